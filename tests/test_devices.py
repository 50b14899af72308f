"""devices.py: what is picked on machines with and without GPUs, and what is written down."""

import platform
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import REPOSITORY

from common import devices
from common.devices import device_name, environment, pick_amp, pick_device
from common.files import read_yaml, write_yaml


def machine(monkeypatch, cuda=0, mps=False, capability=(8, 0), cpuinfo=""):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(devices, "_cpuinfo", lambda: cpuinfo)


def test_auto_takes_the_first_gpu(monkeypatch):
    for options, expected in (({"cuda": 2, "mps": True}, "cuda"), ({"mps": True}, "mps"), ({}, "cpu")):
        machine(monkeypatch, **options)
        assert pick_device() == torch.device(expected)


def test_a_named_device(monkeypatch):
    machine(monkeypatch, cuda=2, mps=True)
    for name in ("cpu", "cuda", "cuda:0", "cuda:1", "mps"):
        assert pick_device(name) == torch.device(name)
    with pytest.raises(ValueError, match="--device cuda:2 is not available"):
        pick_device("cuda:2")


@pytest.mark.parametrize("name", ["gpu", "", "cuda:x", "cuda:-1", "cpu:0", "mps:0", "CUDA", "cuda:0:1", "meta", "0"])
def test_devices_that_do_not_exist(monkeypatch, name):
    machine(monkeypatch, cuda=2, mps=True)
    with pytest.raises(ValueError, match="expected auto, cpu, cuda, cuda:N or mps"):
        pick_device(name)


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "mps"])
def test_devices_that_are_not_there(monkeypatch, name):
    machine(monkeypatch)
    with pytest.raises(ValueError, match=f"--device {name} is not available.*use --device auto or cpu"):
        pick_device(name)


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("cuda", {"capability": (8, 0)}, torch.bfloat16),
        ("cuda", {"capability": (9, 0)}, torch.bfloat16),
        ("cuda", {"capability": (7, 5)}, torch.float16),
        ("mps", {}, None),
        ("cpu", {"cpuinfo": "flags : fpu avx2 avx512f"}, None),
        ("cpu", {"cpuinfo": "flags : fpu avx512_bf16 avx2"}, torch.bfloat16),
        ("cpu", {"cpuinfo": "flags : amx_bf16"}, torch.bfloat16),
        ("cpu", {"cpuinfo": "Features : fp asimd i8mm bf16"}, torch.bfloat16),  # ARM's word for it
        ("cpu", {"cpuinfo": ""}, None),
    ],
)
def test_auto_precision(monkeypatch, kind, options, expected):
    machine(monkeypatch, cuda=1, **options)
    assert pick_amp("auto", torch.device(kind)) is expected


def test_precision_as_asked(monkeypatch):
    machine(monkeypatch, cuda=1, capability=(7, 5))
    for kind in ("cpu", "cuda", "mps"):
        device = torch.device(kind)
        assert pick_amp("off", device) is None and pick_amp("bf16", device) is torch.bfloat16
    assert pick_amp("fp16", torch.device("cuda")) is torch.float16
    with pytest.raises(ValueError, match="--amp fp16 needs a GPU"):
        pick_amp("fp16", torch.device("cpu"))


def test_environment_is_plain_and_says_what_ran(tmp_path):
    found = environment(torch.device("cpu"))
    write_yaml(tmp_path / "environment.yml", found)
    assert read_yaml(tmp_path / "environment.yml") == found
    assert torch.__version__.startswith(found["torch"]) and found["numpy"] == np.__version__ and found["git_commit"]
    assert (
        found["device"] == device_name(torch.device("cpu")) and f"{torch.get_num_threads()} threads" in found["device"]
    )


COUNT_FAULTS = """
import resource
import torch
from common.devices import keep_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

usual = faults()
keep_memory()
print(usual, min(faults() for _ in range(5)))  # the first time is new, and the kernel may move pages at any time
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_kept_memory_is_not_asked_for_anew(tmp_path):
    """Eight times the same 64 MB: with memory kept, hardly a page of it is new to the process."""
    environment = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", COUNT_FAULTS]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    usual, kept = map(int, result.stdout.split())
    assert kept < usual / 10
