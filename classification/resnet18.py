"""torchvision's ResNet-18 in separate steps, its weights, and Grad-CAM.

from classification.resnet18 import ResNet18, fill_body

model = ResNet18(num_classes=2, freeze_bn=True)
fill_body(model, torch.load("resnet18-f37072fd.pth"), "resnet18-f37072fd.pth")
"""

from pathlib import Path

import torch
from torch import nn
from torchvision.models import ResNet18_Weights
from torchvision.models.resnet import BasicBlock, ResNet

from common.cli import listed


class FixedBatchNorm(nn.BatchNorm2d):
    """Batch norm that keeps the statistics it was loaded with, also in training; scale and shift still learn."""

    def train(self, mode=True):
        return super().train(False)


class Head(nn.Linear):
    """A linear layer in float32, also under autocast: logits in half precision are too coarse to compare."""

    def forward(self, features):
        with torch.autocast(features.device.type, enabled=False):
            return super().forward(features.float())


class ResNet18(ResNet):
    """torchvision's ResNet-18 (He et al., 2016; the same state_dict) as separate steps.

    maps: (N, 3, H, W) -> (N, 512, H/32, W/32); features: -> (N, 512); forward: -> (N, num_classes) logits, float32.
    In eval mode with mirror, features are the mean over a picture and its mirror image.
    """

    def __init__(self, num_classes, freeze_bn=False, mirror=False):
        super().__init__(BasicBlock, [2, 2, 2, 2], num_classes, norm_layer=FixedBatchNorm if freeze_bn else None)
        self.mirror = mirror
        self.fc = Head(self.fc.in_features, num_classes)
        # undecided at first: the body gets no gradient before the head has learned anything
        nn.init.zeros_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)

    def maps(self, images):
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def pool(self, maps):
        return self.avgpool(maps).flatten(1)

    def features(self, images):
        features = self.pool(self.maps(images))
        if self.mirror and not self.training:
            features = (features + self.pool(self.maps(images.flip(3)))) / 2
        return features

    def forward(self, images):
        return self.fc(self.features(images))


def fill_body(model, weights, source):
    """Load the weights of a ResNet-18, {name: tensor} of any precision, all but its head.

    source: their name in errors. ValueError when they are those of something else.
    """
    weights = {key: value for key, value in weights.items() if not key.startswith("fc.")}
    own = {key: value for key, value in model.state_dict().items() if not key.startswith("fc.")}
    needed = [key for key in own if not key.endswith("num_batches_tracked")]
    problems = [f"{key} is missing" for key in needed if key not in weights]
    problems += [f"{key} is unknown" for key in weights if key not in own]
    problems += [
        f"{key} is {tuple(value.shape)} instead of {tuple(own[key].shape)}"
        for key, value in weights.items()
        if key in own and value.shape != own[key].shape
    ]
    if problems:
        raise ValueError(f"{source} is not a state_dict of a ResNet-18: {listed(problems, most=1)}")
    model.load_state_dict({key: value.to(own[key].dtype) for key, value in weights.items()}, strict=False)


def imagenet_file():
    """torchvision's IMAGENET1K_V1 file, downloaded through torchvision at the first use; OSError says what to do."""
    url = ResNet18_Weights.IMAGENET1K_V1.url
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
    if not path.is_file():
        print(f"downloading torchvision's ImageNet weights (44.7 MB) to {path}")
        try:
            ResNet18_Weights.IMAGENET1K_V1.get_state_dict(progress=True, check_hash=True)
        except (OSError, RuntimeError) as error:
            raise OSError(
                f"cannot download {url} ({getattr(error, 'reason', error)}); put the file {path.name} into "
                f"{path.parent}, or give --weights PATH, or --weights none"
            ) from None
    return path


def grad_cam(model, image, target):
    """Where the logit of class `target` came from: Grad-CAM (Selvaraju et al., 2017) of the last convolutions.

    image: (3, H, W) standardised -> (H, W) float32 in [0, 1]; all 0 when nothing supports the class.
    """
    model.eval()
    with torch.enable_grad():
        maps = model.maps(image[None]).detach().requires_grad_()
        (gradient,) = torch.autograd.grad(model.fc(model.pool(maps))[0, target], maps)
    heat = torch.relu((gradient.mean((2, 3), keepdim=True) * maps).sum(1, keepdim=True)).detach()
    heat = nn.functional.interpolate(heat.float(), image.shape[1:], mode="bilinear", align_corners=False)[0, 0]
    return (heat / heat.max().clamp(min=1e-12)).cpu().numpy()
