"""Fine-tune torchvision's ResNet-18 on ants and bees, or on any folder with one sub-folder of pictures a class.

python transfer_resnet18.py --download                             # the data once, then ImageNet weights, then training
python transfer_resnet18.py --freeze --name ants_bees_frozen       # features fixed, only the head is trained
python transfer_resnet18.py --data_dir my_pictures --name mine     # my_pictures/{train,val}/<class>/*.jpg
python transfer_resnet18.py --name mine --predict a.jpg holiday/   # class and probability of new pictures
python transfer_resnet18.py --demo                                 # generated pictures, offline, a minute
torchrun --nproc_per_node=2 transfer_resnet18.py --name mine       # on two GPUs, or in two processes
"""

import argparse
import copy
import csv
import math
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision.models import ResNet18_Weights
from tqdm import tqdm

from classification import folders
from classification.folders import set_epoch, to_device
from classification.resnet18 import ResNet18, fill_body, grad_cam
from classification.scores import confusion_matrix, format_confusion, heat_overlay, notable, wilson
from common import download, report
from common.cli import Parser, Stops, check_config, number, parse_options, run_script
from common.devices import keep_memory, pick_amp, pick_device, seed_everything
from common.distributed import copy_main, gather, is_main, launched, parallel, processes, sync_batch_norm, world_size
from common.files import atomic_path, load_checkpoint, new_folder, read_yaml, save_checkpoint, write_yaml
from common.images import write_png
from common.loaders import SharedBatches, WholeBatches, leave_signals_to_main, quieten_loaders, with_shares
from common.runs import (
    check_start,
    earlier_files,
    keeping,
    log_of,
    machine,
    machine_name,
    newest_run,
    only_trainer,
    resolve_machine,
    restore,
    resumed,
    run_folder,
    write_log,
)
from utils import count_params, str2bool

DATA_URL = "https://download.pytorch.org/tutorial/hymenoptera_data.zip"
DATA_SHA256 = "fbc41b31d544714d18dd1230b1e2b455e1557766e13e67f9f5a7a23af7c02209"
RUN_FILES = ("config.yml", "log.csv", "curves.png", "model.pth", "last.pth")
COLUMNS = ("epoch", "lr", "loss", "acc", "val_loss", "val_acc", "seconds")  # of log.csv
ABOUT_THE_COMMAND = ("resume", "overwrite", "predict", "demo", "download", "raw")  # config.yml does not keep these
FREE_ON_RESUME = {"name", "device", "num_workers", *ABOUT_THE_COMMAND}  # the result does not depend on them

# What an option that nobody gave becomes, by the kind of training (kind_of_training).
RECIPES = {
    # Features and batch-norm statistics fixed. In training mode batch norm would see statistics of tiny batches.
    "frozen": {"epochs": 25, "lr": 3e-3, "body_lr": 0.0, "layer_decay": 0.0, "freeze_bn": True},
    # The known recipe moves everything by 1e-3 and breaks the features before the head knows what it wants. Here the
    # head learns fast, layer4 slowly, each stage below it at layer_decay of the rate of the stage above.
    "thawed": {"epochs": 25, "lr": 3e-3, "body_lr": 5e-4, "layer_decay": 0.0, "freeze_bn": True},
    # Nothing to protect: one rate for all, and statistics that have to be learned.
    "scratch": {"epochs": 60, "lr": 0.02, "body_lr": 0.02, "layer_decay": 1.0, "freeze_bn": False},
}
DEMO = {"data_dir": "inputs/two_classes", "weights": "none", "img_size": 64, "epochs": 12}


def build_parser():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    natural, fraction, positive = number(int, 1), number(float, 0, 1), number(float, 0)
    a = parser.add_argument_group("run").add_argument
    a("--name", help="models/<name>; default <folder of the data>_resnet18, with --predict the newest run")
    a("--predict", nargs="+", type=Path, metavar="PATH", help="classify files and folders with a trained run")
    a("--demo", action="store_true", help="train on generated pictures of two classes, offline")
    a("--resume", action="store_true", help="continue models/<name> after its last whole epoch")
    a("--overwrite", action="store_true", help="replace an existing models/<name>")
    a("--seed", type=number(int, 0, 2**32 - 1), default=0, help="order, augmentation, initial weights (default 0)")
    a("--epochs", type=number(int, 1, 100_000), help=f"default {_by_recipe('epochs')}")
    a("-b", "--batch_size", type=natural, default=16, help="of all processes together; default 16")

    a = parser.add_argument_group("data").add_argument
    a("--data_dir", default="inputs/hymenoptera_data", help="{train,val}/<class>/; default inputs/hymenoptera_data")
    a("--download", action="store_true", help="fetch the ants and bees into inputs/ (47 MB)")
    a("--raw", type=Path, metavar="ZIP", help="unpack this zip to data_dir first")
    a("--val_fraction", type=number(float, 0.01, 0.9), default=0.2, help="without a val folder; default 0.2")
    a("--img_size", type=number(int, 32, 1024), default=224, help="side of the square the network sees; default 224")
    a("--augment", type=str2bool, default=True, help="random crop, mirror and colour in training; default True")
    a("--min_scale", type=number(float, 0.01, 1), default=0.5, help="smallest crop, part of the area; default 0.5")
    a("--jitter", type=fraction, default=0.2, help="brightness, contrast and saturation; default 0.2")
    a("--mirror", type=str2bool, default=True, help="validate and predict on picture and mirror image; default True")

    a = parser.add_argument_group("model").add_argument
    a("--weights", default="imagenet", help="imagenet (torchvision's, fetched once), none, or a ResNet-18 state_dict")
    a("--freeze", action="store_true", help="train the head only, on fixed features")
    a("--freeze_bn", type=str2bool, help="fixed batch-norm statistics; default True with weights")
    a("--thaw", type=number(int, 0), default=0, help="epochs in which only the head learns; default 0")

    a = parser.add_argument_group("optimisation").add_argument
    a("--optimizer", choices=sorted(OPTIMIZERS), default="SGD", help="default SGD")
    a("--lr", type=positive, help=f"of the head; default {_by_recipe('lr')}")
    a("--body_lr", type=positive, help=f"of layer4; default {_by_recipe('body_lr')}")
    a("--layer_decay", type=fraction, help=f"rate of a stage / of the one above; default {_by_recipe('layer_decay')}")
    a("--momentum", type=fraction, default=0.9, help="SGD; default 0.9")
    a("--weight_decay", type=positive, default=1e-4, help="default 1e-4")
    a("--scheduler", choices=sorted(SCHEDULERS), default="CosineAnnealingLR", help="default CosineAnnealingLR")
    a("--step_size", type=natural, default=7, help="StepLR: epochs between steps; default 7")
    a("--gamma", type=positive, default=0.1, help="StepLR: factor of a step; default 0.1")
    a("--label_smoothing", type=fraction, default=0.0, help="default 0")

    a = parser.add_argument_group("machine").add_argument
    a("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps; default auto")
    a("--amp", choices=("auto", "off", "bf16", "fp16"), default="auto", help="mixed precision; default auto")
    a("--num_workers", type=number(int, -1, 1024), default=-1, help="loader processes; -1: 0 on a CPU, else up to 8")
    a("--sync_bn", type=str2bool, default=False, help="torchrun: batch norm over the GPUs' batches; default False")
    return parser


def _by_recipe(key):
    return ", ".join(f"{recipe[key]:g} {kind}" for kind, recipe in RECIPES.items())


OPTIMIZERS = {
    "SGD": lambda groups, c: torch.optim.SGD(groups, momentum=c["momentum"], weight_decay=c["weight_decay"]),
    "AdamW": lambda groups, c: torch.optim.AdamW(groups, weight_decay=c["weight_decay"]),
}
SCHEDULERS = {  # the factor of the learning rate in epoch 0, 1, 2 ...
    "CosineAnnealingLR": lambda epoch, c: (1 + math.cos(math.pi * epoch / c["epochs"])) / 2,
    "StepLR": lambda epoch, c: c["gamma"] ** (epoch // c["step_size"]),
    "ConstantLR": lambda epoch, c: 1.0,
}


# ---------------------------------------------------------------- options to a run's config


def kind_of_training(options):
    return "frozen" if options.freeze else "scratch" if options.weights == "none" else "thawed"


def new_config(options, given):
    """The resolved options of a new run, flat, as config.yml keeps them."""
    config = {key: value for key, value in vars(options).items() if key not in ABOUT_THE_COMMAND}
    if options.demo:
        config.update({key: value for key, value in DEMO.items() if key not in given})
    recipe = RECIPES[kind_of_training(argparse.Namespace(**config))]
    config.update({key: value for key, value in recipe.items() if config[key] is None})
    config["name"] = config["name"] or default_name(config["data_dir"])
    if config["sync_bn"] and (config["freeze"] or config["freeze_bn"]):
        raise ValueError("--sync_bn True needs batch norm that learns: leave out --freeze, give --freeze_bn False")
    return resolve_machine(config)


def default_name(data_dir):
    return f"{Path(data_dir).resolve().name}_resnet18"


def resumed_config(options, given):
    """The config of the run to resume; ValueError where other options were given than it began with."""
    name = options.name or default_name(DEMO["data_dir"] if options.demo else options.data_dir)
    folder = run_folder(name)
    config = check_config(build_parser, read_run(folder), folder / "config.yml")
    return resumed(config, folder, options, given, FREE_ON_RESUME, ABOUT_THE_COMMAND)


def read_run(folder):
    """The config.yml of a run; ValueError when it describes no run of this script."""
    config = read_yaml(folder / "config.yml")
    if "classes" not in config:
        raise ValueError(f"{folder} is no run of this script (its config.yml has no `classes`); --name another one")
    classes, size, mirror = (config.get(key) for key in ("classes", "img_size", "mirror"))
    named = isinstance(classes, list) and 1 < len(classes) <= 100_000 and all(isinstance(name, str) for name in classes)
    if not named or type(size) is not int or not 32 <= size <= 1024 or not isinstance(mirror, bool):
        raise ValueError(
            f"{folder}/config.yml is damaged: expected a list of classes, img_size 32 to 1024, mirror true or false"
        )
    return config


# ---------------------------------------------------------------- data


def provide_data(options, data_dir):
    """Make data_dir exist where --download, --raw or --demo say how; FileNotFoundError that names them otherwise."""
    data_dir = Path(data_dir)
    if options.raw:
        download.safe_extract(options.raw, data_dir)
    elif options.download and not data_dir.exists():
        archive = Path("inputs") / Path(DATA_URL).name
        if not archive.is_file():
            download.fetch(DATA_URL, archive, sha256=DATA_SHA256)
        download.safe_extract(archive, data_dir)
    elif options.demo and not data_dir.exists():
        write_demo(data_dir)
    elif not data_dir.is_dir():
        raise FileNotFoundError(
            f"{data_dir}: no such folder; --download fetches the ants and bees, --raw ZIP unpacks a zip that is here "
            "already, --demo trains on generated pictures"
        )


def write_demo(folder, counts=(("train", 60), ("val", 20)), size=96):
    """Generated ants and bees as <folder>/{train,val}/{ants,bees}/*.png, in place only when all are written."""
    from common.synthetic import two_classes

    seed = 0
    with new_folder(folder) as scratch:
        for part, count in counts:
            for label in ("ants", "bees"):
                target = scratch / part / label
                target.mkdir(parents=True)
                for index in range(count):
                    write_png(target / f"{index:03d}.png", two_classes(seed, label, size))
                    seed += 1


def build_data(config):
    """-> {"train": Pictures, "val": Pictures}, classes and a fingerprint of the lists."""
    classes, samples, notes = folders.list_pictures(config["data_dir"], config["val_fraction"], config["seed"])
    for note in notes:
        print(f"note: {note}")
    augmentation = folders.augmentation(config["img_size"], config["min_scale"], config["jitter"])
    datasets = {
        "train": folders.Pictures(
            samples["train"], config["img_size"], augmentation if config["augment"] else None, config["seed"]
        ),
        "val": folders.Pictures(samples["val"], config["img_size"]),
    }
    for part, dataset in datasets.items():
        counts = np.bincount([label for _, label in dataset.samples], minlength=len(classes))
        print(f"{part}: {len(dataset)} pictures, {', '.join(f'{n} {c}' for n, c in zip(counts, classes, strict=True))}")
    names = "\n".join(f"{part} {label} {path.name}" for part in samples for path, label in samples[part])
    sizes = " + ".join(f"{len(dataset)} {part}" for part, dataset in datasets.items())
    return datasets, classes, f"{sizes}, crc {zlib.crc32(names.encode()):08x}"


def build_loaders(config, datasets, model, device, amp, check_stop=lambda: None):
    """-> {"train": loader, "val": loader}: of pictures, or of frozen features, which train the head alone."""
    quieten_loaders()
    workers = {"num_workers": config["num_workers"], "persistent_workers": config["num_workers"] > 0}
    workers["worker_init_fn"] = leave_signals_to_main
    workers["pin_memory"] = device.type == "cuda"
    count, in_order = len(datasets["train"]), WholeBatches(range(len(datasets["val"])), 64)
    # batch norm that learns its statistics cannot do so from one small picture at the end
    drop_last = count % config["batch_size"] == 1 and count > 1 and not config["freeze_bn"] and not config["freeze"]
    shuffled = SharedBatches(folders.EpochSampler(count, config["seed"]), config["batch_size"], drop_last)
    val = DataLoader(datasets["val"], batch_sampler=in_order, **workers)
    if not config["freeze"]:
        if min(count, config["batch_size"]) == 1 and config["img_size"] <= 32 and not config["freeze_bn"]:
            raise ValueError(
                "batch norm learns nothing from one picture of 32 pixels at a time; give --batch_size 2 or more, "
                "a larger --img_size, or --freeze_bn True"
            )
        return {"train": DataLoader(datasets["train"], batch_sampler=shuffled, **workers), "val": val}
    model.eval()
    each_once = WholeBatches(folders.EpochSampler(count, shuffle=False), 64)
    train = DataLoader(datasets["train"], batch_sampler=each_once, **workers)

    def body(images):
        return model.pool(model.maps(images))

    how = {"device": device, "amp": amp, "after_step": check_stop}
    return {
        "train": folders.Features(body, train, shuffled, once=not config["augment"], **how),
        "val": folders.Features(model.features, val, in_order, once=True, **how),
    }


# ---------------------------------------------------------------- model and weights


def load_weights(model, weights):
    """Fill the body from "imagenet" or a file, and say from which; the head stays new."""
    path = imagenet_file() if weights == "imagenet" else Path(weights)
    fill_body(model, load_checkpoint(path), path)
    print(f"weights of {path}; the head is new")


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


def parameter_groups(model, config):
    """Learning rates: the head lr, layer4 body_lr, each stage below layer_decay times the one above.

    A stage whose rate is 0 needs no gradient and is left out.
    """
    groups = [{"params": list(model.fc.parameters()), "lr": config["lr"], "body": False}]
    stages = [model.layer4, model.layer3, model.layer2, model.layer1, nn.ModuleList([model.conv1, model.bn1])]
    for depth, stage in enumerate(stages):
        rate = 0.0 if config["freeze"] else config["body_lr"] * config["layer_decay"] ** depth
        stage.requires_grad_(rate > 0)
        if rate > 0:
            groups.append({"params": list(stage.parameters()), "lr": rate, "body": True})
    return groups


def build_optimizer(model, config):
    """-> optimizer, scheduler; the body's rates are 0 during the first `thaw` epochs."""
    groups = parameter_groups(model, config)
    optimizer = OPTIMIZERS[config["optimizer"]](groups, config)
    factor = SCHEDULERS[config["scheduler"]]

    def body_factor(epoch):
        return 0.0 if epoch < config["thaw"] else factor(epoch, config)

    factors = [body_factor if group["body"] else (lambda epoch: factor(epoch, config)) for group in groups]
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factors)


# ---------------------------------------------------------------- training


def run_epoch(
    model, loader, criterion, device, *, optimizer=None, scaler=None, amp=None, label="", after_step=lambda: None
):
    """One pass over (images, labels) batches, learning when there is an optimizer -> loss, accuracy, (N, C) logits.

    All three are those of all processes of torchrun; in a validation the logits stand in the loader's order.
    after_step(): called after each batch; what it raises ends the training.
    """
    training = optimizer is not None
    model.train(training)
    losses, correct, logits_of_all = [], [], []
    batches = with_shares(loader) if training else ((batch, len(batch[1]), len(batch[1])) for batch in loader)
    bar = {"total": len(loader), "leave": False, "disable": not is_main() or None}
    for (images, labels), own, total in tqdm(batches, label, **bar):
        images, labels = to_device(images, device, amp), labels.to(device, non_blocking=True)
        with torch.set_grad_enabled(training):
            with torch.autocast(device.type, amp, enabled=amp is not None):
                logits = model(images)
            loss = criterion(logits.float(), labels)
        if training:
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss * (own * world_size() / total)).backward()
            scaler.step(optimizer)
            scaler.update()
        losses.append(loss.detach() * own)
        correct.append((logits.detach()[:own].argmax(1) == labels[:own]).sum())
        logits_of_all.append(logits.detach()[:own].float())
        after_step()
    mine = (torch.stack(losses).cpu(), torch.stack(correct).cpu(), torch.cat(logits_of_all).cpu()) if losses else None
    losses, correct, logits = map(torch.cat, zip(*filter(None, gather(mine)), strict=True))
    return losses.sum().item() / len(logits), correct.sum().item() / len(logits), logits


def train_model(
    model,
    dataloaders,
    criterion,
    optimizer,
    scheduler,
    num_epochs,
    *,
    device=None,
    amp=None,
    after_epoch=None,
    resume=None,
    check_stop=lambda: None,
):
    """Train, validate after every epoch, and return (model with its best epoch's weights, rows of the log).

    dataloaders: {"train": ..., "val": ...} of (images, labels) batches; one with set_epoch, or whose sampler has it,
    is told the epoch, 1, 2 ...  after_epoch(progress, better): called with everything that resuming needs, a dict that
    can be given back as `resume`, together with the best weights so far as resume["best"].
    check_stop(): called after each step and epoch, never during after_epoch; what it raises ends the training.
    A loss that is not finite raises ValueError, before anything of that epoch is kept. Best: the highest validation
    accuracy, the first of equals. In a block of distributed.processes every process calls it: the loader to train on
    needs a distributed.SharedBatches as its batch_sampler then, that to validate on a WholeBatches.
    """
    device = device or next(model.parameters()).device
    together = parallel(model, device)
    scaler = torch.amp.GradScaler(device.type, enabled=amp is torch.float16)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    progress, best = {"epoch": 0, "best_acc": -1.0, "best_epoch": 0}, None
    if resume:
        rows, progress = restore(parts, progress, resume, COLUMNS, "last.pth")
        progress, best = {**progress, "rows": rows, "epoch": len(rows)}, resume["best"]
    else:
        progress["rows"] = []
    for epoch in range(progress["epoch"] + 1, num_epochs + 1):
        start, lr, label = time.perf_counter(), optimizer.param_groups[0]["lr"], f"epoch {epoch}/{num_epochs}"
        for loader in dataloaders.values():
            set_epoch(loader, epoch)
        both, learn = {"amp": amp, "after_step": check_stop}, {"optimizer": optimizer, "scaler": scaler}
        loss, acc, _ = run_epoch(together, dataloaders["train"], criterion, device, label=label, **learn, **both)
        copy_main(model)
        val_loss, val_acc, _ = run_epoch(model, dataloaders["val"], criterion, device, label=f"{label} val", **both)
        if not (math.isfinite(loss) and math.isfinite(val_loss)):
            raise ValueError(
                f"{label}: the loss is {loss}, in validation {val_loss}; stopped, the best weights so far are kept. "
                "A lower --lr, --body_lr or --amp off may help"
            )
        scheduler.step()
        better = val_acc > progress["best_acc"]
        if better:
            best = copy.deepcopy(model.state_dict())
            progress.update(best_acc=val_acc, best_epoch=epoch)
        row = {"epoch": epoch, "lr": lr, "loss": loss, "acc": acc, "val_loss": val_loss, "val_acc": val_acc}
        row["seconds"] = round(time.perf_counter() - start, 2)
        progress.update(epoch=epoch, rows=[*progress["rows"], row])
        if after_epoch:
            after_epoch({**progress, **{name: part.state_dict() for name, part in parts.items()}}, better)
        print(
            f"{label}  lr {lr:.1e}  loss {loss:.4f}  acc {acc:.4f}  val_loss {val_loss:.4f}  val_acc {val_acc:.4f}"
            f"{'*' if better else ' '}  {row['seconds']:.1f} s",
            flush=True,
        )
        check_stop()
    model.load_state_dict(best)
    return model, progress["rows"]


def fit(config, model, datasets, folder, resume, device):
    """Train the model as the config says, keeping the run's files -> rows; the model ends with its best weights."""
    amp = pick_amp(config["amp"], device)
    model.to(device)
    if config["amp"] != "off":
        model.to(memory_format=torch.channels_last)
    copy_main(model)
    stops, rows = Stops(), []
    loaders = build_loaders(config, datasets, model, device, amp, stops.check)
    criterion = nn.CrossEntropyLoss(label_smoothing=config["label_smoothing"])
    optimizer, scheduler = build_optimizer(model, config)
    trained = model.fc if config["freeze"] else model  # a frozen body is a fixed function: its features are the data
    print(
        f"ResNet-18, {count_params(model):,} of {sum(p.numel() for p in model.parameters()):,} parameters learn, on "
        f"{machine_name(device)}: {'float32' if amp is None else config['amp'] + ' autocast, channels last'}"
    )
    if resume:
        best = load_checkpoint(folder / "model.pth")
        if config["freeze"]:
            best = {key.removeprefix("fc."): value for key, value in best.items() if key.startswith("fc.")}
        resume, rows = {**resume, "best": best}, log_of(resume, COLUMNS, folder / "last.pth")
        if is_main():
            write_log(rows, folder / "log.csv")  # a kill may have come between the two files

    def keep(progress, better):
        nonlocal rows
        rows = progress["rows"]
        if not is_main():
            return
        if better:
            save_checkpoint(folder / "model.pth", model.state_dict())
        save_checkpoint(folder / "last.pth", progress)
        write_log(rows, folder / "log.csv")

    def draw_curves():
        if rows and is_main():
            report.plot_curves(rows, folder / "curves.png", title=config["name"])

    keywords = {"device": device, "amp": amp, "after_epoch": keep, "resume": resume, "check_stop": stops.check}
    with keeping(folder, "transfer_resnet18.py", draw_curves), stops:
        train_model(trained, loaders, criterion, optimizer, scheduler, config["epochs"], **keywords)
    return rows


# ---------------------------------------------------------------- what came out


def conclude(config, model, datasets, rows, folder, device):
    """Print accuracy and confusion of the finished run and write outputs/<name>/report.html."""
    classes, dataset = config["classes"], datasets["val"]
    amp = pick_amp(config["amp"], device)
    loader = DataLoader(dataset, 64)
    _, _, logits = run_epoch(model, loader, nn.CrossEntropyLoss(), device, amp=amp, label="best weights")
    probabilities = logits.softmax(1).cpu().numpy()
    labels = np.array([label for _, label in dataset.samples])
    best = max(rows, key=lambda row: row["val_acc"])
    headline = []
    for which, row in (("best", best), ("last", rows[-1])):
        low, high = wilson(round(row["val_acc"] * len(labels)), len(labels))
        interval = f"95 % interval {100 * low:.1f} to {100 * high:.1f} %"
        headline.append((f"{which} epoch", f"{100 * row['val_acc']:.1f} %", f"epoch {row['epoch']}; {interval}"))
        print(f"{which} accuracy {100 * row['val_acc']:.2f} % ({interval}) at epoch {row['epoch']}")
    counts = confusion_matrix(labels, probabilities.argmax(1), len(classes))
    print(format_confusion(counts, classes))
    page = Path("outputs") / config["name"] / "report.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    counted = [
        {"": name, **dict(zip(classes, row, strict=True))} for name, row in zip(classes, counts.tolist(), strict=True)
    ]
    headings = {"": "label, predicted:", **{name: name for name in classes}}
    cards = gallery_items(model, dataset, probabilities, labels, classes, device)
    curves = report.picture(report.file_uri(folder / "curves.png"), "loss, accuracy and learning rate of each epoch")
    sections = [
        ("Accuracy", report.summary([*headline, ("pictures", len(labels), "in validation")])),
        ("Curves", curves),
        ("Confusion", report.table(counted, headings, "Counts, best epoch")),
        ("Pictures", report.gallery(cards, ["probability"], GALLERY_NOTE)),
    ]
    report.write_page(page, config["name"], sections, f"ResNet-18, weights {config['weights']}; {', '.join(classes)}")
    print(f"the run is in {folder}, the report in {page}")
    print(f"python transfer_resnet18.py --name {config['name']} --predict PATH")


GALLERY_NOTE = (
    "Best epoch. Each card: the part of the picture that the network sees, and in bright colours what spoke for its "
    "answer (Grad-CAM). Probability is that of the answer."
)


def gallery_items(model, dataset, probabilities, labels, classes, device):
    """Cards of the pictures that were wrong, and of the least and the most certain right ones."""
    items = []
    for group, indices in notable(probabilities, labels).items():
        for index in indices:
            answer, picture = int(probabilities[index].argmax()), dataset.seen(index)
            heat = grad_cam(model, dataset[index][0].to(device), answer)
            said = f"{classes[answer]}, is {classes[labels[index]]}" if group == "wrong" else classes[answer]
            items.append(
                {
                    "title": f"{dataset.samples[index][0].name}: {said}",
                    "panels": [("picture", picture), ("where it looked", heat_overlay(picture, heat))],
                    "values": {"probability": float(probabilities[index, answer])},
                    "group": group,
                }
            )
    return items


# ---------------------------------------------------------------- predict


def load_run(name, device):
    """-> model in eval mode with the best weights of models/<name>, its config."""
    folder = run_folder(name)
    config = read_run(folder)
    model = ResNet18(len(config["classes"]), mirror=config["mirror"])
    try:
        model.load_state_dict(load_checkpoint(folder / "model.pth"))
    except (RuntimeError, TypeError, AttributeError):
        raise ValueError(f"{folder}/model.pth does not fit {folder}/config.yml") from None
    if not all(torch.isfinite(value).all() for value in model.state_dict().values()):
        raise ValueError(f"{folder}/model.pth holds weights that are not finite")
    return model.to(device).eval(), config


def list_files(paths):
    """Files as given, and every picture in folders, sorted, once each -> (files, [(path, what is wrong)])."""
    files, failed = [], []
    for path in paths:
        found = sorted(p for p in path.rglob("*") if p.is_file() and folders.is_picture(p)) if path.is_dir() else [path]
        if not found or not found[0].exists():
            failed.append((path, "holds no picture" if path.is_dir() else "no such file"))
        else:
            files += found
    return list(dict.fromkeys(files)), failed


def predict(options):
    """Classify files and folders -> outputs/<name>/predictions.csv; 1 when some could not be read, else 0."""
    device = pick_device(options.device)
    amp = pick_amp(options.amp, device)
    name = options.name or newest_run("classes")
    model, config = load_run(name, device)
    print(f"models/{name}: {', '.join(config['classes'])}")
    files, failed = list_files(options.predict)
    rows = []
    for start in tqdm(range(0, len(files), 32), "predict", unit="batch", leave=False, disable=None):
        images, read = [], []
        for path in files[start : start + 32]:
            try:
                picture = folders.read_picture(path, round(folders.KEEP * config["img_size"]))
            except ValueError as error:
                failed.append((path, str(error)))
                continue
            images.append(folders.standardise(folders.middle(picture, config["img_size"])))
            read.append(path)
        if images:
            with torch.inference_mode(), torch.autocast(device.type, amp, enabled=amp is not None):
                probabilities = model(to_device(torch.stack(images), device, amp)).softmax(1).cpu().tolist()
            rows += zip(read, probabilities, strict=True)
    if rows:
        write_predictions(rows, config["classes"], Path("outputs") / name / "predictions.csv")
    for path, reason in failed:
        print(f"skipped {reason if str(path) in reason else f'{path}: {reason}'}", file=sys.stderr)
    return 1 if failed else 0


def write_predictions(rows, classes, target, shown=40):
    """rows: (path, probabilities) -> a CSV file, and the first lines of it on the screen."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(target) as temporary, open(temporary, "w", newline="", encoding="utf-8", errors="replace") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "class", "probability", *classes])
        for path, values in rows:
            best = int(np.argmax(values))
            writer.writerow([path, classes[best], f"{values[best]:.6f}", *(f"{value:.6f}" for value in values)])
            if (shown := shown - 1) >= 0:
                print(f"{classes[best]:<{max(map(len, classes))}}  {values[best]:.4f}  {path}")
    more = f"; all {len(rows)} are" if shown < 0 else ""
    print(f"{len(rows)} pictures{more} in {target}")


# ---------------------------------------------------------------- main


def main():
    options, given = parse_options(build_parser)
    if options.predict:
        if launched() > 1:
            raise ValueError("--predict runs in one process; start it without torchrun")
        return predict(options)
    keep_memory()
    config = resumed_config(options, given) if options.resume else new_config(options, given)
    folder = run_folder(config["name"])
    with only_trainer(folder, RUN_FILES):
        train(config, options, folder)
    return 0


def train(config, options, folder):
    """The run in `folder` from its first or next epoch to its report."""
    earlier = earlier_files(folder, RUN_FILES, options)
    with processes(pick_device(config["device"])) as device:
        if is_main():
            provide_data(options, config["data_dir"])
        gather(None)  # the others wait for the data
        datasets, classes, fingerprint = build_data(config)
        model, resume = build_trained(config, classes, fingerprint, folder if options.resume else None)
        if config["sync_bn"]:
            model = sync_batch_norm(model, device)
        config.update(classes=classes, mean=list(folders.MEAN), std=list(folders.STD), data=fingerprint)
        check_start(config, FREE_ON_RESUME, epoch=resume and len(resume["rows"]))
        if not options.resume and is_main():
            folder.mkdir(parents=True, exist_ok=True)
            for path in earlier:
                path.unlink()
            write_yaml(folder / "config.yml", {**config, "environment": machine(device)})
        rows = fit(config, model, datasets, folder, resume, device)
    if is_main():
        conclude(config, model, datasets, rows, folder, device)
    return 0


def build_trained(config, classes, fingerprint, folder):
    """-> the model with the weights to start from, and the checkpoint of the run in `folder` to go on with, or None."""
    seed_everything(config["seed"])
    model = ResNet18(len(classes), config["freeze_bn"] or config["freeze"], config["mirror"])
    if folder and (fingerprint != config.get("data") or classes != config["classes"]):
        now = f"{config.get('data')}, now {fingerprint}"
        raise ValueError(f"{config['data_dir']} has changed since {folder} was trained ({now})")
    if not (folder and (folder / "last.pth").is_file()):
        if config["weights"] != "none" and is_main():  # the others get them from this process, as the training starts
            load_weights(model, config["weights"])
        if folder:
            print(f"{folder} has no whole epoch yet: starting with the first")
        return model, None
    resume = load_checkpoint(folder / "last.pth")
    if not isinstance(resume, dict) or not isinstance(resume.get("rows"), list):
        raise ValueError(f"{folder}/last.pth is no checkpoint of this script; start the run again with --overwrite")
    fill_body(model, load_checkpoint(folder / "model.pth"), folder / "model.pth")
    print(f"resuming {folder} after epoch {len(resume['rows'])}")
    return model, resume


if __name__ == "__main__":
    run_script(main)
