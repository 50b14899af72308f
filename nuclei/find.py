"""The nuclei of one picture of any size, with a run of train.py --target instances.

    found = find_nuclei(Predictor("nuclei"), picture)               # the scale is searched
    found = find_nuclei(Predictor("nuclei"), picture, diameter=35)  # nuclei of about 35 pixels
    found.labels, found.confidence, found.scale

val.py, predict.py and notebooks share it. An exported file answers as well: OnnxPredictor("nuclei_L4.onnx").
"""

from typing import NamedTuple

import cv2
import numpy as np

from common.images import squeeze, to_channels
from inference import predict_tiled, without_tta
from instances import DEFAULTS, count_values, sequential
from nuclei.blocks import nuclei_in_blocks
from nuclei.scale_search import find_scale
from nuclei.scaling import resize_nuclei, stretch_picture, zoom

SEARCHED = 1024  # pixels per side, at most, of the part of a picture in which the scale is searched
SHRINK = 8  # how many times the picture is shrunk to choose that part
LARGEST = 4.0  # highest scale that the search tries: objects below a quarter of the trained diameter are debris
LEAST_SIDE = 16  # network pixels that a picture's shorter side keeps, unless it has fewer to begin with
MOST_SEEN = 2**28  # network pixels of a whole picture, at most: 3 GiB of maps and labels
MOST_SEARCHED = 2**23  # the same for the part in which the scale is searched


class Found(NamedTuple):
    """The nuclei of a picture."""

    labels: np.ndarray  # (H, W) int32, 0 background, 1 ... n the nuclei
    confidence: np.ndarray  # (n + 1,) float32 in [0, 1]: the mean of the mask over each nucleus, 0 for the background
    scale: float  # network pixels per pixel of the picture
    limited: bool = False  # whether a higher scale was found, at which the network would see more than MOST_SEEN


def find_nuclei(predictor, picture, diameter=None, batch_size=2, each=None):
    """picture: (H, W) or (H, W, C), as common.images.read_picture returns it -> Found.

    predictor: inference.Predictor or OnnxPredictor, its run one of --target instances. diameter: the typical nucleus,
    in pixels of the picture; by default the scale is searched (scale_search.py), without test-time augmentation and, in
    large pictures, in a window with much structure. batch_size: tiles that the network sees at once. each() is called
    before every batch of tiles; what it raises ends the work. ValueError for a diameter at which the network would see
    more than MOST_SEEN.
    """
    config = predictor.config
    image = stretch_picture(picture, config)
    lowest, highest = bounds_of(image.shape[:2], MOST_SEEN)
    thresholds = {key: config[key] for key in DEFAULTS}

    def look(part, scale, predictor=predictor):
        maps = predict_tiled(predictor, zoom(part, scale)[None], batch_size, each)[0]
        return *nuclei_in_blocks(maps, **thresholds), maps[0].copy()

    if diameter:
        scale = config["diameter"] / diameter
        if scale > highest:
            raise ValueError(
                f"nuclei of {diameter:g} pixels would be shown {scale:.3g} times as large, "
                f"{scale**2 * image.shape[0] * image.shape[1]:.3g} pixels in all; cut the picture into parts, or give "
                "a larger --diameter"
            )
        wanted = scale = max(scale, lowest)
        labels, confidence, mask = look(image, scale)
    else:
        part, plain = image[busiest_window(image, SEARCHED)], without_tta(predictor)
        looks = {}

        def nuclei_at(scale):
            looks[scale] = look(part, scale, plain)
            return looks[scale][0]

        bounds = lowest, min(LARGEST, bounds_of(part.shape[:2], MOST_SEARCHED)[1])
        wanted = find_scale(nuclei_at, config["diameter"], config.get("scale", 1.0), bounds)
        scale = min(wanted, highest)
        seen = part.shape == image.shape and plain is predictor
        labels, confidence, mask = looks[scale] if seen else look(image, scale)
    labels = resize_nuclei(labels, mask, image.shape[:2], config["mask_threshold"], config["smoothing"])
    kept = count_values(labels, len(confidence)) > 0
    kept[0] = True
    return Found(sequential(labels), confidence[kept], scale, scale < wanted)


def bounds_of(shape, most):
    """The lowest and highest scale at which the network sees a picture of (height, width): `most` pixels or less."""
    return min(1.0, LEAST_SIDE / min(shape)), (most / (shape[0] * shape[1])) ** 0.5


def busiest_window(image, side):
    """(H, W, C) uint8 -> (rows, columns), slices of at most `side` pixels: where neighbouring pixels differ most.

    That is where the sum of the gradient of the grey picture, shrunk by SHRINK, is largest.
    """
    height, width = image.shape[:2]
    if max(height, width) <= side:
        return slice(None), slice(None)
    small = (max(1, height // SHRINK), max(1, width // SHRINK))
    grey = squeeze(to_channels(image, 1), small).reshape(small)
    slope = np.hypot(cv2.Sobel(grey, cv2.CV_32F, 1, 0), cv2.Sobel(grey, cv2.CV_32F, 0, 1))
    rows, columns = (min(side // SHRINK, length) for length in small)
    total = cv2.boxFilter(slope, -1, (columns, rows), anchor=(0, 0), normalize=False)  # of the window that starts here
    total = total[: small[0] - rows + 1, : small[1] - columns + 1]
    window = []
    for start, length in zip(np.unravel_index(total.argmax(), total.shape), (height, width), strict=True):
        first = max(0, min(int(start) * SHRINK, length - side))
        window.append(slice(first, min(first + side, length)))
    return tuple(window)
