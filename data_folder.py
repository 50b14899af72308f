"""inputs/<dataset>: its folders, which file belongs to an id, and, in one sentence, what is missing.

inputs/<dataset>/images/<id><img_ext>  and  inputs/<dataset>/masks/<class>/<id><mask_ext>, with classes 0, 1 ...

check_layout({"dataset": "my_cells", "img_ext": ".png", "mask_ext": ".png", "num_classes": 2})
list_ids("inputs/my_cells/images", ".png")            # ["a", "b"]
find_file("inputs/my_cells/images", "a", ".png")      # inputs/my_cells/images/a.PNG, where that is its name
"""

from collections import Counter
from pathlib import Path

from common.cli import listed
from common.files import is_plain_name

INPUTS = Path("inputs")


# ---------------------------------------------------------------- files


def _spellings(extension):
    """An extension as given, in lower and in upper case: cameras and microscopes write .PNG and .TIF, too."""
    return tuple(dict.fromkeys((extension, extension.lower(), extension.upper())))


def find_file(folder, img_id, extension):
    """The path of an id's file in a folder: with the extension as given, or else in lower or upper case."""
    paths = [Path(folder) / f"{img_id}{spelling}" for spelling in _spellings(extension)]
    return next((path for path in paths if path.is_file()), paths[0])


def _names(folder):
    return [path.name for path in Path(folder).iterdir() if path.is_file() and not path.name.startswith(".")]


def list_ids(img_dir, img_ext, option="--img_ext"):
    """The ids of a folder of images, sorted, because the order of a directory differs between machines.

    option: the name of img_ext in errors. FileNotFoundError, or ValueError when no file has the extension.
    """
    if not Path(img_dir).is_dir():
        raise FileNotFoundError(f"{img_dir}: no such folder")
    names, ids = _names(img_dir), set()
    for ending in _spellings(img_ext):
        ids.update(name.removesuffix(ending) for name in names if name.endswith(ending) and name != ending)
    if not ids:
        raise ValueError(f"{img_dir} holds no *{img_ext} file{_others(names, option)}")
    return sorted(ids)


def usual_ending(folder, wanted):
    """The extension `wanted` where a file of the folder has it or there is none, else the most frequent one."""
    names = _names(folder) if Path(folder).is_dir() else []
    if any(name.endswith(_spellings(wanted)) for name in names):
        return wanted
    counts = Counter(filter(None, (Path(name).suffix for name in names)))
    return counts.most_common(1)[0][0] if counts else wanted


def _others(names, option):
    """What a folder holds instead of the files that were expected, and the option that takes them."""
    counts = Counter(Path(name).suffix for name in names).most_common(5)
    if not counts:
        return ", and no other"
    found = ", ".join(f"{count} *{suffix}" if suffix else f"{count} without extension" for suffix, count in counts)
    return f", but {found}" + (f"; give {option} {counts[0][0]}" if counts[0][0] else "")


# ---------------------------------------------------------------- folders


def check_places(config, option="dataset"):
    """ValueError when the data set or an extension in a config leads out of inputs/. option: as for check_layout."""
    folder = Path(config["dataset"])
    if folder.is_absolute() or ".." in folder.parts or "\0" in config["dataset"]:
        raise ValueError(f"{option} {config['dataset']!r}: expected the name of a folder in inputs/")
    for key in ("img_ext", "mask_ext"):
        if not is_plain_name(f"id{config[key]}"):
            raise ValueError(f"{key} {config[key]!r}: expected the end of a file's name, such as .png")


def classes_of(root):
    """The numbers of the folders masks/0, masks/1 ... of a data set, sorted."""
    folder = root / "masks"
    names = [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal())


def check_layout(config, option="--dataset"):
    """Raise a FileNotFoundError or ValueError, one sentence, when a folder or every file of a kind is missing.

    config: dataset, img_ext, mask_ext, num_classes and target, as in config.yml. option: the name of dataset in errors.
    """
    check_places(config, option)
    root, needed = INPUTS / config["dataset"], range(config["num_classes"])
    if not config["dataset"] or not root.is_dir():
        known = sorted(path.parent.name for path in INPUTS.glob("*/images"))
        there = f"the data sets are: {listed(known, 20)}" if known else "there is no data set yet"
        made = "preprocess_dsb2018.py makes one (--download, --demo)"
        raise FileNotFoundError(f"{option} {config['dataset']}: no such folder in {INPUTS}/; {there}; {made}")
    if not (root / "images").is_dir():
        raise FileNotFoundError(f"{root / 'images'}: no such folder; images are expected there, masks in masks/0")
    list_ids(root / "images", config["img_ext"])
    if config.get("target") == "instances":
        if not (root / "labels").is_dir():
            made = "preprocess_dsb2018.py --native and import_labels.py write them"
            raise FileNotFoundError(f"{root / 'labels'}: no such folder; nuclei one by one need label maps; {made}")
        return
    found = classes_of(root)
    if missing := [k for k in needed if k not in found]:
        there = ", ".join(f"masks/{k}" for k in found[:10]) or "none"
        raise FileNotFoundError(
            f"{root / 'masks' / str(missing[0])}: no such folder; a folder of masks for each of {len(needed)} classes "
            f"is expected (--num_classes {len(needed)}), found {there}"
        )
    for k in needed:
        list_ids(root / "masks" / str(k), config["mask_ext"], "--mask_ext")
