"""What every script shares: run files, seeds, devices, small helpers. Nothing here knows a model, loss or dataset.

torch is imported inside the functions that need it, so that scripts without it (preprocessing) and `--help` start fast.
"""

import argparse
import contextlib
import importlib.metadata
import os
import platform
import random
import re
import subprocess
import warnings
from pathlib import Path

import yaml


def str2bool(value):
    """true/false, yes/no, 1/0 in any case, or a bool -> bool; anything else raises argparse.ArgumentTypeError."""
    answers = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    try:
        return answers[str(value).strip().lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"{value!r} is neither True nor False") from None


# ---------------------------------------------------------------- files


@contextlib.contextmanager
def atomic_path(path):
    """Yields a temporary path beside `path`; on success it is flushed to disk and renamed, on failure removed."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_yaml(path, mapping):
    with atomic_path(path) as temporary:
        temporary.write_text(yaml.safe_dump(mapping, sort_keys=False, allow_unicode=True), encoding="utf-8")


class _Loader(yaml.SafeLoader):
    """Safe YAML whose only booleans are true and false, as in YAML 1.2: `amp: off` is text, and so is an id `no`."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not (tag.endswith(":bool") and first in "yYnNoO")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def read_yaml(path):
    """The mapping in a YAML file; ValueError when it is no YAML mapping, FileNotFoundError when it is not there."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        mapping = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no readable YAML file: {error}") from None
    if not isinstance(mapping, dict):
        raise ValueError(f"{path}: expected `key: value` lines, found {type(mapping).__name__}")
    return mapping


def save_checkpoint(path, state):
    """Tensors and plain Python values only, so that `weights_only=True` reads them back."""
    import torch

    with atomic_path(path) as temporary:
        torch.save(state, temporary)


def load_checkpoint(path):
    """What save_checkpoint wrote, on the CPU. Runs no code from the file; ValueError when it is no such file."""
    import torch

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with warnings.catch_warnings():  # about pickles of other protocols
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # the unpickler of a broken or hostile file raises whatever it likes, with a page of advice
        raise ValueError(
            f"{path} is no checkpoint of tensors and plain values: it is broken, or would run code when read"
        ) from None


def environment(device):
    """Versions, device and git commit, to be kept beside a result."""
    packages = ("torch", "torchvision", "albumentations", "opencv-python-headless", "numpy", "scikit-learn")
    versions = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = ""
    return {
        "python": platform.python_version(),
        **versions,
        "platform": platform.platform(),
        "device": device_name(device),
        "git_commit": commit or "unknown",
    }


# ---------------------------------------------------------------- seeds, devices, numbers


def seed_everything(seed):
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def pick_device(name="auto"):
    """auto | cpu | cuda | cuda:N | mps -> torch.device; auto takes the first GPU there is."""
    import torch

    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind in available if available[kind]))
    kind, _, index = str(name).partition(":")
    if kind not in available or (index and not (kind == "cuda" and index.isdecimal())):
        raise ValueError(f"--device {name}: expected auto, cpu, cuda, cuda:N or mps")
    if not available[kind] or (index and int(index) >= torch.cuda.device_count()):
        raise ValueError(
            f"--device {name} is not there for this PyTorch ({torch.__version__}); use --device auto or cpu"
        )
    return torch.device(name)


def pick_amp(name, device):
    """--amp auto|off|bf16|fp16 -> the autocast dtype, or None for float32.

    auto takes bfloat16 where the hardware multiplies it natively, float16 on older GPUs, float32 elsewhere.
    """
    import torch

    if name == "auto" and device.type == "cuda":
        name = "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    elif name == "auto":
        name = "bf16" if device.type == "cpu" and re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", _cpuinfo()) else "off"
    if name == "fp16" and device.type == "cpu":
        raise ValueError("--amp fp16 needs a GPU; on a CPU use --amp bf16, off or auto")
    return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def _cpuinfo():
    path = Path("/proc/cpuinfo")  # Linux only; elsewhere the answer is "nothing known"
    return path.read_text(errors="replace") if path.is_file() else ""


def device_name(device):
    """What a person calls it: the GPU's or the processor's name and its number of threads."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = re.search(r"^model name\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE)
    cpu = model.group(1) if model else platform.processor() or platform.machine()
    return f"{device.type} ({cpu}, {torch.get_num_threads()} threads)"


def count_params(model):
    """The number of trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


class AverageMeter:
    """A running mean of values with weights: `val` the latest, `avg` the mean, `sum` and `count` what it is made of."""

    def __init__(self):
        self.reset()

    def reset(self):
        self.val, self.avg, self.sum, self.count = 0, 0, 0, 0

    def update(self, val, n=1):
        self.val = val
        self.sum += val * n
        self.count += n
        self.avg = self.sum / self.count if self.count else 0
