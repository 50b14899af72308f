"""A trained run as one ONNX file for any picture: nobody has to standardise, pad or crop around it, or to do so twice.

python export.py --name run1               # models/run1 -> outputs/run1/run1_L4.onnx
python export.py --name run1 --level 2     # pruned: smaller and faster; --level mean averages all heads

Whoever uses the file needs onnxruntime alone:

    session = onnxruntime.InferenceSession("outputs/run1/run1_L4.onnx")
    [probabilities] = session.run(None, {"images": images})  # uint8 (N, H, W, 3) RGB -> float32 (N, H, W, classes)
    session.get_modelmeta().custom_metadata_map              # {"name": "run1", "threshold": "0.5", ...}
"""

import argparse
import importlib.util
import inspect
import warnings
from pathlib import Path

import numpy as np
import torch

from archs import probabilities
from cli import Parser, parse_options, run_script
from dataset import check_split, standardise
from images import decode, squeeze, to_channels
from metrics import THRESHOLDS
from runs import newest_run
from synthetic import nuclei
from utils import atomic_path, count_params, read_yaml
from val import LEVELS, load_trained

PACKAGES = ("onnx", "onnxruntime", "onnxscript")
IN_CONFIG = ("name", "arch", "num_classes", "input_channels", "input_h", "input_w", "scale")  # what goes along
AXES = ("N", "H", "W")  # those that are free
TOLERANCE = 1e-4  # of a probability
CHECKED = 4  # images


def build_parser():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a = parser.add_argument
    a("--name", help="models/<name>; default: the newest run")
    a("--level", choices=LEVELS, default="4", help="the head to keep, or the mean of all; default 4")
    a("--output", type=Path, help="file to write; default: outputs/<name>/<name>_L<level>.onnx")
    a("--overwrite", action="store_true", help="replace an existing file")
    return parser


def check_packages():
    """ValueError when what ONNX needs is not installed."""
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise ValueError(f"{', '.join(missing)} not installed; exporting needs: pip install -r requirements-onnx.txt")


class Deployed(torch.nn.Module):
    """uint8 (N, H, W, channels) in [0, 255], RGB -> probabilities, float32 (N, H, W, classes)."""

    def __init__(self, model, mean, std):
        super().__init__()
        self.model, self.mean, self.std = model, mean, std
        self.eval()  # all of it, because exporters put a module back into the mode in which they found it

    def forward(self, images):
        images = standardise(images.permute(0, 3, 1, 2), self.mean, self.std)
        return probabilities(self.model(images)).permute(0, 2, 3, 1)


def write_onnx(deployed, path, channels, metadata):
    """One file, weights inside, for opset 17 or 18, with any N, H and W; metadata: {key: value}, kept as text."""
    import onnx

    example = torch.zeros(2, 40, 56, channels, dtype=torch.uint8)  # no two axes alike, no axis of 1
    dynamo = inspect.signature(torch.onnx.export).parameters.get("dynamo")
    if dynamo and dynamo.default:  # PyTorch 2.9 and later, which call the other exporter legacy
        free = dict.fromkeys(range(len(AXES)), torch.export.Dim.DYNAMIC)
        how = {"dynamo": True, "opset_version": 18, "external_data": False, "dynamic_shapes": (free,), "verbose": False}
    else:
        free = dict(enumerate(AXES))
        how = {"opset_version": 17, "dynamic_axes": {"images": free, "probabilities": free}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, about its own insides
        torch.onnx.export(
            deployed, (example,), str(path), input_names=["images"], output_names=["probabilities"], **how
        )
    model = onnx.load(str(path))
    for value in (*model.graph.input, *model.graph.output):
        for axis, name in zip(value.type.tensor_type.shape.dim, AXES, strict=False):
            axis.dim_param = name
    del model.graph.value_info[:]  # shapes in between, in the exporter's own names for the axes
    for node in model.graph.node:  # where each came from, which names folders of this machine
        del node.metadata_props[:]
        node.doc_string = ""
    onnx.helper.set_model_props(model, {key: str(value) for key, value in metadata.items()})
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(path))


def images_to_check(config):
    """-> up to CHECKED images (H, W, channels) uint8, and what they are: the run's validation images, or generated."""
    folder = Path("inputs") / config["dataset"] / "images"
    path = Path("models") / config["name"] / "split.yml"
    ids = check_split(read_yaml(path), path)["val"]
    paths = [path for img_id in ids if (path := folder / f"{img_id}{config['img_ext']}").is_file()][:CHECKED]
    pictures, source = [decode(path.read_bytes()) for path in paths], f"validation images of {folder.parent}"
    if not paths:
        pictures, source = [nuclei(seed)[0] for seed in range(CHECKED)], f"generated images ({folder} is gone)"
    return [to_channels(picture, config["input_channels"]) for picture in pictures], f"{len(pictures)} {source}"


def differences(deployed, path, images, sizes):
    """{(height, width): the largest difference of a probability between ONNX Runtime and PyTorch, float32, CPU}."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = {}
    for size in sizes:
        batch = np.stack([squeeze(image, size).reshape(*size, image.shape[2]) for image in images])
        with torch.inference_mode():
            expected = deployed(torch.from_numpy(batch)).numpy()
        [output] = session.run(None, {"images": batch})
        assert output.shape == expected.shape and output.dtype == np.float32
        found[size] = float(np.abs(output - expected).max())
    return found


def main():
    options, _ = parse_options(build_parser)
    check_packages()
    name = options.name or newest_run("arch")
    head = f"L{options.level}".replace("Lmean", "mean")
    output = options.output or Path("outputs") / name / f"{name}_{head}.onnx"
    if output.exists() and not options.overwrite:
        raise FileExistsError(f"{output} exists; give --overwrite to replace it, or another --output")
    model, config = load_trained(name, torch.device("cpu"), level=options.level)
    config["name"] = name  # of the folder, which a user may have renamed
    deployed = Deployed(model.to(memory_format=torch.contiguous_format), config["mean"], config["std"])
    metadata = {key: config[key] for key in IN_CONFIG if key in config}
    metadata |= {"level": options.level, "threshold": THRESHOLDS[0]}

    height, width = config["input_h"], config["input_w"]
    sizes = ((height, width), (height + height // 3 + 1, width - width // 5), (max(1, height // 2 - 1), width + 7))
    images, source = images_to_check(config)
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(output) as temporary:
        write_onnx(deployed, temporary, config["input_channels"], metadata)
        found = differences(deployed, temporary, images, sizes)
        if max(found.values()) > TOLERANCE:
            raise ValueError(f"{output} was not written: ONNX Runtime and PyTorch differ by {max(found.values()):.2g}")
    print(f"{output}: {head}, {count_params(model):,} parameters, {output.stat().st_size / 2**20:.1f} MB")
    shapes = [f"(N, H, W, {config[key]})" for key in ("input_channels", "num_classes")]
    print(f"images uint8 {shapes[0]} -> probabilities float32 {shapes[1]}")
    print(", ".join(f"{key} {value}" for key, value in metadata.items()))
    shown = ", ".join(f"{difference:.1e} at {h} x {w}" for (h, w), difference in found.items())
    print(f"largest difference between ONNX Runtime and PyTorch on {source}: {shown}")


if __name__ == "__main__":
    run_script(main)
