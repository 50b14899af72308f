"""Fine-tune torchvision's ResNet-18 on ants and bees, or on any folder with one sub-folder of pictures per class.

python transfer_resnet18.py --download                             # the data once, then ImageNet weights, then training
python transfer_resnet18.py --freeze --name ants_bees_frozen       # features fixed, only the head is trained
python transfer_resnet18.py --data_dir my_pictures --name mine     # my_pictures/{train,val}/<class>/*.jpg
python transfer_resnet18.py --name mine --predict a.jpg holiday/   # class and probability of new pictures
python transfer_resnet18.py --demo                                 # generated pictures, offline, a minute
torchrun --nproc_per_node=2 transfer_resnet18.py --name mine       # on two GPUs, or in two processes

A ResNet-18 consists of a stem, four stages (layer1 to layer4) and a head; the head is new and predicts your classes.
There are three kinds of training, and some defaults depend on the kind. "frozen" (--freeze): the features stay those of
--weights and only the head learns; fast, and good for few pictures. "thawed" (the default): layer4 learns as well,
slowly. "scratch" (--weights none): everything starts from random weights and learns at one rate; needs many pictures.
"""

import math
import shlex
import zlib
from pathlib import Path

from common.cli import (
    Parser,
    Stops,
    add_machine_options,
    answer_early,
    check_config,
    number,
    parse_options,
    run_script,
)

RUN_FILES = ("config.yml", "log.csv", "curves.png", "model.pth", "last.pth", "tensorboard")
ABOUT_THE_COMMAND = (
    "open",
    "resume",
    "overwrite",
    "predict",
    "reject",
    "demo",
    "download",
    "raw",
)  # config.yml does not keep these
FREE_ON_RESUME = {"name", "device", "num_workers", "tensorboard", *ABOUT_THE_COMMAND}  # no effect on results
ENDLESS = ("ConstantLR", "StepLR")  # schedulers without a planned end: --resume may move it

RECIPES = {  # the value of an option that nobody gave, by the kind of training
    # --freeze. Features and batch-norm statistics are fixed: in training mode batch norm would see tiny batches.
    "frozen": {"epochs": 25, "lr": 3e-3, "body_lr": 0.0, "layer_decay": 0.0, "freeze_bn": True},
    # The usual recipe trains everything at 1e-3 and ruins the features before the head has learned anything. Here the
    # head learns fast, layer4 slowly, and each stage below it at layer_decay times the rate of the stage above.
    "thawed": {"epochs": 25, "lr": 3e-3, "body_lr": 5e-4, "layer_decay": 0.0, "freeze_bn": True},
    # --weights none. Nothing to protect: one rate for all, and batch-norm statistics that have to be learned.
    "scratch": {"epochs": 60, "lr": 0.02, "body_lr": 0.02, "layer_decay": 1.0, "freeze_bn": False},
}
DEMO = {"data_dir": "inputs/two_classes", "weights": "none", "img_size": 64, "epochs": 12}


def build_parser():
    parser = Parser(description=__doc__)
    natural, fraction, positive = number(int, 1), number(float, 0, 1), number(float, 0)
    a = parser.add_argument_group("run").add_argument
    a("--name", help="models/<name>; default: <folder of the data>_resnet18, with --predict the newest run")
    a("--predict", nargs="+", type=Path, metavar="PATH", help="classify files and folders with a trained run")
    reject = "with --predict: answer `unknown` when no class reaches this probability; default: always name a class"
    a("--reject", type=number(float, 0, 1), metavar="P", help=reject)
    a("--open", action="store_true", help="open the report in the browser after the training")
    a("--resume", action="store_true", help="continue models/<name> after its last finished epoch")
    a("--overwrite", action="store_true", help="replace an existing models/<name>")
    a("--seed", type=number(int, 0, 2**32 - 1), default=0, help="random seed of order, augmentation, weights")
    a("--epochs", type=number(int, 1, 100_000), help=f"passes over the pictures; default: {_by_recipe('epochs')}")
    a("-b", "--batch_size", type=natural, default=16, help="global batch size, shared by torchrun's processes")

    group = parser.add_argument_group("data")
    source, a = group.add_mutually_exclusive_group().add_argument, group.add_argument
    a("--data_dir", default="inputs/hymenoptera_data", help="folder with {train,val}/<class>/")
    source("--download", action="store_true", help="fetch the ants and bees into inputs/ (47 MB)")
    source("--raw", type=Path, metavar="ZIP", help="unpack this zip to data_dir first")
    source("--demo", action="store_true", help="train on generated pictures of two classes, offline")
    val_fraction = "fraction of the pictures to draw for validation when there is no val folder"
    a("--val_fraction", type=number(float, 0.01, 0.9), default=0.2, help=val_fraction)
    a("--img_size", type=number(int, 32, 1024), default=224, help="side of the square that the network sees")
    a("--augment", action="store_true", default=True, help="random crop, mirror and colour in training")
    a("--min_scale", type=number(float, 0.01, 1), default=0.5, help="smallest crop, as a fraction of the area")
    a("--jitter", type=fraction, default=0.2, help="change of brightness, contrast and saturation")
    a("--mirror", action="store_true", default=True, help="validate and predict on picture and mirror image together")

    a = parser.add_argument_group("model").add_argument
    weights = "imagenet (torchvision's, fetched once), none, or a ResNet-18 state_dict"
    a("--weights", default="imagenet", help=weights)
    a("--freeze", action="store_true", help="frozen: train the head only, on the features of --weights as they are")
    a("--freeze_bn", action="store_true", default=None, help="fixed batch-norm statistics; default: True with weights")

    a = parser.add_argument_group("optimisation").add_argument
    a("--optimizer", choices=("AdamW", "SGD"), default="SGD", help="optimizer")
    a("--lr", type=positive, help=f"learning rate of the head; default: {_by_recipe('lr')}")
    a("--body_lr", type=positive, help=f"learning rate of layer4; default: {_by_recipe('body_lr')}")
    layer_decay = (
        "layer3 learns at this fraction of layer4's rate, layer2 at this fraction of layer3's, and so on; 0: they stay "
        f"as they are, 1: all learn alike; default: {_by_recipe('layer_decay')}"
    )
    a("--layer_decay", type=fraction, help=layer_decay)
    a("--momentum", type=fraction, default=0.9, help="momentum of SGD")
    a("--weight_decay", type=positive, default=1e-4, help="weight decay of the optimizer")
    schedulers = ("ConstantLR", "CosineAnnealingLR", "StepLR")
    a("--scheduler", choices=schedulers, default="CosineAnnealingLR", help="how the learning rates change")
    a("--step_size", type=natural, default=7, help="StepLR: epochs between steps")
    a("--gamma", type=positive, default=0.1, help="StepLR: factor of a step")
    a("--label_smoothing", type=fraction, default=0.0, help="label smoothing of the cross entropy")
    add_machine_options(parser, training=True)
    return parser


def _by_recipe(key):
    return ", ".join(f"{recipe[key]:g} {kind}" for kind, recipe in RECIPES.items())


answer_early(__name__, build_parser)  # the imports below take seconds

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from classification import folders
from classification.predict import classify, predict_files, read_run
from classification.resnet18 import ResNet18, fill_body, imagenet_file
from classification.scores import print_scores, write_report
from classification.sources import provide_data
from common.board import check_tensorboard, open_board
from common.devices import keep_memory, pick_amp, pick_device, precision_name
from common.distributed import copy_main, gather, is_main, launched, processes, sync_batch_norm, world_size
from common.files import load_weights
from common.loaders import EpochSampler, SharedBatches, WholeBatches, build_loader
from common.report import open_page
from common.runs import (
    OUTPUTS,
    earlier_files,
    machine_name,
    only_trainer,
    resolve_machine,
    resumed,
    run_folder,
)
from engine import OPTIMIZERS, Run, begin, fit, fit_and_keep, no_check, seed_everything
from tasks import Classification
from utils import count_params

RATE_FACTORS = {  # of --scheduler: the factor of the learning rate in epoch 0, 1, 2 ...
    "ConstantLR": lambda epoch, c: 1.0,
    "CosineAnnealingLR": lambda epoch, c: (1 + math.cos(math.pi * epoch / c["epochs"])) / 2,
    "StepLR": lambda epoch, c: c["gamma"] ** (epoch // c["step_size"]),
}


# ---------------------------------------------------------------- options to a run's config


def new_config(options, given):
    """The resolved options of a new run, flat, as config.yml keeps them."""
    config = {key: value for key, value in vars(options).items() if key not in ABOUT_THE_COMMAND}
    if options.demo:
        config.update({key: value for key, value in DEMO.items() if key not in given})
    recipe = RECIPES[kind_of_training(config)]
    config.update({key: value for key, value in recipe.items() if config[key] is None})
    config["name"] = config["name"] or default_name(config["data_dir"])
    if config["sync_bn"] and (config["freeze"] or config["freeze_bn"]):
        raise ValueError("--sync_bn True needs batch norm that learns: leave out --freeze, give --freeze_bn False")
    return resolve_machine(config)


def kind_of_training(config):
    if config["freeze"]:
        return "frozen"
    return "scratch" if config["weights"] == "none" else "thawed"


def default_name(data_dir):
    return f"{Path(data_dir).resolve().name}_resnet18"


def resumed_config(options, given):
    """The config of the run to resume; ValueError when an option was given that differs from the run's."""
    demo = options.demo and "data_dir" not in given
    name = options.name or default_name(DEMO["data_dir"] if demo else options.data_dir)
    folder = run_folder(name)
    config = check_config(build_parser, read_run(folder), folder / "config.yml")
    return resumed(config, folder, options, given, FREE_ON_RESUME, ABOUT_THE_COMMAND, ENDLESS)


# ---------------------------------------------------------------- data


def build_data(config):
    """-> {"train": Pictures, "val": Pictures}, classes and a fingerprint of the lists."""
    classes, samples, notes = folders.list_pictures(config["data_dir"], config["val_fraction"], config["seed"])
    for note in notes:
        print(f"note: {note}")
    augmentation = None
    if config["augment"]:
        augmentation = folders.augmentation(config["img_size"], config["min_scale"], config["jitter"])
    datasets = {
        "train": folders.Pictures(samples["train"], config["img_size"], augmentation, config["seed"]),
        "val": folders.Pictures(samples["val"], config["img_size"]),
    }
    for part, dataset in datasets.items():
        counts = np.bincount([label for _, label in dataset.samples], minlength=len(classes))
        print(f"{part}: {len(dataset)} pictures, {', '.join(f'{n} {c}' for n, c in zip(counts, classes, strict=True))}")
    files = [(part, label, path) for part in samples for path, label in samples[part]]
    names = "\n".join(f"{part} {label} {path.name} {path.stat().st_size}" for part, label, path in files)
    sizes = " + ".join(f"{len(dataset)} {part}" for part, dataset in datasets.items())
    return datasets, classes, f"{sizes}, crc {zlib.crc32(names.encode()):08x}"


def build_loaders(config, datasets, model, device, amp, check_stop=no_check):
    """-> {"train": loader, "val": loader}: of pictures, or of frozen features, which train the head alone."""
    options = {"num_workers": config["num_workers"], "pin_memory": device.type == "cuda"}
    count, frozen = len(datasets["train"]), config["freeze"]
    learns_statistics = not (frozen or config["freeze_bn"])
    # batch norm cannot learn its statistics from one small picture at the end
    drop_last = learns_statistics and count > 1 and count % config["batch_size"] == 1
    shuffled = SharedBatches(EpochSampler(count, config["seed"]), config["batch_size"], drop_last)
    smallest = min(total for _, total in shuffled.sizes())
    if learns_statistics and smallest < 2 * world_size() and config["img_size"] <= 32:
        raise ValueError(
            f"batch norm learns nothing from one picture of 32 pixels at a time, and a batch has only {smallest} for "
            f"{world_size()} processes: give another --batch_size, a larger --img_size, or --freeze_bn True"
        )
    in_order = WholeBatches(range(len(datasets["val"])), 64)
    val = build_loader(datasets["val"], in_order, **options)
    if not frozen:
        return {"train": build_loader(datasets["train"], shuffled, **options), "val": val}

    def body(images):
        return model.pool(model.maps(images))

    model.eval()
    each_once = build_loader(datasets["train"], WholeBatches(EpochSampler(count, shuffle=False), 64), **options)
    how = {"device": device, "amp": amp, "after_step": check_stop}
    return {
        "train": folders.Features(body, each_once, shuffled, once=not config["augment"], **how),
        "val": folders.Features(model.features, val, in_order, once=True, **how),
    }


# ---------------------------------------------------------------- training


def parameter_groups(model, config):
    """Learning rates: the head lr, layer4 body_lr, each stage below layer_decay times the rate of the one above.

    A stage whose rate is 0 needs no gradient and is left out.
    """
    groups = [{"params": list(model.fc.parameters()), "lr": config["lr"]}]
    stages = [model.layer4, model.layer3, model.layer2, model.layer1, nn.ModuleList([model.conv1, model.bn1])]
    for depth, stage in enumerate(stages):
        rate = 0.0 if config["freeze"] else config["body_lr"] * config["layer_decay"] ** depth
        stage.requires_grad_(rate > 0)
        if rate > 0:
            groups.append({"params": list(stage.parameters()), "lr": rate})
    return groups


def build_optimizer(model, config):
    """-> optimizer, and its scheduler, which steps once per epoch."""
    optimizer = OPTIMIZERS[config["optimizer"]](parameter_groups(model, config), config)
    factor = RATE_FACTORS[config["scheduler"]]
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: factor(epoch, config))


def train_model(model, dataloaders, criterion, optimizer, scheduler, num_epochs, *, device=None, amp=None):
    """Train, validate after every epoch, return (model with the weights of its best epoch, rows of the log).

    For notebooks: the script itself trains a Run that is kept on disk. dataloaders: {"train": ..., "val": ...} of
    (images, labels) batches; one with set_epoch, or whose sampler has it, is told the epoch, 1, 2 ... The best epoch
    has the highest validation accuracy, on a tie the last. A loss that is not finite raises ValueError.
    """
    device = device or next(model.parameters()).device
    run = Run(model, Classification(criterion), optimizer, scheduler, device, epochs=num_epochs, amp=amp)
    fit(run, dataloaders["train"], dataloaders["val"])
    run.load_best()
    return model, run.rows


def build_model(config, classes, folder):
    """The network with the weights to start from; `folder` is that of the run to resume, or None."""
    seed_everything(config["seed"])
    model = ResNet18(len(classes), config["freeze_bn"] or config["freeze"], config["mirror"])
    if folder and (folder / "last.pth").is_file():
        path = folder / "model.pth"  # a frozen body is in no last.pth
        fill_body(model, load_weights(path), path)
    elif config["weights"] != "none" and is_main():  # the other processes get them from this one
        path = imagenet_file() if config["weights"] == "imagenet" else Path(config["weights"])
        fill_body(model, load_weights(path), path)
        print(f"weights of {path}; the head is new")
    return model


def prepare(config, options, folder, earlier, device, stops):
    """-> the Run, its loaders and data sets; afterwards a new run's folder holds its config."""
    if is_main():
        provide_data(config["data_dir"], options.download, options.raw, options.demo)
    gather(None)  # the others wait for the data
    datasets, classes, fingerprint = build_data(config)
    if options.resume and (fingerprint != config.get("data") or classes != config["classes"]):
        changed = f"{config.get('data')}, now {fingerprint}"
        raise ValueError(f"{config['data_dir']} has changed since {folder} was trained ({changed})")
    model = build_model(config, classes, folder if options.resume else None)
    if config["sync_bn"]:
        model = sync_batch_norm(model, device)
    config.update(classes=classes, mean=list(folders.MEAN), std=list(folders.STD), data=fingerprint)

    amp = pick_amp(config["amp"], device)
    model.to(device)
    if amp is not None:
        model.to(memory_format=torch.channels_last)
    copy_main(model)
    loaders = build_loaders(config, datasets, model, device, amp, stops.check)
    optimizer, scheduler = build_optimizer(model, config)
    task = Classification(nn.CrossEntropyLoss(label_smoothing=config["label_smoothing"]), classes)
    trained = model.fc if config["freeze"] else model  # a frozen body is a fixed function: its features are the data
    run = Run(trained, task, optimizer, scheduler, device, epochs=config["epochs"], amp=amp, folder=folder, whole=model)
    begin(run, config, earlier, options.resume, FREE_ON_RESUME, fingerprint)
    learning = f"{count_params(model):,} of {sum(p.numel() for p in model.parameters()):,} parameters learn"
    print(f"ResNet-18, {learning}, {machine_name(device)}, {precision_name(amp)}")
    return run, loaders, datasets


# ---------------------------------------------------------------- from the first epoch to the report


def conclude(config, run, dataset, folder):
    """Print accuracy and confusion of the finished run and write outputs/<name>/report.html -> its path."""
    run.load_best()
    model = run.whole.eval()
    batches = tqdm(DataLoader(dataset, 64), "best weights", leave=False, disable=None)
    probabilities = np.concatenate([classify(model, images, run.device, run.amp) for images, _ in batches])
    labels = np.array([label for _, label in dataset.samples])
    headline, counts = print_scores(run.rows, probabilities, labels, config["classes"])
    page = OUTPUTS / config["name"] / "report.html"
    write_report(page, config, model, dataset, probabilities, headline, counts, folder / "curves.png")
    print(f"the run is in {folder}, the report in {page}")
    print(f"python transfer_resnet18.py --name {shlex.quote(config['name'])} --predict PATH")
    return page


def main():
    options, given = parse_options(build_parser)
    if options.predict and options.open:
        raise ValueError("--open shows the report of a training, and --predict writes none")
    if options.predict:
        if launched() > 1:
            raise ValueError("--predict runs in one process; start it without torchrun")
        return predict_files(options)
    if options.reject is not None:
        raise ValueError("--reject is for --predict; give both")
    keep_memory()
    config = resumed_config(options, given) if options.resume else new_config(options, given)
    check_tensorboard(config)
    folder, stops = run_folder(config["name"]), Stops()
    with only_trainer(folder, RUN_FILES):
        earlier = earlier_files(folder, RUN_FILES, options)
        with processes(pick_device(config["device"])) as device:
            run, loaders, datasets = prepare(config, options, folder, earlier, device, stops)
            titles = [f"{config['classes'][label]}/{path.name}" for path, label in datasets["val"].samples]
            board = open_board(config, run, datasets["val"], titles)
            fit_and_keep(run, loaders["train"], loaders["val"], "transfer_resnet18.py", stops, board=board)
        if is_main():
            page = conclude(config, run, datasets["val"], folder)
    if is_main() and options.open:
        open_page(page)
    return 0


if __name__ == "__main__":
    run_script(main)
