"""tasks.py: the official score of batches of crops; test_engine.py trains with the other tasks."""

import math

import cv2
import numpy as np
import pytest
import torch

from instances import DEFAULTS, targets
from losses import BCEDiceLoss, MapsLoss
from tasks import Instances, Truth

EXACT = {**DEFAULTS, "smoothing": 0}  # gives true maps back as they were
TASK = Instances(MapsLoss(BCEDiceLoss()), [1.0, 3.0], EXACT)


def pictures():
    """Label maps of two crops: two discs that touch, and three that do not -> (2, 48, 48) int32."""
    labels = np.zeros((2, 48, 48), np.int32)
    for k, centres in enumerate((((15, 24), (28, 24)), ((10, 10), (35, 12), (24, 36)))):
        for label, centre in enumerate(centres, 1):
            cv2.circle(labels[k], centre, 7, label, -1)
    return labels


def batch():
    labels = pictures()
    maps = torch.from_numpy(np.stack([targets(of_image) for of_image in labels]))
    return torch.zeros(2, 3, 48, 48), maps, {"img_id": ["a", "b"], "labels": torch.from_numpy(labels)}


def logits_of(maps):
    return torch.logit(maps.clamp(1e-4, 1 - 1e-4))


def test_perfect_maps_score_one_and_the_deepest_head_counts():
    images, truth = TASK.to_device(batch(), torch.device("cpu"), None)
    assert images.shape == (2, 3, 48, 48) and isinstance(truth, Truth)
    nothing = torch.full_like(truth.maps, -9.0)
    perfect = logits_of(truth.maps)
    for heads, expected in (([nothing, perfect], 1.0), ([perfect, nothing], 0.0), (perfect, 1.0)):
        counts = TASK.count(heads, truth, 2, training=False)
        assert counts.tolist() == [2 * expected, 2] and TASK.score_of(counts) == expected


def test_one_nucleus_of_three_is_missed():
    """At every threshold 1 of 1 in one image, and 2 of 3 in the other."""
    _, truth = TASK.to_device(batch(), torch.device("cpu"), None)
    maps = truth.maps.clone()
    maps[1][:, truth.labels[1] == 3] = 0
    counts = TASK.count(logits_of(maps), truth, 2, training=False)
    assert counts.tolist() == pytest.approx([1 + 2 / 3, 2])
    assert TASK.score_of(counts + counts) == pytest.approx(5 / 6)


def test_training_judges_one_crop_of_each_batch_and_none_that_is_not_its_own():
    _, truth = TASK.to_device(batch(), torch.device("cpu"), None)
    for own, expected in ((2, [1, 1]), (1, [1, 1]), (0, [0, 0])):
        assert TASK.count(logits_of(truth.maps), truth, own, training=True).tolist() == expected


def test_thresholds_are_those_of_the_config():
    _, truth = TASK.to_device(batch(), torch.device("cpu"), None)
    blind = Instances(MapsLoss(BCEDiceLoss()), thresholds={**EXACT, "smallest": 10_000})
    assert blind.count(logits_of(truth.maps), truth, 2, training=False).tolist() == [0, 2]


def test_the_loss_weighs_the_heads():
    _, truth = TASK.to_device(batch(), torch.device("cpu"), None)
    first, last = torch.randn(2, 2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    expected = (TASK.criterion(first, truth.maps) + 3 * TASK.criterion(last, truth.maps)) / 4
    assert math.isclose(TASK.loss([first, last], truth).item(), expected.item(), rel_tol=1e-6)
