"""common/files.py: files and folders that appear complete or not at all, safe YAML, and checkpoints of any origin."""

import contextlib
import math
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import mounted
from torch import nn

from common.files import (
    atomic_path,
    is_plain_name,
    load_checkpoint,
    load_weights,
    new_folder,
    read_yaml,
    save_checkpoint,
    write_yaml,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------- complete or not at all


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


def write_old_and_new(place, check=None, error=None):
    """place/data with an old file, then a new_folder for it that gets a new one and, perhaps, an error."""
    (place / "data").mkdir()
    (place / "data" / "old").write_text("old")
    with new_folder(place / "data", check) as folder:
        assert names(place / "data") == ["old"]
        (folder / "new").write_text("new")
        if error:
            raise error


def test_a_new_folder_appears_when_it_is_complete(tmp_path):
    with new_folder(tmp_path / "deep" / "data") as folder:
        (folder / "a").write_text("a")
        assert not (tmp_path / "deep" / "data").exists()
    assert names(tmp_path / "deep") == ["data"] and names(tmp_path / "deep" / "data") == ["a"]


def test_an_old_folder_is_replaced_where_the_check_allows_it(tmp_path):
    calls = []
    write_old_and_new(tmp_path, check=lambda: calls.append(names(tmp_path / "data")))
    assert names(tmp_path) == ["data"] and names(tmp_path / "data") == ["new"]
    assert calls == [["old"], ["old"]]  # before the block, and again before the rename


def test_without_a_check_nothing_is_replaced(tmp_path):
    with pytest.raises(FileExistsError, match="data exists already"):
        write_old_and_new(tmp_path)
    assert names(tmp_path) == ["data"] and names(tmp_path / "data") == ["old"]
    with pytest.raises(OSError, match="made was not written: .*made exists already"), new_folder(tmp_path / "made"):
        (tmp_path / "made").mkdir()  # by another process
    assert names(tmp_path) == ["data", "made"] and names(tmp_path / "made") == []


@pytest.mark.parametrize("error", [ValueError("bad"), OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_folder_that_fails_leaves_the_old_one(tmp_path, error):
    message = "data was not written: No space left on device$" if isinstance(error, OSError) else f"^{error}$"
    with pytest.raises(type(error), match=message):
        write_old_and_new(tmp_path, check=lambda: None, error=error)
    assert names(tmp_path) == ["data"] and names(tmp_path / "data") == ["old"]


def test_an_old_folder_comes_back_when_the_rename_fails(tmp_path, monkeypatch):
    rename = Path.rename

    def failing(path, target):
        if path.name == "new":
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="data was not written: Input/output error"):
        write_old_and_new(tmp_path, check=lambda: None)
    assert names(tmp_path) == ["data"] and names(tmp_path / "data") == ["old"]


def test_what_killed_runs_left_is_removed_after_a_day(tmp_path):
    old, young, other, foreign = (tmp_path / f".{name}.tmp" for name in ("d[1].a", "d[1].b", "d1.c", "d[1].d"))
    for leftover in (old, young, other):
        (leftover / "new").mkdir(parents=True)
    foreign.mkdir()  # not ours: it has no folder `new`
    for path in (old, other, foreign):
        os.utime(path, (1, 1))
    with new_folder(tmp_path / "d[1]"):
        assert not old.exists()
    assert young.exists() and other.exists() and foreign.exists()


def test_a_link_to_another_disk_stays_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk", target_is_directory=True)
    with new_folder(tmp_path / "link", check=lambda: None) as folder:
        (folder / "a").write_text("a")
    assert (tmp_path / "link").is_symlink() and names(tmp_path / "disk") == ["a"]


@pytest.mark.parametrize("options", ["size=100k", "ro"])
def test_a_disk_that_is_full_or_read_only_is_named_with_the_folder(tmp_path, options):
    with mounted(tmp_path / "disk", options) as disk:
        message = "disk/data was not written: (No space left on device|Read-only file system)$"
        with pytest.raises(OSError, match=message), new_folder(disk / "data") as folder:
            (folder / "a").write_bytes(bytes(10**6))
        assert names(disk) == []


# ---------------------------------------------------------------- YAML


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
        (b"a: [1, 2", "not a readable YAML"),
        (b"a: b: c", "not a readable YAML"),
        (b"\xff\xfe\x00bad\x81", "not a readable YAML"),
        (b"!!python/object/apply:os.system ['touch pwned']", "not a readable YAML"),
        (b"[" * 1100, "not a readable YAML"),
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


# ---------------------------------------------------------------- checkpoints


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
    with pytest.raises(ValueError, match="model.pth is not a checkpoint of tensors and plain values") as caught:
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


# ---------------------------------------------------------------- weights

WEIGHTS = {"conv.weight": torch.tensor([1.0, -2.0]), "bn.num_batches_tracked": torch.tensor(7)}
OTHER = {"conv.weight": torch.tensor([5.0, 5.0])}
AVERAGED = {"n_averaged": torch.tensor(3), **{f"module.{name}": value for name, value in WEIGHTS.items()}}


@pytest.mark.parametrize(
    "content",
    [
        WEIGHTS,
        {f"module.{name}": value for name, value in WEIGHTS.items()},
        {f"module.module.{name}": value for name, value in WEIGHTS.items()},
        {"state_dict": WEIGHTS, "epoch": 3, "model": "resnet18"},
        {"model": WEIGHTS, "optimizer": {"state": {0: OTHER}}, "rows": []},
        {"model": OTHER, "ema": AVERAGED, "rows": [{"epoch": 1}]},  # our last.pth
        {"model": WEIGHTS, "ema": None},
        {"state_dict": {"model": WEIGHTS}},
        {"state_dict": WEIGHTS, "ema": OTHER, "model": OTHER},
        {**WEIGHTS, "epoch": 3, "ema": 0.999, "names": ["a"]},
        {**WEIGHTS, 7: "text"},
    ],
    ids=["plain", "module", "module twice", "state_dict", "model", "ema", "no ema", "both", "order", "more", "number"],
)
def test_weights_in_every_wrapping(tmp_path, content):
    save_checkpoint(tmp_path / "a.pth", content)
    found = load_weights(tmp_path / "a.pth")
    assert found.keys() == WEIGHTS.keys()
    assert found["conv.weight"].tolist() == [1.0, -2.0] and found["bn.num_batches_tracked"].item() == 7


def test_weights_of_a_training_are_the_averaged_ones(tmp_path):
    model = nn.Sequential(nn.Linear(2, 1), nn.BatchNorm1d(1))
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    with torch.no_grad():
        model[0].weight.fill_(9)
        average.module[0].weight.copy_(torch.tensor([[0.5, 0.25]]))
    save_checkpoint(tmp_path / "last.pth", {"model": model.state_dict(), "ema": average.state_dict()})
    found = load_weights(tmp_path / "last.pth")
    assert found.keys() == model.state_dict().keys() and found["0.weight"].tolist() == [[0.5, 0.25]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.bool])
def test_weights_keep_their_dtype(tmp_path, dtype):
    save_checkpoint(tmp_path / "a.pth", {"a": torch.ones(2, dtype=dtype)})
    assert load_weights(tmp_path / "a.pth")["a"].dtype == dtype


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": {}}, "a.pth holds no weights"),
        ({"epoch": 3}, "a.pth holds no weights"),
        ({"n_averaged": torch.tensor(3)}, "a.pth holds no weights"),
        ([torch.zeros(1)], "a.pth holds no weights"),
        (torch.zeros(1), "a.pth holds no weights"),
        (None, "a.pth holds no weights"),
        ({"model": {"b": torch.zeros(1), "module.a": torch.tensor([0, math.nan])}}, "a.pth .* not finite: a$"),
        ({"a": torch.tensor(math.inf, dtype=torch.float16)}, "a.pth holds weights that are not finite: a$"),
    ],
)
def test_what_holds_no_usable_weights(tmp_path, content, message):
    save_checkpoint(tmp_path / "a.pth", content)
    with pytest.raises(ValueError, match=message) as caught:
        load_weights(tmp_path / "a.pth")
    assert "\n" not in str(caught.value)


def test_weights_of_a_damaged_or_missing_file(tmp_path):
    (tmp_path / "a.pth").write_bytes(b"<html>404</html>")
    with pytest.raises(ValueError, match="a.pth is not a checkpoint"):
        load_weights(tmp_path / "a.pth")
    with pytest.raises(FileNotFoundError, match="b.pth: no such file"):
        load_weights(tmp_path / "b.pth")


# ---------------------------------------------------------------- names


@pytest.mark.parametrize("name", ["run1", "zellen_größe", "a b", "...", "-x"])
def test_plain_names(name):
    assert is_plain_name(name)


@pytest.mark.parametrize("name", ["", ".", "..", "/", "a/b", "../a", "/a", "a/", "a\0b"])
def test_names_that_are_paths(name):
    assert not is_plain_name(name)
