"""contrast.py: limits by hand, hot pixels, sparse nuclei, and values of all types."""

import numpy as np
import pytest

from common import contrast
from common.contrast import stretch_to_uint8
from common.images import to_channels


def ramp(low, high, dtype=np.uint16, size=256):
    """(size, size): a ramp along the rows, whose 3 x 3 median is itself."""
    return np.repeat(np.linspace(low, high, size)[None], size, axis=0).astype(dtype)


@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.uint32, np.int32, np.float32, np.float64])
@pytest.mark.parametrize(("low", "high"), [(0, 255), (100, 4180), (1000, 1510)])
def test_the_range_of_a_picture_becomes_0_to_255(dtype, low, high):
    """Of 65,536 pixels 0.01 % are 6.5: fewer than the 256 of the first and of the last column."""
    found = stretch_to_uint8(ramp(low, high, dtype))
    assert found.dtype == np.uint8
    expected = np.round((ramp(low, high, dtype).astype(float) - low) / (high - low) * 255)
    assert np.array_equal(found, expected)


def test_negative_values_and_fractions():
    assert stretch_to_uint8(ramp(-1000, 20, np.int16))[0, [0, -1]].tolist() == [0, 255]
    found = stretch_to_uint8(ramp(0, 1, np.float32))
    assert np.array_equal(found, np.round(ramp(0, 1, np.float64) * 255))


def test_clusters_of_hot_and_dead_pixels_are_clipped():
    picture = ramp(1000, 2000)
    picture[10:12, 10:12], picture[20:22, 200:202] = 60_000, 0
    found = stretch_to_uint8(picture)
    untouched = np.ones(picture.shape, bool)
    untouched[9:13, 9:13] = untouched[19:23, 199:203] = False
    assert np.array_equal(found[untouched], stretch_to_uint8(ramp(1000, 2000))[untouched])
    assert (found[10:12, 10:12] == 255).all() and (found[20:22, 200:202] == 0).all()


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_hot_and_dead_pixels_change_nothing(dtype):
    picture = ramp(100, 1100, dtype)
    hot = picture.copy()
    rng = np.random.default_rng(0)
    rows, columns = rng.permutation(64)[:50] * 4, rng.permutation(64)[:50] * 4  # 50 of them, none beside another
    hot[rows, columns], hot[rows[:10] + 2, columns[:10]] = 60_000, 0
    same = picture == hot
    assert np.array_equal(stretch_to_uint8(hot)[same], stretch_to_uint8(picture)[same])


@pytest.mark.parametrize("radius", [4, 20])
def test_few_bright_nuclei_stay_above_their_background(radius):
    """One nucleus of 0.02 % and one of 0.5 % of a dark picture of 512 x 512."""
    y, x = np.mgrid[:512, :512]
    nucleus = (y - 100) ** 2 + (x - 300) ** 2 <= radius**2
    noise = np.random.default_rng(0).normal(100, 4, nucleus.shape)
    found = stretch_to_uint8((noise + 400 * nucleus).astype(np.uint16))
    assert found[~nucleus].mean() < 20 and found[nucleus].mean() > 240


def test_nearly_constant_and_constant_pictures():
    assert not stretch_to_uint8(np.full((9, 7), 1000, np.uint16)).any()
    assert not stretch_to_uint8(np.full((9, 7), np.nan, np.float32)).any()
    one = np.full((300, 300), 1000, np.uint16)
    one[5, 5] = 3000  # all there is to see
    assert stretch_to_uint8(one)[5, 5] == 255 and stretch_to_uint8(one).sum() == 255
    assert stretch_to_uint8(np.array([[7]], np.uint16)).tolist() == [[0]]
    assert stretch_to_uint8(np.array([[7, 9]], np.uint16)).tolist() == [[0, 255]]


def test_nan_and_infinity():
    picture = ramp(1000, 1255, np.float32)
    picture[:, :20] = np.nan  # as registration leaves it
    picture[3, 100], picture[5, 100] = np.inf, -np.inf
    found = stretch_to_uint8(picture)
    assert (found[:, :20] == 0).all() and (found[3, 100], found[5, 100]) == (255, 0)
    expected = (np.arange(1020, 1256) - 1021).clip(0) / 234 * 255  # in the median the column beside NaN is 1021
    assert np.abs(found[7, 20:] - expected).max() < 0.51


def test_giant_floats_do_not_warn(recwarn):
    stretch_to_uint8(np.array([[-1e308, 0], [1e308, np.nan]]))
    assert not recwarn


def test_colours_share_their_limits_and_alpha_has_its_own():
    red = ramp(0, 4000)
    picture = np.dstack([red, red // 2, red // 4])
    assert np.array_equal(stretch_to_uint8(picture), np.round(picture / 4000 * 255))
    alpha = ramp(0, 65535)
    found = stretch_to_uint8(np.dstack([picture, alpha]))
    assert np.array_equal(found[..., :3], stretch_to_uint8(picture))
    assert np.array_equal(found[..., 3], np.round(alpha / 257))


def test_eight_bits_stay_as_they_are():
    dark = (ramp(0, 40) % 41).astype(np.uint8)
    assert np.array_equal(to_channels(dark, 1)[..., 0], dark)


def test_large_pictures_are_sampled(monkeypatch):
    picture = ramp(100, 1100)
    monkeypatch.setattr(contrast, "SAMPLED_PIXELS", 64 * 64)  # every fourth row and column
    expected = np.round((picture.astype(float) - 100).clip(0, 988) / 988 * 255)  # columns 0 and 252: 100 and 1088
    assert np.abs(stretch_to_uint8(picture).astype(int) - expected).max() <= 1
