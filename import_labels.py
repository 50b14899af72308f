"""Your pictures and labels -> inputs/<name>/images/<id>.png, masks/<class>/<id>.png and labels/<id>.png.

python import_labels.py photos labels --name my_cells --check    # only prints and draws what it recognises
python import_labels.py photos labels --name my_cells
python import_labels.py dsb2018/train --name stardist            # images/ and masks/ in one folder
python import_labels.py photos annotations.json --name coco

Label formats that are recognised (--form chooses where several are possible):

{forms}
"""

import shlex
from dataclasses import dataclass, field
from pathlib import Path

from common.cli import Parser, answer_early, in_one_line, listed, parse_options, run_script

answer_early(__name__)  # the imports below take a second, and the help needs them

import cv2
import numpy as np
from tqdm import tqdm

from common.files import check_place, is_plain_name, new_folder, write_yaml
from common.images import read_picture, squeeze, to_channels, write_png
from common.runs import OUTPUTS
from data_folder import INPUTS
from label_forms.pairing import list_pictures
from label_forms.recognise import FORMS, find_places, recognise
from label_forms.source import MAX_CLASSES
from labels import MAX_OBJECTS, write_labels

NAMED = 5  # files or classes in a line
SKIPPED_SHOWN = 20
SHEET_PICTURES, SHEET_SIDE = 6, 480  # pictures on the contact sheet, and the longest side of each in pixels
GAP = 8  # pixels between them
COLOURS = (  # RGB of the outlines of the classes, over and over
    ("yellow", (255, 210, 0)),
    ("blue", (0, 150, 255)),
    ("red", (255, 60, 60)),
    ("green", (0, 210, 90)),
    ("pink", (240, 110, 230)),
    ("white", (255, 255, 255)),
)


def build_parser():
    width = max(map(len, FORMS))
    forms = "\n".join(f"    {name:{width}}  {what}" for name, what in FORMS.items())
    parser = Parser(description=__doc__.format(forms=forms))
    a = parser.add_argument
    a("images", type=Path, help="folder of the pictures")
    labels = "folder or file of the labels; default: masks/, labels/ or annotations/ beside IMAGES/images, or IMAGES"
    a("labels", type=Path, nargs="?", help=labels)
    a("--name", required=True, help="the data set becomes inputs/<name>")
    a("--form", choices=FORMS, help="format of the labels; default: detected from the files")
    a("--classes", help="the classes to keep, in this order, such as nucleus,cell; default: all, in alphabetical order")
    a("--check", action="store_true", help="print and draw what was recognised, write nothing to inputs/")
    a("--overwrite", action="store_true", help="replace an existing data set")
    return parser


# ---------------------------------------------------------------- reading everything once


@dataclass
class Survey:
    """What all pictures and labels hold, counted before anything is written."""

    classes: list = field(default_factory=list)  # names; their place is the number of their folder
    pixels: dict = field(default_factory=dict)  # {name: pixels of this class in all pictures}
    objects: dict = field(default_factory=dict)  # {id: number of objects}, empty when they are not known
    usable: list = field(default_factory=list)  # ids
    skipped: dict = field(default_factory=dict)  # {id: why}
    total: int = 0  # pixels
    shared: int = 0  # pixels that several objects claim
    lost: int = 0  # objects without a pixel


def read_pair(img_id, pictures, source, keep):
    """The picture, as read_picture returns it, and its Labels. ValueError says why they cannot be used."""
    image = read_picture(pictures[img_id])
    labels = source.labels_of(img_id, image.shape[:2], keep)
    if (found := count_objects(labels)) > MAX_OBJECTS:
        raise ValueError(f"{found:,} objects, more than the {MAX_OBJECTS:,} that a PNG of 16 bits can number")
    return image, labels


def count_objects(labels):
    return 0 if labels.objects is None else int(labels.objects.max(initial=0))


def survey(pictures, source, chosen=None):
    """Read every picture with its labels -> Survey. chosen: the classes to keep, or None for all.

    Raises ValueError when no picture can be used, there is no class, there are too many, or a chosen one is missing.
    """
    counted = Survey()
    for img_id in tqdm([img_id for img_id in pictures if img_id in source.pairs], "read", unit="img", disable=None):
        try:
            image, labels = read_pair(img_id, pictures, source, chosen)
        except ValueError as error:
            counted.skipped[img_id] = str(error)
            continue
        counted.usable.append(img_id)
        counted.total += image.shape[0] * image.shape[1]
        counted.shared += labels.shared
        counted.lost += labels.lost
        for name, mask in labels.masks.items():
            counted.pixels[name] = counted.pixels.get(name, 0) + int(mask.sum())
        if labels.objects is not None:
            counted.objects[img_id] = count_objects(labels)
    if not counted.usable:
        first, why = next(iter(counted.skipped.items()))
        raise ValueError(f"none of {len(counted.skipped)} pictures can be used; the first, {first}: {why}")
    counted.classes = choose_classes(counted.pixels, chosen)
    return counted


def choose_classes(found, chosen=None):
    """The names of the classes in the order of their folders: those chosen, or all, numbers before other names."""
    ordered = sorted(found, key=lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else 0, name))
    if not ordered:
        raise ValueError("the labels hold no class: all of them are empty")
    if chosen is None and len(ordered) > MAX_CLASSES:
        raise ValueError(f"{len(ordered):,} classes, more than {MAX_CLASSES}; give --classes, or another --form")
    if unknown := [name for name in chosen or () if name not in found]:
        raise ValueError(f"--classes: no class {listed(unknown, NAMED)}; found {listed(ordered, 2 * NAMED)}")
    return list(dict.fromkeys(chosen or ordered))


# ---------------------------------------------------------------- what the user sees


def say(head, text):
    """A line of the report. Names come from other people's files: what cannot be printed is replaced."""
    print(f"{head:<10}{in_one_line(text)}")


def print_pairs(pictures, source, labels):
    without = [img_id for img_id in pictures if img_id not in source.pairs]
    say("form", f"{source.form}: {FORMS[source.form]}")
    say("found", f"{source.says} in {labels}")
    say("pairs", f"{len(source.pairs):,} of {len(pictures):,} pictures have labels")
    if without:
        say("", f"pictures without labels, left out: {len(without):,} ({listed(without, NAMED)})")
    if source.alone:
        say("", f"labels without a picture: {len(source.alone):,} ({listed(source.alone, NAMED)})")
    for note in source.notes:
        say("", note)


def print_survey(counted):
    for img_id, why in list(counted.skipped.items())[:SKIPPED_SHOWN]:
        say("skipped", f"{img_id}: {why}")
    if len(counted.skipped) > SKIPPED_SHOWN:
        say("skipped", f"{len(counted.skipped) - SKIPPED_SHOWN:,} more")
    for number, name in enumerate(counted.classes):
        colour, _ = COLOURS[number % len(COLOURS)]
        fraction = counted.pixels[name] / counted.total
        say(f"class {number}", f"{name}: {fraction:.2%} of the pixels, drawn in {colour}")
    if others := [name for name in counted.pixels if name not in counted.classes]:
        say("", f"left out: {listed(others, NAMED)}")
    if not counted.objects:
        say("objects", "not known: these labels say where a class is, not which pixels are one object")
        return
    counts = list(counted.objects.values())
    say("objects", f"{sum(counts):,}, from {min(counts):,} to {max(counts):,} per picture")
    if counted.shared:
        say("", f"{counted.shared:,} pixels belong to several objects; labels/ gives them to the smallest")
    if counted.lost:
        say("", f"{counted.lost:,} more without a pixel: hidden, too thin, outside, or points and lines")


def outlined(image, labels, classes):
    """The picture with the outlines of its objects or classes -> (H, W, 3) uint8, its longer side SHEET_SIDE.

    Dark pictures are brightened.
    """
    factor = SHEET_SIDE / max(image.shape[:2])
    size = tuple(max(1, round(side * factor)) for side in image.shape[:2])
    drawn = squeeze(to_channels(image, 3), size)
    drawn = cv2.convertScaleAbs(drawn, alpha=255 / max(1, np.percentile(drawn, 99.5)))
    for number, name in enumerate(classes):
        mask = labels.masks.get(name)
        if mask is None:
            continue
        areas = mask.astype(np.uint16) if labels.objects is None else np.where(mask, labels.objects, 0)
        areas = cv2.resize(areas.astype(np.uint16), size[::-1], interpolation=cv2.INTER_NEAREST)
        border = cv2.morphologyEx(areas, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0
        drawn[border & (areas > 0)] = COLOURS[number % len(COLOURS)][1]
    return drawn


def contact_sheet(pictures, source, counted):
    """(H, W, 3) uint8: a few of the usable pictures with their outlines, evenly over the list, three in a row."""
    places = np.linspace(0, len(counted.usable) - 1, min(SHEET_PICTURES, len(counted.usable))).round().astype(int)
    tiles = []
    for place in places:
        image, labels = read_pair(counted.usable[place], pictures, source, counted.classes)
        drawn = outlined(image, labels, counted.classes)
        tile = np.full((SHEET_SIDE + GAP, SHEET_SIDE + GAP, 3), 40, np.uint8)
        tile[: drawn.shape[0], : drawn.shape[1]] = drawn
        tiles.append(tile)
    columns = min(3, len(tiles))
    tiles += [np.full_like(tiles[0], 40)] * (-len(tiles) % columns)
    rows = [np.hstack(tiles[start : start + columns]) for start in range(0, len(tiles), columns)]
    return np.vstack(rows)


# ---------------------------------------------------------------- the data set


def write_image(path, source, image):
    """A PNG is copied as it is; another picture becomes one without alpha, its values kept if of 8 or 16 bits."""
    if source.suffix.lower() == ".png":
        path.write_bytes(source.read_bytes())
    elif image.dtype in (np.uint8, np.uint16):
        write_png(path, image if image.ndim == 2 else image[..., :3])
    else:
        write_png(path, to_channels(image, 3))


def write_data_set(folder, pictures, source, counted):
    """Fill the folder with images/, masks/ and, where objects are known, labels/, all PNG."""
    (folder / "images").mkdir()
    for number in range(len(counted.classes)):
        (folder / "masks" / str(number)).mkdir(parents=True)
    if counted.objects:
        (folder / "labels").mkdir()
    for img_id in tqdm(counted.usable, "write", unit="img", disable=None):
        image, labels = read_pair(img_id, pictures, source, counted.classes)
        write_image(folder / "images" / f"{img_id}.png", pictures[img_id], image)
        for number, name in enumerate(counted.classes):
            mask = labels.masks.get(name, np.zeros(image.shape[:2], bool))
            write_png(folder / "masks" / str(number) / f"{img_id}.png", mask.astype(np.uint8) * 255)
        if labels.objects is not None:
            write_labels(folder / "labels" / f"{img_id}.png", labels.objects)


def describe(images, labels, source, counted):
    """The content of dataset.yml."""
    content = {"source": str(images), "labels": str(labels), "form": source.form, "images": len(counted.usable)}
    content["classes"] = dict(enumerate(counted.classes))
    content["foreground"] = {name: round(counted.pixels[name] / counted.total, 6) for name in counted.classes}
    if counted.objects:
        content["objects"] = sum(counted.objects.values())
    return {**content, "skipped": counted.skipped}


def main():
    options, _ = parse_options(build_parser)
    if not is_plain_name(options.name):
        raise ValueError(f"--name {options.name!r}: expected the name of a folder in inputs/")
    chosen = None if options.classes is None else [name.strip() for name in options.classes.split(",")]
    output, sheet = INPUTS / options.name, OUTPUTS / options.name / "labels.png"

    def may_write():
        check_place(output, "dataset.yml", options.overwrite, "--name")

    if not options.check:
        may_write()  # before everything is read
    images, labels = find_places(options.images, options.labels)
    pictures = list_pictures(images, labels)
    source = recognise(pictures, labels, options.form)
    print_pairs(pictures, source, labels)
    counted = survey(pictures, source, chosen)
    print_survey(counted)
    sheet.parent.mkdir(parents=True, exist_ok=True)
    write_png(sheet, contact_sheet(pictures, source, counted))
    say("drawn", f"{sheet}: check that the outlines fit")
    if options.check:
        say("checked", f"{output} was not written; leave out --check to write it")
        return
    with new_folder(output, check=may_write) as folder:
        write_data_set(folder, pictures, source, counted)
        write_yaml(folder / "dataset.yml", describe(images, labels, source, counted))
    name = shlex.quote(options.name)
    say("written", f"{output}; next: python train.py --dataset {name} --num_classes {len(counted.classes)}")


if __name__ == "__main__":
    run_script(main)
