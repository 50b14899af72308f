"""Many processes, one training: all that torchrun needs. Without torchrun there is one process and nothing happens.

torchrun --nproc_per_node=2 train.py --name run1

    with processes(device) as device:                     # this process's GPU, or the CPU
        loader = DataLoader(dataset, batch_sampler=SharedBatches(sampler, 16))
        parallel_model = parallel(model, device)
        for batch, own, total in with_shares(loader):
            (loss * (own * world_size() / total)).backward()
        every = gather(numbers)                           # one entry per process, in the order of the ranks

The result does not depend on the number of processes: each global batch, its order and its augmentation are those of
one process. Only batch norm sees a part of the batch, unless it is synchronised, and sums round differently.
torch is imported inside the functions that need it, so that `--help` starts fast.
"""

import contextlib
import datetime
import os

PATIENCE = datetime.timedelta(days=1)  # one process may download, or predict a large slide, while the others wait


def launched():
    """The number of processes that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1


def is_main():
    """Whether this is the process that prints and writes what all share, in the block of `processes` and outside."""
    return launched() == 1 or os.environ["RANK"] == "0"


def local_processes():
    """The number of processes that share this machine's memory and processor."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if launched() > 1 else 1


# ---------------------------------------------------------------- the process group


@contextlib.contextmanager
def processes(device):
    """Join torchrun's processes for the length of a block -> the torch.device of this process.

    NCCL connects GPUs, one per process; Gloo connects CPUs. Only the main process prints. ValueError for a device that
    cannot be shared; ConnectionError when another process ends early.
    """
    if launched() == 1:
        yield device
        return
    from torch import distributed

    device = _own_device(device)
    options = {"timeout": PATIENCE, **({"device_id": device} if device.type == "cuda" else {})}
    try:
        with _default_signals():  # nothing is to be tidied up yet
            distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", **options)
    except RuntimeError as error:
        raise ConnectionError(f"torchrun's processes could not be connected: {error}") from None
    try:
        with contextlib.ExitStack() as stack:
            if not is_main():
                stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
            yield device
        distributed.barrier()  # nobody leaves while another still waits for its numbers
    except RuntimeError as error:
        if not (isinstance(error, distributed.DistError) or "gloo" in str(error)):
            raise
        raise ConnectionError("another process has ended; its own message says why") from None
    distributed.destroy_process_group()


def _own_device(device):
    import torch

    if device.type == "cpu":
        return device
    count = launched()
    if device.type != "cuda" or device.index is not None:
        raise ValueError(
            f"--device {device} cannot be shared by {count} processes; start one without torchrun, or give --device cpu"
        )
    index, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if index >= there:
        raise ValueError(
            f"{local_processes()} processes on this machine, but GPUs: {there}; give --nproc_per_node={there}, or "
            "--device cpu"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


@contextlib.contextmanager
def _default_signals():
    """SIGINT and SIGTERM end the process even where Python waits for a library and could not answer them."""
    import signal

    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def world_size():
    """The number of processes of the group; 1 outside of the block of `processes`."""
    if launched() == 1:
        return 1
    from torch import distributed

    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank():
    if world_size() == 1:
        return 0
    from torch import distributed

    return distributed.get_rank()


# ---------------------------------------------------------------- numbers that all must know


def gather(value):
    """[value of the first process, of the second, ...] in every process; any picklable value, of any size."""
    if world_size() == 1:
        return [value]
    import torch
    from torch import distributed

    values = [None] * world_size()
    with torch.inference_mode(False):  # PyTorch 2.5 writes into tensors that it makes for the exchange
        distributed.all_gather_object(values, value)
    return values


def check_same(values):
    """ValueError in every process unless all have the same dict; no process continues before all have called this."""
    for other, found in enumerate(gather(values)):
        if differing := ", ".join(key for key in values if found.get(key) != values[key]):
            raise ValueError(
                f"processes {rank()} and {other} differ in {differing}; start all with the same options and data"
            )


def copy_main(model):
    """Give every process the parameters and buffers of the main one: batch norm's statistics differ between them."""
    if world_size() == 1:
        return
    import torch
    from torch import distributed

    with torch.no_grad():
        for tensor in model.state_dict().values():
            dense = tensor.contiguous()  # channels_last weights are not
            distributed.broadcast(dense, src=0)
            tensor.copy_(dense)


# ---------------------------------------------------------------- models


def parallel(model, device):
    """The model whose backward() averages the gradients of all processes; it shares its parameters with `model`."""
    if world_size() == 1:
        return model
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


def sync_batch_norm(model, device, convert=None):
    """The model with batch norm over the whole global batch. ValueError on other devices than CUDA.

    convert: a function for models with other batch norms than PyTorch's.
    """
    if device.type != "cuda":
        raise ValueError(f"--sync_bn True needs GPUs: PyTorch's SyncBatchNorm does not run on {device.type}")
    from torch.nn import SyncBatchNorm

    convert = convert or SyncBatchNorm.convert_sync_batchnorm
    return convert(model)
