"""The trained models in the repository: small, whole, and good on pictures that they never saw."""

import cv2
import numpy as np
import pytest
import torch
import yaml
from conftest import REPOSITORY, call

import predict
from common.synthetic import generate_nuclei
from instances import judge, summarise
from labels import read_labels

MODELS = REPOSITORY / "models"
PICTURES = 24


@pytest.mark.parametrize(
    ("name", "level", "megabytes", "images"),
    [("nuclei_L2", 2, 1.5, (536, 134)), ("nuclei", None, 3.1, (531, 133))],
)
def test_they_are_small_runs(name, level, megabytes, images):
    folder = MODELS / name
    names = {path.name for path in folder.iterdir()}
    assert names >= {"README.md", "config.yml", "model.pth", "split.yml"} and "last.pth" not in names
    assert (folder / "model.pth").stat().st_size < megabytes * 1e6
    config = yaml.safe_load((folder / "config.yml").read_text())
    assert (config["name"], config.get("level"), config["arch"]) == (name, level, "NestedUNet")
    split = yaml.safe_load((folder / "split.yml").read_text())
    assert (len(split["train"]), len(split["val"])) == images
    state = torch.load(folder / "model.pth", weights_only=True)
    kinds = {value.dtype for value in state.values() if value.is_floating_point()}
    assert kinds == {torch.float16} and all(value.isfinite().all() for value in state.values())


def test_nuclei_one_by_one_without_a_name(tmp_path, monkeypatch, capsys):
    """The README's command, right after cloning: generated nuclei, most of which touch others."""
    (tmp_path / "models").mkdir()
    for name in ("nuclei", "nuclei_L2"):  # a checkout may hold runs of its own, which would come first
        (tmp_path / "models" / name).symlink_to(MODELS / name)
    (tmp_path / "pictures").mkdir()
    truth = {}
    for seed in range(8):
        image, truth[seed] = generate_nuclei(seed)
        cv2.imwrite(str(tmp_path / "pictures" / f"{seed}.png"), image[..., ::-1])
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, predict, "pictures --device cpu --amp off") == 0
    assert "models/nuclei, L4" in capsys.readouterr().out
    found = [read_labels(f"outputs/nuclei/predict/{seed}_labels.tif") for seed in truth]
    scores = summarise([judge(labels, truth[seed]) for seed, labels in enumerate(found)])
    assert scores["f1"] > 0.9


def test_it_finds_generated_nuclei_at_once(tmp_path, monkeypatch, capsys):
    """Fluorescence and stained tissue, which it knows from photographs alone: one command, as the README has it."""
    (tmp_path / "models").symlink_to(MODELS)
    (tmp_path / "pictures").mkdir()
    truth = {}
    for seed in range(PICTURES):
        image, labels = generate_nuclei(seed)
        truth[f"{seed:02d}"] = labels > 0
        cv2.imwrite(str(tmp_path / "pictures" / f"{seed:02d}.png"), image[..., ::-1])
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, predict, "--name nuclei_L2 pictures --device cpu") == 0
    assert "models/nuclei_L2, L2" in capsys.readouterr().out
    both = either = 0
    for name, true in truth.items():
        mask = cv2.imread(str(tmp_path / "outputs" / "nuclei_L2" / "predict" / f"{name}_mask.png"), -1) > 127
        both, either = both + np.sum(mask & true), either + np.sum(mask | true)
    assert both / either > 0.8


def test_the_picture_of_the_readme_is_a_generated_one():
    """To the last level of 255: OpenCV 4.11 rounds some pixels otherwise than 5.0."""
    picture = cv2.imread(str(REPOSITORY / "docs" / "picture.png"))[..., ::-1].astype(int)
    assert any(np.abs(picture - generate_nuclei(seed)[0]).max() <= 1 for seed in range(PICTURES))
