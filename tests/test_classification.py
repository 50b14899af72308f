"""Intervals, confusion matrices and the choice of pictures, against values known from elsewhere."""

import numpy as np
import pytest

from classification.scores import confusion_matrix, format_confusion, heat_overlay, notable, wilson


@pytest.mark.parametrize(
    "correct, total, low, high",  # Newcombe, Statistics in Medicine 17, 1998, table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval(correct, total, low, high):
    assert wilson(correct, total) == pytest.approx((low, high), abs=1e-4)
    assert wilson(total - correct, total) == pytest.approx((1 - high, 1 - low), abs=1e-4)


def test_confusion_matrix_counts_and_lines_up():
    counts = confusion_matrix([0, 0, 1, 2, 2, 2], [0, 1, 1, 2, 2, 0], 3)
    assert counts.tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 2]]
    lines = format_confusion(counts * 1000, ["ants", "bees", "a very long class name"]).split("\n")
    assert len(lines) == 4 and len(set(map(len, lines))) == 1
    assert lines[3].split() == ["a", "very", "long", "class", "name", "1000", "0", "2000"]


def test_notable_pictures():
    probabilities = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.55, 0.45], [0.3, 0.7]])
    found = notable(probabilities, np.array([0, 1, 0, 0, 1]), few=1)
    assert {key: list(value) for key, value in found.items()} == {
        "wrong": [2, 1],
        "least certain": [3],
        "most certain": [0],
    }


def test_heat_darkens_what_was_not_looked_at():
    heat = np.zeros((4, 4), np.float32)
    heat[1, 1] = 1
    overlay = heat_overlay(np.full((4, 4, 3), 200, np.uint8), heat)
    assert overlay.shape == (4, 4, 3) and overlay.dtype == np.uint8
    assert overlay[1, 1].sum() > overlay[0, 0].sum()
