"""The two networks, UNet and NestedUNet (U-Net++), and what they return.

    model = NestedUNet(num_classes=1, input_channels=3, deep_supervision=True)
    heads = as_heads(model(images))  # logits of [X^{0,1}, X^{0,2}, X^{0,3}, X^{0,4}], each (N, num_classes, H, W)
    small = model.prune(2)           # a smaller model: X^{0,2}, its head, and what feeds it
    fast = small.folded()            # for inference: no batch norm, the same output

Nodes carry the paper's names, X^{i,j} = `conv{i}_{j}`: i counts the downsamplings, j the steps along a skip pathway.
U-Net: Ronneberger, Fischer, Brox, MICCAI 2015, https://arxiv.org/abs/1505.04597
U-Net++: Zhou et al., DLMIA 2018, https://arxiv.org/abs/1807.10165, and IEEE TMI 2020, https://arxiv.org/abs/1912.05074
"""

import copy
import functools

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.checkpoint import checkpoint

from encoders import Encoder

DEPTH = 4  # downsamplings, as in both papers
WIDTH = 32  # filters of row 0 in both papers, doubled from row to row
interpolate = functools.partial(F.interpolate, scale_factor=2, mode="bilinear", align_corners=True)


@functools.lru_cache(maxsize=32)
def _interpolation(size, dtype, device):
    """(size, 2 size): the weight of input i in output k when a line is doubled bilinearly with aligned corners."""
    unit_lines = torch.eye(size, dtype=torch.float64)[None]
    return F.interpolate(unit_lines, scale_factor=2, mode="linear", align_corners=True)[0].to(device, dtype)


class _Double(torch.autograd.Function):
    """Bilinear doubling whose gradient is two matrix products, along the rows and along the columns.

    PyTorch's own backward scatters value by value on a CPU: it is 4 to 5 times slower in channels_last bfloat16, a
    tenth of a training step. On a GPU it adds in no fixed order, while matrix products repeat to the last bit.
    """

    @staticmethod
    def forward(ctx, x):
        ctx.shape = x.shape
        return interpolate(x)

    @staticmethod
    def backward(ctx, gradient):
        n, c, h, w = ctx.shape
        # torch.compile sees through the cache, with a warning
        matrix = _interpolation.__wrapped__ if torch.compiler.is_compiling() else _interpolation
        rows, columns = (matrix(size, gradient.dtype, gradient.device) for size in (h, w))
        if gradient.stride(1) != 1:
            return rows @ (gradient @ columns.T)
        # channels_last: the channels lie innermost
        gradient = gradient.permute(0, 2, 3, 1).reshape(n, 2 * h, 2 * w * c)
        halved = columns @ (rows @ gradient).reshape(n * h, 2 * w, c)
        return halved.reshape(n, h, w, c).permute(0, 3, 1, 2)


def upsample(x):
    """(N, C, H, W) -> (N, C, 2 H, 2 W), bilinear with aligned corners."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _Double.apply(x)
    return interpolate(x)


class VGGBlock(nn.Module):
    """(3x3 convolution, batch norm, ReLU) twice -> (N, out_channels, H, W).

    The input is one map (N, in_channels, H, W), or several maps that have in_channels together: they are concatenated
    after the last one, (N, C, H / 2, W / 2), has been upsampled. With `checkpointing` the concatenated maps, the
    largest tensors of a training, are not kept for the backward pass but computed again with the first convolution.
    """

    checkpointing = False

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(out_channels)

    def enter(self, *maps):
        *skips, last = maps
        return self.conv1(torch.cat([*skips, upsample(last)], dim=1) if skips else last)

    def forward(self, *maps):
        kept = not (self.checkpointing and torch.is_grad_enabled())
        x = self.enter(*maps) if kept else checkpoint(self.enter, *maps, use_reentrant=False)
        x = F.relu(self.bn1(x), inplace=True)
        return F.relu(self.bn2(self.conv2(x)), inplace=True)


class SkipNetwork(nn.Module):
    """What both networks share: nodes X^{i,j} connected by pooling, bilinear upsampling and skips.

    X^{i,0} sees the pooled X^{i-1,0}; any other X^{i,j} sees X^{i,k} for k in `skips(j)` and the upsampled X^{i+1,j-1}.
    A subclass defines the nodes, the skips, and the levels d that have a head on X^{0,d}.
    """

    nodes = ()  # (i, j) pairs, each after the nodes that feed it
    levels = (DEPTH,)
    scale = 1  # image pixels per pixel of row 0

    def __init__(self, num_classes, input_channels, width, encoder=None, encoded=range(0)):
        """encoded: the rows i whose X^{i,0} are the stages of the encoder of this name."""
        super().__init__()
        for name, value in (("num_classes", num_classes), ("input_channels", input_channels), ("width", width)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, found {value}")
        self.encoder, stages = None, {}  # stages: filters of the encoder by row
        if encoder is not None:
            self.encoder = Encoder(encoder, len(encoded), input_channels)
            stages = dict(zip(encoded, self.encoder.channels, strict=True))
        self.encoded = tuple(stages)
        self.filters = [(width or WIDTH) * 2**i for i in range(DEPTH + 1)]
        if self.encoder and width is None:
            self.filters = [stages.get(i, self.encoder.channels[0] // 2) for i in range(DEPTH + 1)]
        channels = {(i, j): self.filters[i] if j else stages.get(i, self.filters[i]) for i, j in self.nodes}
        for i, j in self.nodes:
            if j:
                in_channels = sum(channels[i, k] for k in self.skips(j)) + channels[i + 1, j - 1]
            elif i in self.encoded:
                continue
            else:
                in_channels = channels[i - 1, 0] if i else input_channels
            self.add_module(f"conv{i}_{j}", VGGBlock(in_channels, channels[i, j]))
        self.pool = nn.MaxPool2d(2, 2)

    @staticmethod
    def skips(j):
        raise NotImplementedError

    @property
    def head_names(self):
        """What as_heads(model(images)) lists: L1 ... L4 with deep supervision, else L4, or the level pruned to."""
        return [f"L{level}" for level in self.levels]

    def prune(self, level):
        """A new model with the nodes i + j <= level and only the head of X^{0,level}, whose logits forward returns.

        The logits equal those of the same head of this model, which is left unchanged. Padding stays as it is, because
        upsampling with aligned corners depends on the size. ValueError when no head was trained there.
        """
        if level not in self.levels:
            said = f"level {level}: this {type(self).__name__} has no such head, only {', '.join(self.head_names)}"
            if len(self.levels) == 1:
                said += "; pruning needs a NestedUNet trained with --deep_supervision True"
            raise ValueError(said)
        pruned = copy.deepcopy(self)
        pruned.levels = (level,)
        pruned.nodes = tuple((i, j) for i, j in self.nodes if i + j <= level)
        kept = {f"conv{i}_{j}" for i, j in pruned.nodes} | {"final", f"final{level}", "pool"}
        if self.encoder:
            kept.add("encoder")
            pruned.encoded = tuple(i for i in self.encoded if i <= level)
            pruned.encoder = self.encoder.prune(len(pruned.encoded))
        for name in dict(self.named_children()).keys() - kept:
            delattr(pruned, name)
        return pruned

    def folded(self):
        """A new model for inference only, with each batch norm folded into the convolution before it; same outputs.

        In eval mode a batch norm is a scale and a shift of each channel, which the weights and bias of a convolution
        can hold, computed here in their own precision. This model is left unchanged. The new one can be pruned, but it
        neither trains nor fits this model's checkpoints.
        """
        folded = copy.deepcopy(self).eval().requires_grad_(False)
        for block in folded.modules():
            if isinstance(block, VGGBlock):
                for k in (1, 2):
                    conv, bn = getattr(block, f"conv{k}"), getattr(block, f"bn{k}")
                    setattr(block, f"conv{k}", fuse_conv_bn_eval(conv, bn))
                    setattr(block, f"bn{k}", nn.Identity())
        if folded.encoder:
            folded.encoder.fold()
        return folded

    def forward_nodes(self, images):
        """(N, input_channels, H, W), H and W multiples of 16 -> {(i, j): X^{i,j}, (N, width 2^i, H / 2^i, W / 2^i)}."""
        x = {}
        if self.encoder:
            x.update({(i, 0): maps for i, maps in zip(self.encoded, self.encoder(images), strict=True)})
        for i, j in self.nodes:
            if (i, j) in x:
                continue
            if j:
                maps = [*(x[i, k] for k in self.skips(j)), x[i + 1, j - 1]]
            else:
                maps = [self.pool(x[i - 1, 0]) if i else images]
            x[i, j] = getattr(self, f"conv{i}_{j}")(*maps)
        return x

    def pad(self, images):
        """Pad right and bottom by replication to multiples of 16, or 32 with a half stem.

        In training each side is at least twice that, which leaves 2 x 2 at the bottom, so batch norm sees more than one
        value per channel even in a batch of one.
        """
        multiple = 2**DEPTH * self.scale
        least = 2 * multiple if self.training else 1
        # rounded up without negative numbers: ONNX divides those towards zero, Python downwards
        height, width = ((max(side, least) + multiple - 1) // multiple * multiple for side in images.shape[-2:])
        return F.pad(images, (0, width - images.shape[-1], 0, height - images.shape[-2]), mode="replicate")


class UNet(SkipNetwork):
    """U-Net built from the same blocks as NestedUNet, so that the two compare. 7,852,545 parameters by default.

    images (N, input_channels, H, W) float, any H and W -> logits (N, num_classes, H, W).
    """

    nodes = tuple((i, 0) for i in range(DEPTH + 1)) + tuple((i, DEPTH - i) for i in reversed(range(DEPTH)))

    def __init__(self, num_classes=1, input_channels=3, deep_supervision=False, width=WIDTH):
        if deep_supervision:
            raise ValueError("UNet has one head; deep supervision needs NestedUNet")
        super().__init__(num_classes, input_channels, width)
        self.final = nn.Conv2d(width, num_classes, 1)

    @staticmethod
    def skips(j):
        return (0,)

    def forward(self, images):
        height, width = images.shape[-2:]
        return self.final(self.forward_nodes(self.pad(images))[0, DEPTH])[..., :height, :width]


class NestedUNet(SkipNetwork):
    """U-Net++: every X^{i,j}, j > 0, sees all earlier nodes of its row. 9,163,329 parameters by default.

    images (N, input_channels, H, W) float, any H and W -> logits (N, num_classes, H, W) of X^{0,4}; with
    deep_supervision a list of the logits of X^{0,1} ... X^{0,4}, each from its own 1x1 convolution (`final1` ...).
    Pruned to one level, it returns only the logits of that level.

    encoder: the name of a backbone (encoders.py) whose stages are the X^{i,0}, or None. stem: "full" keeps X^{0,0} as a
    block on the image, since encoders have nothing at full resolution; "half" starts the grid at half resolution with
    the encoder and upsamples the logits. width: filters of row 0, doubled from row to row. None means 32 or, with an
    encoder, as many filters in each row as its encoder stage has; row 0 of a full stem has half those of the first one.
    """

    nodes = tuple((d - j, j) for d in range(DEPTH + 1) for j in range(d + 1))  # diagonal by diagonal: L0, L1 ... L4

    def __init__(self, num_classes=1, input_channels=3, deep_supervision=False, width=None, encoder=None, stem="full"):
        if stem == "half" and not encoder:
            raise ValueError("--stem half needs an --encoder")
        first = 0 if stem == "half" else 1  # encoders have nothing at full resolution
        super().__init__(num_classes, input_channels, width, encoder, range(first, DEPTH + 1))
        self.scale = 2 if stem == "half" else 1
        self.deep_supervision = deep_supervision
        self.levels = tuple(range(1, DEPTH + 1)) if deep_supervision else (DEPTH,)
        for name in [f"final{level}" for level in self.levels] if deep_supervision else ["final"]:
            self.add_module(name, nn.Conv2d(self.filters[0], num_classes, 1))

    @staticmethod
    def skips(j):
        return range(j)

    def forward(self, images):
        height, width = images.shape[-2:]
        x = self.forward_nodes(self.pad(images))
        heads = []
        for level in self.levels:
            head = getattr(self, f"final{level}") if self.deep_supervision else self.final
            logits = head(x[0, level])
            heads.append((upsample(logits) if self.scale == 2 else logits)[..., :height, :width])
        return heads if len(heads) > 1 else heads[0]


ARCHS = {"UNet": UNet, "NestedUNet": NestedUNet}


def build_model(config):
    """The network that a run's config describes: arch, encoder, stem, and their sizes. ValueError for unknown ones.

    With `checkpointing` in the config, training takes less memory and more time, with the same results.
    """
    if config["arch"] not in ARCHS:
        raise ValueError(f"arch {config['arch']!r} is unknown; expected one of {', '.join(ARCHS)}")
    keys = ("num_classes", "input_channels", "deep_supervision", "width")
    options = {key: config[key] for key in keys}
    if config.get("encoder", "none") != "none":
        if config["arch"] != "NestedUNet":
            raise ValueError(f"--encoder is for NestedUNet, found --arch {config['arch']}")
        options.update(encoder=config["encoder"], stem=config.get("stem", "full"))
    model = ARCHS[config["arch"]](**options)
    if model.encoder is not None:
        model.encoder.fixed_statistics = config.get("encoder_freeze_bn", False)
    for block in model.modules():
        if isinstance(block, VGGBlock):
            block.checkpointing = config.get("checkpointing", False)
    return model


def as_heads(output):
    """What a model returned, as a list of logits with the deepest head last; a single head is a list of one."""
    return list(output) if isinstance(output, (list, tuple)) else [output]


def probabilities(output):
    """What a model returned -> (N, num_classes, H, W) float32 in [0, 1]: the mean over its heads of their sigmoids."""
    return torch.stack([torch.sigmoid(logits.float()) for logits in as_heads(output)]).mean(0)
