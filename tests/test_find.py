"""nuclei/find.py: nuclei of pictures whose maps can be computed from the picture itself.

python -m pytest -q tests/test_find.py
"""

import cv2
import numpy as np
import pytest
from conftest import BrightNuclei, discs
from scipy import ndimage

from instances import judge, official_scores
from nuclei import find
from nuclei.find import busiest_window, find_nuclei


@pytest.mark.parametrize("radius", [3, 7, 11, 40])
def test_nuclei_of_any_size_are_found_at_their_scale(radius):
    picture, labels = discs(radius, size=(300, 400))
    found = find_nuclei(BrightNuclei(), picture)
    assert found.labels.shape == labels.shape and found.labels.dtype == np.int32
    assert found.scale == pytest.approx(12 / (2 * radius), rel=0.3)
    assert judge(found.labels, labels).counts[4].tolist() == [labels.max(), 0, 0]  # at IoU > 0.7
    assert found.confidence.shape == (labels.max() + 1,) and found.confidence[0] == 0
    assert found.confidence[1:].min() > 0.9


def test_a_given_diameter_is_taken_as_it_is():
    picture, labels = discs(9)
    predictor = BrightNuclei()
    found = find_nuclei(predictor, picture, diameter=24)
    assert found.scale == 0.5 and predictor.seen == [(80, 112)]  # 100, padded
    assert official_scores([judge(found.labels, labels)])[0] > 0.6
    assert find_nuclei(BrightNuclei(), picture[:20, :30], diameter=100).scale == 0.8  # the least, not 0.12


def test_the_scale_is_searched_without_flips():
    """A predictor that averages flips is asked once, at the scale that one without them has found."""

    class Flipping(BrightNuclei):
        def __call__(self, images):
            modes.append(self.tta)
            return super().__call__(images)

    modes, predictor = [], Flipping()
    plain = find_nuclei(predictor, discs(9)[0])
    before = len(modes)
    predictor.tta = True
    found = find_nuclei(predictor, discs(9)[0])
    assert modes[before:] == [False] * before + [True] and found.scale == plain.scale and predictor.tta


def test_pictures_without_nuclei_and_of_odd_shapes():
    for shape in ((1, 1), (3, 400), (300, 2)):
        found = find_nuclei(BrightNuclei(), np.zeros((*shape, 3), np.uint8))
        assert found.labels.shape == shape and not found.labels.any() and found.confidence.tolist() == [0]


def test_sixteen_bits_and_one_channel():
    picture, labels = discs(8)
    deep = (picture[..., 0].astype(np.uint16) * 40).astype(np.uint16)
    assert find_nuclei(BrightNuclei(), deep).labels.max() == labels.max()


def test_a_diameter_that_would_enlarge_too_much(monkeypatch):
    monkeypatch.setattr(find, "MOST_SEEN", 100_000)
    with pytest.raises(ValueError, match=r"nuclei of 2 pixels would be shown 6 times as large.*larger --diameter"):
        find_nuclei(BrightNuclei(), discs(9)[0], diameter=2)


def test_a_picture_too_large_for_the_scale_of_its_nuclei(monkeypatch):
    """It is shown as large as the limit allows, and the answer says so."""
    monkeypatch.setattr(find, "SEARCHED", 128)
    picture, labels = discs(4, size=(400, 300))
    assert not find_nuclei(BrightNuclei(), picture).limited
    monkeypatch.setattr(find, "MOST_SEEN", 400 * 300)
    found = find_nuclei(BrightNuclei(), picture)
    assert found.limited and found.scale == 1 and found.labels.max() == labels.max()


def test_large_pictures_are_searched_in_a_part(monkeypatch):
    """The scale is that of the part with nuclei, and all of the picture is segmented at it, once."""
    monkeypatch.setattr(find, "SEARCHED", 256)
    part, labels = discs(16, size=(256, 256))
    picture = np.full((700, 900, 3), 20, np.uint8)
    picture[400:656, 520:776] = part
    predictor = BrightNuclei()
    found = find_nuclei(predictor, picture)
    assert found.labels.max() == labels.max() and found.scale == pytest.approx(12 / 32, rel=0.3)
    assert max(predictor.seen[0]) <= 256  # the first pass, at scale 1
    expected = ndimage.label(picture[..., 0] > 120)[0]
    assert judge(found.labels, expected).counts[4].tolist() == [labels.max(), 0, 0]


def test_the_busiest_window():
    image = np.full((1000, 800, 3), 90, np.uint8)
    for x in range(500, 640, 10):
        cv2.circle(image, (x, 333), 3, (255, 255, 255), -1)
    rows, columns = busiest_window(image, 160)
    assert rows.stop - rows.start == columns.stop - columns.start == 160
    assert rows.start <= 325 and rows.stop >= 341 and columns.start <= 500 and columns.stop >= 630
    assert busiest_window(image, 1000) == (slice(None), slice(None))
    rows, columns = busiest_window(image[:50], 160)  # lower than the window
    assert columns.stop - columns.start == 160 and image[rows][:, columns].shape[:2] == (50, 160)
