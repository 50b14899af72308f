"""Detects the format of labels: all formats are tried; maps of classes and of objects are told apart by their values.

from label_forms.recognise import find_places, recognise

images, labels = find_places(Path("dsb2018/train"), None)     # dsb2018/train/images, dsb2018/train/masks
source = recognise(list_pictures(images, labels), labels)
"""

from collections import Counter
from dataclasses import replace

from common.cli import listed
from label_forms.annotations import find_json, first_problem
from label_forms.cellpose import find_cellpose
from label_forms.imagej import find_rois
from label_forms.maps import find_label_pictures, guess, read_class_map, read_instance_map

FORMS = {  # name: what it is
    "class_map": "one label picture per picture, each value a class",
    "instance_map": "one label picture per picture, each value an object",
    "class_masks": "one mask per class: a folder per class, or endings such as _nuclei and _cells",
    "object_masks": "one mask per object, in a folder per picture",
    "coco": "COCO JSON, polygons or run lengths",
    "labelme": "LabelMe JSON",
    "imagej": "ImageJ ROIs, .zip or .roi",
    "cellpose": "Cellpose _seg.npy",
}
FINDERS = {  # what looks for which forms
    find_label_pictures: ("class_map", "instance_map", "class_masks", "object_masks"),
    find_json: ("coco", "labelme"),
    find_rois: ("imagej",),
    find_cellpose: ("cellpose",),
}
MAPS = {"class_map": read_class_map, "instance_map": read_instance_map}  # what Sources of the form "map" can be
BESIDE = ("masks", "labels", "annotations")  # folders beside images/, as StarDist and others lay them


def find_places(images, labels):
    """The folders of the pictures and of the labels; without the latter, one of BESIDE, or the same folder."""
    if labels is not None:
        if not labels.exists():
            raise FileNotFoundError(f"{labels}: no such file or folder; expected the labels")
        return images, labels
    if (images / "images").is_dir():
        for name in BESIDE:
            if (images / name).is_dir():
                return images / "images", images / name
    return images, images


def recognise(pictures, labels, form=None):
    """{id: picture}, the folder or file of the labels -> the one Source to read, whose `form` is a key of FORMS.

    form: what the user says it is. Raises ValueError when nothing fits, or when several forms are possible and the user
    does not say which.
    """
    finders = [find for find, forms in FINDERS.items() if form is None or form in forms]
    found = [source for find in finders for source in find(pictures, labels)]
    found = [source for source in found if form in (None, *_readings(source))]
    sources = [source for source in found if source.pairs]
    if not sources:
        raise ValueError(_nothing(found, labels, form))
    if len(sources) > 1:
        choices = " or ".join(f"{' or '.join(_readings(source))} ({source.says})" for source in sources)
        raise ValueError(f"{labels} can be read as {choices}: give --form, or the folder of one of them")
    [source] = sources
    return _as_map(source, form) if source.form == "map" else source


def _readings(source):
    """The keys of FORMS that a Source can be."""
    return tuple(MAPS) if source.form == "map" else (source.form,)


def _as_map(source, form):
    """A Source of maps, with what their values mean: as the user says, or as they look."""
    notes = list(source.notes)
    if form is None:
        form, evidence = guess(list(source.pairs.values()))
        if form is None:
            raise ValueError(
                f"the {source.says} can be maps of classes or of objects ({evidence}): "
                "give --form class_map or --form instance_map"
            )
        notes.append(f"guessed from the values: {evidence}")
    return replace(source, form=form, read=MAPS[form], notes=notes)


def _nothing(found, labels, form):
    """What to say when there is nothing to read."""
    if unpaired := [name for source in found for name in source.alone]:
        return f"none of the {len(unpaired):,} labels in {labels} has the name of a picture ({listed(unpaired, 3)})"
    files = [path for path in (labels.rglob("*") if labels.is_dir() else [labels]) if path.is_file()]
    if problem := first_problem(files):
        return f"{labels} holds no labels that can be read: {problem}"
    kinds = Counter(path.suffix or path.name for path in files)
    inside = listed([f"{count:,} {kind}" for kind, count in kinds.most_common()]) or "no file"
    expected = f"{form}: {FORMS[form]}" if form else "labels in a format that --help lists"
    return f"{labels} holds no labels that can be read ({inside}); expected {expected}"
