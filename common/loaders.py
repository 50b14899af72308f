"""Which process takes which images, and loader processes that neither warn nor answer signals.

loader = DataLoader(dataset, batch_sampler=SharedBatches(sampler, 16), worker_init_fn=leave_signals_to_main)
"""

import os
import signal
import warnings

from common.distributed import rank, world_size


def quieten_loaders():
    """PyTorch's loaders warn of more workers than cores, when that was asked for, and that Python 3.12 sees a fork."""
    warnings.filterwarnings("ignore", "This DataLoader will create")
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)


def leave_signals_to_main(worker_id):
    """For a loader's worker processes: a terminal sends Ctrl-C and a cluster SIGTERM to all, but one shall answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # torch itself ends a stuck worker so


def share(items):
    """This process's contiguous part of a list; the parts differ by one item at most, the first are the larger."""
    count, each = world_size(), len(items) // world_size()
    larger = len(items) % count  # parts that are one item longer
    start = rank() * each + min(rank(), larger)
    return items[start : start + each + (rank() < larger)]


class WholeBatches:
    """This process's part of the batches of a validation, as a DataLoader's batch_sampler; none comes twice.

    sampler: the order of all items, the same in every process, with or without set_epoch; batches are cut from it.
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

    The batches are those of one process, and each is cut into shares. In a last batch of fewer items than processes,
    those without one take its first item, since all must take part; with_shares says that theirs does not count.
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
    """Batches of a training, each with its number of own items that count and that of all processes.

    A mean over the own items, weighted with own * world_size() / total, has gradients whose average over the processes
    is the gradient of the mean over the global batch.
    """
    batches = getattr(loader, "batch_sampler", None)
    if isinstance(batches, SharedBatches):
        for batch, (own, total) in zip(loader, batches.sizes(), strict=True):
            yield batch, own, total
        return
    if world_size() > 1:
        raise ValueError("several processes need a loader whose batch_sampler is a distributed.SharedBatches")
    for batch in loader:
        yield batch, len(batch[0]), len(batch[0])
