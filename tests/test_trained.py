"""inference.py: the config and weights of a run, whole and spoilt, and weights to start from."""

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from test_inference import CPU, MEAN, ROUNDING, STD, by_hand, predictor_of, soft_picture, write_run

from archs import NestedUNet, UNet
from common.files import save_checkpoint, write_yaml
from inference import load_trained, start_from
from instances import DEFAULTS
from run_config import read_config

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty current directory with models/tiny -> its network."""
    monkeypatch.chdir(tmp_path)
    return write_run(tmp_path / "models" / "tiny")


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
        with pytest.raises(ValueError, match=f"has only level 4, not {level}: .*without --deep_supervision True"):
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
        ({"width": "x"}, "is damaged: width 'x' is not what train.py writes"),
        ({"keep": "all"}, "is damaged: keep 'all' is not what train.py writes"),
        ({"width": 0, "input_h": 1.5}, "is damaged: input_h 1.5, width 0 is not what"),
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
        ({"level": 2.0}, "level 2.0"),
        ({"level": 0}, "level 0"),
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
        ("a: 1", r"models/tiny/config.yml is not from a run of train.py: arch, dataset, .*, mean, std missing$"),
        ("classes: [ants, bees]\nseed: 0", "models/tiny is a run of transfer_resnet18.py; use it with: "),
        ("[1, 2]", "expected `key: value` lines, found list"),
        ("a: [", "is not a readable YAML file"),
        ("\0", "is not a readable YAML file"),
    ],
)
def test_another_scripts_config_and_what_is_none(workplace, content, message):
    Path("models/tiny/config.yml").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_config(Path("models/tiny"))


def test_too_much_smoothing(workplace):
    path = Path("models/tiny/config.yml")
    whole = {**yaml.safe_load(path.read_text()), **DEFAULTS, "target": "instances", "num_classes": 3}
    path.write_text(yaml.safe_dump(whole | {"diameter": 22, "stretch": "1,99.8", "smoothing": 10_000}))
    with pytest.raises(ValueError, match="smoothing 10000 is not what train.py writes"):
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
        f"({different} of {count} entries differ); give the --arch, --width, --encoder and --input_channels it was "
        "trained with"
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
