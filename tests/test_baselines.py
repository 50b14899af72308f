"""tools/baselines.py: thresholds and separations by hand, and the table that the command prints.

python -m pytest -q tests/test_baselines.py
"""

import re

import cv2
import numpy as np
import pytest
import yaml
from conftest import REPOSITORY, call, run_script
from test_inference import write_run

from common.images import write_png
from common.synthetic import generate_nuclei
from instances import DEFAULTS, drop_small, judge, official_scores
from labels import write_labels
from tools import baselines
from tools.baselines import components, distance_watershed, otsu


def discs(centres, radius=9, shape=(40, 60)):
    mask = np.zeros(shape, np.uint8)
    for centre in centres:
        cv2.circle(mask, centre, radius, 1, -1)
    return mask > 0


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """inputs/dsb2018 with three generated images and labels, and a split."""
    folder = tmp_path_factory.mktemp("baselines")
    for kind in ("images", "labels"):
        (folder / "inputs" / "dsb2018" / kind).mkdir(parents=True)
    for seed in range(3):
        image, labels = generate_nuclei(seed, 96)
        write_png(folder / "inputs" / "dsb2018" / "images" / f"img{seed}.png", image)
        write_labels(folder / "inputs" / "dsb2018" / "labels" / f"img{seed}.png", labels)
    (folder / "split.yml").write_text(yaml.safe_dump({"train": ["img0"], "val": ["img1", "img2"]}))
    write_run(folder / "models" / "nuc", 3, target="instances", diameter=22.0, stretch="none", **DEFAULTS)
    (folder / "models" / "nuclei_L2").symlink_to(REPOSITORY / "models" / "nuclei_L2")
    return folder


def rows(result):
    """The printed table -> {method: {heading: cell}}."""
    head, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in result.stdout.splitlines()]
    return {line[0]: dict(zip(head, line, strict=True)) for line in lines}


@pytest.mark.parametrize("inverted", [False, True])
def test_otsu_takes_the_lesser_side(inverted):
    mask = discs([(15, 20), (45, 20)])
    image = np.where(mask[..., None], 180, 40).astype(np.uint8).repeat(3, axis=2)
    noise = np.random.default_rng(0).integers(0, 20, image.shape, np.uint8)
    image = 255 - (image + noise) if inverted else image + noise
    assert (otsu(image) == mask).all()
    assert not otsu(np.full((5, 5, 3), 80, np.uint8)).any()


def test_touching_discs():
    mask = discs([(20, 20), (36, 20)])
    assert components(mask).max() == 1
    labels = distance_watershed(mask)
    assert labels.max() == 2 and ((labels > 0) == mask).all()
    assert labels[20, 20] != labels[20, 36] and len(np.unique(labels[:, 28])) <= 3
    assert distance_watershed(discs([(20, 20)])).max() == 1


def test_small_parts_are_dropped():
    mask = discs([(15, 20)])
    mask[0, 50:59] = True
    for separate in (components, distance_watershed):
        assert separate(mask).max() == 1 and separate(mask, smallest=1).max() == 2
        assert not separate(np.zeros((8, 8), bool)).any()


def test_the_table(place):
    of_all = rows(run_script("tools.baselines", "--true", "--kinds", cwd=place))
    methods = [
        f"{name} + {way}" for name in ("Otsu", "true foreground") for way in ("components", "distance watershed")
    ]
    assert [name for name in of_all if "," not in name] == methods
    expected = []
    for seed in range(3):
        labels = generate_nuclei(seed, 96)[1]
        found = components(labels > 0)
        expected.append(judge(found, labels))
        assert (drop_small(found, 20) == found).all()
    row = of_all["true foreground + components"]
    assert (row["images"], row["official"]) == ("3", f"{official_scores(expected).mean():.3f}")
    assert row["false"] == "0" and int(row["merges"]) >= 0
    assert sum(int(of_all[name]["images"]) for name in of_all if name.startswith("Otsu + components,")) == 3


def test_a_split_and_a_foreground_model(place):
    found = rows(run_script("tools.baselines", "--split", "split.yml", "--name", "nuclei_L2", cwd=place))
    assert [row["images"] for row in found.values()] == ["2"] * 4
    assert float(found["nuclei_L2 + components"]["official"]) > 0.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dataset", "none"], "inputs/none/images: no such folder"),
        (["--split", "gone.yml"], "gone.yml: no such file"),
        (["--split", "other.yml"], "inputs/dsb2018 lacks 1 of 1 ids: imgX"),
        (["--split", "empty.yml"], "empty.yml: expected the lists `train:` and `val:`"),
        (["--name", "gone"], "models/gone/config.yml: no such file"),
        (["--name", "nuc"], "models/nuc finds individual nuclei (--target instances); tools.baselines needs a run of"),
    ],
)
def test_what_is_no_table(place, options, message, monkeypatch):
    monkeypatch.chdir(place)
    (place / "other.yml").write_text("train: [img0]\nval: [imgX]")
    (place / "empty.yml").write_text("test: [img0]")
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        call(monkeypatch, baselines, *options)
