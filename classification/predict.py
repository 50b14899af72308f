"""A trained run of transfer_resnet18.py, from its folder to the classes of new pictures.

python transfer_resnet18.py --name mine --predict a.jpg holiday/
"""

import sys

import numpy as np
import torch
from tqdm import tqdm

from classification.folders import MEAN, STD, middle, read_tensor
from classification.resnet18 import ResNet18
from common.devices import pick_amp, pick_device, precision, to_device
from common.files import digest_of, load_weights, lock, read_yaml
from common.images import find_pictures, standardise
from common.runs import OUTPUTS, check_kind, newest_run, run_folder
from common.tables import merge_table, read_table

UNKNOWN = "unknown"  # the class of a picture that --reject leaves without an answer
SHOWN = 40  # predictions that are printed; the file has all


def read_run(folder):
    """The config.yml of a run; ValueError when it is not of this script."""
    config = read_yaml(folder / "config.yml")
    check_kind(config, "classes", folder)
    classes = config.get("classes")
    if classes is None:
        raise ValueError(f"{folder} is not a run of this script (its config.yml has no `classes`); --name another one")
    if not isinstance(classes, list) or len(classes) < 2 or not all(isinstance(name, str) for name in classes):
        raise ValueError(f"{folder}/config.yml is damaged: expected a list of two or more `classes`, found {classes!r}")
    return config


def load_run(name, device):
    """-> model in eval mode with the best weights of models/<name>, its config."""
    folder = run_folder(name)
    config = read_run(folder)
    weights = load_weights(folder / "model.pth")
    try:
        model = ResNet18(len(config["classes"]), mirror=config["mirror"])
        model.load_state_dict(weights)
    except (RuntimeError, KeyError):
        raise ValueError(f"{folder}/model.pth does not fit {folder}/config.yml") from None
    return model.to(device).eval(), config


@torch.inference_mode()
def classify(model, images, device, amp):
    """Standardised images (N, 3, H, W) -> probabilities (N, num_classes), a float32 array."""
    with precision(device, amp):
        return model(to_device(images, device, amp)).softmax(1).cpu().numpy()


def predict_files(options):
    """Classify files and folders -> outputs/<name>/predictions.csv; 1 when some could not be read, else 0."""
    device = pick_device(options.device)
    amp = pick_amp(options.amp, device)
    name = options.name or newest_run("classes")
    model, config = load_run(name, device)
    print(f"models/{name}: {', '.join(config['classes'])}")
    files, failed = find_pictures(options.predict)
    target = OUTPUTS / name / "predictions.csv"
    next(read_table(target, "path"), None)  # a table that cannot take the rows is refused before the work
    rows = []
    for start in tqdm(range(0, len(files), 32), "predict", unit="batch", leave=False, disable=None):
        images, read = [], []
        for path in files[start : start + 32]:
            try:
                picture = read_tensor(path, config["img_size"])
            except (ValueError, OSError) as error:
                failed.append((path, str(error)))
                continue
            images.append(standardise(middle(picture, config["img_size"]), MEAN, STD))
            read.append(path)
        if images:
            rows += zip(read, classify(model, torch.stack(images), device, amp).tolist(), strict=True)
    if rows:
        settings = f"models/{name} ({digest_of((run_folder(name) / 'model.pth').read_bytes())})"
        write_predictions(rows, config["classes"], target, settings, options.reject or 0)
    for path, reason in failed:
        print(f"skipped {reason if str(path) in reason else f'{path}: {reason}'}", file=sys.stderr)
    return 1 if failed else 0


def write_predictions(rows, classes, target, settings, reject):
    """Write predictions to a CSV file, which keeps its rows of other pictures, and print the first few.

    rows: [(path, probabilities), ...]. settings: the model, for a column of that name. reject: the class is UNKNOWN
    where no probability reaches this value.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    answers, new = [], []
    settings += f", reject {reject:g}" if reject else ""
    for path, values in rows:
        best = max(values)
        answers.append((path, classes[int(np.argmax(values))] if best >= reject else UNKNOWN, best))
        probabilities = {name: f"{value:.6f}" for name, value in zip(classes, values, strict=True)}
        answer = {"path": str(path), "class": answers[-1][1], "probability": f"{best:.6f}"}
        answer["settings"] = settings
        new.append({**answer, **probabilities, **answer})  # a class named `path` has no column of its own
    with lock(target.parent):  # other calls write it, too
        merge_table(target, new[0], new, "path", replaced={row["path"] for row in new})
    width = max(len(label) for _, label, _ in answers)
    for path, label, best in answers[:SHOWN]:
        print(f"{label:<{width}}  {best:.4f}  {path}")
    more = f"; all {len(rows)} are" if len(rows) > SHOWN else ""
    unknown = [label for _, label, _ in answers].count(UNKNOWN)
    said = f", {unknown} of them unknown (below {reject:g})" if reject else ""
    pictures = "1 picture" if len(rows) == 1 else f"{len(rows)} pictures"
    print(f"{pictures}{said}{more} in {target}")
