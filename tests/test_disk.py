"""A full disk, a read-only one and files that vanish, in the middle of everything: one line, and what was good stays.

python -m pytest -q tests/test_disk.py      # as root, or where else a small tmpfs may be mounted; skips without
"""

import functools
import http.server
import multiprocessing
import os
import shutil
import signal
import subprocess
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import call, mounted, run_script, serving, trained

import engine
import predict
import train
import transfer_resnet18
import val
from common import download
from common.files import load_checkpoint, save_checkpoint, write_yaml

# the val_iou of these runs rises at first, so that model.pth is written in several epochs
TINY = "--dataset tiny --width 2 --input_w 32 --input_h 32 --epochs 4 -b 4 --device cpu --amp off --ema 0 --lr 0.03"
TINY += " --seed 1 --augment none --loss BCEDiceLoss"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def straight(tmp_path_factory, one_thread):
    """A folder with inputs/tiny and models/run, trained without any accident."""
    return trained(tmp_path_factory.mktemp("straight"), train, TINY, "--name run")


@pytest.fixture
def place(straight, tmp_path, monkeypatch):
    """An empty current folder with a copy of inputs/tiny, and no progress bars."""
    shutil.copytree(straight / "inputs", tmp_path / "inputs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    return tmp_path


def refused(monkeypatch, script, *options, match):
    """The script ends in an error that run_script prints in one line of at most 400 letters."""
    with pytest.raises((ValueError, OSError), match=match) as caught:
        call(monkeypatch, script, *options)
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value) and len(str(caught.value)) < 400
    return str(caught.value)


def content(folder):
    """{path: bytes}, temporary files too, but for the lock, which is there while the run trains."""
    files = [path for path in sorted(Path(folder).rglob("*")) if path.is_file() and path.name != ".lock"]
    return {path.relative_to(folder): path.read_bytes() for path in files}


def fill(disk):
    """Not one byte is left."""
    with open(disk / "filler", "wb", buffering=0) as file:
        for size in (2**16, 2**12, 1):
            try:
                while file.write(b"0" * size):
                    pass
            except OSError:
                continue


def at_call(monkeypatch, module, name, accident, when):
    """The accident happens once, before the first call of module.<name> whose arguments are such that when(*args)."""
    real, happened = getattr(module, name), []

    def before(*args, **options):
        if not happened and when(*args):
            happened.append(True)
            accident()
        return real(*args, **options)

    monkeypatch.setattr(module, name, before)
    return happened


def same_run(a, b):
    """The logs but for the seconds, and the weights, bit for bit."""
    logs = [[line.rsplit(",", 1)[0] for line in (folder / "log.csv").read_text().splitlines()] for folder in (a, b)]
    states = [load_checkpoint(folder / "last.pth")["model"] for folder in (a, b)]
    best = [load_checkpoint(folder / "model.pth") for folder in (a, b)]
    return logs[0] == logs[1] and all(
        torch.equal(x[key], y[key]) for x, y in (states, best) for key in x.keys() | y.keys()
    )


# ---------------------------------------------------------------- training

WRITERS = {"model.pth": "save_checkpoint", "last.pth": "save_checkpoint", "log.csv": "write_log"}


def is_rewrite(file):
    """For at_call: an earlier epoch's file is about to be replaced."""

    def when(*args):
        paths = [arg for arg in args if isinstance(arg, Path)]
        return bool(paths) and paths[0].name == file and paths[0].exists()

    return when


@pytest.mark.parametrize("file", WRITERS)
def test_a_full_disk_while_an_epoch_is_kept(straight, place, monkeypatch, file):
    with mounted(place / "models", "size=3m") as disk:
        before = {}

        def accident():
            before.update(content(disk))
            fill(disk)

        happened = at_call(monkeypatch, engine, WRITERS[file], accident, is_rewrite(file))
        expected = f"No space left on device: 'models/run/{file}'; the last finished epoch is kept; continue with: .*"
        refused(monkeypatch, train, TINY, "--name run", match=expected)
        (disk / "filler").unlink()
        after = content(disk)
        after.pop(Path("run/curves.png"), None)
        assert happened and after.keys() == before.keys() - {Path("run/curves.png")}  # no temporary file among them
        assert all(after[path] == before[path] for path in after)
        monkeypatch.undo()
        monkeypatch.chdir(place)
        call(monkeypatch, train, "--name run --resume")
        assert same_run(disk / "run", straight / "models" / "run")


def test_a_full_disk_while_the_curves_are_drawn(straight, place, monkeypatch):
    with mounted(place / "models", "size=3m") as disk:
        at_call(monkeypatch, engine, "plot_curves", lambda: fill(disk), lambda *_: True)
        refused(monkeypatch, train, TINY, "--name run", match="No space left on device: 'models/run/curves.png'$")
        assert same_run(disk / "run", straight / "models" / "run")
        (disk / "filler").unlink()
        call(monkeypatch, train, "--name run --resume")
        assert (disk / "run" / "curves.png").is_file() and not list((disk / "run").glob(".*"))


def test_the_curves_error_never_hides_another(place, monkeypatch):
    def no_curves(*args, **options):
        raise OSError("no curves")

    monkeypatch.setattr(engine, "plot_curves", no_curves)
    at_call(monkeypatch, engine, "set_epoch", lambda: (_ for _ in ()).throw(OSError("the first")), lambda _, n: n == 2)
    refused(monkeypatch, train, TINY, "--name run", match="^the first; the last finished epoch is kept")


def test_a_disk_that_becomes_read_only(straight, place, monkeypatch):
    with mounted(place / "models", "size=3m") as disk:

        def accident():  # a mount on top, because a disk with an open file (the lock) refuses to become read-only
            subprocess.run(["mount", "--bind", disk, disk], check=True)
            subprocess.run(["mount", "-o", "remount,bind,ro", disk], check=True)

        at_call(monkeypatch, engine, "save_checkpoint", accident, is_rewrite("last.pth"))
        refused(
            monkeypatch,
            train,
            TINY,
            "--name run",
            match="Read-only file system: 'models/run/last.pth'; the last finished",
        )
        refused(monkeypatch, train, "--name run --resume", match="Read-only file system: 'models/run/.lock'")
        refused(monkeypatch, train, TINY, "--name other", match="Read-only file system: 'models/other'")
        subprocess.run(["umount", disk], check=True)
        call(monkeypatch, train, "--name run --resume")
        assert same_run(disk / "run", straight / "models" / "run") and not list((disk / "run").glob(".*"))


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_status_2(place):
    with mounted(place / "models", "size=300k") as disk:
        result = run_script("train.py", *TINY.split(), "--name", "run", cwd=place, ok=False)
        assert "No space left on device: 'models/run/" in result.stderr and "no epoch was finished" in result.stderr
        assert not (disk / "run" / "last.pth").exists() and not list((disk / "run").glob(".*"))


def test_the_run_is_deleted_while_it_trains(place, monkeypatch):
    accident = functools.partial(shutil.rmtree, place / "models" / "run")
    at_call(monkeypatch, engine, "save_checkpoint", accident, is_rewrite("last.pth"))
    refused(monkeypatch, train, TINY, "--name run", match="'models/run/last.pth'; models/run is gone$")


@pytest.mark.parametrize(("damage", "workers"), [("image", 2), ("truncated", 0), ("mask", 0), ("all", 0)])
def test_data_that_vanish(straight, place, monkeypatch, damage, workers):
    inputs = place / "inputs" / "tiny"

    def accident():
        for path in inputs.glob("images/*.png"):
            if damage == "image":
                path.unlink()
            elif damage == "truncated":
                path.write_bytes(path.read_bytes()[:100])
        if damage == "mask":
            shutil.rmtree(inputs / "masks")
        elif damage == "all":
            shutil.rmtree(inputs)

    at_call(monkeypatch, engine, "set_epoch", accident, lambda _, epoch: epoch == 2)
    what = {"image": "no image", "all": "no image", "truncated": "image unreadable", "mask": "no mask"}[damage]
    expected = rf"^inputs/tiny: img\d\d: {what}.*; the last finished epoch is kept; continue with"
    options = ("--name run --cache False --num_workers", workers)
    refused(monkeypatch, train, TINY, *options, match=expected)
    if damage == "all":
        refused(monkeypatch, train, "--name run --resume", match="tiny: no such folder in inputs/")
    shutil.rmtree(inputs, ignore_errors=True)
    shutil.copytree(straight / "inputs" / "tiny", inputs)
    call(monkeypatch, train, "--name run --resume")
    assert same_run(place / "models" / "run", straight / "models" / "run")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of what the dead one held
def test_a_loader_process_that_dies(place, monkeypatch):
    def accident():
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

    at_call(monkeypatch, engine, "set_epoch", accident, lambda _, epoch: epoch == 2)
    options = "--name run --cache False --num_workers 2"
    match = "a loader process died.*the last finished epoch is kept.*--num_workers 0$"
    refused(monkeypatch, train, TINY, options, match=match)


# ---------------------------------------------------------------- the other scripts


def test_a_full_disk_in_the_transfer_job(place, monkeypatch):
    for part in ("train", "val"):
        for k, name in enumerate(("ants", "bees")):
            for index in range(4):
                (place / "pictures" / part / name).mkdir(parents=True, exist_ok=True)
                picture = np.full((40, 40, 3), 60 * index, np.uint8)
                picture[..., k] = 255
                cv2.imwrite(str(place / "pictures" / part / name / f"{index}.png"), picture)
    options = "--data_dir pictures --weights none --freeze --img_size 32 -b 4 --device cpu --epochs 2 --name"
    script = transfer_resnet18
    monkeypatch.setattr(script, "conclude", lambda *arguments: None)
    call(monkeypatch, script, options, "straight")
    shutil.move("models/straight", "straight")
    shutil.rmtree("models")
    with mounted(place / "models", "size=60m") as disk:
        before = {}

        def accident():
            before.update(content(disk))
            fill(disk)

        at_call(monkeypatch, engine, "save_checkpoint", accident, is_rewrite("last.pth"))
        expected = "No space left on device: 'models/run/last.pth'; the last finished epoch is kept; continue with"
        refused(monkeypatch, script, options, "run", match=expected)
        (disk / "filler").unlink()
        after = content(disk)
        assert after.keys() - {Path("run/curves.png")} == before.keys()
        assert all(after[path] == data for path, data in before.items())
        call(monkeypatch, script, "--name run --resume")
        assert same_run(disk / "run", place / "straight")


def test_a_full_disk_while_the_demo_pictures_are_made(place, monkeypatch):
    with mounted(place / "small", "size=500k") as disk:
        arguments = f"--demo --data_dir {disk}/two --epochs 1 --name run"
        refused(monkeypatch, transfer_resnet18, arguments, match="small/two was not written: No space left on device$")
        assert not list(disk.iterdir()) and not (place / "models").exists()


def test_a_full_disk_while_val_writes(straight, place, monkeypatch):
    shutil.copytree(straight / "models", place / "models")
    with mounted(place / "outputs", "size=2m") as disk:
        call(monkeypatch, val, "--name run --device cpu")
        before = content(disk)
        fill(disk)
        refused(monkeypatch, val, "--name run --device cpu", match="No space left on device")
        (disk / "filler").unlink()
        assert content(disk) == before and not list((disk / "run").glob(".*"))


def test_a_full_disk_while_predict_writes(straight, place, monkeypatch):
    shutil.copytree(straight / "models", place / "models")
    noise = np.random.default_rng(0).integers(0, 256, (4, 200, 200, 3), np.uint8)
    for k, picture in enumerate(noise):
        cv2.imwrite(f"{k}.png", picture)
    with mounted(place / "outputs", "size=300k") as disk:
        options = "0.png 1.png 2.png 3.png --name run --device cpu -b 1"
        said = r"No space left on device: 'outputs/run/predict/\d_overlay.png'; \d of 4 pictures are done; "
        said += "repeat the command with --resume to continue$"
        refused(monkeypatch, predict, options, match=said)
        left = content(disk)
        assert left and all(path.suffix in (".png", ".csv") for path in left)
        for path, data in left.items():
            assert path.suffix == ".csv" or cv2.imdecode(np.frombuffer(data, np.uint8), 0) is not None, path


def test_a_picture_that_vanishes_while_predict_is_at_work(straight, place, monkeypatch, capsys):
    shutil.copytree(straight / "models", place / "models")
    pictures = sorted(Path("inputs/tiny/images").iterdir())
    at_call(monkeypatch, predict.PageReader, "read", pictures[4].unlink, lambda _, path: path == pictures[2])
    assert call(monkeypatch, predict, "inputs/tiny/images --name run --device cpu -b 1") == 1
    assert f"skipped {pictures[4]}: No such file or directory" in capsys.readouterr().err
    assert len(list(Path("outputs/run/predict").glob("*_mask.png"))) == len(pictures) - 1


def test_a_full_disk_while_a_file_is_fetched(place, monkeypatch):
    (place / "served").mkdir()
    (place / "served" / "data.zip").write_bytes(bytes(2**20))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=place / "served")
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *arguments: None)
    with serving(handler) as server, mounted(place / "small", "size=512k") as disk:
        with pytest.raises(OSError, match="bytes free; the rest of .* needs 1,048,576"):
            download.fetch(f"{server.url}/data.zip", disk / "data.zip")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**30, 0, 2**30))
        with pytest.raises(OSError, match=r"No space left on device: '.*small/data.zip.part'"):
            download.fetch(f"{server.url}/data.zip", disk / "data.zip")
        assert not (disk / "data.zip").exists()


def test_what_a_file_could_not_become_is_named(place):
    for write in (lambda path: save_checkpoint(path, {"a": torch.zeros(9)}), lambda path: write_yaml(path, {"a": 1})):
        with pytest.raises(FileNotFoundError, match="No such file or directory: 'nowhere/file'"):
            write(Path("nowhere/file"))
