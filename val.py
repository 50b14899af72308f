"""Evaluate a trained run: every definition of IoU and Dice, masks, a table of the images and a report.

python val.py --name run1
python val.py --name run1 --dataset other_nuclei    # all images of another data set
python val.py --name run1 --split my_split.yml      # the `test:` ids of a split of your own
python val.py --name run1 --levels                  # and what a pruned model would cost and give
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

import levels
from archs import ARCHS, DEPTH, EightWays, as_heads, build_model, probabilities
from common import report
from common.cli import Parser, number, parse_options, run_script
from common.devices import device_name, keep_memory, pick_amp, pick_device
from common.distributed import gather, launched
from common.files import atomic_path, load_checkpoint, read_yaml
from common.images import write_png
from common.runs import newest_run, run_folder
from dataset import GROUPED, build_dataset, changes, check_places, check_split, list_ids, make_loader, name_ids
from losses import LOSSES, mean_over_heads
from metrics import (
    DEFINITIONS,
    INTERSECTION,
    PREDICTED,
    THRESHOLDS,
    TRUE,
    PixelCounts,
    bootstrap_interval,
    dice,
    iou,
    per_class,
    summarise,
)

HEADINGS = {  # of the printed table; the definitions follow it
    "iou": "IoU",
    "dice": "Dice",
    "iou_per_image": "IoU/image",
    "dice_per_image": "Dice/image",
    "iou_per_batch": "IoU/batch16",
    "miou": "mIoU",
    "miou_ten": "mIoU10",
}
NEEDED = {  # what config.yml must hold for the run to be rebuilt: of what type, or which of these whole numbers
    **dict.fromkeys(("arch", "dataset", "img_ext", "mask_ext", "loss"), str),
    **{"num_classes": range(1, 101), "input_channels": (1, 3, 4), "width": range(1, 1025)},
    **{"input_h": range(1, 4097), "input_w": range(1, 4097), "seed": range(2**32)},
    **{"deep_supervision": bool, "mean": list, "std": list},
}
SHOWN = 12  # images in each group of the report's gallery
LEVELS_CUT = range(1, DEPTH + 1)  # what `level` may be in the config.yml of a run that export.py cut
LEVELS = (*map(str, LEVELS_CUT), "mean")  # what --level takes


def build_parser():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a = parser.add_argument
    a("--name", help="models/<name>; default: the newest run")
    a("--dataset", help="evaluate all images of this folder of inputs/ (default: the run's validation images)")
    a("--split", help="evaluate the `test:` ids of this split.yml")
    a("-b", "--batch_size", type=number(int, 1), default=16, help="default 16; only the speed depends on it")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--level", choices=LEVELS, help="prune to this head; mean: judge the average of all heads")
    group.add_argument("--levels", action="store_true", help="measure each level: accuracy, time, memory, parameters")
    a("--tta", action="store_true", help="judge the mean over the eight flips and rotations: eight times the work")
    a("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps; default auto")
    a("--amp", choices=("auto", "off", "bf16", "fp16"), default="auto", help="mixed precision; default auto")
    a("--num_workers", type=number(int, 0, 1024), default=0, help="loader processes; default 0")
    return parser


# ---------------------------------------------------------------- a trained run


def read_config(folder):
    """The config.yml of a run; ValueError when it describes no run of train.py."""
    if not (folder / "config.yml").is_file():
        known = ", ".join(sorted(path.parent.name for path in folder.parent.glob("*/config.yml"))) or "none"
        raise FileNotFoundError(f"{folder}/config.yml: no such file; the runs are: {known}")
    config = read_yaml(folder / "config.yml")
    if missing := [key for key in NEEDED if key not in config]:
        raise ValueError(f"{folder}/config.yml is of no run of train.py: {', '.join(missing)} missing")
    wrong = [key for key, expected in NEEDED.items() if not _is(config[key], expected)]
    wrong += [
        key for key, names in (("arch", ARCHS), ("loss", LOSSES)) if key not in wrong and config[key] not in names
    ]
    wrong += [key for key in ("mean", "std") if key not in wrong and not are_channels(config, key)]
    wrong += ["channels_last"] * (not isinstance(config.get("channels_last", False), bool))
    levels = LEVELS_CUT if config["deep_supervision"] is True else (DEPTH,)
    wrong += ["level"] * ("level" in config and not _is(config["level"], levels))
    wrong += ["scale"] * ("scale" in config and not (_is_number(config["scale"]) and config["scale"] > 0))
    if wrong:
        wrong = ", ".join(f"{key} {config[key]!r}" for key in wrong)
        raise ValueError(f"{folder}/config.yml: {wrong} is nothing that train.py writes")
    try:
        check_places(config)
    except ValueError as error:
        raise ValueError(f"{folder}/config.yml: {error}") from None
    return config


def _is(value, expected):
    return type(value) is expected if isinstance(expected, type) else type(value) is int and value in expected


def _is_number(value):
    return type(value) in (int, float) and abs(value) < 1e6  # neither NaN nor infinity is


def are_channels(config, key):
    """Is config's `mean` or `std` a number a channel, and the standard deviations above 0?"""
    values = config.get(key)
    fits = isinstance(values, list) and len(values) == config["input_channels"] and all(map(_is_number, values))
    return fits and (key == "mean" or min(values) > 0)


def load_trained(name, device, which="best", level=None):
    """The model of models/<name>, built from its config.yml alone, in eval mode, and the config.

    which: "best" takes model.pth, "last" the weights of last.pth that a validation would have judged (the averaged
    ones when averaging was on). level: "1" ... "4" prunes to that head alone, "deepest" to the deepest there is, "mean"
    keeps all heads (`probabilities` averages them), None keeps what was trained. ValueError when deep supervision would
    have been needed, or the run was cut to another level (export.py --run).
    """
    folder = run_folder(name)
    config = read_config(folder)
    if "level" in config and level not in (None, "deepest", str(config["level"])):
        raise ValueError(f"{folder} was cut to level {config['level']} and has no other: leave --level out")
    if level not in (None, "deepest", str(DEPTH)) and not config["deep_supervision"]:
        raise ValueError(
            f"{folder} has level {DEPTH} alone, not {level}: it was trained without --deep_supervision True, and only "
            f"X^{{0,{DEPTH}}} has a head"
        )
    path = folder / ("model.pth" if which == "best" else "last.pth")
    state = load_checkpoint(path)
    with torch.device("meta"):  # no memory is taken for what a stranger's config.yml asks, before the shapes are right
        model = build_model(config)
        model = model.prune(config["level"]) if "level" in config and config["deep_supervision"] else model
    try:
        model.to_empty(device="cpu")
        if which == "last":
            average = {k.removeprefix("module."): v for k, v in state.get("ema", {}).items() if k != "n_averaged"}
            state = average or state["model"]
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError, KeyError):
        raise ValueError(
            f"{path} does not hold the weights of the {config['arch']} that config.yml describes"
        ) from None
    if not all(torch.isfinite(value).all() for value in model.state_dict().values()):
        raise ValueError(f"{path} holds weights that are not finite; the training diverged, or the file was changed")
    if level not in (None, "mean"):
        model = model.prune(model.levels[-1] if level == "deepest" else int(level))
    model = model.to(device).eval()
    return (model.to(memory_format=torch.channels_last) if config.get("channels_last") else model), config


@torch.inference_mode()
def evaluate(model, loader, criterion, device, *, amp=None, weights=None, thresholds=(0.5,), on_batch=None, label=None):
    """Loss and pixel counts of every head over all images of a loader, of all processes where torchrun started several.

    amp: the autocast dtype, or None for float32. weights: of the heads' losses, or None. on_batch(img_ids, {head:
    probabilities}, masks) sees every batch of this process; label: of a progress bar, or None. Returns {"loss": the
    criterion, mean over heads and images, "tables": {head: int64 (images, classes, thresholds, 4)}} with the model's
    head_names, the deepest last, and, for more than one head, "mean", the mean of their probabilities.
    """
    model.eval()
    counts, losses = {}, []
    for images, masks, info in tqdm(loader, desc=label, leave=False, disable=None if label else True):
        images, masks = images.to(device, non_blocking=True), masks.to(device, non_blocking=True)
        with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
            heads = as_heads(model(images))
        losses.append(mean_over_heads(criterion, heads, masks, weights) * len(images))
        of_head = {name: probabilities(head) for name, head in zip(model.head_names, heads, strict=True)}
        if len(heads) > 1:
            of_head["mean"] = probabilities(heads)
        for name, values in of_head.items():
            counts.setdefault(name, PixelCounts(thresholds)).update(values, masks)
        if on_batch:
            on_batch(info["img_id"], of_head, masks)
    losses = torch.stack(losses).tolist() if losses else []  # under torchrun there may be more processes than batches
    found = gather((losses, {name: count.table() for name, count in counts.items()}))
    parts = [part for part in found if part[0]]  # put together they are in the images' order
    tables = {name: np.concatenate([of_part[name] for _, of_part in parts]) for name in parts[0][1]}
    loss = torch.tensor([value for of_part, _ in parts for value in of_part]).sum().item()
    return {"loss": loss / len(tables[model.head_names[-1]]), "tables": tables}


# ---------------------------------------------------------------- what to evaluate


def chosen_images(options, config, folder):
    """-> Dataset of the run's validation images, of another data set, or of a split's test ids; and what to call it.

    Third, the content of the run's split.yml where its validation images were chosen, else {}.
    """
    name = options.dataset or config["dataset"]
    root = Path("inputs") / name
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
        raise ValueError(f"{root / 'images'} lacks {len(missing)} of {len(ids)} {part}: {name_ids(missing)}")
    dataset = build_dataset({**config, "dataset": name}, ids)
    found = dataset.check()
    if run_split and (said := changes(run_split, there, {"val": found}, config.get("split") in (None, GROUPED))):
        print(f"val.py: warning: {root} is not what {folder} was trained on: {'; '.join(said)}", file=sys.stderr)
    if name == config["dataset"] and not run_split and (folder / "split.yml").is_file():
        trained = set(read_yaml(folder / "split.yml").get("train", ()))
        if seen := [img_id for img_id in ids if img_id in trained]:
            about = f"{len(seen)} of {len(ids)} {part} were trained on by {folder}"
            print(f"val.py: warning: {about}: {name_ids(seen, 3)}", file=sys.stderr)
    return dataset, f"{name}, {part}", run_split


def iou_by_twins(img_ids, table, split):
    """One line: pooled IoU of the images with and without a twin in training, as split.yml lists them; or None."""
    of_way = split.get("twins") or {}
    twins = {img_id for pairs in of_way.values() for img_id in pairs}
    has_twin = np.array([img_id in twins for img_id in img_ids])
    if has_twin.all() or not has_twin.any():
        return None
    with_twin, without = (summarise(table[mask])["iou"] for mask in (has_twin, ~has_twin))
    return (
        f"IoU of the {has_twin.sum()} images with a look-alike in training {with_twin:.4f}, of the "
        f"{(~has_twin).sum()} others {without:.4f}"
    )


# ---------------------------------------------------------------- results


class Predictions:
    """Collects the thresholded masks of one head as `evaluate` goes, and writes each as <folder>/<class>/<id>.png."""

    def __init__(self, head):
        self.head, self.masks = head, {}

    def __call__(self, img_ids, probabilities, masks):
        predicted = (probabilities[self.head] > THRESHOLDS[0]).cpu().numpy()
        self.masks.update(zip(img_ids, predicted, strict=True))  # (classes, H, W) bool

    def write(self, folder):
        """Replace the folders 0, 1 ... of `folder`, and nothing else there, once all masks are written."""
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".masks_") as temporary:
            for img_id, planes in self.masks.items():
                for k, plane in enumerate(planes):
                    path = Path(temporary) / str(k) / f"{img_id}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_png(path, plane.astype(np.uint8) * 255)
            for old in [path for path in folder.glob("[0-9]*") if path.name.isdigit()]:
                shutil.rmtree(old)
            for new in Path(temporary).iterdir():
                new.rename(folder / new.name)


def rows_of_heads(tables):
    """-> [{"head": "L1", "iou": ..., ...}, ...], the mean over classes of every metric."""
    return [{"head": head, **summarise(table)} for head, table in tables.items()]


def rows_of_images(img_ids, table):
    """-> a row an image at threshold 0.5: IoU and Dice, the mean over classes, and each class's pixel counts."""
    at_half = table[:, :, 0]  # (images, classes, 4)
    rows = []
    for img_id, counts in zip(img_ids, at_half, strict=True):
        row = {"img_id": img_id, "iou": float(iou(counts).mean()), "dice": float(dice(counts).mean())}
        for k, of_class in enumerate(counts):
            numbers = {"predicted": of_class[PREDICTED], "true": of_class[TRUE], "intersection": of_class[INTERSECTION]}
            row |= {f"{key}_{k}": int(value) for key, value in numbers.items()}
        rows.append(row)
    return rows


def print_table(rows, columns):
    """columns: {key of a row: heading}; the first to the left, the others to the right, each as wide as it must be."""
    lines = [list(columns.values())]
    for row in rows:
        values = [row.get(key, "") for key in columns]
        lines.append([f"{value:.4f}" if isinstance(value, float) else str(value) for value in values])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *others in lines:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *cells]))


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
        image, truth, img_id = *dataset.arrays(k), rows[k]["img_id"]
        truth, prediction = truth.transpose(2, 0, 1) > 0, masks[img_id]
        panels = panels_of(image, truth, prediction)
        values = {"IoU": rows[k]["iou"], "Dice": rows[k]["dice"], "foreground": float(truth.mean())}
        items.append({"title": img_id, "panels": panels, "values": values, "group": group_of[k]})
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


def compare_levels(model, loader, tables, device, amp, output):
    """Measure and print what each level costs and gives, draw levels.png -> (heading, html) of the report's section."""
    images = next(iter(loader))[0].to(device)
    rows = levels.rows_of_levels(levels.measure(model, images, device, amp), tables)
    columns, sentence = {**levels.COST_COLUMNS, **HEADINGS, **levels.PAPER_COLUMNS}, levels.sufficient(rows)[1]
    about = levels.NOTE.format(batch=len(images), device=device_name(device))
    print(f"\nlevels: {about}")
    print_table(levels.with_text(rows), columns)
    print(sentence)
    output.mkdir(parents=True, exist_ok=True)
    levels.draw(rows, output / "levels.png")
    picture = report.picture(report.file_uri(output / "levels.png"), "IoU, time, parameters and memory of each level")
    words = report.paragraph(sentence) + report.paragraph(about)
    return "Levels", picture + words + report.table(levels.with_text(rows), columns)


def write_report(path, config, what, headline, by_epoch, by_class, items, curves, more=()):
    """The self-contained page: headline, all definitions, curves, `more` sections, gallery, configuration."""
    columns = {"head": "head", **HEADINGS}
    metrics = "".join(report.table(rows, columns, caption=epoch) for epoch, rows in by_epoch.items())
    if len(by_class) > 1:
        metrics += report.table(by_class, {"class": "class", **HEADINGS}, caption="each class, best epoch")
    legends = report.legend()
    if len(by_class) > 1:
        colours = report.legend([f"class {row['class']}" for row in by_class])
        legends = report.paragraph("Truth and prediction:") + colours + report.paragraph("Errors:") + legends
    defined = [{"metric": HEADINGS[key], "definition": text} for key, text in DEFINITIONS.items()]
    sections = [
        ("Summary", report.summary(headline)),
        ("Metrics", metrics + report.table(defined)),
        *more,
        ("Images", legends + report.gallery(items, ("IoU", "Dice", "foreground"))),
        ("Configuration", report.table([{"option": k, "value": str(v)} for k, v in config.items()])),
    ]
    if curves.is_file():
        sections.insert(
            2, ("Training", report.picture(report.file_uri(curves), "Loss, IoU and learning rate by epoch"))
        )
    report.write_page(path, f"{config['name']}: {config['arch']}", sections, subtitle=what)


def main():
    options, _ = parse_options(build_parser)
    if launched() > 1:
        raise ValueError("val.py evaluates in one process; start it without torchrun: python val.py")
    name = options.name or newest_run("arch")
    folder, output = run_folder(name), Path("outputs") / name
    keep_memory()
    device = pick_device(options.device)
    amp = pick_amp(options.amp, device)
    level = "mean" if options.levels else options.level
    model, config = load_trained(name, device, level=level)
    if options.tta and options.levels:
        raise ValueError("--levels measures single passes; leave --tta out, or judge one level with --level")
    fast = EightWays(model.folded()) if options.tta else model.folded()
    head = "mean" if options.level == "mean" else model.head_names[-1]  # the one that is judged
    criterion = LOSSES[config["loss"]]()
    dataset, what, run_split = chosen_images(options, config, folder)
    loader = make_loader(dataset, options.batch_size, num_workers=options.num_workers)
    print(
        f"{folder}: {what}, {len(dataset)} images, {str(amp or 'float32').removeprefix('torch.')}"
        + ", mean over eight flips and rotations" * options.tta
    )

    predictions = Predictions(head)
    judging = {"amp": amp, "thresholds": THRESHOLDS, "label": name}
    found = evaluate(fast, loader, criterion, device, on_batch=predictions, **judging)
    by_epoch = {"best epoch (model.pth)": rows_of_heads(found["tables"])}
    if (folder / "last.pth").is_file():
        last, _ = load_trained(name, device, "last", level)
        last = EightWays(last.folded()) if options.tta else last.folded()
        of_last = evaluate(last, loader, criterion, device, **judging)
        by_epoch["last epoch (last.pth)"] = rows_of_heads(of_last["tables"])
    table = found["tables"][head]
    classes = per_class(table)
    by_class = [{"class": str(k), **{key: float(v[k]) for key, v in classes.items()}} for k in range(table.shape[1])]
    rows = rows_of_images(dataset.img_ids, table)

    for epoch, heads in by_epoch.items():
        print(f"\n{epoch}")
        print_table(heads, {"head": "head", **HEADINGS})
    if len(by_class) > 1:
        print(f"\neach class, {head}, best epoch")
        print_table(by_class, {"class": "class", **HEADINGS})
    print()
    for key, text in DEFINITIONS.items():
        print(f"{HEADINGS[key]:<12}{text}")
    scores, (low, high) = summarise(table), bootstrap_interval(table)
    print(f"\nIoU {scores['iou']:.4f} ({low:.4f} to {high:.4f}, 95 % bootstrap over images), Dice {scores['dice']:.4f}")
    if said := iou_by_twins(dataset.img_ids, table, run_split):
        print(said)
    more = [compare_levels(model, loader, found["tables"], device, amp, output)] if options.levels else []

    predictions.write(output)
    with atomic_path(output / "metrics.csv") as temporary:
        pd.DataFrame(rows).to_csv(temporary, index=False)
    headline = [
        ("IoU", f"{scores['iou']:.4f}", f"pooled, {head}, best epoch; 95 % {low:.4f} to {high:.4f} over images"),
        ("Dice", f"{scores['dice']:.4f}", "pooled"),
        ("mIoU", f"{scores['miou']:.4f}", "foreground and background"),
        ("images", f"{len(dataset)}", what),
    ]
    items = gallery_items(dataset, rows, predictions.masks)
    write_examples(items, output / "examples.png")
    write_report(output / "report.html", config, what, headline, by_epoch, by_class, items, folder / "curves.png", more)
    print(f"masks, metrics.csv and examples.png are in {output}; look at {output / 'report.html'}")


if __name__ == "__main__":
    run_script(main)
