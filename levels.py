"""What each level of a deeply supervised U-Net++ costs and gives, to choose a smaller one knowingly.

python val.py --name run1 --levels    # prints a table, draws outputs/run1/levels.png, adds a section to the report
"""

import statistics
import time
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from archs import probabilities
from common import report
from common.curves import fractions, save_figure, style_axis
from common.devices import precision, synchronize
from common.report import BLUE, GREEN, VERMILION
from metrics import summarise
from utils import count_params

ENOUGH = 0.005  # below the score of the best level
ROUNDS = 11
COST_COLUMNS = {"level": "level", "parameters": "parameters", "ms": "ms/image", "megabytes": "peak MB"}
PAPER = {  # Zhou et al. 2020, nuclei: million parameters, and mean IoU in per cent, to about half a point
    "L1": {"paper_parameters": "0.1 M", "paper_miou": "about 91.5"},
    "L2": {"paper_parameters": "0.5 M", "paper_miou": "about 92.3"},
    "L3": {"paper_parameters": "2.2 M", "paper_miou": "about 92.2"},
    "L4": {"paper_parameters": "9.0 M", "paper_miou": "about 92.5"},
}
PAPER_DATA = "dsb2018"  # what the names of data sets made of the paper's nuclei begin with
PAPER_COLUMNS = {"paper_parameters": "paper: parameters", "paper_miou": "paper: mean IoU"}
NOTE = (
    f"Pruned models, and the mean of all heads. ms/image: median of {ROUNDS} interleaved rounds of one batch of "
    "{batch}, {device}; peak MB: weights plus the most memory that the tensors of a batch hold at once."
)
PAPER_NOTE = "Paper: Zhou et al. on nuclei, 2020, mean IoU in per cent."


def seconds(answer, device):
    """Seconds that `answer()` takes, with the work that it leaves to the device."""
    synchronize(device)
    start = time.perf_counter()
    answer()
    synchronize(device)
    return time.perf_counter() - start


class PeakMemory(TorchDispatchMode):
    """`bytes`: the most memory that tensors made inside this context held at once.

    It is the same on every device. Memory that a library takes for itself during an operation is not counted.
    """

    def __init__(self):
        super().__init__()
        self.bytes, self._held = 0, weakref.WeakKeyDictionary()  # a storage leaves when its last tensor does

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in filter(torch.is_tensor, tree_leaves(output)):
            storage = tensor.untyped_storage()
            self._held[storage] = storage.nbytes()
        self.bytes = max(self.bytes, sum(self._held.values()))
        return output


@torch.inference_mode()
def measure(model, images, device, amp=None, rounds=ROUNDS):
    """{"L1" ... "L4": {"parameters", "ms", "megabytes"}} of the pruned models, and "mean" of the whole one.

    images: one batch, (N, channels, H, W) standardised. ms: milliseconds per image, the median of `rounds` rounds in
    which the levels take turns, so that a busy moment affects all alike. megabytes (2^20 bytes): the weights plus the
    most memory that the tensors of one batch hold at once. parameters: those that were trained, before folding.
    """
    trained = {f"L{level}": model.prune(level) for level in model.levels} | {"mean": model}
    models = {name: cut.folded() for name, cut in trained.items()}

    def answer(cut):
        with precision(device, amp):
            output = cut(images)
        return probabilities(output)

    times = {name: [] for name in models}
    for turn in tqdm(range(rounds + 1), "levels", leave=False, disable=None):
        for name, cut in models.items():
            taken = seconds(lambda cut=cut: answer(cut), device)
            if turn:  # the first is a warm-up
                times[name].append(taken)
    found = {}
    for name, cut in models.items():
        weights = sum(tensor.nbytes for tensor in (*cut.parameters(), *cut.buffers()))
        with PeakMemory() as peak:
            answer(cut)
        found[name] = {
            "parameters": count_params(trained[name]),
            "ms": statistics.median(times[name]) / len(images) * 1000,
            "megabytes": (weights + peak.bytes) / 2**20,
        }
    return found


def rows_of_levels(measured, tables):
    """What `measure` found and val.judge's tables -> one row per level, with every metric and the paper's figures."""
    return [
        {"level": name, **costs, **summarise(tables[name]), **PAPER.get(name, {})} for name, costs in measured.items()
    ]


def with_text(rows):
    """The rows with their costs formatted for people."""
    as_text = {"parameters": "{:,}", "ms": "{:.2f}", "megabytes": "{:.1f}", "seconds": "{:.2f}"}
    return [row | {key: form.format(row[key]) for key, form in as_text.items() if key in row} for row in rows]


def sufficient(rows, score="iou", name="pooled IoU"):
    """-> the row of the smallest level whose score is within ENOUGH of the best level's, and one sentence.

    rows: one per level, from the smallest, and perhaps one of the mean. score: a key of them; name: its words.
    """
    levels = [row for row in rows if row["level"] != "mean"]
    best, largest = max(levels, key=lambda row: row[score]), levels[-1]
    chosen = next(row for row in levels if row[score] >= best[score] - ENOUGH)
    shares = [f"{chosen['parameters'] / largest['parameters']:.1%} of {largest['level']}'s parameters"]
    for key, words in (("ms", "time"), ("seconds", "time"), ("megabytes", "memory")):
        if key in chosen:
            shares.append(f"{chosen[key] / largest[key]:.0%} of its {words}")
    return chosen, (
        f"{chosen['level']} is the smallest level within {ENOUGH:g} of the best {name} ({chosen[score]:.4f}; "
        f"{best['level']} has {best[score]:.4f}): {', '.join(shares)}."
    )


def section(rows, columns, words, picture, caption):
    """(heading, html) of a report: a picture (a PNG file), paragraphs, and the rows as a table."""
    drawn = report.picture(report.file_uri(picture), caption)
    return "Levels", drawn + "".join(map(report.paragraph, words)) + report.table(with_text(rows), columns)


def draw(rows, path):
    """One PNG: pooled IoU against milliseconds per image, and the costs of each level relative to the largest one."""
    from matplotlib.figure import Figure

    levels = [row for row in rows if row["level"] != "mean"]
    chosen, best = sufficient(rows)[0], max(row["iou"] for row in levels)
    figure = Figure(figsize=(9, 3.6), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.15, 1])
    blue, green, vermilion = fractions(BLUE, GREEN, VERMILION)

    left.axhspan(best - ENOUGH, best, color=green, alpha=0.15, linewidth=0)
    left.plot([row["ms"] for row in levels], [row["iou"] for row in levels], "o-", color=blue, linewidth=1)
    left.plot(chosen["ms"], chosen["iou"], "o", color=vermilion, markersize=9)
    for row in rows:
        if row["level"] == "mean":
            left.plot(row["ms"], row["iou"], "D", color="#666")
        place = {"xytext": (0, -15 if row["level"] == "mean" else 8), "textcoords": "offset points", "ha": "center"}
        left.annotate(row["level"], (row["ms"], row["iou"]), fontsize=9, **place)
    left.margins(0.12, 0.2)
    left.set_xlabel("milliseconds per image", fontsize=9)
    left.set_title("pooled IoU; the band is 0.005 below the best level", fontsize=10)

    keys = {"parameters": "parameters", "ms": "time", "megabytes": "peak memory"}
    for k, (row, shade) in enumerate(zip(levels, (0.3, 0.5, 0.75, 1), strict=False)):
        shares = [100 * row[key] / levels[-1][key] for key in keys]
        places = [place + (k - 1.5) * 0.21 for place in range(len(keys))]
        colour = {"color": vermilion} if row is chosen else {"color": blue, "alpha": shade}
        bars = right.bar(places, shares, 0.19, **colour)
        right.bar_label(bars, [f"{row['level']}\n{share:.0f}" for share in shares], fontsize=7, padding=1)
    right.set_xticks(range(len(keys)), keys.values(), fontsize=9)
    right.set_ylim(0, 118)
    right.set_title(f"per cent of {levels[-1]['level']}", fontsize=10)
    for axis in (left, right):
        style_axis(axis, "y")
    save_figure(figure, path)
