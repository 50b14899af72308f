"""Crops of pictures of nuclei at one scale, and what a network learns of each nucleus (--target instances).

inputs/<dataset>/images/<id><img_ext>  and  inputs/<dataset>/labels/<id>.png (or .tif), 0 background, 1 ... n the nuclei

crops = Crops(ids, "inputs/dsb2018", size=(192, 192), diameter=22, count=1000)
crops.check()                    # reads every file once, and finds each picture's scale
image, maps, info = crops[0]     # (3, h, w) float32; (3, h, w) float32 in [0, 1]; {"img_id": ..., "labels": (h, w)}

Pictures keep their own sizes. Each is stretched between its percentiles and scaled so that its median nucleus has the
canonical diameter (scaling.py); for training, times a random factor.
"""

import hashlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from skimage import measure

from augmentation import augmentation, paste_nuclei
from common.images import squeeze, standardise, to_channels
from common.lookalikes import kind
from data_folder import INPUTS, check_places, find_file
from dataset import Dataset, Item, Problem, is_two_valued, read_file
from instances import MAPS, sequential, targets
from labels import find_labels, read_labels
from nuclei.scaling import median_diameter, resize_labels, stretch, stretch_limits

VIEW = 256  # pixels of the network's input: what validation sees of each picture, or more where crops are larger
TRIES = 3  # windows that are drawn for a crop, until one has a nucleus in its middle


class Facts(NamedTuple):
    """What is known of a picture before its first crop."""

    diameter: float | None  # median diameter of its nuclei in its own pixels; None without nuclei
    limits: tuple  # the grey levels that become 0 and 255
    kind: str  # "dark grey" and so on; see common.lookalikes.kind


class NucleiDataset(Dataset):
    """The middle of each picture at its true scale, for validation; call `check` before the first item.

    Args:
        img_ids: ids, in the order of the items.
        folder: images are <folder>/images/<id><img_ext>, label maps <folder>/labels/<id>.png, .tif or .tiff.
        size: (height, width) of the items.
        diameter: of the median nucleus of every item, in pixels; a picture without nuclei takes the median picture's
            scale.
        percentiles: between which pictures are stretched; see scaling.stretch_limits.
        input_channels: 1 (grey) or 3 (RGB).
        mean, std: one float per channel, for standardise; by default images are only divided by 255.
        seed: of the random streams, which only subclasses use.

    An item is image (C, h, w) float32, maps (3, h, w) float32 in [0, 1] as in instances.MAPS, and
    {"img_id": id, "labels": (h, w) int32 label map}. Pictures are padded by reflection.
    """

    def __init__(
        self,
        img_ids,
        folder,
        *,
        size,
        diameter,
        img_ext=".png",
        percentiles="1,99.8",
        transform=None,
        input_channels=3,
        mean=None,
        std=None,
        seed=0,
    ):
        if input_channels not in (1, 3):
            raise ValueError(f"--input_channels {input_channels}: individual nuclei need 1 (grey) or 3 (RGB)")
        folder = Path(folder)
        places = folder / "images", folder / "labels", img_ext, None, len(MAPS)
        super().__init__(
            img_ids, *places, transform, input_channels=input_channels, size=size, mean=mean, std=std, seed=seed
        )
        self.diameter, self.percentiles = diameter, percentiles
        self.facts = []  # of each picture, in the order of img_ids

    # ---------------------------------------------------------------- before the first item

    def check(self, cache="auto", each=None):
        """As Dataset.check, but mean and std are 0.5, since stretched pictures fill [0, 1]."""
        self.facts = []
        found = super().check(cache, each)
        half = [0.5] * self.input_channels
        return {**found, "mean": half, "std": half}

    def note(self, item):
        limits = stretch_limits(item.image, self.percentiles)
        self.facts.append(Facts(median_diameter(item.mask[..., 0]), limits, kind(item.image)))

    def _read(self, img_id):
        """The Item of an id, its image not yet stretched, its mask the labels, (H, W, 1) uint16 or int32."""
        digest, problems = hashlib.blake2b(img_id.encode(), digest_size=16), []
        image, labels = read_file(find_file(self.img_dir, img_id, self.img_ext), "image", digest, problems), None
        try:
            path = find_labels(self.mask_dir, img_id)
            digest.update(path.read_bytes())
            labels = read_labels(path)
        except ValueError as error:
            text = str(error).replace(f"{self.mask_dir / img_id}", "labels")  # the same for all ids
            problems.append(Problem(text))
        if image is not None and labels is not None and labels.shape != image.shape[:2]:
            problems.append(Problem(f"labels and image differ in size ({self.mask_dir})"))
        if problems:
            raise ValueError(*problems)
        if labels.max() <= np.iinfo(np.uint16).max:
            labels = labels.astype(np.uint16)  # half the memory
        two_valued = is_two_valued(image)
        image = to_channels(image, self.input_channels)
        return Item(image, labels[..., None], digest.digest(), image.shape[:2], two_valued)

    def about(self):
        """A line for people."""
        height, width = self.size
        return (
            f"val_official: official score of the middle {width} x {height} pixels of each validation picture at its "
            "true scale; val.py finds the scale and judges whole pictures"
        )

    def true_scale(self, index):
        """Network pixels per pixel of picture `index`, at which its median nucleus has the canonical diameter."""
        own = self.facts[index].diameter
        return self.diameter / own if own else self.usual_scale()

    def usual_scale(self):
        """The true scale of the median picture; 1 where no picture has a nucleus."""
        diameters = [facts.diameter for facts in self.facts if facts.diameter]
        return self.diameter / float(np.median(diameters)) if diameters else 1.0

    # ---------------------------------------------------------------- items

    def __getitem__(self, index):
        image, labels = self.window(index, self.true_scale(index))
        return self.finished(index, image, labels)

    def window(self, index, scale, stream=None):
        """A part of picture `index` at a scale -> image (h, w, C) uint8, stretched, and label map (h, w) int32.

        It is the middle of the picture; with a stream (numpy Generator) it is anywhere, preferably around a nucleus.
        """
        image, labels = self.arrays(index)
        lengths = image.shape[:2]
        seen = [min(length, max(1, round(side / scale))) for length, side in zip(lengths, self.size, strict=True)]
        for _ in range(TRIES if stream else 1):
            rows, columns = (line(length, count, stream) for length, count in zip(lengths, seen, strict=True))
            part = labels[rows][:, columns, 0].astype(np.int32)
            middle = tuple(slice(count // 4, count - count // 4) for count in seen)
            if part[middle].any():
                break
        size = [
            min(side, max(1, round(length * scale))) if count == length else side
            for length, count, side in zip(lengths, seen, self.size, strict=True)
        ]
        picture = squeeze(stretch(image[rows][:, columns], self.facts[index].limits), size)
        part = resize_labels(sequential(part), size)
        if tuple(size) != tuple(self.size):  # the picture ends before the window does
            rows, columns = (line(length, side, stream) for length, side in zip(size, self.size, strict=True))
            picture = picture[rows][:, columns]
            part = measure.label(part[rows][:, columns], connectivity=2).astype(np.int32)  # mirrored nuclei are others
        return picture, part

    def finished(self, index, image, labels):
        """Arrays of `window` -> an item."""
        tensor = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        maps = torch.from_numpy(targets(labels))
        info = {"img_id": self.img_ids[index], "labels": torch.from_numpy(np.ascontiguousarray(labels))}
        return standardise(tensor, self.mean, self.std), maps, info


class Crops(NucleiDataset):
    """Random crops at random scale for training; `count` of them are an epoch.

    Args, besides those of NucleiDataset:
        count: items per epoch; by default one per picture.
        scale_range: (low, high), range of the factor by which a picture's scale is multiplied. The factor is the
            geometric mean of two log-uniform draws, so those in the middle of the range are the most frequent.
        kind_balance: at 0 all pictures are drawn equally often, at 1 all kinds of pictures; a kind that makes up a
            fraction f of the pictures gets crops in proportion to f ** (1 - kind_balance).
        transform: an albumentations Compose; the label map moves with the image.
        pasted: the fraction of the crops with pasted nuclei; see augmentation.paste_nuclei.

    Everything is drawn from a separate random stream for each (seed, epoch, item): see Dataset.
    """

    def __init__(self, *args, count=None, scale_range=(1, 1), kind_balance=0.0, pasted=0.0, **options):
        super().__init__(*args, **options)
        self.count, self.scale_range, self.kind_balance, self.pasted = count, scale_range, kind_balance, pasted

    def __len__(self):
        return self.count or len(self.img_ids)

    def check(self, cache="auto", each=None):
        """As that of NucleiDataset; ValueError when no picture has a nucleus."""
        found = super().check(cache, each)
        if not any(facts.diameter for facts in self.facts):
            raise ValueError(f"{self.mask_dir}: all {len(self.img_ids)} label maps are empty; nothing could be learned")
        kinds = Counter(facts.kind for facts in self.facts)
        weights = np.array([kinds[facts.kind] ** -self.kind_balance for facts in self.facts])
        self.cumulative = np.cumsum(weights / weights.sum())
        return found

    def about(self):
        counts = Counter(facts.kind for facts in self.facts).most_common()
        kinds = ", ".join(f"{count} {name}" for name, count in counts)
        diameters = [facts.diameter for facts in self.facts if facts.diameter]
        low, middle, high = np.percentile(diameters, (5, 50, 95))
        return (
            f"pictures: {kinds}; median diameter {middle:.0f} pixels (5 to 95 %: {low:.0f} to {high:.0f}), scaled to "
            f"{self.diameter:g}; {len(self)} crops per epoch"
        )

    def __getitem__(self, index):
        stream = np.random.default_rng((self.seed, int(self.epoch), index))
        index = min(int(np.searchsorted(self.cumulative, stream.random())), len(self.facts) - 1)
        factor = np.exp(np.mean(stream.uniform(*np.log(self.scale_range), 2)))
        image, labels = self.window(index, self.true_scale(index) * factor, stream)
        if stream.random() < self.pasted:
            image, labels = paste_nuclei(image, labels, stream)
        return self.finished(index, *self.transformed(image, labels, stream))


def line(length, count, stream=None):
    """(count,) consecutive indices into a line of `length` pixels, which is mirrored beyond its ends.

    They are centred, or, with a stream (numpy Generator), begin at a random place.
    """
    low, high = sorted((0, length - count))
    start = int(stream.integers(low, high + 1)) if stream else (length - count) // 2
    places = np.arange(start, start + count) % (2 * length)
    return np.minimum(places, 2 * length - 1 - places)


def build_crops(config, ids, augment=False, crops_class=Crops):
    """The Crops (augment) or NucleiDataset that the config of a run with --target instances describes.

    crops_class: Crops or a subclass of it.
    """
    check_places(config)
    size, options = (config["input_h"], config["input_w"]), {}
    if augment:
        parts = config["augment"]
        if parts != "none":
            options["transform"] = augmentation(parts, *size, rgb=config["input_channels"] > 1)
        options["count"], options["kind_balance"] = config["crops"], config["kind_balance"]
        options["scale_range"] = [float(part) for part in config["scale_range"].split(",")]
        options["pasted"] = 0.3 if "paste" in parts.split(",") else 0.0
    else:
        size = tuple(max(VIEW, side) for side in size)
    return (crops_class if augment else NucleiDataset)(
        ids,
        INPUTS / config["dataset"],
        size=size,
        diameter=config["diameter"],
        img_ext=config["img_ext"],
        percentiles=config["stretch"],
        input_channels=config["input_channels"],
        mean=config.get("mean"),
        std=config.get("std"),
        seed=config["seed"],
        **options,
    )
