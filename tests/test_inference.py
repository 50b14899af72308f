"""inference.py: probabilities, flips and turns, tiles, against numpy and the network as it was trained.

test_trained.py has the files of a run, test_onnx.py those of export.py.
"""

import itertools
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import inference
from archs import NestedUNet
from common.files import save_checkpoint, write_yaml
from inference import (
    OVERLAP,
    Predictor,
    eight_ways,
    predict_tiled,
    tile_size,
    windows,
)

pytestmark = pytest.mark.usefixtures("one_thread")

MEAN, STD, SCALE = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3], 0.5
CPU = torch.device("cpu")
ROUNDING = 5e-5  # of a probability: these networks have few channels and large weights


def write_run(folder, num_classes=1, input_channels=3, cut=None, **settings):
    """models/<name> as train.py leaves it, of a random network whose answers differ from pixel to pixel -> the network.

    cut: the level that export.py --run kept. settings: of config.yml; None leaves a key out.
    """
    torch.manual_seed(0)
    model = NestedUNet(num_classes, input_channels, deep_supervision=True, width=2)
    noise = torch.nn.functional.interpolate(torch.randn(4, input_channels, 8, 8), size=(48, 48), mode="bilinear")
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0  # the statistics are those of the noise
    heads = model(noise)
    for j, head in enumerate(heads, 1):
        final = getattr(model, f"final{j}")
        spread = head.detach().std((0, 2, 3))
        final.weight.data *= 3 / spread[:, None, None, None]
        final.bias.data = (final.bias.data - head.detach().mean((0, 2, 3))) * 3 / spread
    if cut:
        model = model.prune(cut)
    folder.mkdir(parents=True)
    save_checkpoint(folder / "model.pth", model.state_dict())
    config = {"arch": "NestedUNet", "num_classes": num_classes, "input_channels": input_channels, "width": 2}
    config |= {"dataset": "none", "img_ext": ".png", "mask_ext": ".png", "loss": "BCEDiceLoss", "seed": 0}
    config |= {"encoder": "none", "stem": "full", "target": "masks", "keep": "best"}
    config |= {"deep_supervision": True, "input_h": 32, "input_w": 48, "scale": SCALE, "level": cut}
    config |= {"mean": MEAN[:input_channels], "std": STD[:input_channels], **settings}
    write_yaml(folder / "config.yml", {key: value for key, value in config.items() if value is not None})
    return model.eval()


def soft_picture(height=70, width=90, seed=0):
    """(height, width, 3) uint8 of smooth colours."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)


def by_hand(model, images, mean=MEAN, std=STD):
    """uint8 (N, H, W, C) -> [probabilities (N, H, W, classes) of each head], by numpy but for the network."""
    seen = (images / 255 - mean) / std
    with torch.no_grad():
        output = model(torch.tensor(seen.transpose(0, 3, 1, 2), dtype=torch.float32))
    heads = output if isinstance(output, list) else [output]
    return [1 / (1 + np.exp(-head.double().numpy().transpose(0, 2, 3, 1))) for head in heads]


def standardised(images):
    return torch.tensor(((images / 255 - MEAN) / STD).transpose(0, 3, 1, 2), dtype=torch.float32)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty current directory with models/tiny -> its network."""
    monkeypatch.chdir(tmp_path)
    return write_run(tmp_path / "models" / "tiny")


def predictor_of(name="tiny", **options):
    return Predictor(name, "cpu", "off", **options)


# ---------------------------------------------------------------- probabilities


@pytest.mark.parametrize("level", ["1", "2", "3", "4", "mean", None])
def test_probabilities_are_those_of_the_trained_network(workplace, level):
    """Standardised by hand, batch norm not folded. Of all heads the mean of probabilities answers."""
    images = np.stack([soft_picture(33, 50), soft_picture(33, 50, seed=1)])
    heads = by_hand(workplace, images)
    predictor = predictor_of(level=level)
    found = predictor(images)
    expected = heads[int(level) - 1] if level in ("1", "2", "3", "4") else np.mean(heads, axis=0)
    assert found.dtype == np.float32 and found.shape == (2, 33, 50, 1) and expected.std() > 0.1
    np.testing.assert_allclose(found, expected, atol=ROUNDING)
    assert predictor.head == ("mean" if level in ("mean", None) else f"L{level}")
    assert predictor.about == f"models/tiny, {predictor.head}, cpu, float32"


def test_by_default_the_newest_run_and_its_deepest_head(workplace, tmp_path):
    shutil.copytree("models/tiny", "models/newer")
    Path("models/newer/model.pth").touch()
    predictor = Predictor(device="cpu", amp="off")
    assert (predictor.name, predictor.head, predictor.head_names) == ("newer", "L4", ["L4"])
    images = soft_picture(32, 48)[None]
    np.testing.assert_array_equal(predictor(images), predictor_of(level="4")(images))


@pytest.mark.parametrize("tta", [False, True])
def test_of_heads_gives_every_head_and_their_mean(workplace, tta):
    images = np.stack([soft_picture(20, 35), soft_picture(20, 35, seed=1)])
    predictor = predictor_of(level=None, tta=tta)
    found = predictor.of_heads(standardised(images))
    assert list(found) == predictor.head_names == ["L1", "L2", "L3", "L4", "mean"]
    heads = by_hand(workplace, images)
    if tta:  # each view through the network by itself
        heads = [slow_eight_ways(lambda view, k=k: by_hand(workplace, view)[k], images) for k in range(4)]
    for name, expected in zip(found, [*heads, np.mean(heads, axis=0)], strict=True):
        assert found[name].dtype == torch.float32 and found[name].shape == (2, 1, 20, 35)
        np.testing.assert_allclose(found[name].numpy().transpose(0, 2, 3, 1), expected, atol=ROUNDING)
    np.testing.assert_allclose(predictor(images)[..., 0], found["mean"][:, 0], atol=ROUNDING)


def test_one_head_has_no_mean(workplace):
    predictor = predictor_of(level="3")
    found = predictor.of_heads(standardised(soft_picture(32, 48)[None]))
    assert list(found) == predictor.head_names == ["L3"] and found["L3"].shape == (1, 1, 32, 48)


def test_memory_layout_and_precision_change_little(workplace, tmp_path):
    write_run(tmp_path / "models" / "other", channels_last=True)
    images = soft_picture(32, 48)[None]
    expected = by_hand(workplace, images)[-1]
    predictor = predictor_of("other")
    assert predictor.model.conv1_0.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_allclose(predictor(images), expected, atol=ROUNDING)
    coarse = Predictor("tiny", "cpu", "bf16")
    found = coarse(images)
    assert found.dtype == np.float32 and coarse.about.endswith(", cpu, bfloat16")
    assert np.abs(found - expected).max() > ROUNDING and np.abs(found - expected).mean() < 0.02


# ---------------------------------------------------------------- eight flips and turns


def views(height, width):
    """The eight maps of the places of a view to those of the picture, pixel by pixel -> [(rows, columns)] of ints."""
    for transposed, down, right in itertools.product((False, True), repeat=3):
        rows, columns = np.zeros((2, width, height) if transposed else (2, height, width), int)
        for place in np.ndindex(rows.shape):
            y, x = place[::-1] if transposed else place
            rows[place] = height - 1 - y if down else y
            columns[place] = width - 1 - x if right else x
        yield rows, columns


def slow_eight_ways(function, images):
    """(N, H, W, C) -> the mean over the eight views of what function returns, put back pixel by pixel."""
    total = 0
    for rows, columns in views(*images.shape[1:3]):
        found = function(np.ascontiguousarray(images[:, rows, columns]))
        back = np.empty((len(found), *images.shape[1:3], found.shape[-1]))
        back[:, rows, columns] = found
        total = total + back / 8
    return total


def unsymmetric(batch):
    """(N, H, W, C) -> (N, H, W, 2), different in each corner and along each side."""
    ramp = np.linspace(0, 1, batch.shape[1])[:, None] + np.linspace(0, 3, batch.shape[2]) ** 2
    return (batch[..., :2] / 255 * ramp[..., None]).astype(np.float32)


@pytest.mark.parametrize("size", [(6, 9), (7, 7), (1, 4)])
def test_eight_ways_is_a_slow_loop(size):
    images = np.random.default_rng(0).integers(0, 256, (2, *size, 3), np.uint8)
    seen = []

    def of_arrays(batch):
        assert batch.flags.c_contiguous  # as ONNX Runtime wants it
        seen.append(batch)
        return unsymmetric(batch)

    def of_tensors(batch):  # (N, C, H, W) -> (heads, N, 2, H, W), as Predictor.of_heads does
        found = torch.from_numpy(unsymmetric(batch.permute(0, 2, 3, 1).numpy())).permute(0, 3, 1, 2)
        return torch.stack([found, 2 * found])

    expected = slow_eight_ways(unsymmetric, images)
    assert np.abs(expected - unsymmetric(images)).max() > 0.1
    np.testing.assert_allclose(eight_ways(of_arrays, images, (1, 2)), expected, rtol=1e-5, atol=1e-6)
    found = eight_ways(of_tensors, torch.from_numpy(images).permute(0, 3, 1, 2), (-2, -1))
    assert found.shape == (2, 2, 2, *size)
    np.testing.assert_allclose(found[0].permute(0, 2, 3, 1), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[1], 2 * found[0])
    shapes = [batch.shape[1:3] for batch in seen]
    assert len(seen) == len({batch.tobytes() for batch in seen}) == 8 or size[0] == 1
    assert sorted(shapes) == sorted([size] * 4 + [size[::-1]] * 4)


def test_tta_of_a_predictor(workplace):
    images = soft_picture(20, 35)[None]
    expected = slow_eight_ways(lambda view: by_hand(workplace, view)[-1], images)
    found = predictor_of(tta=True)(images)
    np.testing.assert_allclose(found, expected, atol=ROUNDING)
    assert np.abs(found - predictor_of()(images)).max() > 0.01


# ---------------------------------------------------------------- tiles


class Answers:
    """A predictor for predict_tiled that answers with function(images)."""

    def __init__(self, function, num_classes, size=(1, 1)):
        self.function = function
        self.config = {"num_classes": num_classes, "input_h": size[0], "input_w": size[1]}

    def __call__(self, images):
        return self.function(images)


@pytest.mark.parametrize("overlap", [0, 16, 64])
@pytest.mark.parametrize("length", [16, 64, 80, 96, 112, 256, 272, 1040])
def test_weights_of_tiles_sum_to_one(length, overlap):
    tile = 96
    starts, weights = windows(length, tile, overlap)
    total = np.zeros(length)
    for start, weight in zip(starts, weights, strict=True):
        assert start % 16 == 0 and len(weight) == min(tile, length)
        total[start : start + len(weight)] += weight
    np.testing.assert_allclose(total, 1, atol=1e-6)
    assert starts[0] == 0 and starts[-1] + weights.shape[1] == length and weights.min() > 0
    assert all(b - a <= tile - overlap for a, b in itertools.pairwise(starts))
    if length <= tile:
        np.testing.assert_array_equal(weights, 1)


def test_tiles_are_256_pixels_or_the_trained_size():
    sizes = {(96, 96): (256, 256), (256, 257): (256, 272), (1, 1000): (256, 1008)}
    for (height, width), expected in sizes.items():
        assert tile_size({"input_h": height, "input_w": width}) == expected
    assert tile_size({"input_h": 257, "input_w": 96, "stem": "half"}) == (288, 256)


@pytest.mark.parametrize("height, width", [(1, 1), (40, 150), (64, 64), (131, 97), (300, 65)])
def test_tiles_give_every_pixel_back(height, width, monkeypatch):
    monkeypatch.setattr(inference, "TILE", 16)
    images = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), np.uint8)
    images[0, 0, 0], images[1, -1, -1] = (0, 255, 128), (255, 0, 1)
    seen = []

    def probability(batch):
        seen.append(batch.shape)
        return (batch / 255).astype(np.float32)

    found = predict_tiled(Answers(probability, 3, (96, 80)), images, batch_size=3)
    assert found.dtype == np.uint16 and found.shape == (2, 3, height, width)
    np.testing.assert_array_equal(found, images.transpose(0, 3, 1, 2).astype(np.uint16) * 257)  # 255 -> 65535
    assert len({shape[1:] for shape in seen}) == 1 and max(shape[0] for shape in seen) <= 3
    assert seen[0][1] <= 96 and seen[0][2] <= 80


@pytest.mark.parametrize("size", [(100, 70), (256, 256)])
def test_one_tile_is_the_whole_picture(workplace, size):
    images = np.stack([soft_picture(*size), soft_picture(*size, seed=1)])
    tiled = predict_tiled(predictor_of(), images)
    np.testing.assert_allclose(tiled[:, 0] / 65535, by_hand(workplace, images)[-1][..., 0], atol=ROUNDING)


def test_no_seam():
    """A filter that sees 33 pixels around, and false colours at the border of a tile as a network does."""

    def blurred(batch):
        blurs = [cv2.blur(image, (33, 33), borderType=cv2.BORDER_CONSTANT) for image in batch]
        return np.stack(blurs)[..., None] / np.float32(255)

    images = np.stack([soft_picture(640, 480)[..., 0]] * 2)[..., None]
    whole = predict_tiled(Answers(blurred, 1, (2048, 2048)), images) / 65535
    tiled = predict_tiled(Answers(blurred, 1), images) / 65535
    difference = np.abs(tiled - whole)[:, :, 16:-16, 16:-16]
    assert OVERLAP == 64 and 0 < difference.max() < 0.02, difference.max()  # with a hard cut it is 0.5
    steps = np.abs(np.diff(tiled - whole, axis=3))[:, :, :, 16:-16]
    assert steps.max() < 0.005, steps.max()
