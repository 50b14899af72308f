"""A run is a folder, models/<name>: where it lives, which one is the newest, how options become its config.

folder = run_folder("run1")    # models/run1; ValueError for a name that climbs out of models/
config = resolve_machine({"device": "auto", "amp": "auto", "num_workers": -1})
with only_trainer(folder, RUN_FILES), keeping(folder, "train.py", draw_curves):
    ...   # one process alone trains models/run1; what goes wrong is said with what is kept
"""

import contextlib
import csv
import errno
import math
import os
from pathlib import Path

import torch

from common.cli import in_one_line
from common.devices import device_name, environment, pick_amp, pick_device
from common.distributed import check_same, is_main, local_processes, world_size
from common.files import atomic_path, is_plain_name, read_yaml

MODELS = Path("models")
MAKERS = {  # what only the config.yml of one script's runs holds, and a command that makes such a run
    "arch": "python train.py --name run1",
    "classes": "python transfer_resnet18.py --demo",
}


BROKEN = (KeyError, TypeError, AttributeError, RuntimeError, ValueError)  # what a state of another form raises
FOREIGN = "does not hold the training that config.yml describes"
MOMENTS = {  # what an optimizer keeps of each parameter
    "SGD": {"momentum_buffer"},
    **dict.fromkeys(("Adam", "AdamW"), {"step", "exp_avg", "exp_avg_sq"}),
}


def run_folder(name):
    if not is_plain_name(name):
        raise ValueError(f"--name {name!r}: expected the plain name of a folder, the run is models/<name>")
    return MODELS / name


def newest_run(key):
    """The name of the run with the newest weights among those whose config.yml has `key`.

    key: a key of MAKERS. FileNotFoundError when there is none; it names the command that makes one.
    """
    weights = MODELS.glob("*/model.pth")
    for path in sorted(weights, key=lambda path: path.stat().st_mtime, reverse=True):
        if (path.parent / "config.yml").is_file() and key in read_yaml(path.parent / "config.yml"):
            return path.parent.name
    raise FileNotFoundError(f"no trained run in {MODELS}/; train one first: {MAKERS[key]}")


def earlier_files(folder, names, options):
    """The files of an earlier run that stand in the way; FileExistsError unless --resume or --overwrite was given."""
    earlier = [folder / name for name in names if (folder / name).exists()]
    if earlier and not (options.resume or options.overwrite):
        resume = "--resume goes on with it, " if folder / "last.pth" in earlier else ""
        raise FileExistsError(f"{folder} exists; {resume}--overwrite replaces it, --name takes another")
    return earlier


@contextlib.contextmanager
def only_trainer(folder, names):
    """Within it this process alone trains the run in `folder`; ValueError when another one does.

    The lock is the system's (POSIX, on <folder>/.lock): it ends with its process, even with kill -9, and loader
    processes do not inherit it. Where there are no such locks (Windows, some network drives) none is taken.
    `names`: of the run's files; what a killed process was writing of them is removed. The folder is made, and goes
    again when nothing came into it.
    """
    if not is_main():  # of torchrun's processes the first one writes, and holds the lock
        yield
        return
    made = [path for path in (folder, folder.parent) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _locked(folder):
            for leftover in (path for name in names for path in folder.glob(f".{name}.*.tmp")):
                leftover.unlink(missing_ok=True)
            yield
    finally:
        with contextlib.suppress(OSError):  # not empty
            for path in made:
                path.rmdir()


@contextlib.contextmanager
def _locked(folder):
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
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    raise ValueError(
                        f"another process is training {folder} right now; wait for its end, or take another --name"
                    ) from None
            if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
                break  # else its last holder has just removed this file, and the next would lock another
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # the disk became read-only
                path.unlink()


@contextlib.contextmanager
def keeping(folder, script, at_end):
    """A training within it that is stopped, by its user or by what the system refuses, says what is kept of it.

    script: of the command that goes on with it. at_end(): called in any case (it draws the curves); its own error never
    takes the place of another.
    """
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(Exception):
            at_end()
        kept = "last whole epoch kept" if (folder / "last.pth").is_file() else "no epoch was finished"
        kept = f"{kept}; go on with: python {script} --name {folder.name} --resume"
        if isinstance(error, KeyboardInterrupt):
            print(f"\n{kept}")
        elif isinstance(error, OSError):
            raise OSError(f"{in_one_line(error)}; {kept if folder.is_dir() else f'{folder} is gone'}") from None
        elif isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
            died = f"a loader process died, for want of memory perhaps ({in_one_line(error)})"
            raise OSError(f"{died}; {kept} --num_workers 0") from None
        raise
    at_end()


def check_start(config, free, **more):
    """ValueError unless all of torchrun's processes start with the same config, but for what is free, and `more`."""
    same = {key: value for key, value in config.items() if key not in free - {"name"}}
    check_same({**same, "environment": None, **more})


def machine(device):
    """environment(device), and the number of processes where there are several; for config.yml."""
    return environment(device) | ({"processes": world_size()} if world_size() > 1 else {})


def machine_name(device):
    """device_name(device), and the number of processes where there are several; for people."""
    return f"{world_size()} processes, each on " * (world_size() > 1) + device_name(device)


def resolve_machine(config):
    """The config with what `auto` and -1 mean on this machine: device, amp, channels_last and num_workers."""
    device = pick_device(config["device"])
    amp = pick_amp(config["amp"], device)
    found = {"device": str(device), "amp": {None: "off", torch.bfloat16: "bf16", torch.float16: "fp16"}[amp]}
    if config.get("channels_last") == "auto":
        found["channels_last"] = amp is not None
    if config["num_workers"] < 0:  # on a CPU the workers would take the cores from the training
        found["num_workers"] = 0 if device.type == "cpu" else min(8, max(1, os.cpu_count() // local_processes()))
    return config | found


def resumed(config, folder, options, given, free, leave_out):
    """The config of the run in folder, to go on with; ValueError where an option was given that differs.

    given: names of the options that the user gave; free: those that may differ, because no result depends on them;
    leave_out: those that config.yml does not keep. A run that was stopped in its first epoch has nothing but its
    config; resuming it starts it again.
    """
    if options.overwrite:
        raise ValueError("--resume goes on with a run and --overwrite replaces it; give one of them")
    if (folder / "log.csv").is_file() and not (folder / "last.pth").is_file():
        raise FileNotFoundError(f"{folder}/last.pth: no such file, although log.csv is there; --overwrite starts again")
    if missing := sorted(vars(options).keys() - set(leave_out) - config.keys()):
        raise ValueError(f"{folder}/config.yml is damaged: {', '.join(missing)} missing")
    config = {**config, "name": folder.name}
    asked = {key: getattr(options, key) for key in given - set(leave_out)}
    anew = resolve_machine({**config, **{key: value for key, value in asked.items() if key in free}})
    asked = {key: anew[key] if key in free else value for key, value in asked.items() if key in free or value != "auto"}
    differing = {k: f"{k} {v} (run: {config[k]})" for k, v in sorted(asked.items()) if v != config[k]}
    if refused := [text for key, text in differing.items() if key not in free]:
        raise ValueError(
            f"--resume goes on with the options of {folder}/config.yml, but these differ: {', '.join(refused)}; "
            "leave them out, or start a new run under another --name"
        )
    if differing:
        print(f"other options than {folder} began with, on which no result depends: {', '.join(differing.values())}")
    return config | {key: asked[key] for key in differing}


def restore(parts, progress, state, columns, source):
    """Give each of parts, {name: what has a state_dict}, its own of `state`, the content of last.pth -> rows, progress.

    columns: those of log.csv; progress: {name: a plain value of the right kind}. ValueError, which names the source,
    where anything in state is of another form, kind or shape than what it is to replace.
    """
    rows = log_of(state, columns, source)
    try:
        for name, part in parts.items():
            own, optimizer = part.state_dict(), isinstance(part, torch.optim.Optimizer)
            part.load_state_dict(_alike({**own, "state": state[name]["state"]} if optimizer else own, state[name]))
            for parameter, kept in part.state.items() if optimizer else ():
                for key, value in kept.items():
                    if value is not None or key != "momentum_buffer":
                        _alike(parameter if value.dim() else torch.zeros(()), value)
                if kept and kept.keys() != MOMENTS[type(part).__name__]:
                    raise KeyError("moments")
        return rows, _alike(progress, state)
    except BROKEN:
        raise ValueError(f"{source} {FOREIGN}") from None


def log_of(state, columns, source):
    """The rows of log.csv that `state`, the content of last.pth, holds; ValueError as restore has it."""
    try:
        rows = _alike([dict.fromkeys(columns, math.inf)] * max(1, len(state["rows"])), state["rows"])
        if [row["epoch"] for row in state["rows"]] != list(range(1, len(rows) + 1)):
            raise ValueError("epochs are missing")
        return rows
    except BROKEN:
        raise ValueError(f"{source} {FOREIGN}") from None


def _alike(own, found):
    """found, when it is of the same form as own; an error otherwise.

    A dict may have further entries, which are dropped, and lack flags (None or a bool), which keep their own value:
    other versions of PyTorch know other ones.
    """
    if torch.is_tensor(own):
        same = torch.is_tensor(found) and found.shape == own.shape and bool(torch.isfinite(found).all())
    elif isinstance(own, dict):
        flags = {key: value for key, value in own.items() if value is None or isinstance(value, bool)}
        return {key: _alike(value, {**flags, **found}[key]) for key, value in own.items()}
    elif isinstance(own, (list, tuple)):
        return type(own)(_alike(*pair) for pair in zip(own, found, strict=True))
    elif type(own) in (int, float) and type(found) is int:
        same = abs(found) < 2**53
    elif type(own) in (int, float):
        same = type(found) is float and (abs(found) < 1e30 or (found == found and math.isinf(own)))
    else:
        same = type(found) is type(own) and found == own
    if not same:
        raise TypeError(str(type(found)))
    return found


def write_log(rows, path):
    """log.csv, whole or not at all: a line for each of the rows, dicts with the same keys."""
    with atomic_path(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
