"""torchrun: two Gloo processes on the CPU against one; this file is also what they run.

torchrun --standalone --nproc_per_node=2 tests/test_distributed.py    # in a folder with inputs/; a process of it fails
"""

import copy
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import REPOSITORY, browser_in, write_data_set
from PIL import Image
from torch import nn

import engine
import train
import transfer_resnet18 as transfer
import val
from archs import NestedUNet, as_heads
from augmentation import augmentation
from classification.resnet18 import ResNet18
from common import cli, distributed, loaders
from common.loaders import set_epoch
from dataset import Dataset, build_dataset, make_loader
from inference import Predictor
from losses import LOSSES, BCEDiceLoss, mean_over_heads
from run_config import read_config
from tasks import Segmentation

TINY = "--dataset tiny --width 2 --input_w 32 --input_h 32 -b 4 --device cpu --amp off --ema 0.9 --lr 0.02"
CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


# ---------------------------------------------------------------- what one process and two do alike


def nuclei(count, batch_size, shuffle, augment=False):
    """A loader of the first `count` images of inputs/tiny, in its third epoch."""
    root, ids = Path("inputs/tiny"), [f"img{k:02d}" for k in range(count)]
    options = {"transform": augmentation("flips,mild", 32, 32), "cutmix": 0.5} if augment else {}
    dataset = Dataset(ids, root / "images", root / "masks", ".png", ".png", 1, **options)
    loader = make_loader(dataset, batch_size, shuffle, seed=5)
    if shuffle:
        set_epoch(loader, 3)
    return loader


def small_unet():
    torch.manual_seed(1)
    model = NestedUNet(1, 3, deep_supervision=True, width=2)
    return model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)


def trained_unet(count, batch_size):
    """-> the parameters after one epoch, and what train_one_epoch returned."""
    model, optimizer = small_unet()
    run = engine.Run(model, Segmentation(BCEDiceLoss()), optimizer, None, CPU, epochs=1)
    run.forward = distributed.parallel(model, CPU)
    found = engine.train_one_epoch(run, nuclei(count, batch_size, shuffle=True))
    return dict(model.named_parameters()), found


class Counting(Segmentation):
    """Notes how many images this process scores."""

    images = 0

    def count(self, output, masks, own, training):
        self.images += own
        return super().count(output, masks, own, training)


def judged_unet(count, batch_size):
    """-> what evaluate returned, and how many images this process scored."""
    model, task = small_unet()[0], Counting(BCEDiceLoss())
    loader = nuclei(count, batch_size, shuffle=False)
    with torch.no_grad():  # probabilities on both sides of the threshold
        images = torch.stack([loader.dataset[k][0] for k in range(3)])
        for _ in range(20):
            model(images)
        logits = model.eval()(images)[-1]
        model.final4.bias -= (logits.min() + logits.median()) / 2
    return engine.evaluate(model, loader, task, CPU), task.images


def ants_config(**changes):
    words = "--weights none --img_size 64 -b 4 --augment False --device cpu --amp off --lr 0.01 --name ants --epochs 1"
    options, given = cli.parse_options(transfer.build_parser, words.split())
    return {**transfer.new_config(options, given), **changes}


def ants(**changes):
    """-> the model, its loaders, optimizer and scheduler, as transfer_resnet18.prepare builds them."""
    config = ants_config(**changes)
    torch.manual_seed(1)
    model = ResNet18(2, config["freeze_bn"] or config["freeze"], config["mirror"])
    loaders = transfer.build_loaders(config, transfer.build_data(config)[0], model, CPU, None)
    return model, loaders, *transfer.build_optimizer(model, config)


def trained_ants(**changes):
    model, loaders, optimizer, scheduler = ants(**changes)
    part = model.fc if changes.get("freeze") else model
    _, rows = transfer.train_model(part, loaders, nn.CrossEntropyLoss(), optimizer, scheduler, 1)
    return dict(part.named_parameters()), rows[0]


def tiny_config(name):
    words = f"{TINY} --epochs 4 --name {name} --encoder efficientnet_lite0 --encoder_freeze 1"
    return train.new_config(train.build_parser().parse_args(words.split()))


def tiny_run(name, resume=False, stop_before=None):
    """train.py's own steps inside a group; stopped like Ctrl-C before an epoch, if wanted."""
    config, folder, real = tiny_config(name), Path("models") / name, engine.train_one_epoch

    def stopped(run, loader, label, check_stop):
        if label == f"epoch {stop_before}/4":
            raise KeyboardInterrupt
        return real(run, loader, label, check_stop)

    engine.train_one_epoch = stopped
    try:
        config = read_config(folder) if resume else config
        engine.fit_and_keep(*train.prepare(config, folder, [], CPU, resume), "train.py")
    except KeyboardInterrupt:
        pass
    finally:
        engine.train_one_epoch = real


def work():
    """What each of two processes does; results.pth is of the main one. At its end one process fails."""
    replaced, replace = [], Path.replace
    Path.replace = lambda path, target: replaced.append(target) or replace(path, target)
    with distributed.processes(CPU):
        print("told once")
        for count in range(7):
            parts = distributed.gather(loaders.share(list(range(count))))
            assert sum(parts, []) == list(range(count)) and max(map(len, parts)) - min(map(len, parts)) <= 1
        batches = list(nuclei(7, 3, shuffle=True, augment=True))
        seen = distributed.gather([(images, info["img_id"]) for images, _, info in batches])
        results = {
            "unet": {sizes: trained_unet(*sizes) for sizes in ((10, 4), (7, 3))},
            "judged": {sizes: judged_unet(*sizes) for sizes in ((7, 2), (3, 4))},
            "ants": {"all": trained_ants(freeze_bn=False), "frozen": trained_ants(freeze=True)},
            "seen": seen,
        }
        tiny_run("straight")
        tiny_run("stopped", stop_before=3)
        rows_then = len(Path("models/stopped/log.csv").read_text().splitlines()) - 1
        distributed.gather(None)
        tiny_run("stopped", resume=True)
        counts = distributed.gather(len(replaced))
        if distributed.is_main():
            torch.save({**results, "rows_then": rows_then, "files": counts}, "results.pth")
        distributed.gather(None)
        if not distributed.is_main():
            raise ValueError("the second process\nfails")
        distributed.gather("the first waits for the second")


if __name__ == "__main__":
    torch.set_num_threads(1)
    cli.run_script(work)


# ---------------------------------------------------------------- the tests


def torchrun(script, *arguments, cwd, count=2, env=None):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    paths = os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "tests")))
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1", **(env or {})}
    environment = {key: value for key, value in os.environ.items() if key != "DEBUG"} | settings
    return subprocess.Popen(
        [*command, str(script), *map(str, arguments)],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def write_pictures(root):
    rng = np.random.default_rng(0)
    for part, count in (("train", 5), ("val", 2)):
        for label, name in enumerate(("ants", "bees")):
            (root / part / name).mkdir(parents=True)
            for index in range(count + label):
                picture = rng.integers(0, 120, (70, 80, 3), np.uint8)
                picture[..., label] += 130
                Image.fromarray(picture).save(root / part / name / f"{index}.png")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    write_data_set(folder / "inputs" / "tiny", count=14)
    write_pictures(folder / "inputs" / "hymenoptera_data")
    return folder


@pytest.fixture(autouse=True)
def here(place, monkeypatch):
    monkeypatch.chdir(place)


@pytest.fixture(scope="module")
def two(place, one_thread):
    """-> what two processes came to, and how they ended."""
    process = torchrun(__file__, cwd=place)
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert (place / "results.pth").is_file(), out + err
    return {**torch.load(place / "results.pth", weights_only=False), "ended": (process.returncode, out, err)}


def close(found, expected, least_change=None):
    """All parameters agree to 1e-5, and training did change them."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=0, atol=1e-5), name
    assert least_change is None or any((value - least_change[name]).abs().max() > 1e-3 for name, value in found.items())


def halves(items):
    """The parts of two processes, the first the larger."""
    middle = (len(items) + 1) // 2
    return [part for part in (items[:middle], items[middle:]) if len(part)]


def accumulate(forward_loss, batches, optimizer):
    """One process: for each global batch, the gradients of its parts, weighted with their sizes, then a step."""
    for images, targets in batches:
        optimizer.zero_grad()
        for x, y in zip(halves(images), halves(targets), strict=True):
            (forward_loss(x, y) * len(x) / len(images)).backward()
        optimizer.step()


@pytest.mark.parametrize("sizes", [(10, 4), (7, 3)], ids=["equal halves", "unequal, and a last batch of one"])
def test_two_processes_train_as_one_that_accumulates(two, sizes):
    model, optimizer = small_unet()
    before = copy.deepcopy(dict(model.named_parameters()))
    model.train()
    batches = [(images, masks) for images, masks, _ in nuclei(*sizes, shuffle=True)]
    accumulate(lambda x, y: mean_over_heads(BCEDiceLoss(), as_heads(model(x)), y), batches, optimizer)
    found, returned = two["unet"][sizes]
    close(found, dict(model.named_parameters()), before)
    assert returned.keys() == {"loss", "iou"}


def test_two_processes_fine_tune_as_one_that_accumulates(two):
    model, loaders, optimizer, _ = ants(freeze_bn=False)
    before = copy.deepcopy(dict(model.named_parameters()))
    set_epoch(loaders["train"], 1)
    model.train()
    batches = list(loaders["train"])
    assert [len(labels) for _, labels in batches] == [4, 4, 3]
    accumulate(lambda x, y: nn.functional.cross_entropy(model(x), y), batches, optimizer)
    found, row = two["ants"]["all"]
    close(found, dict(model.named_parameters()), before)
    assert 0 <= row["acc"] <= 1 and (row["val_acc"] * 5) % 1 == pytest.approx(0)  # five pictures, each once


def test_a_frozen_body_gives_the_result_of_one_process(two):
    found, row = two["ants"]["frozen"]
    expected, expected_row = trained_ants(freeze=True)
    close(found, expected)
    skip = {"seconds"}
    assert {k: v for k, v in row.items() if k not in skip} == pytest.approx(
        {k: v for k, v in expected_row.items() if k not in skip}, abs=1e-6
    )


@pytest.mark.parametrize("sizes", [(7, 2), (3, 4)], ids=["an odd number", "fewer batches than processes"])
def test_metrics_are_those_of_one_process_exactly(two, sizes):
    (found, by_main), (expected, by_one) = two["judged"][sizes], judged_unet(*sizes)
    assert found == expected and 0 < found["iou"] < 1
    assert by_one == sizes[0] and by_main == {7: 4, 3: 3}[sizes[0]]  # whole batches: of four two, of one all


def test_batches_order_and_augmentation_do_not_depend_on_the_processes(two):
    first, second = two["seen"]
    for k, (images, _, info) in enumerate(nuclei(7, 3, shuffle=True, augment=True)):
        parts = [first[k], second[k]] if k < 2 else [first[k]]  # the second computes on a stand-in in the last
        assert sum((list(ids) for _, ids in parts), []) == list(info["img_id"])
        assert torch.equal(torch.cat([part for part, _ in parts]), images)
    assert len(first) == len(second) == 3 and second[2][1] == first[2][1]


def test_one_process_writes_and_speaks(two):
    of_main, of_other = two["files"]
    assert of_main > 20 and of_other == 0
    assert two["ended"][1].count("told once") == two["ended"][1].count("epoch 1/4") // 2 == 1
    names = ["config.yml", "curves.png", "last.pth", "log.csv", "model.pth", "split.yml"]
    assert sorted(path.name for path in Path("models/straight").iterdir()) == names
    config = yaml.safe_load(Path("models/straight/config.yml").read_text())
    alone = tiny_config("straight")
    assert {key: config[key] for key in alone} == alone and config["environment"]["processes"] == 2


def test_resuming_gives_the_same_run(two):
    assert two["rows_then"] == 2
    logs = [pd.read_csv(f"models/{name}/log.csv").drop(columns="seconds") for name in ("straight", "stopped")]
    assert len(logs[0]) == 4 and logs[0].equals(logs[1])
    states = [torch.load(f"models/{name}/last.pth", weights_only=True) for name in ("straight", "stopped")]
    for part in ("model", "ema"):
        assert all(torch.equal(value, states[1][part][key]) for key, value in states[0][part].items())


def test_the_saved_weights_are_those_that_were_judged(two):
    """val.py's way, in one process, gives the figure of the best epoch in log.csv."""
    predictor = Predictor("straight", "cpu", "off")
    config = predictor.config
    ids = yaml.safe_load(Path("models/straight/split.yml").read_text())["val"]
    loader = make_loader(build_dataset(config, ids), 4)
    log = pd.read_csv("models/straight/log.csv")
    assert val.summarise(val.judge(predictor, loader)["L4"])["iou"] == pytest.approx(log.val_iou.max(), rel=1e-12)
    found = engine.evaluate(predictor.trained, loader, Segmentation(LOSSES[config["loss"]]()), CPU)
    assert found["loss"] == pytest.approx(log.val_loss[log.val_iou.idxmax()], abs=1e-6)


def test_a_failing_process_ends_all_with_its_message(two):
    status, _, err = two["ended"]
    assert status not in (0, None)
    assert err.count("test_distributed.py: error: the second process fails\n") == 1
    assert err.count("Traceback") <= 1  # torchrun's own


# ---------------------------------------------------------------- without torchrun, and mistakes


def test_one_process_is_left_alone():
    with distributed.processes(CPU) as device:
        assert device is CPU and distributed.world_size() == 1 and distributed.is_main()
    model = nn.Linear(1, 1)
    assert distributed.parallel(model, CPU) is model and distributed.gather(3) == [3]
    assert loaders.share([1, 2]) == [1, 2]
    assert list(loaders.with_shares([("ab", 1)])) == [(("ab", 1), 2, 2)]


def test_the_order_of_one_process_stays_as_it_was():
    """Runs were measured with the order of torch's DistributedSampler and plain batches."""
    loader = nuclei(7, 3, shuffle=True)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(5 + 3)).tolist()
    ids = [list(info["img_id"]) for _, _, info in loader]
    assert ids == [[f"img{k:02d}" for k in order[start : start + 3]] for start in (0, 3, 6)]


@pytest.fixture
def second_of_two(monkeypatch):
    for key, value in {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(key, str(value))


@pytest.mark.parametrize("device", ["cuda:1", "mps"])
def test_a_device_that_cannot_be_shared(second_of_two, device):
    with (
        pytest.raises(ValueError, match=f"--device {device} cannot be shared by 2 processes"),
        distributed.processes(torch.device(device)),
    ):
        raise AssertionError


def test_more_processes_than_gpus(second_of_two, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with (
        pytest.raises(ValueError, match="2 processes on this machine, but GPUs: 1; give --nproc_per_node=1"),
        distributed.processes(torch.device("cuda")),
    ):
        raise AssertionError


def test_a_process_may_wait_long_for_another(second_of_two, monkeypatch):
    """PyTorch gives up after 10 minutes on GPUs, 30 on CPUs; a slide, or a download, may take longer."""
    asked = {}

    def never(backend, **options):
        asked.update(options)
        raise RuntimeError("no address")

    monkeypatch.setattr(torch.distributed, "init_process_group", never)
    with pytest.raises(ConnectionError, match="could not be connected: no address"), distributed.processes(CPU):
        raise AssertionError
    assert asked["timeout"].total_seconds() >= 24 * 3600


def test_sharing_needs_enough_images_and_a_shared_loader(monkeypatch):
    monkeypatch.setattr(loaders, "world_size", lambda: 3)
    with pytest.raises(ValueError, match="--batch_size 2 is shared by 3 processes; give at least 3"):
        loaders.SharedBatches(range(9), 2)
    with pytest.raises(ValueError, match=r"SharedBatches"):
        next(loaders.with_shares([("ab", 1)]))
    for own, expected in enumerate(([2, 1], [2, 1], [1, 1])):
        monkeypatch.setattr(loaders, "rank", lambda own=own: own)
        sizes = loaders.SharedBatches(range(8), 5).sizes()
        assert sizes == list(zip(expected, (5, 3), strict=True))
        assert [size for size, _ in loaders.SharedBatches(range(11), 5).sizes()] == [*(expected[:1] * 2), own == 0]
    dropping = loaders.SharedBatches(range(11), 5, drop_last=True)
    assert len(dropping) == len(dropping.sizes()) == len(list(dropping)) == 2


def test_synchronised_batch_norm_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", *TINY.split(), "--name", "no", "--sync_bn", "True"])
    with pytest.raises(ValueError, match="--sync_bn True needs GPUs: .* does not run on cpu"):
        train.main()
    with pytest.raises(ValueError, match="--sync_bn True needs batch norm that learns"):
        transfer.new_config(*cli.parse_options(transfer.build_parser, ["--sync_bn", "True", "--device", "cpu"]))
    model = distributed.sync_batch_norm(NestedUNet(width=2), torch.device("cuda"))
    assert any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
    assert model.state_dict().keys() == NestedUNet(width=2).state_dict().keys()
    assert not Path("models/no").exists()


def test_val_says_that_it_is_one_process(second_of_two, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["val.py", "--name", "straight"])
    with pytest.raises(ValueError, match="val.py evaluates in one process; start it without torchrun"):
        val.main()


# ---------------------------------------------------------------- the real commands, slowly


def ended(process):
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    return process.returncode, out, err


@pytest.mark.slow
def test_a_common_mistake_is_told_by_each_process(place):
    for words in ("--epochs no", "--name one -b 1", "--name one --dataset nope"):
        status, _, err = ended(torchrun(REPOSITORY / "train.py", *TINY.split(), *words.split(), cwd=place))
        assert status == 1 and err.count("train.py: error: ") in (1, 2), err  # torchrun may end the slower one first
    assert not (place / "models" / "one").exists()


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_torchrun_leaves_a_run_that_goes_on(place, how):
    name = f"signal{int(how)}"
    process = torchrun(REPOSITORY / "train.py", *TINY.split(), "--epochs", 300, "--name", name, cwd=place)
    log = place / "models" / name / "log.csv"
    for _ in range(12000):
        if (log.is_file() and len(log.read_text().splitlines()) > 2) or process.poll() is not None:
            break
        time.sleep(0.01)
    process.send_signal(how)
    status, out, err = ended(process)
    assert status != 0 and "python train.py --name" in out and err.count("train.py: stopped") == 1, out + err
    assert not list((place / "models" / name).glob(".*"))
    rows = len(pd.read_csv(log))
    process = torchrun(REPOSITORY / "train.py", "--name", name, "--resume", cwd=place)
    for _ in range(12000):
        if len(log.read_text().splitlines()) > rows + 2 or process.poll() is not None:
            break
        time.sleep(0.01)
    process.send_signal(how)
    assert f"resuming models/{name} after epoch {rows}" in ended(process)[1]


@pytest.mark.slow
def test_the_transfer_command(place):
    words = "--weights none --img_size 64 -b 4 --device cpu --epochs 2 --name transfer --open"
    browser, seen = browser_in(place)
    status, out, err = ended(torchrun(REPOSITORY / "transfer_resnet18.py", *words.split(), cwd=place, env=browser))
    assert status == 0 and out.count("epoch 2/2") == out.count("the run is in") == 1, out + err
    assert seen.read_text() == f"{(place / 'outputs/transfer/report.html').as_uri()}\n"  # once
