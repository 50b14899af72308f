"""engine.py: an epoch, an evaluation and a whole run on tiny tensors, against values by hand and plain loops."""

import contextlib
import itertools
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.optim import lr_scheduler

import engine
from common.files import load_checkpoint
from engine import Averaged, Run, averaging_decay, evaluate, fit, train_one_epoch
from losses import BCEDiceLoss
from tasks import Classification, Segmentation

CPU = torch.device("cpu")


class Heads(nn.Module):
    """Two heads, 1x1 convolutions."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1)

    def forward(self, images):
        return [self.first(images), self.last(images)]


def segmentation_batches():
    """Three images in batches of two and one: a mean over batches is not the mean over images."""
    torch.manual_seed(3)
    images = torch.randn(3, 1, 4, 4)
    masks = (images + 0.5 * torch.randn(3, 1, 4, 4) > 0).float()
    return [(images[:2], masks[:2], None), (images[2:], masks[2:], None)]


def points(count=5, size=2):
    """Labelled points (N, 2) in batches of `size`."""
    torch.manual_seed(2)
    inputs = torch.randn(count, 2)
    labels = (inputs.sum(1) + 0.3 * torch.randn(count) > 0).long()
    return list(zip(inputs.split(size), labels.split(size), strict=True))


def run_of(model, task=None, lr=0.1, scheduler=None, epochs=1, **options):
    """A Run with plain SGD and, by default, a constant learning rate."""
    optimizer = torch.optim.SGD(model.parameters(), lr)
    scheduler = scheduler(optimizer) if scheduler else lr_scheduler.ConstantLR(optimizer, factor=1.0)
    task = task or Classification(nn.CrossEntropyLoss())
    return Run(model, task, optimizer, scheduler, CPU, epochs=epochs, **options)


def linear(outputs=2):
    torch.manual_seed(1)
    return nn.Linear(2, outputs)


# ---------------------------------------------------------------- one epoch


def test_an_epoch_of_segmentation_is_the_plain_loop():
    torch.manual_seed(1)
    model = Heads()
    plain = [value.detach().clone().requires_grad_() for value in model.parameters()]
    found = train_one_epoch(run_of(model, Segmentation(BCEDiceLoss(), [1.0, 3.0])), segmentation_batches())

    losses, intersection, union = [], 0, 0
    for images, masks, _ in segmentation_batches():
        first, last = plain[0] * images + plain[1], plain[2] * images + plain[3]
        loss = (BCEDiceLoss()(first, masks) + 3 * BCEDiceLoss()(last, masks)) / 4
        gradients = torch.autograd.grad(loss, plain)
        losses += [loss.item()] * len(images)
        intersection += ((last > 0) & (masks > 0)).sum().item()
        union += ((last > 0) | (masks > 0)).sum().item()
        with torch.no_grad():
            for value, gradient in zip(plain, gradients, strict=True):
                value -= 0.1 * gradient
    assert found == {"loss": pytest.approx(np.mean(losses)), "iou": pytest.approx(intersection / union)}
    assert 0 < intersection < union
    for value, expected in zip(model.parameters(), plain, strict=True):
        assert torch.allclose(value, expected, atol=1e-6)


def test_an_epoch_of_classification_is_the_plain_loop():
    """Softmax regression in NumPy: the gradient of the cross entropy is (p - y) x."""
    model = linear().eval()
    weight, bias = (value.detach().double().numpy().copy() for value in (model.weight, model.bias))
    found = train_one_epoch(run_of(model), points())
    losses, right = [], []
    for inputs, labels in points():
        inputs, labels = inputs.double().numpy(), labels.numpy()
        exponents = np.exp(inputs @ weight.T + bias)
        p = exponents / exponents.sum(1, keepdims=True)
        losses += list(-np.log(p[range(len(p)), labels]))
        right += list(p.argmax(1) == labels)
        wrong = (p - np.eye(2)[labels]) / len(labels)
        weight -= 0.1 * wrong.T @ inputs
        bias -= 0.1 * wrong.sum(0)
    assert found == {"loss": pytest.approx(np.mean(losses)), "acc": np.mean(right)} and model.training
    assert np.allclose(model.weight.detach(), weight, atol=1e-6) and np.allclose(model.bias.detach(), bias, atol=1e-6)


@pytest.mark.parametrize("look_every", [1, 10])
def test_a_loss_that_is_not_finite_names_its_step(monkeypatch, look_every):
    """A GPU's losses are looked at every ten steps; a device of that kind is pretended."""
    batches = points(8)
    run = run_of(linear(), lr=0)  # the weights stay finite
    if look_every > 1:
        monkeypatch.setattr(engine, "precision", lambda *_: contextlib.nullcontext())
        monkeypatch.setattr(run.task, "to_device", lambda batch, device, amp: batch)
        run.device = SimpleNamespace(type="cuda")
    expected = evaluate(run.model, batches, Classification(nn.CrossEntropyLoss()), CPU)
    assert train_one_epoch(run, batches) == pytest.approx(expected)
    batches[2][0][1] = math.inf
    with pytest.raises(FloatingPointError, match="the loss is nan at step 3$"):
        train_one_epoch(run, batches)


def test_each_step_and_batch_can_be_the_last():
    def stop():
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt

    run = run_of(linear())
    for epoch in (train_one_epoch, lambda run, *rest: evaluate(run.model, rest[0], run.task, CPU, None, *rest[1:])):
        calls = []
        with pytest.raises(KeyboardInterrupt):
            epoch(run, points(), "", stop)
        assert len(calls) == 2


# ---------------------------------------------------------------- evaluation


def test_an_evaluation_of_segmentation_by_hand():
    """Two classes; the network's answer is its input. IoU is pooled over images, then averaged over classes."""
    logits = torch.tensor([[[[2.0, -1.0]], [[3.0, 1.0]]], [[[-2.0, 4.0]], [[-1.0, 1.0]]], [[[1.0, 1.0]], [[-1, -1]]]])
    masks = torch.tensor([[[[1.0, 0.0]], [[1.0, 0.0]]], [[[1.0, 1.0]], [[0.0, 1.0]]], [[[0.0, 0.0]], [[1, 0]]]])
    loss = np.log1p(np.exp(np.where(masks == 1, -logits, logits))).mean()
    batches = [(logits[:2], masks[:2], None), (logits[2:], masks[2:], None)]
    found = evaluate(nn.Identity(), batches, Segmentation(nn.BCEWithLogitsLoss()), CPU)
    assert found == {"loss": pytest.approx(loss), "iou": pytest.approx((2 / 5 + 2 / 4) / 2)}


def test_the_deepest_head_is_scored():
    model, (images, masks, _) = Heads(), segmentation_batches()[0]
    task = Segmentation(BCEDiceLoss())
    with torch.no_grad():
        for head, bias in ((model.first, -100.0), (model.last, 100.0)):
            head.bias.fill_(bias)
    assert evaluate(model, [(images, masks, None)], task, CPU)["iou"] == masks.mean().item()  # all pixels foreground


def test_an_evaluation_of_classification_by_hand():
    logits = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
    labels = torch.tensor([1, 0, 0])
    losses = [math.log(2), math.log(1 + math.exp(-2)), math.log(1 + math.exp(1))]
    batches = [(logits[:2], labels[:2]), (logits[2:], labels[2:])]
    found = evaluate(nn.Identity(), batches, Classification(nn.CrossEntropyLoss()), CPU)
    assert found == {"loss": pytest.approx(sum(losses) / 3), "acc": 1 / 3}


def test_an_evaluation_changes_nothing():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(0.5), nn.Linear(2, 2)).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    task = Classification(nn.CrossEntropyLoss())
    assert evaluate(model, points(), task, CPU) == evaluate(model, points(), task, CPU)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# ---------------------------------------------------------------- a run, epoch by epoch


def finish(run, *scores, loss=1.0):
    """Epochs with these validation scores; the bias becomes the epoch's number -> which ones were better."""
    better = []
    for score in scores:
        with torch.no_grad():
            run.model.bias.fill_(run.epoch + 1)
        better.append(run.finish_epoch({"epoch": run.epoch + 1, "val_loss": loss, "val_acc": score}))
    return better


def test_the_best_epoch_is_kept_in_memory():
    run = run_of(linear(), epochs=4)
    run.optimizer.step()
    assert finish(run, 0.0, 0.5, 0.5, 0.25) == [True, True, True, False]  # the last of equals
    assert (run.best_score, run.best_epoch, run.over()) == (0.5, 3, "all 4 epochs are done")
    run.load_best()
    assert run.model.bias.tolist() == [3, 3]


def test_the_last_epoch_is_kept_where_asked_for(tmp_path):
    for folder in (None, tmp_path):
        run = run_of(linear(), epochs=3, folder=folder, keep_last=True)
        run.optimizer.step()
        assert finish(run, 0.5, 0.25) == [True, False]
        assert (run.best_score, run.best_epoch) == (0.5, 1)
        run.load_best()
        assert run.model.bias.tolist() == [2, 2]


def test_the_best_weights_are_of_the_whole_model_and_on_disk(tmp_path):
    """A head that is trained on fixed features: last.pth holds the head, model.pth body and head."""
    head = linear()
    whole = nn.Sequential(nn.Linear(3, 2), head)
    run = run_of(head, epochs=4, folder=tmp_path, whole=whole)
    run.optimizer.step()
    finish(run, 0.5, 0.25)
    assert load_checkpoint(tmp_path / "model.pth").keys() == whole.state_dict().keys()
    assert load_checkpoint(tmp_path / "last.pth")["model"].keys() == head.state_dict().keys()
    run.load_best()
    assert head.bias.tolist() == [1, 1]


def test_the_averaged_weights_are_judged_and_kept():
    run = run_of(linear(), ema=0.9, epochs=2)
    train_one_epoch(run, points())
    assert (
        run.ema.n_averaged == 3
        and run.judged is run.ema.module
        and not torch.equal(run.judged.weight, run.model.weight)
    )
    run.finish_epoch({"epoch": 1, "val_loss": 1.0, "val_acc": 1.0})
    assert torch.equal(run.best["weight"], run.ema.module.weight)


def test_early_stopping_by_hand():
    run = run_of(linear(), epochs=9, early_stopping=2)
    run.optimizer.step()
    finish(run, 0.5, 0.6, 0.6)
    assert run.over() is None
    finish(run, 0.55)
    assert run.over() == "no better val_acc for 2 epochs: stopped early"
    for never in (-1, 0):
        run.early_stopping = never
        assert run.over() is None


def test_the_average_of_a_short_training_forgets_soon():
    assert averaging_decay(0.995, 80 * 34) == 0.995 and averaging_decay(0.999, 300 * 34) == 0.999  # our recipes
    assert averaging_decay(0.995, 200) == 0.995 and averaging_decay(0.995, 199) == 1 - 50 / 199
    assert averaging_decay(0.995, 150) == 1 - 1 / 3 and averaging_decay(0.995, 80) == averaging_decay(0.995, 1) == 0.5
    assert averaging_decay(0.3, 80) == 0.3 and averaging_decay(0.0, 80) == 0.0


def test_averaged_weights_by_hand():
    """Decays of min(0.9, (1 + t) / (10 + t)) after t = 1, 2 ... updates, the first copying; counts are copied."""
    model = nn.BatchNorm2d(1)
    ema, expected = Averaged(model, 0.9), None
    for t, value in enumerate((1.0, 5.0, -2.0, 4.0)):
        with torch.no_grad():
            model.weight.fill_(value)
            model.running_var.fill_(value / 2)
            model.num_batches_tracked.fill_(t)
        ema.update_parameters(model)
        decay = min(0.9, (1 + t) / (10 + t))
        expected = value if expected is None else decay * expected + (1 - decay) * value
        assert ema.module.weight.item() == pytest.approx(expected, rel=1e-6)
        assert ema.module.running_var.item() == pytest.approx(expected / 2, rel=1e-6)
        assert ema.module.num_batches_tracked.item() == t
    for _ in range(200):
        ema.update_parameters(model)
    before = ema.module.weight.item()
    with torch.no_grad():
        model.weight.fill_(before + 1)
    ema.update_parameters(model)
    assert ema.module.weight.item() == pytest.approx(before + 0.1, rel=1e-5)  # now the decay is the option's


# ---------------------------------------------------------------- schedulers


def rates(scheduler, losses):
    """The learning rate after each of two steps and after the end of epochs with these validation losses."""
    run = run_of(linear(), lr=1.0, scheduler=scheduler)
    (inputs, labels), *_ = points()
    found = []
    for loss in losses:
        for _ in range(2):
            run.learn(functional.cross_entropy(run.model(inputs), labels))
            found.append(run.optimizer.param_groups[0]["lr"])
        finish(run, 0.5, loss=loss)
        found.append(run.optimizer.param_groups[0]["lr"])
    return found


def test_one_cycle_steps_with_the_batches():
    def cycle(optimizer):
        return lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=5, pct_start=0.5, anneal_strategy="linear")

    start, end = 1 / 25, 1 / 25e4
    up, down = (1 - start) / 1.5, (1 - end) / 2.5
    expected = [start + up, 1 - down / 2, 1 - down / 2, 1 - 3 * down / 2, end, end]
    assert rates(cycle, [1, 1]) == pytest.approx(expected)


def test_plateau_steps_with_the_validation_loss():
    def plateau(optimizer):
        return lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, min_lr=0.3)

    assert rates(plateau, [3, 2, 2, 2, 2])[2::3] == [1, 1, 0.5, 0.3, 0.3]
    assert rates(plateau, [2, 2])[:5] == [1, 1, 1, 1, 1]  # never within an epoch


def test_others_step_with_the_epochs():
    def halving(optimizer):
        return lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)

    assert rates(halving, [1, 1]) == [1, 1, 0.5, 0.5, 0.5, 0.25]


# ---------------------------------------------------------------- whole trainings


def drawing(**options):
    """A Run of a network that draws random numbers."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 2))

    def cosine(optimizer):
        return lr_scheduler.CosineAnnealingLR(optimizer, 4)

    return run_of(model, scheduler=cosine, epochs=4, ema=0.5, seed=7, **options)


def without_seconds(rows):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def test_a_run_is_what_its_parts_are(capsys):
    (run, other), batches, val_batches = (drawing(), drawing()), points(), points(4)
    fit(run, batches, val_batches)
    for row in without_seconds(run.rows):
        torch.manual_seed(7 + row["epoch"])
        rate = 0.1 * (1 + math.cos(math.pi * (row["epoch"] - 1) / 4)) / 2
        expected = {"epoch": row["epoch"], "lr": pytest.approx(rate), **train_one_epoch(other, batches)}
        judged = evaluate(other.ema.module, val_batches, other.task, CPU)
        expected |= {f"val_{name}": value for name, value in judged.items()}
        other.scheduler.step()
        assert row == expected
    *epochs, last = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in epochs] == ["epoch 1/4", "epoch 2/4", "epoch 3/4", "epoch 4/4"]
    assert last == "all 4 epochs are done" and "*" in epochs[0]


def test_the_line_of_an_epoch_says_how_long_the_rest_takes(monkeypatch, capsys):
    """By the median of the epochs of this call: 100, (100 + 30) / 2, 40."""
    ticks = itertools.accumulate([0, 98, 2, 7, 28, 2, 7, 38, 2, 7, 48, 2])  # start, epoch, and what it keeps; a gap
    monkeypatch.setattr(engine, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    run = run_of(linear(), epochs=6)
    run.rows = [{"epoch": epoch, "val_acc": 0.0, "seconds": 9000} for epoch in (1, 2)]  # of an earlier call
    fit(run, points(), points(4))
    *epochs, _ = capsys.readouterr().out.splitlines()
    ends = ["98.0 s, 5 min left", "28.0 s, 2 min left", "38.0 s, 40 s left", "48.0 s"]
    assert [line.rpartition("val_acc ")[2][len("0.0000* ") :] for line in epochs] == ends


def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path, capsys):
    folders = straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    for folder in folders:
        folder.mkdir()
    fit(drawing(folder=straight), points(), points(4))
    run = drawing(folder=stopped)
    with pytest.raises(KeyboardInterrupt):

        def stop():
            if run.epoch == 2:
                raise KeyboardInterrupt

        fit(run, points(), points(4), stop)
    (stopped / "log.csv").write_text("as a kill between the two files leaves it")
    torch.rand(5)
    again = drawing(folder=stopped)
    again.resume()
    assert f"resuming {stopped} after epoch 2" in capsys.readouterr().out
    assert len((stopped / "log.csv").read_text().splitlines()) == 3 and again.best_score == run.best_score
    fit(again, points(), points(4))
    files = [[load_checkpoint(folder / name) for folder in folders] for name in ("model.pth", "last.pth")]
    for one, other in files:
        assert _equal(one, other)
    assert (straight / "model.pth").read_bytes() == (stopped / "model.pth").read_bytes()


def _equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a if key != "seconds")
    if isinstance(a, list):
        return len(a) == len(b) and all(map(_equal, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def test_a_last_pth_of_another_training_is_refused_in_one_line(tmp_path):
    fit(run_of(linear(), folder=tmp_path), points(), points())
    for other in (linear(3), nn.Sequential(linear()), nn.Conv2d(1, 1, 1)):
        with pytest.raises(ValueError, match=r"last\.pth does not hold the training that config\.yml describes$"):
            run_of(other, folder=tmp_path).resume()
    with pytest.raises(ValueError, match=r"last\.pth does not hold the training"):
        run_of(linear(), ema=0.9, folder=tmp_path).resume()
    whole = (tmp_path / "last.pth").read_bytes()
    for damaged in (b"", b"noise", whole[: len(whole) // 2]):
        (tmp_path / "last.pth").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"last\.pth is not a checkpoint of tensors and plain values"):
            run_of(linear(), folder=tmp_path).resume()
    for content in ([1, 2], {"a": 1}, 5):
        torch.save(content, tmp_path / "last.pth")
        with pytest.raises(ValueError, match=r"last\.pth does not hold the training"):
            run_of(linear(), folder=tmp_path).resume()


def test_a_diverging_run_keeps_nothing_of_its_epoch(tmp_path):
    broken = points()
    broken[1][0][0] = math.inf
    run = run_of(linear(), epochs=2, folder=tmp_path)
    with pytest.raises(ValueError, match="^epoch 1/2: the loss is nan at step 2; stopped; a lower learning rate or"):
        fit(run, broken, points())
    assert not list(tmp_path.iterdir())
    run = run_of(linear(), epochs=2, folder=tmp_path)

    def stop():
        if run.epoch == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(run, points(), points(), stop)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    match = "^epoch 2/2: the validation loss after step 3 is nan; stopped, .* keeps the epochs before; a lower"
    with pytest.raises(ValueError, match=match):
        fit(run, points(), broken)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_every_stream_is_seeded():
    draws = []
    for _ in range(2):
        engine.seed_everything(5)
        draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert draws[0] == draws[1]
