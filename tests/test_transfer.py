"""transfer_resnet18.py as its user runs it, on tiny pictures, and its loop against values known beforehand."""

import csv
import functools
import hashlib
import http.server
import os
import signal
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn

import engine
import transfer_resnet18 as script
from classification import folders, resnet18, sources
from classification import predict as classify_module
from common.files import digest_of

REPOSITORY = Path(__file__).parents[1]
SMALL = ["--weights", "none", "--img_size", "32", "-b", "4", "--device", "cpu", "--name", "run"]


def write_tree(root, classes=("ants", "bees"), train=6, val=3):
    """Noise, a colour a class, so that a network can learn it."""
    rng = np.random.default_rng(0)
    for part, count in (("train", train), ("val", val)):
        for label, name in enumerate(classes):
            (root / part / name).mkdir(parents=True)
            for index in range(count):
                picture = rng.integers(0, 120, (40, 48, 3), np.uint8)
                picture[..., label % 3] += 130
                Image.fromarray(picture).save(root / part / name / f"{index}.png")


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    write_tree(tmp_path / "inputs" / "hymenoptera_data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    return tmp_path


def run(*arguments):
    """main() with these arguments, in this process, because importing torchvision again takes seconds."""
    argv, sys.argv = sys.argv, ["transfer_resnet18.py", *map(str, arguments)]
    try:
        return script.main()
    finally:
        sys.argv = argv


def refused(*arguments):
    """The one line of the error that the arguments deserve."""
    with pytest.raises((ValueError, OSError)) as caught:
        run(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def read_log(name="run"):
    with open(f"models/{name}/log.csv", newline="") as file:
        return list(csv.DictReader(file))


def weights_of(name="run"):
    return torch.load(f"models/{name}/model.pth", weights_only=True)


# ---------------------------------------------------------------- the loop


def toy(values, num_epochs=None):
    """train_model on a model whose validation accuracy in epoch n is values[n - 1]; None is a loss of NaN."""
    inputs, labels = torch.eye(4), torch.tensor([0, 0, 0, 0])

    class Planned(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.epoch = nn.Parameter(torch.zeros(())), 0
            self.register_buffer("trained", torch.zeros(()))

        def forward(self, x):
            if self.training:
                self.trained += 1
                return torch.stack([self.weight.expand(4), self.weight.expand(4) * 2], 1)
            right = values[int(self.trained) - 1]
            if right is None:
                return torch.full((4, 2), torch.nan)
            wrong = torch.arange(4) >= right
            return torch.stack([(~wrong).float(), wrong.float()], 1)

    model = Planned()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.1)
    loaders = {part: [(inputs, labels)] for part in ("train", "val")}
    arguments = (model, loaders, nn.CrossEntropyLoss(), optimizer, scheduler, num_epochs or len(values))
    return script.train_model(*arguments)


def test_train_model_returns_the_last_best_epoch_and_logs_the_rate_it_used():
    model, rows = toy([2, 3, 3, 1])
    assert int(model.trained) == 3
    assert [row["val_acc"] for row in rows] == [0.5, 0.75, 0.75, 0.25]
    assert [row["lr"] for row in rows] == pytest.approx([0.1, 0.1, 0.01, 0.01])
    assert rows[0]["loss"] == pytest.approx(np.log(2)) and rows[0]["acc"] == 1.0


def test_a_loss_that_is_not_finite_stops():
    with pytest.raises(ValueError, match="^epoch 2/3: the validation loss after step 1 is nan; stopped; a lower "):
        toy([2, None, 4])


# ---------------------------------------------------------------- a run


def test_a_run_leaves_everything_and_predicts(capsys, place, monkeypatch):
    Path("inputs/hymenoptera_data/train/ants/imageNotFound.gif").write_bytes(b"GIF89a")
    assert run(*SMALL, "--epochs", 2) == 0
    text = capsys.readouterr().out
    assert (
        "imageNotFound.gif" in text and "95 % interval" in text and "best accuracy" in text and "last accuracy" in text
    )
    assert "train: 12 pictures, 6 ants, 6 bees" in text
    assert sorted(path.name for path in Path("models/run").iterdir()) == sorted({*script.RUN_FILES} - {"tensorboard"})
    config = yaml.safe_load(Path("models/run/config.yml").read_text())
    assert config["classes"] == ["ants", "bees"] and config["mean"] == list(folders.MEAN) and config["lr"] > 0
    assert (
        config["environment"]["torch"].startswith(torch.__version__.split("+")[0])
        and not {"resume", "predict", "demo"} & config.keys()
    )
    assert list(read_log()[0]) == ["epoch", "lr", "loss", "acc", "val_loss", "val_acc", "seconds"]
    page = Path("outputs/run/report.html").read_text()
    assert "Confusion" in page and "where it looked" in page and 'src="http' not in page
    torch_state = resnet18.ResNet(resnet18.BasicBlock, [2, 2, 2, 2], 2).state_dict()
    assert weights_of().keys() == torch_state.keys()

    before = Path("models/run/model.pth").read_bytes()
    assert "--overwrite" in refused(*SMALL) and Path("models/run/model.pth").read_bytes() == before

    # predict: the validation accuracy again, found by itself as the newest run; bad files are reported, not fatal
    assert run("--predict", "inputs/hymenoptera_data/val") == 0
    with open("outputs/run/predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["path", "class", "probability", "settings", "ants", "bees"] and len(rows) == 6
    for row in rows:
        assert float(row["ants"]) + float(row["bees"]) == pytest.approx(1, abs=1e-5)
        assert row["probability"] == row[row["class"]] == max(row["ants"], row["bees"])
    correct = sum(Path(row["path"]).parent.name == row["class"] for row in rows)
    assert correct / 6 == pytest.approx(max(float(row["val_acc"]) for row in read_log()))
    Path("broken.jpg").write_bytes(b"no picture")
    Path("empty").mkdir()
    one = "inputs/hymenoptera_data/val/ants/0.png"
    capsys.readouterr()
    assert run("--name", "run", "--predict", "broken.jpg", one, "absent.png", "empty", one) == 1
    captured = capsys.readouterr()
    assert len(captured.err.strip().split("\n")) == 3 and "broken.jpg" in captured.err and "absent.png" in captured.err
    real = classify_module.classify
    monkeypatch.setattr(classify_module, "classify", lambda *args: np.float32([[0.25, 0.75]] * len(real(*args))))
    for reject, label in ((0.75, "bees"), (0.76, "unknown")):
        assert run("--name", "run", "--predict", one, "--reject", reject) == 0
        said = f"1 picture, {int(label == 'unknown')} of them unknown (below {reject})"
        assert f"{label}  0.7500  {one}\n{said}" in capsys.readouterr().out
    monkeypatch.setattr(classify_module, "classify", real)
    assert "--reject is for --predict" in refused(*SMALL, "--reject", 0.5)
    with open("outputs/run/predictions.csv", newline="") as file:  # the row of the second call, and the five others
        again = list(csv.DictReader(file))
    assert [row["path"] for row in again] == [*(r["path"] for r in rows if r["path"] != one), one]
    model = f"models/run ({digest_of(Path('models/run/model.pth').read_bytes())})"
    assert {row["settings"] for row in again[:-1]} == {model} and again[-1]["settings"] == f"{model}, reject 0.76"


@pytest.mark.parametrize("extra", [["--freeze"], ["--optimizer", "AdamW", "--amp", "off"]])
def test_resuming_gives_the_same_bits(extra, monkeypatch, capsys):
    run(*SMALL, "--epochs", 2, *extra)
    whole, log = torch.load("models/run/last.pth", weights_only=True), read_log()
    best = weights_of()

    real = engine.train_one_epoch

    def interrupted(run, *arguments):
        if run.epoch == 1:
            raise KeyboardInterrupt
        return real(run, *arguments)

    capsys.readouterr()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine, "train_one_epoch", interrupted)
        run(*SMALL, "--epochs", 2, *extra, "--overwrite")
    last_line = capsys.readouterr().out.rstrip().split("\n")[-1]
    assert (
        last_line == "the last finished epoch is kept; continue with: python transfer_resnet18.py --name run --resume"
    )
    assert [row["epoch"] for row in read_log()] == ["1"]

    torch.manual_seed(12345)
    run("--name", "run", "--resume")
    again = torch.load("models/run/last.pth", weights_only=True)
    for row, other in zip(log, read_log(), strict=True):
        assert row | {"seconds": 0} == other | {"seconds": 0}
    assert again["best_epoch"] == whole["best_epoch"]
    for key, value in whole["model"].items():
        assert torch.equal(again["model"][key], value), key
    for key, value in weights_of().items():
        assert torch.equal(best[key], value), key


def test_resume_keeps_to_the_runs_options_and_data(place):
    run(*SMALL, "--epochs", 1)
    assert "these differ: lr 0.5 (run: 0.02); leave them out" in refused("--name", "run", "--resume", "--lr", 0.5)
    Path("inputs/hymenoptera_data/train/ants/0.png").unlink()
    assert "has changed" in refused("--name", "run", "--resume")
    assert "no such file" in refused("--name", "other", "--resume")
    assert "plain name of a folder" in refused(*SMALL[:-1], "a/b")
    assert "models/x_resnet18" in refused("--demo", "--data_dir", "inputs/x", "--resume")


# ---------------------------------------------------------------- frozen and thawed


def body_file(path="body.pth"):
    torch.manual_seed(0)
    torch.save(resnet18.ResNet18(7).state_dict(), path)
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("augment", [True, False])
def test_frozen_features_are_computed_no_more_often_than_needed(augment, monkeypatch):
    body, seen = body_file(), []
    maps = resnet18.ResNet18.maps

    def counted(self, images):
        seen.append(len(images))
        return maps(self, images)

    monkeypatch.setattr(resnet18.ResNet18, "maps", counted)
    monkeypatch.setattr(script, "conclude", lambda *arguments: None)
    run(*SMALL, "--weights", "body.pth", "--freeze", "--epochs", 3, "--augment", augment)
    assert sum(seen) == (3 if augment else 1) * 12 + 2 * 6  # validation once, with mirror images
    for key, value in weights_of().items():
        assert key.startswith("fc.") or torch.equal(value, body[key]), key
    assert weights_of()["fc.weight"].any()


def test_only_what_has_a_learning_rate_learns():
    body = body_file()
    run(*SMALL, "--weights", "body.pth", "--epochs", 1, "--layer_decay", 0, "--body_lr", 0.01, "--lr", 0.1)
    state = torch.load("models/run/last.pth", weights_only=True)["model"]
    for key in body:
        learns = key.startswith(("layer4", "fc.")) and "running" not in key and "num_batches" not in key
        same = state[key].shape == body[key].shape and torch.equal(state[key], body[key])
        assert learns != same, key


def test_learning_rates_by_stage_and_epoch():
    model = resnet18.ResNet18(2)
    config = {"lr": 1.0, "body_lr": 0.1, "layer_decay": 0.5, "freeze": False, "epochs": 4}
    config.update(optimizer="SGD", momentum=0.9, weight_decay=0.0, scheduler="StepLR", step_size=2, gamma=0.1)
    optimizer, scheduler = script.build_optimizer(model, config)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    rates = []
    for _ in range(4):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    assert rates[0] == rates[1] == pytest.approx([1, 0.1, 0.05, 0.025, 0.0125, 0.00625])
    assert rates[2] == pytest.approx([value / 10 for value in rates[0]])


def test_recipes_fill_only_what_nobody_gave(monkeypatch):
    def config(*arguments):
        return script.new_config(*script.parse_options(script.build_parser, [*arguments, "--device", "cpu"]))

    assert config("--freeze")["freeze_bn"] is True and config("--weights", "none")["freeze_bn"] is False
    assert config("--freeze", "--lr", "0.5")["lr"] == 0.5 and config()["body_lr"] < config()["lr"]
    assert config()["name"] == "hymenoptera_data_resnet18" and config("--demo")["name"] == "two_classes_resnet18"
    assert config("--demo", "--epochs", "3")["epochs"] == 3 and config("--demo")["weights"] == "none"


# ---------------------------------------------------------------- weights


def test_weights_that_cannot_be_had_say_what_to_do(monkeypatch, place):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens there: offline, on any machine
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("TORCH_HOME", str(place / "torch"))
    message = refused("--name", "run", "--img_size", 32)
    for part in (
        "https://download.pytorch.org/models/resnet18-f37072fd.pth",
        str(place / "torch/hub/checkpoints"),
        "--weights PATH",
    ):
        assert part in message
    assert not Path("models/run").exists()
    body_file("torch/hub/checkpoints/resnet18-f37072fd.pth")  # there now, as the message asked
    assert run("--name", "run", "--img_size", 32, "--freeze", "--epochs", 1) == 0


def test_wrong_weight_files_are_one_line():
    Path("text.pth").write_text("hello")
    assert "text.pth is not a checkpoint" in refused(*SMALL, "--weights", "text.pth")
    torch.save([1, 2], "list.pth")
    assert "list.pth holds no weights" in refused(*SMALL, "--weights", "list.pth")
    torch.save({"conv1.weight": torch.full((2,), torch.nan)}, "nan.pth")
    assert "nan.pth holds weights that are not finite: conv1.weight" in refused(*SMALL, "--weights", "nan.pth")
    torch.save({"a": torch.zeros(2)}, "other.pth")
    assert "other.pth is not a state_dict of a ResNet-18" in refused(*SMALL, "--weights", "other.pth")
    assert "absent.pth: no such file" in refused(*SMALL, "--weights", "absent.pth")
    assert not Path("models/run").exists()


# ---------------------------------------------------------------- data


def test_missing_data_names_the_three_ways_out():
    message = refused(*SMALL, "--data_dir", "inputs/nothing")
    assert all(word in message for word in ("inputs/nothing", "--download", "--raw", "--demo"))


def test_one_source_of_data_at_a_time(capsys):
    with pytest.raises(SystemExit) as stopped:
        run("--download", "--demo")
    assert stopped.value.code == 2 and "not allowed with argument" in capsys.readouterr().err


@pytest.fixture
def archive(place):
    path = place / "hymenoptera_data.zip"
    with zipfile.ZipFile(path, "w") as file:
        for picture in sorted((place / "inputs").rglob("*.png")):
            file.write(picture, picture.relative_to(place / "inputs"))
    (place / "inputs").rename(place / "elsewhere")
    return path


def test_raw_zip_is_unpacked(archive):
    assert run(*SMALL, "--epochs", 1, "--raw", archive) == 0
    assert "exists already" in refused(*SMALL, "--raw", archive, "--overwrite")
    assert run(*SMALL, "--epochs", 1, "--raw", archive, "--data_dir", "inputs/other", "--overwrite") == 0


def test_download_fetches_checks_and_unpacks(archive, monkeypatch):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=archive.parent)
    handler.log_message = lambda *arguments: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(sources, "DATA_URL", f"http://127.0.0.1:{server.server_port}/{archive.name}")
        assert "sha256" in refused(*SMALL, "--epochs", 1, "--download")
        assert not Path("inputs/hymenoptera_data").exists()
        monkeypatch.setattr(sources, "DATA_SHA256", hashlib.sha256(archive.read_bytes()).hexdigest())
        assert run(*SMALL, "--epochs", 1, "--download") == 0
        server.shutdown()
    assert run(*SMALL, "--epochs", 1, "--download", "--overwrite") == 0  # there already, no server needed


def test_more_classes_and_no_val_folder(capsys):
    write_tree(Path("mine"), ("a", "b", "c"), train=5, val=1)
    for path in Path("mine/val").rglob("*.png"):
        path.unlink()
    for name in ("a", "b", "c", ""):
        Path("mine/val", name).rmdir()
    # 12 of 15 pictures train; a batch of 11 leaves one alone at the end
    assert run(*SMALL, "--data_dir", "mine", "--epochs", 1, "-b", 11) == 0
    assert "no val folder: 3 of 15" in capsys.readouterr().out
    assert weights_of()["fc.weight"].shape == (3, 512)


def test_demo_runs_offline(monkeypatch):
    fewer = functools.partial(sources.write_demo, counts=(("train", 8), ("val", 4)), size=64)
    monkeypatch.setattr(sources, "write_demo", fewer)
    opened = []
    monkeypatch.setattr("webbrowser.open", lambda address: opened.append(address) or True)
    assert run("--demo", "--open", "--epochs", 1, "--img_size", 32, "--device", "cpu") == 0
    assert len(list(Path("inputs/two_classes/train/bees").glob("*.png"))) == 8
    assert opened == [Path("outputs/two_classes_resnet18/report.html").resolve().as_uri()]
    assert Path("outputs/two_classes_resnet18/report.html").is_file()
    assert "open" not in yaml.safe_load(Path("models/two_classes_resnet18/config.yml").read_text())


def test_predicting_opens_no_report():
    assert refused("--predict", "x.jpg", "--open").startswith("--open shows the report of a training")


def test_predicting_without_a_run_says_how_to_make_one():
    assert refused("--predict", "x.jpg") == (
        "no trained run in models/; train one first: python transfer_resnet18.py --demo"
    )


# ---------------------------------------------------------------- the real command


def test_a_stopped_run_says_how_to_go_on():
    """As a cluster stops it; a Ctrl-C, in this process, is above."""
    words = [
        sys.executable,
        "-W",
        "error::FutureWarning",
        REPOSITORY / "transfer_resnet18.py",
        *SMALL,
        "--epochs",
        "500",
    ]
    environment, pipe = {**os.environ, "OMP_NUM_THREADS": "1"}, subprocess.PIPE
    process = subprocess.Popen(words, stderr=pipe, stdout=pipe, text=True, env=environment)
    for line in process.stdout:
        if line.startswith("epoch 2/"):
            process.send_signal(signal.SIGTERM)
            break
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 143, errors
    assert output.rstrip().endswith("continue with: python transfer_resnet18.py --name run --resume")
    assert errors.strip() == "transfer_resnet18.py: stopped"
    rows = torch.load("models/run/last.pth", weights_only=True)["rows"]
    assert len(rows) >= 2 and not list(Path("models/run").glob(".*"))
