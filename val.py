"""Evaluate a trained run: IoU and Dice by every definition, masks, a table of the images and a report.

python val.py --name run1
python val.py --name run1 --dataset other_nuclei    # all images of another data set
python val.py --name run1 --split my_split.yml      # the `test:` ids of a split of your own
python val.py --name run1 --levels                  # what each pruned model costs and gives
"""

import sys
import tempfile
from pathlib import Path

from common.cli import Parser, add_machine_options, answer_early, data_set, listed, number, parse_options, run_script
from inference import LEVELS

HEADINGS = {  # of the printed tables; the definitions follow them
    "iou": "IoU",
    "dice": "Dice",
    "iou_per_image": "IoU/image",
    "dice_per_image": "Dice/image",
    "iou_per_batch": "IoU/batch16",
    "miou": "mIoU",
    "miou_ten": "mIoU10",
}
SHOWN = 12  # images in each group of the report's gallery


def build_parser():
    parser = Parser(description=__doc__)
    a = parser.add_argument
    a("--name", help="models/<name>; default: the newest run")
    a(
        "--dataset",
        type=data_set,
        help="evaluate all images of this folder of inputs/; default: the run's validation images",
    )
    a("--split", help="evaluate the `test:` ids of this split.yml")
    a("-b", "--batch_size", type=number(int, 1), default=16, help="affects the speed only")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--level", choices=LEVELS, help="prune to this head; mean: judge the average of all heads")
    group.add_argument("--levels", action="store_true", help="measure each level: accuracy, time, memory, parameters")
    a("--tta", action="store_true", help="average the eight flips and turns: eight times the work")
    a("--explain", action="store_true", help="print the definition of each column; the report has them in any case")
    a = add_machine_options(parser).add_argument
    a("--num_workers", type=number(int, 0, 1024), default=0, help="loader processes")
    return parser


answer_early(__name__, build_parser)  # the imports below take seconds

import numpy as np
import pandas as pd
from tqdm import tqdm

import levels
from common import report
from common.devices import device_name, keep_memory, precision_name
from common.distributed import launched
from common.files import atomic_path, read_yaml
from common.images import write_png
from common.runs import run_folder
from data_folder import check_layout, classes_of, list_ids
from dataset import GROUPED, build_dataset, changes, check_split, make_loader
from inference import Predictor
from metrics import (
    DEFINITIONS,
    INTERSECTION,
    PREDICTED,
    THRESHOLDS,
    TRUE,
    bootstrap_interval,
    count_pixels,
    dice,
    iou,
    per_class,
    summarise,
)

# ---------------------------------------------------------------- what to evaluate


def check_classes(config, name, folder):
    """ValueError when the data set has other classes than the run in `folder`; FileNotFoundError for missing files."""
    root, count = Path("inputs") / name, config["num_classes"]
    found = len(classes_of(root))
    if name != config["dataset"] and found not in (0, count):
        raise ValueError(f"{root / 'masks'} has {found} class folder(s), but {folder} predicts {count} class(es)")
    check_layout({**config, "dataset": name})


def chosen_images(options, config, folder):
    """-> Dataset of the run's validation images, of another data set, or of a split's test ids; and what to call it.

    Third, the content of the run's split.yml when its validation images were chosen, else {}.
    """
    name = options.dataset or config["dataset"]
    root = Path("inputs") / name
    check_classes(config, name, folder)
    run_split = read_yaml(folder / "split.yml") if not (options.dataset or options.split) else {}
    if options.split:
        ids, part = check_split(read_yaml(options.split), options.split).get("test"), f"test ids of {options.split}"
        if not ids:
            raise ValueError(f"{options.split} has no `test:` ids; list the ids to evaluate there")
    elif options.dataset:
        ids, part = list_ids(root / "images", config["img_ext"]), "images of the folder"
    else:
        ids, part = check_split(run_split, folder / "split.yml")["val"], "validation images of the run"
    there = list_ids(root / "images", config["img_ext"])
    if missing := sorted(set(ids) - set(there)):
        raise ValueError(f"{root / 'images'} lacks {len(missing)} of {len(ids)} {part}: {listed(missing, 20)}")
    dataset = build_dataset({**config, "dataset": name}, ids)
    found = dataset.check()
    if run_split and (said := changes(run_split, there, {"val": found}, config.get("split") in (None, GROUPED))):
        print(f"val.py: warning: {root} is not what {folder} was trained on: {'; '.join(said)}", file=sys.stderr)
    if name == config["dataset"] and not run_split and (folder / "split.yml").is_file():
        trained = set(read_yaml(folder / "split.yml").get("train", ()))
        if seen := [img_id for img_id in ids if img_id in trained]:
            about = f"{len(seen)} of {len(ids)} {part} were trained on by {folder}"
            print(f"val.py: warning: {about}: {listed(seen, 3)}", file=sys.stderr)
    return dataset, f"{name}, {part}", run_split


def output_folder(options, name):
    """outputs/<name> for the run's own validation images, a folder inside it for those of --dataset and --split."""
    inner = []
    if options.dataset:
        inner.append("dataset_" + "_".join(Path(options.dataset).parts))
    if options.split:
        inner.append(f"split_{Path(options.split).stem}")
    return Path("outputs", name, *inner)


def judge(predictor, loader, label=None, on_batch=None):
    """Pixel counts of every image of a loader -> {head: int64 (images, classes, thresholds, 4)}.

    on_batch(img_ids, {head: probabilities}) sees every batch; label: of a progress bar, or None.
    """
    tables = {name: [] for name in predictor.head_names}
    for images, masks, info in tqdm(loader, label, unit="batch", leave=False, disable=None if label else True):
        masks = masks.to(predictor.device, non_blocking=True)
        of_head = predictor.of_heads(images)
        for name, probabilities in of_head.items():
            tables[name].append(count_pixels(probabilities, masks).cpu().numpy())
        if on_batch:
            on_batch(info["img_id"], of_head)
    return {name: np.concatenate(of_batches) for name, of_batches in tables.items()}


class Predictions:
    """Collects the thresholded masks of one head as `judge` goes, and writes each as <folder>/<class>/<id>.png."""

    def __init__(self, head):
        self.head, self.masks = head, {}

    def __call__(self, img_ids, of_head):
        predicted = (of_head[self.head] > THRESHOLDS[0]).cpu().numpy()
        self.masks.update(zip(img_ids, predicted, strict=True))  # (classes, H, W) bool

    def write(self, folder):
        """Replace the masks of the same images, once all are written; nothing else in `folder` changes."""
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".masks_") as temporary:
            written = []
            for img_id, planes in self.masks.items():
                for k, plane in enumerate(planes):
                    path = Path(temporary) / str(k) / f"{img_id}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_png(path, plane.astype(np.uint8) * 255)
                    written.append(path)
            for path in written:
                (folder / path.parent.name).mkdir(exist_ok=True)
                path.replace(folder / path.parent.name / path.name)


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


def iou_by_twins(img_ids, table, split):
    """[One line]: pooled IoU of the images with and without a twin in training, as split.yml lists them; or []."""
    of_way = split.get("twins") or {}
    twins = {img_id for pairs in of_way.values() for img_id in pairs}
    has_twin = np.array([img_id in twins for img_id in img_ids])
    if has_twin.all() or not has_twin.any():
        return []
    with_twin, without = (summarise(table[mask])["iou"] for mask in (has_twin, ~has_twin))
    about = f"IoU {with_twin:.4f} on the {has_twin.sum()} images with a look-alike in training"
    return [f"{about}, {without:.4f} on the {(~has_twin).sum()} others"]


def print_table(rows, columns):
    """columns: {key of a row: heading}; the first is left-aligned, the others right-aligned."""
    lines = [list(columns.values())]
    for row in rows:
        values = [row.get(key, "") for key in columns]
        lines.append([f"{value:.4f}" if isinstance(value, float) else str(value) for value in values])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *others in lines:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *cells]))


def print_results(by_epoch, by_class, head, explain):
    """The tables of heads and classes and, with `explain`, what each column means."""
    for epoch, heads in by_epoch.items():
        print(f"\n{epoch}")
        print_table(heads, {"head": "head", **HEADINGS})
    if len(by_class) > 1:
        print(f"\neach class, {head}, best epoch")
        print_table(by_class, {"class": "class", **HEADINGS})
    print()
    if explain:
        for key, text in DEFINITIONS.items():
            print(f"{HEADINGS[key]:<12}{text}")
    else:
        print("--explain says how each column is defined")


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
    order = sorted(range(len(rows)), key=lambda k: (rows[k]["iou"], rows[k]["img_id"]))
    shown = min(SHOWN, -(-len(order) // 3))
    middle = (len(order) - shown) // 2
    groups = {"best": order[-shown:], "median": order[middle : middle + shown], "worst": order[:shown]}
    group_of = {k: group for group, members in groups.items() for k in members}  # on a tiny set the worst win
    items = []
    for k in sorted(group_of, key=order.index):
        image, truth = dataset.arrays(k)
        truth = truth.transpose(2, 0, 1) > 0
        values = {"IoU": rows[k]["iou"], "Dice": rows[k]["dice"], "foreground": float(truth.mean())}
        panels = panels_of(image, truth, masks[rows[k]["img_id"]])
        items.append({"title": rows[k]["img_id"], "panels": panels, "values": values, "group": group_of[k]})
    return items


def write_examples(items, path, each=2):
    """One picture: columns of the worst, median and best images, with truth, prediction and errors below."""
    chosen = []
    for group in ("worst", "median", "best"):
        members = [item for item in items if item["group"] == group]
        chosen += members[:each] if group == "worst" else members[-each:]
    columns = [[array for _, array in item["panels"]] for item in chosen]
    heads = [f"{item['group']}: IoU {item['values']['IoU']:.2f}" for item in chosen]
    rows = [list(row) for row in zip(*columns, strict=True)]
    rows[0] = [report.brighten(image) for image in rows[0]]
    report.contact_sheet(rows, path, captions=heads, size=192)


def compare_levels(predictor, loader, tables, dataset, output):
    """Measure and print what each level costs and gives, draw levels.png -> (heading, html) of the report's section.

    dataset: its name; on the nuclei of the paper the table has the paper's figures, too.
    """
    images = next(iter(loader))[0].to(predictor.device)
    measured = levels.measure(predictor.trained, images, predictor.device, predictor.amp)
    rows, columns = levels.rows_of_levels(measured, tables), {**levels.COST_COLUMNS, **HEADINGS}
    sentence = levels.sufficient(rows)[1]
    about = levels.NOTE.format(batch=len(images), device=device_name(predictor.device))
    if dataset.startswith(levels.PAPER_DATA) and not predictor.trained.encoder:  # the paper has no such network
        columns.update(levels.PAPER_COLUMNS)
        about += f" {levels.PAPER_NOTE}"
    print(f"\nlevels: {about}")
    print_table(levels.with_text(rows), columns)
    print(sentence)
    output.mkdir(parents=True, exist_ok=True)
    levels.draw(rows, output / "levels.png")
    picture = report.picture(report.file_uri(output / "levels.png"), "IoU, time, parameters and memory of each level")
    words = report.paragraph(sentence) + report.paragraph(about)
    return "Levels", picture + words + report.table(levels.with_text(rows), columns)


def write_report(path, config, what, headline, remarks, by_epoch, by_class, items, curves, more=()):
    """The self-contained page: headline, remarks, all definitions, curves, `more` sections, gallery, configuration."""
    columns = {"head": "head", **HEADINGS}
    metrics = [report.table(rows, columns, caption=epoch) for epoch, rows in by_epoch.items()]
    legends = [report.legend()]
    if len(by_class) > 1:
        metrics.append(report.table(by_class, {"class": "class", **HEADINGS}, caption="each class, best epoch"))
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
        ("Configuration", report.table([{"option": key, "value": str(value)} for key, value in config.items()])),
    ]
    report.write_page(path, f"{config['name']}: {config['arch']}", sections, subtitle=what)


# ---------------------------------------------------------------- main


def main():
    options, _ = parse_options(build_parser)
    if launched() > 1:
        raise ValueError("val.py evaluates in one process; start it without torchrun: python val.py")
    if options.tta and options.levels:
        raise ValueError("--levels measures single passes; leave --tta out, or judge one level with --level")
    keep_memory()
    level = "mean" if options.levels else options.level
    predictor = Predictor(options.name, options.device, options.amp, level, tta=options.tta)
    name, config, head = predictor.name, predictor.config, predictor.model.head_names[-1]
    if options.level == "mean":
        head = "mean"
    folder, output = run_folder(name), output_folder(options, name)
    dataset, what, run_split = chosen_images(options, config, folder)
    loader = make_loader(dataset, options.batch_size, num_workers=options.num_workers)
    averaged = ", mean over eight flips and turns" if options.tta else ""
    print(f"{folder}: {what}, {len(dataset)} images, {precision_name(predictor.amp)}{averaged}")

    predictions = Predictions(head)
    tables = judge(predictor, loader, name, predictions)
    by_epoch = {"best epoch (model.pth)": rows_of_heads(tables)}
    if (folder / "last.pth").is_file():
        last = Predictor(name, options.device, options.amp, level, "last", options.tta)
        by_epoch["last epoch (last.pth)"] = rows_of_heads(judge(last, loader, name))
    table = tables[head]
    by_class, rows = rows_of_classes(table), rows_of_images(dataset.img_ids, table)

    scores, (low, high) = summarise(table), bootstrap_interval(table)
    print(f"IoU {scores['iou']:.4f} ({low:.4f} to {high:.4f}, 95 % bootstrap over images), Dice {scores['dice']:.4f}")
    remarks = iou_by_twins(dataset.img_ids, table, run_split)
    for remark in remarks:
        print(remark)
    print_results(by_epoch, by_class, head, options.explain)
    more = []
    if options.levels:
        more.append(compare_levels(predictor, loader, tables, options.dataset or config["dataset"], output))

    predictions.write(output)
    with atomic_path(output / "metrics.csv") as temporary:
        pd.DataFrame(rows).to_csv(temporary, index=False)
    items = gallery_items(dataset, rows, predictions.masks)
    write_examples(items, output / "examples.png")
    headline = [
        ("IoU", f"{scores['iou']:.4f}", f"pooled, {head}, best epoch; 95 % {low:.4f} to {high:.4f} over images"),
        ("Dice", f"{scores['dice']:.4f}", "pooled"),
        ("mIoU", f"{scores['miou']:.4f}", "foreground and background"),
        ("images", f"{len(dataset)}", what),
    ]
    page, curves = output / "report.html", folder / "curves.png"
    write_report(page, config, what, headline, remarks, by_epoch, by_class, items, curves, more)
    print(f"masks, metrics.csv and examples.png are in {output}; open {page}")


if __name__ == "__main__":
    run_script(main)
