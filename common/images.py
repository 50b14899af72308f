"""Picture files and their pixels: read, convert, squeeze, write. The one place that knows how a file becomes an array.

image = to_channels(decode(Path("cells.tif").read_bytes()), 3)    # (H, W, 3) uint8, RGB
small = squeeze(image, (96, 96))
"""

import io
import logging
import struct
import warnings

import cv2
import numpy as np

MAX_PIXELS = 400_000_000  # of a picture whose file nobody vouches for: a few bytes can claim to be gigabytes
UNREADABLE = "unreadable: no whole picture of 8 or 16 bits"
PNG_BEGINS = b"\x89PNG\r\n\x1a\n"
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "PPM")  # other decoders are never offered a stranger's bytes


def quieten_opencv():
    """Its warnings name no file, and a microscope's TIFF has tags that it warns about."""
    if hasattr(cv2, "setLogLevel"):  # up to OpenCV 4.12
        cv2.setLogLevel(0)
    else:
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


def decode(data, max_pixels=MAX_PIXELS):
    """The bytes of a PNG, JPEG, TIFF or BMP -> (H, W) or (H, W, 3 or 4) as stored, uint8 or uint16, RGB(A).

    Raises ValueError when they are no whole picture of 8 or 16 bits, and, before anything is decoded, when their header
    promises more than max_pixels.
    """
    check_pixels(declared_size(io.BytesIO(data)), max_pixels)
    quieten_opencv()
    try:
        array = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:  # an empty file, or more pixels than OpenCV accepts (2^30)
        array = None
    if array is None or array.dtype not in (np.uint8, np.uint16):
        raise ValueError(UNREADABLE)
    if array.ndim == 3:  # OpenCV keeps blue first
        array = cv2.cvtColor(array, cv2.COLOR_BGR2RGB if array.shape[2] == 3 else cv2.COLOR_BGRA2RGBA)
    return array


def read_picture(path, max_pixels=MAX_PIXELS):
    """What decode gives of a file; one that is no picture is not read to its end."""
    with open(path, "rb") as file:
        check_pixels(declared_size(file), max_pixels)
        file.seek(0)
        return decode(file.read(), max_pixels)


def declared_size(file):
    """(width, height) that the header of an open picture file promises; ValueError when it is none of FORMATS."""
    begins = file.read(24)
    if begins.startswith(PNG_BEGINS) and begins[12:16] == b"IHDR" and len(begins) == 24:
        return struct.unpack(">II", begins[16:])  # faster than Pillow, for tens of thousands of masks
    try:
        with open_picture(file) as header:
            return header.size
    except Exception:  # what a damaged header raises has no class in common
        raise ValueError(UNREADABLE) from None


def open_picture(file):
    """Pillow's picture of an open file or a path, its header read, of FORMATS only; the caller checks its size."""
    from PIL import Image  # late: data sets of PNG do without it

    Image.MAX_IMAGE_PIXELS = None  # check_pixels takes the place of Pillow's own limit
    warnings.filterwarnings("ignore", module=r"PIL\.")  # about tags that no result depends on; they name no file
    logging.getLogger("PIL").setLevel(logging.CRITICAL)  # an error is raised as well
    return Image.open(file, formats=FORMATS)


def check_pixels(size, max_pixels):
    """ValueError when (width, height) are more than max_pixels."""
    if size[0] * size[1] > max_pixels:
        raise ValueError(f"{size[0]} x {size[1]} pixels are more than {max_pixels:,}")


def to_channels(array, channels):
    """What decode gives -> (H, W, channels) uint8 in [0, 255]: 1 grey, 3 RGB or 4 RGBA; missing alpha is opaque.

    16-bit values are scaled by the smallest of 10, 12, 14 and 16 bits that holds the brightest pixel, because cameras
    keep their 12 bits in 16; a full-scale picture keeps its brightness, unlike with scaling by its own maximum.
    """
    if array.dtype == np.uint16:
        array = array.reshape(*array.shape[:2], -1)
        scales = np.full(array.shape[2], 65535.0)  # alpha's, because opaque is 65535 whatever the camera
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
    """What decode gives for a mask -> (H, W) bool, everything that is not 0; alpha says nothing."""
    return (array if array.ndim == 2 else array[..., :3].max(axis=2)) > 0


def squeeze(array, size):
    """(H, W[, C]) -> (height, width[, C]) = size: area average where a side shrinks, linear where it grows."""
    (height, width), (old_height, old_width, *channels) = size, array.shape
    for shape, shrinks in (((width, old_height), width < old_width), ((width, height), height < old_height)):
        array = cv2.resize(array, shape, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    return array.reshape(height, width, *channels)  # OpenCV drops a single channel


def squeeze_mask(mask, size):
    """(H, W) bool -> (height, width) bool whose number of foreground pixels is that of the area average, rounded.

    The k pixels with the highest coverage are foreground, k = round(sum of the coverage). Coverage that differs by less
    than about a thousandth is settled by the neighbourhood's, then in raster order.
    """
    coverage = squeeze(mask.astype(np.float32), size)
    k = round(float(coverage.sum(dtype=np.float64)))
    rank = np.round(coverage + 1e-3 * cv2.blur(coverage, (3, 3)), 5)
    small = np.zeros(rank.size, bool)
    small[np.argsort(-rank, axis=None, kind="stable")[:k]] = True
    return small.reshape(rank.shape)


def write_png(path, array):
    """(H, W) or (H, W, 3) RGB, uint8 or uint16 -> a PNG; through Python's own file, which tells of a full disk."""
    path.write_bytes(cv2.imencode(".png", array if array.ndim == 2 else array[..., ::-1])[1])


def standardise(images, mean, std):
    import torch

    mean = torch.as_tensor(mean, dtype=torch.float32, device=images.device).view(-1, 1, 1)
    std = torch.as_tensor(std, dtype=torch.float32, device=images.device).view(-1, 1, 1)
    return (images.float() / 255 - mean) / std
