"""Outlines of numbered objects on a picture, in the caller's colours or in colours that differ between neighbours.

    drawn = draw_outlines(image, labels, distinct_colours(labels))     # (H, W, 3) uint8
    polygons(labels)                                                   # {1: [(n, 2) x and y, ...], ...}

labels is (H, W) of whole numbers, 0 background, 1 ... n the objects. Everything here takes plain arrays.
"""

import cv2
import numpy as np
from scipy import ndimage

from common.report import GREEN, ORANGE, PURPLE, SKY, VERMILION, YELLOW, as_rgb

DISTINCT = (YELLOW, SKY, VERMILION, GREEN, PURPLE, ORANGE)  # all of the palette that is seen on black
NEAR = 4  # pixels: objects that are as close as this get different colours


def draw_outlines(image, labels, colours, width=1):
    """An image with the outermost `width` pixels of each object in its colour -> (H, W, 3) uint8.

    The background beside them is darkened, so that light colours are seen on light pictures, too.
    image: HW or HWC uint8. colours: (n + 1, 3) uint8, one per label; that of 0 is not used.
    """
    drawn = as_rgb(image).copy()
    line = edges(labels, width)
    rim = line & (labels == 0)
    drawn[rim] //= 2
    line &= labels > 0
    drawn[line] = colours[labels[line]]
    return drawn


def polygons(labels, tolerance=0.7):
    """-> {label: [(n, 2) int32 x and y, ...]}, the outside of each part of an object, without holes.

    The corners are centres of the outermost pixels; those that change the line by at most `tolerance` pixels are left
    out.
    """
    found = {}
    for label, box in enumerate(ndimage.find_objects(labels), 1):
        if box is not None:
            mask, corner = (labels[box] == label).astype(np.uint8), (box[1].start, box[0].start)
            lines = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE, offset=corner)[0]
            found[label] = [cv2.approxPolyDP(line, tolerance, True)[:, 0] for line in lines]
    return found


def edges(labels, width=1):
    """-> (H, W) bool: the pixels that are, along a row or column, at most `width` pixels from another label.

    The border of the picture is no edge: where it cuts an object off, the outline is open.
    """
    line = np.zeros(labels.shape, bool)
    for k in range(1, width + 1):
        for first, second in _shifted(labels, k, 0), _shifted(labels, 0, k):
            differ = labels[first] != labels[second]
            line[first] |= differ
            line[second] |= differ
    return line


def _shifted(labels, down, right):
    """Two windows of the array; a pixel of the second is `down` below and `right` of its fellow in the first."""
    height, width = labels.shape
    first = slice(0, max(height - down, 0)), slice(max(-right, 0), max(width - max(right, 0), 0))
    second = slice(down, None), slice(max(right, 0), max(width + min(right, 0), 0))
    return first, second


def distinct_colours(labels):
    """-> (n + 1, 3) uint8, a colour of DISTINCT for each label; objects within about NEAR pixels have different ones.

    An object whose neighbours already have every colour gets the one that the fewest of them have.
    """
    near = neighbours(labels)
    chosen = np.zeros(labels.max(initial=0) + 1, int)
    for label in range(1, len(chosen)):
        taken = [chosen[other] for other in near.get(label, ()) if other < label]
        order = [(label + k) % len(DISTINCT) for k in range(len(DISTINCT))]  # also those that stand alone alternate
        chosen[label] = min(order, key=taken.count)
    return np.array(DISTINCT, np.uint8)[chosen]


def neighbours(labels):
    """-> {label: set of the labels within NEAR pixels of it, seen along rows, columns and diagonals}."""
    near = {}
    for k in range(1, NEAR + 1):
        for first, second in (_shifted(labels, *shift) for shift in ((0, k), (k, 0), (k, k), (k, -k))):
            one, other = labels[first], labels[second]
            meet = (one != other) & (one > 0) & (other > 0)
            for pair in np.unique(np.stack([one[meet], other[meet]], axis=1), axis=0).tolist():
                near.setdefault(pair[0], set()).add(pair[1])
                near.setdefault(pair[1], set()).add(pair[0])
    return near
