"""Labels in JSON: COCO (polygons and run lengths, one file for all pictures) and LabelMe (one file per picture).

from label_forms.annotations import run_lengths

piece = run_lengths("cell", {"size": [2, 3], "counts": [1, 2, 3]}, (2, 3))     # its mask: [[0, 1], [1, 0]] as bool
"""

import base64
import json
import math
from pathlib import PurePosixPath

import numpy as np

from common.images import decode, foreground
from label_forms.outlines import draw, ellipse, rectangle
from label_forms.pairing import one_each, pair
from label_forms.source import Piece, Source, cut, unite

MAX_JSON_BYTES = 2**27  # Python needs up to twenty-five times as much memory
MAX_CODES = 7  # characters of a compressed run length: 34 bits and a sign
DAMAGED_RUNS = "run lengths do not fill the picture"


def find_json(pictures, labels):
    """A .json file, or a folder of them -> [Source] of the form "coco" or "labelme", [] if there is neither."""
    files = sorted(path for path in labels.rglob("*.json") if path.is_file()) if labels.is_dir() else [labels]
    for path in files:
        if path.suffix.lower() != ".json":
            continue
        try:
            content = read_json(path)
        except ValueError:
            if files == [labels]:
                raise
            continue
        if not isinstance(content, dict):
            continue
        if "images" in content and "annotations" in content:
            source = coco_source(path, content, pictures)
            if len(files) > 1:
                source.notes.append(f"not read: {len(files) - 1} other .json files in {labels}")
            return [source]
        if "shapes" in content:
            return [labelme_source(files, pictures)]
    return []


# ---------------------------------------------------------------- JSON


def first_problem(files):
    """What is wrong with the first .json file that cannot be read; None without one."""
    for path in files:
        try:
            if path.suffix.lower() == ".json":
                read_json(path)
        except ValueError as error:
            return str(error)
    return None


def read_json(path):
    """The content of a JSON file. ValueError, naming it, when it is damaged, too large or nested too deeply."""
    if (size := path.stat().st_size) > MAX_JSON_BYTES:
        raise ValueError(f"{path} has {size:,} bytes, more than {MAX_JSON_BYTES:,}; split it into several data sets")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def check_size(found, shape, name):
    """ValueError unless (width, height) in a JSON file are the picture's; None stands for what it does not say."""
    for value, expected in zip(found, shape[::-1], strict=True):
        if value is not None and value != expected:
            raise ValueError(f"{name} says {found[0]} x {found[1]} pixels, the picture has {shape[1]} x {shape[0]}")


# ---------------------------------------------------------------- COCO


def read_coco(item, shape):
    """(entry of "images", [(class, annotation), ...]) -> yields the Piece of each annotation."""
    image, annotations = item
    check_size((image.get("width"), image.get("height")), shape, "the JSON file")
    for name, annotation in annotations:
        yield _coco_piece(name, annotation, shape)


def _coco_piece(name, annotation, shape):
    try:
        segmentation = annotation["segmentation"]
        if isinstance(segmentation, dict):
            piece = run_lengths(name, segmentation, shape)
        else:
            flat = isinstance(segmentation[0], (int, float))  # one polygon that is not in a list of polygons
            piece = draw(name, [segmentation] if flat else segmentation, shape)
    except (TypeError, KeyError, OverflowError, ValueError) as error:
        raise ValueError(f"annotation {annotation.get('id')}: {error}") from None
    return piece and piece._replace(single=not annotation.get("iscrowd"))


def run_lengths(name, segmentation, shape):
    """COCO's {"size": [height, width], "counts": numbers or their compressed text} -> Piece, or None for an empty mask.

    Runs go down the columns and begin with background. ValueError when they do not fill the picture.
    """
    height, width = shape
    check_size(segmentation["size"][::-1], shape, "the annotation")
    counts = segmentation["counts"]
    runs = np.asarray(counts, np.int64) if isinstance(counts, list) else decompress(counts)
    if runs.ndim != 1 or (runs < 0).any() or (runs > height * width).any() or runs.sum() != height * width:
        raise ValueError(DAMAGED_RUNS)
    ends = runs.cumsum()
    starts, ends = (ends - runs)[1::2], ends[1::2]
    starts, ends = starts[ends > starts], ends[ends > starts]
    if not len(starts):
        return None
    left, right = int(starts[0]) // height, int(ends[-1] - 1) // height + 1
    edges = np.zeros((right - left) * height + 1, np.int8)
    np.add.at(edges, starts - left * height, 1)
    np.add.at(edges, ends - left * height, -1)
    return cut(name, edges[:-1].cumsum(dtype=np.int8).reshape(right - left, height).T > 0, left)


def decompress(text):
    """COCO's compressed run lengths -> int64, as maskApi of the COCO API defines them; ValueError for other text.

    A character holds five bits, the lowest ones first, and whether more follow; the last one's fifth bit is the sign.
    From the fourth number on, each is the difference to the last but one.
    """
    codes = np.frombuffer(text.encode() if isinstance(text, str) else b"", np.uint8).astype(np.int64) - 48
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        raise ValueError(DAMAGED_RUNS)
    lasts = np.flatnonzero(codes & 32 == 0)
    firsts = np.append(0, lasts[:-1] + 1)
    lengths = lasts - firsts + 1
    if lengths.max() > MAX_CODES:
        raise ValueError(DAMAGED_RUNS)
    places = np.arange(len(codes)) - np.repeat(firsts, lengths)
    runs = np.add.reduceat((codes & 31) << 5 * places, firsts)
    runs -= np.where(codes[lasts] & 16, 1 << 5 * lengths, 0)
    for first in (1, 2):
        runs[first::2] = runs[first::2].cumsum()
    return runs


def coco_source(path, content, pictures):
    """The content of a COCO file -> Source. Its images are the pictures of the same names, in whatever folder."""
    entries, notes, boxes = {}, [], 0
    try:
        names = {category["id"]: str(category["name"]) for category in content["categories"]}
        for image in content["images"]:
            parts = PurePosixPath(str(image["file_name"]).replace("\\", "/")).parts
            if not parts or ".." in parts:
                raise ValueError(f"file_name {image['file_name']!r} leads out of the folder of pictures")
            if image["id"] in entries:
                raise ValueError(f"two images have the id {image['id']}")
            entries[image["id"]] = (parts[-1], image, [])
        for annotation in content["annotations"]:
            image_id, category_id = annotation["image_id"], annotation["category_id"]
            if image_id not in entries or category_id not in names:
                raise ValueError(f"an annotation names image {image_id}, category {category_id}; one is not listed")
            if annotation.get("segmentation"):
                entries[image_id][2].append((names[category_id], annotation))
            else:
                boxes += 1
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} is not valid COCO: {what}") from None
    if boxes:
        notes.append(f"not used: {boxes:,} annotations without an outline (boxes or key points)")
    stems = {}
    for name, image, annotations in entries.values():
        other = stems.setdefault(PurePosixPath(name).stem, (image, annotations))
        if other[0] is not image:
            raise ValueError(f"{path} has two images named {name}; each picture needs a name of its own")
    pairs = {img_id: stems[img_id] for img_id in pictures if img_id in stems}
    total = sum(len(annotations) for _, annotations in pairs.values())
    says = f"{path.name}, {total:,} annotations of {len(pairs):,} pictures"
    return Source("coco", says, pairs, read_coco, sorted(stems.keys() - pairs.keys()), notes)


# ---------------------------------------------------------------- LabelMe


def labelme_source(files, pictures):
    """LabelMe's files -> Source. A file belongs to the picture of its own name; its imagePath is not followed."""
    pairs, alone = pair(pictures, files)
    pairs, notes = one_each(pairs)
    return Source("labelme", f"{len(files):,} .json files", pairs, read_labelme, [path.name for path in alone], notes)


def read_labelme(path, shape):
    """A LabelMe file -> yields the Pieces of its objects. Entries of the same label and group_id are one object."""
    content, objects = read_json(path), {}
    try:
        check_size((content.get("imageWidth"), content.get("imageHeight")), shape, path.name)
        for number, entry in enumerate(content["shapes"]):
            group = entry.get("group_id")
            key = (str(entry["label"]), number if group is None else f"group {group}")
            objects.setdefault(key, []).append(entry)
        for (name, _), entries in objects.items():
            yield unite(_labelme_piece(name, entry, shape) for entry in entries)
    except (TypeError, KeyError, AttributeError, IndexError, OverflowError) as error:
        raise ValueError(f"{path.name} is not valid LabelMe: {type(error).__name__}: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None


def _labelme_piece(name, entry, shape):
    """An entry of "shapes" -> its Piece, or None for a line or a point, which have no area."""
    kind, points = entry.get("shape_type") or "polygon", entry["points"]
    if kind == "mask":
        return _labelme_mask(name, entry, shape)
    if kind in ("polygon", "oriented_rectangle") or (kind == "rectangle" and len(points) == 4):
        return draw(name, [points], shape)
    if kind == "rectangle":
        (x, y), (other_x, other_y) = points
        return draw(name, [rectangle(x, y, other_x, other_y)], shape)
    if kind == "circle":  # its centre and a point on it
        (x, y), end = points
        radius = math.dist((x, y), end)
        return draw(name, [ellipse(x - radius, y - radius, x + radius, y + radius)], shape)
    return None


def _labelme_mask(name, entry, shape):
    """An entry with a mask, a PNG within a box whose corners are pixels -> its Piece."""
    left, top = (int(value) for value in entry["points"][0])
    mask = foreground(decode(base64.b64decode(entry["mask"]), math.prod(shape)))
    if left < 0 or top < 0 or top + mask.shape[0] > shape[0] or left + mask.shape[1] > shape[1]:
        raise ValueError(f"a mask of {mask.shape[1]} x {mask.shape[0]} at ({left}, {top}) leads out of the picture")
    return Piece(name, top, left, mask)
