"""export.py: the file against PyTorch at many sizes, alone in a folder of its own, and as a user runs the script."""

import shutil

import cv2
import numpy as np
import pytest
import torch
import yaml
from conftest import run_script, write_data_set

import export
from archs import NestedUNet, UNet

onnx = pytest.importorskip("onnx", reason="needs requirements-onnx.txt")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs requirements-onnx.txt")
pytest.importorskip("onnxscript", reason="needs requirements-onnx.txt")

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
        (lambda: NestedUNet(2, 3, deep_supervision=True, width=2), 3, 2),
        (lambda: NestedUNet(1, 1, deep_supervision=True, width=4).prune(2), 1, 1),
        (lambda: UNet(1, 4, width=2), 4, 1),
    ],
    ids=["mean of heads", "pruned, grey", "UNet, RGBA"],
)
def test_the_file_is_the_model_at_every_size(model, channels, classes, tmp_path):
    torch.manual_seed(0)
    model, mean, std = model().eval(), [0.1, 0.2, 0.3, 0.4][:channels], [0.3, 0.25, 0.2, 0.15][:channels]
    export.write_onnx(export.Deployed(model, mean, std), tmp_path / "m.onnx", channels, {"name": "x", "threshold": 0.5})
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]  # the weights are inside

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
        assert np.abs(found - expected).max() < 1e-5 and expected.std() > 0 or (height, width) == (1, 1)


def test_nothing_of_this_machine_is_in_the_file(tmp_path):
    model = NestedUNet(1, 3, deep_supervision=True, width=1).prune(1).eval()
    export.write_onnx(export.Deployed(model, [0.0] * 3, [1.0] * 3), tmp_path / "m.onnx", 3, {})
    content = (tmp_path / "m.onnx").read_bytes()
    assert b"site-packages" not in content and b"archs.py" not in content


# ---------------------------------------------------------------- as a user runs it


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with a tiny run of two classes, models/tiny."""
    folder = tmp_path_factory.mktemp("export")
    write_data_set(folder / "inputs" / "cells", size=(24, 32), num_classes=2)
    options = ("--num_classes", 2, "--width", 2, "--input_w", 32, "--input_h", 24, "--epochs", 1)
    run_script("train.py", "--dataset", "cells", "--name", "tiny", "--deep_supervision", True, *options, cwd=folder)
    return folder


def test_export_as_a_user(run):
    said = run_script("export.py", "--name", "tiny", "--level", "2", cwd=run).stdout
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
    error = run_script("export.py", "--name", "tiny", "--level", "2", cwd=run, ok=False).stderr
    assert "tiny_L2.onnx exists; give --overwrite" in error and path.read_bytes() == written


def test_mean_of_heads_to_a_file_of_the_users_without_the_data(run, tmp_path):
    shutil.copytree(run / "models", tmp_path / "models")
    output = tmp_path / "new" / "all.onnx"
    output.parent.mkdir()
    output.write_text("an older file")
    options = ("--level", "mean", "--output", output, "--overwrite")
    assert "4 generated images" in run_script("export.py", *options, cwd=tmp_path).stdout
    assert session_of(output).get_modelmeta().custom_metadata_map["level"] == "mean"
    assert [path.name for path in output.parent.iterdir()] == ["all.onnx"]


def test_int8_beside_the_float_file(run):
    """A quarter of the weights' bytes, convolutions in whole numbers, about the same answer; predict.py takes it."""
    said = run_script("export.py", "--name", "tiny", "--int8", cwd=run).stdout
    assert "calibrated on 4 training images of inputs/cells" in said and "precision int8" in said
    path = run / "outputs" / "tiny" / "tiny_L4_int8.onnx"
    assert [file.name for file in path.parent.glob("tiny_L4*")] == [path.name]
    run_script("export.py", "--name", "tiny", cwd=run)
    exact, rounded = session_of(path.with_name("tiny_L4.onnx")), session_of(path)
    assert rounded.get_modelmeta().custom_metadata_map["precision"] == "int8"
    types = {tensor.data_type for tensor in onnx.load(path).graph.initializer if len(tensor.dims) == 4}
    assert types == {onnx.TensorProto.INT8}  # every convolution's weights
    images = np.stack([cv2.imread(str(run / f"inputs/cells/images/img0{k}.png"))[..., ::-1] for k in range(4)])
    (a,), (b,) = (session.run(None, {"images": images}) for session in (exact, rounded))
    assert a.shape == b.shape and 0 < np.abs(a - b).max() < 0.1 and np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.95
    run_script("predict.py", "--onnx", path, "inputs/cells/images/img00.png", cwd=run)


def test_int8_without_the_data(run, tmp_path):
    shutil.copytree(run / "models", tmp_path / "models")
    said = run_script("export.py", "--int8", "--level", "1", cwd=tmp_path).stdout
    assert "calibrated on 64 generated images (inputs/cells/images is gone)" in said


def test_differences_by_hand(tmp_path, monkeypatch):
    """Two pixels of four differ, by 0.2 and 0.4; one crosses the threshold."""
    answers = {"onnx": np.float32([[[[0.4], [0.9]], [[0.7], [0.2]]]]), "torch": [[[[0.6], [0.9]], [[0.7], [0.6]]]]}
    answers["torch"][0][0][0][0] = 0.2  # 0.4 here and 0.2 there: both below 0.5
    session = type("Session", (), {"run": lambda *_: [answers["onnx"]]})()
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: session)
    found = export.differences(
        lambda images: torch.tensor(answers["torch"]), "x", [np.zeros((2, 2, 3), np.uint8)], [(2, 2)]
    )
    assert found[2, 2] == pytest.approx((0.4, 0.15, 0.25))


def test_a_file_that_differs_is_not_written(run, monkeypatch, capsys):
    monkeypatch.chdir(run)
    monkeypatch.setattr("sys.argv", ["export.py", "--name", "tiny", "--level", "1"])
    monkeypatch.setattr(export, "write_onnx", lambda *_: None)
    monkeypatch.setattr(export, "differences", lambda *_: {(24, 32): (2e-4, 1e-5, 0.0)})
    with pytest.raises(ValueError, match="L1.onnx was not written: ONNX Runtime and PyTorch differ by 0.0002"):
        export.main()
    assert not list(run.glob("outputs/tiny/*L1*"))


def test_a_run_that_is_not_there(run):
    assert "the runs are: tiny" in run_script("export.py", "--name", "gone", cwd=run, ok=False).stderr


def test_missing_packages_in_one_line(run, monkeypatch):
    monkeypatch.setattr(export, "PACKAGES", ("onnx", "onnx_of_tomorrow"))
    with pytest.raises(ValueError, match=r"^onnx_of_tomorrow not installed; .*pip install -r requirements-onnx.txt$"):
        export.check_packages()


# ---------------------------------------------------------------- a smaller run


def test_a_run_cut_to_a_level_answers_like_that_level(run, tmp_path):
    shutil.copytree(run, tmp_path / "here", ignore=shutil.ignore_patterns("outputs"))
    here, folder = tmp_path / "here", tmp_path / "here" / "models" / "small"
    said = run_script("export.py", "--name", "tiny", "--level", "2", "--run", "small", cwd=here).stdout
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
    assert split == {key: of_run[key] for key in ("train", "val", "sizes", "fingerprint")}

    pictures = "inputs/cells/images"
    of_level = run_script("predict.py", pictures, "--name", "tiny", "--level", 2, "--probability", cwd=here).stdout
    of_small = run_script("predict.py", pictures, "--name", "small", "--probability", cwd=here).stdout
    assert "models/tiny, L2," in of_level and "models/small, L2," in of_small
    files = sorted(path.name for path in (here / "outputs" / "tiny" / "predict").glob("*_probability_*.png"))
    assert len(files) == 12
    for file in files:
        pair = [cv2.imread(str(here / "outputs" / name / "predict" / file), -1) for name in ("tiny", "small")]
        assert np.abs(np.subtract(*pair, dtype=np.int64)).max() < 0.01 * 65535

    scores = run_script("val.py", "--name", "small", cwd=here).stdout
    assert "\nL2 " in scores and "\nL4 " not in scores and "last epoch" not in scores
    run_script("export.py", "--name", "small", "--output", "small.onnx", cwd=here)
    assert session_of(here / "small.onnx").get_modelmeta().custom_metadata_map["level"] == "2"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for script, *options, expected in (
        ("export.py", "--level", 2, "--run", "small", "models/small/config.yml exists; give --overwrite"),
        ("export.py", "--run", "tiny", "--overwrite", "is the run itself"),
        ("export.py", "--level", "mean", "--run", "new", "keeps one head"),
        ("export.py", "--run", "new", "--int8", "--int8 is for an ONNX file"),
        ("export.py", "--run", "../new", "expected the plain name of a folder"),
    ):
        assert expected in run_script(script, "--name", "tiny", *options, cwd=here, ok=False).stderr
    for script, *options, expected in (
        ("predict.py", "inputs", "--level", 1, "was cut to level 2 and has no other: leave --level out"),
        ("val.py", "--levels", "was cut to level 2"),
        ("export.py", "--run", "tiny", "--overwrite", "models/tiny is a training of its own"),
        ("train.py", "--resume", "is another run cut to level 2; go on with the whole one"),
        ("train.py", "--dataset", "cells", "models/small exists; --overwrite replaces it"),
    ):
        assert expected in run_script(script, "--name", "small", *options, cwd=here, ok=False).stderr
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}

    run_script("export.py", "--name", "tiny", "--level", 1, "--run", "small", "--overwrite", cwd=here)
    assert yaml.safe_load((folder / "config.yml").read_text())["level"] == 1
    run_script("train.py", "--config", folder / "config.yml", "--name", "again", cwd=here)  # a recipe, as any config
    for level in (0, 5, "2", True, 2.0):
        (folder / "config.yml").write_text(yaml.safe_dump(yaml.safe_load(before["config.yml"]) | {"level": level}))
        assert f"level {level!r} is nothing that train.py writes" in run_script(
            "val.py", "--name", "small", cwd=here, ok=False
        ).stderr  # fmt: skip


def test_a_run_without_deep_supervision_in_half_precision_is_no_training(tmp_path):
    write_data_set(tmp_path / "inputs" / "cells", count=6)
    options = (
        "--dataset cells --arch UNet --width 2 --input_w 32 --input_h 32 --epochs 1 --augment none --loss BCEDiceLoss"
    )
    run_script("train.py", *options.split(), "--name", "whole", cwd=tmp_path)
    run_script("export.py", "--name", "whole", "--run", "small", cwd=tmp_path)
    kept = (tmp_path / "models" / "small" / "model.pth").read_bytes()
    assert "another run cut to level 4" in run_script(
        "train.py", "--name", "small", "--resume", cwd=tmp_path, ok=False
    ).stderr  # fmt: skip
    assert kept == (tmp_path / "models" / "small" / "model.pth").read_bytes()
    assert "\nL4 " in run_script("val.py", "--name", "small", cwd=tmp_path).stdout
