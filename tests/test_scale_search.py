"""nuclei/scale_search.py: the scale of pictures of known nuclei, seen by networks that find them more or less well.

python -m pytest -q tests/test_scale_search.py
"""

import math

import numpy as np
import pytest

from nuclei.scale_search import PASSES, find_scale
from nuclei.scaling import typical_diameter


def squares(sides):
    """A label map of squares with these sides, in a row."""
    labels = np.zeros((max(sides, default=1), sum(sides) + 1), np.int32)
    left = 0
    for label, side in enumerate(sides, 1):
        labels[:side, left : left + side] = label
        left += side
    return labels


def diameter_of(area):
    return 2 * math.sqrt(area / math.pi)


class Network:
    """nuclei_at of a picture whose nuclei are squares with these sides; `seen` are the scales that were asked for.

    What is smaller than `least` or larger than `most` pixels per side is not found.
    """

    def __init__(self, sides, least=1, most=math.inf):
        self.sides, self.least, self.most, self.seen = sides, least, most, []

    def __call__(self, scale):
        self.seen.append(scale)
        sides = [round(side * scale) for side in self.sides]
        return squares([side for side in sides if self.least <= side <= self.most])


def test_typical_diameter_by_hand():
    assert typical_diameter(np.zeros((4, 4), np.int32)) is None
    assert typical_diameter(squares([3])) == pytest.approx(diameter_of(9))
    assert typical_diameter(squares([4, 10, 20])) == pytest.approx(diameter_of(250))  # 16 of 400 pixels is debris
    debris = squares([1] * 5 + [10, 10, 12, 14])
    assert typical_diameter(debris) == pytest.approx(diameter_of((100 + 144) / 2))
    labels = squares([3, 5])
    labels[labels == 1] = 7  # numbers may be missing
    assert typical_diameter(labels) == pytest.approx(diameter_of(17))


def test_near_enough_takes_one_pass():
    network = Network([20, 22, 24])
    assert find_scale(network, diameter_of(22**2) * 1.2) == 1 and network.seen == [1]


@pytest.mark.parametrize("side", [6, 40, 150])
def test_a_second_pass_where_it_is_far(side):
    network = Network([side] * 3)
    scale = find_scale(network, diameter_of(20**2))
    assert scale == pytest.approx(20 / side, rel=0.01) and network.seen == [1, scale]


def test_nothing_at_the_start():
    network = Network([100], most=60)
    assert find_scale(network, diameter_of(50**2)) == 0.5 and network.seen == [1, 0.5]
    network = Network([10], least=15)
    assert find_scale(network, diameter_of(20**2)) == 2 and network.seen == [1, 0.5, 2]


def test_nothing_at_all():
    network = Network([])
    assert find_scale(network, 22, start=0.7) == 0.7 and network.seen == [0.7, 0.35, 1.4]


def test_a_pass_that_finds_nothing_ends_the_search():
    network = Network([10], most=15)
    assert find_scale(network, diameter_of(40**2)) == 1 and network.seen == [1, 4]


def test_bounds():
    network = Network([100] * 3)
    assert find_scale(network, diameter_of(10**2), bounds=(0.5, 2)) == 0.5 and network.seen == [1, 0.5]
    network = Network([10] * 3)
    assert find_scale(network, diameter_of(100**2), start=4, bounds=(0.5, 2)) == 2 and network.seen == [2]


def test_the_best_of_a_search_that_does_not_settle():
    """A network that finds pieces of 10 or of 40 pixels, whatever the scale: 10 is nearer to 19 than 40 is."""
    answers = iter([40, 10, 40, 10])
    seen = []

    def nuclei_at(scale):
        seen.append(scale)
        return squares([next(answers)])

    scale = find_scale(nuclei_at, diameter_of(19**2))
    assert len(seen) == PASSES and scale == seen[1] == pytest.approx(19 / 40)
