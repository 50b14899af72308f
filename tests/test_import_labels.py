"""import_labels.py: every form of labels, made with the tools that people use, becomes the same data set."""

import base64
import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from conftest import call, run_script
from PIL import Image

import import_labels

pycocotools_mask = pytest.importorskip("pycocotools.mask", reason="needs requirements-import.txt")
roifile = pytest.importorskip("roifile", reason="needs requirements-import.txt")
tifffile = pytest.importorskip("tifffile", reason="needs requirements-import.txt")

SHAPE = (8, 10)
BOXES = {"a": [(1, 1, 5, 4), (5, 1, 8, 4), (2, 5, 4, 7)], "b": [(0, 0, 3, 8)]}  # left, top, right, bottom of objects


def truth(img_id):
    """(8, 10) uint16: 0 background, 1 ... n. The first two objects of a touch."""
    objects = np.zeros(SHAPE, np.uint16)
    for number, (left, top, right, bottom) in enumerate(BOXES[img_id], 1):
        objects[top:bottom, left:right] = number
    return objects


def corners(box):
    left, top, right, bottom = box
    return [[left, top], [right, top], [right, bottom], [left, bottom]]


def write(path, array):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".tif":
        tifffile.imwrite(path, array if array.ndim == 2 else array[..., ::-1])
    else:
        assert cv2.imwrite(str(path), array)


def write_pictures(folder="photos", ids=BOXES, ending=".png"):
    for number, img_id in enumerate(ids):
        write(f"{folder}/{img_id}{ending}", np.random.default_rng(number).integers(0, 256, (*SHAPE, 3), np.uint8))


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(path):
    return cv2.imread(str(path), cv2.IMREAD_UNCHANGED)


def refused(patch, *options):
    """The message of the ValueError or OSError that main raises; nothing may be written to inputs/."""
    with pytest.raises((ValueError, OSError)) as error:
        call(patch, import_labels, *options)
    assert not Path("inputs").exists()
    return str(error.value)


# ---------------------------------------------------------------- forms that know the objects


def instance_maps(dtype, name):
    def form():
        for img_id in BOXES:
            write(f"labels/{name.format(img_id)}", truth(img_id).astype(dtype))
        return "photos labels --form instance_map"

    return form


def stardist():
    write_pictures("train/images", ending=".tif")
    for img_id in BOXES:
        write(f"train/masks/{img_id}.tif", truth(img_id) * 1000)
    return "train --form instance_map"


def cellpose_masks():
    for img_id in BOXES:
        write(f"photos/{img_id}_cp_masks.png", truth(img_id))
        write(f"photos/{img_id}_flows.tif", truth(img_id))
    return "photos --form instance_map"


def cellpose_npy():
    for img_id in BOXES:
        masks = np.asfortranarray(truth(img_id)) if img_id == "a" else truth(img_id).astype(">u4")
        np.save(f"photos/{img_id}_seg.npy", {"filename": "x", "flows": [masks, []], "masks": masks, "diameter": np.nan})
    return "photos"


def object_folders():
    for img_id in BOXES:
        for number in range(1, truth(img_id).max() + 1):
            write(f"labels/{img_id}/{number}.png", (truth(img_id) == number).astype(np.uint8) * 255)
    return "photos labels"


def raw_dsb():
    for img_id in BOXES:
        write(f"raw/{img_id}/images/{img_id}.png", read(f"photos/{img_id}.png"))
        for number in range(1, truth(img_id).max() + 1):
            write(f"raw/{img_id}/masks/{number}f3.png", (truth(img_id) == number).astype(np.uint8) * 255)
    return "raw"


def coco(segment):
    def form():
        content = {"images": [], "annotations": [], "categories": [{"id": 7, "name": "cell"}]}
        for image_id, (img_id, boxes) in enumerate(BOXES.items()):
            image = {"id": image_id, "file_name": f"train/{img_id}.jpg", "height": SHAPE[0], "width": SHAPE[1]}
            content["images"].append(image)
            for number, box in enumerate(boxes, 1):
                about = {"image_id": image_id, "category_id": 7, "iscrowd": 0}
                content["annotations"].append({**about, "segmentation": segment(truth(img_id) == number, box)})
        Path("coco.json").write_text(json.dumps(content))
        return "photos coco.json"

    return form


def polygon(mask, box):
    return [np.ravel(corners(box)).tolist()]


def compressed(mask, box):
    found = pycocotools_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(SHAPE), "counts": found["counts"].decode()}


def uncompressed(mask, box):
    column = np.concatenate([[False], mask.ravel(order="F"), [False]])
    changes = np.flatnonzero(column[1:] != column[:-1])
    return {"size": list(SHAPE), "counts": np.diff([0, *changes, mask.size]).tolist()}


def labelme():
    shapes = {img_id: [{"label": "cell", "points": corners(box)} for box in boxes] for img_id, boxes in BOXES.items()}
    (left, top, right, bottom), mask = BOXES["a"][1], np.full((3, 3), 255, np.uint8)
    shapes["a"][0] = {"label": "cell", "points": [[5, 4], [1, 1]], "shape_type": "rectangle", "group_id": None}
    picture = base64.b64encode(cv2.imencode(".png", mask)[1]).decode()
    shapes["a"][1] = {"label": "cell", "points": [[left, top], [right - 1, bottom - 1]], "shape_type": "mask"}
    shapes["a"][1]["mask"] = picture
    for img_id in BOXES:
        content = {"shapes": shapes[img_id], "imagePath": f"..\\{img_id}.png", "imageHeight": 8, "imageWidth": 10}
        Path(f"photos/{img_id}.json").write_text(json.dumps(content))
    return "photos"


def roi_zips():
    Path("rois").mkdir()
    for img_id, boxes in BOXES.items():
        rois = [roifile.ImagejRoi.frompoints(np.array(corners(box), np.float32)) for box in boxes]
        rois[0] = roifile.ImagejRoi(roitype=roifile.ROI_TYPE.RECT)
        rois[0].left, rois[0].top, rois[0].right, rois[0].bottom = boxes[0]
        roifile.roiwrite(f"rois/RoiSet_{img_id}.zip", rois)
    return "photos rois"


def roi_folders():
    for img_id, boxes in BOXES.items():
        Path("rois", img_id).mkdir(parents=True)
        for number, box in enumerate(boxes):
            roifile.ImagejRoi.frompoints(corners(box)).tofile(f"rois/{img_id}/{number}.roi")
    return "photos rois"


OBJECT_FORMS = {
    "8 bits": instance_maps(np.uint8, "{}.png"),
    "16 bits, _labels": instance_maps(np.uint16, "{}_labels.png"),
    "int32, mask_": instance_maps(np.int32, "mask_{}.tif"),
    "uint32, any ending": instance_maps(np.uint32, "{}-nuclei.tif"),
    "float32": instance_maps(np.float32, "{}.tif"),
    "int64": instance_maps(np.int64, "{}.tif"),
    "stardist": stardist,
    "cellpose masks": cellpose_masks,
    "cellpose npy": cellpose_npy,
    "folders": object_folders,
    "dsb": raw_dsb,
    "coco polygons": coco(polygon),
    "coco run lengths": coco(uncompressed),
    "coco compressed": coco(compressed),
    "labelme": labelme,
    "roi zips": roi_zips,
    "roi folders": roi_folders,
}


@pytest.mark.parametrize("form", OBJECT_FORMS.values(), ids=OBJECT_FORMS)
def test_objects(form, here, monkeypatch, capsys):
    write_pictures()
    call(monkeypatch, import_labels, form(), "--name cells")
    for img_id in BOXES:
        assert (read(f"inputs/cells/labels/{img_id}.png") == truth(img_id)).all()
        assert (read(f"inputs/cells/masks/0/{img_id}.png") == 255 * (truth(img_id) > 0)).all()
        assert (read(f"inputs/cells/images/{img_id}.png") == read(f"photos/{img_id}.png")).all()
    assert read("inputs/cells/labels/a.png").dtype == np.uint16
    printed = capsys.readouterr().out
    assert "pairs     2 of 2 pictures have labels\n" in printed and "without" not in printed
    assert "objects   4, from 1 to 3 per picture\n" in printed
    assert ": 30.63% of the pixels" in printed  # (12 + 9 + 4 + 24) / 160
    assert sorted(path.name for path in Path("inputs").iterdir()) == ["cells"]


# ---------------------------------------------------------------- forms that know the classes

# Class 1 where the first object is, class 2 where the second and the third are; each also in one corner.
CLASSES = {img_id: np.take([0, 1, 2, 2], truth(img_id)).astype(np.uint8) for img_id in BOXES}
for array in CLASSES.values():
    array[7, 9], array[7, 7] = 1, 2


def class_maps(factor, dtype, ending):
    def form():
        for img_id, values in CLASSES.items():
            write(f"labels/{img_id}{ending}", values.astype(dtype) * factor)
        return "photos labels", ["1", "2"] if factor == 1 else [str(factor), str(2 * factor)]

    return form


def palette(mode, names):
    def form():
        Path("labels").mkdir()
        for img_id, values in CLASSES.items():
            picture = Image.fromarray(values)
            picture.putpalette([0, 0, 0, 0, 0, 200, 255, 0, 0])
            picture.convert(mode).save(f"labels/{img_id}.png")
        return "photos labels", names

    return form


def class_masks(name):
    def form():
        for img_id, values in CLASSES.items():
            for number, class_name in ((1, "cytoplasm"), (2, "nucleus")):
                write(f"labels/{name.format(class_name, img_id)}", (values == number).astype(np.uint8) * 255)
        return "photos labels", ["cytoplasm", "nucleus"]

    return form


CLASS_FORMS = {
    "8 bits": class_maps(1, np.uint8, ".png"),
    "16 bits": class_maps(1000, np.uint16, "_mask.tif"),
    "bmp": class_maps(100, np.uint8, ".bmp"),
    "palette": palette("P", ["1", "2"]),
    "colours": palette("RGB", ["#0000c8", "#ff0000"]),
    "folders": class_masks("{}/{}_mask.png"),
    "endings": class_masks("{1}_{0}.png"),
}


@pytest.mark.parametrize("form", CLASS_FORMS.values(), ids=CLASS_FORMS)
def test_classes(form, here, monkeypatch, capsys):
    write_pictures()
    options, names = form()
    call(monkeypatch, import_labels, options, "--name cells")
    for img_id, values in CLASSES.items():
        for number in (0, 1):
            assert (read(f"inputs/cells/masks/{number}/{img_id}.png") == 255 * (values == number + 1)).all()
    assert not Path("inputs/cells/labels").exists() and "objects   not known" in capsys.readouterr().out
    about = yaml.safe_load(Path("inputs/cells/dataset.yml").read_text())
    assert list(about["classes"].values()) == names
    assert about["foreground"] == {names[0]: round(38 / 160, 6), names[1]: round(15 / 160, 6)}


@pytest.mark.parametrize("ending", [".png", ".jpg"])
def test_masks_of_one_class(ending, here, monkeypatch, capsys):
    """A JPEG changes 0 and 255 a little; every mask is in two pieces or more, but that does not matter here."""
    write_pictures(ids="a")
    mask = np.kron(truth("a") > 0, np.ones((16, 16))).astype(np.uint8) * 255
    write("photos/a.png", np.zeros((*mask.shape, 3), np.uint8))
    write(f"labels/a{ending}", mask)
    call(monkeypatch, import_labels, "photos labels --name cells")
    assert (read("inputs/cells/masks/0/a.png") == mask).all()
    assert "all labels are 0 or 255" in capsys.readouterr().out


# ---------------------------------------------------------------- what is said, and what is written


def test_it_says_what_has_no_partner(here, monkeypatch, capsys):
    write_pictures(ids=["a", "b", "c"])
    for name in ("a", "b", "d", "e"):
        write(f"labels/{name}.png", CLASSES["a"] if name != "b" else CLASSES["a"][:, :9])
    call(monkeypatch, import_labels, "photos labels --name cells")
    printed = capsys.readouterr().out
    assert "pairs     2 of 3 pictures have labels\n" in printed
    assert "pictures without labels, left out: 1 (c)\n" in printed
    assert "labels without a picture: 2 (d.png, e.png)\n" in printed
    assert "skipped   b: b.png has 9 x 8 pixels, its picture 10 x 8\n" in printed
    assert [path.name for path in Path("inputs/cells/images").iterdir()] == ["a.png"]
    assert yaml.safe_load(Path("inputs/cells/dataset.yml").read_text())["skipped"].keys() == {"b"}


def test_check_writes_only_the_contact_sheet(here, monkeypatch, capsys):
    write_pictures()
    options, _ = CLASS_FORMS["8 bits"]()
    call(monkeypatch, import_labels, options, "--name cells --check")
    assert "inputs/cells was not written" in capsys.readouterr().out and not Path("inputs").exists()
    assert [str(path) for path in Path("outputs").rglob("*") if path.is_file()] == ["outputs/cells/labels.png"]
    sheet = read("outputs/cells/labels.png")[..., ::-1]
    assert sheet.shape == (488, 976, 3)
    for _, colour in import_labels.COLOURS[:2]:
        assert (sheet == colour).all(2).any()
    assert not (sheet == import_labels.COLOURS[2][1]).all(2).any()
    # 48 sheet pixels for each of the picture: the upper left corner of the first object is drawn, its middle is not
    assert (sheet[48, 48 : 5 * 48] == import_labels.COLOURS[0][1]).all() and (sheet[96, 96] != sheet[48, 96]).any()


def test_an_existing_data_set(here, monkeypatch):
    write_pictures()
    options, _ = CLASS_FORMS["8 bits"]()
    Path("inputs/other").mkdir(parents=True)
    Path("inputs/other/mine.txt").touch()
    for overwrite in ("", "--overwrite"):
        with pytest.raises(FileExistsError, match="not written by this script"):
            call(monkeypatch, import_labels, options, "--name other", overwrite)
    call(monkeypatch, import_labels, options, "--name cells")
    Path("inputs/cells/images/old.png").touch()
    with pytest.raises(FileExistsError, match="--overwrite"):
        call(monkeypatch, import_labels, options, "--name cells")
    call(monkeypatch, import_labels, options, "--name cells --overwrite")
    assert not Path("inputs/cells/images/old.png").exists() and Path("inputs/other/mine.txt").exists()


def test_chosen_classes(here, monkeypatch):
    """--classes keeps some, in its order, and the objects of these: a nucleus does not cut a hole into its cell."""
    write_pictures(ids="a")
    forms = [("cell", (0, 0, 6, 6)), ("nucleus", (1, 1, 3, 3)), ("dirt", (8, 6, 10, 8))]
    shapes = [{"label": label, "points": corners(box)} for label, box in forms]
    Path("photos/a.json").write_text(json.dumps({"shapes": shapes}))
    call(monkeypatch, import_labels, "photos --name cells --classes dirt,cell")
    expected = np.zeros(SHAPE, int)
    expected[:6, :6], expected[6:, 8:] = 1, 2
    assert (read("inputs/cells/labels/a.png") == expected).all()
    assert (read("inputs/cells/masks/0/a.png") == 255 * (expected == 2)).all()
    assert (read("inputs/cells/masks/1/a.png") == 255 * (expected == 1)).all()
    assert sorted(path.name for path in Path("inputs/cells/masks").iterdir()) == ["0", "1"]
    with pytest.raises(ValueError, match="no class wall; found cell, dirt, nucleus"):
        call(monkeypatch, import_labels, "photos --name cells --overwrite --classes cell,wall")


def test_pictures_keep_their_values(here, monkeypatch, capsys):
    deep = np.random.default_rng(0).integers(0, 65536, SHAPE, np.uint16)
    write("photos/a.tif", deep)
    write_pictures(ids="b", ending=".jpg")
    for img_id in BOXES:
        write(f"labels/{img_id}.png", CLASSES[img_id])
    write("photos/c.tif", deep / np.float32(7))
    tifffile.imwrite("photos/d.tif", np.zeros((5, *SHAPE), np.uint8), photometric="minisblack")
    for img_id in "cd":
        write(f"labels/{img_id}.png", CLASSES["a"])
    call(monkeypatch, import_labels, "photos labels --name cells")
    assert (read("inputs/cells/images/a.png") == deep).all()
    scaled = read("inputs/cells/images/c.png")  # a PNG holds no floats
    assert scaled.dtype == np.uint8 and np.corrcoef(scaled[..., 0].ravel(), deep.ravel())[0, 1] > 0.95
    assert "skipped   d: has 5 pages, expected 1" in capsys.readouterr().out
    assert (read("inputs/cells/images/b.png") == read("photos/b.jpg")).all()


def test_an_empty_list_of_classes(here, monkeypatch):
    write_pictures()
    assert "--classes" in refused(monkeypatch, object_folders(), "--name cells --classes=")


def test_a_package_that_is_absent(here, monkeypatch):
    monkeypatch.setitem(sys.modules, "roifile", None)
    write_pictures()
    assert "roifile is not installed: pip install -r requirements-import.txt" in refused(
        monkeypatch, roi_zips(), "--name cells"
    )


@pytest.mark.parametrize("name", ["..", "a/b", "/tmp/x"])
def test_a_name_that_leads_out(name, here, monkeypatch):
    write_pictures()
    assert "--name" in refused(monkeypatch, class_maps(1, np.uint8, ".png")()[0], "--name", name)


@pytest.mark.slow
def test_imported_data_train(here):
    """As a user does: import, then the command that is printed."""
    ids = [f"day{number}" for number in range(5)]
    write_pictures(ids=ids)
    for number, img_id in enumerate(ids):
        write(f"labels/{img_id}_mask.png", np.roll(CLASSES["a"], number, axis=1))
    said = run_script("import_labels.py", "photos", "labels", "--name", "my cells", cwd=here).stdout
    assert "next: python train.py --dataset 'my cells' --num_classes 2\n" in said
    options = ("--num_classes", 2, "--epochs", 1, "--width", 8, "--input_w", 16, "--input_h", 16, "--name", "run")
    run_script("train.py", "--dataset", "my cells", *options, cwd=here)
    assert (here / "models/run/model.pth").is_file()
    result = run_script("import_labels.py", "photos", "nothing", "--name", "x", cwd=here, ok=False)
    assert result.stderr == "import_labels.py: error: nothing: no such file or folder; expected the labels\n"
