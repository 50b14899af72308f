"""What val.py writes about masks: the masks themselves, tables, a gallery of images and the report.

    predictions.write(Path("outputs/run1"))
    rows = rows_of_images(img_ids, tables["L4"])               # one dict per image, for metrics.csv
    items = gallery_items(dataset, rows, predictions.masks)    # worst, median and best images, for report.gallery

A table is int64 (images, classes, thresholds, 4), the pixel counts of metrics.count_pixels for one head.
nuclei/evaluation.py writes about individual nuclei.
"""

import numpy as np

from common import report
from common.images import write_png
from common.lookalikes import kind
from metrics import DEFINITIONS, INTERSECTION, PREDICTED, THRESHOLDS, TRUE, dice, iou, per_class, summarise
from run_config import kept_epoch

HEADINGS = {  # of the printed tables; the definitions follow them
    "iou": "IoU",
    "dice": "Dice",
    "iou_per_image": "IoU/image",
    "dice_per_image": "Dice/image",
    "iou_per_batch": "IoU/batch16",
    "miou": "mIoU",
    "miou_ten": "mIoU10",
}


class Predictions:
    """Collects the thresholded masks of one head as `judge` goes, and writes each as <folder>/<class>/<id>.png."""

    def __init__(self, head):
        self.head, self.masks = head, {}

    def __call__(self, img_ids, of_head):
        predicted = (of_head[self.head] > THRESHOLDS[0]).cpu().numpy()
        self.masks.update(zip(img_ids, predicted, strict=True))  # (classes, H, W) bool

    def write(self, folder):
        """<folder>/<class>/<id>.png, 0 and 255."""
        for img_id, planes in self.masks.items():
            for k, plane in enumerate(planes):
                (folder / str(k)).mkdir(exist_ok=True)
                write_png(folder / str(k) / f"{img_id}.png", plane.astype(np.uint8) * 255)


# ---------------------------------------------------------------- tables


def rows_of_heads(tables):
    """-> [{"head": "L1", "iou": ..., ...}, ...], the mean over classes of every metric."""
    return [{"head": head, **summarise(table)} for head, table in tables.items()]


def rows_of_classes(table):
    """-> [{"class": "0", "iou": ..., ...}, ...] of one head's table."""
    of_metric = per_class(table)
    return [
        {"class": str(k), **{key: float(values[k]) for key, values in of_metric.items()}} for k in range(table.shape[1])
    ]


def rows_of_images(img_ids, table):
    """-> one row per image at threshold 0.5: IoU and Dice, the mean over classes, and each class's pixel counts."""
    at_half = table[:, :, 0]  # (images, classes, 4)
    rows = []
    for img_id, counts in zip(img_ids, at_half, strict=True):
        row = {"img_id": img_id, "iou": float(iou(counts).mean()), "dice": float(dice(counts).mean())}
        for k, of_class in enumerate(counts):
            row[f"predicted_{k}"] = int(of_class[PREDICTED])
            row[f"true_{k}"] = int(of_class[TRUE])
            row[f"intersection_{k}"] = int(of_class[INTERSECTION])
        rows.append(row)
    return rows


def scores_by_twins(img_ids, split, name, score):
    """[One line]: a score of the images with and without a twin in training, as split.yml lists them; [] without any.

    name: what the line calls the score. score: (images,) bool, which images count -> float.
    """
    of_way = split.get("twins") or {}
    twins = {img_id for pairs in of_way.values() for img_id in pairs}
    has_twin = np.array([img_id in twins for img_id in img_ids])
    if not has_twin.any():
        return []
    if has_twin.all():
        return [f"each of the {len(has_twin)} images has a look-alike in training"]
    about = f"{name} {score(has_twin):.4f} on the {has_twin.sum()} images with a look-alike in training"
    return [f"{about}, {score(~has_twin):.4f} on the {(~has_twin).sum()} others"]


# ---------------------------------------------------------------- pictures and the report


def panels_of(image, truth, prediction):
    """image (H, W, C) uint8, truth and prediction (classes, H, W) bool -> [(heading, picture), ...], four of them."""
    return [
        ("image", image),
        ("truth", report.mask_picture(truth)),
        ("prediction", report.mask_picture(prediction)),
        ("errors", report.label_overlay(report.brighten(image), truth, prediction)),
    ]


def gallery_items(dataset, rows, masks):
    """The images with the lowest, middle and highest IoU, for report.gallery."""
    groups = report.worst_to_best([(row["iou"], row["img_id"]) for row in rows])
    items = []
    for k, group in groups.items():
        image, truth = dataset.arrays(k)
        truth = truth.transpose(2, 0, 1) > 0
        values = {"IoU": rows[k]["iou"], "Dice": rows[k]["dice"], "foreground": float(truth.mean())}
        panels = panels_of(image, truth, masks[rows[k]["img_id"]])
        tags = [kind(image)]
        items.append({"title": rows[k]["img_id"], "panels": panels, "values": values, "group": group, "tags": tags})
    return items


def write_examples(items, path):
    """One picture: the two worst, median and best images, with truth, prediction and errors below each."""
    chosen = []
    for group in ("worst", "median", "best"):
        members = [item for item in items if item["group"] == group]
        chosen += members[:2] if group == "worst" else members[-2:]
    columns = [[array for _, array in item["panels"]] for item in chosen]
    heads = [f"{item['group']}: IoU {item['values']['IoU']:.2f}" for item in chosen]
    rows = [list(row) for row in zip(*columns, strict=True)]
    rows[0] = [report.brighten(image) for image in rows[0]]
    report.contact_sheet(rows, path, captions=heads, size=192)


def write_report(path, config, what, headline, remarks, by_epoch, by_class, items, curves, more=()):
    """The self-contained page: headline, remarks, all definitions, curves, `more` sections, gallery, configuration."""
    columns = {"head": "head", **HEADINGS}
    metrics = [report.table(rows, columns, caption=epoch) for epoch, rows in by_epoch.items()]
    legends = [report.legend()]
    if len(by_class) > 1:
        caption = f"each class, {kept_epoch(config)}"
        metrics.append(report.table(by_class, {"class": "class", **HEADINGS}, caption=caption))
        colours = report.legend([f"class {row['class']}" for row in by_class])
        legends = [report.paragraph("Truth and prediction:"), colours, report.paragraph("Errors:"), *legends]
    metrics.append(report.table([{"metric": HEADINGS[key], "definition": text} for key, text in DEFINITIONS.items()]))
    summary = report.summary(headline) + "".join(map(report.paragraph, remarks))
    sections = [("Summary", summary), ("Metrics", "".join(metrics))]
    if curves.is_file():
        picture = report.picture(report.file_uri(curves), "Loss, IoU and learning rate by epoch")
        sections.append(("Training", picture))
    sections += [
        *more,
        ("Images", "".join(legends) + report.gallery(items, ("IoU", "Dice", "foreground"))),
        ("Configuration", report.options(config)),
    ]
    report.write_page(path, f"{config['name']}: {config['arch']}", sections, subtitle=what)
