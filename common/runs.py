"""A run is a folder, models/<name>: where it lives, which one is newest, how options become its config.

folder = run_folder("run1")    # models/run1; ValueError for a name that leads out of models/
config = resolve_machine({"device": "auto", "amp": "auto", "num_workers": -1})
with only_trainer(folder, RUN_FILES), keeping(folder, "train.py", draw_curves):
    ...   # only this process trains models/run1; an error says what is kept
"""

import contextlib
import csv
import multiprocessing
import os
import shlex
import shutil
from pathlib import Path

from common.cli import in_one_line, warn
from common.devices import device_name, environment, pick_amp, pick_device, precision_name
from common.distributed import check_same, is_main, local_processes, world_size
from common.files import atomic_path, is_plain_name, lock, read_yaml, write_yaml

MODELS, OUTPUTS = Path("models"), Path("outputs")
MODEL_CARD = "README.md"  # in the folder of a run that came with the repository
MAKERS = {  # a key that only the config.yml of one script's runs has, and a command that makes such a run
    "arch": "python train.py --name run1",
    "classes": "python transfer_resnet18.py --demo",
}
USES = {  # how to use such a run
    "arch": "python predict.py --name {name} PATH",
    "classes": "python transfer_resnet18.py --name {name} --predict PATH",
}


def run_folder(name, option="--name"):
    if not is_plain_name(name):
        raise ValueError(f"{option} {name!r}: expected the plain name of a folder; the run is models/<name>")
    return MODELS / name


def weights_file(source):
    """The file that --weights or --encoder_weights names: a file, or the model.pth of a run, by its name or folder."""
    path = Path(source)
    if path.is_file():
        return path
    named = MODELS / path / "model.pth"  # comes before a folder: the repository has one that is called nuclei
    return path / "model.pth" if path.is_dir() and not named.is_file() else named


def list_runs(key):
    """Yields (name, config) of the runs whose config.yml has `key`, those with the newest weights first.

    Runs that came with the repository (they have a model card) follow after all others, in the order of their names.
    key: a key of MAKERS.
    """
    own, shipped = [], []
    for path in MODELS.glob("*/model.pth"):
        (shipped if (path.parent / MODEL_CARD).is_file() else own).append(path)
    own.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    for path in (*own, *sorted(shipped)):
        about = path.parent / "config.yml"
        if not about.is_file():
            continue
        try:
            config = read_yaml(about)
        except (ValueError, OSError) as error:
            warn(f"{path.parent} is left out: {in_one_line(error)}")
            continue
        if key in config:
            yield path.parent.name, config


def newest_run(key):
    """The first name of list_runs(key). FileNotFoundError when there is none; it names the command that makes one."""
    name, _ = next(list_runs(key), (None, None))
    if name is None:
        raise FileNotFoundError(f"no trained run in {MODELS}/; train one first: {MAKERS[key]}")
    return name


def check_kind(config, key, folder):
    """ValueError when the config.yml of `folder` belongs to a run of the other script, not to one that has `key`.

    key: a key of MAKERS.
    """
    (other,) = MAKERS.keys() - {key}
    if key not in config and other in config:
        script = MAKERS[other].split()[1]
        use = USES[other].format(name=shlex.quote(folder.name))
        raise ValueError(f"{folder} is a run of {script}; use it with: {use}")


def earlier_files(folder, names, options):
    """The files of an earlier run that stand in the way; FileExistsError unless --resume or --overwrite was given."""
    earlier = [folder / name for name in names if (folder / name).exists()]
    if earlier and not (options.resume or options.overwrite):
        resume = "--resume continues it, " if folder / "last.pth" in earlier else ""
        raise FileExistsError(f"{folder} exists; {resume}--overwrite replaces it, --name picks another")
    return earlier


def write_start(config, folder, earlier, device, split=None):
    """Write config.yml and split.yml of a new run. The files in `earlier` are deleted."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in earlier:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    if split:
        write_yaml(folder / "split.yml", split)
    write_yaml(folder / "config.yml", {**config, "environment": machine(device)})  # last: now it can be resumed


@contextlib.contextmanager
def only_trainer(folder, names):
    """A block in which only this process trains the run in `folder`; ValueError when another process does.

    names: the run's files; what a killed process left of them half written is removed. The folder is made, and removed
    again if nothing came into it.
    """
    if not is_main():  # of torchrun's processes the main one writes, and holds the lock
        yield
        return
    made = [path for path in (folder, folder.parent) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        busy = f"another process is training {folder} right now; wait until it ends, or take another --name"
        with lock(folder, busy):
            for leftover in (path for name in names for path in folder.glob(f".{name}.*.tmp")):
                leftover.unlink(missing_ok=True)
            yield
    finally:
        with contextlib.suppress(OSError):  # not empty
            for path in made:
                path.rmdir()


@contextlib.contextmanager
def keeping(folder, script, at_end):
    """A block around a training; if the user or the system stops it, the message says what has been kept.

    script: named in the command that continues the run. at_end() is always called (it draws the curves); its own error
    never hides another one.
    """
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(Exception):
            at_end()
        kept = "the last finished epoch is kept" if (folder / "last.pth").is_file() else "no epoch was finished"
        kept = f"{kept}; continue with: python {script} --name {shlex.quote(folder.name)} --resume"
        if isinstance(error, KeyboardInterrupt):
            print(f"\n{kept}")
        elif isinstance(error, OSError):
            if not folder.is_dir():
                kept = f"{folder} is gone"
            raise OSError(f"{in_one_line(error)}; {kept}") from None
        elif isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
            died = f"a loader process died, perhaps for lack of memory ({in_one_line(error)})"
            raise OSError(f"{died}; {kept} --num_workers 0") from None
        raise
    at_end()


def check_start(config, free, **more):
    """ValueError unless all of torchrun's processes start with the same config (but for keys in `free`) and `more`."""
    same = {key: value for key, value in config.items() if key not in free - {"name"}}
    check_same({**same, "environment": None, **more})


def machine(device):
    """environment(device), with the number of processes when there are several; for config.yml."""
    if world_size() == 1:
        return environment(device)
    return {**environment(device), "processes": world_size()}


def machine_name(device):
    """device_name(device), with the number of processes when there are several; for people."""
    if world_size() == 1:
        return device_name(device)
    return f"{world_size()} processes, each on {device_name(device)}"


def resolve_machine(config):
    """The config with the meaning of `auto` and -1 on this machine: device, amp, channels_last and num_workers."""
    device = pick_device(config["device"])
    amp = pick_amp(config["amp"], device)
    names = {"float32": "off", "bfloat16": "bf16", "float16": "fp16"}
    found = {"device": str(device), "amp": names[precision_name(amp)]}
    if config.get("channels_last") == "auto":
        found["channels_last"] = amp is not None
    if config["num_workers"] < 0:
        # on a CPU the workers would take the cores from the training; if not forked, each has a copy of all images
        none = device.type == "cpu" or multiprocessing.get_start_method() != "fork"
        found["num_workers"] = 0 if none else min(8, max(1, os.cpu_count() // local_processes()))
    return config | found


def resumed(config, folder, options, given, free, leave_out, endless=()):
    """The config of the run in `folder`, to continue it; ValueError when an option was given that differs.

    given: names of the options that the user gave; free: those that may differ, because no result depends on them;
    leave_out: those that config.yml does not keep; endless: schedulers that allow more epochs. A run that was stopped
    in its first epoch has nothing but its config; resuming starts it again.
    """
    if options.overwrite:
        raise ValueError("--resume continues a run and --overwrite replaces it; give one of them")
    if (folder / "log.csv").is_file() and not (folder / "last.pth").is_file():
        raise FileNotFoundError(f"{folder}/last.pth: no such file, although log.csv is there; --overwrite starts again")
    if missing := sorted(vars(options).keys() - set(leave_out) - config.keys()):
        raise ValueError(f"{folder}/config.yml lacks {', '.join(missing)}: it is damaged, or of another version")
    config = {**config, "name": folder.name}
    given = given - set(leave_out)
    if "epochs" in given and options.epochs > config["epochs"]:
        config["epochs"] = _longer(config, folder, options.epochs, endless)
    resolved = resolve_machine({**config, **{key: getattr(options, key) for key in given & free}})
    refused, changed = [], {}
    for key in sorted(given):
        value = resolved[key] if key in free else getattr(options, key)
        if value == config[key] or (value == "auto" and key not in free):  # `auto` keeps the run's value
            continue
        if key in free:
            changed[key] = value
        else:
            refused.append(f"{key} {value} (run: {config[key]})")
    if refused:
        raise ValueError(
            f"--resume keeps the options of {folder}/config.yml, but these differ: {', '.join(refused)}; "
            "leave them out, or start a new run under another --name"
        )
    if changed:
        said = ", ".join(f"{key} {value} (run: {config[key]})" for key, value in changed.items())
        print(f"options that differ from {folder} and change the result by rounding at most: {said}")
    return {**config, **changed}


def _longer(config, folder, epochs, endless):
    """The larger number of epochs; ValueError when the learning rate was planned to end with the run."""
    if config["scheduler"] not in endless:
        body = " (its body; the head is new)" if "classes" in config else ""
        raise ValueError(
            f"{folder} ends at epoch {config['epochs']}, because {config['scheduler']} plans the learning rate up to "
            f"there ({', '.join(endless)} can be resumed with more --epochs); to train on, start another run with "
            f"--weights {shlex.quote(str(folder / 'model.pth'))}{body}"
        )
    print(f"{folder}: {epochs} epochs instead of {config['epochs']}")
    return epochs


def note_changes(config, folder):
    """Record in config.yml the options that a resumed run changes."""
    kept = read_yaml(folder / "config.yml")
    changed = {key: config[key] for key in ("epochs", "tensorboard") if key in config and config[key] != kept.get(key)}
    if changed:
        write_yaml(folder / "config.yml", {**kept, **changed})


def time_left(seconds):
    """0.4, 35, 2880, 3900 -> "1 s left", "35 s left", "48 min left", "1 h 05 min left"."""
    minutes = round(seconds / 60)
    if seconds < 99.5:
        return f"{max(1, round(seconds))} s left"
    return f"{minutes // 60} h {minutes % 60:02} min left" if minutes >= 60 else f"{minutes} min left"


def write_log(rows, path):
    """Write log.csv, whole or not at all: one line for each of the rows, dicts with the same keys."""
    with atomic_path(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
