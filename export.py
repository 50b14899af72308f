"""Export a trained run as one ONNX file that takes pictures as they are: standardisation, padding and cropping inside.

python export.py --name run1               # models/run1 -> outputs/run1/run1_L4.onnx
python export.py --name run1 --level 2     # pruned: smaller and faster; --level mean averages all heads
python export.py --name run1 --int8        # -> run1_L4_int8.onnx: a quarter of the size, faster, quantised
python export.py --name run1 --level 2 --run small   # no ONNX: a run of 1 MB, models/small, for predict.py and val.py
python export.py --name run1 --level mean --run half # the same with all its levels
python export.py --name nuclei             # of --target instances: the file gives the three maps of individual nuclei

Using the file needs onnxruntime only:

    session = onnxruntime.InferenceSession("outputs/run1/run1_L4.onnx")
    [probabilities] = session.run(None, {"images": images})  # uint8 (N, H, W, 3) RGB -> float32 (N, H, W, classes)
    session.get_modelmeta().custom_metadata_map              # {"name": "run1", "threshold": "0.5", ...}

A run of --target instances gives maps, float32 (N, H, W, 3): mask, contact and distance, each in [0, 1]. Pictures have
to be stretched and scaled as in its training, and the maps become nuclei by a watershed; nuclei/find.py does all of it
with the metadata of the file (diameter, stretch, scale and thresholds).

--int8: convolutions, pooling, upsampling and concatenation compute with 8-bit integers. Their ranges are the smallest
and largest values seen on 64 training images (Jacob et al., CVPR 2018, https://arxiv.org/abs/1712.05877; weights have
one scale per channel). Standardisation and sigmoid stay float32. For runs of masks, three ways to find the ranges
(minimum and maximum, entropy, 99.99th percentile) gave an IoU within 0.0004 of each other on 200 other training images.
"""

import inspect
import logging
import shlex
import tempfile
import warnings
from pathlib import Path

from common.cli import Parser, answer_early, parse_options, run_script
from inference import LEVELS

PACKAGES = ("onnx", "onnxruntime", "onnxscript")
IN_CONFIG = (
    "name",
    "arch",
    "target",
    "num_classes",
    "input_channels",
    "input_h",
    "input_w",
    "scale",
    "stem",
)  # copied into the file
AXES = ("N", "H", "W")  # dynamic ones
TOLERANCE = 1e-4  # of a probability
CHECKED = 4  # images
CALIBRATED = 64  # training images whose activations give the ranges of --int8
WHOLE_NUMBERS = ("Conv", "Relu", "Clip", "MaxPool", "Resize", "Concat")  # in int8; Clip: ReLU6 of encoders
RUN_FILES = ("config.yml", "split.yml", "model.pth", "last.pth")  # of models/<name>, in the order they are looked for
PARTS = {"train": "training", "val": "validation"}


def build_parser():
    parser = Parser(description=__doc__)
    a = parser.add_argument
    a("--name", help="models/<name>; default: the newest run")
    a("--level", choices=LEVELS, help="the head to keep, or the mean of all; default: the deepest")
    a("--int8", action="store_true", help="quantise to 8 bits, calibrated on training images")
    a("--run", metavar="NAME", help="write a half-precision run models/NAME instead, with head --level (mean: all)")
    a("--output", type=Path, help="file to write; default: outputs/<name>/<name>_L<level>.onnx, or ..._int8.onnx")
    a("--overwrite", action="store_true", help="replace an existing file or run")
    return parser


answer_early(__name__, build_parser)  # the imports below take seconds

import numpy as np
import torch

from common.extras import load_extra
from common.files import atomic_path, read_yaml, save_checkpoint, write_yaml
from common.images import read_picture, squeeze, to_channels
from common.runs import OUTPUTS, newest_run, run_folder
from common.synthetic import generate_nuclei
from data_folder import INPUTS, find_file
from dataset import ABOUT, check_split
from inference import answer, load_trained
from instances import DEFAULTS, MAPS
from labels import find_labels, read_labels
from metrics import THRESHOLDS
from nuclei.crops import VIEW, line
from nuclei.scaling import median_diameter, stretch_picture, zoom
from run_config import is_of_nuclei
from utils import count_params


class Deployed(torch.nn.Module):
    """uint8 (N, H, W, channels) in [0, 255], RGB -> probabilities or maps, float32 (N, H, W, classes) in [0, 1]."""

    def __init__(self, model, mean, std):
        super().__init__()
        self.model, self.mean, self.std = model, mean, std
        self.eval()  # all of it, because exporters put a module back into the mode in which they found it

    def forward(self, images):
        return answer(self.model, images, self.mean, self.std)


def write_onnx(deployed, path, channels, metadata):
    """One file, weights inside, for opset 17 or 18, with any N, H and W; metadata: {key: value}, kept as text."""
    import onnx

    output = output_name(metadata)
    example = torch.zeros(2, 40, 56, channels, dtype=torch.uint8)  # no two axes alike, no axis of 1
    dynamo = inspect.signature(torch.onnx.export).parameters.get("dynamo")
    if dynamo and dynamo.default:  # PyTorch 2.9 and later, which call the other exporter legacy
        free = dict.fromkeys(range(len(AXES)), torch.export.Dim.DYNAMIC)
        how = {"dynamo": True, "opset_version": 18, "external_data": False, "dynamic_shapes": (free,), "verbose": False}
    else:
        free = dict(enumerate(AXES))
        how = {"opset_version": 17, "dynamic_axes": {"images": free, output: free}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, about its own insides
        torch.onnx.export(deployed, (example,), str(path), input_names=["images"], output_names=[output], **how)
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


def output_name(config):
    """What an exported file calls its answer."""
    return "maps" if is_of_nuclei(config) else "probabilities"


# ---------------------------------------------------------------- images to calibrate and to compare with


def seen_size(config):
    """(height, width) of the images that the run was validated on."""
    size = config["input_h"], config["input_w"]
    return tuple(max(VIEW, side) for side in size) if is_of_nuclei(config) else size


def images_of(config, part, count):
    """Up to `count` images of a part of the run's split, or generated images if its files are gone -> images, source.

    images: list of (H, W, channels) uint8; as stored for a run of masks, as view_of returns them for individual nuclei.
    """
    folder, of_nuclei = INPUTS / config["dataset"], is_of_nuclei(config)
    path = run_folder(config["name"]) / "split.yml"
    ids = check_split(read_yaml(path), path)[part]
    if part == "train":  # spread over the list: neighbours may be of one kind
        ids = ids[:: max(1, len(ids) // count)]
    paths = {img_id: find_file(folder / "images", img_id, config["img_ext"]) for img_id in ids}
    ids = [img_id for img_id in ids if paths[img_id].is_file()][:count]
    if ids:
        pictures, source = [picture_of(paths[img_id]) for img_id in ids], f"{PARTS[part]} images of {folder}"
        diameters = [diameter_of(folder / "labels", img_id) if of_nuclei else None for img_id in ids]
    else:
        generated, source = (
            [generate_nuclei(seed) for seed in range(count)],
            f"generated images ({folder / 'images'} is gone)",
        )
        pictures = [picture for picture, _ in generated]
        diameters = [median_diameter(labels) for _, labels in generated]
    if of_nuclei:
        images = [view_of(picture, own, config) for picture, own in zip(pictures, diameters, strict=True)]
    else:
        images = [to_channels(picture, config["input_channels"]) for picture in pictures]
    return images, f"{len(images)} {source}"


def picture_of(path):
    """What read_picture returns; ValueError names the file."""
    try:
        return read_picture(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def diameter_of(folder, img_id):
    """The median diameter of the nuclei in an id's labels, in pixels; None without nuclei, or without labels."""
    try:
        return median_diameter(read_labels(find_labels(folder, img_id)))
    except ValueError:  # to compare two programs, the usual scale of the run's pictures will do
        return None


def view_of(picture, own, config):
    """The middle of a picture, stretched and scaled as the network sees it -> uint8 (*seen_size, channels).

    own: the median diameter of its nuclei in pixels; None takes the scale of the median training picture.
    """
    image = stretch_picture(picture, config)
    scale = config["diameter"] / own if own else config.get("scale", 1)
    size = seen_size(config)
    needed = [min(length, max(1, round(side / scale))) for length, side in zip(image.shape, size, strict=False)]
    return middle(zoom(middle(image, needed), scale), size)


def middle(image, size):
    """The middle of (H, W, C) of that size (height, width); beyond its ends it is reflected."""
    rows, columns = (line(length, side) for length, side in zip(image.shape, size, strict=False))
    return image[rows][:, columns]


def batch_of(images, size):
    """Images (H, W, channels) uint8 of any sizes -> (N, height, width, channels)."""
    return np.stack([squeeze(image, size).reshape(*size, image.shape[2]) for image in images])


# ---------------------------------------------------------------- 8 bits, and the comparison with PyTorch


def quantise(source, path, batches):
    """The ONNX file `source` -> `path`, with weights and activations of 8 bits; see --int8.

    batches: uint8 (N, H, W, channels) each, images as the network was trained on. Quantise-dequantise pairs (QDQ)
    stand in the file, so that other runtimes than ONNX Runtime can fuse them too.
    """
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    class Batches(CalibrationDataReader):
        def __init__(self):
            self.waiting = ({"images": batch} for batch in batches)

        def get_next(self):
            return next(self.waiting, None)

    logging.disable(logging.WARNING)  # its advice to optimise first, which the exporter has done
    try:
        quantize_static(
            str(source),
            str(path),
            Batches(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            calibrate_method=CalibrationMethod.MinMax,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=list(WHOLE_NUMBERS),
        )
    finally:
        logging.disable(logging.NOTSET)


def differences(deployed, path, images, sizes, config):
    """How ONNX Runtime and PyTorch (float32) differ on a CPU: {(height, width): (largest, mean, changed)}.

    largest, mean: of a value in [0, 1]; changed: the fraction of the masks' pixels on the other side of the threshold.
    """
    import onnxruntime

    threshold, masks = THRESHOLDS[0], slice(None)  # each class is a mask
    if is_of_nuclei(config):
        threshold, masks = config["mask_threshold"], slice(1)  # the first map is one
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = {}
    for size in sizes:
        batch = batch_of(images, size)
        with torch.inference_mode():
            expected = deployed(torch.from_numpy(batch)).numpy()
        [output] = session.run(None, {"images": batch})
        assert output.shape == expected.shape and output.dtype == np.float32
        difference = np.abs(output - expected)
        changed = (output[..., masks] > threshold) != (expected[..., masks] > threshold)
        found[size] = float(difference.max()), float(difference.mean()), float(changed.mean())
    return found


def write_int8(deployed, path, config, metadata):
    """As write_onnx, quantised; -> what it was calibrated on."""
    images, source = images_of(config, "train", CALIBRATED)
    batches = [batch_of(images[k : k + 8], seen_size(config)) for k in range(0, len(images), 8)]
    with tempfile.TemporaryDirectory() as temporary:
        write_onnx(deployed, Path(temporary) / "float.onnx", config["input_channels"], metadata)
        quantise(Path(temporary) / "float.onnx", path, batches)
    return source


def write_run(name, options):
    """models/<name> -> models/<options.run>: pruned, or with all heads for --level mean, in half precision."""
    source, folder = run_folder(name), run_folder(options.run, "--run")
    if given := [flag for flag, value in (("--int8", options.int8), ("--output", options.output)) if value]:
        raise ValueError(f"{given[0]} is for an ONNX file, --run for a run folder; give one of them")
    if folder.resolve() == source.resolve():
        raise ValueError(f"--run {options.run} is the run itself; give the new one another name")
    if earlier := [path for path in (folder / file for file in RUN_FILES) if path.exists()]:
        if (folder / "last.pth").exists() or not (folder / "model.pth").exists():  # not even an epoch of it
            raise FileExistsError(f"{folder} is a training run; give --run another name")
        if not options.overwrite:
            raise FileExistsError(f"{earlier[0]} exists; give --overwrite to replace it, or another --run")
    model, config = load_trained(name, torch.device("cpu"), level=options.level or "deepest")
    split = read_yaml(source / "split.yml")
    check_split(split, source / "split.yml")
    split = {key: split[key] for key in (*PARTS, "test", *ABOUT, "twins") if key in split}
    state = {key: value.half() if value.is_floating_point() else value for key, value in model.state_dict().items()}
    if wild := [key for key, value in state.items() if not torch.isfinite(value).all()]:
        raise ValueError(f"{wild[0]} of {source} is too large for half precision")
    folder.mkdir(parents=True, exist_ok=True)
    save_checkpoint(folder / "model.pth", state)
    write_yaml(folder / "split.yml", split)
    config = {**config, "name": folder.name, "exported": True}  # no training that could go on
    if options.level != "mean":
        config["level"] = model.levels[-1]
    write_yaml(folder / "config.yml", config)
    size = (folder / "model.pth").stat().st_size / 2**20
    heads = ", ".join(model.head_names)
    print(f"{folder}: {heads}, {count_params(model):,} parameters in half precision, {size:.1f} MB")
    print(f"use it: python predict.py --name {shlex.quote(folder.name)} pictures/")


def about_run(config):
    """{key: value} of a run that goes into its ONNX file; what OnnxPredictor makes a config of."""
    metadata = {key: config[key] for key in IN_CONFIG if key in config}
    if is_of_nuclei(config):
        metadata.update({key: config[key] for key in ("diameter", "stretch", *DEFAULTS)})
        metadata["maps"] = ",".join(MAPS)
    else:
        metadata["threshold"] = THRESHOLDS[0]
    return metadata


def write_deployed(name, options):
    """models/<name> -> one ONNX file, compared with PyTorch before it gets its name."""
    for package in PACKAGES:
        load_extra(package, "onnx")
    model, config = load_trained(name, torch.device("cpu"), level=options.level or "deepest")
    head = "mean" if options.level == "mean" else model.head_names[-1]
    ending = "_int8.onnx" if options.int8 else ".onnx"
    output = options.output or OUTPUTS / name / f"{name}_{head}{ending}"
    if output.exists() and not options.overwrite:
        raise FileExistsError(f"{output} exists; give --overwrite to replace it, or another --output")
    deployed = Deployed(model.to(memory_format=torch.contiguous_format), config["mean"], config["std"])
    metadata = about_run(config)
    metadata["level"] = head.removeprefix("L")
    metadata["precision"] = "int8" if options.int8 else "float32"

    height, width = seen_size(config)
    sizes = ((height, width), (height + height // 3 + 1, width - width // 5), (max(1, height // 2 - 1), width + 7))
    images, source = images_of(config, "val", CHECKED)
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(output) as temporary:
        if options.int8:
            print(f"calibrated on {write_int8(deployed, temporary, config, metadata)}")
        else:
            write_onnx(deployed, temporary, config["input_channels"], metadata)
        found = differences(deployed, temporary, images, sizes, config)
        if (largest := max(values[0] for values in found.values())) > TOLERANCE and not options.int8:
            raise ValueError(f"{output} was not written: ONNX Runtime and PyTorch differ by {largest:.2g}")
    print(f"{output}: {head}, {count_params(model):,} parameters, {output.stat().st_size / 2**20:.1f} MB")
    shapes = [f"(N, H, W, {config[key]})" for key in ("input_channels", "num_classes")]
    maps = f": {', '.join(MAPS)}" if is_of_nuclei(config) else ""
    print(f"images uint8 {shapes[0]} -> {output_name(config)} float32 {shapes[1]}{maps}")
    print(", ".join(f"{key} {value}" for key, value in metadata.items()))
    print(f"ONNX Runtime and PyTorch on {source}, largest and mean difference, pixels whose mask differs:")
    for (h, w), (largest, mean, masks) in found.items():
        print(f"  {h} x {w}: {largest:.1e}, {mean:.1e}, {masks:.3%}")


def main():
    options, _ = parse_options(build_parser)
    name = options.name or newest_run("arch")
    if options.run:
        write_run(name, options)
    else:
        write_deployed(name, options)


if __name__ == "__main__":
    run_script(main)
