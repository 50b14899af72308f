"""Segment any pictures with a trained run: masks or individual nuclei, outlines and tables, at the original size.

python predict.py --name run1 slide.tif scans/ "more/*.png"
python predict.py --name nuclei --rois --geojson slide.tif            # a run of train.py --target instances
python predict.py --onnx outputs/run1/run1_L4.onnx scans/             # a file that export.py wrote, without PyTorch
torchrun --nproc_per_node=4 predict.py --name nuclei scans/           # four processes share the pictures

PATH is a file, a folder (searched recursively) or a pattern. PNG, JPEG, TIFF, BMP, WEBP and PPM of 8 or 16 bits can be
read, grey or colour, of any size; EXIF orientation is applied. Pictures of more than 8 bits are scaled between two
percentiles, which a hot pixel does not affect. A TIFF may also hold floats, and several pages (slices, time points,
positions): each page becomes a picture of its own, <stem>_p000, <stem>_p001 ..., unless --page selects one. A
microscope file with 2, 4 or more channels needs --channels.

A run of masks. For each picture outputs/<name>/predict/ gets <stem>_mask.png (0 and 255; with several classes
<stem>_mask_0.png ...), <stem>_overlay.png (outlines) and, with --probability, <stem>_probability.png (16 bits, 65535 =
1; the mask is where it is above the threshold). images.csv has one row per picture; objects.csv one per connected
region (8 neighbours): area, centroid and box in pixels counted from 0.

A run of individual nuclei (--target instances). Each picture gets <stem>_labels.tif (16 or 32 bits, 0 background, 1 ...
n the nuclei), in which the pages of a stack stay together, and <stem>_overlay.png with the outline of each nucleus.
images.csv has count, density and median diameter of each picture; objects.csv one row per nucleus: area, centroid, box,
equivalent diameter, eccentricity, solidity, perimeter, mean and largest value of each channel, confidence, and whether
it touches the border; with --pixel_size (or where a TIFF gives it) sizes also in micrometres.

Where several pictures have the same stem, the name of their folder is put before it, and a number is added if that is
not enough. A later call adds to the folder and to the tables, and replaces only the results of the same pictures.
--resume continues a call that was stopped.

A network recognises objects that have about the same size, in pixels, as in training. For individual nuclei the scale
is derived from what a first pass finds, or from --diameter. For masks, --mode resize resizes the whole picture to the
training size, such as 96 x 96: right for pictures like those in training. --mode tile shows the network one piece at a
time: right for slides, which resizing would blur, and for thumbnails. The scale of tiles, in network pixels per pixel
of the picture, is that of the median training picture; if your objects are twice as large as in that picture, halve it
with --scale. The default, auto, resizes, but switches to tiles where resizing would make objects more than 5 times
smaller or larger than in the median training picture. docs/RESULTS.md compares the two modes.

Exit status: 0 if all went well; 1 if some pictures could not be read and the others are done; 2 if nothing was done.
"""

import contextlib
import math
import sys
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.cli import (
    Parser,
    add_machine_options,
    channel_numbers,
    interruptible,
    listed,
    number,
    parse_options,
    run_script,
    warn,
)
from common.devices import pick_device
from common.distributed import gather, is_main, launched, processes, rank, world_size
from common.images import MAX_PIXELS, MOST_PIXELS, PageReader, file_of, find_pictures, list_pages, squeeze, to_channels
from common.report import open_page
from common.runs import OUTPUTS
from inference import LEVELS, OnnxPredictor, Predictor, predict_tiled
from predictions import (
    DIAMETERS,
    PIXEL_SIZES,
    MaskResults,
    Picture,
    earlier_results,
    forget_settings,
    is_done,
    output_names,
    reason_of,
    write_page,
)
from run_config import is_of_nuclei

OF_MASKS = ("mode", "scale", "threshold", "probability")  # options that only one of the two kinds of runs has
OF_NUCLEI = ("diameter", "pixel_size", "rois", "geojson", "submission")
FARTHEST = 5  # times the training's scale that --mode auto resizes to; DSB2018's own pictures are up to 4.2 off
HELD_BYTES = 2**28  # of decoded pictures that wait in one batch, whatever --batch_size


def build_parser():
    parser = Parser(description=__doc__)
    a = parser.add_argument
    a("paths", nargs="+", metavar="PATH", help="a picture, a folder of pictures or a pattern such as 'scans/*.tif'")
    a("--name", help="models/<name>; default: the newest run, or one that came with the repository")
    a("--onnx", type=Path, metavar="FILE", help="a file of export.py instead of a run; needs ONNX Runtime")
    output = "folder of the results; default: outputs/<name>/predict"
    a("--output", type=Path, metavar="FOLDER", help=output)
    a("--resume", action="store_true", help="skip pictures that have results from the same model and options")
    a("--level", choices=LEVELS, help="head whose output is used, or the mean of all; default: the deepest")
    a = parser.add_argument_group("masks").add_argument
    mode = "resize: the whole picture at the trained size; tile: pieces of it at --scale; auto: what fits"
    a("--mode", choices=("auto", "resize", "tile"), default="auto", help=mode)
    scale = "predict in tiles; 0.5 shows the network the picture at half its size; default: the scale of the training"
    a("--scale", type=number(float, 1e-3, 100), help=scale)
    a("--threshold", type=number(float, 0, 1), default=0.5, help="the mask is where the probability is above it")
    a("--probability", action="store_true", help="write <stem>_probability.png as well")

    a = parser.add_argument_group("individual nuclei: runs of --target instances").add_argument
    diameter = "diameter of a typical nucleus, in pixels of the picture; default: estimated from the picture"
    a("--diameter", type=number(float, *DIAMETERS), help=diameter)
    pixel_size = "micrometres per pixel, for the tables; default: from the TIFF's metadata, if any"
    a("--pixel_size", type=number(float, *PIXEL_SIZES), metavar="UM", help=pixel_size)
    a("--rois", action="store_true", help="write <stem>_rois.zip for ImageJ; needs requirements-objects.txt")
    a("--geojson", action="store_true", help="write <stem>.geojson for QuPath; needs requirements-objects.txt")
    submission = "write the run lengths of all nuclei as the 2018 Data Science Bowl wants them"
    a("--submission", type=Path, metavar="FILE", help=submission)

    a = parser.add_argument_group("pictures and speed").add_argument
    a("--tta", action="store_true", help="average over eight flips and rotations: eight times the work")
    a("--page", type=number(int, 0), help="read only this page of multi-page files, counted from 0; default: all")
    channels = "one channel, counted from 0, for grey, or three for red, green and blue: 0 or 2,1,0"
    a("--channels", type=channel_numbers, metavar="K[,K,K]", help=channels)
    a("--html", action="store_true", help="write report.html, a page with the outlines of up to 200 pictures")
    a("--open", action="store_true", help="write report.html and open it in the browser")
    a("--max_pixels", type=number(int, 1, MOST_PIXELS), default=MAX_PIXELS, help="refuse larger pictures")
    a("-b", "--batch_size", type=number(int, 1), default=8, help="pictures or tiles at once")
    add_machine_options(parser)
    return parser


# ---------------------------------------------------------------- pictures in


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
    batch = []
    with contextlib.closing(PageReader(options.max_pixels, options.channels)) as reader:
        for path in files:
            started = time.perf_counter()
            try:
                image = to_channels(reader.read(path), config["input_channels"])
                tiled = in_tiles(image.shape[:2], options, config)
                size = seen_size(image.shape[:2], tiled, options, config)
                if math.prod(size) > options.max_pixels:
                    raise ValueError(f"would be enlarged to {size[1]} x {size[0]} pixels; give a smaller --scale")
                picture = Picture(path, image, squeeze(image, size), tiled, time.perf_counter() - started)
            except (ValueError, OSError, MemoryError) as error:
                failed.append((path, reason_of(error)))
                continue
            held = sum(waiting.image.nbytes for waiting in batch) + image.nbytes
            differs = batch and picture.small.shape != batch[0].small.shape
            if batch and (differs or len(batch) == options.batch_size or held > HELD_BYTES):
                yield batch
                batch = []
            batch.append(picture)
    if batch:
        yield batch


def share_of(files):
    """Those of the files that this one of torchrun's processes takes; all pages of a file stay together."""
    sources = [file_of(file) for file in files]
    places = {source: k for k, source in enumerate(dict.fromkeys(sources))}
    return [file for file, source in zip(files, sources, strict=True) if places[source] % world_size() == rank()]


# ---------------------------------------------------------------- from pictures to results


def predict_masks(predictor, files, results, options, failed, bar):
    """Segment the files, in batches; what cannot be read goes to `failed`."""
    for pictures in read_batches(files, options, predictor.config, failed):
        started = time.perf_counter()
        found = predict_tiled(predictor, np.stack([picture.small for picture in pictures]), options.batch_size)
        each = (time.perf_counter() - started) / len(pictures)
        for picture, probabilities in zip(pictures, found, strict=True):
            picture.seconds += each
            results.add(picture, probabilities)
        bar.update(len(pictures))


def predict_nuclei(predictor, files, results, options, failed, bar):
    """Find the nuclei of the files, one after the other; what cannot be read goes to `failed`."""
    from nuclei.find import find_nuclei  # late: scikit-image takes a second

    batch_size = max(1, options.batch_size // 4)  # their tiles have four times the pixels
    with contextlib.closing(PageReader(options.max_pixels, options.channels)) as reader:
        for path in files:
            started = time.perf_counter()
            try:
                picture = reader.read(path)
                found = find_nuclei(predictor, picture, options.diameter, batch_size)
            except (ValueError, OSError, MemoryError) as error:
                failed.append((path, reason_of(error)))
                continue
            try:
                results.add(path, picture, found, time.perf_counter() - started, reader.values)
            except ValueError as error:  # too large for ImageJ
                failed.append((path, reason_of(error)))
                continue
            bar.update()


def build_results(folder, names, settings, options, of_nuclei):
    if not of_nuclei:
        return MaskResults(folder, names, settings, options.threshold, options.probability)
    from nuclei.predictions import NucleiResults

    return NucleiResults(folder, names, settings, options.pixel_size, options.rois, options.geojson)


# ---------------------------------------------------------------- the whole


def build_predictor(options, given, device):
    """The network that answers; ValueError for options that do not go together."""
    if options.onnx and (unused := given & {"level", "amp"}):
        raise ValueError(f"--{min(unused)} does not go with --onnx: export.py fixed it in the file")
    if options.scale and options.mode == "resize":
        raise ValueError("--scale needs --mode tile; --mode resize uses the training size")
    if options.onnx:
        predictor = OnnxPredictor(options.onnx, device, options.name, options.tta)
    else:
        predictor = Predictor(options.name, device, options.amp, options.level or "deepest", tta=options.tta)
    of_nuclei = is_of_nuclei(predictor.config)
    if unused := [name for name in (OF_MASKS if of_nuclei else OF_NUCLEI) if name in given]:
        finds = "individual nuclei (--target instances)" if of_nuclei else "masks, not individual nuclei"
        raise ValueError(f"--{unused[0]} does not go with {options.onnx or predictor.name}, which finds {finds}")
    return predictor


def settings_of(options, predictor):
    """What the results depend on, in words, for the tables and for --resume."""
    settings = [f"{options.onnx or f'models/{predictor.name} {predictor.head}'} ({predictor.digest})"]
    if not is_of_nuclei(predictor.config):
        settings += [f"mode {options.mode}", f"threshold {options.threshold:g}"]
    for name in ("scale", "diameter", "pixel_size"):
        if getattr(options, name):
            settings.append(f"{name} {getattr(options, name):g}")
    if options.channels:
        settings.append(f"channels {','.join(map(str, options.channels))}")
    settings += [name for name in ("tta", "probability", "rois", "geojson") if getattr(options, name)]
    return ", ".join(settings)


def check_apart(paths, files, output):
    """ValueError when the results would lie among the pictures, whose files they might replace."""
    if output.resolve() in {path.resolve() for path in (*map(Path, paths), *(file.parent for file in files))}:
        raise ValueError(f"{output} is the pictures' own folder, and results might replace them; give another --output")


def main():
    options, given = parse_options(build_parser)
    with processes(pick_device(options.device) if launched() > 1 else options.device) as device:
        return predict(options, given, device)


def predict(options, given, device):
    """Predict in one process -> exit status."""
    predictor = build_predictor(options, given, device)
    of_nuclei = is_of_nuclei(predictor.config)
    print(predictor.about)
    output = options.output or OUTPUTS / predictor.name / "predict"
    if options.scale:
        options.mode = "tile"
    elif options.mode == "tile" and not predictor.config.get("scale"):
        print("the run does not record the scale of its training pictures; using --scale 1")
    if options.submission:
        from nuclei.object_files import check_submission  # late: SciPy takes a second

        check_submission(options.submission)
    files, failed = find_pictures(options.paths, leave_out=output)
    check_apart(options.paths, files, output)
    files, damaged = list_pages(files, options.page, options.channels)
    failed += damaged

    settings, earlier = gather((settings_of(options, predictor), earlier_results(output)))[0]
    names, everything, done = output_names(files, {name: row["path"] for name, row in earlier.items()}), files, set()
    if options.resume:
        done = {names[file] for file in files if is_done(output, earlier.get(names[file]), settings)}
        done = gather(done)[0]  # of one process: another may already have replaced a file
        files = [file for file in files if names[file] not in done]
        print(f"{len(done)} of {len(everything)} pictures are done already")
    if is_main() and (again := [earlier[names[file]] for file in files if names[file] in earlier]):
        forget_settings(output, again)
    results, own, failed_here = build_results(output, names, settings, options, of_nuclei), share_of(files), []
    bar = tqdm(total=len(own), desc="predict", unit="img", leave=False, disable=not is_main() or None)
    with interruptible(), results.kept(len(own)), bar:
        find = predict_nuclei if of_nuclei else predict_masks
        find(predictor, own, results, options, failed_here, bar)
    shares = gather((results.images, results.limited, failed_here))
    results.images = [row for images, _, _ in shares for row in images]
    results.limited = [name for _, limited, _ in shares for name in limited]
    failed += [entry for _, _, failed_there in shares for entry in failed_there]
    if is_main():
        return report(results, failed, done, options, predictor, everything)
    return 0


def report(results, failed, done, options, predictor, files):
    """Finish, and print what was done, and what not -> the exit status. done: names of pictures done before."""
    if not (results.images or done):
        reasons = [f"{path}: {reason}" for path, reason in failed]
        raise ValueError(f"nothing to predict; {listed(reasons, most=1)}")
    results.finish()
    for path, reason in failed:
        print(f"predict.py: skipped {path}: {reason}", file=sys.stderr)
    for words, names in results.suspicions():
        warn(f"{words} in {len(names)} of {len(results.images)} pictures: {listed(names)}; look at the overlays")
    skipped = f", {len(failed)} skipped" if failed else ""
    if results.images:
        print(f"{results.folder}: {results.about()}{skipped}")
    if options.submission:
        left_out = {path for path, _ in failed}
        results.write_submission(options.submission, [file for file in files if file not in left_out])
        print(f"run lengths of all nuclei are in {options.submission}")
    if options.html or options.open:
        write_page(results.folder, predictor.about)
        print(f"open {results.folder / 'report.html'}")
    if options.open:
        open_page(results.folder / "report.html")
    return 1 if failed else 0


if __name__ == "__main__":
    run_script(main)
