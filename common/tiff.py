"""TIFF files as microscopes write them: their pages, axes and channels, through tifffile, and the size of a pixel.

with open("stack.ome.tif", "rb") as file, Stack(file) as stack:
    print(len(stack), stack.channels(0))   # 12 ["DAPI", "GFP"]
    plane = stack.read(3, [0])             # (H, W), channel 0 of page 3, as stored
print(pixel_size("stack.ome.tif"))         # 0.325 (µm), or None

A page is one picture. Time points, slices, positions and any other images are pages, in the order of the file's axes;
the axes C and S are the channels of a page. Of a pyramid only the full resolution is read; thumbnails are skipped.
Pages and channels are counted from 0. Other files that the metadata of an OME-TIFF name are never opened.
"""

import logging
import math
import struct
import warnings
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np

from common.headers import ORIENTATION, TIFF_BEGINS, UNREADABLE, check_pixels, open_picture, upright

MAX_FRAMES = 100_000  # in one file: metadata of a few bytes can claim billions
PIXEL_BYTES = 8  # per allowed pixel of a page, at most: four channels of 16 bits
GREY, RGB, PALETTE = (0, 1), 2, 3  # PhotometricInterpretation; grey where 0 is white or black
UNASSOCIATED = 2  # ExtraSamples: alpha by which the colours are not multiplied
ALPHA = ((1,), (UNASSOCIATED,))  # one, of associated or unassociated alpha
SLIDES = ("svs", "scn", "ndpi", "bif", "philips", "qpi", "avs")  # whose other series are labels and overviews
LIBTIFF = (1, 2, 3, 4, 5, 7, 8, 32773, 32946)  # the usual compressions, which Pillow's libtiff has: LZW, JPEG, Deflate
SAVE_ANEW = "save it with 8 or 16 bits per sample and without compression"
MICROMETRES = {  # units as OME and ImageJ spell them
    **dict.fromkeys(("µm", "μm", "\\u00B5m", "um", "micron", "microns"), 1),  # two different letters, and an escape
    **{"pm": 1e-6, "Å": 1e-4, "nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6, "in": 25_400},
}


def is_tiff(begins):
    """Whether a file that begins with these bytes, four or more, is a TIFF or BigTIFF."""
    return begins[:4] in TIFF_BEGINS


class TiffError(ValueError):
    """What is wrong with a file, in words for its user; the libraries raise errors of all classes."""


# ---------------------------------------------------------------- pages


class Plane(NamedTuple):
    """One picture of a file: the frames of a tifffile.TiffPageSeries that hold its channels, one or several in each."""

    series: object
    frames: tuple  # their numbers in the series

    @property
    def key(self):
        """The tifffile.TiffPage that says how the frames are stored."""
        return self.series.keyframe

    @property
    def samples(self):
        """How many channels one frame holds. Alpha beside grey does not count."""
        key = self.key
        if key.axes == "YX":
            return 3 if key.photometric == PALETTE else 1
        stored = key.shape[key.axes.index(key.axes.strip("YX"))]
        if key.photometric in GREY and tuple(key.extrasamples) in ALPHA:
            return stored - 1
        return stored

    @property
    def is_colour(self):
        """Whether the channels are red, green, blue (and alpha) of one colour picture."""
        return len(self.frames) == 1 and self.key.photometric not in GREY and self.samples <= 4


def _list_pages(tiff):
    """A tifffile.TiffFile -> its Pages; raises TiffError for axes and numbers that cannot be pictures."""
    whole = [series for series in tiff.series if _is_whole(series.keyframe)] or tiff.series[:1]
    if whole and whole[0].kind in SLIDES:
        del whole[1:]
    pages = [page for series in whole for page in _pages_of(series)]
    if len(whole) > 1 and all(series.kind == "generic" for series in whole):  # sizes alternate: as they lie in the file
        pages.sort(key=lambda page: page.series[page.frames[0]].index)
    return pages


def _is_whole(key):
    """Whether a tifffile.TiffPage is a picture: no lower level of a pyramid, no thumbnail, no transparency mask."""
    return isinstance(key.index, int) and not key.is_reduced and not key.is_mask


def _pages_of(series):
    """A series -> its Pages, in the order of its axes."""
    axes, shape, key = series.get_axes(True), series.get_shape(True), series.keyframe
    if key.axes not in ("YX", "YXS", "SYX", "CYX"):
        raise TiffError(f"unreadable: a page has the axes {key.axes}, expected Y, X and channels")
    if key.dtype is None or key.dtype.kind not in "buif":
        raise TiffError(f"unreadable: {_storage(key)}; {SAVE_ANEW}")
    if 0 in key.shape:
        raise TiffError(UNREADABLE)
    outer = shape[: len(shape) - len(key.shape)]
    claimed = math.prod(outer)
    frames = claimed if series.is_truncated else len(series)
    if max(frames, claimed) > MAX_FRAMES:
        raise TiffError(f"unreadable: it claims more than {MAX_FRAMES:,} pages")
    if frames != claimed:  # the metadata do not fit the file
        axes, outer = "I", (frames,)
    numbers = np.arange(frames).reshape(outer)
    if "C" in axes[: len(outer)]:
        numbers = np.moveaxis(numbers, axes.index("C"), -1).reshape(-1, outer[axes.index("C")])
    else:
        numbers = numbers.reshape(-1, 1)
    return [Plane(series, tuple(channels)) for channels in numbers.tolist()]


# ---------------------------------------------------------------- files


def _open(file):
    """An open file -> tifffile.TiffFile, quiet, and without the readers that would look for other files."""
    import tifffile  # late: data sets of PNG do without it

    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what matters of it is raised as well
    warnings.filterwarnings("ignore", module="tifffile")
    file.seek(0)
    return tifffile.TiffFile(file, is_ndtiff=False, is_mmstack=False, _multifile=False)


def _is_cut(tiff):
    """Whether the last page that tifffile found points to a next one beyond the end of the file."""
    form, file = tiff.tiff, tiff.filehandle
    last = tiff.pages[len(tiff.pages) - 1]
    file.seek(last.offset)
    [tags] = struct.unpack(form.tagnoformat, file.read(form.tagnosize))
    file.seek(last.offset + form.tagnosize + tags * form.tagsize)
    [following] = struct.unpack(form.offsetformat, file.read(form.offsetsize))
    return following >= file.size


def _ome_pixels(tiff):
    """The `Pixels` elements of a file's OME-XML, [] without any. TiffError when they claim more than MAX_FRAMES frames.

    The schema: https://www.openmicroscopy.org/Schemas/OME/2016-06
    """
    if not tiff.is_ome:
        return []
    try:
        elements = list(ElementTree.fromstring(tiff.ome_metadata).iter())
    except ElementTree.ParseError:  # tifffile does without it, too
        return []
    first, largest = tiff.pages.first, 1
    for element in elements:
        tag = element.tag.rpartition("}")[2]
        if tag == "Pixels":
            claimed = math.prod(int(element.get(f"Size{axis}", 1)) for axis in "XYZCT")
            largest = max(largest, claimed / math.prod(first.shape) / 10)  # ten: the first page may be a small one
        elif tag == "TiffData":
            largest = max(largest, *(int(element.get(name, 0)) for name in ("PlaneCount", "NumPlanes")))
        elif tag.startswith("ModuloAlong") and "Start" in element.attrib:
            start, end, step = (float(element.get(name, 1)) for name in ("Start", "End", "Step"))
            largest = max(largest, abs((end - start) / step))
    if not largest <= MAX_FRAMES:
        raise TiffError(f"unreadable: it claims more than {MAX_FRAMES:,} pages")
    return [element for element in elements if element.tag.endswith("}Pixels")]


class Stack:
    """The pages of an open TIFF file, which has to stay open. Raises ValueError when the file is damaged."""

    def __init__(self, file):
        self.file = file
        try:
            self.tiff = _open(file)
            if _is_cut(self.tiff):
                raise TiffError("unreadable: the file ends before its last page")
            self.ome = _ome_pixels(self.tiff)
            self.pages = _list_pages(self.tiff)
        except TiffError:
            raise
        except Exception:  # damaged files raise errors without a common class
            raise TiffError(UNREADABLE) from None
        if not self.pages:
            raise TiffError(UNREADABLE)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.tiff.close()

    def __len__(self):
        return len(self.pages)

    def check(self, number, max_pixels):
        """ValueError when a page declares more than max_pixels pixels, or more than PIXEL_BYTES for each of them."""
        key = self.pages[number].key
        check_pixels((key.imagewidth, key.imagelength), max_pixels)
        if key.nbytes > PIXEL_BYTES * max_pixels:
            raise TiffError(f"{key.nbytes:,} bytes of pixels are more than {PIXEL_BYTES * max_pixels:,}")

    @property
    def is_plain(self):
        """Whether the file is one page that OpenCV reads correctly: grey, a palette, or a colour of 3 or 4 samples."""
        page, key = self.pages[0], self.pages[0].key
        grey = key.axes == "YX"
        colour = page.is_colour and (key.axes == "YXS" or key.dtype == np.uint8)  # planes of 16 bits come out mixed
        if key.axes == "YXS" and UNASSOCIATED in key.extrasamples:  # OpenCV multiplies colours by it
            return False
        return len(self) == 1 and len(page.frames) == 1 and key.index == 0 and (grey or colour)

    @property
    def is_simple(self):
        """Whether the first page's pixels are stored uncompressed: `read` then takes no more memory than they do."""
        page = self.pages[0]
        return _is_raw(page.key) and page.key.photometric != PALETTE and page.samples in (1, 3)

    @property
    def is_inverted(self):
        """Whether decoders invert the first page: 8 bits, 0 is white. Right for pictures, wrong for labels."""
        return self.pages[0].key.photometric == 0 and self.dtype(0) == np.uint8

    def dtype(self, number):
        """The numpy dtype of a page as it is stored; bool for one bit."""
        return np.dtype(self.pages[number].key.dtype)

    def is_colour(self, number):
        """Whether the channels of a page are red, green, blue (and alpha) of one colour picture."""
        return self.pages[number].is_colour

    def channels(self, number):
        """The names of the channels of a page, a list of str: OME's, or else their numbers."""
        page = self.pages[number]
        if page.is_colour:
            return ["red", "green", "blue", "alpha"][: page.samples]
        names, count = [], len(page.frames) * page.samples
        if page.series.kind == "ome" and len(self.ome) == len(self.tiff.series):
            elements = self.ome[self.tiff.series.index(page.series)]
            names = [element.get("Name") for element in elements if element.tag.endswith("}Channel")]
        return names if len(names) == count and all(names) else [str(k) for k in range(count)]

    def read(self, number, channels):
        """A page and the numbers of its channels -> (H, W) of one channel, (H, W, n) of several; as stored, upright.

        The byte order is the machine's, palettes are looked up, one bit becomes 0 and 255. Raises ValueError when the
        page is damaged, or is compressed in a way that Pillow does not decode.
        """
        page = self.pages[number]
        try:
            wanted = {channel // page.samples for channel in channels}
            frames = {k: self._frame(page, page.frames[k]) for k in wanted}
        except TiffError:
            raise
        except Exception:  # as above
            raise TiffError(UNREADABLE) from None
        if len(wanted) == 1 and list(channels) == list(range(page.samples)) and page.samples > 1:
            return frames[0]
        planes = [frames[channel // page.samples][..., channel % page.samples] for channel in channels]
        return np.stack(planes, axis=2) if len(planes) > 1 else np.ascontiguousarray(planes[0])

    def _frame(self, page, index):
        """Frame `index` of a page's series -> (H, W, C)."""
        series, key = page.series, page.key
        if not _is_raw(key):
            array = self._decode(page, series[index])
        else:
            array = self._read_raw(series, index)
            if key.photometric == PALETTE:
                array = (key.colormap >> 8).astype(np.uint8).T[array]
            if key.axes in ("SYX", "CYX"):
                array = np.moveaxis(array, 0, 2)
            array = upright(array, key.tags.valueof(ORIENTATION, 1))
        return array if array.ndim == 3 else array[..., None]

    def _read_raw(self, series, index):
        """A frame that is stored uncompressed -> an array of the shape of the series' key."""
        key = series.keyframe
        if series.dataoffset is not None:  # one block of all frames; of large stacks ImageJ describes the first alone
            offset = series.dataoffset + index * key.nbytes
            stored = key.dtype.newbyteorder(self.tiff.byteorder)
            return self.tiff.filehandle.read_array(stored, math.prod(key.shape), offset).reshape(key.shape)
        frame = series[index]
        if frame is None:
            raise TiffError("unreadable: this page is missing in the file")
        ends = [start + count for start, count in zip(frame.dataoffsets, frame.databytecounts, strict=True)]
        if not ends or max(ends) > self.tiff.filehandle.size:
            raise TiffError(UNREADABLE)
        return frame.asarray(maxworkers=1, buffersize=2**24)

    def _decode(self, page, frame):
        """A frame of any other kind -> (H, W[, C]) as Pillow's libtiff decodes it, which turns it upright."""
        key, unknown = page.key, TiffError(f"unreadable: {_storage(page.key)}; {SAVE_ANEW}")
        try:
            self.file.seek(0)
            picture = open_picture(self.file)
            picture.seek(frame.index)
        except Exception:  # as above
            raise unknown from None
        try:
            if picture.mode in ("P", "PA", "CMYK", "YCbCr", "LAB", "RGBX"):
                picture = picture.convert("RGB")
            elif picture.mode in ("1", "LA"):
                picture = picture.convert("L")
            array = np.asarray(picture)
        except Exception:  # as above
            raise TiffError(UNREADABLE) if key.compression in LIBTIFF else unknown from None
        channels = math.prod(array.shape[2:])
        whole = channels >= 3 if page.is_colour else channels == page.samples
        lossless = key.dtype == bool or np.can_cast(key.dtype, array.dtype)  # Pillow keeps 8 of 16 bits in colours
        swapped = self.tiff.byteorder == ">" and picture.mode in ("I", "F")  # once by libtiff, again by Pillow
        if swapped or not (whole and lossless):
            raise unknown
        return array.astype(array.dtype.newbyteorder("="), copy=False)


def _is_raw(key):
    """Whether the samples of a tifffile.TiffPage are uncompressed and need no conversion."""
    meant = key.photometric in (1, RGB, PALETTE) or (key.photometric == 0 and key.dtype.itemsize > 1)
    return key.compression == 1 and key.bitspersample in (8, 16, 32, 64) and meant


def _storage(key):
    """How the pixels of a tifffile.TiffPage are stored, for a message."""
    return f"{key.dtype} of axes {key.axes} in {key.compression.name} compression"


# ---------------------------------------------------------------- the size of a pixel


def pixel_size(path):
    """The side of a pixel in µm, as the OME-XML or the ImageJ tags of a TIFF file say, or None.

    None also when the two sides differ by more than 1 %, or the unit is no length. The resolution in dots per inch that
    every program writes is not used; ImageJ's own unit is `inch` where it found nothing else.
    """
    with open(path, "rb") as file:
        if not is_tiff(file.read(4)):
            return None
        try:
            sides = _sides(_open(file))
        except Exception:  # as above
            return None
    if not sides or not all(0 < side < math.inf for side in sides) or max(sides) > 1.01 * min(sides):
        return None
    return math.sqrt(math.prod(sides))


def _sides(tiff):
    """The width and height of a pixel in µm, None when the file does not say."""
    if pixels := _ome_pixels(tiff):
        found = [
            (pixels[0].get(f"PhysicalSize{axis}"), pixels[0].get(f"PhysicalSize{axis}Unit", "µm")) for axis in "XY"
        ]
        return [float(size) * MICROMETRES[unit] for size, unit in found]
    if tiff.imagej_metadata:
        unit = MICROMETRES[tiff.imagej_metadata["unit"]]
        resolutions = [tiff.pages.first.tags.valueof(name) for name in ("XResolution", "YResolution")]
        return [unit * below / above for above, below in resolutions]  # fractions, in pixels per unit
    return None
