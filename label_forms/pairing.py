"""Which label file belongs to which picture, by their names, whatever tools add to them.

from label_forms.pairing import list_pictures, pair

pictures = list_pictures(Path("photos"), Path("labels"))     # {"day1": Path("photos/day1.tif"), ...}
pairs, alone = pair(pictures, files)                         # {"day1": {"": Path("labels/day1_masks.png")}}, [...]
"""

import re

from common.cli import listed
from common.images import find_pictures, is_picture

# Words in the name of a file that say what it is, not which picture it belongs to.
OF_PICTURES = {"image", "images", "img", "im", "photo", "raw"}
OF_LABELS = {
    *("mask", "masks", "label", "labels", "seg", "segmentation", "annotation", "annotations"),
    *("gt", "cp", "instance", "instances", "roi", "rois", "roiset"),
}
OF_PRODUCTS = {"flows", "cellprob", "outlines", "output", "overlay"}  # drawn by Cellpose and predict.py: no labels


def words(stem):
    """The words of a file's name, in lower case: "Day1_cp_masks" -> ["day1", "cp", "masks"]."""
    return [word for word in re.split(r"[_\-. ]+", stem.lower()) if word]


def list_pictures(images, labels):
    """The pictures of a folder, searched recursively -> {id: path}, sorted. The id is the name without its extension.

    In the layout of the raw DSB2018, `<id>/images/<file>`, it is the name of the folder. Files of the folder `labels`
    are left out. Where that is `images` itself, only the pictures directly in it count, if there are any, and label
    pictures that lie beside them, such as Cellpose's `<id>_masks.tif`, are left out.
    Raises ValueError when there are none, or two have the same id; FileNotFoundError when `images` does not exist.
    """
    if not images.exists():
        raise FileNotFoundError(f"{images}: no such file or folder; expected the pictures")
    raw = [path for path in sorted(images.glob("*/images/*")) if is_picture(path)]
    if raw and len({path.parent for path in raw}) == len(raw):
        named = [(path.parent.parent.name, path) for path in raw]
    else:
        files, _ = find_pictures([images])
        place, beside = images.resolve(), labels.resolve()
        if place == beside:
            files = _without_labels([path for path in files if path.parent == images] or files)
        elif place in beside.parents:
            files = [path for path in files if beside not in path.resolve().parents]
        named = [(path.stem, path) for path in files]
    pictures = {}
    for img_id, path in named:
        if img_id in pictures:
            raise ValueError(f"{pictures[img_id]} and {path} have the same name; each picture needs a name of its own")
        pictures[img_id] = path
    if not pictures:
        raise ValueError(f"{images} holds no picture (.png, .jpg, .tif, .bmp ...)")
    return dict(sorted(pictures.items()))


def _without_labels(files):
    """Drop files that are named as labels of another: a.tif, a_masks.tif, b_masks.tif -> a.tif, b_masks.tif."""

    def is_label(path):
        return bool((OF_LABELS | OF_PRODUCTS) & set(words(path.stem)))

    plain = {(path.parent, _key(path.stem)) for path in files if not is_label(path)}
    return [path for path in files if not is_label(path) or (path.parent, _key(path.stem)) not in plain]


def _key(stem):
    """The words that say which picture: ("day1",) of img_day1, day1_mask and day1_flows."""
    noise = OF_PICTURES | OF_LABELS | OF_PRODUCTS
    return tuple(word for word in words(stem) if word not in noise) or tuple(words(stem))


def is_product(path):
    """Whether the name of a file says that it was drawn from labels (an overlay, flows), so that it holds none."""
    return bool(OF_PRODUCTS & set(words(path.stem)))


def pair(pictures, files):
    """{id: picture}, label files -> ({id: {ending: file}}, files that belong to no picture).

    A file belongs to the picture of the same name, apart from words such as img, mask or label. What else it has
    before or after that name is the ending: "nuclei" for day1_nuclei_mask.png. An ending is not a number alone, or
    day1_2.png would be taken for day1.png when the picture day1_2 is missing.
    Raises ValueError when two files are labels of one picture with the same ending.
    """
    keys = {_key(img_id): img_id for img_id in pictures}
    if len(keys) < len(pictures):  # such as img_1 and raw_1: only names that are equal count
        keys = {tuple(words(img_id)): img_id for img_id in pictures}
    pairs, alone = {}, []
    for file in files:
        img_id, ending = (file.stem, "") if file.stem in pictures else _match(_key(file.stem), keys)
        if img_id is None:
            alone.append(file)
            continue
        other = pairs.setdefault(img_id, {}).setdefault(ending, file)
        if other is not file:
            raise ValueError(f"{other} and {file} are both labels of {img_id}; move one of them elsewhere")
    return pairs, alone


def one_each(pairs):
    """{id: {ending: file}} -> ({id: file}, notes): the file with the shortest ending; a note lists the others."""
    chosen = {img_id: paths[min(paths, key=len)] for img_id, paths in pairs.items()}
    return chosen, not_used(
        [path for img_id, paths in pairs.items() for path in paths.values() if path != chosen[img_id]]
    )


def not_used(files):
    """-> [] or [a sentence about label files that are left out because another one is closer to its picture's name]."""
    names = [path.name for path in files]
    return [f"not used: {len(names):,} files with more in their names ({listed(names, 3)})"] if names else []


def _match(name, keys):
    """-> (id of the picture with the longest key at the beginning or end of `name`, ending), or (None, "")."""
    for length in range(len(name), 0, -1):
        for key, rest in ((name[:length], name[length:]), (name[-length:], name[:-length])):
            if key in keys and (not rest or any(not word.isdigit() for word in rest)):
                return keys[key], "_".join(rest)
    return None, ""
