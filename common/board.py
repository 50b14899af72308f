"""What TensorBoard shows of a training: the columns of log.csv, and what the network predicts for a few pictures.

python train.py --name run1 --tensorboard    # transfer_resnet18.py as well
tensorboard --logdir models                  # prints the address to open in a browser

    board = open_board(config, run, val_set, titles)     # None without --tensorboard
    board.add(run, row)                                  # after each epoch
    board.close()

Needs the package tensorboard: pip install -r requirements-tensorboard.txt. Without the option it is not imported.
"""

import math

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import default_collate

from common.devices import precision
from common.distributed import is_main
from common.extras import load_extra
from common.images import squeeze
from common.report import as_rgb, brighten

PICTURES = 4  # of the validation; each epoch adds them to the file
SIDE = 128  # pixels, at most, of a panel's longer side
GAP, CAPTION_HEIGHT = 2, 16  # pixels


def check_tensorboard(config):
    """OSError when the config asks for TensorBoard but the package is absent."""
    if config["tensorboard"]:
        load_tensorboard()


def load_tensorboard():
    module, otherwise = "torch.utils.tensorboard", "; or pass --tensorboard False"
    return load_extra(module, "tensorboard", "tensorboard", otherwise)


def open_board(config, run, dataset, titles):
    """The Board of this run and its validation set; None without --tensorboard, and in all but the main process."""
    return Board(run, dataset, titles, config["mean"], config["std"]) if config["tensorboard"] and is_main() else None


class Board:
    """The event files in models/<name>/tensorboard. Steps are epochs; those after the last finished one are purged.

    dataset: validation items, standardised with mean and std; titles: of each of them. A few, evenly spread, are shown.
    For a run without a board so far, the epochs of its log are added first.
    """

    def __init__(self, run, dataset, titles, mean, std):
        self.mean, self.std = mean, std
        chosen = np.unique(np.linspace(0, len(dataset) - 1, PICTURES).round().astype(int)).tolist()
        self.examples = [
            (f"validation/{number} {titles[index]}", default_collate([dataset[index]]))
            for number, index in enumerate(chosen, 1)  # titles may be alike
        ]
        folder = run.folder / "tensorboard"
        begun = any(folder.glob("events.*"))
        self.writer = load_tensorboard().SummaryWriter(str(folder), purge_step=run.epoch + 1)
        for row in [] if begun else run.rows:
            self._add_scalars(row)

    def _add_scalars(self, row):
        for name, value in row.items():
            if name != "epoch":
                self.writer.add_scalar(name, value, row["epoch"])

    @torch.inference_mode()
    def add(self, run, row):
        """Write a row of the log, and what run.kept says of the examples."""
        self._add_scalars(row)
        model = run.kept.eval()
        for tag, batch in self.examples:  # one by one: they need less memory than a batch of the training
            inputs, truth = run.task.to_device(batch, run.device, run.amp)
            with precision(run.device, run.amp):
                output = model(inputs)
            picture = arranged(as_picture(inputs[0], self.mean, self.std), *run.task.drawn(output, truth))
            self.writer.add_image(tag, picture, row["epoch"], dataformats="HWC")
        self.writer.flush()

    def close(self):
        self.writer.close()


def as_picture(tensor, mean, std):
    """(C, H, W), as common.images.standardise returns it -> (H, W, 3) uint8, dim ones brightened."""
    image = tensor.float().cpu().permute(1, 2, 0) * torch.tensor(std) + torch.tensor(mean)
    return brighten(as_rgb((255 * image).round().clamp(0, 255).byte().numpy()))


def arranged(image, rows, caption=""):
    """One picture (h, w, 3) uint8: the image, to its right the rows of panels, and below the caption, if any.

    image: (H, W, 3) uint8; panels: (H, W) or (H, W, 3) uint8. Large ones are shrunk to SIDE pixels.
    """
    height, width = (max(1, round(side * min(1, SIDE / max(image.shape[:2])))) for side in image.shape[:2])
    lines = []
    for row in rows:
        first = np.full_like(image, 255) if lines else image
        panels = [squeeze(as_rgb(panel), (height, width)) for panel in (first, *row)]
        lines.append(np.hstack([np.pad(panel, ((0, GAP), (0, GAP), (0, 0)), constant_values=255) for panel in panels]))
    picture = np.vstack(lines)
    return with_caption(picture, caption) if caption else picture


def with_caption(picture, caption):
    """(H, W, 3) uint8, with a line of text below; it becomes as wide as the text."""
    font = ImageFont.load_default(CAPTION_HEIGHT - 5)
    height, width = picture.shape[0], max(picture.shape[1], math.ceil(font.getlength(caption)) + 4)
    canvas = Image.new("RGB", (width, height + CAPTION_HEIGHT), "white")
    canvas.paste(Image.fromarray(picture), (0, 0))
    ImageDraw.Draw(canvas).text((2, height + 1), caption, "black", font)
    return np.asarray(canvas)
