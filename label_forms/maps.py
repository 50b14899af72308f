"""Labels that are pictures: maps of classes or of objects, a mask per class, a mask per object.

from label_forms.maps import find_label_pictures, guess, read_map

values = read_map("labels/day1.png")    # (H, W) integers as stored: palette indices, grey values or coded colours
"""

import logging

import cv2
import numpy as np

from common.cli import listed
from common.headers import check_pixels, exif_orientation, open_picture, upright
from common.images import MAX_PIXELS, is_picture
from instances import sequential
from label_forms.pairing import is_product, not_used, pair
from label_forms.source import MAX_CLASSES, Labels, Source, check_shape, cut

COLOUR = 2**24  # added to the value of a coloured pixel, 2^16 red + 2^8 green + blue
NEARLY = 40  # JPEG: how far from 0 and 255 the pixels of a mask may lie
GUESS_MAPS, GUESS_VALUES = 30, 50  # looked at for a guess; the values of a map, beginning with the smallest
MANY_VALUES = 20  # more classes than that are rare


# ---------------------------------------------------------------- pixels


def read_map(path, max_pixels=MAX_PIXELS):
    """A label picture -> (H, W) integers from 0, as stored, upright: palette indices, grey values or coded colours.

    Reads 1 to 16 bits, and TIFF of 32 and 64 bits, also float where all values are whole numbers. Of colours, of 8 bits
    each, grey ones are their level, so that black is 0, and the others are COLOUR + 2^16 red + 2^8 green + blue; alpha
    is ignored. A JPEG has to be a mask, and is split at 128. Raises ValueError for anything else, and for a picture of
    more than max_pixels before it is decoded.
    """
    with open(path, "rb") as file:
        try:
            picture = open_picture(file)
        except Exception:  # damaged headers raise errors without a common class
            return _read_tiff(path, max_pixels)
        with picture:
            check_pixels(picture.size, max_pixels)
            if getattr(picture, "n_frames", 1) > 1:
                raise ValueError(f"{path.name} is a stack of {picture.n_frames} pages; expected one map per picture")
            bits, inverted, swapped = _stored(picture, file)
            if bits > 8 and len(picture.getbands()) > 1:
                raise ValueError(f"{path.name} has {bits} bits for each colour; save its numbers as one grey channel")
            if swapped:
                return _read_tiff(path, max_pixels)
            try:
                array = np.asarray(picture)
            except Exception:
                raise ValueError(f"{path.name} is damaged") from None
            orientation, is_jpeg = exif_orientation(picture), picture.format == "JPEG"
    if inverted:
        array = 255 - array
    array = _integers(array, path.name)
    if is_jpeg:
        between = np.isin(array, [*range(NEARLY), *range(256 - NEARLY, 256)], invert=True)
        if between.mean() > 0.01 or array.max(initial=0) >= COLOUR:
            raise ValueError(f"{path.name} is a JPEG, which changes the values of labels; save them as PNG or TIFF")
        array = np.where(array > 127, 255, 0)
    return upright(array, orientation)


def _stored(picture, file):
    """A picture open in Pillow, and its file -> (bits per sample, whether Pillow inverts it, whether it swaps bytes).

    Pillow inverts an 8-bit TIFF in which 0 is white, as ImageJ writes masks, and swaps the bytes of a compressed 32-bit
    TIFF that is big-endian.
    """
    if picture.format == "PNG":
        file.seek(24)
        return file.read(1)[0], False, False
    if picture.format != "TIFF":
        return 8, False, False
    tags = picture.tag_v2
    bits = max(tags.get(258, (1,)))
    swapped = tags.prefix == b"MM" and tags.get(259, 1) != 1 and picture.mode in ("I", "F")
    return bits, bits == 8 and tags.get(262) == 0, swapped


def _read_tiff(path, max_pixels):
    """A file that Pillow cannot read, or not correctly -> (H, W) integers, if it is a TIFF, such as one of int64."""
    if path.suffix.lower() not in (".tif", ".tiff"):
        raise ValueError(f"{path.name} is not a readable picture")
    import tifffile  # late: few labels have 64 bits

    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # its errors are raised as well
    try:
        with tifffile.TiffFile(path) as file:
            [page] = file.pages
            if page.ndim != 2:
                raise ValueError(f"{page.ndim} axes")
            check_pixels(page.shape[::-1], max_pixels)
            array = page.asarray()
    except Exception as error:  # as above
        raise ValueError(f"{path.name} is not a readable TIFF with one page ({error})") from None
    return _integers(array.astype(np.int64) if array.dtype == np.uint64 else array, path.name)


def _integers(array, name):
    """What Pillow decodes -> (H, W) integers."""
    if array.ndim == 3 and array.shape[2] == 2:  # grey and alpha
        array = array[..., 0]
    if array.ndim == 3:
        red, green, blue = (array[..., k].astype(np.int32) for k in range(3))
        return np.where((red == green) & (green == blue), red, COLOUR + (red << 16 | green << 8 | blue))
    if array.dtype.kind == "f":
        with np.errstate(invalid="ignore"):
            whole = array.astype(np.int64)
        if not np.array_equal(whole, array):
            raise ValueError(f"{name} holds fractions or NaN; labels are whole numbers")
        array = whole
    if array.min(initial=0) < 0:
        raise ValueError(f"{name} holds negative values ({array.min()}); labels count from 0")
    return array.astype(np.uint8) if array.dtype == bool else array


def value_name(value):
    """The name of the class with this value of read_map: "2", or "#ff8000" for a colour."""
    return f"#{value - COLOUR:06x}" if value >= COLOUR else str(value)


def values_of(array):
    """The values of (H, W) integers, sorted, without 0."""
    values = np.unique(array)
    return values[values != 0]


# ---------------------------------------------------------------- from files to Labels


def read_class_map(path, shape):
    """Each value but 0 is a class."""
    array = read_map(path)
    check_shape(array, shape, path.name)
    values = values_of(array)
    if len(values) > MAX_CLASSES:
        raise ValueError(f"{path.name} holds {len(values):,} values; expected at most {MAX_CLASSES} classes")
    return Labels({value_name(int(value)): array == value for value in values})


def read_instance_map(path, shape):
    """Each value but 0 is an object, also where it is in several pieces."""
    array = read_map(path)
    check_shape(array, shape, path.name)
    return Labels({"object": array > 0}, sequential(array))


def read_class_masks(paths, shape):
    """{class: path} of masks with 0 and one other value."""
    masks = {}
    for name, path in paths.items():
        array = read_map(path)
        check_shape(array, shape, path.name)
        if len(values := values_of(array)) > 1:
            raise ValueError(f"{path.name} holds {len(values) + 1:,} values; a mask of one class holds 0 and one other")
        masks[name] = array > 0
    return Labels(masks)


def read_object_masks(paths, shape):
    """The paths of masks with one object each -> yields their Pieces."""
    for path in paths:
        array = read_map(path)
        check_shape(array, shape, path.name)
        yield cut("object", array > 0)


# ---------------------------------------------------------------- finding


def find_label_pictures(pictures, labels):
    """Sources of the forms "map" (of classes or objects, see guess), "class_masks" and "object_masks"."""
    own = {path.resolve() for path in pictures.values()}

    def inside(folder):
        files = sorted(folder.iterdir()) if folder.is_dir() else [folder]
        return [file for file in files if file.is_file() and is_picture(file) and file.resolve() not in own]

    folders = [path for path in sorted(labels.iterdir()) if path.is_dir()] if labels.is_dir() else []
    objects = {img_id: folder for img_id in pictures for folder in _folders_of(labels / img_id) if inside(folder)}
    files = [path for path in inside(labels) if not is_product(path)]
    classes = {path.name: inside(path) for path in folders if path.name not in objects and inside(path)}
    if objects:
        paths = {img_id: inside(folder) for img_id, folder in objects.items()}
        says = f"{sum(map(len, paths.values())):,} masks in a folder per picture"
        known = {labels / img_id for img_id in objects}
        alone = [folder.name for folder in folders if folder not in known and inside(folder)]
        return [Source("object_masks", says, paths, read_object_masks, alone)]
    of_files, of_folders = _of_files(pictures, files), _of_folders(pictures, classes)
    if of_files and of_files.pairs and classes:
        of_files.notes.append(f"not read: the folders {listed(list(classes), 3)} inside {labels}")
        return [of_files]
    return [source for source in (of_files, of_folders) if source]


def _folders_of(folder):
    """Where the masks of one picture's objects may lie; the first is the layout of the raw DSB2018."""
    return [place for place in (folder / "masks", folder) if place.is_dir()][:1]


def _of_files(pictures, files):
    """Label pictures of one folder: one per picture, or one per class with different endings."""
    if not files:
        return None
    pairs, alone = pair(pictures, files)
    names = [path.name for path in alone]
    endings = {ending for of_picture in pairs.values() for ending in of_picture}
    if len(endings) < 2 or "" in endings:
        ending = "" if "" in endings else "".join(endings)
        maps = {img_id: paths[ending] for img_id, paths in pairs.items() if ending in paths}
        notes = not_used([path for paths in pairs.values() for other, path in paths.items() if other != ending])
        return Source("map", f"{len(maps):,} label pictures", maps, None, names, notes)  # read: see recognise.py
    says = f"{sum(map(len, pairs.values())):,} masks with the endings {listed(sorted(endings))}"
    return Source("class_masks", says, pairs, read_class_masks, names, _absent(pairs, endings))


def _of_folders(pictures, classes):
    """{folder: label pictures}: a folder per class; as _of_files, if there is one folder or they are the pictures'."""
    pairs, alone = {}, []
    for name, files in classes.items():
        of_class, unknown = pair(pictures, files)
        alone += [f"{name}/{path.name}" for path in unknown]
        for img_id, paths in of_class.items():
            if len(paths) > 1:
                raise ValueError(f"{listed(list(paths.values()))} are all masks of {img_id}; expected one per class")
            pairs.setdefault(img_id, {})[name] = next(iter(paths.values()))
    found = {name for paths in pairs.values() for name in paths}
    beside = all([*paths] == [pictures[img_id].parent.name] for img_id, paths in pairs.items())  # photos/train/a.png
    if len(found) < 2 or beside:
        return _of_files(pictures, [path for files in classes.values() for path in files])
    says = f"{sum(map(len, pairs.values())):,} masks in the folders {listed(sorted(found))}"
    return Source("class_masks", says, pairs, read_class_masks, alone, _absent(pairs, found))


def _absent(pairs, classes):
    """Sentences about the pictures that have masks of some classes only."""
    notes = []
    for name in sorted(classes):
        if missing := [img_id for img_id, paths in pairs.items() if name not in paths]:
            notes.append(f"no mask of {name}, taken as empty: {len(missing)} pictures ({listed(missing, 3)})")
    return notes


# ---------------------------------------------------------------- classes or objects?


def guess(paths):
    """What the values of maps are -> ("class_map", "instance_map" or None if both are possible, the evidence).

    Objects have many numbers, and each is one connected piece. Classes have few values, which lie in many pieces.
    """
    values, regions, whole, unreadable = set(), 0, 0, []
    for path in paths[:GUESS_MAPS]:
        try:
            array = read_map(path)
        except ValueError as error:  # it is named again when every file is read
            unreadable.append(error)
            continue
        found = values_of(array)
        values.update(found.tolist())
        for value in found[:GUESS_VALUES]:
            pieces = cv2.connectedComponents((array == value).astype(np.uint8), connectivity=8)[0] - 1
            regions, whole = regions + 1, whole + (pieces == 1)
    if len(unreadable) == len(paths[:GUESS_MAPS]):
        raise unreadable[0]
    if not values:
        raise ValueError(f"{paths[0].parent}: all label pictures are empty (0 everywhere)")
    share = whole / regions
    evidence = f"{len(values):,} nonzero values; {share:.0%} of them form one region per picture"
    if len(values) == 1:
        return "class_map", f"all labels are 0 or {value_name(*values)}"
    if len(values) <= MANY_VALUES and share < 0.5:
        return "class_map", evidence
    if len(values) > MANY_VALUES and share > 0.8:
        return "instance_map", evidence
    return None, evidence
