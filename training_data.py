"""Which images a training learns from and which it validates on; both are read and checked before the first step.

    split = chosen_split(config, folder=None)               # {"train": ids, "val": ids}
    train_set, val_set, about = build_data(config, split)   # about: what split.yml notes besides the ids

config is that of a run of train.py. dataset.py opens whole images with masks, nuclei/crops.py opens crops of nuclei.
"""

import math

from common.cli import loading, warn
from common.files import read_yaml
from common.lookalikes import Sketches, about_groups, about_twins, grouped_split, groups, twins
from data_folder import INPUTS, list_ids
from dataset import ABOUT, GROUPED, RANDOM, build_dataset, check_split, split_ids
from nuclei.crops import build_crops
from nuclei.rehearsal import NO_REHEARSAL, Rehearsal, build_rehearsal
from run_config import is_of_nuclei

ENOUGH_STEPS = 100  # batch norm's statistics remember about ten steps, and start from nothing
MOSTLY = 0.8  # a larger foreground fraction is taken for a mistake


def open_images(config, ids, augment=False):
    """The data set of these ids, as --target asks for; see dataset.build_dataset and nuclei.crops.build_crops."""
    return (build_crops if is_of_nuclei(config) else build_dataset)(config, ids, augment)


def chosen_split(config, folder):
    """The ids of a resumed run's split.yml (in `folder`), of the user's --split file, or of a seeded 80/20 split."""
    if folder or config["split"] not in (None, GROUPED, RANDOM):
        path = folder / "split.yml" if folder else config["split"]
        return check_split(read_yaml(path), path)
    ids = list_ids(INPUTS / config["dataset"] / "images", config["img_ext"])
    if config["split"] != GROUPED:
        return split_ids(ids, config["split_seed"])
    sketches = Sketches()
    open_images(config, ids).check(cache=False, each=sketches.add)
    print(about_groups(groups(sketches)))
    return grouped_split(ids, sketches, config["split_seed"])


def build_data(config, split):
    """-> training and validation data set, checked and cached, and what split.yml notes about them.

    Adds what was found in the data to config: mean, std and scale (pixels of the input per pixel of the raw image, for
    masks where dataset.yml tells it, for individual nuclei that of the median training picture).
    """
    folder, of_nuclei = INPUTS / config["dataset"], is_of_nuclei(config)
    truth = "labels" if of_nuclei else "masks"
    with loading():  # albumentations
        train_set, val_set = open_images(config, split["train"], augment=True), open_images(config, split["val"])
    results, problems, sketches = [], [], Sketches()
    for dataset in (train_set, val_set):
        try:
            results.append(dataset.check(config["cache"], sketches.add))
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("; ".join(problems))
    found, found_val = results
    images = len(split["train"]), len(split["val"])
    if not any(found["foreground"]):
        raise ValueError(f"{folder / truth}: all {images[0]} training {truth} are empty; nothing could be learned")
    config.setdefault("mean", found["mean"])
    config.setdefault("std", found["std"])
    for dataset in (train_set, val_set):
        dataset.mean, dataset.std = config["mean"], config["std"]
    if of_nuclei:
        config["scale"] = round(train_set.usual_scale(), 6)
    elif (folder / "dataset.yml").is_file():
        config.update(input_scale(folder / "dataset.yml", config))

    size = (found["bytes"] + found_val["bytes"]) / 2**20
    kept = "kept in memory" if found["cached"] and found_val["cached"] else "read again in each epoch"
    foreground = ", ".join(f"{part:.1%}" for part in found["foreground"])
    print(f"{folder}: {images[0]} training and {images[1]} validation images, {size:.0f} MB, {kept}")
    print(f"foreground of the training {truth} {foreground}; mean {config['mean']}, std {config['std']}")
    if of_nuclei:
        print(train_set.about())
        print(val_set.about())
    places = ["labels"] if of_nuclei else [f"masks/{k}" for k in range(config["num_classes"])]
    for suspicion in suspicions(folder, places, found, found_val, sum(images)):
        warn(suspicion)
    of_twins = twins(sketches, split["train"], split["val"])
    print(about_twins(of_twins, images[1]))
    about = {key: {"train": found[key], "val": found_val[key]} for key in ABOUT}
    if of_nuclei and config["rehearse"] != NO_REHEARSAL:
        other = build_rehearsal(config, len(train_set), split["val"])
        about["fingerprint"]["rehearsal"] = other.check(config["cache"])["fingerprint"]
        train_set = Rehearsal(train_set, other)
    return train_set, val_set, {**about, "twins": of_twins}


def input_scale(path, config):
    """{"scale": pixels of the input per pixel of the raw image} where dataset.yml tells it, else {}."""
    about = read_yaml(path)
    known = [about[key] for key in ("scale", "img_size") if about.get(key) and about[key] != "native"]
    if not all(type(value) in (int, float) and 0 < value < 1e6 for value in known):
        raise ValueError(f"{path}: scale and img_size must be numbers above 0, found {known}")
    if len(known) < 2:
        return {}
    side = math.sqrt(config["input_h"] * config["input_w"])
    return {"scale": round(about["scale"] * side / about["img_size"], 6)}


def suspicions(folder, places, found, found_val, count):
    """Warnings about valid data that look like a mistake.

    places: the folder in `folder` of each class's truth; found: what Dataset.check found in training, validation.
    """
    said = []
    if found["two_valued"] + found_val["two_valued"] == count:
        said.append(f"all {count} images of {folder / 'images'} are pure black and white; are they masks?")
    for place, part, part_val in zip(
        [folder / place for place in places], found["foreground"], found_val["foreground"], strict=True
    ):
        if part > MOSTLY:
            said.append(f"{part:.1%} of the pixels of {place} are foreground; are the masks inverted?")
        for name, share in (("training", part), ("validation", part_val)):
            if not share:
                said.append(f"all {name} masks of {place} are empty")
    return said


def recommend_steps(config, steps_per_epoch):
    """Warn when the training is too short for batch norm and averaged weights to follow the network."""
    steps = config["epochs"] * steps_per_epoch
    if steps < ENOUGH_STEPS:
        longer = f"--epochs {math.ceil(ENOUGH_STEPS / steps_per_epoch)}"
        recommended = f"at least {ENOUGH_STEPS} are recommended: {longer}, or a smaller --batch_size"
        warn(f"{steps} steps in all, {recommended}")
