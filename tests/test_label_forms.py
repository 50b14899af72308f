"""label_forms: names, forms, pixels, Cellpose; see test_label_outlines.py, and test_import_labels.py for the whole."""

import pickle
import struct
import zipfile
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from fuzzing import Trap, broken, fuzz, limits

from label_forms import cellpose, maps
from label_forms.annotations import find_json
from label_forms.imagej import find_rois
from label_forms.pairing import list_pictures, pair
from label_forms.recognise import find_places, recognise
from label_forms.source import Piece, paint
from labels import read_labels

tifffile = pytest.importorskip("tifffile", reason="needs requirements-import.txt")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def touch(*names):
    for name in map(Path, names):
        name.parent.mkdir(parents=True, exist_ok=True)
        name.touch()


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("pictures", "files", "expected"),
    [
        ("a b", "a b", {"a": {"": "a"}, "b": {"": "b"}}),
        ("a", "a_mask", {"a": {"": "a_mask"}}),
        ("a", "Mask-A", {"a": {"": "Mask-A"}}),
        ("image_01 image_02", "label_01 label_02", {"image_01": {"": "label_01"}, "image_02": {"": "label_02"}}),
        ("day1 day10", "day10_masks", {"day10": {"": "day10_masks"}}),
        ("day1", "day10_masks", {}),
        ("img_1", "img_1_0_mask", {}),  # that of img_1_0, which is missing
        ("a", "a_nuclei a_cell_wall_mask", {"a": {"nuclei": "a_nuclei", "cell_wall": "a_cell_wall_mask"}}),
        ("a a_b", "a_b_mask a_mask", {"a": {"": "a_mask"}, "a_b": {"": "a_b_mask"}}),
        ("a_img a_raw", "a_raw a_mask", {"a_raw": {"": "a_raw"}}),  # a_mask may belong to either
        ("mask img", "mask img", {"mask": {"": "mask"}, "img": {"": "img"}}),
    ],
)
def test_pairs(pictures, files, expected):
    paths = {name: Path(f"{name}.png") for name in files.split()}
    pairs, alone = pair(dict.fromkeys(pictures.split()), list(paths.values()))
    found = {img_id: {ending: path.stem for ending, path in of.items()} for img_id, of in pairs.items()}
    assert found == expected
    used = {name for of in expected.values() for name in of.values()}
    assert {path.stem for path in alone} == paths.keys() - used


def test_two_labels_of_one_picture():
    with pytest.raises(ValueError, match=r"a_mask.png and a_label.png are both labels of a"):
        pair({"a": None}, [Path("a_mask.png"), Path("a_label.png")])


def test_the_label_of_a_pictures_own_name_comes_before_copies_of_it():
    touch("labels/a - Copy.json", "labels/a.json", "labels/b-meta.json", "labels/a-old_seg.npy", "labels/a_seg.npy")
    for path in Path("labels").glob("*.json"):
        path.write_text('{"shapes": []}')
    pictures = {"a": Path("a.png"), "b": Path("b.png")}
    [labelme] = find_json(pictures, Path("labels"))
    assert labelme.pairs == {"a": Path("labels/a.json"), "b": Path("labels/b-meta.json")}
    assert labelme.notes == ["not used: 1 files with more in their names (a - Copy.json)"]
    [of_cellpose] = cellpose.find_cellpose(pictures, Path("labels"))
    assert of_cellpose.pairs == {"a": Path("labels/a_seg.npy")}
    assert of_cellpose.notes == ["not used: 1 files with more in their names (a-old_seg.npy)"]


@pytest.mark.parametrize(
    ("name", "expected", "alone"),
    [("RoiSet", [("object", "RoiSet")], []), ("a_nuclei", [("nuclei", "a_nuclei")], []), ("b", None, ["b.zip"])],
)
def test_roiset_alone_belongs_to_a_single_picture_and_other_names_do_not(name, expected, alone):
    Path("labels").mkdir()
    with zipfile.ZipFile(f"labels/{name}.zip", "w") as file:
        file.writestr("1.roi", b"")
    [source] = find_rois({"a": Path("a.png")}, Path("labels"))
    found = source.pairs and [(of, path.stem) for of, path in source.pairs["a"]]
    assert (found or None) == expected and source.alone == alone


def test_label_pictures_are_no_pictures():
    """Of a folder with both, and of a folder of labels inside that of the pictures."""
    touch("p/a.tif", "p/a_masks.tif", "p/a_cp_output.png", "p/seg_b.png", "p/.hidden.png", "p/notes.txt")
    assert list(list_pictures(Path("p"), Path("p"))) == ["a", "seg_b"]
    touch("q/a.png", "q/day/b.png", "q/labels/a.png")
    assert list(list_pictures(Path("q"), Path("q/labels"))) == ["a", "b"]
    with pytest.raises(ValueError, match="have the same name"):
        list_pictures(Path("q"), Path("p"))
    touch("two/a.png", "two/a.jpg")
    with pytest.raises(ValueError, match=r"two/a.jpg and two/a.png have the same name"):
        list_pictures(Path("two"), Path("p"))


def test_places():
    touch("train/images/a.tif", "train/masks/a.tif")
    assert find_places(Path("train"), None) == (Path("train/images"), Path("train/masks"))
    assert find_places(Path("train/images"), None) == (Path("train/images"),) * 2
    with pytest.raises(FileNotFoundError, match="expected the labels"):
        find_places(Path("train"), Path("none"))


# ---------------------------------------------------------------- one form or another


def write_maps(*arrays):
    Path("labels").mkdir(exist_ok=True)
    for number, array in enumerate(arrays):
        cv2.imwrite(f"labels/{number}.png", array)
    return {str(number): Path(f"{number}.png") for number in range(len(arrays))}


CELLS = np.arange(1, 31, dtype=np.uint8).reshape(5, 6)  # 30 objects of one pixel each


@pytest.mark.parametrize(
    ("array", "form"),
    [
        (np.kron(CELLS, np.ones((3, 3), np.uint8)), "instance_map"),
        (np.tile(np.arange(4, dtype=np.uint8), (4, 3)), "class_map"),  # stripes: each value in three pieces
        (np.eye(3, dtype=np.uint8) * 255, "class_map"),
        (np.tile(CELLS, (1, 2)), None),  # 30 values, each in two pieces
        (CELLS % 25, None),  # 24 values: five in two pieces, nineteen in one
        (np.arange(3, dtype=np.uint8).reshape(1, 3), None),
    ],
)
def test_classes_or_objects(array, form):
    pictures = write_maps(array)
    if form:
        assert recognise(pictures, Path("labels")).form == form
    else:
        with pytest.raises(ValueError, match="give --form class_map or --form instance_map"):
            recognise(pictures, Path("labels"))
        for chosen in ("class_map", "instance_map"):
            assert recognise(pictures, Path("labels"), chosen).form == chosen


def test_labels_may_lie_in_the_pictures_own_folders():
    """photos/train/a.png has labels/train/a.png; a folder per class has other names than those of the pictures."""
    array = np.kron(CELLS, np.ones((3, 3), np.uint8))
    for place in ("train/a", "train/b", "val/c"):
        for folder in ("photos", "labels"):
            path = Path(folder, f"{place}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), array)
    pictures = list_pictures(Path("photos"), Path("labels"))
    found = recognise(pictures, Path("labels"))
    assert found.form == "instance_map" and sorted(found.pairs) == ["a", "b", "c"]
    for name in ("train", "val"):
        Path("labels", name).rename(Path("labels", f"cells_{name}"))
    found = recognise(pictures, Path("labels"))
    assert found.form == "class_masks"


def test_one_folder_spelt_in_two_ways():
    for name, array in (("d1.tif", CELLS * 5), ("d1_masks.png", np.kron(CELLS, np.ones((3, 3), np.uint8)))):
        cv2.imwrite(name, array)
    pictures = list_pictures(Path(), Path.cwd())
    assert pictures == {"d1": Path("d1.tif")}
    assert recognise(pictures, Path.cwd()).pairs == {"d1": Path.cwd() / "d1_masks.png"}


def test_two_forms_in_one_folder():
    pictures = write_maps(np.eye(3, dtype=np.uint8))
    touch("labels/0_seg.npy")
    with pytest.raises(
        ValueError,
        match=r"class_map or instance_map \(1 label pictures\) or cellpose \(1 _seg.npy files\): give --form",
    ):
        recognise(pictures, Path("labels"))
    assert recognise(pictures, Path("labels"), "cellpose").form == "cellpose"
    assert recognise(pictures, Path("labels"), "class_map").form == "class_map"


def test_why_the_only_json_cannot_be_read():
    touch("annotations/coco.json")
    with pytest.raises(ValueError, match="holds no labels that can be read: annotations/coco.json is not JSON"):
        recognise({"a": Path("a.png")}, Path("annotations"))


def test_nothing_to_recognise():
    touch("labels/a.txt", "labels/b.txt", "other/b.png")
    with pytest.raises(ValueError, match=r"labels holds no labels that can be read \(2 .txt\)"):
        recognise({"a": Path("a.png")}, Path("labels"))
    with pytest.raises(ValueError, match=r"none of the 1 labels in other has the name of a picture \(b.png\)"):
        recognise({"a": Path("a.png")}, Path("other"))
    with pytest.raises(ValueError, match=r"expected coco: COCO JSON"):
        recognise({"a": Path("a.png")}, Path("other"), "coco")


# ---------------------------------------------------------------- pixels


def test_values_of_a_map():
    colours = np.array([[[0, 0, 0], [1, 2, 3], [9, 9, 9]]], np.uint8)
    cv2.imwrite("colours.png", colours[..., ::-1])
    assert maps.read_map(Path("colours.png")).tolist() == [[0, maps.COLOUR + 0x010203, 9]]  # as in files of grey alone
    cv2.imwrite("grey.png", np.repeat(np.array([[[0], [7]]], np.uint8), 3, axis=2))
    assert maps.read_map(Path("grey.png")).tolist() == [[0, 7]]
    tifffile.imwrite("turned.tif", np.array([[0, 7]], np.uint16), extratags=[(274, "H", 1, 6, True)])
    assert maps.read_map(Path("turned.tif")).tolist() == [[0], [7]]
    with pytest.raises(ValueError, match="2 x 1 pixels are more than 1"):
        maps.read_map(Path("grey.png"), max_pixels=1)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.float32])
@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_a_tiff_has_the_values_that_are_stored(dtype, photometric, compression, byteorder):
    """Decoders invert 8 bits where 0 is white, as in masks of ImageJ, and mix up the bytes of others."""
    stored = np.array([[0, 1, 77], [200, 0, 255]], dtype)
    options = {"photometric": photometric, "compression": compression, "byteorder": byteorder}
    tifffile.imwrite("a.tif", stored, **options)
    assert maps.read_map(Path("a.tif")).tolist() == stored.tolist()
    if dtype != np.float32:
        assert read_labels(Path("a.tif")).tolist() == np.unique(stored, return_inverse=True)[1].reshape(2, 3).tolist()


def tiff(array):
    tifffile.imwrite("x.tif", array, photometric="minisblack")


def tiff_of_colours(array):
    tifffile.imwrite("x.tif", array, photometric="rgb")


def bomb():
    data = bytearray(cv2.imencode(".png", np.zeros((1, 1), np.uint8))[1].tobytes())
    data[16:24] = struct.pack(">II", 100_000, 100_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    Path("x.png").write_bytes(data)


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda: tiff(np.full((4, 4), -3, np.int32)), r"negative values \(-3\)"),
        (lambda: tiff(np.full((4, 4), np.nan, np.float32)), "fractions or NaN"),
        (lambda: tiff(np.full((4, 4), 0.5, np.float32)), "fractions or NaN"),
        (lambda: tiff(np.zeros((5, 4, 4), np.uint16)), "stack of 5 pages"),
        (lambda: tiff(np.zeros((5, 4, 4), np.int64)), "not a readable TIFF with one page"),
        (lambda: Path("x.tif").write_bytes(b"II*\0junk"), "not a readable TIFF with one page"),
        (lambda: Path("x.png").write_bytes(b"junk"), "not a readable picture"),
        (bomb, "100000 x 100000 pixels are more than"),
        (lambda: cv2.imwrite("x.jpg", np.full((16, 16), 120, np.uint8)), "JPEG, which changes the values"),
        (lambda: cv2.imwrite("x.jpg", np.full((16, 16, 3), (0, 0, 255), np.uint8)), "JPEG, which changes the values"),
        (lambda: cv2.imwrite("x.png", np.full((4, 4, 3), 300, np.uint16)), "16 bits for each colour; save its numbers"),
        (lambda: tiff_of_colours(np.full((4, 4, 3), 300, np.uint16)), "16 bits for each colour; save its numbers"),
    ],
)
def test_a_map_that_cannot_be_read(write, said):
    write()
    [path] = Path().glob("x.*")
    with pytest.raises(ValueError, match=said):
        maps.read_map(path)


def test_a_class_mask_with_many_values():
    write_maps(np.arange(4, dtype=np.uint8).reshape(2, 2))
    with pytest.raises(ValueError, match="4 values; a mask of one class holds 0 and one other"):
        maps.read_class_masks({"cell": Path("labels/0.png")}, (2, 2))


def test_objects_keep_their_pieces():
    tifffile.imwrite("a.tif", np.array([[0, 70_000, 5], [70_000, 0, 9]], np.uint64))
    assert maps.read_instance_map(Path("a.tif"), (2, 3)).objects.tolist() == [[0, 3, 1], [3, 0, 2]]


def test_where_objects_overlap_the_smallest_is_on_top():
    large, small, hidden = (np.ones((side, side), bool) for side in (4, 2, 2))
    pieces = [Piece("nucleus", 1, 1, hidden), Piece("nucleus", 1, 1, small), Piece("cell", 0, 0, large), None]
    labels = paint(pieces, (5, 5))
    assert labels.objects.tolist() == [[2, 2, 2, 2, 0], [2, 1, 1, 2, 0], [2, 1, 1, 2, 0], [2, 2, 2, 2, 0], [0] * 5]
    assert (labels.masks["cell"].sum(), labels.masks["nucleus"].sum()) == (16, 4)
    assert (labels.shared, labels.lost) == (4, 2)


# ---------------------------------------------------------------- Cellpose


def seg(content, path="a_seg.npy"):
    np.save(path, content)
    return cellpose.read_masks(Path(path))


@pytest.mark.parametrize("dtype", ["<u2", ">u2", "<u4", "<i8", "u1"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_masks_of_seg_npy(dtype, order):
    masks = np.array([[0, 1, 2], [3, 0, 200]]).astype(dtype, order=order)
    content = {"img": np.zeros((2, 3)), "masks": masks, "est_diam": np.float32(3), "path": Path("x"), "flows": [[], {}]}
    assert (seg(content) == masks).all()


def header():
    np.save("header.npy", np.array(None, object))
    data = Path("header.npy").read_bytes()
    return data[: data.index(b"\n") + 1]


@pytest.mark.parametrize(
    "data",
    [
        pickle.dumps({"masks": Trap()}),
        pickle.dumps(Trap()),
        b"\x80\x04]r\xff\xff\xff\x7f.",  # a memo of 2^31 entries: 32 GB
        b"\x80\x04" + b"]" * 200_000 + b".",
        b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"x.",  # bytes of 1 TB
        b"junk",
    ],
    ids=["trap in masks", "trap", "memo", "steps", "bytes", "junk"],
)
def test_seg_npy_never_runs_what_it_says(data):
    Path("a_seg.npy").write_bytes(header() + data)
    with pytest.raises(ValueError, match="a_seg.npy holds no masks that can be read safely"), limits():
        cellpose.read_masks(Path("a_seg.npy"))
    assert not Path("pwned").exists()


@pytest.mark.parametrize(
    ("masks", "said"),
    [
        (np.zeros((2, 2), np.float32), "masks of type f4"),
        (np.zeros((5, 2, 2), np.uint16), "masks with 3 axes"),
        (np.full((2, 2), -1), "negative masks"),
        (np.array([[{}]]), "masks of type O8"),
    ],
)
def test_seg_npy_with_other_masks(masks, said):
    with pytest.raises(ValueError, match=said):
        seg({"masks": masks})


def test_damaged_maps_and_seg_npy(count, sandbox, capfd):
    masks = np.arange(12, dtype=np.uint16).reshape(3, 4)
    np.save("free/a_seg.npy", {"masks": masks, "flows": [masks], "img": None})
    tifffile.imwrite("free/a.tif", masks.astype(np.int64))
    cv2.imwrite("free/a.png", masks)
    bases = {path.name: path.read_bytes() for path in sorted(Path("free").iterdir())}

    def call(data):
        path = Path("free/x_seg.npy" if data[1:6] == b"NUMPY" else "free/x.tif")
        path.write_bytes(data)
        (cellpose.read_masks if path.suffix == ".npy" else maps.read_map)(path)

    counts = fuzz("label pictures", [*bases.items(), *broken(bases, count, 12)], call, sandbox, capfd)
    assert min(counts.values()) > 0
