"""Finding the scale of a picture: how far to zoom until its nuclei are as large as those that the network has learned.

    scale = find_scale(nuclei_at, diameter=22)     # nuclei_at(scale) -> label map, as the network sees it
    scale = 22 / 35                                # or where the diameter is known, such as from --diameter 35

scale is network pixels per pixel of the picture.
"""

import math
from typing import NamedTuple

import numpy as np

from nuclei.scaling import typical_diameter

FAR = 1.25  # another pass is worth its time where found and wanted diameter differ by more than this factor
PASSES = 3  # at most, counted from the first that finds nuclei


class Pass(NamedTuple):
    """What was found at one scale."""

    scale: float
    diameter: float | None  # the typical one, in network pixels


def find_scale(nuclei_at, diameter, start=1.0, bounds=(1 / 16, 16)):
    """-> the scale at which the typical diameter is nearest to `diameter`, in network pixels.

    nuclei_at(scale) -> label map of the picture, or of a part of it, at this scale. The first pass is at `start`, or,
    where it finds nothing, at half or twice of that. Another follows, up to PASSES, as long as the typical diameter is
    more than a factor of FAR from the wanted one. No scale lies outside of bounds = (lowest, highest). Where nothing
    is found at all, the answer is that of `start`.
    """

    def look(scale):
        return Pass(scale, typical_diameter(nuclei_at(scale)))

    def error(done):
        return abs(math.log(done.diameter / diameter))

    passes = []
    for scale in (start, start / 2, start * 2):
        passes.append(look(float(np.clip(scale, *bounds))))
        if passes[-1].diameter:
            break
    else:
        return passes[0].scale
    passes = passes[-1:]
    while error(passes[-1]) > math.log(FAR) and len(passes) < PASSES:
        last = passes[-1]
        scale = float(np.clip(last.scale * diameter / last.diameter, *bounds))
        if scale == last.scale:
            break
        done = look(scale)
        if not done.diameter:
            break
        passes.append(done)
    return min(passes, key=error).scale
