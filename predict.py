"""Segment any pictures with a trained run: masks, outlines and tables of what was found, at the original size.

python predict.py --name run1 slide.tif scans/ "more/*.png"
python predict.py --onnx outputs/run1/run1_L4.onnx scans/             # what export.py wrote, without PyTorch

Files, folders (searched through) and patterns; PNG, JPEG, TIFF or BMP of 8 or 16 bits, grey or colour, of any size;
orientation tags are not followed. outputs/<name>/predict/ gets for each picture <stem>_mask.png (0 and 255; with
several classes <stem>_mask_0.png ...), <stem>_overlay.png (outlines) and, with --probability, <stem>_probability.png
(16 bits, 65535 = 1; the mask is where it is above the threshold). A stem that several pictures share gets the name of
their folder in front, and a number where that is not enough. images.csv has a row a picture; objects.csv a row a
connected region (8 neighbours): area, centroid and box in pixels counted from 0. The results of an earlier call go.

--mode resize shows the network the whole picture at the trained size, as in training. --mode tile shows it overlapping
tiles at the scale of the median training picture, or --scale. The default, auto, resizes, and takes tiles where that
would make things more than 5 times smaller or larger than the median's: on slides and thumbnails. On the 134
validation pictures of DSB2018 at their full size, 256 to 1024 pixels, a network trained at 96 pixels reached a pooled
IoU of 0.823 by resizing and 0.821 in tiles, and 0.805 and 0.790 as the mean over pictures (95 % of the differences
lie in -0.014 to 0.008 and -0.030 to -0.003). Tiles won on fluorescence of 696 x 520 (0.838, 0.823), resizing on smears
of 1024 x 1024 (0.490, 0.084), whose nuclei --mode tile shows 4 times as large as training did.

Exit status: 0; 1 when some of the pictures could not be read and the others are done; 2 when nothing was done.
"""

import argparse
import collections
import contextlib
import csv
import glob
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
from common.cli import Parser, number, parse_options, run_script
from common.files import atomic_path, is_plain_name
from common.images import MAX_PIXELS, check_pixels, read_picture, squeeze, to_channels, write_png

EXTENSIONS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")  # looked for in folders; a file may have any name
TILE, OVERLAP = 256, 64  # pixels that the network sees
FARTHEST = 5  # times the training's scale that --mode auto resizes to; DSB2018's own pictures are up to 4.2 off
MULTIPLE = 16  # what a network pads to; tiles that begin on it pool the same pixels together as the whole picture does
HELD_BYTES = 2**28  # of decoded pictures that wait in one batch, whatever --batch_size
OWN_FILES = r"(images|objects)\.csv|.*_(mask|overlay|probability)(_\d+)?\.png"
OWN_FILES = re.compile(rf"{OWN_FILES}|\.({OWN_FILES})\.\d+\.tmp", re.DOTALL)  # the latter of a killed call
OBJECT_COLUMNS = ("image", "class", "object", "area", "centroid_x", "centroid_y", "left", "top", "width", "height")


def build_parser():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a = parser.add_argument
    a("paths", nargs="+", metavar="PATH", help="a picture, a folder of pictures or a pattern such as 'scans/*.tif'")
    a("--name", help="models/<name>; default: the newest run")
    a("--onnx", type=Path, metavar="FILE", help="a file of export.py instead of a run; needs ONNX Runtime")
    a("--level", choices=("1", "2", "3", "4", "mean"), help="head that answers; default: the deepest")
    a("--mode", choices=("auto", "resize", "tile"), default="auto", help="default auto; see above")
    a("--scale", type=number(float, 1e-3, 100), help="take tiles, of so many pixels per pixel; default: as in training")
    a("--tta", action="store_true", help="average the eight flips and rotations: eight times the work")
    a("--threshold", type=number(float, 0, 1), default=0.5, help="what is above it belongs to the mask; default 0.5")
    a("--probability", action="store_true", help="write <stem>_probability.png as well")
    a(
        "--max_pixels",
        type=number(int, 1, 2**30),
        default=MAX_PIXELS,
        help="refuse pictures of more; default %(default)s",
    )
    a("-b", "--batch_size", type=number(int, 1), default=8, help="pictures or tiles at once; default 8")
    a("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps; default auto")
    a("--amp", choices=("auto", "off", "bf16", "fp16"), default="auto", help="mixed precision; default auto")
    return parser


# ---------------------------------------------------------------- the network


def torch_probability(options):
    """-> a function from images, uint8 (N, H, W, C), to probabilities, float32 (N, H, W, classes); the run's config."""
    import torch

    from archs import probabilities
    from common.devices import pick_amp, pick_device
    from common.runs import newest_run
    from dataset import standardise
    from val import load_trained

    device = pick_device(options.device)
    amp = pick_amp(options.amp, device)
    name = options.name or newest_run("arch")
    model, config = load_trained(name, device, level=options.level or "deepest")
    head = "mean of its heads" if options.level == "mean" else model.head_names[-1]
    model = model.folded()

    @torch.inference_mode()
    def probability(images):
        batch = standardise(torch.from_numpy(images).to(device).permute(0, 3, 1, 2), config["mean"], config["std"])
        with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
            output = model(batch)
        return probabilities(output).permute(0, 2, 3, 1).cpu().numpy()

    print(f"models/{name}, {head}, {device}, {str(amp or 'float32').removeprefix('torch.')}")
    return probability, {**config, "name": name}


def onnx_probability(options):
    """The same of a file that export.py wrote."""
    try:
        import onnxruntime
    except ImportError:
        raise ValueError("--onnx needs ONNX Runtime, which is not installed: pip install onnxruntime") from None

    content = options.onnx.read_bytes()
    providers = ["CPUExecutionProvider"] if options.device == "cpu" else onnxruntime.get_available_providers()
    try:
        session = onnxruntime.InferenceSession(content, providers=providers)
        (images,), (output,) = session.get_inputs(), session.get_outputs()
        about = session.get_modelmeta().custom_metadata_map
        config = {"input_channels": int(images.shape[3]), "num_classes": int(output.shape[3])}
        config |= {"input_h": int(about["input_h"]), "input_w": int(about["input_w"])}
        config |= {"scale": float(about.get("scale") or 0), "name": options.name or Path(about["name"]).name}
    except Exception as error:  # ONNX Runtime's errors have no class in common
        raise ValueError(f"{options.onnx} is no ONNX file of export.py ({type(error).__name__})") from None
    fits = config["input_channels"] in (1, 3, 4) and 1 <= config["num_classes"] <= 100
    fits &= all(1 <= config[key] <= 4096 for key in ("input_h", "input_w")) and 0 <= config["scale"] < 1e6
    if not fits or not is_plain_name(config["name"]):
        raise ValueError(f"{options.onnx} is no ONNX file of export.py: {config}")
    print(f"{options.onnx}, {session.get_providers()[0]}")

    def probability(batch):
        try:
            [found] = session.run(None, {images.name: batch})
        except Exception as error:
            raise ValueError(f"{options.onnx} cannot be run ({type(error).__name__})") from None
        whole = getattr(found, "dtype", None) == np.float32 and found.shape == (*batch.shape[:3], config["num_classes"])
        if not whole or not (found.min() >= 0 and found.max() <= 1 + 1e-6):  # which NaN is not either
            raise ValueError(
                f"{options.onnx} answers with something else than probabilities of {batch.shape[1:3]} pixels"
            )
        return found

    return probability, config


def eight_ways(probability):
    """The mean over the eight flips and rotations of a batch, each turned back."""

    def average(images):
        total = np.float32(0)
        for turns, flip in itertools.product(range(4), (1, -1)):
            seen = np.ascontiguousarray(np.rot90(images[:, ::flip], turns, (1, 2)))
            total = total + np.rot90(probability(seen), -turns, (1, 2))[:, ::flip]
        return total / 8

    return average


# ---------------------------------------------------------------- tiles


def windows(length, tile, overlap=OVERLAP):
    """Where the tiles of a side begin and what they weigh: (starts, float32 (len(starts), min(tile, length))).

    All sizes are multiples of 16, and so are the starts; neighbours overlap by `overlap` or more.
    The weights of a tile are a raised cosine, never 0, divided so that those of all tiles sum to 1 at every pixel.
    """
    size = min(tile, length)
    steps = -(-(length - size) // (tile - overlap))  # rounded up, then spread evenly
    starts = [k * (length - size) // max(1, steps) // MULTIPLE * MULTIPLE for k in range(steps + 1)]
    bump = 0.5 - 0.5 * np.cos(2 * np.pi * (np.arange(size) + 0.5) / size)
    total = np.zeros(length)
    for start in starts:
        total[start : start + size] += bump
    return starts, np.stack([bump / total[start : start + size] for start in starts]).astype(np.float32)


def predict_tiled(probability, images, num_classes, tile, batch_size):
    """(N, H, W, C) uint8 -> (N, num_classes, H, W) uint16, 65535 = 1; the network sees a batch of tiles at a time.

    tile: (height, width), multiples of 16; images that fit are seen whole. Sides are padded to a multiple of 16 at
    their ends by replication, as the network itself does, so that every tile begins on one and all have one size.
    The sums of one row of tiles are kept, and those lines that the next row does not reach go to the result.
    """
    height, width = images.shape[1:3]
    images = np.pad(images, [(0, 0), (0, -height % MULTIPLE), (0, -width % MULTIPLE), (0, 0)], mode="edge")
    count, bottom, right = images.shape[:3]
    (tops, row_weights), (lefts, column_weights) = windows(bottom, tile[0]), windows(right, tile[1])
    tile_h, tile_w = row_weights.shape[1], column_weights.shape[1]
    places = [(k, left, weights) for k in range(count) for left, weights in zip(lefts, column_weights, strict=True)]
    result = np.empty((count, num_classes, height, width), np.uint16)
    strip = np.zeros((count, tile_h, right, num_classes), np.float32)
    for top, end, weights_y in zip(tops, [*tops[1:], bottom], row_weights, strict=True):
        for batch in (places[first : first + batch_size] for first in range(0, len(places), batch_size)):
            seen = np.stack([images[k, top : top + tile_h, left : left + tile_w] for k, left, _ in batch])
            for (k, left, weights_x), values in zip(batch, probability(seen), strict=True):
                strip[k, :, left : left + tile_w] += values * (weights_y[:, None] * weights_x)[..., None]
        stop = min(end, height)
        result[:, :, top:stop] = np.rint(strip[:, : stop - top, :width] * 65535).transpose(0, 3, 1, 2)
        strip = np.concatenate([strip[:, end - top :], np.zeros_like(strip[:, : end - top])], axis=1)
    return result


# ---------------------------------------------------------------- pictures in


def find_files(paths, output):
    """-> (files, [(path, what is wrong)]): files as given, those in folders sorted, each file once.

    A folder's pictures are those with a known extension; hidden files and our own results are none.
    """
    files, failed = [], []
    for path in map(Path, paths):
        pattern = [] if path.exists() else sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207, may be absolute
        matches = [path] if path.exists() else [Path(match) for match in pattern]
        found = [match for match in matches if not match.is_dir()]
        for folder in (match for match in matches if match.is_dir()):
            inside = (p for p in sorted(folder.rglob("*")) if p.suffix.lower() in EXTENSIONS and p.is_file())
            found += [p for p in inside if p.name[0] != "." and p.parent.resolve() != output.resolve()]
        if not found:
            failed.append((path, "holds no picture" if matches else "no such file"))
        files += found
    return list({path.resolve(): path for path in files}.values()), failed


def output_names(files):
    """{file: what the names of its results begin with}, all different even where capitals make no difference.

    The stem; where several files share it, <folder>_<stem>; where that is not enough, with _2, _3 ... at its end.
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
    """(height, width) of a picture -> (height, width) at which the network sees it; see --mode."""
    trained, scale = (config["input_h"], config["input_w"]), options.scale or config.get("scale")
    resized = math.sqrt(math.prod(trained) / math.prod(shape))
    fits = not scale or 1 / FARTHEST <= resized / scale <= FARTHEST
    if options.mode == "resize" or (options.mode == "auto" and fits):
        return trained
    return tuple(max(1, round(side * (scale or 1))) for side in shape)


def read_batches(files, options, config, failed):
    """Yields lists of Pictures: those in a row whose `small` have one size. What cannot be read goes to `failed`."""
    batch = []
    for path in tqdm(files, "predict", unit="img", leave=False, disable=None):
        started = time.perf_counter()
        try:
            image = to_channels(read_picture(path, options.max_pixels), config["input_channels"])
            size = seen_size(image.shape[:2], options, config)
            check_pixels(size[::-1], options.max_pixels)
            picture = Picture(path, image, squeeze(image, size), time.perf_counter() - started)
        except (ValueError, OSError, MemoryError) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            hint = "; --max_pixels raises the limit" if "pixels are more than" in reason else ""
            failed.append((path, reason + hint))
            continue
        held = sum(waiting.image.nbytes for waiting in batch) + image.nbytes
        differs = batch and picture.small.shape != batch[0].small.shape
        if batch and (differs or len(batch) == options.batch_size or held > HELD_BYTES):
            yield batch
            batch = []
        batch.append(picture)
    if batch:
        yield batch


# ---------------------------------------------------------------- results out


def draw_outlines(image, masks):
    """(H, W, C) uint8 and a boolean (H, W) a class -> (H, W, 3) uint8: the brightened image, the masks' inner edges."""
    drawn = report.brighten(image[..., :3] if image.shape[2] >= 3 else image[..., :1].repeat(3, axis=2))
    width = 3 if max(image.shape) < 512 else 5  # lines of 1 pixel, or 2
    for mask, colour in zip(masks, itertools.cycle(report.PALETTE), strict=False):
        inner = cv2.erode(mask.view(np.uint8), np.ones((width, width), np.uint8))
        drawn[mask & (inner == 0)] = colour
    return drawn


class Results:
    """The files of outputs/<name>/predict and the rows of its tables; the first picture replaces an earlier call's."""

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
            columns |= {f"pixels{ending}": area, f"fraction{ending}": area / mask.size, f"objects{ending}": objects}
            masks.append(mask)
        self.write_picture(f"{name}_overlay.png", draw_outlines(picture.image, masks))
        seconds = round(picture.seconds + time.perf_counter() - started, 4)
        scale = round(math.sqrt(picture.small.size / picture.image.size), 4)
        about = {"image": name, "path": picture.path, "width": width, "height": height, "scale": scale}
        self.images.append({**about, **columns, "seconds": seconds})

    def add_objects(self, name, k, mask):
        """A row for each connected region of a mask of class k -> how many there are."""
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
        """Writes the tables at its end, also of an interrupted run; on a full disk, the picture's error is the one."""
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


def main():
    options, given = parse_options(build_parser)
    if options.onnx and (unused := given & {"level", "amp"}):
        raise ValueError(f"--{min(unused)} is no option of --onnx: export.py decided it when it wrote the file")
    if options.scale:
        if options.mode == "resize":
            raise ValueError("--scale is an option of --mode tile; --mode resize has the trained size")
        options.mode = "tile"
    probability, config = (onnx_probability if options.onnx else torch_probability)(options)
    if options.tta:
        probability = eight_ways(probability)
    output = Path("outputs") / config["name"] / "predict"
    files, failed = find_files(options.paths, output)
    tile = tuple(max(TILE, side + -side % MULTIPLE) for side in (config["input_h"], config["input_w"]))
    if options.mode == "tile" and not (options.scale or config.get("scale")):
        print("the run does not know at which scale it saw its training pictures; taking --scale 1")

    results = Results(output, output_names(files), options)
    with results.kept():
        for pictures in read_batches(files, options, config, failed):
            started, small = time.perf_counter(), np.stack([picture.small for picture in pictures])
            found = predict_tiled(probability, small, config["num_classes"], tile, options.batch_size)
            for picture, probabilities in zip(pictures, found, strict=True):
                picture.seconds += (time.perf_counter() - started) / len(pictures)
                results.add(picture, probabilities)

    if not results.images:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise ValueError(f"nothing to predict; {': '.join(map(str, failed[0]))}{more}")
    for path, reason in failed:
        print(f"predict.py: skipped {path}: {reason}", file=sys.stderr)
    print(f"{output}: {len(results.images)} pictures, {len(results.objects)} objects, {len(failed)} skipped")
    return 1 if failed else 0


if __name__ == "__main__":
    run_script(main)
