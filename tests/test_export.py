"""export.py: the file against PyTorch at many sizes, alone in a folder of its own, and as a user runs the script."""

import contextlib
import io
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from conftest import call, write_data_set, write_label_set
from test_inference import soft_picture, write_run

import export
import predict
import train
import val
from archs import NestedUNet, UNet
from inference import OnnxPredictor, Predictor
from instances import judge
from nuclei.find import find_nuclei
from nuclei.scaling import stretch_picture, zoom

onnx = pytest.importorskip("onnx", reason="needs requirements-onnx.txt")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs requirements-onnx.txt")
pytest.importorskip("onnxscript", reason="needs requirements-onnx.txt")

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = [(1, 16, 16), (2, 40, 56), (1, 1, 1), (3, 33, 15), (1, 130, 64), (2, 7, 97)]


def session_of(path):
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def by_hand(model, images, mean, std):
    """uint8 (N, H, W, C) -> probabilities (N, H, W, classes), every step written out in numpy but the network."""
    height, width = images.shape[1:3]
    edges = ((0, 0), (0, -height % 16), (0, -width % 16), (0, 0))
    values = (np.pad(images, edges, mode="edge") / 255 - mean) / std
    with torch.no_grad():
        output = model(torch.tensor(values.transpose(0, 3, 1, 2), dtype=torch.float32))
    heads = output if isinstance(output, list) else [output]
    probabilities = np.mean([1 / (1 + np.exp(-head.double().numpy())) for head in heads], axis=0)
    return probabilities.transpose(0, 2, 3, 1)[:, :height, :width]


@pytest.mark.parametrize(
    ("model", "channels", "classes"),
    [
        pytest.param(lambda: NestedUNet(2, 3, deep_supervision=True, width=2), 3, 2, marks=pytest.mark.slow),
        (lambda: NestedUNet(1, 1, width=4, deep_supervision=True).prune(2), 1, 1),
        pytest.param(lambda: UNet(1, 4, width=2), 4, 1, marks=pytest.mark.slow),
    ],
    ids=["mean of heads", "pruned, grey", "UNet, RGBA"],
)
def test_the_file_is_the_model_at_every_size(model, channels, classes, tmp_path):
    torch.manual_seed(0)
    model, mean, std = model().eval(), [0.1, 0.2, 0.3, 0.4][:channels], [0.3, 0.25, 0.2, 0.15][:channels]
    export.write_onnx(export.Deployed(model, mean, std), tmp_path / "m.onnx", channels, {"name": "x", "threshold": 0.5})
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]  # the weights are inside
    content = (tmp_path / "m.onnx").read_bytes()
    assert b"site-packages" not in content and b"archs.py" not in content  # nothing of this machine

    session = session_of(tmp_path / "m.onnx")
    (images,), (output,) = session.get_inputs(), session.get_outputs()
    assert (images.name, images.type, images.shape) == ("images", "tensor(uint8)", ["N", "H", "W", channels])
    assert (output.name, output.type, output.shape) == ("probabilities", "tensor(float)", ["N", "H", "W", classes])
    assert session.get_modelmeta().custom_metadata_map == {"name": "x", "threshold": "0.5"}
    rng = np.random.default_rng(0)
    for number, height, width in SIZES:
        batch = rng.integers(0, 256, (number, height, width, channels), np.uint8)
        [found] = session.run(None, {"images": batch})
        expected = by_hand(model, batch, mean, std)
        assert found.shape == (number, height, width, classes) and found.dtype == np.float32
        assert np.abs(found - expected).max() < 1e-5 and (expected.std() > 0 or (height, width) == (1, 1))


# ---------------------------------------------------------------- as a user runs it


def told(patch, script, *options):
    """What script.main() prints."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert not call(patch, script, *options)
    return said.getvalue()


@pytest.fixture(scope="module")
def exported(tmp_path_factory, one_thread):
    """A folder with a tiny run of two classes, models/tiny, whose level 2 was exported -> it, what export.py said."""
    folder = tmp_path_factory.mktemp("export")
    write_data_set(folder / "inputs" / "cells", size=(24, 32), num_classes=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        options = "--num_classes 2 --width 2 --input_w 32 --input_h 24 --epochs 1 --device cpu"
        call(patch, train, "--dataset cells --name tiny --deep_supervision True", options)
        return folder, told(patch, export, "--name tiny --level 2")


@pytest.fixture
def run(exported, monkeypatch):
    monkeypatch.chdir(exported[0])
    return exported[0]


@pytest.fixture
def go(monkeypatch):
    """go(script, *options) runs script.main() in the current folder -> what it prints."""
    return lambda script, *options: told(monkeypatch, script, *options)


def refused(go, script, *options):
    with pytest.raises((ValueError, OSError)) as caught:
        go(script, *options)
    return str(caught.value)


def test_export_as_a_user(exported, run, go):
    said = exported[1]
    assert "ONNX Runtime and PyTorch on 2 validation images of inputs/cells, largest and mean difference" in said
    assert "24 x 32" in said and "33 x 26" in said and "11 x 39" in said
    path = run / "outputs" / "tiny" / "tiny_L2.onnx"
    about = session_of(path).get_modelmeta().custom_metadata_map
    expected = {"name": "tiny", "arch": "NestedUNet", "num_classes": "2", "input_channels": "3"}
    expected |= {"input_h": "24", "input_w": "32", "level": "2", "threshold": "0.5"}
    assert expected.items() <= about.items()
    images = np.stack([cv2.imread(str(run / f"inputs/cells/images/img0{k}.png"))[..., ::-1] for k in range(2)])
    assert session_of(path).run(None, {"images": images})[0].shape == (2, 24, 32, 2)

    written = path.read_bytes()
    error = refused(go, export, "--name tiny --level 2")
    assert "tiny_L2.onnx exists; give --overwrite" in error and path.read_bytes() == written


@pytest.mark.slow
def test_mean_of_heads_to_a_file_of_the_users_without_the_data(run, go, tmp_path, monkeypatch):
    shutil.copytree(run / "models", tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    output = tmp_path / "new" / "all.onnx"
    output.parent.mkdir()
    output.write_text("an older file")
    said = go(export, "--level mean --output", output, "--overwrite")
    assert "4 generated images (inputs/cells/images is gone)" in said
    assert session_of(output).get_modelmeta().custom_metadata_map["level"] == "mean"
    assert [path.name for path in output.parent.iterdir()] == ["all.onnx"]


def test_int8_beside_the_float_file(run, go):
    """A quarter of the weights' bytes, convolutions in whole numbers, about the same answer; predict.py takes it."""
    said = go(export, "--name tiny --level 2 --int8")
    assert "calibrated on 4 training images of inputs/cells" in said and "precision int8" in said
    path = run / "outputs" / "tiny" / "tiny_L2_int8.onnx"
    assert sorted(file.name for file in path.parent.glob("*.onnx")) == ["tiny_L2.onnx", path.name]
    exact, rounded = session_of(path.with_name("tiny_L2.onnx")), session_of(path)
    assert rounded.get_modelmeta().custom_metadata_map["precision"] == "int8"
    types = {tensor.data_type for tensor in onnx.load(path).graph.initializer if len(tensor.dims) == 4}
    assert types == {onnx.TensorProto.INT8}  # every convolution's weights
    images = np.stack([cv2.imread(str(run / f"inputs/cells/images/img0{k}.png"))[..., ::-1] for k in range(4)])
    (a,), (b,) = (session.run(None, {"images": images}) for session in (exact, rounded))
    assert a.shape == b.shape and 0 < np.abs(a - b).max() < 0.1 and np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.95
    go(predict, "--onnx", path, "inputs/cells/images/img00.png")


def test_images_to_calibrate_with(run, tmp_path, monkeypatch):
    """Of the training images every other one where half of them do; generated ones where they are gone."""
    config = yaml.safe_load(Path("models/tiny/config.yml").read_text())
    ids = yaml.safe_load(Path("models/tiny/split.yml").read_text())["train"]
    images, source = export.images_of(config, "train", 2)
    assert source == "2 training images of inputs/cells"
    for image, img_id in zip(images, ids[::2], strict=True):
        np.testing.assert_array_equal(image, cv2.imread(f"inputs/cells/images/{img_id}.png")[..., ::-1])
    shutil.copytree(run / "models", tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    images, source = export.images_of(config | {"input_channels": 1}, "train", 3)
    assert source == "3 generated images (inputs/cells/images is gone)" and {image.shape[2] for image in images} == {1}


def test_differences_by_hand(tmp_path, monkeypatch):
    """Two pixels of four differ, by 0.2 and 0.4; one crosses the threshold."""
    answers = {"onnx": np.float32([[[[0.4], [0.9]], [[0.7], [0.2]]]]), "torch": [[[[0.6], [0.9]], [[0.7], [0.6]]]]}
    answers["torch"][0][0][0][0] = 0.2  # 0.4 here and 0.2 there: both below 0.5
    session = type("Session", (), {"run": lambda *_: [answers["onnx"]]})()
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: session)
    args = lambda images: torch.tensor(answers["torch"]), "x", [np.zeros((2, 2, 3), np.uint8)], [(2, 2)]
    assert export.differences(*args, {})[2, 2] == pytest.approx((0.4, 0.15, 0.25))


def test_of_the_maps_of_nuclei_the_first_is_a_mask(monkeypatch):
    """One pixel of two crosses 0.35 in the first map; in the other maps both do."""
    session = type("Session", (), {"run": lambda *_: [np.float32([[[[0.3, 0.9, 0.9], [0.6, 0.9, 0.9]]]])]})()
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: session)
    config = {"target": "instances", "mask_threshold": 0.35}
    expected = torch.tensor([[[[0.4, 0.1, 0.1], [0.6, 0.1, 0.1]]]])
    found = export.differences(lambda images: expected, "x", [np.zeros((1, 2, 3), np.uint8)], [(1, 2)], config)
    assert found[1, 2][2] == 0.5


def test_a_file_that_differs_is_not_written(run, go, monkeypatch):
    monkeypatch.setattr(export, "write_onnx", lambda *_: None)
    monkeypatch.setattr(export, "differences", lambda *_: {(24, 32): (2e-4, 1e-5, 0.0)})
    said = refused(go, export, "--name tiny --level 1")
    assert said.endswith("L1.onnx was not written: ONNX Runtime and PyTorch differ by 0.0002")
    assert not list(run.glob("outputs/tiny/*L1*"))


def test_a_run_that_is_not_there(run, go):
    assert "the runs are: tiny" in refused(go, export, "--name gone")


def test_a_missing_package_in_one_line(run, go, monkeypatch):
    monkeypatch.setattr(export, "PACKAGES", ("onnx", "onnx_of_tomorrow"))
    said = refused(go, export, "--name tiny --output tomorrow.onnx")
    assert said == "onnx_of_tomorrow is not installed: pip install -r requirements-onnx.txt"
    assert not (run / "tomorrow.onnx").exists()


# ---------------------------------------------------------------- a smaller run


def test_a_run_cut_to_a_level_answers_like_that_level(exported, go, tmp_path, monkeypatch):
    shutil.copytree(exported[0], tmp_path / "here", ignore=shutil.ignore_patterns("outputs"))
    here, folder = tmp_path / "here", tmp_path / "here" / "models" / "small"
    monkeypatch.chdir(here)
    said = go(export, "--name tiny --level 2 --run small")
    whole = NestedUNet(2, 3, deep_supervision=True, width=2)
    assert f"L2, {sum(p.numel() for p in whole.prune(2).parameters()):,} parameters" in said
    assert sorted(path.name for path in folder.iterdir()) == ["config.yml", "model.pth", "split.yml"]

    state = torch.load(folder / "model.pth", weights_only=True)
    of_whole = torch.load(here / "models" / "tiny" / "model.pth", weights_only=True)
    assert state.keys() == whole.prune(2).state_dict().keys()
    for key, value in state.items():
        assert value.dtype == (torch.float16 if of_whole[key].is_floating_point() else torch.int64)
        torch.testing.assert_close(value.to(of_whole[key].dtype), of_whole[key], rtol=2**-11, atol=2**-24)
    split, of_run = (yaml.safe_load((here / "models" / name / "split.yml").read_text()) for name in ("small", "tiny"))
    assert split == {key: of_run[key] for key in ("train", "val", "sizes", "fingerprint", "twins")}

    pictures = "inputs/cells/images"
    of_level = go(predict, pictures, "--name tiny --level 2 --probability --device cpu --amp off")
    of_small = go(predict, pictures, "--name small --probability --device cpu --amp off")
    assert "models/tiny, L2," in of_level and "models/small, L2," in of_small
    files = sorted(path.name for path in (here / "outputs" / "tiny" / "predict").glob("*_probability_*.png"))
    assert len(files) == 12
    for file in files:
        pair = [cv2.imread(str(here / "outputs" / name / "predict" / file), -1) for name in ("tiny", "small")]
        assert np.abs(np.subtract(*pair, dtype=np.int64)).max() < 0.01 * 65535

    scores = go(val, "--name small --device cpu")
    assert "\nL2 " in scores and "\nL4 " not in scores and "last epoch" not in scores
    go(export, "--name small --output small.onnx")
    assert session_of(here / "small.onnx").get_modelmeta().custom_metadata_map["level"] == "2"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for options, expected in (
        ("--level 2 --run small", "models/small/config.yml exists; give --overwrite"),
        ("--run tiny --overwrite", "is the run itself"),
        ("--run new --int8", "--int8 is for an ONNX file"),
        ("--run ../new", "--run '../new': expected the plain name of a folder"),
    ):
        assert expected in refused(go, export, "--name tiny", options)
    for script, options, expected in (
        (predict, "inputs --level 1", "was cut to level 2 and has no other: leave --level out"),
        (val, "--levels", "was cut to level 2"),
        (export, "--run tiny --overwrite", "models/tiny is a training run"),
        (train, "--resume", "was cut to level 2; resume the whole one"),
        (train, "--dataset cells", "models/small exists; --overwrite replaces it"),
        (
            train,
            "--dataset cells --name other --weights small",
            "small is a run cut to level 2; --weights needs",
        ),
    ):
        assert expected in refused(go, script, "--name small", options)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}

    go(export, "--name tiny --level 1 --run small --overwrite")
    assert yaml.safe_load((folder / "config.yml").read_text())["level"] == 1
    go(train, "--config", folder / "config.yml", "--name again --device cpu")  # a recipe, as any config


def test_a_training_before_its_first_epoch_is_not_replaced(exported, go, tmp_path, monkeypatch):
    shutil.copytree(exported[0], tmp_path / "here", ignore=shutil.ignore_patterns("outputs"))
    monkeypatch.chdir(tmp_path / "here")
    folder = tmp_path / "here" / "models" / "begun"
    folder.mkdir()
    (folder / "config.yml").write_text("arch: NestedUNet\n")
    with pytest.raises(FileExistsError, match="models/begun is a training run; give --run another name"):
        go(export, "--name tiny --level 2 --run begun --overwrite")
    assert (folder / "config.yml").read_text() == "arch: NestedUNet\n"


def test_a_run_without_deep_supervision_in_half_precision_is_no_training(tmp_path, go, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_data_set(tmp_path / "inputs" / "cells", count=6)
    options = "--dataset cells --arch UNet --width 2 --input_w 32 --input_h 32 --epochs 1 --device cpu"
    go(train, options, "--augment none --loss BCEDiceLoss --name whole")
    go(export, "--name whole --run small")
    kept = Path("models/small/model.pth").read_bytes()
    assert "was cut to level 4" in refused(go, train, "--name small --resume")
    assert kept == Path("models/small/model.pth").read_bytes()
    assert "\nL4 " in go(val, "--name small --device cpu")


def test_a_run_with_all_its_levels_in_half_precision(exported, go, tmp_path, monkeypatch):
    shutil.copytree(exported[0], tmp_path / "here", ignore=shutil.ignore_patterns("outputs"))
    monkeypatch.chdir(tmp_path / "here")
    assert "models/half: L1, L2, L3, L4, " in go(export, "--name tiny --level mean --run half")
    config = yaml.safe_load(Path("models/half/config.yml").read_text())
    assert config["name"] == "half" and "level" not in config
    assert "is a half-precision export of another run" in refused(go, train, "--name half --resume")
    about, of_run = (yaml.safe_load(Path(f"models/{name}/split.yml").read_text()) for name in ("half", "tiny"))
    assert about["twins"] == of_run["twins"]
    state, whole = (torch.load(f"models/{name}/model.pth", weights_only=True) for name in ("half", "tiny"))
    assert state.keys() == whole.keys()
    assert {value.dtype for value in state.values()} == {torch.float16, torch.int64}
    for level in (2, 4):
        assert f"models/half, L{level}," in go(predict, "inputs/cells/images", f"--name half --level {level}")


# ---------------------------------------------------------------- individual nuclei

FOUND_WITH = {"mask_threshold": 0.4, "contact_threshold": 0.3, "distance_threshold": 0.2, "seed_threshold": 0.5}
FOUND_WITH |= {"smallest": 5, "smoothing": 0, "diameter": 12.0, "stretch": "2,99", "scale": 1.5}


@pytest.fixture(scope="module")
def nuclei_place(tmp_path_factory, one_thread):
    """A folder with models/nuc, a network of random weights with --target instances, exported -> it, what was said."""
    folder = tmp_path_factory.mktemp("nuclei")
    ids = write_label_set(folder / "inputs" / "cells")
    write_run(folder / "models" / "nuc", 3, dataset="cells", stem="full", target="instances", **FOUND_WITH)
    (folder / "models" / "nuc" / "split.yml").write_text(yaml.safe_dump({"train": ids[:4], "val": ids[4:]}))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(export, "TOLERANCE", 1e-3)  # the heads of write_run have large weights
        return folder, told(patch, export, "--name nuc")


@pytest.fixture
def of_nuclei(nuclei_place, monkeypatch):
    monkeypatch.chdir(nuclei_place[0])
    return nuclei_place[0]


def test_an_exported_file_finds_the_nuclei_of_its_run(nuclei_place, of_nuclei):
    said = nuclei_place[1]
    assert "-> maps float32 (N, H, W, 3): mask, contact, distance" in said and "probabilities" not in said
    assert "2 validation images of inputs/cells" in said and "256 x 256" in said
    path = of_nuclei / "outputs" / "nuc" / "nuc_L4.onnx"
    assert [output.name for output in session_of(path).get_outputs()] == ["maps"]
    assert "threshold" not in session_of(path).get_modelmeta().custom_metadata_map
    run, file = Predictor("nuc", "cpu", "off"), OnnxPredictor(path, "cpu")
    assert file.config == {key: run.config[key] for key in file.config} and FOUND_WITH.items() <= file.config.items()
    picture = soft_picture(150, 180)
    for diameter in (None, 20):
        one, other = (find_nuclei(predictor, picture, diameter) for predictor in (run, file))
        assert one.labels.max() >= 3 and one.scale == pytest.approx(other.scale, rel=1e-3)
        assert judge(other.labels, one.labels).counts[0].tolist() == [one.labels.max(), 0, 0]  # AP50 = 1
        assert ((one.labels > 0) != (other.labels > 0)).sum() <= 10  # pixels that rounding moves across the threshold
        np.testing.assert_allclose(one.confidence, other.confidence, atol=1e-3)


@pytest.mark.slow
def test_int8_of_nuclei_is_calibrated_at_their_scale(of_nuclei, go, monkeypatch):
    batches = []
    monkeypatch.setattr(
        export, "quantise", lambda source, path, seen: (batches.extend(seen), shutil.copy(source, path))
    )
    said = go(export, "--name nuc --int8")
    assert "calibrated on 4 training images of inputs/cells" in said and "nuc_L4_int8.onnx" in said
    [batch] = batches
    assert batch.shape == (4, 256, 256, 3) and batch.max() == 255  # stretched: the files have 219 at most


def test_a_small_picture_goes_on_as_in_a_mirror():
    """Nuclei of 6 pixels are shown twice as large: 120 x 144 in the middle of 256 x 256."""
    config = {"target": "instances", "input_h": 32, "input_w": 48, "input_channels": 3, **FOUND_WITH}
    picture = soft_picture(60, 72)
    view = export.view_of(picture, 6.0, config)
    seen = zoom(stretch_picture(picture, config), 2)
    np.testing.assert_array_equal(view[68:188, 56:200], seen)
    np.testing.assert_array_equal(view[38:68, 56:200], seen[:30][::-1])
    np.testing.assert_array_equal(view[68:188, 200:250], seen[:, ::-1][:, :50])


def test_of_a_large_picture_the_middle_is_seen():
    """Nuclei of 24 pixels are shown half as large: 512 pixels become 256; without nuclei, the usual scale."""
    config = {"target": "instances", "input_h": 32, "input_w": 48, "input_channels": 3, **FOUND_WITH}
    picture = soft_picture(600, 700)
    stretched = stretch_picture(picture, config)
    np.testing.assert_array_equal(export.view_of(picture, 24.0, config), zoom(stretched[44:556, 94:606], 0.5))
    side = round(256 / 1.5)
    top, left = (600 - side) // 2, (700 - side) // 2
    view = export.view_of(picture, None, config)
    np.testing.assert_array_equal(view[:255], zoom(stretched[top : top + side, left : left + side], 1.5)[:255, :256])


def test_diameters_and_pictures_that_are_gone(of_nuclei, tmp_path, monkeypatch):
    labels = cv2.imread("inputs/cells/labels/img00.png", -1)
    area = np.median(np.bincount(labels.ravel())[1:])
    assert export.diameter_of(Path("inputs/cells/labels"), "img00") == pytest.approx(2 * (area / np.pi) ** 0.5)
    assert export.diameter_of(Path("inputs/gone/labels"), "img00") is None
    config = Predictor("nuc", "cpu").config | {"name": "nuc"}
    shutil.copytree("models", tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    images, source = export.images_of(config, "val", 3)
    assert source == "3 generated images (inputs/cells/images is gone)" and images[2].shape == (256, 256, 3)


def test_a_cut_run_of_nuclei_finds_them_too(of_nuclei, go):
    go(export, "--name nuc --level 2 --run small")
    small, level = Predictor("small", "cpu", "off"), Predictor("nuc", "cpu", "off", level="2")
    assert FOUND_WITH.items() <= small.config.items() and small.config["level"] == 2
    picture = soft_picture(150, 180)
    one, other = (find_nuclei(predictor, picture, 20).labels > 0 for predictor in (small, level))
    assert one.any() and (one != other).mean() < 0.01  # half precision
