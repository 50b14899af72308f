"""predict.py with runs of individual nuclei: label TIFFs, tables counted again, stacks, files of other programs.

python -m pytest -q tests/test_nuclei_predictions.py
"""

import csv
import subprocess
import sys

import cv2
import numpy as np
import pandas as pd
import pytest
import tifffile
from conftest import REPOSITORY, BrightNuclei, call, discs, run_script, write_label_set
from skimage.measure import regionprops

import engine
import predict
import train
from instances import from_runs, judge
from nuclei import find, object_files
from nuclei.object_files import join_label_tiffs, write_label_tiff
from nuclei.predictions import NucleiResults

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current directory, where predict.py finds what is bright."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(predict, "build_predictor", lambda options, given, device: BrightNuclei())
    return tmp_path


def write(path, picture, **options):
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".tif":
        tifffile.imwrite(path, picture, **options)
    else:
        cv2.imwrite(str(path), picture[..., ::-1])
    return path


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_labels_outlines_and_tables_of_one_picture(here, monkeypatch, capsys):
    picture, labels = discs(8)
    picture[..., 1] //= 2
    write(here / "in" / "a.png", picture)
    assert call(monkeypatch, predict, "in/a.png --output out --pixel_size 0.5") == 0
    assert names_in(here / "out") == ["a_labels.tif", "a_overlay.png", "images.csv", "objects.csv"]
    found = tifffile.imread("out/a_labels.tif")
    assert found.dtype == np.uint16 and judge(found.astype(np.int32), labels).counts[4].tolist() == [42, 0, 0]

    table = pd.read_csv("out/objects.csv")
    for k, region in enumerate(regionprops(found, picture)):  # scikit-image's objects, which the table does not use
        row = table.iloc[k]
        assert (row["image"], row["object"], row["area"]) == ("a", region.label, (found == region.label).sum())
        assert row["area_um2"] == row["area"] / 4 and row["width"] == region.bbox[3] - region.bbox[1]
        assert row["mean_green"] == pytest.approx(picture[found == region.label, 1].mean(), abs=1e-3)
        assert row["max_red"] == picture[found == region.label, 0].max()
        assert row["confidence"] > 0.9 and not row["touches_border"]
    images = pd.read_csv("out/images.csv").iloc[0]
    assert images["objects"] == len(table) == 42 and images["um_per_pixel"] == 0.5
    assert images["objects_per_megapixel"] == pytest.approx(42e6 / picture[..., 0].size, abs=1e-3)
    assert images["objects_per_mm2"] == pytest.approx(42e6 / (picture[..., 0].size * 0.25), abs=1e-3)
    assert images["median_diameter"] == pytest.approx(np.median(2 * np.sqrt(table["area"] / np.pi)), abs=1e-3)
    overlay = cv2.imread("out/a_overlay.png")
    assert overlay.shape == picture.shape and len(np.unique(overlay[found > 0], axis=0)) > 2
    assert "1 picture, 42 nuclei, scale 0.7" in capsys.readouterr().out


def test_values_are_those_of_the_file(here, monkeypatch):
    """Sixteen bits are measured as they are, and the size of a pixel comes from the file."""
    picture, labels = discs(8, value=250)
    deep = picture[..., 0].astype(np.uint16) * 16
    write(here / "in" / "deep.tif", deep, imagej=True, resolution=(4, 4), metadata={"unit": "um"})
    channels = np.stack([deep, deep // 2, deep // 8])  # for the network and the eye each is scaled to 8 bits
    write(here / "in" / "three.tif", channels, imagej=True, metadata={"axes": "CYX"})
    write(here / "in" / "dim.tif", deep / np.float32(4000 * 12345), imagej=True)
    call(monkeypatch, predict, "in --output out")
    table = pd.read_csv("out/objects.csv", index_col="image")
    assert len(table.loc["deep"]) == labels.max() and (table.loc["deep", "max_grey"] == 4000).all()
    in_um = table.loc["deep", "equivalent_diameter_um"] / table.loc["deep", "equivalent_diameter"]
    assert in_um.round(3).unique() == [0.25]
    for colour, value in (("red", 4000), ("green", 2000), ("blue", 500)):
        assert (table.loc["three", f"max_{colour}"] == value).all()
    assert (table.loc["dim", "max_grey"] == 8.1e-05).all()  # 1 / 12345 has four digits, however small it is


def test_a_pixel_size_that_cannot_be_is_unknown(here, monkeypatch, capsys):
    """Some programs write metres without a unit, which then means micrometres."""
    pixels = {"PhysicalSizeX": 6.5e-7, "PhysicalSizeY": 6.5e-7}
    write(here / "in" / "a.ome.tif", discs(8)[0][..., 0], ome=True, metadata={"axes": "YX", **pixels})
    assert call(monkeypatch, predict, "in --output out") == 0 and not capsys.readouterr().err
    assert "area_um2" not in pd.read_csv("out/objects.csv") and (here / "out" / "a.ome_labels.tif").exists()


def test_a_picture_without_nuclei(here, monkeypatch, capsys):
    write(here / "in" / "empty.png", np.zeros((40, 50, 3), np.uint8))
    assert call(monkeypatch, predict, "in --output out --submission out.csv") == 0
    assert "warning: no nuclei in 1 of 1 pictures: empty" in capsys.readouterr().err
    assert pd.read_csv("out/objects.csv").empty and not tifffile.imread("out/empty_labels.tif").any()
    assert (here / "out.csv").read_text().split() == ["ImageId,EncodedPixels", "empty,"]


def test_a_picture_too_large_for_the_scale_of_its_nuclei(here, monkeypatch, capsys):
    monkeypatch.setattr(find, "SEARCHED", 128)
    monkeypatch.setattr(find, "MOST_SEEN", 400 * 300)
    write(here / "in" / "slide.png", discs(4, size=(400, 300))[0])
    assert call(monkeypatch, predict, "in --output out") == 0
    said = "a scale that may be too low for small nuclei (cut such large pictures into parts) in 1 of 1 pictures: slide"
    assert f"predict.py: warning: {said}" in capsys.readouterr().err


# ---------------------------------------------------------------- stacks


def stack_of(*radii):
    return np.stack([discs(radius, value=150 + 20 * k)[0][..., 0] for k, radius in enumerate(radii)])


def counts(path):
    with tifffile.TiffFile(path) as tiff:
        return [int(page.asarray().max()) for page in tiff.pages]


def test_the_label_tiff_of_a_stack_has_its_pages(here, monkeypatch):
    write(here / "in" / "cells.tif", stack_of(6, 8, 10), photometric="minisblack")
    write(here / "in" / "cells.png", discs(9)[0])
    expected = [discs(radius)[1].max() for radius in (6, 8, 10)]
    call(monkeypatch, predict, "in --output out --pixel_size 0.5")
    assert [name for name in names_in(here / "out") if "labels" in name] == [
        "in_cells_2_labels.tif",
        "in_cells_labels.tif",
    ]
    assert counts("out/in_cells_2_labels.tif") == expected
    assert counts("out/in_cells_labels.tif") == [discs(9)[1].max()]
    with tifffile.TiffFile("out/in_cells_2_labels.tif") as tiff:
        assert {page.tags.valueof("XResolution") for page in tiff.pages} == {(20_000, 1)}  # per cm
    before = (here / "out" / "in_cells_2_labels.tif").read_bytes()
    again = "in --output out --pixel_size 0.5 --resume --submission all.csv"
    call(monkeypatch, predict, again)  # nothing is done again
    assert (here / "out" / "in_cells_2_labels.tif").read_bytes() == before
    assert len(pd.read_csv("all.csv").query("ImageId == 'cells_p002'")) == expected[2]
    call(monkeypatch, predict, "in/cells.tif --output one --page 1")
    assert [name for name in names_in(here / "one") if "labels" in name] == ["cells_p001_labels.tif"]


def test_later_pictures_leave_the_label_tiff_of_a_stack_alone(here, monkeypatch):
    write(here / "in" / "cells.tif", stack_of(6, 8), photometric="minisblack")
    call(monkeypatch, predict, "in --output out")
    before = (here / "out" / "cells_labels.tif").read_bytes()
    write(here / "other" / "cells.png", discs(9)[0])
    call(monkeypatch, predict, "other --output out")
    assert (here / "out" / "cells_labels.tif").read_bytes() == before
    assert counts("out/other_cells_labels.tif") == [discs(9)[1].max()]


def test_a_stack_leaves_the_label_tiff_of_an_earlier_picture_alone(here, monkeypatch):
    write(here / "one" / "cells.png", discs(9)[0])
    call(monkeypatch, predict, "one --output out")
    before = (here / "out" / "cells_labels.tif").read_bytes()
    write(here / "in" / "cells.tif", stack_of(6, 8), photometric="minisblack")
    call(monkeypatch, predict, "in --output out")
    assert (here / "out" / "cells_labels.tif").read_bytes() == before
    assert counts("out/in_cells_labels.tif") == [discs(radius)[1].max() for radius in (6, 8)]


def test_a_stack_with_more_pages_than_files_may_be_open(tmp_path):
    resource = pytest.importorskip("resource")  # not on Windows
    paths = [tmp_path / f"a_p{k:03d}_labels.tif" for k in range(60)]
    for k, path in enumerate(paths):
        write_label_tiff(path, np.full((3, 4), k, np.int32), pixel_size=0.5)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open(tmp_path / "a", "w") as file:  # its number is the first free one
        resource.setrlimit(resource.RLIMIT_NOFILE, (file.fileno() + 30, limits[1]))
    try:
        join_label_tiffs(paths, tmp_path / "a_labels.tif")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert counts(tmp_path / "a_labels.tif") == list(range(60)) and not any(path.exists() for path in paths)


def test_labels_that_were_moved_away_are_made_again(here, monkeypatch):
    write(here / "in" / "a.png", discs(8)[0])
    call(monkeypatch, predict, "in --output out")
    (here / "out" / "a_labels.tif").unlink()
    call(monkeypatch, predict, "in --output out --resume --submission sub.csv")
    assert (here / "out" / "a_labels.tif").exists() and len(pd.read_csv("sub.csv")) == 42


def test_a_picture_too_large_for_imagej_is_skipped(here, monkeypatch, capsys):
    monkeypatch.setattr(object_files, "IMAGEJ_SIDE", 100)
    write(here / "in" / "a.png", discs(8)[0])
    write(here / "in" / "b.png", discs(8, size=(90, 90))[0])
    assert call(monkeypatch, predict, "in --output out --rois") == 1
    assert "skipped in/a.png: out/a_rois.zip: ImageJ ROIs reach 100 pixels" in capsys.readouterr().err
    assert names_in(here / "out") == ["b_labels.tif", "b_overlay.png", "b_rois.zip", "images.csv", "objects.csv"]


def test_a_stack_that_was_stopped_goes_on(here, monkeypatch):
    write(here / "in" / "cells.tif", stack_of(6, 8, 10), photometric="minisblack")
    add = NucleiResults.add

    def stopped(results, path, *args):
        if path.number == 1:
            raise KeyboardInterrupt
        add(results, path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(NucleiResults, "add", stopped)
        with pytest.raises(KeyboardInterrupt):
            call(patch, predict, "in --output out")
    assert (here / "out" / "cells_p000_labels.tif").exists()
    call(monkeypatch, predict, "in --output out --resume")
    assert counts("out/cells_labels.tif") == [discs(radius)[1].max() for radius in (6, 8, 10)]
    assert not (here / "out" / "cells_p000_labels.tif").exists()


# ---------------------------------------------------------------- other programs


def test_the_submission_is_what_the_labels_say(here, monkeypatch, capsys):
    for name, radius in (("a", 6), ("b", 9)):
        write(here / "in" / f"{name}.png", discs(radius)[0])
    call(monkeypatch, predict, "in --output out --submission sub.csv --rois --geojson")
    with open("sub.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for name in "ab":
        labels = tifffile.imread(f"out/{name}_labels.tif").astype(np.int32)
        runs = [row["EncodedPixels"] for row in rows if row["ImageId"] == name]
        assert np.array_equal(from_runs(runs, labels.shape), labels) and labels.any()
        assert (here / "out" / f"{name}_rois.zip").exists() and (here / "out" / f"{name}.geojson").exists()
    assert "run lengths of all nuclei are in sub.csv" in capsys.readouterr().out
    call(monkeypatch, predict, "in/a.png --output out --submission sub.csv")  # another submission may be replaced
    (here / "in").rename(here / "moved")
    call(monkeypatch, predict, "moved --output out --submission sub.csv")
    assert (here / "out" / "moved_a_labels.tif").exists()  # beside that of in/a.png
    assert set(pd.read_csv("sub.csv")["ImageId"]) == {"a", "b"}
    write(here / "moved" / "more" / "a.png", discs(6)[0])
    call(monkeypatch, predict, "moved --output out --submission sub.csv")
    assert set(pd.read_csv("sub.csv")["ImageId"]) == {"moved_a", "moved_b", "more_a"}
    (here / "notes.csv").write_text("my notes")
    with pytest.raises(ValueError, match=r"--submission notes.csv exists and is not a submission; give another name"):
        call(monkeypatch, predict, "in/a.png --output out --submission notes.csv")
    with pytest.raises(ValueError, match="notes.csv is a file, not a folder"):
        call(monkeypatch, predict, "in/a.png --output out --submission notes.csv/sub.csv")


@pytest.mark.parametrize(("option", "package"), [("rois", "roifile"), ("geojson", "shapely")])
def test_a_missing_package_is_named_before_the_work(here, monkeypatch, option, package):
    write(here / "in" / "a.png", discs(6)[0])
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(OSError, match=f"^{package} is not installed: pip install -r requirements-objects.txt$"):
        call(monkeypatch, predict, f"in --output out --{option}")
    assert not (here / "out").exists()


# ---------------------------------------------------------------- real runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory, one_thread):
    """A folder with inputs/cells and a run of each kind, of one epoch."""
    folder = tmp_path_factory.mktemp("runs")
    write_label_set(folder / "inputs" / "cells", count=5)
    masks = folder / "inputs" / "cells" / "masks" / "0"
    masks.mkdir(parents=True)
    for path in (folder / "inputs" / "cells" / "labels").iterdir():
        cv2.imwrite(str(masks / path.name), (cv2.imread(str(path), -1) > 0).astype(np.uint8) * 255)
    small = "--dataset cells --width 2 --epochs 1 -b 2 --input_w 32 --input_h 32 --device cpu --amp off --split random"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(engine, "plot_curves", lambda *args, **kwargs: None)
        call(patch, train, small, "--name masks")
        call(patch, train, small, "--name nuclei --target instances --diameter 12 --deep_supervision True")
    return folder


def test_processes_share_the_files(tmp_path):
    """Two processes leave what one leaves, and one table."""
    write(tmp_path / "in" / "stack.tif", stack_of(6, 8), photometric="minisblack")
    for k in range(3):
        write(tmp_path / "in" / f"{k}.png", discs(6 + k)[0])
    (tmp_path / "models").symlink_to(REPOSITORY / "models")
    options = ["--name", "nuclei", "--device", "cpu", "--amp", "off", "--diameter", "14", "in"]
    said = run_script("predict.py", *options, "--output", "one", cwd=tmp_path).stdout
    assert "5 pictures" in said and " 0 nuclei" not in said
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(REPOSITORY / "predict.py"), *options, "--output", "two"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("nuclei, scale") == 1 and "5 pictures" in result.stdout
    assert names_in(tmp_path / "one") == names_in(tmp_path / "two")
    for name in names_in(tmp_path / "one"):
        one, two = tmp_path / "one" / name, tmp_path / "two" / name
        if name.endswith(".csv"):
            by = ["image"] if name == "images.csv" else ["image", "object"]
            tables = [pd.read_csv(path).sort_values(by, ignore_index=True) for path in (one, two)]
            pd.testing.assert_frame_equal(*(table.drop(columns="seconds", errors="ignore") for table in tables))
        else:
            assert one.read_bytes() == two.read_bytes(), name


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--name masks --diameter 30", "--diameter does not go with masks, which finds masks, not individual nuclei"),
        ("--name masks --rois", "--rois does not go with masks"),
        ("--name nuclei --threshold 0.4", "--threshold does not go with nuclei, which finds individual nuclei"),
        ("--name nuclei --mode tile", "--mode does not go with nuclei"),
    ],
)
def test_options_that_do_not_go_together(runs, monkeypatch, words, said):
    monkeypatch.chdir(runs)
    with pytest.raises(ValueError, match=said):
        call(monkeypatch, predict, "inputs/cells/images --device cpu --amp off", words)
    assert not (runs / "outputs").exists()


def test_a_mistake_is_one_line_and_status_2(runs):
    result = run_script("predict.py", "inputs/cells/images", "--name", "masks", "--rois", cwd=runs, ok=False)
    assert result.stderr.count("\n") == 1 and not (runs / "outputs").exists()
