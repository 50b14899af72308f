"""What benchmark.py measures: each function builds something and returns (step, about).

step() is what is timed; about is a dict for the row, such as the precision and the GFLOP of a step. WORKERS names the
functions. Each runs in a process of its own and imports only what it needs, so that its memory is its own:

    echo step | python -m tools.workers '{"kind": "inference", "plain": true, "level": 1, "device": "cpu"}'

"plain" in a task selects our own code with every fast setting switched off.
"""

import contextlib
import io
import os
import tempfile
import time
from pathlib import Path

from common.cli import parse_options

BATCH, SIDE = 16, 96  # images of a batch, and pixels of their side
RAW = 48  # raw images that preprocessing is timed on, at most

# ---------------------------------------------------------------- what they share


def one_batch():
    """Noise: images (16, 3, 96, 96) float32, masks (16, 1, 96, 96) of 0 and 1, and info. No time depends on it."""
    import torch

    generator = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH, 3, SIDE, SIDE, generator=generator)
    masks = (torch.rand(BATCH, 1, SIDE, SIDE, generator=generator) < 0.15).float()
    return images, masks, {"img_id": [str(k) for k in range(BATCH)]}


def waiting(device, function):
    """-> a step that calls the function and waits until the device has done it."""
    from common.devices import synchronize

    def step():
        function()
        synchronize(device)

    return step


def count_gflop(step):
    """-> GFLOP of the convolutions and matrix products of a step (a multiplication and an addition are two)."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops() / 1e9


def training_config(task):
    """The config that train.py makes of its options; the plain way switches its fast settings off."""
    import archs
    import train
    from common.devices import keep_memory

    words = ["--deep_supervision", "True", "--dataset", task["dataset"], "--device", task["device"]]
    words += task.get("words", [])
    if task["plain"]:
        words += ["--amp", "off", "--channels_last", "False", "--cache", "False", "--num_workers", "0"]
        archs.upsample = archs.interpolate  # PyTorch's own gradient
    else:
        keep_memory()
    options, _ = parse_options(train.build_parser, words)
    return train.new_config(options)


def build_run(task):
    """-> the engine.Run of a training with train.py's defaults, and its config.

    task["words"]: more options of train.py; task["peer"]: whether another package's network takes the place of ours.
    """
    import torch

    import train
    from archs import build_model
    from common.devices import pick_device

    config = training_config(task)
    torch.backends.cudnn.benchmark = True
    model = peer_network() if task.get("peer") else build_model(config)
    return train.build_run(config, model, 1000, pick_device(config["device"])), config


def peer_network():
    """The U-Net++ of segmentation_models_pytorch with its own defaults, on the same encoder of timm."""
    import segmentation_models_pytorch as smp

    return smp.UnetPlusPlus("tu-tf_efficientnet_lite0", encoder_weights=None, classes=1)


# ---------------------------------------------------------------- the network


def train_step(task):
    """engine.train_one_epoch of one batch that is there already: forward, backward, optimizer, averaged weights."""
    from engine import train_one_epoch

    run, config = build_run(task)
    batches = [one_batch()]
    step = waiting(run.device, lambda: train_one_epoch(run, batches))
    return step, {"precision": config["amp"], "gflop": count_gflop(step)}


def evaluate_step(task):
    """engine.evaluate of one batch that is there already, as it runs after each epoch."""
    from engine import evaluate

    run, config = build_run(task)
    batches = [one_batch()]
    step = waiting(run.device, lambda: evaluate(run.judged, batches, run.task, run.device, run.amp))
    return step, {"precision": config["amp"], "gflop": count_gflop(step)}


def inference_step(task):
    """One batch through the network, pruned to task["level"]: standardised images to probabilities."""
    import torch

    from archs import NestedUNet, probabilities
    from common.devices import keep_memory, pick_amp, pick_device, precision
    from common.runs import resolve_machine

    asked = {"device": task["device"], "amp": "off" if task["plain"] else "auto", "num_workers": 0}
    config = resolve_machine(asked)
    device = pick_device(config["device"])
    amp = pick_amp(config["amp"], device)
    model = NestedUNet(deep_supervision=True).eval().prune(task["level"]).to(device)
    if not task["plain"]:
        keep_memory()
        model = model.folded()
    if amp is not None:
        model.to(memory_format=torch.channels_last)
    images = one_batch()[0].to(device)

    @torch.inference_mode()
    def infer():
        with precision(device, amp):
            probabilities(model(images))

    step = waiting(device, infer)
    return step, {"precision": config["amp"], "gflop": count_gflop(step)}


def write_onnx(task):
    """No step: the network as float32.onnx and int8.onnx in task["folder"], calibrated on generated images."""
    import torch

    import export
    from archs import NestedUNet
    from common.synthetic import generate_nuclei

    torch.manual_seed(0)
    folder = Path(task["folder"])
    model = NestedUNet(deep_supervision=True).eval().prune(4)
    export.write_onnx(export.Deployed(model, [0.0] * 3, [1.0] * 3), folder / "float32.onnx", 3, {})
    images = [generate_nuclei(seed)[0] for seed in range(8)]
    export.quantise(folder / "float32.onnx", folder / "int8.onnx", [export.batch_of(images, (SIDE, SIDE))])
    return None, {}


def onnx_step(task):
    """The file task["file"] in ONNX Runtime on the CPU: uint8 images to probabilities, without PyTorch."""
    import numpy as np
    import onnxruntime

    images = np.random.default_rng(0).integers(0, 256, (BATCH, SIDE, SIDE, 3), np.uint8)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = task["threads"]
    session = onnxruntime.InferenceSession(task["file"], settings, providers=["CPUExecutionProvider"])

    def step():
        session.run(None, {"images": images})

    return step, {}


# ---------------------------------------------------------------- the data


def loading_epoch(task):
    """An epoch of augmented batches of the training set, without a network."""
    from common.loaders import set_epoch
    from dataset import make_loader
    from training_data import build_data, chosen_split

    config = training_config(task)
    with contextlib.redirect_stderr(io.StringIO()):  # warnings about the data
        train_set, _, _ = build_data(config, chosen_split(config, None))
    loader = make_loader(train_set, BATCH, shuffle=True, num_workers=config["num_workers"])
    epochs = iter(range(1, 2**31))

    def step():
        set_epoch(loader, next(epochs))
        for _ in loader:
            pass

    return step, {"images": len(train_set), "workers": config["num_workers"]}


def preprocess_images(task):
    """Raw images with their instance masks to squares on disk; the plain way uses one thread."""
    import cv2

    from dsb2018 import find_samples
    from preprocess_dsb2018 import convert

    cv2.setNumThreads(1)
    samples = find_samples(Path(task["raw"]))
    loads = {img_id: samples[img_id].load for img_id in list(samples)[:RAW]}
    threads = 1 if task["plain"] else os.cpu_count()

    def step():
        with tempfile.TemporaryDirectory() as folder:
            convert(Path(folder), loads, SIDE, threads)

    return step, {"images": len(loads)}


# ---------------------------------------------------------------- transfer learning


def tutorial_epoch(task):
    """Training and validation as tutorials have them, on the pictures of task["data_dir"].

    Every epoch decodes every JPEG; batches of 4, float32, all layers learn.
    """
    import torch
    import torchvision
    from torchvision.transforms import v2

    from classification.folders import MEAN, STD, list_pictures
    from common.devices import pick_device

    device = pick_device(task["device"])
    to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    transforms = {
        "train": v2.Compose([v2.RandomResizedCrop(224), v2.RandomHorizontalFlip(), *to_tensor]),
        "val": v2.Compose([v2.Resize(256), v2.CenterCrop(224), *to_tensor]),
    }
    classes, samples, _ = list_pictures(task["data_dir"])

    class Decoded(torch.utils.data.Dataset):
        def __init__(self, part):
            self.samples, self.transform = samples[part], transforms[part]

        def __len__(self):
            return len(self.samples)

        def __getitem__(self, index):
            path, label = self.samples[index]
            return self.transform(torchvision.datasets.folder.pil_loader(path)), label

    num_workers = 0 if device.type == "cpu" else 4
    loaders = {
        part: torch.utils.data.DataLoader(Decoded(part), 4, shuffle=part == "train", num_workers=num_workers)
        for part in transforms
    }
    model = torchvision.models.resnet18(num_classes=len(classes)).to(device)
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

    return waiting(device, epoch), {}


def transfer_epoch(task):
    """Training and validation of transfer_resnet18.py with the options task["words"], from random weights."""
    import torch

    import transfer_resnet18 as script
    from common.devices import keep_memory, pick_amp, pick_device

    keep_memory()
    words = ["--data_dir", task["data_dir"], "--device", task["device"], *task["words"]]
    config = script.new_config(*parse_options(script.build_parser, words))
    config["weights"] = "none"  # only now, because the recipe depends on it; learned weights take as much time
    device = pick_device(config["device"])
    amp = pick_amp(config["amp"], device)
    datasets, classes, _ = script.build_data(config)
    model = script.build_model(config, classes, None).to(device)
    if amp is not None:
        model.to(memory_format=torch.channels_last)
    loaders = script.build_loaders(config, datasets, model, device, amp)
    optimizer, scheduler = script.build_optimizer(model, config)
    trained = model.fc if config["freeze"] else model
    criterion = torch.nn.CrossEntropyLoss()

    def epoch():
        script.train_model(trained, loaders, criterion, optimizer, scheduler, 1, device=device, amp=amp)

    return waiting(device, epoch), {}


# ---------------------------------------------------------------- the machine


def machine_limit(task):
    """Large matrix products and 3x3 convolutions; a step returns {precision: {operation: GFLOP/s}}."""
    import torch
    import torch.nn.functional as F

    from common.devices import keep_memory, pick_amp, pick_device

    keep_memory()
    device = pick_device(task["device"])
    clock = time.process_time if task["clock"] == "cpu" else time.perf_counter
    dtypes = {"off": torch.float32}
    if pick_amp("auto", device) is torch.bfloat16:
        dtypes["bf16"] = torch.bfloat16

    def rate(flop, function):
        """GFLOP/s of the fastest of three calls."""
        function, seconds = waiting(device, function), []
        for _ in range(3):
            start = clock()
            function()
            seconds.append(clock() - start)
        return flop / min(seconds) / 1e9

    a, b = torch.randn(2, 2048, 2048, device=device)
    images = torch.randn(16, 256, 48, 48, device=device).to(memory_format=torch.channels_last)
    weight = torch.randn(64, 256, 3, 3, device=device).to(memory_format=torch.channels_last)
    operands = {name: [tensor.to(dtype) for tensor in (a, b, images, weight)] for name, dtype in dtypes.items()}

    def rates(a, b, images, weight):
        product = rate(2 * 2048**3, lambda: a @ b)
        convolution = rate(2 * 16 * 48**2 * 64 * 256 * 9, lambda: F.conv2d(images, weight, padding=1))
        return {
            "matrix product 2048 x 2048": product,
            "convolution 3x3, 256 to 64 channels, 16 x 48 x 48": convolution,
        }

    @torch.inference_mode()
    def step():
        return {name: rates(*tensors) for name, tensors in operands.items()}

    return step, {}


WORKERS = {
    "train": train_step,
    "evaluate": evaluate_step,
    "inference": inference_step,
    "write_onnx": write_onnx,
    "onnx": onnx_step,
    "loading": loading_epoch,
    "preprocess": preprocess_images,
    "tutorial": tutorial_epoch,
    "transfer": transfer_epoch,
    "limit": machine_limit,
}
