"""val.py: its figures against a slow count of the written masks, its files, and what becomes of bad input."""

import contextlib
import html
import io
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import call, run_script, write_data_set

import train
import val

pytestmark = pytest.mark.usefixtures("one_thread")

TRAIN = "--width 4 --lr 0.03 --epochs 6 -b 2 --ema 0 --device cpu --amp off --input_h 47 --input_w 33"
TRAIN += " --augment flips,mild --loss BCEDiceLoss"


@pytest.fixture(scope="module")
def place(tmp_path_factory, one_thread):
    """A folder with a deeply supervised run `two` of two classes and a run `one`, the newer; val.py was run on both.

    -> the folder, and what val.py printed for `two`.
    """
    folder = tmp_path_factory.mktemp("val")
    write_data_set(folder / "inputs" / "two", count=12, size=(47, 33), num_classes=2)
    write_data_set(folder / "inputs" / "one", count=6, size=(47, 33))
    write_data_set(folder / "inputs" / "other", count=3, size=(60, 50), seed=5)
    kept = folder / "outputs" / "two" / "predict" / "mine.png"
    kept.parent.mkdir(parents=True)
    kept.write_text("not val's")
    (folder / "outputs" / "two" / "2024").mkdir()
    (folder / "outputs" / "two" / "0").mkdir()
    (folder / "outputs" / "two" / "0" / "corrected.tif").write_text("not val's either")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        call(patch, train, TRAIN, "--dataset two --num_classes 2 --deep_supervision True --name two")
        call(patch, train, TRAIN, "--dataset one --input_channels 1 --arch UNet --name one")
        with contextlib.redirect_stdout(io.StringIO()) as said:
            call(patch, val, "--name two --amp off --device cpu")
    return folder, said.getvalue()


@pytest.fixture
def go(place, monkeypatch, capsys):
    """go(*options) runs val.main with them -> what it prints."""
    monkeypatch.chdir(place[0])

    def run(*options):
        capsys.readouterr()
        call(monkeypatch, val, "--device cpu", *options)
        return capsys.readouterr()

    return run


def masks(folder, k, ids):
    """{id: bool (H, W)} of the PNG files in folder/<k>."""
    found = {img_id: cv2.imread(str(folder / str(k) / f"{img_id}.png"), cv2.IMREAD_UNCHANGED) for img_id in ids}
    for mask in found.values():
        assert mask.shape == (47, 33) and mask.dtype == np.uint8 and set(np.unique(mask)) <= {0, 255}
    return {img_id: mask > 0 for img_id, mask in found.items()}


def ratio(a, b):
    return a / b if b else 1.0


def test_every_figure_is_that_of_the_written_masks(place):
    folder, said = place
    ids = yaml.safe_load((folder / "models" / "two" / "split.yml").read_text())["val"]
    pooled, per_image = [], {img_id: [] for img_id in ids}
    for k in range(2):
        truth, predicted = masks(folder / "inputs/two/masks", k, ids), masks(folder / "outputs/two", k, ids)
        overlap = {i: int((truth[i] & predicted[i]).sum()) for i in ids}
        union = {i: int((truth[i] | predicted[i]).sum()) for i in ids}
        total = {i: int(truth[i].sum() + predicted[i].sum()) for i in ids}
        assert 0 < sum(overlap.values()) < sum(union.values()), "the run is too poor, or too good, to test with"
        background = {i: int((~truth[i] & ~predicted[i]).sum()) for i in ids}
        missed = sum(union.values()) - sum(overlap.values())
        iou, dice = sum(overlap.values()) / sum(union.values()), 2 * sum(overlap.values()) / sum(total.values())
        miou = (iou + sum(background.values()) / (sum(background.values()) + missed)) / 2
        images = [(ratio(overlap[i], union[i]), ratio(2 * overlap[i], total[i])) for i in ids]
        pooled.append([iou, dice, *np.mean(images, axis=0), iou, miou])
        for i, both in zip(ids, images, strict=True):
            per_image[i].append(both)
    table, _, rest = said[said.index("best epoch") :].partition("last epoch")
    classes = re.search(r"each class.*\nclass .*\n0 +(.*)\n1 +(.*)\n", rest)
    for line, expected in zip(classes.groups(), pooled, strict=True):
        assert [float(value) for value in line.split()][:6] == pytest.approx(expected, abs=5.1e-5)
    heads = {line.split()[0]: [float(v) for v in line.split()[1:]] for line in table.split("\n") if "0." in line}
    assert list(heads) == ["L1", "L2", "L3", "L4", "mean"]
    assert heads["L4"][:6] == pytest.approx(np.mean(pooled, axis=0), abs=5.1e-5)

    rows = pd.read_csv(folder / "outputs/two/metrics.csv").set_index("img_id")
    assert rows.index.tolist() == ids
    for i in ids:
        assert rows.loc[i, ["iou", "dice"]].tolist() == pytest.approx(np.mean(per_image[i], axis=0), abs=1e-9)
    log = pd.read_csv(folder / "models/two/log.csv")
    assert log.val_iou.max() == pytest.approx(np.mean(pooled, axis=0)[0], abs=1e-9)


def test_the_headline_has_its_interval_and_every_metric_its_definition(place, go):
    said = place[1]
    iou, low, high = map(float, re.search(r"IoU (\S+) \((\S+) to (\S+), 95 % bootstrap", said).groups())
    assert 0 < low < iou < high < 1
    assert all(heading in said for heading in val.HEADINGS.values()) and "outputs/two/report.html" in said
    assert said.split("\n")[1].startswith("IoU ")  # before the tables
    assert "two-class mIoU: " not in said and "--explain" in said
    definitions = go("--name two --explain").out
    page = (place[0] / "outputs" / "two" / "report.html").read_text()
    assert all(text in definitions and text in html.unescape(page) for text in val.DEFINITIONS.values())


def test_earlier_output_is_replaced_and_nothing_else(place):
    output = place[0] / "outputs" / "two"
    written = ["0", "1", "examples.png", "metrics.csv", "report.html"]
    assert sorted(path.name for path in output.iterdir()) == sorted([*written, "2024", "predict"])
    assert (output / "predict" / "mine.png").read_text() == "not val's"
    assert (output / "0" / "corrected.tif").read_text() == "not val's either"


def test_the_report_asks_the_network_for_nothing_and_names_the_classes(place):
    page = (place[0] / "outputs" / "two" / "report.html").read_text()
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page) and "url(" not in page and "@import" not in page
    assert "class 0" in page and "class 1" in page and 'data-tag="dark ' in page
    for img_id in yaml.safe_load((place[0] / "models" / "two" / "split.yml").read_text())["val"]:
        assert img_id in page


def test_no_figure_depends_on_the_batch_size(go):
    said, tables, written = [], [], []
    for options in ("-b 1", "-b 2 --num_workers 1", "-b 16"):
        said.append(go("--name two --amp off", options).out)
        tables.append(Path("outputs/two/metrics.csv").read_bytes())
        written.append([path.read_bytes() for path in sorted(Path("outputs/two").glob("[01]/*.png"))])
    assert said[0] == said[1] == said[2] and tables[0] == tables[1] == tables[2]
    assert written[0] == written[1] == written[2] and len(written[0]) == 6


def test_newest_run_other_data_and_splits(go, place):
    def own():
        return {path: path.read_bytes() for path in Path("outputs/one").glob("*") if path.is_file()}

    assert go().out.startswith("models/one: one, validation images of the run, 2 images")
    before = own()
    assert go("--dataset other").out.startswith("models/one: other, images of the folder, 3 images")
    ids = [f"img{k:02d}" for k in range(6)]
    Path("mine.yml").write_text(yaml.safe_dump({"train": ids[:2], "val": ids[2:3], "test": ids[3:]}))
    assert go("--split mine.yml").out.startswith("models/one: one, test ids of mine.yml, 3 images")
    for folder, expected in (("dataset_other", ids[:3]), ("split_mine", ids[3:])):
        assert sorted(path.stem for path in Path("outputs/one", folder, "0").iterdir()) == expected
        assert (Path("outputs/one") / folder / "report.html").is_file()
    assert before and own() == before


def test_warns_when_the_data_have_changed(go):
    assert "warning" not in go("--name one").err
    val_id = yaml.safe_load(Path("models/one/split.yml").read_text())["val"][0]
    path = Path(f"inputs/one/masks/0/{val_id}.png")
    before = path.read_bytes()
    path.write_bytes(cv2.imencode(".png", np.zeros((47, 33), np.uint8))[1].tobytes())
    try:
        said = "inputs/one is not what models/one was trained on: the val images or masks have other contents\n"
        assert go("--name one").err.endswith(f"val.py: warning: {said}")
    finally:
        path.write_bytes(before)


def test_says_which_images_are_gone_or_new(go):
    split = yaml.safe_load(Path("models/one/split.yml").read_text())
    image, mask = (Path("inputs/one") / kind / f"{split['train'][0]}.png" for kind in ("images", "masks/0"))
    image.rename("kept.png")
    shutil.copy("kept.png", "inputs/one/images/zz.png")
    try:
        said = go("--name one").err
        assert f"trained on: 1 of its images are gone ({split['train'][0]}); 1 images are new (zz)\n" in said
        assert "val images" not in said
    finally:
        Path("inputs/one/images/zz.png").unlink()
        Path("kept.png").rename(image)
    lost = Path("inputs/one/images") / f"{split['val'][0]}.png"
    lost.rename("kept.png")
    try:
        with pytest.raises(ValueError, match=f"lacks 1 of 2 validation images of the run: {split['val'][0]}$"):
            go("--name one")
    finally:
        Path("kept.png").rename(lost)


def test_says_when_the_images_have_another_size(go):
    shutil.copytree("inputs/one", "kept")
    try:
        for path in Path("inputs/one").rglob("*.png"):
            picture = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
            cv2.imwrite(str(path), cv2.resize(picture, (66, 94), interpolation=cv2.INTER_NEAREST))
        assert "trained on: the val images were 33 x 47, now 66 x 94\n" in go("--name one").err
    finally:
        shutil.rmtree("inputs/one")
        Path("kept").rename("inputs/one")


def test_a_copied_run_judges_files_of_other_kinds(go):
    """Its report has the name of its folder, and the files of --dataset their own endings."""
    shutil.copytree("models/one", "models/copy")
    shutil.copytree("inputs/other", "inputs/bitmaps")
    for path in Path("inputs/bitmaps").rglob("*.png"):
        cv2.imwrite(str(path.with_suffix(".bmp")), cv2.imread(str(path), cv2.IMREAD_UNCHANGED))
        path.unlink()
    try:
        said = [go("--name", name, "--dataset", data).out for name, data in (("one", "other"), ("copy", "bitmaps"))]
        tables = [pd.read_csv(f"outputs/{name}/metrics.csv") for name in ("one/dataset_other", "copy/dataset_bitmaps")]
        assert tables[0].equals(tables[1]) and said[1].startswith(
            "models/copy: bitmaps, images of the folder, 3 images"
        )
        assert "<h1>copy: UNet</h1>" in Path("outputs/copy/dataset_bitmaps/report.html").read_text()
    finally:
        shutil.rmtree("models/copy")
        shutil.rmtree("inputs/bitmaps")


def test_images_with_and_without_a_twin_are_scored_apart(go):
    path = Path("models/two/split.yml")
    before = path.read_text()
    split = yaml.safe_load(before)
    first, *others = split["val"]
    none, way = {"identical": {}, "seam": {}, "alike": {}}, {"seam": {first: split["train"][0]}}
    path.write_text(yaml.safe_dump({**split, "twins": none | way}))
    try:
        said = go("--name two --amp off").out
        rows = pd.read_csv("outputs/two/metrics.csv").set_index("img_id")

        def pooled(ids):
            of = rows.loc[ids]
            parts = [(of[f"intersection_{k}"].sum(), (of[f"predicted_{k}"] + of[f"true_{k}"]).sum()) for k in (0, 1)]
            return np.mean([overlap / (total - overlap) for overlap, total in parts])

        one, two = pooled([first]), pooled(others)
        assert f"IoU {one:.4f} on the 1 images with a look-alike in training, {two:.4f} on the 2 others" in said
        assert said.split("\n")[2] in Path("outputs/two/report.html").read_text()
        way = {"seam": dict.fromkeys(split["val"], split["train"][0])}
        path.write_text(yaml.safe_dump({**split, "twins": none | way}))
        assert "each of the 3 images has a look-alike in training" in go("--name two --amp off").out
        path.write_text(yaml.safe_dump({**split, "twins": none}))
        assert "look-alike" not in go("--name two --amp off").out
    finally:
        path.write_text(before)


def test_images_that_were_trained_on_are_named(go):
    split = yaml.safe_load(Path("models/one/split.yml").read_text())
    said = go("--name one --dataset one").err
    assert (
        f"warning: models/one was trained on 4 of 6 images of the folder: {', '.join(sorted(split['train'])[:3])}"
        in said
    )
    assert "warning" not in go("--name one --dataset other").err


def test_bfloat16_and_float32_agree(go):
    """On 134 real images the pooled IoU differs by 0.0001 (README); here few pixels may change sides."""
    planes = []
    for amp in ("off", "bf16"):
        go("--name two", "--amp", amp)
        planes.append([masks(Path("outputs/two"), k, pd.read_csv("outputs/two/metrics.csv").img_id) for k in (0, 1)])
    pairs = [(plane, other[k]) for one, other in zip(*planes, strict=True) for k, plane in one.items()]
    assert np.mean([plane.mean() for plane, _ in pairs]) > 0.02 and np.mean([(a != b).mean() for a, b in pairs]) < 0.01


def test_refuses_spoilt_weights_and_what_is_not_there(go):
    shutil.copytree("models/one", "models/spoilt")
    try:
        torch.save({"model": {"a": torch.zeros(1)}}, "models/spoilt/last.pth")
        with pytest.raises(ValueError, match=r"last\.pth does not hold the weights"):
            go("--name spoilt")
        assert not Path("outputs/spoilt").exists()
        shutil.copy("models/two/model.pth", "models/spoilt/model.pth")
        with pytest.raises(ValueError, match=r"model\.pth does not hold the weights of the UNet"):
            go("--name spoilt")
        Path("models/spoilt/model.pth").write_bytes(b"junk")
        with pytest.raises(ValueError, match="is not a checkpoint"):
            go("--name spoilt")
        Path("models/spoilt/config.yml").write_text("a: 1")
        with pytest.raises(ValueError, match="is not from a run of train.py"):
            go("--name spoilt")
    finally:
        shutil.rmtree("models/spoilt")
    for options, match in (
        ("--name nope", "the runs are: one, two"),
        ("--name a/b", "plain name"),
        ("--name ..", "plain name"),
        ("--name one --dataset nope", "no such folder in inputs/; the data sets are: one, other, two; "),
        ("--name two --dataset one", r"inputs/one/masks has 1 class folder\(s\), but models/two predicts 2 class"),
        (
            "--name one --dataset inputs/two",
            r"inputs/two/masks has 2 class folder\(s\), but models/one predicts 1 class",
        ),
        ("--name one --split nope.yml", "no such file"),
        ("--name one --split models/one/split.yml", "no `test:` ids"),
    ):
        with pytest.raises((ValueError, OSError), match=match):
            go(options)


def test_a_mistake_is_one_line_and_status_2(tmp_path):
    result = run_script("val.py", cwd=tmp_path, ok=False)
    assert result.stderr == ("val.py: error: no trained run in models/; train one first: python train.py --name run1\n")
