"""What a visitor of app.py gets: the nuclei of a picture, or its class, in a folder that is deleted with the page.

    sessions = Sessions(folder, device="cpu")
    session = sessions.of("c0ffee")                      # one for each open page
    answer = session.find("cells.tif", Question("nuclei", level="2"))
    answer.about, answer.files                           # "cells: 84 nuclei ...", label TIFF, overlay, tables, outlines
    session.stop()                                       # from another thread: `find` raises Stopped

app.py lays the page out; this is the work behind it. Pictures, limits, results and messages are those of predict.py.
"""

import contextlib
import copy
import functools
import shutil
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from common import report, synthetic
from common.cli import in_one_line, lack_of_memory
from common.curves import fractions, style_axis
from common.devices import pick_amp, pick_device
from common.images import MAX_PIXELS, PageReader, list_pages, squeeze, standardise, to_channels, write_png
from common.outlines import distinct_colours, draw_outlines
from common.runs import OUTPUTS, list_runs, run_folder
from inference import Predictor
from predictions import DIAMETERS, PIXEL_SIZES, reason_of
from run_config import is_of_nuclei

EXAMPLES = {"bright": 22, "small": 3, "stained": 10}  # seeds of common.synthetic.generate_nuclei
SHOWN_SIDES = 640, 1600  # pixels of the longer side of the outlines on the page, at least and at most
NO_REPORT = "–"
SHOWN_ROWS = 1000  # of the table on the page; the file has all
TRIED = ("level", "nuclei", "median diameter", "seconds")
COLUMNS = ("object", "area", "equivalent_diameter", "eccentricity", "solidity", "confidence", "touches_border")


class Stopped(Exception):
    """The visitor cancelled this question."""


@dataclass(frozen=True)
class Question:
    """What a visitor wants to know of a picture: options of predict.py; 0 and None stand for their defaults."""

    run: str
    level: str | None = None
    tta: bool = False
    threshold: float | None = None  # of the mask map
    diameter: float = 0  # of a typical nucleus, in pixels
    pixel_size: float = 0  # micrometres
    channels: tuple | None = None
    page: int = 0  # of a file with several

    def check(self):
        """ValueError for numbers that predict.py's own options would refuse."""
        low, high = DIAMETERS
        if self.diameter and not low <= self.diameter <= high:
            raise ValueError(f"diameter {self.diameter:g}: expected {low} to {high:,} pixels")
        low, high = PIXEL_SIZES
        if self.pixel_size and not low <= self.pixel_size <= high:
            raise ValueError(f"{self.pixel_size:g} micrometres per pixel: expected {low:g} to {high:,.0f}")
        if self.page and self.page < 0:
            raise ValueError(f"page {self.page:g}: pages are counted from 0")


@dataclass(frozen=True)
class Answer:
    about: str  # one line for people
    overlay: str  # path of the outlines, as large as the page shows them
    figure: object  # the histogram of sizes, a matplotlib Figure
    rows: list  # of the table, in the order of COLUMNS
    tried: list  # of the table of levels that this picture was asked with, in the order of TRIED
    files: list  # to download


class Sessions:
    """All visits. folder: a temporary one, which the caller removes in the end. device, amp: as for Predictor."""

    def __init__(self, folder, device="auto", amp="auto", max_pixels=MAX_PIXELS):
        self.folder, self.max_pixels = Path(folder), max_pixels
        self.device, self.amp = pick_device(device), amp
        self.open, self.lock = {}, threading.Lock()
        self.load = functools.lru_cache(maxsize=8)(self.load)
        self.load_classifier = functools.lru_cache(maxsize=2)(self.load_classifier)

    def of(self, key):
        """The session of a page; a new one for a new key."""
        with self.lock:
            if key not in self.open:
                self.open[key] = Session(self, Path(tempfile.mkdtemp(dir=self.folder)))
            return self.open[key]

    def end(self, key):
        """Stop the work of a page that was closed, and remove its files."""
        with self.lock:
            session = self.open.pop(key, None)
        if session:
            session.close()

    def end_all(self):
        for key in list(self.open):
            self.end(key)

    def load(self, run, level, written):
        """The Predictor of a run. written: when its weights were saved, so that those of a new training are read."""
        predictor = Predictor(run, str(self.device), self.amp, level or "deepest")
        predictor(np.zeros((1, 64, 64, predictor.config["input_channels"]), np.uint8))  # the first call is slow
        return predictor

    def load_classifier(self, run, written):
        from classification.predict import load_run  # late: torchvision takes a second

        return load_run(run, self.device)

    def examples(self):
        """Write the generated example pictures -> [(path, name)]."""
        folder = self.folder / "examples"
        folder.mkdir(exist_ok=True)
        for name, seed in EXAMPLES.items():
            write_png(folder / f"{name}.png", synthetic.generate_nuclei(seed)[0])
        return [(str(folder / f"{name}.png"), name) for name in EXAMPLES]


class Session:
    """One visit: its folder, and at most one answer in it."""

    def __init__(self, sessions, folder):
        self.sessions, self.folder = sessions, folder
        self.stopping, self.closed, self.lock = threading.Event(), False, threading.Lock()
        self.last, self.asked, self.tried = None, None, {}

    def stop(self):
        self.stopping.set()

    def close(self):
        self.stop()
        with self.lock:  # an answer that is being written ends first
            self.closed = True
            shutil.rmtree(self.folder, ignore_errors=True)

    def find(self, path, question, each=None):
        """The nuclei of a picture -> Answer. It stops the work on an earlier question of this visit.

        each(count) is called before every batch of tiles. Raises Stopped after `stop`, and ValueError or OSError for
        what predict.py would refuse.
        """
        from nuclei.find import find_nuclei  # late: scikit-image takes a second

        question.check()
        self.stop()
        self.stopping = stopping = threading.Event()
        count = 0

        def watch():
            nonlocal count
            if stopping.is_set():
                raise Stopped
            count += 1
            if each:
                each(count)

        page, picture, values, note = self._read(path, question)
        predictor = copy.copy(self.sessions.load(question.run, question.level, weights_written(question.run)))
        predictor.tta = question.tta
        if question.threshold is not None:
            predictor.config = {**predictor.config, "mask_threshold": question.threshold}
        started = time.perf_counter()
        found = find_nuclei(predictor, picture, question.diameter or None, each=watch)
        seconds = time.perf_counter() - started
        with self.lock:
            if self.closed or stopping.is_set():
                raise Stopped
            return self._answer(page, picture, values, found, question, predictor.head, seconds, note)

    def _read(self, path, question):
        """-> the file or its page, its picture and values as PageReader has them, and a note on further pages."""
        pages, failed = list_pages([Path(path)], question.page or None, question.channels)
        if failed:
            raise ValueError(failed[0][1])
        note = f" (page 0 of {len(pages)})" if len(pages) > 1 else ""
        with contextlib.closing(PageReader(self.sessions.max_pixels, question.channels)) as reader:
            return pages[0], reader.read(pages[0]), reader.values, note

    def _answer(self, page, picture, values, found, question, head, seconds, note):
        """Write the files of an answer to a new folder; those of the last answer are deleted."""
        from nuclei.object_files import fits_imagej
        from nuclei.predictions import NucleiResults

        folder, name = Path(tempfile.mkdtemp(dir=self.folder)), page.stem
        settings, pixel_size = f"models/{question.run} {head}", question.pixel_size or None
        rois = fits_imagej(found.labels.shape)
        results = NucleiResults(folder, {page: name}, settings, pixel_size, rois, geojson=True)
        objects = results.add(page, picture, found, seconds, values)
        results.write_tables()
        [summary] = results.images
        diameter = round(summary["median_diameter"], 1) if objects else None
        self._note(page, question, [head, len(objects), diameter, round(seconds, 2)])
        height, width = picture.shape[:2]
        typical = f", median diameter {diameter} pixels" if objects else ""
        about = f"{name}{note}, {width} x {height}: {len(objects):,} nuclei{typical}"
        about += f"; {head}, scale {found.scale:.3g}, {seconds:.2f} s"
        if found.limited:
            about += "; a higher scale would suit it, but needs a smaller picture: cut it into parts"
        rows = [[row[column] for column in COLUMNS] for row in objects[:SHOWN_ROWS]]
        figure = draw_sizes([row["equivalent_diameter"] for row in objects])
        write_png(folder / "shown.png", as_shown(picture, found.labels))
        endings = [f"{name}_overlay.png", f"{name}_labels.tif", "objects.csv"]
        endings += [f"{name}_rois.zip"] if rois else []
        endings.append(f"{name}.geojson")
        files = [str(folder / ending) for ending in endings]
        if self.last:
            shutil.rmtree(self.last, ignore_errors=True)
        self.last = folder
        return Answer(about, str(folder / "shown.png"), figure, rows, list(self.tried.values()), files)

    def _note(self, page, question, row):
        """Remember what a level gave, as long as nothing else changes."""
        asked = (page, {**vars(question), "level": None})
        if asked != self.asked:
            self.asked, self.tried = asked, {}
        self.tried[row[0]] = row
        self.tried = dict(sorted(self.tried.items()))

    def classify(self, path, run):
        """-> {class: probability}, and (H, W, 3) uint8, the picture, bright only where the network looked."""
        from classification.folders import MEAN, STD, middle, read_tensor
        from classification.predict import classify
        from classification.resnet18 import grad_cam
        from classification.scores import heat_overlay

        model, config = self.sessions.load_classifier(run, weights_written(run))
        seen = middle(read_tensor(Path(path), config["img_size"], self.sessions.max_pixels), config["img_size"])
        image = standardise(seen, MEAN, STD)
        device = self.sessions.device
        [values] = classify(model, image[None], device, pick_amp(self.sessions.amp, device))
        heat = grad_cam(model, image.to(device), int(values.argmax()))
        picture = heat_overlay(seen.permute(1, 2, 0).numpy(), heat)
        return dict(zip(config["classes"], values.tolist(), strict=True)), picture


def as_shown(picture, labels):
    """A picture and its label map -> the outlines as large as the page shows them, (h, w, 3) uint8."""
    side = max(labels.shape)
    zoom = np.clip(side, *SHOWN_SIDES) / side
    size = [max(1, round(length * zoom)) for length in labels.shape]
    labels = cv2.resize(labels, size[::-1], interpolation=cv2.INTER_NEAREST)
    image = report.brighten(squeeze(to_channels(picture, 3), size))
    return draw_outlines(image, labels, distinct_colours(labels), 2)


def refusal(path, error):
    """What the page says of a picture that predict.py would skip, or of a run that has gone."""
    if isinstance(error, RuntimeError):
        error = MemoryError(lack_of_memory(error))
    reason, name = in_one_line(reason_of(error)), Path(path).name
    return reason.replace(str(path), name) if str(path) in reason else f"{name}: {reason}"


# ---------------------------------------------------------------- runs


def weights_written(run):
    path = run_folder(run) / "model.pth"
    if not path.is_file():
        raise ValueError(f"the run {run} is gone; reload the page")
    return path.stat().st_mtime_ns


def runs_of_nuclei():
    """Yields the names of the runs that find individual nuclei, the newest first."""
    return (name for name, config in list_runs("arch") if is_of_nuclei(config))


def about_runs():
    """[name, job, data, report or NO_REPORT] of each run under models/, the newest first in each job."""
    rows = []
    for name, config in [*list_runs("arch"), *list_runs("classes")]:
        if "classes" in config:
            job, data = "classes", ", ".join(map(str, config["classes"]))
        else:
            job, data = ("individual nuclei" if is_of_nuclei(config) else "masks"), str(config.get("dataset"))
        rows.append([name, job, data, str(report_of(name)) if report_of(name).is_file() else NO_REPORT])
    return rows


def report_of(run):
    return OUTPUTS / run_folder(run).name / "report.html"


def draw_sizes(diameters):
    """The histogram of equivalent diameters, a matplotlib Figure."""
    from matplotlib.figure import Figure  # late: it takes a second

    figure = Figure(figsize=(5, 2.4), dpi=120, layout="constrained")
    axis = figure.subplots()
    if diameters:
        bins = min(40, max(5, round(len(diameters) ** 0.5 * 2)))
        axis.hist(diameters, bins=bins, color=fractions(report.BLUE)[0])
    axis.set_xlabel("equivalent diameter, pixels", fontsize=9)
    axis.set_ylabel("nuclei", fontsize=9)
    style_axis(axis, grid=None)
    return figure
