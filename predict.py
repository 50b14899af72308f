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
where that is not enough. images.csv has one row per picture, with the size of a pixel
where a TIFF tells it; objects.csv one row per connected region (8 neighbours): area, centroid and box in pixels counted
from 0.

A second call adds to the folder and to the tables. It replaces the results of the same pictures, and nothing else. A
call that was stopped goes on with --resume.

A network recognises things at about the size, in pixels, at which it saw them in training. --mode resize squeezes the
whole picture to the trained size, such as 96 x 96, as in training: right for pictures like those of the training.
--mode tile shows it piece by piece: right for slides, which a squeeze would blur, and thumbnails. The scale, in pixels
that the network sees per pixel of the picture, is then that of the median training picture; if your things are twice as
large as those, halve it with --scale. The default, auto, resizes, but takes tiles where resizing would make things more
than 5 times smaller or larger than in the median picture. docs/RESULTS.md compares the two.

Exit status: 0; 1 when some pictures could not be read and the others are done; 2 when nothing was done.
"""

import argparse
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.cli import Parser, add_machine_options, listed, number, parse_options, run_script
from common.headers import check_pixels
from common.images import MAX_PIXELS, PageReader, find_pictures, list_pages, squeeze, to_channels
from inference import LEVELS, OnnxPredictor, Predictor, predict_tiled
from predictions import Results, earlier_results, is_done, output_names, write_page

FARTHEST = 5  # times the training's scale that --mode auto resizes to; DSB2018's own pictures are up to 4.2 off
HELD_BYTES = 2**28  # of decoded pictures that wait in one batch, whatever --batch_size


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
    output = "folder of the results; default: outputs/<name>/predict"
    a("--output", type=Path, metavar="FOLDER", help=output)
    a("--resume", action="store_true", help="leave out pictures that are done already, with the same options")
    a("--level", choices=LEVELS, help="head that answers; default: the deepest")
    mode = "resize: the whole picture at the trained size; tile: pieces of it at --scale; auto: what fits"
    a("--mode", choices=("auto", "resize", "tile"), default="auto", help=mode)
    scale = "predict in tiles; 0.5 shows the network the picture at half its size; default: the scale of the training"
    a("--scale", type=number(float, 1e-3, 100), help=scale)
    a("--tta", action="store_true", help="average the eight flips and turns: eight times the work")
    a("--threshold", type=number(float, 0, 1), default=0.5, help="the mask is where the probability is above it")
    a("--probability", action="store_true", help="write <stem>_probability.png as well")
    a("--page", type=number(int, 0), help="of files with several pages, this one alone, counted from 0; default: all")
    channels = "one channel, counted from 0, for grey, or three for red, green and blue: 0 or 2,1,0"
    a("--channels", type=channel_numbers, metavar="K[,K,K]", help=channels)
    a("--html", action="store_true", help="write report.html, one page of all outlines in the folder")
    a("--max_pixels", type=number(int, 1, 2**30), default=MAX_PIXELS, help="refuse larger pictures")
    a("-b", "--batch_size", type=number(int, 1), default=8, help="pictures or tiles at once")
    add_machine_options(parser)
    return parser


# ---------------------------------------------------------------- pictures in


@dataclass
class Picture:
    path: Path
    image: np.ndarray  # (H, W, C) uint8, as large as in the file
    small: np.ndarray  # (h, w, C) uint8, as the network sees it
    tiled: bool  # whether that is at the scale of tiles, not at the trained size
    seconds: float


def in_tiles(shape, options, config):
    """Whether the network sees a picture of (height, width) in tiles, by --mode; the size of training otherwise."""
    scale = options.scale or config.get("scale")
    if options.mode != "auto" or not scale:
        return options.mode == "tile"
    resized = math.sqrt(config["input_h"] * config["input_w"] / math.prod(shape))
    return not 1 / FARTHEST <= resized / scale <= FARTHEST


def seen_size(shape, tiled, options, config):
    """(height, width) of a picture -> (height, width) at which the network sees it."""
    if not tiled:
        return config["input_h"], config["input_w"]
    scale = options.scale or config.get("scale") or 1
    return tuple(max(1, round(side * scale)) for side in shape)


def read_batches(files, options, config, failed):
    """Yields lists of consecutive Pictures whose `small` have one size. What cannot be read goes to `failed`."""
    batch, reader = [], PageReader(options.max_pixels, options.channels)
    for path in files:
        started = time.perf_counter()
        try:
            image = to_channels(reader.read(path), config["input_channels"])
            tiled = in_tiles(image.shape[:2], options, config)
            size = seen_size(image.shape[:2], tiled, options, config)
            check_pixels(size[::-1], options.max_pixels)
            picture = Picture(path, image, squeeze(image, size), tiled, time.perf_counter() - started)
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


# ---------------------------------------------------------------- the whole


def build_predictor(options, given):
    """The network that answers; ValueError for options that do not go together."""
    if options.onnx and (unused := given & {"level", "amp"}):
        raise ValueError(f"--{min(unused)} is not an option of --onnx: export.py decided it when it wrote the file")
    if options.scale and options.mode == "resize":
        raise ValueError("--scale is an option of --mode tile; --mode resize has the trained size")
    if options.onnx:
        return OnnxPredictor(options.onnx, options.device, options.name, options.tta)
    return Predictor(options.name, options.device, options.amp, options.level or "deepest", tta=options.tta)


def settings_of(options, predictor):
    """What the results depend on, in words, for the tables and for --resume."""
    model = options.onnx or f"models/{predictor.name} {predictor.head}"
    settings = [str(model), f"mode {options.mode}", f"threshold {options.threshold:g}"]
    if options.scale:
        settings.append(f"scale {options.scale:g}")
    if options.channels:
        settings.append(f"channels {','.join(map(str, options.channels))}")
    settings += [name for name in ("tta", "probability") if getattr(options, name)]
    return ", ".join(settings)


def check_apart(paths, files, output):
    """ValueError when the results would lie among the pictures, whose files they might replace."""
    if output.resolve() in {path.resolve() for path in (*map(Path, paths), *(file.parent for file in files))}:
        raise ValueError(f"{output} is the pictures' own folder, and results might replace them; give another --output")


def predict_all(predictor, files, results, options, failed):
    """Segment the files, in batches; what cannot be read goes to `failed`."""
    with results.kept(len(files)), tqdm(total=len(files), desc="predict", unit="img", leave=False, disable=None) as bar:
        for pictures in read_batches(files, options, predictor.config, failed):
            started = time.perf_counter()
            found = predict_tiled(predictor, np.stack([picture.small for picture in pictures]), options.batch_size)
            each = (time.perf_counter() - started) / len(pictures)
            for picture, probabilities in zip(pictures, found, strict=True):
                picture.seconds += each
                results.add(picture, probabilities)
            bar.update(len(pictures))


def main():
    options, given = parse_options(build_parser)
    predictor = build_predictor(options, given)
    print(predictor.about)
    output = options.output or Path("outputs") / predictor.name / "predict"
    if options.scale:
        options.mode = "tile"
    elif options.mode == "tile" and not predictor.config.get("scale"):
        print("the run does not know the scale of its training pictures; taking --scale 1")
    files, failed = find_pictures(options.paths, leave_out=output)
    check_apart(options.paths, files, output)
    files, damaged = list_pages(files, options.page, options.channels)
    failed += damaged

    settings, earlier = settings_of(options, predictor), earlier_results(output)
    names = output_names(files, {name: row["path"] for name, row in earlier.items()})
    done = set()
    if options.resume:
        done = {names[file] for file in files if is_done(output, earlier.get(names[file]), settings)}
        found, files = files, [file for file in files if names[file] not in done]
        print(f"{len(done)} of {len(found)} pictures are done already")
    results = Results(output, names, settings, options.threshold, options.probability)
    predict_all(predictor, files, results, options, failed)
    status = report(results, failed, done)
    if options.html:
        write_page(output, predictor.about)
        print(f"open {output / 'report.html'}")
    return status


def report(results, failed, done):
    """Print what was done, and what not -> the exit status. done: names of the pictures that were done before."""
    if not (results.images or done):
        reasons = [f"{path}: {reason}" for path, reason in failed]
        raise ValueError(f"nothing to predict; {listed(reasons, most=1)}")
    for path, reason in failed:
        print(f"predict.py: skipped {path}: {reason}", file=sys.stderr)
    for words, names in results.suspicions():
        about = f"{words} in {len(names)} of {len(results.images)} pictures"
        print(f"predict.py: warning: {about}: {listed(names)}; look at the overlays", file=sys.stderr)
    skipped = f", {len(failed)} skipped" if failed else ""
    if results.images:
        print(f"{results.folder}: {results.about()}{skipped}")
    return 1 if failed else 0


if __name__ == "__main__":
    run_script(main)
