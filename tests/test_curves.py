"""Curves of a training: the best epoch, one panel per pair of columns, the scale of the learning rate.

python -m pytest -q tests/test_curves.py
"""

import cv2
import pytest

from common.curves import plot_curves


def read_png(path):
    return cv2.imread(str(path), cv2.IMREAD_COLOR)[..., ::-1]


@pytest.mark.parametrize("epochs", [1, 40])
def test_plot_curves(tmp_path, epochs):
    names = ("epoch", "lr", "loss", "iou", "val_loss", "val_iou", "seconds")
    rows = [dict(zip(names, (e, 10.0**-e, 1 / e, 0.5, 2 / e, e / 99, 0.1), strict=True)) for e in range(1, epochs + 1)]
    path = tmp_path / "curves.png"
    plot_curves(rows, path, "a_run_$with_dollars")
    assert read_png(path).std() > 5
    assert [file.name for file in tmp_path.iterdir()] == ["curves.png"]


@pytest.fixture
def drawn(monkeypatch):
    """The matplotlib figures that were saved."""
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
    return figures


def test_plot_curves_marks_the_best_epoch(tmp_path, drawn):
    scores = [(1, 0.5, 0.6), (2, 0.6, 0.9), (3, 0.7, 0.9), (4, 0.8, float("nan"))]
    rows = [{"epoch": epoch, "lr": 0.1, "acc": acc, "val_acc": val_acc} for epoch, acc, val_acc in scores]
    plot_curves(rows, tmp_path / "curves.png", "run")
    axis, _ = drawn[0].axes
    assert axis.get_title() == "accuracy"
    assert axis.get_legend().get_texts()[-1].get_text() == "best 0.9000, epoch 3"  # on a tie the later


@pytest.mark.parametrize(("last", "scale"), [(0.02, "linear"), (0.0001, "log"), (0, "linear")])
def test_plot_curves_panels_and_scale_of_the_learning_rate(tmp_path, drawn, last, scale):
    rows = [{"epoch": e, "lr": lr, "loss": 1, "val_loss": 2} for e, lr in ((1, 0.1), (2, last))]
    plot_curves(rows, tmp_path / "curves.png", "run")
    loss, rate = drawn[0].axes
    assert (loss.get_title(), rate.get_title(), rate.get_yscale()) == ("loss", "learning rate", scale)
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["training", "validation"]  # no best loss
