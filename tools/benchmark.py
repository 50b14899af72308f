"""Measure the numbers of docs/SPEED.md on this machine: a table in Markdown, each row compared with the plain way.

python -m tools.benchmark                                # everything, in a few minutes
python -m tools.benchmark --only inference --rounds 9    # a part of it
python -m tools.benchmark --only transfer                # time per epoch: a plain tutorial loop and ours
python -m tools.benchmark --only peers                   # U-Net++ with an encoder: segmentation_models_pytorch and ours

To compare with another commit: `git worktree add ../before COMMIT`, then run the same command in both folders.

The plain way is our own network with every fast setting off: float32, contiguous tensors, PyTorch's own gradient of
upsampling, batch norms not folded, files decoded in each epoch, memory as the C library returns it. The fast way is
what train.py, val.py and predict.py choose automatically. Each way runs in a process of its own, and the processes take
turns. A time is the median of the rounds; one more round comes first, to warm up.
"""

import datetime
import importlib.util
import json
import math
import os
import re
import sys
import tempfile
from pathlib import Path

from common.cli import Parser, number, parse_options, run_script
from common.files import atomic_path
from data_folder import INPUTS
from tools.steps import BATCH, SIDE
from tools.workers import in_turns, workers

LEVELS = (4, 3, 2, 1)
PACKAGES = ("torch", "numpy", "opencv-python-headless", "albumentations", "onnxruntime")
PEERS = ("timm", "segmentation-models-pytorch")
NAMES = {"off": "float32", "bf16": "bfloat16", "fp16": "float16"}  # of the values of --amp


def build_parser():
    parser = Parser(description=__doc__)
    a = parser.add_argument
    a("--only", choices=sorted(BENCHMARKS), nargs="+", help="which to measure; default: all")
    a("--rounds", type=number(int, 1), default=5, help="how often each step is timed")
    a("--clock", choices=("wall", "cpu"), default="wall", help="cpu: processor time, for a machine that others use too")
    a("--threads", type=number(int, 1, 1024), default=default_threads(), help="threads per process")
    a("--dataset", default="dsb2018_96", help="loading: a folder in inputs/")
    raw = "inputs/data-science-bowl-2018/stage1_train.zip"
    a("--raw", default=raw, help="preprocess: a folder or zip of raw images")
    a("--data_dir", default="inputs/hymenoptera_data", help="transfer: a folder with {train,val}/<class>/")
    a("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    a("--json", type=Path, metavar="FILE", help="also write the rows to this file")
    return parser


def default_threads():
    """OMP_NUM_THREADS where it is set, else the number of cores."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdecimal() and int(asked) else os.cpu_count()


# ---------------------------------------------------------------- rows


def row(what, seconds, plain=None, **more):
    """A line of the table: seconds, and their ratio to the plain way's."""
    return {"what": what, "seconds": seconds, "of_plain": seconds / plain if plain else None, **more}


def measured(options, tasks, plain):
    """Time workers in turns -> a row for each, with its share of the time and memory of the one named `plain`."""
    with workers(options, tasks) as started:
        median = in_turns(started, options.rounds)
        peaks = {name: worker.close() for name, worker in started.items()}
    rows = []
    for name, seconds in median.items():
        line = row(name, seconds, median[plain], bytes=peaks[name])
        if peaks[name] and peaks[plain]:
            line["memory_of_plain"] = peaks[name] / peaks[plain]
        rows.append({**line, **started[name].about})
    return rows


# Each takes the options and what the earlier ones found, which it may add to, and returns rows.


def limit(options, found):
    with workers(options, {"limit": {"kind": "limit"}}) as started:
        worker, answers = started["limit"], []
        for _ in range(options.rounds):
            worker()
            answers.append(worker.result)
    rows, found["limits"] = [], {}
    for precision, rates in answers[0].items():
        best = {what: max(answer[precision][what] for answer in answers) for what in rates}
        found["limits"][precision] = max(best.values())
        for what, rate in best.items():
            rows.append({"what": f"{what}, {NAMES[precision]}", "gflop_per_second": rate})
    return rows


def training(options, found):
    plain = "training step, plain"
    tasks = {
        plain: {"kind": "train", "plain": True},
        "training step": {"kind": "train", "plain": False},
        "validation step, plain": {"kind": "evaluate", "plain": True},
        "validation step": {"kind": "evaluate", "plain": False},
    }
    rows = measured(options, tasks, plain)
    found["training_step"] = next(line["seconds"] for line in rows if line["what"] == "training step")
    return rows


def peers(options, found):
    """A training step with an encoder, beside that of segmentation_models_pytorch's U-Net++ with the same encoder."""
    if missing := [name for name in PEERS if importlib.util.find_spec(name.replace("-", "_")) is None]:
        said = f"not installed: {', '.join(missing)}; pip install {' '.join(missing)}"
        if options.only == ["peers"]:
            raise ValueError(said)
        print(f"no peers rows: {said}", file=sys.stderr)
        return []
    encoder = ["--encoder", "efficientnet_lite0", "--encoder_weights", "none"]
    task = {"kind": "train", "plain": False, "words": encoder}
    smp = "training step, efficientnet_lite0, segmentation_models_pytorch"
    tasks = {
        smp: {**task, "peer": True},
        "training step, efficientnet_lite0": task,
        "training step, efficientnet_lite0, --width 16": {**task, "words": [*encoder, "--width", "16"]},
        "training step, efficientnet_lite0, --stem half": {**task, "words": [*encoder, "--stem", "half"]},
        "training step, no encoder": {"kind": "train", "plain": False},
    }
    return measured(options, tasks, smp)


def inference(options, found):
    plain = "inference L4, plain"
    tasks = {plain: {"kind": "inference", "plain": True, "level": 4}}
    for level in LEVELS:
        tasks[f"inference L{level}"] = {"kind": "inference", "plain": False, "level": level}
    with tempfile.TemporaryDirectory() as folder:
        from export import PACKAGES as ONNX_PACKAGES  # late: it takes a second

        if all(importlib.util.find_spec(package) for package in ONNX_PACKAGES):
            with workers(options, {"files": {"kind": "write_onnx", "folder": folder}}):
                pass  # they are written once the worker is ready
            for kind in ("float32", "int8"):
                file = str(Path(folder) / f"{kind}.onnx")
                tasks[f"inference L4, ONNX Runtime, {kind}"] = {"kind": "onnx", "file": file}
        return measured(options, tasks, plain)


def has_data(path, name, options):
    """Whether the data of the rows `name` are there; FileNotFoundError when these rows alone were asked for."""
    if Path(path).exists():
        return True
    if options.only == [name]:
        raise FileNotFoundError(f"{path}: no such file or folder; the {name} rows time what is in it")
    print(f"no {name} rows: {path} does not exist", file=sys.stderr)
    return False


def loading(options, found):
    if not has_data(INPUTS / options.dataset, "loading", options):
        return []
    plain = "an epoch's batches, plain"
    tasks = {plain: {"kind": "loading", "plain": True}, "an epoch's batches": {"kind": "loading", "plain": False}}
    rows = measured(options, tasks, plain)
    if "training_step" in found:  # loader processes work beside the training, which then waits for less
        _, line = rows
        training_seconds = math.ceil(line["images"] / BATCH) * found["training_step"]
        line["share_of_epoch"] = line["seconds"] / (line["seconds"] + training_seconds)
    return rows


def preprocess(options, found):
    if not has_data(options.raw, "preprocess", options):
        return []
    plain = "preprocessing, one thread"
    tasks = {
        plain: {"kind": "preprocess", "plain": True, "raw": options.raw},
        "preprocessing": {"kind": "preprocess", "plain": False, "raw": options.raw},
    }
    return measured(options, tasks, plain)


def transfer(options, found):
    """An epoch, training and validation, of the loop that tutorials show and of transfer_resnet18.py's three ways."""
    if not has_data(options.data_dir, "transfer", options):
        return []
    ours = {"kind": "transfer", "data_dir": options.data_dir}
    plain = "transfer, an epoch, plain tutorial loop"
    tasks = {
        plain: {"kind": "tutorial", "data_dir": options.data_dir},
        "transfer, an epoch, everything learns": {**ours, "words": ["--layer_decay", "1"]},
        "transfer, an epoch, layer4 and head learn (default)": {**ours, "words": []},
        "transfer, an epoch, head learns (--freeze)": {**ours, "words": ["--freeze"]},
    }
    return measured(options, tasks, plain)


BENCHMARKS = {
    "limit": limit,
    "training": training,
    "peers": peers,
    "inference": inference,
    "loading": loading,
    "preprocess": preprocess,
    "transfer": transfer,
}


# ---------------------------------------------------------------- the table


def add_fractions(rows, limits):
    """Add to each row what fraction of the machine's limit, in the row's precision, its step reached."""
    for line in rows:
        if line.get("gflop") and line.get("precision") in limits:
            line["of_limit"] = line["gflop"] / line["seconds"] / limits[line["precision"]]


def markdown(rows):
    """The rows as a Markdown table."""
    headings = ["", "time", "of plain", "peak memory", "of plain", "notes"]
    lines = [table_line(headings), "|---" * len(headings) + "|"]
    for line in rows:
        memory = line["bytes"] / 2**20 if line.get("bytes") else None
        cells = [
            line["what"],
            seconds_text(line.get("seconds")),
            text(line.get("of_plain"), "{:.3f}"),
            text(memory, "{:,.0f} MB"),
            text(line.get("memory_of_plain"), "{:.2f}"),
            notes(line),
        ]
        lines.append(table_line(cells))
    return "\n".join(lines)


def table_line(cells):
    return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"


def text(value, form):
    return "" if value is None else form.format(value)


def seconds_text(seconds):
    if seconds is None:
        return ""
    return f"{seconds * 1000:.0f} ms" if seconds < 10 else f"{seconds:.1f} s"


def notes(line):
    parts = []
    if "gflop_per_second" in line:
        parts.append(f"{line['gflop_per_second']:.0f} GFLOP/s")
    if "gflop" in line:
        parts.append(f"{line['gflop']:.1f} GFLOP")
    if "of_limit" in line:
        parts.append(f"{line['of_limit']:.0%} of the limit in {NAMES[line['precision']]}")
    if "images" in line:
        parts.append(f"{line['images']} images")
    if "share_of_epoch" in line:
        parts.append(f"{line['share_of_epoch']:.1%} of a training epoch")
    return ", ".join(parts)


def about_machine(options):
    """Where and with what this was measured."""
    from common.devices import device_name, pick_device, versions

    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "machine": re.sub(r", \d+ threads\)$", ")", device_name(pick_device(options.device))),
        "threads": options.threads,
        "rounds": options.rounds,
        "clock": options.clock,
        "batch": f"{BATCH} x {SIDE} x {SIDE}",
        "data": f"inputs/{options.dataset}",
        "versions": versions((*PACKAGES, *PEERS)),
    }


def print_table(rows, about):
    print(markdown(rows))
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    machine = f"{about['machine']}, {about['threads']} threads"
    print(f"\n{machine}; batches of {about['batch']}; {about['data']}; {versions};")
    print(f"medians of {about['rounds']} rounds in turns, {about['clock']} time; {about['date']}")


def main():
    options, _ = parse_options(build_parser)
    if options.json and not options.json.parent.is_dir():
        raise FileNotFoundError(f"{options.json.parent}: no such folder to write {options.json.name} in")
    rows, found = [], {}
    for name, benchmark in BENCHMARKS.items():
        if not options.only or name in options.only:
            rows += benchmark(options, found)
    add_fractions(rows, found.get("limits", {}))
    about = about_machine(options)
    print_table(rows, about)
    if options.json:
        with atomic_path(options.json) as temporary:
            temporary.write_text(json.dumps({**about, "rows": rows}, indent=1), encoding="utf-8")
        print(f"the rows are in {options.json}")


if __name__ == "__main__":
    run_script(main)
