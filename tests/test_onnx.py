"""inference.py: OnnxPredictor on a file made by hand, in the shapes of export.py, and on files of other kinds."""

import sys
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from conftest import run_script
from test_inference import soft_picture

from inference import OnnxPredictor, onnx_providers


def write_onnx(path, answers=1, **metadata):
    """The mean of the channels over 255, `answers` times, in the shapes of export.py."""
    onnx = pytest.importorskip("onnx", reason="needs requirements-onnx.txt")
    value, node = onnx.helper.make_tensor_value_info, onnx.helper.make_node
    constants = [onnx.numpy_helper.from_array(np.float32(255), "full")]
    constants += [onnx.numpy_helper.from_array(np.int64([3]), "axes")]
    nodes = [
        node("Cast", ["images"], ["floats"], to=onnx.TensorProto.FLOAT),
        node("ReduceMean", ["floats", "axes"], ["grey"], keepdims=1),
        node("Div", ["grey", "full"], ["answer"]),
        node("Concat", ["answer"] * answers, ["probabilities"], axis=3),
    ]
    images = value("images", onnx.TensorProto.UINT8, ["N", "H", "W", 3])
    output = value("probabilities", onnx.TensorProto.FLOAT, ["N", "H", "W", answers])
    graph = onnx.helper.make_graph(nodes, "grey", [images], [output], constants)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    onnx.helper.set_model_props(model, metadata)
    onnx.save(model, str(path))


ABOUT = {"name": "grey", "input_h": "32", "input_w": "48", "scale": "1.0", "stem": "full", "target": "masks"}
NUCLEI = {**ABOUT, "target": "instances", "diameter": "22.0", "stretch": "1,99.8", "smallest": "20", "smoothing": "1"}
NUCLEI |= {f"{name}_threshold": "0.25" for name in ("mask", "contact", "distance", "seed")}


@pytest.mark.parametrize("tta", [False, True])
def test_an_onnx_file_answers(tmp_path, tta):
    pytest.importorskip("onnxruntime", reason="needs requirements-onnx.txt")
    write_onnx(tmp_path / "grey.onnx", **ABOUT)
    predictor = OnnxPredictor(tmp_path / "grey.onnx", "cpu", tta=tta)
    images = np.stack([soft_picture(33, 50), soft_picture(33, 50, seed=1)])
    found = predictor(images)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, images.mean(axis=3, keepdims=True) / 255, atol=1e-6)
    size = {"input_channels": 3, "num_classes": 1, "input_h": 32, "input_w": 48, "scale": 1.0, "stem": "full"}
    size["target"] = "masks"
    assert predictor.config == size and predictor.name == "grey"
    assert predictor.about == f"{tmp_path / 'grey.onnx'}, CPU"
    assert OnnxPredictor(tmp_path / "grey.onnx", name="mine").name == "mine"


def test_onnx_needs_no_torch(tmp_path):
    """predict.py in a process in which torch cannot be imported."""
    pytest.importorskip("onnxruntime", reason="needs requirements-onnx.txt")
    write_onnx(tmp_path / "grey.onnx", **ABOUT)
    image = soft_picture(40, 300)
    cv2.imwrite(str(tmp_path / "a.png"), image)
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "torch.py").write_text("raise ImportError('no torch here')")
    args = ("--onnx", "grey.onnx", "a.png", "--scale", "1", "--probability", "--tta")
    run_script("predict.py", *args, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path / "blocked")})
    found = cv2.imread(str(tmp_path / "outputs" / "grey" / "predict" / "a_probability.png"), cv2.IMREAD_UNCHANGED)
    np.testing.assert_allclose(found / 65535, image.mean(axis=2) / 255, atol=1e-4)


def test_the_providers_of_each_device():
    cpu, cuda, azure = "CPUExecutionProvider", "CUDAExecutionProvider", "AzureExecutionProvider"
    assert onnx_providers("auto", [azure, cpu]) == onnx_providers("cpu", [azure, cuda, cpu]) == [cpu]
    assert onnx_providers("cuda", [cuda, cpu]) == onnx_providers("auto", [cuda, cpu]) == [cuda, cpu]
    assert onnx_providers("cuda:3", [cuda, cpu]) == [(cuda, {"device_id": 3}), cpu]
    for device, said in (
        ("cuda", "this ONNX Runtime has no CUDA"),
        ("mps", "no CoreML"),
        ("cdua", "expected auto, cpu"),
    ):
        with pytest.raises(ValueError, match=f"--device {device}: .*{said}"):
            onnx_providers(device, [cpu])
    for device in ("cpu:0", "cuda:x", "cuda:-1"):
        with pytest.raises(ValueError, match="expected auto, cpu, cuda, cuda:N or mps"):
            onnx_providers(device, [cuda, cpu])


def test_without_onnx_runtime_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # as if it were not installed
    with pytest.raises(OSError, match="^onnxruntime is not installed: pip install -r requirements-onnx.txt$"):
        OnnxPredictor("any.onnx")


def test_a_file_of_individual_nuclei(tmp_path):
    pytest.importorskip("onnxruntime", reason="needs requirements-onnx.txt")
    write_onnx(tmp_path / "n.onnx", 3, **NUCLEI)
    thresholds = dict.fromkeys(("mask_threshold", "contact_threshold", "distance_threshold", "seed_threshold"), 0.25)
    assert OnnxPredictor(tmp_path / "n.onnx").config == {
        "input_channels": 3,
        "num_classes": 3,
        "input_h": 32,
        "input_w": 48,
        "stem": "full",
        "target": "instances",
        "scale": 1.0,
        "diameter": 22.0,
        "stretch": "1,99.8",
        "smallest": 20.0,
        "smoothing": 1.0,
        **thresholds,
    }


@pytest.mark.parametrize(
    ("answers", "changed", "message"),
    [
        (3, {"diameter": "0"}, "or is damaged: diameter 0.0"),
        (3, {"diameter": "large"}, "ValueError"),
        (3, {"seed_threshold": "nan"}, "or is damaged: seed_threshold nan"),
        (3, {"smallest": None}, "KeyError"),
        (3, {"stretch": "1,2,3"}, "or is damaged: stretch '1,2,3'"),
        (3, {"target": "cells"}, "or is damaged: target 'cells'"),
        (1, {}, "or is damaged: num_classes 1"),
    ],
)
def test_damaged_files_of_individual_nuclei(tmp_path, answers, changed, message):
    pytest.importorskip("onnxruntime", reason="needs requirements-onnx.txt")
    about = {key: value for key, value in (NUCLEI | changed).items() if value is not None}
    write_onnx(tmp_path / "n.onnx", answers, **about)
    with pytest.raises(ValueError, match=f"n.onnx was not written by export.py.*{message}"):
        OnnxPredictor(tmp_path / "n.onnx")


@pytest.mark.parametrize(
    "about", [{"name": "grey"}, {"input_h": "0"}, {"input_w": "5000"}, {"scale": "-1"}, {"name": ".."}], ids=str
)
def test_onnx_files_of_others_are_refused(tmp_path, about):
    pytest.importorskip("onnxruntime", reason="needs requirements-onnx.txt")
    write_onnx(tmp_path / "grey.onnx", **(about if about == {"name": "grey"} else ABOUT | about))
    with pytest.raises(ValueError, match="grey.onnx was not written by export.py"):
        OnnxPredictor(tmp_path / "grey.onnx")


def test_what_is_no_onnx_file(tmp_path):
    pytest.importorskip("onnxruntime", reason="needs requirements-onnx.txt")
    (tmp_path / "a.onnx").write_text("hello")
    with pytest.raises(ValueError, match="a.onnx was not written by export.py"):
        OnnxPredictor(tmp_path / "a.onnx")
    with pytest.raises(FileNotFoundError):
        OnnxPredictor(tmp_path / "nothing.onnx")


@pytest.mark.parametrize("answer", ["nan", "above 1", "float64", "another size", "fails"])
def test_an_onnx_file_must_answer_with_probabilities(tmp_path, monkeypatch, answer):
    pytest.importorskip("onnxruntime", reason="needs requirements-onnx.txt")
    write_onnx(tmp_path / "grey.onnx", **ABOUT)
    predictor, images = OnnxPredictor(tmp_path / "grey.onnx"), soft_picture(8, 9)[None]
    whole = np.full((1, 8, 9, 1), 0.5, np.float32)
    wrong = {"nan": whole * np.nan, "above 1": whole * 3, "float64": whole.astype(float), "another size": whole[:, 1:]}

    def run(*_):
        if answer == "fails":
            raise RuntimeError("of ONNX Runtime's own kind")
        return [wrong[answer]]

    monkeypatch.setattr(predictor, "session", SimpleNamespace(run=run))
    expected = "cannot be run" if answer == "fails" else "did not return probabilities of 9 x 8 pixels"
    with pytest.raises(ValueError, match=expected):
        predictor(images)
