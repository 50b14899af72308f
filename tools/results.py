"""Print rows of docs/RESULTS.md, evaluated again from runs of train.py: one row for several seeds, or one per run.

python -m tools.results run_s0 run_s1 run_s2          # one row: mean and standard deviation over the runs
python -m tools.results --each run_s0 other           # one row per run
python -m tools.results run_s0 --worst docs/worst.png # draw the validation images with most wrong pixels

A row shows the deepest head on each run's own validation images: the last epoch, the best epoch (chosen on the same
images), the other definitions for the last epoch, and the minutes of training in log.csv. The 95 % interval is a
bootstrap over images of the pooled IoU of all seeds together.
"""

import statistics
from pathlib import Path

from common.cli import Parser, answer_early, parse_options, run_script


def build_parser():
    parser = Parser(description=__doc__)
    a = parser.add_argument
    a("names", nargs="+", metavar="NAME", help="runs: models/<NAME>")
    a("--each", action="store_true", help="print one row per run instead of one for all")
    a("--tta", action="store_true", help="average over eight flips and rotations")
    a("--head", help="L1, L2, L3, L4 or mean; default: the deepest")
    a("--worst", type=Path, metavar="FILE", help="draw the images with most wrong pixels instead")
    return parser


answer_early(__name__, build_parser)  # the imports below take seconds

import numpy as np
import pandas as pd
from PIL import Image

import train
import val
from common import report
from common.devices import keep_memory
from common.files import read_yaml
from common.runs import run_folder
from dataset import build_dataset, make_loader
from evaluation import panels_of
from inference import Predictor
from metrics import INTERSECTION, PREDICTED, TRUE, bootstrap_interval, iou, summarise
from run_config import check_of_masks, kept_epoch, read_config

OTHERS = {  # definitions beside the pooled IoU, and their headings
    "dice": "Dice",
    "iou_per_image": "IoU/image",
    "iou_per_batch": "IoU/batch16",
    "miou": "mIoU",
    "miou_ten": "mIoU10",
}
SHOWN, SIDE = 12, 96  # images of --worst, and pixels of each


def command(config):
    """The command that trains such a run again: the options that differ from train.py's defaults."""
    left_out = {*train.ABOUT_THE_COMMAND, *train.FREE_ON_RESUME, "channels_last"}
    if config["amp"] != "off":
        left_out.add("amp")  # auto found it on the machine of the run, as it found channels_last
    defaults = {key: value for key, value in vars(train.build_parser().parse_args([])).items() if key not in left_out}
    given = [f"--{key} {config[key]}" for key, default in defaults.items() if config[key] != default]
    return " ".join(["python train.py", *given])


def judge(name, which, options):
    """Evaluate the best or last epoch of a run on its validation images.

    Returns the pixel counts of the chosen head, int64 (images, classes, thresholds, 4), the Dataset, and the predicted
    masks, {id: (classes, H, W) bool}.
    """
    predictor = Predictor(name, level=None, which=which, tta=options.tta)
    head = options.head or predictor.model.head_names[-1]
    if head not in predictor.head_names:
        raise ValueError(f"models/{name} has no head {head}, only {', '.join(predictor.head_names)}")
    dataset = build_dataset(predictor.config, read_yaml(run_folder(name) / "split.yml")["val"])
    dataset.check()
    predictions = val.Predictions(head)
    tables = val.judge(predictor, make_loader(dataset, 16), on_batch=predictions)
    return tables[head], dataset, predictions.masks


def row(names, options):
    """The cells of one row. names: runs that differ in their seeds only."""
    ids = [read_yaml(run_folder(name) / "split.yml")["val"] for name in names]
    if any(of_run != ids[0] for of_run in ids):
        raise ValueError(f"{', '.join(names)} differ in their validation images; give --each for one row per run")
    last = [judge(name, "last", options)[0] for name in names]
    kept = [name for name in names if kept_epoch(read_config(run_folder(name))) == "best epoch"]
    best = [judge(name, "best", options)[0] for name in kept]
    logs = [pd.read_csv(run_folder(name) / "log.csv") for name in names]
    scores = [summarise(table) for table in last]
    low, high = bootstrap_interval(sum(last))
    return [
        str(len(names)),
        str(len(logs[0])),
        f"{statistics.fmean(log.seconds.sum() for log in logs) / 60:.0f}",
        f"{mean_and_spread([score['iou'] for score in scores])} ({low:.3f} to {high:.3f})",
        mean_and_spread([summarise(table)["iou"] for table in best]) if best else "not kept",
        *(mean_and_spread([score[key] for score in scores]) for key in OTHERS),
    ]


def mean_and_spread(values):
    """[0.84, 0.85] -> "0.8450 ± 0.0071": the mean and, of several values, their sample standard deviation."""
    mean = f"{statistics.fmean(values):.4f}"
    return f"{mean} ± {statistics.stdev(values):.4f}" if len(values) > 1 else mean


def draw_worst(name, options, path):
    """A sheet of the images with most wrong pixels; below each its truth, its prediction and the errors."""
    table, dataset, predicted = judge(name, "last", options)
    counts = table[:, :, 0].sum(1)  # (images, 4) at a probability of 0.5
    wrong = counts[:, PREDICTED] + counts[:, TRUE] - 2 * counts[:, INTERSECTION]
    worst = np.argsort(-wrong)[:SHOWN]
    columns, captions = [], []
    for k in worst:
        image, truth = dataset.arrays(k)
        img_id = dataset.img_ids[k]
        panels = panels_of(image, truth.transpose(2, 0, 1) > 0, predicted[img_id])
        columns.append([report.brighten(image), *(picture for _, picture in panels[1:])])
        captions.append(f"{img_id[:8]} {iou(counts[k]):.2f}")
    half = len(columns) // 2
    rows = [list(part) for of_half in (columns[:half], columns[half:]) for part in zip(*of_half, strict=True)]
    none = [[]] * 3  # only the images have captions
    report.contact_sheet(rows, path, captions=[captions[:half], *none, captions[half:], *none], size=SIDE)
    Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)  # a third of the bytes
    print(f"{path}: {wrong[worst].sum() / wrong.sum():.0%} of all wrong pixels")


def main():
    options, _ = parse_options(build_parser)
    keep_memory()
    for name in options.names:
        check_of_masks(read_config(run_folder(name)), name, "tools.results")
    if options.worst and len(options.names) > 1:
        raise ValueError(f"--worst draws one run, found {len(options.names)}")
    if options.worst:
        draw_worst(options.names[0], options, options.worst)
        return
    headings = ["run", "seeds", "epochs", "minutes", "IoU, last epoch (95 %)", "IoU, best epoch", *OTHERS.values()]
    headings.append("command")
    print(f"| {' | '.join(headings)} |\n|{'---|' * len(headings)}")
    for names in [[name] for name in options.names] if options.each else [options.names]:
        of_run = command(read_config(run_folder(names[0])))
        print(f"| {' | '.join([names[0], *row(names, options), f'`{of_run}`'])} |", flush=True)


if __name__ == "__main__":
    run_script(main)
