"""images.py: the EXIF orientation is followed in both jobs, whatever the format and whichever OpenCV is installed."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps
from test_images import file_of, noise

from common.images import decode, read_picture, read_thumbnail, to_channels

STORED = {
    "grey": np.repeat(np.repeat(noise(3, 5), 8, 0), 8, 1),
    "deep": noise(24, 40, dtype=np.uint16, high=65536),
    "colour": np.repeat(np.repeat(noise(3, 5, 3), 8, 0), 8, 1),
    "alpha": np.dstack([noise(24, 40, 3), np.full((24, 40), 255, np.uint8)]),
}
TURNS = [  # beside each, as EXIF words it, what the first row and the first column of the stored picture show
    lambda stored: stored,  # top, left
    lambda stored: np.fliplr(stored),  # top, right
    lambda stored: np.rot90(stored, 2),  # bottom, right
    lambda stored: np.flipud(stored),  # bottom, left
    lambda stored: stored.swapaxes(0, 1),  # left, top
    lambda stored: np.rot90(stored, -1),  # right, top
    lambda stored: np.rot90(stored.swapaxes(0, 1), 2),  # right, bottom
    lambda stored: np.rot90(stored, 1),  # left, bottom
]


def with_orientation(array, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    return file_of(array, kind, exif=exif, **options)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("kind", "form"),
    [(kind, form) for kind in ("PNG", "TIFF") for form in STORED]
    + [("JPEG", "grey"), ("JPEG", "colour"), ("WEBP", "colour")],
)
def test_the_orientation_is_followed_by_both_jobs(kind, form, orientation, tmp_path):
    data, close = with_orientation(STORED[form], kind, orientation), 12 if kind == "JPEG" else 0
    expected = TURNS[orientation - 1](STORED[form]).astype(int)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))).astype(int)
    assert upright.shape == expected.shape and np.abs(upright - expected).max() <= close  # Pillow agrees
    found = decode(data)
    assert found.dtype == STORED[form].dtype and found.flags.c_contiguous
    assert found.shape == expected.shape and np.abs(found - expected).max() <= close
    (tmp_path / "picture").write_bytes(data)
    assert np.array_equal(read_picture(tmp_path / "picture"), found)
    thumbnail = read_thumbnail(tmp_path / "picture", 24)
    colours = to_channels(found, 3)
    assert thumbnail.shape == colours.shape and np.abs(thumbnail - colours.astype(int)).max() <= close


@pytest.mark.parametrize("options", [{"compression": "tiff_lzw"}, {"compression": "jpeg", "quality": 100}])
def test_compressed_tiffs_are_turned_too(options):
    array = np.repeat(np.repeat(noise(4, 6, 3), 16, 0), 16, 1)
    turned = decode(file_of(array, "TIFF", tiffinfo={0x0112: 6}, **options))
    assert np.array_equal(turned, np.rot90(decode(file_of(array, "TIFF", **options)), -1))


def test_exif_behind_the_pixels_of_a_png_counts():
    data = with_orientation(STORED["colour"], "PNG", 6)
    start = data.index(b"eXIf") - 4
    end = start + 12 + struct.unpack(">I", data[start : start + 4])[0]
    last = len(data) - 12  # IEND
    moved = data[:start] + data[end:last] + data[start:end] + data[last:]
    assert np.array_equal(decode(moved), np.rot90(STORED["colour"], -1))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("value", [b"garbage garbage", b"", b"II*\0\x08\0\0\0\xff\xff", 0, 9, 65535])
def test_exif_that_says_nothing_leaves_a_picture_as_it_is(kind, value, tmp_path):
    exif = value
    if not isinstance(value, bytes):
        exif = Image.Exif()
        exif[0x0112] = value
    data = file_of(STORED["colour"], kind, exif=exif)
    (tmp_path / "picture").write_bytes(data)
    plain = file_of(STORED["colour"], kind)
    (tmp_path / "plain").write_bytes(plain)
    assert np.array_equal(decode(data), decode(plain))
    assert np.array_equal(read_thumbnail(tmp_path / "picture", 24), read_thumbnail(tmp_path / "plain", 24))


def test_the_pixels_of_a_png_may_hold_the_letters_exif():
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = zlib.compress(b"\0eXIfeXIf\0eXIfeXIf", level=0)  # level 0 stores the letters as they are
    header = struct.pack(">IIBBBBB", 8, 2, 8, 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    assert b"eXIf" in data and decode(data).tobytes() == b"eXIfeXIf" * 2


def test_masks_are_read_without_pillow(monkeypatch):
    """It costs as much as decoding a small mask."""
    mask = noise(9, 7, high=2) * 255
    data = file_of(mask)
    monkeypatch.setattr("common.headers.open_picture", None)
    assert np.array_equal(decode(data), mask)


def test_a_header_of_too_many_pixels_is_refused_before_decoding(tmp_path, monkeypatch):
    monkeypatch.setattr("common.images.cv2.imdecode", None)
    monkeypatch.setattr("common.tiff.Stack.read", None)
    for kind in ("PNG", "JPEG", "TIFF"):
        data = with_orientation(noise(9, 7, 3), kind, 6)
        (tmp_path / "picture").write_bytes(data)
        for read in (lambda data=data: decode(data, 62), lambda: read_picture(tmp_path / "picture", 62)):
            with pytest.raises(ValueError, match="pixels are more than 62"):
                read()
        with pytest.raises(ValueError, match="pixels are more than 62"):
            read_thumbnail(tmp_path / "picture", 4, 62)
