"""Train UNet or NestedUNet (U-Net++) on a prepared data set; the result is a folder models/<name>.

python train.py --arch NestedUNet --deep_supervision True --name run1
python train.py --name run1 --resume                 # continue a stopped run
torchrun --nproc_per_node=4 train.py --name run1     # on four GPUs, or in four processes
python train.py --dataset my_cells --num_classes 2   # inputs/my_cells/{images,masks/0,masks/1}
python train.py --config configs/nuclei.yml --name nuclei1   # nuclei one by one: inputs/dsb2018/{images,labels}
"""

import argparse
import shlex
from pathlib import Path

from augmentation import AUGMENTATIONS, OF_NUCLEI, WHOLE_IMAGES
from common.cli import (
    Parser,
    add_machine_options,
    answer_early,
    auto_or_bool,
    check_config,
    data_set,
    interval,
    loading,
    number,
    parse_options,
    run_script,
    weights,
)
from run_config import BOUNDS, INPUT_CHANNELS, stretch

RUN_FILES = ("config.yml", "split.yml", "log.csv", "curves.png", "model.pth", "last.pth", "tensorboard")
ABOUT_THE_COMMAND = ("config", "resume", "overwrite")  # options that config.yml does not keep
FREE_ON_RESUME = {"name", "device", "num_workers", "cache", "checkpointing", "tensorboard", *ABOUT_THE_COMMAND}
NO_OPTIONS = (
    "mean",
    "std",
    "scale",
    "environment",
    "level",
    "exported",
)  # what config.yml may keep besides the options
ENCODER_OPTIONS = ("stem", "encoder_weights", "encoder_lr", "encoder_freeze", "encoder_freeze_bn")
NUCLEI_OPTIONS = ("diameter", "scale_range", "stretch", "crops", "kind_balance", "rehearse", "map_weights")
AUGMENT = {"masks": "flips,mild,cutmix", "instances": "flips,copies,stain,light,noise,paste"}  # unless it is given
PRETRAINED_LR = 0.2  # the default of --encoder_lr, as a fraction of --lr
ENDLESS = ("ConstantLR", "MultiStepLR", "ReduceLROnPlateau")  # schedulers without a planned end: it may be moved


def build_parser():
    parser = Parser(description=__doc__)
    natural, positive, seed = number(int, 1), number(float, 0), number(int, *BOUNDS["seed"])
    a = parser.add_argument_group("run").add_argument
    a("--name", help="models/<name>; default: <dataset>_<arch>_wDS or _woDS")
    a("--config", help="YAML file of options; the command line takes precedence")
    a("--resume", action="store_true", help="continue models/<name> after its last finished epoch")
    a("--overwrite", action="store_true", help="replace an existing models/<name>")
    a("--weights", help="start from the weights of a run (its name) or a file")
    a("--seed", type=seed, default=0, help="random seed of initial weights, order and augmentation")
    epochs = f"passes over the training images; --resume can raise it with {', '.join(ENDLESS)}"
    a("--epochs", type=number(int, 1, 100_000), default=80, help=epochs)
    a("-b", "--batch_size", type=natural, default=16, help="global batch size, shared by torchrun's processes")
    a("--early_stopping", type=number(int), default=-1, help="stop after N epochs without a better score; -1: never")

    kept = "epoch whose weights model.pth holds: the one with the best validation score, or the last"
    a("--keep", choices=("best", "last"), default="best", help=kept)
    targets = "masks: a class per pixel; instances: nuclei one by one, from labels/ (configs/nuclei.yml)"
    a("--target", choices=("masks", "instances"), default="masks", help=targets)

    a = parser.add_argument_group("model").add_argument
    a("-a", "--arch", choices=("NestedUNet", "UNet"), default="NestedUNet", help="network; NestedUNet is U-Net++")
    heads = "NestedUNet: a loss on each of four heads, so that the network can be pruned"
    a("--deep_supervision", action="store_true", help=heads)
    backbone = "pretrained column X^{i,0}: none, efficientnet_lite0, resnet18, or another backbone of timm"
    a("--encoder", default="none", help=backbone)
    a("--stem", choices=("full", "half"), default="full", help="resolution of the top row, with --encoder")
    sources = "auto (ImageNet), none, a file, or models/<run> of transfer_resnet18.py"
    a("--encoder_weights", default="auto", help=sources)
    rate = "learning rate of the encoder; default: --lr, or a fifth of it for pretrained weights"
    a("--encoder_lr", type=positive, help=rate)
    a("--encoder_freeze", type=number(int, 0), default=0, help="initial epochs in which the encoder stays frozen")
    a("--encoder_freeze_bn", action="store_true", help="keep the encoder's batch-norm statistics")
    a("--input_channels", type=int, choices=INPUT_CHANNELS, default=3, help="grey, RGB or RGBA")
    a("--num_classes", type=number(int, *BOUNDS["num_classes"]), default=1, help="number of folders masks/<k>")
    width = "filters of the top row, doubled four times; default: 32, or with --encoder those of its stages"
    a("--width", type=number(int, *BOUNDS["width"]), help=width)
    for key, side in (("input_w", "width"), ("input_h", "height")):
        a(f"--{key}", type=number(int, *BOUNDS[key]), default=96, help=f"{side} of resized images, or of crops")

    a = parser.add_argument_group("data").add_argument
    a("--dataset", type=data_set, default="dsb2018_96", help="a folder in inputs/")
    a("--img_ext", default=".png", help="ending of the images' file names")
    a("--mask_ext", default=".png", help="ending of the masks' file names")
    split = "random: 80/20; grouped: look-alikes on one side; or a split.yml; default: random, or grouped for instances"
    a("--split", help=split)
    a("--split_seed", type=seed, default=41, help="random seed of the random and grouped splits")
    defaults = ", ".join(f"for {target} {parts}" for target, parts in AUGMENT.items())
    parts = f"none, or some of {','.join(AUGMENTATIONS)}; default: {defaults}"
    a("--augment", type=augment, help=parts)

    a = parser.add_argument_group("individual nuclei (--target instances)").add_argument
    a(
        "--diameter",
        type=number(float, 4, 256),
        default=22,
        help="pixels; each picture is scaled until its median nucleus has this size",
    )
    a("--scale_range", type=interval(0.1, 10), default="0.5,2", help="range of the random factor that scales a crop")
    stretched = "percentiles of each picture that become black and white, or none"
    a("--stretch", type=stretch, default="1,99.8", help=stretched)
    a("--crops", type=number(int, 1, 10_000_000), help="random crops per epoch; default: as many as training pictures")
    balance = "0: every picture is equally likely; 1: every kind of picture (dark grey, coloured ...) is"
    a("--kind_balance", type=number(float, 0, 1), default=0.5, help=balance)
    others = "generated, or a folder in inputs/: source of every second crop, so that fine-tuning forgets less"
    a("--rehearse", type=data_set, default="none", help=others)
    a("--map_weights", type=weights(3), default="1,1,1", help="weights of the losses of mask, contact and distance")

    a = parser.add_argument_group("optimisation").add_argument
    losses = ("BCEDiceLoss", "BCELovaszLoss", "BCEWithLogitsLoss", "LovaszHingeLoss")
    a("--loss", choices=losses, default="BCELovaszLoss", help="loss of the mask, for each head")
    a("--head_weights", type=weights(4), help="weights of the losses of L1 to L4, such as 1,2,3,4; default: equal")
    a("--optimizer", choices=("Adam", "AdamW", "SGD"), default="AdamW", help="optimizer")
    a("--lr", "--learning_rate", type=positive, default=2e-3, help="learning rate")
    a("--momentum", type=number(float, 0, 1), default=0.9, help="momentum of SGD")
    a("--weight_decay", type=positive, default=1e-4, help="weight decay of the optimizer")
    a("--nesterov", action="store_true", help="Nesterov momentum of SGD")
    schedulers = ("ConstantLR", "CosineAnnealingLR", "MultiStepLR", "OneCycleLR", "ReduceLROnPlateau")
    a("--scheduler", choices=schedulers, default="OneCycleLR", help="how the learning rate changes")
    a("--min_lr", type=positive, default=1e-5, help="CosineAnnealingLR, ReduceLROnPlateau: lowest learning rate")
    a("--factor", type=number(float, 0, 0.999999), default=0.1, help="ReduceLROnPlateau: factor of a step")
    a("--patience", type=number(int, 0), default=2, help="ReduceLROnPlateau: epochs without improvement before a step")
    a("--milestones", type=milestones, default="20,40", help="MultiStepLR: epochs of the steps")
    a("--gamma", type=positive, default=2 / 3, help="MultiStepLR: factor of a step")
    ema = "decay of the averaged weights, less in trainings of few steps; 0: no averaging"
    a("--ema", type=number(float, 0, 0.99999), default=0.995, help=ema)

    a = add_machine_options(parser, training=True).add_argument
    a("--channels_last", type=auto_or_bool, default="auto", help="memory layout; auto: with mixed precision")
    a("--compile", action="store_true", help="torch.compile; does not help on a CPU")
    a("--checkpointing", action="store_true", help="recompute activations in the backward pass: less memory, more time")
    a("--cache", type=auto_or_bool, default="auto", help="keep decoded images in memory; auto: when they fit")
    return parser


def augment(text):
    """'cutmix,flips' or a list of them -> 'flips,cutmix', parts in the order of AUGMENTATIONS; 'none' has no parts."""
    names = [part.strip("[]'\" ") for part in text.split(",")] if text != "none" else []
    if unknown := [name for name in names if name not in AUGMENTATIONS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r}: expected none, or some of {','.join(AUGMENTATIONS)}")
    return ",".join(name for name in AUGMENTATIONS if name in names) or "none"


def milestones(text):
    """'20,40' or '[20, 40]' -> '20,40', increasing whole numbers."""
    epochs = [number(int, 1)(part) for part in str(text).strip("[] ").split(",")]
    if epochs != sorted(set(epochs)):
        raise argparse.ArgumentTypeError(f"{text!r} does not increase")
    return ",".join(map(str, epochs))


answer_early(__name__, build_parser)  # the imports below take seconds

import torch

from archs import WIDTH, build_model
from common.board import check_tensorboard, open_board
from common.devices import keep_memory, pick_amp, pick_device, precision_name
from common.distributed import is_main, processes, sync_batch_norm
from common.files import read_yaml
from common.runs import (
    earlier_files,
    machine_name,
    only_trainer,
    resolve_machine,
    resumed,
    run_folder,
)
from data_folder import check_layout
from dataset import GROUPED, make_loader
from encoders import convert_sync_batchnorm, load_encoder
from engine import OPTIMIZERS, SCHEDULERS, Run, averaging_decay, begin, fit_and_keep, seed_everything
from inference import start_from
from instances import DEFAULTS, MAPS
from losses import LOSSES, MapsLoss
from nuclei.rehearsal import check_rehearsal
from run_config import read_config
from tasks import Instances, Segmentation
from training_data import build_data, chosen_split, recommend_steps
from utils import count_params

# ---------------------------------------------------------------- options to a run's config


def read_recipe(path):
    """A recipe, or the config.yml of another run without what it recorded about its data and machine."""
    recipe = read_yaml(path)
    if refused := sorted(recipe.keys() & set(ABOUT_THE_COMMAND)):
        raise ValueError(f"{path}: {', '.join(refused)} can only be given on the command line")
    left_out = {*NO_OPTIONS, *DEFAULTS}
    if "environment" in recipe:
        left_out |= {"device", "num_workers"}
    return {key: value for key, value in recipe.items() if key not in left_out}


def new_config(options):
    """The resolved options of a new run, flat, as config.yml keeps them."""
    config = {key: value for key, value in vars(options).items() if key not in ABOUT_THE_COMMAND}
    if not config["name"]:
        supervision = "wDS" if config["deep_supervision"] else "woDS"
        config["name"] = f"{Path(config['dataset']).name}_{config['arch']}_{supervision}"
    if config["head_weights"] and not config["deep_supervision"]:
        raise ValueError("--head_weights is for the four heads of deep supervision; give --deep_supervision True")
    config |= encoder_config(config) | target_config(config)
    if config["scheduler"] in ("CosineAnnealingLR", "ReduceLROnPlateau"):
        for key in ("lr", "encoder_lr"):
            if config[key] is not None and config[key] < config["min_lr"]:
                lowest = f"--min_lr {config['min_lr']:g}, to which it should fall"
                raise ValueError(f"--{key} {config[key]:g} is below {lowest}")
    return resolve_machine(config)


def changed(config, keys):
    """Those of the options `keys` that have another value than their default."""
    defaults = build_parser().parse_args([])
    return [key for key in keys if config[key] != getattr(defaults, key)]


def target_config(config):
    """What --target decides: num_classes, split, augment, thresholds; ValueError for options of the other target."""
    of_nuclei = config["target"] == "instances"
    if not of_nuclei and (given := changed(config, NUCLEI_OPTIONS)):
        raise ValueError(f"--{given[0]} is for individual nuclei; give --target instances")
    if of_nuclei and config["num_classes"] not in (1, len(MAPS)):  # 3: the config.yml of another run
        raise ValueError(f"--num_classes {config['num_classes']} is for --target masks; leave it out")
    found = {"augment": config["augment"] or AUGMENT[config["target"]]}
    if of_nuclei:
        found.update(num_classes=len(MAPS), split=config["split"] or GROUPED, **DEFAULTS)
    foreign = WHOLE_IMAGES if of_nuclei else OF_NUCLEI
    if wrong := [part for part in found["augment"].split(",") if part in foreign]:
        raise ValueError(f"--augment {wrong[0]} does not go with --target {config['target']}; leave it out")
    return found


def encoder_config(config):
    """width and encoder_lr, resolved; ValueError when an encoder's options are given without one."""
    if config["encoder"] == "none":
        if given := changed(config, ENCODER_OPTIONS):
            raise ValueError(f"--{given[0]} needs an --encoder, such as --encoder efficientnet_lite0")
        return {"width": config["width"] or WIDTH}
    if config["encoder_lr"] is not None:
        return {}
    pretrained = config["weights"] or config["encoder_weights"] != "none"
    return {"encoder_lr": PRETRAINED_LR * config["lr"] if pretrained else config["lr"]}


def resumed_config(options, given):
    """The config of the run to resume, with the options that may change; ValueError where others were changed."""
    if not options.name:
        raise ValueError("--resume needs --name, the run to continue")
    folder = run_folder(options.name)
    config = check_config(build_parser, read_config(folder), folder / "config.yml")
    if "level" in config:
        raise ValueError(f"{folder} was cut to level {config['level']}; resume the whole one")
    if "exported" in config:
        raise ValueError(f"{folder} is a half-precision export of another run; resume that one")
    return resumed(config, folder, options, given, FREE_ON_RESUME, ABOUT_THE_COMMAND, ENDLESS)


# ---------------------------------------------------------------- building and training


def build_task(config):
    """The task that --target names, with its loss."""

    def numbers(text):
        return [float(part) for part in text.split(",")]

    criterion, head_weights = LOSSES[config["loss"]](), None
    if config["head_weights"]:
        head_weights = numbers(config["head_weights"])
    if config["target"] == "instances":
        criterion = MapsLoss(criterion, numbers(config["map_weights"]))
        return Instances(criterion, head_weights, {key: config[key] for key in DEFAULTS})
    return Segmentation(criterion, head_weights)


def build_run(config, model, steps_per_epoch, device, folder=None):
    """The Run that a config describes, with `model` on the device; its folder keeps it."""
    model.to(device)
    if config["channels_last"]:
        model.to(memory_format=torch.channels_last)
    task = build_task(config)
    of_encoder = list(model.encoder.parameters()) if model.encoder else []
    with loading():  # what the first optimizer of a process imports
        optimizer = OPTIMIZERS[config["optimizer"]](parameter_groups(model, of_encoder, config), config)
    scheduler = SCHEDULERS[config["scheduler"]](optimizer, config, steps_per_epoch)
    return Run(
        model,
        task,
        optimizer,
        scheduler,
        device,
        epochs=config["epochs"],
        amp=pick_amp(config["amp"], device),
        ema=averaging_decay(config["ema"], config["epochs"] * steps_per_epoch),
        early_stopping=config["early_stopping"],
        seed=config["seed"],
        folder=folder,
        frozen=of_encoder,
        frozen_epochs=config["encoder_freeze"],
        keep_last=config["keep"] == "last",
    )


def parameter_groups(model, of_encoder, config):
    """What an optimizer takes: the parameters, or two groups of them, the encoder's with its own learning rate."""
    if not of_encoder:
        return model.parameters()
    ids = {id(parameter) for parameter in of_encoder}
    others = [parameter for parameter in model.parameters() if id(parameter) not in ids]
    return [{"params": others}, {"params": of_encoder, "lr": config["encoder_lr"]}]


def prepare(config, folder, earlier, device, resume):
    """-> the Run, its training and validation loader; afterwards a new run's folder holds its config and split.

    earlier: files of an earlier run, to be deleted; resume: whether to continue the run in `folder`.
    """
    begun = resume and (folder / "last.pth").is_file()
    keep_memory()
    torch.backends.cudnn.benchmark = True  # all batches have one size: let cuDNN find its fastest convolutions
    seed_everything(config["seed"])
    model = build_model(config)
    if config["sync_bn"]:
        model = sync_batch_norm(model, device, convert_sync_batchnorm if model.encoder else None)
    check_layout(config)
    check_rehearsal(config)
    split = chosen_split(config, folder if resume else None)
    if config["weights"] and not begun:
        start_from(model, config)
    elif model.encoder and config["encoder_weights"] != "none" and not begun:
        load_encoder(model.encoder, config["encoder_weights"])
        config.update(mean=model.encoder.mean, std=model.encoder.std)
    train_set, val_set, about = build_data(config, split)
    options = {"num_workers": config["num_workers"], "pin_memory": device.type == "cuda"}
    loader = make_loader(train_set, config["batch_size"], shuffle=True, seed=config["seed"], **options)
    val_loader = make_loader(val_set, config["batch_size"], **options)
    run = build_run(config, model, len(loader), device, folder)

    if resume and about["fingerprint"] != read_yaml(folder / "split.yml").get("fingerprint"):
        others = ", or those of --rehearse," if "rehearsal" in about["fingerprint"] else ""
        raise ValueError(f"the files of inputs/{config['dataset']}{others} have changed since {folder} was started")
    begin(run, config, earlier, resume, FREE_ON_RESUME, about["fingerprint"], {**split, **about})
    if is_main() and not resume:
        recommend_steps(config, len(loader))

    layout = "channels_last" if config["channels_last"] else "contiguous"
    built = f"{config['arch']}, {count_params(model):,} parameters"
    print(f"{built}, {machine_name(device)}, {precision_name(run.amp)}, {layout}")
    return run, loader, val_loader


def main():
    options, given = parse_options(build_parser, read_config=read_recipe)
    config = resumed_config(options, given) if options.resume else new_config(options)
    check_tensorboard(config)
    folder = run_folder(config["name"])
    with only_trainer(folder, RUN_FILES):
        earlier = earlier_files(folder, RUN_FILES, options)
        with processes(pick_device(config["device"])) as device:
            run, loader, val_loader = prepare(config, folder, earlier, device, options.resume)
            board = open_board(config, run, val_loader.dataset, val_loader.dataset.img_ids)
            fit_and_keep(run, loader, val_loader, "train.py", compiled=config["compile"], board=board)
            score = f"val_{run.task.score}"
            print(f"best {score} {run.best_score:.4f} at epoch {run.best_epoch}, last {run.rows[-1][score]:.4f}")
            print(f"the run is in {folder}; evaluate it: python val.py --name {shlex.quote(config['name'])}")


if __name__ == "__main__":
    run_script(main)
