"""What predict.py writes for individual nuclei: label TIFFs, outlines, measures, and files for other programs.

    results = NucleiResults(Path("outputs/nuclei/predict"), names, settings="models/nuclei L4", rois=True)
    with results.kept(count=len(files)):
        results.add(path, picture, found, seconds=0.4)     # found: nuclei.find.Found
    results.finish()                                       # one label TIFF for the pages of each file
    results.write_submission("submission.csv", files)

The folder has <name>_labels.tif, <name>_overlay.png and, when asked for, <name>_rois.zip and <name>.geojson of each
picture. predictions.py describes the tables and how names are given.
"""

import time

import numpy as np
import tifffile

from common import report
from common.extras import load_extra
from common.images import MOST_PIXELS, Page, to_channels
from common.outlines import distinct_colours, draw_outlines
from labels import read_labels
from nuclei.object_files import (
    join_label_tiffs,
    write_geojson,
    write_label_tiff,
    write_rois,
    write_submission,
)
from nuclei.objects import measure, summarise
from predictions import Results, name_of_stack, um_per_pixel

PACKAGES = {"rois": ("roifile", "shapely"), "geojson": ("shapely",)}  # optional ones
THICK = 1024  # pixels of the longer side, from which outlines are two pixels wide


class NucleiResults(Results):
    """Nuclei of pictures, each with its number.

    Args, besides those of predictions.Results:
        pixel_size: micrometres per pixel; by default from the metadata of a TIFF.
        rois, geojson: whether to write ImageJ ROIs and QuPath's GeoJSON. OSError where a package for it is missing.
    """

    def __init__(self, folder, names, settings, pixel_size=None, rois=False, geojson=False):
        super().__init__(folder, names, settings)
        self.pixel_size, self.rois, self.geojson = pixel_size, rois, geojson
        for option, packages in PACKAGES.items():
            if getattr(self, option):
                for package in packages:
                    load_extra(package, "objects")

    def add(self, path, picture, found, seconds, values=None):
        """Write the results of a picture -> its rows of objects.csv.

        path: its path or common.images.Page. picture: (H, W[, C]) as common.images.PageReader returns it. found:
        nuclei.find.Found. seconds: what reading it and finding its nuclei took. values: PageReader.values, which the
        intensities are measured in; by default picture.
        """
        started = time.perf_counter()
        self.folder.mkdir(parents=True, exist_ok=True)
        name, labels = self.names[path], found.labels
        pixel_size = self.pixel_size or um_per_pixel(path) or None
        table = measure(labels, picture if values is None else values, found.confidence, pixel_size)
        if self.rois:  # first: it refuses what ImageJ cannot hold
            write_rois(self.folder / f"{name}_rois.zip", labels)
        write_label_tiff(self.label_path(name), labels, pixel_size)
        if self.geojson:
            write_geojson(self.folder / f"{name}.geojson", labels, table)
        shown, width = report.brighten(to_channels(picture, 3)), 1 + (max(labels.shape) >= THICK)
        self.write_picture(f"{name}_overlay.png", draw_outlines(shown, labels, distinct_colours(labels), width))
        height, width = labels.shape
        about = {"image": name, "path": path, "width": width, "height": height, "um_per_pixel": pixel_size or ""}
        about.update(scale=round(found.scale, 4), **summarise(table, labels.shape, pixel_size))
        about["seconds"] = round(seconds + time.perf_counter() - started, 4)
        columns = ["image", *table]
        rows = [dict(zip(columns, (name, *values), strict=True)) for values in zip(*table.values(), strict=True)]
        self.keep(about, rows, columns)
        if found.limited:
            self.limited.append(name)
        return rows

    def finish(self):
        """Join the label TIFFs of the pages of each file, where all are there: cells_p000_labels.tif, ... -> one."""
        stacks = {}
        for picture, name in self.names.items():
            if isinstance(picture, Page):
                stacks.setdefault(picture.path, []).append((picture.number, name))
        for pages in stacks.values():
            names = [name for _, name in sorted(pages)]
            paths = [self.label_path(name) for name in names]
            if len(paths) > 1 and all(path.exists() for path in paths):
                join_label_tiffs(paths, self.label_path(name_of_stack(names[0])))

    def label_path(self, name):
        return self.folder / f"{name}_labels.tif"

    def labels_of(self, picture):
        """The label map (H, W) of a picture of this call or, with the same settings, of an earlier one."""
        path = self.label_path(self.names[picture])
        if path.exists() or not isinstance(picture, Page):
            return read_labels(path, max_pixels=MOST_PIXELS)
        stack = self.label_path(name_of_stack(self.names[picture]))
        return tifffile.imread(stack, key=picture.number).astype(np.int32)

    def write_submission(self, path, pictures):
        """The Bowl's CSV, of pictures whose results are there. Their ids are their files' stems, if these differ."""
        stems = [picture.stem for picture in pictures]
        ids = stems if len(set(stems)) == len(stems) else [self.names[picture] for picture in pictures]
        write_submission(path, zip(ids, map(self.labels_of, pictures), strict=True))

    def found(self):
        count = sum(row["objects"] for row in self.images)
        return f"{count:,} nuclei"

    def suspicions(self):
        """Warnings about pictures without nuclei, or too large for their scale: [(words, names), ...]."""
        empty = [row["image"] for row in self.images if not row["objects"]]
        found = {
            "no nuclei": empty,
            "a scale that may be too low for small nuclei (cut such large pictures into parts)": self.limited,
        }
        return [(words, names) for words, names in found.items() if names]
