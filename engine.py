"""How a training runs: one step, one epoch, and a whole training that is kept on disk and resumed. Both jobs share it.

    run = Run(model, Segmentation(criterion), optimizer, scheduler, device, epochs=80, folder=Path("models/run1"))
    fit(run, loader, val_loader)

train.py and transfer_resnet18.py build what a training is made of; this file loops over it. A task (tasks.py) says what
differs between the jobs: how a batch is laid out, what its loss is, and what is counted to score it.
"""

import copy
import math
import random
import statistics
import time

import numpy as np
import torch
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from common.cli import Stops
from common.curves import plot_curves
from common.devices import precision
from common.distributed import copy_main, gather, is_main, parallel, world_size
from common.files import load_checkpoint, save_checkpoint
from common.loaders import set_epoch, with_shares
from common.runs import check_start, keeping, note_changes, time_left, write_log, write_start
from utils import AverageMeter

SHORT = 200  # below this many steps, averaged weights forget sooner

OPTIMIZERS = {  # each takes parameters, or groups of them with learning rates of their own, and the config
    "Adam": lambda parameters, c: torch.optim.Adam(parameters, c["lr"], weight_decay=c["weight_decay"]),
    "AdamW": lambda parameters, c: torch.optim.AdamW(parameters, c["lr"], weight_decay=c["weight_decay"]),
    "SGD": lambda parameters, c: torch.optim.SGD(
        parameters,
        c["lr"],
        momentum=c["momentum"],
        nesterov=c.get("nesterov", False),
        weight_decay=c["weight_decay"],
    ),
}
SCHEDULERS = {  # of train.py; steps: batches per epoch
    "ConstantLR": lambda o, c, steps: lr_scheduler.ConstantLR(o, factor=1.0),
    "CosineAnnealingLR": lambda o, c, steps: lr_scheduler.CosineAnnealingLR(o, c["epochs"], eta_min=c["min_lr"]),
    "MultiStepLR": lambda o, c, steps: lr_scheduler.MultiStepLR(
        o, [int(epoch) for epoch in c["milestones"].split(",")], gamma=c["gamma"]
    ),
    # one step per batch: up to lr over the first fifth, then down to almost nothing
    "OneCycleLR": lambda o, c, steps: lr_scheduler.OneCycleLR(
        o,
        [group["lr"] for group in o.param_groups],
        total_steps=max(10, c["epochs"] * steps),
        pct_start=0.2,
        cycle_momentum=False,
    ),
    "ReduceLROnPlateau": lambda o, c, steps: lr_scheduler.ReduceLROnPlateau(
        o, factor=c["factor"], patience=c["patience"], min_lr=c["min_lr"]
    ),
}


def seed_everything(seed):
    """Seed the global random streams of Python, NumPy and PyTorch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


# ---------------------------------------------------------------- one epoch


def no_check():
    """Stands in for a function that may end the training, such as Stops.check."""


def train_one_epoch(run, loader, label="", check_stop=no_check):
    """One pass over the loader -> {"loss": mean over images, run.task.score: score of the training batches}.

    Both cover all processes. When a loss is not finite, every process raises FloatingPointError, which names the step.
    check_stop() is called after each step; what it raises ends the training.
    """
    run.model.train()
    losses, counts, waiting = AverageMeter(), 0, []
    look_every = 1 if run.device.type == "cpu" else 10  # looking at a loss waits for the GPU
    with tqdm(total=len(loader), desc=label, unit="batch", leave=False, disable=not is_main() or None) as bar:
        for step, (batch, own, total) in enumerate(with_shares(loader), 1):
            inputs, targets = run.task.to_device(batch, run.device, run.amp)
            with precision(run.device, run.amp):
                output = run.forward(inputs)
            loss = run.task.loss(output, targets)
            run.learn(loss * (own * world_size() / total))
            with torch.no_grad():
                counts = counts + run.task.count(output, targets, own, training=True)
            waiting.append((loss.detach() * (own / total), total))
            bar.update()
            if step % look_every == 0 or step == len(loader):
                parts = gather((torch.stack([part for part, _ in waiting]).tolist(), counts.cpu()))
                for k, (_, total) in enumerate(waiting):
                    losses.update(sum(of_process[k] for of_process, _ in parts), total)
                    if not math.isfinite(losses.val):
                        raise FloatingPointError(f"the loss is {losses.val} at step {step - len(waiting) + k + 1}")
                waiting.clear()
                found = {"loss": losses.avg, run.task.score: run.task.score_of(sum(count for _, count in parts))}
                bar.set_postfix({name: f"{value:.4f}" for name, value in found.items()})
            check_stop()
    return found


@torch.inference_mode()
def evaluate(model, loader, task, device, amp=None, label="", check_stop=no_check):
    """One pass over the loader without learning -> {"loss": mean over images, task.score: their score}.

    Both are of all processes. amp: the autocast dtype, or None for float32. check_stop() is called after each batch.
    """
    model.eval()
    losses, counts, count = [], 0, 0
    for batch in tqdm(loader, label, unit="batch", leave=False, disable=not is_main() or None):
        inputs, targets = task.to_device(batch, device, amp)
        with precision(device, amp):
            output = model(inputs)
        losses.append(task.loss(output, targets) * len(inputs))
        counts = counts + task.count(output, targets, len(inputs), training=False)
        count += len(inputs)
        check_stop()
    mine = (torch.stack(losses).tolist(), counts.cpu(), count) if losses else None  # more processes than batches
    losses, counts, sizes = zip(*[part for part in gather(mine) if part], strict=True)
    loss = torch.tensor([value for of_process in losses for value in of_process]).sum().item() / sum(sizes)
    return {"loss": loss, task.score: task.score_of(sum(counts))}


# ---------------------------------------------------------------- a whole training


class Run:
    """What a training is made of, how far it has come, and the folder that keeps it.

    model: what learns, on `device`. task: one of tasks.py. scheduler: OneCycleLR is stepped after each
    batch, ReduceLROnPlateau after each epoch with the validation loss, any other after each epoch. amp: the autocast
    dtype or None. ema: decay of the averaged weights, which are then the ones validated and kept; 0 for none.
    early_stopping: epochs without a better validation score, negative for never. seed: the global stream is seeded
    with seed + epoch, or left alone when None. folder: gets log.csv, model.pth (best epoch, or last with keep_last) and
    last.pth (what resuming needs); None keeps those weights in memory. whole: the model that model.pth holds when
    `model` is a part of it, such as a head trained on fixed features. frozen: parameters that do not learn in the first
    frozen_epochs.
    """

    def __init__(
        self,
        model,
        task,
        optimizer,
        scheduler,
        device,
        *,
        epochs,
        amp=None,
        ema=0.0,
        early_stopping=-1,
        seed=None,
        folder=None,
        whole=None,
        frozen=(),
        frozen_epochs=0,
        keep_last=False,
    ):
        self.model, self.task, self.optimizer, self.scheduler, self.device = model, task, optimizer, scheduler, device
        self.epochs, self.amp, self.early_stopping, self.seed, self.folder = epochs, amp, early_stopping, seed, folder
        self.forward = model  # `fit` wraps it for several processes, or compiles it
        self.whole = whole or model
        self.frozen, self.frozen_epochs, self.keep_last = frozen, frozen_epochs, keep_last
        self.ema = Averaged(model, ema) if ema else None
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp is torch.float16)
        self.rows, self.best_score, self.best_epoch, self.best = [], -1.0, 0, None

    @property
    def epoch(self):
        """The last finished epoch."""
        return len(self.rows)

    @property
    def judged(self):
        """The model that is validated: the averaged weights when averaging is on."""
        return self.ema.module if self.ema else self.model

    @property
    def kept(self):
        """The whole model that is validated; model.pth gets its weights from the best epoch, or from the last."""
        return self.judged if self.whole is self.model else self.whole

    def learn(self, loss):
        """One step of the optimizer, of the scheduler that counts steps, and of the averaged weights."""
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        if self.epoch < self.frozen_epochs:
            for parameter in self.frozen:
                parameter.grad = None  # the optimizer leaves it alone
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if isinstance(self.scheduler, OneCycleLR):
            self.scheduler.step()
        if self.ema:
            self.ema.update_parameters(self.model)

    def finish_epoch(self, row):
        """Step the scheduler, note the epoch, keep it on disk -> whether it is the best so far."""
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(row["val_loss"])
        elif not isinstance(self.scheduler, OneCycleLR):
            self.scheduler.step()
        self.rows.append(row)
        better = row[f"val_{self.task.score}"] >= self.best_score  # on a tie the later one: it has learned longer
        if better:
            self.best_score, self.best_epoch = row[f"val_{self.task.score}"], row["epoch"]
        due = better or self.keep_last
        if self.folder is None:
            if due:
                self.best = copy.deepcopy(self.kept.state_dict())
        elif is_main():
            if due:
                save_checkpoint(self.folder / "model.pth", self.kept.state_dict())
            save_checkpoint(self.folder / "last.pth", self.state())
            write_log(self.rows, self.folder / "log.csv")  # last: it counts the epochs that are safe
        return better

    def load_best(self):
        """Give the model the weights that model.pth holds."""
        best = self.best if self.folder is None else load_checkpoint(self.folder / "model.pth")
        self.kept.load_state_dict(best)

    def over(self):
        """Why no further epoch is due, or None."""
        scores = [row[f"val_{self.task.score}"] for row in self.rows]
        waited = self.epoch - 1 - scores.index(max(scores)) if scores else 0  # an equal score is no better one
        if 0 < self.early_stopping <= waited:
            return f"no better val_{self.task.score} for {self.early_stopping} epochs: stopped early"
        return f"all {self.epoch} epochs are done" if self.epoch >= self.epochs else None

    def _parts(self):
        parts = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler, "scaler": self.scaler}
        return {**parts, "ema": self.ema} if self.ema else parts

    def state(self):
        """What last.pth holds: tensors and plain values."""
        progress = {"rows": self.rows, f"best_{self.task.score}": self.best_score, "best_epoch": self.best_epoch}
        return {**progress, **{name: part.state_dict() for name, part in self._parts().items()}}

    def resume(self):
        """Go on where last.pth ends. ValueError when it does not fit this training."""
        path = self.folder / "last.pth"
        state = load_checkpoint(path)
        try:
            for name, part in self._parts().items():
                part.load_state_dict(state[name])
            self.rows = list(state["rows"])
            self.best_score, self.best_epoch = state[f"best_{self.task.score}"], state["best_epoch"]
        except (KeyError, TypeError, AttributeError, RuntimeError, ValueError, IndexError):
            raise ValueError(f"{path} does not hold the training that config.yml describes") from None
        if is_main():
            write_log(self.rows, self.folder / "log.csv")  # a kill may have come between the two files
        print(f"resuming {self.folder} after epoch {self.epoch}")


def averaging_decay(ema, steps):
    """The decay of the averaged weights in a training of so many steps: `ema`, or less in a short training.

    An average remembers 1 / (1 - decay) steps. In a training of fewer than SHORT steps, that is limited to a fiftieth
    of all steps (but not to less than two): with few images an epoch is a single step, and a longer average would lag
    whole epochs behind.
    """
    return ema if steps >= SHORT else min(ema, 1 - 1 / max(2, steps / 50))


class Averaged(AveragedModel):
    """An exponential moving average of the weights (Polyak averaging, as in Tarvainen and Valpola, NeurIPS 2017).

    Its memory is short at first, min(decay, (1 + t) / (10 + t)) after t steps, so that short trainings profit too.
    """

    def __init__(self, model, decay):
        super().__init__(model, use_buffers=True)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model):
        """Take the weights of one more step. Unlike the parent's, it does not wait for a GPU: it counts on the CPU."""
        updates, pairs = int(self.n_averaged), list(zip(_tensors(self.module), _tensors(model), strict=True))
        blended = [pair for pair in pairs if updates and pair[0].is_floating_point()]
        copied = [pair for pair in pairs if not (updates and pair[0].is_floating_point())]  # such as numbers of batches
        if blended:
            weight = 1 - min(self.decay, (1 + updates) / (10 + updates))
            torch._foreach_lerp_(*map(list, zip(*blended, strict=True)), weight)
        if copied:
            torch._foreach_copy_(*map(list, zip(*copied, strict=True)))
        self.n_averaged += 1


def _tensors(model):
    return *model.parameters(), *model.buffers()


def fit(run, loader, val_loader, check_stop=no_check, compiled=False, board=None):
    """Train from the epoch after run.epoch to the last one; every finished epoch is kept, and shown on the board.

    check_stop() is called after each step and epoch, never while files are written; what it raises ends the training.
    ValueError when a loss is not finite, before anything of that epoch is kept.
    """
    run.forward = parallel(run.model, run.device)
    if compiled:
        run.forward = torch.compile(run.forward)
    spent = []  # seconds of each epoch
    while not run.over():
        start, epoch, rate = time.perf_counter(), run.epoch + 1, run.optimizer.param_groups[0]["lr"]
        label = f"epoch {epoch}/{run.epochs}"
        for each in (loader, val_loader):
            set_epoch(each, epoch)
        if run.seed is not None:  # what a network draws (dropout) is the same after a resume
            torch.manual_seed(run.seed + epoch)
        try:
            trained = train_one_epoch(run, loader, label, check_stop)
            copy_main(run.judged)
            judged = evaluate(run.judged, val_loader, run.task, run.device, run.amp, f"{label} val", check_stop)
            if not math.isfinite(judged["loss"]):
                raise FloatingPointError(f"the validation loss after step {len(loader)} is {judged['loss']}")
        except FloatingPointError as error:
            kept = f"stopped, {run.folder} keeps the epochs before" if run.epoch and run.folder else "stopped"
            raise ValueError(f"{label}: {error}; {kept}; a lower learning rate or --amp off may help") from None
        scores = {**trained, **{f"val_{name}": value for name, value in judged.items()}}
        seconds = round(time.perf_counter() - start, 2)
        row = {"epoch": epoch, "lr": rate, **scores, "seconds": seconds}
        if board:
            board.add(run, row)  # before last.pth: resuming purges any extra epoch
        better = run.finish_epoch(row)
        spent.append(time.perf_counter() - start)
        left = f", {time_left(statistics.median(spent) * (run.epochs - epoch))}" if epoch < run.epochs else ""
        shown = "  ".join(f"{name} {value:.4f}" for name, value in scores.items())
        print(f"{label}  lr {rate:.1e}  {shown}{'*' if better else ' '} {seconds:.1f} s{left}", flush=True)
        check_stop()
    print(run.over())


def begin(run, config, earlier, resume, free, data, split=None):
    """Before the first step: continue the run in its folder, or write a new one's config.yml and split.yml there.

    earlier: files to delete. resume: whether the run was begun before. free: the options that torchrun's processes
    need not share. data: the fingerprint of the data, which they do share. split: the content of split.yml.
    """
    if resume and (run.folder / "last.pth").is_file():
        run.resume()
    elif resume:
        print(f"{run.folder} has no finished epoch yet: starting with the first")
    check_start(config, free, data=data, epoch=run.epoch)
    if is_main() and resume:
        note_changes(config, run.folder)
    elif is_main():
        write_start(config, run.folder, earlier, run.device, split)


def fit_and_keep(run, loader, val_loader, script, stops=None, compiled=False, board=None):
    """`fit` as a script runs it: signals wait for the end of a step, and curves.png is written however it ends.

    script: named in the command that continues a stopped run. stops: a common.cli.Stops, or None for a new one.
    board: a common.board.Board, which is always closed at the end, or None.
    """

    def at_end():
        if run.rows and is_main():
            plot_curves(run.rows, run.folder / "curves.png", title=run.folder.name)
        if board:
            board.close()

    with keeping(run.folder, script, at_end), stops or Stops() as stops:
        fit(run, loader, val_loader, stops.check, compiled, board)
