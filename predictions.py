"""What predict.py writes to a folder: masks, outlines, and tables that keep the rows of earlier calls.

    names = output_names(files, earlier={"a": "scans/a.png"})
    results = MaskResults(Path("outputs/run1/predict"), names, settings="models/run1 L4, threshold 0.5")
    with results.kept(count=len(files)):
        results.add(picture, probabilities)

A result replaces a file of the same name; nothing else in the folder is touched. The processes of torchrun may share a
folder, and so may successive calls; of two simultaneous calls, neither knows the names that the other assigns.
Individual nuclei have results of their own: nuclei/predictions.py.
"""

import collections
import contextlib
import itertools
import math
import re
import time
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from common import report
from common.cli import in_one_line
from common.distributed import world_size
from common.files import atomic_path, is_plain_name, lock
from common.headers import TooManyPixels
from common.images import MOST_PIXELS, Page, file_of, read_picture, squeeze, to_channels, write_png
from common.tables import merge_table, read_table
from common.tiff import pixel_size

OBJECT_COLUMNS = ("image", "class", "object", "area", "centroid_x", "centroid_y", "left", "top", "width", "height")
SHOWN = r"(objects|fraction)(_\d+)?|median_diameter"  # columns of images.csv on the page
ON_PAGE, PAGE_SIDE = 200, 640  # pictures of a page, and pixels of their longer side
DIAMETERS = 1, 10_000  # pixels that a nucleus can have
PIXEL_SIZES = 1e-4, 1e6  # micrometres that a pixel can have
SAVE_SECONDS = 60  # the tables are saved this often,
SAVE_FACTOR = 20  # or, when they are large, after this many times as long as saving them takes


# ---------------------------------------------------------------- names, and what an earlier call left


def output_names(files, earlier=()):
    """{file: the beginning of the names of its results}, unique even on file systems that ignore case.

    The name is the stem; <folder>_<stem> where several files share the stem; with _2, _3 ... where that is not enough.
    Pages add _p000, _p001 ... to the name of their file; no other picture gets the file's name, because the label TIFF
    of all its pages has it. earlier: {name: path} of the pictures that have results already; they keep their names.
    """

    def all_names(name, endings):
        """The names of a file and of its pages, without regard to case."""
        return {(name + ending).casefold() for ending in ("", *endings)}

    pages = {}  # {file: the endings of its pages}, [""] of a picture that is a file of its own
    for file in files:
        pages.setdefault(file_of(file), []).append(ending_of(file))
    earlier, kept = dict(earlier), {}  # kept: {file: name} of those with earlier results
    for name, text in earlier.items():
        path = Page.file_in(text)
        kept[Path(path).resolve()] = name if path == text else name_of_stack(name)
    taken = {name.casefold() for own in (*earlier, *kept.values()) for name in (own, name_of_stack(own))}
    names = {path: kept[path.resolve()] for path in pages if path.resolve() in kept}
    stems = collections.Counter(path.stem.casefold() for path in pages)
    stems.update(taken)  # by a picture of an earlier call
    new = [path for path in pages if path not in names]
    for path in sorted(new, key=lambda path: stems[path.stem.casefold()] > 1):  # those that keep their stem first
        name = path.stem if stems[path.stem.casefold()] == 1 else f"{path.absolute().parent.name}_{path.stem}"
        name = name.encode(errors="surrogateescape")[:200].decode(errors="ignore")  # names of files end at 255 bytes
        candidates = itertools.chain([name], (f"{name}_{k}" for k in itertools.count(2)))
        names[path] = next(
            own for own in candidates if not taken & {*all_names(own, pages[path]), name_of_stack(own).casefold()}
        )
        taken |= all_names(names[path], pages[path])
    return {file: names[file_of(file)] + ending_of(file) for file in files}


def ending_of(picture):
    """What the name of a page adds to that of its file; nothing for a picture that is a file of its own."""
    return picture.ending if isinstance(picture, Page) else ""


def name_of_stack(name):
    """The name of a page -> that of its file: cells_p003 -> cells; others stay."""
    return re.sub(r"_p\d{3,}$", "", name)


def earlier_results(folder):
    """{name: row of images.csv} of the pictures that a folder has results of; ValueError when a table is damaged."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; the results need a folder")
    next(read_table(folder / "objects.csv", "image"), None)  # better refused now than after the work
    rows = {row["image"]: row for row in read_table(folder / "images.csv", "image")}
    for name, row in rows.items():
        if not is_plain_name(name) or not row.get("path"):
            raise ValueError(f"{folder / 'images.csv'} is damaged: the row {name!r} lacks a usable name or path")
    return rows


def um_per_pixel(picture):
    """The side of a pixel in µm, from the tags of a TIFF, given as a path or a common.images.Page.

    "" when it is unknown, or not within PIXEL_SIZES: some programs write metres without naming the unit.
    """
    low, high = PIXEL_SIZES
    try:
        size = pixel_size(file_of(picture))
    except OSError:  # the file has gone
        size = None
    return round(size, 6) if size and low <= size <= high else ""


def reason_of(error):
    """Why a picture was skipped, in words."""
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    if isinstance(error, TooManyPixels):
        reason += "; --max_pixels raises the limit"
    return reason


def is_done(folder, row, settings):
    """Whether the results of a row of images.csv exist and were made with these settings; False for None."""
    if not row or row.get("settings") != settings:
        return False
    name = row["image"]
    found = [f"{name}_mask.png", f"{name}_mask_0.png", f"{name}_labels.tif", f"{name_of_stack(name)}_labels.tif"]
    return (folder / f"{name}_overlay.png").is_file() and any((folder / file).is_file() for file in found)


def forget_settings(folder, rows):
    """Clear the settings of `rows` in images.csv, so that --resume does not take them for done.

    A call that is killed may leave files of its own beside the rows of an earlier one.
    """
    rows = [{**row, "settings": ""} for row in rows]
    with lock(folder):
        merge_table(folder / "images.csv", rows[0], rows, "image", replaced={row["image"] for row in rows})


# ---------------------------------------------------------------- pictures and tables


def outline_masks(image, masks):
    """(H, W, C) uint8, a boolean (H, W) per class -> (H, W, 3) uint8: the image, brightened, with the masks' edges."""
    drawn = report.brighten(to_channels(image, 3))
    width = 3 if max(image.shape) < 512 else 5  # lines of 1 pixel, or 2
    for mask, colour in zip(masks, itertools.cycle(report.PALETTE), strict=False):
        inner = cv2.erode(mask.view(np.uint8), np.ones((width, width), np.uint8))
        drawn[mask & (inner == 0)] = colour
    return drawn


def object_rows(name, k, mask):
    """A boolean (H, W) mask of class k -> a row of objects.csv for each of its connected regions (8 neighbours)."""
    count, _, boxes, centroids = cv2.connectedComponentsWithStats(mask.view(np.uint8), connectivity=8)
    rows = []
    for index in range(1, count):  # 0 is the background
        left, top, width, height, area = boxes[index].tolist()
        x, y = (round(value, 2) for value in centroids[index].tolist())
        values = (name, k, index, area, x, y, left, top, width, height)
        rows.append(dict(zip(OBJECT_COLUMNS, values, strict=True)))
    return rows


class Results:
    """What all results of one call have in common; a subclass adds pictures and says what it found in them.

    names: see output_names. settings: text that tells what the results depend on; a column of images.csv.
    `images` holds this call's rows of images.csv, `objects` the rows of objects.csv not yet written,
    `columns` its headings, `saved` the number of pictures whose rows are written, and `limited` the names of pictures
    that the network saw smaller than it should.
    """

    def __init__(self, folder, names, settings):
        self.folder, self.names, self.settings = folder, names, settings
        self.images, self.objects, self.columns, self.limited, self.saved = [], [], {}, [], 0
        self.saved_at, self.saving = time.monotonic(), 0.0  # when the tables were written, and how long it took

    def keep(self, row, objects, columns):
        """Take a picture's row of images.csv, without its settings, and its rows and the columns of objects.csv.

        Its path is kept absolute: another call for the same folder may be made elsewhere.
        """
        self.columns.update(dict.fromkeys(columns))
        self.images.append({**row, "path": Path(str(row["path"])).absolute(), "settings": self.settings})
        self.objects += objects
        if time.monotonic() - self.saved_at > max(SAVE_SECONDS, SAVE_FACTOR * self.saving):
            self.write_tables()

    def write_picture(self, name, array):
        with atomic_path(self.folder / name) as temporary:
            write_png(temporary, array)

    def write_tables(self):
        """Bring images.csv and objects.csv up to date."""
        names, started = [row["image"] for row in self.images], time.monotonic()
        if len(names) > self.saved:
            new = set(names[self.saved :])
            with lock(self.folder):  # other calls and processes write them, too
                merge_table(self.folder / "objects.csv", self.columns, self.objects, "image", replaced=new)
                columns = dict.fromkeys(column for row in self.images for column in row)
                merge_table(self.folder / "images.csv", columns, self.images, "image", replaced=set(names))
            self.saved, self.objects = len(names), []
        self.saved_at = time.monotonic()
        self.saving = self.saved_at - started

    @contextlib.contextmanager
    def kept(self, count):
        """A block at whose end the tables are written. One that is interrupted says how many of `count` are done."""
        try:
            yield
            self.write_tables()
        except BaseException as error:
            with contextlib.suppress(OSError):
                self.write_tables()
            whose = " of this process" if world_size() > 1 else ""
            done = f"{self.saved} of {count} pictures{whose} are done; repeat the command with --resume to continue"
            if isinstance(error, OSError):
                raise OSError(f"{in_one_line(error)}; {done}") from None
            if isinstance(error, KeyboardInterrupt):
                print(f"\n{done}")
            raise

    def finish(self):
        """Called when all pictures are done; a subclass may have more to do then."""

    def about(self):
        """One line on this call: how many pictures and objects, how they were seen, and how long a picture took."""
        count = len(self.images)
        scales = sorted({f"{row['scale']:.3g}" for row in self.images}, key=float)
        scale = f"scale {scales[0]}" + (f" to {scales[-1]}" if len(scales) > 1 else "")
        seconds = sum(row["seconds"] for row in self.images) / count
        pictures = "1 picture" if count == 1 else f"{count:,} pictures"
        return f"{pictures}, {self.found()}, {scale}; {seconds:.2f} s per picture"


@dataclass
class Picture:
    """A picture whose masks are to be found."""

    path: Path
    image: np.ndarray  # (H, W, C) uint8, as large as in the file
    small: np.ndarray  # (h, w, C) uint8, as the network sees it
    tiled: bool  # whether that is at the scale of tiles, not at the trained size
    seconds: float  # that reading it and finding its masks took


class MaskResults(Results):
    """Masks of every class, their outlines, and the connected regions in tables.

    threshold: the mask is where the probability is above it. probability: whether to write the probabilities, too.
    """

    def __init__(self, folder, names, settings, threshold=0.5, probability=False):
        super().__init__(folder, names, settings)
        self.threshold, self.probability = threshold, probability

    def add(self, picture, probabilities):
        """Write the results of a Picture. probabilities: (num_classes, h, w) uint16 of picture.small."""
        started = time.perf_counter()
        self.folder.mkdir(parents=True, exist_ok=True)
        name, (height, width) = self.names[picture.path], picture.image.shape[:2]
        masks, columns, objects = [], {}, []
        for k, plane in enumerate(probabilities):
            ending = f"_{k}" if len(probabilities) > 1 else ""
            plane = squeeze(plane, (height, width))
            mask = plane > self.threshold * 65535
            if self.probability:
                self.write_picture(f"{name}_probability{ending}.png", plane)
            self.write_picture(f"{name}_mask{ending}.png", mask.view(np.uint8) * 255)
            found, area = object_rows(name, k, mask), int(mask.sum())
            columns[f"pixels{ending}"] = area
            columns[f"fraction{ending}"] = area / mask.size
            columns[f"objects{ending}"] = len(found)
            objects += found
            masks.append(mask)
        self.write_picture(f"{name}_overlay.png", outline_masks(picture.image, masks))
        seconds = round(picture.seconds + time.perf_counter() - started, 4)
        scale = round(math.sqrt(picture.small.size / picture.image.size), 4)
        about = {"image": name, "path": picture.path, "width": width, "height": height}
        about["um_per_pixel"] = um_per_pixel(picture.path)
        how = {"mode": "tile" if picture.tiled else "resize", "scale": scale}
        self.keep({**about, **how, **columns, "seconds": seconds}, objects, OBJECT_COLUMNS)

    def found(self):
        count = len(self.images)
        objects = sum(value for row in self.images for key, value in row.items() if key.startswith("objects"))
        tiled = sum(row["mode"] == "tile" for row in self.images)
        modes = f"{count - tiled} resized, {tiled} in tiles"
        if tiled in (0, count):
            modes = "in tiles" if tiled else "resized"
        return f"{objects:,} objects; {modes}"

    def suspicions(self):
        """Warnings about pictures with nothing but background or nothing but foreground: [(words, names), ...]."""
        said = {"no foreground": [], "nothing but foreground": []}
        for row in self.images:
            fractions = [value for key, value in row.items() if key.startswith("fraction")]
            if not any(fractions):
                said["no foreground"].append(row["image"])
            elif 1 in fractions:
                said["nothing but foreground"].append(row["image"])
        return [(words, names) for words, names in said.items() if names]


# ---------------------------------------------------------------- a page to look at


def write_page(folder, subtitle):
    """Write <folder>/report.html: the outlines of the pictures in images.csv, those of earlier calls, too."""
    rows = list(earlier_results(folder).values())
    items = []
    for row in rows[:ON_PAGE]:
        path = folder / f"{row['image']}_overlay.png"
        if path.is_file():
            items.append(_card(row, read_picture(path, MOST_PIXELS)))
    keys = dict.fromkeys(key for item in items for key in item["values"])
    note = f"The first {ON_PAGE} of {len(rows)} pictures." if len(rows) > ON_PAGE else ""
    sections = [("Pictures", report.gallery(items, list(keys), note))]
    report.write_page(folder / "report.html", f"{len(rows)} pictures", sections, subtitle)


def _card(row, overlay):
    """A row of images.csv and its overlay, (H, W, 3) uint8 -> an item of report.gallery."""
    height, width = overlay.shape[:2]
    shrink = min(1, PAGE_SIDE / max(height, width))
    overlay = squeeze(overlay, (max(1, round(height * shrink)), max(1, round(width * shrink))))
    values = {}
    for key, text in row.items():
        if re.fullmatch(SHOWN, key or ""):
            with contextlib.suppress(TypeError, ValueError):  # a table may have been edited
                values[key.replace("_", " ")] = int(text) if text.isdecimal() else float(text)
    return {"title": row["image"], "panels": [("outlines", overlay)], "values": values}
