"""utils.py, by hand; and the one seed that sets all random streams."""

import argparse

import pytest
from torch import nn

from utils import AverageMeter, count_params, str2bool


@pytest.mark.parametrize("value", [True, 1, "true", "True", "TRUE", "yes", "Yes", "1", " true "])
def test_what_means_true(value):
    assert str2bool(value) is True


@pytest.mark.parametrize("value", [False, 0, "false", "False", "FALSE", "no", "No", "0", "false\n"])
def test_what_means_false(value):
    assert str2bool(value) is False


@pytest.mark.parametrize("value", ["", "t", "2", "on", "None", None, "truee", 2, 0.5])
def test_what_means_neither(value):
    with pytest.raises(argparse.ArgumentTypeError, match="is neither True nor False"):
        str2bool(value)


def test_average_meter_by_hand():
    meter = AverageMeter()
    assert (meter.val, meter.avg, meter.sum, meter.count) == (0, 0, 0, 0)
    meter.update(2.0)
    meter.update(5.0, n=3)
    assert (meter.val, meter.avg, meter.sum, meter.count) == (5.0, 17 / 4, 17.0, 4)
    meter.update(9.0, n=0)
    assert (meter.val, meter.avg, meter.count) == (9.0, 17 / 4, 4)
    meter.reset()
    assert (meter.val, meter.avg, meter.sum, meter.count) == (0, 0, 0, 0)
    meter.update(9.0, n=0)
    assert meter.avg == 0


def test_count_params_counts_what_is_trained():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2, bias=False))
    assert count_params(model) == (12 + 4) + (4 + 4) + 8
    model[0].weight.requires_grad_(False)
    assert count_params(model) == 4 + 8 + 8
