"""A trained run, from its folder to probabilities: config, weights, heads, test-time augmentation, tiles, ONNX files.

    predictor = Predictor("run1", level="2")               # models/run1; or OnnxPredictor("run1_L2.onnx")
    probabilities = predictor(images)                      # uint8 (N, H, W, C) -> float32 (N, H, W, classes)
    fractions = predict_tiled(predictor, images)           # the same for pictures of any size, in bounded memory

val.py, predict.py, export.py and notebooks share it. torch is imported inside the functions that need it, so that an
ONNX file can be used without PyTorch.
"""

import copy
import math
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.cli import loading
from common.devices import parse_device, pick_amp, pick_device, precision, precision_name
from common.distributed import is_main
from common.extras import load_extra
from common.files import digest_of, is_plain_name, load_weights, read_yaml
from common.images import standardise
from common.runs import newest_run, run_folder, weights_file
from run_config import are_channels, fits_of, is_of_nuclei, levels_of, read_config

WEIGHTS = {"best": "model.pth", "last": "last.pth"}  # of a run
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "mps": "CoreMLExecutionProvider"}
LEVELS = ("1", "2", "3", "4", "mean")  # what --level takes
TILE, OVERLAP = 256, 64  # pixels that the network sees
TILE_OF_NUCLEI = 512  # for --target instances, whose pictures keep about their own size: whole, where they fit
MULTIPLE = 16  # what a network pads to, or twice that; tiles that begin on it see the pixels pooled as the whole does


# ---------------------------------------------------------------- weights


def load_trained(name, device, which="best", level=None):
    """The model of models/<name>, built from its config.yml alone, in eval mode, and the config.

    which: "best" takes model.pth, "last" the weights of last.pth that a validation would have judged (the averaged
    ones when averaging was on). level: "1" ... "4" prunes to that head alone, "deepest" to the deepest there is, "mean"
    keeps all heads, None keeps what was trained. ValueError when the run has no such level (it needs deep supervision,
    and a run that was cut has one level), or when the weights are damaged or of another network.
    """
    import torch

    from archs import build_model

    folder = run_folder(name)
    config = read_config(folder)
    cut, known = config.get("level"), levels_of(config)
    if len(known) == 1 and level not in (None, "deepest", str(known[0])):
        if cut:
            raise ValueError(f"{folder} was cut to level {cut} and has no other: leave --level out")
        raise ValueError(f"{folder} has only level {known[0]}, not {level}: trained without --deep_supervision True")
    path = folder / WEIGHTS[which]
    weights = load_weights(path)
    model = build_model(config)
    if cut and config["deep_supervision"]:
        model = model.prune(cut)
    try:
        model.load_state_dict(weights)
    except RuntimeError:
        raise ValueError(
            f"{path} does not hold the weights of the {config['arch']} that config.yml describes"
        ) from None
    if level not in (None, "mean"):
        model = model.prune(model.levels[-1] if level == "deepest" else int(level))
    model = model.to(device).eval()
    return (model.to(memory_format=torch.channels_last) if config.get("channels_last") else model), config


def start_from(model, config):
    """Load config["weights"], a run's name or a file, into model; heads of another size keep their fresh weights.

    The weights of a run expect images standardised as in that run, so its mean and std go into config.
    """
    path = weights_file(config["weights"])
    if not path.is_file():
        raise FileNotFoundError(f"--weights {config['weights']}: no such file, and no run: {path} does not exist")
    cut = None
    if (path.parent / "config.yml").is_file():
        other = {**read_yaml(path.parent / "config.yml"), "input_channels": config["input_channels"]}
        config.update({key: other[key] for key in ("mean", "std") if are_channels(other, key)})
        cut = other.get("level")
    weights, own = load_weights(path), model.state_dict()
    fitting = {key: value for key, value in weights.items() if key in own and own[key].shape == value.shape}
    fresh = sorted(own.keys() - fitting.keys())
    if wrong := [key for key in fresh if not key.startswith("final")]:
        if cut:
            raise ValueError(f"{path.parent} is a run cut to level {cut}; --weights needs the whole run")
        found = tuple(weights[wrong[0]].shape) if wrong[0] in weights else "missing"
        raise ValueError(
            f"{path} does not fit: {wrong[0]} is {found} there, {tuple(own[wrong[0]].shape)} here ({len(wrong)} of "
            f"{len(own)} entries differ); give the --arch, --width, --encoder and --input_channels it was trained with"
        )
    model.load_state_dict(fitting, strict=False)
    print(f"weights of {path}" + (f"; new heads: {', '.join(fresh)}" if fresh else ""))


# ---------------------------------------------------------------- probabilities


def answer(model, images, mean, std):
    """Pictures as they are to probabilities: what predict.py shows and what an exported file computes.

    model: images as standardised -> logits of one or several heads. images: a uint8 tensor (N, H, W, C) in [0, 255],
    RGB -> float32 (N, H, W, classes) in [0, 1], the mean over the heads.
    """
    from archs import probabilities

    images = standardise(images.permute(0, 3, 1, 2), mean, std)
    return probabilities(model(images)).permute(0, 2, 3, 1)


def eight_ways(function, images, axes):
    """Test-time augmentation: the mean of function(images) over the eight flips and 90 degree turns, each undone.

    images: an array or tensor whose height and width are `axes`; what function returns has them in the same places.
    """
    library = np if isinstance(images, np.ndarray) else sys.modules["torch"]
    total = 0
    for turns in range(4):
        for flipped in (False, True):
            seen = library.rot90(images, turns, axes)
            seen = library.flip(seen, axes[1:]) if flipped else seen
            found = function(np.ascontiguousarray(seen) if library is np else seen)
            found = library.flip(found, axes[1:]) if flipped else found
            total = total + library.rot90(found, -turns, axes)
    return total / 8


def without_tta(predictor):
    """A Predictor or OnnxPredictor -> one of the same network that looks once; itself where it already does."""
    if not predictor.tta:
        return predictor
    plain = copy.copy(predictor)
    plain.tta = False
    return plain


class Predictor:
    """A run of train.py, ready to answer.

    name: models/<name>, None for the newest run; level: see load_trained, by default the deepest head; which: "best" or
    "last"; tta: average over eight flips and rotations. Attributes: config, name, head ("L4", or "mean" for the mean of
    several heads), head_names, device, amp, and `about`, a line for people.
    """

    def __init__(self, name=None, device="auto", amp="auto", level="deepest", which="best", tta=False):
        self.name = name or newest_run("arch")
        self.tta, self.which = tta, which
        with loading():  # PyTorch, for the first time in predict.py
            self.device = pick_device(device)
            self.amp = pick_amp(amp, self.device)
            self.trained, self.config = load_trained(self.name, self.device, which, level)
        self.model = self.trained.folded()
        self.head_names = [*self.model.head_names, "mean"] if len(self.model.head_names) > 1 else self.model.head_names
        self.head = self.head_names[-1]
        self.about = f"models/{self.name}, {self.head}, {self.device}, {precision_name(self.amp)}"

    @property
    def digest(self):
        """Eight digits that change with the weights and with each setting in config.yml. Reads both files."""
        folder = run_folder(self.name)
        return digest_of(*((folder / file).read_bytes() for file in ("config.yml", WEIGHTS[self.which])))

    def __call__(self, images):
        """uint8 (N, H, W, C) in [0, 255] -> float32 (N, H, W, classes) in [0, 1] of `head`."""
        import torch

        def look(images):
            with precision(self.device, self.amp):
                return answer(self.model, images, self.config["mean"], self.config["std"])

        with torch.inference_mode():
            images = torch.from_numpy(images).to(self.device)
            found = eight_ways(look, images, (1, 2)) if self.tta else look(images)
            return found.cpu().numpy()

    def of_heads(self, images):
        """Standardised images (N, C, H, W) -> {head: probabilities (N, classes, H, W) float32}, as in head_names."""
        import torch

        from archs import as_heads

        def look(images):
            with precision(self.device, self.amp):
                heads = as_heads(self.model(images))
            return torch.stack([torch.sigmoid(logits.float()) for logits in heads])  # (heads, N, classes, H, W)

        with torch.inference_mode():
            images = images.to(self.device, non_blocking=True)
            found = eight_ways(look, images, (-2, -1)) if self.tta else look(images)
            planes = [*found, found.mean(0)] if len(found) > 1 else found
            return dict(zip(self.head_names, planes, strict=True))


def onnx_config(session):
    """The config that export.py wrote into the file of an ONNX Runtime session, with the run's name.

    Raises errors of many kinds for other files.
    """
    (images,), (output,) = session.get_inputs(), session.get_outputs()
    about = session.get_modelmeta().custom_metadata_map
    config = {"input_channels": int(images.shape[3]), "num_classes": int(output.shape[3])}
    config.update({key: int(about[key]) for key in ("input_h", "input_w")})
    config.update({key: about[key] for key in ("stem", "target")})
    if "scale" in about:
        config["scale"] = float(about["scale"])
    if is_of_nuclei(config):
        from instances import DEFAULTS

        config["stretch"] = about["stretch"]
        config.update({key: float(about[key]) for key in ("diameter", *DEFAULTS)})
    return config, Path(about["name"]).name


def onnx_providers(device, available):
    """auto, cpu, cuda, cuda:N or mps -> the providers for ONNX Runtime, the preferred one first.

    available: their names. ValueError when there is none for the device.
    """
    kind, index = parse_device(device)
    if kind == "auto":  # Azure's provider stands first, and runs no such file
        return [name for name in available if name != "AzureExecutionProvider"]
    if PROVIDERS[kind] not in available:
        raise ValueError(f"--device {device}: this ONNX Runtime has no {PROVIDERS[kind]}; use --device auto or cpu")
    chosen = (PROVIDERS[kind], {"device_id": int(index)}) if index else PROVIDERS[kind]
    return [chosen, PROVIDERS["cpu"]] if kind != "cpu" else [chosen]


class OnnxPredictor:
    """A file that export.py wrote, ready to answer; needs ONNX Runtime alone.

    device: see onnx_providers. ValueError when the file is something else.
    """

    def __init__(self, path, device="auto", name=None, tta=False):
        onnxruntime = load_extra("onnxruntime", "onnx")
        self.path, self.tta = path, tta
        content = Path(path).read_bytes()
        self.digest = digest_of(content)
        providers = onnx_providers(device, onnxruntime.get_available_providers())
        try:
            self.session = onnxruntime.InferenceSession(content, providers=providers)
            self.input = self.session.get_inputs()[0].name
            self.config, own_name = onnx_config(self.session)
            self.name = name or own_name
            wrong = [key for key, fit in fits_of(self.config).items() if not fit]
        except Exception as error:  # ONNX Runtime's errors have no class in common
            raise ValueError(f"{path} was not written by export.py ({type(error).__name__})") from None
        if wrong or not is_plain_name(self.name):
            found = ", ".join(f"{key} {self.config.get(key)!r}" for key in wrong) or f"name {self.name!r}"
            raise ValueError(f"{path} was not written by export.py, or is damaged: {found}")
        self.about = f"{path}, {self.session.get_providers()[0].removesuffix('ExecutionProvider')}"

    def __call__(self, images):
        """uint8 (N, H, W, C) in [0, 255] -> float32 (N, H, W, classes) in [0, 1]."""
        return eight_ways(self._look, images, (1, 2)) if self.tta else self._look(images)

    def _look(self, images):
        try:
            [found] = self.session.run(None, {self.input: images})
        except Exception as error:
            raise ValueError(f"{self.path} cannot be run ({type(error).__name__})") from None
        whole = getattr(found, "dtype", None) == np.float32
        whole = whole and found.shape == (*images.shape[:3], self.config["num_classes"])
        if not whole or not (found.min() >= 0 and found.max() <= 1 + 1e-6):  # which refuses NaN, too
            height, width = images.shape[1:3]
            raise ValueError(f"{self.path} did not return probabilities of {width} x {height} pixels")
        return found


# ---------------------------------------------------------------- tiles


def multiple_of(config):
    """What a run's network pads both sides to: 16, or 32 with --stem half."""
    return 2 * MULTIPLE if config.get("stem") == "half" else MULTIPLE


def tile_size(config):
    """(height, width) of the tiles for a run: 256 or 512, its trained size where that is larger, padded as it pads."""
    multiple, least = multiple_of(config), TILE_OF_NUCLEI if is_of_nuclei(config) else TILE
    return tuple(max(least, side + -side % multiple) for side in (config["input_h"], config["input_w"]))


def windows(length, tile, overlap=OVERLAP, multiple=MULTIPLE):
    """Where the tiles of a side begin and what they weigh: (starts, float32 (len(starts), min(tile, length))).

    All sizes are multiples of `multiple`, and so are the starts; neighbours overlap by `overlap` or more. The weights
    of a tile are a raised cosine, never 0, divided so that those of all tiles sum to 1 at every pixel.
    """
    size = min(tile, length)
    steps = -(-(length - size) // (tile - overlap))  # rounded up, then spread evenly
    starts = [k * (length - size) // max(1, steps) // multiple * multiple for k in range(steps + 1)]
    bump = 0.5 - 0.5 * np.cos(2 * np.pi * (np.arange(size) + 0.5) / size)
    total = np.zeros(length)
    for start in starts:
        total[start : start + size] += bump
    return starts, np.stack([bump / total[start : start + size] for start in starts]).astype(np.float32)


def predict_tiled(predictor, images, batch_size=8, each=None):
    """(N, H, W, C) uint8 -> (N, classes, H, W) uint16, 65535 = 1; the network sees `batch_size` tiles at a time.

    Images that fit into tile_size are seen whole. Images are padded at the right and bottom to multiples of 16 or 32 by
    replication, as the network itself pads, so that every tile begins at such a multiple and all tiles have one size.
    Only one row of tiles is summed up at a time; the lines that the next row does not reach go to the result. each() is
    called before every batch; what it raises ends the work.
    """
    tile, num_classes, (height, width) = tile_size(predictor.config), predictor.config["num_classes"], images.shape[1:3]
    multiple = multiple_of(predictor.config)
    images = np.pad(images, [(0, 0), (0, -height % multiple), (0, -width % multiple), (0, 0)], mode="edge")
    count, bottom, right = images.shape[:3]
    tops, row_weights = windows(bottom, tile[0], multiple=multiple)
    lefts, column_weights = windows(right, tile[1], multiple=multiple)
    tile_h, tile_w = row_weights.shape[1], column_weights.shape[1]
    places = [(k, left, weights) for k in range(count) for left, weights in zip(lefts, column_weights, strict=True)]
    steps = len(tops) * math.ceil(len(places) / batch_size)
    bar = tqdm(total=steps, desc="tiles", unit="batch", leave=False, disable=None if steps > 1 and is_main() else True)
    result = np.empty((count, num_classes, height, width), np.uint16)
    strip = np.zeros((count, tile_h, right, num_classes), np.float32)
    for top, end, weights_y in zip(tops, [*tops[1:], bottom], row_weights, strict=True):
        for batch in (places[first : first + batch_size] for first in range(0, len(places), batch_size)):
            if each:
                each()
            seen = np.stack([images[k, top : top + tile_h, left : left + tile_w] for k, left, _ in batch])
            for (k, left, weights_x), values in zip(batch, predictor(seen), strict=True):
                strip[k, :, left : left + tile_w] += values * (weights_y[:, None] * weights_x)[..., None]
            bar.update()
        stop = min(end, height)
        result[:, :, top:stop] = np.rint(strip[:, : stop - top, :width] * 65535).transpose(0, 3, 1, 2)
        strip = np.concatenate([strip[:, end - top :], np.zeros_like(strip[:, : end - top])], axis=1)
    bar.close()
    return result
