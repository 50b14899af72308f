"""data_folder.py: the files of an id however their extension is spelled, and one sentence on what is missing."""

import shutil
from pathlib import Path

import pytest
from conftest import run_script

from common.cli import data_set
from data_folder import check_layout, classes_of, find_file, list_ids, usual_ending
from dataset import Dataset

CONFIG = {"dataset": "tiny", "img_ext": ".png", "mask_ext": ".png", "num_classes": 1}


@pytest.fixture
def place(tiny_data, monkeypatch):
    """A current directory with inputs/tiny, of six images -> that folder."""
    monkeypatch.chdir(tiny_data.parents[1])
    return Path("inputs/tiny")


def refused(match, **changes):
    with pytest.raises((ValueError, OSError), match=match):
        check_layout(CONFIG | changes)


def test_extensions_in_upper_and_lower_case(place):
    before = Dataset(list_ids(place / "images", ".png"), place / "images", place / "masks", ".png", ".png", 1).check()
    for path in sorted(place.rglob("*.png"))[::2]:
        path.rename(path.with_suffix(".PNG"))
    check_layout(CONFIG)
    ids = list_ids(place / "images", ".png")
    assert ids == list_ids(place / "images", ".PNG") == [f"img{k:02d}" for k in range(6)]
    assert Dataset(ids, place / "images", place / "masks", ".png", ".PNG", 1).check() == before
    assert {find_file(place / "images", img_id, ".png").suffix for img_id in ids} == {".png", ".PNG"}
    shutil.copy(place / "masks/0/img01.png", place / "images/img00.png")  # then it is the one that was asked for
    assert find_file(place / "images", "img00", ".png").suffix == ".png"
    assert find_file(place / "images", "img99", ".png").name == "img99.png"


def test_the_ending_that_is_wanted_or_the_most_frequent_one(place):
    for name in ("a.tif", "b.tif", "c.bmp", "plain", ".hidden.gif", ".hidden2.gif", ".hidden3.gif"):
        (place / "images" / name).touch()
    for path in sorted((place / "images").glob("*.png"))[1:]:
        path.unlink()
    assert usual_ending(place / "images", ".png") == ".png"  # one is enough
    assert usual_ending(place / "images", ".PNG") == ".PNG"  # in any spelling that list_ids finds
    assert usual_ending(place / "images", ".jpg") == ".tif"
    assert usual_ending(place / "nowhere", ".jpg") == ".jpg"


def test_one_sentence_on_what_is_missing(place):
    check_layout(CONFIG)
    refused(r"^--dataset my: no such folder in inputs/; the data sets are: tiny; preprocess_dsb2018", dataset="my")
    refused(r"holds no \*\.tif file, but 6 \*\.png; give --img_ext \.png$", img_ext=".tif")
    refused(r"masks/0 holds no \*\.tif file, but 6 \*\.png; give --mask_ext \.png$", mask_ext=".tif")
    refused(r"masks/1: no such folder; .* 3 classes is expected \(--num_classes 3\), found masks/0$", num_classes=3)
    refused("dataset '../x': expected the name", dataset="../x")
    (place / "masks" / "0").rename(place / "masks" / "cells")
    refused(r"masks/0: no such folder; .* found none$")
    assert classes_of(place) == []
    (place / "images").rename(place / "pictures")
    refused("inputs/tiny/images: no such folder")
    shutil.rmtree("inputs")
    refused("no such folder in inputs/; there is no data set yet")


def test_a_data_set_is_also_named_by_its_path():
    for text in ("my_cells", "inputs/my_cells", "inputs/my_cells/", "./inputs/my_cells"):
        assert data_set(text) == "my_cells"
    assert data_set("inputs/a/b") == "a/b" and data_set("inputs") == "inputs" and data_set("../x") == "../x"


def test_many_missing_masks_are_one_short_line(place):
    """Not the ids of all images, as a user meets it."""
    words = ["--dataset", "inputs/tiny", "--num_classes", "2", "--name", "x", "--epochs", "1", "--device", "cpu"]
    said = run_script("train.py", *words, cwd=Path.cwd(), ok=False).stderr
    assert said.startswith("train.py: error: inputs/tiny/masks/1: no such folder") and len(said) < 200
