"""Label files: pictures whose values number the objects, 0 for background, as most programs for cells write them.

path = find_labels("inputs/my_cells/labels", "img01")    # img01.png, .tif or .tiff
labels = read_labels(path, shape=(256, 320))             # (256, 320) int32
write_labels("inputs/my_cells/labels/img01.png", labels)

Objects that touch keep their own numbers, which is what a mask cannot say.
"""

import numpy as np

from common.headers import read_header, upright
from common.images import MAX_PIXELS, imdecode, write_png
from common.tiff import Stack, is_tiff
from data_folder import find_file
from instances import sequential

EXTENSIONS = (".png", ".tif", ".tiff")
MAX_OBJECTS = np.iinfo(np.uint16).max  # in a file of 16 bits
UNREADABLE = "unreadable: no whole PNG or TIFF of 8, 16 or 32 bits"
EXPECTED = "expected one channel of whole numbers of 8, 16 or 32 bits"


def find_labels(folder, img_id):
    """The label file of an id in a folder: <id>.png, <id>.tif or <id>.tiff, or the same in upper case.

    Raises ValueError unless there is exactly one.
    """
    paths = [find_file(folder, img_id, extension) for extension in EXTENSIONS]
    found = [path for path in paths if path.is_file()]
    if not found:
        raise ValueError(f"no labels ({folder})")
    if len(found) > 1:
        raise ValueError(f"several label files, {' and '.join(path.suffix for path in found)} ({folder})")
    return found[0]


def read_labels(path, shape=None, max_pixels=MAX_PIXELS):
    """A PNG or TIFF of 8, 16 or 32 bits -> (H, W) int32, upright, with the numbers as in the file, 0 for background.

    Only if a number is larger than the count of pixels, all become 1 ... n in the same order, so that a table with a
    row for each number never outgrows the picture.
    shape: the (height, width) that the labels must have.
    Raises ValueError, naming the file, if it is damaged, has several channels or pages, fractions, negative numbers or
    another size, and, before anything is decoded, if its header declares more than max_pixels pixels.
    """
    try:
        with open(path, "rb") as file:
            labels = _decode(file, max_pixels)
        if shape is not None and labels.shape != tuple(shape):
            found, expected = (f"{width} x {height}" for height, width in (labels.shape, shape))
            raise ValueError(f"{found} pixels, its image has {expected}")
        if labels.min() < 0:
            raise ValueError(f"the number {labels.min()}; expected 0 for background and 1 ... n for the objects")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if labels.max() > labels.size:
        return sequential(labels)
    return labels.astype(np.int32)


def _decode(file, max_pixels):
    """An open label file -> (H, W) of whole numbers, upright. ValueError says what is wrong with it."""
    begins = file.read(4)
    file.seek(0)
    array = _decode_tiff(file, max_pixels) if is_tiff(begins) else _decode_png(file, max_pixels)
    if array.ndim == 3 or array.dtype.kind == "f":
        channels = 1 if array.ndim == 2 else array.shape[2]
        raise ValueError(f"{channels} channel(s) of {array.dtype}; {EXPECTED}")
    return array


def _decode_tiff(file, max_pixels):
    with Stack(file) as stack:
        if len(stack) > 1:
            raise ValueError(f"{len(stack)} pages, expected one")
        stack.check(0, max_pixels)
        array = imdecode(file)  # knows compressed numbers of 32 bits; turns a TIFF upright
        if array is None:
            array = stack.read(0, range(len(stack.channels(0))))
        return 255 - array if stack.is_inverted else array


def _decode_png(file, max_pixels):
    orientation = read_header(file, max_pixels)
    array = imdecode(file)
    if array is None:
        raise ValueError(UNREADABLE)
    return upright(array, orientation)


def write_labels(path, labels):
    """(H, W) of whole numbers 0 ... n -> a PNG of 16 bits. ValueError if it has more than 65,535 objects."""
    if labels.max(initial=0) > MAX_OBJECTS:
        raise ValueError(f"{labels.max():,} objects; a label file of 16 bits holds at most {MAX_OBJECTS:,}")
    write_png(path, labels.astype(np.uint16))
