"""The machine: which device and precision to compute with, and what to write down about it.

    device = pick_device("auto")    # the first GPU, else the CPU
    amp = pick_amp("auto", device)  # torch.bfloat16 where the hardware multiplies it natively; None means float32
    with precision(device, amp):
        output = model(images)

torch is imported inside the functions that need it, so that `--help` starts fast.
"""

import contextlib
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

PACKAGES = ("torch", "torchvision", "albumentations", "opencv-python-headless", "numpy", "scikit-learn")


def parse_device(name):
    """auto, cpu, cuda, cuda:N or mps -> (kind, N as text, or "" without one). ValueError for other names."""
    kind, _, index = str(name).partition(":")
    if kind not in ("auto", "cpu", "cuda", "mps") or (index and not (kind == "cuda" and index.isdecimal())):
        raise ValueError(f"--device {name}: expected auto, cpu, cuda, cuda:N or mps")
    return kind, index


def pick_device(name="auto"):
    """auto, cpu, cuda, cuda:N or mps -> torch.device; auto is the first GPU, or the CPU. ValueError otherwise."""
    import torch

    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind, index = parse_device(name)
    if kind == "auto":
        return torch.device(next(kind for kind in available if available[kind]))
    if not available[kind] or (index and int(index) >= torch.cuda.device_count()):
        raise ValueError(
            f"--device {name} is not available to this PyTorch ({torch.__version__}); use --device auto or cpu"
        )
    return torch.device(name)


def pick_amp(name, device):
    """auto, off, bf16 or fp16 -> the autocast dtype, or None for float32.

    auto is bfloat16 where the hardware multiplies it natively, float16 on older GPUs, and float32 elsewhere.
    """
    import torch

    if name == "auto" and device.type == "cuda":
        name = "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    elif name == "auto":
        name = "bf16" if device.type == "cpu" and re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", _cpuinfo()) else "off"
    if name == "fp16" and device.type == "cpu":
        raise ValueError(
            "--amp fp16 needs a GPU, also to resume a run trained with it; on a CPU use --amp bf16, off or auto"
        )
    return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def precision(device, amp):
    """The context in which a model computes: autocast to the dtype `amp`, or float32 when it is None."""
    import torch

    return torch.autocast(device.type, dtype=amp, enabled=amp is not None)


def precision_name(amp):
    """A torch.dtype or None -> "bfloat16", "float16" or "float32", for people."""
    return str(amp or "float32").removeprefix("torch.")


def to_device(images, device, amp):
    """Images (N, 3, H, W) on the device, channels_last under mixed precision, whose kernels prefer it.

    Other tensors, such as features (N, D), keep their layout.
    """
    import torch

    layout = torch.channels_last if amp is not None and images.dim() == 4 else torch.contiguous_format
    return images.to(device, non_blocking=True, memory_format=layout)


def synchronize(device):
    """Wait until the device is idle: calls to a GPU return before their work is done."""
    import torch

    if device.type in ("cuda", "mps"):
        {"cuda": torch.cuda, "mps": torch.mps}[device.type].synchronize()


def _cpuinfo():
    path = Path("/proc/cpuinfo")  # Linux only; elsewhere the answer is "nothing known"
    return path.read_text(errors="replace") if path.is_file() else ""


def keep_memory():
    """Let the C library keep freed memory for the next tensor instead of returning it to the system.

    A training step frees and allocates more than a gigabyte; with glibc's defaults the kernel clears those pages each
    time. Nothing happens with another C library, nor where MALLOC_... variables say what the user wants.
    """
    if platform.libc_ver()[0] != "glibc" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    import ctypes

    mallopt = ctypes.CDLL(None).mallopt
    for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**26)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD of malloc.h
        mallopt(option, value)


def memory():
    """Bytes of memory of this machine; 8 GB where the standard library cannot tell."""
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


def versions(packages):
    """{package: version} of those that are installed."""
    found = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def environment(device):
    """Versions, device and git commit, to be kept beside a result."""
    git = ["git", "-C", str(Path(__file__).parents[1]), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = ""
    return {
        "python": platform.python_version(),
        **versions(PACKAGES),
        "platform": platform.platform(),
        "device": device_name(device),
        "git_commit": commit or "unknown",
    }
