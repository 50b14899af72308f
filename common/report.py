"""Pages and pictures for reports: tables, galleries that sort and filter, error overlays, contact sheets.

Everything here takes plain values and uint8 arrays in RGB order, and knows no model or dataset. A page is one file that
never uses the network. It is made of page.html and page.js. To see one:

    python -c "from common import report as r; r.write_page('page.html', 'Hello', [('A', r.table([{'iou': 0.84}]))])"

The functions that make a piece of a page return HTML as a str, so pieces can be joined with `+` or `"".join`. Values
may contain any text: they are escaped.
"""

import base64
import collections
import functools
import json
import math
import numbers
import webbrowser
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from markupsafe import Markup

from common.cli import warn
from common.files import atomic_path

# The palette of Okabe and Ito is safe for all kinds of colour blindness (https://jfly.uni-koeln.de/color).
VERMILION, SKY, GREEN, BLUE = (213, 94, 0), (86, 180, 233), (0, 158, 115), (0, 114, 178)
YELLOW, PURPLE, ORANGE = (240, 228, 66), (204, 121, 167), (230, 159, 0)
PALETTE = [YELLOW, PURPLE, BLUE, ORANGE, GREEN, SKY, VERMILION]  # for classes; the colours of OUTCOMES come last
OUTCOMES = {  # of a pixel: colour, opacity, meaning; painted in this order, so errors stay on top
    "found": (GREEN, 0.3, "labelled and predicted"),
    "false alarm": (SKY, 0.95, "predicted only"),
    "missed": (VERMILION, 0.95, "labelled only"),
}
GAP, CAPTION_HEIGHT, CHARACTER_WIDTH = 8, 20, 6.4  # of a contact sheet, in pixels
LARGEST_ICON = 128  # pixels; the browser enlarges pictures up to this size without smoothing
SHOWN = 12  # pictures in each group of worst_to_best
LARGEST_PNG = 200  # pixels; colour pictures with a longer side become JPEG, which is smaller


# ---------------------------------------------------------------- pictures


def as_rgb(image):
    """HW or HWC uint8 -> HW3 uint8. One or two channels: the first as grey; three or more: the first three."""
    image = np.asarray(image)
    assert image.dtype == np.uint8 and image.ndim in (2, 3), f"expected HW or HWC uint8: {image.dtype} {image.shape}"
    image = image[..., None] if image.ndim == 2 else image
    return image[..., :3] if image.shape[2] >= 3 else image[..., :1].repeat(3, axis=2)


def _class_colour(index):
    return PALETTE[index % len(PALETTE)]


def brighten(image):
    """Scale the intensities of an image so that its brightest 0.5 % become white, which reveals dim fluorescence.

    image: HW or HWC uint8. Returns the same shape and dtype. Alpha, a fourth channel, does not count.
    """
    image = np.asarray(image)
    step = math.ceil(math.sqrt(image.size / 2**24))  # a sample of a huge image is enough
    sample = image[::step, ::step] if image.ndim == 2 else image[::step, ::step, :3]
    factors = np.arange(256) * (255 / max(1, np.percentile(sample, 99.5)))
    return cv2.LUT(image, factors.clip(0, 255).round().astype(np.uint8)).reshape(image.shape)


def mask_picture(masks):
    """Draw masks on black: white for a single class, one colour per class for several, the last class on top.

    masks: (C, H, W) or (H, W) boolean. Returns HW3 uint8.
    """
    masks = np.asarray(masks, bool)
    masks = masks[None] if masks.ndim == 2 else masks
    pixels = np.zeros((*masks.shape[1:], 3), np.uint8)
    for index, mask in enumerate(masks):
        pixels[mask] = 255 if len(masks) == 1 else _class_colour(index)
    return pixels


def label_overlay(image, truth, prediction):
    """Tint every labelled or predicted pixel of an image: found, false alarm or missed (see `legend`).

    image: HW or HWC uint8; truth, prediction: (H, W) or (C, H, W) boolean, compared class by class. A pixel with the
    wrong class is both missed and a false alarm, and is drawn as missed. Returns HW3 uint8.
    """
    truth, prediction = (np.asarray(mask, bool).reshape(-1, *np.shape(image)[:2]) for mask in (truth, prediction))
    assert truth.shape == prediction.shape, f"labels {truth.shape}, predictions {prediction.shape}"
    regions = {"found": truth & prediction, "false alarm": ~truth & prediction, "missed": truth & ~prediction}
    plain = as_rgb(image).astype(np.float32)
    overlay = plain.copy()
    for name, (colour, opacity, _) in OUTCOMES.items():
        region = regions[name].any(axis=0)
        overlay[region] = (1 - opacity) * plain[region] + opacity * np.float32(colour)
    return np.rint(overlay).astype(np.uint8)


# ---------------------------------------------------------------- contact sheets


def contact_sheet(rows_of_arrays, path, captions=None, size=256):
    """Write rows of pictures as one PNG on white.

    rows_of_arrays: lists of HW or HWC uint8 arrays; each is drawn with at most `size` pixels per side.
    captions: a list of strings labels the columns; a list of lists labels every picture.
    """
    from matplotlib.figure import Figure

    rows = [[_fit(array, size) for array in row] for row in rows_of_arrays]
    if captions and isinstance(captions[0], str):
        captions = [captions]
    captions = [*(captions or []), *[[]] * len(rows)][: len(rows)]
    cell_height = max(array.shape[0] for row in rows for array in row)
    cell_width = max(array.shape[1] for row in rows for array in row)
    lefts = [GAP + column * (cell_width + GAP) for column in range(max(map(len, rows)))]
    tops, height = [], GAP
    for words in captions:
        if words:
            height += CAPTION_HEIGHT
        tops.append(height)
        height += cell_height + GAP
    width = lefts[-1] + cell_width + GAP

    sheet = np.full((height, width, 3), 255, np.uint8)
    figure = Figure(figsize=((width + 0.01) / 100, (height + 0.01) / 100), dpi=100)  # the canvas size is rounded down
    for top, row, words in zip(tops, rows, captions, strict=True):
        for left, array in zip(lefts, row, strict=False):
            y, x = top + (cell_height - array.shape[0]) // 2, left + (cell_width - array.shape[1]) // 2
            sheet[y : y + array.shape[0], x : x + array.shape[1]] = array
        for left, caption in zip(lefts, words, strict=False):
            x, y = left + cell_width / 2, height - top + CAPTION_HEIGHT / 2 + 2  # y grows upwards
            _write_caption(figure, x, y, caption, cell_width)
    figure.figimage(sheet, origin="upper")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def _fit(array, size):
    """HW or HWC uint8 -> HW3 uint8, at most `size` pixels per side. Small pictures are enlarged by a whole factor."""
    pixels, longest = as_rgb(array), max(np.shape(array)[:2])
    if longest <= size:
        return pixels.repeat(size // longest, axis=0).repeat(size // longest, axis=1)
    height, width = (max(1, round(side * size / longest)) for side in pixels.shape[:2])
    return cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)


def _write_caption(figure, x, y, caption, width):
    """Centre a caption at (x, y), in pixels from the bottom left; what does not fit into `width` is cut off."""
    room = max(4, int(width / CHARACTER_WIDTH))
    if len(caption) > room:
        caption = caption[: room - 1] + "…"
    figure.text(x, y, caption, transform=None, fontsize=8, va="center", ha="center", color="#333", parse_math=False)


# ---------------------------------------------------------------- pieces of a page


def data_uri(array):
    """Encode a picture as a data: URI.

    array: HW or HWC uint8. Colour pictures with a side of more than 200 pixels become JPEG, all others PNG.
    """
    pixels = as_rgb(array)[..., ::-1]  # OpenCV writes BGR
    if np.ndim(array) == 2 or np.shape(array)[2] < 3:
        pixels = pixels[..., 0]
    kind, options = "png", [cv2.IMWRITE_PNG_COMPRESSION, 9]
    if pixels.ndim == 3 and max(pixels.shape) > LARGEST_PNG:
        sampling = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]  # keeps thin coloured edges
        kind, options = "jpeg", [cv2.IMWRITE_JPEG_QUALITY, 90, *sampling]
    done, data = cv2.imencode(f".{kind}", pixels, options)
    assert done
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def file_uri(path):
    """Encode a PNG file as a data: URI."""
    return f"data:image/png;base64,{base64.b64encode(Path(path).read_bytes()).decode()}"


def paragraph(words):
    """One paragraph of text."""
    return _render("paragraph", words=words)


def picture(uri, caption):
    """A picture from `data_uri` or `file_uri`; its caption also serves as the description for screen readers."""
    return _render("picture", uri=uri, caption=caption)


def summary(pairs):
    """Headline numbers, from (label, value, note) tuples."""
    return _render("summary", figures=pairs)


def table(rows, columns=None, caption=""):
    """A table, which scrolls in its own box if it is wider than the page.

    rows: list of dicts; a missing key is shown as a dash. columns: the keys to show, or a dict {key: heading}; default
    all keys. Columns that contain a number are aligned to the right.
    """
    columns = columns or dict.fromkeys(key for row in rows for key in row)
    headings = columns if isinstance(columns, dict) else dict.fromkeys(columns)
    numeric = {key for key in headings if any(isinstance(row.get(key), numbers.Real) for row in rows)}
    return _render("table", headings=headings, rows=rows, numeric=numeric, caption=caption)


def legend(classes=()):
    """The meaning of the colours in `label_overlay` or, with several names in `classes`, in `mask_picture`."""
    if len(classes) > 1:
        entries = [(_class_colour(index), name, "") for index, name in enumerate(classes)]
    else:
        entries = [(colour, name, meaning) for name, (colour, _, meaning) in OUTCOMES.items()]
    return legend_of(entries)


def legend_of(entries):
    """The meaning of colours, from (RGB colour, name, meaning) tuples."""
    return _render("legend", entries=entries)


class Region(NamedTuple):
    """A part of a picture that says what it is when the pointer is on it."""

    text: str
    outlines: list  # of (n, 2) int arrays: x and y in pixels of the picture, (0, 0) the centre of the first
    name: str = ""  # different for each region of a card
    partner: str = ""  # the name of a region in another picture of the card; the two light up together


def gallery(items, sort_keys, note=""):
    """Cards of pictures that can be sorted and filtered in the browser; clicking a picture enlarges it.

    items: list of {"title": str, "panels": [(caption, uint8 array), ...], "values": {name: number}, "group": str,
    "tags": [str, ...], "regions": {caption: [Region, ...]}}, of which all but the first two are optional. sort_keys:
    the names of the values to sort by. A reader can choose a group and a tag; the cards keep the given order until they
    are sorted.
    """
    groups = collections.Counter(item["group"] for item in items if item.get("group"))  # in order of first appearance
    tags = collections.Counter(tag for item in items for tag in item.get("tags", ()))
    cards = [_card(item) for item in items]
    widest = max((len(card["panels"]) for card in cards), default=1)
    filters = {"group": groups, "tag": tags}
    return _render("gallery", cards=cards, filters=filters, sort_keys=sort_keys, panels_per_card=widest, note=note)


def worst_to_best(scores):
    """Which of many pictures a gallery shows: {index: "worst", "median" or "best"}, the lowest score first.

    scores: numbers or other values that can be sorted. A group has SHOWN pictures, or a third of all if these are
    fewer, rounded up.
    """
    order = sorted(range(len(scores)), key=lambda k: scores[k])
    shown = min(SHOWN, -(-len(order) // 3))
    middle = (len(order) - shown) // 2
    members = {"best": order[-shown:], "median": order[middle : middle + shown], "worst": order[:shown]}
    group_of = {k: group for group, indices in members.items() for k in indices}  # on a tiny set the worst win
    return {k: group_of[k] for k in order if k in group_of}


def options(config):
    """A table of the options of a run."""
    return table([{"option": key, "value": str(value)} for key, value in config.items()])


def _card(item):
    """The arguments of the template's `card_of`."""
    values = item.get("values", {})
    finite = {name: float(value) if math.isfinite(value) else None for name, value in values.items()}  # JSON has no NaN
    panels = []
    for caption, array in item["panels"]:
        regions = [(region, _path(region.outlines)) for region in item.get("regions", {}).get(caption, ())]
        (height, width), pixelated = np.shape(array)[:2], max(np.shape(array)[:2]) <= LARGEST_ICON
        panel = {"uri": data_uri(array), "caption": caption, "pixelated": pixelated}
        panels.append({**panel, "width": width, "height": height, "regions": regions})
    return {
        "title": item["title"],
        "group": item.get("group") or "",
        "tags": item.get("tags", []),
        "tags_json": json.dumps(item.get("tags", [])),
        "values": values,
        "values_json": json.dumps(finite),
        "panels": panels,
    }


def _path(outlines):
    """Closed outlines as the `d` of an SVG path: the first point of each, and the steps to the others."""
    pieces = []
    for points in outlines:
        steps = " ".join(map(str, np.diff(points, axis=0).ravel().tolist()))
        pieces.append(f"M{points[0][0]} {points[0][1]}l{steps or '0 0'}z".replace(" -", "-"))
    return "".join(pieces)


def write_page(path, title, sections, subtitle=""):
    """Write one self-contained HTML file.

    sections: (heading, html) pairs, where html comes from the functions above. With more than two sections, links to
    them stand below the title.
    """
    sections = [(heading, Markup(content)) for heading, content in sections]
    page = _render("page", title=title, subtitle=subtitle, sections=sections)
    with atomic_path(path) as temporary:
        temporary.write_bytes(page.encode("utf-8", "replace"))  # file names may contain bytes that are not UTF-8


def open_page(path):
    """Open a page in the reader's browser; a line on stderr where there is none."""
    try:
        opened = webbrowser.open(Path(path).resolve().as_uri())
    except webbrowser.Error:
        opened = False
    if not opened:
        warn(f"no browser could be started; open {path} yourself")


# ---------------------------------------------------------------- the template


def _shown(value):
    """A value as the page shows it, not yet escaped: floats with four digits, None as a dash. A str stays as it is."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    if isinstance(value, numbers.Integral) or not isinstance(value, numbers.Real):
        return str(value)
    size = abs(value)
    if size >= 1e3:
        return f"{value:.1f}"
    return f"{value:.4f}" if size == 0 or size >= 1e-3 else f"{value:.4g}"


@functools.cache
def _macros():
    import jinja2  # late, like matplotlib, so that `--help` starts fast

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=_shown,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").module


def _render(macro, **values):
    """The HTML of one macro of page.html.

    A plain str: Markup would escape what callers put before it with `+`, such as the result of their `"".join`.
    """
    return str(getattr(_macros(), macro)(**values))
