"""tools/results.py: its rows say what val.py and log.csv say, and its commands make the runs again."""

import cv2
import pandas as pd
import pytest
import yaml
from conftest import REPOSITORY, run_script, write_data_set

OPTIONS = "--dataset tiny --width 4 --input_w 32 --input_h 32 --epochs 2 -b 2 --lr 0.03 --ema 0 --augment flips"
OPTIONS += " --loss BCEDiceLoss --deep_supervision True --head_weights 1,1,2,2"
ENV = {"PYTHONPATH": str(REPOSITORY)}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with two runs that differ in their seed, tiny_s0 and tiny_s1."""
    folder = tmp_path_factory.mktemp("results")
    write_data_set(folder / "inputs" / "tiny", count=20)
    for seed in range(2):
        run_script("train.py", *OPTIONS.split(), "--seed", seed, "--name", f"tiny_s{seed}", cwd=folder)
    return folder


def results(place, *options):
    """The cells of each row that tools/results.py prints."""
    said = run_script("tools.results", *options, cwd=place, env=ENV).stdout
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in said.splitlines()]
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_a_row_is_what_val_says(place):
    first, second = results(place, "--each", "tiny_s0", "tiny_s1")
    of_val = run_script("val.py", "--name", "tiny_s0", cwd=place).stdout.split("last epoch")
    for epoch, keys in zip(of_val, (["IoU, best epoch"], ["IoU, last epoch (95 %)", "Dice", "IoU/image"]), strict=True):
        line = next(line.split() for line in epoch.splitlines() if line.startswith("L4"))
        assert [first[key].split()[0] for key in keys] == line[1 : 1 + len(keys)]
    (both,) = results(place, "tiny_s0", "tiny_s1")
    values = [float(row["IoU, last epoch (95 %)"].split()[0]) for row in (first, second)]
    mean, _, spread, *interval = both["IoU, last epoch (95 %)"].split()
    assert float(mean) == pytest.approx(sum(values) / 2, abs=1e-4)
    assert float(spread) == pytest.approx(abs(values[0] - values[1]) / 2**0.5, abs=1e-4)
    low, high = float(interval[0].strip("(")), float(interval[2].strip(")"))
    assert low <= high and both["seeds"] == "2" and both["epochs"] == "2"
    log = pd.read_csv(place / "models" / "tiny_s0" / "log.csv")
    assert first["minutes"] == f"{log.seconds.sum() / 60:.0f}"


def test_the_command_of_a_row_makes_the_run_again(place):
    command = results(place, "--each", "tiny_s1")[0]["command"].strip("`").split()
    assert command[:2] == ["python", "train.py"] and "--weight_decay" not in command
    run_script(*command[1:], "--name", "again", cwd=place)
    of_run, again = (pd.read_csv(place / "models" / name / "log.csv") for name in ("tiny_s1", "again"))
    assert of_run.drop(columns="seconds").equals(again.drop(columns="seconds"))


def test_another_head_and_the_worst_images(place):
    assert results(place, "--head", "L1", "tiny_s0")[0]["mIoU10"] != results(place, "tiny_s0")[0]["mIoU10"]
    run_script("tools.results", "tiny_s0", "--worst", "worst.png", cwd=place, env=ENV)
    config = yaml.safe_load((place / "models" / "tiny_s0" / "split.yml").read_text())
    assert len(config["val"]) == 4
    sheet = cv2.imread(str(place / "worst.png"))  # two columns of four pictures, twice
    assert sheet.shape[:2] == (2 * (4 * (96 + 8) + 20) + 8, 2 * (96 + 8) + 8)
    wrong = run_script("tools.results", "tiny_s0", "--head", "L5", cwd=place, ok=False, env=ENV)
    assert "models/tiny_s0 has no head L5, only L1, L2, L3, L4, mean" in wrong.stderr


def test_runs_of_other_images_are_no_row(place):
    run_script("train.py", *OPTIONS.split(), "--split_seed", 1, "--name", "other", cwd=place)
    refused = run_script("tools.results", "tiny_s0", "other", cwd=place, env=ENV, ok=False)
    assert "differ in their validation images" in refused.stderr
    both = run_script("tools.results", "tiny_s0", "other", "--worst", "w.png", cwd=place, env=ENV, ok=False)
    assert "--worst draws one run, found 2" in both.stderr and not (place / "w.png").exists()
