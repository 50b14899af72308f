"""common/synthetic.py: the same seed gives the same picture, and the labels say where the nuclei are."""

import numpy as np
import pytest

from common.synthetic import generate_nuclei, two_classes

SEEDS = range(40)


@pytest.fixture(scope="module")
def fields():
    return [generate_nuclei(seed, 128) for seed in SEEDS]


def test_shapes_and_labels(fields):
    for image, labels in fields:
        assert image.shape == (128, 128, 3) and image.dtype == np.uint8
        assert labels.shape == (128, 128) and labels.dtype == np.int32
        assert np.unique(labels).tolist() == list(range(labels.max() + 1))  # 0, and every number up to the last
        assert labels.max() >= 1


def test_a_seed_is_a_picture(fields):
    again_image, again_labels = generate_nuclei(SEEDS[3], 128)
    assert np.array_equal(fields[3][0], again_image) and np.array_equal(fields[3][1], again_labels)
    assert len({image.tobytes() for image, _ in fields}) == len(fields)


def test_nuclei_are_where_the_labels_say(fields):
    dark_fields = 0
    for image, labels in fields:
        inside, outside = image[labels > 0].mean(), image[labels == 0].mean()
        grey = (image == image[..., :1]).all()
        dark_fields += grey
        assert inside > outside + 3 if grey else inside < outside - 10
    assert 24 <= dark_fields <= 36  # about three of four


def test_nuclei_touch_and_fill_as_much_as_in_real_fields(fields):
    covered = np.array([(labels > 0).mean() for _, labels in fields])
    assert 0.08 < covered.mean() < 0.25 and covered.min() < 0.08 and covered.max() > 0.25
    touching = sum(
        ((labels[:, 1:] != labels[:, :-1]) & (labels[:, 1:] > 0) & (labels[:, :-1] > 0)).any() for _, labels in fields
    )
    assert touching > len(fields) / 2


@pytest.mark.parametrize("size", [32, 97, 300])
def test_any_size(size):
    image, labels = generate_nuclei(5, size)
    assert image.shape == (size, size, 3) and labels.shape == (size, size)
    assert two_classes(5, "ants", size).shape == (size, size, 3)


def test_only_the_insect_tells_the_classes_apart():
    """Pictures of one seed share everything but the body: the background says nothing."""
    for seed in range(6):
        ant, bee = (two_classes(seed, label, 96).astype(int) for label in ("ants", "bees"))
        assert np.array_equal(ant, two_classes(seed, "ants", 96))
        centre = np.abs(ant - bee)[24:72, 24:72].mean()
        assert centre > 5
        assert np.array_equal(ant[:10, :10], bee[:10, :10])  # the same ground in the same light
    with pytest.raises(KeyError):
        two_classes(0, "wasps")
