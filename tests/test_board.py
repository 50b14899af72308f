"""common/board.py: event files, read with TensorBoard's own reader, hold the log and a few pictures of each kept epoch.

python -m pytest -q tests/test_board.py
"""

import io
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import call, run_script, trained, write_data_set, write_label_set
from PIL import Image

import train
import transfer_resnet18
from common.board import arranged, as_picture, open_board
from common.files import load_checkpoint
from common.images import standardise
from engine import Run
from tasks import Classification, Instances, Segmentation, Truth

reader = pytest.importorskip(
    "tensorboard.backend.event_processing.event_accumulator", reason="needs requirements-tensorboard.txt"
)

TINY = "--dataset tiny --width 2 --input_w 32 --input_h 32 --epochs 3 -b 4 --device cpu --amp off --ema 0.9"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def place(tmp_path_factory, one_thread):
    """A folder with inputs/tiny, a run models/plain without a board, and models/shown with one."""
    folder = trained(tmp_path_factory.mktemp("board"), train, TINY, "--name plain")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        call(patch, train, TINY, "--name shown --tensorboard")
    return folder


@pytest.fixture(autouse=True)
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("TQDM_DISABLE", "1")


@pytest.fixture
def go(monkeypatch):
    return lambda *options: call(monkeypatch, train, *options)


def log(name):
    return pd.read_csv(f"models/{name}/log.csv")


def events(name):
    everything = {reader.SCALARS: 0, reader.IMAGES: 0}
    return reader.EventAccumulator(f"models/{name}/tensorboard", everything).Reload()


def scalars(name):
    """-> a table as log.csv has it: each column has the same steps, and none twice."""
    found = events(name)
    columns = {tag: {event.step: event.value for event in found.Scalars(tag)} for tag in found.Tags()["scalars"]}
    assert all(len(found.Scalars(tag)) == len(column) for tag, column in columns.items())
    return pd.DataFrame(columns).rename_axis("epoch").reset_index()


def pictures(name):
    """{tag: [(step, picture), ...]}"""
    found = events(name)
    return {
        tag: [
            (event.step, np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))) for event in found.Images(tag)
        ]
        for tag in found.Tags()["images"]
    }


def hide_tensorboard(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)


# ---------------------------------------------------------------- a training


def test_the_curves_are_those_of_the_log():
    assert scalars("shown").epoch.tolist() == [1, 2, 3]
    pd.testing.assert_frame_equal(scalars("shown"), log("shown"), rtol=1e-6)
    assert not Path("models/plain/tensorboard").exists()


def test_each_epoch_shows_image_truth_and_prediction_of_the_same_pictures(place):
    split = {path.stem: path for path in Path("inputs/tiny/masks/0").iterdir()}
    found = pictures("shown")
    assert len(found) == 2  # all that are in the validation
    for tag, shown in found.items():
        assert [step for step, _ in shown] == [1, 2, 3]
        truth = np.asarray(Image.open(split[tag.split(" ")[1]]))
        for _, picture in shown:
            assert picture.shape == (34, 3 * 34, 3)
            assert np.array_equal(picture[:32, 34:66], truth[..., None].repeat(3, 2))
            assert set(np.unique(picture[:32, 68:100])) <= {0, 255}


def test_the_training_is_the_same_bit_for_bit():
    assert log("shown").drop(columns="seconds").equals(log("plain").drop(columns="seconds"))
    one, other = (load_checkpoint(f"models/{name}/model.pth") for name in ("plain", "shown"))
    assert all(torch.equal(value, other[key]) for key, value in one.items())


def test_a_stopped_run_goes_on_with_the_same_curves(go, monkeypatch):
    """The third epoch is stopped between the board and last.pth: it comes again, and only once."""
    real = Run.finish_epoch

    def stopped(run, row):
        if row["epoch"] == 3:
            raise KeyboardInterrupt
        return real(run, row)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "finish_epoch", stopped)
        go(TINY, "--name stopped --tensorboard")
    assert len(log("stopped")) == 2 and scalars("stopped").epoch.tolist() == [1, 2, 3]
    go("--name stopped --resume")  # config.yml remembers the option
    pd.testing.assert_frame_equal(scalars("stopped"), log("stopped"), rtol=1e-6)
    assert all([step for step, _ in shown] == [1, 2, 3] for shown in pictures("stopped").values())


def test_a_board_that_begins_later_has_the_earlier_epochs(go, capsys):
    go(TINY, "--epochs 1 --scheduler ConstantLR --name later")
    go("--name later --resume --epochs 2 --tensorboard")
    assert "change the result by rounding at most: tensorboard True (run: False)" in capsys.readouterr().out
    pd.testing.assert_frame_equal(scalars("later"), log("later"), rtol=1e-6)
    assert all([step for step, _ in shown] == [2] for shown in pictures("later").values())
    go(TINY, "--epochs 1 --name later --overwrite")
    assert not Path("models/later/tensorboard").exists()


def test_individual_nuclei_show_three_maps(go):
    write_label_set("inputs/nuclei", count=5)
    go(TINY, "--dataset nuclei --target instances --split random --input_w 64 --epochs 1 --name nuclei --tensorboard")
    pd.testing.assert_frame_equal(scalars("nuclei"), log("nuclei"), rtol=1e-6)
    (shown,) = pictures("nuclei").values()
    assert [(step, picture.shape) for step, picture in shown] == [(1, (2 * 130, 4 * 130, 3))]  # 256 pixels, halved


def test_the_transfer_job_shows_the_whole_network_while_its_head_learns(monkeypatch):
    for part in ("train", "val"):
        for name in ("ants", "bees"):
            write_data_set(Path("pictures", part, name), count=3)
    options = "--data_dir pictures --weights none --img_size 32 -b 3 --epochs 1 --device cpu --amp off"
    call(monkeypatch, transfer_resnet18, options, "--freeze --name transfer --tensorboard")
    pd.testing.assert_frame_equal(scalars("transfer"), log("transfer"), rtol=1e-6)
    found = pictures("transfer")
    assert len(found) == 4 and {tag.split("/")[1] for tag in found} == {"1 ants", "2 ants", "3 bees", "4 bees"}
    for ((step, picture),) in found.values():
        assert step == 1 and len(picture) == 34 + 16 and (picture[34:] < 100).any()  # the caption


def test_only_the_main_process_has_a_board(monkeypatch):
    for key, value in {"LOCAL_RANK": "1", "RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(key, value)
    assert open_board({"tensorboard": True, "mean": [0], "std": [1]}, None, [], []) is None


# ---------------------------------------------------------------- without the package


def test_an_absent_package_is_one_line_before_any_work(tmp_path, monkeypatch):
    stub = tmp_path / "stub" / "tensorboard"
    stub.mkdir(parents=True)
    (stub / "__init__.py").write_text("raise ModuleNotFoundError('No module named tensorboard')")
    path = f"{stub.parent}:{Path(train.__file__).parent}"
    result = run_script("train.py", "--tensorboard", cwd=tmp_path, ok=False, env={"PYTHONPATH": path})
    said = "tensorboard is not installed: pip install -r requirements-tensorboard.txt"
    assert (
        result.stdout == "" and result.stderr.startswith(f"train.py: error: {said}") and result.stderr.count("\n") == 1
    )
    monkeypatch.chdir(tmp_path)
    hide_tensorboard(monkeypatch)
    with pytest.raises(OSError, match=said):
        call(monkeypatch, transfer_resnet18, "--demo --tensorboard")
    assert [path.name for path in tmp_path.iterdir()] == ["stub"]


def test_nothing_is_imported_without_the_option(go, monkeypatch):
    hide_tensorboard(monkeypatch)
    go("--name plain --resume")
    with pytest.raises(OSError, match="not installed: .*; or pass --tensorboard False"):
        go("--name shown --resume")
    go("--name shown --resume --tensorboard False")


def test_a_picture_comes_back_from_what_the_network_sees():
    image = torch.tensor([[[0, 51]], [[102, 153]], [[204, 255]]], dtype=torch.uint8)
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    assert as_picture(standardise(image, mean, std), mean, std).ravel().tolist() == pytest.approx(
        [0, 102, 204, 51, 153, 255], abs=1
    )
    grey = standardise(torch.tensor([[[0, 60, 120]]], dtype=torch.uint8), [0.5], [0.2])
    assert as_picture(grey, [0.5], [0.2])[0, :, 0].tolist() == pytest.approx([0, 128, 255], abs=2)  # brightened


def test_panels_stand_side_by_side():
    image, panel = np.full((2, 3, 3), 7, np.uint8), np.full((2, 3), 9, np.uint8)
    found = arranged(image, [[panel], [panel]])
    assert found.shape == (8, 10, 3)
    assert found[..., 1].tolist() == [
        *[[7] * 3 + [255] * 2 + [9] * 3 + [255] * 2] * 2,
        *[[255] * 10] * 2,
        *[[255] * 5 + [9] * 3 + [255] * 2] * 2,
        *[[255] * 10] * 2,
    ]
    assert arranged(np.zeros((64, 512, 3), np.uint8), [[]]).shape == (18, 130, 3)
    assert arranged(image, [[]], "x" * 40).shape[1] > 100  # as wide as its caption


def test_what_each_task_draws_of_the_first_image():
    logits = torch.tensor([[[[-1.0, 1.0]]], [[[9.0, 9.0]]]])
    rows, caption = Segmentation(None).drawn([-logits, logits], torch.tensor([[[[1.0, 0.0]]], [[[0.0, 0.0]]]]))
    assert [panel[..., 0].tolist() for panel in rows[0]] == [[[255, 0]], [[0, 255]]] and caption == ""

    maps = torch.tensor([0.0, 0.5, 1.0]).view(1, 3, 1, 1)
    rows, _ = Instances(None).drawn(torch.tensor([-99.0, 0.0, 99.0]).view(1, 3, 1, 1), Truth(maps, None))
    assert [[panel.item() for panel in row] for row in rows] == [[0, 128, 255]] * 2

    classes = Classification(None, ["ants", "bees"])
    drawn = classes.drawn(torch.tensor([[0.0, np.log(3)]]), torch.tensor([0]))
    assert drawn == ([[]], "predicted bees (0.75), true class ants")
