"""tiff.py on files that tifffile's OME, ImageJ and plain writers made: pages, channels, pixels, sizes, and refusals.

Each plane has a value of its own, so that it says which plane was read.
"""

import io
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import tifffile
from conftest import REPOSITORY
from test_images import noise

from common import images
from common.images import Page, PageReader, decode, list_pages, read_picture, read_thumbnail, to_channels
from common.tiff import Stack, pixel_size

GREY = {"photometric": "minisblack"}


def written(array, path=None, **options):
    """The bytes of a TIFF of an array, or of a list of arrays; in `path`, if given."""
    buffer, kind = io.BytesIO(), {key: options.pop(key) for key in ("ome", "imagej", "bigtiff") if key in options}
    with tifffile.TiffWriter(buffer, **kind) as writer:
        for part in array if isinstance(array, list) else [array]:
            writer.write(part, **options)
    if path:
        path.write_bytes(buffer.getvalue())
    return buffer.getvalue()


def planes(*outer, dtype=np.uint16, size=(20, 30)):
    """(*outer, H, W): plane 0 of value 0, plane 1 of value 1 ..., in the order of the axes."""
    count = int(np.prod(outer))
    return np.broadcast_to(np.arange(count, dtype=dtype)[:, None, None], (count, *size)).reshape(*outer, *size).copy()


def values(stack):
    """[[value of channel 0, 1 ...] of page 0, ...] of a file of `planes`."""
    return [
        [int(stack.read(number, [k])[3, 4]) for k in range(len(stack.channels(number)))] for number in range(len(stack))
    ]


# ---------------------------------------------------------------- pages and channels

TZCYX = np.arange(24).reshape(2, 3, 4).reshape(6, 4).tolist()  # a page for each time and slice, T first


@pytest.mark.parametrize(
    ("writer", "compression"),
    [({"ome": True, **GREY}, None), ({"ome": True, **GREY}, "zlib"), ({"imagej": True}, None)],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_times_and_slices_are_pages_and_channels_are_channels(writer, compression, dtype):
    data = written(planes(2, 3, 4, dtype=dtype), metadata={"axes": "TZCYX"}, compression=compression, **writer)
    with Stack(io.BytesIO(data)) as stack:
        assert values(stack) == TZCYX and stack.read(5, [2, 1, 0])[0, 0].tolist() == [22, 21, 20]
        assert stack.read(5, [2]).shape == (20, 30) and stack.read(5, [2]).dtype == dtype
        assert not stack.is_colour(0) and not stack.is_plain


def test_a_large_imagej_stack_describes_its_first_frame_alone():
    data = written(planes(2, 3, 4), imagej=True, metadata={"axes": "TZCYX"}, truncate=True)
    assert len(tifffile.TiffFile(io.BytesIO(data)).pages) == 1
    with Stack(io.BytesIO(data)) as stack:
        assert values(stack) == TZCYX


def test_channels_stand_where_the_file_puts_them():
    """OME files of many microscopes have the order XYZCT or XYZTC."""
    data = written(planes(2, 3, 4), ome=True, metadata={"axes": "CTZYX"}, **GREY)
    with Stack(io.BytesIO(data)) as stack:
        assert values(stack) == [[k, 12 + k] for k in range(12)]


def test_names_of_channels():
    names = ["DAPI", "GFP"]
    data = written(planes(2), ome=True, metadata={"axes": "CYX", "Channel": {"Name": names}}, **GREY)
    with Stack(io.BytesIO(data)) as stack:
        assert stack.channels(0) == names
    with Stack(io.BytesIO(written(planes(2), ome=True, metadata={"axes": "CYX"}, **GREY))) as stack:
        assert stack.channels(0) == ["0", "1"]
    with Stack(io.BytesIO(written(noise(9, 7, 3), photometric="rgb"))) as stack:
        assert stack.channels(0) == ["red", "green", "blue"] and stack.is_colour(0)


@pytest.mark.parametrize("options", [{}, {"metadata": None}, {"bigtiff": True}])
def test_a_plain_stack_has_a_page_for_each_plane(options):
    with Stack(io.BytesIO(written(planes(5), **GREY, **options))) as stack:
        assert values(stack) == [[0], [1], [2], [3], [4]]


def test_pages_of_several_sizes_are_in_the_order_of_the_file():
    parts = [np.full((20, 30), 0, np.uint8), np.full((10, 8), 1, np.uint8), np.full((20, 30), 2, np.uint8)]
    with Stack(io.BytesIO(written(parts, metadata=None, **GREY))) as stack:
        found = [stack.read(number, [0]) for number in range(3)]
    assert all(np.array_equal(one, other) for one, other in zip(found, parts, strict=True))


@pytest.mark.parametrize("ome", [True, False])
def test_a_pyramid_is_one_page_of_the_full_resolution(ome):
    full = noise(64, 96, 3)
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer, ome=ome) as writer:
        writer.write(full, subifds=2, photometric="rgb", tile=(32, 32))
        writer.write(full[::2, ::2], subfiletype=1, photometric="rgb", tile=(32, 32))
        writer.write(full[::4, ::4], subfiletype=1, photometric="rgb", tile=(32, 32))
        if not ome:
            writer.write(full[::8, ::8], subfiletype=1, photometric="rgb", metadata=None)  # a thumbnail
    assert np.array_equal(decode(buffer.getvalue()), full)


def test_other_files_are_not_opened(tmp_path):
    """The OME-XML of one file names another, as sets of files do."""
    written(planes(1)[0] + 7, tmp_path / "other.ome.tif", ome=True, **GREY)
    data = written(planes(2), ome=True, metadata={"axes": "TYX"}, **GREY)
    link = b'<TiffData FirstT="1" IFD="0"><UUID FileName="../other.ome.tif">urn:uuid:1</UUID></TiffData>'
    xml = data[data.index(b"<?xml") : data.index(b"</OME>") + 6]
    first = xml[xml.index(b"<TiffData") : xml.index(b"</Pixels>")]
    changed = xml.replace(first, b'<TiffData IFD="0" PlaneCount="1"/>' + link)
    (tmp_path / "a").mkdir()
    path = tmp_path / "a" / "set.ome.tif"
    with tifffile.TiffWriter(path) as writer:
        writer.write(planes(2), description=changed.decode(), metadata=None, **GREY)
    with open(path, "rb") as file, Stack(file) as stack:
        assert values(stack) == [[0], [1]]


# ---------------------------------------------------------------- pixels

COLOURS = np.random.default_rng(1).integers(0, 65536, (3, 256)).astype(np.uint16)
GREY8, RGB8, DEEP = noise(20, 30), noise(20, 30, 3), noise(20, 30, dtype=np.uint16, high=5000)
RGBA8 = np.dstack([RGB8, GREY8])
FORMS = {  # array, options of the writer, what is read
    "grey": (GREY8, GREY, GREY8),
    "white is zero": (GREY8, {"photometric": "miniswhite"}, 255 - GREY8),
    "colour": (RGB8, {"photometric": "rgb"}, RGB8),
    "planes of colour": (RGB8.transpose(2, 0, 1), {"photometric": "rgb", "planarconfig": "separate"}, RGB8),
    "palette": (GREY8, {"photometric": "palette", "colormap": COLOURS}, (COLOURS >> 8).astype(np.uint8).T[GREY8]),
    "16 bits": (DEEP, GREY, DEEP),
    "signed": (DEEP.astype(np.int16) - 2000, GREY, DEEP.astype(np.int16) - 2000),
    "float32": (DEEP.astype(np.float32) / 7, GREY, DEEP.astype(np.float32) / 7),
    "tiles": (noise(70, 90), {"tile": (16, 16), **GREY}, noise(70, 90)),
    "turned": (GREY8, {"extratags": [(274, "H", 1, 6, False)], **GREY}, np.rot90(GREY8, -1)),
}
RAW_FORMS = {
    "one bit": (GREY8 > 99, GREY, (GREY8 > 99) * np.uint8(255)),
    "signed 8 bits": (GREY8.view(np.int8), GREY, GREY8.view(np.int8)),
    "32 bits": (DEEP.astype(np.uint32) * 700_000, GREY, DEEP.astype(np.uint32) * 700_000),
    "float16": (GREY8.astype(np.float16), GREY, GREY8.astype(np.float16)),
    "float64": (DEEP / 7, GREY, DEEP / 7),
    "deep colour": (np.dstack([DEEP] * 3), {"photometric": "rgb"}, np.dstack([DEEP] * 3)),
    "deep planes": (np.stack([DEEP] * 3), {"photometric": "rgb", "planarconfig": "separate"}, np.dstack([DEEP] * 3)),
    "grey and alpha": (RGB8[..., :2], {"extrasamples": ["unassalpha"], "planarconfig": "contig", **GREY}, RGB8[..., 0]),
}
CASES = [(name, None) for name in (*FORMS, *RAW_FORMS)] + [(name, "zlib") for name in FORMS]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize(("form", "compression"), CASES)
def test_pixels_are_those_of_the_file(form, compression, byteorder, count, tmp_path):
    """In a file of one page and in the second page of a stack; values, not always the type, which may be wider."""
    array, options, expected = (FORMS | RAW_FORMS)[form]
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path, byteorder=byteorder) as writer:
        for k in range(count):
            changed = array if array.dtype == bool or k == count - 1 else array // 2
            writer.write(changed, compression=compression, metadata=None, **options)
    [*_, last], failed = list_pages([path])
    if count == 2 and byteorder == ">" and compression and form in ("signed", "float32"):  # Pillow mixes up their bytes
        with pytest.raises(ValueError, match="unreadable: .* in ADOBE_DEFLATE compression"):
            PageReader().read(last)
        return
    found = PageReader().read(last)
    assert not failed and found.dtype.isnative and np.can_cast(expected.dtype, found.dtype)
    assert found.shape == expected.shape and np.array_equal(found, expected)


@pytest.mark.parametrize("compression", ["tiff_lzw", "jpeg", "packbits", "tiff_deflate"])
def test_compressed_stacks_of_pillow(compression, tmp_path):
    """imagecodecs, which tifffile would need for some, is not required."""
    from PIL import Image

    smooth = np.repeat(np.repeat(noise(4, 6, 3), 16, 0), 16, 1)
    pages = [Image.fromarray(picture) for picture in (smooth // 2, smooth)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:], compression=compression)
    pictures, _ = list_pages([tmp_path / "a.tif"])
    found = [PageReader().read(picture).astype(int) for picture in pictures]
    close = 40 if compression == "jpeg" else 0
    assert np.abs(found[0] - smooth // 2).max() <= close and np.abs(found[1] - smooth).max() <= close


@pytest.mark.parametrize("dtype", [np.uint32, np.float64])
def test_what_no_library_decodes_is_described(dtype):
    data = written(planes(2, dtype=dtype), compression="zlib", metadata=None, **GREY)
    expected = f"unreadable: {np.dtype(dtype)} of axes YX in ADOBE_DEFLATE compression; save it with 8 or 16 bits"
    with Stack(io.BytesIO(data)) as stack, pytest.raises(ValueError, match=expected):
        stack.read(1, [0])
    with pytest.raises(ValueError, match="unreadable: complex64 of axes YX"):
        decode(written(np.ones((9, 7), np.complex64), **GREY))


# ---------------------------------------------------------------- from files to what the network sees


def test_three_channels_are_colours_each_with_its_own_limits():
    """The second channel is a tenth as bright, and does not stay dark for that."""
    ramp = np.repeat(np.arange(256)[None], 256, 0)
    channels = np.stack([1000 + 10 * ramp, 100 + ramp, 3 * ramp]).astype(np.uint16)
    found = decode(written(channels, ome=True, metadata={"axes": "CYX"}, **GREY))
    assert np.array_equal(found, np.dstack([ramp] * 3)) and found.dtype == np.uint8
    eight = planes(3, dtype=np.uint8)
    assert np.array_equal(decode(written(eight, ome=True, metadata={"axes": "CYX"}, **GREY)), np.moveaxis(eight, 0, 2))


@pytest.mark.parametrize(
    ("array", "options", "listing"),
    [
        (planes(2), {"ome": True, "metadata": {"axes": "CYX", "Channel": {"Name": ["DAPI", "GFP"]}}}, "0 DAPI, 1 GFP"),
        (planes(5), {"imagej": True, "metadata": {"axes": "CYX"}}, "0, 1, 2, 3, 4"),
        (noise(9, 7, 4), {"planarconfig": "contig"}, "0, 1, 2, 3"),
    ],
)
def test_other_numbers_of_channels_have_to_be_chosen(array, options, listing, tmp_path):
    path = tmp_path / "a.tif"
    written(array, path, **options, **({} if "imagej" in options else GREY))
    count = listing.count(",") + 1
    expected = (
        f"has {count} channels ({listing}), expected 1 or 3; "
        "choose with predict.py --channels (0, or 2,1,0), or save only those to use"
    )
    with pytest.raises(ValueError) as caught:
        read_picture(path)
    assert str(caught.value) == expected and list_pages([path]) == ([], [(path, expected)])
    assert list_pages([path], channels=[1]) == ([path], [])
    assert np.array_equal(PageReader(channels=[1]).read(path), array[1] if array.shape[-1] > 4 else array[..., 1])
    message = f"has no channel 9; its channels are {listing}"
    assert list_pages([path], channels=[9, 0, 0]) == ([], [(path, message)])


def test_channels_of_other_files(tmp_path):
    image = noise(9, 7, 3)
    images.write_png(tmp_path / "a.png", image)
    assert np.array_equal(to_channels(PageReader(channels=[2]).read(tmp_path / "a.png"), 1)[..., 0], image[..., 2])
    assert np.array_equal(PageReader(channels=[2, 0, 0]).read(tmp_path / "a.png"), image[..., [2, 0, 0]])
    with pytest.raises(ValueError, match="has no channel 3; its channels are 0 red, 1 green, 2 blue"):
        PageReader(channels=[3]).read(tmp_path / "a.png")


def test_pages_are_listed_named_and_chosen(tmp_path):
    written(planes(12), tmp_path / "stack.tif", **GREY)
    written(planes(1)[0], tmp_path / "one.tif", **GREY)
    images.write_png(tmp_path / "a.png", noise(9, 7))
    (tmp_path / "cut.tif").write_bytes((tmp_path / "one.tif").read_bytes()[:9])
    files = [tmp_path / name for name in ("a.png", "stack.tif", "one.tif", "cut.tif", "gone.tif")]
    stack, damaged = files[1], [(files[3], images.UNREADABLE), (files[4], "No such file or directory")]
    pictures, failed = list_pages(files)
    assert pictures == [files[0], *(Page(stack, k) for k in range(12)), files[2]] and failed == damaged
    assert [pictures[4].stem, str(pictures[4])] == ["stack_p003", f"{stack}, page 3"]
    assert list_pages(files, number=11) == (
        [Page(stack, 11)],
        [(files[0], "has no page 11; it has 1, counted from 0"), (files[2], "has no page 11; it has 1, counted from 0")]
        + damaged,
    )
    assert list_pages(files[:3], number=0) == ([files[0], Page(stack, 0), files[2]], [])
    with pytest.raises(ValueError, match="has 12 pages, expected 1; save each page as a file of its own"):
        read_picture(stack)
    with pytest.raises(ValueError, match="stack.tif is not a readable picture .has 12 pages, expected 1"):
        read_thumbnail(stack, 20)


def test_a_reader_changes_files(tmp_path):
    for k, name in enumerate("ab"):
        written(planes(3) + 10 * k, tmp_path / f"{name}.tif", **GREY)
    a, b = tmp_path / "a.tif", tmp_path / "b.tif"
    reader = PageReader()
    pages = [Page(a, 0), Page(a, 2), Page(b, 1), Page(a, 1)]
    assert [int(reader.read(page)[0, 0]) for page in pages] == [0, 2, 11, 1]
    reader.close()
    assert reader.file.closed and int(reader.read(Page(b, 2))[0, 0]) == 12


# ---------------------------------------------------------------- the size of a pixel


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"PhysicalSizeX": 0.325, "PhysicalSizeY": 0.325}, 0.325),  # µm, unless the file says otherwise
        ({"PhysicalSizeX": 325, "PhysicalSizeXUnit": "nm", "PhysicalSizeY": 0.325, "PhysicalSizeYUnit": "µm"}, 0.325),
        ({"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.7}, None),
        ({"PhysicalSizeX": 0.5}, None),
        ({"PhysicalSizeX": 1, "PhysicalSizeXUnit": "pixel", "PhysicalSizeY": 1, "PhysicalSizeYUnit": "pixel"}, None),
        ({"PhysicalSizeX": 0, "PhysicalSizeY": 0}, None),
        ({"PhysicalSizeX": "nan", "PhysicalSizeY": "nan"}, None),
        ({}, None),
    ],
)
def test_pixel_size_of_ome(tmp_path, metadata, expected):
    written(planes(2), tmp_path / "a.tif", ome=True, metadata={"axes": "TYX", **metadata}, **GREY)
    assert pixel_size(tmp_path / "a.tif") == (expected and pytest.approx(expected))


@pytest.mark.parametrize(
    ("unit", "per_unit", "expected"),
    [
        ("um", (4, 4), 0.25),
        ("\\u00B5m", (4, 4), 0.25),
        ("micron", (2, 2), 0.5),
        ("nm", (0.01, 0.01), 0.1),
        ("mm", (2000, 2000), 0.5),
        ("um", (4, 2), None),
        ("pixel", (1, 1), None),
        (None, (300, 300), None),
        ("inch", (300, 300), None),  # dots of a printer
    ],
)
def test_pixel_size_of_imagej(tmp_path, unit, per_unit, expected):
    metadata = {"axes": "TYX"}
    if unit:
        metadata["unit"] = unit
    written(planes(2), tmp_path / "a.tif", imagej=True, resolution=per_unit, metadata=metadata)
    assert pixel_size(tmp_path / "a.tif") == (expected and pytest.approx(expected))


def test_no_pixel_size(tmp_path):
    written(planes(2), tmp_path / "dpi.tif", resolution=(300, 300), resolutionunit="inch", **GREY)
    images.write_png(tmp_path / "a.png", noise(9, 7))
    (tmp_path / "bad.tif").write_bytes(b"II*\0" + b"\xff" * 40)
    assert [pixel_size(tmp_path / name) for name in ("dpi.tif", "a.png", "bad.tif")] == [None] * 3


# ---------------------------------------------------------------- hostile files


def test_a_declared_size_is_refused_before_decoding(monkeypatch):
    monkeypatch.setattr(Stack, "read", None)
    for array in (planes(1)[0], planes(3)):
        stack = Stack(io.BytesIO(written(array, **GREY)))
        with pytest.raises(ValueError, match="30 x 20 pixels are more than 599"):
            stack.check(0, 599)
    wide = written(np.zeros((20, 30, 40), np.float64), planarconfig="contig", **GREY)
    with Stack(io.BytesIO(wide)) as stack, pytest.raises(ValueError, match="192,000 bytes of pixels are more than"):
        stack.check(0, 600)


def retold(xml_changes, **options):
    """An OME-TIFF of two planes whose metadata are changed by {old: new}."""
    data = written(planes(2), ome=True, metadata={"axes": "TYX"}, **GREY)
    xml = data[data.index(b"<?xml") : data.index(b"</OME>") + 6].decode()
    for old, new in xml_changes.items():
        assert old in xml
        xml = xml.replace(old, new)
    return written(planes(2), description=xml, metadata=None, **GREY)


IMAGEJ = "ImageJ=1.11a\nimages=COUNT\nframes=COUNT\nhyperstack=true\n"


@pytest.mark.parametrize(
    "data",
    [
        retold({'SizeT="2"': 'SizeT="2000000000"'}),
        retold({'SizeX="30"': 'SizeX="4000000000"'}),
        retold({'PlaneCount="2"': 'PlaneCount="2000000000"'}),
        written(planes(2), description=IMAGEJ.replace("COUNT", "2000000000"), metadata=None, **GREY),
    ],
    ids=["times", "width", "planes", "imagej"],
)
def test_metadata_that_claim_billions_of_planes_cost_nothing(data):
    tracemalloc.start()
    try:
        with Stack(io.BytesIO(data)) as stack:
            assert len(stack) <= 2
    except ValueError as error:
        assert str(error) == "unreadable: it claims more than 100,000 pages"
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 20e6


def test_metadata_that_lie_a_little():
    with Stack(io.BytesIO(retold({'SizeT="2"': 'SizeT="3"'}))) as stack:  # a plane is missing
        assert [int(stack.read(k, [0])[0, 0]) for k in range(2)] == [0, 1]
        with pytest.raises(ValueError, match="this page is missing in the file"):
            stack.read(2, [0])


@pytest.mark.parametrize("part", [0.02, 0.3, 0.6, 0.95])
@pytest.mark.parametrize("options", [{"imagej": True}, {"ome": True, **GREY}, {"compression": "zlib", **GREY}])
def test_truncated_stacks(options, part):
    data = written(np.stack([noise(40, 50, dtype=np.uint16, high=900)] * 4), **options)
    with pytest.raises(ValueError, match="unreadable"), Stack(io.BytesIO(data[: int(len(data) * part)])) as stack:
        assert len(stack) == 4
        stack.read(3, [0])


def test_memory_of_a_large_page(tmp_path):
    """4,000 x 5,000 of 16 bits, 40 MB: reading takes little more, counting pages takes nothing of it."""
    path = tmp_path / "large.tif"
    tifffile.imwrite(path, np.zeros((2, 4000, 5000), np.uint16), **GREY)
    code = (
        "import sys, tifffile; from common.images import Page, PageReader, Path, list_pages;"
        "from tools.workers import peak_memory; peak = lambda: peak_memory() // 1024; before = peak();"
        "pages, _ = list_pages([Path(sys.argv[1])]); listed = peak() - before; PageReader().read(pages[1]);"
        "print(len(pages), listed < 5_000, peak() - before < 60_000)"
    )
    command = [sys.executable, "-c", code, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert (result.stdout, result.stderr) == ("2 True True\n", "")
