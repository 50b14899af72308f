"""common/outlines.py: lines and colours on a few pixels by hand, and neighbours by a slow loop.

python -m pytest -q tests/test_outlines.py
"""

import cv2
import numpy as np
import pytest

from common.outlines import DISTINCT, NEAR, distinct_colours, draw_outlines, edges, neighbours, polygons
from common.synthetic import generate_nuclei


def drawn(text):
    """Rows of digits and dots -> a label map."""
    return np.array([[0 if c == "." else int(c) for c in row] for row in text.split()], np.int32)


def shown(mask):
    return " ".join("".join("#" if value else "." for value in row) for row in mask)


SQUARES = drawn("....... .11122. .11122. .111... 3......")


def test_edges_by_hand():
    assert shown(edges(SQUARES)) == ".#####. ####### ##.#### ######. ####..."
    assert shown(edges(SQUARES) & (SQUARES > 0)) == "....... .#####. .#.###. .###... #......"
    assert shown(edges(drawn("1111111"), 2)) == "......."  # the border of the picture is no edge
    assert shown(edges(drawn("111111.."), 2)) == "....####"
    assert not edges(np.zeros((3, 4), np.int32)).any()


@pytest.mark.parametrize("width", [1, 3])
def test_edges_by_a_slow_loop(width):
    labels = generate_nuclei(1, 48)[1]
    expected = np.zeros(labels.shape, bool)
    for y, x in np.ndindex(labels.shape):
        cross = [labels[max(y - width, 0) : y + width + 1, x], labels[y, max(x - width, 0) : x + width + 1]]
        expected[y, x] = any((line != labels[y, x]).any() for line in cross)
    assert (edges(labels, width) == expected).all()


def test_drawing_by_hand():
    image = np.full((5, 7), 100, np.uint8)
    colours = np.array([(9, 9, 9), (250, 0, 0), (0, 250, 0), (0, 0, 250)], np.uint8)
    picture = draw_outlines(image, SQUARES, colours)
    assert picture.shape == (5, 7, 3) and (image == 100).all()
    assert picture[1, 1:6].tolist() == [[250, 0, 0]] * 3 + [[0, 250, 0]] * 2
    assert picture[4, 0].tolist() == [0, 0, 250]
    assert picture[2, 2].tolist() == [100] * 3  # inside
    assert picture[0, 1].tolist() == [50] * 3 and picture[0, 0].tolist() == [100] * 3  # beside, and farther away
    rgba = np.full((5, 7, 4), 100, np.uint8)
    assert (draw_outlines(rgba, SQUARES, colours) == picture).all()


def test_neighbours_by_hand():
    assert neighbours(SQUARES) == {1: {2, 3}, 2: {1}, 3: {1}}
    apart = np.zeros((1, 2 * NEAR + 3), np.int32)
    apart[0, [0, NEAR, 2 * NEAR + 1]] = 1, 2, 3
    assert neighbours(apart) == {1: {2}, 2: {1}}


def test_neighbours_have_different_colours():
    labels = generate_nuclei(2)[1]
    colours = distinct_colours(labels)
    assert colours.shape == (labels.max() + 1, 3) and colours.dtype == np.uint8
    assert {tuple(colour) for colour in colours.tolist()} == set(DISTINCT)
    near, pairs = neighbours(labels), 0
    for label, others in near.items():
        for other in others:
            assert colours[label].tolist() != colours[other].tolist()
            pairs += 1
    assert pairs > 10


def test_more_neighbours_than_colours():
    """Eight strips, all of them near the ninth."""
    labels = np.zeros((2, 2 * 8), np.int32)
    labels[0] = np.arange(1, 9).repeat(2)
    labels[1] = 9
    colours = [tuple(colour) for colour in distinct_colours(labels).tolist()]
    before = colours[1:9]
    assert set(before) == set(DISTINCT)
    assert before.count(colours[9]) == min(before.count(colour) for colour in DISTINCT)


def corners(outlines):
    return [{tuple(point) for point in points.tolist()} for points in outlines]


def test_polygons_by_hand():
    found = polygons(SQUARES)
    assert found.keys() == {1, 2, 3}
    assert corners(found[2]) == [{(4, 1), (5, 1), (5, 2), (4, 2)}] and corners(found[3]) == [{(0, 4)}]
    parts = polygons(drawn("11...22. 11...... 11...222 11...2.2 .....222"))
    assert corners(parts[1]) == [{(0, 0), (1, 0), (1, 3), (0, 3)}]
    assert sorted(map(len, parts[2])) == [2, 4]  # two parts; the hole of the second is left out


def test_polygons_of_generated_nuclei_are_close_and_short():
    labels, filled, count = generate_nuclei(2)[1], 0, 0
    labels = labels.repeat(2, axis=0).repeat(2, axis=1)  # as in a report
    drawn_again = np.zeros(labels.shape, np.int32)
    for label, outlines in polygons(labels).items():
        cv2.fillPoly(drawn_again, outlines, label)
        count += sum(map(len, outlines))
        filled += 1
    assert filled == len(np.unique(labels)) - 1 > 10
    assert (drawn_again != labels).sum() < 0.02 * (labels > 0).sum() and count < 30 * filled


def test_nothing():
    none = np.zeros((3, 4), np.int32)
    assert distinct_colours(none).shape == (1, 3) and neighbours(none) == {} == polygons(none)
    image = np.arange(36, dtype=np.uint8).reshape(3, 4, 3)
    assert (draw_outlines(image, none, distinct_colours(none)) == image).all()
    assert distinct_colours(drawn("1..3")).shape == (4, 3)
