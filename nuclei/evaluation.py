"""How well individual nuclei are found: tables by kind of picture and level, a figure, and outlines of what went wrong.

    judged = [Judged("a", "dark grey", "L4", judge(found, true)), ...]     # instances.judge
    rows = rows_by(judged, "kind")                                        # one dict per kind, and one for all
    draw_precision(rows, "kind", "precision.png")
    panels = panels_of(image, true, found, judged[0].result)              # for report.gallery

instances.py defines every number.
"""

from typing import NamedTuple

import numpy as np

from common import report
from common.files import atomic_path
from common.outlines import draw_outlines
from instances import (
    FALSE,
    FOUND,
    KINDS,
    MERGED,
    MISSED,
    SPLIT,
    TWENTIETHS,
    Result,
    bootstrap_interval,
    official_scores,
    summarise,
)

PRECISION = {f"ap{5 * k}": f"{k / 20:.2f}" for k in TWENTIETHS.tolist()}  # ap50: 0.50 ... ap95: 0.95
COLUMNS = {  # of rows_by: key and heading
    "images": "images",
    "official": "official",
    "interval": "95 %",
    "ap50": "AP50",
    "f1": "F1",
    "pq": "PQ",
    "true": "true",
    "predicted": "predicted",
    "merges": "merges",
    "splits": "splits",
    "missed": "missed",
    "false": "false",
    "count_error": "count error",
}
COLOURS = {  # of an outline
    FOUND: (report.GREEN, "IoU with a true nucleus above 0.5"),
    MISSED: (report.VERMILION, "true nucleus that was not found"),
    FALSE: (report.SKY, "predicted where there is none"),
    MERGED: (report.YELLOW, "one prediction for several true nuclei"),
    SPLIT: (report.PURPLE, "several predictions for one true nucleus"),
}
PANEL = 512  # pixels per side of a drawn picture, at least


class Judged(NamedTuple):
    """One image at one level."""

    img_id: str
    kind: str  # of picture: common.lookalikes.kind
    level: str
    result: Result
    group: str = ""  # of look-alikes, for the bootstrap; empty: the image stands for itself


# ---------------------------------------------------------------- tables


def row_of(judged):
    """One or more Judged of one level -> {column: number}: the keys of COLUMNS, PRECISION, and the interval's ends.

    low, high: 95 % bootstrap interval of the official score over images, or over groups of look-alikes.
    """
    results = [item.result for item in judged]
    scores = summarise(results)
    precision = dict(zip(PRECISION, scores.pop("ap"), strict=True))
    low, high = bootstrap_interval(official_scores(results), [item.group or item.img_id for item in judged])
    interval = {"low": low, "high": high, "interval": f"{low:.3f} to {high:.3f}"}
    return {"images": len(judged), **scores, **precision, **interval}


def rows_by(judged, key):
    """Judged images -> a row for each "kind", most images first, and one for "all"; or for each "level", as they come.

    A row is that of `row_of` and its name under `key`.
    """
    parts = {}
    for item in judged:
        parts.setdefault(getattr(item, key), []).append(item)
    if key == "kind":
        parts = dict(sorted(parts.items(), key=lambda part: -len(part[1])))
        parts["all"] = judged
    return [{key: name, **row_of(items)} for name, items in parts.items()]


def rows_of_images(judged):
    """Judged images of one level -> one row each, for metrics.csv."""
    rows = []
    for item in judged:
        row = row_of([item])
        tp, fp, fn = item.result.counts[0].tolist()
        about = {"img_id": item.img_id, "kind": item.kind, "level": item.level, "tp": tp, "fp": fp, "fn": fn}
        columns = ["official", *PRECISION, "f1", "pq", "true", "predicted", "count_error"]
        mistakes = ["merges", "splits", "missed", "false"]
        rows.append({**about, **{column: row[column] for column in (*columns, *mistakes)}})
    return rows


# ---------------------------------------------------------------- the figure


def draw_precision(rows, key, path):
    """One PNG: TP / (TP + FP + FN) at each threshold of IoU, a line for each row of rows_by(judged, key)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), dpi=120, layout="constrained")
    axis = figure.subplots()
    colours = (report.BLUE, report.VERMILION, report.GREEN, report.ORANGE, report.SKY, report.PURPLE)
    thresholds = TWENTIETHS / 20
    for k, row in enumerate(rows):
        look = {"color": [channel / 255 for channel in colours[k % len(colours)]], "linewidth": 1.5, "markersize": 4}
        if row[key] == "all":
            look.update(color="black", linewidth=2.5)
        label = f"{row[key]}: {row['official']:.3f} (n = {row['images']})"
        axis.plot(thresholds, [row[column] for column in PRECISION], "o-", label=label, **look)
    axis.set_xticks(thresholds, PRECISION.values(), fontsize=8)
    axis.set_ylim(0, 1)
    axis.set_xlabel("threshold of IoU", fontsize=9)
    axis.set_title("precision TP / (TP + FP + FN), mean over images; official score: its mean", fontsize=10)
    axis.legend(frameon=False, fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(color="#ddd", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


# ---------------------------------------------------------------- outlines


def panels_of(image, true, found, result):
    """Three pictures for report.gallery: [(heading, picture), ...].

    image: (H, W, C) uint8. true, found: label maps (H, W). result: of instances.judge.
    """
    shown = report.brighten(image)
    return [
        ("image", image),
        ("truth", outlined(shown, true, result.true_kinds)),
        ("prediction", outlined(shown, found, result.predicted_kinds)),
    ]


def outlined(image, labels, kinds):
    """An image and the outline of each nucleus in the colour of its kind -> (h, w, 3) uint8, enlarged if small.

    kinds: (n + 1,) indices into instances.KINDS, as in a Result.
    """
    zoom = -(-PANEL // max(labels.shape))
    image, labels = (array.repeat(zoom, axis=0).repeat(zoom, axis=1) for array in (image, labels))
    table = np.zeros((len(KINDS), 3), np.uint8)
    for kind, (colour, _) in COLOURS.items():
        table[kind] = colour
    return draw_outlines(image, labels, table[kinds], width=2)


def legend():
    """The meaning of the colours of `outlined`, as a piece of a page."""
    return report.legend_of([(colour, KINDS[kind], meaning) for kind, (colour, meaning) in COLOURS.items()])
