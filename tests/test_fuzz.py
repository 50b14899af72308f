"""Hostile and broken pictures and zips end in one line or a right answer; test_fuzz_runs.py has the other files.

python -m pytest -q -s tests/test_fuzz.py             # a small sample; prints how many were refused and accepted
python -m pytest -q -s -m slow tests/test_fuzz.py     # some hundreds for every reader

Every reader gets files that are broken at random, from a fixed seed (bits flipped, spans cut out, zeroed, doubled or
overwritten by giant numbers, beginnings of other files), and files made by hand. It may answer, or raise a ValueError
or OSError (which run_script turns into one line), or exit with status 2 after one line, as the parser does. It may not
raise anything else, warn, print from inside a library, take longer than LIMIT_SECONDS or more than LIMIT_BYTES, run
code from a file, or write anywhere but into its own output.
"""

import contextlib
import io
import pickle
import random
import re
import shutil
import stat
import struct
import sys
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import tifffile
from fuzzing import Trap, broken, fuzz, judge, mutated
from PIL import Image

import preprocess_dsb2018
from common import download, images, tiff

# ---------------------------------------------------------------- pictures


def png_of(width, height, depth=8, colour=0, rows=b"", more=()):
    """A PNG whose header says what it is told, with right CRCs; rows: what stands in its data."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    parts = [header, *(chunk(*pair) for pair in more), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def file_of(array, kind, **options):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind, **options)
    return buffer.getvalue()


def tiff_of(array, **options):
    buffer = io.BytesIO()
    if array.ndim > 2 and not {"photometric", "imagej"} & options.keys():
        options["photometric"] = "minisblack"
    tifffile.imwrite(buffer, array, **options)
    return buffer.getvalue()


def pictures():
    """{name: bytes} of whole pictures of all kinds."""
    rng = np.random.default_rng(0)
    colour = rng.integers(0, 256, (17, 23, 3), np.uint8)
    grey, deep = colour[..., 0].copy(), rng.integers(0, 65536, (17, 23)).astype(np.uint16)
    palette = io.BytesIO()
    Image.fromarray(colour).quantize(16).save(palette, "PNG", transparency=3)
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "png": file_of(colour, "PNG"),
        "png16": file_of(deep, "PNG"),
        "rgba": file_of(np.dstack([colour, grey]), "PNG"),
        "palette": palette.getvalue(),
        "jpeg": file_of(colour, "JPEG", exif=exif),
        "progressive": file_of(grey, "JPEG", progressive=True),
        "tiff": file_of(colour, "TIFF"),
        "tiff_lzw": file_of(deep, "TIFF", compression="tiff_lzw"),
        "tiff_jpeg": file_of(colour, "TIFF", compression="jpeg"),
        "bmp": file_of(colour, "BMP"),
        "webp": file_of(colour, "WEBP"),
        "png_exif": file_of(colour, "PNG", exif=exif),
        "webp_exif": file_of(colour, "WEBP", exif=exif),
        "ppm": file_of(colour, "PPM"),
        "float": tiff_of(grey.astype(np.float32)),
        "ome": tiff_of(np.dstack([deep] * 3).transpose(2, 0, 1), ome=True, metadata={"axes": "CYX"}),
        "tiles": tiff_of(np.tile(colour, (2, 2, 1)), photometric="rgb", tile=(16, 16), metadata=None),
        "big_endian": tiff_of(deep, bigtiff=True, byteorder=">"),
    }


def stacks():
    """{name: bytes} of whole TIFF files of several pages."""
    deep = np.random.default_rng(0).integers(0, 65536, (2, 3, 17, 23)).astype(np.uint16)
    return {
        "imagej": tiff_of(deep, imagej=True, metadata={"axes": "TCYX", "unit": "um"}, resolution=(2, 2)),
        "ome": tiff_of(deep, ome=True, metadata={"axes": "TCYX", "PhysicalSizeX": 1, "PhysicalSizeY": 1}),
        "shaped": tiff_of(deep, compression="zlib", photometric="minisblack"),
        "plain": tiff_of((deep >> 8).astype(np.uint8), photometric="minisblack", metadata=None),
    }


def hostile_pictures():
    """{name: bytes} of files made to harm; each must be refused."""
    whole = pictures()
    bmp = bytearray(whole["bmp"])
    bmp[18:26] = struct.pack("<ii", 2**31 - 1, 2**31 - 1)
    return {
        "bomb": png_of(50_000, 50_000, rows=bytes(10**7)),
        "bomb16": png_of(2**31 - 1, 2**31 - 1, 16, 6),
        "wide": png_of(2**31 - 1, 1),
        "nothing": png_of(0, 0),
        "animated": png_of(3, 3, rows=bytes(12), more=[(b"acTL", struct.pack(">II", 2**31 - 1, 0))])[:-40],
        "bmp": bytes(bmp),
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(pwned) (w) file closefile\n",
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="9999999" height="9999999"/>',
        "ppm": b"P6 99999999 99999999 255\n",
        "empty": b"",
        "pickle": pickle.dumps(Trap()),
        "zip": b"PK\x03\x04" + bytes(100),
    }


def test_pictures_of_the_nuclei_jobs(count, sandbox, capfd):
    whole = pictures()
    cases = [*whole.items(), *hostile_pictures().items(), *broken(whole, 2 * count, 1, list(whole.values()))]

    def call(data):
        Path("free/picture").write_bytes(data)
        for array in (images.decode(data), images.read_picture("free/picture")):
            assert array.dtype.kind in "uif" and array.ndim in (2, 3) and array.size
            images.to_channels(array, 3)

    fuzz("images.decode, read_picture", cases, call, sandbox, capfd)
    assert all(judge(call, data) == "accepted" for data in whole.values())
    for name, data in hostile_pictures().items():
        assert judge(call, data) == "refused", name


def test_stacks(count, sandbox, capfd):
    whole = stacks()
    cases = [*whole.items(), *broken(whole, 2 * count, 7, list(whole.values()))]
    path = Path("free/stack.tif")

    def call(data):
        path.write_bytes(data)
        tiff.pixel_size(path)
        pages, failed = images.list_pages([path])
        with contextlib.closing(images.PageReader()) as reader:
            for page in pages[:30]:
                images.to_channels(reader.read(page), 3)
        if failed:
            raise ValueError(failed[0][1])

    fuzz("images.list_pages, PageReader", cases, call, sandbox, capfd)
    assert all(judge(call, data) == "accepted" for data in whole.values())


def test_pictures_of_the_transfer_job(count, sandbox, capfd):
    whole = pictures()
    cases = [*whole.items(), *hostile_pictures().items(), *broken(whole, 2 * count, 2, list(whole.values()))]

    def call(data):
        Path("free/picture.jpg").write_bytes(data)
        picture = images.read_thumbnail("free/picture.jpg", 16)
        assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3 and picture.size

    fuzz("images.read_thumbnail", cases, call, sandbox, capfd)
    assert all(judge(call, data) == "accepted" for data in whole.values())
    for name, data in hostile_pictures().items():
        assert judge(call, data) == "refused", name


# ---------------------------------------------------------------- zips


def zip_of(entries, compression=zipfile.ZIP_DEFLATED):
    """[(name or ZipInfo, bytes)] -> the bytes of a zip."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile's about duplicate names
        for name, data in entries:
            archive.writestr(name, data)
    return buffer.getvalue()


def link(name, mode=stat.S_IFLNK):
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, (mode | 0o777) << 16
    return info


def patched(data, old, new):
    assert old in data
    return data.replace(old, new)


def raw_entries():
    """stage1_train in small: two images with two masks each."""
    entries = []
    for number, name in enumerate(("a1", "b2")):
        rng = np.random.default_rng(number)
        entries.append((f"{name}/images/{name}.png", file_of(rng.integers(0, 256, (20, 20, 3), np.uint8), "PNG")))
        for k in range(2):
            mask = np.zeros((20, 20), np.uint8)
            mask[3 * k : 3 * k + 4, 5:9] = 255
            entries.append((f"{name}/masks/m{k}.png", file_of(mask, "PNG")))
    return entries


def hostile_zips(entries):
    """{name: bytes}; each must be refused, or, where its name ends in !, must do no harm."""
    whole, first = zip_of(entries), entries[0]
    found = {
        f"climbs {name!r}": zip_of([*entries, (name, b"x")])
        for name in ("../evil", "a/../../evil", "/evil", "C:/evil", "..\\evil", "a/b/../../../evil", "..", "//evil")
    }
    bz2, packed = zip_of(entries, zipfile.ZIP_BZIP2), zip_of([("big", bytes(2**24))])
    return found | {
        "link": zip_of([*entries, (link("link"), "../../evil")]),
        "link, then through it": zip_of([(link("x"), ".."), ("x/evil", b"x"), *entries]),
        "device": zip_of([*entries, (link("null", stat.S_IFCHR), b"")]),
        "pipe": zip_of([*entries, (link("pipe", stat.S_IFIFO), b"")]),
        "twice!": zip_of([*entries, *entries]),
        "file and folder": zip_of([("a", b"x"), ("a/b", b"x")]),
        "bzip2": bz2,
        "lzma": zip_of(entries, zipfile.ZIP_LZMA),
        "says terabytes": _with_sizes(whole, 2**32 - 2),
        "says less than it is": patched(packed, struct.pack("<I", 2**24), struct.pack("<I", 1000)),
        "encrypted": _with_flags(whole, 1),
        "wrong crc": patched(whole, struct.pack("<I", zlib.crc32(first[1])), b"abcd"),
        "method 99": patched(
            zip_of(entries, zipfile.ZIP_STORED),
            b"PK\x01\x02\x14\x03\x14\x00\x00\x00\x00\x00",
            b"PK\x01\x02\x14\x03\x14\x00\x00\x00\x63\x00",
        ),
        "empty": zip_of([]),
        "nothing": b"",
        "text": b"<html>404</html>",
        "long name": zip_of([*entries, ("n" * 5000, b"x")]),
        "odd names!": zip_of([*entries, ("\x1b[31m\nred", b"x"), ("con", b"x"), (" ", b"x")]),
        "deep!": zip_of([*entries, ("d/" * 1000 + "x", b"x")]),
        "many!": zip_of([*entries, *((f"f{k}", b"") for k in range(300))]),
    }


def _headers(data, local, central):
    """Where a field lies in every local header and in every entry of the central directory."""
    for signature, offset in ((b"PK\x03\x04", local), (b"PK\x01\x02", central)):
        yield from (match.start() + offset for match in re.finditer(re.escape(signature), data))


def _with_flags(data, flags):
    data = bytearray(data)
    for place in _headers(bytes(data), 6, 8):
        data[place] |= flags
    return bytes(data)


def _with_sizes(data, size):
    data = bytearray(data)
    for place in _headers(bytes(data), 22, 24):
        data[place : place + 4] = struct.pack("<I", size)
    return bytes(data)


def test_zips_are_unpacked_safely(count, sandbox, capfd):
    entries = [("data/a.txt", b"a" * 500), ("data/b/c.txt", bytes(range(256))), ("data/d.bin", bytes(3000))]
    bases = {"deflated": zip_of(entries), "stored": zip_of(entries, zipfile.ZIP_STORED)}
    hostile = hostile_zips(entries)

    def call(data):
        shutil.rmtree("free", ignore_errors=True)
        Path("free").mkdir()
        Path("free/x.zip").write_bytes(data)
        try:
            download.safe_extract("free/x.zip", "free/data")
        finally:
            assert {path.name for path in Path("free").iterdir()} <= {"x.zip", "data"}, "half-written"
            assert not any(path.is_symlink() for path in Path("free").rglob("*"))
        assert Path("free/data").is_dir()

    fuzz(
        "download.safe_extract", [*bases.items(), *hostile.items(), *broken(bases, 2 * count, 3)], call, sandbox, capfd
    )
    fuzz(
        "download.check_zip",
        [*bases.items(), *hostile.items(), *broken(bases, count, 4)],
        lambda data: (Path("free/x.zip").write_bytes(data), download.check_zip("free/x.zip")),
        sandbox,
        capfd,
    )
    assert all(judge(call, data) == "accepted" for data in bases.values())
    for name, data in hostile.items():
        assert name.endswith("!") or judge(call, data) == "refused", name


def preprocess(monkeypatch, raw):
    shutil.rmtree("free/out", ignore_errors=True)
    words = ["--raw", raw, "--output", "free/out", "--img_size", "16", "--num_workers", "1"]
    monkeypatch.setattr(sys, "argv", ["preprocess_dsb2018.py", *words])
    preprocess_dsb2018.main()
    names = {path.name for path in Path("free/out/images").iterdir()}
    assert names and names == {path.name for path in Path("free/out/masks/0").iterdir()}


def test_raw_zips(count, sandbox, capfd, monkeypatch):
    entries = raw_entries()
    whole = zip_of(entries)
    bases = {
        "zip": whole,
        "stored": zip_of(entries, zipfile.ZIP_STORED),
        "kaggle": zip_of([("stage1_train.zip", whole)]),
    }
    hostile = hostile_zips(entries) | {
        "climbing ids": zip_of([(name.replace("a1", ".."), data) for name, data in entries]),
        "bombs inside!": zip_of([*entries, ("c/images/c.png", png_of(60_000, 60_000)), ("c/masks/c.png", b"")]),
        "an id as long as a name can be": zip_of([(name.replace("a1", "i" * 300), data) for name, data in entries]),
    }

    def call(data):
        Path("free/raw.zip").write_bytes(data)
        try:
            preprocess(monkeypatch, "free/raw.zip")
        finally:
            assert {path.name for path in Path("free").iterdir()} <= {"raw.zip", "out"}, "half-written"

    fuzz("preprocess_dsb2018, zip", [*bases.items(), *hostile.items(), *broken(bases, count, 5)], call, sandbox, capfd)
    assert all(judge(call, data) == "accepted" for data in bases.values())
    assert judge(call, hostile["climbing ids"]) == "refused"


def test_raw_folders(count, sandbox, capfd, monkeypatch):
    entries = raw_entries()
    rng = random.Random(6)

    def cases():
        for number in range(count):
            yield f"{number}", [(name, mutated(data, rng) if rng.random() < 0.4 else data) for name, data in entries]

    def call(files):
        shutil.rmtree("free", ignore_errors=True)
        for name, data in files:
            path = Path("free/raw", name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        preprocess(monkeypatch, "free/raw")

    fuzz("preprocess_dsb2018, folder", [("whole", entries), *cases()], call, sandbox, capfd)
    assert judge(call, entries) == "accepted"
