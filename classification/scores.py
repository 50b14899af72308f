"""How well a classifier did: an interval, a confusion matrix, heat maps, and which pictures are worth looking at.

from classification import confusion_matrix, wilson

wilson(145, 153)                              # (0.900, 0.973): what 94.8 % of 153 pictures can mean
confusion_matrix([0, 0, 1], [0, 1, 1], 2)     # [[1, 1], [0, 1]]
"""

import math

import cv2
import numpy as np


def wilson(correct, total, z=1.959964):
    """The 95 % interval of a proportion (Wilson, 1927), which stays within [0, 1] and holds for few pictures."""
    p = correct / total
    centre = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    return max(0.0, centre - half), min(1.0, centre + half)


def confusion_matrix(labels, predictions, num_classes):
    """(num_classes, num_classes) counts; rows are the labels, columns the predictions."""
    counts = np.zeros((num_classes, num_classes), int)
    np.add.at(counts, (np.asarray(labels), np.asarray(predictions)), 1)
    return counts


def format_confusion(counts, classes):
    """Aligned text of a confusion matrix."""
    corner = "label, predicted:"
    width = max(len(corner), *map(len, classes))
    widths = [max(len(name), len(str(column.max()))) for name, column in zip(classes, counts.T, strict=True)]
    lines = [f"{corner:<{width}}  " + "  ".join(f"{name:>{w}}" for name, w in zip(classes, widths, strict=True))]
    for name, row in zip(classes, counts, strict=True):
        lines.append(f"{name:<{width}}  " + "  ".join(f"{count:>{w}}" for count, w in zip(row, widths, strict=True)))
    return "\n".join(lines)


def heat_overlay(picture, heat):
    """(H, W, 3) uint8 and (H, W) from 0 to 1 -> (H, W, 3) uint8: dark where the network did not look."""

    colours = cv2.applyColorMap(np.uint8(255 * heat), cv2.COLORMAP_INFERNO)[..., ::-1]
    return np.uint8(0.45 * picture + 0.55 * colours)


def notable(probabilities, labels, most=48, few=12):
    """{"wrong": indices, "least certain": ..., "most certain": ...}; the last two are right answers.

    probabilities: (N, num_classes); labels: (N,). Wrong answers begin with the most certain of them.
    """
    answers, certainty = probabilities.argmax(1), probabilities.max(1)
    wrong, right = np.flatnonzero(answers != labels), np.flatnonzero(answers == labels)
    wrong, right = wrong[np.argsort(-certainty[wrong])], right[np.argsort(certainty[right])]
    return {"wrong": wrong[:most], "least certain": right[:few], "most certain": right[few:][-few:][::-1]}
