"""nuclei/scaling.py: percentiles by sorting, diameters of squares, labels resized one mask at a time."""

import math

import cv2
import numpy as np
import pytest

from common.images import squeeze
from instances import judge, match, official_scores
from nuclei.scaling import (
    LEAST_RANGE,
    median_diameter,
    resize_labels,
    resize_nuclei,
    stretch,
    stretch_limits,
    stretch_picture,
    zoom,
)

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


def half_planes(columns, split):
    """A nucleus left of `split`, which may lie within a pixel -> its mask (16, columns) uint16 and label map."""
    share = (split - np.arange(columns)).clip(0, 1)
    mask = np.tile(np.rint(share * 65535).astype(np.uint16), (16, 1))
    return mask, (mask > 0.5 * 65535).astype(np.int32)


@pytest.mark.parametrize("split", [8, 8.25, 8.4, 8.6, 9])
@pytest.mark.parametrize("factor", [4, 0.5])
def test_edges_lie_between_the_pixels_that_the_network_saw(split, factor):
    """An edge at `split` is an edge at `factor` times that, to the pixel; whole labels know the nearest pixel only."""
    mask, labels = half_planes(16, split)
    size = (int(16 * factor), int(16 * factor))
    found = resize_nuclei(labels, mask, size, 0.5, 0)
    assert found.shape == size and found.dtype == np.int32
    assert abs(found.sum(1) - split * factor).max() <= 1
    if factor == 4 and split == 8.4:  # pixels 7 and 8, centres 7.5 and 8.5, have 1 and 0.4: 0.5 lies at 8 1/3
        assert found.sum(1).tolist() == [33] * 64 and resize_labels(labels, size).sum(1).tolist() == [32] * 64


def test_discs_come_back_better_than_from_their_labels():
    whole = np.zeros((240, 240), np.int32)
    for label, (x, y) in enumerate(np.ndindex(5, 5), 1):
        cv2.circle(whole, (x * 46 + 27, y * 46 + 27), 13 + label % 7, label, -1)
    mask = np.rint(squeeze((whole > 0).astype(np.float32), (60, 60)) * 65535).astype(np.uint16)
    labels = resize_labels(whole, (60, 60)) * (mask > 0.5 * 65535)
    old, new = (
        match(found, whole)
        for found in (resize_labels(labels, (240, 240)), resize_nuclei(labels, mask, (240, 240), 0.5, 0))
    )
    assert (new.intersection / new.union).mean() > (old.intersection / old.union).mean() + 0.02


def test_resized_nuclei_keep_filled_holes_and_borders_and_nothing_that_was_dropped():
    labels = np.zeros((20, 30), np.int32)
    labels[4:16, 3:13], labels[4:16, 13:24] = 1, 5  # they touch; numbers may be missing
    mask = np.where(labels > 0, 65535, 0).astype(np.uint16)
    mask[8:10, 6:8] = 0  # a hole that instances.nuclei filled
    mask[1:3, 26:29] = 65535  # a nucleus that it dropped
    found = resize_nuclei(labels, mask, (60, 90), 0.6, 0)
    assert set(np.unique(found)) == {0, 1, 5} and (found[15:45, 12:66] > 0).all()
    assert not found[:9, 75:].any()
    assert (found[15:45, 12:39] == 1).all() and (found[15:45, 39:66] == 5).all()
    assert resize_nuclei(labels, mask, labels.shape, 0.6, 0) is labels  # its own size: as it was found


def test_the_mask_is_smoothed_before_it_is_resized():
    mask, labels = half_planes(16, 8)
    mask[7, 8] = 65535  # a spike of one pixel, which smoothing takes off the mask, and so off the labels
    found = resize_nuclei(labels, mask, (64, 64), 0.5, 1.5)
    assert abs(found.sum(1) - 32).max() <= 2
    assert resize_nuclei(labels, mask, (64, 64), 0.5, 0).sum(1).max() >= 35
