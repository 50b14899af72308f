"""The nuclei of one picture of any size, with a run of train.py --target instances.

    found = find_nuclei(Predictor("nuclei"), picture)               # the scale is searched
    found = find_nuclei(Predictor("nuclei"), picture, diameter=35)  # nuclei of about 35 pixels
    found.labels, found.confidence, found.scale

val.py, predict.py and notebooks share it. An exported file answers as well: OnnxPredictor("nuclei_L4.onnx").
"""

from typing import NamedTuple

import cv2
import numpy as np

from common.images import to_channels
from inference import predict_tiled
from instances import DEFAULTS, sequential
from nuclei.blocks import nuclei_in_blocks
from nuclei.scale_search import find_scale
from nuclei.scaling import resize_labels, stretch_picture, zoom

SEARCHED = 1024  # pixels per side of the part of a large picture in which the scale is searched
LEAST_SIDE = 16  # pixels that the network sees of a picture, unless the picture has less
MOST_PIXELS = 2**28  # of a whole picture as the network sees it: 2 GiB of maps and labels
MOST_SEARCHED = 2**23  # of the part in which the scale is searched


class Found(NamedTuple):
    """The nuclei of a picture."""

    labels: np.ndarray  # (H, W) int32, 0 background, 1 ... n the nuclei
    confidence: np.ndarray  # (n + 1,) float32 in [0, 1]: the mean of the mask over each nucleus, 0 for the background
    scale: float  # network pixels per pixel of the picture


def find_nuclei(predictor, picture, diameter=None, batch_size=2):
    """picture: (H, W, C) uint8, as common.images.read_picture returns it -> Found.

    predictor: inference.Predictor or OnnxPredictor, its run one of --target instances. diameter: the typical nucleus,
    in pixels of the picture; by default the scale is searched (scale_search.py), in large pictures in a window with
    much structure. batch_size: tiles that the network sees at once. ValueError for a diameter at which the network
    would see more than MOST_PIXELS.
    """
    config = predictor.config
    image = stretch_picture(picture, config)
    lowest, highest = bounds_of(image.shape[:2], MOST_PIXELS)
    thresholds = {key: config[key] for key in DEFAULTS}

    def look(part, scale):
        maps = predict_tiled(predictor, zoom(part, scale)[None], batch_size)[0]
        return nuclei_in_blocks(maps, **thresholds)

    if diameter:
        scale = config["diameter"] / diameter
        if scale > highest:
            raise ValueError(
                f"nuclei of {diameter:g} pixels would be shown {scale:.3g} times as large, "
                f"{scale**2 * image.shape[0] * image.shape[1]:.3g} pixels in all; take a larger --diameter"
            )
        labels, confidence = look(image, max(scale, lowest))
    else:
        part = image[busiest_window(image, SEARCHED)]
        looks = {}

        def nuclei_at(scale):
            looks[scale] = look(part, scale)
            return looks[scale][0]

        bounds = lowest, min(highest, bounds_of(part.shape[:2], MOST_SEARCHED)[1])
        scale, _ = find_scale(nuclei_at, config["diameter"], config.get("scale", 1.0), bounds)
        labels, confidence = looks[scale] if part.shape == image.shape else look(image, scale)
    labels = resize_labels(labels, image.shape[:2])
    kept = np.bincount(labels.ravel(), minlength=len(confidence)) > 0
    kept[0] = True
    return Found(sequential(labels), confidence[kept], scale)


def bounds_of(shape, most):
    """The lowest and highest scale at which the network sees a picture of (height, width): `most` pixels or less."""
    return min(1.0, LEAST_SIDE / min(shape)), (most / (shape[0] * shape[1])) ** 0.5


def busiest_window(image, side):
    """(H, W, C) uint8 -> (rows, columns), slices of at most `side` pixels: where grey levels differ most.

    That is where the mean gradient of the picture, shrunk eight times, is largest; of equal windows the one nearest
    to the middle.
    """
    size = [min(side, length) for length in image.shape[:2]]
    if size == [*image.shape[:2]]:
        return slice(None), slice(None)
    grey = to_channels(image, 1)[..., 0]
    small = cv2.resize(grey, None, fx=1 / 8, fy=1 / 8, interpolation=cv2.INTER_AREA).astype(np.float32)
    slope = np.hypot(cv2.Sobel(small, cv2.CV_32F, 1, 0), cv2.Sobel(small, cv2.CV_32F, 0, 1))
    total = cv2.integral(slope)
    steps = [np.linspace(0, length - own, 17).round().astype(int) for length, own in zip(image.shape[:2], size)]
    places = [(top, left) for top in steps[0] for left in steps[1]]

    def structure(place):
        top, left = (start // 8 for start in place)
        bottom, right = (min((start + own) // 8, end) for start, own, end in zip(place, size, slope.shape))
        inside = total[bottom, right] - total[top, right] - total[bottom, left] + total[top, left]
        off = sum(abs(2 * start - length + own) for start, own, length in zip(place, size, image.shape))
        return round(inside, 3), -off

    best = max(places, key=structure)
    return tuple(slice(start, start + own) for start, own in zip(best, size, strict=True))
