"""train.py: options, recipes, schedules, what is refused on resuming, and what becomes of bad input."""

import argparse
import math
import os
import pickle
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import REPOSITORY, call, trained, write_data_set

import train
from common.cli import parse_options
from common.files import load_checkpoint
from dataset import build_dataset, split_ids
from engine import OPTIMIZERS, SCHEDULERS, Run
from inference import load_trained
from losses import LOSSES
from tasks import Segmentation
from training_data import chosen_split, input_scale, suspicions

TINY = "--dataset tiny --width 2 --input_w 32 --input_h 32 --epochs 2 -b 4 --device cpu --amp off --ema 0.9"
MODELS = Path("models")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def place(tmp_path_factory, one_thread):
    """A folder with inputs/tiny and a finished run models/base of two epochs."""
    return trained(tmp_path_factory.mktemp("train"), train, TINY, "--name base")


@pytest.fixture(autouse=True)
def here(place, monkeypatch):
    monkeypatch.chdir(place)


@pytest.fixture
def go(monkeypatch):
    """go(*options) runs train.main with them."""
    return lambda *options: call(monkeypatch, train, *options)


def prepared(*options):
    """-> the Run that train.py would begin with these options; its folder holds config.yml and split.yml."""
    words = " ".join(map(str, (TINY, *options))).split()
    parsed, _ = parse_options(train.build_parser, words, read_config=train.read_recipe)
    config, folder = train.new_config(parsed), MODELS / parsed.name
    shutil.rmtree(folder, ignore_errors=True)
    run, _, _ = train.prepare(config, folder, [], torch.device("cpu"), resume=False)
    return run


def config_of(name):
    return yaml.safe_load((MODELS / name / "config.yml").read_text())


def refused(go, *options, match):
    """The options end in one of the errors that run_script prints in one line, and it speaks of `match`."""
    with pytest.raises((ValueError, OSError), match=match):
        go(*options)


def log(name):
    return pd.read_csv(MODELS / name / "log.csv")


def same_log(a, b):
    return log(a).drop(columns="seconds").equals(log(b).drop(columns="seconds"))


def same_weights(a, b):
    def equal(x, y):
        if isinstance(x, dict):
            return x.keys() == y.keys() and all(equal(x[key], y[key]) for key in x if key != "rows")
        return torch.equal(x, y) if torch.is_tensor(x) else x == y

    files = ("model.pth", "last.pth")
    return all(equal(*(torch.load(MODELS / name / file, weights_only=True) for name in (a, b))) for file in files)


def content(name):
    return {path.name: path.read_bytes() for path in sorted((MODELS / name).iterdir())}


# ---------------------------------------------------------------- a run


def test_a_run_is_six_files(capsys):
    assert sorted(content("base")) == ["config.yml", "curves.png", "last.pth", "log.csv", "model.pth", "split.yml"]
    assert list(log("base")) == ["epoch", "lr", "loss", "iou", "val_loss", "val_iou", "seconds"]
    assert log("base").epoch.tolist() == [1, 2]
    config = config_of("base")
    options = vars(train.build_parser().parse_args([]))
    assert set(config) == options.keys() - {"config", "resume", "overwrite"} | {"mean", "std", "environment"}
    split = yaml.safe_load((MODELS / "base" / "split.yml").read_text())
    assert len(split["train"]) == 7 and len(split["val"]) == 2 and set(split["fingerprint"]) == {"train", "val"}


def test_the_flags_that_its_users_know():
    known = (
        "--name --epochs -b --batch_size -a --arch --deep_supervision --input_channels --num_classes --input_w "
        "--input_h --loss --dataset --img_ext --mask_ext --optimizer --lr --momentum --weight_decay --nesterov "
        "--scheduler --min_lr --factor --patience --milestones --gamma --early_stopping --num_workers --seed "
        "--split_seed --resume --overwrite --weights --device --amp --channels_last --compile --cache --config --split"
    )
    assert set(known.split()) <= set(train.build_parser()._option_string_actions)


def test_the_last_line_is_the_val_command_and_the_default_name_tells_data_and_model(go, capsys):
    go(TINY, "--epochs", 1, "--deep_supervision", "True")
    name = "tiny_NestedUNet_wDS"
    assert capsys.readouterr().out.rstrip().split("\n")[-1] == (
        f"the run is in models/{name}; evaluate it: python val.py --name {name}"
    )
    assert (MODELS / name / "model.pth").is_file()


def rates(optimizer, scheduler, epochs, steps, **config):
    """The learning rate at the beginning of each epoch, as train.py's own tables build optimizer and scheduler."""
    defaults = {**vars(train.build_parser().parse_args([])), "epochs": epochs, **config}
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = OPTIMIZERS[optimizer]([parameter], defaults)
    schedule = SCHEDULERS[scheduler](optimizer, defaults, steps)
    run = Run(torch.nn.Identity(), Segmentation(None), optimizer, schedule, torch.device("cpu"), epochs=epochs)
    found = []
    for epoch in range(1, epochs + 1):
        found.append(optimizer.param_groups[0]["lr"])
        for _ in range(steps):
            run.learn(parameter.sum())
        run.finish_epoch({"epoch": epoch, "val_loss": 1.0, "val_iou": 0.0})
    return found


@pytest.mark.parametrize(
    ("optimizer", "scheduler", "expected"),
    [
        ("SGD", "ConstantLR", [0.08] * 4),
        ("Adam", "MultiStepLR", [0.08, 0.04, 0.04, 0.02]),  # milestones 1, 3; gamma 0.5
        ("AdamW", "CosineAnnealingLR", [0.02 + 0.06 * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)]),
        ("SGD", "ReduceLROnPlateau", [0.08, 0.08, 0.04, 0.02]),  # the first loss is the best
    ],
)
def test_learning_rates_by_hand(optimizer, scheduler, expected):
    config = {"lr": 0.08, "min_lr": 0.02, "milestones": "1,3", "gamma": 0.5, "factor": 0.5, "patience": 0}
    assert rates(optimizer, scheduler, 4, 2, **config, nesterov=True) == pytest.approx(expected, rel=1e-9)


def test_one_cycle_rises_and_falls():
    lr = rates("AdamW", "OneCycleLR", 6, 2, lr=0.01)
    assert lr[0] < 0.001 < 0.005 < max(lr) <= 0.01 and 0 < lr.index(max(lr)) < 3 and lr[5] < 0.002


def test_the_log_holds_the_rate_of_each_epoch(go):
    go(TINY, "--epochs 3 --lr 0.08 --scheduler MultiStepLR --milestones 1,2 --gamma 0.5 --name lr --overwrite")
    assert log("lr").lr.tolist() == pytest.approx([0.08, 0.04, 0.02], rel=1e-9)


def test_a_short_training_is_warned_of(go, capsys):
    go(TINY, "--name short")
    steps = "warning: 4 steps in all, at least 100 are recommended: --epochs 50, or a smaller --batch_size"
    assert steps in capsys.readouterr().err
    go("--name short --resume")
    assert "steps in all" not in capsys.readouterr().err


def test_a_run_that_stopped_early_stays_stopped(go, capsys):
    go(TINY, "--lr 0 --ema 0 --scheduler ConstantLR --epochs 9 --early_stopping 1 --name early")
    rows = log("early")
    assert len(rows) == rows.val_iou.argmax() + 2 < 9 and "stopped early" in capsys.readouterr().out
    before = content("early")
    go("--name early --resume")
    assert "stopped early" in capsys.readouterr().out
    assert {name for name, data in content("early").items() if data != before[name]} <= {"curves.png"}


def test_the_same_seed_gives_the_same_log_whatever_the_workers(go):
    go(TINY, "--name", "workers", "--num_workers", 2)
    go(TINY, "--name", "seed", "--seed", 1)
    assert same_log("base", "workers") and same_weights("base", "workers")
    assert not same_log("base", "seed")


# ---------------------------------------------------------------- config files


def test_a_recipe_stands_between_defaults_and_the_command_line(go):
    Path("recipe.yml").write_text("epochs: 1\nlr: 1e-3\nbatch_size: 3\nmilestones: [1, 2]\namp: off\nsplit: null\n")
    tiny = "--dataset tiny --width 2 --input_w 32 --input_h 32 --device cpu"
    go(tiny, "--config", "recipe.yml", "--batch_size", 5, "--name", "recipe")
    config = config_of("recipe")
    expected = {"epochs": 1, "lr": 0.001, "batch_size": 5, "milestones": "1,2", "amp": "off", "gamma": 2 / 3}
    assert {key: config[key] for key in expected} == expected


def test_the_config_of_a_run_is_a_recipe_for_other_machines_too(tmp_path):
    lines = ["device: cpu", "num_workers: 0", "cache: false", "lr: 0.5"]
    for extra, kept in (
        (["environment: {torch: '2.14'}", "mean: [0.1]"], {"cache", "lr"}),
        ([], {"cache", "lr", "device", "num_workers"}),
    ):
        (tmp_path / "a.yml").write_text("\n".join(lines + extra))
        assert train.read_recipe(tmp_path / "a.yml").keys() == kept


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").glob("*.yml")), ids=lambda path: path.name)
def test_the_recipes_of_the_repository_are_read(path):
    """That of the defaults says in a file what train.py does without one."""
    options, given = parse_options(train.build_parser, ["--config", str(path)], read_config=train.read_recipe)
    assert given - {"config"} == yaml.safe_load(path.read_text()).keys()
    if path.name == "default.yml":
        defaults = vars(train.build_parser().parse_args([]))
        defaults["augment"] = train.AUGMENT["masks"]  # the default of --target masks
        assert {key for key in given if getattr(options, key) != defaults[key]} == {"config", "deep_supervision"}
        assert given >= {
            "epochs",
            "batch_size",
            "augment",
            "loss",
            "optimizer",
            "lr",
            "weight_decay",
            "scheduler",
            "ema",
        }


def test_the_config_of_a_run_is_a_recipe(go):
    go("--config", MODELS / "base" / "config.yml", "--name", "again")
    assert same_log("base", "again") and same_weights("base", "again")


@pytest.mark.parametrize("name", ["overwrite", "resume"])
def test_a_recipe_replaces_no_run(go, name):
    Path("strange.yml").write_text(f"name: base\n{name}: true\n")
    before = content("base")
    refused(go, "--config strange.yml", match=f"strange.yml: {name} can only be given on the command line")
    assert content("base") == before


# ---------------------------------------------------------------- augmentation and loss


def test_the_text_of_augment():
    assert train.augment("none") == "none"
    assert train.augment("cutmix,flips") == "flips,cutmix" == train.augment("['flips', 'cutmix', 'flips']")
    for wrong in ("", "flip", "flips,", "none,flips", "flips mild"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected none, or some of flips,mild,colour"):
            train.augment(wrong)


def test_what_a_recipe_says_of_augmentation_and_loss_is_done(go):
    recipe = "augment: [cutmix, flips]\nhead_weights: [0, 0, 0.5, 1]\ndeep_supervision: true\n"
    Path("loss.yml").write_text(recipe)
    options = "--config loss.yml --weight_decay 0 --epochs 1 --ema 0 --name loss --overwrite"
    go(TINY, options)
    expected = {"augment": "flips,cutmix", "head_weights": "0,0,0.5,1"}
    config = config_of("loss")
    assert {key: config[key] for key in expected} == expected
    train.seed_everything(0)
    before, after = train.build_model(config).state_dict(), load_checkpoint(MODELS / "loss" / "model.pth")
    same = [level for level in range(1, 5) if torch.equal(*(w[f"final{level}.weight"] for w in (before, after)))]
    assert same == [1, 2]  # no loss, no gradient
    losses = [log("loss").loss[0]]
    for other in ("--augment none", "--head_weights 1,1,1,1"):
        go(TINY, options, other)
        losses.append(log("loss").loss[0])
    assert len(set(losses)) == 3


def test_the_validation_loss_weighs_the_heads_too(go):
    """A head without weight has no part in what a scheduler or a reader sees."""
    go(TINY, "--head_weights 0,0,0,1 --deep_supervision True --weight_decay 0 --epochs 1 --name weighed")
    model, config = load_trained("weighed", torch.device("cpu"), "last")
    dataset = build_dataset(config, yaml.safe_load((MODELS / "weighed" / "split.yml").read_text())["val"])
    images, masks = (
        torch.stack(part) for part in list(zip(*(dataset[k] for k in range(len(dataset))), strict=True))[:2]
    )
    with torch.no_grad():
        expected = LOSSES[config["loss"]]()(model(images)[-1], masks).item()
    assert log("weighed").val_loss[0] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "options, match",
    [
        ("--head_weights 1,2,3,4", "give --deep_supervision True"),
        ("--scheduler CosineAnnealingLR --lr 1e-6", "--lr 1e-06 is below --min_lr 1e-05"),
        (
            "--scheduler CosineAnnealingLR --encoder resnet18 --encoder_lr 1e-6",
            "--encoder_lr 1e-06 is below --min_lr 1e-05",
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused(go, options, match):
    refused(go, TINY, options, "--name one", match=match)
    assert not (MODELS / "one").exists()


# ---------------------------------------------------------------- what is refused, and what stays


def test_resume_refuses_other_options_and_other_data(go):
    refused(go, "--resume", match="--resume needs --name")
    refused(go, "--resume", "--name", "base", "--overwrite", match="give one of them")
    refused(go, "--resume", "--name", "nope", match="nope/config.yml")
    refused(go, "--resume", "--name", "base", "--lr", 5, "--width", 9, match=r"lr 5.0 \(run: 0.002\), width 9 \(run:")
    write_data_set("inputs/changing", count=5)
    go(TINY, "--dataset", "changing", "--name", "changing", "--epochs", 1)
    shutil.copy("inputs/tiny/masks/0/img00.png", "inputs/changing/masks/0/img01.png")
    refused(go, "--resume", "--name", "changing", match="have changed")
    torch.save({"a": 1}, MODELS / "changing" / "last.pth")
    shutil.rmtree("inputs/changing")
    write_data_set("inputs/changing", count=5)
    refused(go, "--resume", "--name", "changing", match=r"last\.pth does not hold")
    (MODELS / "changing" / "last.pth").unlink()
    refused(go, "--resume", "--name", "changing", match="last.pth: no such file, although log.csv")


def test_an_existing_run_is_safe(go):
    shutil.copytree(MODELS / "base", MODELS / "safe")
    before = content("safe")
    refused(go, TINY, "--name", "safe", match="exists; --resume")
    refused(go, TINY, "--name", "safe", "--overwrite", "--dataset", "nope", match="no such folder")
    refused(go, TINY, "--name", "safe", "--overwrite", "--weights", "nope", match="nope")
    refused(
        go, TINY, "--name", "safe", "--overwrite", "--optimizer", "SGD", "--nesterov", 1, "--momentum", 0, match="m"
    )
    assert content("safe") == before
    go(TINY, "--name", "safe", "--overwrite", "--epochs", 1)
    assert len(log("safe")) == 1


def test_a_diverging_run_stops_and_keeps_the_best_weights(go):
    spoilt = "--optimizer SGD --lr 1e30 --scheduler ConstantLR"
    refused(
        go, TINY, spoilt, "--name", "nan", match="epoch 1/2: the (validation )?loss .*(nan|inf).*; stopped; a lower"
    )
    assert sorted(content("nan")) == ["config.yml", "split.yml"]
    later = "--optimizer SGD --lr 0.01 --scheduler MultiStepLR --milestones 1 --gamma 1e32 --epochs 4 --ema 0"
    refused(go, TINY, later, "--name", "later", match="epoch 2/4: .* step .*models/later keeps the epochs before")
    assert len(log("later")) == 1
    for state in torch.load(MODELS / "later" / "model.pth", weights_only=True).values():
        assert torch.isfinite(state).all()
    assert torch.load(MODELS / "later" / "last.pth", weights_only=True)["best_epoch"] == 1


# ---------------------------------------------------------------- starting from weights


def known_state(width, num_classes):
    """Names and shapes of 4uiiurz1/pytorch-nested-unet's NestedUNet without deep supervision, random values."""
    state, filters = {}, [width * 2**i for i in range(5)]
    for i in range(5):
        for j in range(5 - i):
            before = filters[i] * j + filters[i + 1] if j else filters[i - 1] if i else 3
            for k, channels in ((1, before), (2, filters[i])):
                node = f"conv{i}_{j}"
                state[f"{node}.conv{k}.weight"] = torch.randn(filters[i], channels, 3, 3) * 0.1
                state[f"{node}.conv{k}.bias"] = torch.randn(filters[i])
                for name in ("weight", "bias", "running_mean", "running_var"):
                    state[f"{node}.bn{k}.{name}"] = torch.rand(filters[i])
                state[f"{node}.bn{k}.num_batches_tracked"] = torch.tensor(7)
    state["final.weight"], state["final.bias"] = torch.randn(num_classes, width, 1, 1), torch.randn(num_classes)
    return state


def test_starts_from_the_weights_of_runs_and_files(capsys):
    def starts_as(weights):
        found = prepared("--name from --weights", weights).model.state_dict()
        assert found.keys() == state.keys()
        return [key for key in state if not torch.equal(found[key], state[key])]

    state = known_state(2, 1)
    torch.save({f"module.{key}": value for key, value in state.items()}, "wrapped.pth")
    assert starts_as("wrapped.pth") == [] and "weights of wrapped.pth\n" in capsys.readouterr().out
    torch.save({"state_dict": {**state, **known_state(2, 3)}}, "three.pth")
    state = load_checkpoint("three.pth")["state_dict"]
    assert set(starts_as("three.pth")) == {"final.bias", "final.weight"}
    assert "weights of three.pth; new heads: final.bias, final.weight" in capsys.readouterr().out
    state = load_checkpoint(MODELS / "base" / "model.pth")
    for run in ("base", MODELS / "base"):
        assert starts_as(run) == [] and "weights of models/base/model.pth\n" in capsys.readouterr().out


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_starts_from_a_last_pth():
    """From the averaged weights where there are some: those that a validation judged."""
    averaged = load_trained("base", torch.device("cpu"), "last")[0].state_dict()
    last = load_checkpoint(MODELS / "base" / "last.pth")
    torch.save({key: value for key, value in last.items() if key != "ema"}, "plain.pth")
    for path, expected in ((MODELS / "base" / "last.pth", averaged), ("plain.pth", last["model"])):
        found = prepared("--name second --weights", path).model.state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in found.items())
    assert not torch.equal(averaged["final.weight"], last["model"]["final.weight"])


def test_refuses_weights_that_do_not_fit(go):
    refused(go, TINY, "--name", "no", "--weights", "base", "--width", 3, match=r"is \(2,\) there, \(3,\) here")
    refused(go, TINY, "--name", "no", "--weights", "base", "--arch", "UNet", match="does not fit")
    refused(go, TINY, "--name", "no", "--weights", "nope", match="--weights nope: no such file, and no run")
    torch.save([1, 2], "list.pth")
    refused(go, TINY, "--name", "no", "--weights", "list.pth", match="list.pth holds no weights")
    for data in (b"", b"garbage", pickle.dumps(Hostile(), 2), pickle.dumps(Hostile())):
        Path("bad.pth").write_bytes(data)
        refused(go, TINY, "--name", "no", "--weights", "bad.pth", match="bad.pth is not a checkpoint")
    assert not Path("ran").exists() and not (MODELS / "no").exists()


# ---------------------------------------------------------------- bad input


def test_mistakes_in_data_are_listed_together(go):
    write_data_set("inputs/broken", count=10)
    masks = Path("inputs/broken/masks/0")
    for k in range(1, 10, 2):
        (masks / f"img{k:02d}.png").unlink()
    with pytest.raises(ValueError, match="no mask") as caught:
        go(TINY, "--dataset", "broken", "--name", "no")
    assert all(f"img{k:02d}" in str(caught.value) for k in range(1, 10, 2))
    said = r"^inputs/tiny/masks/1: no such folder; .* 2 classes is expected \(--num_classes 2\), found masks/0$"
    refused(go, TINY, "--num_classes", 2, "--name", "no", match=said)
    Path("inputs/none/images").mkdir(parents=True)
    refused(go, TINY, "--dataset", "none", "--name", "no", match=r"holds no \*\.png")
    refused(
        go,
        TINY,
        "--img_ext",
        ".bmp",
        "--name",
        "no",
        match=r"holds no \*\.bmp file, but \d+ \*\.png; give --img_ext \.png$",
    )
    for name, value in (("grey", 130), ("empty", 0)):
        write_data_set(f"inputs/{name}", count=5)
        for path in Path(f"inputs/{name}/masks/0").iterdir():
            path.write_bytes(flat_mask(value))
    refused(go, TINY, "--dataset", "grey", "--name", "no", match="mask values other than")
    refused(go, TINY, "--dataset", "empty", "--name", "no", match="all 4 training masks are empty")
    assert not (MODELS / "no").exists()


def test_suspicious_data_are_warned_about(capsys):
    """Masks in both folders, inverted, and a validation part without anything to find."""
    ids = write_data_set("inputs/odd", count=5)
    for path in Path("inputs/odd/masks/0").iterdir():
        mask = 255 - cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
        path.write_bytes(cv2.imencode(".png", mask)[1].tobytes())
        shutil.copy(path, f"inputs/odd/images/{path.name}")
    for img_id in split_ids(ids)["val"]:
        Path(f"inputs/odd/masks/0/{img_id}.png").write_bytes(flat_mask(0))
    prepared("--dataset odd --name odd")
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    bodies, inverted, empty, few_steps = warnings
    assert "steps in all, at least 100 are recommended" in few_steps
    assert bodies.endswith("warning: all 5 images of inputs/odd/images are pure black and white; are they masks?")
    assert re.search(
        r"8\d\.\d% of the pixels of inputs/odd/masks/0 are foreground; are the masks inverted\?$", inverted
    )
    assert empty.endswith("warning: all validation masks of inputs/odd/masks/0 are empty")


def test_ordinary_data_raise_no_suspicion():
    usual = {"foreground": [0.8, 0.1], "two_valued": 3}
    places = ["masks/0", "masks/1"]
    assert suspicions(Path("inputs/a"), places, usual, usual, 7) == []
    none = usual | {"foreground": [0.2, 0]}
    assert suspicions(Path("a"), places, none, usual, 7) == ["all training masks of a/masks/1 are empty"]


@pytest.mark.parametrize(
    ("about", "expected"),
    [("scale: 0.5\nimg_size: 96", {"scale": 0.25}), ("scale: 1.0\nimg_size: native", {}), ("images: 3", {})],
)
def test_the_scale_of_the_input(tmp_path, about, expected):
    """Masks of pictures of their own size are squeezed by a factor of their own each."""
    (tmp_path / "dataset.yml").write_text(about)
    assert input_scale(tmp_path / "dataset.yml", {"input_h": 48, "input_w": 48}) == expected


def test_swapped_folders_stop_before_the_first_epoch(go):
    write_data_set("inputs/swapped", count=5)
    folder = Path("inputs/swapped")
    (folder / "images").rename(folder / "kept")
    (folder / "masks" / "0").rename(folder / "images")
    (folder / "kept").rename(folder / "masks" / "0")
    refused(go, TINY, "--dataset swapped", "--name no", match="are images and masks swapped")
    assert not (MODELS / "no").exists()


def flat_mask(value):
    return cv2.imencode(".png", np.full((32, 32), value, np.uint8))[1].tobytes()


def test_splits_of_ones_own(go):
    ids = [f"img{k:02d}" for k in range(9)]
    for content, match in (
        ({"train": ids[:5], "val": ids[4:6]}, "img04 is in train and again in val"),
        ({"train": ids[:5], "val": ["nobody"]}, "nobody"),
        ({"train": ids[:5]}, "expected the lists"),
        ({"train": [1, 2], "val": [3]}, "list of strings"),
    ):
        Path("split.yml").write_text(yaml.safe_dump(content))
        refused(go, TINY, "--split", "split.yml", "--name", "no", match=match)
    Path("split.yml").write_text(yaml.safe_dump({"train": ids[:5], "val": ids[5:7], "test": ids[7:]}))
    prepared("--split split.yml --name split")
    written = yaml.safe_load((MODELS / "split" / "split.yml").read_text())
    assert [written[part] for part in ("train", "val", "test")] == [ids[:5], ids[5:7], ids[7:]]


def field(seed, side=32):
    """Soft blots, bright where the mask is."""
    blots = cv2.GaussianBlur(np.random.default_rng(seed).normal(size=(side, side)).astype(np.float32), (0, 0), 2)
    level = 60 + 20 * (seed % 7)
    picture = np.clip(level + 40 * blots / blots.std(), 0, 255).astype(np.uint8)
    return np.dstack([picture, picture // (1 + seed % 3), picture]), (picture > level).astype(np.uint8) * 255


def test_twins_on_both_sides_are_named_and_grouped_keeps_them_together(go, capsys):
    folder = Path("inputs/twins")
    for kind in ("images", "masks/0"):
        (folder / kind).mkdir(parents=True)
    for k in range(12):
        picture, mask = field(k)
        for copy, (a, b) in enumerate(((picture, mask), (picture[::-1], mask[::-1]))):
            cv2.imwrite(str(folder / "images" / f"f{k:02d}_{copy}.png"), a)
            cv2.imwrite(str(folder / "masks/0" / f"f{k:02d}_{copy}.png"), b)
    prepared("--dataset twins --name leaky")
    split = yaml.safe_load((MODELS / "leaky" / "split.yml").read_text())
    other = {img_id: img_id[:-1] + str(1 - int(img_id[-1])) for img_id in split["train"] + split["val"]}
    expected = {img_id: other[img_id] for img_id in split["val"] if other[img_id] in split["train"]}
    assert len(expected) >= 3 and split["twins"]["identical"] == expected
    said = capsys.readouterr().out
    assert f"look-alikes: {len(expected)} of 5 validation" in said and f"({len(expected)} the same pixels)" in said
    assert min(expected) in said
    for seed in (41, 5):
        prepared("--dataset twins --name grouped --split grouped --split_seed", seed)
        grouped = yaml.safe_load((MODELS / "grouped" / "split.yml").read_text())
        assert sorted(grouped["train"] + grouped["val"]) == sorted(other) and len(grouped["val"]) == 4
        assert not {other[img_id] for img_id in grouped["val"]} & set(grouped["train"])
        assert grouped["twins"] == {"identical": {}, "seam": {}, "alike": {}}
        assert "groups of look-alikes: " in capsys.readouterr().out
    assert config_of("grouped")["split"] == "grouped"
    resumed = chosen_split(config_of("grouped"), MODELS / "grouped")  # as written, not drawn again
    assert resumed == {part: grouped[part] for part in ("train", "val")}
    same = (folder / "images" / "f00_0.png").read_bytes()
    for path in (folder / "images").iterdir():
        path.write_bytes(same)
    refused(go, TINY, "--dataset twins --name no --split grouped", match="24 images fall into 1 group")
    assert not (MODELS / "no").exists()


def test_other_mistakes(go):
    refused(go, TINY, "--name", "a/b", match="plain name")
    refused(go, TINY, "--name", "..", match="plain name")
    refused(go, TINY, "--config", "nope.yml", match="nope.yml: no such file")
    refused(go, TINY, "--arch", "UNet", "--deep_supervision", "True", match="one head")
    if not torch.cuda.is_available():
        refused(go, TINY, "--device", "cuda", match="--device cuda is not available")
    for text, match in (("- a\n", "found list"), ("nope: 1\n", "unknown options nope"), ("a: [", "readable YAML")):
        Path("bad.yml").write_text(text)
        refused(go, TINY, "--config", "bad.yml", match=match)
    for wrong in ("--epochs -1", "--lr abc", "--frobnicate 1", "-b 0", "--milestones 3,2"):
        with pytest.raises(SystemExit) as caught:
            go(TINY, wrong)
        assert caught.value.code == 2


def test_a_file_in_the_place_of_the_folder_stays(go, tmp_path, place, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inputs").symlink_to(place / "inputs")
    (tmp_path / "models").write_text("a file")
    refused(go, TINY, match="models")
    assert (tmp_path / "models").read_text() == "a file"
