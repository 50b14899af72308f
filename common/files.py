"""Files and folders that appear complete or not at all: YAML, checkpoints, and names that are safe to use as paths.

from common.files import atomic_path, new_folder, read_yaml, write_yaml
from common.files import load_checkpoint, load_weights, save_checkpoint

torch is imported inside the functions that need it, so that `--help` starts fast.
"""

import contextlib
import errno
import glob
import hashlib
import os
import shutil
import tempfile
import time
import warnings
from pathlib import Path

import yaml

DAY_SECONDS = 24 * 3600
MAX_YAML_BYTES = 2**24  # the ids of about 200,000 images; PyYAML reads about 0.2 MB per second


# ---------------------------------------------------------------- complete or not at all


@contextlib.contextmanager
def atomic_path(path):
    """Yields a temporary path beside `path`. On success it is flushed to disk and renamed, on failure removed.

    Raises OSError that names `path` for what the system refuses: a full disk, a folder that no longer exists.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:  # a failed write names no file
        if error.errno is None or error.filename not in (None, str(temporary)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        with contextlib.suppress(OSError):  # this fails on a disk that became read-only, which is not the error to show
            temporary.unlink()


@contextlib.contextmanager
def lock(folder, busy=None):
    """A block in which only one process at a time works on a folder; it waits until another process has finished.

    busy: text of a ValueError to raise instead of waiting.
    The lock is the system's (POSIX lockf on <folder>/.lock). It ends with its process, even on kill -9, and forked
    loader processes never inherit it. (The filelock package before 3.30 uses flock, which they do inherit, and leaves
    its file behind.) Where there are no such locks (Windows, some network drives) none is taken.
    """
    path = folder / ".lock"
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with contextlib.ExitStack() as stack:
        while True:
            file = stack.enter_context(open(path, "a"))
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
            except OSError as error:
                if busy and error.errno in (errno.EACCES, errno.EAGAIN):
                    raise ValueError(busy) from None
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                    break  # else its last holder has just removed this file, and the next would lock another
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # the disk became read-only
                path.unlink()


@contextlib.contextmanager
def new_folder(output, check=None):
    """Yields an empty folder to fill. It becomes `output` when the block succeeds and is removed when it fails.

    check: called without arguments before the block and again before `output` is replaced; it raises if `output` may
    not be replaced. By default nothing that exists is replaced (FileExistsError). An earlier folder is deleted only
    after the new one has its name. Leftovers of killed runs are removed when they are more than a day old.
    Raises OSError that names `output` for what the system refuses.
    """

    def check_absent():
        if Path(output).exists():
            raise FileExistsError(f"{output} exists already; remove it first, or choose another folder")

    check = check or check_absent
    check()
    target = Path(output).resolve()  # a link to another disk stays a link
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        prefix = f".{target.name}."
        with tempfile.TemporaryDirectory(".tmp", prefix, target.parent, ignore_cleanup_errors=True) as scratch:
            new, old = Path(scratch, "new"), Path(scratch, "old")
            new.mkdir()
            yield new
            check()  # another process may have written `output` in the meantime
            _replace(target, new, old)
    except OSError as error:
        missing = f" ({error.filename})" if isinstance(error, FileNotFoundError) and error.filename else ""
        raise OSError(f"{output} was not written: {error.strerror or error}{missing}") from None


@contextlib.contextmanager
def replacing(folder):
    """Yields an empty folder inside `folder`. When the block succeeds, its files replace those of the same names.

    folder is made. Nothing else in it changes, and nothing at all when the block fails.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".new_") as temporary:
        new = Path(temporary)
        try:
            yield new
        except OSError as error:  # a full disk: the user knows only `folder`
            if str(error.filename).startswith(temporary):
                raise OSError(error.errno, error.strerror, error.filename.replace(temporary, str(folder))) from None
            raise
        for path in sorted(new.rglob("*")):
            place = folder / path.relative_to(new)
            if path.is_dir():
                place.mkdir(exist_ok=True)
            else:
                path.replace(place)


def check_place(output, mark, overwrite, option):
    """FileExistsError if the folder `output` may not be written: it holds something that is not to be replaced.

    mark: a file that the script writes into its results. Only a folder that has it may be replaced, with overwrite.
    option: the one that names another folder.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not (output / mark).is_file():
        raise FileExistsError(
            f"{output} exists and was not written by this script (no {mark}); choose another {option}"
        )
    if not overwrite:
        raise FileExistsError(f"{output} exists; give --overwrite to replace it, or another {option}")


def _replace(target, new, old):
    """Rename `new` to `target`. An existing target becomes `old`, and gets its name back if the second rename fails."""
    try:
        if target.exists():
            target.rename(old)
        new.rename(target)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)


def _remove_leftovers(target):
    """Remove scratch folders of `target` that killed runs left. Younger ones may belong to a run that is at work."""
    for leftover in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
        if (leftover / "new").is_dir() and time.time() - leftover.stat().st_mtime > DAY_SECONDS:
            shutil.rmtree(leftover, ignore_errors=True)


# ---------------------------------------------------------------- YAML


def write_yaml(path, mapping):
    with atomic_path(path) as temporary:
        temporary.write_text(yaml.dump(mapping, Dumper=_Dumper, sort_keys=False, allow_unicode=True), encoding="utf-8")


class _Dumper(yaml.SafeDumper):
    """Safe YAML without `&anchors` and `*aliases`, which read_yaml refuses."""

    def ignore_aliases(self, data):
        return True


class _Loader(yaml.SafeLoader):
    """Safe YAML in which only true and false are booleans, as in YAML 1.2: `amp: off` is text, and so is the id `no`.

    Aliases are refused: a few lines of them can expand to more values than memory holds.
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
    """The mapping in a YAML file. Raises FileNotFoundError, or ValueError if the file is not a YAML mapping."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if (size := path.stat().st_size) > MAX_YAML_BYTES:
        raise ValueError(f"{path} has {size:,} bytes; a YAML file may have at most {MAX_YAML_BYTES:,}")
    data = path.read_bytes()
    try:
        mapping = yaml.load(data.decode("utf-8"), _Loader)
    except Exception as error:  # a hostile value such as `!!int ""` can raise an exception of any class
        raise ValueError(f"{path} is not a readable YAML file: {str(error) or type(error).__name__}") from None
    if not isinstance(mapping, dict):
        raise ValueError(f"{path}: expected `key: value` lines, found {type(mapping).__name__}")
    return mapping


# ---------------------------------------------------------------- checkpoints


def save_checkpoint(path, state):
    """Save tensors and plain Python values, and nothing else: load_checkpoint reads with `weights_only=True`."""
    import torch

    # torch.save gets a file, not a name: a name would be stored in the archive, and equal states would differ in bytes
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch wraps what file.write raised, such as a full disk or a signal
            raise error.__context__ or error from None


def load_checkpoint(path):
    """The content of a checkpoint, with tensors on the CPU. Code in the file is never run.

    Raises FileNotFoundError, or ValueError that names a file that is damaged or holds more than tensors and plain
    values.
    """
    import torch

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with warnings.catch_warnings():  # torch warns about the protocol of ordinary pickles
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # a damaged or hostile file can raise an exception of any class, with a page of advice
        raise ValueError(
            f"{path} is not a checkpoint of tensors and plain values: it is damaged, or would run code when loaded"
        ) from None


def load_weights(path):
    """The weights in a checkpoint, ours or another project's -> {name: tensor}, on the CPU in their stored dtypes.

    Unwraps {"state_dict": ...}, {"ema": ...} and {"model": ...} in this order, so that our last.pth gives the averaged
    weights where there are some, and removes "module." from the beginning of names (DataParallel, AveragedModel).
    Values that are not tensors are left out, and so is AveragedModel's counter `n_averaged`.
    Raises FileNotFoundError, or ValueError if the file is damaged, or holds no weights, or one that is not finite.
    """
    import torch

    state = load_checkpoint(path)
    for key in ("state_dict", "ema", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    weights = {}
    for key, value in state.items() if isinstance(state, dict) else ():
        name = str(key)
        while name.startswith("module."):
            name = name.removeprefix("module.")
        if torch.is_tensor(value) and name != "n_averaged":
            weights[name] = value
    if not weights:
        raise ValueError(f"{path} holds no weights; expected a state_dict, {{name: tensor}}")
    for name, value in weights.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ValueError(f"{path} holds weights that are not finite: {name}")
    return weights


# ---------------------------------------------------------------- names


def digest_of(*contents):
    """Bytes -> eight hexadecimal digits, by which users tell versions of a file apart."""
    return hashlib.blake2b(b"".join(contents), digest_size=4).hexdigest()


def is_plain_name(name):
    """Whether `name` names a file or folder, and is not a path that could lead out of its parent folder."""
    return name not in ("", ".", "..") and Path(name).name == name and "\0" not in name
