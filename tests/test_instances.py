"""instances.py: targets, watershed, matching, scores and run lengths against slow loops and cases made by hand.

python -m pytest -q tests/test_instances.py
"""

import tracemalloc
from fractions import Fraction

import numpy as np
import pytest

from common.synthetic import generate_nuclei
from instances import (
    DEFAULTS,
    DEFINITIONS,
    FALSE,
    FOUND,
    MERGED,
    MISSED,
    NONE,
    SPLIT,
    bootstrap_interval,
    contact_band,
    count_values,
    drop_small,
    fill_holes,
    from_runs,
    judge,
    match,
    nuclei,
    official_scores,
    sequential,
    summarise,
    targets,
    to_runs,
)

EMPTY = np.zeros((6, 8), np.int32)


def drawn(text):
    """Rows of digits and dots, separated by spaces -> a label map."""
    return np.array([[0 if c == "." else int(c) for c in row] for row in text.split()], np.int32)


def blobs(seed, size=40, count=12):
    """Rectangles of all sizes that touch, overlap, are cut in two and leave the picture, with numbers missing."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((size, size + 7), np.int32)
    for label in rng.permutation(np.arange(1, count + 4))[:count]:
        y, x = rng.integers(-5, size, 2)
        labels[max(y, 0) : y + rng.integers(1, 24), max(x, 0) : x + rng.integers(1, 24)] = label
    return labels


def test_values_are_counted_in_little_memory():
    """np.bincount copies a uint8 picture to eight times its size."""
    image = np.random.default_rng(0).integers(0, 256, (2000, 300, 3), np.uint8)
    tracemalloc.start()
    counts = count_values(image, 300)
    assert tracemalloc.get_traced_memory()[1] < 2 * image.nbytes
    tracemalloc.stop()
    assert counts.tolist() == [(image == value).sum() for value in range(300)]
    assert count_values(image[:0], 3).tolist() == [0, 0, 0]


# ---------------------------------------------------------------- label map -> targets


def slow_contact_band(labels):
    """For each pixel: how many nuclei have a pixel in the square of their own reach around it."""
    height, width = labels.shape
    area = {k: int((labels == k).sum()) for k in np.unique(labels) if k}
    reach = {k: 1 if pixels < 300 else 2 if pixels < 2000 else 3 for k, pixels in area.items()}
    band = np.zeros(labels.shape, bool)
    for y in range(height):
        for x in range(width):
            near = [
                k for k, r in reach.items() if (labels[max(y - r, 0) : y + r + 1, max(x - r, 0) : x + r + 1] == k).any()
            ]
            band[y, x] = len(near) > 1
    return band


def slow_relative_distance(labels):
    distance = np.zeros(labels.shape)
    for k in np.unique(labels[labels > 0]):
        inside, outside = np.argwhere(labels == k), np.argwhere(labels != k)
        if not len(outside):
            return np.ones(labels.shape)
        to_edge = np.sqrt(((inside[:, None] - outside) ** 2).sum(2).min(1))
        distance[labels == k] = to_edge / to_edge.max()
    return distance


@pytest.mark.parametrize("seed", range(6))
def test_targets_by_slow_loops(seed):
    labels = blobs(seed, *((40, 12) if seed % 2 else (64, 5)))
    mask, contact, distance = targets(labels)
    assert (mask == (labels > 0)).all() and (contact == slow_contact_band(labels)).all()
    assert np.abs(distance - slow_relative_distance(labels)).max() < 1e-6


def test_the_band_is_wider_between_larger_nuclei():
    for side, reach in ((10, 1), (20, 2), (50, 3)):
        labels = np.zeros((side, 2 * side), np.int32)
        labels[:, :side], labels[:, side:] = 1, 2
        assert np.flatnonzero(contact_band(labels)[0]).tolist() == list(range(side - reach, side + reach))
        if side > 10:
            assert not contact_band(np.where(labels == 2, 0, labels)).any()


def test_targets_by_hand():
    labels = drawn(".......... .111222... .111222..3 .111222... ..........")
    mask, contact, distance = targets(labels)
    assert targets(labels).dtype == np.float32 and mask.sum() == 19
    assert np.flatnonzero(contact[2]).tolist() == [3, 4] and contact.sum() == 2 * 5  # and one pixel above and below
    assert distance[1:4, 1:4].tolist() == [[0.5, 0.5, 0.5], [0.5, 1, 0.5], [0.5, 0.5, 0.5]]
    assert distance[2, 9] == 1 and distance[0].max() == 0


def test_targets_of_nothing_and_of_everything():
    assert not targets(EMPTY).any()
    mask, contact, distance = targets(np.ones((5, 5), np.int32))
    assert mask.all() and not contact.any() and (distance == 1).all()  # the border of the picture is no edge


# ---------------------------------------------------------------- maps -> label map


@pytest.mark.parametrize("seed", range(4))
def test_round_trip(seed):
    labels = generate_nuclei(seed)[1]
    labels = sequential(drop_small(labels, DEFAULTS["smallest"]))
    found = nuclei(targets(labels), **{**DEFAULTS, "smoothing": 0})
    assert found.dtype == np.int32 and official_scores([judge(found, labels)])[0] > 0.95


def test_round_trip_of_touching_and_nested_nuclei():
    labels = np.zeros((60, 90), np.int32)
    labels[5:55, 5:45], labels[5:55, 45:85] = 1, 2
    labels[20:35, 15:32] = 3  # within 1
    found = nuclei(targets(labels), **DEFAULTS)
    (result,) = [judge(found, labels)]
    assert found.max() == 3 and (result.true_kinds[1:] == FOUND).all() and result.matched_iou > 2.9


def test_nothing_and_one_pixel():
    assert not nuclei(np.zeros((3, 6, 8)), **DEFAULTS).any()
    one = EMPTY.copy()
    one[2, 3] = 1
    assert (nuclei(targets(one), **{**DEFAULTS, "smallest": 1, "smoothing": 0}) == one).all()
    assert not nuclei(targets(one), **{**DEFAULTS, "smallest": 2, "smoothing": 0}).any()


def test_every_threshold_does_what_its_name_says():
    mask = np.full((1, 9), 0.6)
    contact = np.array([[0, 0, 0, 0, 0.4, 0, 0, 0, 0]])
    distance = np.array([[0.2, 0.6, 0.2, 0.2, 0.2, 0.2, 0.05, 0.4, 0.2]])
    maps = np.stack([mask, contact, distance])

    def found(**changed):
        thresholds = {"mask_threshold": 0.5, "contact_threshold": 0.3, "distance_threshold": 0.2}
        thresholds |= {"seed_threshold": 0.3, "smallest": 1, "smoothing": 0, **changed}
        return "".join(map(str, nuclei(maps, **thresholds)[0]))

    assert found() == "111112222"  # at the highest contact; the pixel itself goes to either side
    assert found(mask_threshold=0.7) == "000000000"
    assert found(contact_threshold=1) in ("111111222", "111111122")  # where the distance is too small
    assert found(contact_threshold=1, distance_threshold=0) == "111111111"
    assert found(seed_threshold=0.5) == "111111111"  # the second seed does not reach it
    assert found(seed_threshold=0.9) == "111111111"  # none does: the whole part is one nucleus
    assert found(smallest=5) == "111110000"


def test_smoothing_rounds_off():
    """A Gaussian of one pixel weighs [0.0545, 0.2442, 0.4026, ...]: a spur of one pixel and a corner go, sides stay."""
    mask = np.zeros((30, 30))
    mask[5:25, 5:25] = 1
    mask[14, 25:29] = 1  # a spur
    maps = np.stack([mask, np.zeros((30, 30)), mask])
    whole, smooth = (nuclei(maps, **{**DEFAULTS, "mask_threshold": 0.5, "smoothing": value}) for value in (0, 1))
    expected = mask.copy()
    expected[14, 26:] = 0  # 0.40 of the spur is left, and more beside the square: 0.40 + 0.60 x 0.30 in its first pixel
    for corner in ((5, 5), (5, 24), (24, 5), (24, 24)):
        expected[corner] = 0  # (0.70)² = 0.49
    assert whole.tolist() == mask.tolist() and smooth.tolist() == expected.tolist()


def test_holes():
    labels = drawn("111.1111 1.1.1..1 11111221 .1..1221 11111111")
    #                 ^ closed   ^ shared by 1 and 2; left open to the border
    filled = fill_holes(labels)
    assert filled.tolist() == drawn("111.1111 111.1..1 11111221 .1111221 11111111").tolist()
    assert (fill_holes(EMPTY) == EMPTY).all() and fill_holes(np.ones((3, 3), np.int32)).all()


def test_small_objects_and_sequential_numbers():
    labels = drawn("1..33 1..33 ....9")
    assert drop_small(labels, 2).tolist() == drawn("1..33 1..33 .....").tolist()
    assert drop_small(labels, 3).tolist() == drawn("...33 ...33 .....").tolist()
    assert sequential(labels).tolist() == drawn("1..22 1..22 ....3").tolist()
    assert sequential(np.array([[7, 2**31]])).tolist() == [[1, 2]] and not sequential(EMPTY).any()


# ---------------------------------------------------------------- matching and the official score


def slow_pairs(predicted, true):
    """{(predicted, true): (intersection, union)} by comparing each with each."""
    pairs = {}
    for p in np.unique(predicted[predicted > 0]).tolist():
        for t in np.unique(true[true > 0]).tolist():
            if common := int(((predicted == p) & (true == t)).sum()):
                pairs[p, t] = common, int(((predicted == p) | (true == t)).sum())
    return pairs


def slow_official(predicted, true):
    """The rule of the Data Science Bowl, in fractions."""
    count_p, count_t = (len(np.unique(labels[labels > 0])) for labels in (predicted, true))
    if not count_t:
        return 0.0 if count_p else 1.0
    pairs, precisions = slow_pairs(predicted, true), []
    for percent in range(50, 100, 5):
        tp = sum(Fraction(i, u) > Fraction(percent, 100) for i, u in pairs.values())
        precisions.append(Fraction(tp, count_p + count_t - tp))
    return float(sum(precisions) / 10)


@pytest.mark.parametrize("seed", range(8))
def test_matching_by_slow_loops(seed):
    true = blobs(seed)
    rng = np.random.default_rng(seed)
    predicted = np.where(rng.random(true.shape) < 0.02, 0, np.roll(true, seed % 3, 1))
    predicted[predicted == true.max()] = 30
    found = match(predicted, true)
    pairs = zip(found.predicted, found.true, found.intersection, found.union, strict=True)
    assert {(p, t): (i, u) for p, t, i, u in pairs} == slow_pairs(predicted, true)
    assert official_scores([judge(predicted, true)])[0] == pytest.approx(slow_official(predicted, true), abs=1e-12)


def test_iou_has_to_be_larger_than_the_threshold():
    true, half, most = (np.zeros((1, 40), np.int32) for _ in range(3))
    true[0, :20], half[0, :10], most[0, :19] = 1, 1, 1
    assert judge(half, true).counts[:, 0].tolist() == [0] * 10  # IoU 10 / 20
    assert judge(most, true).counts[:, 0].tolist() == [1] * 9 + [0]  # 19 / 20
    assert official_scores([judge(true, true)]) == [1]


def test_images_without_nuclei():
    one = drawn("11.. ....")
    none = np.zeros_like(one)
    assert official_scores([judge(none, none), judge(one, none), judge(none, one)]).tolist() == [1, 0, 0]


def test_shapes_that_differ():
    with pytest.raises(ValueError, match=r"\(6, 8\) and true labels \(8, 6\) differ"):
        match(EMPTY, EMPTY.T)


def test_65535_objects_in_little_memory():
    """A table of all with all would take 34 GB."""
    true = np.arange(65_536, dtype=np.int32).repeat(2).reshape(256, 512)  # two pixels each
    predicted = true.copy()
    predicted[128:] = np.roll(true[128:], 1)  # each of these overlaps two others, IoU 1 / 3
    tracemalloc.start()
    result = judge(predicted, true)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert result.counts.tolist() == [[32_767, 32_768, 32_768]] * 10
    assert (result.true_kinds == MISSED).sum() == (result.predicted_kinds == FALSE).sum() == 32_768
    assert peak < 50e6
    runs = to_runs(true)
    assert len(runs) == 65_535 and (from_runs(runs, true.shape) == true).all()


# ---------------------------------------------------------------- what went wrong


def test_kinds_by_hand():
    true = drawn(
        """
        1111.2222....
        1111.2222.33.
        1111.2222.33.
        .............
        44444444.5.66
        44444444...66
        """
    )
    predicted = drawn(
        """
        111111111....
        111111111.22.
        111111111.22.
        .............
        33334444.....
        33334444....7
        """
    )
    result = judge(predicted, true)
    assert result.true_kinds.tolist() == [NONE, MERGED, MERGED, FOUND, SPLIT, MISSED, MISSED]
    assert result.predicted_kinds.tolist() == [NONE, MERGED, FOUND, SPLIT, SPLIT, NONE, NONE, FALSE]
    assert (result.merges, result.splits, result.matched_iou) == (1, 1, 1.0)
    assert result.counts[0].tolist() == [1, 4, 5]  # IoU of 3 with 4 is 0.5, which is not enough


def test_what_is_found_is_called_found_even_if_it_swallows_another():
    true, predicted = drawn("1111111122 1111111122"), drawn("1111111111 1111111111")
    result = judge(predicted, true)
    assert result.predicted_kinds.tolist() == [NONE, FOUND] and result.true_kinds.tolist() == [NONE, FOUND, MERGED]
    assert (result.merges, result.splits) == (1, 0)
    result = judge(true, predicted)
    assert result.predicted_kinds.tolist() == [NONE, FOUND, SPLIT] and result.true_kinds.tolist() == [NONE, FOUND]
    assert (result.merges, result.splits) == (0, 1)


# ---------------------------------------------------------------- many images


def test_summary_by_hand():
    whole, part = drawn("11111.22"), drawn("11111.2.")  # IoU 1 and 0.5
    most = drawn("1111..22")  # 0.8 and 1
    results = [judge(part, whole), judge(most, whole), judge(part * 0, whole), judge(whole, whole * 0)]
    found = summarise(results)
    # TP, FP, FN at 0.5: 1 1 1, 2 0 0, 0 0 2, 0 2 0
    ap50 = (1 / 3 + 1 + 0 + 0) / 4
    ap80 = (1 / 3 + 1 / 3 + 0 + 0) / 4  # 0.8 is not more than 0.80
    expected = {
        "official": (6 * ap50 + 4 * ap80) / 10,
        "ap": pytest.approx([ap50] * 6 + [ap80] * 4),
        "ap50": ap50,
        "f1": 2 * 3 / (2 * 3 + 3 + 3),
        "pq": (1 + 0.8 + 1) / (3 + 3),
        "predicted": 6,
        "true": 6,
        "count_error": 0.5,  # 0, 0, 2 / 2 and 2 / 1
        "merges": 0,
        "splits": 0,
        "missed": 3,
        "false": 3,
    }
    assert found == {name: value if name == "ap" else pytest.approx(value) for name, value in expected.items()}
    assert found["official"] == pytest.approx(official_scores(results).mean())
    assert found.keys() == DEFINITIONS.keys()
    nothing = summarise([judge(EMPTY, EMPTY)])
    assert [nothing[name] for name in ("official", "f1", "pq", "count_error", "true")] == [1, 1, 1, 0, 0]


def test_bootstrap():
    scores = np.random.default_rng(0).random(50)
    low, high = bootstrap_interval(scores)
    means = np.random.default_rng(1).choice(scores, (4000, 50)).mean(1)  # one image at a time
    assert (low, high) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.006)
    assert bootstrap_interval(scores) == (low, high) != bootstrap_interval(scores, seed=1)
    assert bootstrap_interval(np.full(7, 0.25)) == (0.25, 0.25)


def test_groups_are_drawn_as_a_whole():
    scores, groups = [0.0, 0.0, 0.0, 1.0], ["a", "a", "a", "b"]
    # a quarter of the draws is a a, half is a b, a quarter is b b
    assert bootstrap_interval(scores, groups, level=0.6) == (0.0, 1.0)
    assert bootstrap_interval(scores, groups, level=0.4) == (0.25, 0.25)
    alone = np.random.default_rng(0).random(30)
    assert bootstrap_interval(alone, np.arange(30)) == bootstrap_interval(alone)


# ---------------------------------------------------------------- run lengths


def test_runs_by_hand():
    labels = drawn("1.2 1.2 ..2 .11")
    assert to_runs(labels) == ["1 2 8 1 12 1", "9 3"]  # four pixels in a column
    assert from_runs(["1 2 8 1 12 1", "", "9 3"], (4, 3)).tolist() == labels.tolist()
    assert to_runs(EMPTY) == [] and (from_runs([""], EMPTY.shape) == EMPTY).all()
    assert to_runs(np.ones((2, 3), np.int32)) == ["1 6"]


@pytest.mark.parametrize("seed", range(3))
def test_runs_there_and_back(seed):
    labels = sequential(blobs(seed))
    assert (from_runs(to_runs(labels), labels.shape) == labels).all()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["1 2", "5"], "nucleus 2: expected pairs `start length` of integers, found '5'"),
        (["1 2 x 1"], "expected pairs"),
        (["-1 2"], "expected pairs"),
        (["1.5 2"], "expected pairs"),
        (["²  1"], "expected pairs"),
        (["0 2"], "nucleus 1: the run 0 2 does not lie in 4 x 3 = 12 pixels"),
        (["3 0"], "the run 3 0 does not lie"),
        (["12 2"], "the run 12 2 does not lie"),
        (["1 99999999999999999999999"], "does not lie"),
        (["1 3", "7 1 3 2"], "nucleus 2: the run 3 2 overlaps nucleus 1"),
        (["1 3 3 1"], "nucleus 1: the run 3 1 overlaps nucleus 1"),
    ],
)
def test_runs_that_are_wrong(rows, message):
    with pytest.raises(ValueError, match=message):
        from_runs(rows, (3, 4))
