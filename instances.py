"""Individual nuclei: from label maps to what a network learns, and back; matching, the official score and run lengths.

    learned = targets(labels)                 # (3, H, W) float32: MAPS = mask, contact, distance
    labels = nuclei(maps, **DEFAULTS)         # (3, H, W) float in [0, 1] -> (H, W) int32
    result = judge(labels, true_labels)       # what was found, missed, false, merged or split
    summarise([result, ...])                  # {"official": 0.61, "ap50": 0.84, ...}; keys as in DEFINITIONS

A label map is (H, W) int32: 0 is background, 1 ... n are the nuclei. Numbers may be missing, as in a crop; use
`sequential` where they must not be. Truth is never relabelled by connected components, which would merge touching
nuclei.
"""

from typing import NamedTuple

import numpy as np
from scipy import ndimage
from skimage.segmentation import watershed

MAPS = ("mask", "contact", "distance")  # the channels of targets and of what a network predicts
REACH = (2000, 300, 1)  # smallest area of nuclei whose contact band reaches 3, 2 and 1 pixels
DEFAULTS = {  # of `nuclei`; keys of config.yml. Chosen on training pictures: docs/RESULTS.md
    "mask_threshold": 0.6,
    "contact_threshold": 0.2,
    "distance_threshold": 0.3,
    "seed_threshold": 0.5,
    "smallest": 40,  # pixels that the network sees, where the typical nucleus has 380
    "smoothing": 1.0,  # of these pixels
}
TWENTIETHS = np.arange(10, 20)  # thresholds 0.50, 0.55 ... 0.95 of IoU, as k / 20, so that integers are compared
NONE, FOUND, MISSED, FALSE, MERGED, SPLIT = range(6)
KINDS = ("none", "found", "missed", "false", "merged", "split")

DEFINITIONS = {
    "official": "Data Science Bowl 2018: TP / (TP + FP + FN) of an image at IoU > 0.50, 0.55 ... 0.95, mean over the "
    "thresholds, then over images; an image without true nuclei scores 1 if none is predicted, else 0",
    "ap": "TP / (TP + FP + FN) of an image at each of these thresholds, mean over images",
    "ap50": "ap at IoU > 0.5",
    "f1": "2 TP / (2 TP + FP + FN) at IoU > 0.5, of all images together; 1 without any nuclei",
    "pq": "panoptic quality: sum of the IoU of matched nuclei / (TP + FP / 2 + FN / 2), of all images together",
    "predicted": "number of predicted nuclei",
    "true": "number of true nuclei",
    "count_error": "|predicted - true| / max(true, 1) nuclei of an image, median over images",
    "merges": "predicted nuclei that cover more than half of each of two or more true nuclei",
    "splits": "true nuclei that contain more than half of each of two or more predicted nuclei",
    "missed": "true nuclei that are not found at IoU > 0.5 and are in no merge or split",
    "false": "predicted nuclei that match no true nucleus at IoU > 0.5 and are in no merge or split",
}


# ---------------------------------------------------------------- label maps


def sequential(labels):
    """Label map of any integers >= 0 -> (H, W) int32 with the numbers 0 ... n in the same order and none missing."""
    if labels.max(initial=0) > labels.size:  # a table with a row for each number would outgrow the picture
        values, inverse = np.unique(labels, return_inverse=True)
        labels = inverse.reshape(labels.shape) + int(values[0] > 0)
    present = areas(labels) > 0
    present[0] = False
    return np.cumsum(present, dtype=np.int32)[labels]


def areas(labels):
    """Label map -> (n + 1,) int64: pixels of the background and of each label."""
    return count_values(labels, int(labels.max(initial=0)) + 1)


def count_values(array, length, rows=256):
    """(H, ...) integers in [0, length) -> (length,) int64: how often each value occurs.

    A few rows at a time, because np.bincount copies what it counts to 64 bits.
    """
    counts = np.zeros(length, np.int64)
    for first in range(0, len(array), rows):
        counts += np.bincount(array[first : first + rows].ravel(), minlength=length)
    return counts


# ---------------------------------------------------------------- label map -> targets


def targets(labels):
    """Label map, after augmentation -> (3, H, W) float32 in [0, 1], what the network learns; channels as in MAPS."""
    return np.stack([labels > 0, contact_band(labels), relative_distance(labels)]).astype(np.float32)


def contact_band(labels):
    """Label map -> (H, W) bool: pixels within reach of two or more nuclei.

    A nucleus reaches 1, 2 or 3 pixels (also diagonally) from its edge, as REACH says for its area: a band of 3 pixels
    would erase the smallest nuclei.
    """
    area = areas(labels)[labels]
    both = np.stack([labels, upside_down(labels)])
    reach = np.zeros_like(both)
    for smallest in REACH:
        reach = np.maximum(reach, np.where(area >= smallest, both, 0))
        reach = ndimage.maximum_filter(reach, (1, 3, 3))
    return (reach[0] > 0) & (reach.sum(0) != labels.max(initial=0) + 1)


def upside_down(labels):
    """Label map -> the same with the numbers n ... 1, so that a maximum finds the smallest label and skips background.

    Where the largest label near a pixel and the largest of these add up to n + 1, only one label is near.
    """
    return np.where(labels > 0, labels.max(initial=0) + 1 - labels, 0)


def relative_distance(labels):
    """Label map -> (H, W) float32: distance to the edge of the pixel's nucleus / the largest one in it; 0 outside.

    Distances are Euclidean, to the nearest pixel that is not of this nucleus. The border of the picture is no edge, so
    that a nucleus looks the same in two crops.
    """
    distance = np.zeros(labels.shape, np.float32)
    for label, box in enumerate(ndimage.find_objects(labels), 1):
        if box is None:
            continue
        wider = tuple(slice(max(side.start - 1, 0), side.stop + 1) for side in box)
        inside = labels[wider] == label
        depth = np.ones(inside.shape) if inside.all() else ndimage.distance_transform_edt(inside)
        distance[wider][inside] = (depth / depth.max())[inside]
    return distance


# ---------------------------------------------------------------- maps -> label map


def nuclei(maps, mask_threshold, contact_threshold, distance_threshold, seed_threshold, smallest, smoothing):
    """(3, H, W) float in [0, 1], channels as in MAPS -> (H, W) int32 label map, 0 ... n. Call it with **DEFAULTS.

    The mask is smoothed by a Gaussian with a standard deviation of `smoothing` pixels, which rounds off ragged
    outlines; foreground is where the result is above mask_threshold. Seeds are the connected regions of foreground with
    a contact of at most contact_threshold and a distance of at least distance_threshold, provided that the distance
    reaches seed_threshold somewhere in the region. contact_threshold 1 ignores the contact; 0 for the other two ignores
    the distance. A watershed grows the seeds over the whole foreground; they meet where contact is high and distance
    low. Nuclei of fewer than `smallest` pixels are dropped, and holes inside a nucleus are filled.

    On true maps of the 2018 Data Science Bowl, seeds from the contact alone are better; on maps that are blurred and
    noisy, as a network predicts them, seeds from both are.
    """
    mask, contact, distance = maps
    foreground = ndimage.gaussian_filter(mask, smoothing) > mask_threshold
    centres = foreground & (contact <= contact_threshold) & (distance >= distance_threshold)
    seeds = find_seeds(foreground, centres, distance, seed_threshold)
    labels = watershed(contact - distance, seeds, mask=foreground)
    return sequential(fill_holes(drop_small(labels, smallest)))


def find_seeds(foreground, centres, distance, seed_threshold):
    """(H, W) bool, bool and float -> (H, W) int32: a number for each connected part of the centres that is a seed.

    In a seed, distance reaches seed_threshold somewhere; a part where it does not is a splinter of another nucleus. A
    connected part of the foreground that contains no seed becomes a seed as a whole.
    """
    seeds, count = ndimage.label(centres)
    highest = np.zeros(count + 1, distance.dtype)
    np.maximum.at(highest, seeds, distance)
    seeds[highest[seeds] < seed_threshold] = 0
    parts, part_count = ndimage.label(foreground)
    alone = np.ones(part_count + 1, bool)
    alone[parts[seeds > 0]] = False
    alone[0] = False
    return np.where(alone[parts], parts + count, seeds)


def drop_small(labels, smallest):
    """Label map -> the same without the labels of less than `smallest` pixels."""
    return np.where(areas(labels)[labels] < smallest, 0, labels)


def fill_holes(labels):
    """Label map -> the same with each hole filled that lies within one nucleus. A hole that two nuclei share stays."""
    holes, count = ndimage.label(labels == 0)

    def highest_beside(values):
        highest = np.zeros(count + 1, values.dtype)
        np.maximum.at(highest, holes, ndimage.maximum_filter(values, footprint=ndimage.generate_binary_structure(2, 1)))
        return highest

    label = highest_beside(labels)
    within_one = label + highest_beside(upside_down(labels)) == labels.max(initial=0) + 1
    for line in (holes[0], holes[-1], holes[:, 0], holes[:, -1]):
        within_one[line] = False
    return np.where((labels == 0) & within_one[holes], label[holes], labels)


# ---------------------------------------------------------------- matching


class Match(NamedTuple):
    """The overlaps of a predicted and a true label map."""

    predicted_areas: np.ndarray  # (n + 1,) int64 pixels of each predicted label, 0 where the number is missing
    true_areas: np.ndarray  # (m + 1,) int64
    predicted: np.ndarray  # (pairs,) the predicted label of each pair that overlaps
    true: np.ndarray  # (pairs,) the true label
    intersection: np.ndarray  # (pairs,) int64 pixels

    @property
    def union(self):
        return self.predicted_areas[self.predicted] + self.true_areas[self.true] - self.intersection


def match(predicted, true):
    """Two label maps of one shape -> Match. ValueError if the shapes differ."""
    if predicted.shape != true.shape:
        raise ValueError(f"predicted labels {predicted.shape} and true labels {true.shape} differ in shape")
    both = (predicted > 0) & (true > 0)
    predicted_areas, true_areas = areas(predicted), areas(true)
    keys = true[both].astype(np.int64) * len(predicted_areas) + predicted[both]
    pairs, intersection = np.unique(keys, return_counts=True)  # pairs that meet, never a table of all with all
    return Match(predicted_areas, true_areas, pairs % len(predicted_areas), pairs // len(predicted_areas), intersection)


class Result(NamedTuple):
    """What `judge` says about one image."""

    counts: np.ndarray  # (10, 3) int64: TP, FP, FN at IoU > 0.50, 0.55 ... 0.95
    matched_iou: float  # sum of the IoU of the TP at 0.5
    merges: int
    splits: int
    predicted_kinds: np.ndarray  # (n + 1,) uint8, an index into KINDS for each label: FOUND, FALSE, MERGED or SPLIT
    true_kinds: np.ndarray  # (m + 1,) uint8: FOUND, MISSED, MERGED or SPLIT; NONE where a number is missing


def judge(predicted, true):
    """Two label maps of one shape -> Result, by the definitions in DEFINITIONS.

    FOUND are the TP at 0.5, and nothing else: a nucleus that is found is not called merged or split, too. MERGED are a
    predicted nucleus that covers more than half of two or more true ones, and these true ones; SPLIT are a true nucleus
    that contains more than half of two or more predicted ones, and these predicted ones. The rest is FALSE or MISSED.
    """
    pairs = match(predicted, true)
    matched = 20 * pairs.intersection[:, None] > TWENTIETHS * pairs.union[:, None]  # (pairs, 10)
    found = matched[:, 0]  # above 0.5, a nucleus is in one pair at most
    covered = 2 * pairs.intersection > pairs.true_areas[pairs.true]
    inside = 2 * pairs.intersection > pairs.predicted_areas[pairs.predicted]
    merging = np.bincount(pairs.predicted[covered], minlength=len(pairs.predicted_areas)) > 1  # of each predicted label
    splitting = np.bincount(pairs.true[inside], minlength=len(pairs.true_areas)) > 1  # of each true label
    merged, split = covered & merging[pairs.predicted], inside & splitting[pairs.true]

    def kinds(own_areas, labels, otherwise):
        kind = np.where(own_areas > 0, otherwise, NONE).astype(np.uint8)
        kind[0] = NONE
        kind[labels[split]] = SPLIT
        kind[labels[merged]] = MERGED
        kind[labels[found]] = FOUND
        return kind

    tp, count, true_count = matched.sum(0), (pairs.predicted_areas[1:] > 0).sum(), (pairs.true_areas[1:] > 0).sum()
    return Result(
        counts=np.stack([tp, count - tp, true_count - tp], axis=1),
        matched_iou=float((pairs.intersection[found] / pairs.union[found]).sum()),
        merges=int(merging.sum()),
        splits=int(splitting.sum()),
        predicted_kinds=kinds(pairs.predicted_areas, pairs.predicted, FALSE),
        true_kinds=kinds(pairs.true_areas, pairs.true, MISSED),
    )


# ---------------------------------------------------------------- scores of many images


def precision(counts):
    """TP, FP, FN (..., 3) -> (...) float64: TP / (TP + FP + FN), and 1 where nothing is true and nothing predicted."""
    total = counts.sum(-1)
    return np.where(total == 0, 1.0, counts[..., 0] / np.maximum(total, 1))


def official_scores(results):
    """Results of images -> (images,) float64, the official score of each."""
    return precision(np.array([result.counts for result in results])).mean(-1)


def summarise(results):
    """Results of one or more images -> {name: number}; keys as in DEFINITIONS, "ap" a list of ten."""
    table = np.array([result.counts for result in results])  # (images, 10, 3)
    tp, fp, fn = (int(count) for count in table[:, 0].sum(0))
    predicted, true = table[:, 0, :2].sum(-1), table[:, 0, ::2].sum(-1)  # nuclei of each image
    ap, nothing = precision(table).mean(0), tp + fp + fn == 0
    return {
        "official": float(ap.mean()),
        "ap": ap.tolist(),
        "ap50": float(ap[0]),
        "f1": 1.0 if nothing else 2 * tp / (2 * tp + fp + fn),
        "pq": 1.0 if nothing else sum(result.matched_iou for result in results) / (tp + (fp + fn) / 2),
        "predicted": tp + fp,
        "true": tp + fn,
        "count_error": float(np.median(np.abs(predicted - true) / np.maximum(true, 1))),
        "merges": sum(result.merges for result in results),
        "splits": sum(result.splits for result in results),
        "missed": sum(int((result.true_kinds == MISSED).sum()) for result in results),
        "false": sum(int((result.predicted_kinds == FALSE).sum()) for result in results),
    }


def bootstrap_interval(scores, groups=None, resamples=10_000, level=0.95, seed=0):
    """Percentile interval of the mean score when images are drawn with replacement -> (low, high); Efron 1979.

    scores: (images,) float. groups: (images,) labels; whole groups are drawn then, since look-alikes are not
    independent of one another, and a draw's mean is that of all its images.
    """
    scores = np.asarray(scores, float)
    names = np.arange(len(scores)) if groups is None else np.unique(groups, return_inverse=True)[1]
    sums, sizes = np.bincount(names, scores), np.bincount(names)
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=resamples)
    tail = (1 - level) / 2
    low, high = np.quantile(draws @ sums / (draws @ sizes), [tail, 1 - tail])
    return float(low), float(high)


# ---------------------------------------------------------------- run lengths


def to_runs(labels):
    """Label map -> [str, ...], the runs "start length start length ..." of each label that there is, in their order.

    The format of the Data Science Bowl: pixels are numbered from 1, down the columns, from left to right.
    """
    pixels = np.concatenate([[0], labels.T.ravel(), [0]])  # a background pixel on either side closes the runs
    changes = np.flatnonzero(pixels[1:] != pixels[:-1])
    starts, stops, owners = changes[:-1], changes[1:], pixels[1:][changes[:-1]]
    runs = {label: [] for label in np.unique(owners[owners > 0]).tolist()}
    for start, stop, label in zip(starts.tolist(), stops.tolist(), owners.tolist(), strict=True):
        if label:
            runs[label].append(f"{start + 1} {stop - start}")
    return [" ".join(of_label) for of_label in runs.values()]


def from_runs(rows, shape):
    """[str, ...], one for each nucleus, as `to_runs` writes them -> (H, W) int32 labels 1 ... len(rows); shape (H, W).

    An empty text is no nucleus. Raises ValueError, naming the row from 1, for text that is no list of pairs of positive
    integers, runs beyond the picture, and pixels that belong to two nuclei.
    """
    height, width = shape
    pixels = np.zeros(height * width, np.int32)
    label = 0
    for number, text in enumerate(rows, 1):
        values = text.split()
        if not values:
            continue
        if len(values) % 2 or not all(value.isascii() and value.isdigit() for value in values):
            raise ValueError(f"nucleus {number}: expected pairs `start length` of integers, found {shorten(text)}")
        label += 1
        runs = [int(value) for value in values]
        for start, length in zip(runs[::2], runs[1::2], strict=True):
            stop = start - 1 + length
            if start < 1 or length < 1 or stop > pixels.size:
                raise ValueError(
                    f"nucleus {number}: the run {start} {length} does not lie in {width} x {height} = "
                    f"{pixels.size} pixels, which are numbered from 1"
                )
            if taken := int(pixels[start - 1 : stop].max()):
                raise ValueError(f"nucleus {number}: the run {start} {length} overlaps nucleus {taken}")
            pixels[start - 1 : stop] = label
    return pixels.reshape(width, height).T.copy()


def shorten(text):
    return repr(text if len(text) <= 40 else f"{text[:37]}...")
