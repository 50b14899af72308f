"""Intervals, confusion matrices and the choice of pictures, against values known from elsewhere."""

import numpy as np
import pytest

from classification.scores import about_rejecting, format_confusion, heat_overlay, notable, print_scores, wilson


@pytest.mark.parametrize(
    "correct, total, low, high",  # Newcombe, Statistics in Medicine 17, 1998, table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval(correct, total, low, high):
    assert wilson(correct, total) == pytest.approx((low, high), abs=1e-4)
    assert wilson(total - correct, total) == pytest.approx((1 - high, 1 - low), abs=1e-4)


def test_accuracy_and_confusion_by_hand(capsys):
    """Rows are labels; the fourth class is in no label and no answer, and has its row and column all the same."""
    labels, answers = np.array([0, 0, 1, 2, 2, 2]), np.array([0, 1, 1, 2, 2, 0])
    rows = [{"epoch": epoch, "val_acc": acc} for epoch, acc in ((1, 0.5), (2, 4 / 6), (3, 4 / 6), (4, 0.5))]
    headline, counts = print_scores(rows, np.eye(4)[answers], labels, ["a", "b", "c", "d"])
    assert counts.tolist() == [[1, 1, 0, 0], [0, 1, 0, 0], [1, 0, 2, 0], [0, 0, 0, 0]]
    low, high = (f"{100 * bound:.1f}" for bound in wilson(4, 6))
    without = "; no validation picture of d"
    assert headline[0] == ("best epoch", "66.7 %", f"epoch 3; 95 % interval {low} to {high} %{without}")
    assert headline[1][:2] == ("last epoch", "50.0 %") and headline[2][:2] == ("pictures", 6)
    said = capsys.readouterr().out
    assert f"best accuracy 66.67 % (95 % interval {low} to {high} %) at epoch 3{without}\n" in said
    assert "last accuracy 50.00 %" in said and format_confusion(counts, ["a", "b", "c", "d"]) + "\n" in said


def test_what_rejecting_does_by_hand():
    probabilities = np.array([[0.95, 0.05], [0.6, 0.4], [0.3, 0.7], [0.01, 0.99], [0.9, 0.1]])
    said = about_rejecting(probabilities, np.array([0, 0, 0, 0, 0]))  # wrong: the third, unsure, and the fourth, sure
    assert said == "--predict with --reject 0.9 would call 1 of 2 wrong answers and 1 of 3 right ones unknown"


def test_a_confusion_matrix_lines_up():
    counts = np.array([[1000, 1000, 0], [0, 1000, 0], [1000, 0, 2000]])
    lines = format_confusion(counts, ["ants", "bees", "a very long class name"]).split("\n")
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
