"""What differs between trainings: how a batch is laid out, what its loss is, and what is counted to score it.

    run = Run(model, Segmentation(criterion), optimizer, scheduler, device, epochs=80)    # engine.py

A task has
    score: the name of its score
    to_device(batch, device, amp) -> inputs, truth
    loss(output, truth) -> scalar
    count(output, truth, own, training) -> counts of the first `own` images, a tensor that adds up over batches and
        processes
    score_of(sum of counts) -> float
    drawn(output, truth) -> (rows, caption) of the first image, for common.board: rows of pictures, (H, W) or (H, W, 3)
        uint8, that show what is true and what the output says
"""

from typing import NamedTuple

import torch

from archs import as_heads
from common.devices import to_device
from common.report import mask_picture
from instances import DEFAULTS, judge, nuclei, official_scores
from losses import mean_over_heads
from metrics import count_pixels, summarise


class Segmentation:
    """Batches are images (N, C, H, W) float32, masks (N, K, H, W) of 0 and 1, and info. The score is pooled IoU.

    criterion: one of losses.LOSSES, averaged over the heads with `head_weights`. The score is that of the deepest
    head at a probability of 0.5.
    """

    score = "iou"

    def __init__(self, criterion, head_weights=None):
        self.criterion, self.head_weights = criterion, head_weights

    def to_device(self, batch, device, amp):
        images, masks, _ = batch
        return images.to(device, non_blocking=True), masks.to(device, non_blocking=True)

    def loss(self, output, masks):
        return mean_over_heads(self.criterion, as_heads(output), masks, self.head_weights)

    def count(self, output, masks, own, training):
        """Pixel counts of the images together, (K, 1, 4)."""
        probabilities = torch.sigmoid(as_heads(output)[-1][:own].float())
        return count_pixels(probabilities, masks[:own], thresholds=(0.5,)).sum(0)

    def score_of(self, counts):
        return summarise(counts[None].numpy())["iou"]

    def drawn(self, output, masks):
        """One row: the true and the predicted mask."""
        pair = masks[0] > 0.5, torch.sigmoid(as_heads(output)[-1][0].float()) > 0.5
        return [[mask_picture(mask.cpu().numpy()) for mask in pair]], ""


class Truth(NamedTuple):
    """What is true of a batch of crops."""

    maps: torch.Tensor  # (N, 3, H, W) float32 in [0, 1], as in instances.MAPS, on the device
    labels: torch.Tensor  # (N, H, W) int32 label maps, on the CPU


class Instances:
    """Batches are those of nuclei/crops.py. The score is the official one of the Data Science Bowl, of the crops.

    criterion: losses.MapsLoss, averaged over the heads with `head_weights`. thresholds: of instances.nuclei. The score
    is that of the deepest head; in training, since the watershed takes time, of only the first crop of each batch.
    """

    score = "official"

    def __init__(self, criterion, head_weights=None, thresholds=DEFAULTS):
        self.criterion, self.head_weights, self.thresholds = criterion, head_weights, thresholds

    def to_device(self, batch, device, amp):
        images, maps, info = batch
        return images.to(device, non_blocking=True), Truth(maps.to(device, non_blocking=True), info["labels"])

    def loss(self, output, truth):
        return mean_over_heads(self.criterion, as_heads(output), truth.maps, self.head_weights)

    def count(self, output, truth, own, training):
        """(sum of the scores, number of them), float64."""
        judged = min(own, 1) if training else own
        maps = torch.sigmoid(as_heads(output)[-1][:judged].float()).cpu().numpy()
        total = 0.0
        for of_image, labels in zip(maps, truth.labels[:judged].numpy(), strict=True):
            total += official_scores([judge(nuclei(of_image, **self.thresholds), labels)])[0]
        return torch.tensor([total, judged], dtype=torch.float64)

    def score_of(self, counts):
        total, number = counts.tolist()
        return total / number

    def drawn(self, output, truth):
        """Two rows, true and predicted: mask, contact and distance."""
        pair = truth.maps[0], torch.sigmoid(as_heads(output)[-1][0].float())
        return [list((255 * maps).round().byte().cpu().numpy()) for maps in pair], ""


class Classification:
    """Batches are images (N, 3, H, W), or features (N, D), and labels (N,) int64. The score is accuracy.

    classes: their names, for `drawn`.
    """

    score = "acc"

    def __init__(self, criterion, classes=()):
        self.criterion, self.classes = criterion, classes

    def to_device(self, batch, device, amp):
        images, labels = batch
        return to_device(images, device, amp), labels.to(device, non_blocking=True)

    def loss(self, logits, labels):
        return self.criterion(logits.float(), labels)

    def count(self, logits, labels, own, training):
        """(right, all) of the images."""
        right = (logits[:own].argmax(1) == labels[:own]).sum()
        return torch.stack([right, torch.full_like(right, own)])

    def score_of(self, counts):
        right, total = counts.tolist()
        return right / total

    def drawn(self, logits, labels):
        """No row, but a caption: the predicted class, its probability, and the true class."""
        probability, answer = logits[0].float().softmax(0).max(0)
        return [[]], f"predicted {self.classes[answer]} ({probability:.2f}), true class {self.classes[labels[0]]}"
