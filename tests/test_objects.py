"""nuclei/objects.py: every measure of nuclei drawn by hand, and of generated ones by slow loops.

python -m pytest -q tests/test_objects.py
"""

import math

import numpy as np
import pytest

from common.synthetic import generate_nuclei
from nuclei.objects import measure, summarise


@pytest.fixture
def labels():
    """One pixel, a line of three, a square in the corner with a hole, and two pixels that touch in a corner."""
    labels = np.zeros((8, 10), np.int32)
    labels[2, 3] = 1
    labels[4, 4:7] = 2
    labels[5:8, 7:10] = 4
    labels[6, 8] = 0
    labels[0, 0] = labels[1, 1] = 5
    return labels


@pytest.fixture
def image():
    return np.arange(240, dtype=np.uint8).reshape(8, 10, 3)


def test_by_hand(labels, image):
    table = measure(labels, image, np.array([0, 0.25, 0.5, 0, 0.75, 1]))
    hull = 9  # pixels; the corner-to-corner pair is its own hull
    expected = {
        "object": [1, 2, 4, 5],
        "area": [1, 3, 8, 2],
        "centroid_x": [3, 5, 8, 0.5],
        "centroid_y": [2, 4, 6, 0.5],
        "left": [3, 4, 7, 0],
        "top": [2, 4, 5, 0],
        "width": [1, 3, 3, 2],
        "height": [1, 1, 3, 2],
        "equivalent_diameter": [round(2 * math.sqrt(area / math.pi), 4) for area in (1, 3, 8, 2)],
        "eccentricity": [0, 1, 0, 1],
        "solidity": [1, 1, round(8 / hull, 4), 1],
        "mean_red": [69, 135, 204, 16.5],  # red is 30 y + 3 x
        "max_red": [69, 138, 237, 33],
        "mean_green": [70, 136, 205, 17.5],
        "max_green": [70, 139, 238, 34],
        "mean_blue": [71, 137, 206, 18.5],
        "max_blue": [71, 140, 239, 35],
        "confidence": [0.25, 0.5, 0.75, 1],
        "touches_border": [False, False, True, True],
    }
    assert {key: table[key] for key in expected} == expected
    assert table.keys() - expected.keys() == {"perimeter"}
    plain = {type(value) for values in table.values() for value in values}
    assert plain == {int, float, bool}


def test_micrometres(labels, image):
    table, in_um = measure(labels, image), measure(labels, image, pixel_size=0.5)
    assert in_um["area_um2"] == [area / 4 for area in table["area"]]
    for column in ("centroid_x", "centroid_y", "equivalent_diameter", "perimeter"):
        assert in_um[f"{column}_um"] == pytest.approx([value / 2 for value in table[column]], abs=1e-4)
    assert in_um.keys() - table.keys() == {"area_um2", *(f"{c}_um" for c in table if f"{c}_um" in in_um)}
    assert len(in_um) == len(table) + 5


@pytest.mark.parametrize("seed", range(2))
def test_by_slow_loops(seed):
    image, labels = generate_nuclei(seed, 128)
    image = image.astype(np.uint16) * 257
    labels[labels == 2] = 0  # a number that is missing
    table = measure(labels, image)
    assert table["object"] == [k for k in range(1, labels.max() + 1) if (labels == k).any()]
    for row, label in enumerate(table["object"]):
        y, x = np.nonzero(labels == label)
        points = np.stack([x, y])
        small, large = np.linalg.eigvalsh(np.cov(points, bias=True))
        expected = {
            "area": len(x),
            "centroid_x": x.mean(),
            "centroid_y": y.mean(),
            "left": x.min(),
            "height": y.max() - y.min() + 1,
            "eccentricity": math.sqrt(1 - small / large),
            "mean_green": image[y, x, 1].mean(),
            "max_blue": image[y, x, 2].max(),
            "touches_border": bool(min(x.min(), y.min()) == 0 or max(x.max(), y.max()) == 127),
        }
        assert {key: table[key][row] for key in expected} == pytest.approx(expected, abs=1e-3)


def test_the_perimeter_of_a_disc():
    y, x = np.mgrid[-60:61, -60:61]
    table = measure((y**2 + x**2 <= 50**2).astype(np.int32), np.zeros((121, 121), np.uint8))
    assert table["perimeter"][0] == pytest.approx(2 * math.pi * 50, rel=0.06)  # scikit-image's is 5 % long
    assert table["solidity"][0] > 0.98 and table["eccentricity"][0] < 0.01


@pytest.mark.parametrize(
    ("channels", "names"),
    [(None, ["grey"]), (1, ["grey"]), (2, ["channel_0", "channel_1"]), (4, ["red", "green", "blue"])],
)
def test_names_of_channels(labels, channels, names):
    shape = labels.shape if channels is None else (*labels.shape, channels)
    table = measure(labels, np.zeros(shape, np.uint8))
    assert [column.removeprefix("mean_") for column in table if column.startswith("mean_")] == names
    assert [column.removeprefix("max_") for column in table if column.startswith("max_")] == names


def test_of_a_picture(labels, image):
    table = measure(labels, image)
    found = summarise(table, labels.shape, pixel_size=0.5)
    assert found == {
        "objects": 4,
        "objects_per_megapixel": 50_000,
        "median_diameter": pytest.approx((2 * math.sqrt(3 / math.pi) + 2 * math.sqrt(2 / math.pi)) / 2, abs=1e-4),
        "objects_per_mm2": 200_000,  # 80 pixels of 0.25 square micrometres
        "median_diameter_um": pytest.approx(found["median_diameter"] / 2, abs=1e-4),
    }
    assert list(summarise(table, labels.shape)) == ["objects", "objects_per_megapixel", "median_diameter"]


def test_without_nuclei(labels, image):
    table = measure(labels * 0, image, np.zeros(1), pixel_size=0.5)
    assert table.keys() == measure(labels, image, np.ones(6), pixel_size=0.5).keys()
    assert all(values == [] for values in table.values())
    found = summarise(table, labels.shape, pixel_size=0.5)
    assert found["objects"] == found["objects_per_mm2"] == 0
    assert found["median_diameter"] is found["median_diameter_um"] is None
