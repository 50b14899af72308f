"""Everything between a file and a tensor: ids, split, checks, augmentation, standardisation, loaders.

inputs/<dataset>/images/<id><img_ext>  and  inputs/<dataset>/masks/<class>/<id><mask_ext>   (0, 1 ... one a class)

dataset = Dataset(ids, "inputs/demo_96/images", "inputs/demo_96/masks", ".png", ".png", num_classes=1)
image, mask, info = dataset[0]   # (3, H, W) float32, (1, H, W) float32 of 0 and 1, {"img_id": ...}
"""

import hashlib
import os
import random
import signal
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, DistributedSampler

from common.devices import memory
from common.distributed import local_processes
from common.files import is_plain_name
from common.images import decode, foreground, squeeze, squeeze_mask, to_channels
from common.loaders import SharedBatches, WholeBatches, leave_signals_to_main, quieten_loaders

ABOUT = ("sizes", "fingerprint")  # what split.yml keeps of Dataset.check, for each part
GROUPED = "grouped"  # what --split takes beside a file of ids
AUGMENTATIONS = ("flips", "mild", "colour", "copies", "affine", "cutmix")  # the parts that --augment puts together
NAMED_AT_MOST = 20  # ids of one kind of problem that a message names; the rest is counted


# ---------------------------------------------------------------- ids and split


def list_ids(img_dir, img_ext):
    """The ids of a folder of images, sorted, because the order of a directory differs between machines."""
    if not Path(img_dir).is_dir():
        raise FileNotFoundError(
            f"{img_dir}: no such folder; preprocess_dsb2018.py makes a data set (--download, --demo)"
        )
    names = [path.name for path in Path(img_dir).iterdir() if path.is_file() and not path.name.startswith(".")]
    ids = sorted(name.removesuffix(img_ext) for name in names if name.endswith(img_ext) and name != img_ext)
    if not ids:
        raise ValueError(f"{img_dir} holds no *{img_ext} file; check --dataset and --img_ext")
    return ids


def split_ids(ids, split_seed=41):
    """{"train": 80 %, "val": 20 %} of the ids, as scikit-learn's train_test_split of the sorted ids draws them."""
    from sklearn.model_selection import train_test_split

    if len(ids) < 2:
        raise ValueError(f"a split needs at least 2 images, found {len(ids)}")
    train, val = train_test_split(sorted(ids), test_size=0.2, random_state=split_seed)
    return {"train": train, "val": val}


def check_split(content, source):
    """The mapping in a split.yml -> {"train": [...], "val": [...]} and "test" where it has one; else ValueError.

    Every list holds ids as text and no id stands twice.
    """
    split = {part: content[part] for part in ("train", "val", "test") if content.get(part)}
    if "train" not in split or "val" not in split:
        raise ValueError(f"{source}: expected the lists `train:` and `val:` (and, if wanted, `test:`) of image ids")
    seen = {}
    for part, ids in split.items():
        if not isinstance(ids, list) or not all(isinstance(img_id, str) for img_id in ids):
            raise ValueError(f"{source}: `{part}` must be a list of texts; put ids that look like numbers in quotes")
        for img_id in ids:
            if not is_plain_name(img_id):
                raise ValueError(f"{source}: {img_id!r} cannot be the name of an image")
            if img_id in seen:
                raise ValueError(f"{source}: {img_id} stands in {seen[img_id]} and again in {part}")
            seen[img_id] = part
    return split


def changes(split, ids, found, every=True):
    """What differs from the data that a run's split.yml describes, in words, [] when nothing does.

    split: the content of split.yml; ids: those of the folder now; found: {part: what Dataset.check found, now};
    every: whether the split was of every image there was, so that others are new.
    """
    known = {img_id: part for part in ("train", "val", "test") for img_id in split.get(part) or ()}
    missing, new = sorted(known.keys() - set(ids)), sorted(set(ids) - known.keys())
    said = [f"{len(missing)} of its images are gone ({name_ids(missing, 3)})"] if missing else []
    if new and every:
        said.append(f"{len(new)} images are new ({name_ids(new, 3)})")
    for part, now in found.items():
        sizes, fingerprint = (about.get(part) if isinstance(about, dict) else None for about in map(split.get, ABOUT))
        if isinstance(sizes, dict) and now["sizes"] != sizes:
            said.append(f"the {part} images are {' and '.join(now['sizes'])}, then {' and '.join(map(str, sizes))}")
        elif now["fingerprint"] != fingerprint:
            said.append(f"the {part} images or masks have other contents")
    return said


def check_places(config):
    """ValueError when the data set or an extension of a config leads out of inputs/."""
    folder = Path(config["dataset"])
    if folder.is_absolute() or ".." in folder.parts or "\0" in config["dataset"]:
        raise ValueError(f"dataset {config['dataset']!r}: expected the name of a folder of inputs/")
    for key in ("img_ext", "mask_ext"):
        if not is_plain_name(f"id{config[key]}"):
            raise ValueError(f"{key} {config[key]!r}: expected the end of a file's name, such as .png")


# ---------------------------------------------------------------- what a network sees


def standardise(images, mean, std):
    """uint8 (..., C, H, W) in [0, 255] -> float32, divided by 255, minus mean, over std (sequences of C floats).

    The one place where a pixel becomes a number that a network sees: training, validation, prediction and export.
    """
    mean = torch.as_tensor(mean, dtype=torch.float32, device=images.device).view(-1, 1, 1)
    std = torch.as_tensor(std, dtype=torch.float32, device=images.device).view(-1, 1, 1)
    return (images.float() / 255 - mean) / std


def augmentation(parts, input_h, input_w, rgb=True):
    """An albumentations Compose of the parts of --augment, a text such as "flips,mild", for uint8 images and masks.

    flips: the eight flips and rotations by 90 degrees (four flips where height and width differ).
    mild, colour: brightness, contrast and (RGB only) hue and saturation, a little or a lot, colour with gamma too. All
        in proportion to the picture: a shift of 15 % of 255 levels would turn a dim picture of fluorescence black.
    copies: now and then the negative and (RGB only) the grey picture, as fluorescence is to histology.
    affine: half of the pictures turned by any angle, scaled by 0.7 to 1.4, shifted by up to a tenth, mirrored outside.
    Alpha is none of the images' channels here: Dataset moves it with the masks.
    cutmix is none of its parts: it takes two items, and Dataset does it.
    """
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # it asks the network for its newest version at import
    import albumentations as A  # late: validation does without its three seconds

    parts, chosen = parts.split(","), []
    if "affine" in parts:
        place = {"scale": (0.7, 1.4), "keep_ratio": True, "rotate": (-180, 180), "translate_percent": (-0.1, 0.1)}
        chosen.append(A.Affine(**place, border_mode=cv2.BORDER_REFLECT_101, p=0.5))
    if "flips" in parts:
        chosen += [A.D4(p=1)] if input_h == input_w else [A.HorizontalFlip(p=0.5), A.VerticalFlip(p=0.5)]
    for part, light, hue, saturation in (("mild", 0.15, 10, 15), ("colour", 0.3, 30, 40)):
        if part in parts:
            light = (-light, 0.15)  # more would turn the nuclei of bright pictures white
            chosen.append(A.RandomBrightnessContrast(light, light, brightness_by_max=False, p=0.5))
            chosen += [A.RandomGamma(gamma_limit=(60, 120), p=0.5)] * (part == "colour")
            chosen += [A.HueSaturationValue(hue, saturation, val_shift_limit=0, p=0.5)] * rgb
    if "copies" in parts:
        chosen += [A.ToGray(p=0.1)] * rgb + [A.InvertImg(p=0.1)]
    return A.Compose(chosen)


def paste(image, mask, other_image, other_mask, stream):
    """CutMix (Yun et al., ICCV 2019, https://arxiv.org/abs/1905.04899): a rectangle of another item replaces its own.

    Arrays (H, W, C); the sides of the rectangle are a quarter to three quarters of the picture's. Returns new arrays.
    """
    h, w = image.shape[:2]
    height, width = (max(1, round(side * stream.uniform(0.25, 0.75))) for side in (h, w))
    top, left = stream.integers(h - height + 1), stream.integers(w - width + 1)
    part = slice(top, top + height), slice(left, left + width)
    image, mask = image.copy(), mask.copy()
    image[part], mask[part] = other_image[part], other_mask[part]
    return image, mask


def is_two_valued(array):
    """Are all values of (H, W[, C]) 0 and 255, or all 0 and 1, as in a mask? Alpha says nothing."""
    values = array if array.ndim == 2 else array[..., :3]
    sparse = values[::8, ::8]  # tells of most pictures that they are none
    return any(np.isin(sparse, pair).all() and np.isin(values, pair).all() for pair in ((0, 255), (0, 1)))


def name_ids(ids, at_most=NAMED_AT_MOST):
    return ", ".join(ids[:at_most]) + (f" and {len(ids) - at_most} more" if len(ids) > at_most else "")


def _named(problem, ids):
    return f"{problem}, {len(ids)} of the ids: {name_ids(ids)}"


class Dataset(torch.utils.data.Dataset):
    """Images and masks of a prepared data set.

    Args:
        img_ids: ids, in the order of the items.
        img_dir, mask_dir: folders; images are `img_dir/<id><img_ext>`, masks `mask_dir/<class>/<id><mask_ext>`.
        num_classes: folders 0 ... num_classes - 1 of mask_dir.
        transform: an albumentations Compose or None. It draws from a stream of its own for each (seed, epoch, item),
            so that neither workers nor processes nor a resumed run change it; see set_epoch.
        input_channels: 1 (grey), 3 (RGB) or 4 (RGBA).
        size: (height, width) that everything is resized to, or None.
        mean, std: for standardise, a float a channel; by default the image is only divided by 255.
        cutmix: the part of the items, in [0, 1], that get a rectangle of another item; see paste.

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
        """Every epoch gets its own augmentations."""
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
        """The item as the transform draws it from a numpy Generator: image (H, W, C) uint8, mask likewise."""
        image, mask = self.arrays(index)
        if self.transform is None:
            return image, mask
        self.transform.set_random_state(stream, random.Random(int(stream.integers(2**62))))
        if self.input_channels != 4:
            drawn = self.transform(image=image, mask=mask)
            return drawn["image"], drawn["mask"]
        drawn = self.transform(image=image[..., :3], mask=np.dstack([mask, image[..., 3]]))  # alpha moves, but no more
        return np.dstack([drawn["image"], drawn["mask"][..., -1]]), drawn["mask"][..., :-1]

    def arrays(self, index):
        """The item before augmentation: image (H, W, C) uint8, mask (H, W, num_classes) uint8 of 0 and 1."""
        if self._cache:
            return self._cache[index]
        try:
            return self._read(self.img_ids[index])[:2]
        except ValueError as error:  # check found nothing: the files have changed since
            raise OSError(f"{self.img_dir.parent}: {self.img_ids[index]}: {', '.join(error.args)}") from None

    def check(self, cache="auto", each=None):
        """Read every file once, before the first step: raises ValueError naming all that is wrong with any of them.

        cache: True keeps the decoded arrays in memory, False does not, "auto" does when they take less than a quarter
        of the machine's memory (or of 8 GB where that is not known), shared by the processes on this machine.
        each: called with every image, in order.
        Returns {"fingerprint", "sizes", "mean", "std", "foreground", "two_valued", "bytes", "cached"}: a hash of ids
        and files, how many images have which size in their files, the channels' statistics in [0, 1], the foreground
        fraction of each class, the number of images in black and white alone, the decoded size, whether it is kept.
        """
        problems, kept, sums, digests, sizes = {}, [], [], [], Counter()
        keep, two_valued = cache is not False, 0

        for img_id, item in self._read_all():
            if isinstance(item, ValueError):
                for problem in item.args:
                    problems.setdefault(problem, []).append(img_id)
                continue
            image, mask, digest, (height, width, black_and_white) = item
            sizes[f"{width} x {height}"] += 1
            two_valued += black_and_white
            if each:
                each(image)
            pixels = image.reshape(-1, image.shape[2]) / 255.0
            sums.append((len(pixels), pixels.sum(0), (pixels**2).sum(0), mask.sum((0, 1), dtype=np.int64)))
            digests.append(digest)
            size = (image.nbytes + mask.nbytes) * len(self)
            keep = keep and (cache is True or size < memory() / 4 / local_processes())
            if keep:
                kept.append((image, mask))
            else:
                kept.clear()
        if problems:
            raise ValueError(f"{self.img_dir.parent}: " + "; ".join(map(_named, *zip(*problems.items(), strict=True))))
        count, total, squares, covered = (sum(column) for column in zip(*sums, strict=True))
        self._cache = kept
        mean = total / count
        variance = squares / count - mean**2
        variance = np.maximum(variance, max(variance.max() / 16, 1e-6))  # empty channels would get hundreds of sigmas
        return {
            "fingerprint": hashlib.blake2b(b"".join(digests), digest_size=16).hexdigest(),
            "sizes": dict(sorted(sizes.items(), key=lambda item: (-item[1], item[0]))[:NAMED_AT_MOST]),
            "mean": [round(float(value), 6) for value in mean],
            "std": [round(float(value), 6) for value in np.sqrt(variance)],
            "foreground": [float(value) for value in covered / count],
            "two_valued": two_valued,
            "bytes": size,
            "cached": bool(kept),
        }

    def _read_all(self):
        """Yields (id, _read's tuple or its ValueError), a few ids at a time: decoded images that wait need memory."""

        def read(img_id):
            try:
                return self._read(img_id)
            except ValueError as error:
                return error

        with ThreadPoolExecutor(os.cpu_count()) as pool:  # OpenCV decodes outside Python's global lock
            for start in range(0, len(self), 64):
                ids = self.img_ids[start : start + 64]
                yield from zip(ids, pool.map(read, ids), strict=True)

    def _read(self, img_id):
        """-> image (H, W, C) uint8, mask (H, W, num_classes) uint8 of 0 and 1, digest of the files, and of the image
        as stored (height, width, is it black and white alone).

        Raises a ValueError whose args are all that is wrong with this id's files.
        """
        digest, problems = hashlib.blake2b(img_id.encode(), digest_size=16), []

        def content(path, what):
            if not path.is_file():
                problems.append(f"no {what} ({path.parent})")
                return None
            data = path.read_bytes()
            digest.update(data)
            try:
                return decode(data)
            except ValueError as error:
                problems.append(f"{what} {error} ({path.parent})")
                return None

        image, masks = content(self.img_dir / f"{img_id}{self.img_ext}", "image"), []
        black_and_white = image is not None and is_two_valued(image)
        for k in range(self.num_classes):
            folder = self.mask_dir / str(k)
            mask = content(folder / f"{img_id}{self.mask_ext}", "mask")
            if mask is None:
                continue
            if image is not None and mask.shape[:2] != image.shape[:2]:
                problems.append(f"mask of another size than its image ({folder})")
            if not is_two_valued(mask):
                swapped = "; the image has these alone: are images and masks swapped?" if black_and_white else ""
                problems.append(f"mask values other than 0 and 255, or 0 and 1 ({folder}{swapped})")
            masks.append(foreground(mask))
        if problems:
            raise ValueError(*problems)
        about = (*image.shape[:2], black_and_white)
        image = to_channels(image, self.input_channels)
        if self.size and image.shape[:2] != tuple(self.size):
            image, masks = squeeze(image, self.size), [squeeze_mask(mask, self.size) for mask in masks]
        return image, np.stack(masks, axis=2).astype(np.uint8), digest.digest(), about


def build_dataset(config, ids, augment=False):
    """The Dataset that a run's config describes (dataset, extensions, channels, size, seed; mean and std if known).

    augment: as the config's `augment` says.
    """
    check_places(config)
    folder, size = Path("inputs") / config["dataset"], (config["input_h"], config["input_w"])
    parts = config["augment"] if augment else "none"
    return Dataset(
        ids,
        folder / "images",
        folder / "masks",
        config["img_ext"],
        config["mask_ext"],
        config["num_classes"],
        augmentation(parts, *size, rgb=config["input_channels"] > 1) if parts != "none" else None,
        input_channels=config["input_channels"],
        size=size,
        mean=config.get("mean"),
        std=config.get("std"),
        seed=config["seed"],
        cutmix=0.5 if "cutmix" in parts else 0.0,
    )


def make_loader(dataset, batch_size, shuffle=False, seed=0, num_workers=0, pin_memory=False):
    """Batches in order, or, with shuffle, in an order of each epoch's own drawn from (seed, epoch).

    The last batch may be smaller: no image is left out, however few there are. Call set_epoch(loader, epoch) first.
    Under torchrun each process gets its share of every shuffled batch, or whole batches of those in order.
    """
    quieten_loaders()
    if shuffle:  # the order of all images: one replica, since the batches are shared after they were drawn
        order = DistributedSampler(dataset, num_replicas=1, rank=0, shuffle=True, seed=seed)
        batches = SharedBatches(order, batch_size)
    else:
        batches = WholeBatches(range(len(dataset)), batch_size)
    return Loader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        generator=torch.Generator().manual_seed(seed),  # leaves the global random stream alone
        worker_init_fn=_quiet_worker,
    )


class Loader(DataLoader):
    """A DataLoader that answers a Ctrl-C during the start of its workers after it: a fork would swallow it."""

    def __iter__(self):
        if not self.num_workers or threading.current_thread() is not threading.main_thread():
            return super().__iter__()
        held = []
        before = signal.signal(signal.SIGINT, lambda *received: held.append(received))  # and no worker answers it
        try:
            iterator = super().__iter__()
        finally:
            signal.signal(signal.SIGINT, before)
        if held and callable(before):
            before(*held[0])
        return iterator


def _quiet_worker(worker_id):
    cv2.setNumThreads(0)  # the processes are the parallelism
    leave_signals_to_main(worker_id)


def set_epoch(loader, epoch):
    loader.dataset.set_epoch(epoch)
    loader.batch_sampler.set_epoch(epoch)
