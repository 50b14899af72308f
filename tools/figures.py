"""Draw the figures of the documentation from the model itself, a trained run, and logs of runs.

python -m tools.figures --name run1 --image ID             # docs/nodes.png ... picture.png
python -m tools.figures --curves plain_s0 fast_s0 fast_s1  # docs/fast_and_plain.png
python -m tools.figures --nuclei nuclei                    # docs/one_by_one.jpg, from what val.py --name nuclei wrote

nodes.png and nodes_encoder.png show the nodes of U-Net++, and features.png what a trained run sees in them
(HOW_IT_WORKS.md). picture.png is the generated picture that the README segments, fast_and_plain.png compares the logs
of several runs (SPEED.md). one_by_one.jpg has the worst and the median validation picture of each kind, with the
outlines of their nuclei.
"""

import tempfile
from pathlib import Path

from common.cli import Parser, answer_early, parse_options, run_script


def build_parser():
    parser = Parser(description=__doc__)
    parser.add_argument("--name", help="models/<name>, trained with deep supervision; default: the newest run")
    parser.add_argument("--image", help="an id of its data set; default: its first validation image")
    parser.add_argument("--curves", nargs="+", metavar="NAME", help="draw the logs of these runs, and nothing else")
    parser.add_argument("--nuclei", metavar="NAME", help="draw nuclei of this run one by one, and nothing else")
    return parser


answer_early(__name__, build_parser)  # the imports below take seconds

import cv2
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from archs import DEPTH, NestedUNet
from common import report
from common.curves import fractions
from common.files import read_yaml
from common.images import read_picture, standardise, to_channels, write_png
from common.report import BLUE, GREEN, ORANGE, PURPLE, SKY
from common.runs import OUTPUTS, newest_run, run_folder
from common.synthetic import generate_nuclei
from data_folder import INPUTS, find_file
from inference import load_trained
from instances import judge
from labels import find_labels, read_labels
from nuclei.evaluation import panels_of
from run_config import check_of_masks, read_config
from utils import count_params

DOCS = Path(__file__).parents[1] / "docs"
COLOURS = [(150, 150, 150), ORANGE, SKY, GREEN, BLUE]  # of the diagonals i + j = 0 ... 4
OF_ENCODER = tuple(fractions(PURPLE)[0])  # arrows
IMAGE = (-0.35, -1.35)  # where the image stands that an encoder reads
SIDE = 96
VIEW = 256  # pixels of a picture whose nuclei are drawn
PICTURE = 13  # the seed of the README's picture to try


def colour(level, light=0.0):
    """The RGB of a diagonal, in [0, 1], mixed with white: light 0 is the pure colour, 1 is white."""
    return tuple((1 - light) * channel / 255 + light for channel in COLOURS[level])


def place(i, j):
    """The (x, y) of X^{i,j}: each row is half a step to the right of the one above, as in the paper's figure."""
    return 2.4 * j + 1.2 * i, -1.35 * i


def arrow(axis, start, end, **style):
    curve = style.pop("curve", 0)
    shape = {"arrowstyle": "-|>", "mutation_scale": 9, "shrinkA": 21, "shrinkB": 21}
    axis.annotate("", end, start, arrowprops={**shape, "connectionstyle": f"arc3,rad={curve}", **style}, zorder=1)


def draw_nodes(path, encoder=None):
    """The nodes by level, with their channels and sizes for an image of 96 x 96, and what each level keeps."""
    model = NestedUNet(deep_supervision=True, encoder=encoder).eval()
    with torch.inference_mode():
        shapes = {node: tuple(x.shape[1:]) for node, x in model.forward_nodes(torch.zeros(1, 3, SIDE, SIDE)).items()}
    figure = Figure(figsize=(10, 6.6), dpi=100)
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_xlim(-1.0, 11.0)
    axis.set_ylim(-6.1, 1.85)
    axis.axis("off")
    for i, j in shapes:
        for k in range(j):
            curve = -0.17 if j - k > 1 else 0
            arrow(axis, place(i, k), place(i, j), color="#8a8a8a", linewidth=0.9, linestyle=(0, (3, 2)), curve=curve)
        if j:
            arrow(axis, place(i + 1, j - 1), place(i, j), color=colour(4), linewidth=1.4)
        elif i in model.encoded:
            before = place(i - 1, 0) if i - 1 in model.encoded else IMAGE
            arrow(axis, before, place(i, 0), color=OF_ENCODER, linewidth=1.4)
        elif i:
            arrow(axis, place(i - 1, 0), place(i, 0), color="#222222", linewidth=1.4)
    for (i, j), (channels, height, width) in shapes.items():
        box = {
            "boxstyle": "round,pad=0.35",
            "facecolor": colour(i + j, 0.72),
            "edgecolor": colour(i + j),
            "linewidth": 1.5,
        }
        words = f"$X^{{{i},{j}}}$\n{channels} x {height} x {width}"
        axis.text(*place(i, j), words, ha="center", va="center", fontsize=8.5, bbox=box, linespacing=1.35)
    for level in range(1, DEPTH + 1):
        x, y = place(0, level)
        arrow(axis, (x, y), (x, y + 1.28), color=colour(level), linewidth=1.4, shrinkB=9)
        pruned = model.prune(level)
        axis.text(x, y + 1.35, f"L{level}", ha="center", va="center", fontsize=13, weight="bold", color=colour(level))
        millions = count_params(pruned) / 1e6
        kept = f"{len(pruned.nodes)} nodes, {millions:.{1 if millions > 0.1 else 3}f} M"
        axis.text(x, y + 1.66, kept, ha="center", va="center", fontsize=8.5, color="#333333")
    halve = ("#222222", "-", "halve: maximum of 2 x 2")
    if encoder:
        halve = (OF_ENCODER, "-", "a stage of the encoder")
        axis.text(*IMAGE, "image", ha="center", va="center", fontsize=9.5)
    keys = [
        halve,
        (colour(4), "-", "double: bilinear"),
        ("#8a8a8a", "--", "skip: as it is"),
    ]
    for row, (shade, line, words) in enumerate(keys):
        y = -4.3 - 0.42 * row
        axis.plot([8.0, 8.6], [y, y], line, color=shade, linewidth=1.5)
        axis.text(8.75, y, words, va="center", fontsize=9.5)
    axis.text(
        -0.8,
        -4.3,
        "A level keeps the nodes of\nits own colour and of all\ncolours to their left.",
        va="center",
        fontsize=9.5,
    )
    figure.savefig(path)


def telling(features, probability):
    """(channels, h, w), (H, W) -> (h, w): the channel whose correlation with the probability is strongest."""
    seen = torch.nn.functional.adaptive_avg_pool2d(probability[None], features.shape[1:]).flatten()
    both = torch.cat([seen[None], features.flatten(1)])
    alike = torch.nan_to_num(torch.corrcoef(both)[0, 1:]).abs()  # a constant channel has no correlation
    return features[alike.argmax()].numpy()


def draw_features(path, name, img_id):
    """An image, the probabilities of the heads, and of each node the channel that resembles the deepest of them."""
    model, config = load_trained(name, torch.device("cpu"), level="mean")
    img_id = img_id or read_yaml(run_folder(name) / "split.yml")["val"][0]
    source = find_file(INPUTS / config["dataset"] / "images", img_id, config["img_ext"])
    image = to_channels(read_picture(source), config["input_channels"])
    batch = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))[None]
    with torch.inference_mode():
        padded = model.pad(standardise(batch, config["mean"], config["std"]))
        features = model.forward_nodes(padded)
        heads = {j: torch.sigmoid(getattr(model, f"final{j}")(features[0, j]))[0, 0] for j in model.levels}

    figure = Figure(figsize=(8, 9.6), dpi=100)
    step, side = 1.58, 1.36  # inches

    def panel(i, j, picture, words, shade, **style):
        x, y = 0.1 + step * (j + i / 2), 9.58 - (i + 2) * step
        axis = figure.add_axes((x / 8, y / 9.6, side / 8, side / 9.6))
        axis.imshow(picture, interpolation="nearest", **style)
        axis.set_xticks([])
        axis.set_yticks([])
        for spine in axis.spines.values():
            spine.set(color=shade, linewidth=2)
        axis.set_title(words, fontsize=9, pad=3)

    panel(-1, 0.5, image.squeeze(), "the image", "#222222", cmap="gray")
    for j, probability in heads.items():
        panel(-1, j + 0.5, probability.numpy(), f"L{j}: probability", colour(j), cmap="gray", vmin=0, vmax=1)
    for (i, j), x in features.items():
        words = f"$X^{{{i},{j}}}$  {x.shape[2]} x {x.shape[3]}"
        panel(i, j, telling(x[0], heads[DEPTH]), words, colour(i + j), cmap="gray")
    figure.savefig(path)


def draw_curves(path, names):
    """Training loss and validation IoU from the log.csv of each run; the first, the reference, has a broader line."""
    figure = Figure(figsize=(8, 2.8), dpi=100, layout="constrained")
    axes = figure.subplots(1, 2)
    for k, name in enumerate(names):
        log = pd.read_csv(run_folder(name) / "log.csv")
        for axis, column in zip(axes, ("loss", "val_iou"), strict=True):
            axis.plot(log.epoch, log[column], color=colour(k), linewidth=1.5 if k else 4, marker="o", label=name)
    for axis, title in zip(axes, ("training loss", "validation IoU"), strict=True):
        axis.set_title(title)
        axis.set_xlabel("epoch")
        axis.set_xticks(log.epoch)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.savefig(path)


def draw_nuclei(path, name):
    """The worst and the median validation picture of each kind: truth and prediction of a run, as val.py left it."""
    inputs, output = INPUTS / read_config(run_folder(name))["dataset"], OUTPUTS / name
    table = pd.read_csv(output / "metrics.csv").sort_values(["official", "img_id"])
    columns, captions = [], []
    for kind in table["kind"].value_counts().index:
        rows = table[table["kind"] == kind]
        for which, row in (("worst", rows.iloc[0]), ("median", rows.iloc[len(rows) // 2])):
            image = to_channels(read_picture(next((inputs / "images").glob(f"{row['img_id']}.*"))), 3)
            true, found = (read_labels(find_labels(folder / "labels", row["img_id"])) for folder in (inputs, output))
            result = judge(found, true)  # of all of it; the middle is shown
            rows_shown, columns_shown = (slice((side - VIEW) // 2, (side + VIEW) // 2) for side in true.shape)
            shown = [array[rows_shown, columns_shown] for array in (image, true, found)]
            columns.append([picture for _, picture in panels_of(*shown, result)[1:]])
            captions.append(f"{kind}, {which}: {row['official']:.2f}")
    with tempfile.TemporaryDirectory() as folder:
        sheet = Path(folder) / "sheet.png"
        report.contact_sheet(list(zip(*columns, strict=True)), sheet, captions, size=VIEW)
        full_colour = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]  # lines are thin
        cv2.imwrite(str(path), cv2.imread(str(sheet)), [cv2.IMWRITE_JPEG_QUALITY, 85, *full_colour])


def main():
    options, _ = parse_options(build_parser)
    if options.nuclei:
        draw_nuclei(DOCS / "one_by_one.jpg", options.nuclei)
        return
    names = options.curves or [options.name or newest_run("arch")]
    for name in names:
        check_of_masks(read_config(run_folder(name)), name, "tools.figures")
    if options.curves:
        draw_curves(DOCS / "fast_and_plain.png", names)
        return
    draw_nodes(DOCS / "nodes.png")
    draw_nodes(DOCS / "nodes_encoder.png", "efficientnet_lite0")
    draw_features(DOCS / "features.png", names[0], options.image)
    write_png(DOCS / "picture.png", generate_nuclei(PICTURE)[0])
    print(f"nodes.png, nodes_encoder.png, features.png and picture.png are in {DOCS}")


if __name__ == "__main__":
    run_script(main)
