"""Evaluate a trained run: every definition of IoU and Dice, masks, a table of the images and a report.

python val.py --name run1
python val.py --name run1 --dataset other_nuclei          # all images of another data set
python val.py --name run1 --split split.yml               # the `test:` ids of a split of your own
"""


import torch

from archs import as_heads, head_names
from losses import mean_over_heads
from metrics import PixelCounts


@torch.inference_mode()
def evaluate(model, loader, criterion, device, *, amp=None, thresholds=(0.5,), on_batch=None, progress=None):
    """Loss and pixel counts of every head over all images of a loader.

    amp: the autocast dtype, or None for float32. on_batch(img_ids, {head: probabilities}, masks) sees every batch.
    progress: wraps the loader (tqdm). Returns {"loss": the training criterion, mean over images, "tables": {head:
    int64 (images, classes, thresholds, 4)}} with the heads L1 ... L4, L4 always the deepest, and, for more than one
    head, "mean", the mean of their probabilities.
    """
    model.eval()
    counts, losses, images_seen = {}, [], 0
    for images, masks, info in progress(loader) if progress else loader:
        images, masks = images.to(device, non_blocking=True), masks.to(device, non_blocking=True)
        with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
            heads = as_heads(model(images))
        losses.append(mean_over_heads(criterion, heads, masks) * len(images))
        images_seen += len(images)
        probabilities = {
            name: torch.sigmoid(head.float()) for name, head in zip(head_names(len(heads)), heads, strict=True)
        }
        if len(heads) > 1:
            probabilities["mean"] = torch.stack(list(probabilities.values())).mean(0)
        for name, values in probabilities.items():
            counts.setdefault(name, PixelCounts(thresholds)).update(values, masks)
        if on_batch:
            on_batch(info["img_id"], probabilities, masks)
    return {"loss": torch.stack(losses).sum().item() / images_seen, "tables": {n: c.table() for n, c in counts.items()}}
