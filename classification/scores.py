"""How well a classifier did: accuracy with its interval, the confusion matrix, pictures worth a look, the report.

from classification.scores import notable, wilson

wilson(145, 153)                       # (0.900, 0.973): what 94.8 % of 153 pictures can mean
notable(probabilities, labels)         # {"wrong": indices, "least certain": ..., "most certain": ...}
"""

import cv2
import numpy as np
from tqdm import tqdm

from classification.resnet18 import grad_cam
from common import report
from common.cli import listed

GALLERY_NOTE = (
    "Best epoch. Each card shows the part of the picture that the network sees and, in bright colours, what supported "
    "its answer (Grad-CAM). Probability is that of the answer."
)


def wilson(correct, total):
    """The 95 % Wilson score interval of a proportion, which stays within [0, 1] and holds for few pictures."""
    from scipy.stats import binomtest

    low, high = binomtest(correct, total).proportion_ci(method="wilson")
    return float(low), float(high)


def print_scores(rows, probabilities, labels, classes):
    """Print accuracy and confusion -> (label, value, note) of the best and the last epoch, and the confusion matrix.

    rows: those of log.csv; probabilities: (N, num_classes) of the best epoch; labels: (N,). The matrix is an int array
    (num_classes, num_classes) of counts whose rows are labels and whose columns are predictions.
    """
    from sklearn.metrics import confusion_matrix

    headline = []
    best = max(reversed(rows), key=lambda row: row["val_acc"])  # on a tie the last, as in engine.Run
    counts = confusion_matrix(labels, probabilities.argmax(1), labels=range(len(classes)))
    absent = [name for name, of_class in zip(classes, counts, strict=True) if not of_class.any()]
    without = f"; no validation picture of {listed(absent)}" if absent else ""
    for which, row in (("best", best), ("last", rows[-1])):
        low, high = wilson(round(row["val_acc"] * len(labels)), len(labels))
        interval = f"95 % interval {100 * low:.1f} to {100 * high:.1f} %"
        headline.append(
            (f"{which} epoch", f"{100 * row['val_acc']:.1f} %", f"epoch {row['epoch']}; {interval}{without}")
        )
        print(f"{which} accuracy {100 * row['val_acc']:.2f} % ({interval}) at epoch {row['epoch']}{without}")
    print(format_confusion(counts, classes))
    print(about_rejecting(probabilities, labels))
    return [*headline, ("pictures", len(labels), "in validation")], counts


def about_rejecting(probabilities, labels, reject=0.9):
    """One line: what an answer `unknown` below this probability would do to the validation pictures."""
    sure, right = probabilities.max(1) >= reject, probabilities.argmax(1) == labels
    rejected = (
        f"{(~sure & ~right).sum()} of {(~right).sum()} wrong answers and {(~sure & right).sum()} of {right.sum()}"
    )
    return f"--predict with --reject {reject:g} would call {rejected} right ones unknown"


def format_confusion(counts, classes):
    """A confusion matrix as aligned text."""
    corner = "label, predicted:"
    width = max(len(corner), *map(len, classes))
    widths = [max(len(name), len(str(column.max()))) for name, column in zip(classes, counts.T, strict=True)]
    lines = [f"{corner:<{width}}  " + "  ".join(f"{name:>{w}}" for name, w in zip(classes, widths, strict=True))]
    for name, row in zip(classes, counts, strict=True):
        lines.append(f"{name:<{width}}  " + "  ".join(f"{count:>{w}}" for count, w in zip(row, widths, strict=True)))
    return "\n".join(lines)


def heat_overlay(picture, heat):
    """(H, W, 3) uint8 and (H, W) from 0 to 1 -> (H, W, 3) uint8: dark where the network did not look."""

    colours = cv2.applyColorMap(np.uint8(255 * heat), cv2.COLORMAP_INFERNO)[..., ::-1]
    return np.uint8(0.45 * picture + 0.55 * colours)


def notable(probabilities, labels, most=48, few=12):
    """{"wrong": indices, "least certain": ..., "most certain": ...}; the last two are right answers.

    probabilities: (N, num_classes); labels: (N,). Wrong answers start with the most certain one.
    """
    answers, certainty = probabilities.argmax(1), probabilities.max(1)
    wrong, right = np.flatnonzero(answers != labels), np.flatnonzero(answers == labels)
    wrong, right = wrong[np.argsort(-certainty[wrong])], right[np.argsort(certainty[right])]
    return {"wrong": wrong[:most], "least certain": right[:few], "most certain": right[few:][-few:][::-1]}


def gallery_items(model, dataset, probabilities, labels, classes):
    """Cards of the pictures that were wrong, and of the least and the most certain right ones."""
    device = next(model.parameters()).device
    items = []
    for group, indices in notable(probabilities, labels).items():
        for index in tqdm(indices, f"report, {group}", unit="img", leave=False, disable=None):
            answer, picture = int(probabilities[index].argmax()), dataset.seen(index)
            heat = grad_cam(model, dataset[index][0].to(device), answer)
            said = f"{classes[answer]}, is {classes[labels[index]]}" if group == "wrong" else classes[answer]
            items.append(
                {
                    "title": f"{dataset.samples[index][0].name}: {said}",
                    "panels": [("picture", picture), ("where it looked", heat_overlay(picture, heat))],
                    "values": {"probability": float(probabilities[index, answer])},
                    "group": group,
                }
            )
    return items


def write_report(path, config, model, dataset, probabilities, headline, counts, curves):
    """The self-contained page: accuracy, curves, confusion and a gallery. curves: the run's curves.png."""
    classes, labels = config["classes"], [label for _, label in dataset.samples]
    path.parent.mkdir(parents=True, exist_ok=True)
    counted = []
    for name, row in zip(classes, counts.tolist(), strict=True):
        counted.append({"": name, **dict(zip(classes, row, strict=True))})
    headings = {"": "label, predicted:", **{name: name for name in classes}}
    cards = gallery_items(model, dataset, probabilities, np.array(labels), classes)
    sections = [
        ("Accuracy", report.summary(headline)),
        ("Curves", report.picture(report.file_uri(curves), "loss, accuracy and learning rate of each epoch")),
        ("Confusion", report.table(counted, headings, "Counts, best epoch")),
        ("Pictures", report.gallery(cards, ["probability"], GALLERY_NOTE)),
    ]
    report.write_page(path, config["name"], sections, f"ResNet-18, weights {config['weights']}; {', '.join(classes)}")
