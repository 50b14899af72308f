"""The ResNet-18 is torchvision's; its weights come from many kinds of files; Grad-CAM is what its paper says."""

import pytest
import torch
import torchvision

from classification.resnet18 import ResNet18, fill_body, grad_cam
from common.files import load_weights


@pytest.fixture(scope="module")
def reference():
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=5).eval()
    for name, value in model.named_buffers():
        if "running" in name:
            value.uniform_(0.5, 1.5)
    return model


def test_it_is_torchvisions_network(reference):
    images = torch.randn(2, 3, 64, 64)
    model = ResNet18(5).eval()
    model.load_state_dict(reference.state_dict())
    with torch.no_grad():
        assert torch.equal(model(images), reference(images))
        model.mirror = True
        expected = (reference(images) + reference(images.flip(3))) / 2
        assert torch.allclose(model(images), expected, atol=1e-5)


def test_frozen_statistics_stay(reference):
    for freeze_bn, moved in ((True, False), (False, True)):
        model = ResNet18(5, freeze_bn=freeze_bn)
        before = model.bn1.running_mean.clone()
        model.train()(torch.randn(2, 3, 64, 64)).sum().backward()
        assert (not torch.equal(model.bn1.running_mean, before)) == moved
        assert model.bn1.weight.grad is not None or freeze_bn


@pytest.mark.parametrize("form", ["plain", "module", "half", "state_dict", "headless"])
def test_bodies_are_taken_from_many_kinds_of_files(reference, form, tmp_path):
    state = dict(reference.state_dict())
    if form == "module":
        state = {f"module.{key}": value for key, value in state.items()}
    if form == "half":
        state = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    if form == "state_dict":
        state = {"epoch": 3, "state_dict": state}
    if form == "headless":
        state = {key: value for key, value in state.items() if not key.startswith("fc.")}
    model = ResNet18(2)
    torch.save(state, tmp_path / "x.pth")
    fill_body(model, load_weights(tmp_path / "x.pth"), "x.pth")
    assert model.fc.weight.shape == (2, 512) and not model.fc.weight.any()
    tolerance = 1e-3 if form == "half" else 0
    for key, value in reference.state_dict().items():
        if not key.startswith("fc."):
            assert torch.allclose(model.state_dict()[key], value, rtol=tolerance, atol=tolerance), key
            assert model.state_dict()[key].dtype == value.dtype


def test_logits_are_float32_under_autocast():
    """Also when the head alone is trained, on features in half precision."""
    model, features = ResNet18(3), torch.randn(2, 512)
    torch.nn.init.normal_(model.fc.weight)
    with torch.autocast("cpu", torch.bfloat16):
        found = model.fc(features.bfloat16())
        assert model(torch.randn(2, 3, 64, 64)).dtype == torch.float32
    assert torch.equal(found, features.bfloat16().float() @ model.fc.weight.T + model.fc.bias)


def test_something_else_is_refused(reference):
    state = dict(reference.state_dict())
    wrong = [
        ({"a": torch.zeros(1)}, "conv1.weight is missing and 100 more"),
        ({**state, "layer1.2.conv1.weight": torch.zeros(1)}, "layer1.2.conv1.weight is unknown"),
        (
            {**state, "conv1.weight": torch.zeros(64, 1, 7, 7)},
            r"conv1.weight is \(64, 1, 7, 7\) instead of \(64, 3, 7, 7\)",
        ),
    ]
    for content, reason in wrong:
        with pytest.raises(ValueError, match=f"x.pth is not a state_dict of a ResNet-18: {reason}"):
            fill_body(ResNet18(2), content, "x.pth")


def test_grad_cam_by_hand():
    """With a linear head over the mean, the gradient of a logit is the head's weight over the number of places."""
    torch.manual_seed(0)
    model = ResNet18(3).eval()
    torch.nn.init.normal_(model.fc.weight)
    image = torch.randn(3, 96, 64)
    with torch.no_grad():
        maps = model.maps(image[None])[0]
        small = torch.relu((model.fc.weight[1][:, None, None] * maps).sum(0))
    small = torch.nn.functional.interpolate(small[None, None], (96, 64), mode="bilinear")[0, 0]
    heat = torch.from_numpy(grad_cam(model, image, 1))
    assert heat.shape == (96, 64)
    assert torch.allclose(heat, small / small.max(), atol=1e-4)
    torch.nn.init.zeros_(model.fc.weight)
    assert not grad_cam(model, image, 1).any()
