"""Every option of every script with every choice and extreme value: it works without a warning, or says why not.

python -m pytest -q -s tests/test_options.py           # some values of each option
python -m pytest -q -s -m slow tests/test_options.py   # all of them

A new option has to be entered in FLAGS, with values that work and values that are refused in one line; choices, both
bools, and what lies outside of the bounds of a number are added from the parser itself.
"""

import math
import shutil
import sys
import webbrowser
from pathlib import Path

import cv2
import fuzzing
import numpy as np
import pytest
from conftest import write_data_set, write_label_set
from fuzzing import judge

import archs
import engine
import export
import import_labels
import losses
import predict
import preprocess_dsb2018
import run_config
import train
import transfer_resnet18
import val
from label_forms.recognise import FORMS
from tools import benchmark
from utils import str2bool

pytestmark = pytest.mark.usefixtures("one_thread")

# What each call begins with; the option under test comes after it and wins.
BASE = {
    train: "--dataset tiny --width 1 --input_w 16 --input_h 16 --epochs 1 -b 2 --device cpu --amp off --name new",
    val: "--name run --device cpu --amp off",
    predict: "inputs/tiny/images/img00.png --name run --device cpu --amp off",
    export: "--name run --overwrite",
    import_labels: "inputs/tiny/images inputs/tiny/masks/0 --name new",
    preprocess_dsb2018: "--raw raw --output inputs/new --img_size 16 --num_workers 1",
    transfer_resnet18: "--data_dir inputs/pictures --weights none --img_size 32 --epochs 1 -b 4 --device cpu --amp off "
    "--num_workers 0 --name new",
    benchmark: "--only limit --rounds 1 --threads 1 --dataset tiny --raw raw --data_dir inputs/pictures --device cpu",
}

POSITIONAL = {"paths": 0, "images": 0, "labels": 1}  # where BASE has them

DEVICES = ("auto cpu", "gpu cuda:99 cpu:x")
WORKERS = ("0 3", "-2 1025 1.5")
RESUMING = ("", "")  # tried in test_train.py and test_transfer.py

# {option: (values that work, values that are refused)}, words; ! stands for a switch, _ for an empty text.
FLAGS = {
    train: {
        "name": ("a_name-1 _", ". .. a/b /x ../x"),
        "config": ("recipe.yml", "none.yml models inputs/tiny/images/img00.png"),
        "resume": RESUMING,
        "overwrite": ("!", ""),
        "weights": ("run models/run models/run/model.pth", "none inputs/tiny/images/img00.png"),
        "seed": ("0 4294967295", "-1 4294967296 x"),
        "epochs": ("1 2", "0 -1 1.5"),
        "batch_size": ("1 3 100000", "0 -1"),
        "early_stopping": ("-1 0 1 1000", "x 0.5"),
        "keep": ("", "all"),
        "target": ("", "boxes"),
        "arch": ("", "Transformer"),
        "deep_supervision": ("", "maybe"),
        "encoder": ("none efficientnet_lite0", "resnet_18 hf-hub:timm/resnet18 vit_tiny_patch16_224 ../x _"),
        "stem": ("", "quarter"),
        "encoder_weights": ("none auto", "models/run none.pth inputs/tiny/images/img00.png"),
        "encoder_lr": ("0 1e-12 1e-3", "-1 inf 1e30"),
        "encoder_freeze": ("0 1 1000", "-1 1.5"),
        "encoder_freeze_bn": ("", "2"),
        "input_channels": ("", "0 2 5"),
        "num_classes": ("1", "0 5 100 101"),  # the data set has one class
        "width": ("1 3", "0 257"),
        "input_w": ("1 17 96 97", "0 4097"),
        "input_h": ("1 17 96 97", "0 4097"),
        "dataset": ("tiny five", "none .. /etc _"),
        "img_ext": (".png", ".jpg / _ ../.png"),
        "mask_ext": (".png", ".jpg / ../.png"),
        "split": ("models/run/split.yml random", "none.yml recipe.yml grouped"),  # its images are all of one group
        "split_seed": ("0 4294967295", "-1"),
        "augment": ("none flips cutmix,affine,copies,colour,mild,flips", "_ flop flips,,mild none,flips paste"),
        "diameter": ("4 22.5 256", "3.9 257"),
        "scale_range": ("1,1 [0.1,10]", "2,1 1 0,1 1,11 a _"),
        "stretch": ("none 0,100 [1,99.8]", "99,1 1 -1,50 1,101 a _"),
        "crops": ("1 7", "0 1.5"),
        "kind_balance": ("0 1", "-0.1 1.1"),
        "rehearse": ("none generated cells", "nope ../cells tiny"),
        "map_weights": ("1,1,1 [0,0.5,1]", "1,1 0,0,0 1,1,-1 a _"),
        "head_weights": ("1,1,1,1 [0,0,0.5,1]", "1 0,0,0,0 1,1,1,1,1 1,1,1,-1 1,1,1,nan a _"),
        "loss": ("", "MSE"),
        "optimizer": ("", "Adagrad"),
        "lr": ("0 1e-12 1e-3", "-1 inf 1e30"),
        "momentum": ("0 0.5 1", "-0.1 1.1"),
        "weight_decay": ("0 1", "-1"),
        "nesterov": ("", "2"),
        "scheduler": ("", "LinearLR"),
        "min_lr": ("0 1", "-1"),
        "factor": ("0 0.999999", "1 -1"),
        "patience": ("0 1000", "-1"),
        "milestones": ("1 1,2,3 [1,2] 1000000", "0 2,1 1,1 a _ 1,,2"),
        "gamma": ("0 1 10", "-1"),
        "ema": ("0 0.99999", "1 -1"),
        "device": DEVICES,
        "amp": ("", "on"),  # fp16 needs a GPU
        "channels_last": ("auto", "2"),
        "checkpointing": ("", "2"),
        "tensorboard": ("", "2"),
        "sync_bn": ("", "2"),
        "compile": ("", "2"),
        "cache": ("auto", "2"),
        "num_workers": ("-1 " + WORKERS[0], WORKERS[1]),
    },
    val: {
        "name": ("run _", "none .. a/b"),
        "dataset": ("tiny one", "none .. /etc"),
        "split": ("test.yml", "none.yml models/run/split.yml"),
        "batch_size": ("1 1000", "0"),
        "level": ("", "0 5"),
        "levels": ("!", ""),
        "tta": ("!", ""),
        "explain": ("!", ""),
        "open": ("!", ""),
        "submission": ("", "new.csv"),  # of a run of individual nuclei: test_val_nuclei.py
        "device": DEVICES,
        "amp": ("", "on"),
        "num_workers": WORKERS,
    },
    predict: {
        "paths": ("inputs inputs/tiny/images/*.png", "none"),
        "name": ("run", "none .. a/b"),
        "onnx": ("run.onnx", "none.onnx inputs/tiny/images/img00.png"),
        "output": ("new/results", "recipe.yml inputs/tiny/images"),
        "resume": ("!", ""),
        "level": ("", "0 5"),
        "mode": ("", "whole"),
        "scale": ("0.01 1 10", "0 1000"),
        "diameter": ("4 300", "0.9 10001"),
        "pixel_size": ("0.5", "0"),
        "rois": ("!", ""),
        "geojson": ("!", ""),
        "submission": ("new.csv new/folder/a.csv", "recipe.yml recipe.yml/a.csv"),
        "tta": ("!", ""),
        "threshold": ("0 0.5 1", "-1 2"),
        "probability": ("!", ""),
        "page": ("0", "-1 1 x"),
        "channels": ("0 2,1,0 0,0,0", "3 0,1 -1 a _ 0,1,2,3"),
        "html": ("!", ""),
        "open": ("!", ""),
        "max_pixels": ("1024 1073741824", "0 1 1073741825"),
        "batch_size": ("1 1000", "0"),
        "device": DEVICES,
        "amp": ("", "on"),
    },
    export: {
        "name": ("run", "none .. a/b"),
        "level": ("", "0 5"),
        "output": ("a.onnx new/folder/a.onnx", "models"),
        "int8": ("!", ""),
        "run": ("small", "run ../x ."),
        "overwrite": ("!", ""),
    },
    import_labels: {
        "images": ("inputs/tiny/images/img00.png", "none recipe.yml"),
        "labels": ("inputs/tiny/masks/0/img00.png inputs/tiny/masks", "none recipe.yml models"),
        "name": ("a_name-1", ".. a/b _"),
        "form": ("", "masks"),
        "classes": ("255", "a 255,b"),
        "check": ("!", ""),
        "overwrite": ("!", ""),
    },
    preprocess_dsb2018: {
        "raw": ("raw", "none recipe.yml models"),
        "download": ("", ""),  # test_preprocess.py
        "demo": ("", ""),  # in test_other_combinations, without --raw
        "url": ("", "http://127.0.0.1:1/x"),  # not without --download
        "fixes": ("raw", "none recipe.yml models inputs/tiny"),
        "solution": ("", "none recipe.yml models"),  # test_dsb2018.py
        "native": ("", "!"),  # not with --img_size
        "img_size": ("8 17 96 97", "7 4097"),
        "output": ("new/folder", "models recipe.yml"),
        "overwrite": ("!", ""),
        "num_workers": ("1 3", "0 257"),
    },
    transfer_resnet18: {
        "name": ("a_name-1 _", ".. a/b"),
        "predict": ("", "none"),  # with a run in test_transfer.py
        "demo": ("", ""),  # test_transfer.py
        "open": ("!", ""),
        "reject": ("", "0.5"),  # not without --predict
        "resume": RESUMING,
        "overwrite": ("!", ""),
        "seed": ("0 4294967295", "-1 4294967296"),
        "epochs": ("1 2", "0 -1"),
        "batch_size": ("2 5 100000", "0"),
        "data_dir": ("inputs/pictures inputs/pictures/train", "none inputs/one/images recipe.yml"),
        "download": ("!", ""),  # the data are there
        "raw": ("", "none.zip recipe.yml"),
        "val_fraction": ("0.01 0.9", "0 1"),
        "img_size": ("32 33 97", "31 1025"),
        "augment": ("", "2"),
        "min_scale": ("0.01 1", "0 1.1"),
        "jitter": ("0 1", "-1 2"),
        "mirror": ("", "2"),
        "weights": ("none", "none.pth recipe.yml models/run/model.pth"),
        "freeze": ("!", ""),
        "tensorboard": ("", "2"),
        "sync_bn": ("", "2"),
        "freeze_bn": ("", "2"),
        "optimizer": ("", "Adam"),
        "lr": ("0 1e-12", "-1 inf"),
        "body_lr": ("0 1e-12", "-1 nan"),
        "layer_decay": ("0 1", "2"),
        "momentum": ("0 1", "2"),
        "weight_decay": ("0 1", "-1"),
        "scheduler": ("", "OneCycleLR"),
        "step_size": ("1 1000", "0"),
        "gamma": ("0 10", "-1"),
        "label_smoothing": ("0 1", "2"),
        "device": DEVICES,
        "amp": ("", "on"),
        "num_workers": ("-1 " + WORKERS[0], WORKERS[1]),
    },
    benchmark: {
        "only": ("", "none"),
        "rounds": ("1", "0"),
        "clock": ("", "sun"),
        "threads": ("1", "0 1025"),
        "dataset": ("tiny none", ""),  # the machine's limit needs none
        "raw": ("none", ""),
        "json": ("rows.json", "none/rows.json"),
        "data_dir": ("none", ""),  # only `transfer` needs it: test_benchmark.py
        "device": ("", "gpu"),
    },
}
NEVER = {  # choices of the parser that cannot work here
    (train, "amp", "fp16"), (val, "amp", "fp16"), (predict, "amp", "fp16"), (transfer_resnet18, "amp", "fp16"),
    (train, "sync_bn", "True"), (transfer_resnet18, "sync_bn", "True"),
    *((import_labels, "form", name) for name in FORMS.keys() - {"class_map", "instance_map"}),
    (train, "nesterov", "True"), (train, "deep_supervision", "False"), (train, "resume", "True"),
    (transfer_resnet18, "resume", "True"), (preprocess_dsb2018, "download", "True"),
    (preprocess_dsb2018, "demo", "True"), (transfer_resnet18, "demo", "True"), (preprocess_dsb2018, "native", "True"),
}  # fmt: skip
SLOW = {
    ("train", "compile"),
    ("export", "level"),
    ("export", "output"),
    ("export", "name"),
    ("export", "overwrite"),
    ("export", "int8"),
}
SLOW |= {("export", "int8"), ("predict", "onnx")} | {("tools.benchmark", flag) for flag in FLAGS[benchmark]}


def actions(script):
    """{name: action} of a script's options."""
    return {action.dest: action for action in script.build_parser()._actions if action.dest != "help"}


def values(script, flag):
    """-> (values that work, values that are refused) of an option, each without doubles."""
    action, (good, bad) = actions(script)[flag], map(str.split, FLAGS[script][flag])
    kind = action.type
    if action.choices:
        good += map(str, action.choices)
    elif kind in (str2bool, getattr(train, "auto_or_bool", None)):
        good += [str(bool(action.default)), str(not action.default)]  # that which is not the default comes last
    elif hasattr(kind, "low"):
        bad += ["nan", "inf", "1e999", "x", "_"]
        bad += [str(kind.low - 1)] * math.isfinite(kind.low) + [str(kind.high + 1)] * math.isfinite(kind.high)
    good = [value for value in good if (script, flag, value) not in NEVER]
    return list(dict.fromkeys(good)), list(dict.fromkeys(bad))


# ---------------------------------------------------------------- a place to run in


@pytest.fixture(scope="module")
def furnished(tmp_path_factory, one_thread):
    """A folder with data sets, a finished run `run`, raw data, a recipe and pictures of two classes."""
    folder = tmp_path_factory.mktemp("options")
    for name, options in (("tiny", {}), ("five", {"num_classes": 5}), ("two", {"count": 2}), ("one", {"count": 1})):
        write_data_set(folder / "inputs" / name, **{"count": 5, "size": (20, 16), **options})
    for path in (folder / "inputs" / "two" / "masks" / "0").iterdir():
        cv2.imwrite(str(path), np.full((20, 16), 255, np.uint8))  # there is something left at 1 x 1
    for channels in (1, 4):
        write_data_set(folder / "inputs" / f"channels{channels}", count=5, size=(20, 16), channels=channels)
    for k in range(2):
        source = folder / "inputs" / "tiny"
        for kind, path in (("images", source / "images"), ("masks", source / "masks" / "0")):
            target = folder / "raw" / f"id{k}" / kind
            target.mkdir(parents=True)
            shutil.copy(path / f"img0{k}.png", target / f"id{k}.png")
    for part, number in (("train", 3), ("val", 1)):
        for label in ("ants", "bees"):
            target = folder / "inputs" / "pictures" / part / label
            target.mkdir(parents=True)
            for k in range(number):
                pixels = np.random.default_rng(k).integers(0, 256, (40, 40, 3), np.uint8)
                cv2.imwrite(str(target / f"{k}.png"), pixels)
    write_label_set(folder / "inputs" / "cells", count=5)
    (folder / "recipe.yml").write_text("lr: 1e-4\nmilestones: [1, 2]\nnesterov: no\n")
    (folder / "test.yml").write_text("train: [img00]\nval: [img01]\ntest: [img02]\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(engine, "plot_curves", lambda *args, **kwargs: None)
        nuclei = "--name nuclei --target instances --dataset cells --split random --input_w 32 --input_h 32"
        expect("accepted", patch, train, BASE[train], nuclei)
        expect("accepted", patch, train, BASE[train], "--name run --ema 0 --deep_supervision True")
    return folder


@pytest.fixture
def here(furnished, tmp_path, monkeypatch):
    """A fresh copy of it, and drawing of curves, which no option changes, left out."""
    shutil.copytree(furnished, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(engine, "plot_curves", lambda *args, **kwargs: None)
    monkeypatch.setattr(transfer_resnet18, "conclude", lambda *args, **kwargs: "report.html")
    monkeypatch.setattr(webbrowser, "open", lambda address: True)
    return tmp_path / "here"


def run(patch, script, *words):
    """The verdict of fuzzing.judge on the script's main with these words."""
    made = "models/new", "models/a_name-1", "inputs/new", "new", "outputs/run"
    for folder in made if script not in (val, predict) else ():
        shutil.rmtree(folder, ignore_errors=True)
    if script is transfer_resnet18:
        patch.setattr(engine, "save_checkpoint", lambda *args: None)  # 90 MB each time
    words = [word.removesuffix("_") if word.endswith("=_") else word for word in " ".join(words).split()]
    patch.setattr(sys, "argv", [f"{script.__name__}.py", *words])
    return judge(script.main)


def words_of(script, flag, value):
    words = BASE[script].replace(*(("--amp off", "") if flag == "onnx" else ("", "")))  # which export.py decided
    if flag == "encoder":
        words += " --encoder_weights none" if value != "none" else ""
    words += " --deep_supervision True" * (flag == "head_weights")
    if script is train and (flag in train.NUCLEI_OPTIONS or value == "instances"):
        words += " --target instances --dataset cells --split random --input_w 32 --input_h 32"
    if script is predict and flag in predict.OF_NUCLEI:
        words = words.replace("inputs/tiny", "inputs/cells").replace("--name run", "--name nuclei")
    if flag == "stem" or flag.startswith("encoder_"):
        words += " --encoder efficientnet_lite0 --encoder_weights none"
    if flag in POSITIONAL:
        words = words.split(" ")
        words[POSITIONAL[flag]] = value
        return " ".join(words)
    return f"{words} --{flag}" if value == "!" else f"{words} --{flag}={value}"


def expect(expected, patch, script, *words):
    try:
        found = run(patch, script, *words)
    except BaseException as error:
        raise AssertionError(f"{script.__name__} {' '.join(words)}: {type(error).__name__}: {error}") from error
    assert found == expected, f"{script.__name__} {' '.join(words)}: {found} {judge.line}"


def walk(script, flag, patch, some):
    """some: the last of the values that work and the first two that do not; that the defaults work is known."""
    for expected, of_option in zip(("accepted", "refused"), values(script, flag), strict=True):
        chosen = of_option[-1:] if expected == "accepted" else of_option[:2]
        for value in chosen if some else of_option:
            expect(expected, patch, script, words_of(script, flag, value))


CASES = [(script, flag) for script, flags in FLAGS.items() for flag in flags]
IDS = [f"{script.__name__} {flag}" for script, flag in CASES]
QUICK = [pytest.param(*case, id=name, marks=[pytest.mark.slow] * ((case[0].__name__, case[1]) in SLOW))
         for case, name in zip(CASES, IDS, strict=True)]  # fmt: skip


@pytest.mark.parametrize("script", FLAGS, ids=lambda script: script.__name__)
def test_the_table_knows_every_option(script):
    assert FLAGS[script].keys() == actions(script).keys(), "enter new options in FLAGS"


def test_choices_are_the_names_in_the_registries():
    """The parsers list them literally, so that --help does not import torch."""
    of_train, of_transfer = actions(train), actions(transfer_resnet18)
    for choices, registry in (
        (of_train["arch"], archs.ARCHS),
        (of_train["loss"], losses.LOSSES),
        (of_train["optimizer"], engine.OPTIMIZERS),
        (of_train["scheduler"], train.SCHEDULERS),
        (of_transfer["scheduler"], transfer_resnet18.RATE_FACTORS),
    ):
        assert sorted(choices.choices) == sorted(registry)
    assert set(of_transfer["optimizer"].choices) <= engine.OPTIMIZERS.keys()


def test_what_read_config_takes_is_what_the_parser_takes():
    of_train = actions(train)
    assert {key: (of_train[key].type.low, of_train[key].type.high) for key in run_config.BOUNDS} == run_config.BOUNDS
    assert tuple(of_train["input_channels"].choices) == run_config.INPUT_CHANNELS


def furnish(flag, patch):
    if flag == "onnx":
        expect("accepted", patch, export, BASE[export], "--output run.onnx")
    if flag == "compile":
        patch.setattr(fuzzing, "LIMIT_SECONDS", 600)  # the compiler is no reader of files


@pytest.mark.parametrize(("script", "flag"), QUICK)
def test_some_values(script, flag, here, monkeypatch):
    furnish(flag, monkeypatch)
    walk(script, flag, monkeypatch, some=True)


@pytest.mark.slow
@pytest.mark.parametrize(("script", "flag"), CASES, ids=IDS)
def test_all_values(script, flag, here, monkeypatch):
    furnish(flag, monkeypatch)
    walk(script, flag, monkeypatch, some=False)


# ---------------------------------------------------------------- several options at once

CHANNELS = ("--dataset tiny", "--dataset channels1 --input_channels 1", "--dataset channels4 --input_channels 4")
CHANNELS += ("--dataset channels1 --input_channels 4", "--dataset tiny --input_channels 1")
CLASSES = "--dataset five --num_classes 5"
SIZES = ("1 96", "17 96", "97 1", "96 97")
HEADS = ("--arch UNet", "--arch NestedUNet", "--arch NestedUNet --deep_supervision True")
BATCHES = ("-b 1 --num_workers 0", "-b 100 --num_workers 0", "-b 2 --num_workers 3")


def train_and_val(patch, *words):
    expect("accepted", patch, train, BASE[train], *words)
    expect("accepted", patch, val, "--name new --device cpu -b 3")
    expect("accepted", patch, predict, "inputs/tiny/images --name new --device cpu --mode tile")


@pytest.mark.parametrize("number", range(len(CHANNELS) + 1))
def test_channels_classes_sizes_heads_and_batches(number, here, monkeypatch):
    """Each of them with each of the others at least once in a few runs; test_all_of_them has every combination."""
    height, width = SIZES[number % len(SIZES)].split()
    words = ((*CHANNELS, CLASSES)[number], HEADS[number % 3], BATCHES[number // 2 % 3])
    train_and_val(monkeypatch, *words, f"--input_h {height} --input_w {width}")


@pytest.mark.slow
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("data", (*CHANNELS, CLASSES))
def test_all_of_them(data, size, heads, here, monkeypatch):
    height, width = size.split()
    for batch in BATCHES:
        train_and_val(monkeypatch, data, heads, batch, f"--input_h {height} --input_w {width}")


OTHERS = [
    (train, BASE[train] + " --dataset two", "accepted"),  # one image to learn from, one to validate on
    (train, BASE[train] + " --dataset two -b 1 --input_w 1 --input_h 1", "accepted"),
    (train, BASE[train] + " --dataset one", "refused"),
    (train, BASE[train] + " --epochs 3 --early_stopping 1 --lr 0 --ema 0", "accepted"),
    (train, BASE[train] + " --epochs 2 --early_stopping 0 --scheduler MultiStepLR --milestones 1", "accepted"),
    (train, BASE[train] + " --optimizer SGD --nesterov True --momentum 0", "refused"),
    (train, BASE[train] + " --optimizer SGD --nesterov True", "accepted"),
    (train, BASE[train] + " --arch UNet --deep_supervision True", "refused"),
    (train, BASE[train] + " --head_weights 1,1,1,1", "refused"),
    (train, BASE[train] + " --num_classes 5", "refused"),
    (val, "--name run --dataset one --device cpu", "accepted"),
    (val, "--name run --level 1 --levels", "refused"),
    (predict, "inputs/tiny/images --name run --device cpu --tta --mode tile --scale 5 -b 1", "accepted"),
    (predict, "inputs/tiny/images --name run --device cpu --mode resize --scale 2", "refused"),
    (preprocess_dsb2018, "--demo --output inputs/new", "accepted"),
    (preprocess_dsb2018, "--demo --native --output inputs/new", "accepted"),
    (preprocess_dsb2018, "--demo --fixes raw --output inputs/new", "refused"),
    (preprocess_dsb2018, "--solution recipe.yml --output inputs/new", "refused"),  # without --raw
    (preprocess_dsb2018, "--demo --raw raw --output inputs/new", "refused"),
    (preprocess_dsb2018, "--raw raw --output inputs/tiny --overwrite", "refused"),  # not made by it
    (transfer_resnet18, BASE[transfer_resnet18] + " -b 1", "refused"),  # batch norm sees one value a channel
    (transfer_resnet18, BASE[transfer_resnet18] + " -b 1 --freeze_bn True", "accepted"),
    (transfer_resnet18, BASE[transfer_resnet18] + " -b 1 --img_size 64", "accepted"),
    (transfer_resnet18, BASE[transfer_resnet18] + " -b 5 --num_workers 3", "accepted"),  # 6 pictures: one is left over
    (transfer_resnet18, BASE[transfer_resnet18] + " --freeze --augment False -b 1", "accepted"),
]


@pytest.mark.parametrize(
    ("script", "words", "expected"), OTHERS, ids=[f"{case[0].__name__} {k}" for k, case in enumerate(OTHERS)]
)
def test_other_combinations(script, words, expected, here, monkeypatch):
    monkeypatch.setattr(preprocess_dsb2018, "DEMO_IMAGES", 2)
    expect(expected, monkeypatch, script, words)


@pytest.mark.parametrize("scheduler", train.SCHEDULERS)
@pytest.mark.parametrize(
    "optimizer", ["AdamW", *(pytest.param(name, marks=pytest.mark.slow) for name in ("Adam", "SGD"))]
)
def test_every_optimizer_and_scheduler_resumes(optimizer, scheduler, here, monkeypatch):
    """What is checked in last.pth lets everything pass that train.py writes."""
    momentum = 0 if scheduler == "ConstantLR" else 0.9
    words = f"{BASE[train]} --optimizer {optimizer} --scheduler {scheduler} --milestones 1 --momentum {momentum}"
    monkeypatch.setattr(engine.Run, "over", lambda self: "stopped" if self.epoch == 1 else None)
    expect("accepted", monkeypatch, train, words, "--epochs 2 --name resumed")
    monkeypatch.undo()
    monkeypatch.setattr(engine, "plot_curves", lambda *args, **kwargs: None)
    monkeypatch.chdir(here)
    expect("accepted", monkeypatch, train, "--name resumed --resume --device cpu")
    assert len(Path("models/resumed/log.csv").read_text().split()) == 3
