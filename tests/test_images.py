"""images.py on files that another library (Pillow) wrote, and squeezing against explicit area averages."""

import io
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from common.images import (
    EXTENSIONS,
    decode,
    find_pictures,
    foreground,
    read_picture,
    read_thumbnail,
    squeeze,
    squeeze_mask,
    standardise,
    to_channels,
    write_png,
)

UNREADABLE = "unreadable: no whole picture of 8 or 16 bits"


def file_of(image, kind="PNG", **options):
    """A Pillow image or an array -> the bytes of a file."""
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, kind, **options)
    return buffer.getvalue()


def colours(height=24, width=30):
    """(H, W, 3) uint8: red, green and blue stripes, unequal in brightness."""
    image = np.zeros((height, width, 3), np.uint8)
    image[:, :10, 0], image[:, 10:20, 1], image[:, 20:, 2] = 250, 180, 90
    return image


def noise(*shape, dtype=np.uint8, high=256, seed=0):
    return np.random.default_rng(seed).integers(0, high, shape, dtype)


# ---------------------------------------------------------------- finding


def test_files_folders_and_patterns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["b.png", "a.TIF", "sub/c.jpeg", "sub/d.txt", ".hidden.png", "out/e.png", "out/more/f.pgm", "x[1].bmp"]
    for name in [*names, "x1.webp"]:
        Path(name).parent.mkdir(exist_ok=True, parents=True)
        Path(name).touch()

    def found(*paths):
        files, failed = find_pictures(paths, leave_out=Path("out"))
        return [path.as_posix() for path in files], [f"{path}: {reason}" for path, reason in failed]

    assert found(".") == (["a.TIF", "b.png", "out/more/f.pgm", "sub/c.jpeg", "x1.webp", "x[1].bmp"], [])
    assert len(find_pictures([tmp_path])[0]) == 7  # nothing is left out
    assert found("sub/d.txt", "out/e.png") == (["sub/d.txt", "out/e.png"], [])  # whatever is named is taken
    assert found("x[1].bmp") == (["x[1].bmp"], []) and found("x[0-9].*") == (["x1.webp"], [])
    assert found("**/*.jpeg") == (["sub/c.jpeg"], []) and found("s*") == (["sub/c.jpeg"], [])
    files, failed = found("b.png", "*.png", str(tmp_path / "b.png"), "sub/../b.png")
    assert len(files) == 1 and not failed
    Path("empty").mkdir()
    assert found("empty", "out", "nothing.png", "*.gif", "b.png") == (
        ["out/more/f.pgm", "b.png"],
        ["empty: holds no picture", "nothing.png: no such file", "*.gif: no such file"],
    )
    for name in ("phone/a.HEIC", "phone/b.heic", "phone/notes.txt"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    assert found("phone") == ([], ["phone: holds no picture; its files end in .heic, .txt"])


@pytest.mark.parametrize("ending", EXTENSIONS)
def test_what_is_found_is_read_by_both_jobs(ending, tmp_path):
    grey = np.repeat(np.repeat(noise(3, 4), 8, 0), 8, 1)
    path = tmp_path / f"a{ending}"
    Image.fromarray(grey).save(path, **{".webp": {"lossless": True}, ".jpg": {"quality": 100}}.get(ending, {}))
    assert find_pictures([tmp_path]) == ([path], [])
    for array in (to_channels(read_picture(path), 3), read_thumbnail(path, 100)):
        assert array.shape == (24, 32, 3) and np.abs(array[4::8, 4::8].mean(2) - grey[4::8, 4::8]).max() < 12


# ---------------------------------------------------------------- files to arrays


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP"])
@pytest.mark.parametrize("shape", [(24, 30), (24, 30, 3), (1, 1, 3)])
def test_pixels_are_those_of_the_file(kind, shape):
    image = noise(*shape)
    found = decode(file_of(image, kind))
    assert found.dtype == np.uint8 and np.array_equal(found, image)


def test_jpeg_keeps_the_order_of_the_colours():
    found = decode(file_of(colours(), "JPEG", quality=95, subsampling=0))
    assert found.shape == (24, 30, 3) and np.abs(found.astype(int) - colours()).max() < 12


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"})])
def test_rgba(kind, options):
    """The colours are those of the file, also where they are transparent."""
    image = np.dstack([colours(), noise(24, 30)])
    found = decode(file_of(image, kind, **options))
    assert np.array_equal(found, image)
    assert np.array_equal(to_channels(found, 3), colours()) and np.array_equal(to_channels(found, 4), image)


def test_grey_and_alpha():
    grey, alpha = noise(9, 7), noise(9, 7, seed=1)
    found = decode(file_of(Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)])))
    assert np.array_equal(to_channels(found, 4), np.dstack([grey, grey, grey, alpha]))
    assert np.array_equal(to_channels(found, 3), np.dstack([grey] * 3))
    assert np.array_equal(to_channels(found, 1)[..., 0], grey)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP"])
def test_a_palette_is_looked_up(kind):
    indices = Image.fromarray(noise(9, 7, high=3))
    indices.putpalette([10, 20, 30, 200, 0, 7, 0, 250, 90])
    expected = np.array([[10, 20, 30], [200, 0, 7], [0, 250, 90]], np.uint8)[noise(9, 7, high=3)]
    assert np.array_equal(to_channels(decode(file_of(indices, kind)), 3), expected)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP"])
def test_one_bit_is_black_and_white(kind):
    bits = noise(9, 13, high=2)
    found = decode(file_of(Image.fromarray(bits * 255).convert("1"), kind))
    assert np.array_equal(to_channels(found, 1)[..., 0], bits * 255)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_kept_and_then_scaled(kind):
    """The limits of a ramp are its ends: contrast.py has the other cases."""
    image = np.repeat(np.arange(500, 4580, 16, dtype=np.uint16)[None], 200, 0)
    found = decode(file_of(image, kind) if kind != "PPM" else b"P5 255 200 65535\n" + image.astype(">u2").tobytes())
    assert found.dtype == np.uint16 and np.array_equal(found, image)
    expected = np.repeat(np.round(np.arange(255) / 254 * 255)[None], 200, 0)
    assert np.array_equal(to_channels(found, 1)[..., 0], expected)
    assert np.array_equal(to_channels(found, 3), np.dstack([expected] * 3))


def test_sixteen_bits_in_colour():
    image = np.zeros((20, 20, 3), np.uint16)
    image[:10, :10], image[10:, 10:] = (4095, 0, 0), (0, 819, 1638)  # red, greenish blue: 1/5 and 2/5
    found = decode(cv2.imencode(".png", image[..., ::-1])[1].tobytes())
    small = to_channels(found, 3)[::19, ::19]
    assert small.tolist() == [[[255, 0, 0], [0, 0, 0]], [[0, 0, 0], [0, 51, 102]]]


def test_grey_to_and_from_colours():
    grey = noise(5, 4)
    assert np.array_equal(to_channels(grey, 1), grey[..., None])
    assert np.array_equal(to_channels(grey, 3), np.dstack([grey] * 3))
    assert np.array_equal(to_channels(grey, 4), np.dstack([grey] * 3 + [np.full((5, 4), 255)]))
    luminance = (colours() @ np.array([0.299, 0.587, 0.114]))[..., None]  # ITU-R BT.601
    assert np.abs(to_channels(colours(), 1) - luminance).max() <= 0.51
    opaque = np.dstack([colours(), np.full((24, 30), 255, np.uint8)])
    assert np.array_equal(to_channels(colours(), 4), opaque)
    assert np.array_equal(to_channels(opaque, 1), to_channels(colours(), 1))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP"])
@pytest.mark.parametrize("part", [0.0, 0.05, 0.5, 0.9, 0.99])
def test_a_truncated_file_is_no_picture(kind, part):
    whole = file_of(noise(80, 90, 3), kind)
    with pytest.raises(ValueError, match=UNREADABLE):
        decode(whole[: int(len(whole) * part)])


def test_what_is_no_picture():
    broken = bytearray(file_of(noise(80, 90, 3)))
    broken[len(broken) // 2] ^= 0xFF  # the checksum of a PNG tells
    for data in (bytes(broken), b"<html>404</html>", b"\0" * 1000):
        with pytest.raises(ValueError, match=UNREADABLE):
            decode(data)


@pytest.mark.parametrize(
    ("begins", "name"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x1cftypavif\0\0\0\0avifmif1", "AVIF"),
        (b"GIF89a", "GIF"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
        (b"ZISRAWFILE\0", "Zeiss CZI"),
        (b"\xda\xce\xbe\n", "Nikon ND2"),
        (bytes(128) + b"DICM", "DICOM"),
    ],
)
def test_other_formats_are_named_by_both_jobs(begins, name, tmp_path):
    path = tmp_path / "picture.jpg"
    path.write_bytes(begins + bytes(200))
    expected = f"unreadable: the file is {name}; convert it to PNG or TIFF"
    with pytest.raises(ValueError) as caught:
        read_picture(path)
    assert str(caught.value) == expected
    with pytest.raises(ValueError) as caught:
        read_thumbnail(path, 20)
    assert str(caught.value) == f"{path} is not a readable picture ({expected})"


def test_a_gif_of_pillow_is_named():
    with pytest.raises(ValueError, match="the file is GIF;"):
        decode(file_of(noise(9, 7), "GIF"))


def test_a_broken_tiff_says_nothing_of_its_own(capfd):
    whole = file_of(noise(80, 90, 3), "TIFF")
    with pytest.raises(ValueError, match=UNREADABLE):
        decode(whole[:-500])
    assert capfd.readouterr() == ("", "")


def test_foreground_ignores_alpha():
    assert foreground(np.array([[0, 1, 255]])).tolist() == [[False, True, True]]
    assert foreground(np.array([[[0, 0, 0, 255], [0, 0, 1, 0]]])).tolist() == [[False, True]]


# ---------------------------------------------------------------- thumbnails


def save(path, size=(40, 30), colour=(200, 30, 30), **options):
    Image.new("RGB", size, colour).save(path, **options)


def test_thumbnails_are_shrunk_but_never_enlarged(tmp_path):
    save(tmp_path / "big.jpg", (2000, 1000))
    assert read_thumbnail(tmp_path / "big.jpg", 100).shape == (100, 200, 3)
    save(tmp_path / "small.png", (20, 10))
    assert read_thumbnail(tmp_path / "small.png", 100).shape == (10, 20, 3)


def test_a_large_jpeg_is_decoded_smaller(tmp_path):
    """At 1/4, the smallest of 1/2, 1/4 and 1/8 that leaves twice the size asked for; then resized."""
    Image.fromarray(cv2.GaussianBlur(noise(800, 1200, 3), (0, 0), 9)).save(tmp_path / "a.jpg")
    with Image.open(tmp_path / "a.jpg") as image:
        image.draft("RGB", (300, 200))
        assert image.size == (300, 200)
        expected = image.resize((150, 100), Image.Resampling.BILINEAR)
    assert np.array_equal(read_thumbnail(tmp_path / "a.jpg", 100), np.asarray(expected))


@pytest.mark.parametrize(
    "mode, value, expected",
    [
        ("L", 7, (7, 7, 7)),
        ("1", 1, (255,) * 3),
        ("RGBA", (9, 8, 7, 0), (255,) * 3),
        ("RGBA", (9, 8, 7, 255), (9, 8, 7)),
        ("LA", (7, 0), (255,) * 3),
    ],
)
def test_thumbnails_are_rgb_on_white(tmp_path, mode, value, expected):
    Image.new(mode, (4, 4), value).save(tmp_path / "a.png")
    assert tuple(read_thumbnail(tmp_path / "a.png", 8)[0, 0].tolist()) == expected


@pytest.mark.parametrize("ending", ["png", "jpg", "bmp"])
def test_red_is_the_first_channel_of_a_thumbnail(tmp_path, ending):
    save(tmp_path / f"a.{ending}", (200, 200), (200, 120, 40))
    for side in (200, 20):  # as it is, and shrunk while a JPEG is decoded
        assert np.abs(read_thumbnail(tmp_path / f"a.{ending}", side).mean((0, 1)) - (200, 120, 40)).max() <= 2


@pytest.mark.parametrize("channels", [(), (3,), (4,)])
@pytest.mark.parametrize("ending", ["png", "tif"])
def test_thumbnails_of_more_than_8_bits_are_scaled_alike(tmp_path, ending, channels):
    image = noise(40, 50, *channels, dtype=np.uint16, high=900)
    if channels == (4,):
        image[..., 3] = 65535
    assert cv2.imwrite(str(tmp_path / f"a.{ending}"), image)
    expected = to_channels(read_picture(tmp_path / f"a.{ending}"), 3)
    assert expected.max() > 200 and np.array_equal(read_thumbnail(tmp_path / f"a.{ending}", 40), expected)


def test_thumbnails_of_damaged_files(tmp_path):
    path = tmp_path / "a.jpg"
    for data in (b"", b"<html>404</html>", file_of(noise(80, 90, 3), "JPEG")[:900]):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=f"{path} is not a readable picture") as caught:
            read_thumbnail(path, 20)
        assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- squeezing


def overlaps(old, new):
    """(new, old): the part of output pixel o, [o old / new, (o + 1) old / new), that each input pixel makes up."""
    parts = np.zeros((new, old))
    for o, i in np.ndindex(new, old):
        low, high = o * old / new, (o + 1) * old / new
        parts[o, i] = max(0.0, min(i + 1, high) - max(i, low)) * new / old
    return parts


def area_average(image, size):
    rows, columns = overlaps(image.shape[0], size[0]), overlaps(image.shape[1], size[1])
    return np.einsum("ab,b...->a...", rows, np.einsum("cd,bd...->bc...", columns, image.astype(float)))


@pytest.mark.parametrize("old", [(48, 64), (31, 47), (96, 20), (16, 12)])
@pytest.mark.parametrize("channels", [(), (1,), (3,), (4,)])
def test_squeeze_is_the_area_average(old, channels):
    image, size = noise(*old, *channels), (16, 12)
    found = squeeze(image, size)
    assert found.shape == (*size, *channels) and found.dtype == np.uint8
    assert np.abs(found - area_average(image, size)).max() < 1.01  # rounded twice, once a side


def test_squeeze_enlarges_linearly_and_one_side_alone():
    ramp = np.repeat(np.arange(0, 80, 8, dtype=np.uint8)[None], 6, axis=0)  # (6, 10), 8 more a pixel
    wide = squeeze(ramp, (6, 20))
    assert np.array_equal(wide[:, 1:-1], np.repeat(np.arange(2, 74, 4, dtype=np.uint8)[None], 6, axis=0))
    both = squeeze(ramp, (3, 20))
    assert np.array_equal(both, wide[:3])
    assert squeeze(ramp, (12, 5)).tolist() == [[4, 20, 36, 52, 68]] * 12


def blob(height, width, radius, seed):
    rng = np.random.default_rng(seed)
    mask = np.zeros((height, width), np.uint8)
    for _ in range(12):
        cv2.circle(mask, (int(rng.integers(width)), int(rng.integers(height))), radius, 1, -1)
    return mask > 0


@pytest.mark.parametrize("old", [(256, 320), (97, 131), (1040, 1388), (96, 96), (40, 200)])
@pytest.mark.parametrize("radius", [1, 7])
def test_squeezed_masks_keep_their_area(old, radius):
    mask = blob(*old, radius, seed=radius)
    small = squeeze_mask(mask, (32, 24))
    coverage = area_average(mask, (32, 24))
    assert small.shape == (32, 24) and small.dtype == bool
    assert abs(small.sum() - coverage.sum()) <= 0.5 + 1e-3
    # the pixels chosen are the most covered ones
    assert coverage[small].min(initial=1) >= coverage[~small].max(initial=0) - 2e-3


def test_masks_that_grow_stay_or_are_plain():
    mask = blob(32, 24, 3, seed=0)
    assert np.array_equal(squeeze_mask(mask, (32, 24)), mask)
    large = squeeze_mask(mask, (96, 72))
    assert large.mean() == pytest.approx(mask.mean(), rel=0.03)
    assert (large != np.repeat(np.repeat(mask, 3, 0), 3, 1)).mean() < 0.1
    for value in (False, True):
        for size in ((5, 9), (64, 64)):
            assert (squeeze_mask(np.full((32, 24), value), size) == value).all()


def test_a_tie_goes_to_the_neighbourhood_then_to_raster_order():
    mask = np.zeros((8, 8), bool)
    mask[0, 0] = mask[0, 4] = mask[6, 6] = True  # three quarters of a pixel, the last of them
    mask[6:, 4:6] = True  # beside a whole one: 2 of 16 pixels
    assert np.argwhere(squeeze_mask(mask, (4, 4))).tolist() == [[3, 2], [3, 3]]
    alike = np.zeros((64, 64), bool)
    alike[::2, ::2] = True  # a quarter of every pixel: the first quarter of the 32 rows
    assert np.array_equal(squeeze_mask(alike, (32, 32)), np.arange(32)[:, None] < np.full(32, 8))


# ---------------------------------------------------------------- standardising


def test_standardise_by_hand():
    image = torch.tensor([[[0, 255]], [[51, 102]]], dtype=torch.uint8)
    found = standardise(image, [0.5, 0.2], (0.25, 0.1))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor([[[-2.0, 2.0]], [[0.0, 2.0]]]))
    assert torch.equal(standardise(image[None].repeat(3, 1, 1, 1), [0.5, 0.2], (0.25, 0.1))[2], found)


# ---------------------------------------------------------------- writing


@pytest.mark.parametrize("array", [noise(9, 7), noise(9, 7, 3), noise(9, 7, dtype=np.uint16, high=60000)])
def test_written_and_read_back(array, tmp_path):
    write_png(tmp_path / "image.png", array)
    assert np.array_equal(decode((tmp_path / "image.png").read_bytes()), array)
    if array.dtype == np.uint8:
        assert np.array_equal(np.asarray(Image.open(tmp_path / "image.png")), array)


def test_writing_where_one_cannot(tmp_path):
    with pytest.raises(OSError):
        write_png(tmp_path / "nowhere" / "image.png", noise(2, 2))
