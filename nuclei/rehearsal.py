"""What a network that is tuned on a few pictures should not forget: crops of other pictures, mixed into its training.

    other = build_rehearsal(config, len(own))
    other.check()
    train_set = Rehearsal(own, other)     # every second item is of other pictures

Rehearsal against forgetting: Robins, Connection Science 1995, https://doi.org/10.1080/09540099550039318.
"""

import numpy as np
from torch.utils.data import Dataset

from common.files import read_yaml
from common.images import to_channels
from common.runs import weights_file
from common.synthetic import generate_nuclei
from data_folder import INPUTS, check_layout, list_ids, usual_ending
from dataset import Item
from nuclei.crops import Crops, build_crops

NO_REHEARSAL, GENERATED = "none", "generated"  # values of --rehearse that are no folder in inputs/
SEEDS = range(1000, 1040)  # of the generated pictures


class GeneratedCrops(Crops):
    """Crops of generated nuclei, fluorescence and stained tissue; an id is a seed of `generate_nuclei`."""

    def _read(self, img_id):
        image, labels = generate_nuclei(int(img_id))
        image = to_channels(image, self.input_channels)
        return Item(image, labels.astype(np.uint16)[..., None], img_id.encode(), image.shape[:2], False)


class Rehearsal(Dataset):
    """Two Crops of the same length in turns: the items 0, 2, 4 ... are of `own`, the items 1, 3, 5 ... of `other`."""

    def __init__(self, own, other):
        self.own, self.other = own, other

    def __len__(self):
        return len(self.own)

    def __getitem__(self, index):
        return (self.other if index % 2 else self.own)[index]

    def set_epoch(self, epoch):
        self.own.set_epoch(epoch)
        self.other.set_epoch(epoch)


def others_of(config):
    """The config of a run with the data set that --rehearse names instead of its own."""
    source = config["rehearse"]
    ending = usual_ending(INPUTS / source / "images", config["img_ext"])
    return {**config, "dataset": source, "img_ext": ending}


def check_rehearsal(config):
    """check_layout for the folder that --rehearse names, if any: before any file is read."""
    if config["rehearse"] not in (NO_REHEARSAL, GENERATED):
        check_layout(others_of(config), "--rehearse")


def build_rehearsal(config, count, validation=()):
    """The Crops that --rehearse names, `count` per epoch; call `check` next.

    Pictures of a folder that must stay unseen are left out: those that the run of --weights kept for validation and, if
    the folder is the training's own data set, `validation`. The folder's images may have another extension.
    """
    source, others = config["rehearse"], {**others_of(config), "crops": count}
    if source == GENERATED:
        ids, crops_class = [str(seed) for seed in SEEDS], GeneratedCrops
    else:
        unseen, crops_class = {*validated_by(config["weights"], source)}, Crops
        if source == config["dataset"]:
            unseen.update(validation)
        ids = [img_id for img_id in list_ids(INPUTS / source / "images", others["img_ext"]) if img_id not in unseen]
    print(f"rehearsal: every second crop is from {len(ids)} pictures ({source})")
    return build_crops(others, ids, augment=True, crops_class=crops_class)


def validated_by(weights, dataset):
    """The validation ids of the run that --weights names, where it was trained on that data set; else none."""
    if not weights:
        return []
    config, split = (weights_file(weights).with_name(name) for name in ("config.yml", "split.yml"))
    if not (config.is_file() and split.is_file()) or read_yaml(config).get("dataset") != dataset:
        return []
    return read_yaml(split)["val"]
