"""The nuclei job's data: which images there are, which are for validation, and from their files to tensors.

inputs/<dataset>/images/<id><img_ext>  and  inputs/<dataset>/masks/<class>/<id><mask_ext>, with classes 0, 1 ...

dataset = Dataset(ids, "inputs/demo_96/images", "inputs/demo_96/masks", ".png", ".png", num_classes=1)
image, mask, info = dataset[0]   # (3, H, W) float32, (1, H, W) float32 of 0 and 1, {"img_id": ...}
"""

import hashlib
import math
import os
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DistributedSampler
from tqdm import tqdm

from augmentation import augmentation, paste
from common.cli import listed
from common.devices import memory
from common.distributed import is_main, local_processes
from common.files import is_plain_name
from common.images import decode, foreground, squeeze, squeeze_mask, standardise, to_channels
from common.loaders import SharedBatches, WholeBatches, build_loader
from data_folder import INPUTS, check_places, find_file

ABOUT = ("sizes", "fingerprint")  # the results of Dataset.check that split.yml keeps for each part
GROUPED, RANDOM = "grouped", "random"  # the values of --split that are no file of ids
NAMED_AT_MOST = 20  # ids per kind of problem in a message; the others are only counted


# ---------------------------------------------------------------- ids and split


def split_ids(ids, split_seed=41):
    """{"train": 80 %, "val": 20 %} of the ids, as scikit-learn's train_test_split draws them from the sorted ids."""
    from sklearn.model_selection import train_test_split

    if len(ids) < 2:
        raise ValueError(f"a split needs at least 2 images, found {len(ids)}")
    train, val = train_test_split(sorted(ids), test_size=0.2, random_state=split_seed)
    return {"train": train, "val": val}


def check_split(content, source):
    """The content of a split.yml -> {"train": [...], "val": [...]}, with "test" if the file has it.

    Raises ValueError, naming `source`, unless the lists hold ids as text and no id is in them twice.
    """
    split = {part: content[part] for part in ("train", "val", "test") if content.get(part)}
    if "train" not in split or "val" not in split:
        raise ValueError(f"{source}: expected the lists `train:` and `val:` (and, if wanted, `test:`) of image ids")
    seen = {}
    for part, ids in split.items():
        if not isinstance(ids, list) or not all(isinstance(img_id, str) for img_id in ids):
            raise ValueError(f"{source}: `{part}` must be a list of strings; put ids that look like numbers in quotes")
        for img_id in ids:
            if not is_plain_name(img_id):
                raise ValueError(f"{source}: {img_id!r} cannot be the name of an image")
            if img_id in seen:
                raise ValueError(f"{source}: {img_id} is in {seen[img_id]} and again in {part}")
            seen[img_id] = part
    return split


def changes(split, ids, found, every=True):
    """How the data differ from those that a run's split.yml describes: a list of phrases, [] when nothing changed.

    split: the content of split.yml; ids: the ids of the folder now; found: {part: result of Dataset.check now};
    every: whether the split was made of all the images that there were, so that others are new.
    """
    known = {img_id: part for part in ("train", "val", "test") for img_id in split.get(part) or ()}
    missing, new = sorted(known.keys() - set(ids)), sorted(set(ids) - known.keys())
    said = []
    if missing:
        said.append(f"{len(missing)} of its images are gone ({listed(missing, 3)})")
    if new and every:
        said.append(f"{len(new)} images are new ({listed(new, 3)})")
    for part, now in found.items():
        sizes, fingerprint = _recorded(split, "sizes", part), _recorded(split, "fingerprint", part)
        if isinstance(sizes, dict) and now["sizes"] != sizes:
            said.append(f"the {part} images were {' and '.join(map(str, sizes))}, now {' and '.join(now['sizes'])}")
        elif now["fingerprint"] != fingerprint:
            said.append(f"the {part} images or masks have other contents")
    return said


def _recorded(split, key, part):
    """split[key][part], or None: runs of earlier versions recorded less."""
    return split[key].get(part) if isinstance(split.get(key), dict) else None


# ---------------------------------------------------------------- one image and its masks


class Problem(NamedTuple):
    """What is wrong with a file: `text` is the same for all files of its kind, `detail` is of this one."""

    text: str
    detail: str = ""


class Item(NamedTuple):
    """The files of one id, decoded, before augmentation."""

    image: np.ndarray  # (H, W, C) uint8
    mask: np.ndarray  # (H, W, num_classes) uint8 of 0 and 1; in nuclei/crops.py labels, (H, W, 1)
    digest: bytes  # of the id and the bytes of its files
    size: tuple  # (height, width) in the file
    two_valued: bool  # is the image black and white, like a mask?


def read_file(path, what, digest, problems):
    """What `decode` makes of a file, or None and one more in problems; its bytes go into the digest."""
    if not path.is_file():
        problems.append(Problem(f"no {what} ({path.parent})"))
        return None
    data = path.read_bytes()
    digest.update(data)
    try:
        return decode(data)
    except ValueError as error:
        problems.append(Problem(f"{what} {error} ({path.parent})"))
        return None


def is_two_valued(array):
    """Whether all values of (H, W[, C]) are 0 and 255, or all 0 and 1, as in a mask. Alpha is ignored."""
    values = array if array.ndim == 2 else array[..., :3]
    sparse = values[::8, ::8]  # enough to reject most images
    return any(np.isin(sparse, pair).all() and np.isin(values, pair).all() for pair in ((0, 255), (0, 1)))


class Statistics:
    """What Dataset.check reports about the items, added one at a time."""

    def __init__(self):
        self.fingerprint = hashlib.blake2b(digest_size=16)
        self.sizes, self.two_valued = Counter(), 0
        self.pixels, self.total, self.squares, self.covered = 0, 0.0, 0.0, 0

    def add(self, item):
        height, width = item.size
        self.sizes[f"{width} x {height}"] += 1
        self.two_valued += item.two_valued
        self.fingerprint.update(item.digest)
        values = item.image.reshape(-1, item.image.shape[2]) / 255.0
        self.pixels += len(values)
        self.total = self.total + values.sum(0)
        self.squares = self.squares + (values**2).sum(0)
        self.covered = self.covered + np.count_nonzero(item.mask, axis=(0, 1))

    def summary(self):
        mean = self.total / self.pixels
        variance = self.squares / self.pixels - mean**2
        # without this floor an empty channel would be divided by almost nothing
        variance = np.maximum(variance, max(variance.max() / 16, 1e-6))
        most_frequent = sorted(self.sizes.items(), key=lambda item: (-item[1], item[0]))
        return {
            "fingerprint": self.fingerprint.hexdigest(),
            "sizes": dict(most_frequent[:NAMED_AT_MOST]),
            "mean": [round(float(value), 6) for value in mean],
            "std": [round(float(value), 6) for value in np.sqrt(variance)],
            "foreground": [float(value) for value in self.covered / self.pixels],
            "two_valued": self.two_valued,
        }


# ---------------------------------------------------------------- data set


class Dataset(torch.utils.data.Dataset):
    """Images and masks of a prepared data set.

    Args:
        img_ids: ids, in the order of the items.
        img_dir, mask_dir: folders; images are `img_dir/<id><img_ext>`, masks `mask_dir/<class>/<id><mask_ext>`.
        num_classes: the folders 0 ... num_classes - 1 of mask_dir.
        transform: an albumentations Compose or None. It draws from a separate random stream for each (seed, epoch,
            item), so that its results depend neither on workers and processes nor on resuming; see set_epoch.
        input_channels: 1 (grey), 3 (RGB) or 4 (RGBA).
        size: (height, width) to which everything is resized, or None.
        mean, std: one float per channel, for standardise; by default images are only divided by 255.
        cutmix: the fraction of the items, in [0, 1], that get a rectangle of another item; see augmentation.paste.
        seed: of the random streams.

    An item is image (C, H, W) float32, mask (num_classes, H, W) float32 of 0 and 1, {"img_id": id}.
    """

    def __init__(
        self,
        img_ids,
        img_dir,
        mask_dir,
        img_ext,
        mask_ext,
        num_classes,
        transform=None,
        *,
        input_channels=3,
        size=None,
        mean=None,
        std=None,
        seed=0,
        cutmix=0.0,
    ):
        if input_channels not in (1, 3, 4):
            raise ValueError(f"input_channels {input_channels}: expected 1 (grey), 3 (RGB) or 4 (RGBA)")
        self.img_ids = list(img_ids)
        self.img_dir, self.mask_dir = Path(img_dir), Path(mask_dir)
        self.img_ext, self.mask_ext, self.num_classes = img_ext, mask_ext, num_classes
        self.transform, self.input_channels, self.size, self.seed = transform, input_channels, size, seed
        self.mean = mean or [0.0] * input_channels
        self.std = std or [1.0] * input_channels
        self.cutmix = cutmix
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # persistent workers see it change
        self._cache = None

    def __len__(self):
        return len(self.img_ids)

    def set_epoch(self, epoch):
        """Call it before each epoch, or the augmentations of all epochs are the same."""
        self.epoch.fill_(epoch)

    def __getitem__(self, index):
        stream = np.random.default_rng((self.seed, int(self.epoch), index))
        image, mask = self.augmented(index, stream)
        if self.cutmix and stream.random() < self.cutmix:
            image, mask = paste(image, mask, *self.augmented(int(stream.integers(len(self))), stream), stream)
        image = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        mask = torch.from_numpy(np.ascontiguousarray(mask.transpose(2, 0, 1)))
        return standardise(image, self.mean, self.std), mask.float(), {"img_id": self.img_ids[index]}

    def augmented(self, index, stream):
        """The item after the transform, which draws from a numpy Generator: image (H, W, C) and mask, uint8."""
        return self.transformed(*self.arrays(index), stream)

    def transformed(self, image, mask, stream):
        """What the transform makes of image (H, W, C) and mask (H, W[, K]), which moves with the image."""
        if self.transform is None:
            return image, mask
        self.transform.set_random_state(stream, random.Random(int(stream.integers(2**62))))
        if self.input_channels != 4:
            drawn = self.transform(image=image, mask=mask)
            return drawn["image"], drawn["mask"]
        # alpha moves with the mask, and keeps its values as the mask does
        drawn = self.transform(image=image[..., :3], mask=np.dstack([mask, image[..., 3]]))
        return np.dstack([drawn["image"], drawn["mask"][..., -1]]), drawn["mask"][..., :-1]

    def arrays(self, index):
        """The item before augmentation: image (H, W, C) uint8, mask (H, W, num_classes) uint8 of 0 and 1."""
        if self._cache:
            return self._cache[index]
        try:
            item = self._read(self.img_ids[index])
        except ValueError as error:  # check found nothing, so the files have changed since
            said = ", ".join(f"{problem.text}{problem.detail}" for problem in error.args)
            raise OSError(f"{self.img_dir.parent}: {self.img_ids[index]}: {said}") from None
        return item.image, item.mask

    def check(self, cache="auto", each=None):
        """Read every file once, before the first step; raises a ValueError that names all the problems of all files.

        cache: True keeps the decoded arrays in memory, False does not, and "auto" does if they take less than a quarter
        of the machine's memory, divided among its processes.
        each: called with every image, in order.
        Returns a dict: "fingerprint", a hash of ids and files; "sizes", {"width x height" in the files: images}; "mean"
        and "std" of each channel, in [0, 1]; "foreground", the fraction of each class; "two_valued", the number of
        images that are black and white; "bytes", the decoded size; "cached", whether it is kept.
        """
        room = math.inf if cache else 0
        if cache == "auto":
            room = memory() / 4 / local_processes()
        statistics, problems, kept, needed = Statistics(), {}, [], 0
        shown = {"unit": "img", "leave": False, "disable": not is_main() or None}
        for img_id, item in tqdm(self._read_all(), "read", len(self.img_ids), **shown):
            if isinstance(item, ValueError):
                for problem in item.args:
                    problems.setdefault(problem.text, []).append((img_id, problem.detail))
                continue
            statistics.add(item)
            self.note(item)
            if each:
                each(item.image)
            needed += item.image.nbytes + item.mask.nbytes
            if needed < room:
                kept.append((item.image, item.mask))
            else:
                room = 0
                kept.clear()
        if problems:
            lines = []
            for text, found in problems.items():
                (first, detail), ids = found[0], [img_id for img_id, _ in found]
                detail = f"{detail} in {first}" if detail else ""
                lines.append(f"{text}{detail}, {len(ids)} of the ids: {listed(ids, NAMED_AT_MOST)}")
            raise ValueError(f"{self.img_dir.parent}: {'; '.join(lines)}")
        self._cache = kept
        return {**statistics.summary(), "bytes": needed, "cached": bool(kept)}

    def note(self, item):
        """Hook for subclasses: check calls it with every Item, in order."""

    def _read_all(self):
        """Yields (id, Item or the ValueError of _read). Reads at most 64 ids ahead: decoded images are large."""

        def read(img_id):
            try:
                return self._read(img_id)
            except ValueError as error:
                return error

        with ThreadPoolExecutor(os.cpu_count()) as pool:  # OpenCV decodes without holding Python's global lock
            for start in range(0, len(self.img_ids), 64):
                ids = self.img_ids[start : start + 64]
                yield from zip(ids, pool.map(read, ids), strict=True)

    def _read(self, img_id):
        """The Item of an id; raises a ValueError whose args are the Problems of its files."""
        digest, problems = hashlib.blake2b(img_id.encode(), digest_size=16), []
        image = read_file(find_file(self.img_dir, img_id, self.img_ext), "image", digest, problems)
        two_valued, masks = image is not None and is_two_valued(image), []
        for k in range(self.num_classes):
            folder = self.mask_dir / str(k)
            mask = read_file(find_file(folder, img_id, self.mask_ext), "mask", digest, problems)
            if mask is None:
                continue
            if image is not None and mask.shape[:2] != image.shape[:2]:
                sizes = f": {mask.shape[1]} x {mask.shape[0]} and {image.shape[1]} x {image.shape[0]} pixels"
                problems.append(Problem(f"mask and image differ in size ({folder})", sizes))
            if not is_two_valued(mask):
                advice = ": python import_labels.py turns maps of classes or objects into masks"
                if two_valued:
                    advice = "; the image has only these: are images and masks swapped?"
                values = f": {listed(np.unique(mask).tolist())}"
                problems.append(Problem(f"mask values other than 0 and 255, or 0 and 1 ({folder}{advice})", values))
            masks.append(foreground(mask))
        if problems:
            raise ValueError(*problems)
        size, image = image.shape[:2], to_channels(image, self.input_channels)
        if self.size and size != tuple(self.size):
            image, masks = squeeze(image, self.size), [squeeze_mask(mask, self.size) for mask in masks]
        return Item(image, np.stack(masks, axis=2).astype(np.uint8), digest.digest(), size, two_valued)


# ---------------------------------------------------------------- built from a config


def build_dataset(config, ids, augment=False):
    """The Dataset that a run's config describes (dataset, extensions, channels, size, seed; mean and std if known).

    augment: whether to augment as config["augment"] says.
    """
    check_places(config)
    folder, size = INPUTS / config["dataset"], (config["input_h"], config["input_w"])
    parts, transform = config["augment"] if augment else "none", None
    if parts != "none":
        transform = augmentation(parts, *size, rgb=config["input_channels"] > 1)
    return Dataset(
        ids,
        folder / "images",
        folder / "masks",
        config["img_ext"],
        config["mask_ext"],
        config["num_classes"],
        transform,
        input_channels=config["input_channels"],
        size=size,
        mean=config.get("mean"),
        std=config.get("std"),
        seed=config["seed"],
        cutmix=0.5 if "cutmix" in parts else 0.0,
    )


def make_loader(dataset, batch_size, shuffle=False, seed=0, num_workers=0, pin_memory=False):
    """Batches in order, or, with shuffle, in an order drawn from (seed, epoch); call set_epoch(loader, epoch) first.

    The last batch may be smaller: no image is left out. Under torchrun each process gets its share of every shuffled
    batch, and whole batches of those in order.
    """
    if shuffle:  # one replica: SharedBatches divides the batches among the processes after they are drawn
        order = DistributedSampler(dataset, num_replicas=1, rank=0, shuffle=True, seed=seed)
        batches = SharedBatches(order, batch_size)
    else:
        batches = WholeBatches(range(len(dataset)), batch_size)
    return build_loader(dataset, batches, num_workers, pin_memory, seed)
