"""What every form of labels becomes: a mask for each class and, where they are known, a map of the objects.

from label_forms.source import Labels, Piece, paint

labels = paint([Piece("nucleus", 2, 3, np.ones((4, 4), bool))], (32, 32))
labels.masks["nucleus"], labels.objects     # (32, 32) bool, (32, 32) int32: 0 background, 1 ... n the objects
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from instances import sequential
from labels import MAX_OBJECTS

MAX_CLASSES = 100  # as train.py
MAX_PIECE_PIXELS = 1_000_000_000  # in the boxes of one picture's objects, a byte each


@dataclass
class Labels:
    """The labels of one picture."""

    masks: dict  # {name of a class: (H, W) bool}; classes may overlap, and a class that is absent may be missing
    objects: np.ndarray | None = None  # (H, W) int32: 0 background, 1 ... n; None when they are not known
    shared: int = 0  # pixels that several objects claim; the smallest object has them
    lost: int = 0  # objects without a pixel: outside of the picture, too thin, or hidden by smaller ones


@dataclass
class Source:
    """The labels that were found in one form."""

    form: str
    says: str  # for the user, such as "12 ImageJ ROI files"
    pairs: dict  # {id of a picture: its labels, as `read` takes them}
    read: Callable  # (pairs[id], (height, width) of the picture) -> Labels, or the Pieces of its objects
    alone: list = field(default_factory=list)  # names of labels without a picture
    notes: list = field(default_factory=list)  # sentences for the user

    def labels_of(self, img_id, shape, keep=None):
        """The Labels of a picture of (height, width); ValueError says what is wrong with them. keep: see paint."""
        found = self.read(self.pairs[img_id], shape)
        return found if isinstance(found, Labels) else paint(found, shape, keep)


class Piece(NamedTuple):
    """One object of a picture: its mask within the box whose upper left corner is (top, left)."""

    name: str  # of its class
    top: int
    left: int
    mask: np.ndarray  # (h, w) bool
    single: bool = True  # False for a crowd: its pixels belong to the class, but it is no object

    @property
    def box(self):
        """The slices of the picture that it covers."""
        height, width = self.mask.shape
        return np.s_[self.top : self.top + height, self.left : self.left + width]


def check_shape(array, shape, name):
    """ValueError, naming the file, unless an array has the height and width of its picture."""
    if array.shape[:2] != tuple(shape):
        found, expected = array.shape[1::-1], tuple(shape)[::-1]
        raise ValueError(f"{name} has {found[0]} x {found[1]} pixels, its picture {expected[0]} x {expected[1]}")


def cut(name, mask, beginning=0):
    """(H, W) bool, a picture or its columns from `beginning` on -> its Piece, or None for an empty mask."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return None
    top, left = int(rows[0]), int(columns[0])
    return Piece(name, top, beginning + left, mask[top : rows[-1] + 1, left : columns[-1] + 1].copy())


def unite(pieces):
    """Several Pieces of one object, or None for those without a pixel -> one Piece, or None."""
    pieces = [piece for piece in pieces if piece is not None]
    if not pieces:
        return None
    rows, columns = zip(*(piece.box for piece in pieces), strict=True)
    top, left = min(part.start for part in rows), min(part.start for part in columns)
    mask = np.zeros((max(part.stop for part in rows) - top, max(part.stop for part in columns) - left), bool)
    for piece in pieces:
        mask[piece._replace(top=piece.top - top, left=piece.left - left).box] |= piece.mask
    return Piece(pieces[0].name, top, left, mask)


def paint(pieces, shape, keep=None):
    """Pieces, or None for objects without a pixel, of a picture of (height, width) -> Labels.

    Where objects overlap, the smallest one has the pixel in the map of the objects; masks keep all of them.
    keep: names of the classes whose objects are in that map; None for all.
    Raises ValueError when there are more objects than 16 bits can number, or more pixels than fit into memory.
    """
    kept, pixels, lost = [], 0, 0
    for piece in pieces:
        if piece is None or not piece.mask.any():
            lost += 1
            continue
        kept.append(piece)
        pixels += piece.mask.size
        if len(kept) > MAX_OBJECTS or pixels > MAX_PIECE_PIXELS:
            raise ValueError(f"more than {MAX_OBJECTS:,} objects, or {MAX_PIECE_PIXELS:,} pixels in their boxes")
    masks, objects, shared = {}, np.zeros(shape, np.int32), np.zeros(shape, bool)
    numbers = sorted(range(len(kept)), key=lambda number: -int(kept[number].mask.sum()))
    for number in numbers:
        piece = kept[number]
        box = piece.box
        masks.setdefault(piece.name, np.zeros(shape, bool))[box] |= piece.mask
        if _is_object(piece, keep):
            shared[box] |= piece.mask & (objects[box] > 0)
            objects[box][piece.mask] = number + 1
    objects = sequential(objects)
    hidden = sum(_is_object(piece, keep) for piece in kept) - int(objects.max(initial=0))
    return Labels(masks, objects, int(shared.sum()), lost + hidden)


def _is_object(piece, keep):
    return piece.single and (keep is None or piece.name in keep)
