"""Three small helpers under the names that users of pytorch-nested-unet know.

from utils import AverageMeter, count_params, str2bool
"""

import argparse


def str2bool(value):
    """true/false, yes/no, 1/0 in any case, or a bool -> bool; anything else raises argparse.ArgumentTypeError."""
    answers = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    try:
        return answers[str(value).strip().lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"{value!r} is neither True nor False") from None


def count_params(model):
    """The number of trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


class AverageMeter:
    """A running mean of values with weights: `val` the latest, `avg` the mean, `sum` and `count` what it is made of."""

    def __init__(self):
        self.reset()

    def reset(self):
        self.val, self.avg, self.sum, self.count = 0, 0, 0, 0

    def update(self, val, n=1):
        self.val = val
        self.sum += val * n
        self.count += n
        self.avg = self.sum / self.count if self.count else 0
