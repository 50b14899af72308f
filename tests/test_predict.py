"""predict.py: every kind of file at its own size, tables counted by hand, bad inputs."""

import base64
import csv
import itertools
import re
import sys
import zlib
from argparse import Namespace
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import tifffile
from conftest import run_script
from PIL import Image
from test_inference import by_hand, soft_picture, write_run

import predict
import predictions
from common import report
from common.contrast import stretch_to_uint8
from common.images import Page, squeeze
from predict import predict_tiled
from predictions import MaskResults, Picture, output_names

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty current directory with models/tiny -> (folder, its network)."""
    monkeypatch.chdir(tmp_path)
    return tmp_path, write_run(tmp_path / "models" / "tiny")


def call(monkeypatch, *args, device=("--device", "cpu", "--amp", "off")):
    """main() with these arguments -> exit status."""
    monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, (*args, *device))])
    return predict.main()


def read(path):
    array = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    assert array is not None, path
    return array


def rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def expected(model, image, size):
    """The deepest head's probability, computed plainly: (H, W) of an RGB picture that the network sees at `size`."""
    probability = by_hand(model, squeeze(image, size)[None])[-1][0, ..., 0]
    return cv2.resize(probability, image.shape[1::-1], interpolation=cv2.INTER_LINEAR)


# ---------------------------------------------------------------- files in, files out


@pytest.mark.parametrize("mode", ["tile", "resize"])
def test_every_kind_of_file_at_its_own_size(workplace, monkeypatch, mode):
    folder, model = workplace
    image = soft_picture()
    colours, grey = Image.fromarray(image), Image.fromarray(image[..., 0])
    (folder / "in").mkdir()
    deep = 1000 + 7 * image.astype(np.uint16)
    same = []  # files of exactly these colours
    for ending in ("png", "tif", "bmp"):
        same.append(f"rgb_{ending}")
        colours.save(folder / "in" / f"rgb_{ending}.{ending}")
        grey.save(folder / "in" / f"grey_{ending}.{ending}")
        colours.quantize(32).save(folder / "in" / f"palette_{ending}.{ending}")
    for ending in ("png", "tif"):
        same.append(f"rgba_{ending}")
        colours.convert("RGBA").save(folder / "in" / f"rgba_{ending}.{ending}")
        cv2.imwrite(str(folder / "in" / f"deep_{ending}.{ending}"), deep[..., ::-1])
        cv2.imwrite(str(folder / "in" / f"deepgrey_{ending}.{ending}"), deep[..., 0])
    colours.save(folder / "in" / "rgb_jpg.JPEG", quality=98)
    grey.save(folder / "in" / "grey_jpg.jpg")
    assert call(monkeypatch, "in", "--mode", mode, "--probability") == 0

    out = folder / "outputs" / "tiny" / "predict"
    names = sorted(path.stem for path in (folder / "in").iterdir())
    assert sorted(row["image"] for row in rows(out / "images.csv")) == names
    size = (35, 45) if mode == "tile" else (32, 48)
    plain, plain_grey = expected(model, image, size), expected(model, image[..., [0, 0, 0]], size)
    assert plain.std() > 0.1 and 0.05 < (plain > 0.5).mean() < 0.95  # or nothing below could fail
    for name in names:
        mask, overlay, found = (read(out / f"{name}_{kind}.png") for kind in ("mask", "overlay", "probability"))
        assert mask.shape == found.shape == (70, 90) and overlay.shape == (70, 90, 3)
        assert mask.dtype == overlay.dtype == np.uint8 and found.dtype == np.uint16
        np.testing.assert_array_equal(mask, np.where(found > 32767, 255, 0))
        if "jpg" in name:
            jpeg = cv2.imread(str(next((folder / "in").glob(f"{name}.*"))))[..., ::-1]
            np.testing.assert_allclose(found / 65535, expected(model, jpeg, size), atol=1e-4)
        elif "deep" in name:
            seen = stretch_to_uint8(deep[..., [0, 0, 0]] if "grey" in name else deep)
            np.testing.assert_allclose(found / 65535, expected(model, seen, size), atol=1e-4)
        elif "grey" in name or name in same:
            np.testing.assert_allclose(found / 65535, plain_grey if "grey" in name else plain, atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 1), (3, 200), (40, 1)])
def test_thin_pictures(workplace, monkeypatch, shape):
    folder, _ = workplace
    cv2.imwrite("thin.png", soft_picture(*shape))
    for mode in ("tile", "resize"):
        assert call(monkeypatch, "thin.png", "--mode", mode) == 0
        assert read(folder / "outputs/tiny/predict/thin_mask.png").shape == shape


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels(tmp_path, monkeypatch, channels):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "models" / "c", input_channels=channels, mean=[0.5] * channels, std=[0.2] * channels)
    cv2.imwrite("a.png", soft_picture())
    assert call(monkeypatch, "a.png") == 0
    assert read("outputs/c/predict/a_mask.png").shape == (70, 90)
    assert read("outputs/c/predict/a_overlay.png").shape == (70, 90, 3)


def test_several_classes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "models" / "two", num_classes=2)
    cv2.imwrite("a.png", soft_picture())
    assert call(monkeypatch, "a.png", "--probability", "--threshold", "0.25") == 0
    out = tmp_path / "outputs" / "two" / "predict"
    [row], objects = rows(out / "images.csv"), rows(out / "objects.csv")
    for k in ("0", "1"):
        mask = read(out / f"a_mask_{k}.png")
        np.testing.assert_array_equal(mask > 0, read(out / f"a_probability_{k}.png") > 0.25 * 65535)
        assert int(row[f"pixels_{k}"]) == (mask > 0).sum()
        assert int(row[f"objects_{k}"]) == sum(o["class"] == k for o in objects) == cv2.connectedComponents(mask)[0] - 1
        assert sum(int(o["area"]) for o in objects if o["class"] == k) == (mask > 0).sum()
    assert not (out / "a_mask.png").exists() and (out / "a_overlay.png").exists()


def test_the_scale_is_the_runs_own_or_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = write_run(tmp_path / "models" / "old", scale=None)
    image = soft_picture()
    cv2.imwrite("a.png", image[..., ::-1])
    for args, size in ((("--mode", "tile"), (70, 90)), (("--scale", "0.3"), (21, 27)), ((), (32, 48))):
        assert call(monkeypatch, "a.png", "--probability", *args) == 0
        assert ("using --scale 1" in capsys.readouterr().out) == ("--mode" in args)
        found = read("outputs/old/predict/a_probability.png") / 65535
        np.testing.assert_allclose(found, expected(model, image, size), atol=1e-4)


@pytest.mark.parametrize(
    "shape, resize, tile",  # at scale 0.5, 32 x 48 are seen of 64 x 96; of 320 x 480 and of 13 x 19 in auto, too
    [
        ((64, 96), True, (32, 48)),
        ((319, 480), True, (160, 240)),
        ((321, 480), False, (160, 240)),
        ((12, 19), False, (6, 10)),
    ],
)
def test_auto_takes_tiles_where_resizing_goes_too_far(shape, resize, tile):
    config = {"input_h": 32, "input_w": 48, "scale": 0.5}

    def size(mode, **changes):
        options = Namespace(mode=mode, scale=None)
        tiled = predict.in_tiles(shape, options, config | changes)
        return predict.seen_size(shape, tiled, options, config | changes)

    assert size("resize") == (32, 48) and size("tile") == tile
    assert size("auto") == ((32, 48) if resize else tile)
    assert size("auto", scale=None) == (32, 48) and size("tile", scale=None) == shape


METADATA = {"axes": "TCYX", "PhysicalSizeX": 325, "PhysicalSizeY": 325}
METADATA |= {"PhysicalSizeXUnit": "nm", "PhysicalSizeYUnit": "nm"}


def test_pages_and_channels(workplace, monkeypatch):
    """A time series of two channels: the mask of a page is that of the same plane as an 8-bit picture."""
    folder, _ = workplace
    out = folder / "outputs" / "tiny" / "predict"
    image = soft_picture()
    series = np.stack([np.stack([image[..., k], 255 - image[..., k]]) for k in range(3)])  # (T, C, Y, X)
    tifffile.imwrite("series.tif", series, ome=True, metadata=METADATA, photometric="minisblack")
    assert call(monkeypatch, "series.tif", "--channels", "1", "--mode", "resize") == 0
    assert {row["um_per_pixel"] for row in rows(out / "images.csv")} == {"0.325"}
    names = [f"series_p00{k}" for k in range(3)]
    assert [row["image"] for row in rows(out / "images.csv")] == names
    assert [row["path"] for row in rows(out / "images.csv")] == [
        str(Path(f"series.tif, page {k}").absolute()) for k in range(3)
    ]
    masks = [read(out / f"{name}_mask.png") for name in names]
    for k in range(3):
        cv2.imwrite("plane.png", series[k, 1])
        assert call(monkeypatch, "plane.png", "--mode", "resize") == 0
        np.testing.assert_array_equal(read(out / "plane_mask.png"), masks[k])
    assert call(monkeypatch, "series.tif", "--channels", "1,0,0", "--page", "2") == 0
    assert {row["image"] for row in rows(out / "images.csv")} == {*names, "plane"}
    assert "channels 1,0,0" in rows(out / "images.csv")[-1]["settings"]


def test_names_of_pages_and_files_do_not_meet(workplace, monkeypatch):
    tifffile.imwrite("a.tif", np.stack([soft_picture()[..., 0]] * 2), photometric="minisblack")
    cv2.imwrite("a_p001.png", soft_picture())
    assert call(monkeypatch, "a.tif", "a_p001.png") == 0
    names = [row["image"] for row in rows("outputs/tiny/predict/images.csv")]
    assert len(names) == len({name.casefold() for name in names}) == 3 and "a_p000" in names


# ---------------------------------------------------------------- what is printed, and the page


def test_what_a_call_did_is_one_line_and_odd_pictures_are_named(workplace, monkeypatch, capsys):
    for name in ("a", "b"):
        cv2.imwrite(f"{name}.png", soft_picture(64, 96))
    cv2.imwrite("large.png", soft_picture(400, 480))
    assert call(monkeypatch, "a.png", "b.png", "large.png") == 0
    images = rows("outputs/tiny/predict/images.csv")
    assert [(row["mode"], row["scale"]) for row in images] == [("resize", "0.5")] * 2 + [("tile", "0.5")]
    seconds = sum(float(row["seconds"]) for row in images) / 3
    objects = sum(int(row["objects"]) for row in images)
    said = f"3 pictures, {objects:,} objects; 2 resized, 1 in tiles, scale 0.5; {seconds:.2f} s per picture\n"
    out, err = capsys.readouterr()
    assert out.endswith(f"outputs/tiny/predict: {said}") and "warning" not in err
    assert call(monkeypatch, "a.png", "b.png", "--threshold", "1") == 0
    assert "warning: no foreground in 2 of 2 pictures: a, b; look at" in capsys.readouterr().err
    monkeypatch.setattr(predict, "predict_tiled", lambda *_: np.full((1, 1, 32, 48), 65535, np.uint16))
    assert call(monkeypatch, "a.png") == 0
    assert "warning: nothing but foreground in 1 of 1 pictures: a; look at" in capsys.readouterr().err


def test_the_page_shows_the_pictures_of_all_calls(workplace, monkeypatch, capsys):
    for name in ("a", "b<i>"):
        cv2.imwrite(f"{name}.png", soft_picture(700, 900))
        assert call(monkeypatch, f"{name}.png", "--html") == 0
    assert capsys.readouterr().out.endswith("open outputs/tiny/predict/report.html\n")
    page = Path("outputs/tiny/predict/report.html").read_text()
    pictures = re.findall(r'<img src="data:image/jpeg;base64,([^"]+)"', page)
    sizes = [cv2.imdecode(np.frombuffer(base64.b64decode(data), np.uint8), 1).shape for data in pictures]
    assert sizes == [(498, 640, 3)] * 2 and "b&lt;i&gt;" in page and "b<i>" not in page
    table = Path("outputs/tiny/predict/images.csv")
    table.write_text(re.sub(r",0\.\d+,\d+,(?=[^,]+,)", ",,?,", table.read_text()))  # as by hand
    assert call(monkeypatch, "a.png", "--html", "--resume") == 0
    monkeypatch.setattr(predictions, "ON_PAGE", 1)
    opened = []
    monkeypatch.setattr("webbrowser.open", lambda address: opened.append(address) or True)
    assert call(monkeypatch, "a.png", "--open") == 0
    assert opened == [Path("outputs/tiny/predict/report.html").resolve().as_uri()]
    page = Path("outputs/tiny/predict/report.html").read_text()
    assert "The first 1 of 2 pictures." in page and page.count("data:image/jpeg") == 1


# ---------------------------------------------------------------- several calls, one folder


def content(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_a_second_call_replaces_its_own_names_and_nothing_else(workplace, monkeypatch):
    for name in ("a", "b"):
        cv2.imwrite(f"{name}.png", soft_picture())
    out = workplace[0] / "outputs" / "tiny" / "predict"
    assert call(monkeypatch, "a.png", "--probability") == 0
    (out / "hand_corrected_mask.png").write_text("mine")
    Path("bad.png").write_text("no picture")
    before = content(out)
    with pytest.raises(ValueError):
        call(monkeypatch, "bad.png")
    assert content(out) == before
    assert call(monkeypatch, "b.png") == 0
    after = content(out)
    assert set(after) - set(before) == {"b_mask.png", "b_overlay.png"}
    assert {name for name in before if after[name] != before[name]} == {"images.csv", "objects.csv"}
    for table in ("images.csv", "objects.csv"):
        assert {row["image"] for row in rows(out / table)} == {"a", "b"}

    count = len(rows(out / "objects.csv"))
    table = pd.read_csv(out / "images.csv").assign(remark="by hand")  # as a spreadsheet would save it
    table.to_csv(out / "images.csv", index=False, encoding="utf-8-sig")
    cv2.imwrite("a.png", np.zeros((30, 40, 3), np.uint8))
    assert call(monkeypatch, "a.png", "--threshold", "1") == 0  # nothing is above it
    b, a = rows(out / "images.csv")
    assert (a["image"], a["width"], a["objects"], a["remark"]) == ("a", "40", "0", "")
    assert (b["image"], b["remark"]) == ("b", "by hand") and len(rows(out / "objects.csv")) == count / 2


def test_output_takes_another_folder_but_not_that_of_the_pictures(workplace, monkeypatch):
    Path("in").mkdir()
    for name in ("a.png", "a_mask.png"):  # the second is a label by hand
        cv2.imwrite(f"in/{name}", soft_picture())
    before = content("in")
    for paths in (["in"], ["in/a.png"], ["in/*.png"]):
        with pytest.raises(ValueError, match="in is the pictures' own folder, .*; give another --output"):
            call(monkeypatch, *paths, "--output", "in")
    with pytest.raises(ValueError, match="in/a.png is a file"):
        call(monkeypatch, "in", "--output", "in/a.png")
    assert call(monkeypatch, "in", "--output", "new/results") == 0
    assert content("in") == before and not Path("outputs").exists()
    assert {path.name for path in Path("new/results").glob("*_overlay.png")} == {"a_overlay.png", "a_mask_overlay.png"}


def test_folders_with_equal_names_share_an_output(workplace, monkeypatch):
    """Results of another call's picture are never replaced; those of the same picture are."""
    for folder, height in (("A", 20), ("B", 30)):
        Path(folder).mkdir()
        cv2.imwrite(f"{folder}/cell.png", soft_picture(height, 40))
    for path in ("A", "B", "A/cell.png", "./B"):
        assert call(monkeypatch, path, "--output", "out") == 0
    assert {row["image"]: row["height"] for row in rows("out/images.csv")} == {"cell": "20", "B_cell": "30"}
    assert read("out/cell_mask.png").shape == (20, 40) and read("out/B_cell_mask.png").shape == (30, 40)


def test_an_interrupted_call_goes_on_with_resume(workplace, monkeypatch, capsys):
    for name in ("a", "b", "c"):
        cv2.imwrite(f"{name}.png", soft_picture())
    calls = []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return predict_tiled(*args)

    monkeypatch.setattr(predict, "predict_tiled", interrupted)
    words = ("a.png", "b.png", "c.png", "--batch_size", "1")
    with pytest.raises(KeyboardInterrupt):
        call(monkeypatch, *words)
    said = "2 of 3 pictures are done; repeat the command with --resume to continue"
    assert said in capsys.readouterr().out
    assert [row["image"] for row in rows("outputs/tiny/predict/images.csv")] == ["a", "b"]
    Path("outputs/tiny/predict/a_overlay.png").unlink()  # then it is not done
    assert call(monkeypatch, *words, "--resume") == 0
    assert "1 of 3 pictures are done already" in capsys.readouterr().out and len(calls) == 5
    assert [row["image"] for row in rows("outputs/tiny/predict/images.csv")] == ["b", "a", "c"]
    assert call(monkeypatch, *words, "--resume") == 0 and len(calls) == 5
    with monkeypatch.context() as patch:  # as if killed: files of other results, and no rows
        patch.setattr(MaskResults, "write_tables", lambda _: None)
        assert call(patch, "a.png", "--threshold", "0.9") == 0
    assert call(monkeypatch, *words, "--resume") == 0
    assert "2 of 3 pictures are done already" in capsys.readouterr().out
    del calls[5:]
    assert call(monkeypatch, *words, "--resume", "--threshold", "0.6") == 0 and len(calls) == 8  # other results
    Path("models/tiny").rename("models/old")
    write_run(Path("models/tiny"), scale=0.7)  # the name stands for another run now
    assert call(monkeypatch, *words, "--resume", "--threshold", "0.6") == 0 and len(calls) == 11


def test_tables_are_saved_while_a_long_call_is_at_work(workplace, monkeypatch):
    """What kill -9 leaves can be resumed."""
    for name in ("a", "b"):
        cv2.imwrite(f"{name}.png", soft_picture())
    monkeypatch.setattr(predictions, "SAVE_SECONDS", 0)
    seen = []

    def tiled(*args):
        path = Path("outputs/tiny/predict/images.csv")
        seen.append([row["image"] for row in rows(path)] if path.exists() else None)
        return predict_tiled(*args)

    monkeypatch.setattr(predict, "predict_tiled", tiled)
    assert call(monkeypatch, "a.png", "b.png", "--batch_size", "1") == 0
    assert seen == [None, ["a"]]
    objects = rows("outputs/tiny/predict/objects.csv")
    assert len(objects) == sum(int(row["objects"]) for row in rows("outputs/tiny/predict/images.csv")) > 0


def test_large_tables_are_saved_less_often(tmp_path, monkeypatch):
    """Saving copies the whole table, so the time between two saves grows with it."""
    monkeypatch.setattr(predictions, "SAVE_SECONDS", 0)
    results = MaskResults(tmp_path, {}, "")
    results.saving = 1000.0
    results.keep({"image": "a", "path": "a.png"}, [], [])
    assert not (tmp_path / "images.csv").exists()
    results.saving = 0.0
    results.keep({"image": "b", "path": "b.png"}, [], [])
    assert [row["image"] for row in rows(tmp_path / "images.csv")] == ["a", "b"]


@pytest.mark.parametrize(
    ("table", "text", "expected_words"),
    [
        ("images.csv", "a;b\n1;2\n", "has no column 'image'"),
        ("objects.csv", "\n", "has no column 'image'"),
        ("images.csv", "image,path\n../../x,a.png\n", "is damaged"),
        ("images.csv", "image,path\na,\n", "is damaged"),
        ("images.csv", 'image,path\na,"' + "x" * 200_000 + '"\n', "not a readable table"),
    ],
)
def test_a_table_that_cannot_be_continued_is_refused_before_the_work(
    workplace, monkeypatch, table, text, expected_words
):
    cv2.imwrite("a.png", soft_picture())
    Path("out").mkdir()
    Path("out", table).write_text(text)
    with pytest.raises(ValueError, match=expected_words):
        call(monkeypatch, "a.png", "--output", "out")
    assert content("out") == {table: text.encode()}


def test_tta_from_the_command_line(workplace, monkeypatch):
    _, model = workplace
    image = soft_picture(64, 96)
    cv2.imwrite("a.png", image[..., ::-1])
    assert call(monkeypatch, "a.png", "--tta", "--probability", "--mode", "resize") == 0
    small, turned = squeeze(image, (32, 48)), []
    for flip_y, flip_x, transpose in itertools.product((1, -1), (1, -1), (False, True)):
        seen = np.ascontiguousarray(small[::flip_y, ::flip_x])
        seen = np.ascontiguousarray(seen.swapaxes(0, 1)) if transpose else seen
        found = expected(model, seen, seen.shape[:2])
        turned.append((found.T if transpose else found)[::flip_y, ::flip_x])
    average = cv2.resize(np.mean(turned, axis=0), (96, 64), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_allclose(read("outputs/tiny/predict/a_probability.png") / 65535, average, atol=1e-4)


# ---------------------------------------------------------------- files and names


def test_output_names():
    def names(*paths):
        return list(output_names([Path(path) for path in paths]).values())

    assert names("x/a.png", "x/b.png") == ["a", "b"]
    assert names("x/a.png", "y/a.png") == ["x_a", "y_a"]
    assert names("x/a.png", "x/a.jpg") == ["x_a", "x_a_2"]
    assert names("1/x/a.png", "2/x/a.png", "3/x/A.png") == ["x_a", "x_a_2", "x_A_3"]
    paths = [Path(path) for path in ("x/a.png", "y/a.png", "y/x_a.png", "x/a.tif", "x_a_2.png")]
    found = output_names(paths)
    assert len({name.casefold() for name in found.values()}) == 5
    assert found[Path("y/x_a.png")] == "x_a" and found[Path("x_a_2.png")] == "x_a_2" and found[Path("y/a.png")] == "y_a"
    earlier = output_names([Path("y/a.png"), Path("z/b.png"), Path("x/a.png")], {"a": "x/a.png", "b_1": "gone/b.png"})
    assert earlier == {Path("x/a.png"): "a", Path("y/a.png"): "y_a", Path("z/b.png"): "b"}
    long = names(f"x/{'é' * 120}.png", f"x/{'é' * 119}n.png")
    assert len(set(long)) == 2 and all(len(name.encode()) < 210 for name in long)


def test_the_pages_of_a_file_share_its_name():
    def pages(path, count):
        return [Page(Path(path), k) for k in range(count)]

    def names(files, earlier=()):
        return list(output_names(files, earlier).values())

    assert names(pages("x/cells.tif", 2)) == ["cells_p000", "cells_p001"]
    assert names([*pages("a/c.tif", 2), *pages("b/c.tif", 3)])[2:] == ["b_c_p000", "b_c_p001", "b_c_p002"]
    long = names(pages(f"{'é' * 120}.tif", 2))
    assert [name[-5:] for name in long] == ["_p000", "_p001"] and len(set(long)) == 2
    earlier = {"cells": "x/cells.png"}  # its label TIFF must not become that of the pages
    assert names(pages("x/cells.tif", 2), earlier) == ["x_cells_p000", "x_cells_p001"]
    earlier = {"c_2_p000": "b/c.tif, page 0"}
    assert names([*pages("b/c.tif", 2), Path("b/c_2.png")], earlier) == ["c_2_p000", "c_2_p001", "b_c_2"]
    found = names([Path("cells_p001.png"), *pages("cells.tif", 2)])
    assert found == ["cells_p001", "cells_2_p000", "cells_2_p001"]


def test_equal_stems_do_not_meet(workplace, monkeypatch):
    for number, path in enumerate(("x/a.png", "x/a.jpg", "y/a.png")):
        Path(path).parent.mkdir(exist_ok=True)
        cv2.imwrite(path, soft_picture(20 + number, 30))
    assert call(monkeypatch, "x", "y") == 0
    root = Path.cwd()
    sizes = {row["image"]: (Path(row["path"]), int(row["height"])) for row in rows("outputs/tiny/predict/images.csv")}
    assert sizes == {"x_a": (root / "x/a.jpg", 21), "x_a_2": (root / "x/a.png", 20), "y_a": (root / "y/a.png", 22)}
    for name, (_, height) in sizes.items():
        assert read(f"outputs/tiny/predict/{name}_mask.png").shape == (height, 30)


def test_one_relative_path_from_two_folders(workplace, tmp_path, monkeypatch):
    """Two pictures, each called a.png where the call is made, share an output folder: neither replaces the other."""
    for number, name in enumerate(("x", "y")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "models").symlink_to(Path("models").absolute())
        cv2.imwrite(str(tmp_path / name / "a.png"), soft_picture(20 + number, 30))
    for name in ("x", "y", "x"):
        monkeypatch.chdir(tmp_path / name)
        assert call(monkeypatch, "a.png", "--output", str(tmp_path / "out")) == 0
    found = {row["image"]: (row["path"], row["height"]) for row in rows(tmp_path / "out" / "images.csv")}
    assert found == {"a": (str(tmp_path / "x/a.png"), "20"), "y_a": (str(tmp_path / "y/a.png"), "21")}


def test_batches_hold_pictures_of_one_size(workplace, monkeypatch):
    for number, width in enumerate((30, 30, 30, 40, 30)):
        cv2.imwrite(f"{number}.png", soft_picture(20, width))
    Path("bad.png").write_text("no picture")
    files = [Path(f"{number}.png") for number in (0, 1, 2, 3, 4)]
    files.insert(1, Path("bad.png"))
    config, failed = {"input_channels": 3, "input_h": 32, "input_w": 48}, []

    def sizes(**options):
        given = {"mode": "tile", "scale": 1.0, "max_pixels": 10**6, "batch_size": 2, "channels": None}
        options = Namespace(**given | options)
        return [len(batch) for batch in predict.read_batches(files, options, config, failed)]

    assert sizes() == [2, 1, 1, 1] and [path.name for path, _ in failed] == ["bad.png"]
    assert sizes(mode="resize", batch_size=4) == [4, 1]
    monkeypatch.setattr(predict, "HELD_BYTES", 2 * 20 * 30 * 3)
    assert sizes(mode="resize", batch_size=4) == [2, 1, 1, 1]
    failed.clear()
    assert sizes(scale=100.0) == [] and len(failed) == 6  # 2000 x 3000 pixels to see are more than a million


# ---------------------------------------------------------------- tables and outlines, by hand


def test_tables_by_hand(tmp_path):
    planes = np.zeros((1, 8, 10), np.uint16)
    planes[0, 1:3, 2:6] = 65535  # 8 pixels, centre (3.5, 1.5)
    planes[0, 5, 0], planes[0, 6, 1] = 40000, 32768  # one object, joined by a corner
    planes[0, 7, 9] = 32767  # 0.49999, below the threshold
    image = np.full((8, 10, 3), 100, np.uint8)
    picture = Picture(Path("in/cells.png"), image, image, True, 1.5)
    results = MaskResults(tmp_path / "p", {picture.path: "cells"}, "models/run L4", 0.5, probability=True)
    results.add(picture, planes)
    results.write_tables()
    [row] = rows(tmp_path / "p" / "images.csv")
    assert float(row.pop("seconds")) >= 1.5
    assert row == {
        "image": "cells",
        "path": str(Path("in/cells.png").absolute()),
        "width": "10",
        "height": "8",
        "um_per_pixel": "",
        "mode": "tile",
        "scale": "1.0",
        "pixels": "10",
        "fraction": "0.125",
        "objects": "2",
        "settings": "models/run L4",
    }
    assert (tmp_path / "p" / "objects.csv").read_text().split() == [
        "image,class,object,area,centroid_x,centroid_y,left,top,width,height",
        "cells,0,1,8,3.5,1.5,2,1,4,2",
        "cells,0,2,2,0.5,5.5,0,5,2,2",
    ]
    np.testing.assert_array_equal(read(tmp_path / "p" / "cells_probability.png"), planes[0])
    np.testing.assert_array_equal(read(tmp_path / "p" / "cells_mask.png"), np.where(planes[0] > 32767, 255, 0))
    assert not list((tmp_path / "p").glob(".*"))


def test_outlines_are_the_inner_edge():
    image = np.full((20, 20, 3), 255, np.uint8)
    mask = np.zeros((20, 20), bool)
    mask[5:10, 4:10] = True
    mask[15:, 15:] = True  # at the border of the picture it stays open
    edge = mask.copy()
    edge[6:9, 5:9] = edge[16:, 16:] = False
    drawn = predictions.outline_masks(image, [mask])
    np.testing.assert_array_equal(drawn, np.where(edge[..., None], np.uint8(report.PALETTE[0]), np.uint8(255)))
    two = predictions.outline_masks(image[..., :1], [mask, ~mask])
    assert {tuple(map(int, colour)) for colour in two.reshape(-1, 3)} == {(255,) * 3, *report.PALETTE[:2]}
    wide = predictions.outline_masks(np.zeros((600, 40, 3), np.uint8), [np.ones((600, 40), bool)] * 9)
    assert not wide.any()


# ---------------------------------------------------------------- bad inputs and exit statuses, as a user meets them


def png_that_claims(width, height):
    """A PNG of a few bytes whose header promises width x height pixels."""
    data = bytearray(cv2.imencode(".png", np.zeros((4, 4), np.uint8))[1].tobytes())
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def test_bad_files_are_skipped_and_named(workplace, monkeypatch, capsys):
    folder, _ = workplace
    good = cv2.imencode(".png", soft_picture())[1].tobytes()
    files = {"good.png": good, "cut.png": good[: len(good) // 2], "text.png": b"hello", "empty.jpg": b""}
    files |= {"notes.txt": b"no picture, and not meant to be one", "bomb.png": png_that_claims(60_000, 60_000)}
    (folder / "in").mkdir()
    for name, data in files.items():
        (folder / "in" / name).write_bytes(data)
    tifffile.imwrite(folder / "in" / "two.tif", np.ones((2, 9, 9), np.uint8), metadata={"axes": "CYX"}, ome=True)
    (folder / "gone").mkdir()
    assert call(monkeypatch, "in", "nowhere.png", "gone") == 1
    said = capsys.readouterr()
    about = (
        r"\noutputs/tiny/predict: 1 picture, \d+ objects; resized, scale 0\.\d+; \d\.\d\d s per picture, 7 skipped\n$"
    )
    assert re.search(about, said.out)
    complaints = [line.split(": ", 1)[1] for line in said.err.strip().split("\n") if line.startswith("predict.py: ")]
    assert [line.split(": ")[0] for line in complaints] == [
        "skipped nowhere.png",
        "skipped gone",
        "skipped in/two.tif",
        "skipped in/bomb.png",
        "skipped in/cut.png",
        "skipped in/empty.jpg",
        "skipped in/text.png",
    ]
    assert "has 2 channels (0, 1), expected 1 or 3; choose with predict.py --channels" in complaints[2]
    assert "60000 x 60000 pixels are more than 400,000,000; --max_pixels raises the limit" in complaints[3]
    assert (folder / "outputs/tiny/predict/good_mask.png").is_file()


def test_mistakes_are_one_line_and_status_2(workplace, monkeypatch, capsys):
    folder, _ = workplace
    cv2.imwrite("a.png", soft_picture())
    Path("text.png").write_text("hello")
    Path("empty").mkdir()
    with pytest.raises(SystemExit):
        call(monkeypatch)
    assert "required: PATH" in capsys.readouterr().err
    said = run_script("predict.py", "a.png", "--channels", "1,2", cwd=folder, ok=False)
    assert "--channels: expected one number or three, such as 0 or 2,1,0, found '1,2'" in said.stderr
    said = run_script("predict.py", "text.png", "nowhere.png", cwd=folder, ok=False)
    assert "nothing to predict; nowhere.png: no such file and 1 more" in said.stderr
    for args, expected_words in [
        (["empty"], "nothing to predict; empty: holds no picture"),
        (["a.png", "--name", "other"], "the runs are: tiny"),
        (["a.png", "--max_pixels", "6299"], "90 x 70 pixels are more than 6,299"),
        (["a.png", "--mode", "resize", "--scale", "0.5"], "--scale needs --mode tile"),
        (
            ["a.png", "--max_pixels", "7000", "--scale", "2"],
            "would be enlarged to 180 x 140 pixels; give a smaller --scale",
        ),
        (["a.png", "--page", "1"], "a.png: has no page 1; it has 1, counted from 0"),
        (["a.png", "--channels", "3"], "a.png: has no channel 3; its channels are 0 red, 1 green, 2 blue"),
        (["a.png", "--onnx", "x.onnx", "--level", "2"], "--level does not go with --onnx"),
        (["a.png", "--onnx", "x.onnx"], "x.onnx"),
        (["a.png", "--onnx", "a.png"], "a.png was not written by export.py"),
    ]:
        with pytest.raises((ValueError, OSError), match=expected_words):
            call(monkeypatch, *args, device=())
    assert not Path("outputs").exists()
