"""nuclei/blocks.py: nuclei found in blocks are those found in the whole picture.

python -m pytest -q tests/test_blocks.py
"""

import tracemalloc

import numpy as np
import pytest

from common.synthetic import generate_nuclei
from inference import predict_tiled
from instances import DEFAULTS, judge, nuclei, sequential, targets
from nuclei import blocks
from nuclei.blocks import divide, first_pixels, nuclei_in_blocks


def as_maps(labels):
    """The true maps of a label map as `predict_tiled` returns maps."""
    return np.rint(targets(labels) * 65535).astype(np.uint16)


def mosaic(seeds, size=160):
    """Generated fields of nuclei in a square."""
    side = int(len(seeds) ** 0.5)
    fields = [sequential(generate_nuclei(seed, size)[1]) for seed in seeds]
    offsets = np.cumsum([0, *(field.max() for field in fields[:-1])])
    fields = [np.where(field > 0, field + offset, 0) for field, offset in zip(fields, offsets, strict=True)]
    return np.block([fields[k : k + side] for k in range(0, len(fields), side)]).astype(np.int32)


def disc(size, radius):
    y, x = np.mgrid[:size, :size] - size // 2
    return (y**2 + x**2 <= radius**2).astype(np.int32)


def exactly_the_same(labels, others):
    pairs = set(zip(labels.ravel().tolist(), others.ravel().tolist(), strict=True))
    return len(pairs) == labels.max() + 1 == others.max() + 1 and (0, 0) in pairs


@pytest.fixture(scope="module")
def field():
    maps = as_maps(mosaic(range(4)))
    return maps, nuclei(maps.astype(np.float32) / 65535, **DEFAULTS)


# ---------------------------------------------------------------- the same as the whole


def test_one_block_is_the_whole(field):
    maps, whole = field
    labels, confidence = nuclei_in_blocks(maps, **DEFAULTS)
    assert (labels == whole).all() and labels.dtype == np.int32 and len(confidence) == whole.max() + 1


@pytest.mark.parametrize(("core", "margin"), [(160, 64), (100, 64)])
def test_blocks_are_the_whole(field, core, margin):
    maps, whole = field
    labels, _ = nuclei_in_blocks(maps, core=core, margin=margin, **DEFAULTS)
    assert exactly_the_same(labels, whole)


def test_pictures_of_other_shapes(field):
    maps, _ = field
    for window in (np.s_[:, :250, :90], np.s_[:, 7:8, :], np.s_[:, :, 11:12], np.s_[:, 100:201, 5:306]):
        part = np.ascontiguousarray(maps[window])
        whole = nuclei(part.astype(np.float32) / 65535, **DEFAULTS)
        assert exactly_the_same(nuclei_in_blocks(part, core=64, margin=64, **DEFAULTS)[0], whole)


def test_blurred_and_noisy_maps_differ_in_few_nuclei(field):
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.15, field[0].shape)
    maps = np.rint((field[0] / 65535 + noise).clip(0, 1) * 65535).astype(np.uint16)
    whole = nuclei(maps.astype(np.float32) / 65535, **DEFAULTS)
    labels, _ = nuclei_in_blocks(maps, core=100, margin=48, **DEFAULTS)
    counts = judge(labels, whole).counts
    assert counts[0, 1:].sum() <= 1 and counts[0, 0] > 30


def test_through_the_tiles_of_a_network(field):
    """A network whose answer is its picture: the maps, in 8 bits, are joined from tiles and then from blocks."""

    class Predictor:
        config = {"input_h": 96, "input_w": 96, "num_classes": 3}

        def __call__(self, images):
            return images.astype(np.float32) / 255

    image = np.rint(field[0] / 257).astype(np.uint8).transpose(1, 2, 0)
    maps = predict_tiled(Predictor(), image[None])[0]
    assert np.abs(maps.astype(int) - image.transpose(2, 0, 1).astype(int) * 257).max() <= 1
    labels, _ = nuclei_in_blocks(maps, core=128, margin=64, **DEFAULTS)
    assert judge(labels, field[1]).counts[:, 1:].sum() == 0


# ---------------------------------------------------------------- large nuclei


@pytest.mark.parametrize("radius", [30, 120])
def test_a_nucleus_larger_than_many_blocks_is_one(radius):
    maps = as_maps(disc(300, radius))
    labels, confidence = nuclei_in_blocks(maps, core=64, margin=16, **{**DEFAULTS, "smoothing": 0})
    assert (labels == disc(300, radius)).all() and confidence.tolist() == [0, 1]


def test_a_nucleus_larger_than_the_widest_block_is_cut(monkeypatch):
    monkeypatch.setattr(blocks, "WIDEST", 32)
    labels, confidence = nuclei_in_blocks(as_maps(disc(300, 120)), core=64, margin=16, **{**DEFAULTS, "smoothing": 0})
    assert labels.max() == 1 and len(confidence) == 2 and not labels[disc(300, 120) == 0].any()
    assert labels[30, 150] == 1  # its first pixel, and what the block of that pixel sees of it
    assert labels.sum() <= 128**2


# ---------------------------------------------------------------- parts


def test_confidence_is_the_mean_of_the_mask(field):
    maps = field[0].copy()
    maps[0] = np.where(maps[0] > 0, np.random.default_rng(0).integers(40_000, 65_536, maps[0].shape), 0)
    labels, confidence = nuclei_in_blocks(maps, core=100, margin=64, **DEFAULTS)
    expected = [maps[0][labels == k].mean() / 65535 for k in range(1, labels.max() + 1)]
    assert confidence[1:] == pytest.approx(expected, abs=1e-6)
    assert confidence[0] == 0 and confidence.dtype == np.float32


def test_first_pixels_by_hand():
    rows, columns = first_pixels(np.array([[0, 0, 3], [1, 1, 3], [3, 1, 0]], np.int32))
    assert (rows[[1, 3]].tolist(), columns[[1, 3]].tolist()) == ([1, 0], [0, 2])


def test_divide():
    assert divide(10, 4) == [slice(0, 3), slice(3, 6), slice(6, 10)]
    assert divide(4, 4) == [slice(0, 4)] and divide(1, 4) == [slice(0, 1)]


def test_nothing():
    labels, confidence = nuclei_in_blocks(np.zeros((3, 70, 90), np.uint16), core=64, margin=16, **DEFAULTS)
    assert labels.shape == (70, 90) and not labels.any() and confidence.tolist() == [0]


def test_memory_is_that_of_the_labels_and_one_block():
    maps = np.tile(as_maps(mosaic([0])), (1, 4, 4))  # 640 x 640, sixteen blocks

    def peak(function):
        tracemalloc.start()
        function()
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    in_blocks = peak(lambda: nuclei_in_blocks(maps, core=160, margin=48, **DEFAULTS))
    whole = peak(lambda: nuclei(maps.astype(np.float32) / 65535, **DEFAULTS))
    assert in_blocks - 640**2 * 4 < whole / 4
