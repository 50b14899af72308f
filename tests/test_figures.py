"""tools/figures.py: the figures of a tiny run, and the channel that it shows of a node."""

import cv2
import numpy as np
import pytest
import torch
from conftest import call, trained
from test_inference import write_run

import train
from common import report
from common.synthetic import generate_nuclei
from instances import DEFAULTS
from tools import figures

OPTIONS = "--name tiny --dataset tiny --width 4 --input_w 32 --input_h 32 --epochs 2 -b 4 --augment none"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with models/tiny, a run with four heads, and models/nuc, one of individual nuclei."""
    folder = tmp_path_factory.mktemp("figures")
    write_run(folder / "models" / "nuc", 3, target="instances", diameter=22.0, stretch="none", **DEFAULTS)
    return trained(folder, train, OPTIONS, "--deep_supervision True")


@pytest.fixture
def docs(place, tmp_path, monkeypatch):
    """An empty folder in which the figures are drawn, instead of the repository's docs/."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(figures, "DOCS", tmp_path)
    return tmp_path


def test_the_figures_of_the_newest_run(docs, monkeypatch):
    call(monkeypatch, figures)
    assert sorted(path.name for path in docs.iterdir()) == [
        "features.png",
        "nodes.png",
        "nodes_encoder.png",
        "picture.png",
    ]
    plain, encoded = (cv2.imread(str(docs / name)) for name in ("nodes.png", "nodes_encoder.png"))
    assert plain.shape == encoded.shape == (660, 1000, 3) and not np.array_equal(plain, encoded)
    colours = set(map(tuple, plain.reshape(-1, 3)[:, ::-1].tolist()))
    assert colours >= {figures.ORANGE, figures.SKY, figures.GREEN, figures.BLUE}  # each level has its own
    assert cv2.imread(str(docs / "features.png")).shape == (960, 800, 3)
    picture = cv2.imread(str(docs / "picture.png"))[..., ::-1]
    assert np.array_equal(picture, generate_nuclei(figures.PICTURE)[0])


def test_the_image_is_shown_that_was_asked_for(docs, monkeypatch):
    call(monkeypatch, figures, "--name tiny --image img00")
    first = (docs / "features.png").read_bytes()
    call(monkeypatch, figures, "--name tiny --image img01")
    assert (docs / "features.png").read_bytes() != first
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        call(monkeypatch, figures, "--name tiny --image gone")


@pytest.mark.parametrize("options", ["--name nuc", "--curves tiny nuc"])
def test_runs_of_individual_nuclei_are_refused(docs, monkeypatch, options):
    with pytest.raises(ValueError, match="models/nuc finds individual nuclei .*; tools.figures needs a run of masks"):
        call(monkeypatch, figures, options)
    assert not list(docs.iterdir())


def test_curves_of_two_runs(docs, monkeypatch):
    call(monkeypatch, figures, "--curves tiny tiny")
    assert [path.name for path in docs.iterdir()] == ["fast_and_plain.png"]
    assert cv2.imread(str(docs / "fast_and_plain.png")).shape == (280, 800, 3)


def test_the_channel_that_resembles_the_probability():
    probability = torch.zeros(4, 4)
    probability[:, 2:] = 1  # averaged to 2 x 2: [[0, 1], [0, 1]]
    constant, weak, inverse = torch.ones(2, 2), torch.tensor([[0.0, 1], [1, 1]]), torch.tensor([[5.0, 3], [5, 3]])
    assert np.array_equal(figures.telling(torch.stack([constant, weak, inverse]), probability), inverse.numpy())


def test_nuclei_one_by_one(docs, place, monkeypatch):
    """Truth above, prediction below; a nucleus that was missed is orange in the truth alone."""
    for name in ("found", "lost"):
        labels = np.zeros((300, 280), np.uint16)
        cv2.circle(labels, (140, 150), 30, 1, -1)
        for folder, array in (("inputs/dsb/images", labels.astype(np.uint8) * 200), ("inputs/dsb/labels", labels)):
            (place / folder).mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(place / folder / f"{name}.png"), array)
        (place / "outputs/nuc/labels").mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(place / f"outputs/nuc/labels/{name}.png"), labels * (name == "found"))
    table = "img_id,kind,official\nfound,dark grey,1.0\nlost,dark grey,0.0\n"
    (place / "outputs/nuc/metrics.csv").write_text(table)
    monkeypatch.setattr(figures, "read_config", lambda folder: {"dataset": "dsb"})
    call(monkeypatch, figures, "--nuclei nuc")
    sheet = cv2.imread(str(docs / "one_by_one.jpg"))[..., ::-1]
    assert sheet.shape[1] > 2 * figures.VIEW
    above, below = np.array_split(sheet.astype(int), 2)

    def has(half, colour):
        return (np.abs(half - colour).sum(2) < 120).any()

    assert has(above, report.VERMILION) and not has(below, report.VERMILION)
    assert has(above, report.GREEN) and has(below, report.GREEN)
