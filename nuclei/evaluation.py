"""How well individual nuclei are found: tables by kind of picture and level, a figure, and outlines of what went wrong.

    judged = [Judged("a", "dark grey", "L4", judge(found, true)), ...]     # instances.judge
    rows = rows_by(judged, "kind")                                        # one dict per kind, and one for all
    draw_precision(rows, "kind", "precision.png")
    items = gallery_items(dataset, judged, "outputs/nuclei/labels")       # worst, median and best, for report.gallery

instances.py defines every number. evaluation.py writes about masks.
"""

import statistics
from typing import NamedTuple

import numpy as np

from common import report
from common.curves import fractions, save_figure, style_axis
from common.outlines import draw_outlines, polygons
from instances import (
    DEFINITIONS,
    FALSE,
    FOUND,
    KINDS,
    MERGED,
    MISSED,
    SPLIT,
    TWENTIETHS,
    Result,
    bootstrap_interval,
    match,
    official_scores,
    summarise,
)
from labels import MAX_OBJECTS, find_labels, read_labels, write_labels
from nuclei.object_files import write_label_tiff
from run_config import kept_epoch

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
HEADINGS = {"ap": "AP", **COLUMNS}  # of everything in instances.DEFINITIONS
LEVEL_COLUMNS = {"level": "level", "parameters": "parameters", "seconds": "s/picture", **COLUMNS}
LEVELS_NOTE = "Pruned models; each finds its own scale. s/picture: median, for finding the nuclei,"
INTERVAL = "95 % bootstrap interval of the official score; groups of look-alikes are drawn as a whole"
COLOURS = {  # of an outline
    FOUND: (report.GREEN, "IoU with a true nucleus above 0.5"),
    MISSED: (report.VERMILION, "true nucleus that was not found"),
    FALSE: (report.SKY, "predicted where there is none"),
    MERGED: (report.YELLOW, "one prediction for several true nuclei"),
    SPLIT: (report.PURPLE, "several predictions for one true nucleus"),
}
POINT = "Point at a nucleus, or tap it in the enlarged picture, to see its outcome and its best match."
PANEL = 512  # pixels per side of a drawn picture, at least


class Judged(NamedTuple):
    """One image at one level."""

    img_id: str
    kind: str  # of picture: common.lookalikes.kind
    level: str
    result: Result
    group: str = ""  # of look-alikes, for the bootstrap; empty: the image stands for itself
    scale: float = 1.0  # network pixels per pixel of the picture
    seconds: float = 0.0  # for finding its nuclei


# ---------------------------------------------------------------- tables


def scores_of(results):
    """Results of instances.judge -> {column: number}: what instances.summarise says, "ap" as the keys of PRECISION."""
    scores = summarise(results)
    return {**dict(zip(PRECISION, scores.pop("ap"), strict=True)), **scores}


def row_of(judged):
    """One or more Judged of one level -> {column: number}: the keys of COLUMNS and PRECISION, and those below.

    low, high: 95 % bootstrap interval of the official score over images, or over groups of look-alikes; groups: how
    many of these. seconds: median per picture.
    """
    results = [item.result for item in judged]
    groups = [item.group or item.img_id for item in judged]
    low, high = bootstrap_interval(official_scores(results), groups)
    interval = {"low": low, "high": high, "interval": f"{low:.3f} to {high:.3f}", "groups": len(set(groups))}
    seconds = statistics.median(item.seconds for item in judged)
    return {"images": len(judged), **scores_of(results), **interval, "seconds": seconds}


def rows_by(judged, key):
    """Judged images -> a row per "kind", the most frequent first, and one for "all"; or a row per "level", in order.

    A row holds what `row_of` returns and, under `key`, the name of its kind or level.
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
        scores = scores_of([item.result])
        tp, fp, fn = item.result.counts[0].tolist()
        about = {"img_id": item.img_id, "kind": item.kind, "level": item.level, "tp": tp, "fp": fp, "fn": fn}
        columns = ["official", *PRECISION, "f1", "pq", "true", "predicted", "count_error"]
        mistakes = ["merges", "splits", "missed", "false"]
        values = {column: scores[column] for column in (*columns, *mistakes)}
        rows.append({**about, **values, "scale": item.scale, "seconds": item.seconds})
    return rows


def headline_of(row):
    """One line on a row of `rows_by`."""
    interval = f"{row['low']:.4f} to {row['high']:.4f}, 95 % bootstrap over {row['groups']} groups of look-alikes"
    return f"official score {row['official']:.4f} ({interval}), AP50 {row['ap50']:.4f}, F1 {row['f1']:.4f}"


def about_scale_and_time(judged):
    """One line on the scales that were found, and how long that took."""
    low, middle, high = np.percentile([item.scale for item in judged], (0, 50, 100))
    seconds = statistics.median(item.seconds for item in judged)
    return f"scale {middle:.3g} (median; {low:.3g} to {high:.3g}), {seconds:.2f} s per picture (median)"


# ---------------------------------------------------------------- label maps


def write_found(folder, img_id, labels):
    """A label map -> <folder>/<id>.png of 16 bits, or <id>.tif of 32 with more than 65,535 nuclei."""
    folder.mkdir(exist_ok=True)
    if labels.max(initial=0) > MAX_OBJECTS:
        write_label_tiff(folder / f"{img_id}.tif", labels)
    else:
        write_labels(folder / f"{img_id}.png", labels)


def read_found(folder, img_id):
    """The label map that `write_found` wrote."""
    return read_labels(find_labels(folder, img_id))


# ---------------------------------------------------------------- the figure


def draw_precision(rows, key, path):
    """One PNG: TP / (TP + FP + FN) at each threshold of IoU, a line for each row of rows_by(judged, key)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), dpi=120, layout="constrained")
    axis = figure.subplots()
    colours = fractions(report.BLUE, report.VERMILION, report.GREEN, report.ORANGE, report.SKY, report.PURPLE)
    thresholds = TWENTIETHS / 20
    for k, row in enumerate(rows):
        look = {"color": colours[k % len(colours)], "linewidth": 1.5, "markersize": 4}
        if row[key] == "all":
            look.update(color="black", linewidth=2.5)
        label = f"{row[key]}: {row['official']:.3f} (n = {row['images']})"
        axis.plot(thresholds, [row[column] for column in PRECISION], "o-", label=label, **look)
    axis.set_xticks(thresholds, PRECISION.values(), fontsize=8)
    axis.set_ylim(0, 1)
    axis.set_xlabel("threshold of IoU", fontsize=9)
    axis.set_title("precision TP / (TP + FP + FN), mean over images; official score: its mean", fontsize=10)
    axis.legend(frameon=False, fontsize=8)
    style_axis(axis)
    save_figure(figure, path)


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


def enlarged(array):
    """A picture or label map, each pixel repeated until its longer side has at least PANEL of them."""
    zoom = -(-PANEL // max(array.shape[:2]))
    return array.repeat(zoom, axis=0).repeat(zoom, axis=1)


def outlined(image, labels, kinds):
    """An image and the outline of each nucleus in the colour of its kind -> (h, w, 3) uint8, enlarged if small.

    kinds: (n + 1,) indices into instances.KINDS, as in a Result.
    """
    image, labels = enlarged(image), enlarged(labels)
    table = np.zeros((len(KINDS), 3), np.uint8)
    for kind, (colour, _) in COLOURS.items():
        table[kind] = colour
    return draw_outlines(image, labels, table[kinds], width=2)


def regions_of(true, found, result):
    """What each nucleus of `panels_of` says, and where: {"truth": [report.Region, ...], "prediction": [...]}."""
    pairs = match(found, true)
    overlaps = sorted(zip(pairs.intersection / pairs.union, pairs.predicted, pairs.true, strict=True))
    of_true = {t: (iou, f"predicted nucleus {p}") for iou, p, t in overlaps}  # the last one, the best, stays
    of_found = {p: (iou, f"true nucleus {t}") for iou, p, t in overlaps}
    return {
        "truth": _regions("true nucleus", true, pairs.true_areas, result.true_kinds, of_true),
        "prediction": _regions("predicted nucleus", found, pairs.predicted_areas, result.predicted_kinds, of_found),
    }


def _regions(name, labels, areas, kinds, best):
    """best: {label: (IoU, name of the nucleus it overlaps best)}."""
    regions = []
    for label, outlines in polygons(enlarged(labels)).items():
        iou, partner = best.get(label, (0, ""))
        overlap = f"IoU {iou:.3f} with {partner}" if partner else "no overlap"
        text = f"{name} {label}: {KINDS[kinds[label]]}, {areas[label]:,} px, {overlap}"
        regions.append(report.Region(text, outlines, f"{name} {label}", partner))
    return regions


def legend():
    """The meaning of the colours of `outlined`, as a piece of a page."""
    return report.legend_of([(colour, KINDS[kind], meaning) for kind, (colour, meaning) in COLOURS.items()])


# ---------------------------------------------------------------- the report


def gallery_items(dataset, judged, folder):
    """The pictures with the lowest, middle and highest official score, for report.gallery; a kind is a tag.

    dataset: a NucleiDataset; judged: of its pictures, in order, at one level; folder: of their label maps.
    """
    scores = official_scores([item.result for item in judged]).tolist()
    groups = report.worst_to_best([(score, item.img_id) for score, item in zip(scores, judged, strict=True)])
    items = []
    for k, group in groups.items():
        image, true = dataset.arrays(k)
        shown = true[..., 0].astype(np.int32), read_found(folder, judged[k].img_id), judged[k].result
        own = scores_of([judged[k].result])
        counts = {COLUMNS[key]: own[key] for key in ("true", "predicted", "missed", "false", "merges", "splits")}
        item = {"title": judged[k].img_id, "group": group, "tags": [judged[k].kind]}
        item["values"] = {"official": scores[k], **counts, "scale": judged[k].scale}
        items.append({**item, "panels": panels_of(image, *shown), "regions": regions_of(*shown)})
    return items


def write_report(folder, config, what, head, rows, remarks, items, curves, more=()):
    """<folder>/report.html: headline, remarks, tables, definitions, curves, `more` sections, gallery, configuration.

    folder: has precision.png. rows: rows_by kind, the last of them all pictures. items: of gallery_items.
    """
    total = rows[-1]
    headline = [
        ("official score", f"{total['official']:.4f}", f"{head}, {kept_epoch(config)}; 95 % {total['interval']}"),
        ("AP50", f"{total['ap50']:.4f}", "mean over images"),
        ("F1", f"{total['f1']:.4f}", "at IoU > 0.5, all nuclei together"),
        ("count error", f"{100 * total['count_error']:.1f} %", "median over images"),
        ("images", f"{total['images']}", what),
    ]
    means = [{"column": HEADINGS[key], "definition": text} for key, text in DEFINITIONS.items()]
    figure = report.picture(report.file_uri(folder / "precision.png"), "precision at each threshold of IoU, by kind")
    tables = [
        report.table(rows, {"kind": "kind", **COLUMNS}, "kinds of pictures"),
        report.table(rows, {"kind": "kind", **PRECISION}, "AP at each threshold of IoU"),
        report.table([*means, {"column": COLUMNS["interval"], "definition": INTERVAL}]),
    ]
    sections = [
        ("Summary", report.summary(headline) + "".join(map(report.paragraph, remarks))),
        ("Kinds of pictures", tables[0] + figure + tables[1]),
        *more,
        ("Definitions", tables[2]),
    ]
    if curves.is_file():
        picture = report.picture(report.file_uri(curves), "Loss, official score and learning rate by epoch")
        sections.append(("Training", picture))
    shown = len(items)
    note = POINT
    if shown < total["images"]:
        each = shown // 3
        note = f"The {each} worst, {each} median and {each} best of {total['images']} pictures. {POINT}"
    gallery = report.gallery(items, ("official", "true", "missed", "false", "merges", "splits"), note)
    sections += [("Images", legend() + gallery), ("Configuration", report.options(config))]
    report.write_page(folder / "report.html", f"{config['name']}: {config['arch']}", sections, subtitle=what)
