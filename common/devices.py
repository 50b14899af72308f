"""The machine: which device and which precision to compute with, and what to write down about it.

    device = pick_device("auto")    # the first GPU there is, else the CPU
    amp = pick_amp("auto", device)  # torch.bfloat16 where the hardware multiplies it natively; None is float32

torch is imported inside the functions that need it, so that `--help` starts fast.
"""

import contextlib
import importlib.metadata
import os
import platform
import random
import re
import subprocess
from pathlib import Path


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
        raise ValueError(
            "--amp fp16 needs a GPU, to resume what was trained so too; on a CPU use --amp bf16, off or auto"
        )
    return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def _cpuinfo():
    path = Path("/proc/cpuinfo")  # Linux only; elsewhere the answer is "nothing known"
    return path.read_text(errors="replace") if path.is_file() else ""


def keep_memory():
    """Let the C library keep freed memory for the next tensor instead of returning it to the system and asking anew.

    A training step frees and takes more than a gigabyte; with glibc's defaults the kernel clears those pages each time.
    Nothing happens where the C library is another one, nor where MALLOC_... variables say what the user wants.
    """
    if platform.libc_ver()[0] != "glibc" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    import ctypes

    mallopt = ctypes.CDLL(None).mallopt
    for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**26)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD of malloc.h
        mallopt(option, value)


def memory():
    """Bytes of memory of this machine, as far as Python's standard library knows it."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return 8 * 2**30


def device_name(device):
    """What a person calls it: the GPU's or the processor's name and its number of threads."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = re.search(r"^model name\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE)
    cpu = model.group(1) if model else platform.processor() or platform.machine()
    return f"{device.type} ({cpu}, {torch.get_num_threads()} threads)"


def environment(device):
    """Versions, device and git commit, to be kept beside a result."""
    packages = ("torch", "torchvision", "albumentations", "opencv-python-headless", "numpy", "scikit-learn")
    versions = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    git = ["git", "-C", str(Path(__file__).parents[1]), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
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


def seed_everything(seed):
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
