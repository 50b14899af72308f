"""val.py on a run of individual nuclei: its figures against a slow count of the written labels, and its files.

python -m pytest -q tests/test_val_nuclei.py
"""

import csv
import html
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import browser_in, call, run_script, write_data_set, write_label_set

import engine
import train
import val
from archs import build_model
from instances import DEFINITIONS, bootstrap_interval, from_runs
from nuclei import crops
from nuclei.evaluation import COLUMNS, PRECISION
from utils import count_params

pytestmark = pytest.mark.usefixtures("one_thread")

TRAIN = "--width 4 --input_w 48 --input_h 48 --ema 0 --lr 0.03 --device cpu --amp off -b 4"
NUCLEI = f"{TRAIN} --dataset cells --split random --target instances --diameter 12 --augment flips,copies"
NUCLEI += " --scale_range 0.8,1.25"
EASY = {"mask_threshold": 0.5, "contact_threshold": 0.3, "distance_threshold": 0.2, "smallest": 20}  # of a poor run
SHAPE = (60, 72)


def write_cells(folder, count=12):
    """Seven separate discs and an eighth that touches the first; every third picture is bright, the last one empty."""
    ids, rng = write_label_set(folder, count, SHAPE), np.random.default_rng(0)
    for k, img_id in enumerate(ids):
        labels = np.zeros(SHAPE, np.uint16)
        places = rng.permutation([(x, y) for y in (12, 34, 52) for x in (12, 36, 60)])
        for label, (x, y) in enumerate([*places[:7], places[0] + (9, 0)], 1):
            cv2.circle(labels, (int(x), int(y)), int(rng.integers(5, 7)), label, -1)
        image = rng.integers(0, 60, (*SHAPE, 3), np.uint8)
        if k < count - 1:
            image[labels > 0] = 190
        else:
            labels[:] = 0
        cv2.imwrite(str(folder / "images" / f"{img_id}.png"), 255 - image if k % 3 == 2 else image)
        cv2.imwrite(str(folder / "labels" / f"{img_id}.png"), labels)


@pytest.fixture(scope="module")
def place(tmp_path_factory, one_thread):
    """A folder with the run `nuclei`, and what val.py printed for it; `first` is a copy of what it wrote then.

    `masks` and `plain`, which has no levels, are runs, too.
    """
    folder = tmp_path_factory.mktemp("nuclei")
    write_cells(folder / "inputs" / "cells")
    write_data_set(folder / "inputs" / "tiny", count=5)
    for kept in ("predict/mine.png", "labels/corrected.png"):
        (folder / "outputs/nuclei" / kept).parent.mkdir(parents=True)
        (folder / "outputs/nuclei" / kept).write_text("not val's")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(crops, "VIEW", 48)
        patch.setattr(engine, "plot_curves", lambda *args, **kwargs: None)
        call(patch, train, TRAIN, "--dataset tiny --epochs 1 --name masks")
        call(patch, train, NUCLEI, "--crops 4 --epochs 1 --name plain")
        call(patch, train, NUCLEI, "--crops 80 --epochs 4 --deep_supervision True --keep last --name nuclei")
        path = Path("models/nuclei/config.yml")
        path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **EASY}))
    words, browser = ["--name", "nuclei", "--amp", "off", "--submission", "new/bowl.csv", "--open"], browser_in(folder)
    said = run_script("val.py", *words, cwd=folder, env=browser[0])
    shutil.copytree(folder / "outputs" / "nuclei", folder / "first")
    return folder, said.stdout


@pytest.fixture
def go(place, monkeypatch, capsys):
    """go(*options) runs val.main with them -> what it prints."""
    monkeypatch.chdir(place[0])

    def run(*options):
        capsys.readouterr()
        call(monkeypatch, val, "--device cpu --amp off", *options)
        return capsys.readouterr()

    return run


@pytest.fixture
def copied(place, tmp_path, monkeypatch):
    """The data and the run in a folder of their own, to be spoilt."""
    for name in ("inputs", "models"):
        shutil.copytree(place[0] / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)


def ids_of(folder, name="nuclei"):
    return yaml.safe_load((folder / "models" / name / "split.yml").read_text())["val"]


def read_labels(folder, img_id):
    labels = cv2.imread(str(folder / f"{img_id}.png"), cv2.IMREAD_UNCHANGED)
    assert labels.shape == SHAPE and labels.dtype == np.uint16
    return labels.astype(np.int32)


def slow_counts(found, true):
    """TP, FP, FN at IoU > 0.50, 0.55 ... 0.95 -> (10, 3); every pair of masks is compared."""
    count, true_count = int(found.max()), int(true.max())
    overlaps = [
        ((a & b).sum(), (a | b).sum())
        for a in (found == k for k in range(1, count + 1))
        for b in (true == k for k in range(1, true_count + 1))
    ]
    tps = [sum(100 * both > percent * either for both, either in overlaps) for percent in range(50, 100, 5)]
    return np.array([(tp, count - tp, true_count - tp) for tp in tps])


def table(said, title):
    """The table below a line that starts with `title` -> {first word(s): list of the other cells, as text}."""
    heading, *lines = said[said.index(f"\n{title}") :].lstrip().split("\n\n")[0].splitlines()[1:]
    assert heading
    return {re.split(r"  +", line)[0]: re.split(r"  +", line)[1:] for line in lines if "  " in line}


# ---------------------------------------------------------------- figures


def test_every_figure_is_that_of_the_written_labels(place):
    folder, said = place
    ids, rows = ids_of(folder), pd.read_csv(folder / "first/metrics.csv").set_index("img_id")
    assert rows.index.tolist() == ids and len(ids) == 3
    counts = {}
    for img_id in ids:
        found = read_labels(folder / "first/labels", img_id)
        true = read_labels(folder / "inputs/cells/labels", img_id)
        counts[img_id] = slow_counts(found, true)
        row = rows.loc[img_id]
        ap = counts[img_id][:, 0] / counts[img_id].sum(1)
        assert row[list(PRECISION)].tolist() == pytest.approx(ap.tolist(), abs=1e-9)
        assert row.official == pytest.approx(ap.mean(), abs=1e-9)
        assert row[["tp", "fp", "fn"]].tolist() == counts[img_id][0].tolist()
        assert (row.predicted, row.true) == (found.max(), true.max()) == (len(np.unique(found)) - 1, 8)
        assert row.count_error == pytest.approx(abs(found.max() - 8) / 8)
        number = int(img_id.removeprefix("img"))
        assert row.kind == ("bright grey" if number % 3 == 2 else "dark grey") and row.level == "L4"
        assert 0.5 < row.scale < 2 and row.seconds > 0
    scores = np.array([(of[:, 0] / of.sum(1)).mean() for of in counts.values()])
    assert 0.2 < scores.mean() < 0.9, "the run is too poor, or too good, to test with"
    tp, fp, fn = np.sum([of[0] for of in counts.values()], axis=0)
    ap50 = np.mean([of[0, 0] / of[0].sum() for of in counts.values()])
    first, second = said.splitlines()[:2]
    assert first == "models/nuclei: cells, validation images of the run, 3 images, float32"
    official, low, high, printed_ap50, f1 = map(float, re.findall(r"\d\.\d{4}", second))
    assert second.startswith("official score ") and low <= official <= high
    assert [official, printed_ap50, f1] == pytest.approx([scores.mean(), ap50, 2 * tp / (2 * tp + fp + fn)], abs=5.1e-5)


def test_tables_by_kind_and_threshold(place):
    folder, said = place
    rows = pd.read_csv(folder / "first/metrics.csv")
    printed, thresholds = table(said, "kinds of pictures, L4"), table(said, "AP at each threshold")
    parts = {"all": rows, **dict(iter(rows.groupby("kind")))}
    assert printed.keys() == thresholds.keys() == parts.keys() and len(parts) > 2
    for kind, part in parts.items():
        cells = dict(zip(COLUMNS, printed[kind], strict=True))
        assert int(cells["images"]) == len(part)
        assert float(cells["official"]) == pytest.approx(part.official.mean(), abs=5.1e-5)
        assert float(cells["count_error"]) == pytest.approx(part.count_error.median(), abs=5.1e-5)
        for key in ("true", "predicted", "merges", "splits", "missed", "false"):
            assert int(cells[key]) == part[key].sum()
        ap = [part[key].mean() for key in PRECISION]
        assert [float(value) for value in thresholds[kind]] == pytest.approx(ap, abs=5.1e-5)


def test_the_interval_draws_groups_of_look_alikes(place):
    """All pictures of a kind look alike here."""
    rows = pd.read_csv(place[0] / "first/metrics.csv")
    low, high = bootstrap_interval(rows.official, rows.kind)
    assert f"({low:.4f} to {high:.4f}, 95 % bootstrap over 2 groups of look-alikes)" in place[1]
    assert "\nkinds of pictures, L4, last epoch (model.pth)\n" in place[1]


def test_pictures_with_and_without_a_twin_are_scored_apart(copied, go, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path("models/nuclei/split.yml")
    split = yaml.safe_load(path.read_text())
    first, *others = split["val"]
    split["twins"] = {"seam": {first: split["train"][0]}}
    path.write_text(yaml.safe_dump(split))
    said = go("--name nuclei").out
    rows = pd.read_csv("outputs/nuclei/metrics.csv").set_index("img_id").official
    expected = f"official score {rows[first]:.4f} on the 1 images with a look-alike in training, "
    assert said.splitlines()[2] == expected + f"{rows[others].mean():.4f} on the 2 others"


def test_definitions_on_demand(place, go):
    assert not any(text in place[1] for text in DEFINITIONS.values()) and "--explain" in place[1]
    said = go("--name nuclei --level 1 --explain").out
    page = html.unescape((place[0] / "first/report.html").read_text())
    assert all(text in said and text in page for text in DEFINITIONS.values())


# ---------------------------------------------------------------- levels


def test_levels(go, place):
    said = go("--name nuclei --levels").out
    rows = table(said, "levels: ")
    assert list(rows)[:4] == ["L1", "L2", "L3", "L4"]
    config = yaml.safe_load((place[0] / "models/nuclei/config.yml").read_text())
    counts = [count_params(build_model(config).prune(level)) for level in (1, 2, 3, 4)]
    assert [int(rows[f"L{k}"][0].replace(",", "")) for k in (1, 2, 3, 4)] == counts
    assert rows["L4"][2:] == table(said, "kinds of pictures, L4")["all"]
    assert re.search(r"\nL\d is the smallest level within 0.005 of the best official score \(", said)
    assert cv2.imread("outputs/nuclei/levels.png") is not None
    assert "Levels" in Path("outputs/nuclei/report.html").read_text()
    assert set(pd.read_csv("outputs/nuclei/metrics.csv").level) == {"L4"}  # the labels are those of L4
    alone = table(go("--name nuclei --level 2").out, "kinds of pictures, L2")["all"]
    assert alone == rows["L2"][2:]
    assert set(pd.read_csv("outputs/nuclei/metrics.csv").level) == {"L2"}


def test_the_mean_of_the_heads(go):
    assert "all" in table(go("--name nuclei --level mean").out, "kinds of pictures, mean")
    assert set(pd.read_csv("outputs/nuclei/metrics.csv").level) == {"mean"}


# ---------------------------------------------------------------- files


def test_the_submission_is_the_written_labels(place):
    folder, said = place
    with open(folder / "new/bowl.csv", newline="") as file:
        heading, *rows = csv.reader(file)
    assert heading == ["ImageId", "EncodedPixels"]
    ids = ids_of(folder)
    assert list(dict.fromkeys(row[0] for row in rows)) == ids
    for img_id in ids:
        runs = [text for name, text in rows if name == img_id]
        labels = read_labels(folder / "first/labels", img_id)
        assert np.array_equal(from_runs(runs, SHAPE), labels) and len(runs) == labels.max() > 0
    assert f"new/bowl.csv: {len(rows)} nuclei of 3 images\n" in said


def test_other_pictures_among_them_an_empty_one(go, place):
    """All 12 images of the folder: those of the training are named, and an image without nuclei has one empty row."""
    config = Path("models/nuclei/config.yml")
    before = config.read_text()
    config.write_text(before.replace("mask_threshold: 0.5", "mask_threshold: 1"))  # finds nothing
    try:
        said = go("--name nuclei --dataset cells --submission all.csv")
    finally:
        config.write_text(before)
    assert "models/nuclei was trained on 9 of 12 images of the folder" in said.err
    output = Path("outputs/nuclei/dataset_cells")
    rows = pd.read_csv(output / "metrics.csv").set_index("img_id")
    assert len(rows) == 12 and not rows.predicted.any() and rows.official.sum() == rows.official["img11"] == 1
    assert Path("all.csv").read_text() == "ImageId,EncodedPixels\n" + "".join(f"{img_id},\n" for img_id in rows.index)
    assert not read_labels(output / "labels", "img11").any()


def test_earlier_output_is_replaced_and_nothing_else(place, go):
    output = place[0] / "outputs" / "nuclei"
    shutil.rmtree(output / "dataset_cells", ignore_errors=True)
    (output / "levels.png").unlink(missing_ok=True)
    first = ids_of(place[0])[0]
    (output / "labels" / f"{first}.png").write_text("an earlier one")
    go("--name nuclei -b 1 --num_workers 2 --submission new/bowl.csv")  # an earlier submission is replaced, too
    labels = [f"{img_id}.png" for img_id in ids_of(place[0])]
    assert sorted(path.name for path in output.iterdir()) == sorted(
        ["labels", "metrics.csv", "precision.png", "predict", "report.html"]
    )
    assert sorted(path.name for path in (output / "labels").iterdir()) == sorted(["corrected.png", *labels])
    assert (output / "labels/corrected.png").read_text() == "not val's" == (output / "predict/mine.png").read_text()
    assert read_labels(output / "labels", first).any()


def test_the_report_names_kinds_and_pictures_and_asks_the_network_for_nothing(place):
    page = (place[0] / "first/report.html").read_text()
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page) and "url(" not in page
    for img_id in ids_of(place[0]):
        assert img_id in page
    assert 'data-tag="dark grey"' in page and 'data-group="worst"' in page and 'data-sort="merges"' in page
    rows = pd.read_csv(place[0] / "first/metrics.csv")
    assert page.count("<path") == rows[["true", "predicted"]].sum().sum() and "px, IoU 0." in page
    assert page.count(": found, ") == 2 * rows.tp.sum() and page.count(": false, ") == rows.false.sum()
    assert (place[0] / "seen.txt").read_text() == f"{(place[0] / 'outputs/nuclei/report.html').as_uri()}\n"  # --open
    assert "one prediction for several true nuclei" in page
    scores = [float(score) for score in re.findall(r"&#34;official&#34;: ([\d.]+)", page)]
    assert len(scores) == 3 and scores == sorted(scores)  # worst first


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ("--name masks --submission a.csv", "--submission needs a run of train.py --target instances; models/masks"),
        ("--name nuclei --submission recipe.csv", "recipe.csv exists and is not a submission; give another name"),
        ("--name nuclei --submission models", "models exists and is not a submission"),
        ("--name nuclei --dataset tiny", "inputs/tiny/labels: no such folder; nuclei one by one need label maps"),
        ("--name nuclei --dataset nope", "no such folder in inputs/"),
        ("--name nuclei --dataset lost", r"no labels \(inputs/lost/labels\), 1 of the ids: img01"),
        ("--name nuclei --dataset sizes", r"labels and image differ in size \(inputs/sizes/labels\), 1 of"),
        ("--name plain --levels", "trained without --deep_supervision True"),
        ("--name plain --level 2", "trained without --deep_supervision True"),
        ("--name nuclei --levels --tta", "leave --tta out"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(copied, go, tmp_path, monkeypatch, options, match):
    monkeypatch.chdir(tmp_path)
    Path("recipe.csv").write_text("ImageId,EncodedPixels,Height,Width,Usage\n")
    write_label_set("inputs/lost", count=2)
    Path("inputs/lost/labels/img01.png").unlink()
    write_label_set("inputs/sizes", count=2)
    cv2.imwrite("inputs/sizes/labels/img01.png", np.ones((60, 71), np.uint16))
    with pytest.raises((ValueError, OSError), match=match):
        go(options)
    assert not Path("outputs").exists() and Path("recipe.csv").read_text().endswith("Usage\n")


def test_a_mistake_is_one_line_and_status_2(place):
    result = run_script("val.py", "--name", "masks", "--submission", "a.csv", cwd=place[0], ok=False)
    assert result.stderr.count("\n") == 1


def test_a_failure_leaves_the_earlier_output(copied, go, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("outputs/nuclei/labels").mkdir(parents=True)
    kept = Path("outputs/nuclei/labels", f"{ids_of(tmp_path)[0]}.png")
    kept.write_text("an earlier one")

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(val.of_nuclei, "write_report", stop)
    with pytest.raises(KeyboardInterrupt):
        go("--name nuclei --submission a.csv")
    assert kept.read_text() == "an earlier one" and not Path("a.csv").exists()
    assert sorted(Path("outputs").rglob("*")) == [Path("outputs/nuclei"), kept.parent, kept]
