"""Files of individual nuclei for other programs: label TIFF, ImageJ ROIs, QuPath GeoJSON, the Bowl's submission.

    write_label_tiff("a_labels.tif", labels, pixel_size=0.5)   # Fiji, napari, CellProfiler
    write_rois("a_rois.zip", labels)                           # ImageJ: Analyze > Tools > ROI Manager, More > Open
    write_geojson("a.geojson", labels, table)                  # QuPath: File > Import objects
    write_submission("submission.csv", [("a", labels), ...])   # run lengths

A label map is (H, W) int32, 0 background, 1 ... n the nuclei. The outlines follow the edges of the pixels, so the area
inside is that of the nucleus: (0, 0) is the corner of the upper left pixel, as ImageJ, QuPath and COCO count.
"""

import csv
import json
import math
import zipfile

import numpy as np
import tifffile
from scipy import ndimage

from common.extras import load_extra
from common.files import atomic_path
from instances import to_runs

SUBMISSION = ("ImageId", "EncodedPixels")  # columns of the 2018 Data Science Bowl
MOVE, LINE, CLOSE = 0, 1, 4  # ImageJ's segments of a path: java.awt.geom.PathIterator
MICROMETRES_PER_CM = 10_000
CENTIMETRE = 3  # ResolutionUnit of TIFF
BIG_TIFF = 2**31  # bytes; a classic TIFF ends at 4 GiB
IMAGEJ_SIDE = 60_535  # pixels: ImageJ and roifile read 16-bit coordinates as -5000 ... 60535


# ---------------------------------------------------------------- label TIFF


def write_label_tiff(path, labels, pixel_size=None):
    """Label map -> a TIFF of 16 bits, or of 32 with more than 65,535 nuclei; deflate compression.

    pixel_size: micrometres per pixel, kept as the resolution of the file.
    """
    # OpenCV before 5 reads no compressed uint32
    kind = np.uint16 if labels.max(initial=0) <= np.iinfo(np.uint16).max else np.int32
    with atomic_path(path) as temporary:
        tifffile.imwrite(temporary, labels.astype(kind), **_options(pixel_size))


def join_label_tiffs(paths, path):
    """Label TIFFs of one page each -> one TIFF of their pages in this order; `paths` are deleted."""
    found = []
    for page in paths:  # one at a time: a process may not open thousands of files
        with tifffile.TiffFile(page) as file:
            first = file.pages.first
            found.append((first.dtype, first.size, _pixel_size(first)))
    kinds, sizes, pixel_sizes = zip(*found, strict=True)
    kind = max(kinds, key=lambda kind: kind.itemsize)
    options, large = _options(pixel_sizes[0]), sum(sizes) * kind.itemsize > BIG_TIFF
    with atomic_path(path) as temporary, tifffile.TiffWriter(temporary, bigtiff=large) as writer:
        for page in paths:
            writer.write(tifffile.imread(page).astype(kind), **options)
    for page in paths:
        page.unlink()


def _pixel_size(page):
    """What `_options` made the resolution of."""
    if page.tags.valueof("ResolutionUnit") != CENTIMETRE:
        return None
    pixels, per_cm = page.tags.valueof("XResolution")
    return MICROMETRES_PER_CM * per_cm / pixels


def _options(pixel_size):
    options = {"compression": "zlib", "photometric": "minisblack", "metadata": None}
    if pixel_size:
        per_cm = MICROMETRES_PER_CM / pixel_size
        options.update(resolution=(per_cm, per_cm), resolutionunit="CENTIMETER")
    return options


# ---------------------------------------------------------------- outlines


def outlines(labels):
    """Label map -> yields (label, polygons) of each nucleus in order; needs shapely.

    A polygon is a list of closed rings [(x, y), ...] of whole numbers: its outside, counter-clockwise as RFC 7946 asks
    (x to the right, y taken as upwards), then its holes, clockwise. Parts of a nucleus that touch in a corner alone are
    polygons of their own, so that each is valid by the rules of OGC.
    """
    shapely = load_extra("shapely", "objects")
    for label, box in enumerate(ndimage.find_objects(labels), 1):
        if box is None:
            continue
        rows, columns = box
        lefts, tops, rights = _runs(labels[box] == label)
        pixels = shapely.box(lefts + columns.start, tops + rows.start, rights + columns.start, tops + rows.start + 1)
        united = shapely.union_all(pixels).simplify(0)  # without corners in the middle of a straight line
        yield label, [_rings(polygon) for polygon in shapely.get_parts(united)]


def _runs(mask):
    """(h, w) bool -> left, top and right of each run of pixels in a row, int arrays; right is exclusive."""
    changes = np.diff(mask.astype(np.int8), axis=1, prepend=0, append=0)
    tops, lefts = np.nonzero(changes == 1)
    rights = np.nonzero(changes == -1)[1]
    return lefts, tops, rights


def _rings(polygon):
    """A shapely polygon -> [outside, hole, ...], as in `outlines`."""
    from shapely.geometry.polygon import orient

    polygon = orient(polygon)
    return [[(int(x), int(y)) for x, y in ring.coords] for ring in (polygon.exterior, *polygon.interiors)]


# ---------------------------------------------------------------- ImageJ


def fits_imagej(shape):
    """Whether ROIs can hold the outlines of a picture of (height, width)."""
    return max(shape) <= IMAGEJ_SIDE


def write_rois(path, labels):
    """Label map -> a zip of ImageJ ROIs, one per nucleus, named by its number; needs roifile and shapely.

    A nucleus with holes or several parts is a composite ROI, any other one a polygon. ValueError for a picture with
    more than IMAGEJ_SIDE pixels per side, which the format cannot hold.
    """
    roifile = load_extra("roifile", "objects")
    if not fits_imagej(labels.shape):
        size = f"{labels.shape[1]} x {labels.shape[0]}"
        raise ValueError(f"{path}: ImageJ ROIs reach {IMAGEJ_SIDE:,} pixels, the picture has {size}")
    digits = len(str(labels.max(initial=0)))
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for label, polygons in outlines(labels):
            name = f"{label:0{digits}d}"  # ImageJ sorts names as text
            archive.writestr(f"{name}.roi", _roi(roifile, name, polygons).tobytes())


def _roi(roifile, name, polygons):
    rings = [ring[:-1] for rings in polygons for ring in rings]  # ImageJ closes them itself
    roi = roifile.ImagejRoi.frompoints(np.concatenate(rings), name=name)
    roi.right, roi.bottom = roi.right - 1, roi.bottom - 1  # frompoints takes corners for the centres of pixels
    if len(rings) == 1:
        roi.roitype = roifile.ROI_TYPE.POLYGON
        return roi
    path = []
    for first, *others in rings:
        path += [MOVE, *first]
        for corner in others:
            path += [LINE, *corner]
        path.append(CLOSE)
    roi.roitype, roi.integer_coordinates, roi.n_coordinates = roifile.ROI_TYPE.RECT, None, 0
    roi.multi_coordinates, roi.shape_roi_size = np.array(path, np.float32), len(path)
    return roi


# ---------------------------------------------------------------- QuPath


def write_geojson(path, labels, table=None):
    """Label map -> a GeoJSON FeatureCollection of QuPath detections, one per nucleus; needs shapely.

    table: of objects.measure; its finite numbers become the measurements of each detection.
    """
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write('{"type": "FeatureCollection", "features": [')
        columns = [column for column in table or () if column != "object"]
        for k, (label, polygons) in enumerate(outlines(labels)):
            values = {column: float(table[column][k]) for column in columns}
            measurements = {column: value for column, value in values.items() if math.isfinite(value)}  # no NaN in JSON
            file.write(",\n" if k else "\n")
            json.dump(_feature(label, polygons, measurements), file)
        file.write("\n]}\n")


def _feature(label, polygons, measurements):
    if len(polygons) == 1:
        geometry = {"type": "Polygon", "coordinates": polygons[0]}
    else:
        geometry = {"type": "MultiPolygon", "coordinates": polygons}
    properties = {
        "objectType": "detection",
        "name": str(label),
        "classification": {"name": "Nucleus"},
        "measurements": measurements,
    }
    return {"type": "Feature", "geometry": geometry, "properties": properties}


# ---------------------------------------------------------------- the Data Science Bowl


def submission_rows(img_id, labels):
    """Label map -> [(img_id, runs), ...], a row per nucleus, or one row with an empty text where there is none."""
    return [(img_id, runs) for runs in to_runs(labels) or [""]]


def check_submission(path):
    """ValueError where a submission cannot be written, or would replace anything but an earlier submission."""
    if file := next((folder for folder in path.parents if folder.is_file()), None):
        raise ValueError(f"--submission {path}: {file} is a file, not a folder")
    if not path.exists():
        return
    heading = ""
    if path.is_file():
        with open(path, encoding="utf-8", errors="replace") as file:
            heading = file.readline(100).strip()
    if heading != ",".join(SUBMISSION):
        raise ValueError(f"--submission {path} exists and is not a submission; give another name")


def write_submission(path, pictures):
    """(img_id, label map) of each picture -> the CSV file of the Data Science Bowl."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(SUBMISSION)
        for img_id, labels in pictures:
            writer.writerows(submission_rows(img_id, labels))
