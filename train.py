"""Train UNet or NestedUNet (U-Net++) on a prepared data set; the result is a folder models/<name>.

python train.py --arch NestedUNet --deep_supervision True --name run1
python train.py --name run1 --resume                 # go on with a stopped run
torchrun --nproc_per_node=4 train.py --name run1     # on four GPUs, or in four processes
python train.py --dataset my_cells --num_classes 2   # inputs/my_cells/{images,masks/0,masks/1}
"""

import argparse
import math
import sys
import time
from pathlib import Path

import torch
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from archs import ARCHS, DEEPEST, DEPTH, as_heads, build_model
from common.cli import Parser, Stops, check_config, number, parse_options, run_script
from common.devices import keep_memory, memory, pick_amp, pick_device, seed_everything
from common.distributed import copy_main, gather, is_main, parallel, processes, sync_batch_norm, world_size
from common.files import load_checkpoint, read_yaml, save_checkpoint, write_yaml
from common.loaders import with_shares
from common.lookalikes import Sketches, about_groups, about_twins, grouped_split, groups, twins
from common.report import plot_curves
from common.runs import (
    check_start,
    earlier_files,
    keeping,
    machine,
    machine_name,
    only_trainer,
    resolve_machine,
    restore,
    resumed,
    run_folder,
    write_log,
)
from dataset import (
    ABOUT,
    AUGMENTATIONS,
    GROUPED,
    build_dataset,
    check_split,
    list_ids,
    make_loader,
    set_epoch,
    split_ids,
)
from losses import LOSSES, mean_over_heads, smooth_borders
from metrics import PixelCounts, summarise
from utils import count_params, str2bool
from val import are_channels, evaluate, read_config

RUN_FILES = ("config.yml", "split.yml", "log.csv", "curves.png", "model.pth", "last.pth")
COLUMNS = ("epoch", "lr", "loss", "iou", "val_loss", "val_iou", "seconds")  # of log.csv
ABOUT_THE_COMMAND = ("config", "resume", "overwrite")  # options that config.yml does not keep
MOSTLY = 0.8  # a larger foreground is taken for a mistake
NO_OPTIONS = ("mean", "std", "scale", "environment", "level")  # what config.yml may keep beside the options
FREE_ON_RESUME = {
    "name",
    "device",
    "num_workers",
    "cache",
    "checkpointing",
    *ABOUT_THE_COMMAND,
}  # the result does not depend on them


def build_parser():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    natural = number(int, 1)
    size = number(int, 1, 4096)
    a = parser.add_argument_group("run").add_argument
    a("--name", help="models/<name>; default <dataset>_<arch>_wDS or _woDS")
    a("--config", help="YAML file of options; the command line comes after it")
    a("--resume", action="store_true", help="continue models/<name> after its last whole epoch")
    a("--overwrite", action="store_true", help="replace an existing models/<name>")
    a("--weights", help="start from the weights of a run (its name) or a file")
    a("--seed", type=number(int, 0, 2**32 - 1), default=0, help="initial weights, order, augmentation (default 0)")
    a("--epochs", type=number(int, 1, 100_000), default=80, help="default 80")
    a("-b", "--batch_size", type=natural, default=16, help="of all processes together; default 16")
    a(
        "--early_stopping",
        type=number(int),
        default=-1,
        help="stop after N epochs without a better val_iou; default: never",
    )

    a = parser.add_argument_group("model").add_argument
    a("-a", "--arch", choices=sorted(ARCHS), default="NestedUNet", help="default NestedUNet")
    a(
        "--deep_supervision",
        type=str2bool,
        default=False,
        help="NestedUNet: a loss on each of four heads, so that it can be pruned; default False",
    )
    a("--input_channels", type=int, choices=(1, 3, 4), default=3, help="grey, RGB or RGBA; default 3")
    a("--num_classes", type=number(int, 1, 100), default=1, help="folders masks/0, masks/1 ...; default 1")
    a(
        "--width",
        type=number(int, 1, 1024),
        default=32,
        help="filters of the first level, doubled four times; default 32",
    )
    a("--input_w", type=size, default=96, help="default 96")
    a("--input_h", type=size, default=96, help="default 96")

    a = parser.add_argument_group("data").add_argument
    a("--dataset", default="dsb2018_96", help="a folder of inputs/; default dsb2018_96")
    a("--img_ext", default=".png", help="default .png")
    a("--mask_ext", default=".png", help="default .png")
    a("--split", help="grouped: look-alikes on one side; or a split.yml of your own; default: a seeded 80/20 split")
    parts = ",".join(AUGMENTATIONS)
    a("--augment", type=augment, default="flips,mild,cutmix", help=f"none, or some of {parts}; default %(default)s")
    a("--split_seed", type=number(int, 0, 2**32 - 1), default=41, help="default 41")

    a = parser.add_argument_group("optimisation").add_argument
    positive = number(float, 0)
    a("--loss", choices=sorted(LOSSES), default="BCELovaszLoss", help="default BCELovaszLoss")
    a("--head_weights", type=head_weights, help="of the losses of L1 to L4, such as 1,2,3,4; default: all the same")
    a("--border_smoothing", type=number(float, 0, 0.5), default=0.0, help="softer training masks at borders; default 0")
    a("--optimizer", choices=sorted(OPTIMIZERS), default="AdamW", help="default AdamW")
    a("--lr", "--learning_rate", type=positive, default=2e-3, help="default 2e-3")
    a("--momentum", type=number(float, 0, 1), default=0.9, help="SGD; default 0.9")
    a("--weight_decay", type=positive, default=1e-4, help="default 1e-4")
    a("--nesterov", type=str2bool, default=False, help="SGD; default False")
    a("--scheduler", choices=sorted(SCHEDULERS), default="OneCycleLR", help="default OneCycleLR")
    a("--min_lr", type=positive, default=1e-5, help="CosineAnnealingLR, ReduceLROnPlateau; default 1e-5")
    a("--factor", type=number(float, 0, 0.999999), default=0.1, help="ReduceLROnPlateau; default 0.1")
    a("--patience", type=number(int, 0), default=2, help="ReduceLROnPlateau; default 2")
    a("--milestones", type=milestones, default="20,40", help="MultiStepLR: epochs, such as 20,40 (the default)")
    a("--gamma", type=positive, default=2 / 3, help="MultiStepLR; default 2/3")
    a("--ema", type=number(float, 0, 0.99999), default=0.995, help="decay of averaged weights, 0: off; default 0.995")

    a = parser.add_argument_group("machine").add_argument
    a("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps; default auto")
    a("--amp", choices=("auto", "off", "bf16", "fp16"), default="auto", help="mixed precision; default auto")
    a("--channels_last", type=auto_or_bool, default="auto", help="memory layout; auto: with mixed precision")
    a("--compile", type=str2bool, default=False, help="torch.compile; a CPU gains nothing; default False")
    a("--checkpointing", type=str2bool, default=False, help="less memory, more time, same results; default False")
    a("--cache", type=auto_or_bool, default="auto", help="keep decoded images in memory; auto: when they fit")
    a("--num_workers", type=number(int, -1, 1024), default=-1, help="loader processes; -1: 0 on a CPU, else up to 8")
    a("--sync_bn", type=str2bool, default=False, help="torchrun: batch norm over the GPUs' batches; default False")
    return parser


def auto_or_bool(text):
    return text if text == "auto" else str2bool(text)


def augment(text):
    """'cutmix,flips' or a list of them -> 'flips,cutmix', parts in the order of AUGMENTATIONS; 'none' has no parts."""
    names = [part.strip("[]'\" ") for part in text.split(",")] if text != "none" else []
    if unknown := [name for name in names if name not in AUGMENTATIONS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r}: expected none, or some of {','.join(AUGMENTATIONS)}")
    return ",".join(name for name in AUGMENTATIONS if name in names) or "none"


def head_weights(text):
    """'1,2,3,4' or '[1, 2, 3, 4]' -> '1,2,3,4', numbers of at least 0, not all 0."""
    weights = [number(float, 0, 1e6)(part) for part in str(text).strip("[] ").split(",")]
    if len(weights) != DEPTH or not any(weights):
        raise argparse.ArgumentTypeError(f"{text!r}: expected {DEPTH} numbers, not all of them 0")
    return ",".join(f"{weight:g}" for weight in weights)


def milestones(text):
    """'20,40' or '[20, 40]' -> '20,40', rising whole numbers."""
    epochs = [number(int, 1)(part) for part in str(text).strip("[] ").split(",")]
    if epochs != sorted(set(epochs)):
        raise argparse.ArgumentTypeError(f"{text!r} does not rise")
    return ",".join(map(str, epochs))


OPTIMIZERS = {
    "Adam": lambda p, c: torch.optim.Adam(p, c["lr"], weight_decay=c["weight_decay"]),
    "AdamW": lambda p, c: torch.optim.AdamW(p, c["lr"], weight_decay=c["weight_decay"]),
    "SGD": lambda p, c: torch.optim.SGD(
        p, c["lr"], momentum=c["momentum"], nesterov=c["nesterov"], weight_decay=c["weight_decay"]
    ),
}

SCHEDULERS = {
    "CosineAnnealingLR": lambda o, c, steps: lr_scheduler.CosineAnnealingLR(o, c["epochs"], eta_min=c["min_lr"]),
    "ReduceLROnPlateau": lambda o, c, steps: lr_scheduler.ReduceLROnPlateau(
        o, factor=c["factor"], patience=c["patience"], min_lr=c["min_lr"]
    ),
    "MultiStepLR": lambda o, c, steps: lr_scheduler.MultiStepLR(
        o, [int(epoch) for epoch in c["milestones"].split(",")], gamma=c["gamma"]
    ),
    "ConstantLR": lambda o, c, steps: lr_scheduler.ConstantLR(o, factor=1.0),
    # a step a batch: up to lr over the first fifth, then down to almost nothing
    "OneCycleLR": lambda o, c, steps: lr_scheduler.OneCycleLR(
        o, c["lr"], total_steps=max(10, c["epochs"] * steps), pct_start=0.2, cycle_momentum=False
    ),
}


# ---------------------------------------------------------------- options to a run's config


def new_config(options):
    """The resolved options of a new run, flat, as config.yml keeps them."""
    config = {key: value for key, value in vars(options).items() if key not in ABOUT_THE_COMMAND}
    if not config["name"]:
        supervision = "wDS" if config["deep_supervision"] else "woDS"
        config["name"] = f"{Path(config['dataset']).name}_{config['arch']}_{supervision}"
    if config["head_weights"] and not config["deep_supervision"]:
        raise ValueError("--head_weights are for the four heads of deep supervision; give --deep_supervision True")
    if config["border_smoothing"] and config["loss"] == "LovaszHingeLoss":
        raise ValueError("--border_smoothing is for losses with a cross entropy; LovaszHingeLoss sees 0 and 1 alone")
    if config["scheduler"] in ("CosineAnnealingLR", "ReduceLROnPlateau") and config["lr"] < config["min_lr"]:
        raise ValueError(f"--lr {config['lr']:g} is below --min_lr {config['min_lr']:g}, to which it should fall")
    return resolve_machine(config)


def resumed_config(options, given):
    """The config of the run to resume, with the options that may change; ValueError where others were changed."""
    if not options.name:
        raise ValueError("--resume needs --name, the run to go on with")
    folder = run_folder(options.name)
    config = check_config(build_parser, read_config(folder), folder / "config.yml")
    if "level" in config:
        raise ValueError(f"{folder} is another run cut to level {config['level']}; go on with the whole one")
    return resumed(config, folder, options, given, FREE_ON_RESUME, ABOUT_THE_COMMAND)


# ---------------------------------------------------------------- building


def build_data(config, split):
    """-> training and validation Dataset, checked and cached, and what split.yml notes about them.

    Adds what was found in the data to config: mean, std and, where dataset.yml tells it, scale (pixels of the input
    for a pixel of the raw image).
    """
    folder = Path("inputs") / config["dataset"]
    train_set, val_set = build_dataset(config, split["train"], augment=True), build_dataset(config, split["val"])
    results, problems, sketches = [], [], Sketches()
    for dataset in (train_set, val_set):
        try:
            results.append(dataset.check(config["cache"], sketches.add))
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("; ".join(problems))
    found, found_val = results
    if not any(found["foreground"]):
        raise ValueError(f"{folder / 'masks'}: all {len(train_set)} training masks are empty; nothing could be learned")
    config.setdefault("mean", found["mean"])
    config.setdefault("std", found["std"])
    for dataset in (train_set, val_set):
        dataset.mean, dataset.std = config["mean"], config["std"]
    if (folder / "dataset.yml").is_file():
        about = read_yaml(folder / "dataset.yml")
        known = [about[key] for key in ("scale", "img_size") if about.get(key)]
        if not all(type(value) in (int, float) and 0 < value < 1e6 for value in known):
            raise ValueError(f"{folder / 'dataset.yml'}: scale and img_size must be numbers above 0, found {known}")
        if len(known) == 2:
            side = math.sqrt(config["input_h"] * config["input_w"])
            config["scale"] = round(about["scale"] * side / about["img_size"], 6)
    size = (found["bytes"] + found_val["bytes"]) / 2**20
    kept = "kept in memory" if found["cached"] and found_val["cached"] else "read anew each epoch"
    foreground = ", ".join(f"{part:.1%}" for part in found["foreground"])
    print(f"{folder}: {len(train_set)} training and {len(val_set)} validation images, {size:.0f} MB, {kept}")
    print(f"foreground of the training masks {foreground}; mean {config['mean']}, std {config['std']}")
    for suspicion in suspicions(folder, found, found_val, len(train_set) + len(val_set)):
        print(f"train.py: warning: {suspicion}", file=sys.stderr)
    of_twins = twins(sketches, split["train"], split["val"])
    print(about_twins(of_twins, len(val_set)))
    about = {key: {"train": found[key], "val": found_val[key]} for key in ABOUT}
    return train_set, val_set, {**about, "twins": of_twins}


def suspicions(folder, found, found_val, count):
    """What is no error, but most likely a mistake. found: what Dataset.check found in training and validation."""
    said = []
    if found["two_valued"] + found_val["two_valued"] == count:
        said.append(f"all {count} images of {folder / 'images'} are black and white alone; are they masks?")
    for k, (part, part_val) in enumerate(zip(found["foreground"], found_val["foreground"], strict=True)):
        masks = folder / "masks" / str(k)
        if part > MOSTLY:
            said.append(f"{part:.1%} of the pixels of {masks} are foreground; are the masks inverted?")
        for name, share in (("training", part), ("validation", part_val)):
            if not share:
                said.append(f"all {name} masks of {masks} are empty")
    return said


def check_memory(config, device):
    """ValueError when the machine could not hold the weights: better said than found out when the memory is full."""
    with torch.device("meta"):  # shapes without memory
        weights = 4 * sum(value.numel() for value in build_model(config).state_dict().values())
    needed = weights * (4 if device.type == "cpu" else 1)  # and their gradients and the optimizer's two averages
    if needed > memory():
        raise ValueError(
            f"--width {config['width']}: the weights and what training keeps of them take {needed / 2**30:,.0f} GB, "
            f"this machine has {memory() / 2**30:,.0f}; take a smaller one"
        )


def start_from(model, config):
    """Load config["weights"], a run's name or a file, into model; heads of another size keep their fresh weights.

    A run's weights expect images standardised as that run did, so its mean and std come along.
    """
    path = Path(config["weights"])
    if not path.is_file():
        path = (path if path.is_dir() else Path("models") / path) / "model.pth"
    if not path.is_file():
        raise FileNotFoundError(f"--weights {config['weights']}: no such file, and no run: {path} is not there either")
    if (path.parent / "config.yml").is_file():
        other = {**read_yaml(path.parent / "config.yml"), "input_channels": config["input_channels"]}
        config.update({key: other[key] for key in ("mean", "std") if are_channels(other, key)})
    state = load_checkpoint(path)
    for key in ("state_dict", "ema", "model"):  # of others' checkpoints; of our last.pth, averaged where it was
        state = state[key] if isinstance(state, dict) and isinstance(state.get(key), dict) else state
    state = state.items() if isinstance(state, dict) else ()
    state = {str(key).removeprefix("module."): value for key, value in state if torch.is_tensor(value)}
    if wild := [key for key, value in state.items() if not torch.isfinite(value).all()]:
        raise ValueError(f"{path} holds weights that are not finite: {wild[0]}")
    own = model.state_dict()
    fitting = {key: value for key, value in state.items() if key in own and own[key].shape == value.shape}
    fresh = sorted(key for key in own.keys() - fitting.keys())
    if wrong := [key for key in fresh if not key.startswith("final")]:
        found = tuple(state[wrong[0]].shape) if wrong[0] in state else "missing"
        raise ValueError(
            f"{path} does not fit: {wrong[0]} is {found} there, {tuple(own[wrong[0]].shape)} here, and so on for "
            f"{len(wrong)} of {len(own)} entries; give the --arch, --width and --input_channels it was trained with"
        )
    model.load_state_dict(fitting, strict=False)
    print(f"weights of {path}" + (f"; new heads: {', '.join(fresh)}" if fresh else ""))


def averaged(model, decay):
    """An exponential moving average of the weights (Polyak averaging, as in Tarvainen and Valpola, NeurIPS 2017).

    Its memory is short at first, min(decay, (1 + t) / (10 + t)) after t steps, so that short trainings profit too.
    """

    def average(averages, values, updates):
        if averages[0].is_floating_point():
            updates = float(updates)
            torch._foreach_lerp_(averages, values, 1 - min(decay, (1 + updates) / (10 + updates)))
        else:  # numbers of batches
            torch._foreach_copy_(averages, values)

    return AveragedModel(model, multi_avg_fn=average, use_buffers=True)


# ---------------------------------------------------------------- training


def train_one_epoch(
    model,
    loader,
    criterion,
    optimizer,
    device,
    *,
    amp=None,
    scaler=None,
    step_scheduler=None,
    ema=None,
    weights=None,
    border_smoothing=0.0,
    label="",
    after_step=lambda: None,
):
    """One pass over the loader -> {"loss": mean over images, "iou": pooled IoU of the deepest head}.

    Both are of all processes, and so is the error: FloatingPointError, with the step, at a loss that is not finite.
    after_step(): may end the training.
    """
    model.train()
    counts, parts, losses, sizes = PixelCounts(thresholds=(0.5,)), [], [], []
    look_every = 1 if device.type == "cpu" else 10  # looking at a loss waits for the GPU
    with tqdm(total=len(loader.dataset), desc=label, unit="img", leave=False, disable=not is_main() or None) as bar:
        for step, ((images, masks, _), own, total) in enumerate(with_shares(loader), 1):
            images, masks = images.to(device, non_blocking=True), masks.to(device, non_blocking=True)
            with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
                heads = as_heads(model(images))
            loss = mean_over_heads(criterion, heads, smooth_borders(masks, border_smoothing), weights)
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss * (own * world_size() / total)).backward()
            scaler.step(optimizer)
            scaler.update()
            if step_scheduler:
                step_scheduler.step()
            if ema:
                ema.update_parameters(model)
            parts.append(loss.detach() * (own / total))
            sizes.append(total)
            counts.update(torch.sigmoid(heads[-1].detach()[:own].float()), masks[:own])
            bar.update(total)
            if step % look_every == 0 or step == len(loader):
                found = gather((torch.stack(parts).tolist(), counts.table().sum(0, keepdims=True)))
                losses += [sum(of_step) for of_step in zip(*(values for values, _ in found), strict=True)]
                parts.clear()
                if wrong := [k for k, value in enumerate(losses, 1) if not math.isfinite(value)]:
                    raise FloatingPointError(f"the loss is {losses[wrong[0] - 1]} at step {wrong[0]}")
                mean = sum(map(math.prod, zip(losses, sizes, strict=True))) / sum(sizes)
                iou = summarise(sum(table for _, table in found))["iou"]
                bar.set_postfix(loss=f"{mean:.4f}", iou=f"{iou:.4f}")
            after_step()
    return {"loss": mean, "iou": iou}


class Run:
    """What a training is made of and how it is kept in last.pth: everything that resuming needs."""

    def __init__(self, config, model, steps_an_epoch, device):
        self.config, self.device = config, device
        self.model = model.to(device)
        if config["channels_last"]:
            self.model.to(memory_format=torch.channels_last)
        self.ema = averaged(self.model, config["ema"]) if config["ema"] else None
        self.optimizer = OPTIMIZERS[config["optimizer"]](self.model.parameters(), config)
        self.scheduler = SCHEDULERS[config["scheduler"]](self.optimizer, config, steps_an_epoch)
        self.amp = pick_amp(config["amp"], device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp is torch.float16)
        self.best_iou, self.best_epoch, self.rows = -1.0, 0, []  # rows: those of log.csv

    @property
    def epoch(self):  # the last whole one
        return len(self.rows)

    @property
    def judged(self):
        """The model that is validated and kept: the averaged weights when averaging is on."""
        return self.ema.module if self.ema else self.model

    def finish_epoch(self, row, folder):
        """Note the epoch and keep it in model.pth, last.pth and, when both are safe, log.csv; -> is it the best?"""
        self.rows.append(row)
        if better := row["val_iou"] > self.best_iou:
            self.best_iou, self.best_epoch = row["val_iou"], row["epoch"]
        if is_main():
            if better:
                save_checkpoint(folder / "model.pth", self.judged.state_dict())
            save_checkpoint(folder / "last.pth", self.state())
            write_log(self.rows, folder / "log.csv")
        return better

    def over(self):
        """Why no further epoch is due, or None."""
        stop = self.config["early_stopping"]
        if 0 < stop <= self.epoch - self.best_epoch:
            return f"no better val_iou for {stop} epochs: stopped early"
        return f"all {self.epoch} epochs are done" if self.epoch >= self.config["epochs"] else None

    def state(self):
        parts = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler, "scaler": self.scaler}
        if self.ema:
            parts["ema"] = self.ema
        progress = {"rows": self.rows, "best_iou": self.best_iou, "best_epoch": self.best_epoch}
        return {**progress, **{name: part.state_dict() for name, part in parts.items()}}

    def load_state(self, state, source):
        parts = {name: getattr(self, name) for name in ("model", "optimizer", "scheduler", "scaler")}
        parts |= {"ema": self.ema} if self.ema else {}
        progress = {"best_iou": self.best_iou, "best_epoch": self.best_epoch}
        self.rows, progress = restore(parts, progress, state, COLUMNS, source)
        self.best_iou, self.best_epoch = progress["best_iou"], progress["best_epoch"]


def fit(run, loader, val_loader, criterion, folder, check_stop=lambda *_: None):
    """Train from run.epoch + 1 to the last epoch, writing log.csv, model.pth and last.pth after each.

    check_stop(*_): called after each step and epoch, never while files are written; what it raises ends the training.
    """
    config, device = run.config, run.device
    model = parallel(run.model, device)
    model = torch.compile(model) if config["compile"] else model
    weights = [float(part) for part in config["head_weights"].split(",")] if config["head_weights"] else None
    each_step = run.scheduler if config["scheduler"] == "OneCycleLR" else None
    while not run.over():
        start, epoch = time.time(), run.epoch + 1
        set_epoch(loader, epoch)
        torch.manual_seed(config["seed"] + epoch)  # what a network may draw (dropout) is resumed alike
        lr = run.optimizer.param_groups[0]["lr"]
        label = f"epoch {epoch}/{config['epochs']}"
        parts = {"amp": run.amp, "scaler": run.scaler, "step_scheduler": each_step, "ema": run.ema, "label": label}
        parts |= {"weights": weights, "border_smoothing": config["border_smoothing"], "after_step": check_stop}
        try:
            trained = train_one_epoch(model, loader, criterion, run.optimizer, device, **parts)
            copy_main(run.judged)
            judged = evaluate(
                run.judged, val_loader, criterion, device, amp=run.amp, weights=weights, on_batch=check_stop
            )
            if not math.isfinite(judged["loss"]):
                raise FloatingPointError(f"the validation loss after step {len(loader)} is {judged['loss']}")
        except FloatingPointError as error:
            kept = f"stopped, {folder} keeps the epochs before" if run.epoch else "stopped"
            raise ValueError(f"{label}: {error}; {kept}; a lower --lr or --amp off may help") from None
        scores = {**trained, "val_loss": judged["loss"], "val_iou": summarise(judged["tables"][DEEPEST])["iou"]}
        if config["scheduler"] == "ReduceLROnPlateau":
            run.scheduler.step(scores["val_loss"])
        elif not each_step:
            run.scheduler.step()
        row = {"epoch": epoch, "lr": lr, **scores, "seconds": round(time.time() - start, 1)}
        better = run.finish_epoch(row, folder)
        shown = "  ".join(f"{name} {value:.4f}" for name, value in scores.items())
        print(f"{label}  lr {lr:.1e}  {shown}{'*' if better else ' '} {row['seconds']:.1f} s", flush=True)
        check_stop()
    print(run.over())


def main():
    options, given = parse_options(build_parser, read_config=read_recipe)
    config = resumed_config(options, given) if options.resume else new_config(options)
    folder = run_folder(config["name"])
    with only_trainer(folder, RUN_FILES):
        earlier = earlier_files(folder, RUN_FILES, options)
        with processes(pick_device(config["device"])) as device:
            train(*prepare(config, folder, earlier, device, options.resume), folder)


def prepare(config, folder, earlier, device, resume):
    """-> the Run, its training and its validation loader; a new run's folder holds its config and split afterwards."""
    begun = resume and (folder / "last.pth").is_file()
    keep_memory()
    torch.backends.cudnn.benchmark = True  # all batches have one size: let cuDNN find its fastest convolutions
    seed_everything(config["seed"])
    check_memory(config, device)
    model = build_model(config)
    if config["sync_bn"]:
        model = sync_batch_norm(model, device)
    split = chosen_split(config, folder if resume else None)
    if config["weights"] and not begun:
        start_from(model, config)
    train_set, val_set, about = build_data(config, split)
    loader_options = {"num_workers": config["num_workers"], "pin_memory": device.type == "cuda"}
    loader = make_loader(train_set, config["batch_size"], shuffle=True, seed=config["seed"], **loader_options)
    val_loader = make_loader(val_set, config["batch_size"], **loader_options)
    run = Run(config, model, len(loader), device)

    if resume and about["fingerprint"] != read_yaml(folder / "split.yml").get("fingerprint"):
        raise ValueError(f"the files of inputs/{config['dataset']} have changed since {folder} was started")
    if begun:
        run.load_state(load_checkpoint(folder / "last.pth"), folder / "last.pth")
        print(f"resuming {folder} after epoch {run.epoch}")
    elif resume:
        print(f"{folder} has no whole epoch yet: starting with the first")
    check_start(config, FREE_ON_RESUME, data=about["fingerprint"], epoch=run.epoch)
    if begun and is_main():
        write_log(run.rows, folder / "log.csv")  # a kill may have come between the two files
    elif not resume and is_main():
        write_start(config, folder, earlier, {**split, **about}, device)

    precision = "float32" if run.amp is None else f"{config['amp']} autocast"
    layout = "channels_last" if config["channels_last"] else "contiguous"
    print(f"{config['arch']}, {count_params(model):,} parameters, {machine_name(device)}, {precision}, {layout}")
    return run, loader, val_loader


def write_start(config, folder, earlier, split, device):
    """What a run's folder holds before the first of its epochs; the files of an earlier run go."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in earlier:
        path.unlink()
    write_yaml(folder / "split.yml", split)
    write_yaml(folder / "config.yml", {**config, "environment": machine(device)})  # last: it can be resumed


def train(run, loader, val_loader, folder):
    """Fit, and end with the curves and a word on where the run is or how it goes on."""
    config = run.config

    def draw_curves():
        if run.rows and is_main():
            plot_curves(run.rows, folder / "curves.png", title=config["name"])

    with keeping(folder, "train.py", draw_curves), Stops() as stops:
        fit(run, loader, val_loader, LOSSES[config["loss"]](), folder, stops.check)
    print(f"best val_iou {run.best_iou:.4f} at epoch {run.best_epoch}, last {run.rows[-1]['val_iou']:.4f}")
    print(f"the run is in {folder}; evaluate it: python val.py --name {config['name']}")


def chosen_split(config, folder):
    """The ids of a resumed run's split.yml, of the user's --split file, or of a seeded 80/20 split."""
    if folder or config["split"] not in (None, GROUPED):
        path = folder / "split.yml" if folder else config["split"]
        return check_split(read_yaml(path), path)
    ids = list_ids(Path("inputs") / config["dataset"] / "images", config["img_ext"])
    if not config["split"]:
        return split_ids(ids, config["split_seed"])
    sketches = Sketches()
    build_dataset(config, ids).check(cache=False, each=sketches.add)
    print(about_groups(groups(sketches)))
    return grouped_split(ids, sketches, config["split_seed"])


def read_recipe(path):
    """A recipe, or the config.yml of another run, whose findings about its data and machine are not options."""
    recipe = read_yaml(path)
    left_out = (*NO_OPTIONS, *(("device", "num_workers") if "environment" in recipe else ()))
    return {key: value for key, value in recipe.items() if key not in left_out}


if __name__ == "__main__":
    run_script(main)
