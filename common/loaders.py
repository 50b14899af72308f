"""Batches and loader processes, for both jobs: which process takes which items, in which order, and how they load.

batches = SharedBatches(EpochSampler(len(dataset), seed=0), batch_size=16)
loader = build_loader(dataset, batches, num_workers=4)
set_epoch(loader, 1)
"""

import os
import random
import signal
import threading
import warnings

import cv2
import torch
from torch.utils.data import DataLoader

from common.distributed import rank, world_size

# ---------------------------------------------------------------- loaders


def build_loader(dataset, batch_sampler, num_workers=0, pin_memory=False, seed=0):
    """A DataLoader of the batches of batch_sampler, lists of the dataset's indices, loaded by num_workers processes.

    The workers persist from epoch to epoch. The seed keeps the loader from drawing from the global random stream.
    """
    quieten_loaders()
    return Loader(
        dataset,
        batch_sampler=batch_sampler,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        generator=torch.Generator().manual_seed(seed),
        worker_init_fn=start_worker,
    )


class Loader(DataLoader):
    """A DataLoader that handles a Ctrl-C after it has started its workers; during a fork it would be lost."""

    def __iter__(self):
        if not self.num_workers or threading.current_thread() is not threading.main_thread():
            return super().__iter__()
        held = []
        before = signal.signal(signal.SIGINT, lambda *received: held.append(received))  # the workers inherit it
        try:
            iterator = super().__iter__()
        finally:
            signal.signal(signal.SIGINT, before)
        if held and callable(before):
            before(*held[0])
        return iterator


def quieten_loaders():
    """Silence PyTorch about more workers than cores, when the user asked for them, and Python 3.12 about forks."""
    warnings.filterwarnings("ignore", "This DataLoader will create")
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)


def start_worker(worker_id):
    """The worker_init_fn: one thread per worker, and signals are left to the main process.

    A terminal sends Ctrl-C, and a cluster SIGTERM, to all processes, but only one should respond.
    """
    cv2.setNumThreads(0)  # the workers are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # PyTorch ends a stuck worker this way


def set_epoch(loader, epoch):
    """Pass the epoch to whichever of the loader, its dataset, its sampler and its batch sampler has a set_epoch."""
    parts = [getattr(loader, name, None) for name in ("dataset", "sampler", "batch_sampler")]
    for part in (loader, *parts):
        if hasattr(part, "set_epoch"):
            part.set_epoch(epoch)


# ---------------------------------------------------------------- orders


def stream(*parts):
    """A seed for each (seed, epoch, index): it does not depend on workers, on the order or on resuming."""
    return random.Random(" ".join(map(str, parts))).getrandbits(63)


class EpochSampler(torch.utils.data.Sampler):
    """(index, epoch) pairs in an order drawn from (seed, epoch). Call set_epoch before each epoch."""

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


# ---------------------------------------------------------------- batches of several processes


def share(items):
    """This process's contiguous part of a list. The parts differ by at most one item; the first ones are larger."""
    count, each = world_size(), len(items) // world_size()
    larger = len(items) % count  # parts that have one item more
    start = rank() * each + min(rank(), larger)
    return items[start : start + each + (rank() < larger)]


class WholeBatches:
    """This process's share of the batches of a validation, as a DataLoader's batch_sampler; each batch comes once.

    sampler: the order of all items, the same in every process, with or without set_epoch. Batches are cut from it.
    """

    def __init__(self, sampler, batch_size, drop_last=False):
        self.sampler, self.batch_size, self.drop_last = sampler, batch_size, drop_last

    def set_epoch(self, epoch):
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def _of_all(self, items):
        """The batches of all processes."""
        batches = [items[start : start + self.batch_size] for start in range(0, len(items), self.batch_size)]
        return batches[:-1] if self.drop_last and len(batches[-1]) < self.batch_size else batches

    def __len__(self):
        return len(share(self._of_all(range(len(self.sampler)))))

    def __iter__(self):
        return iter(share(self._of_all(list(self.sampler))))


class SharedBatches(WholeBatches):
    """This process's share of every batch of a training, as a DataLoader's batch_sampler.

    The batches are those of a single process; each is divided among the processes. If the last batch has fewer items
    than there are processes, those without an item take its first one, because all must take part in a step;
    with_shares says that it does not count.
    """

    def __init__(self, sampler, batch_size, drop_last=False):
        if batch_size < world_size():
            raise ValueError(
                f"--batch_size {batch_size} is shared by {world_size()} processes; give at least {world_size()}"
            )
        super().__init__(sampler, batch_size, drop_last)

    def __len__(self):
        return len(self.sizes())

    def __iter__(self):
        return iter([share(batch) or batch[:1] for batch in self._of_all(list(self.sampler))])

    def sizes(self):
        """(items of this process that count, items of all processes) of each batch."""
        return [(len(share(batch)), len(batch)) for batch in self._of_all(range(len(self.sampler)))]


def with_shares(loader):
    """Yields (batch, own, total): each batch, and how many items of this process and of all processes count.

    Weight the mean loss over the own items with own * world_size() / total: the average of its gradients over the
    processes is then the gradient of the mean over the global batch.
    """
    batches = getattr(loader, "batch_sampler", None)
    if isinstance(batches, SharedBatches):
        for batch, (own, total) in zip(loader, batches.sizes(), strict=True):
            yield batch, own, total
        return
    if world_size() > 1:
        raise ValueError("several processes need a loader whose batch_sampler is a loaders.SharedBatches")
    for batch in loader:
        yield batch, len(batch[0]), len(batch[0])
