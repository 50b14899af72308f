"""nuclei/crops.py and --target instances: scale, windows, kinds, draws, what is refused, and real runs of train.py."""

import math
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import call, run_script, write_data_set, write_label_set

import engine
import train
from augmentation import augmentation
from common.cli import parse_options
from common.loaders import set_epoch
from dataset import make_loader
from inference import Predictor
from instances import DEFAULTS, areas, targets
from nuclei import crops
from nuclei.crops import VIEW, Crops, NucleiDataset, build_crops, line
from nuclei.scaling import median_diameter, stretch, stretch_limits

pytestmark = pytest.mark.usefixtures("one_thread")
COMMON = "--dataset cells --split random --width 2 --input_w 48 --input_h 32 --epochs 2 -b 4 --device cpu --amp off"
OPTIONS = COMMON + " --target instances --diameter 12 --crops 6 --ema 0.9 --deep_supervision True"


@pytest.fixture
def cells(tmp_path, monkeypatch):
    """inputs/cells with six pictures, in the current folder -> (its path, the ids)."""
    monkeypatch.chdir(tmp_path)
    return Path("inputs/cells"), write_label_set("inputs/cells")


def read(folder, kind, img_id):
    array = cv2.imread(str(folder / kind / f"{img_id}.png"), cv2.IMREAD_UNCHANGED)
    return array[..., ::-1] if kind == "images" else array.astype(np.int32)


def opened(kind, cells, size=(32, 48), diameter=12, **options):
    folder, ids = cells
    dataset = kind(ids, folder, size=size, diameter=diameter, **options)
    dataset.check()
    return dataset


# ---------------------------------------------------------------- windows


@pytest.mark.parametrize(("length", "count"), [(10, 4), (10, 10), (10, 13), (3, 20), (1, 5)])
def test_lines_go_on_as_in_a_mirror(length, count):
    mirrored = [*range(length), *range(length - 1, -1, -1)] * (4 * count)
    whole = mirrored[::-1] + mirrored  # position p is at 2 * length * ... from the middle
    zero = len(mirrored)

    def expected(start):
        return whole[zero + start : zero + start + count]

    assert line(length, count).tolist() == expected((length - count) // 2)
    starts = range(min(0, length - count), max(0, length - count) + 1)
    seen = {tuple(line(length, count, np.random.default_rng(seed)).tolist()) for seed in range(300)}
    assert seen <= {tuple(expected(start)) for start in starts}
    if count <= length:
        assert len(seen) == len(starts)


def test_the_middle_of_a_picture_at_its_own_scale(cells):
    """A diameter at which nothing is scaled: pixels and labels are those of the files."""
    folder, ids = cells
    for k, img_id in enumerate(ids):
        image, labels = read(folder, "images", img_id), read(folder, "labels", img_id)
        dataset = opened(NucleiDataset, cells, diameter=median_diameter(labels))
        found, maps, info = dataset[k]
        part = labels[14:46, 12:60]
        assert np.array_equal(np.unique(part, return_inverse=True)[1].reshape(part.shape), info["labels"])
        assert np.array_equal(maps, targets(info["labels"].numpy())) and info["img_id"] == img_id
        stretched = stretch(image, stretch_limits(image, "1,99.8"))[14:46, 12:60]
        assert np.array_equal(found, stretched.transpose(2, 0, 1).astype(np.float32) / 255)


def one_disc(cells, *radii, centre=(36, 30)):
    """Every picture shows one nucleus of these radii."""
    for img_id, radius in zip(cells[1], radii, strict=True):
        labels = np.zeros((60, 72), np.uint16)
        cv2.circle(labels, centre, radius, 5, -1)
        cv2.imwrite(str(cells[0] / "labels" / f"{img_id}.png"), labels)


def test_every_picture_is_scaled_to_the_canonical_diameter(cells):
    one_disc(cells, 3, 5, 7, 10, 14, 20)
    dataset = opened(NucleiDataset, cells, diameter=16)
    assert [facts.diameter for facts in dataset.facts] == pytest.approx([6, 10, 14, 20, 28, 40], abs=1.2)
    for k in range(6):
        found = dataset[k][2]["labels"].numpy()
        assert median_diameter(found[:, 12:36]) == pytest.approx(16, rel=0.05)


def test_mirrored_nuclei_have_numbers_of_their_own(cells):
    """Windows of 180 x 216 pixels on pictures of 60 x 72: in each direction the picture, mirrored on either side."""
    one_disc(cells, *[5] * 6)
    same = opened(NucleiDataset, cells).facts[0].diameter
    found = opened(NucleiDataset, cells, size=(180, 216), diameter=same)[0][2]["labels"].numpy()
    assert sorted(areas(found)[1:]) == [np.count_nonzero(read(cells[0], "labels", "img00"))] * 9
    one_disc(cells, *[5] * 6, centre=(70, 30))  # the edge cuts it: it and its mirror image are one nucleus
    same = opened(NucleiDataset, cells).facts[0].diameter
    found = opened(NucleiDataset, cells, size=(180, 216), diameter=same)[0][2]["labels"].numpy()
    assert (
        found.max() == 6
    )  # in each of three rows: one across the right edge, one that the left end of the window cuts


def test_a_picture_without_nuclei_takes_the_scale_of_the_others(cells):
    folder, ids = cells
    cv2.imwrite(str(folder / "labels" / f"{ids[0]}.png"), np.zeros((60, 72), np.uint16))
    dataset = opened(NucleiDataset, cells)
    others = [median_diameter(read(folder, "labels", img_id)) for img_id in ids[1:]]
    assert dataset.true_scale(0) == 12 / np.median(others)
    _, maps, info = dataset[0]
    assert not maps.any() and not info["labels"].any()


def test_grey_runs_and_16_bits(cells):
    folder, ids = cells
    path = str(folder / "images" / f"{ids[0]}.png")
    cv2.imwrite(path, cv2.imread(path, cv2.IMREAD_GRAYSCALE).astype(np.uint16) * 200)
    image, _, _ = opened(NucleiDataset, cells, input_channels=1)[0]
    assert image.shape == (1, 32, 48) and image.max() == 1


# ---------------------------------------------------------------- random crops


def test_factors_of_scale_lie_in_their_range(cells):
    """A single nucleus of known size: crops show it larger or smaller."""
    one_disc(cells, *[6] * 6)
    random_crops = opened(Crops, cells, size=(100, 100), scale_range=(0.5, 2), count=200)
    sizes = []
    for k in range(200):
        labels = random_crops[k][2]["labels"].numpy()
        whole = np.zeros_like(labels)
        whole[1:-1, 1:-1] = labels[1:-1, 1:-1]
        inside = [label for label in np.unique(labels)[1:] if (whole == label).sum() == (labels == label).sum()]
        sizes += [math.sqrt(areas(labels)[label] / math.pi) / 6 for label in inside[:1]]
    factors = np.log2(sizes)
    assert factors.min() > -1.1 and factors.max() < 1.1 and abs(np.median(factors)) < 0.2
    assert factors.min() < -0.6 and factors.max() > 0.6


def test_draws_depend_on_seed_epoch_and_item_alone(cells):
    options = {"scale_range": (0.5, 2), "count": 7, "pasted": 0.5, "transform": None}
    options["transform"] = augmentation("flips,copies,stain,light,noise", 32, 48)

    def drawn(workers, epoch, seed=3, order=False):
        random_crops = opened(Crops, cells, seed=seed, **options)
        loader = make_loader(random_crops, 3, shuffle=order, num_workers=workers)
        set_epoch(loader, epoch)
        return [torch.cat([batch[0].flatten(1), batch[1].flatten(1)], 1) for batch in loader]

    first = torch.cat(drawn(0, 1))
    assert len(first) == 7 and torch.equal(first, torch.cat(drawn(2, 1)))
    for other in (drawn(0, 2), drawn(0, 1, seed=4)):
        assert not torch.equal(first, torch.cat(other))
    shuffled = torch.cat(drawn(0, 1, order=True))
    assert sorted(map(tuple, shuffled.tolist())) == sorted(map(tuple, first.tolist()))


def test_labels_follow_the_image_whatever_is_drawn(cells):
    """Nuclei are far brighter than the background, or darker in a negative: their mask can be read off the image."""
    transform = augmentation("flips,copies", 32, 48)
    random_crops = opened(Crops, cells, scale_range=(0.7, 1.5), count=40, pasted=1.0, transform=transform)
    agreement = []
    for k in range(40):
        image, maps, info = random_crops[k]
        labels = info["labels"].numpy()
        assert np.array_equal(maps, targets(labels))
        if maps[0].any():
            grey = image.mean(0).numpy()
            bright = grey > (grey.max() + grey.min()) / 2
            agreement.append(max((bright == (labels > 0)).mean(), (bright != (labels > 0)).mean()))
    assert np.mean(agreement) > 0.95


@pytest.mark.parametrize("balance", [0, 0.5, 1])
def test_rare_kinds_are_drawn_more_often(cells, balance):
    """Five dark pictures and a bright one; the share of a kind is to f ** (1 - balance)."""
    folder, ids = cells
    path = str(folder / "images" / f"{ids[0]}.png")
    cv2.imwrite(path, 255 - cv2.imread(path))

    class Drawn(Crops):
        """Items are the numbers of the pictures."""

        def window(self, *_):
            return None, None

        def transformed(self, *_):
            return None, None

        def finished(self, index, *_):
            return index

    drawn = opened(Drawn, cells, count=3000, kind_balance=balance)
    counts = Counter(drawn[k] for k in range(3000))
    rare = 1 ** (1 - balance) / (1 ** (1 - balance) + 5 ** (1 - balance))
    assert counts[0] / 3000 == pytest.approx(rare, abs=0.04)
    assert all(counts[k] / 3000 == pytest.approx((1 - rare) / 5, abs=0.03) for k in range(1, 6))


def test_crops_look_for_nuclei(cells):
    """One nucleus in a corner: without looking, few crops would show it."""
    folder, ids = cells
    for img_id in ids:
        labels = np.zeros((60, 72), np.uint16)
        labels[14:24, 14:24] = 1
        cv2.imwrite(str(folder / "labels" / f"{img_id}.png"), labels)
    random_crops = opened(Crops, cells, size=(20, 20), diameter=11.28, count=200)  # the picture's own scale
    shown = np.mean([random_crops[k][1][0, 5:15, 5:15].any() for k in range(200)])
    # a window begins at 0 ... 40 and 0 ... 52; its middle meets the nucleus where it begins at 0 ... 18 in both
    single = (19 / 41) * (19 / 53)
    assert shown == pytest.approx(1 - (1 - single) ** 3, abs=0.12)


# ---------------------------------------------------------------- what is refused


def test_all_that_is_wrong_is_in_one_message(cells):
    folder, ids = cells
    labels = folder / "labels"
    (labels / f"{ids[0]}.png").unlink()
    (labels / f"{ids[1]}.png").unlink()
    (labels / f"{ids[2]}.png").write_bytes(b"no picture")
    cv2.imwrite(str(labels / f"{ids[3]}.png"), np.ones((5, 5), np.uint16))
    cv2.imwrite(str(labels / f"{ids[4]}.tif"), np.ones((60, 72), np.uint16))
    with pytest.raises(ValueError) as caught:
        opened(NucleiDataset, cells)
    said = str(caught.value)
    assert f"no labels ({labels}), 2 of the ids: img00, img01" in said
    assert "labels.png: unreadable" in said and "1 of the ids: img02" in said
    assert f"labels and image differ in size ({labels}), 1 of the ids: img03" in said
    assert "several label files, .png and .tif" in said and "img05" not in said


def test_labels_without_any_nucleus(cells):
    folder, ids = cells
    for img_id in ids:
        cv2.imwrite(str(folder / "labels" / f"{img_id}.png"), np.zeros((60, 72), np.uint16))
    with pytest.raises(ValueError, match="inputs/cells/labels: all 6 label maps are empty; nothing could"):
        opened(Crops, cells)
    view = opened(NucleiDataset, cells)  # nothing to find, which a network may be asked all the same
    assert view.usual_scale() == 1 and not view[0][2]["labels"].any()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ("--target masks", "--diameter is for individual nuclei; give --target instances"),
        ("--augment flips,cutmix", "--augment cutmix does not go with --target instances"),
        ("--num_classes 2", "--num_classes 2 is for --target masks"),
        ("--input_channels 4", "--input_channels 4: individual nuclei need 1"),
        ("--split grouped", "--split grouped: 6 images fall into .* take --split random"),
        ("--dataset masks_only", "inputs/masks_only/labels: no such folder; nuclei one by one need label maps"),
    ],
)
def test_options_that_do_not_go_together(cells, monkeypatch, options, match):
    shutil.copytree(cells[0] / "images", "inputs/masks_only/images")
    with pytest.raises((ValueError, OSError), match=match):
        call(monkeypatch, train, OPTIONS, "--name no", options)
    with pytest.raises(ValueError, match="--augment paste does not go with --target masks"):
        call(monkeypatch, train, COMMON, "--name no --augment paste")
    assert not Path("models/no").exists()


# ---------------------------------------------------------------- real runs


def new_config(*words):
    options, _ = parse_options(train.build_parser, " ".join(words).split(), read_config=train.read_recipe)
    return train.new_config(options)


def test_the_config_says_how_to_predict():
    config = new_config(OPTIONS.replace("--split random", ""))
    assert (config["target"], config["num_classes"], config["split"]) == ("instances", 3, "grouped")
    assert config["augment"] == train.AUGMENT["instances"] and {key: config[key] for key in DEFAULTS} == DEFAULTS
    assert not DEFAULTS.keys() & new_config("--dataset cells").keys()
    assert new_config("--dataset cells")["augment"] == train.AUGMENT["masks"]
    with pytest.raises(ValueError, match="--augment cutmix does not go with --target instances"):
        new_config(OPTIONS, "--augment", train.AUGMENT["masks"])  # given is given, also as it is by default elsewhere


def test_build_crops_reads_a_config(cells):
    config = new_config(OPTIONS, "--kind_balance 0.25 --scale_range 0.8,1.25 --stretch 2,98")
    drawn, middle = build_crops(config, cells[1], augment=True), build_crops(config, cells[1])
    assert type(drawn) is Crops and len(drawn) == 6 and drawn.size == (32, 48) and drawn.transform is not None
    assert (drawn.scale_range, drawn.kind_balance, drawn.percentiles) == ([0.8, 1.25], 0.25, "2,98")
    assert type(middle) is NucleiDataset and middle.size == (VIEW, VIEW) and middle.transform is None
    plain = build_crops(config | {"augment": "none", "crops": None}, cells[1][:4], augment=True)
    assert plain.transform is None and plain.pasted == 0 and len(plain) == 4


def log(name):
    return pd.read_csv(f"models/{name}/log.csv").drop(columns="seconds")


def weights(name, file="model.pth"):
    return torch.load(f"models/{name}/{file}", weights_only=True)


def test_a_resumed_run_is_the_same_to_the_last_bit(cells, monkeypatch, capsys):
    monkeypatch.setattr(engine, "plot_curves", lambda *args, **kwargs: None)
    monkeypatch.setattr(crops, "VIEW", 64)
    call(monkeypatch, train, OPTIONS, "--name whole")
    said = capsys.readouterr().out
    assert "val_official: official score of the middle 64 x 64 pixels" in said and "best val_official" in said
    assert list(log("whole")) == ["epoch", "lr", "loss", "official", "val_loss", "val_official"]
    with monkeypatch.context() as patch:
        patch.setattr(engine.Run, "over", lambda run: "stopped" if run.epoch == 1 else None)
        call(monkeypatch, train, OPTIONS, "--name parts")
    call(monkeypatch, train, "--name parts --resume --num_workers 2")
    assert log("whole").equals(log("parts"))
    for part in ("model", "ema"):
        one, other = (weights(name, "last.pth")[part] for name in ("whole", "parts"))
        assert all(torch.equal(one[key], other[key]) for key in one)
    config = Predictor("whole", device="cpu").config
    assert config["scale"] == pytest.approx(12 / 14, rel=0.05)  # printed above: the median training picture
    call(monkeypatch, train, "--config models/whole/config.yml --name again")  # its config is a recipe
    assert log("whole").equals(log("again"))


def test_weights_of_a_run_of_masks_start_one_of_nuclei(cells, monkeypatch, capsys):
    """All but the heads, which have three maps instead of a class."""
    monkeypatch.setattr(engine, "plot_curves", lambda *args, **kwargs: None)
    write_data_set("inputs/tiny", count=5)
    monkeypatch.setattr(crops, "VIEW", 64)
    small = "--width 2 --epochs 1 -b 4 --device cpu --amp off --deep_supervision True --input_w 32 --input_h 32"
    call(monkeypatch, train, small, "--dataset tiny --name masks")
    call(monkeypatch, train, OPTIONS, "--epochs 1 --lr 0 --ema 0 --weights masks --name nuclei")
    assert "new heads: final1.bias, final1.weight" in capsys.readouterr().out
    before, after = weights("masks"), weights("nuclei")
    assert torch.equal(before["conv1_2.conv1.weight"], after["conv1_2.conv1.weight"])
    assert len(after["final4.bias"]) == 3


def test_the_recipe_of_the_repository_made_small(cells, monkeypatch, capsys):
    monkeypatch.setattr(engine, "plot_curves", lambda *args, **kwargs: None)
    monkeypatch.setattr(crops, "VIEW", 64)
    small = "--dataset cells --split random --crops 4 --epochs 1 -b 2 --input_w 32 --input_h 32 --diameter 12"
    small += " --device cpu --amp off --encoder none --width 2"
    recipe = Path(train.__file__).parent / "configs" / "nuclei.yml"
    call(monkeypatch, train, "--config", recipe, small, "--name user")
    assert "4 crops per epoch" in capsys.readouterr().out
    config = yaml.safe_load(Path("models/user/config.yml").read_text())
    assert config["target"] == "instances" and config["stretch"] == "1,99.8"
    assert {key: config[key] for key in DEFAULTS} == DEFAULTS


@pytest.mark.slow
def test_two_processes_learn_as_one(cells):
    """torchrun: the same crops and the same validation, batch norm aside: it sees half of each batch."""
    words = [*OPTIONS.split(), "--epochs=1", "--lr=0", "--ema=0"]
    run_script("train.py", *words, "--name=one", cwd=".")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", train.__file__]
    subprocess.run([*command, *words, "--name=two"], check=True, timeout=300)
    one, two = log("one"), log("two")
    assert one.val_official.equals(two.val_official)
    assert two.loss[0] == pytest.approx(one.loss[0], rel=0.2)
