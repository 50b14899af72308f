"""Which images look alike: a validation image that has a twin in training is scored for its memory, not for its sight.

sketches = Sketches(images)                        # (H, W, C) uint8 each
split = grouped_split(ids, sketches, seed=41)      # {"train": ..., "val": ...}, whole groups of twins on one side

Two images are twins when one of these holds. They are compared at 96 x 96 pixels and in whole numbers, whose sums do
not depend on the order of adding, so that every machine finds the same:

identical   the same pixels, also flipped or turned.
seam        the border of one goes on in the other, as in two crops cut side by side from one slide. A border is carried
            on by half a pixel from its last two lines; the mismatch of two is their squared difference over the sum of
            their variances. It must be below 0.15, and below 0.6 of that with any other image, seen from either side.
alike       colour and texture: seven quantiles of each channel and the mean difference of pixels 1, 2, 4 and 8 apart,
            each as 8 sqrt(value), differ by at most 25 in all.

The thresholds were chosen on the 670 images of the 2018 Data Science Bowl (PYTHONPATH=. python tests/test_lookalikes.py
stage1_train.zip prints these figures). Seams: at full size 530 pairs of borders fit (correlation above 0.8, difference
below twice that of neighbouring lines); of 446 found in the 96 x 96 images 438 are among them, and of the 8 others 6
come near. Alike: contact sheets of random pairs at every distance showed, up to 37, cells of one kind photographed
alike and nothing else; from 48 on kinds mix. 25 is on the safe side, and at 37 the groups grow too large for a split.
Only 1 of the 961 pairs has different sizes in the raw data, so that the size, which squares no longer show, need not be
kept.
"""

import hashlib
import math
from collections import Counter

import numpy as np

from common.images import squeeze, to_channels

SIDE = 96
SEAM, SECOND, CONTRAST = 0.15, 0.6, 288  # mismatch; share of the second best; sum of squares of a border, 2 grey levels
ALIKE = 25
QUANTILES = (1, 5, 25, 50, 75, 95, 99)  # per cent
STEPS = (1, 2, 4, 8)  # pixels
BLOCK = 256  # rows of a table of all pairs that are in memory at once
NAMED = 3
WAYS = {"identical": "the same pixels", "seam": "the next crop of a slide", "alike": "alike in colour and texture"}


class Sketches:
    """What is compared of each image, about 1.3 kB: digests (n), looks (n, 25) int16, borders (n, 4, 288) int8.

    borders: right, left, bottom, top.
    """

    def __init__(self, images=()):
        self.digests, self._looks, self._borders = [], [], []
        for image in images:
            self.add(image)

    def add(self, image):
        """image: (H, W, 1, 3 or 4) uint8; alpha says nothing."""
        colour = to_channels(image if image.shape[2] > 1 else image[..., 0], 3)
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


def _digest(image):
    """The same bytes for an image and its flips and turns."""
    turned = [np.rot90(view, turns) for view in (image, image[:, ::-1]) for turns in range(4)]
    texts = (str(view.shape).encode() + np.ascontiguousarray(view).tobytes() for view in turned)
    return min(hashlib.blake2b(text, digest_size=16).digest() for text in texts)


def _look(small):
    """(SIDE, SIDE, 3) uint8 -> (25,) int16: colour and texture. The root tells more of the dark, as the eye does."""
    ranks, colour = [SIDE * SIDE * share // 100 for share in QUANTILES], []
    for channel in small.reshape(-1, 3).T:
        colour.append(np.searchsorted(np.bincount(channel, minlength=256).cumsum(), ranks, side="right"))
    values, texture = small.astype(np.int16), []
    for step in STEPS:
        down, right = np.abs(values[step:] - values[:-step]), np.abs(values[:, step:] - values[:, :-step])
        texture.append(2 * (int(down.sum()) + int(right.sum())) / down.size)  # twice a sum of two means
    return np.round(8 * np.sqrt(np.concatenate([*np.transpose(colour), texture]))).astype(np.int16)


def _borders(small):
    """(SIDE, SIDE, 3) uint8 -> (4, 3 * SIDE) int8, half the value: right, left, bottom, top, half a pixel outside."""
    values = small.astype(np.int32)
    lines = (
        (values[:, -1], values[:, -2]),
        (values[:, 0], values[:, 1]),
        (values[-1], values[-2]),
        (values[0], values[1]),
    )
    return np.array([np.clip((3 * last - inner) // 2, 0, 255).ravel() // 2 - 64 for last, inner in lines], np.int8)


# ---------------------------------------------------------------- pairs


def seams(borders):
    """Sketches.borders -> [(i, j), ...]: image j goes on where image i ends, to the right or below."""
    return [pair for first in (0, 2) for pair in _matches(borders[:, first], borders[:, first + 1])]


def _matches(ends, starts):
    """(n, 3 * SIDE) int8 twice -> pairs (i, j) whose end and start fit each other and no other as well.

    Sums of products stay below 2^24, where float32 is exact in whatever order they are added.
    """
    count = len(ends)
    ends, starts = ends.astype(np.float32), starts.astype(np.float32)
    (square_e, spread_e), (square_s, spread_s) = _squares(ends), _squares(starts)
    rows, columns = np.full((count, 2), np.inf), np.full((2, count), np.inf)  # the two smallest of each
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
    """Sum of squares of each line, and that about the mean of each channel."""
    channels = lines.astype(np.float64).reshape(len(lines), SIDE, 3)
    squares = (channels**2).sum((1, 2))
    return squares, squares - (channels.sum(1) ** 2).sum(1) / SIDE


def _distances(looks, others):
    """(b, 25), (n, 25) int16 -> (b, n) int32, the sum of absolute differences."""
    total = np.zeros((len(looks), len(others)), np.int32)
    for one, other in zip(looks.T, others.T, strict=True):
        total += np.abs(one[:, None] - other)
    return total


def twins(sketches, train, val):
    """{"identical": {validation id: training id}, "seam": ..., "alike": ...}: a twin of each that has one, by id.

    sketches: of the training images and then the validation images; train, val: their ids. An image stands once, with
    its most telling twin; of those that are alike the nearest.
    """
    found, first_val = {}, len(train)
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
    return {how: {val[v - first_val]: train[t] for v, (way, t) in sorted(found.items()) if way == how} for how in WAYS}


# ---------------------------------------------------------------- groups and the split


def groups(sketches):
    """(n,) int: twins, and twins of twins, share the number of their first image."""
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


def kind_of(look):
    """dark or bright, by the median, and grey or coloured, by how far the channels' quantiles lie apart."""
    quantiles = look[: 3 * len(QUANTILES)].reshape(-1, 3)
    bright = quantiles[QUANTILES.index(50)].max() >= 80  # a value of 100
    coloured = (quantiles.max(1) - quantiles.min(1)).max() >= 12
    return f"{'bright' if bright else 'dark'} {'coloured' if coloured else 'grey'}"


def grouped_split(ids, sketches, seed):
    """{"train": ids, "val": ids}, a fifth to validate, whole groups on one side, each kind on both where groups allow.

    ids: sorted, in the order of the sketches. The groups are drawn in an order that depends on the seed alone. Raises
    ValueError when the groups are too large for a validation part between 10 and 30 %.
    """
    labels, kinds = groups(sketches), [kind_of(look) for look in sketches.looks]
    members = {int(label): np.flatnonzero(labels == label).tolist() for label in np.unique(labels)}
    order = np.random.RandomState(seed).permutation(sorted(members)).tolist()
    of_kind = {kind: [label for label in order if kinds[label] == kind] for kind in sorted(set(kinds))}
    size, held, chosen = {label: len(images) for label, images in members.items()}, Counter(), set()

    def take(kind, candidates, most, most_in_all):
        """Hold those that fit: at most so many images of the kind, and so many in all."""
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
    for kind, labels in of_kind.items():  # what is missing still
        take(kind, labels, sum(size[label] for label in labels) // 2, math.ceil(len(ids) / 5))
    val = sorted(k for label in chosen for k in members[label])
    if not len(ids) / 10 <= len(val) <= len(ids) * 3 / 10:
        largest = max(map(len, members.values()))
        raise ValueError(
            f"--split grouped: {len(ids)} images fall into {len(members)} group(s) of look-alikes, the largest of "
            f"{largest}; whole groups make {len(val)} images to validate, nowhere near a fifth; leave --split out, or "
            "give a --split FILE with ids of your own under `train:` and `val:`"
        )
    train = sorted(set(range(len(ids))).difference(val))
    return {"train": [ids[k] for k in train], "val": [ids[k] for k in val]}


def about_groups(labels):
    sizes = np.unique(labels, return_counts=True)[1]
    return f"groups of look-alikes: {len(sizes)}, the largest of {sizes.max()} images"


def about_twins(found, validated):
    """One line on what `twins` found among so many validation images."""
    ids = [img_id for of_way in found.values() for img_id in of_way]
    if not ids:
        return "look-alikes: no validation image has a twin in training"
    counts = ", ".join(f"{len(found[way])} {words}" for way, words in WAYS.items() if found[way])
    more = f" and {len(ids) - NAMED} more" if len(ids) > NAMED else ""
    return (
        f"look-alikes: {len(ids)} of {validated} validation images have a twin in training ({counts}), listed in "
        f"split.yml: {', '.join(ids[:NAMED])}{more}; --split grouped would keep twins together"
    )
