"""nuclei/rehearsal.py and --rehearse: which crops are mixed in, from which pictures, and real runs of train.py."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import call, write_label_set

import engine
import train
from common.cli import parse_options
from common.synthetic import generate_nuclei
from nuclei import crops
from nuclei.crops import build_crops
from nuclei.rehearsal import Rehearsal, build_rehearsal

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONS = (
    "--dataset cells --target instances --split random --width 2 --input_w 48 --input_h 32 --diameter 12 --crops 6"
)
OPTIONS += " --epochs 2 -b 4 --device cpu --amp off --ema 0.9"


@pytest.fixture
def ids(tmp_path, monkeypatch):
    """inputs/cells with six pictures, in the current folder -> their ids."""
    monkeypatch.chdir(tmp_path)
    return write_label_set("inputs/cells")


def config_of(**changes):
    options, _ = parse_options(train.build_parser, OPTIONS.split())
    return {**train.new_config(options), **changes}


def test_every_second_crop_is_rehearsed(ids, capsys):
    """Own crops and others in turns, each from its own stream, in every epoch."""
    write_label_set("inputs/others", count=3, seed=1)
    own = build_crops(config_of(), ids, augment=True)
    own.check()
    others = build_rehearsal(config_of(rehearse="others"), len(own))
    others.check()
    both = Rehearsal(own, others)
    assert "every second crop is from 3 pictures (others)" in capsys.readouterr().out
    for epoch in (1, 2):
        both.set_epoch(epoch)
        for k in range(6):
            image, maps, info = (both.other if k % 2 else own)[k]
            assert torch.equal(both[k][0], image) and torch.equal(both[k][1], maps)
            assert (info["img_id"] in both.other.img_ids) or not k % 2
    assert len(both) == 6 and not torch.equal(own[1][0], both[1][0])


@pytest.mark.parametrize("weights", ["known", "models/known", "models/known/model.pth"])
def test_what_was_kept_for_validation_is_not_rehearsed(ids, weights):
    """Of the data set that the run of --weights was trained on."""
    run = Path("models/known")
    run.mkdir(parents=True)
    (run / "config.yml").write_text("dataset: cells\n")
    (run / "split.yml").write_text(yaml.safe_dump({"train": ids[2:], "val": ids[:2]}))
    (run / "model.pth").touch()
    shutil.copytree("inputs/cells", "inputs/twin")
    assert build_rehearsal(config_of(rehearse="cells", weights=weights), 4).img_ids == ids[2:]
    assert build_rehearsal(config_of(rehearse="twin", weights=weights), 4).img_ids == ids
    others = config_of(rehearse="cells", dataset="others", weights=weights)
    assert build_rehearsal(others, 4, ids[2:4]).img_ids == ids[2:]  # those are ids of the others
    assert build_rehearsal(config_of(rehearse="cells", weights=weights), 4, ids[2:4]).img_ids == ids[4:]
    assert build_rehearsal(config_of(rehearse="cells"), 4).img_ids == ids


def test_rehearsed_pictures_may_have_another_extension(ids):
    for img_id in ids:
        Path(f"inputs/cells/images/{img_id}.png").rename(f"inputs/cells/images/{img_id}.tif")  # read by its content
    Path("inputs/cells/images/notes.txt").touch()
    assert build_rehearsal(config_of(rehearse="cells", dataset="own"), 4).img_ids == ids


def test_generated_nuclei_are_rehearsed():
    drawn, grey = (build_rehearsal(config_of(rehearse="generated", input_channels=k), 4) for k in (3, 1))
    for generated in (drawn, grey):
        generated.check()
    image, labels = drawn.arrays(3)
    expected, true = generate_nuclei(int(drawn.img_ids[3]))
    assert np.array_equal(image, expected) and np.array_equal(labels[..., 0], true)
    assert {facts.kind for facts in drawn.facts} == {"dark grey", "bright coloured"}
    assert grey[0][0].shape == (1, 32, 48)


def test_a_training_with_rehearsal(ids, monkeypatch, capsys):
    monkeypatch.setattr(engine, "plot_curves", lambda *args, **kwargs: None)
    monkeypatch.setattr(crops, "VIEW", 48)
    call(monkeypatch, train, OPTIONS, "--name first")
    call(monkeypatch, train, OPTIONS, "--weights first --name plain")
    call(monkeypatch, train, OPTIONS, "--weights first --rehearse generated --name tuned")
    assert "rehearsal: every second crop is from 40 pictures (generated)\n" in capsys.readouterr().out
    losses = [pd.read_csv(f"models/{name}/log.csv").loss for name in ("plain", "tuned")]
    assert not losses[0].equals(losses[1])
    call(monkeypatch, train, "--name tuned --resume")  # all epochs are done
    assert yaml.safe_load(Path("models/tuned/config.yml").read_text())["rehearse"] == "generated"


def test_resuming_with_other_pictures_to_rehearse(ids, monkeypatch):
    """Also where the run of --weights, whose validation pictures are left out, has gone."""
    monkeypatch.setattr(engine, "plot_curves", lambda *args, **kwargs: None)
    monkeypatch.setattr(crops, "VIEW", 48)
    call(monkeypatch, train, OPTIONS, "--name first")
    shutil.copytree("inputs/cells", "inputs/own")
    call(monkeypatch, train, OPTIONS.replace("cells", "own"), "--weights first --rehearse cells --name tuned")
    Path("models/first").rename("models/gone")
    with pytest.raises(ValueError, match="the files of inputs/own, or those of --rehearse, have changed since"):
        call(monkeypatch, train, "--name tuned --resume")


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ("--rehearse nope", "^--rehearse nope: no such folder in inputs/; the data sets are: cells; "),
        ("--rehearse ../cells", "^--rehearse '../cells': expected the name of a folder in inputs/"),
        ("--rehearse bare", "inputs/bare/labels: no such folder; nuclei one by one need label maps"),
        ("--rehearse generated --target masks", "--diameter is for individual nuclei"),
    ],
)
def test_what_cannot_be_rehearsed(ids, monkeypatch, capsys, words, match):
    """It is refused before the training's own pictures are read."""
    if "bare" in words:
        shutil.copytree("inputs/cells/images", "inputs/bare/images")
    with pytest.raises((ValueError, OSError), match=match):
        call(monkeypatch, train, OPTIONS, words, "--name other")
    assert "validation images" not in capsys.readouterr().out and not Path("models/other").exists()
