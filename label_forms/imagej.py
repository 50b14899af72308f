"""Labels as ImageJ's ROI manager saves them: a .zip of ROIs per picture, or single .roi files.

from label_forms.imagej import find_rois

[source] = find_rois({"day1": Path("photos/day1.tif")}, Path("rois"))    # rois/day1.zip, or RoiSet_day1.zip
"""

from common.download import ZIP_ERRORS, check_zip, open_zip
from common.extras import load_extra
from label_forms.outlines import draw, ellipse
from label_forms.pairing import OF_LABELS, pair, words
from label_forms.source import Source

MAX_ZIP_BYTES = 2**28  # of the ROIs of one picture, unpacked; 10,000 nuclei take about 10 MB
WITH_AREA = ("POLYGON", "RECT", "OVAL", "FREEHAND", "TRACED")  # and composite ones, which ImageJ calls RECT


def find_rois(pictures, labels):
    """A .zip or .roi file, or a folder with them -> [Source] of the form "imagej", [] without any.

    Names are paired as for other labels; RoiSet.zip may stand alone for a single picture. The .roi files of a picture
    may also lie in a folder of its name.
    """
    files = sorted(path for path in (labels.iterdir() if labels.is_dir() else [labels]) if _is_roi_file(path))
    folders = {img_id: sorted((labels / img_id).glob("*.roi")) for img_id in pictures if (labels / img_id).is_dir()}
    pairs = {img_id: {path.stem: ("object", path) for path in paths} for img_id, paths in folders.items() if paths}
    if not files and not pairs:
        return []
    of_files, alone = pair(pictures, files)
    if len(alone) == len(files) == len(pictures) == 1 and OF_LABELS.issuperset(words(files[0].stem)):
        of_files, alone = {next(iter(pictures)): {"": files[0]}}, []
    for img_id, paths in of_files.items():
        named = {ending: (ending or "object", path) for ending, path in paths.items()}
        pairs.setdefault(img_id, {}).update(named)
    pairs = {img_id: list(paths.values()) for img_id, paths in pairs.items()}
    says = f"{sum(map(len, pairs.values())) + len(alone):,} ImageJ ROI files"
    return [Source("imagej", says, pairs, read_rois, [path.name for path in alone])]


def _is_roi_file(path):
    """Whether it is an .roi file, or a zip that holds some; a damaged zip is named when it is read."""
    if path.suffix.lower() != ".zip" or not path.is_file():
        return path.suffix.lower() == ".roi"
    try:
        with open_zip(path) as archive:
            return any(name.lower().endswith(".roi") for name in archive.namelist())
    except ValueError:
        return True


def read_rois(items, shape):
    """[(class, path), ...] of one picture -> yields the Pieces; None for lines and points, which have no area."""
    slices = set()
    for name, path in items:
        for roi in _rois(path):
            slices.add((roi.z_position, roi.t_position) if roi.z_position or roi.t_position else roi.position)
            if len(slices - {0}) > 1:
                raise ValueError(f"{path.name} has ROIs on several slices of a stack; save one file per slice")
            yield draw(name, _outlines(roi, path), shape, cut_out=roi.composite)


def _rois(path):
    """Yields the roifile.ImagejRoi objects of a .roi or .zip file."""
    roifile = load_extra("roifile", "import")

    def parsed(name, data):
        try:
            return roifile.ImagejRoi.frombytes(data)
        except Exception:  # roifile raises errors without a common class
            raise ValueError(f"{path.name}: {name} is damaged, or not an ImageJ ROI") from None

    if path.suffix.lower() == ".roi":
        yield parsed("the file", path.read_bytes())
        return
    check_zip(path, MAX_ZIP_BYTES)
    with open_zip(path) as archive:
        names = [name for name in archive.namelist() if name.lower().endswith(".roi")]
        for name in names:
            try:
                data = archive.read(name)
            except ZIP_ERRORS as error:
                raise ValueError(f"{path.name} is damaged ({error})") from None
            yield parsed(name, data)


def _outlines(roi, path):
    """The outlines of an ImagejRoi, none for one without an area."""
    if roi.roitype.name not in WITH_AREA:
        return []
    if roi.roitype.name == "OVAL":
        return [ellipse(roi.left, roi.top, roi.right, roi.bottom)]
    try:
        return roi.coordinates(multi=True)
    except Exception:  # as above
        raise ValueError(f"{path.name}: the outline of {roi.name!r} is damaged") from None
