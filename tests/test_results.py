"""tools/results.py: its rows say what val.py and log.csv say, and its commands make the runs again."""

import cv2
import pandas as pd
import pytest
import yaml
from conftest import call, write_data_set
from test_inference import write_run

import train
import val
from instances import DEFAULTS
from tools import results

OPTIONS = "--dataset tiny --width 4 --input_w 32 --input_h 32 --epochs 2 -b 2 --lr 0.03 --ema 0 --augment flips"
OPTIONS += " --loss BCEDiceLoss --deep_supervision True --head_weights 1,1,2,2 --device cpu"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def place(tmp_path_factory, one_thread):
    """A folder with two runs that differ in their seed, tiny_s0 and tiny_s1, one of another split, one of nuclei."""
    folder = tmp_path_factory.mktemp("results")
    write_run(folder / "models" / "nuc", 3, target="instances", diameter=22.0, stretch="none", **DEFAULTS)
    write_data_set(folder / "inputs" / "tiny", count=20)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, options in (("tiny_s0", "--seed 0"), ("tiny_s1", "--seed 1"), ("other", "--split_seed 1")):
            call(patch, train, OPTIONS, options, "--name", name)
    return folder


@pytest.fixture(autouse=True)
def here(place, monkeypatch):
    monkeypatch.chdir(place)


@pytest.fixture
def rows(monkeypatch, capsys):
    """rows(*options) -> the cells of each row that tools/results.py prints."""

    def printed(*options):
        capsys.readouterr()
        call(monkeypatch, results, *options)
        lines = capsys.readouterr().out.splitlines()
        head, _, *found = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        return [dict(zip(head, row, strict=True)) for row in found]

    return printed


def test_a_row_is_what_val_says(rows, monkeypatch, capsys):
    first, second = rows("--each", "tiny_s0", "tiny_s1")
    call(monkeypatch, val, "--name tiny_s0 --device cpu")
    of_val = capsys.readouterr().out.split("last epoch")
    for epoch, keys in zip(of_val, (["IoU, best epoch"], ["IoU, last epoch (95 %)", "Dice", "IoU/image"]), strict=True):
        line = next(line.split() for line in epoch.splitlines() if line.startswith("L4"))
        assert [first[key].split()[0] for key in keys] == line[1 : 1 + len(keys)]
    (both,) = rows("tiny_s0", "tiny_s1")
    values = [float(row["IoU, last epoch (95 %)"].split()[0]) for row in (first, second)]
    mean, _, spread, *interval = both["IoU, last epoch (95 %)"].split()
    assert float(mean) == pytest.approx(sum(values) / 2, abs=1e-4)
    assert float(spread) == pytest.approx(abs(values[0] - values[1]) / 2**0.5, abs=1e-4)
    low, high = float(interval[0].strip("(")), float(interval[2].strip(")"))
    assert low <= high and both["seeds"] == "2" and both["epochs"] == "2"
    log = pd.read_csv("models/tiny_s0/log.csv")
    assert first["minutes"] == f"{log.seconds.sum() / 60:.0f}"


def test_a_run_that_keeps_the_last_epoch_has_no_best_one(rows, monkeypatch):
    call(monkeypatch, train, OPTIONS, "--keep last --name last")
    (row,) = rows("last")
    assert row["IoU, best epoch"] == "not kept" and float(row["IoU, last epoch (95 %)"].split()[0]) > 0


def test_the_command_of_a_row_makes_the_run_again(rows, monkeypatch):
    command = rows("--each", "tiny_s1")[0]["command"].strip("`").split()
    assert command[:2] == ["python", "train.py"] and "--weight_decay" not in command
    call(monkeypatch, train, *command[2:], "--device cpu --name again")
    of_run, again = (pd.read_csv(f"models/{name}/log.csv") for name in ("tiny_s1", "again"))
    assert of_run.drop(columns="seconds").equals(again.drop(columns="seconds"))


def test_another_head_and_the_worst_images(rows, place, monkeypatch):
    assert rows("--head L1 tiny_s0")[0]["mIoU10"] != rows("tiny_s0")[0]["mIoU10"]
    call(monkeypatch, results, "tiny_s0 --worst worst.png")
    assert len(yaml.safe_load((place / "models" / "tiny_s0" / "split.yml").read_text())["val"]) == 4
    sheet = cv2.imread("worst.png")  # two columns of four pictures, twice
    assert sheet.shape[:2] == (2 * (4 * (96 + 8) + 20) + 8, 2 * (96 + 8) + 8)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ("tiny_s0 --head L5", "models/tiny_s0 has no head L5, only L1, L2, L3, L4, mean"),
        ("tiny_s0 other", "differ in their validation images"),
        ("tiny_s0 nuc", "models/nuc finds individual nuclei .*; tools.results needs a run of masks"),
        ("tiny_s0 other --worst w.png", "--worst draws one run, found 2"),
    ],
)
def test_what_is_no_row(monkeypatch, place, options, match):
    with pytest.raises(ValueError, match=match):
        call(monkeypatch, results, options)
    assert not (place / "w.png").exists()
