"""Raw stage1_train of the 2018 Data Science Bowl -> inputs/dsb2018_<size>/images/<id>.png and masks/0/<id>.png.

python preprocess_dsb2018.py --raw stage1_train.zip
"""

import contextlib
import io
import os
import re
import shutil
import signal
import statistics
import sys
import tempfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from cli import Parser, number, parse_options, run_script
from utils import write_yaml

RAW = Path("inputs/data-science-bowl-2018")
ENTRY = re.compile(r"(?P<root>(?:.*/)?)(?P<id>[^/]+)/(?P<kind>images|masks)/(?P<file>[^/]*)")
MAX_FILE_BYTES = 256 * 2**20  # of one PNG; the largest real one has 2 MB


def build_parser():
    parser = Parser(description="stage1_train -> a data set that train.py reads")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--raw", type=Path, help="stage1_train: the folder, the zip, or Kaggle's zip that contains it")
    parser.add_argument("--img_size", type=number(int, 8, 4096), default=96, help="side of the written squares")
    parser.add_argument("--output", type=Path, help="folder to write (default: inputs/dsb2018_<img_size>)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing data set")
    parser.add_argument("--num_workers", type=number(int, 1, 256), default=os.cpu_count(), help="threads")
    return parser


# ---------------------------------------------------------------- the raw data


@dataclass
class Sample:
    """The files of one image: names to be given to the `read` of find_samples."""

    images: list = field(default_factory=list)
    masks: list = field(default_factory=list)


def group_entries(names):
    """`<root>/<id>/images/*.png` and `<root>/<id>/masks/*.png` -> {id: Sample}, sorted by id.

    Of several roots the one named stage1_train is taken, or ValueError raised. {} when there is none.
    """
    roots = {}
    for name in sorted(set(names)):
        entry = ENTRY.fullmatch(name)
        if not entry or name.startswith("__MACOSX/"):
            continue
        sample = roots.setdefault(entry["root"], {}).setdefault(entry["id"], Sample())
        if entry["file"].lower().endswith(".png") and not entry["file"].startswith("."):
            getattr(sample, entry["kind"]).append(name)
    if len(roots) > 1:
        roots = {root: samples for root, samples in roots.items() if root.endswith("stage1_train/")} or roots
    if len(roots) > 1:
        raise ValueError(
            f"several sets of images, in {', '.join(root or '.' for root in roots)}; expected stage1_train"
        )
    return next(iter(roots.values()), {})


def open_folder(folder):
    """(samples, read) of a stage1_train folder or of its parent."""
    candidates = (folder / "stage1_train" / "stage1_train", folder / "stage1_train", folder)
    root = next((root for root in candidates if any(root.glob("*/images"))), folder)
    names = []
    for kind in (*root.glob("*/images"), *root.glob("*/masks")):
        inside = kind.relative_to(root).as_posix()
        names += [
            f"{inside}/{file}" for file in ("", *(path.name for path in kind.iterdir()))
        ]  # "" keeps an id whose folder is empty
    return group_entries(names), lambda name: (root / name).read_bytes()


def open_zip(path):
    """(samples, read) of stage1_train.zip, or of a zip that contains it. Nothing is unpacked to disk."""
    try:
        archive = zipfile.ZipFile(path)
        samples = group_entries(archive.namelist())
        inner = [name for name in archive.namelist() if Path(name).name == "stage1_train.zip"]
        if not samples and inner:
            archive = zipfile.ZipFile(io.BytesIO(archive.read(inner[0])))
            samples = group_entries(archive.namelist())
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{path} is no whole zip file ({error}); download it again") from None

    def read(name):
        if archive.getinfo(name).file_size > MAX_FILE_BYTES:
            raise ValueError(f"{name} is larger than {MAX_FILE_BYTES:,} bytes")
        return archive.read(name)

    return samples, read


def find_samples(raw):
    """A folder or zip -> ({id: Sample} sorted by id, read: name -> bytes). ValueError when it holds no such images."""
    if raw.is_dir():
        samples, read = open_folder(raw)
        if not samples and (raw / "stage1_train.zip").is_file():
            return find_samples(raw / "stage1_train.zip")
    elif raw.exists():
        samples, read = open_zip(raw)
    else:
        raise FileNotFoundError(f"{raw}: no such file or folder; expected stage1_train, as a folder or a zip")
    if not samples:
        raise ValueError(f"{raw}: expected <id>/images/<id>.png and <id>/masks/*.png inside, found none")
    return samples, read


# ---------------------------------------------------------------- pixels


def decode(data, name):
    """PNG bytes -> (H, W) or (H, W, 3 or 4), uint8 or uint16, blue first. ValueError naming the file otherwise."""
    try:
        array = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:  # an empty file, or more pixels than OpenCV accepts
        array = None
    if array is None or array.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"{name} is no readable PNG")
    return array


def to_rgb(image):
    """What `decode` gives -> (H, W, 3) uint8 RGB; alpha is dropped (it is 255 everywhere in the real images).

    16-bit values are scaled by the smallest of 10, 12, 14, 16 bits that holds the brightest pixel, because cameras keep
    their 12 bits in 16; a full-scale image keeps its brightness, unlike with scaling by its own maximum.
    """
    if image.dtype == np.uint16:
        full_scale = next(2**bits - 1 for bits in (10, 12, 14, 16) if image.max() < 2**bits)
        image = np.round(image * (255 / full_scale)).astype(np.uint8)
    if image.ndim == 2:
        return cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)
    return cv2.cvtColor(image, cv2.COLOR_BGRA2RGB if image.shape[2] == 4 else cv2.COLOR_BGR2RGB)


def squeeze(array, size):
    """(H, W[, 3]) -> (size, size[, 3]): the area average along a side that shrinks, linear along one that grows."""
    height, width = array.shape[:2]
    for shape, shrinks in (((size, height), width > size), ((size, size), height > size)):
        array = cv2.resize(array, shape, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    return array


def squeeze_mask(union, size):
    """(H, W) bool -> (size, size) bool whose number of foreground pixels is that of the area average, rounded.

    The k pixels with the highest coverage are foreground, k = round(sum of the coverage). Equal coverage is settled by
    the neighbourhood's, then in raster order.
    """
    coverage = squeeze(union.astype(np.float32), size)
    k = round(float(coverage.sum(dtype=np.float64)))
    rank = np.round(coverage + 1e-3 * cv2.blur(coverage, (3, 3)), 5)
    small = np.zeros(size * size, bool)
    small[np.argsort(-rank, axis=None, kind="stable")[:k]] = True
    return small.reshape(size, size)


def unite(masks, shape):
    """Instance masks as `decode` gives them -> (H, W) bool, the union of all that is not 0. masks: (name, array)."""
    union = np.zeros(shape, bool)
    for name, mask in masks:
        if mask.shape[:2] != shape:
            found, expected = ("x".join(map(str, side[1::-1])) for side in (mask.shape, shape))
            raise ValueError(f"{name} has {found} pixels, its image {expected}")
        union |= (mask if mask.ndim == 2 else mask[..., :3].max(axis=2)) > 0
    return union


def save_png(path, array):
    """Through Python's own file, because cv2.imwrite tells nobody about a full disk."""
    path.write_bytes(cv2.imencode(".png", array)[1])


# ---------------------------------------------------------------- the data set


def load(sample, read):
    """Sample -> (H, W, 3) uint8 RGB, (H, W) bool. ValueError with the reason when the sample cannot be used."""
    if len(sample.images) != 1:
        raise ValueError(f"{len(sample.images) or 'no'} image files, expected 1")
    if not sample.masks:
        raise ValueError("no masks")
    try:
        image = to_rgb(decode(read(sample.images[0]), sample.images[0]))
        masks = ((name, decode(read(name), name)) for name in sample.masks)
        return image, unite(masks, image.shape[:2])
    except (OSError, EOFError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"cannot be read: {error}") from None


@contextlib.contextmanager
def new_folder(output, overwrite):
    """Yields a folder to fill; it becomes `output` when the block ends well and vanishes when it does not."""
    output = Path(output).resolve()
    if output.exists():
        whole = (output / "dataset.yml").is_file()
        if not overwrite:
            raise FileExistsError(f"{output} exists; give --overwrite to replace it, or another --output")
        if not output.is_dir() or (any(output.iterdir()) and not whole):
            raise FileExistsError(f"{output} is no data set of this script (no dataset.yml); remove it yourself")
    output.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".tmp", dir=output.parent))
    try:
        (scratch / "new").mkdir()
        yield scratch / "new"
        if output.exists():
            output.rename(scratch / "old")
        (scratch / "new").rename(output)
    finally:
        if (scratch / "old").exists() and not output.exists():
            (scratch / "old").rename(output)
        shutil.rmtree(scratch, ignore_errors=True)


def write_sample(folder, img_id, image, union, size):
    """Writes the small image and mask; returns what the summary counts."""
    mask = squeeze_mask(union, size)
    save_png(folder / "images" / f"{img_id}.png", squeeze(image, size)[..., ::-1])
    save_png(folder / "masks" / "0" / f"{img_id}.png", mask.astype(np.uint8) * 255)
    return {"foreground": float(mask.mean()), "scale": size / float(np.sqrt(union.size))}


def convert(folder, samples, read, size, num_workers):
    """Fill `folder` from the raw samples, in threads. Returns ({id: counts}, {id: why it was skipped})."""
    (folder / "images").mkdir()
    (folder / "masks" / "0").mkdir(parents=True)

    def work(img_id):
        try:
            image, union = load(samples[img_id], read)
        except ValueError as error:
            return str(error)
        return {**write_sample(folder, img_id, image, union, size), "masks": len(samples[img_id].masks)}

    pool = ThreadPoolExecutor(num_workers)  # OpenCV lets go of the interpreter's lock while it decodes
    try:
        futures = {pool.submit(work, img_id): img_id for img_id in samples}
        results = {futures[done]: done.result() for done in tqdm(as_completed(futures), total=len(futures), unit="img")}
    finally:
        pool.shutdown(cancel_futures=True)
    results = {img_id: results[img_id] for img_id in samples}
    skipped = {img_id: result for img_id, result in results.items() if isinstance(result, str)}
    return {img_id: result for img_id, result in results.items() if img_id not in skipped}, skipped


def describe(source, size, written, skipped):
    """The content of dataset.yml."""
    return {
        "source": str(source),
        "img_size": size,
        "images": len(written),
        "masks": sum(counts["masks"] for counts in written.values()),
        "foreground": round(statistics.fmean(counts["foreground"] for counts in written.values()), 6),
        "scale": round(statistics.median(counts["scale"] for counts in written.values()), 6),
        "skipped": skipped,
    }


def stop_on_sigterm():
    """`kill` unwinds like Ctrl-C, so that the temporary folder is removed."""

    def stop(signum, frame):
        print(f"\n{Path(sys.argv[0]).name}: stopped by a signal", file=sys.stderr)
        sys.exit(128 + signum)

    signal.signal(signal.SIGTERM, stop)


def main():
    options, _ = parse_options(build_parser)
    started = time.perf_counter()
    stop_on_sigterm()
    cv2.setNumThreads(1)  # the images are spread over threads already
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # its warnings name no file
    output = options.output or Path(f"inputs/dsb2018_{options.img_size}")
    raw = options.raw or RAW
    with new_folder(output, options.overwrite) as folder:
        samples, read = find_samples(raw)
        written, skipped = convert(folder, samples, read, options.img_size, options.num_workers)
        if not written:
            raise ValueError(
                f"{raw}: all {len(skipped)} images had to be skipped, the first: {next(iter(skipped.values()))}"
            )
        summary = describe(raw, options.img_size, written, skipped)
        write_yaml(folder / "dataset.yml", summary)
    for img_id, reason in skipped.items():
        print(f"skipped {img_id}: {reason}")
    print(
        f"{output}: {summary['images']:,} images, {summary['masks']:,} masks, {len(skipped)} skipped, "
        f"foreground {summary['foreground']:.2%}, {time.perf_counter() - started:.1f} s"
    )


if __name__ == "__main__":
    run_script(main)
