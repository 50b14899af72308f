"""What is counted and when it is divided: every definition behind "0.84 or 0.92?".

    table = np.concatenate([count_pixels(probabilities, masks) for probabilities, masks in batches])
    summarise(table)                         # {"iou": 0.85, "iou_per_image": 0.83, ...}

Metrics are divided once, at the very end, from integer counts per image, class and threshold. So no figure depends on
the batch size of the evaluation.
"""

import numpy as np
import torch

THRESHOLDS = tuple(round(0.5 + 0.05 * k, 2) for k in range(10))  # 0.5, 0.55 ... 0.95
INTERSECTION, PREDICTED, TRUE, PIXELS = range(4)  # the last axis of a table of counts

DEFINITIONS = {
    "iou": "pooled IoU: foreground at threshold 0.5; intersection and union are summed over all images, then divided",
    "dice": "pooled Dice: 2 intersection / (predicted + true) of the same sums",
    "iou_per_image": "mean of the images' IoU; an image with no foreground in either mask scores 1",
    "dice_per_image": "mean of the images' Dice; an image with no foreground in either mask scores 1",
    "iou_per_batch": "IoU within batches of 16 images in split order, averaged by batch size (pytorch-nested-unet)",
    "miou": "two-class mIoU: mean of background and foreground IoU, pooled, threshold 0.5",
    "miou_ten": "ten-threshold mIoU: two-class mIoU averaged over 0.5, 0.55 ... 0.95 (the U-Net++ authors' Keras code)",
}


def count_pixels(probabilities, masks, thresholds=THRESHOLDS):
    """Intersection, predicted, true and all pixels of each image, class and threshold.

    probabilities: (N, C, H, W) float in [0, 1]; masks: (N, C, H, W) of 0 and 1. Foreground is a probability above the
    threshold. Returns an int64 tensor (N, C, len(thresholds), 4) on the same device. ValueError when the shapes differ.
    """
    _check_shapes(probabilities, masks)
    true = masks.flatten(2) > 0.5  # (N, C, P)
    probabilities = probabilities.flatten(2)
    pixels = torch.full(true.shape[:2], true.shape[-1], device=true.device)
    counts = []
    for threshold in thresholds:
        predicted = probabilities > threshold
        counts.append(torch.stack([(predicted & true).sum(-1), predicted.sum(-1), true.sum(-1), pixels], dim=-1))
    return torch.stack(counts, dim=2)


def _check_shapes(output, masks):
    """Broadcasting would count something, and it would be wrong."""
    if output.shape != masks.shape:
        raise ValueError(f"output {tuple(output.shape)} and masks {tuple(masks.shape)} differ in shape")


def _ratio(numerator, denominator):
    """numerator / denominator, and 1 where both are 0: nothing to find and nothing found."""
    return np.where(denominator == 0, 1.0, numerator / np.maximum(denominator, 1))


def iou(counts):
    """Foreground IoU of counts (..., 4) -> (...)."""
    union = counts[..., PREDICTED] + counts[..., TRUE] - counts[..., INTERSECTION]
    return _ratio(counts[..., INTERSECTION], union)


def dice(counts):
    """Foreground Dice of counts (..., 4) -> (...)."""
    return _ratio(2 * counts[..., INTERSECTION], counts[..., PREDICTED] + counts[..., TRUE])


def two_class_iou(counts):
    """Mean of background and foreground IoU of counts (..., 4) -> (...)."""
    missed_or_false = counts[..., PREDICTED] + counts[..., TRUE] - 2 * counts[..., INTERSECTION]
    both_background = counts[..., PIXELS] - missed_or_false - counts[..., INTERSECTION]
    return (iou(counts) + _ratio(both_background, both_background + missed_or_false)) / 2


def per_class(table, batch_size=16):
    """A table of counts (images, classes, thresholds, 4) -> {metric: (classes,) array}; keys as in DEFINITIONS.

    thresholds[0] must be 0.5; `miou_ten` needs all of THRESHOLDS and is left out with fewer.
    """
    at_half = table[:, :, 0]  # (images, classes, 4)
    pooled = table.sum(0)  # (classes, thresholds, 4)
    batches = [at_half[start : start + batch_size] for start in range(0, len(at_half), batch_size)]
    result = {
        "iou": iou(pooled[:, 0]),
        "dice": dice(pooled[:, 0]),
        "iou_per_image": iou(at_half).mean(0),
        "dice_per_image": dice(at_half).mean(0),
        "iou_per_batch": np.average([iou(b.sum(0)) for b in batches], axis=0, weights=[len(b) for b in batches]),
        "miou": two_class_iou(pooled[:, 0]),
    }
    if table.shape[2] == len(THRESHOLDS):
        result["miou_ten"] = two_class_iou(pooled).mean(-1)
    return result


def summarise(table, batch_size=16):
    """A table of counts -> {metric: float}, the mean over classes; keys as in DEFINITIONS."""
    return {name: float(values.mean()) for name, values in per_class(table, batch_size).items()}


def bootstrap_interval(table, metric=iou, resamples=10_000, level=0.95, seed=0):
    """Percentile interval of the pooled, class-averaged `metric` when images are drawn with replacement -> (low, high).

    Efron 1979. It covers the choice of images, not the differences between trainings. table: see per_class.
    """
    at_half = table[:, :, 0]
    rng = np.random.default_rng(seed)
    # (resamples, images): how often each image is drawn; pooled counts are then one matrix product
    draws = rng.multinomial(len(at_half), np.full(len(at_half), 1 / len(at_half)), size=resamples)
    pooled = np.einsum("ri,ick->rck", draws, at_half, optimize=True)
    tail = (1 - level) / 2
    low, high = np.quantile(metric(pooled).mean(-1), [tail, 1 - tail])
    return float(low), float(high)


def iou_score(output, target, smooth=1e-5):
    """IoU of one batch, pooled over its pixels: logits and masks of any equal shape -> float.

    Foreground is a probability (a mask value) above 0.5; `smooth` makes two empty masks 1.
    """
    predicted, true = torch.as_tensor(output) > 0, torch.as_tensor(target) > 0.5  # logit > 0 is probability > 0.5
    _check_shapes(predicted, true)
    intersection, union = (predicted & true).sum().item(), (predicted | true).sum().item()
    return (intersection + smooth) / (union + smooth)


def dice_coef(output, target, smooth=1e-5):
    """Soft Dice of one batch, pooled over its pixels, without a threshold: logits and masks of equal shape -> float."""
    probabilities, true = torch.as_tensor(output).double().sigmoid(), torch.as_tensor(target).double()
    _check_shapes(probabilities, true)
    overlap = (probabilities * true).sum().item()
    return (2 * overlap + smooth) / (probabilities.sum().item() + true.sum().item() + smooth)
