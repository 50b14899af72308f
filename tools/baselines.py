"""Print rows of docs/RESULTS.md for individual nuclei found without learning them: thresholds, and foreground masks.

python -m tools.baselines                                        # Otsu's threshold, on all images of inputs/dsb2018
python -m tools.baselines --split models/nuclei/split.yml        # on the validation images of a run
python -m tools.baselines --split models/nuclei/split.yml --name nuclei_L2    # and the masks of a foreground model
python -m tools.baselines --true                                 # and the true foreground: the limit of both ways

A data set has images/ and labels/, as preprocess_dsb2018.py --native writes them. Each foreground becomes nuclei in two
ways: its connected components, and a watershed of the distance to its edge. A foreground model sees each image at the
size of its training, as in predict.py --mode resize.
"""

from pathlib import Path

import cv2
import numpy as np
from scipy import ndimage
from skimage.feature import peak_local_max
from skimage.filters import threshold_otsu
from skimage.segmentation import watershed
from tqdm import tqdm

from common.cli import Parser, listed, parse_options, run_script
from common.files import read_yaml
from common.images import read_picture, squeeze, to_channels
from common.lookalikes import kind
from data_folder import INPUTS, find_file, list_ids
from dataset import check_split
from inference import Predictor, predict_tiled
from instances import drop_small, judge, sequential
from labels import find_labels, read_labels
from nuclei.evaluation import COLUMNS, Judged, row_of
from run_config import check_of_masks

SMALLEST = 20  # pixels; the smallest nucleus of stage1_train has 21
SMOOTH, APART = 2, 5  # pixels: sd of the blur of the distance, and the least distance between two of its peaks
SHOWN = ("images", "official", "interval", "ap50", "f1", "pq", "merges", "splits", "missed", "false", "count_error")


def build_parser():
    parser = Parser(description=__doc__)
    a = parser.add_argument
    a("--dataset", default="dsb2018", help="inputs/<dataset>")
    a("--split", type=Path, metavar="FILE", help="a split.yml, whose `val:` ids are taken; default: all images")
    a("--name", help="models/<name>, a run that was trained on masks; default: none")
    a("--true", action="store_true", help="add the true foreground")
    a("--kinds", action="store_true", help="a row for each kind of picture as well")
    return parser


# ---------------------------------------------------------------- foreground


def otsu(image):
    """(H, W, 3) uint8 -> (H, W) bool: by Otsu's threshold of the grey picture, the side with fewer pixels.

    Otsu 1979. So nuclei may be brighter or darker than what is around them. A picture of one grey has none.
    """
    grey = to_channels(image, 1)[..., 0]
    mask = grey > threshold_otsu(grey)
    return ~mask if mask.mean() > 0.5 else mask


def of_model(predictor, image):
    """The foreground that a run of train.py finds in (H, W, C) uint8, at its trained size -> (H, W) bool."""
    config = predictor.config
    image = to_channels(image, config["input_channels"])
    seen = squeeze(image, (config["input_h"], config["input_w"]))
    [found] = predict_tiled(predictor, seen[None])
    return squeeze(found[0], image.shape[:2]) > 0.5 * 65535


# ---------------------------------------------------------------- foreground to nuclei


def components(mask, smallest=SMALLEST):
    """(H, W) bool -> label map of its connected components (4 neighbours) of at least `smallest` pixels."""
    return sequential(drop_small(ndimage.label(mask)[0], smallest))


def distance_watershed(mask, smallest=SMALLEST):
    """(H, W) bool -> label map: a watershed from the peaks of the blurred distance to the background.

    SMOOTH and APART give the highest official score with the true foreground of a sixth of stage1_train.
    """
    distance = ndimage.gaussian_filter(ndimage.distance_transform_edt(mask), SMOOTH)
    peaks = peak_local_max(distance, min_distance=APART, labels=ndimage.label(mask)[0], exclude_border=False)
    seeds = np.zeros(mask.shape, np.int32)
    seeds[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
    return sequential(drop_small(watershed(-distance, seeds, mask=mask), smallest))


SEPARATIONS = {"components": components, "distance watershed": distance_watershed}


# ---------------------------------------------------------------- the table


def chosen_ids(options):
    """The ids to evaluate; ValueError when one of them is not there."""
    ids = list_ids(INPUTS / options.dataset / "images", ".png", "a data set of PNG files")
    if not options.split:
        return ids
    wanted = check_split(read_yaml(options.split), options.split)["val"]
    if missing := sorted(set(wanted) - set(ids)):
        raise ValueError(f"inputs/{options.dataset} lacks {len(missing)} of {len(wanted)} ids: {listed(missing, 3)}")
    return wanted


def judge_all(ids, folder, foregrounds):
    """-> {method: [Judged, ...]}. foregrounds: {name: function(image, true labels) -> (H, W) bool}."""
    judged = {f"{name} + {way}": [] for name in foregrounds for way in SEPARATIONS}
    for img_id in tqdm(ids, "baselines", unit="img", leave=False, disable=None):
        image = to_channels(read_picture(find_file(folder / "images", img_id, ".png")), 3)
        true = read_labels(find_labels(folder / "labels", img_id), image.shape[:2])
        of_picture = kind(image)
        for name, foreground in foregrounds.items():
            mask = foreground(image, true)
            for way, separate in SEPARATIONS.items():
                result = judge(separate(mask), true)
                judged[f"{name} + {way}"].append(Judged(img_id, of_picture, "", result))
    return judged


def print_rows(judged, kinds):
    """A row per method, in Markdown; with kinds, one for each kind of picture below it."""
    print(f"| method | {' | '.join(COLUMNS[key] for key in SHOWN)} |\n|{'---|' * (len(SHOWN) + 1)}")
    for method, items in judged.items():
        parts = {method: items}
        if kinds:
            of_kind = sorted({item.kind for item in items})
            parts.update({f"{method}, {name}": [item for item in items if item.kind == name] for name in of_kind})
        for name, part in parts.items():
            row = row_of(part)
            cells = [f"{row[key]:.3f}" if isinstance(row[key], float) else str(row[key]) for key in SHOWN]
            print(f"| {' | '.join([name, *cells])} |")


def main():
    options, _ = parse_options(build_parser)
    cv2.setNumThreads(1)
    foregrounds = {"Otsu": lambda image, true: otsu(image)}
    if options.name:
        predictor = Predictor(options.name)
        check_of_masks(predictor.config, options.name, "tools.baselines")
        if predictor.config["num_classes"] != 1:
            raise ValueError(f"models/{options.name} has {predictor.config['num_classes']} classes; expected one")
        foregrounds[options.name] = lambda image, true: of_model(predictor, image)
    if options.true:
        foregrounds["true foreground"] = lambda image, true: true > 0
    print_rows(judge_all(chosen_ids(options), INPUTS / options.dataset, foregrounds), options.kinds)


if __name__ == "__main__":
    run_script(main)
