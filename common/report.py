"""Pages and figures: curves, tables, galleries that sort and filter, error overlays, contact sheets.

Takes plain values and uint8 RGB arrays and knows no model or data set. A page is one file that asks the network for
nothing. To see one:

    python -c "import report; report.write_page('page.html', 'Hello', [('Table', report.table([{'iou': 0.84}]))])"
"""

import base64
import collections
import html
import json
import math
import numbers
from pathlib import Path

import cv2
import numpy as np

from common.files import atomic_path

# Okabe and Ito's palette, which people with any kind of colour vision can tell apart (https://jfly.uni-koeln.de/color)
VERMILION, SKY, GREEN, BLUE = (213, 94, 0), (86, 180, 233), (0, 158, 115), (0, 114, 178)
YELLOW, PURPLE, ORANGE = (240, 228, 66), (204, 121, 167), (230, 159, 0)
PALETTE = [YELLOW, PURPLE, BLUE, ORANGE, GREEN, SKY, VERMILION]  # of classes: the colours of errors come last
OUTCOMES = {  # of a pixel: colour, opacity, meaning; painted in this order, so that errors stay on top
    "found": (GREEN, 0.3, "labelled and predicted"),
    "false alarm": (SKY, 0.95, "predicted only"),
    "missed": (VERMILION, 0.95, "labelled only"),
}


# ---------------------------------------------------------------- pictures


def _rgb(image):
    """HW or HWC uint8 -> HW3 uint8: one or two channels show the first as grey, more show the first three."""
    image = np.asarray(image)
    assert image.dtype == np.uint8 and image.ndim in (2, 3), f"no uint8 picture: {image.dtype} {image.shape}"
    image = image[..., None] if image.ndim == 2 else image
    return image[..., :3] if image.shape[2] >= 3 else image[..., :1].repeat(3, axis=2)


def brighten(image):
    """HW or HWC uint8, scaled so that its brightest half percent is white: shows what dim fluorescence hides."""
    image = np.asarray(image)
    step = math.ceil(math.sqrt(image.size / 2**24))  # of a slide some million pixels tell enough
    factors = np.arange(256) * (255 / max(1, np.percentile(image[::step, ::step], 99.5)))
    return cv2.LUT(image, factors.clip(0, 255).round().astype(np.uint8)).reshape(image.shape)


def mask_picture(masks):
    """(C, H, W) or (H, W) boolean -> HW3 uint8: white for one class, distinct colours for several, the last on top."""
    masks = np.asarray(masks, bool)
    masks = masks[None] if masks.ndim == 2 else masks
    pixels = np.zeros((*masks.shape[1:], 3), np.uint8)
    for index, mask in enumerate(masks):
        pixels[mask] = 255 if len(masks) == 1 else PALETTE[index % len(PALETTE)]
    return pixels


def label_overlay(image, truth, prediction):
    """The image with every labelled pixel tinted: found, false alarm or missed (see legend).

    image: HW or HWC uint8; truth, prediction: boolean (H, W) or (C, H, W), compared class by class. A pixel given to
    the wrong class is both missed and a false alarm, and shows as missed. Returns HW3 uint8.
    """
    truth, prediction = (np.asarray(mask, bool).reshape(-1, *np.shape(image)[:2]) for mask in (truth, prediction))
    assert truth.shape == prediction.shape, f"labels {truth.shape}, predictions {prediction.shape}"
    regions = {"found": truth & prediction, "false alarm": ~truth & prediction, "missed": truth & ~prediction}
    plain = _rgb(image).astype(np.float32)
    overlay = plain.copy()
    for name, (colour, opacity, _) in OUTCOMES.items():
        region = regions[name].any(axis=0)
        overlay[region] = (1 - opacity) * plain[region] + opacity * np.float32(colour)
    return np.rint(overlay).astype(np.uint8)


def _fit(array, size):
    """A picture of at most `size` pixels a side: small ones grow by a whole factor, crisply."""
    pixels, longest = _rgb(array), max(np.shape(array)[:2])
    if longest <= size:
        return pixels.repeat(size // longest, axis=0).repeat(size // longest, axis=1)
    height, width = (max(1, round(side * size / longest)) for side in pixels.shape[:2])
    return cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)


def contact_sheet(rows_of_arrays, path, captions=None, size=256):
    """Rows of uint8 pictures as one PNG on white, each at most `size` pixels a side.

    captions: a list of strings heads the columns; a list of lists gives every picture its own.
    """
    from matplotlib.figure import Figure

    rows = [[_fit(array, size) for array in row] for row in rows_of_arrays]
    captions = [captions] if captions and isinstance(captions[0], str) else captions or []
    captions = [*captions, *[[]] * len(rows)][: len(rows)]
    cell_h, cell_w = (max(array.shape[axis] for row in rows for array in row) for axis in (0, 1))
    gap, line = 8, 20
    tops = np.cumsum([gap] + [line * bool(words) + cell_h + gap for words in captions])
    width, height = gap + max(map(len, rows)) * (cell_w + gap), int(tops[-1])
    sheet = np.full((height, width, 3), 255, np.uint8)
    figure = Figure(figsize=((width + 0.01) / 100, (height + 0.01) / 100), dpi=100)  # the canvas rounds down
    for top, row, words in zip(tops, rows, captions, strict=False):
        for column, array in enumerate(row):
            y = top + line * bool(words) + (cell_h - array.shape[0]) // 2
            x = gap + column * (cell_w + gap) + (cell_w - array.shape[1]) // 2
            sheet[y : y + array.shape[0], x : x + array.shape[1]] = array
        for column, caption in enumerate(words):
            x, room = gap + column * (cell_w + gap) + cell_w / 2, max(4, int(cell_w / 6.4))
            caption = caption if len(caption) <= room else caption[: room - 1] + "…"
            style = {"fontsize": 8, "va": "center", "ha": "center", "color": "#333", "parse_math": False}
            figure.text(x, height - top - line / 2 + 2, caption, transform=None, **style)
    figure.figimage(sheet, origin="upper")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def plot_curves(rows, path, title=""):
    """One PNG of a run: a panel for each pair of columns (x, val_x), best validation epoch marked, and one for lr.

    rows: dicts or a DataFrame of log.csv, with `epoch`, pairs such as (loss, val_loss), (iou, val_iou) and maybe `lr`.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rows = rows.to_dict("records") if hasattr(rows, "to_dict") else list(rows)
    assert rows, "no epoch to plot"

    def column(name):
        return np.array([math.nan if row.get(name) in (None, "") else float(row[name]) for row in rows])

    epochs, pairs = column("epoch"), [name for name in rows[0] if f"val_{name}" in rows[0]]
    shown = pairs + ["lr"] * ("lr" in rows[0])
    widths = [1 if name == "lr" else 1.8 for name in shown]
    figure = Figure(figsize=(2.5 * sum(widths), 3.6), dpi=120, layout="constrained")
    axes = figure.subplots(1, len(shown), squeeze=False, width_ratios=widths)[0]
    train, valid = (tuple(channel / 255 for channel in colour) for colour in (BLUE, VERMILION))
    for axis, name in zip(axes, shown, strict=True):
        dots = {"marker": "o", "markersize": 3} if len(rows) < 15 else {}  # a line of one epoch is invisible
        if name == "lr":
            rates = column(name)
            axis.plot(epochs, rates, color="#666", **dots)
            axis.set_yscale("log" if rates.min() > 0 and rates.max() / rates.min() > 30 else "linear")
        else:
            curve = column(f"val_{name}")
            axis.plot(epochs, column(name), color=train, label="training", **dots)
            axis.plot(epochs, curve, color=valid, label="validation", **dots)
            if "loss" not in name and np.isfinite(curve).any():
                best = np.nanargmax(curve)
                axis.plot(epochs[best], curve[best], "*", color=valid, markersize=13, markeredgecolor="white")
                axis.axvline(epochs[best], color=valid, linewidth=0.8, linestyle=":", zorder=0)
                axis.plot([], [], " ", label=f"best {curve[best]:.4f}, epoch {epochs[best]:.0f}")
            axis.legend(frameon=False, fontsize=8)
        axis.set_title({"lr": "learning rate", "iou": "IoU", "acc": "accuracy"}.get(name, name), fontsize=10)
        axis.set_xlabel("epoch", fontsize=9)
        axis.set_xlim(epochs.min() - 0.5, epochs.max() + 0.5)
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        axis.tick_params(labelsize=8)
        axis.grid(color="#ddd", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    if title:
        figure.suptitle(title, fontsize=11, parse_math=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


# ---------------------------------------------------------------- pieces of a page


def data_uri(array):
    """HW or HWC uint8 -> a data: address; PNG, or JPEG for colour pictures of more than 200 pixels a side."""
    colour = np.ndim(array) == 3 and np.shape(array)[2] >= 3
    pixels = _rgb(array)[..., ::-1] if colour else _rgb(array)[..., 0]  # OpenCV writes BGR
    if colour and max(pixels.shape) > 200:
        chroma = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]  # thin coloured edges stay
        kind, (done, data) = "jpeg", cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 90, *chroma])
    else:
        kind, (done, data) = "png", cv2.imencode(".png", pixels, [cv2.IMWRITE_PNG_COMPRESSION, 9])
    assert done
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def file_uri(path):
    """The data: address of a PNG file."""
    return f"data:image/png;base64,{base64.b64encode(Path(path).read_bytes()).decode()}"


def text(value):
    """A value as escaped text: floats with four digits, None as a dash."""
    if value is None:
        return "–"
    if isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral):
        size = abs(value)
        return f"{value:.4f}" if size == 0 or 1e-3 <= size < 1e3 else f"{value:.1f}" if size >= 1e3 else f"{value:.4g}"
    return html.escape(str(value))


def paragraph(words):
    return f"<p>{text(words)}</p>"


def picture(uri, caption):
    """A picture from data_uri or file_uri with its caption, which describes it to those who cannot see it as well."""
    return f'<figure><img src="{uri}" alt="{text(caption)}"><figcaption>{text(caption)}</figcaption></figure>'


def summary(pairs):
    """Headline numbers: (label, value, small note) each."""
    cells = (f"<div><dt>{text(a)}</dt><dd>{text(b)}</dd><dd class=note>{text(c)}</dd></div>" for a, b, c in pairs)
    return f"<dl class=summary>{''.join(cells)}</dl>"


def table(rows, columns=None, caption=""):
    """rows: a list of dicts; columns: the keys to show, or {key: heading}; a wide table scrolls inside its own box."""
    columns = columns or dict.fromkeys(key for row in rows for key in row)
    headings = {key: columns[key] or key for key in columns} if isinstance(columns, dict) else {k: k for k in columns}
    number = {key: " class=number" * any(isinstance(row.get(key), numbers.Real) for row in rows) for key in headings}
    head = "".join(f"<th scope=col{number[key]}>{text(heading)}</th>" for key, heading in headings.items())
    lines = ("".join(f"<td{number[key]}>{text(row.get(key))}</td>" for key in headings) for row in rows)
    title, body = f"<caption>{text(caption)}</caption>" * bool(caption), "".join(f"<tr>{line}</tr>" for line in lines)
    return (
        f'<div class=scroll tabindex=0 role=region aria-label="{text(caption or "table")}">'
        f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def legend(classes=()):
    """What the colours of label_overlay mean; with several names in `classes`, what those of mask_picture mean."""
    keys = [(colour, name, meaning) for name, (colour, _, meaning) in OUTCOMES.items()]
    if len(classes) > 1:
        keys = [(PALETTE[index % len(PALETTE)], text(name), "") for index, name in enumerate(classes)]
    items = (
        f'<li><i style="background:rgb{colour}"></i><b>{name}</b> {meaning}</li>' for colour, name, meaning in keys
    )
    return f"<ul class=legend>{''.join(items)}</ul>"


def gallery(items, sort_keys, note=""):
    """Cards of pictures that sort and filter in the browser; a click on a picture enlarges it.

    items: {"title": str, "panels": [(caption, uint8 array), ...], "values": {name: number}, "group": str or absent}.
    sort_keys: the values' names to sort by. The page shows the items in the order given until somebody sorts.
    """
    groups = collections.Counter(item["group"] for item in items if item.get("group"))  # in the order first seen
    controls, button = "", '<button type=button data-{}="{}" aria-pressed={}>{}</button>'
    if groups:
        shows = [button.format("group", "", "true", f"all <small>{len(items)}</small>")]
        shows += [button.format("group", text(g), "false", f"{text(g)} <small>{n}</small>") for g, n in groups.items()]
        controls += f"<div role=group aria-label=Show><span>Show</span>{''.join(shows)}</div>"
    if sort_keys:
        sorts = [button.format("sort", text(key), "false", text(key)) for key in sort_keys]
        controls += f"<div role=group aria-label=Sort><span>Sort by</span>{''.join(sorts)}</div>"
    widest = max((len(item["panels"]) for item in items), default=1)
    return (
        f'<div class=gallery style="--panels:{widest}">{paragraph(note) if note else ""}'
        f"<div class=controls hidden>{controls}<span role=status></span></div>"
        f"<div class=cards>{''.join(map(_card, items))}</div></div>"
    )


def _card(item):
    title, group, values = text(item["title"]), text(item.get("group") or ""), item.get("values", {})
    data = {name: float(value) if math.isfinite(value) else None for name, value in values.items()}  # JSON has no NaN
    panels = "".join(
        f'<button type=button class="panel{" pixel" * (max(np.shape(array)[:2]) <= 128)}">'
        f'<img src="{data_uri(array)}" alt="{text(caption)}, {title}"><span>{text(caption)}</span></button>'
        for caption, array in item["panels"]
    )
    return (
        f'<article class=card data-group="{group}" data-values="{html.escape(json.dumps(data))}">'
        f"<h3><span>{title}</span>{f'<small>{group}</small>' if group else ''}</h3><div class=panels>{panels}</div>"
        f"<dl>{''.join(f'<div><dt>{text(k)}</dt><dd>{text(v)}</dd></div>' for k, v in values.items())}</dl></article>"
    )


def write_page(path, title, sections, subtitle=""):
    """One self-contained HTML file. sections: (heading, html) pairs, the html made by the functions above."""
    parts = [(f"section-{index}", text(heading), content) for index, (heading, content) in enumerate(sections, 1)]
    links = "".join(f'<a href="#{anchor}">{heading}</a>' for anchor, heading, _ in parts)
    page = PAGE.format(
        title=text(title),
        subtitle=f"<p class=subtitle>{text(subtitle)}</p>" * bool(subtitle),
        nav=f"<nav aria-label=Sections>{links}</nav>" * (len(parts) > 2),
        body="".join(f"<section id={a}><h2>{heading}</h2>{content}</section>" for a, heading, content in parts),
        style=STYLE,
        script=SCRIPT,
    )
    with atomic_path(path) as temporary:
        temporary.write_bytes(page.encode("utf-8", "replace"))  # file names may hold what UTF-8 cannot


# The policy makes the promise of no requests one that the browser keeps; the empty icon saves it from asking for one.
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<link rel="icon" href="data:,"><style>{style}</style></head>
<body><header><h1>{title}</h1>{subtitle}{nav}</header><main>{body}</main><script>{script}</script></body></html>
"""

STYLE = """
:root { --ink: #1c2024; --soft: #5d6670; --line: #dfe3e8; --page: #f6f7f9; --card: #fff; --accent: #0b63a5; }
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #e8eaed; --soft: #9aa4af; --line: #333a42; --page: #14171a; --card: #1d2125; --accent: #6cb6f0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1440px; padding: 2rem clamp(1rem, 3vw, 2.5rem) 4rem; background: var(--page);
  color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1, h3, p { overflow-wrap: anywhere; }
h1 { margin: 0; font-size: clamp(1.5rem, 4vw, 2.1rem); line-height: 1.2; letter-spacing: -.02em; }
h2 { margin: 2.75rem 0 .75rem; font-size: 1.25rem; }
p { max-width: 70ch; margin: .5rem 0 1rem; }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin-top: 1rem; font-size: .9rem; }
a { color: var(--accent); text-decoration: none; } a:hover { text-decoration: underline; }
img { max-width: 100%; height: auto; } dl, dd { margin: 0; }
figure { margin: 1rem 0; overflow-x: auto; }
figcaption { margin-top: .4rem; font-size: .875rem; position: sticky; left: 0; }
figure img { display: block; border-radius: 8px; border: 1px solid var(--line); }
button { font: inherit; color: inherit; background: none; border: 0; padding: 0; cursor: pointer; }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
dt, small, figcaption, caption, .subtitle, .note, .panel, .controls span { color: var(--soft); }
dd, .number { font-variant-numeric: tabular-nums; }
.summary div, .scroll, .card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.summary { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1rem 0; }
.summary div { padding: .9rem 1.1rem; flex: 1 1 8.5rem; max-width: 18rem; } .summary dt { font-size: .85rem; }
.summary dd { font-size: clamp(1.35rem, 6vw, 1.9rem); line-height: 1.25; font-weight: 650; overflow-wrap: anywhere; }
.summary .note { font-size: .8rem; font-weight: 400; }
.scroll { overflow-x: auto; margin: 1rem 0; width: fit-content; max-width: 100%; }
table { border-collapse: collapse; font-size: .9rem; }
caption { text-align: left; padding: .7rem .9rem .3rem; font-size: .85rem; }
th, td { padding: .45rem .9rem; text-align: left; border-bottom: 1px solid var(--line); }
td { white-space: nowrap; } th { font-weight: 600; vertical-align: bottom; }
.number { text-align: right; } tr:last-child td { border-bottom: 0; }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1.5rem; padding: 0; list-style: none; font-size: .9rem; }
.legend i { display: inline-block; width: .9em; height: .9em; margin-right: .45em; border-radius: 3px;
  vertical-align: -.08em; print-color-adjust: exact; }
.controls { display: flex; flex-wrap: wrap; gap: .5rem 1.5rem; align-items: center; padding: .6rem 0;
  font-size: .875rem; position: sticky; top: 0; background: var(--page); } [hidden] { display: none !important; }
.controls div { display: flex; flex-wrap: wrap; gap: .35rem; align-items: center; }
.controls button, h3 small { padding: .3rem .75rem; border: 1px solid var(--line); border-radius: 99px; }
.controls button { background: var(--card); } .controls button:hover { border-color: var(--accent); }
.controls [aria-pressed=true], .controls [aria-pressed=true] small { background: var(--accent); color: var(--page); }
[data-order=up]::after { content: " \\2191"; } [data-order=down]::after { content: " \\2193"; }
.cards { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, calc(var(--panels) * 8rem + 4rem)), 1fr)); }
.card { padding: .9rem 1rem; min-width: 0; break-inside: avoid; }
h3 { display: flex; justify-content: space-between; gap: .75rem; align-items: start; margin: 0 0 .6rem;
  font-size: .875rem; }
h3 span { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 2; overflow: hidden; }
h3 small { padding: 0 .55rem; font-weight: 400; font-size: .75rem; white-space: nowrap; }
.panels { display: grid; grid-template-columns: repeat(var(--panels), 1fr); gap: .5rem; }
.panel { min-width: 0; cursor: zoom-in; font-size: .75rem; } .pixel { image-rendering: pixelated; }
.panel img { display: block; width: 100%; border-radius: 4px; margin-bottom: .2rem;
  box-shadow: 0 0 0 1px var(--line); }
.card dl { display: flex; flex-wrap: wrap; gap: .1rem 1.1rem; margin-top: .5rem; font-size: .85rem; }
.card dl div { display: flex; gap: .4rem; }
dialog { border: 0; max-width: 100vw; max-height: 100vh; background: none; color: #fff; text-align: center; }
dialog::backdrop { background: rgb(0 0 0 / .88); }
dialog img { width: min(92vw, 80vh); max-height: 80vh; object-fit: contain; } dialog p { margin: .5rem auto; }
dialog button { position: fixed; top: .75rem; right: 1rem; font-size: 2rem; line-height: 2.75rem; width: 2.75rem; }
@media (max-width: 640px) { .panels { grid-template-columns: repeat(min(var(--panels), 2), 1fr); }
  .controls { position: static; } figure img { max-width: none; height: 15rem; } }
@media print { body { padding: 0; background: #fff; } th, td { padding: .3rem .4rem; }
  nav, .controls { display: none !important; } }
"""

SCRIPT = """
const box = document.createElement("dialog");  // closes on Escape by itself and gives the focus back
box.innerHTML = '<button type="button" aria-label="Close">&times;</button><img alt=""><p></p>';
document.body.append(box);
box.onclick = () => box.close();
let current;
function enlarge(panel) {
  current = panel;
  const small = panel.querySelector("img"), large = box.querySelector("img");
  large.src = small.src;
  large.alt = box.querySelector("p").textContent = small.alt;
  large.className = small.naturalWidth < 512 ? "pixel" : "";
  if (!box.open) box.showModal();
}
box.onkeydown = event => {
  const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
  const panels = [...document.querySelectorAll(".card:not([hidden]) .panel")];
  const next = step && panels[panels.indexOf(current) + step];
  if (next) enlarge(next);
};
for (const gallery of document.querySelectorAll(".gallery")) {
  const cards = [...gallery.querySelectorAll(".card")];
  const value = (card, key) => JSON.parse(card.dataset.values)[key] ?? null;
  let order = "";
  gallery.querySelector(".controls").hidden = false;
  gallery.onclick = event => {
    const button = event.target.closest("button");
    if (!button) return;
    if (button.matches(".panel")) return enlarge(button);
    const {group, sort} = button.dataset, kind = sort === undefined ? "group" : "sort";
    for (const other of gallery.querySelectorAll(`button[data-${kind}]`)) {
      other.setAttribute("aria-pressed", other === button);
      if (other !== button) delete other.dataset.order;
    }
    if (kind === "group") {
      for (const card of cards) card.hidden = group !== "" && card.dataset.group !== group;
    } else {
      button.dataset.order = button.dataset.order === "up" ? "down" : "up";
      const sign = button.dataset.order === "up" ? 1 : -1;
      order = `, by ${sort}, ${sign > 0 ? "ascending" : "descending"}`;
      cards.sort((a, b) => {
        const x = value(a, sort), y = value(b, sort);  // a missing value goes last either way
        return x === null || y === null ? (x === null) - (y === null) : sign * (x - y);
      });
      gallery.querySelector(".cards").append(...cards);
    }
    gallery.querySelector("[role=status]").textContent = `${cards.filter(c => !c.hidden).length} shown${order}`;
  };
}
"""
