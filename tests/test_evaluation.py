"""evaluation.py: files that take their places together. nuclei/evaluation.py: a few images that were judged by hand.

python -m pytest -q tests/test_evaluation.py
"""

import numpy as np
import pytest

from common.files import replacing
from instances import DEFINITIONS, KINDS, NONE, bootstrap_interval, judge, summarise
from nuclei.evaluation import (
    COLOURS,
    COLUMNS,
    PRECISION,
    Judged,
    draw_precision,
    headline_of,
    legend,
    outlined,
    panels_of,
    read_found,
    regions_of,
    row_of,
    rows_by,
    rows_of_images,
    write_found,
)

EMPTY = np.zeros((4, 9), np.int32)


def drawn(text):
    return np.array([[0 if c == "." else int(c) for c in row] for row in text.split()], np.int32)


@pytest.fixture
def judged():
    """Two dark images, one found and one half found, and a bright one with a false nucleus; at L1 nothing is found."""
    two, one, none = drawn("11.2 11.2"), drawn("11.. 11.."), drawn(".... ....")
    return [
        Judged("a", "dark", "L4", judge(two, two)),
        Judged("c", "bright", "L4", judge(one, none)),
        Judged("b", "dark", "L4", judge(one, two)),
    ]


def test_rows_by_kind(judged):
    dark, bright, both = rows_by(judged, "kind")
    assert [row["kind"] for row in (dark, bright, both)] == ["dark", "bright", "all"]
    assert [row["images"] for row in (dark, bright, both)] == [2, 1, 3]
    assert [row["official"] for row in (dark, bright, both)] == [0.75, 0, 0.5]
    assert (both["ap50"], both["ap95"], both["true"], both["predicted"]) == (0.5, 0.5, 4, 4)
    assert (both["missed"], both["false"], both["merges"], both["splits"]) == (1, 1, 0, 0)
    assert both["f1"] == pytest.approx(2 * 3 / (2 * 3 + 1 + 1)) and dark["f1"] == pytest.approx(6 / 7)
    assert {key: both[key] for key in DEFINITIONS if key != "ap"} == {
        key: value for key, value in summarise([item.result for item in judged]).items() if key != "ap"
    }
    assert COLUMNS.keys() | PRECISION.keys() <= both.keys()


def test_rows_by_level(judged):
    lost = [item._replace(level="L1", result=judge(EMPTY, drawn("1........ " * 4))) for item in judged]
    first, last = rows_by(lost + judged, "level")
    assert (first["level"], first["official"], first["missed"]) == ("L1", 0, 3)
    assert (last["level"], last["official"], last["images"]) == ("L4", 0.5, 3)


def test_the_interval(judged):
    scores = [1, 0, 0.5]
    row = row_of(judged)
    assert (row["low"], row["high"]) == bootstrap_interval(scores)
    assert row["interval"] == f"{row['low']:.3f} to {row['high']:.3f}"
    twins = [item._replace(group="slide") if item.kind == "dark" else item for item in judged]
    assert (row_of(twins)["low"], row_of(twins)["high"]) == bootstrap_interval(scores, ["slide", "c", "slide"])
    assert row_of(judged[:1])["interval"] == "1.000 to 1.000"


def test_rows_of_images(judged):
    rows = rows_of_images(judged)
    assert [(row["img_id"], row["kind"], row["official"]) for row in rows] == [
        ("a", "dark", 1),
        ("c", "bright", 0),
        ("b", "dark", 0.5),
    ]
    assert [(row["tp"], row["fp"], row["fn"]) for row in rows] == [(2, 0, 0), (0, 1, 0), (1, 0, 1)]
    assert [row["count_error"] for row in rows] == [0, 1, 0.5]
    assert len({tuple(row) for row in rows}) == 1 and "interval" not in rows[0]
    other = judged[0]._replace(scale=0.5, seconds=0.25)
    assert [(row["scale"], row["seconds"]) for row in rows_of_images([other])] == [(0.5, 0.25)]


def test_the_headline(judged):
    twins = [item._replace(group="slide") if item.kind == "dark" else item for item in judged]
    row = row_of(twins)
    interval = f"{row['low']:.4f} to {row['high']:.4f}, 95 % bootstrap over 2 groups of look-alikes"
    assert headline_of(row) == f"official score 0.5000 ({interval}), AP50 0.5000, F1 0.7500"
    times = [item._replace(seconds=seconds) for item, seconds in zip(judged, (1, 3, 8), strict=True)]
    assert row_of(times)["seconds"] == 3


@pytest.mark.parametrize(("count", "name"), [(0, "a.png"), (65_535, "a.png"), (65_536, "a.tif")])
def test_label_maps_of_any_number_of_nuclei(tmp_path, count, name):
    labels = np.zeros((300, 300), np.int32)
    labels.ravel()[:count] = np.arange(1, count + 1)
    write_found(tmp_path / "labels", "a", labels)
    assert [path.name for path in (tmp_path / "labels").iterdir()] == [name]
    assert np.array_equal(read_found(tmp_path / "labels", "a"), labels)


def test_the_figure(judged, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
    rows = rows_by(judged, "kind")
    draw_precision(rows, "kind", tmp_path / "precision.png")
    (axis,) = figures[0].axes
    assert [list(line.get_ydata()) for line in axis.lines] == [[row[key] for key in PRECISION] for row in rows]
    assert axis.lines[0].get_xdata().tolist() == pytest.approx(np.linspace(0.5, 0.95, 10).tolist())
    words = [text.get_text() for text in axis.get_legend().get_texts()]
    assert words == ["dark: 0.750 (n = 2)", "bright: 0.000 (n = 1)", "all: 0.500 (n = 3)"]
    assert [path.name for path in tmp_path.iterdir()] == ["precision.png"]


def test_outlines_have_the_colours_of_their_kinds():
    true = drawn("111..222 111..222 ........ 33333333 33333333 ........ 44444444 44444444")
    found = drawn("11111111 11111111 ........ 33334444 33334444 .......5 ........ ........")
    result = judge(found, true)
    image = np.zeros((*true.shape, 3), np.uint8)
    (_, plain), (_, truth), (_, prediction) = panels_of(image, true, found, result)
    assert plain is image and truth.shape == prediction.shape == (512, 512, 3)
    colours = {KINDS[kind]: colour for kind, (colour, _) in COLOURS.items()}
    for picture, labels, expected in (
        (truth, true, {1: "merged", 2: "merged", 3: "split", 4: "missed"}),
        (prediction, found, {1: "merged", 3: "split", 4: "split", 5: "false"}),
    ):
        large = labels.repeat(64, axis=0).repeat(64, axis=1)
        for label, kind in expected.items():
            seen = {tuple(pixel) for pixel in picture[large == label].tolist()}
            assert seen == {colours[kind], (0, 0, 0)}
    assert outlined(image, true, judge(true, true).true_kinds).any()


def test_regions_say_what_each_nucleus_is():
    true = drawn("111..222 111..222 ........ 33333333 33333333 ........ 44444444 5555....")
    found = drawn("11111111 11111111 ........ 33334444 33334444 .......5 66...... 777.....")
    regions = regions_of(true, found, judge(found, true))
    assert [region.text for region in regions["truth"]] == [
        "true nucleus 1: merged, 6 px, IoU 0.375 with predicted nucleus 1",
        "true nucleus 2: merged, 6 px, IoU 0.375 with predicted nucleus 1",
        "true nucleus 3: split, 16 px, IoU 0.500 with predicted nucleus 4",  # of equals the last
        "true nucleus 4: missed, 8 px, IoU 0.250 with predicted nucleus 6",
        "true nucleus 5: found, 4 px, IoU 0.750 with predicted nucleus 7",
    ]
    assert [region.text for region in regions["prediction"]] == [
        "predicted nucleus 1: merged, 16 px, IoU 0.375 with true nucleus 2",
        "predicted nucleus 3: split, 8 px, IoU 0.500 with true nucleus 3",
        "predicted nucleus 4: split, 8 px, IoU 0.500 with true nucleus 3",
        "predicted nucleus 5: false, 1 px, no overlap",
        "predicted nucleus 6: false, 2 px, IoU 0.250 with true nucleus 4",
        "predicted nucleus 7: found, 3 px, IoU 0.750 with true nucleus 5",
    ]
    names = {region.name: region.partner for part in regions.values() for region in part}
    assert len(names) == 11 and names["true nucleus 4"] == "predicted nucleus 6" and not names["predicted nucleus 5"]
    (outline,) = regions["truth"][1].outlines  # each pixel has grown to 64 x 64: see panels_of
    assert {tuple(point) for point in outline.tolist()} == {(320, 0), (511, 0), (511, 127), (320, 127)}


def test_a_large_picture_is_not_enlarged():
    image, labels = np.zeros((40, 700, 3), np.uint8), np.zeros((40, 700), np.int32)
    assert outlined(image, labels, np.array([NONE])).shape == image.shape


def test_the_legend_names_every_kind():
    words = legend()
    for kind, (colour, meaning) in COLOURS.items():
        assert KINDS[kind] in words and meaning in words and f"rgb({colour[0]}, {colour[1]}, {colour[2]})" in words
    assert len(COLOURS) == len(KINDS) - 1 and len({colour for colour, _ in COLOURS.values()}) == len(COLOURS)


# ---------------------------------------------------------------- evaluation.py


def contents(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_files_take_their_places_together(tmp_path):
    output = tmp_path / "outputs" / "run"
    for text in ("first", "second"):
        with replacing(output) as new:
            (new / "0").mkdir()
            for name in ("a.csv", "0/a.png", f"0/{text}.png"):
                (new / name).write_text(text)
        (output / "0" / "mine.png").write_text("kept")
    expected = {"a.csv": "second", "0/a.png": "second", "0/first.png": "first", "0/second.png": "second"}
    assert contents(tmp_path / "outputs" / "run") == {**expected, "0/mine.png": "kept"}
    before = contents(output)
    with pytest.raises(OSError, match=f"No space left on device: '{output}/a.csv'"), replacing(output) as new:
        (new / "a.csv").write_text("third")
        raise OSError(28, "No space left on device", str(new / "a.csv"))
    assert contents(output) == before and sorted(path.name for path in output.iterdir()) == ["0", "a.csv"]
