"""nuclei/scaling.py: percentiles by sorting, diameters of squares, labels resized one mask at a time."""

import math

import cv2
import numpy as np
import pytest

from common.images import squeeze
from instances import judge, official_scores
from nuclei.scaling import LEAST_RANGE, median_diameter, resize_labels, stretch, stretch_limits, stretch_picture, zoom

CONFIG = {"input_channels": 3, "stretch": "1,99.8"}


def picture(seed=0, size=(40, 50, 3), low=20, high=90):
    return np.random.default_rng(seed).integers(low, high, size, np.uint8)


@pytest.mark.parametrize("percentiles", ["1,99.8", "0,100", "25,50", "none"])
def test_limits_are_the_values_at_their_rank(percentiles):
    image = picture()
    values = np.sort(image.ravel())
    low, high = stretch_limits(image, percentiles)
    if percentiles == "none":
        assert (low, high) == (0, 255) and np.array_equal(stretch(image, (low, high)), image)
        return
    for limit, share in zip((low, high), percentiles.split(","), strict=True):
        assert limit == values[max(0, math.ceil(float(share) / 100 * len(values)) - 1)]


def test_stretched_by_hand():
    image = np.array([[[0], [10], [20], [30], [255]]], np.uint8)
    assert stretch(image, (10, 30)).ravel().tolist() == [0, 0, 128, 255, 255]
    assert stretch(image, (10, 30)).shape == image.shape


def test_a_picture_without_contrast_stays_flat():
    """Noise of two grey levels does not become black and white."""
    image = picture(low=7, high=9)
    assert stretch_limits(image, "1,99.8") == (7, 7 + LEAST_RANGE)
    assert np.ptp(stretch(image, stretch_limits(image, "1,99.8"))) <= 255 / LEAST_RANGE + 1
    assert stretch_limits(np.full((4, 4, 3), 255, np.uint8), "1,99.8") == (255, 255 + LEAST_RANGE)


def test_colours_share_their_limits():
    image = picture()
    image[..., 2] //= 3
    stretched = stretch(image, stretch_limits(image, "1,99.8")).astype(int)
    assert (stretched[..., 2] <= stretched[..., 0]).mean() > 0.8


@pytest.mark.parametrize("scale", [0.5, 1, 2.3, 0.001])
def test_a_whole_picture_as_the_network_sees_it(scale):
    image = picture()
    found = zoom(stretch_picture(image, CONFIG), scale)
    assert found.shape == (max(1, round(40 * scale)), max(1, round(50 * scale)), 3) and found.dtype == np.uint8
    assert np.array_equal(found, squeeze(stretch(image, stretch_limits(image, "1,99.8")), found.shape[:2]))


def test_grey_pictures_get_the_channels_of_the_run():
    grey = picture(size=(8, 9))
    assert np.ptp(stretch_picture(grey, CONFIG), axis=2).max() == 0
    assert stretch_picture(grey, {**CONFIG, "input_channels": 1}).shape == (8, 9, 1)


def test_diameters_by_hand():
    labels = np.zeros((20, 20), np.int32)
    assert median_diameter(labels) is None
    labels[:2, :2], labels[5:9, 5:9], labels[10:18, 10:18] = 1, 7, 3  # areas 4, 16 and 64; numbers are missing
    assert median_diameter(labels) == pytest.approx(2 * math.sqrt(16 / math.pi))


def one_at_a_time(labels, size):
    """The label whose mask, resized bilinearly by OpenCV, is largest."""
    present = np.unique(labels)
    shares = [cv2.resize((labels == label).astype(np.float32), size[::-1]) for label in present]
    return present[np.argmax(shares, axis=0)], np.sort(shares, axis=0)


@pytest.mark.parametrize("size", [(30, 40), (61, 83), (90, 55), (1, 1), (7, 200)])
def test_resized_labels_are_those_of_each_mask(size):
    rng = np.random.default_rng(1)
    labels = np.zeros((30, 40), np.int32)
    for label in range(1, 12):
        centre = int(rng.integers(40)), int(rng.integers(30))
        cv2.circle(labels, centre, int(rng.integers(2, 7)), label, -1)
    expected, shares = one_at_a_time(labels, size)
    found = resize_labels(labels, size)
    assert found.shape == size and found.dtype == labels.dtype
    sure = shares[-1] - shares[-2] > 1e-4  # elsewhere two labels have equal shares
    assert np.array_equal(found[sure], expected[sure])
    assert np.isin(found, labels).all()
    if size == labels.shape:
        assert np.array_equal(found, labels)


def test_smaller_and_back_loses_less_than_nearest_pixels():
    rng, labels = np.random.default_rng(2), np.zeros((100, 100), np.int32)
    for label, (x, y) in enumerate(np.ndindex(6, 6), 1):
        centre = (int(x * 16 + 10), int(y * 16 + 10))
        cv2.ellipse(labels, centre, (int(rng.integers(4, 8)), int(rng.integers(3, 8))), label * 31, 0, 360, label, -1)

    def score(resized):
        small = resized(labels, (71, 71))
        return official_scores([judge(resized(small, labels.shape), labels)])[0]

    def nearest(labels, size):
        return cv2.resize(labels.astype(np.float32), size[::-1], interpolation=cv2.INTER_NEAREST_EXACT).astype(np.int32)

    assert score(resize_labels) > score(nearest) + 0.01
