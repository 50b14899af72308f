"""Nothing is lost: locks, signals, and runs that are killed with -9 at random moments and resumed, bit for bit.

python -m pytest -q tests/test_resume.py
python -m pytest -q -s -m slow tests/test_resume.py      # the loop of kills, a line each
"""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from conftest import REPOSITORY, call, trained, write_data_set
from torch import nn

import engine
import train
import transfer_resnet18
import val
from common.files import load_checkpoint

TINY = "--dataset tiny --width 2 --input_w 32 --input_h 32 --epochs 4 -b 4 --device cpu --amp off --lr 0.02 --ema 0.9"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def go(place, monkeypatch):
    return lambda *options: call(monkeypatch, train, *options)


@pytest.fixture(scope="module")
def place(tmp_path_factory, one_thread):
    """A folder with inputs/tiny and models/straight, a run without any accident."""
    return trained(tmp_path_factory.mktemp("resume"), train, TINY, "--name straight")


@pytest.fixture(autouse=True)
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("TQDM_DISABLE", "1")


def lines(name):
    """log.csv without the seconds; every line is whole."""
    rows = (Path("models") / name / "log.csv").read_text().split("\n")
    assert rows.pop() == "" and len({row.count(",") for row in rows}) == 1
    return [row.rpartition(",")[0] for row in rows]


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a if key != "rows")  # they have seconds
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def same_run(a, b):
    """The logs, and everything in both checkpoints, bit for bit."""
    files = [[load_checkpoint(f"models/{name}/{file}") for name in (a, b)] for file in ("model.pth", "last.pth")]
    return lines(a) == lines(b) and all(equal(*pair) for pair in files)


def hidden(name):
    return [path.name for path in Path("models", name).iterdir() if path.name.startswith(".")]


# ---------------------------------------------------------------- one process a run


def started(name, *options):
    """A process of its own that trains."""
    command = [sys.executable, REPOSITORY / "train.py", *TINY.split(), "--name", name, *options]
    settings = {key: value for key, value in os.environ.items() if key != "DEBUG"} | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("schedule", ["ConstantLR", "MultiStepLR --milestones 2", "ReduceLROnPlateau --patience 0"])
def test_more_epochs_where_the_schedule_has_no_end(go, capsys, schedule):
    """The longer training is the one that was asked for later, bit for bit."""
    words = f"{TINY} --ema 0 --scheduler {schedule}"
    go(words, "--epochs 3 --name long --overwrite")
    go(words, "--epochs 1 --name longer --overwrite")
    capsys.readouterr()
    go("--name longer --resume --epochs 3")
    assert "models/longer: 3 epochs instead of 1\n" in capsys.readouterr().out
    assert yaml.safe_load(Path("models/longer/config.yml").read_text())["epochs"] == 3
    one, other = (torch.load(f"models/{name}/last.pth", weights_only=True) for name in ("long", "longer"))
    assert all(torch.equal(value, other["model"][key]) for key, value in one["model"].items())
    assert lines("long") == lines("longer") and len(lines("long")) == 4
    go("--name longer --resume")
    assert "all 3 epochs are done" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"but these differ: epochs 2 \(run: 3\)"):
        go("--name longer --resume --epochs 2")


@pytest.mark.parametrize("schedule", ["OneCycleLR", "CosineAnnealingLR"])
def test_no_more_epochs_where_the_schedule_ends(go, schedule):
    go(TINY, "--epochs 1 --name ended --overwrite --scheduler", schedule)
    kept = Path("models/ended/config.yml").read_bytes()
    said = (
        f"models/ended ends at epoch 1, because {schedule} .* start another run with --weights models/ended/model.pth$"
    )
    with pytest.raises(ValueError, match=said):
        go("--name ended --resume --epochs 2")
    assert Path("models/ended/config.yml").read_bytes() == kept


def wait_for_epochs(process, name, epochs):
    log = Path("models", name, "log.csv")
    while not log.is_file() or len(log.read_text().splitlines()) <= epochs:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def test_a_second_process_is_refused_and_a_killed_one_resumes_as_if_nothing_had_happened(go, monkeypatch, capsys):
    long = "--epochs 40"
    go(TINY, long, "--name long --overwrite")
    process = started("busy", *long.split(), "--num_workers", "2")
    try:
        wait_for_epochs(process, "busy", 2)
        process.send_signal(signal.SIGSTOP)  # it keeps its lock
        for how in ("--name busy --resume", f"{TINY} --name busy --overwrite", f"{TINY} --name busy"):
            with pytest.raises(ValueError, match="is training models/busy right now; wait until it ends"):
                go(how)
        transfer = "--demo --epochs 1 --name busy --overwrite"
        with pytest.raises(ValueError, match="another process is training models/busy"):
            call(monkeypatch, transfer_resnet18, transfer)
        call(monkeypatch, val, "--name busy --device cpu")  # reading is free
        assert process.poll() is None and 2 < len(lines("busy")) < 41
    finally:
        process.kill()
        process.wait()  # not for its output, which its loader processes hold open
    assert hidden("busy")  # the lock's file is still there, and the loader processes live on for seconds
    Path("models/busy/.last.pth.123.tmp").write_bytes(b"half of a check")
    go("--name busy --resume --num_workers 0 --cache False --checkpointing True")
    said = "cache False (run: auto), checkpointing True (run: False), num_workers 0 (run: 2)"
    assert f"change the result by rounding at most: {said}" in capsys.readouterr().out
    assert same_run("long", "busy") and hidden("busy") == []
    assert Path("models/long/model.pth").read_bytes() == Path("models/busy/model.pth").read_bytes()
    before = {path: path.read_bytes() for path in Path("models/busy").iterdir()}
    go("--name busy --resume --num_workers 0 --device auto --amp off")
    assert "all 40 epochs are done" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in Path("models/busy").iterdir()} == before


def test_a_mistake_leaves_no_folder(go, place, monkeypatch):
    (place / "other").mkdir()
    (place / "other" / "inputs").symlink_to(place / "inputs")
    monkeypatch.chdir(place / "other")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        go(TINY, "--name new --dataset none")
    assert not Path("models").exists()


# ---------------------------------------------------------------- signals


def test_control_c_keeps_the_last_epoch_and_says_how_to_go_on():
    process = started("held", "--epochs", "5000", "--num_workers", "2")
    wait_for_epochs(process, "held", 1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130 and err.strip() == "train.py: stopped", out + err
    assert out.rstrip().endswith("python train.py --name held --resume") and Path("models/held/last.pth").is_file()


@pytest.mark.parametrize(
    ("file", "number"), [("model.pth", signal.SIGTERM), ("last.pth", signal.SIGINT), ("log.csv", signal.SIGTERM)]
)
def test_a_signal_while_an_epoch_is_kept_waits_until_it_is(go, monkeypatch, capsys, file, number):
    """Between any two of the three files nothing is lost, and nothing half of an epoch is there."""
    name = "write_log" if file == "log.csv" else "save_checkpoint"
    real = getattr(engine, name)

    def disturbed(*arguments):
        if Path("models/stopped", file) in arguments:
            os.kill(os.getpid(), number)
        return real(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as caught:
        patch.setattr(engine, name, disturbed)
        go(TINY, "--name stopped --overwrite")
    assert caught.type.__name__ == ("Terminated" if number == signal.SIGTERM else "KeyboardInterrupt")
    assert (
        "the last finished epoch is kept; continue with: python train.py --name stopped --resume"
        in capsys.readouterr().out
    )
    last = load_checkpoint("models/stopped/last.pth")
    assert lines("stopped") == lines("straight")[:2] and len(last["rows"]) == 1 and last["best_epoch"] == 1
    assert Path("models/stopped/curves.png").is_file() and hidden("stopped") == []
    go("--name stopped --resume")
    assert same_run("straight", "stopped")


def stopped_in_step(monkeypatch, number, options):
    """A training that gets SIGTERM in the middle of its step `number` -> the steps that it began."""
    real, steps = engine.Run.learn, []

    def disturbed(run, loss):
        steps.append(len(steps) + 1)
        if steps[-1] == number:
            os.kill(os.getpid(), signal.SIGTERM)
        real(run, loss)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine.Run, "learn", disturbed)
        call(patch, train, options)
    return steps


def test_a_signal_in_a_step_ends_the_training_after_it(monkeypatch):
    assert stopped_in_step(monkeypatch, 3, f"{TINY} --name stepped") == [1, 2, 3]  # two an epoch
    assert lines("stepped") == lines("straight")[:2]


# ---------------------------------------------------------------- resuming


def test_a_run_without_a_whole_epoch_is_started_again(go, monkeypatch, capsys):
    assert stopped_in_step(monkeypatch, 2, f"{TINY} --name first") == [1, 2]
    assert "no epoch was finished; continue with: python train.py --name first --resume" in capsys.readouterr().out
    Path("models/first/model.pth").write_bytes(b"as a kill between the two checkpoints leaves it")
    go("--name first --resume")
    assert "has no finished epoch yet: starting with the first" in capsys.readouterr().out
    assert same_run("straight", "first")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_run_of_a_gpu_goes_on_without_one_where_auto_says_so(go, capsys):
    shutil.copytree("models/straight", "models/gpu")
    path = Path("models/gpu/config.yml")
    path.write_text(path.read_text().replace("device: cpu\n", "device: cuda\n"))
    with pytest.raises(ValueError, match="use --device auto or cpu"):
        go("--name gpu --resume")
    go("--name gpu --resume --device auto")
    assert "change the result by rounding at most: device cpu (run: cuda)" in capsys.readouterr().out


def test_a_network_that_draws_random_numbers_is_resumed_alike(go, monkeypatch):
    """None of ours has dropout; who adds it gets the same stream after --resume."""
    build = train.build_model

    def with_dropout(config):
        model = build(config)
        model.conv0_0 = nn.Sequential(model.conv0_0, nn.Dropout(0.3))
        return model

    monkeypatch.setattr(train, "build_model", with_dropout)
    go(TINY, "--epochs 2 --name dropout")
    stopped_in_step(monkeypatch, 4, f"{TINY} --epochs 2 --name dropped")
    torch.rand(7)
    go("--name dropped --resume")
    assert same_run("dropout", "dropped")
    model = with_dropout(yaml.safe_load(Path("models/dropout/config.yml").read_text())).train()
    images = torch.rand(1, 3, 32, 32)
    assert not torch.equal(model(images), model(images))


# ---------------------------------------------------------------- the loop of kills

# Imports once, then forks a process for each line of its input, which says arguments and output; answers pid, status.
ZYGOTE = """
import importlib, json, os, sys
import albumentations, matplotlib.figure, sklearn.model_selection, torch
from common.cli import run_script
script = importlib.import_module(sys.argv[1])
torch.set_num_threads(1)
for line in sys.stdin:
    arguments, output = json.loads(line)
    pid = os.fork()
    if not pid:
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        os.dup2(1, 2)
        os.close(0)
        sys.argv = [sys.argv[1] + ".py", *arguments]
        run_script(script.main)
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


class Zygote:
    def __init__(self, script):
        settings = {
            **os.environ,
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": "1",
            "NO_ALBUMENTATIONS_UPDATE": "1",
        }
        command = [sys.executable, "-c", ZYGOTE, script]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=settings)

    def start(self, *options):
        self.process.stdin.write(json.dumps([" ".join(map(str, options)).split(), "said.txt"]) + "\n")
        self.process.stdin.flush()
        self.pid = int(self.process.stdout.readline())

    def status(self):
        return int(self.process.stdout.readline())

    def ended(self):
        """True once it has; a zombie does until `status` is asked for."""
        stat = Path(f"/proc/{self.pid}/stat")
        return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


def digest(state):
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in state.values())).hexdigest()


def best_weights(monkeypatch, script, options):
    """Runs the training in this process -> {digest of what became model.pth: epoch}."""
    real, found = engine.save_checkpoint, {}

    def noted(path, state):
        if path.name == "model.pth":
            epoch = len(lines("straight")) if (path.parent / "log.csv").exists() else 1  # a heading and the rows
            found[digest(state)] = epoch
        real(path, state)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "save_checkpoint", noted)
        call(patch, script, options, "--name straight --overwrite")
    return found


def wait(zygote, condition, seconds=300):
    """False when the process ended before."""
    for _ in range(int(seconds * 2000)):
        if condition():
            return True
        if zygote.ended():
            return False
        time.sleep(0.0005)
    raise AssertionError(f"nothing for {seconds} s: {Path('said.txt').read_text()}")


def size(path):
    try:
        return path.stat().st_size
    except FileNotFoundError:  # not yet, or renamed just now
        return 0


def look(best, before):
    """Everything in models/killed is whole and no worse than before -> (epoch, epoch of model.pth), what to print."""
    folder = Path("models/killed")
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())} if folder.exists() else {}
    for name in ("config.yml", "split.yml"):
        assert name not in files or yaml.safe_load((folder / name).read_text())
    if "curves.png" in files:
        assert cv2.imread(str(folder / "curves.png")) is not None
    epoch = logged = kept = 0
    if "last.pth" in files:
        last = load_checkpoint(folder / "last.pth")
        epoch = len(last["rows"])
        score = "val_iou" if "val_iou" in last["rows"][0] else "val_acc"
        assert max(row[score] for row in last["rows"]) == last.get("best_iou", last.get("best_acc"))
    if "log.csv" in files:
        logged = len(lines("killed")) - 1
        assert lines("killed") == lines("straight")[: logged + 1] and epoch - 1 <= logged <= epoch
    if "model.pth" in files:
        kept = best[digest(load_checkpoint(folder / "model.pth"))]  # a KeyError: no weights that the run should have
    assert epoch >= before[0] and kept >= before[1] and kept <= epoch + 1
    torn = ", ".join(f"{name} {size / 1e6:.2f} MB" for name, size in files.items() if name.endswith(".tmp")) or "none"
    return (epoch, kept), f"last.pth epoch {epoch:2}, log.csv {logged:2} rows, model.pth epoch {kept:2}, torn: {torn}"


def kill_and_resume(monkeypatch, script, options, kills, seed):
    """Kills the run so often, at moments that a seeded draw spreads over it and its writing, and resumes it each time.

    A moment is a number of whole epochs after the process began and a part of the next one; or, each third time, when a
    checkpoint is being written.
    """
    rng = random.Random(seed)
    started = time.time()
    best = best_weights(monkeypatch, script, options)
    epochs = len(lines("straight")) - 1
    pace = (time.time() - started) / epochs
    zygote, state, done = Zygote(script.__name__), (0, 0), 0
    try:
        for number in range(1, 1000):
            has_config = Path("models/killed/config.yml").exists()
            zygote.start(f"{options} --name killed", "--resume" if has_config else "")
            if done == kills:
                break
            log, before = Path("models/killed/log.csv"), state[0]
            go_on = rng.randrange(0, max(2, 2 * (epochs - before) // (kills - done + 1)))

            def passed(log=log, go_on=go_on, target=before + go_on):
                return not go_on or (log.exists() and len(log.read_text().splitlines()) > target)

            alive, how = wait(zygote, passed), f"{go_on} epochs later"
            if alive and number % 3 == 0:
                part = rng.random()

                def writing(
                    log=log, part=part
                ):  # so much of it as the draw says; model.pth only in epochs that are better
                    torn = log.parent.glob(".*.pth.*.tmp")
                    return any(
                        size(path) >= part * size(log.with_name(path.name.split(".")[1] + ".pth")) for path in torn
                    )

                alive = wait(zygote, writing)
                how += ", in a checkpoint"
            elif alive:
                pause = rng.uniform(0, 1.2 * pace if go_on else 3 * pace)
                time.sleep(pause)
                how += f" + {pause:.2f} s"
            os.kill(zygote.pid, signal.SIGKILL)
            status = zygote.status()
            if status != signal.SIGKILL:  # it came to its end before
                assert status == 0, Path("said.txt").read_text()
                break
            done += 1
            state, told = look(best, state)
            print(f"{script.__name__} kill {done:2}/{kills}  {how:<33}{told}", flush=True)
        else:
            raise AssertionError("too many lives")
        status = zygote.status() if status == signal.SIGKILL else status
    finally:
        zygote.process.stdin.close()
        zygote.process.wait(300)
    assert status == 0, Path("said.txt").read_text()
    assert same_run("straight", "killed") and hidden("killed") == []
    print(
        f"{script.__name__} {options}: {done} kills, {epochs} epochs, the same log and weights as without", flush=True
    )
    assert done > kills / 2


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    write_data_set(tmp_path / "inputs" / "tiny", count=9)
    monkeypatch.chdir(tmp_path)
    return tmp_path


WIDE = "--dataset tiny --input_w 32 --input_h 32 -b 4 --device cpu --amp off"  # to write takes a third of an epoch


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        f"{WIDE} --width 12 --lr 0.01 --epochs 40 --ema 0.9 --num_workers 0",
        f"{WIDE} --width 12 --lr 0.01 --epochs 40 --ema 0.9 --num_workers 2 --cache False --deep_supervision True",
        f"{WIDE} --width 12 --lr 0.05 --epochs 90 --ema 0 --early_stopping 12 --optimizer SGD --arch UNet"
        " --scheduler ReduceLROnPlateau",
    ],
    ids=["averaged", "workers", "early stopping"],
)
def test_twenty_kills_lose_nothing(fresh, monkeypatch, options):
    kill_and_resume(monkeypatch, train, options, kills=20, seed=7)


@pytest.mark.slow
@pytest.mark.parametrize("extra", ["", "--freeze --num_workers 2"], ids=["all", "frozen"])
def test_kills_of_the_transfer_job_lose_nothing(fresh, monkeypatch, extra):
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for k, name in enumerate(("ants", "bees")):
            (fresh / "pictures" / part / name).mkdir(parents=True)
            for index in range(6):
                picture = rng.integers(0, 200, (40, 40, 3), np.uint8)
                picture[..., k] = np.clip(picture[..., k] + 40.0, 0, 255).astype(np.uint8)
                cv2.imwrite(str(fresh / "pictures" / part / name / f"{index}.png"), picture)
    options = f"--data_dir pictures --weights none --img_size 32 -b 4 --device cpu --amp off --epochs 20 {extra}"
    kill_and_resume(monkeypatch, transfer_resnet18, options, kills=8, seed=3)
