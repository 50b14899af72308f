"""label_forms/outlines.py, annotations.py and imagej.py: from corners and run lengths to pixels, and hostile files."""

import itertools
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from fuzzing import broken, fuzz, limits
from matplotlib.path import Path as Outline

from label_forms import annotations, imagej
from label_forms.outlines import draw, ellipse
from label_forms.source import paint

coco_mask = pytest.importorskip("pycocotools.mask", reason="needs requirements-import.txt")
roifile = pytest.importorskip("roifile", reason="needs requirements-import.txt")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# ---------------------------------------------------------------- outlines


def test_a_pixel_belongs_to_the_outline_around_its_centre():
    random = np.random.default_rng(0)
    centres = np.stack(np.meshgrid(np.arange(60), np.arange(50)), 2).reshape(-1, 2) + 0.5
    different = found = expected = 0
    for _ in range(20):
        angle, radius = np.sort(random.uniform(0, 2 * np.pi, 30)), 20 + 3 * random.standard_normal(30)
        outline = np.stack([30 + radius * np.cos(angle), 25 + radius * np.sin(angle)], 1)
        exact = Outline(outline).contains_points(centres).reshape(50, 60)
        piece, mask = draw("", [outline], (50, 60)), np.zeros((50, 60), bool)
        mask[piece.box] = piece.mask
        different, found, expected = different + (mask != exact).sum(), found + mask.sum(), expected + exact.sum()
    assert different < 0.015 * expected and abs(found - expected) < 0.001 * expected


def test_outlines_outside_and_inside_another():
    square, inner = [(1, 1), (6, 1), (6, 6), (1, 6)], [(2, 2), (4, 2), (4, 4), (2, 4)]
    assert draw("", [square, inner], (8, 8)).mask.sum() == 25
    assert draw("", [square, inner], (8, 8), cut_out=True).mask.sum() == 21
    assert draw("", [[(-5, -5), (2, -5), (2, 3), (-5, 3)]], (8, 8)).mask.sum() == 6
    assert draw("", [[(20, 20), (30, 20), (30, 30)]], (8, 8)) is None
    assert draw("", [[(1, 1), (2, 2)]], (8, 8)) is None
    assert draw("", [ellipse(0, 0, 200, 100)], (100, 200)).mask.sum() == pytest.approx(np.pi * 100 * 50, rel=1e-3)


@pytest.mark.parametrize(
    ("outline", "said"),
    [
        ([1, 1, float("nan"), 1, 5, 5], "not a finite number"),
        ([1, 1, float("inf"), 1, 5, 5], "not a finite number"),
        ([1, 1, 1e300, 1, 5, 5], "pixels long"),
        (np.random.default_rng(0).uniform(0, 20, 2_000_000), "outline of 1,000,000 points is .* pixels long"),
        ([1, 1, 2, 2, 3, 3, 4], "not a list of x and y"),
        ([[1, 2, 3], [1, 2, 3]], "not a list of x and y"),
    ],
)
def test_an_outline_that_is_none(outline, said):
    with pytest.raises(ValueError, match=said):
        draw("", [outline], (20, 20))


# ---------------------------------------------------------------- JSON


def coco(**changes):
    content = {
        "images": [{"id": 0, "file_name": "a.png", "width": 10, "height": 8}],
        "categories": [{"id": 1, "name": "cell"}],
        "annotations": [{"id": 5, "image_id": 0, "category_id": 1, "segmentation": [[1, 1, 4, 1, 4, 4, 1, 4]]}],
    }
    Path("coco.json").write_text(json.dumps(content | changes))
    [source] = annotations.find_json({"a": Path("a.png")}, Path("coco.json"))
    return source.labels_of("a", (8, 10))


def segment(*segmentations, **about):
    return [{"id": 5, "image_id": 0, "category_id": 1, "segmentation": found, **about} for found in segmentations]


def test_a_crowd_is_no_object_and_a_box_is_nothing():
    crowd = segment({"size": [8, 10], "counts": [0, 8, 72]}, iscrowd=1)  # the first column
    labels = coco(annotations=[*segment([[1, 1, 4, 1, 4, 4, 1, 4]]), *crowd, *segment([])])
    assert labels.masks["cell"].sum() == 17 and labels.objects.sum() == 9


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"images": [{"id": 0, "file_name": "../a.png"}]}, "leads out of the folder"),
        ({"images": [{"id": 0, "file_name": "a.png", "width": 10**6, "height": 10**6}]}, "the picture has 10 x 8"),
        ({"images": [{"id": 0, "file_name": "x/a.png"}, {"id": 1, "file_name": "y/a.png"}]}, "two images named a.png"),
        ({"images": [{"id": 9, "file_name": "a.png"}]}, "names image 0, category 1; one is not listed"),
        ({"images": [{"id": 0, "file_name": "a.png"}, {"id": 0, "file_name": "b.png"}]}, "two images have the id 0"),
        ({"images": None}, "not valid COCO"),
        ({"categories": [{}]}, "'id' is missing"),
        ({"annotations": segment("abc")}, "annotation 5: could not convert"),
        ({"annotations": segment([[10**400, 1, 2, 3, 4, 5]])}, "annotation 5: int too large"),
        ({"annotations": segment([[1, 1, 4, 1, 4, 4]]) * 4}, "more than 3 objects"),
        ({"annotations": segment({"size": [80, 10], "counts": [800]})}, "says 10 x 80 pixels"),
        *(
            ({"annotations": segment({"size": [8, 10], "counts": counts})}, "run lengths do not fill the picture")
            for counts in ([1, 2], [81], [-1, 81], [[80]], "", "0", "oooo", "\x7f\x7f", "é", "1" * 1000, 5, None)
        ),
    ],
)
def test_coco_that_is_wrong(changes, said, monkeypatch):
    monkeypatch.setattr("label_forms.source.MAX_OBJECTS", 3)
    with pytest.raises(ValueError, match=said), limits():
        coco(**changes)


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (7, 13), (300, 200)])
def test_run_lengths_are_those_of_pycocotools(shape):
    random = np.random.default_rng(0)
    for share in (0, 0.01, 0.3, 0.97, 1):
        mask = np.zeros(shape, np.uint8)
        box = tuple(slice(*sorted(random.integers(0, side + 1, 2))) for side in shape) if share % 1 else np.s_[:]
        mask[box] = random.random(mask[box].shape) < share
        encoded = coco_mask.encode(np.asfortranarray(mask))
        runs = [len(list(group)) for _, group in itertools.groupby(mask.T.ravel())]
        runs = [0] * int(mask[0, 0]) + runs
        for counts in (encoded["counts"].decode(), runs):
            piece = annotations.run_lengths("cell", {"size": [*shape], "counts": counts}, shape)
            found = np.zeros(shape, bool)
            if piece:
                found[piece.box] = piece.mask
                assert piece.mask.any(0)[[0, -1]].all() and piece.mask.any(1)[[0, -1]].all()
            assert (found == mask).all() and (piece is None) == (not mask.any())


def test_a_polygon_that_is_in_no_list():
    square = [1, 1, 4, 1, 4, 4, 1, 4]
    assert (coco(annotations=segment(square)).objects == coco(annotations=segment([square])).objects).all()


def test_json_files_that_are_no_labels():
    """Beside masks, or deeper in the folder of the pictures."""
    Path("settings.json").write_text("// not JSON")
    assert annotations.find_json({"a": Path("a.png")}, Path()) == []
    Path("day1").mkdir()
    Path("day1/a.json").write_text('{"shapes": []}')
    [source] = annotations.find_json({"a": Path("day1/a.png")}, Path())
    assert source.pairs == {"a": Path("day1/a.json")}


@pytest.mark.parametrize("content", ["[" * 100_000, "{", "\xff"])
def test_json_that_is_none(content):
    Path("x.json").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match="x.json is not JSON"):
        annotations.read_json(Path("x.json"))


def test_json_that_is_too_large(monkeypatch):
    with open("x.json", "wb") as file:
        file.truncate(2**28)
    with pytest.raises(ValueError, match="268,435,456 bytes, more than 134,217,728"):
        annotations.read_json(Path("x.json"))


def labelme(*shapes, **about):
    Path("a.json").write_text(json.dumps({"shapes": shapes, **about}))
    return paint(annotations.read_labelme(Path("a.json"), (20, 20)), (20, 20))


def test_labelme_shapes():
    """Of one group: a rectangle and a triangle; a circle; a line, which has no area."""
    group = {"label": "cell", "group_id": 3}
    labels = labelme(
        {**group, "shape_type": "rectangle", "points": [[1, 1], [3, 3]]},
        {**group, "shape_type": "polygon", "points": [[15, 15], [19, 15], [19, 19], [15, 19]]},
        {"label": "dot", "shape_type": "circle", "points": [[10, 10], [13, 10]]},
        {"label": "dot", "shape_type": "line", "points": [[1, 1], [9, 9]]},
    )
    corners = {"label": "cell", "shape_type": "rectangle", "points": [[1, 1], [3, 1], [3, 3], [1, 3]]}
    assert labelme(corners).masks["cell"].sum() == 4
    y, x = np.mgrid[:20, :20] + 0.5
    assert (labels.masks["dot"] == ((x - 10) ** 2 + (y - 10) ** 2 < 9)).all()
    assert labels.masks["cell"].sum() == 20 and (labels.objects[labels.masks["cell"]] == 1).all()
    assert labels.objects.max() == 2 and labels.lost == 1


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ({}, "KeyError: 'label'"),
        ({"label": "cell", "points": [[float("nan"), 1], [2, 2], [3, 3]]}, "not a finite number"),
        ({"label": "cell", "shape_type": "circle", "points": [[1, 1]]}, "not enough values"),
        ({"label": "cell", "shape_type": "mask", "points": [[0, 0], [3, 3]], "mask": "junk"}, "unreadable"),
        ({"label": "cell", "shape_type": "mask", "points": [[1e400, 0], [3, 3]], "mask": ""}, "OverflowError"),
    ],
)
def test_labelme_that_is_wrong(shape, said):
    with pytest.raises(ValueError, match=f"a.json.*{said}"):
        labelme(shape)


def test_labelme_of_another_picture():
    with pytest.raises(ValueError, match="a.json says 30 x 20 pixels, the picture has 20 x 20"):
        labelme(imageWidth=30, imageHeight=20)


# ---------------------------------------------------------------- ImageJ


def roi(points=((1, 1), (5, 1), (5, 5), (1, 5)), **about):
    made = roifile.ImagejRoi.frompoints(np.array(points, np.float32))
    for name, value in about.items():
        setattr(made, name, value)
    return made


def read_zip(entries, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile("a.zip", "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return paint(imagej.read_rois([("object", Path("a.zip"))], (8, 8)), (8, 8))


def test_rois_of_all_kinds():
    oval = roifile.ImagejRoi(roitype=roifile.ROI_TYPE.OVAL)
    oval.left, oval.top, oval.right, oval.bottom = 4, 4, 8, 8
    ring = roifile.ImagejRoi(roitype=roifile.ROI_TYPE.RECT)  # ImageJ's composite: a square with a hole
    path = [0, 0, 0, 1, 4, 0, 1, 4, 4, 1, 0, 4, 4, 0, 1, 1, 1, 2, 1, 1, 2, 2, 1, 1, 2, 4]
    ring.multi_coordinates, ring.shape_roi_size = np.array(path, np.float32), len(path)
    line = roi(roitype=roifile.ROI_TYPE.POLYLINE)
    labels = read_zip({f"{number}.roi": made.tobytes() for number, made in enumerate((oval, ring, line))})
    assert (labels.objects == 1).sum() == 16 - 4 and (labels.objects == 2).sum() == 16 - 1 and labels.lost == 1
    assert labels.objects[1, 1] == 0


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"1.roi": bytes(2**20 + 1)}, "unpacks to 1,048,577 bytes, more than the 1,048,576"),
        ({"../1.roi": roi().tobytes()}, "outside of the folder"),
        ({"1.roi": roi().tobytes()[:70]}, "1.roi is damaged, or not an ImageJ ROI"),
        ({"1.roi": b"junk" * 99}, "1.roi is damaged, or not an ImageJ ROI"),
        ({"1.roi": roi(z_position=1).tobytes(), "2.roi": roi(z_position=2).tobytes()}, "on several slices of a stack"),
    ],
)
def test_rois_that_are_wrong(entries, said, monkeypatch):
    monkeypatch.setattr(imagej, "MAX_ZIP_BYTES", 2**20)
    with pytest.raises(ValueError, match=said), limits():
        read_zip(entries)


def test_a_zip_that_is_none():
    Path("a.zip").write_bytes(b"PK\3\4junk")
    with pytest.raises(ValueError, match="not a complete zip file"):
        next(imagej.read_rois([("object", Path("a.zip"))], (8, 8)))
    with pytest.raises(ValueError, match="neither stored nor deflated"):
        read_zip({"1.roi": roi().tobytes()}, zipfile.ZIP_LZMA)


# ---------------------------------------------------------------- damaged files


def test_damaged_json_and_rois(count, sandbox, capfd):
    """Each ends in Labels or in one line, within a minute and 3 GB."""
    run_lengths = {"size": [8, 10], "counts": "1220h1"}
    coco_file = {
        "images": [{"id": 0, "file_name": "a.png", "width": 10, "height": 8}],
        "categories": [{"id": 1, "name": "cell"}],
        "annotations": segment([[1, 1, 4, 1, 4, 4]], run_lengths),
    }
    labelme_file = {"shapes": [{"label": "cell", "shape_type": "circle", "points": [[5, 4], [7, 4]]}]}
    with zipfile.ZipFile("free/a.zip", "w") as archive:
        archive.writestr("1.roi", roi().tobytes())
    bases = {"coco": json.dumps(coco_file).encode(), "labelme": json.dumps(labelme_file).encode()}
    bases |= {"zip": Path("free/a.zip").read_bytes(), "roi": roi().tobytes()}

    def call(data):
        name = "a.json" if data[:1] == b"{" else "a.zip" if data[:2] == b"PK" else "a.roi"
        path = Path("free", name)
        path.write_bytes(data)
        finder = annotations.find_json if name == "a.json" else imagej.find_rois
        for source in finder({"a": Path("a.png")}, path):
            if source.pairs:
                source.labels_of("a", (8, 10))

    counts = fuzz("labels", [*bases.items(), *broken(bases, count, 11)], call, sandbox, capfd)
    assert min(counts.values()) > 0
