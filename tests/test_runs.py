"""common/runs.py: which run is meant without a name; the lock of a run belongs to its trainer alone."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

from common.runs import newest_run, only_trainer, time_left, weights_file

TRAINER = """
import os, sys, time
from pathlib import Path
from common.runs import newest_run, only_trainer

with only_trainer(Path(sys.argv[1]), ()):
    child = os.fork()
    if child:
        print(child, flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork, and no lock, on this system")
def test_a_forked_child_does_not_keep_the_lock_of_a_killed_trainer(tmp_path):
    """Loader processes are forked, and outlive a trainer that is killed with -9 by some seconds."""
    folder = tmp_path / "run"
    command = [sys.executable, "-c", TRAINER, str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as trainer:
        child = int(trainer.stdout.readline())
        try:
            with pytest.raises(ValueError, match="another process is training"), only_trainer(folder, ()):
                pytest.fail("two trainers at once")
            trainer.kill()
            trainer.wait()
            os.kill(child, 0)  # the child is alive
            with only_trainer(folder, ()):
                assert (folder / ".lock").is_file()
            os.kill(child, 0)
        finally:
            trainer.kill()
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
    assert not (folder / ".lock").exists()


def test_a_run_comes_before_a_folder_of_its_name(tmp_path, monkeypatch):
    """In the repository, --weights nuclei is models/nuclei, although there is a folder nuclei."""
    monkeypatch.chdir(tmp_path)
    for folder in ("models/nuclei", "nuclei", "elsewhere"):
        Path(folder).mkdir(parents=True)
    for file in ("models/nuclei/model.pth", "elsewhere/model.pth", "some.pth"):
        Path(file).touch()
    found = [weights_file(name) for name in ("nuclei", "models/nuclei", "elsewhere", "some.pth", "gone")]
    models = ["models/nuclei/model.pth", "models/nuclei/model.pth"]
    assert list(map(str, found)) == [*models, "elsewhere/model.pth", "some.pth", "models/gone/model.pth"]


def test_the_newest_run_and_the_shipped_ones_last(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def write(name, time, shipped=False, key="arch"):
        folder = tmp_path / "models" / name
        folder.mkdir(parents=True)
        (folder / "config.yml").write_text(f"{key}: x\n")
        (folder / "model.pth").touch()
        os.utime(folder / "model.pth", (time, time))
        if shipped:
            (folder / "README.md").touch()

    with pytest.raises(FileNotFoundError, match="no trained run in models/; train one first: python train.py"):
        newest_run("arch")
    write("card_a", 900, shipped=True)
    write("card_b", 800, shipped=True)
    assert newest_run("arch") == "card_a"
    write("old", 100)
    write("new", 200)
    write("ants", 300, key="classes")
    assert newest_run("arch") == "new" and newest_run("classes") == "ants"
    write("broken", 400)
    (tmp_path / "models" / "broken" / "config.yml").write_text("arch: [x\n")
    assert newest_run("arch") == "new"
    assert "warning: models/broken is left out: models/broken/config.yml" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "1 s"), (35.4, "35 s"), (99.4, "99 s"), (99.6, "2 min"), (2880, "48 min"), (3569, "59 min")]
    + [(3571, "1 h 00 min"), (3900, "1 h 05 min"), (100 * 3600, "100 h 00 min")],
)
def test_the_time_left_in_words(seconds, words):
    assert time_left(seconds) == f"{words} left"
