"""utils.py: small helpers by hand, and files that are whole or not there at all."""

import argparse
import contextlib
import math
import os
import pickle
import random

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from common.cli import in_one_line
from common.devices import seed_everything
from common.files import atomic_path, load_checkpoint, read_yaml, save_checkpoint, write_yaml
from utils import AverageMeter, count_params, str2bool


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------- small helpers


@pytest.mark.parametrize("value", [True, 1, "true", "True", "TRUE", "yes", "Yes", "1", " true "])
def test_what_means_true(value):
    assert str2bool(value) is True


@pytest.mark.parametrize("value", [False, 0, "false", "False", "FALSE", "no", "No", "0", "false\n"])
def test_what_means_false(value):
    assert str2bool(value) is False


@pytest.mark.parametrize("value", ["", "t", "2", "on", "None", None, "truee", 2, 0.5])
def test_what_means_neither(value):
    with pytest.raises(argparse.ArgumentTypeError, match="is neither True nor False"):
        str2bool(value)


def test_average_meter_by_hand():
    meter = AverageMeter()
    assert (meter.val, meter.avg, meter.sum, meter.count) == (0, 0, 0, 0)
    meter.update(2.0)
    meter.update(5.0, n=3)
    assert (meter.val, meter.avg, meter.sum, meter.count) == (5.0, 17 / 4, 17.0, 4)
    meter.update(9.0, n=0)
    assert (meter.val, meter.avg, meter.count) == (9.0, 17 / 4, 4)
    meter.reset()
    assert (meter.val, meter.avg, meter.sum, meter.count) == (0, 0, 0, 0)
    meter.update(9.0, n=0)
    assert meter.avg == 0


def test_count_params_counts_what_is_trained():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2, bias=False))
    assert count_params(model) == (12 + 4) + (4 + 4) + 8
    model[0].weight.requires_grad_(False)
    assert count_params(model) == 4 + 8 + 8


class Broken(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        raise OSError("inputs/x: a: no image (gone)")


def test_an_error_in_one_line():
    assert in_one_line(ValueError("found this,\n  expected that")) == "found this, expected that"
    assert in_one_line(MemoryError()) == "MemoryError"
    with pytest.raises(OSError) as caught:
        list(torch.utils.data.DataLoader(Broken(), num_workers=1))
    assert "Traceback" in str(caught.value) and in_one_line(caught.value) == "inputs/x: a: no image (gone)"


def test_a_seed_sets_all_three_streams():
    def draw(seed):
        seed_everything(seed)
        return random.random(), np.random.random(), torch.rand(1).item()

    first, again, other = draw(5), draw(5), draw(6)
    assert first == again and all(a != b for a, b in zip(first, other, strict=True))


# ---------------------------------------------------------------- files


def test_atomic_path_replaces_a_file_at_the_end(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("old")
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old" and temporary.parent == tmp_path
    assert path.read_text() == "new" and names(tmp_path) == ["log.csv"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
@pytest.mark.parametrize("existing", [None, "old"])
def test_atomic_path_leaves_nothing_behind_on_failure(tmp_path, error, existing):
    path = tmp_path / "log.csv"
    if existing:
        path.write_text(existing)
    with pytest.raises(error), atomic_path(path) as temporary:
        temporary.write_text("half of")
        raise error
    assert names(tmp_path) == (["log.csv"] if existing else [])
    assert not existing or path.read_text() == existing


def test_yaml_there_and_back(tmp_path):
    mapping = {"name": "zellen_größe", "lr": 2e-3, "tiny": 1e-10, "amp": "off", "ema": False, "none": None}
    mapping |= {
        "milestones": "20,40",
        "mean": [0.1, 0.2],
        "environment": {"python": "3.10"},
        "ids": ["007", "1e5", "no"],
    }
    write_yaml(tmp_path / "config.yml", mapping)
    found = read_yaml(tmp_path / "config.yml")
    assert found == mapping and list(found) == list(mapping) and names(tmp_path) == ["config.yml"]
    assert "größe" in (tmp_path / "config.yml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [1, 2", "no readable YAML"),
        (b"a: b: c", "no readable YAML"),
        (b"\xff\xfe\x00bad\x81", "no readable YAML"),
        (b"!!python/object/apply:os.system ['touch pwned']", "no readable YAML"),
        (b"[" * 2000, "no readable YAML"),
        (b"- a\n- b\n", "expected `key: value` lines, found list"),
        (b"just text", "expected `key: value` lines, found str"),
        (b"", "expected `key: value` lines, found NoneType"),
    ],
)
def test_what_is_no_yaml_mapping(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yml").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_yaml("my.yml")
    assert names(tmp_path) == ["my.yml"]


def test_yaml_that_is_not_there(tmp_path):
    for path in (tmp_path / "nowhere.yml", tmp_path):
        with pytest.raises(FileNotFoundError, match="no such file"):
            read_yaml(path)


@pytest.mark.parametrize("word", ["on", "off", "yes", "no", "Off"])
def test_words_that_yaml_1_1_takes_for_booleans_stay_words(tmp_path, word):
    """`amp: off` is what --amp takes, and `no` may be an image's id; str2bool understands yes and no."""
    (tmp_path / "my.yml").write_text(f"amp: {word}\nids: [{word}]\nnesterov: true\nresume: False\n")
    assert read_yaml(tmp_path / "my.yml") == {"amp": word, "ids": [word], "nesterov": True, "resume": False}
    assert yaml.safe_load("amp: off") == {"amp": False}  # nobody else's loader is changed


def test_checkpoints_there_and_back(tmp_path):
    model = nn.Linear(2, 3)
    state = {"model": model.state_dict(), "epoch": 3, "best": math.inf, "names": ["a", None, True]}
    save_checkpoint(tmp_path / "last.pth", state)
    found = load_checkpoint(tmp_path / "last.pth")
    assert torch.equal(found["model"]["weight"], model.weight) and found["model"].keys() == state["model"].keys()
    assert {key: found[key] for key in ("epoch", "best", "names")} == {
        "epoch": 3,
        "best": math.inf,
        "names": state["names"],
    }
    assert names(tmp_path) == ["last.pth"]


class Trap:
    """A pickle that makes a folder when it is opened."""

    def __reduce__(self):
        return (os.mkdir, ("pwned",))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["pickle", "torch", "noise", "text", "empty", "truncated"])
def test_checkpoints_that_are_refused(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.pth"
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"model": Trap()}))
    elif kind == "torch":
        torch.save({"model": Trap()}, path)
    elif kind == "truncated":
        save_checkpoint(path, {"model": torch.zeros(1000)})
        path.write_bytes(path.read_bytes()[:2000])
    else:
        path.write_bytes(
            {"noise": np.random.default_rng(0).bytes(5000), "text": b"<html>404</html>", "empty": b""}[kind]
        )
    with pytest.raises(ValueError, match="model.pth is no checkpoint of tensors and plain values") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value) and not (tmp_path / "pwned").exists()


def test_a_checkpoint_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model.pth: no such file"):
        load_checkpoint(tmp_path / "model.pth")


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt(), RuntimeError("a worker")]
)
def test_what_stops_the_writing_of_a_checkpoint_is_what_is_raised(tmp_path, monkeypatch, error):
    """A full disk, Ctrl-C, a dead loader process: torch raises an error of its own then, with these behind it."""

    class Disturbed:
        def write(self, data):
            raise error

        def __getattr__(self, name):
            return getattr(file, name)

    state = {"a": torch.zeros(10**5)}
    save_checkpoint(tmp_path / "last.pth", state)
    before = (tmp_path / "last.pth").read_bytes()
    with open(tmp_path / "elsewhere", "wb") as file:
        monkeypatch.setattr("builtins.open", lambda *args: contextlib.nullcontext(Disturbed()))
        with pytest.raises(type(error), match="No space|a worker" if str(error) else None):
            save_checkpoint(tmp_path / "last.pth", state)
        monkeypatch.undo()
    assert (tmp_path / "last.pth").read_bytes() == before and "last.pth" in names(tmp_path)


@pytest.mark.parametrize(
    ("tensor", "accepted"),
    [
        (torch.zeros(1).expand(4), False),
        (torch.zeros(8).as_strided((3, 3), (2, 1)), False),
        (torch.zeros(2, 1).expand(2, 3), False),
        (torch.zeros(3, 4).T, True),
        (torch.zeros(6, 6)[::2, 1:5], True),
        (torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last), True),
        (torch.zeros(0, 3), True),
        (torch.zeros(()), True),
    ],
)
def test_tensors_that_share_their_own_memory_are_refused(tmp_path, tensor, accepted):
    save_checkpoint(tmp_path / "a.pth", {"tensor": tensor, "room": torch.zeros(100)})
    if accepted:
        assert torch.equal(load_checkpoint(tmp_path / "a.pth")["tensor"], tensor)
    else:
        with pytest.raises(ValueError, match="no checkpoint of tensors"):
            load_checkpoint(tmp_path / "a.pth")
