"""inference.py: from a run's folder to probabilities, against numpy and the network as it was trained."""

import itertools
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
import yaml
from conftest import run_script

import inference
from archs import NestedUNet, UNet
from common.files import save_checkpoint, write_yaml
from inference import (
    OVERLAP,
    OnnxPredictor,
    Predictor,
    eight_ways,
    load_trained,
    predict_tiled,
    read_config,
    start_from,
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


# ---------------------------------------------------------------- a run's weights


def test_a_run_cut_to_a_level_answers_with_that_level(workplace, tmp_path):
    write_run(tmp_path / "models" / "small", cut=2)
    images = soft_picture(32, 48)[None]
    for level in ("deepest", None, "2"):
        predictor = predictor_of("small", level=level)
        assert predictor.head_names == ["L2"] and predictor.head == "L2"
        np.testing.assert_allclose(predictor(images), by_hand(workplace, images)[1], atol=ROUNDING)
    for level in ("1", "4", "mean"):
        with pytest.raises(ValueError, match=r"models/small was cut to level 2 and has no other: leave --level out$"):
            predictor_of("small", level=level)


def test_without_deep_supervision_there_is_level_4_alone(workplace, tmp_path):
    shutil.copytree("models/tiny", "models/plain")
    config = yaml.safe_load(Path("models/plain/config.yml").read_text())
    write_yaml(Path("models/plain/config.yml"), {**config, "arch": "UNet", "deep_supervision": False})
    model = UNet(width=2).eval()
    save_checkpoint(Path("models/plain/model.pth"), model.state_dict())
    images = soft_picture(32, 48)[None]
    for level in ("deepest", None, "4"):
        predictor = predictor_of("plain", level=level)
        assert predictor.head_names == ["L4"]
        np.testing.assert_allclose(predictor(images), by_hand(model, images)[0], atol=ROUNDING)
    for level in ("2", "mean"):
        with pytest.raises(ValueError, match=f"has level 4 alone, not {level}: .*without --deep_supervision True"):
            predictor_of("plain", level=level)


def test_last_takes_the_averaged_weights_where_there_are_some(workplace, tmp_path):
    images, folder = soft_picture(32, 48)[None], tmp_path / "models" / "tiny"
    torch.manual_seed(1)
    latest, averaged = (NestedUNet(deep_supervision=True, width=2).eval() for _ in range(2))
    answers = [by_hand(model, images)[-1] for model in (latest, averaged, workplace)]
    assert min(np.abs(a - b).max() for a, b in itertools.combinations(answers, 2)) > 0.01
    state = {"rows": [], "model": latest.state_dict(), "optimizer": {"state": {}}}
    save_checkpoint(folder / "last.pth", state)
    np.testing.assert_allclose(predictor_of(which="last")(images), answers[0], atol=ROUNDING)
    ema = {f"module.{key}": value for key, value in averaged.state_dict().items()} | {"n_averaged": torch.tensor(3)}
    save_checkpoint(folder / "last.pth", {**state, "ema": ema})
    np.testing.assert_allclose(predictor_of(which="last")(images), answers[1], atol=ROUNDING)
    np.testing.assert_allclose(predictor_of()(images), answers[2], atol=ROUNDING)


def test_weights_in_half_precision_become_float32(workplace):
    path = Path("models/tiny/model.pth")
    save_checkpoint(path, {key: value.half() for key, value in workplace.state_dict().items()})
    model, _ = load_trained("tiny", CPU)
    assert all(value.dtype == torch.float32 for value in model.parameters()) and not model.training


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda path: path.unlink(), r"models/tiny/model.pth: no such file"),
        (lambda path: path.write_bytes(b"junk"), r"model.pth is not a checkpoint of tensors"),
        (lambda path: save_checkpoint(path, {"a": 1}), r"model.pth holds no weights"),
        (
            lambda path: save_checkpoint(path, UNet(width=2).state_dict()),
            r"not hold the weights of the NestedUNet that",
        ),
        (
            lambda path: save_checkpoint(path, NestedUNet(deep_supervision=True, width=3).state_dict()),
            r"does not hold the weights of the NestedUNet that config.yml describes",
        ),
    ],
    ids=["gone", "junk", "no weights", "another network", "another width"],
)
def test_spoilt_weights_are_one_line(workplace, spoil, message):
    spoil(Path("models/tiny/model.pth"))
    with pytest.raises((ValueError, OSError), match=message) as caught:
        predictor_of()
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- a run's config


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"width": "x"}, "is damaged: width 'x' is nothing that train.py writes"),
        ({"width": 0, "input_h": 1.5}, "is damaged: width 0, input_h 1.5 is nothing"),
        ({"num_classes": 101}, "num_classes 101"),
        ({"num_classes": True}, "num_classes True"),
        ({"input_channels": 2}, "input_channels 2"),
        ({"input_w": 5000}, "input_w 5000"),
        ({"deep_supervision": "yes"}, "deep_supervision 'yes'"),
        ({"loss": 3}, "loss 3"),
        ({"arch": None}, "arch None"),
        ({"arch": "Foo"}, "arch 'Foo' is unknown; expected one of UNet, NestedUNet"),
        ({"mean": [1, 2]}, r"mean \[1, 2\]"),
        ({"mean": [0.5, 0.5, float("nan")]}, r"mean \[0.5, 0.5, nan\]"),
        ({"std": [1, 1, 0]}, r"std \[1, 1, 0\]"),
        ({"scale": -1}, "scale -1"),
        ({"level": 5}, "level 5"),
        ({"level": "2"}, "level '2'"),
        ({"level": True}, "level True"),
        ({"level": 2, "deep_supervision": False}, "level 2"),
        ({"dataset": "../elsewhere"}, "config.yml: dataset '../elsewhere': expected the name of a folder"),
        ({"img_ext": "/../x.png"}, "config.yml: img_ext '/../x.png'"),
    ],
    ids=str,
)
def test_a_damaged_config_is_one_line(workplace, changed, message):
    path = Path("models/tiny/config.yml")
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changed))
    with pytest.raises(ValueError, match=message) as caught:
        predictor_of()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: 1", r"models/tiny/config.yml is not of a run of train.py: arch, dataset, .*, mean, std missing$"),
        ("classes: [ants, bees]\nseed: 0", "is not of a run of train.py: arch, "),  # of transfer_resnet18.py
        ("[1, 2]", "expected `key: value` lines, found list"),
        ("a: [", "is not a readable YAML file"),
        ("\0", "is not a readable YAML file"),
    ],
)
def test_another_scripts_config_and_what_is_none(workplace, content, message):
    Path("models/tiny/config.yml").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_config(Path("models/tiny"))


def test_a_run_that_is_not_there_names_those_that_are(workplace):
    shutil.copytree("models/tiny", "models/more")
    with pytest.raises(FileNotFoundError, match="models/nope/config.yml: no such file; the runs are: more, tiny$"):
        predictor_of("nope")
    shutil.rmtree("models")
    with pytest.raises(FileNotFoundError, match="the runs are: none$"):
        predictor_of("nope")
    for name in ("a/b", "..", ""):
        with pytest.raises(ValueError, match="plain name"):
            load_trained(name, CPU)


# ---------------------------------------------------------------- weights to start from


@pytest.mark.parametrize("source", ["tiny", "models/tiny", "models/tiny/model.pth"])
def test_starting_weights_of_a_run(workplace, source, capsys):
    """By its name, folder or file: every weight, and the mean and std that these weights expect."""
    model, config = NestedUNet(deep_supervision=True, width=2), {"weights": source, "input_channels": 3}
    start_from(model, config)
    own = model.state_dict()
    assert all(torch.equal(own[key], value) for key, value in workplace.state_dict().items())
    assert config == {"weights": source, "input_channels": 3, "mean": MEAN, "std": STD}
    assert capsys.readouterr().out == "weights of models/tiny/model.pth\n"


def test_starting_weights_of_a_strangers_file(workplace, capsys):
    """A state_dict as others save it, in half precision, with no config.yml beside it."""
    state = {f"module.{key}": value.half() for key, value in workplace.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state}, "foreign.pth")
    model, config = NestedUNet(deep_supervision=True, width=2), {"weights": "foreign.pth", "input_channels": 3}
    start_from(model, config)
    for key, value in workplace.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-3, atol=1e-3)
    assert "mean" not in config and capsys.readouterr().out == "weights of foreign.pth\n"


@pytest.mark.parametrize("options", [{"num_classes": 2, "deep_supervision": True}, {"num_classes": 1}])
def test_heads_of_another_kind_stay_fresh(workplace, options, capsys):
    model = NestedUNet(width=2, **options)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    start_from(model, {"weights": "tiny", "input_channels": 3})
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key] if key.startswith("final") else workplace.state_dict()[key]), key
    heads = sorted(key for key in before if key.startswith("final"))
    assert capsys.readouterr().out == f"weights of models/tiny/model.pth; new heads: {', '.join(heads)}\n"


def test_starting_weights_that_do_not_fit(workplace):
    def refused(model, weights="tiny"):
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises((ValueError, OSError)) as caught:
            start_from(model, {"weights": weights, "input_channels": 3})
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
        return str(caught.value)

    wider = NestedUNet(deep_supervision=True, width=3)
    count = len(wider.state_dict())
    different = count - 30 - 8  # all but batch norms' counters; the heads would stay fresh
    assert refused(wider) == (
        "models/tiny/model.pth does not fit: conv0_0.bn1.bias is (2,) there, (3,) here "
        f"({different} of {count} entries differ); give the --arch, --width and --input_channels it was trained with"
    )
    assert "conv0_0.conv1.weight is (2, 3, 3, 3) there, (2, 1, 3, 3) here" in refused(
        NestedUNet(1, 1, deep_supervision=True, width=2)
    )
    save_checkpoint(Path("unet.pth"), UNet(width=2).state_dict())
    assert "is missing there" in refused(NestedUNet(width=2), "unet.pth")
    assert refused(NestedUNet(width=2), "nope") == (
        "--weights nope: no such file, and no run: models/nope/model.pth does not exist"
    )
    Path("text.pth").write_text("hello")
    assert "text.pth is not a checkpoint" in refused(NestedUNet(width=2), "text.pth")


# ---------------------------------------------------------------- ONNX files


def write_onnx(path, **metadata):
    """The mean of the channels over 255, in the shapes of export.py."""
    onnx = pytest.importorskip("onnx", reason="needs requirements-onnx.txt")
    value, node = onnx.helper.make_tensor_value_info, onnx.helper.make_node
    constants = [onnx.numpy_helper.from_array(np.float32(255), "full")]
    constants += [onnx.numpy_helper.from_array(np.int64([3]), "axes")]
    nodes = [
        node("Cast", ["images"], ["floats"], to=onnx.TensorProto.FLOAT),
        node("ReduceMean", ["floats", "axes"], ["grey"], keepdims=1),
        node("Div", ["grey", "full"], ["probabilities"]),
    ]
    images = value("images", onnx.TensorProto.UINT8, ["N", "H", "W", 3])
    output = value("probabilities", onnx.TensorProto.FLOAT, ["N", "H", "W", 1])
    graph = onnx.helper.make_graph(nodes, "grey", [images], [output], constants)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    onnx.helper.set_model_props(model, metadata)
    onnx.save(model, str(path))


ABOUT = {"name": "grey", "input_h": "32", "input_w": "48", "scale": "1.0", "threshold": "0.5"}


@pytest.mark.parametrize("tta", [False, True])
def test_an_onnx_file_answers(tmp_path, tta):
    pytest.importorskip("onnxruntime", reason="needs requirements-onnx.txt")
    write_onnx(tmp_path / "grey.onnx", **ABOUT)
    predictor = OnnxPredictor(tmp_path / "grey.onnx", "cpu", tta=tta)
    images = np.stack([soft_picture(33, 50), soft_picture(33, 50, seed=1)])
    found = predictor(images)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, images.mean(axis=3, keepdims=True) / 255, atol=1e-6)
    size = {"input_channels": 3, "num_classes": 1, "input_h": 32, "input_w": 48, "scale": 1.0}
    assert predictor.config == size and predictor.name == "grey"
    assert predictor.about == f"{tmp_path / 'grey.onnx'}, CPUExecutionProvider"
    assert OnnxPredictor(tmp_path / "grey.onnx", name="mine").name == "mine"


def test_onnx_needs_no_torch(tmp_path):
    """predict.py in a process in which torch cannot be imported."""
    pytest.importorskip("onnxruntime", reason="needs requirements-onnx.txt")
    write_onnx(tmp_path / "grey.onnx", **ABOUT)
    image = soft_picture(40, 300)
    cv2.imwrite(str(tmp_path / "a.png"), image)
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "torch.py").write_text("raise ImportError('no torch here')")
    args = ("--onnx", "grey.onnx", "a.png", "--scale", "1", "--probability", "--tta")
    run_script("predict.py", *args, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path / "blocked")})
    found = cv2.imread(str(tmp_path / "outputs" / "grey" / "predict" / "a_probability.png"), cv2.IMREAD_UNCHANGED)
    np.testing.assert_allclose(found / 65535, image.mean(axis=2) / 255, atol=1e-4)


def test_without_onnx_runtime_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # as if it were not installed
    with pytest.raises(ValueError, match="not installed: pip install onnxruntime$"):
        OnnxPredictor("any.onnx")


@pytest.mark.parametrize(
    "about", [{"name": "grey"}, {"input_h": "0"}, {"input_w": "5000"}, {"scale": "-1"}, {"name": ".."}], ids=str
)
def test_onnx_files_of_others_are_refused(tmp_path, about):
    pytest.importorskip("onnxruntime", reason="needs requirements-onnx.txt")
    write_onnx(tmp_path / "grey.onnx", **(about if about == {"name": "grey"} else ABOUT | about))
    with pytest.raises(ValueError, match="grey.onnx is no ONNX file of export.py"):
        OnnxPredictor(tmp_path / "grey.onnx")


def test_what_is_no_onnx_file(tmp_path):
    pytest.importorskip("onnxruntime", reason="needs requirements-onnx.txt")
    (tmp_path / "a.onnx").write_text("hello")
    with pytest.raises(ValueError, match="a.onnx is no ONNX file of export.py"):
        OnnxPredictor(tmp_path / "a.onnx")
    with pytest.raises(FileNotFoundError):
        OnnxPredictor(tmp_path / "nothing.onnx")


@pytest.mark.parametrize("answer", ["nan", "above 1", "float64", "another size", "fails"])
def test_an_onnx_file_must_answer_with_probabilities(tmp_path, monkeypatch, answer):
    pytest.importorskip("onnxruntime", reason="needs requirements-onnx.txt")
    write_onnx(tmp_path / "grey.onnx", **ABOUT)
    predictor, images = OnnxPredictor(tmp_path / "grey.onnx"), soft_picture(8, 9)[None]
    whole = np.full((1, 8, 9, 1), 0.5, np.float32)
    wrong = {"nan": whole * np.nan, "above 1": whole * 3, "float64": whole.astype(float), "another size": whole[:, 1:]}

    def run(*_):
        if answer == "fails":
            raise RuntimeError("of ONNX Runtime's own kind")
        return [wrong[answer]]

    monkeypatch.setattr(predictor, "session", SimpleNamespace(run=run))
    expected = "cannot be run" if answer == "fails" else r"does not answer with probabilities of \(8, 9\) pixels"
    with pytest.raises(ValueError, match=expected):
        predictor(images)
