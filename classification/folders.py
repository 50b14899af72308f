"""The transfer job's data: pictures in one folder per class, decoded and shrunk once, augmented reproducibly.

<root>/train/<class>/**/*.jpg and <root>/val/<class>/**/*.jpg

classes, samples, notes = list_pictures("inputs/hymenoptera_data")
dataset = Pictures(samples["train"], img_size=224, augmentation=augmentation(224), seed=0)
image, label = dataset[0, 5]   # picture 0 as epoch 5 sees it: (3, 224, 224) float32, int
"""

import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional
from tqdm import tqdm

from common.cli import listed
from common.devices import precision, to_device
from common.distributed import gather, is_main, local_processes
from common.images import EXTENSIONS, MAX_PIXELS, is_picture, read_thumbnail, standardise
from common.loaders import set_epoch, stream

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, for RGB in [0, 1]; the weights expect them
RESIZE = 256 / 224  # validation takes the middle 224 of a shorter side of 256, as torchvision's weights expect
KEEP = 320 / 224  # shorter side in memory, in units of img_size: a crop of half its area is not enlarged
CACHE_BYTES = 4 * 2**30


# ---------------------------------------------------------------- lists


def list_pictures(root, val_fraction=0.2, seed=0):
    """The folder of a data set -> (classes, {"train": [(path, label), ...], "val": [...]}, notes), all sorted.

    Without a folder val/, a seeded, stratified draw takes val_fraction of the pictures for it. Notes are sentences
    about what was drawn or skipped. Raises FileNotFoundError or ValueError when there is nothing to learn from.
    """
    root = _find_root(Path(root))
    train_dir = root / "train" if (root / "train").is_dir() else root
    classes = _class_folders(train_dir)
    if len(classes) < 2:
        raise ValueError(f"{train_dir} holds {len(classes)} class folder(s); expected two or more")
    found, strays = _list_classes(train_dir, classes)
    samples, notes = {"train": found}, []
    if train_dir != root and (root / "val").is_dir():
        if unknown := sorted(set(_class_folders(root / "val")) - set(classes)):
            raise ValueError(f"{root / 'val'} has classes that {train_dir} lacks: {', '.join(unknown)}")
        present = [name for name in classes if (root / "val" / name).is_dir()]
        if not present:
            raise ValueError(f"{root / 'val'} holds no class folder; expected {', '.join(classes)}, or no val/ at all")
        samples["val"], more = _list_classes(root / "val", present, classes)
        strays += more
        if absent := sorted(set(classes) - set(present)):
            notes.append(f"{root / 'val'} has no pictures of {', '.join(absent)}")
    else:
        samples["train"], samples["val"] = stratified_split(found, val_fraction, seed)
        notes.append(
            f"{root} has no val folder: {len(samples['val'])} of {len(found)} pictures drawn for it (seed {seed})"
        )
    if strays:
        notes.append(f"skipped {listed(strays)}: none of {' '.join(EXTENSIONS)}")
    return classes, samples, notes


def _find_root(root):
    """The folder that holds train/, which may be one level deeper, where a zip was unpacked."""
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    inner = [path for path in root.iterdir() if path.is_dir() and not path.name.startswith((".", "__"))]
    return inner[0] if len(inner) == 1 and inner[0].name != "train" and (inner[0] / "train").is_dir() else root


def _class_folders(folder):
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "__")))


def _list_classes(folder, names, classes=None):
    """The pictures in these class folders -> ([(path, label)], strays); labels are positions in `classes`."""
    samples = []
    strays = [path for path in folder.iterdir() if path.is_file()]
    for name in names:
        files = [path for path in sorted((folder / name).rglob("*")) if path.is_file()]
        pictures = [path for path in files if is_picture(path)]
        if not pictures:
            raise ValueError(
                f"{folder / name} holds no picture ({' '.join(EXTENSIONS)}); add some or remove the folder"
            )
        samples += [(path, (classes or names).index(name)) for path in pictures]
        strays += [path for path in files if not is_picture(path)]
    return samples, sorted(path for path in strays if not path.name.startswith("."))


def stratified_split(samples, fraction, seed):
    """Samples -> (train, val). A seeded draw moves `fraction` of each class to val, at least one and never all."""
    val = set()
    for label in sorted({label for _, label in samples}):
        own = [sample for sample in samples if sample[1] == label]
        if len(own) < 2:
            raise ValueError(f"{own[0][0].parent} holds one picture; a split needs two of each class, or a val folder")
        val.update(random.Random(f"{seed} {label}").sample(own, min(len(own) - 1, max(1, round(fraction * len(own))))))
    return [sample for sample in samples if sample not in val], [sample for sample in samples if sample in val]


# ---------------------------------------------------------------- one picture


def read_tensor(path, img_size, max_pixels=MAX_PIXELS):
    """A file -> (3, H, W) uint8 RGB, large enough for crops of img_size; ValueError when it is damaged.

    It is a view of (H, W, 3) bytes, the layout that torchvision resizes fastest.
    """
    return torch.from_numpy(read_thumbnail(path, round(KEEP * img_size), max_pixels)).permute(2, 0, 1)


def middle(picture, img_size):
    """(3, H, W) uint8 -> (3, img_size, img_size): the middle square, which validation and prediction see."""
    height, width = picture.shape[-2:]
    side = max(1, round(min(height, width) / RESIZE))
    top, left = (height - side) // 2, (width - side) // 2
    return functional.resized_crop(picture, top, left, side, side, [img_size, img_size], antialias=True)


def augmentation(img_size, min_scale=0.5, jitter=0.2):
    """The transform of training, for (3, H, W) uint8: a random crop of at least min_scale of the area, flip, colour."""
    return v2.Compose(
        [
            v2.RandomResizedCrop(img_size, scale=(min_scale, 1), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(jitter, jitter, jitter),
        ]
    )


# ---------------------------------------------------------------- data set


class Pictures(torch.utils.data.Dataset):
    """Items (3, img_size, img_size) float32 and label, for samples [(path, label)].

    An index is a pair (index, epoch), or an int, which means epoch 0. The augmentation draws from a separate random
    stream for each (seed, epoch, index); without one, an item is the middle of its picture.
    The constructor decodes every file, in threads, and raises a ValueError that names the damaged ones. The shrunk
    pictures stay in memory if they fit in CACHE_BYTES, which the processes of torchrun on this machine share; otherwise
    files are read again each time.
    """

    def __init__(self, samples, img_size, augmentation=None, seed=0):
        self.samples, self.img_size, self.augmentation, self.seed = samples, img_size, augmentation, seed
        self.kept, self.bytes, broken, room = [], 0, [], CACHE_BYTES / local_processes()
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
            pictures = threads.map(self._read_or_error, (path for path, _ in samples))
            shown = {"unit": "img", "leave": False, "disable": not is_main() or None}
            for picture in tqdm(pictures, "decode", len(samples), **shown):
                if isinstance(picture, ValueError):
                    broken.append(picture)
                elif self.bytes <= room:
                    self.kept.append(picture)
                    self.bytes += picture.nbytes
        if broken:
            raise ValueError(f"{listed(broken)}; repair or remove {'them' if len(broken) > 1 else 'it'}")
        if self.bytes > room:
            self.kept = []

    def _read_or_error(self, path):
        try:
            return read_tensor(path, self.img_size)
        except ValueError as error:
            return error

    def __len__(self):
        return len(self.samples)

    def _picture(self, index):
        if self.kept:
            return self.kept[index]
        try:
            return read_tensor(self.samples[index][0], self.img_size)
        except ValueError as error:  # it was readable at construction, so the file has changed since
            raise OSError(str(error)) from None

    def seen(self, index):
        """The part of a picture that validation looks at, to be shown: (img_size, img_size, 3) uint8."""
        return middle(self._picture(index), self.img_size).permute(1, 2, 0).numpy()

    def __getitem__(self, index):
        index, epoch = index if isinstance(index, tuple) else (index, 0)
        picture, label = self._picture(index), self.samples[index][1]
        if self.augmentation is None:
            return standardise(middle(picture, self.img_size), MEAN, STD), label
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global stream
            torch.random.default_generator.manual_seed(stream(self.seed, epoch, index))
            return standardise(self.augmentation(picture), MEAN, STD), label


# ---------------------------------------------------------------- batches


class Features:
    """Batches of (features, labels) of a frozen body, computed once, or once per epoch where pictures are augmented.

    The processes of torchrun compute the features together, in the batches of `loader`, in the order of the pictures.
    Iterating then yields them in the batches of `batch_sampler`, lists of indices or of (index, epoch) pairs.
    once: whether the features of the first epoch serve all epochs.
    after_step(): called after each batch of `loader`; an exception that it raises ends the training.
    """

    def __init__(self, body, loader, batch_sampler, device, amp, once=False, after_step=lambda: None):
        self.body, self.loader, self.batch_sampler, self.device, self.amp = body, loader, batch_sampler, device, amp
        self.once, self.kept, self.after_step = once, None, after_step

    def __len__(self):
        return len(self.batch_sampler)

    def set_epoch(self, epoch):
        set_epoch(self.loader, epoch)

    @torch.no_grad()
    def compute(self):
        """(N, 512) features and (N,) labels of all pictures, on the device."""
        features, labels = [], []
        for images, targets in self.loader:
            with precision(self.device, self.amp):
                features.append(self.body(to_device(images, self.device, self.amp)).float())
            labels.append(targets.to(self.device))
            self.after_step()
        parts = gather((torch.cat(features).cpu(), torch.cat(labels).cpu()) if features else None)
        features, labels = zip(*filter(None, parts), strict=True)
        return torch.cat(features).to(self.device), torch.cat(labels).to(self.device)

    def __iter__(self):
        if self.kept is None or not self.once:
            self.kept = self.compute()
        features, labels = self.kept
        for batch in self.batch_sampler:
            indices = [index[0] if isinstance(index, tuple) else index for index in batch]
            indices = torch.tensor(indices, device=features.device)
            yield features[indices], labels[indices]
