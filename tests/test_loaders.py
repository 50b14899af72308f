"""loaders.py: what set_epoch reaches, orders, and worker processes; test_distributed.py has the shares of processes."""

import os
import signal

import cv2
import pytest
import torch

from common.loaders import EpochSampler, WholeBatches, build_loader, set_epoch


class Numbers(torch.utils.data.Dataset):
    """Item k is (k, the epoch, the seed that PyTorch gave the worker, OpenCV's threads)."""

    def __init__(self, count=6):
        self.count, self.epoch = count, torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch):
        self.epoch.fill_(epoch)

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        index = index[0] if isinstance(index, tuple) else index
        return index, int(self.epoch), torch.initial_seed() % 2**31, cv2.getNumThreads()


@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_reach_the_dataset_and_the_order(workers):
    loader = build_loader(Numbers(), WholeBatches(EpochSampler(6, seed=1), 4), workers)
    orders = []
    for epoch in (1, 2, 1):
        set_epoch(loader, epoch)
        batches = list(loader)
        assert [len(batch[0]) for batch in batches] == [4, 2]
        assert {seen for batch in batches for seen in batch[1].tolist()} == {epoch}
        orders.append([number for batch in batches for number in batch[0].tolist()])
    assert orders[0] == orders[2] != orders[1] and sorted(orders[0]) == sorted(orders[1]) == list(range(6))


def test_set_epoch_of_what_wants_none():
    set_epoch([1, 2], 3)
    set_epoch(torch.utils.data.DataLoader([1, 2]), 3)
    sampler = torch.utils.data.DistributedSampler(range(8), 1, 0)
    set_epoch(torch.utils.data.DataLoader(range(8), sampler=sampler), 3)
    assert sampler.epoch == 3


def test_workers_have_one_thread_and_seeds_of_their_own():
    loaders = [build_loader(Numbers(), WholeBatches(range(6), 3), 2, seed=seed) for seed in (5, 5, 6)]
    before = torch.random.get_rng_state()
    first, again, other = ([batch[2].tolist() for batch in loader] for loader in loaders)
    assert torch.equal(torch.random.get_rng_state(), before), "the global stream was touched"
    assert first == again != other and first[0] != first[1]
    assert {threads for batch in loaders[0] for threads in batch[3].tolist()} <= {0, 1}  # OpenCV says 1 for none


def test_every_item_once_an_epoch_in_another_order():
    sampler = EpochSampler(20, seed=1)
    orders = []
    for epoch in (1, 2):
        sampler.set_epoch(epoch)
        orders.append([index for index, own in sampler if own == epoch])
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(20)) and orders[0] != orders[1]
    assert list(EpochSampler(3, shuffle=False)) == [(0, 0), (1, 0), (2, 0)]


def test_ctrl_c_while_the_workers_start_comes_after_it(monkeypatch):
    loader = build_loader(Numbers(), WholeBatches(range(6), 2), 2)
    start, started = torch.utils.data.DataLoader.__iter__, []

    def interrupted(self):
        os.kill(os.getpid(), signal.SIGINT)
        started.append(start(self))
        return started[0]

    monkeypatch.setattr(torch.utils.data.DataLoader, "__iter__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        iter(loader)
    assert len(started) == 1 and len(list(started[0])) == 3  # the workers are whole
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
