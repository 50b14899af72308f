"""Which images a training learns from and which it validates on; both are read and checked before the first step.

    split = chosen_split(config, folder=None)               # {"train": ids, "val": ids}
    train_set, val_set, about = build_data(config, split)   # about: what split.yml notes besides the ids

config is that of a run of train.py.
"""

import math
import sys
from pathlib import Path

from common.files import read_yaml
from common.lookalikes import Sketches, about_groups, about_twins, grouped_split, groups, twins
from data_folder import list_ids
from dataset import ABOUT, GROUPED, build_dataset, check_split, split_ids

MOSTLY = 0.8  # a larger foreground fraction is taken for a mistake


def chosen_split(config, folder):
    """The ids of a resumed run's split.yml (in `folder`), of the user's --split file, or of a seeded 80/20 split."""
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


def build_data(config, split):
    """-> training and validation Dataset, checked and cached, and what split.yml notes about them.

    Adds what was found in the data to config: mean, std and, where dataset.yml tells it, scale (pixels of the input
    per pixel of the raw image).
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
        config.update(input_scale(folder / "dataset.yml", config))

    size = (found["bytes"] + found_val["bytes"]) / 2**20
    kept = "kept in memory" if found["cached"] and found_val["cached"] else "read again in each epoch"
    foreground = ", ".join(f"{part:.1%}" for part in found["foreground"])
    print(f"{folder}: {len(train_set)} training and {len(val_set)} validation images, {size:.0f} MB, {kept}")
    print(f"foreground of the training masks {foreground}; mean {config['mean']}, std {config['std']}")
    for suspicion in suspicions(folder, found, found_val, len(train_set) + len(val_set)):
        print(f"train.py: warning: {suspicion}", file=sys.stderr)
    of_twins = twins(sketches, split["train"], split["val"])
    print(about_twins(of_twins, len(val_set)))
    about = {key: {"train": found[key], "val": found_val[key]} for key in ABOUT}
    return train_set, val_set, {**about, "twins": of_twins}


def input_scale(path, config):
    """{"scale": pixels of the input per pixel of the raw image} where dataset.yml tells it, else {}."""
    about = read_yaml(path)
    known = [about[key] for key in ("scale", "img_size") if about.get(key)]
    if not all(type(value) in (int, float) and 0 < value < 1e6 for value in known):
        raise ValueError(f"{path}: scale and img_size must be numbers above 0, found {known}")
    if len(known) < 2:
        return {}
    side = math.sqrt(config["input_h"] * config["input_w"])
    return {"scale": round(about["scale"] * side / about["img_size"], 6)}


def suspicions(folder, found, found_val, count):
    """Warnings about valid data that look like a mistake. found: what Dataset.check found in training, validation."""
    said = []
    if found["two_valued"] + found_val["two_valued"] == count:
        said.append(f"all {count} images of {folder / 'images'} are pure black and white; are they masks?")
    for k, (part, part_val) in enumerate(zip(found["foreground"], found_val["foreground"], strict=True)):
        masks = folder / "masks" / str(k)
        if part > MOSTLY:
            said.append(f"{part:.1%} of the pixels of {masks} are foreground; are the masks inverted?")
        for name, share in (("training", part), ("validation", part_val)):
            if not share:
                said.append(f"all {name} masks of {masks} are empty")
    return said
