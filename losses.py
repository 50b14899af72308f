"""Losses on logits, and how the losses of several heads become one number.

    criterion = LOSSES["BCEDiceLoss"]()
    loss = mean_over_heads(criterion, heads, masks)

Every criterion takes logits (N, C, H, W), any float dtype, and masks (N, C, H, W) of 0 and 1, or softer (the Lovász
hinge treats those above 0.5 as 1), and returns a float32 (or float64) scalar. Each class is a binary problem, so masks
may overlap.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F


def _at_least_float32(logits):
    """Sums over thousands of pixels need more than the eight bits of a bfloat16."""
    return logits if logits.dtype == torch.float64 else logits.float()


class BCEDiceLoss(nn.Module):
    """bce_weight x binary cross entropy + (1 - soft Dice), Dice per image and class, then averaged.

    soft Dice = (2 sum(p y) + smooth) / (sum(p) + sum(y) + smooth) with p the sigmoid of the logits, as in Milletari et
    al., V-Net, https://arxiv.org/abs/1606.04797 (but with plain sums in the denominator); `smooth` makes Dice defined
    for an empty mask. positive_weight: weight of foreground pixels in the cross entropy, for rare foreground.
    """

    def __init__(self, bce_weight=0.5, smooth=1e-5, positive_weight=1.0):
        super().__init__()
        self.bce_weight, self.smooth, self.positive_weight = bce_weight, smooth, positive_weight

    def forward(self, logits, masks):
        logits = _at_least_float32(logits)
        masks = masks.to(logits.dtype)
        rare = None if self.positive_weight == 1 else logits.new_full((), self.positive_weight)
        bce = F.binary_cross_entropy_with_logits(logits, masks, pos_weight=rare)
        probabilities = torch.sigmoid(logits).flatten(2)  # (N, C, P)
        masks = masks.flatten(2)
        overlap = (probabilities * masks).sum(-1)  # (N, C)
        dice = (2 * overlap + self.smooth) / (probabilities.sum(-1) + masks.sum(-1) + self.smooth)
        return self.bce_weight * bce + (1 - dice).mean()


class LovaszHingeLoss(nn.Module):
    """The Lovász extension of the Jaccard loss on hinge errors, per image and class, then averaged.

    Berman, Triki, Blaschko, CVPR 2018, https://arxiv.org/abs/1705.08790. With the errors m = max(0, 1 - logit x sign /
    margin) in descending order and Δ(k) the Jaccard loss of mispredicting the k largest: sum_k m_k (Δ(k) - Δ(k - 1)).
    All images and classes are sorted in one call. A logit beyond the margin does not lower the loss any further: with
    the paper's margin of 1, probabilities stay between 0.27 and 0.73, so masks are good at a threshold of 0.5 and empty
    at 0.75.
    """

    def __init__(self, margin=1.0):
        super().__init__()
        self.margin = margin

    def forward(self, logits, masks):
        if logits.shape != masks.shape:  # as the cross entropy says of itself; broadcasting would hide it
            raise ValueError(f"logits {tuple(logits.shape)} and masks {tuple(masks.shape)} differ in shape")
        logits = _at_least_float32(logits).flatten(2)  # (N, C, P)
        masks = (masks > 0.5).to(logits.dtype).flatten(2)  # a softer target would push an unsure pixel further out
        errors, order = torch.sort(1 - logits / self.margin * (2 * masks - 1), dim=-1, descending=True)
        wrong_foreground = masks.gather(-1, order).cumsum(-1)
        rank = torch.arange(1, errors.shape[-1] + 1, device=errors.device, dtype=errors.dtype)
        foreground = masks.sum(-1, keepdim=True)
        union = foreground + (rank - wrong_foreground)  # foreground and the background pixels mispredicted so far
        jaccard_loss = 1 - (foreground - wrong_foreground) / union
        steps = torch.diff(jaccard_loss, dim=-1, prepend=torch.zeros_like(jaccard_loss[..., :1]))
        return (F.relu(errors) * steps).sum(-1).mean()


class BCELovaszLoss(nn.Module):
    """bce_weight x binary cross entropy + the Lovász hinge with a margin for confident outputs (4: 0.98)."""

    def __init__(self, bce_weight=0.25, margin=4.0):
        super().__init__()
        self.bce_weight, self.lovasz = bce_weight, LovaszHingeLoss(margin)

    def forward(self, logits, masks):
        logits = _at_least_float32(logits)
        bce = F.binary_cross_entropy_with_logits(logits, masks.to(logits.dtype))
        return self.bce_weight * bce + self.lovasz(logits, masks)


LOSSES = {
    "BCEDiceLoss": BCEDiceLoss,
    "BCELovaszLoss": BCELovaszLoss,
    "LovaszHingeLoss": LovaszHingeLoss,
    "BCEWithLogitsLoss": nn.BCEWithLogitsLoss,
}


class MapsLoss(nn.Module):
    """The loss of the three maps of individual nuclei, mask, contact and distance: the weighted mean of their losses.

    mask_loss: a criterion for the mask. Contact: binary cross entropy, in which the few contact pixels count threefold,
    + (1 - soft Dice), whose smooth = 1 demands nothing where there is no contact. Distance: binary cross entropy, which
    is smallest where the probability equals the distance.
    logits and maps: (N, 3, H, W), channels as in instances.MAPS, maps in [0, 1].
    """

    def __init__(self, mask_loss, weights=(1, 1, 1)):
        super().__init__()
        self.mask_loss, self.weights = mask_loss, weights
        self.contact_loss = BCEDiceLoss(bce_weight=1.0, smooth=1.0, positive_weight=3.0)

    def forward(self, logits, maps):
        logits = _at_least_float32(logits)
        parts = (
            self.mask_loss(logits[:, :1], maps[:, :1]),
            self.contact_loss(logits[:, 1:2], maps[:, 1:2]),
            F.binary_cross_entropy_with_logits(logits[:, 2:], maps[:, 2:].to(logits.dtype)),
        )
        return sum(weight * part for weight, part in zip(self.weights, parts, strict=True)) / sum(self.weights)


def mean_over_heads(criterion, heads, masks, weights=None):
    """Deep supervision as in the U-Net++ paper: the plain mean of the criterion over a list of heads' logits.

    weights: one weight per head for a weighted mean.
    """
    weights = weights or [1] * len(heads)
    parts = [weight * criterion(logits.float(), masks) for weight, logits in zip(weights, heads, strict=True)]
    return sum(parts) / sum(weights)
