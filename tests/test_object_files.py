"""nuclei/object_files.py: every file is read back by a library of its own, and its pixels are those of the label map.

python -m pytest -q tests/test_object_files.py
"""

import csv
import json
import sys

import numpy as np
import pytest
import roifile
import shapely
import tifffile
from matplotlib.path import Path as Outline
from PIL import Image
from shapely.geometry import shape as as_shape

from common.synthetic import generate_nuclei
from instances import from_runs
from labels import read_labels
from nuclei.object_files import SUBMISSION, outlines, submission_rows, write_geojson, write_label_tiff, write_rois
from nuclei.objects import measure

DRAWN = """
    1..22222.3
    .1.2...2..
    ...2.2.244
    5..2...244
    .5.2222244
    55....6...
    .....6.6..
    ......6..7
"""  # 1: parts that touch in a corner; 2: a ring around another part of it; 6: a ring that only corners close


def drawn():
    return np.array([[0 if c == "." else int(c) for c in row] for row in DRAWN.split()], np.int32)


def scattered(seed):
    """Nuclei of scattered pixels: many parts, holes, and corners that touch."""
    return np.random.default_rng(seed).choice([0, 1, 1, 2, 3], (14, 17)).astype(np.int32)


MAPS = [drawn(), scattered(0), scattered(1), generate_nuclei(3, 96)[1], np.ones((2, 3), np.int32)]
MAPS[3][MAPS[3] == 2] = 0  # a number that is missing
CENTRES = {labels.shape: np.indices(labels.shape)[::-1].reshape(2, -1).T + 0.5 for labels in MAPS}


def inside(shape, ring):
    """Whether the centre of each pixel is inside a ring, by matplotlib."""
    return Outline(ring).contains_points(CENTRES[shape]).reshape(shape)


def present(labels):
    return np.unique(labels[labels > 0]).tolist()


# ---------------------------------------------------------------- outlines


def test_outlines_by_hand():
    labels = np.array([[0, 1, 1], [0, 2, 0]], np.int32)
    (one, [[first]]), (two, [[second]]) = outlines(labels)
    assert (one, two) == (1, 2)
    assert sorted(first[1:]) == [(1, 0), (1, 1), (3, 0), (3, 1)]  # and no corner where 2 ends
    assert first[0] == first[-1] and set(second) == {(1, 1), (2, 1), (2, 2), (1, 2)}


@pytest.mark.parametrize("labels", MAPS)
def test_outlines_are_the_pixels_again(labels):
    again = np.zeros_like(labels)
    for label, polygons in outlines(labels):
        for outside, *holes in polygons:
            mask = inside(labels.shape, outside)
            for hole in holes:
                mask &= ~inside(labels.shape, hole)
            assert (again[mask] == 0).all()
            again[mask] = label
    assert (again == labels).all()


# ---------------------------------------------------------------- QuPath


@pytest.mark.parametrize("labels", MAPS)
def test_geojson_is_valid(tmp_path, labels):
    path = tmp_path / "a.geojson"
    write_geojson(path, labels)
    collection = json.loads(path.read_text(encoding="utf-8"))
    assert collection["type"] == "FeatureCollection"
    assert [int(feature["properties"]["name"]) for feature in collection["features"]] == present(labels)
    for feature, label in zip(collection["features"], present(labels), strict=True):
        geometry = as_shape(feature["geometry"])
        assert geometry.is_valid and geometry.area == (labels == label).sum()
        for polygon in shapely.get_parts(geometry):
            assert polygon.exterior.is_ccw and not any(hole.is_ccw for hole in polygon.interiors)
            assert polygon.exterior.is_closed and polygon.exterior.is_simple
        within = shapely.contains_xy(geometry, *CENTRES[labels.shape].T).reshape(labels.shape)
        assert (within == (labels == label)).all()
        assert feature["type"] == "Feature" and feature["properties"]["objectType"] == "detection"


def test_geojson_kinds_and_measurements(tmp_path):
    labels = drawn()
    table = measure(labels, np.zeros(labels.shape, np.uint8), np.linspace(0, 1, 8))
    write_geojson(tmp_path / "a.geojson", labels, table)
    features = json.loads((tmp_path / "a.geojson").read_text())["features"]
    assert [feature["geometry"]["type"] for feature in features] == [
        *["MultiPolygon", "MultiPolygon", "Polygon", "Polygon", "MultiPolygon", "MultiPolygon", "Polygon"]
    ]
    measured = features[2]["properties"]["measurements"]
    assert (measured["area"], measured["left"], measured["touches_border"]) == (1, 9, 1)
    assert measured["confidence"] == pytest.approx(3 / 7, abs=1e-4) and "object" not in measured


def test_geojson_leaves_out_what_json_cannot_hold(tmp_path):
    """A float TIFF may have pixels that are no numbers."""
    labels = drawn()
    picture = np.ones(labels.shape, np.float32)
    picture[labels == 3], picture[labels == 4] = np.nan, np.inf
    write_geojson(tmp_path / "a.geojson", labels, measure(labels, picture, np.linspace(0, 1, 8)))

    def refuse(word):
        raise AssertionError(word)

    features = json.loads((tmp_path / "a.geojson").read_text(), parse_constant=refuse)["features"]
    measured = [feature["properties"]["measurements"] for feature in features]
    assert ["mean_grey" in values for values in measured] == [True, True, False, False, True, True, True]


def test_geojson_of_nothing(tmp_path):
    write_geojson(tmp_path / "a.geojson", np.zeros((4, 5), np.int32))
    assert json.loads((tmp_path / "a.geojson").read_text()) == {"type": "FeatureCollection", "features": []}


# ---------------------------------------------------------------- ImageJ


@pytest.mark.parametrize("labels", MAPS)
def test_rois_are_the_pixels_again(tmp_path, labels):
    path = tmp_path / "a.zip"
    write_rois(path, labels)
    rois = roifile.roiread(path)
    assert [int(roi.name) for roi in rois] == present(labels)
    for roi in rois:
        mask = np.zeros(labels.shape, bool)
        for ring in roi.coordinates(multi=True):
            mask ^= inside(labels.shape, ring)  # as ImageJ fills a composite path: even-odd
        assert (mask == (labels == int(roi.name))).all()
        rows, columns = np.nonzero(mask)
        box = (roi.left, roi.top, roi.right, roi.bottom)
        assert box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


def test_rois_replace_an_earlier_zip(tmp_path):
    path = tmp_path / "a.zip"
    write_rois(path, drawn())
    write_rois(path, np.ones((2, 3), np.int32))
    (roi,) = roifile.roiread(path)
    assert roi.roitype == roifile.ROI_TYPE.POLYGON and roi.name == "1"
    assert [file.name for file in tmp_path.iterdir()] == ["a.zip"]


def test_names_of_rois_sort_as_numbers(tmp_path):
    write_rois(tmp_path / "a.zip", np.arange(12, dtype=np.int32).reshape(3, 4))
    names = [roi.name for roi in roifile.roiread(tmp_path / "a.zip")]
    assert names == sorted(names) and names[0] == "01" and names[-1] == "11"


def test_a_picture_too_wide_for_rois(tmp_path):
    with pytest.raises(ValueError, match="ImageJ ROIs reach 60,535 pixels, the picture has 60536 x 1"):
        write_rois(tmp_path / "a.zip", np.zeros((1, 60_536), np.int32))
    wide = np.zeros((2, 60_535), np.int32)
    wide[1, -2:] = 1
    write_rois(tmp_path / "a.zip", wide)
    (roi,) = roifile.roiread(tmp_path / "a.zip")
    assert sorted(roi.coordinates().tolist()) == [[60533, 1], [60533, 2], [60535, 1], [60535, 2]]


@pytest.mark.parametrize(
    ("write", "package"), [(write_rois, "roifile"), (write_rois, "shapely"), (write_geojson, "shapely")]
)
def test_a_package_that_is_not_installed(tmp_path, monkeypatch, write, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(OSError, match=f"^{package} is not installed: pip install -r requirements-objects.txt$"):
        write(tmp_path / "a", drawn())
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- label TIFF


@pytest.mark.parametrize("labels", MAPS)
def test_label_tiff(tmp_path, labels):
    path = tmp_path / "a_labels.tif"
    write_label_tiff(path, labels, pixel_size=0.5)
    with tifffile.TiffFile(path) as file:
        (page,) = file.pages
        assert page.dtype == np.uint16 and page.compression.name == "ADOBE_DEFLATE"
        assert (page.asarray() == labels).all()
        assert page.get_resolution("MICROMETER") == (2, 2)  # pixels
    assert (read_labels(path) == labels).all()
    assert (np.asarray(Image.open(path)) == labels).all()


@pytest.mark.parametrize(("count", "kind"), [(65_535, np.uint16), (65_536, np.int32)])
def test_many_labels(tmp_path, count, kind):
    labels = np.arange(count + 1, dtype=np.int32)[None]
    write_label_tiff(tmp_path / "a.tif", labels)
    found = tifffile.imread(tmp_path / "a.tif")
    assert found.dtype == kind and (found == labels).all()
    assert (read_labels(tmp_path / "a.tif") == labels).all()


# ---------------------------------------------------------------- the Data Science Bowl


def test_submission(tmp_path):
    rows = [*submission_rows("a", drawn()), *submission_rows("none", np.zeros((3, 3), np.int32))]
    with open(tmp_path / "s.csv", "w", newline="") as file:
        csv.writer(file).writerows([SUBMISSION, *rows])
    with open(tmp_path / "s.csv", newline="") as file:
        back = list(csv.DictReader(file))
    assert [row["ImageId"] for row in back] == ["a"] * 7 + ["none"]
    runs = [row["EncodedPixels"] for row in back]
    assert runs[0] == "1 1 10 1" and runs[-1] == ""  # eight pixels in a column
    assert (from_runs(runs[:-1], drawn().shape) == drawn()).all()
