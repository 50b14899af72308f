"""levels.py: memory counted by hand, levels chosen by hand, and `val.py --level` and `--levels` as a user runs them."""

import math
import shutil
from pathlib import Path

import cv2
import pandas as pd
import pytest
import torch
from conftest import call, write_data_set

import train
import val
from archs import NestedUNet
from levels import PAPER, PeakMemory, draw, measure, rows_of_levels, sufficient, with_text
from metrics import count_pixels
from utils import count_params

pytestmark = pytest.mark.usefixtures("one_thread")


def test_peak_memory_by_hand():
    with torch.inference_mode():
        images = torch.zeros(250)  # 1000 bytes, made before
        with PeakMemory() as peak:
            a = images + 1  # 1000
            b = a.view(50, 5)[:, :2]  # the same bytes
            c = torch.cat([a, images])  # 3000 with it
            assert peak.bytes == 3000
            del a, b
            d = c.relu_().double()  # in place; then 2000 and 4000
            assert peak.bytes == 6000
            del c
            assert (d + 1).shape == (500,) and peak.bytes == 8000


def test_memory_and_parameters_fall_with_the_level():
    model = NestedUNet(deep_supervision=True, width=4).eval()
    found = measure(model, torch.zeros(2, 3, 48, 40), torch.device("cpu"), rounds=1)
    assert list(found) == ["L1", "L2", "L3", "L4", "mean"]
    for smaller, larger in (("L1", "L2"), ("L2", "L3"), ("L3", "L4"), ("L4", "mean")):
        for key in ("parameters", "megabytes"):
            assert found[smaller][key] < found[larger][key]
    assert all(row["ms"] > 0 for row in found.values())
    assert found["L2"]["parameters"] == count_params(model.prune(2))
    assert found["mean"]["parameters"] == count_params(model)
    # the weights, and at least X^{0,0} and X^{0,1} of two images, padded to 48 x 48
    state = sum(tensor.nbytes for tensor in model.prune(1).state_dict().values())
    assert found["L1"]["megabytes"] * 2**20 > state + 2 * (2 * 4 * 48 * 48 * 4)


def table_of(hits):
    """One image, one class, threshold 0.5: of 100 true pixels `hits` found, no false alarm."""
    masks = torch.zeros(1, 1, 1, 200)
    masks[..., :100] = 1
    found = torch.zeros_like(masks)
    found[..., :hits] = 1
    return count_pixels(found, masks, thresholds=(0.5,)).numpy()


COSTS = {f"L{k}": {"parameters": 10**k, "ms": 1.0 * k, "megabytes": 2.0 * k} for k in (1, 2, 3, 4)}


@pytest.mark.parametrize(
    ("hits", "expected"),
    [((80, 81, 82, 83), "L4"), ((83, 83, 83, 83), "L1"), ((70, 83, 82, 80), "L2"), ((80, 82, 83, 83), "L3")],
)
def test_the_smallest_level_within_half_a_point(hits, expected):
    tables = {f"L{k}": table_of(n) for k, n in enumerate(hits, 1)} | {"mean": table_of(99)}
    rows = rows_of_levels(COSTS | {"mean": COSTS["L4"]}, tables)
    assert [row["iou"] for row in rows] == [n / 100 for n in (*hits, 99)]
    chosen, sentence = sufficient(rows)  # the mean is no level
    assert chosen["level"] == expected and sentence.startswith(f"{expected} is the smallest level within 0.005 of")
    if expected == "L2":
        assert "L2 has 0.8300): 1.0% of L4's parameters, 50% of its time, 50% of its memory" in sentence
    assert rows[1]["paper_parameters"] == "0.5 M" and set(PAPER) == {"L1", "L2", "L3", "L4"}
    assert with_text(rows)[3]["parameters"] == "10,000" and "paper_miou" not in rows[4]


def test_the_smallest_level_of_a_run_of_nuclei():
    rows = [
        {"level": f"L{k}", "parameters": 10**k, "seconds": k / 4, "official": score}
        for k, score in enumerate((0.5, 0.61, 0.614, 0.6), 1)
    ]
    chosen, sentence = sufficient(rows, "official", "official score")
    assert chosen is rows[1] and sentence == (
        "L2 is the smallest level within 0.005 of the best official score (0.6100; L3 has 0.6140): "
        "1.0% of L4's parameters, 50% of its time."
    )
    assert with_text(rows)[3] | rows[3] == rows[3] and with_text(rows)[3]["seconds"] == "1.00"


def test_the_picture(tmp_path):
    draw(rows_of_levels(COSTS, {name: table_of(80) for name in COSTS}), tmp_path / "levels.png")
    picture = cv2.imread(str(tmp_path / "levels.png"))
    assert picture.shape == (432, 1080, 3) and picture.std() > 10


# ---------------------------------------------------------------- val.py --level and --levels


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with two tiny runs, `deep` and `plain`."""
    folder = tmp_path_factory.mktemp("levels")
    write_data_set(folder / "inputs" / "dsb2018_tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, deep in (("deep", True), ("plain", False)):
            options = "--dataset dsb2018_tiny --width 2 --input_w 32 --input_h 32 --epochs 1 --device cpu"
            call(patch, train, options, "--name", name, "--deep_supervision", deep)
    return folder


@pytest.fixture
def go(runs, monkeypatch, capsys):
    """go(*options) runs val.main with them -> what it prints."""
    monkeypatch.chdir(runs)

    def run(*options):
        capsys.readouterr()
        call(monkeypatch, val, "--device cpu", *options)
        return capsys.readouterr().out

    return run


def rows_below(stdout, title):
    """The table under a line of stdout that starts with `title`: a list of words a row, the heading first."""
    return [line.split() for line in stdout[stdout.index(f"\n{title}") :].split("\n\n")[0].strip().splitlines()[1:]]


def test_val_levels(go):
    said = go("--name deep --levels -b 2")
    assert "one batch of 2" in said and "is the smallest level within 0.005 of" in said
    heading, *rows = rows_below(said, "levels: ")[:6]
    assert heading[:4] == ["level", "parameters", "ms/image", "peak"] and rows[1][-2:] == ["about", "92.3"]
    assert [row[0] for row in rows] == ["L1", "L2", "L3", "L4", "mean"]
    deep = NestedUNet(deep_supervision=True, width=2)
    counts = [*(count_params(deep.prune(level)) for level in (1, 2, 3, 4)), count_params(deep)]
    assert [int(row[1].replace(",", "")) for row in rows] == counts
    assert cv2.imread("outputs/deep/levels.png") is not None
    page = Path("outputs/deep/report.html").read_text(encoding="utf-8")
    assert "Levels" in page and "about 92.3" in page
    shutil.copytree("inputs/dsb2018_tiny", "inputs/cells")
    said = go("--name deep --levels --dataset cells")
    assert "within 0.005" in said and "paper" not in said.lower() and "92.3" not in said  # the paper is on nuclei


def test_val_level_judges_the_pruned_model(go):
    found = {}
    for level, head in (("2", "L2"), ("mean", "mean"), (None, "L4")):
        said = go("--name deep", f"--level {level}" if level else "")
        found[level] = {row[0]: row[1:] for row in rows_below(said, "best epoch")[1:]}
        kept = pd.read_csv("outputs/deep/metrics.csv")
        assert math.isclose(kept["iou"].mean(), float(found[level][head][2]), abs_tol=1e-4)
    assert list(found["2"]) == ["L2"] and list(found[None]) == ["L1", "L2", "L3", "L4", "mean"] == list(found["mean"])
    assert found["2"]["L2"] == found[None]["L2"] and found["mean"] == found[None]


@pytest.mark.parametrize("options", ["--level 2", "--levels"])
def test_without_deep_supervision_there_are_no_levels(go, options):
    with pytest.raises(ValueError, match="trained without --deep_supervision True"):
        go("--name plain", options)
    assert not Path("outputs/plain").exists()


def test_level_4_needs_no_deep_supervision(go):
    assert "\nL4 " in go("--name plain --level 4")
    shutil.rmtree("outputs/plain")


def test_one_level_or_all_of_them(go, capsys):
    with pytest.raises(SystemExit):
        go("--name deep --level 2 --levels")
    assert "not allowed with argument --level" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--levels measures single passes; leave --tta out"):
        go("--name deep --tta --levels")
