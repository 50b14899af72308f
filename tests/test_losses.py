"""losses.py by hand, against a slow Lovász hinge from the definition, and where masks and logits are extreme."""

import itertools
import math

import pytest
import torch
from torch import nn

from losses import LOSSES, BCEDiceLoss, BCELovaszLoss, LovaszHingeLoss, MapsLoss, mean_over_heads

LOGIT_3 = math.log(3)  # its sigmoid is 3/4


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---------------------------------------------------------------- BCE and Dice


def test_bce_dice_by_hand():
    logits = torch.tensor([[[[0.0, LOGIT_3], [LOGIT_3, -LOGIT_3]]]])  # probabilities 1/2, 3/4, 3/4, 1/4
    masks = torch.tensor([[[[1.0, 1.0], [0.0, 0.0]]]])
    bce = -(math.log(1 / 2) + math.log(3 / 4) + math.log(1 / 4) + math.log(3 / 4)) / 4
    dice = 2 * (1 / 2 + 3 / 4) / (9 / 4 + 2)
    assert BCEDiceLoss(smooth=0)(logits, masks).item() == pytest.approx(0.5 * bce + 1 - dice, rel=1e-6)
    assert BCEDiceLoss(bce_weight=2, smooth=0)(logits, masks).item() == pytest.approx(2 * bce + 1 - dice, rel=1e-6)
    smooth = (2.5 + 1) / (4.25 + 1)
    assert BCEDiceLoss(bce_weight=0, smooth=1)(logits, masks).item() == pytest.approx(1 - smooth, rel=1e-6)
    default = 0.5 * bce + 1 - (2.5 + 1e-5) / (4.25 + 1e-5)
    assert BCEDiceLoss()(logits, masks).item() == pytest.approx(default, rel=1e-6)


def test_dice_is_per_image_and_class_not_pooled():
    """One pixel found of one, 99 missed of 99: the mean of Dice 1 and 0 is 1/2, pooled it would be 2/101."""
    logits = torch.full((2, 1, 1, 100), -100.0)
    logits[0, 0, 0, 0] = 100
    masks = torch.zeros(2, 1, 1, 100)
    masks[0, 0, 0, 0], masks[1, 0, 0, 1:] = 1, 1
    for shape in ((2, 1, 1, 100), (1, 2, 1, 100)):
        loss = BCEDiceLoss(bce_weight=0)(logits.view(shape), masks.view(shape))
        assert loss.item() == pytest.approx(0.5, abs=1e-5)


# ---------------------------------------------------------------- Lovász hinge


def jaccard_loss(wrong, foreground):
    """Δ(M) = |M| / |foreground ∪ M| of a set M of mispredicted pixels, equation 6 of Berman et al."""
    return len(wrong) / len(foreground | wrong) if wrong else 0.0


def slow_lovasz_hinge(logits, masks):
    """One image and class, flat lists: definition 1 of Berman et al. (the Lovász extension), set by set."""
    errors = [max(0.0, 1 - logit * (1 if true else -1)) for logit, true in zip(logits, masks, strict=True)]
    foreground = {pixel for pixel, true in enumerate(masks) if true}
    loss, wrong = 0.0, set()
    for pixel in sorted(range(len(errors)), key=lambda pixel: -errors[pixel]):
        loss += errors[pixel] * (jaccard_loss(wrong | {pixel}, foreground) - jaccard_loss(wrong, foreground))
        wrong.add(pixel)
    return loss


def lovasz_hinge_by_thresholds(logits, masks):
    """The same as an integral: of Δ(the pixels whose error exceeds t) over all t > 0 (the Choquet integral)."""
    errors = [max(0.0, 1 - logit * (1 if true else -1)) for logit, true in zip(logits, masks, strict=True)]
    foreground = {pixel for pixel, true in enumerate(masks) if true}
    levels = sorted({0.0, *errors})
    return sum(
        (high - low) * jaccard_loss({pixel for pixel, error in enumerate(errors) if error > low}, foreground)
        for low, high in zip(levels, levels[1:], strict=False)
    )


def test_lovasz_by_hand():
    """Errors 2 (a miss), 1.5 (a false alarm), 0.5 (a weak hit), 0; Δ = 1/2, 2/3, 1, 1."""
    logits = torch.tensor([[[[-1.0, 0.5], [0.5, -3.0]]]])
    masks = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]])
    by_hand = 2 * (1 / 2) + 1.5 * (2 / 3 - 1 / 2) + 0.5 * (1 - 2 / 3)
    assert LovaszHingeLoss()(logits, masks).item() == pytest.approx(by_hand, rel=1e-6)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 1, 4, 5), (3, 2, 4, 3), (2, 3, 1, 7)])
@pytest.mark.parametrize("foreground", [0.0, 0.3, 1.0])
def test_lovasz_is_the_definition_per_image_and_class(shape, foreground):
    logits = 2 * torch.randn(shape, dtype=torch.float64)
    logits[..., -1] = logits[..., 0]  # a tie in some of the cases
    masks = (torch.rand(shape) < foreground).double()
    flat = list(zip(logits.flatten(2).flatten(0, 1).tolist(), masks.flatten(2).flatten(0, 1).tolist(), strict=True))
    expected = sum(slow_lovasz_hinge(*pair) for pair in flat) / len(flat)
    assert sum(lovasz_hinge_by_thresholds(*pair) for pair in flat) / len(flat) == pytest.approx(expected)
    assert LovaszHingeLoss()(logits, masks).item() == pytest.approx(expected, rel=1e-12)


def test_lovasz_is_the_jaccard_loss_at_the_corners():
    """At logits of 1 and -1 the errors are 2 and 0: the loss is twice the Jaccard loss, 1 - IoU, of the prediction."""
    masks = (torch.rand(4, 1, 8, 8) > 0.6).float()
    predicted = (torch.rand(4, 1, 8, 8) > 0.5).float()
    both, either = (masks * predicted).flatten(1).sum(1), (masks + predicted).clamp(max=1).flatten(1).sum(1)
    assert LovaszHingeLoss()(2 * predicted - 1, masks).item() == pytest.approx(2 * (1 - both / either).mean().item())


# ---------------------------------------------------------------- all of them


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_in_float64(name):
    masks = (torch.rand(2, 2, 3, 4) > 0.5).double()
    masks[0, 0], masks[1, 1] = 0, 1
    logits = torch.randn(2, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    criterion = LOSSES[name]()
    assert torch.autograd.gradcheck(lambda logits: criterion(logits, masks), logits)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_finite_at_the_extremes(name, dtype):
    for mask, logit in itertools.product(("empty", "full", "one pixel"), (-1e4, -60.0, 0.0, 60.0, 1e4)):
        masks = torch.full((2, 1, 16, 16), float(mask == "full"))
        masks[0, 0, 0, 0] = float(mask != "empty")
        logits = torch.full(masks.shape, logit, dtype=dtype, requires_grad=True)
        loss = mean_over_heads(LOSSES[name](), [logits], masks)
        loss.backward()
        finite = loss.isfinite() and logits.grad.isfinite().all()
        assert finite and loss.dtype == torch.float32 and loss >= 0, f"{mask}, logits of {logit}"


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("true", [0.0, 1.0])
def test_empty_and_full_masks_pull_the_right_way(name, true):
    """A sure right answer costs almost nothing, a sure wrong one costs; the gradient of every pixel leads to the first.

    The Lovász hinge of an empty mask is the one largest error: Δ is 1 from the first false alarm on.
    """
    masks = torch.full((1, 1, 4, 4), true)
    criterion, sign = LOSSES[name](), 2 * true - 1
    assert criterion(30 * sign * torch.ones(1, 1, 4, 4), masks) < 1e-4
    wrong = (-2 * sign * torch.ones(1, 1, 4, 4)).requires_grad_()
    loss = criterion(wrong, masks)
    loss.backward()
    assert loss > 0.5 and (wrong.grad * sign <= 0).all() and (wrong.grad * sign).min() < -1e-3


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_is_the_mean_of_its_images_and_classes(name):
    logits, masks = torch.randn(3, 2, 9, 7), (torch.rand(3, 2, 9, 7) > 0.8).float()
    criterion = LOSSES[name]()
    alone = [criterion(logits[n : n + 1, c : c + 1], masks[n : n + 1, c : c + 1]) for n in range(3) for c in range(2)]
    torch.testing.assert_close(criterion(logits, masks), torch.stack(alone).mean())


@pytest.mark.parametrize("name", ["BCEDiceLoss", "BCELovaszLoss", "LovaszHingeLoss"])
def test_bfloat16_logits_and_integer_masks_are_summed_in_float32(name):
    logits, masks = torch.randn(1, 1, 64, 64).bfloat16(), torch.rand(1, 1, 64, 64) > 0.5
    expected = LOSSES[name]()(logits.double(), masks.double())
    for kind in (torch.bool, torch.uint8, torch.float32, torch.bfloat16):
        loss = LOSSES[name]()(logits, masks.to(kind))
        assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_logits_and_masks_of_different_shapes(name):
    for logits, masks in (((2, 1, 3, 4), (2, 2, 3, 4)), ((2, 1, 3, 4), (2, 1, 4, 3)), ((1, 1, 3, 4), (2, 1, 3, 4))):
        with pytest.raises(ValueError):
            LOSSES[name]()(torch.zeros(logits), torch.zeros(masks))


def test_the_names_that_users_know():
    assert {name: type(build()) for name, build in LOSSES.items()} == {
        "BCEDiceLoss": BCEDiceLoss,
        "BCELovaszLoss": BCELovaszLoss,
        "LovaszHingeLoss": LovaszHingeLoss,
        "BCEWithLogitsLoss": nn.BCEWithLogitsLoss,
    }


def test_mean_over_heads():
    masks = torch.ones(1, 1, 1, 1)
    heads = [torch.full((1, 1, 1, 1), value) for value in (0.0, LOGIT_3)]
    expected = -(math.log(1 / 2) + math.log(3 / 4)) / 2
    assert mean_over_heads(nn.BCEWithLogitsLoss(), heads, masks).item() == pytest.approx(expected)
    assert mean_over_heads(nn.BCEWithLogitsLoss(), heads[:1], masks).item() == pytest.approx(math.log(2))
    assert mean_over_heads(nn.BCEWithLogitsLoss(), heads, masks, [3, 1]).item() == pytest.approx(
        -(3 * math.log(1 / 2) + math.log(3 / 4)) / 4
    )
    with pytest.raises(ValueError):
        mean_over_heads(nn.BCEWithLogitsLoss(), heads, masks, [1, 1, 1, 1])


def test_bce_lovasz_is_a_quarter_of_the_one_and_the_other_with_a_wide_margin():
    logits, masks = torch.randn(3, 2, 5, 4), (torch.rand(3, 2, 5, 4) > 0.6).float()
    expected = nn.BCEWithLogitsLoss()(logits, masks) / 4 + LovaszHingeLoss()(logits / 4, masks)
    torch.testing.assert_close(BCELovaszLoss()(logits, masks), expected)
    # within a margin of 4 two errors of 0.025 are left; with both pixels wrong the IoU would be 1 of 3
    right = torch.tensor([[[[3.9, -3.9], [4.1, -4.1]]]])
    hinge = LovaszHingeLoss(margin=4)
    assert hinge(right, (right > 0).float()).item() == pytest.approx(0.025 * 2 / 3, rel=1e-4)
    assert hinge(right * 1.1, (right > 0).float()) == 0


def test_softer_masks():
    """The cross entropy sees them as they are, the Lovász hinge those above 0.5 as 1."""
    masks = torch.zeros(1, 1, 9, 9)
    masks[..., 4:8, 4:8] = 1
    logits, soft = torch.randn_like(masks), 0.2 + 0.6 * masks
    hinge = LovaszHingeLoss(4)
    assert hinge(logits, soft) == hinge(logits, masks)
    expected = 0.25 * nn.functional.binary_cross_entropy_with_logits(logits, soft) + hinge(logits, masks)
    torch.testing.assert_close(BCELovaszLoss()(logits, soft), expected)


# ---------------------------------------------------------------- the three maps of individual nuclei


def three_maps():
    """One image of two pixels: logits of mask, contact and distance, whose probabilities are 1/2 and 3/4."""
    logits = torch.tensor([0.0, LOGIT_3]).reshape(1, 1, 1, 2).repeat(1, 3, 1, 1)
    maps = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.25]]).reshape(1, 3, 1, 2)
    half, three = math.log(1 / 2), math.log(3 / 4)
    mask = -(half + math.log(1 / 4)) / 2
    contact = -(half + 3 * three) / 2 + 1 - (2 * 3 / 4 + 1) / (5 / 4 + 1 + 1)
    distance = -(half + three / 4 + math.log(1 / 4) * 3 / 4) / 2
    return logits, maps, (mask, contact, distance)


@pytest.mark.parametrize("weights", [(1, 1, 1), (2, 1, 0.5), (0, 1, 0)])
def test_the_loss_of_three_maps_by_hand(weights):
    logits, maps, parts = three_maps()
    expected = sum(weight * part for weight, part in zip(weights, parts, strict=True)) / sum(weights)
    assert MapsLoss(nn.BCEWithLogitsLoss(), weights)(logits, maps).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_can_be_that_of_the_mask(name):
    logits = torch.randn(2, 3, 8, 8, requires_grad=True)
    MapsLoss(LOSSES[name]())(logits, torch.rand(2, 3, 8, 8).round()).backward()
    assert torch.isfinite(logits.grad).all() and (logits.grad.flatten(2).abs().sum(-1) > 0).all()


def test_a_distance_is_learned_as_a_probability():
    """The cross entropy is least at the target itself, also between 0 and 1."""
    logits, target = torch.zeros(1, 3, 4, 4, requires_grad=True), torch.rand(1, 3, 4, 4)
    optimizer = torch.optim.Adam([logits], 0.1)
    for _ in range(300):
        optimizer.zero_grad()
        MapsLoss(nn.BCEWithLogitsLoss(), (0, 0, 1))(logits, target).backward()
        optimizer.step()
    assert torch.allclose(torch.sigmoid(logits)[:, 2], target[:, 2], atol=0.02)
