"""labels.py: label files of every number of bits, as other programs write them, and what is refused in one line.

python -m pytest -q tests/test_labels.py
"""

from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from fuzzing import broken, fuzz, judge

from common.images import MAX_PIXELS
from labels import find_labels, read_labels, write_labels

LABELS = np.array([[0, 1, 1, 7], [0, 0, 2, 7], [3, 0, 0, 0]], np.int32)


def saved(path, array, **options):
    if path.suffix == ".png":
        assert cv2.imwrite(str(path), array)
    else:
        tifffile.imwrite(path, array, **options)
    return path


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize(
    ("dtype", "byteorder"),
    [
        *((dtype, byteorder) for dtype in ("uint8", "uint16", "int8", "int16", "int32") for byteorder in "<>"),
        ("uint32", "<"),  # Pillow, which reads the header, knows no other order
    ],
)
def test_tiffs_of_8_16_and_32_bits(tmp_path, dtype, compression, byteorder):
    path = saved(tmp_path / "a.tif", LABELS.astype(dtype), compression=compression, byteorder=byteorder)
    if dtype == "uint32" and compression and int(cv2.__version__.split(".")[0]) < 5:
        with pytest.raises(ValueError, match="save it .* without compression"):
            read_labels(path)
        return
    found = read_labels(path, (3, 4))
    assert found.dtype == np.int32 and found.tolist() == LABELS.tolist()


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_pngs_of_8_and_16_bits(tmp_path, dtype):
    assert read_labels(saved(tmp_path / "a.png", LABELS.astype(dtype))).tolist() == LABELS.tolist()


def test_numbers_stay_unless_they_are_larger_than_the_picture(tmp_path):
    stays = np.where(LABELS == 7, 12, LABELS)  # twelve pixels
    assert read_labels(saved(tmp_path / "a.tif", stays)).tolist() == stays.tolist()
    large = np.where(LABELS == 7, 2_000_000_000, LABELS * 100)
    expected = [[0, 1, 1, 4], [0, 0, 2, 4], [3, 0, 0, 0]]
    assert read_labels(saved(tmp_path / "b.tif", large)).tolist() == expected
    assert not read_labels(saved(tmp_path / "c.tif", LABELS * 0)).any()


def test_labels_are_turned_as_their_image_is(tmp_path):
    for orientation, turned in ((3, LABELS[::-1, ::-1]), (6, np.rot90(LABELS, -1))):
        path = saved(tmp_path / "a.tif", LABELS.astype(np.uint16), extratags=[(274, "H", 1, orientation, True)])
        assert read_labels(path).tolist() == turned.tolist()


def test_written_and_read(tmp_path):
    many = np.arange(65_536, dtype=np.int32).reshape(256, 256)
    write_labels(tmp_path / "a.png", many)
    assert (read_labels(tmp_path / "a.png", (256, 256)) == many).all()
    assert cv2.imread(str(tmp_path / "a.png"), cv2.IMREAD_UNCHANGED).dtype == np.uint16
    with pytest.raises(ValueError, match="65,536 objects; a label file of 16 bits holds at most 65,535"):
        write_labels(tmp_path / "b.png", many + 1)
    assert not (tmp_path / "b.png").exists()


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (-LABELS, "the number -7; expected 0 for background"),
        (LABELS.astype(np.float32), r"1 channel\(s\) of float32; expected one channel of whole numbers"),
        (np.dstack([LABELS] * 3).astype(np.uint8), r"3 channel\(s\) of uint8; expected one channel"),
        (np.stack([LABELS] * 2).astype(np.uint16), "2 pages, expected one"),
        (LABELS.astype(np.int32).T, "3 x 4 pixels, its image has 4 x 3"),
    ],
)
def test_what_is_refused(tmp_path, array, message):
    path = saved(tmp_path / "a.tif", array, photometric="rgb" if array.shape == (3, 4, 3) else "minisblack")
    with pytest.raises(ValueError, match=rf"a\.tif: {message}"):
        read_labels(path, (3, 4))


@pytest.mark.parametrize("data", [b"", b"text", b"II*\0", b"\x89PNG\r\n\x1a\n"])
def test_files_that_are_no_pictures(tmp_path, data):
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.png: unreadable"):
        read_labels(tmp_path / "a.png")


def test_half_a_file(tmp_path):
    path = saved(tmp_path / "a.tif", np.random.default_rng(0).integers(0, 999, (99, 99), np.uint16))
    path.write_bytes(path.read_bytes()[:-9000])
    with pytest.raises(ValueError, match=r"a\.tif: unreadable"):
        read_labels(path)


def test_the_size_is_checked_before_anything_is_decoded(tmp_path):
    path = saved(tmp_path / "a.png", np.zeros((20_001, 20_000), np.uint8))
    assert path.stat().st_size < 1e6
    with pytest.raises(ValueError, match=f"20000 x 20001 pixels are more than {MAX_PIXELS:,}"):
        read_labels(path)


def test_more_pixels_on_a_side_than_opencv_reads(tmp_path):
    labels = np.ones((1, 2**20 + 1), np.uint16)
    assert np.array_equal(read_labels(saved(tmp_path / "a.tif", labels)), labels)


def test_one_file_for_each_id(tmp_path):
    with pytest.raises(ValueError, match="no labels"):
        find_labels(tmp_path, "a.b")
    path = saved(tmp_path / "a.b.tiff", LABELS)
    assert find_labels(tmp_path, "a.b") == path
    upper = saved(tmp_path / "c.tif", LABELS).rename(tmp_path / "c.TIF")
    assert find_labels(tmp_path, "c") == upper
    saved(tmp_path / "a.b.png", LABELS.astype(np.uint8))
    with pytest.raises(ValueError, match=r"several label files, \.png and \.tiff"):
        find_labels(tmp_path, "a.b")


def test_files_broken_at_random(count, sandbox, capfd):
    bases = {}
    for name, options in (
        ("a.png", {}),
        ("a.tif", {}),
        ("z.tif", {"compression": "zlib"}),
        ("b.tif", {"tile": (16, 16)}),
    ):
        array = np.random.default_rng(0).integers(0, 9, (20, 30)).astype(np.uint16)
        bases[name] = saved(sandbox / name, array, **options).read_bytes()

    def call(data):
        Path("free/a.tif").write_bytes(data)
        labels = read_labels("free/a.tif", max_pixels=2**20)
        assert labels.dtype == np.int32 and labels.min() >= 0 and labels.max() <= labels.size

    fuzz("labels.read_labels", [*bases.items(), *broken(bases, 2 * count, 8)], call, sandbox, capfd)
    assert all(judge(call, data) == "accepted" for data in bases.values())
