"""What several test files share: running a script as its user does, and a tiny data set on disk.

from conftest import run_script, write_data_set
"""

import contextlib
import http.server
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before PyTorch starts: the tests run in several processes

import cv2
import numpy as np
import pytest
import torch

from instances import DEFAULTS

REPOSITORY = Path(__file__).parents[1]

# A shell's background job ignores Ctrl-C, and what it starts inherits that: the scripts under test shall not.
signal.signal(signal.SIGINT, signal.default_int_handler)


def run_script(script, *args, cwd, ok=True, env=None, timeout=300):
    """Run `script`, "train.py" or "tools.benchmark", of the repository in the folder `cwd` -> CompletedProcess of text.

    ok=True asserts status 0; ok=False asserts a user's mistake: status 2, and one line on stderr that names the script,
    after any progress, and no traceback; ok=None asserts nothing. Deprecated calls are errors, one thread is used.
    `env` is added to the environment.
    """
    settings = {
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "error::DeprecationWarning,error::FutureWarning",
        "NO_ALBUMENTATIONS_UPDATE": "1",
        "PYTHONPATH": str(REPOSITORY),
        **(env or {}),
    }
    environment = {key: value for key, value in os.environ.items() if key != "DEBUG"} | settings
    place = [str(REPOSITORY / script)] if script.endswith(".py") else ["-m", script]
    name = Path(script).name if script.endswith(".py") else f"{script.rpartition('.')[2]}.py"
    command = [sys.executable, *place, *map(str, args)]
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)
    said = f"{' '.join(command)}\nstatus {result.returncode}\n{result.stdout}\n{result.stderr}"
    if ok:
        assert result.returncode == 0, said
    elif ok is not None:
        assert result.returncode == 2 and "Traceback" not in result.stderr, said
        assert result.stderr.strip().split("\n")[-1].startswith(f"{name}: error: "), said
    return result


def call(patch, script, *options):
    """script.main() with these options, in this process -> what it returns. `script` is the imported module."""
    patch.setattr(sys, "argv", [f"{script.__name__.rpartition('.')[2]}.py", *" ".join(map(str, options)).split()])
    try:
        return script.main()
    finally:  # an error keeps its loader processes, and the garbage collector would wait five seconds for each
        for process in multiprocessing.active_children():
            process.terminate()


def trained(folder, script, *options):
    """folder/inputs/tiny and the run that `script`, which is train, makes of it with these options -> folder."""
    write_data_set(folder / "inputs" / "tiny", count=9)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        call(patch, script, *options)
    return folder


def browser_in(folder):
    """A stand-in for a browser -> the environment in which scripts start it, and the file where it notes addresses."""
    program, seen = folder / "browser", folder / "seen.txt"
    program.write_text(f'#!/bin/sh\necho "$1" >> "{seen}"\n')
    program.chmod(0o755)
    return {"BROWSER": str(program)}, seen


def write_data_set(folder, count=6, size=(32, 32), num_classes=1, channels=3, seed=0):
    """folder/images/<id>.png and folder/masks/<class>/<id>.png, ids img00, img01 ...; -> the ids.

    Bright discs, one mask of 0 and 255 a class, on dark noise: a network can learn it. `size` is (height, width);
    `channels` 1, 3 or 4.
    """
    folder, (height, width) = Path(folder), size
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    ids = [f"img{number:02d}" for number in range(count)]
    for img_id in ids:
        image = rng.integers(0, 60, (height, width, channels), np.uint8)
        for k in range(num_classes):
            mask = np.zeros((height, width), np.uint8)
            centre = int(rng.integers(width // 4, width - width // 4)), int(rng.integers(height // 4, height * 3 // 4))
            cv2.circle(mask, centre, max(2, min(size) // 5), 255, -1)
            image[mask > 0, k % channels] = 230
            (folder / "masks" / str(k)).mkdir(parents=True, exist_ok=True)
            assert cv2.imwrite(str(folder / "masks" / str(k) / f"{img_id}.png"), mask)
        assert cv2.imwrite(str(folder / "images" / f"{img_id}.png"), image)
    return ids


def write_label_set(folder, count=6, size=(60, 72), seed=0):
    """folder/images/<id>.png and folder/labels/<id>.png, 16 bits, ids img00, img01 ...; -> the ids.

    Bright discs on dark noise, in pairs that touch; the radii of a picture are alike, 4 to 9 pixels.
    """
    folder, (height, width) = Path(folder), size
    rng = np.random.default_rng(seed)
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    ids = [f"img{number:02d}" for number in range(count)]
    for img_id in ids:
        radius, labels = int(rng.integers(4, 10)), np.zeros(size, np.uint16)
        for label in range(1, 9):
            if label % 2:
                centre = rng.integers(radius, (width - radius, height - radius))
            else:
                centre = centre + (2 * radius - 1, 0)
            cv2.circle(labels, centre.tolist(), radius, label, -1)
        image = rng.integers(0, 60, (height, width, 3), np.uint8)
        image[labels > 0] = rng.integers(150, 220, (1, 3))
        assert cv2.imwrite(str(folder / "images" / f"{img_id}.png"), image)
        assert cv2.imwrite(str(folder / "labels" / f"{img_id}.png"), labels)
    return ids


def discs(radius, size=(160, 200), value=200):
    """A picture of bright discs that do not touch, (H, W, 3) uint8, and its label map (H, W) int32."""
    labels, step = np.zeros(size, np.int32), 3 * radius
    places = [(x, y) for y in range(step, size[0] - radius, step) for x in range(step, size[1] - radius, step)]
    for label, centre in enumerate(places, 1):
        cv2.circle(labels, centre, radius, label, -1)
    picture = np.full((*size, 3), 20, np.uint8)
    picture[labels > 0] = value
    return picture, labels


class BrightNuclei:
    """Stands for a Predictor of a run of individual nuclei: what is brighter than half is a nucleus.

    `seen` lists the (height, width) of what it was shown.
    """

    about = name = head = digest = "bright"
    tta = False

    def __init__(self, **config):
        self.seen = []
        self.config = {
            "target": "instances",
            "diameter": 12.0,
            "stretch": "none",
            "input_channels": 3,
            "num_classes": 3,
        }
        self.config |= {"input_h": 64, "input_w": 64, **DEFAULTS, "smallest": 4, "smoothing": 0, **config}

    def __call__(self, images):
        self.seen += [image.shape[:2] for image in images]
        maps = np.zeros((*images.shape[:3], 3), np.float32)
        maps[..., 0] = maps[..., 2] = images[..., 0] > 120
        return maps


@pytest.fixture
def tiny_data(tmp_path):
    """Six 32 x 32 RGB images and masks of one class in tmp_path/inputs/tiny -> that folder."""
    write_data_set(tmp_path / "inputs" / "tiny")
    return tmp_path / "inputs" / "tiny"


@pytest.fixture(scope="module")
def one_thread():
    """As the processes of run_script have: the sums of two threads round differently."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[pytest.param(24, id="some"), pytest.param(500, id="many", marks=pytest.mark.slow)])
def count(request):
    """How many files a test of hostile files breaks; see test_fuzz.py."""
    return request.param


@pytest.fixture
def sandbox(tmp_path, monkeypatch):
    """A folder within a folder, so that what climbs out is seen; `free` is where a reader may write."""
    (tmp_path / "here" / "free").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


@contextlib.contextmanager
def serving(handler):
    """An HTTP server of this machine that answers with `handler`, in a thread; `url` is its address."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextlib.contextmanager
def mounted(folder, options):
    """A small file system of its own: root ignores chmod, and a full disk cannot be pretended otherwise."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"cannot mount: {error}")
    if done.returncode:
        pytest.skip(f"may not mount a tmpfs here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
