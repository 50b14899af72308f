"""The numbers of the README, measured again on this machine: a table in Markdown, each row beside the plain way.

python -m tools.benchmark                                # everything, in a few minutes
python -m tools.benchmark --only inference --rounds 9    # some of it
python -m tools.benchmark --only transfer                # seconds an epoch: the plain tutorial loop and ours, in turns

The plain way is our own network with every switch off: float32, contiguous tensors, PyTorch's own upsampling gradient,
batch norms as they are, files decoded each epoch, memory as the C library hands it out. The fast way is what train.py,
val.py and predict.py pick by themselves. Each way runs in a process of its own, which shows its memory, and they take
turns, because a machine changes from minute to minute; a figure is the median of the rounds after a first one.
"""

import argparse
import contextlib
import datetime
import functools
import importlib.metadata
import importlib.util
import io
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common.cli import Parser, number, parse_options, run_script
from common.files import atomic_path

BATCH, SIDE = 16, 96
LEVELS = (4, 3, 2, 1)
GENERATED = 96  # images, where there is no data set
RAW = 48  # raw images that preprocessing is timed on
PACKAGES = ("torch", "numpy", "opencv-python-headless", "albumentations", "onnxruntime", "openvino")


def build_parser():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a = parser.add_argument
    a("--only", choices=sorted(BENCHMARKS), nargs="+", default=list(BENCHMARKS), help="which; default all")
    a("--rounds", type=number(int, 1), default=5, help="times each thing is timed, in turns; default 5")
    a(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: processor time, for a machine that others use, too",
    )
    a("--threads", type=number(int, 1, 1024), default=default_threads(), help="of a process; default %(default)s")
    a("--dataset", default="dsb2018_96", help="loading: a folder of inputs/; generated data where it is not there")
    a("--raw", default="inputs/data-science-bowl-2018/stage1_train", help="preprocess: raw data, or generated")
    a("--data_dir", default="inputs/hymenoptera_data", help="transfer: default inputs/hymenoptera_data")
    a("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps; default auto")
    a("--json", type=Path, metavar="FILE", help="write the rows there, too")
    a("--serve", help=argparse.SUPPRESS)  # what a worker process does, in JSON
    return parser


def default_threads():
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdecimal() and int(asked) else os.cpu_count()


def in_turns(steps, rounds):
    """{name: function} -> {name: median seconds}, in turns, because a machine changes; the first call warms up."""
    seconds = {name: [] for name in steps}
    for lap in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()):
                own = step()  # a worker measures itself
            seconds[name].append(own if isinstance(own, float) else time.perf_counter() - start)
        times = ", ".join(f"{name} {times[-1]:.3g} s" for name, times in seconds.items())
        print(f"round {lap}: {times}", file=sys.stderr, flush=True)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


# ---------------------------------------------------------------- processes that take turns


class Worker:
    """A process that holds one of WORKERS and does its step when called; closing it tells its peak memory."""

    def __init__(self, options, kind, **about):
        place = about.pop("place", None)  # where its inputs/ is
        task = {"kind": kind, "device": options.device, "dataset": options.dataset, "threads": options.threads, **about}
        command = [sys.executable, "-m", "tools.benchmark", "--serve", json.dumps(task)]
        settings = {"OMP_NUM_THREADS": str(options.threads), "PYTHONPATH": str(Path(__file__).parents[1])}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env={**os.environ, **settings}, cwd=place, **pipes)
        self.about = self.answer()  # once it is ready: gflop and the like
        self.clock = "wall" if kind == "preprocess" else options.clock  # more threads, not less work

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            self.process.stdin.close()
            self.process.stdout.close()
            raise ValueError(f"a worker ended with status {self.process.wait()}; its words stand above")
        return json.loads(line)

    def __call__(self):
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        self.found, *clocks = self.answer()
        return dict(zip(("wall", "cpu"), clocks, strict=True))[self.clock]

    def close(self):
        """-> bytes: the most memory of the process, or of its tensors on a GPU; None where that is not known."""
        if not self.process.stdin.closed:
            self.process.stdin.close()
            self.peak = self.answer()
            self.process.wait()
            self.process.stdout.close()
        return self.peak


@contextlib.contextmanager
def workers(options, wanted):
    """{name: (kind, about)} -> {name: Worker}; none is left behind."""
    started = {}
    try:
        for name, (kind, about) in wanted.items():
            started[name] = Worker(options, kind, **about)
        yield started
    finally:
        for worker in started.values():
            if not hasattr(worker, "peak") and not worker.process.stdin.closed:
                worker.process.kill()
                worker.process.communicate()


def serve(task):
    """What a worker process does: build, then a step for each line of standard input, then say its peak memory."""
    answers = sys.stdout
    say = functools.partial(print, file=answers, flush=True)
    with contextlib.redirect_stdout(sys.stderr if os.environ.get("DEBUG") else io.StringIO()):
        step, about = WORKERS[task["kind"]](task)
        say(json.dumps(about))
        for _ in sys.stdin:
            wall, cpu = time.perf_counter(), time.process_time()
            found = step()
            say(json.dumps([found, time.perf_counter() - wall, time.process_time() - cpu]))
        say(json.dumps(peak_memory()))


def peak_memory():
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def waited(device, function):
    """The function, and then what the device still has to do; a GPU answers before it is done."""
    import torch

    def step():
        value = function()
        {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type, lambda: None)()
        return value

    return step


def counted(step):
    """-> GFLOP of the convolutions and matrix products of a step (a multiplication and an addition are two)."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops() / 1e9


class Batches(list):
    """Batches that are there already, as a loader; `dataset` has an entry an image."""

    @property
    def dataset(self):
        return range(sum(len(images) for images, *_ in self))


def one_batch():
    """(BATCH, 3, SIDE, SIDE) float32 and (BATCH, 1, SIDE, SIDE) of 0 and 1: noise, since no time depends on it."""
    import torch

    generator = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH, 3, SIDE, SIDE, generator=generator)
    masks = (torch.rand(BATCH, 1, SIDE, SIDE, generator=generator) < 0.15).float()
    return images, masks, {"img_id": [str(k) for k in range(BATCH)]}


def config_of(task):
    """What train.py makes of its options; the plain way switches off what it picks by itself."""
    import archs
    import train
    from common.devices import keep_memory

    words = ["--arch", "NestedUNet", "--deep_supervision", "True", "--dataset", task["dataset"]]
    words += ["--device", task["device"]]
    if task["plain"]:
        words += ["--amp", "off", "--channels_last", "False", "--cache", "False", "--num_workers", "0"]
        archs.upsample = archs.interpolate
    else:
        keep_memory()
    return train.new_config(parse_options(train.build_parser, words)[0])


def serve_train(task):
    """A step of train_one_epoch, data ready; or, with `validate`, of evaluate as it runs after each epoch."""
    import torch

    import train
    from archs import build_model
    from common.devices import pick_device
    from losses import LOSSES

    config = config_of(task)
    device, criterion = pick_device(config["device"]), LOSSES[config["loss"]]()
    torch.backends.cudnn.benchmark = True
    run, batches = train.Run(config, build_model(config), 1000, device), Batches([one_batch()])
    if task.get("validate"):
        work = functools.partial(train.evaluate, run.judged, batches, criterion, device, amp=run.amp)
    else:
        parts = {"amp": run.amp, "scaler": run.scaler, "step_scheduler": run.scheduler, "ema": run.ema}
        work = functools.partial(train.train_one_epoch, run.model, batches, criterion, run.optimizer, device, **parts)
    step = waited(device, work)
    return lambda: step() and None, {"precision": config["amp"], "gflop": counted(step)}


def serve_inference(task):
    """A batch through the network, pruned to a level: standardised images to probabilities."""
    import torch

    from archs import NestedUNet, probabilities
    from common.devices import keep_memory, pick_amp, pick_device

    device = pick_device(task["device"])
    amp = None if task["plain"] else pick_amp("auto", device)
    model = NestedUNet(deep_supervision=True).eval().prune(task["level"]).to(device)
    if not task["plain"]:
        keep_memory()
        model = model.folded().to(memory_format=torch.channels_last if amp else torch.contiguous_format)
    images = one_batch()[0].to(device)

    @torch.inference_mode()
    def step():
        with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
            probabilities(model(images))

    return waited(device, step), {"precision": "bf16" if amp else "off", "gflop": counted(step)}


def serve_write_onnx(task):
    """The same network as ONNX files in a folder, float32 and int8, calibrated on generated images."""
    import torch

    import export
    from archs import NestedUNet
    from common.images import squeeze
    from common.synthetic import nuclei

    torch.manual_seed(0)
    folder = Path(task["folder"])
    model = NestedUNet(deep_supervision=True).eval().prune(4)
    export.write_onnx(export.Deployed(model, [0.0] * 3, [1.0] * 3), folder / "float32.onnx", 3, {})
    images = [squeeze(nuclei(seed)[0], (SIDE, SIDE)) for seed in range(8)]
    export.quantise(folder / "float32.onnx", folder / "int8.onnx", [export.batch_of(images, (SIDE, SIDE))])
    return None, {}


def serve_onnx(task):
    """An ONNX file in ONNX Runtime or OpenVINO on the CPU: uint8 images to probabilities, without PyTorch."""
    import numpy as np

    images = np.random.default_rng(0).integers(0, 256, (BATCH, SIDE, SIDE, 3), np.uint8)
    if task["runtime"] == "openvino":
        import openvino

        settings = {"INFERENCE_NUM_THREADS": task["threads"], "PERFORMANCE_HINT": "LATENCY"}
        compiled = openvino.Core().compile_model(task["file"], "CPU", settings)
        return lambda: compiled([images]) and None, {}
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = task["threads"]
    session = onnxruntime.InferenceSession(task["file"], settings, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"images": images}) and None, {}


def serve_loading(task):
    """An epoch of batches of the training set, augmented, without a network."""
    import train
    from dataset import set_epoch

    config = config_of(task)
    with contextlib.redirect_stderr(io.StringIO()):
        train_set, _, _ = train.build_data(config, train.chosen_split(config, None))
    loader = train.make_loader(train_set, BATCH, shuffle=True, num_workers=config["num_workers"])
    epochs = iter(range(1, 2**31))

    def step():
        set_epoch(loader, next(epochs))
        for _ in loader:
            pass

    return step, {"images": len(train_set), "workers": config["num_workers"]}


def serve_preprocess(task):
    """Raw images and their instance masks to squares on disk; plain is one thread."""
    import cv2

    import preprocess_dsb2018 as script

    cv2.setNumThreads(1)
    samples, read = script.find_samples(Path(task["raw"]))
    ids = list(samples)[:RAW]

    def step():
        with tempfile.TemporaryDirectory() as folder:
            threads = 1 if task["plain"] else os.cpu_count()
            script.convert(Path(folder), ids, lambda img_id: script.load_raw(samples[img_id], read), SIDE, threads)

    return step, {"images": len(ids)}


def serve_limit(task):
    """GFLOP/s of large matrix products and 3x3 convolutions: the most that this machine gives PyTorch."""
    import torch
    import torch.nn.functional as F

    from common.devices import keep_memory, pick_amp, pick_device

    keep_memory()
    device = pick_device(task["device"])
    last, work = {"memory_format": torch.channels_last}, {}
    clock = time.process_time if task["clock"] == "cpu" else time.perf_counter
    for name, dtype in {"off": torch.float32, "bf16": torch.bfloat16}.items():
        if dtype is torch.bfloat16 and pick_amp("auto", device) is not torch.bfloat16:
            continue
        a, b = torch.randn(2, 2048, 2048, device=device).to(dtype)
        images = torch.randn(16, 256, 48, 48, device=device).to(dtype).to(**last)
        weight = torch.randn(64, 256, 3, 3, device=device).to(dtype).to(**last)
        work[name, "matrix product 2048 x 2048"] = (2 * 2048**3, functools.partial(torch.matmul, a, b))
        convolve = functools.partial(F.conv2d, images, weight, padding=1)
        work[name, "convolution 3x3, 256 to 64 channels, 16 x 48 x 48"] = (2 * 16 * 48**2 * 64 * 256 * 9, convolve)

    @torch.inference_mode()
    def step():
        found = {}
        for (precision, what), (flop, function) in work.items():
            function, seconds = waited(device, function), []
            for _ in range(3):
                start = clock()
                function()
                seconds.append(clock() - start)
            found[f"{precision}|{what}"] = flop / min(seconds) / 1e9
        return found

    return step, {}


WORKERS = {name.removeprefix("serve_"): value for name, value in list(globals().items()) if name.startswith("serve_")}


# ---------------------------------------------------------------- rows


def row(what, seconds, plain=None, **more):
    """A line of the table: seconds, and its ratio to the plain way's."""
    return {"what": what, "seconds": seconds, "of_plain": seconds / plain if plain else None, **more}


def measured(options, wanted, plain):
    """Time workers in turns -> rows, each with its share of the plain one's time and memory."""
    with workers(options, wanted) as started:
        median = in_turns(started, options.rounds)
        peaks = {name: worker.close() for name, worker in started.items()}
        about = {name: worker.about for name, worker in started.items()}
    rows = []
    for name, seconds in median.items():
        of_plain = {"memory_of_plain": peaks[name] / peaks[plain]} if peaks[name] and peaks[plain] else {}
        rows.append(row(name, seconds, median[plain], bytes=peaks[name], **of_plain, **about[name]))
    return rows


def limit(options, found):
    with workers(options, {"limit": ("limit", {"clock": options.clock})}) as started:
        answers = []
        for _ in range(options.rounds):
            started["limit"]()
            answers.append(started["limit"].found)
        started["limit"].close()
    found["limits"] = {}
    rows = []
    for key in answers[0]:
        precision, what = key.split("|")
        rate = max(answer[key] for answer in answers)
        found["limits"][precision] = max(rate, found["limits"].get(precision, 0))
        rows.append({"what": f"{what}, {NAMES[precision]}", "gflop_per_second": rate})
    return rows


NAMES = {"off": "float32", "bf16": "bfloat16", "fp16": "float16"}


def training(options, found):
    plain = "training step, plain"
    wanted = {
        plain: ("train", {"plain": True}),
        "training step": ("train", {"plain": False}),
        "validation step, plain": ("train", {"plain": True, "validate": True}),
        "validation step": ("train", {"plain": False, "validate": True}),
    }
    rows = measured(options, wanted, plain)
    found["step"] = {row["what"]: row["seconds"] for row in rows}
    return rows


def inference(options, found):
    plain = "inference L4, plain"
    wanted = {plain: ("inference", {"plain": True, "level": 4})}
    wanted |= {f"inference L{level}": ("inference", {"plain": False, "level": level}) for level in LEVELS}
    with tempfile.TemporaryDirectory() as folder:
        if all(map(importlib.util.find_spec, ("onnx", "onnxruntime", "onnxscript"))):
            with workers(options, {"files": ("write_onnx", {"folder": folder})}) as started:
                started["files"].close()
            for key, name in RUNTIMES.items():
                for kind in ("float32", "int8") if importlib.util.find_spec(key) else ():
                    file = str(Path(folder) / f"{kind}.onnx")
                    wanted[f"inference L4, {name}, {kind}"] = ("onnx", {"runtime": key, "file": file})
        return measured(options, wanted, plain)


RUNTIMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}


def loading(options, found):
    plain = "an epoch's batches, plain"
    rows = measured(
        options,
        {
            plain: ("loading", {"plain": True, "place": options.place}),
            "an epoch's batches": ("loading", {"plain": False, "place": options.place}),
        },
        plain,
    )
    step = found.get("step", {}).get("training step")
    for line in rows[1:]:
        if step:  # with loader processes, which work beside the training, it waits for less
            steps = math.ceil(line["images"] / BATCH) * step
            line["share_of_epoch"] = line["seconds"] / (line["seconds"] + steps)
    return rows


def preprocess(options, found):
    with contextlib.ExitStack() as stack:
        raw = Path(options.raw)
        if not raw.exists():
            raw = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            write_raw(raw)
        plain = f"preprocessing {RAW} images, one thread"
        about = {"raw": str(raw)}
        wanted = {
            plain: ("preprocess", {"plain": True, **about}),
            f"preprocessing {RAW} images": ("preprocess", {"plain": False, **about}),
        }
        return measured(options, wanted, plain)


def write_raw(folder):
    """RAW generated pictures in the form of stage1_train: a folder an image, a mask file a nucleus."""
    import numpy as np

    from common.images import write_png
    from common.synthetic import nuclei

    for seed in range(RAW):
        image, labels = nuclei(seed)
        for part in ("images", "masks"):
            (folder / f"raw{seed}" / part).mkdir(parents=True)
        write_png(folder / f"raw{seed}" / "images" / f"raw{seed}.png", image)
        for k in range(1, labels.max() + 1):
            write_png(folder / f"raw{seed}" / "masks" / f"{k}.png", (labels == k).astype(np.uint8) * 255)


def write_data_set(folder):
    """GENERATED images and masks, as preprocess_dsb2018.py --demo would write them."""
    import preprocess_dsb2018 as script

    folder.mkdir(parents=True)
    seeds = {f"demo_{seed:03d}": seed for seed in range(GENERATED)}
    script.convert(folder, list(seeds), lambda img_id: script.load_demo(seeds[img_id], 256), SIDE, os.cpu_count())


# ---------------------------------------------------------------- transfer


def transfer(options, found):
    """An epoch, training and validation, of the loop that tutorials show and of transfer_resnet18.py's three ways."""
    if not Path(options.data_dir).is_dir() and len(options.only) > 1:
        print(f"no transfer rows: {options.data_dir} is not there", file=sys.stderr)
        return []
    kinds = {
        "everything learns": ["--layer_decay", "1"],
        "layer4 and head learn (default)": [],
        "head learns (--freeze)": ["--freeze"],
    }
    plain = "plain tutorial loop"
    steps = {plain: plain_epoch(options)} | {name: our_epoch(options, words) for name, words in kinds.items()}
    median = in_turns(steps, options.rounds)
    return [row(f"transfer, an epoch, {name}", seconds, median[plain]) for name, seconds in median.items()]


def plain_epoch(options):
    """As tutorials have it: ImageFolder decodes every JPEG in every epoch, batches of 4, float32, all layers learn."""
    import torch
    import torchvision
    from torchvision.transforms import v2

    from classification.folders import MEAN, STD, list_pictures
    from common.devices import pick_device

    device = pick_device(options.device)
    tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    seen = {
        "train": v2.Compose([v2.RandomResizedCrop(224), v2.RandomHorizontalFlip(), *tensor]),
        "val": v2.Compose([v2.Resize(256), v2.CenterCrop(224), *tensor]),
    }
    _, samples, _ = list_pictures(options.data_dir)

    class Decoded(torch.utils.data.Dataset):
        def __init__(self, part):
            self.samples, self.transform = samples[part], seen[part]

        def __len__(self):
            return len(self.samples)

        def __getitem__(self, index):
            path, label = self.samples[index]
            return self.transform(torchvision.datasets.folder.pil_loader(path)), label

    workers = {"num_workers": 0 if device.type == "cpu" else 4}
    loaders = {part: torch.utils.data.DataLoader(Decoded(part), 4, shuffle=part == "train", **workers) for part in seen}
    model = torchvision.models.resnet18(num_classes=2).to(device)
    criterion, optimizer = torch.nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)

    def epoch():
        for part, loader in loaders.items():
            model.train(part == "train")
            for images, labels in loader:
                with torch.set_grad_enabled(part == "train"):
                    loss = criterion(model(images.to(device)), labels.to(device))
                if part == "train":
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                loss.item()

    return epoch


def our_epoch(options, words):
    """An epoch of train_model with the options `words`; weights are random, which costs the same as learned ones."""
    import torch

    import transfer_resnet18 as script
    from common.devices import pick_amp, pick_device

    config = script.new_config(
        *parse_options(script.build_parser, ["--data_dir", options.data_dir, "--device", options.device, *words])
    )
    device = pick_device(config["device"])
    amp = pick_amp(config["amp"], device)
    datasets, classes, _ = script.build_data(config)
    model = script.ResNet18(len(classes), config["freeze_bn"], config["mirror"]).to(device)
    model.to(memory_format=torch.channels_last if amp else torch.contiguous_format)
    loaders = script.build_loaders(config, datasets, model, device, amp)
    optimizer, scheduler = script.build_optimizer(model, config)
    trained = model.fc if config["freeze"] else model
    criterion = torch.nn.CrossEntropyLoss()
    return lambda: script.train_model(trained, loaders, criterion, optimizer, scheduler, 1, device=device, amp=amp)


# ---------------------------------------------------------------- the table


def add_fractions(rows, limits):
    """What fraction of the machine's limit, in its own precision, a step reached."""
    for line in rows:
        if line.get("gflop") and limits.get(line.get("precision")):
            line["of_limit"] = line["gflop"] / line["seconds"] / limits[line["precision"]]


def markdown(rows):
    columns = {
        "": lambda line: line["what"],
        "time": lambda line: seconds_text(line.get("seconds")),
        "of plain": lambda line: text(line.get("of_plain"), "{:.3f}"),
        "peak memory": lambda line: text(line.get("bytes") and line["bytes"] / 2**20, "{:,.0f} MB"),
        "of plain ": lambda line: text(line.get("memory_of_plain"), "{:.2f}"),
        "notes": notes,
    }
    lines = ["| " + " | ".join(name.strip() for name in columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(cell(line) for cell in columns.values()) + " |" for line in rows]
    return "\n".join(line.replace("|  |", "| |").replace("|  |", "| |") for line in lines)


def text(value, form):
    return "" if value is None else form.format(value)


def seconds_text(seconds):
    return "" if seconds is None else f"{seconds * 1000:.0f} ms" if seconds < 10 else f"{seconds:.1f} s"


def notes(line):
    said = []
    if "gflop_per_second" in line:
        said.append(f"{line['gflop_per_second']:.0f} GFLOP/s")
    if "gflop" in line:
        said.append(f"{line['gflop']:.1f} GFLOP")
    if "of_limit" in line:
        said.append(f"{line['of_limit']:.0%} of the limit in {NAMES[line['precision']]}")
    if "share_of_epoch" in line:
        said.append(f"{line['share_of_epoch']:.1%} of a training epoch")
    return ", ".join(said)


def about_machine(options, source):
    """Where and with what this was measured, one sentence each."""
    from common.devices import device_name, pick_device

    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    machine = device_name(pick_device(options.device)).split(" threads")[0].rpartition(",")[0] + ")"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "machine": machine,
        "threads": options.threads,
        "rounds": options.rounds,
        "clock": options.clock,
        "batch": f"{BATCH} x {SIDE} x {SIDE}",
        "data": source,
        "versions": versions,
    }


BENCHMARKS = {
    "limit": limit,
    "training": training,
    "inference": inference,
    "loading": loading,
    "preprocess": preprocess,
    "transfer": transfer,
}


def main():
    options, _ = parse_options(build_parser)
    if options.serve:
        serve(json.loads(options.serve))
        return
    if options.json and not options.json.parent.is_dir():
        raise FileNotFoundError(f"{options.json.parent}: no such folder to write {options.json.name} in")
    rows, found, source, options.place = [], {}, f"inputs/{options.dataset}", None
    with tempfile.TemporaryDirectory() as folder:
        if "loading" in options.only and not Path(source).is_dir():
            source = f"{GENERATED} generated images (inputs/{options.dataset} is not there)"
            write_data_set(Path(folder) / "inputs" / "generated")
            options.dataset, options.place = "generated", folder
        for name in (name for name in BENCHMARKS if name in options.only):
            rows += BENCHMARKS[name](options, found)
    add_fractions(rows, found.get("limits", {}))
    about = about_machine(options, source)
    print(markdown(rows))
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    print(
        f"\n{about['machine']}, {about['threads']} threads; batches of {about['batch']}; {about['data']}; {versions};"
    )
    print(f"medians of {about['rounds']} rounds in turns, {about['clock']} time; {about['date']}")
    if options.json:
        with atomic_path(options.json) as temporary:
            temporary.write_text(json.dumps({**about, "rows": rows}, indent=1), encoding="utf-8")
        print(f"the rows are in {options.json}")


if __name__ == "__main__":
    run_script(main)
