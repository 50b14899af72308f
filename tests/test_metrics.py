"""metrics.py by hand, and every definition a second time with sets and loops over images and thresholds."""

import math

import numpy as np
import pytest
import torch

from metrics import (
    DEFINITIONS,
    THRESHOLDS,
    bootstrap_interval,
    count_pixels,
    dice,
    dice_coef,
    iou,
    iou_score,
    per_class,
    summarise,
    two_class_iou,
)

TEN = [0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95]


def scores(images=37, classes=2, side=9, seed=0):
    """Probabilities and masks (images, classes, side, side), float32; blobs of every size, some images empty."""
    rng = np.random.default_rng(seed)
    masks = (rng.random((images, classes, side, side)) < rng.random((images, classes, 1, 1)) ** 3).astype(np.float32)
    noise = rng.random(masks.shape)
    probabilities = np.where(rng.random(masks.shape) < 0.7, 0.35 + 0.6 * (masks - 0.5) + 0.3 * noise, noise)
    masks[:5:2], probabilities[:5] = 0, 0.1 * noise[:5]  # images 0, 2, 4 empty in both, 1 and 3 in the prediction
    return torch.from_numpy(probabilities.clip(0, 1).astype(np.float32)), torch.from_numpy(masks)


def counted(probabilities, masks, batch_size=16, **options):
    """The table of all images, counted in batches."""
    batches = zip(probabilities.split(batch_size), masks.split(batch_size), strict=True)
    return np.concatenate([count_pixels(*batch, **options).numpy() for batch in batches])


# ---------------------------------------------------------------- the table of definitions, a second time


def divide(numerator, denominator):
    return 1.0 if denominator == 0 else numerator / denominator


def pixel_sets(probabilities, masks, threshold, images):
    """The foreground of some images of one class as sets of (image, y, x): predicted, true, all."""
    predicted, true, everything = set(), set(), set()
    for n in images:
        for y, x in np.ndindex(masks.shape[1:]):
            everything.add((n, y, x))
            if probabilities[n, y, x] > threshold:
                predicted.add((n, y, x))
            if masks[n, y, x] == 1:
                true.add((n, y, x))
    return predicted, true, everything


def set_iou(predicted, true, everything=None):
    return divide(len(predicted & true), len(predicted | true))


def set_dice(predicted, true, everything=None):
    return divide(2 * len(predicted & true), len(predicted) + len(true))


def set_two_class(predicted, true, everything):
    return (set_iou(predicted, true) + set_iou(everything - predicted, everything - true)) / 2


def brute_force(probabilities, masks):
    """(N, H, W) arrays of one class -> every row of the table, from its words."""
    everyone = range(len(masks))
    batches = [everyone[start : start + 16] for start in range(0, len(masks), 16)]

    def of(function, images, threshold=0.5):
        return function(*pixel_sets(probabilities, masks, threshold, images))

    return {
        "iou": of(set_iou, everyone),
        "dice": of(set_dice, everyone),
        "iou_per_image": sum(of(set_iou, [n]) for n in everyone) / len(masks),
        "dice_per_image": sum(of(set_dice, [n]) for n in everyone) / len(masks),
        "iou_per_batch": sum(len(batch) * of(set_iou, batch) for batch in batches) / len(masks),
        "miou": of(set_two_class, everyone),
        "miou_ten": sum(of(set_two_class, everyone, threshold) for threshold in TEN) / 10,
    }


@pytest.mark.parametrize("classes", [1, 3])
def test_every_row_against_brute_force(classes):
    probabilities, masks = scores(classes=classes)
    expected = [brute_force(probabilities[:, k].numpy(), masks[:, k].numpy()) for k in range(classes)]
    assert len({round(value, 6) for value in expected[0].values()}) == len(DEFINITIONS)  # no row hides behind another
    table = counted(probabilities, masks)
    for name, values in per_class(table).items():
        assert values.tolist() == pytest.approx([row[name] for row in expected], rel=1e-12), name
    for name, value in summarise(table).items():
        assert value == pytest.approx(sum(row[name] for row in expected) / classes, rel=1e-12), name
    assert set(summarise(table)) == set(per_class(table)) == set(DEFINITIONS)


@pytest.mark.parametrize("batch_size", [1, 5, 16, 37, 100])
def test_no_figure_depends_on_the_batch_size(batch_size):
    probabilities, masks = scores()
    assert summarise(counted(probabilities, masks, batch_size)) == summarise(counted(probabilities, masks))


def test_batches_of_another_size_on_request():
    probabilities, masks = scores(images=5, classes=1)
    table = counted(probabilities, masks)
    assert summarise(table, batch_size=1)["iou_per_batch"] == pytest.approx(summarise(table)["iou_per_image"])
    assert summarise(table, batch_size=5)["iou_per_batch"] == pytest.approx(summarise(table)["iou"])


# ---------------------------------------------------------------- counts


def test_counts_by_hand():
    probabilities = torch.tensor([[[[0.2, 0.5], [0.6, 0.97]]]])  # 0.5 is not above 0.5
    masks = torch.tensor([[[[0.0, 1.0], [0.0, 1.0]]]])
    table = counted(probabilities, masks)
    assert tuple(TEN) == THRESHOLDS and table.shape == (1, 1, 10, 4) and table.dtype == np.int64
    assert table[0, 0, 0].tolist() == [1, 2, 2, 4]  # intersection, predicted, true, pixels
    assert table[0, 0, 1].tolist() == [1, 2, 2, 4]  # 0.55
    assert table[0, 0, 3:].tolist() == [[1, 1, 2, 4]] * 7  # 0.65 ... 0.95
    row = table[0, 0, 0]
    assert iou(row) == pytest.approx(1 / 3) and dice(row) == 0.5
    assert two_class_iou(row) == pytest.approx((1 / 3 + 1 / 3) / 2)  # background: 1 right, 2 wrong
    assert two_class_iou(table[0, 0, 9]) == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_nothing_to_divide_is_1():
    nothing, everything = torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
    for probabilities, masks in ((nothing, nothing), (everything, everything)):
        assert set(summarise(counted(probabilities, masks)).values()) == {1.0}
    assert set(summarise(counted(nothing, everything)).values()) == {0.0}
    assert iou(np.zeros((2, 4), int)).tolist() == dice(np.zeros((2, 4), int)).tolist() == [1, 1]


def test_images_of_different_sizes_and_one_threshold():
    two = count_pixels(torch.ones(2, 1, 3, 3), torch.ones(2, 1, 3, 3), thresholds=(0.5,))
    one = count_pixels(torch.ones(1, 1, 1, 2), torch.zeros(1, 1, 1, 2), thresholds=(0.5,))
    table = torch.cat([two, one]).numpy()
    assert table[:, 0, 0].tolist() == [[9, 9, 9, 9], [9, 9, 9, 9], [0, 2, 0, 2]]
    figures = summarise(table)
    assert "miou_ten" not in figures and figures["iou"] == 18 / 20 and figures["iou_per_image"] == pytest.approx(2 / 3)


def test_no_images_and_wrong_shapes():
    assert count_pixels(torch.zeros(0, 1, 2, 2), torch.zeros(0, 1, 2, 2)).shape == (0, 1, 10, 4)
    with pytest.raises(ValueError, match=r"\(1, 1, 2, 2\).*\(1, 2, 2\)"):
        count_pixels(torch.zeros(1, 1, 2, 2), torch.zeros(1, 2, 2))


def test_a_count_of_more_pixels_than_32_bits_hold():
    row = np.array([2**33, 2**34, 2**34, 2**36])
    assert iou(row) == pytest.approx(1 / 3) and dice(row) == 0.5


# ---------------------------------------------------------------- the bootstrap


def test_interval_of_equal_images_is_their_figure():
    probabilities, masks = scores(images=6, classes=2)
    table = counted(probabilities[5:6].repeat(9, 1, 1, 1), masks[5:6].repeat(9, 1, 1, 1))
    low, high = bootstrap_interval(table, resamples=50)
    assert low == pytest.approx(summarise(table)["iou"]) and low == high
    assert bootstrap_interval(table, metric=dice, resamples=50)[0] == pytest.approx(summarise(table)["dice"])


def test_interval_of_two_images_by_hand():
    """IoU 1 and 0 of one pixel each: drawn both alike in half of the resamples, else 1/2."""
    table = np.zeros((2, 1, 1, 4), np.int64)
    table[0, 0, 0], table[1, 0, 0] = (1, 1, 1, 1), (0, 0, 1, 1)
    assert bootstrap_interval(table) == (0.0, 1.0)
    assert bootstrap_interval(table, level=0.4) == (0.5, 0.5)  # the quartiles and all between


def test_interval_as_a_loop_of_resamples_finds_it():
    probabilities, masks = scores(classes=1)
    table = counted(probabilities, masks)
    rng, figures = np.random.default_rng(7), []
    for _ in range(4000):
        drawn = table[rng.integers(0, len(table), len(table))][:, 0, 0].sum(0)
        figures.append(drawn[0] / (drawn[1] + drawn[2] - drawn[0]))
    low, high = bootstrap_interval(table)
    width = high - low
    assert [low, high] == pytest.approx(np.quantile(figures, [0.025, 0.975]).tolist(), abs=0.1 * width)
    assert low < summarise(table)["iou"] < high
    assert bootstrap_interval(table) == (low, high) != bootstrap_interval(table, seed=1)
    narrow = bootstrap_interval(table, level=0.5)
    assert low < narrow[0] < narrow[1] < high


# ---------------------------------------------------------------- the two functions that users know


def test_iou_score_by_hand():
    logits = torch.tensor([[[[2.0, -1.0], [0.1, -3.0]]], [[[1.0, 1.0], [0.0, -2.0]]]])
    masks = torch.tensor([[[[1.0, 1.0], [0.0, 0.0]]], [[[1.0, 0.0], [0.0, 0.0]]]])
    exact = (2 + 1e-5) / (5 + 1e-5)  # pooled over the batch; a logit of 0 is no foreground
    assert iou_score(logits, masks) == pytest.approx(exact, rel=1e-12)
    assert iou_score(logits.numpy(), masks.numpy()) == iou_score(logits, masks.bool()) == iou_score(logits, masks)
    assert isinstance(iou_score(logits.requires_grad_(), masks), float)
    assert iou_score(-torch.ones(4), torch.zeros(4)) == 1


def test_dice_coef_by_hand():
    """Soft: probabilities 3/4, 1/4, 1/2 without a threshold."""
    logits, masks = torch.tensor([math.log(3), -math.log(3), 0.0]), torch.tensor([1.0, 0.0, 1.0])
    exact = (2 * (3 / 4 + 1 / 2) + 1e-5) / (3 / 2 + 2 + 1e-5)
    assert dice_coef(logits.view(1, 1, 1, 3), masks.view(1, 1, 1, 3)) == pytest.approx(exact, rel=1e-6)
    assert dice_coef(logits.numpy(), masks.numpy()) == dice_coef(logits.requires_grad_(), masks)
    assert dice_coef(torch.full((9,), -1e4), torch.zeros(9)) == 1


@pytest.mark.parametrize("function", [iou_score, dice_coef])
def test_batch_functions_want_equal_shapes(function):
    """(2, 1, 3, 3) and (2, 3, 3) would broadcast, (2, 1, 2, 3) and (2, 1, 3, 2) flatten, to a wrong figure."""
    for shapes in (((2, 1, 3, 3), (2, 3, 3)), ((2, 1, 2, 3), (2, 1, 3, 2))):
        with pytest.raises(ValueError, match="differ in shape"):
            function(torch.zeros(shapes[0]), torch.zeros(shapes[1]))
