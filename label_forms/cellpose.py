"""Cellpose's `<picture>_seg.npy`, read without running what it says.

from label_forms.cellpose import read_masks

masks = read_masks(Path("photos/day1_seg.npy"))     # (H, W) integers: 0 background, 1 ... n

Such a file is a pickle: numpy.load(allow_pickle=True), as Cellpose opens it, calls any function that the file names.
Here every name stands for an inert object that only keeps what it is given, so nothing is imported or called; then the
one array `masks` is built from its recorded type, shape and bytes.
"""

import io
import pickle
import pickletools

import numpy as np

from instances import sequential
from label_forms.pairing import one_each, pair
from label_forms.source import Labels, Source, check_shape

MAX_FILE_BYTES = 2**30  # a picture of 4 megapixels takes about 200 MB
MAX_STEPS = 100_000  # of the pickle; Cellpose's have a few hundred
ELSE = "save the masks from Cellpose as PNG or TIFF (_cp_masks.png, _masks.tif) instead"


def find_cellpose(pictures, labels):
    """A folder with `<picture>_seg.npy` files -> [Source] of the form "cellpose", [] without any."""
    files = sorted(labels.glob("*_seg.npy")) if labels.is_dir() else [labels]
    files = [path for path in files if path.name.endswith("_seg.npy")]
    if not files:
        return []
    pairs, alone = pair(pictures, files)
    pairs, notes = one_each(pairs)
    says, alone = f"{len(files):,} _seg.npy files", [path.name for path in alone]
    return [Source("cellpose", says, pairs, read_cellpose, alone, notes)]


def read_cellpose(path, shape):
    masks = read_masks(path)
    check_shape(masks, shape, path.name)
    return Labels({"object": masks > 0}, sequential(masks))


def read_masks(path):
    """The `masks` of a `_seg.npy` file: (H, W) integers. ValueError when there are none in a form that is known."""
    if (size := path.stat().st_size) > MAX_FILE_BYTES:
        raise ValueError(f"{path.name} has {size:,} bytes, more than {MAX_FILE_BYTES:,}; {ELSE}")
    try:
        data = path.read_bytes()
        if data[:6] != b"\x93NUMPY":
            raise ValueError("not an .npy file")
        header = 10 if data[6] == 1 else 12  # with the length of the description that follows
        length = int.from_bytes(data[8:header], "little")
        outer = _inert(data[header + length :])  # a numpy array of one object, the dictionary
        return _array(outer.state[4][0]["masks"])
    except Exception as error:  # a damaged or hostile file can raise an exception of any class
        raise ValueError(f"{path.name} holds no masks that can be read safely ({error}); {ELSE}") from None


def _inert(data):
    """Unpickle with stand-ins. ValueError for more steps, or a larger memo, than an honest file has."""
    for step, (opcode, argument, _) in enumerate(pickletools.genops(io.BytesIO(data))):
        large = "PUT" in opcode.name and int(argument) > MAX_STEPS  # unpickling makes room for that many objects
        if step > MAX_STEPS or large:
            raise ValueError("too many steps")

    class StandIn:
        """Whatever class or function the file names: called with anything, it only keeps its arguments and state."""

        state = ()

        def __init__(self, *arguments):
            self.arguments = arguments

        def __setstate__(self, state):
            self.state = state

    class Reader(pickle.Unpickler):
        def find_class(self, module, name):
            return StandIn

    return Reader(io.BytesIO(data)).load()


def _array(stand_in):
    """The stand-in of a numpy array -> (H, W) integers. Its state: version, shape, dtype, Fortran order, bytes."""
    _, shape, dtype, fortran, raw = stand_in.state
    order, kind = dtype.state[1], dtype.arguments[0]
    if kind not in ("u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8"):
        raise ValueError(f"masks of type {kind}")
    array = np.frombuffer(raw, np.dtype(kind).newbyteorder(order))
    array = array.reshape(shape, order="F" if fortran else "C")
    if array.ndim != 2:
        raise ValueError(f"masks with {array.ndim} axes: a stack; expected one picture")
    if array.min(initial=0) < 0:
        raise ValueError("negative masks")
    return array.astype(np.int64)
