"""Which images look alike: a validation image with a twin in training measures memory, not generalisation.

sketches = Sketches(images)                        # (H, W, C) uint8 each
split = grouped_split(ids, sketches, seed=41)      # {"train": ..., "val": ...}, groups of twins stay together

Two images are twins if one of the following holds. Images are compared at 96 x 96 pixels and in integers, so that the
order of additions does not matter and every machine finds the same twins.

identical   The same pixels, also flipped or rotated.
seam        The border of one continues in the other, as in two adjacent crops of one slide. Each border is extrapolated
            by half a pixel from its last two lines. The mismatch of two borders is their squared difference divided by
            the sum of their variances. It must be below 0.15, and below 0.6 times the mismatch with any other image,
            seen from either side.
alike       Similar colour and texture. The features are seven quantiles of each channel, and the mean difference of
            pixels that are 1, 2, 4 and 8 apart, each as 8 sqrt(value). They differ by at most 25 in total.

The thresholds were chosen on the 670 images of the 2018 Data Science Bowl. To print the figures below:
`PYTHONPATH=. python tests/test_lookalikes.py stage1_train.zip`.

Seams: at full size, 530 pairs of borders match (correlation above 0.8, difference below twice that of neighbouring
lines). Of the 446 seams found at 96 x 96, 438 are among them, and 6 of the other 8 come near.
Alike: on contact sheets of random pairs at every distance, pairs up to 37 showed cells of one kind under the same
imaging and nothing else; from 48 on, kinds mix. 25 is on the safe side, and at 37 the groups become too large for a
split. Only 1 of the 961 pairs has different sizes in the raw data, so the size, which is lost when images are resized
to squares, is not needed.
"""

import hashlib
import math
from collections import Counter

import numpy as np

from common.cli import listed
from common.images import squeeze, to_channels

SIDE = 96
SEAM = 0.15  # largest mismatch of two borders
SECOND = 0.6  # and its largest ratio to the second best mismatch
CONTRAST = 288  # smallest sum of squares of a border about its mean: a standard deviation of about 2 grey levels
ALIKE = 25  # largest sum of absolute differences of two looks
QUANTILES = (1, 5, 25, 50, 75, 95, 99)  # per cent
STEPS = (1, 2, 4, 8)  # pixels
BLOCK = 256  # rows of the table of all pairs that are in memory at once
NAMED = 3  # ids in a message
WAYS = {"identical": "the same pixels", "seam": "the next crop of a slide", "alike": "alike in colour and texture"}


class Sketches:
    """What is compared, about 1.3 kB per image: digests (n), looks (n, 25) int16, borders (n, 4, 288) int8.

    The order of the borders is right, left, bottom, top.
    """

    def __init__(self, images=()):
        self.digests, self._looks, self._borders = [], [], []
        for image in images:
            self.add(image)

    def add(self, image):
        """image: (H, W, C) uint8 with 1, 3 or 4 channels. Alpha is ignored."""
        colour = _rgb(image)
        small = squeeze(colour, (SIDE, SIDE))
        self.digests.append(_digest(colour))
        self._looks.append(_look(small))
        self._borders.append(_borders(small))

    def __len__(self):
        return len(self.digests)

    @property
    def looks(self):
        return np.array(self._looks)

    @property
    def borders(self):
        return np.array(self._borders)


def _rgb(image):
    return to_channels(image if image.shape[2] > 1 else image[..., 0], 3)


def _digest(image):
    """16 bytes that are the same for an image and its flips and rotations."""
    turned = [np.rot90(view, turns) for view in (image, image[:, ::-1]) for turns in range(4)]
    texts = (str(view.shape).encode() + np.ascontiguousarray(view).tobytes() for view in turned)
    return min(hashlib.blake2b(text, digest_size=16).digest() for text in texts)


def _look(small):
    """(SIDE, SIDE, 3) uint8 -> (25,) int16: colour and texture. The root weights dark values more, as the eye does."""
    ranks = [SIDE * SIDE * share // 100 for share in QUANTILES]
    colour = []
    for channel in small.reshape(-1, 3).T:
        cumulative = np.bincount(channel, minlength=256).cumsum()
        colour.append(np.searchsorted(cumulative, ranks, side="right"))
    values = small.astype(np.int16)
    texture = []
    for step in STEPS:
        down = np.abs(values[step:] - values[:-step])
        right = np.abs(values[:, step:] - values[:, :-step])
        texture.append(2 * (int(down.sum()) + int(right.sum())) / down.size)  # twice the sum of the two means
    features = np.concatenate([*np.transpose(colour), texture])  # all channels of a quantile side by side
    return np.round(8 * np.sqrt(features)).astype(np.int16)


def _borders(small):
    """(SIDE, SIDE, 3) uint8 -> (4, 3 * SIDE) int8: right, left, bottom, top, extrapolated outwards by half a pixel.

    Values are halved and shifted by 64 to fit an int8.
    """
    values = small.astype(np.int32)
    lines = (
        (values[:, -1], values[:, -2]),
        (values[:, 0], values[:, 1]),
        (values[-1], values[-2]),
        (values[0], values[1]),
    )
    borders = []
    for last, inner in lines:
        outside = np.clip((3 * last - inner) // 2, 0, 255)
        borders.append(outside.ravel() // 2 - 64)
    return np.array(borders, np.int8)


# ---------------------------------------------------------------- pairs


def seams(borders):
    """Sketches.borders -> [(i, j), ...]: image j continues where image i ends, to the right or below."""
    right, left, bottom, top = (borders[:, side] for side in range(4))
    return _matches(right, left) + _matches(bottom, top)


def _matches(ends, starts):
    """(n, 3 * SIDE) int8 twice -> pairs (i, j) whose end and start fit each other clearly better than any other.

    Sums of products stay below 2^24, where float32 is exact whatever the order of additions.
    """
    count = len(ends)
    ends, starts = ends.astype(np.float32), starts.astype(np.float32)
    (square_e, spread_e), (square_s, spread_s) = _squares(ends), _squares(starts)
    rows, columns = np.full((count, 2), np.inf), np.full((2, count), np.inf)  # the two smallest mismatches
    partner = np.zeros(count, int)
    for first in range(0, count, BLOCK):
        block = slice(first, min(first + BLOCK, count))
        differences = square_e[block, None] + square_s - 2.0 * (ends[block] @ starts.T)
        mismatch = differences / np.maximum(spread_e[block, None] + spread_s, 1)
        mismatch[:, spread_s < CONTRAST] = np.inf
        mismatch[spread_e[block] < CONTRAST] = np.inf
        mismatch[np.arange(len(mismatch)), np.arange(block.start, block.stop)] = np.inf
        partner[block] = mismatch.argmin(1)
        rows[block] = np.partition(mismatch, 1, axis=1)[:, :2] if count > 1 else np.inf
        columns = np.sort(np.concatenate([columns, mismatch]), axis=0)[:2]
    best = rows[:, 0]
    fits = (best < SEAM) & (best < SECOND * rows[:, 1])
    fits &= (best == columns[0, partner]) & (best < SECOND * columns[1, partner])
    return [(int(i), int(partner[i])) for i in np.flatnonzero(fits)]


def _squares(lines):
    """Sum of squares of each line, and sum of squares about the mean of each channel."""
    channels = lines.astype(np.float64).reshape(len(lines), SIDE, 3)
    squares = (channels**2).sum((1, 2))
    return squares, squares - (channels.sum(1) ** 2).sum(1) / SIDE


def _distances(looks, others):
    """(b, 25), (n, 25) int16 -> (b, n) int32: sums of absolute differences."""
    total = np.zeros((len(looks), len(others)), np.int32)
    for one, other in zip(looks.T, others.T, strict=True):
        total += np.abs(one[:, None] - other)
    return total


def twins(sketches, train, val):
    """Twins of validation images in training: {"identical": {validation id: training id}, "seam": ..., "alike": ...}.

    sketches: those of the training images, then those of the validation images. train, val: their ids.
    Each validation image appears at most once: identical comes before seam, seam before alike. Of several training
    images that are alike, the nearest is its twin.
    """
    found, first_val = {}, len(train)  # found: {position: (way, position of the twin)}; stronger ways replace weaker
    for first in range(first_val, len(sketches), BLOCK):
        distances = _distances(sketches.looks[first : first + BLOCK], sketches.looks[:first_val])
        for v, row in enumerate(distances, first):
            nearest = int(row.argmin())
            if row[nearest] <= ALIKE:
                found[v] = "alike", nearest
    for pair in seams(sketches.borders):
        t, v = sorted(pair)
        if t < first_val <= v:
            found[v] = "seam", t
    training = {digest: t for t, digest in enumerate(sketches.digests[:first_val])}
    for v, digest in enumerate(sketches.digests[first_val:], first_val):
        if digest in training:
            found[v] = "identical", training[digest]
    by_way = {way: {} for way in WAYS}
    for v, (way, t) in sorted(found.items()):
        by_way[way][val[v - first_val]] = train[t]
    return by_way


# ---------------------------------------------------------------- groups and the split


def groups(sketches):
    """(n,) int: twins, and twins of twins, have the same label, the index of their first image."""
    labels = np.arange(len(sketches))

    def join(members):
        if (labels[members] != labels[members[0]]).any():
            together = np.unique(labels[members])
            labels[np.isin(labels, together)] = together[0]

    for first in range(0, len(sketches), BLOCK):
        for row in _distances(sketches.looks[first : first + BLOCK], sketches.looks) <= ALIKE:
            join(np.flatnonzero(row))  # the image itself is among them
    for pair in seams(sketches.borders):
        join(list(pair))
    first_of = {}
    for k, digest in enumerate(sketches.digests):
        join([first_of.setdefault(digest, k), k])
    return labels


def kind(image):
    """The kind of a picture, (H, W, C) uint8 -> "dark grey", "bright coloured" and so on; see kind_of.

    Of the 670 images of the 2018 Data Science Bowl, at their own sizes, 546 are dark grey, 108 bright coloured and 16
    bright grey.
    """
    return kind_of(_look(squeeze(_rgb(image), (SIDE, SIDE))))


def kind_of(look):
    """Dark or bright by the median, and grey or coloured by the largest distance between the channels' quantiles."""
    quantiles = look[: 3 * len(QUANTILES)].reshape(-1, 3)
    bright = quantiles[QUANTILES.index(50)].max() >= 80  # 8 sqrt(100)
    coloured = (quantiles.max(1) - quantiles.min(1)).max() >= 12
    return f"{'bright' if bright else 'dark'} {'coloured' if coloured else 'grey'}"


def grouped_split(ids, sketches, seed):
    """{"train": ids, "val": ids}: a fifth for validation, no group split, each kind on both sides where groups allow.

    ids: sorted, in the order of the sketches. The seed alone determines the order in which groups are drawn.
    Raises ValueError if the groups are too large for a validation part of 10 to 30 %.
    """
    labels, kinds = groups(sketches), [kind_of(look) for look in sketches.looks]
    members = {int(label): np.flatnonzero(labels == label).tolist() for label in np.unique(labels)}
    order = np.random.RandomState(seed).permutation(sorted(members)).tolist()
    of_kind = {kind: [label for label in order if kinds[label] == kind] for kind in sorted(set(kinds))}
    size = {label: len(images) for label, images in members.items()}
    held, chosen = Counter(), set()  # validation images of each kind, and their groups

    def take(kind, candidates, most, most_in_all):
        """Choose the groups that fit: at most so many images of the kind, and so many in total."""
        for label in candidates:
            fits = held[kind] + size[label] <= most and held.total() + size[label] <= most_in_all
            if fits and label not in chosen:
                chosen.add(label)
                held[kind] += size[label]

    for kind, labels in of_kind.items():
        count = sum(size[label] for label in labels)
        take(kind, labels, count // 5, len(ids))
        if not held[kind]:
            take(kind, sorted(labels, key=size.get)[:1], count // 2, math.ceil(len(ids) / 5))
    for kind, labels in of_kind.items():  # fill up to a fifth
        take(kind, labels, sum(size[label] for label in labels) // 2, math.ceil(len(ids) / 5))
    val = sorted(k for label in chosen for k in members[label])
    if not len(ids) / 10 <= len(val) <= len(ids) * 3 / 10:
        largest = max(map(len, members.values()))
        raise ValueError(
            f"--split grouped: {len(ids)} images fall into {len(members)} group(s) of look-alikes, the largest of "
            f"{largest}; whole groups give {len(val)} validation images, too far from a fifth; take --split random, or "
            "give a --split FILE with your own ids under `train:` and `val:`"
        )
    train = sorted(set(range(len(ids))).difference(val))
    return {"train": [ids[k] for k in train], "val": [ids[k] for k in val]}


def about_groups(labels):
    sizes = np.unique(labels, return_counts=True)[1]
    return f"groups of look-alikes: {len(sizes)}, the largest has {sizes.max()} images"


def about_twins(found, validated):
    """One line on what `twins` found. validated: the number of validation images."""
    ids = [img_id for of_way in found.values() for img_id in of_way]
    if not ids:
        return "look-alikes: no validation image has a twin in training"
    counts = ", ".join(f"{len(found[way])} {words}" for way, words in WAYS.items() if found[way])
    return (
        f"look-alikes: {len(ids)} of {validated} validation images have a twin in training ({counts}), listed in "
        f"split.yml: {listed(ids, NAMED)}; --split grouped keeps twins together"
    )
