"""Rows of RESULTS.md, judged again from runs of train.py: one of several seeds, or one for each run.

python -m tools.results run_s0 run_s1 run_s2          # one row: mean and standard deviation over the runs
python -m tools.results --each run_s0 other           # a row a run
python -m tools.results run_s0 --worst docs/worst.png # the validation images that cost most pixels

A row is of each run's own validation images and deepest head: last epoch, best epoch (picked on the same images), the
other definitions of the last epoch, and the minutes that log.csv counts. The 95 % interval is a bootstrap over images
of the seeds' pooled IoU together.
"""

import argparse
import statistics
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

import train
from archs import EightWays
from common import report
from common.cli import Parser, parse_options, run_script
from common.devices import keep_memory, pick_amp, pick_device
from common.files import read_yaml
from common.runs import run_folder
from dataset import build_dataset, make_loader
from losses import LOSSES
from metrics import INTERSECTION, PREDICTED, THRESHOLDS, TRUE, bootstrap_interval, iou, summarise
from val import Predictions, evaluate, load_trained, panels_of, read_config

OTHERS = {"dice": "Dice", "iou_per_image": "IoU/image", "iou_per_batch": "IoU/batch16", "miou": "mIoU",
          "miou_ten": "mIoU10"}  # fmt: skip
SHOWN, SIDE = 12, 96  # images of --worst, and pixels of each


def build_parser():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", metavar="NAME", help="runs: models/<NAME>")
    parser.add_argument("--each", action="store_true", help="a row for each run instead of one of all")
    parser.add_argument("--tta", action="store_true", help="judge the mean over the eight flips and rotations")
    parser.add_argument("--head", help="L1, L2, L3, L4 or mean; default: the deepest")
    parser.add_argument("--worst", type=Path, metavar="FILE", help="draw the images with most wrong pixels instead")
    return parser


def command(config):
    """The command that makes such a run: the options that differ from train.py's defaults."""
    parser, leave_out = train.build_parser(), {*train.ABOUT_THE_COMMAND, *train.FREE_ON_RESUME}
    resolved = {"channels_last", *(["amp"] if config["amp"] != "off" else [])}  # of the machine; auto everywhere
    defaults = {key: default for key, default in vars(parser.parse_args([])).items() if key not in leave_out | resolved}
    if missing := sorted(defaults.keys() - config.keys()):
        raise ValueError(f"models/{config['name']} is of an earlier train.py, without --{', --'.join(missing)}")
    given = [f"--{key} {config[key]}" for key, default in defaults.items() if config[key] != default]
    return " ".join(["python train.py", *given])


def judge(name, which, options):
    """A run's validation images, by its best or last epoch -> table of counts, Dataset, {id: predicted mask}."""
    device = pick_device()
    model, config = load_trained(name, device, which)
    heads = model.head_names + ["mean"] * (len(model.head_names) > 1)
    head = options.head or model.head_names[-1]
    if head not in heads:
        raise ValueError(f"models/{name} has no head {head}, only {', '.join(heads)}")
    dataset = build_dataset(config, read_yaml(Path("models") / name / "split.yml")["val"])
    dataset.check()
    model = EightWays(model.folded()) if options.tta else model.folded()
    criterion, predictions = LOSSES[config["loss"]](), Predictions(head)
    judging = {"amp": pick_amp("auto", device), "thresholds": THRESHOLDS, "on_batch": predictions}
    found = evaluate(model, make_loader(dataset, 16), criterion, device, **judging)
    return found["tables"][head], dataset, predictions.masks


def row(names, options):
    """The cells of one row: runs that differ in their seed alone."""
    ids = [read_yaml(run_folder(name) / "split.yml")["val"] for name in names]
    if any(of_run != ids[0] for of_run in ids):
        raise ValueError(f"{', '.join(names)} have other validation images than one another; give --each")
    last, best = ([judge(name, which, options)[0] for name in names] for which in ("last", "best"))
    logs = [pd.read_csv(Path("models") / name / "log.csv") for name in names]
    scores = [summarise(table) for table in last]

    def mean(values):
        values = list(values)
        spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        return f"{statistics.fmean(values):.4f}{spread}"

    low, high = bootstrap_interval(sum(last))
    return [
        str(len(names)),
        str(len(logs[0])),
        f"{statistics.fmean(log.seconds.sum() for log in logs) / 60:.0f}",
        f"{mean(score['iou'] for score in scores)} ({low:.3f} to {high:.3f})",
        mean(summarise(table)["iou"] for table in best),
        *(mean(score[key] for score in scores) for key in OTHERS),
    ]


def draw_worst(name, options, path):
    """Columns of the images that cost most wrong pixels: image, truth, prediction, errors."""
    table, dataset, predicted = judge(name, "last", options)
    counts = table[:, :, 0].sum(1)
    wrong = counts[:, PREDICTED] + counts[:, TRUE] - 2 * counts[:, INTERSECTION]
    columns, captions = [], []
    for k in np.argsort(-wrong)[:SHOWN]:
        image, truth = dataset.arrays(k)
        _, *others = panels_of(image, truth.transpose(2, 0, 1) > 0, predicted[dataset.img_ids[k]])
        columns.append([report.brighten(image), *(picture for _, picture in others)])
        captions.append(f"{dataset.img_ids[k][:8]} {iou(counts[k]):.2f}")
    half = len(columns) // 2
    rows = [list(part) for of_half in (columns[:half], columns[half:]) for part in zip(*of_half, strict=True)]
    none = [[]] * 3
    report.contact_sheet(rows, path, captions=[captions[:half], *none, captions[half:], *none], size=SIDE)
    Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)  # a third of the bytes
    print(f"{path}: {wrong[np.argsort(-wrong)[:SHOWN]].sum() / wrong.sum():.0%} of all wrong pixels")


def main():
    options, _ = parse_options(build_parser)
    keep_memory()
    torch.set_grad_enabled(False)
    if options.worst and len(options.names) > 1:
        raise ValueError("--worst is of one run")
    if options.worst:
        draw_worst(options.names[0], options, options.worst)
        return
    heads = ["run", "seeds", "epochs", "minutes", "IoU, last epoch (95 %)", "IoU, best epoch", *OTHERS.values()]
    print(f"| {' | '.join([*heads, 'command'])} |\n|{'---|' * (len(heads) + 1)}")
    for names in [[name] for name in options.names] if options.each else [options.names]:
        config = read_config(run_folder(names[0]))
        of_run = command(config)
        print(f"| {' | '.join([names[0], *row(names, options), f'`{of_run}`'])} |", flush=True)


if __name__ == "__main__":
    run_script(main)
