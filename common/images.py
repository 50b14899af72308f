"""Picture files and their pixels, for both jobs: find, read, convert, shrink, standardise and write pictures.

files, failed = find_pictures(["slide.tif", "scans/", "more/*.png"])
image = to_channels(read_picture(files[0]), 3)   # the nuclei job: (H, W, 3) uint8, RGB, all the pixels of the file
small = read_thumbnail(files[0], 320)            # the transfer job: (H, W, 3) uint8, RGB, a shorter side of 320 at most

Both readers accept PNG, JPEG, TIFF, BMP, WEBP, PPM and PGM, check the size in the header before they decode anything,
and turn the picture as its EXIF orientation says.
"""

import glob
import io
import logging
import struct
import warnings
from pathlib import Path

import cv2
import numpy as np

EXTENSIONS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".ppm", ".pgm", ".webp")
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "PPM")  # the only decoders of Pillow that see an untrusted file
MAX_PIXELS = 400_000_000  # default limit for an untrusted file: a few bytes can claim gigabytes of pixels
UNREADABLE = "unreadable: no whole picture of 8 or 16 bits"
PNG_BEGINS = b"\x89PNG\r\n\x1a\n"
ORIENTATION = 0x0112  # the EXIF tag


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
            failed.append((path, "holds no picture" if matches else "no such file"))
        files.update((file.resolve(), file) for file in found)
    return list(files.values()), failed


# ---------------------------------------------------------------- headers


def quieten_opencv():
    """Silence OpenCV, whose warnings do not name the file and are triggered by the private TIFF tags of microscopes."""
    if hasattr(cv2, "setLogLevel"):  # up to OpenCV 4.12
        cv2.setLogLevel(0)
    else:
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


def open_picture(file):
    """An open file -> Pillow's picture, of which only the header has been read. The caller checks its size."""
    from PIL import Image  # late: data sets of PNG do without it

    Image.MAX_IMAGE_PIXELS = None  # check_pixels replaces Pillow's own limit
    warnings.filterwarnings("ignore", module=r"PIL\.")  # about tags that do not affect the result; they name no file
    logging.getLogger("PIL").setLevel(logging.CRITICAL)  # its errors are raised as well
    return Image.open(file, formats=FORMATS)


def check_pixels(size, max_pixels):
    """ValueError when width x height is more than max_pixels."""
    if size[0] * size[1] > max_pixels:
        raise ValueError(f"{size[0]} x {size[1]} pixels are more than {max_pixels:,}")


def read_header(file, max_pixels):
    """The header of an open picture file -> the EXIF orientation, 1 to 8, that OpenCV leaves to its caller.

    Raises ValueError when it is none of FORMATS or declares more than max_pixels pixels.
    """
    begins = file.read(24)
    if begins.startswith(PNG_BEGINS) and begins[12:16] == b"IHDR" and len(begins) == 24:
        check_pixels(struct.unpack(">II", begins[16:]), max_pixels)
        if not _has_exif(file):  # tens of thousands of masks are read without Pillow
            return 1
    try:
        picture = open_picture(file)
    except Exception:  # damaged headers raise errors without a common class
        raise ValueError(UNREADABLE) from None
    with picture:
        check_pixels(picture.size, max_pixels)
        if picture.format == "TIFF":  # the only format that IMREAD_UNCHANGED turns, from OpenCV 4.11 to 5.0
            return 1
        return exif_orientation(picture)


def _has_exif(png):
    """Whether an open PNG file has an eXIf chunk."""
    png.seek(len(PNG_BEGINS))
    while len(begins := png.read(8)) == 8:
        length, kind = struct.unpack(">I4s", begins)
        if kind == b"eXIf":
            return True
        png.seek(length + 4, io.SEEK_CUR)  # its data and CRC
    return False


def exif_orientation(picture):
    """The EXIF orientation of Pillow's open picture, 1 to 8; 1 (upright) when it has none or the EXIF is damaged."""
    try:
        found = picture.getexif().get(ORIENTATION)
    except Exception:  # damaged EXIF raises errors without a common class; the pixels may be whole
        return 1
    return found if found in range(1, 9) else 1


def upright(array, orientation):
    """(H, W[, C]) as stored -> as meant by its EXIF orientation, 1 to 8; width and height swap for 5 to 8."""
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    return np.ascontiguousarray(array)


# ---------------------------------------------------------------- files to arrays


def decode(data, max_pixels=MAX_PIXELS):
    """The bytes of a picture file -> (H, W) grey, (H, W, 3) RGB or (H, W, 4) RGBA, uint8 or uint16 as stored, upright.

    Raises ValueError when the file is damaged or holds other than 8 or 16 bits per channel, and, before anything is
    decoded, when its header declares more than max_pixels pixels.
    """
    return _decode(io.BytesIO(data), max_pixels)


def read_picture(path, max_pixels=MAX_PIXELS):
    """A file -> what `decode` returns and raises. A file whose header is wrong is not read any further."""
    with open(path, "rb") as file:
        return _decode(file, max_pixels)


def _decode(file, max_pixels):
    orientation = read_header(file, max_pixels)
    file.seek(0)
    quieten_opencv()
    try:
        array = cv2.imdecode(np.frombuffer(file.read(), np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:  # more pixels than OpenCV accepts (2^30)
        array = None
    if array is None or array.dtype not in (np.uint8, np.uint16):
        raise ValueError(UNREADABLE)
    if array.ndim == 3:  # OpenCV keeps blue first
        array = cv2.cvtColor(array, cv2.COLOR_BGR2RGB if array.shape[2] == 3 else cv2.COLOR_BGRA2RGBA)
    return upright(array, orientation)


def read_thumbnail(path, shorter_side, max_pixels=MAX_PIXELS):
    """A file -> (H, W, 3) uint8, RGB, upright, its shorter side at most `shorter_side` pixels; never enlarged.

    Transparent parts become white, and 16 bits become the upper 8. A large JPEG is decoded at 1/2, 1/4 or 1/8 of its
    size, which is several times faster than decoding all of it. Raises ValueError, naming the file, when it is damaged.
    """
    from PIL import Image, ImageOps

    try:
        # not by its path: Pillow would map it into memory and mix up the width and height of a TIFF to be turned
        with open(path, "rb") as file, open_picture(file) as image:
            check_pixels(image.size, max_pixels)
            image.draft("RGB", _shrunk(image.size, 2 * shorter_side))
            if exif_orientation(image) != 1:
                image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16"):
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB")
    except Exception as error:  # decoders raise errors without a common class
        raise ValueError(f"{path} is not a readable picture ({str(error) or type(error).__name__})") from None
    size = _shrunk(image.size, shorter_side)
    return np.array(image if size == image.size else image.resize(size, Image.Resampling.BILINEAR))


def _shrunk(size, shorter_side):
    factor = min(1, shorter_side / min(size))
    return tuple(max(1, round(side * factor)) for side in size)


# ---------------------------------------------------------------- arrays to arrays


def to_channels(array, channels):
    """What `decode` returns -> (H, W, channels) uint8 in [0, 255]: 1 grey, 3 RGB or 4 RGBA; a missing alpha is opaque.

    16-bit values are scaled from the smallest of 10, 12, 14 and 16 bits that holds the brightest pixel, because cameras
    store 12 bits in 16. Scaling by the picture's own maximum instead would change the brightness of dim pictures.
    """
    if array.dtype == np.uint16:
        array = array.reshape(*array.shape[:2], -1)
        scales = np.full(array.shape[2], 65535.0)  # for alpha: opaque is 65535, whatever the camera
        scales[:3] = next(2**bits - 1 for bits in (10, 12, 14, 16) if array[..., :3].max() < 2**bits)
        narrow = np.empty(array.shape, np.uint8)
        for line in range(0, len(array), 64):  # float64 for all lines at once would take eight times the picture
            narrow[line : line + 64] = np.round(array[line : line + 64] * (255 / scales))
        array = narrow
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
