"""What every script shares: its files, seeds and small helpers. Nothing here knows a model, a loss or a dataset.

torch is imported inside the functions that need it, so that scripts without it (preprocessing) and `--help` start fast.
"""

import argparse
import contextlib
import os
import random
import signal
import warnings
from pathlib import Path

import yaml


def str2bool(value):
    """true/false, yes/no, 1/0 in any case, or a bool -> bool; anything else raises argparse.ArgumentTypeError."""
    answers = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    try:
        return answers[str(value).strip().lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"{value!r} is neither True nor False") from None


# ---------------------------------------------------------------- files


@contextlib.contextmanager
def atomic_path(path):
    """Yields a temporary path beside `path`; on success it is flushed to disk and renamed, on failure removed.

    What the system refuses (a full disk, a folder that is gone) is an OSError that names `path`.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:  # of a write it names no file
        if error.errno is None or error.filename not in (None, str(temporary)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        with contextlib.suppress(OSError):  # in vain on a disk that became read-only; that is not the error to tell
            temporary.unlink()


def write_yaml(path, mapping):
    with atomic_path(path) as temporary:
        temporary.write_text(yaml.safe_dump(mapping, sort_keys=False, allow_unicode=True), encoding="utf-8")


class _Loader(yaml.SafeLoader):
    """Safe YAML whose only booleans are true and false, as in YAML 1.2: `amp: off` is text, and so is an id `no`."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not (tag.endswith(":bool") and first in "yYnNoO")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def read_yaml(path):
    """The mapping in a YAML file; ValueError when it is no YAML mapping, FileNotFoundError when it is not there."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        mapping = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no readable YAML file: {error}") from None
    if not isinstance(mapping, dict):
        raise ValueError(f"{path}: expected `key: value` lines, found {type(mapping).__name__}")
    return mapping


def save_checkpoint(path, state):
    """Tensors and plain Python values only, so that `weights_only=True` reads them back."""
    import torch

    with atomic_path(path) as temporary, open(temporary, "wb") as file:  # as "archive": the same state, the same bytes
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch hides behind its own what went wrong in file.write: a full disk, a signal
            raise error.__context__ or error from None


def load_checkpoint(path):
    """What save_checkpoint wrote, on the CPU. Runs no code from the file; ValueError when it is no such file."""
    import torch

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with warnings.catch_warnings():  # about pickles of other protocols
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # the unpickler of a broken or hostile file raises whatever it likes, with a page of advice
        raise ValueError(
            f"{path} is no checkpoint of tensors and plain values: it is broken, or would run code when read"
        ) from None


# ---------------------------------------------------------------- seeds and numbers


def leave_signals_to_main(worker_id):
    """For a loader's worker processes: a terminal sends Ctrl-C and a cluster SIGTERM to all, but one shall answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # torch itself ends a stuck worker so


def in_one_line(error):
    """An error's message without line breaks; of one that a loader's process passed on, its traceback's last line."""
    message = str(error).strip()
    if " in DataLoader worker process " in message.split("\n", 1)[0]:
        message = message.rsplit("\n", 1)[-1].partition(": ")[2]
    return " ".join(message.split()) or type(error).__name__


def seed_everything(seed):
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def count_params(model):
    """The number of trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


class AverageMeter:
    """A running mean of values with weights: `val` the latest, `avg` the mean, `sum` and `count` what it is made of."""

    def __init__(self):
        self.reset()

    def reset(self):
        self.val, self.avg, self.sum, self.count = 0, 0, 0, 0

    def update(self, val, n=1):
        self.val = val
        self.sum += val * n
        self.count += n
        self.avg = self.sum / self.count if self.count else 0
