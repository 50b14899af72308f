"""dsb2018.py, and preprocess_dsb2018.py with --native, --fixes and --solution, on generated files of the same formats.

python -m pytest -q tests/test_dsb2018.py
"""

import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from conftest import call, run_script
from fuzzing import broken, fuzz

import preprocess_dsb2018 as preprocess
from dsb2018 import find_samples, read_solution
from instances import to_runs
from labels import read_labels

BOXES = {  # id: size of the image, then y, x, height and width of each nucleus, in the order of the mask files
    "a1": ((20, 30), (2, 3, 5, 6), (7, 3, 4, 6), (12, 20, 6, 8)),  # the first two touch
    "b2": ((24, 16), (0, 0, 24, 16), (5, 5, 6, 6)),  # one lies in the other
}


def labels_of(img_id):
    (height, width), *boxes = BOXES[img_id]
    labels = np.zeros((height, width), np.int32)
    for k, (y, x, h, w) in enumerate(boxes, 1):
        labels[y : y + h, x : x + w] = k
    return labels


def image_of(img_id):
    return np.random.default_rng(len(img_id)).integers(0, 256, (*BOXES[img_id][0], 3), np.uint8)


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), array if array.ndim == 2 else array[..., ::-1])


def save_mask(folder, img_id, k, box):
    mask = np.zeros(BOXES[img_id][0], np.uint8)
    y, x, h, w = box
    mask[y : y + h, x : x + w] = 255
    save(folder / img_id / "masks" / f"m{k}.png", mask)


def zip_folder(folder, path):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*.*")):
            archive.write(file, file.relative_to(folder))
    return path


@pytest.fixture
def here(tmp_path, monkeypatch):
    """raw/ as stage1_train and test/ as stage1_test, with solution.csv."""
    monkeypatch.chdir(tmp_path)
    rows = ["ImageId,EncodedPixels,Height,Width,Usage"]
    for img_id, (size, *boxes) in BOXES.items():
        for part in ("raw", "test"):
            save(tmp_path / part / img_id / "images" / f"{img_id}.png", image_of(img_id))
        for k, box in enumerate(boxes):
            save_mask(tmp_path / "raw", img_id, k, box)
        rows += [f"{img_id},{runs},{size[0]},{size[1]},Public" for runs in to_runs(labels_of(img_id))]
    Path("solution.csv").write_text("\n".join(rows) + "\n")
    return tmp_path


def prepared(monkeypatch, *options):
    call(monkeypatch, preprocess, *options, "--num_workers", 1)


def written(folder, img_id):
    """image, mask and labels of a data set, as arrays."""
    image, mask = (
        cv2.imread(str(Path(folder) / kind / f"{img_id}.png"), cv2.IMREAD_UNCHANGED) for kind in ("images", "masks/0")
    )
    return image[..., ::-1], mask, read_labels(Path(folder) / "labels" / f"{img_id}.png")


# ---------------------------------------------------------------- labels from mask files


def test_native_keeps_sizes_and_numbers_nuclei(here, monkeypatch, capsys):
    prepared(monkeypatch, "--raw raw --native")
    for img_id in BOXES:
        image, mask, labels = written("inputs/dsb2018", img_id)
        assert (image == image_of(img_id)).all() and (labels == labels_of(img_id)).all()
        assert (mask == (labels > 0) * 255).all()
    assert "inputs/dsb2018: 2 images with 5 nuclei from 5 masks, 0 skipped" in capsys.readouterr().out
    described = yaml.safe_load(Path("inputs/dsb2018/dataset.yml").read_text())
    assert (described["img_size"], described["nuclei"], described["scale"]) == ("native", 5, 1.0)


def test_masks_that_overlap(here):
    """A pixel belongs to the smallest of its masks, whatever their order; equal, empty and hidden ones are no error."""
    folder = here / "raw" / "a1" / "masks"
    for file in folder.iterdir():
        file.unlink()
    boxes = [(4, 4, 2, 2), (2, 2, 10, 10), (4, 4, 2, 2), (0, 0, 0, 0), (8, 8, 8, 8)]
    for k, box in enumerate(boxes):
        save_mask(here / "raw", "a1", k, box)
    expected = np.zeros((20, 30), np.int32)
    for label, (y, x, h, w) in ((2, boxes[1]), (3, boxes[4]), (1, boxes[0])):  # largest first
        expected[y : y + h, x : x + w] = label
    image, labels, masks = find_samples(here / "raw")["a1"].load()
    assert (labels == expected).all() and masks == 5 and image.shape == (20, 30, 3)


def test_more_nuclei_than_a_file_can_number_are_skipped(here, monkeypatch, capsys):
    monkeypatch.setattr("labels.MAX_OBJECTS", 2)
    prepared(monkeypatch, "--raw raw --native")
    assert "skipped a1: 3 objects; a label file of 16 bits holds at most 2" in capsys.readouterr().out
    assert [path.name for path in Path("inputs/dsb2018/images").iterdir()] == ["b2.png"]


def test_demo_has_labels(here, monkeypatch):
    monkeypatch.setattr(preprocess, "DEMO_IMAGES", 2)
    prepared(monkeypatch, "--demo --native")
    image, mask, labels = written("inputs/demo", "demo_001")
    assert image.shape == (256, 256, 3) and labels.max() > 1 and ((labels > 0) == (mask > 0)).all()


def test_other_data_in_the_same_folders(here, monkeypatch):
    for file in (here / "raw").rglob("*.png"):
        save(file.with_suffix(".tif"), cv2.imread(str(file), cv2.IMREAD_UNCHANGED))
        file.unlink()
    prepared(monkeypatch, "--raw raw --native --output inputs/my_cells")
    assert (written("inputs/my_cells", "a1")[2] == labels_of("a1")).all()


# ---------------------------------------------------------------- corrections


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_fixes_replace_masks_and_leave_images_out(here, monkeypatch, capsys, packed, inside):
    save_mask(here / "fixes", "a1", 0, (1, 1, 9, 9))
    save_mask(here / "fixes", "a1", 1, (12, 12, 3, 3))
    (here / "fixes" / "dropped.txt").write_text("b2\nelsewhere\n")
    if inside:
        (here / "fixes").rename(here / "stage1_train")
        (here / "fixes").mkdir()
        (here / "stage1_train").rename(here / "fixes" / "stage1_train")
    path = zip_folder(here / "fixes", here / "fixes.zip") if packed else here / "fixes"
    prepared(monkeypatch, f"--raw raw --native --fixes {path}")
    _, _, labels = written("inputs/dsb2018", "a1")
    assert labels.max() == 2 and (labels == 1).sum() == 81 and not Path("inputs/dsb2018/images/b2.png").exists()
    assert f"{path}: 1 images corrected, 1 left out" in capsys.readouterr().out
    described = yaml.safe_load(Path("inputs/dsb2018/dataset.yml").read_text())
    assert described["fixes"] == {"source": str(path), "corrected": 1, "left_out": ["b2"]}


def test_fixes_of_something_else(here, monkeypatch):
    save_mask(here, "a1", 0, (1, 1, 9, 9))
    (here / "a1").rename(here / "zz")
    (here / "other").mkdir()
    (here / "zz").rename(here / "other" / "zz")
    with pytest.raises(ValueError, match="other corrects 1 images, such as zz; none of them is here"):
        prepared(monkeypatch, "--raw raw --fixes other")
    with pytest.raises(ValueError, match="test: expected <id>/masks"):
        prepared(monkeypatch, "--raw raw --fixes test")
    with pytest.raises(FileNotFoundError, match="none: no such file or folder; expected <id>/masks/"):
        prepared(monkeypatch, "--raw raw --fixes none")


# ---------------------------------------------------------------- run lengths in a table


@pytest.mark.parametrize("packed", [False, True])
def test_solution_makes_the_test_set(here, monkeypatch, capsys, packed):
    raw = zip_folder(here / "test", here / "stage1_test.zip") if packed else here / "test"
    prepared(monkeypatch, f"--raw {raw} --solution solution.csv")
    for img_id in BOXES:
        image, mask, labels = written("inputs/dsb2018_test", img_id)
        assert (image == image_of(img_id)).all() and (labels == labels_of(img_id)).all()
    assert "inputs/dsb2018_test: 2 images with 5 nuclei from 5 masks, 0 skipped" in capsys.readouterr().out
    prepared(monkeypatch, f"--raw {raw} --solution solution.csv --img_size 16")
    assert cv2.imread("inputs/dsb2018_test_16/images/a1.png").shape == (16, 16, 3)


def test_kaggle_folder_with_both_sets(here, monkeypatch):
    (here / "all").mkdir()
    (here / "raw").rename(here / "all" / "stage1_train")
    (here / "test").rename(here / "all" / "stage1_test")
    prepared(monkeypatch, "--raw all --solution solution.csv")
    prepared(monkeypatch, "--raw all --native")
    assert (written("inputs/dsb2018_test", "b2")[2] == written("inputs/dsb2018", "b2")[2]).all()


def test_what_does_not_fit_is_skipped_with_its_reason(here, monkeypatch, capsys):
    for name in ("overlap", "size", "beyond", "odd", "two_sizes", "ignored", "extra", "empty"):
        save(here / "test" / name / "images" / f"{name}.png", np.zeros((4, 5, 3), np.uint8))
    rows = ["overlap,1 4,4,5,Public", "overlap,4 2,4,5,Public", "size,1 4,5,4,Public", "beyond,20 2,4,5,Public"]
    rows += ["odd,1 2 3,4,5,Public", "two_sizes,1 2,4,5,Public", "two_sizes,3 2,4,6,Public", "missing,1 2,4,5,Public"]
    rows += ["ignored,1 1,4,5,Ignored", "empty,,4,5,Public"]
    with open("solution.csv", "a") as file:
        file.write("\n".join(rows))
    prepared(monkeypatch, "--raw test --solution solution.csv")
    out = capsys.readouterr().out
    reasons = {
        "overlap": "nucleus 2: the run 4 2 overlaps nucleus 1",
        "size": "the solution says 4x5 pixels, the image has 5x4",
        "beyond": "nucleus 1: the run 20 2 does not lie in 5 x 4 = 20 pixels, which are numbered from 1",
        "odd": "nucleus 1: expected pairs `start length` of integers, found '1 2 3'",
        "two_sizes": "the solution says 5x4 and 6x4 pixels, the image has 5x4",
        "missing": "no image files, expected 1",
        "ignored": "left out of the score by the solution (Usage is Ignored)",
        "extra": "no row in the solution",
    }
    for img_id, reason in reasons.items():
        assert f"skipped {img_id}: {reason}\n" in out
    assert "3 images with 5 nuclei from 5 masks, 8 skipped" in out
    assert not written("inputs/dsb2018_test", "empty")[2].any()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no column ImageId, EncodedPixels, Height, Width"),
        ("ImageId,EncodedPixels\na,1 2\n", "no column Height, Width"),
        ("ImageId,EncodedPixels,Height,Width\n", "no rows"),
        ("ImageId,EncodedPixels,Height,Width\n../a,1 2,4,5\n", "line 2: '../a' cannot be the name of an image"),
        (
            "ImageId,EncodedPixels,Height,Width\na,1 2\n",
            r"line 2: expected Height and Width in pixels, found \['', ''\]",
        ),
        ("ImageId,EncodedPixels,Height,Width\na,1 2,-4,5\n", r"found \['-4', '5'\]"),
        ("ImageId,EncodedPixels,Height,Width\na,1 2,4,99999999999\n", "expected Height and Width"),
        ('ImageId,EncodedPixels,Height,Width\na,"' + "1 1 " * 40_000 + '",4,5\n', "field larger than field limit"),
        (b"\xff\xfe\0", "is no text; expected a table with the columns ImageId"),
    ],
)
def test_tables_that_are_wrong(tmp_path, text, message):
    (tmp_path / "s.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=rf"s\.csv:? .*{message}"):
        read_solution(tmp_path / "s.csv")


# ---------------------------------------------------------------- as a user runs it


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--native --img_size 96 --raw raw", "--native keeps the sizes of the images; leave out --img_size"),
        ("--solution solution.csv", "--solution is for --raw stage1_test; give both"),
        ("--demo --fixes raw", "--fixes is for the masks of stage1_train"),
        ("--raw test --solution none.csv", "none.csv"),
        ("--raw raw --native --fixes solution.csv", "solution.csv is not a complete zip file"),
    ],
)
def test_mistakes_end_in_one_line(here, options, message):
    result = run_script("preprocess_dsb2018.py", *options.split(), cwd=here, ok=False)
    assert message in result.stderr.strip().split("\n")[-1] and not (here / "inputs").exists()


def test_tables_broken_at_random(count, here, sandbox, capfd):
    bases = {"solution": (here / "solution.csv").read_bytes()}

    def call(data):
        Path("free/s.csv").write_bytes(data)
        for img_id, truth in read_solution(Path("free/s.csv")).items():
            truth.number_runs(BOXES.get(img_id, ((4, 4),))[0])

    fuzz("dsb2018.read_solution", [*bases.items(), *broken(bases, 2 * count, 9)], call, sandbox, capfd)
