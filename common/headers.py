"""What the first bytes of a picture file say, before anything is decoded: its format, size and orientation.

with open("a.png", "rb") as file:
    orientation = read_header(file, max_pixels=400_000_000)   # 1 to 8; ValueError for "a.png" that is a HEIC file
"""

import io
import logging
import struct
import warnings

import cv2
import numpy as np

FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "PPM")  # the only decoders of Pillow that see an untrusted file
UNREADABLE = "unreadable: no whole picture of 8 or 16 bits"
PNG_BEGINS = b"\x89PNG\r\n\x1a\n"
TIFF_BEGINS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # + is BigTIFF
ORIENTATION = 0x0112  # the tag, in EXIF and TIFF
BEGINS = 132  # bytes that tell a format

# Formats that people have and that are not read: (offset, bytes there, name). ISO 14496-12 and 23008-12 for ftyp; the
# others as in Wikipedia's list of file signatures, and Bio-Formats' readers for the microscopes' own formats.
FOREIGN = (
    (4, b"ftypavif", "AVIF"),
    (4, b"ftypavis", "AVIF"),
    *((4, b"ftyp" + brand, "HEIC") for brand in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")),
    (4, b"ftyp", "MP4 or QuickTime"),
    (0, b"GIF8", "GIF"),
    (4, b"JXL \r\n\x87\n", "JPEG XL"),
    (0, b"\xff\x0a", "JPEG XL"),
    (4, b"jP  \r\n\x87\n", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (0, b"8BPS", "Photoshop"),
    (0, b"%PDF", "PDF"),
    (0, b"%!PS", "PostScript"),
    (0, b"<svg", "SVG"),
    (0, b"\x76\x2f\x31\x01", "OpenEXR"),
    (0, b"ZISRAWFILE", "Zeiss CZI"),
    (0, b"\xda\xce\xbe\x0a", "Nikon ND2"),
    (0, b"\x70\x00\x00\x00", "Leica LIF"),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "OLE (Olympus OIB, Zeiss ZVI)"),
    (128, b"DICM", "DICOM"),
    (0, b"SIMPLE  =", "FITS"),
    (0, b"\x89HDF\r\n\x1a\n", "HDF5 (such as Imaris)"),
    (0, b"\x93NUMPY", "NumPy"),
    (0, b"PK\x03\x04", "zip"),
    (0, b"\x1f\x8b", "gzip"),
)


def foreign_format(begins):
    """The first BEGINS bytes of a file -> the name of its format if it is one of FOREIGN, else None."""
    for offset, magic, name in FOREIGN:
        if begins[offset : offset + len(magic)] == magic:
            return name
    return None


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


class TooManyPixels(ValueError):
    """A picture has more pixels than the caller admits."""


def check_pixels(size, max_pixels):
    """TooManyPixels when width x height is more than max_pixels."""
    if size[0] * size[1] > max_pixels:
        raise TooManyPixels(f"{size[0]} x {size[1]} pixels are more than {max_pixels:,}")


def read_header(file, max_pixels):
    """The header of an open picture file -> its EXIF orientation, 1 to 8, which OpenCV follows only in TIFF.

    Raises ValueError when it is none of FORMATS, naming the format if it is one of FOREIGN, or declares more than
    max_pixels pixels.
    """
    begins = file.read(BEGINS)
    if begins.startswith(PNG_BEGINS) and begins[12:16] == b"IHDR" and len(begins) >= 24:
        check_pixels(struct.unpack(">II", begins[16:24]), max_pixels)
        if not _has_exif(file):  # tens of thousands of masks are read without Pillow
            return 1
    try:
        picture = open_picture(file)
    except Exception:  # damaged headers raise errors without a common class
        name = foreign_format(begins)
        raise ValueError(f"unreadable: the file is {name}; convert it to PNG or TIFF" if name else UNREADABLE) from None
    with picture:
        check_pixels(picture.size, max_pixels)
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
