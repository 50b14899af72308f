"""Picture files and their pixels, for both jobs: find, read, convert, shrink, standardise and write pictures.

files, failed = find_pictures(["slide.tif", "scans/", "more/*.png"])
pictures, damaged = list_pages(files)            # files of one page, and each page of the others: see PageReader
image = to_channels(read_picture(files[0]), 3)   # the nuclei job: (H, W, 3) uint8, RGB, all the pixels of the file
small = read_thumbnail(files[0], 320)            # the transfer job: (H, W, 3) uint8, RGB, a shorter side of 320 at most

All readers accept PNG, JPEG, TIFF, BMP, WEBP, PPM and PGM, check the size in the header before they decode anything,
and turn the picture as its EXIF orientation says.
"""

import glob
import io
import re
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from common.cli import listed
from common.contrast import stretch_to_uint8
from common.headers import (
    PNG_BEGINS,
    UNREADABLE,
    exif_orientation,
    open_picture,
    quieten_opencv,
    read_header,
    upright,
)
from common.tiff import Stack, is_tiff

EXTENSIONS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".ppm", ".pgm", ".webp")
MAX_PIXELS = 400_000_000  # default limit for an untrusted file: a few bytes can claim gigabytes of pixels
MOST_PIXELS = 2**30  # that OpenCV decodes: the highest limit


# ---------------------------------------------------------------- files


def is_picture(path):
    """Whether the name of a file ends like a picture's; hidden files are not pictures."""
    return path.suffix.lower() in EXTENSIONS and not path.name.startswith(".")


def find_pictures(paths, leave_out=None):
    """Files, folders and glob patterns -> (files, failed): each file once, and a list of (path, reason).

    A folder is searched recursively, in sorted order, for files that `is_picture` accepts. A file that is named or
    matched by a pattern may have any extension.
    leave_out: a folder, such as that of our own results; searching a folder skips the files directly inside it.
    """
    left_out = Path(leave_out).resolve() if leave_out else None
    files, failed = {}, []
    for path in map(Path, paths):
        matches = [path]
        if not path.exists():  # a pattern; Path.glob refuses absolute ones
            matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207
        found = [match for match in matches if not match.is_dir()]
        for folder in (match for match in matches if match.is_dir()):
            inside = (file for file in sorted(folder.rglob("*")) if is_picture(file) and file.is_file())
            found += [file for file in inside if file.parent.resolve() != left_out]
        if not found:
            failed.append((path, _why_nothing(matches)))
        files.update((file.resolve(), file) for file in found)
    return list(files.values()), failed


def _why_nothing(folders):
    if not folders:
        return "no such file"
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    endings = sorted({file.suffix.lower() for file in files if not is_picture(file)} - {""})
    return f"holds no picture; its files end in {listed(endings)}" if endings else "holds no picture"


@dataclass(frozen=True)
class Page:
    """A page of a TIFF file that has several; usable wherever the path of a picture is."""

    path: Path
    number: int  # from 0

    def __str__(self):
        return f"{self.path}, page {self.number}"

    @staticmethod
    def file_in(text):
        """str(page) -> the path of its file, a str; other paths are returned unchanged."""
        return re.sub(r", page \d+$", "", text)

    @property
    def ending(self):
        """_p003 for page 3, at the end of the names of its results."""
        return f"_p{self.number:03d}"

    @property
    def stem(self):
        """cells_p003 for page 3 of cells.tif."""
        return self.path.stem + self.ending


def file_of(picture):
    """The file of a picture that is given as a path or a Page."""
    return picture.path if isinstance(picture, Page) else picture


def list_pages(files, number=None, channels=None):
    """Files -> (pictures, failed): all their pages, or only page `number` of each; a list of (path, reason).

    A file with one page yields its path, any other a Page per page. channels: see PageReader; a file that lacks them
    fails as a whole.
    """
    pictures, failed = [], []
    for path in files:
        try:
            with open(path, "rb") as file:
                count = _count_pages(file, channels)
        except (ValueError, OSError) as error:
            failed.append((path, getattr(error, "strerror", None) or str(error)))
            continue
        if number is not None and number >= count:
            failed.append((path, f"has no page {number}; it has {count}, counted from 0"))
        elif count == 1:
            pictures.append(path)
        else:
            pictures += [Page(path, k) for k in range(count) if number in (None, k)]
    return pictures, failed


def _count_pages(file, channels):
    """How many pages an open file has: 1 unless it is a TIFF. ValueError when its channels have to be chosen."""
    if not is_tiff(file.read(4)):
        return 1
    with Stack(file) as stack:
        _wanted_channels(stack, 0, channels)
        return len(stack)


class PageReader:
    """Reads what list_pages found: read(picture) returns and raises what `decode` does.

    `values` then holds the same picture with the values of its file: a microscope's channels, which `decode` scales,
    are left unscaled. The file of a page stays open for the next one, until close().
    channels: the numbers of the channels to read, one for grey or three for red, green and blue; None for all: one,
    three, or those of a colour picture.
    """

    def __init__(self, max_pixels=MAX_PIXELS, channels=None):
        self.max_pixels, self.channels = max_pixels, channels
        self.path, self.file, self.stack, self.values = None, None, None, None

    def close(self):
        if self.file is not None:
            self.file.close()
        self.path = None

    def read(self, picture):
        seen, self.values = self._read(picture)
        return seen

    def _read(self, picture):
        if not isinstance(picture, Page):
            with open(picture, "rb") as file:
                return _decode(file, self.max_pixels, self.channels)
        if picture.path != self.path:
            self.close()
            self.file = open(picture.path, "rb")  # noqa: SIM115
            self.path, self.stack = picture.path, Stack(self.file)
        return _decode_page(self.stack, picture.number, self.max_pixels, self.channels)


# ---------------------------------------------------------------- files to arrays


def decode(data, max_pixels=MAX_PIXELS):
    """The bytes of a picture file of one page -> its pixels as stored, upright; alpha is the fourth channel.

    (H, W) grey, (H, W, 3) RGB or (H, W, 4) RGBA, of uint8 or uint16; from a TIFF also of other integers and floats. The
    three channels of a microscope's TIFF are RGB, each passed to `stretch_to_uint8` if it has more than 8 bits.
    Raises ValueError when the file is damaged, no picture, or holds several pages or other numbers of channels, and,
    before anything is decoded, when its header declares more than max_pixels pixels.
    """
    return _decode(io.BytesIO(data), max_pixels)[0]


def read_picture(path, max_pixels=MAX_PIXELS):
    """A file -> what `decode` returns and raises. A file whose header is wrong is not read any further."""
    with open(path, "rb") as file:
        return _decode(file, max_pixels)[0]


def _decode(file, max_pixels, chosen=None):
    """An open file -> what `decode` returns, and the same with the values of the file; chosen: as for PageReader."""
    file.seek(0)
    begins = file.read(4)
    file.seek(0)
    if is_tiff(begins):
        with Stack(file) as stack:
            if len(stack) > 1:
                raise ValueError(f"has {len(stack)} pages, expected 1; save each page as a file of its own")
            return _decode_page(stack, 0, max_pixels, chosen)
    orientation = read_header(file, max_pixels)
    array = _decode_plain(file)
    if array is None or array.dtype not in (np.uint8, np.uint16):
        raise ValueError(UNREADABLE)
    if chosen is not None:
        names = ["grey"] if array.ndim == 2 else ["red", "green", "blue", "alpha"][: array.shape[2]]
        array = np.atleast_3d(array)[..., _choose_channels(chosen, names)]
    array = upright(array, orientation)
    return array, array


def _decode_plain(file):
    """What OpenCV reads of an open file, RGB or RGBA where it has colours; None when that is nothing."""
    array = imdecode(file)
    if array is not None and array.ndim == 3:  # OpenCV keeps blue first
        return cv2.cvtColor(array, cv2.COLOR_BGR2RGB if array.shape[2] == 3 else cv2.COLOR_BGRA2RGBA)
    return array


def imdecode(file):
    """The pixels of an open file as OpenCV stores them, with blue first, or None when it reads nothing."""
    quieten_opencv()
    file.seek(0)
    try:
        return cv2.imdecode(np.frombuffer(file.read(), np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:  # more pixels than OpenCV accepts: MOST_PIXELS in all, 2^20 per side
        return None


def _decode_page(stack, number, max_pixels, chosen):
    """A page of a TIFF -> what `_decode` returns. chosen: the numbers of its channels, in the order RGB, or None."""
    stack.check(number, max_pixels)
    if stack.is_plain and not stack.is_simple and chosen is None:
        array = _decode_plain(stack.file)
        if array is not None and array.dtype in (np.uint8, stack.dtype(0)):
            return array, array
    array = stack.read(number, _wanted_channels(stack, number, chosen))
    if array.ndim == 2 or stack.is_colour(number):
        return array, array
    return np.dstack([to_channels(array[..., k], 1) for k in range(array.shape[2])]), array


def _wanted_channels(stack, number, chosen):
    """The numbers of the channels to read of a page."""
    names = stack.channels(number)
    if chosen is not None:
        return _choose_channels(chosen, names)
    if not stack.is_colour(number) and len(names) not in (1, 3):
        found = f"has {len(names)} channels ({_numbered(names)}), expected 1 or 3"
        raise ValueError(f"{found}; choose with predict.py --channels (0, or 2,1,0), or save only those to use")
    return list(range(len(names)))


def _choose_channels(chosen, names):
    """The numbers `chosen` as they are; ValueError when there is no such channel."""
    if max(chosen) >= len(names):
        raise ValueError(f"has no channel {max(chosen)}; its channels are {_numbered(names)}")
    return list(chosen)


def _numbered(names):
    """["DAPI", "GFP"] -> "0 DAPI, 1 GFP"; names that are the numbers stand alone."""
    return listed([str(k) if name == str(k) else f"{k} {name}" for k, name in enumerate(names)], most=12)


def read_thumbnail(path, shorter_side, max_pixels=MAX_PIXELS):
    """A file -> (H, W, 3) uint8, RGB, upright, its shorter side at most `shorter_side` pixels; never enlarged.

    Transparent parts become white, and more than 8 bits are scaled by `stretch_to_uint8`. A large JPEG is decoded at
    1/2, 1/4 or 1/8 of its size, which is several times faster than decoding all of it. Raises ValueError, naming the
    file, when it is damaged or `decode` would refuse it.
    """
    from PIL import Image, ImageOps

    try:
        # not by its path: Pillow would map it into memory and mix up the width and height of a TIFF to be turned
        with open(path, "rb") as file:
            image = _deep_picture(file, max_pixels) if _is_deep(file) else _open_checked(file, max_pixels)
            image.draft("RGB", _shrunk(image.size, 2 * shorter_side))
            if exif_orientation(image) != 1:
                image = ImageOps.exif_transpose(image)
            if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB")
    except Exception as error:  # decoders raise errors without a common class
        raise ValueError(f"{path} is not a readable picture ({str(error) or type(error).__name__})") from None
    size = _shrunk(image.size, shorter_side)
    return np.array(image if size == image.size else image.resize(size, Image.Resampling.BILINEAR))


def _is_deep(file):
    """Whether Pillow would not give all that an open file holds: more than 8 bits, several pages or channels."""
    begins = file.read(26)
    if is_tiff(begins):
        with Stack(file) as stack:
            return not (stack.is_plain and stack.dtype(0) in (np.uint8, bool))
    return begins.startswith((b"P5", b"P6")) or (begins.startswith(PNG_BEGINS) and begins[24:25] == b"\x10")


def _deep_picture(file, max_pixels):
    """An open file -> Pillow's picture, RGB or RGBA, of what `decode` returns."""
    from PIL import Image

    array, _ = _decode(file, max_pixels)
    return Image.fromarray(to_channels(array, 4 if array.shape[2:] == (4,) else 3))


def _open_checked(file, max_pixels):
    """An open file -> Pillow's picture; ValueError as read_header raises it."""
    file.seek(0)
    read_header(file, max_pixels)
    file.seek(0)
    return open_picture(file)


def _shrunk(size, shorter_side):
    factor = min(1, shorter_side / min(size))
    return tuple(max(1, round(side * factor)) for side in size)


# ---------------------------------------------------------------- arrays to arrays


def to_channels(array, channels):
    """What `decode` returns -> (H, W, channels) uint8 in [0, 255]: 1 grey, 3 RGB or 4 RGBA; a missing alpha is opaque.

    Values of other types than uint8 are scaled by `stretch_to_uint8`.
    """
    if array.dtype != np.uint8:
        array = stretch_to_uint8(array)
    conversions = {
        (1, 3): cv2.COLOR_GRAY2RGB,
        (1, 4): cv2.COLOR_GRAY2RGBA,
        (3, 1): cv2.COLOR_RGB2GRAY,
        (3, 4): cv2.COLOR_RGB2RGBA,
        (4, 1): cv2.COLOR_RGBA2GRAY,
        (4, 3): cv2.COLOR_RGBA2RGB,
    }
    found = 1 if array.ndim == 2 else array.shape[2]
    if found != channels:
        array = cv2.cvtColor(array, conversions[found, channels])
    return array.reshape(*array.shape[:2], channels)


def foreground(array):
    """What `decode` returns for a mask -> (H, W) bool: everything that is not 0. Alpha is ignored."""
    return (array if array.ndim == 2 else array[..., :3].max(axis=2)) > 0


def squeeze(array, size):
    """(H, W[, C]) -> (*size[, C]), size = (height, width): area average where a side shrinks, linear where it grows."""
    (height, width), (old_height, old_width, *channels) = size, array.shape
    for shape, shrinks in (((width, old_height), width < old_width), ((width, height), height < old_height)):
        array = cv2.resize(array, shape, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    return array.reshape(height, width, *channels)  # OpenCV drops a single channel


def squeeze_mask(mask, size):
    """(H, W) bool -> size = (height, width) bool, with as much foreground as the area average has, rounded.

    The k pixels with the highest coverage become foreground, k = round(sum of the coverage). Where coverage differs by
    less than about 0.001, the mean coverage of the neighbourhood decides, then raster order.
    """
    coverage = squeeze(mask.astype(np.float32), size)
    k = round(float(coverage.sum(dtype=np.float64)))
    rank = np.round(coverage + 1e-3 * cv2.blur(coverage, (3, 3)), 5)
    small = np.zeros(rank.size, bool)
    small[np.argsort(-rank, axis=None, kind="stable")[:k]] = True
    return small.reshape(rank.shape)


def standardise(images, mean, std):
    """uint8 tensor (..., C, H, W) in [0, 255] -> float32, (image / 255 - mean) / std; mean, std: C floats each.

    The only place where a pixel becomes what a network sees, for training, validation, prediction and export.
    """
    import torch  # late: preprocess_dsb2018.py does without it

    mean = torch.as_tensor(mean, dtype=torch.float32, device=images.device).view(-1, 1, 1)
    std = torch.as_tensor(std, dtype=torch.float32, device=images.device).view(-1, 1, 1)
    return (images.float() / 255 - mean) / std


def write_png(path, array):
    """(H, W) or (H, W, 3) RGB, uint8 or uint16 -> a PNG. Unlike cv2.imwrite, raises OSError when the disk is full."""
    path.write_bytes(cv2.imencode(".png", array if array.ndim == 2 else array[..., ::-1])[1])
