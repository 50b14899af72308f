"""torchvision's ResNet-18 with its steps apart, its weights, and where it looks; imports torch and torchvision only.

from resnet18 import ResNet18, fill_body

model = ResNet18(num_classes=2, freeze_bn=True)
fill_body(model, torch.load("resnet18-f37072fd.pth"), "resnet18-f37072fd.pth")
"""

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet


class FixedBatchNorm(nn.BatchNorm2d):
    """Batch norm that keeps the statistics it was loaded with, in training as well; scale and shift still learn."""

    def train(self, mode=True):
        return super().train(False)


class ResNet18(ResNet):
    """torchvision's ResNet-18 (He et al., 2016; the same state_dict) with its steps apart.

    maps: (N, 3, H, W) -> (N, 512, H/32, W/32); features: -> (N, 512); forward: -> (N, num_classes) logits, float32.
    In eval mode with mirror, features are the mean over a picture and its mirror image.
    """

    def __init__(self, num_classes, freeze_bn=False, mirror=False):
        super().__init__(BasicBlock, [2, 2, 2, 2], num_classes, norm_layer=FixedBatchNorm if freeze_bn else None)
        self.mirror = mirror
        nn.init.zeros_(self.fc.weight)  # undecided at first: the body gets no gradient before the head knows something
        nn.init.zeros_(self.fc.bias)

    def maps(self, images):
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def pool(self, maps):
        return self.avgpool(maps).flatten(1)

    def head(self, features):
        with torch.autocast(features.device.type, enabled=False):  # half-precision logits are too coarse to compare
            return self.fc(features.float())

    def features(self, images):
        features = self.pool(self.maps(images))
        if self.mirror and not self.training:
            features = (features + self.pool(self.maps(images.flip(3)))) / 2
        return features

    def forward(self, images):
        return self.head(self.features(images))


def fill_body(model, state, source):
    """Load a ResNet-18's state_dict, all but its head, whatever its precision.

    `module.` before the names and a surrounding {"state_dict": ...} or {"model": ...} are accepted.
    source: what an error calls it. ValueError when it is something else or holds values that are not finite.
    """
    if isinstance(state, dict):
        state = next((state[key] for key in ("state_dict", "model") if isinstance(state.get(key), dict)), state)
    state = state.items() if isinstance(state, dict) else ()
    state = {str(key).removeprefix("module."): value for key, value in state if torch.is_tensor(value)}
    state = {key: value for key, value in state.items() if not key.startswith("fc.")}
    own = {key: value for key, value in model.state_dict().items() if not key.startswith("fc.")}
    needed = [key for key in own if not key.endswith("num_batches_tracked")]
    problems = [f"{key} is missing" for key in needed if key not in state]
    problems += [f"{key} is unknown" for key in state if key not in own]
    for key in [key for key in own if key in state]:
        if state[key].shape != own[key].shape:
            problems.append(f"{key} is {tuple(state[key].shape)} instead of {tuple(own[key].shape)}")
        elif not torch.isfinite(state[key].float()).all():
            problems.append(f"{key} is not finite")
    if problems:
        more = f", and {len(problems) - 1} more such entries" if len(problems) > 1 else ""
        raise ValueError(f"{source} is no state_dict of a ResNet-18: {problems[0]}{more}")
    model.load_state_dict({key: value.to(own[key].dtype) for key, value in state.items()}, strict=False)


def grad_cam(model, image, target):
    """Where the logit of class `target` came from: Grad-CAM (Selvaraju et al., 2017) of the last convolutions.

    image: (3, H, W) standardised -> (H, W) float32, 0 to 1, all 0 where nothing speaks for the class.
    """
    model.eval()
    with torch.enable_grad():
        maps = model.maps(image[None]).detach().requires_grad_()
        (gradient,) = torch.autograd.grad(model.head(model.pool(maps))[0, target], maps)
    heat = torch.relu((gradient.mean((2, 3), keepdim=True) * maps).sum(1, keepdim=True)).detach()
    heat = nn.functional.interpolate(heat.float(), image.shape[1:], mode="bilinear", align_corners=False)[0, 0]
    return (heat / heat.max().clamp(min=1e-12)).cpu().numpy()
