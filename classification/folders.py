"""Class-per-folder pictures: which there are, decoded and shrunk once, augmented the same way in every process.

<root>/train/<class>/**/*.jpg and <root>/val/<class>/**/*.jpg

classes, samples, notes = list_pictures("inputs/hymenoptera_data")
dataset = Pictures(samples["train"], img_size=224, augmentation=augmentation(224), seed=0)
image, label = dataset[5, 0]   # picture 0 as epoch 5 sees it: (3, 224, 224) float32, int
"""

import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional
from tqdm import tqdm

from common.distributed import gather, is_main, local_processes
from common.images import check_pixels, open_picture

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
MAX_PIXELS = 200_000_000  # of one picture, as the largest cameras have: a few bytes can claim to be gigabytes
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, for RGB in [0, 1]; the weights expect them
RESIZE = 256 / 224  # validation looks at the middle 224 of a shorter side of 256, as torchvision's weights do
KEEP = 320 / 224  # pictures in memory: room enough for a crop of half the area without enlarging it
CACHE_BYTES = 4 * 2**30
NAMED_AT_MOST = 5


# ---------------------------------------------------------------- lists


def list_pictures(root, val_fraction=0.2, seed=0):
    """-> (classes, {"train": [(path, label), ...], "val": [...]}, notes), everything sorted.

    A root without val/ is split by a seeded, stratified draw. Notes are sentences about what was skipped or drawn.
    Raises FileNotFoundError or ValueError, one line, for folders nothing can be learned from.
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
        notes.append(f"skipped {_named(strays)}: no {' '.join(EXTENSIONS)}")
    return classes, samples, notes


def _find_root(root):
    """The folder that has train/, which may lie one level deeper, as a zip unpacks."""
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    inner = [path for path in root.iterdir() if path.is_dir() and not path.name.startswith((".", "__"))]
    return inner[0] if len(inner) == 1 and inner[0].name != "train" and (inner[0] / "train").is_dir() else root


def _class_folders(folder):
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "__")))


def _list_classes(folder, names, classes=None):
    """-> ([(path, label)], strays); labels are positions in `classes`."""
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
        strays += [path for path in files if path not in set(pictures)]
    return samples, sorted(path for path in strays if not path.name.startswith("."))


def is_picture(path):
    return path.suffix.lower() in EXTENSIONS and not path.name.startswith(".")


def stratified_split(samples, fraction, seed):
    """-> (train, val): of each class the seeded `fraction`, at least one and never all, goes to val."""
    val = set()
    for label in sorted({label for _, label in samples}):
        own = [sample for sample in samples if sample[1] == label]
        if len(own) < 2:
            raise ValueError(f"{own[0][0].parent} holds one picture; a split needs two of each class, or a val folder")
        val.update(random.Random(f"{seed} {label}").sample(own, min(len(own) - 1, max(1, round(fraction * len(own))))))
    return [sample for sample in samples if sample not in val], [sample for sample in samples if sample in val]


def _named(paths):
    more = f" and {len(paths) - NAMED_AT_MOST} more" if len(paths) > NAMED_AT_MOST else ""
    return ", ".join(map(str, paths[:NAMED_AT_MOST])) + more


# ---------------------------------------------------------------- one picture


def read_picture(path, shorter_side):
    """A file -> (3, H, W) uint8 RGB, upright, its shorter side at most `shorter_side`; ValueError when unreadable.

    Transparent parts become white. The tensor is a view of (H, W, 3) bytes, the layout torchvision resizes fastest.
    """
    try:
        with open_picture(path) as image:
            check_pixels(image.size, MAX_PIXELS)
            image.draft("RGB", _shrunk(image.size, 2 * shorter_side))  # a JPEG decodes to 1/2, 1/4, 1/8 for less work
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16"):
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB")
    except Exception as error:  # a damaged file raises whatever its decoder likes
        raise ValueError(f"{path} is no readable picture ({str(error) or type(error).__name__})") from None
    size = _shrunk(image.size, shorter_side)
    image = image if size == image.size else image.resize(size, Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _shrunk(size, shorter_side):
    factor = min(1, shorter_side / min(size))
    return tuple(max(1, round(side * factor)) for side in size)


def middle(picture, img_size):
    """(3, H, W) -> (3, img_size, img_size): the middle square that validation and prediction see."""
    height, width = picture.shape[-2:]
    side = max(1, round(min(height, width) / RESIZE))
    top, left = (height - side) // 2, (width - side) // 2
    return functional.resized_crop(picture, top, left, side, side, [img_size, img_size], antialias=True)


def augmentation(img_size, min_scale=0.5, jitter=0.2):
    """What training does to a picture: a random crop of at least `min_scale` of its area, a mirror, colour."""
    return v2.Compose(
        [
            v2.RandomResizedCrop(img_size, scale=(min_scale, 1), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(jitter, jitter, jitter),
        ]
    )


def standardise(pictures):
    """(…, 3, H, W) uint8 -> float32, (value / 255 - mean) / std."""
    mean, std = (torch.tensor(values, device=pictures.device).view(3, 1, 1) for values in (MEAN, STD))
    return (pictures.float() / 255 - mean) / std


# ---------------------------------------------------------------- data set


class Pictures(torch.utils.data.Dataset):
    """(3, img_size, img_size) float32 and the label of each sample; indices are (index, epoch) pairs or plain indices.

    Every file is decoded at construction, in threads, so that an unreadable one is reported before the training begins.
    The shrunk pictures stay in memory while they fit in CACHE_BYTES (of all processes of torchrun on this machine
    together), else files are read again each time.
    augmentation: None gives the middle of each picture, the same in every epoch.
    """

    def __init__(self, samples, img_size, augmentation=None, seed=0, label="decode"):
        self.samples, self.img_size, self.augmentation, self.seed = samples, img_size, augmentation, seed
        self.kept, self.bytes, broken, room = [], 0, [], CACHE_BYTES / local_processes()
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
            pictures = threads.map(self._read_or_error, (path for path, _ in samples))
            shown = {"unit": "img", "leave": False, "disable": not is_main() or None}
            for picture in tqdm(pictures, label, len(samples), **shown):
                if isinstance(picture, ValueError):
                    broken.append(picture)
                elif self.bytes <= room:
                    self.kept.append(picture)
                    self.bytes += picture.nbytes
        if broken:
            more = f"; {len(broken) - 1} more files like it" if len(broken) > 1 else ""
            raise ValueError(f"{broken[0]}{more}; repair or remove it")
        if self.bytes > room:
            self.kept = []

    def _read_or_error(self, path):
        try:
            return self._read(path)
        except ValueError as error:
            return error

    def _read(self, path):
        return read_picture(path, round(KEEP * self.img_size))

    def __len__(self):
        return len(self.samples)

    def _picture(self, index):
        if self.kept:
            return self.kept[index]
        try:
            return self._read(self.samples[index][0])
        except ValueError as error:  # it was readable at the start: the files have changed since
            raise OSError(str(error)) from None

    def seen(self, index):
        """What the network looks at in validation, for people: (img_size, img_size, 3) uint8."""
        return middle(self._picture(index), self.img_size).permute(1, 2, 0).numpy()

    def __getitem__(self, index):
        index, epoch = index if isinstance(index, tuple) else (index, 0)
        picture, label = self._picture(index), self.samples[index][1]
        if self.augmentation is None:
            return standardise(middle(picture, self.img_size)), label
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global stream; leave that as it was
            torch.random.default_generator.manual_seed(stream(self.seed, epoch, index))
            return standardise(self.augmentation(picture)), label


def stream(*parts):
    """A seed of its own for every (seed, epoch, index): independent of workers, of order and of resuming."""
    return random.Random(" ".join(map(str, parts))).getrandbits(63)


class EpochSampler(torch.utils.data.Sampler):
    """(index, epoch) pairs in an order drawn from (seed, epoch); set_epoch before each epoch, as DistributedSampler."""

    def __init__(self, length, seed=0, shuffle=True):
        self.length, self.seed, self.shuffle, self.epoch = length, seed, shuffle, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return self.length

    def __iter__(self):
        generator = torch.Generator().manual_seed(stream(self.seed, self.epoch, "order"))
        order = torch.randperm(self.length, generator=generator).tolist() if self.shuffle else range(self.length)
        return iter([(index, self.epoch) for index in order])


# ---------------------------------------------------------------- batches


def to_device(images, device, amp):
    """(N, 3, H, W) on the device, channels last where mixed precision runs, because its kernels prefer that."""
    layout = torch.channels_last if amp is not None and images.dim() == 4 else torch.contiguous_format
    return images.to(device, non_blocking=True, memory_format=layout)


def set_epoch(loader, epoch):
    """Tell the loader, or its sampler of items or batches, the epoch, where it wants to know."""
    for listener in (loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)):
        if hasattr(listener, "set_epoch"):
            listener.set_epoch(epoch)


class Features:
    """Batches of (features, labels) of a fixed body: computed once, or once an epoch where the pictures change.

    Features are computed in large batches, in the pictures' order, by all processes of torchrun together; the head then
    sees them in the batches of `batch_sampler`, lists of indices or of (index, epoch) pairs.
    after_step(): called after each of the large ones; what it raises ends the training.
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
        """-> (N, 512) features and (N,) labels of all pictures, on the device."""
        features, labels = [], []
        for images, targets in self.loader:
            with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None):
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
