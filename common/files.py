"""Files that are whole or not there at all: YAML, checkpoints, and the names that are safe to use for them.

from common.files import atomic_path, load_checkpoint, read_yaml, save_checkpoint, write_yaml

torch is imported inside the functions that need it, so that `--help` starts fast.
"""

import contextlib
import os
import warnings
import zipfile
from pathlib import Path

import yaml

MAX_YAML_BYTES = 2**24  # ids of some 200,000 images; PyYAML reads about 0.2 MB a second


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
        temporary.write_text(yaml.dump(mapping, Dumper=_Dumper, sort_keys=False, allow_unicode=True), encoding="utf-8")


class _Dumper(yaml.SafeDumper):
    """Safe YAML without `&anchors` and `*aliases`, which read_yaml refuses."""

    def ignore_aliases(self, data):
        return True


class _Loader(yaml.SafeLoader):
    """Safe YAML whose only booleans are true and false, as in YAML 1.2: `amp: off` is text, and so is an id `no`.

    Aliases are refused: a few lines of them stand for more values than a machine can hold.
    """

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not (tag.endswith(":bool") and first in "yYnNoO")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            event = self.get_event()
            raise yaml.composer.ComposerError(None, None, f"the alias *{event.anchor} is refused", event.start_mark)
        return super().compose_node(parent, index)


def read_yaml(path):
    """The mapping in a YAML file; ValueError when it is no YAML mapping, FileNotFoundError when it is not there."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if (size := path.stat().st_size) > MAX_YAML_BYTES:
        raise ValueError(f"{path} has {size:,} bytes, more than the {MAX_YAML_BYTES:,} that a YAML file may have")
    data = path.read_bytes()
    try:
        mapping = yaml.load(data.decode("utf-8"), _Loader)
    except Exception as error:  # what a hostile value such as `!!int ""` raises has no class in common
        raise ValueError(f"{path} is no readable YAML file: {str(error) or type(error).__name__}") from None
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
    """What save_checkpoint wrote, on the CPU. Runs no code from the file; ValueError when it is no such file.

    So it is for files that unpack to more than they are, and for tensors that no checkpoint of weights holds: sparse,
    complex, or larger than the file (a stride of 0 makes four bytes terabytes) or than their own memory.
    """
    import torch

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    size = path.stat().st_size
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:  # PyTorch stores its entries as they are
                if sum(entry.file_size for entry in archive.infolist()) > size:
                    raise ValueError("compressed")
        with warnings.catch_warnings():  # about pickles of other protocols
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
        for tensor in _tensors(state):
            plain = tensor.layout is torch.strided and not (tensor.is_complex() or tensor.is_quantized)
            if not plain or tensor.numel() * tensor.element_size() > size or _overlaps(tensor):
                raise ValueError("no plain tensor")
    except Exception:  # the unpickler of a broken or hostile file raises whatever it likes, with a page of advice
        raise ValueError(
            f"{path} is no checkpoint of tensors and plain values: it is broken, or would run code when read"
        ) from None
    return state


def _overlaps(tensor):
    """Do elements of it share memory, so that it cannot be written to?"""
    extent = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride < extent:
                return True
            extent += stride * (size - 1)
    return False


def _tensors(state):
    """Yields the tensors in nested dicts, lists and tuples, each container once: a hostile one may hold itself."""
    import torch

    waiting, seen = [state], set()
    while waiting:
        value = waiting.pop()
        if torch.is_tensor(value):
            yield value
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            waiting += value.values() if isinstance(value, dict) else value


def is_plain_name(name):
    """Is it the name of a file or folder, and no path that could lead out of the folder it is put in?"""
    return name not in ("", ".", "..") and Path(name).name == name and "\0" not in name


def load_weights(path):
    import torch

    state = load_checkpoint(path)
    for key in ("state_dict", "ema", "model"):
        state = state[key] if isinstance(state, dict) and isinstance(state.get(key), dict) else state
    items = state.items() if isinstance(state, dict) else ()
    weights = {str(k).removeprefix("module."): v for k, v in items if torch.is_tensor(v) and k != "n_averaged"}
    for key, value in weights.items():
        if not torch.isfinite(value).all():
            raise ValueError(f"{path} holds weights that are not finite: {key}")
    return weights
