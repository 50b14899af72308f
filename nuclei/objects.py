"""What is measured of each nucleus: area, place, shape, intensity and confidence; and of a picture as a whole.

    table = measure(labels, image, confidence, pixel_size=0.5)   # {column: [a value per nucleus]}, for objects.csv
    pandas.DataFrame(table)
    summarise(table, labels.shape, pixel_size=0.5)               # count, density and median diameter, for images.csv

Lengths are in pixels, areas in pixels squared. With a pixel size, columns that end in _um and _um2 repeat them in
micrometres.
"""

import numpy as np
from skimage.measure import regionprops_table

PROPERTIES = {  # our columns: what scikit-image calls them
    "object": "label",
    "area": "area",
    "centroid_x": "centroid-1",
    "centroid_y": "centroid-0",
    "left": "bbox-1",
    "top": "bbox-0",
    "right": "bbox-3",
    "bottom": "bbox-2",
    "equivalent_diameter": "equivalent_diameter_area",
    "eccentricity": "eccentricity",
    "solidity": "solidity",
    "perimeter": "perimeter",
}
CHANNELS = {1: ("grey",), 3: ("red", "green", "blue"), 4: ("red", "green", "blue")}  # names by number; alpha is none
LENGTHS = ("centroid_x", "centroid_y", "equivalent_diameter", "perimeter")  # that are repeated in micrometres
DIGITS = 4  # after the decimal point, or significant digits of values below 0.1


def measure(labels, image, confidence=None, pixel_size=None):
    """Label map and picture -> {column: list}, one entry per nucleus, in the order of their numbers.

    labels: (H, W) int32. image: (H, W) or (H, W, C), whole numbers or floats. confidence: (n + 1,) float in [0, 1],
    the mean mask probability of each label (see blocks.py); without it there is no such column. pixel_size: micrometres
    per pixel.

    Columns: object (its number); area; centroid_x, centroid_y (0 is the centre of the first pixel); left, top, width,
    height of its box; equivalent_diameter (of a circle of the same area); eccentricity (of the ellipse with the same
    second moments: 0 for a circle, towards 1 for a line); solidity (area / area of the convex hull); perimeter; mean_
    and max_ of each channel, in the picture's own values; confidence; touches_border (of the picture, which may cut the
    nucleus off).
    """
    image = image.reshape(*labels.shape, -1)
    names = CHANNELS.get(image.shape[2]) or [f"channel_{k}" for k in range(image.shape[2])]
    wanted = {name.partition("-")[0] for name in PROPERTIES.values()} | {"intensity_mean", "intensity_max"}
    found = regionprops_table(labels, image[..., : len(names)], properties=sorted(wanted))
    raw = {column: found[name] for column, name in PROPERTIES.items()}
    height, width = labels.shape
    table = {
        "object": raw["object"],
        "area": raw["area"].astype(int),
        **{column: raw[column] for column in ("centroid_x", "centroid_y", "left", "top")},
        "width": raw["right"] - raw["left"],
        "height": raw["bottom"] - raw["top"],
        **{column: raw[column] for column in ("equivalent_diameter", "eccentricity", "solidity", "perimeter")},
    }
    for k, name in enumerate(names):
        table[f"mean_{name}"] = found[f"intensity_mean-{k}"]
        highest = found[f"intensity_max-{k}"]
        table[f"max_{name}"] = highest if image.dtype.kind == "f" else highest.astype(int)
    if confidence is not None:
        table["confidence"] = confidence[raw["object"]]
    table["touches_border"] = (
        (raw["left"] == 0) | (raw["top"] == 0) | (raw["right"] == width) | (raw["bottom"] == height)
    )
    if pixel_size:
        table["area_um2"] = table["area"] * pixel_size**2
        table.update({f"{column}_um": table[column] * pixel_size for column in LENGTHS})
    return {column: _rounded(values) for column, values in table.items()}


def _rounded(values):
    """An array -> a list of Python's own numbers, which a CSV file shows as people write them."""
    return [rounded(value) if isinstance(value, float) else value for value in values.tolist()]


def rounded(value):
    """1234.56789 -> 1234.5679; 0.0000345678 -> 3.457e-05."""
    return round(value, DIGITS) if abs(value) >= 0.1 else float(f"{value:.{DIGITS}g}")


def summarise(table, shape, pixel_size=None):
    """A table of `measure` and the picture's (height, width) -> {column: number}, what images.csv says of a picture.

    objects: their count; objects_per_megapixel; median_diameter: of a circle of the same area, in pixels, None without
    nuclei. With pixel_size, in micrometres per pixel: objects_per_mm2 and median_diameter_um as well.
    """
    count, pixels = len(table["object"]), shape[0] * shape[1]
    diameter = float(np.median(table["equivalent_diameter"])) if count else None
    found = {
        "objects": count,
        "objects_per_megapixel": rounded(count / pixels * 1e6),
        "median_diameter": rounded(diameter) if count else None,
    }
    if pixel_size:
        found["objects_per_mm2"] = rounded(count / (pixels * pixel_size**2) * 1e6)
        found["median_diameter_um"] = rounded(diameter * pixel_size) if count else None
    return found
