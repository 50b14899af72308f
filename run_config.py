"""The settings of a trained run, from models/<name>/config.yml or an exported file, checked once.

config = read_config(Path("models/run1"))    # every key that predicting needs, checked once
is_of_nuclei(config)                         # whether it answers with maps of individual nuclei, or with classes
"""

import argparse

from common.cli import interval
from common.files import read_yaml
from common.runs import check_kind
from data_folder import check_places

BOUNDS = {  # smallest and largest value of train.py's options that a run's readers use
    "num_classes": (1, 100),
    "width": (1, 256),
    "input_h": (1, 4096),
    "input_w": (1, 4096),
    "seed": (0, 2**32 - 1),
}
INPUT_CHANNELS = (1, 3, 4)  # grey, RGB, RGBA
TEXTS = ("arch", "dataset", "img_ext", "mask_ext", "loss")  # values of config.yml that must be text


def read_config(folder):
    """The config.yml of a run of train.py. ValueError, in one line, when it describes no such run."""
    path = folder / "config.yml"
    if not path.is_file():
        known = ", ".join(sorted(found.parent.name for found in folder.parent.glob("*/config.yml"))) or "none"
        raise FileNotFoundError(f"{path}: no such file; the runs are: {known}")
    config = read_yaml(path)
    check_kind(config, "arch", folder)
    needed = (*TEXTS, *BOUNDS, "input_channels", "deep_supervision", "mean", "std")
    if missing := [key for key in needed if key not in config]:
        raise ValueError(f"{path} is not from a run of train.py: {', '.join(missing)} missing")
    levels = (1, 4) if config["deep_supervision"] is True else (4, 4)
    fits = fits_of(config)
    fits.update({key: isinstance(config[key], str) for key in TEXTS})
    fits.update({key: is_within(config[key], BOUNDS[key]) for key in ("width", "seed")})
    fits["width"] = fits["width"] or (config["width"] is None and config.get("encoder", "none") != "none")
    fits["deep_supervision"] = isinstance(config["deep_supervision"], bool)
    fits.update({key: are_channels(config, key) for key in ("mean", "std")})
    fits["encoder"] = isinstance(config.get("encoder", "none"), str)
    fits["keep"] = config.get("keep", "best") in ("best", "last")
    fits["level"] = "level" not in config or is_within(config["level"], levels)
    wrong = [key for key, fit in fits.items() if not fit]
    if wrong:
        found = ", ".join(f"{key} {config.get(key)!r}" for key in wrong)
        raise ValueError(f"{path} is damaged: {found} is not what train.py writes")
    try:
        check_places(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return {**config, "name": folder.name}  # which a user may have copied or renamed


def levels_of(config):
    """The levels of U-Net++ that a run can answer with, the deepest last: [1, 2, 3, 4], or one alone."""
    if config.get("level"):
        return [config["level"]]
    return [1, 2, 3, 4] if config["deep_supervision"] else [4]


def kept_epoch(config):
    """Whose weights model.pth holds (train.py --keep): "best epoch" or "last epoch"."""
    return f"{config.get('keep', 'best')} epoch"


def fits_of(config):
    """{key: whether its value is one that train.py writes}, for what runs and exported files both tell."""
    scale = config.get("scale", 1)
    fits = {key: is_within(config[key], BOUNDS[key]) for key in ("num_classes", "input_h", "input_w")}
    fits["input_channels"] = config["input_channels"] in INPUT_CHANNELS
    fits["stem"] = config.get("stem", "full") in ("full", "half")
    fits["scale"] = _is_number(scale) and scale > 0
    fits["target"] = config.get("target", "masks") in ("masks", "instances")
    if is_of_nuclei(config):
        from instances import DEFAULTS, MAPS  # late: scipy and scikit-image take a second

        fits.update({key: _is_number(config.get(key)) and config[key] >= 0 for key in DEFAULTS})
        fits["smoothing"] = fits["smoothing"] and config["smoothing"] <= 100  # its time grows with it
        fits["diameter"] = _is_number(config.get("diameter")) and config["diameter"] > 0
        fits["stretch"] = _is_stretch(config.get("stretch"))
        fits["num_classes"] = config["num_classes"] == len(MAPS)
    return fits


def is_of_nuclei(config):
    """Whether a run answers with the maps of individual nuclei (--target instances), not with classes."""
    return config.get("target", "masks") == "instances"


def check_of_masks(config, name, reader):
    """ValueError when the run models/<name> finds individual nuclei, while `reader` is for runs of masks."""
    if is_of_nuclei(config):
        raise ValueError(f"models/{name} finds individual nuclei (--target instances); {reader} needs a run of masks")


def is_within(value, bounds):
    """Whether value is a whole number from bounds[0] to bounds[1]."""
    return type(value) is int and bounds[0] <= value <= bounds[1]


def _is_number(value):
    return type(value) in (int, float) and abs(value) < 1e6  # neither NaN nor infinity is


def stretch(text):
    """An argparse type, of --stretch: '1,99.8' or 'none'."""
    return text if text == "none" else interval(0, 100)(text)


def _is_stretch(text):
    try:
        return isinstance(text, str) and bool(stretch(text))
    except argparse.ArgumentTypeError:
        return False


def are_channels(config, key):
    """Whether the config's `mean` or `std` is a number for each channel, with standard deviations above 0."""
    values = config.get(key)
    if not isinstance(values, list) or len(values) != config["input_channels"]:
        return False
    return all(_is_number(value) and (key == "mean" or value > 0) for value in values)
