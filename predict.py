"""Segment any pictures with a trained run: masks, outlines and tables of what was found, at the original size.

python predict.py --name run1 slide.tif scans/ "more/*.png"
python predict.py --onnx outputs/run1/run1_L4.onnx scans/             # a file that export.py wrote, without PyTorch

PATH is a file, a folder (searched recursively) or a pattern. PNG, JPEG, TIFF, BMP, WEBP and PPM of 8 or 16 bits, grey
or colour, of any size; EXIF orientation is followed. More than 8 bits are scaled between percentiles of the picture,
which a hot pixel does not move. A TIFF may also hold floats, and several pages (slices, time points, positions): each
is a picture, <stem>_p000, <stem>_p001 ..., unless --page takes one. A microscope's file of 2, 4 or more channels needs
--channels.

For each picture outputs/<name>/predict/ gets <stem>_mask.png (0 and 255; with several classes <stem>_mask_0.png ...),
<stem>_overlay.png (outlines) and, with --probability, <stem>_probability.png (16 bits, 65535 = 1; the mask is where it
is above the threshold). A stem that several pictures share is prefixed with the name of their folder, and numbered
where that is not enough. images.csv has one row per picture; objects.csv one row per connected region (8 neighbours):
area, centroid and box in pixels counted from 0. The results of an earlier call are removed.

--mode resize shows the network the whole picture at the trained size, as in training. --mode tile shows it overlapping
tiles at the scale of the median training picture, or at --scale. The default, auto, resizes, but takes tiles where
resizing would make things more than 5 times smaller or larger than in the median picture: on slides and thumbnails.
docs/RESULTS.md compares the two.

Exit status: 0; 1 when some pictures could not be read and the others are done; 2 when nothing was done.
"""

import argparse
import collections
import contextlib
import csv
import itertools
import math
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from common import report
from common.cli import Parser, add_machine_options, listed, number, parse_options, run_script
from common.files import atomic_path
from common.headers import check_pixels
from common.images import MAX_PIXELS, PageReader, find_pictures, list_pages, squeeze, to_channels, write_png
from inference import LEVELS, OnnxPredictor, Predictor, predict_tiled

FARTHEST = 5  # times the training's scale that --mode auto resizes to; DSB2018's own pictures are up to 4.2 off
HELD_BYTES = 2**28  # of decoded pictures that wait in one batch, whatever --batch_size
OWN_FILES = r"(images|objects)\.csv|.*_(mask|overlay|probability)(_\d+)?\.png"
OWN_FILES = re.compile(rf"{OWN_FILES}|\.({OWN_FILES})\.\d+\.tmp", re.DOTALL)  # the latter of a killed call
OBJECT_COLUMNS = ("image", "class", "object", "area", "centroid_x", "centroid_y", "left", "top", "width", "height")


def channel_numbers(text):
    """An argparse type: "0" -> [0], "2,1,0" -> [2, 1, 0]."""
    parts = text.split(",")
    if len(parts) not in (1, 3) or not all(part.strip().isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"expected one number or three, such as 0 or 2,1,0, found {text!r}")
    return [int(part) for part in parts]


def build_parser():
    parser = Parser(description=__doc__)
    a = parser.add_argument
    a("paths", nargs="+", metavar="PATH", help="a picture, a folder of pictures or a pattern such as 'scans/*.tif'")
    a("--name", help="models/<name>; default: the newest run")
    a("--onnx", type=Path, metavar="FILE", help="a file of export.py instead of a run; needs ONNX Runtime")
    a("--level", choices=LEVELS, help="head that answers; default: the deepest")
    a("--mode", choices=("auto", "resize", "tile"), default="auto", help="what the network sees; explained above")
    scale = "predict in tiles, of this many pixels per pixel; default: as in training"
    a("--scale", type=number(float, 1e-3, 100), help=scale)
    a("--tta", action="store_true", help="average the eight flips and turns: eight times the work")
    a("--threshold", type=number(float, 0, 1), default=0.5, help="the mask is where the probability is above it")
    a("--probability", action="store_true", help="write <stem>_probability.png as well")
    a("--page", type=number(int, 0), help="of files with several pages, this one alone, counted from 0; default: all")
    channels = "one channel, counted from 0, for grey, or three for red, green and blue: 0 or 2,1,0"
    a("--channels", type=channel_numbers, metavar="K[,K,K]", help=channels)
    a("--max_pixels", type=number(int, 1, 2**30), default=MAX_PIXELS, help="refuse larger pictures")
    a("-b", "--batch_size", type=number(int, 1), default=8, help="pictures or tiles at once")
    add_machine_options(parser)
    return parser


# ---------------------------------------------------------------- pictures in


def output_names(files):
    """{file: the beginning of the names of its results}, all different even where case makes no difference.

    It is the stem; <folder>_<stem> where several files share the stem; with _2, _3 ... where that is not enough.
    """
    stems = collections.Counter(path.stem.casefold() for path in files)
    names, taken = {}, set()
    for path in sorted(files, key=lambda path: stems[path.stem.casefold()] > 1):  # those that keep their stem first
        name = path.stem if stems[path.stem.casefold()] == 1 else f"{path.absolute().parent.name}_{path.stem}"
        name = name.encode(errors="surrogateescape")[:200].decode(errors="ignore")  # names of files end at 255 bytes
        candidates = itertools.chain([name], (f"{name}_{k}" for k in itertools.count(2)))
        names[path] = next(candidate for candidate in candidates if candidate.casefold() not in taken)
        taken.add(names[path].casefold())
    return names


@dataclass
class Picture:
    path: Path
    image: np.ndarray  # (H, W, C) uint8, as large as in the file
    small: np.ndarray  # (h, w, C) uint8, as the network sees it
    seconds: float


def seen_size(shape, options, config):
    """(height, width) of a picture -> (height, width) at which the network sees it, by --mode and --scale."""
    trained, scale = (config["input_h"], config["input_w"]), options.scale or config.get("scale")
    resized = math.sqrt(math.prod(trained) / math.prod(shape))
    fits = not scale or 1 / FARTHEST <= resized / scale <= FARTHEST
    if options.mode == "resize" or (options.mode == "auto" and fits):
        return trained
    return tuple(max(1, round(side * (scale or 1))) for side in shape)


def read_batches(files, options, config, failed):
    """Yields lists of consecutive Pictures whose `small` have one size. What cannot be read goes to `failed`."""
    batch, reader = [], PageReader(options.max_pixels, options.channels)
    for path in tqdm(files, "predict", unit="img", leave=False, disable=None):
        started = time.perf_counter()
        try:
            image = to_channels(reader.read(path), config["input_channels"])
            size = seen_size(image.shape[:2], options, config)
            check_pixels(size[::-1], options.max_pixels)
            picture = Picture(path, image, squeeze(image, size), time.perf_counter() - started)
        except (ValueError, OSError, MemoryError) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            if "pixels are more than" in reason:
                reason += "; --max_pixels raises the limit"
            failed.append((path, reason))
            continue
        held = sum(waiting.image.nbytes for waiting in batch) + image.nbytes
        differs = batch and picture.small.shape != batch[0].small.shape
        if batch and (differs or len(batch) == options.batch_size or held > HELD_BYTES):
            yield batch
            batch = []
        batch.append(picture)
    reader.close()
    if batch:
        yield batch


# ---------------------------------------------------------------- results out


def draw_outlines(image, masks):
    """(H, W, C) uint8, a boolean (H, W) per class -> (H, W, 3) uint8: the image, brightened, with the masks' edges."""
    drawn = report.brighten(image[..., :3] if image.shape[2] >= 3 else image[..., :1].repeat(3, axis=2))
    width = 3 if max(image.shape) < 512 else 5  # lines of 1 pixel, or 2
    for mask, colour in zip(masks, itertools.cycle(report.PALETTE), strict=False):
        inner = cv2.erode(mask.view(np.uint8), np.ones((width, width), np.uint8))
        drawn[mask & (inner == 0)] = colour
    return drawn


class Results:
    """The files of outputs/<name>/predict and the rows of its tables; the first picture removes an earlier call's."""

    def __init__(self, folder, names, options):
        self.folder, self.names, self.options = folder, names, options
        self.images, self.objects = [], []

    def add(self, picture, probabilities):
        """probabilities: (num_classes, h, w) uint16 of picture.small."""
        started = time.perf_counter()
        if not self.images:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.iterdir():
                if OWN_FILES.fullmatch(path.name):
                    path.unlink()
        name, (height, width) = self.names[picture.path], picture.image.shape[:2]
        masks, columns = [], {}
        for k, plane in enumerate(probabilities):
            ending = f"_{k}" if len(probabilities) > 1 else ""
            plane = squeeze(plane, (height, width))
            mask = plane > self.options.threshold * 65535
            if self.options.probability:
                self.write_picture(f"{name}_probability{ending}.png", plane)
            self.write_picture(f"{name}_mask{ending}.png", mask.view(np.uint8) * 255)
            area, objects = int(mask.sum()), self.add_objects(name, k, mask)
            columns[f"pixels{ending}"] = area
            columns[f"fraction{ending}"] = area / mask.size
            columns[f"objects{ending}"] = objects
            masks.append(mask)
        self.write_picture(f"{name}_overlay.png", draw_outlines(picture.image, masks))
        seconds = round(picture.seconds + time.perf_counter() - started, 4)
        scale = round(math.sqrt(picture.small.size / picture.image.size), 4)
        about = {"image": name, "path": picture.path, "width": width, "height": height, "scale": scale}
        self.images.append({**about, **columns, "seconds": seconds})

    def add_objects(self, name, k, mask):
        """Add a row for each connected region of the mask of class k -> how many there are."""
        count, _, boxes, centroids = cv2.connectedComponentsWithStats(mask.view(np.uint8), connectivity=8)
        for index in range(1, count):  # 0 is the background
            left, top, width, height, area = boxes[index].tolist()
            centroid = (round(value, 2) for value in centroids[index].tolist())
            self.objects.append((name, k, index, area, *centroid, left, top, width, height))
        return count - 1

    def write_picture(self, name, array):
        with atomic_path(self.folder / name) as temporary:
            write_png(temporary, array)

    def write_table(self, name, columns, rows):
        path = self.folder / name
        with atomic_path(path) as part, open(part, "w", newline="", encoding="utf-8", errors="replace") as file:
            csv.writer(file).writerows([columns, *rows])

    @contextlib.contextmanager
    def kept(self):
        """A block at whose end the tables are written, also when it is interrupted; an error of its own comes first."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(OSError):
                self.write_tables()
            raise
        self.write_tables()

    def write_tables(self):
        if not self.images:
            return
        self.write_table("images.csv", self.images[0].keys(), [row.values() for row in self.images])
        self.write_table("objects.csv", OBJECT_COLUMNS, self.objects)


def build_predictor(options, given):
    """The network that answers; ValueError for options that do not go together."""
    if options.onnx and (unused := given & {"level", "amp"}):
        raise ValueError(f"--{min(unused)} is not an option of --onnx: export.py decided it when it wrote the file")
    if options.scale and options.mode == "resize":
        raise ValueError("--scale is an option of --mode tile; --mode resize has the trained size")
    if options.onnx:
        return OnnxPredictor(options.onnx, options.device, options.name, options.tta)
    return Predictor(options.name, options.device, options.amp, options.level or "deepest", tta=options.tta)


def main():
    options, given = parse_options(build_parser)
    predictor = build_predictor(options, given)
    print(predictor.about)
    config, output = predictor.config, Path("outputs") / predictor.name / "predict"
    if options.scale:
        options.mode = "tile"
    elif options.mode == "tile" and not config.get("scale"):
        print("the run does not know the scale of its training pictures; taking --scale 1")
    files, failed = find_pictures(options.paths, leave_out=output)
    files, damaged = list_pages(files, options.page, options.channels)
    failed += damaged

    results = Results(output, output_names(files), options)
    with results.kept():
        for pictures in read_batches(files, options, config, failed):
            started = time.perf_counter()
            found = predict_tiled(predictor, np.stack([picture.small for picture in pictures]), options.batch_size)
            for picture, probabilities in zip(pictures, found, strict=True):
                picture.seconds += (time.perf_counter() - started) / len(pictures)
                results.add(picture, probabilities)

    if not results.images:
        reasons = [f"{path}: {reason}" for path, reason in failed]
        raise ValueError(f"nothing to predict; {listed(reasons, most=1)}")
    for path, reason in failed:
        print(f"predict.py: skipped {path}: {reason}", file=sys.stderr)
    print(f"{output}: {len(results.images)} pictures, {len(results.objects)} objects, {len(failed)} skipped")
    return 1 if failed else 0


if __name__ == "__main__":
    run_script(main)
