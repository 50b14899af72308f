"""The curves of a training, one PNG with a panel for each pair of columns of its log; and what all figures share.

plot_curves(rows, "curves.png", "run1")     # rows: those of log.csv
"""

import numpy as np

from common.files import atomic_path
from common.report import BLUE, VERMILION

PANEL_TITLES = {"lr": "learning rate", "iou": "IoU", "acc": "accuracy", "official": "official score"}


def plot_curves(rows, path, title):
    """Write the curves of a run as one PNG: a panel for each pair of columns (x, val_x) and one for lr.

    rows: the rows of log.csv as dicts of numbers: `epoch`, pairs such as (loss, val_loss) and (iou, val_iou), and `lr`.
    The best validation epoch is marked in every panel but those of losses.
    """
    from matplotlib.figure import Figure

    columns = {name: np.array([row[name] for row in rows], float) for name in rows[0]}
    names = [name for name in columns if f"val_{name}" in columns]
    widths = [*[1.8] * len(names), 1]
    figure = Figure(figsize=(2.5 * sum(widths), 3.6), dpi=120, layout="constrained")
    *axes, last = figure.subplots(1, len(widths), width_ratios=widths)
    epochs = columns["epoch"]
    for axis, name in zip(axes, names, strict=True):
        _draw_pair(axis, epochs, columns[name], columns[f"val_{name}"], mark_best="loss" not in name)
        _label_axis(axis, epochs, PANEL_TITLES.get(name, name))
    _draw_learning_rate(last, epochs, columns["lr"])
    _label_axis(last, epochs, PANEL_TITLES["lr"])
    figure.suptitle(title, fontsize=11, parse_math=False)
    save_figure(figure, path)


def fractions(*colours):
    """(red, green, blue) in [0, 255] each -> the same in [0, 1], as matplotlib takes them."""
    return [[channel / 255 for channel in colour] for colour in colours]


def style_axis(axis, grid="both"):
    """Small numbers, a light grid behind the data, no frame at the top and right. grid: "x", "y", "both" or None."""
    axis.tick_params(labelsize=8)
    if grid:
        axis.grid(axis=grid, color="#ddd", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def save_figure(figure, path):
    """Write a matplotlib Figure as PNG, whole or not at all."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def _marker(epochs):
    return "o" if len(epochs) < 15 else ""  # a line through a single epoch would be invisible


def _draw_learning_rate(axis, epochs, rates):
    axis.plot(epochs, rates, color="#666", marker=_marker(epochs), markersize=3)
    if rates.min() > 0 and rates.max() / rates.min() > 30:
        axis.set_yscale("log")


def _draw_pair(axis, epochs, train, valid, mark_best):
    """Training and validation curves of one quantity; with `mark_best`, a star at the highest validation value."""
    train_colour, valid_colour = fractions(BLUE, VERMILION)
    axis.plot(epochs, train, color=train_colour, label="training", marker=_marker(epochs), markersize=3)
    axis.plot(epochs, valid, color=valid_colour, label="validation", marker=_marker(epochs), markersize=3)
    if mark_best and np.isfinite(valid).any():
        best = len(valid) - 1 - np.nanargmax(valid[::-1])  # on a tie the last
        axis.plot(epochs[best], valid[best], "*", color=valid_colour, markersize=13, markeredgecolor="white")
        axis.axvline(epochs[best], color=valid_colour, linewidth=0.8, linestyle=":", zorder=0)
        axis.plot([], [], " ", label=f"best {valid[best]:.4f}, epoch {epochs[best]:.0f}")
    axis.legend(frameon=False, fontsize=8)


def _label_axis(axis, epochs, title):
    from matplotlib.ticker import MaxNLocator

    axis.set_title(title, fontsize=10)
    axis.set_xlabel("epoch", fontsize=9)
    axis.set_xlim(epochs.min() - 0.5, epochs.max() + 0.5)
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    style_axis(axis)
