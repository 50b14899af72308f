"""tools/benchmark.py: real workers on little data, the steps that they time, and the table by hand."""

import contextlib
import importlib.util
import json
import re
import time

import numpy as np
import pytest
import torch
from conftest import call, run_script, write_data_set

import archs
from common.images import write_png
from tools import benchmark, steps, workers


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a data set, raw images and pictures of two classes, the smallest that the rows can be timed on."""
    rng = np.random.default_rng(0)
    write_data_set(tmp_path / "inputs" / "tiny", count=10)
    for k in range(2):
        for part in ("images", "masks"):
            (tmp_path / "raw" / f"id{k}" / part).mkdir(parents=True)
            write_png(tmp_path / "raw" / f"id{k}" / part / "a.png", np.full((20, 20), 255, np.uint8))
    for part, count in (("train", 2), ("val", 1)):
        for label in ("ants", "bees"):
            folder = tmp_path / "pictures" / part / label
            folder.mkdir(parents=True)
            for k in range(count):
                write_png(folder / f"{k}.png", rng.integers(0, 256, (64, 64, 3), np.uint8))
    monkeypatch.chdir(tmp_path)
    return tmp_path


PLACES = ("--dataset", "tiny", "--raw", "raw", "--data_dir", "pictures", "--rounds", 1, "--threads", 1)


class Here:
    """A workers.Worker in this process."""

    def __init__(self, options, task):
        task = {"device": "cpu", "threads": 1, "clock": options.clock, "dataset": options.dataset, **task}
        self.step, self.about = steps.WORKERS[task["kind"]](task)

    def __call__(self):
        started = time.perf_counter()
        self.result = self.step()
        return time.perf_counter() - started

    def close(self):
        return 2**20


@pytest.mark.slow
def test_every_row(place, monkeypatch, capsys, one_thread):
    """All steps in this process, on small batches, and their table."""
    monkeypatch.setattr(archs, "upsample", archs.upsample)  # the plain way replaces it
    monkeypatch.setattr("common.devices.keep_memory", lambda: None)
    monkeypatch.setattr("export.PACKAGES", ("not_installed",))
    for module in (steps, benchmark):
        monkeypatch.setattr(module, "BATCH", 2)
        monkeypatch.setattr(module, "SIDE", 32)

    def workers_here(options, tasks):
        return contextlib.nullcontext({name: Here(options, task) for name, task in tasks.items()})

    monkeypatch.setattr(benchmark, "workers", workers_here)
    if not importlib.util.find_spec("segmentation_models_pytorch"):  # ours takes its place
        monkeypatch.setattr(benchmark, "PEERS", ("timm",))
        monkeypatch.setattr(steps, "peer_network", lambda: archs.NestedUNet(width=2, encoder="efficientnet_lite0"))
    call(monkeypatch, benchmark, *PLACES, "--json rows.json")
    printed = capsys.readouterr().out
    rows = {row["what"]: row for row in json.loads((place / "rows.json").read_text())["rows"]}
    assert all(f"| {name} |" in printed for name in rows)
    plain = {
        "training step": "training step, plain",
        "training step, efficientnet_lite0": "training step, efficientnet_lite0, segmentation_models_pytorch",
        "validation step": "training step, plain",
        "inference L1": "inference L4, plain",
        "an epoch's batches": "an epoch's batches, plain",
        "preprocessing": "preprocessing, one thread",
        "transfer, an epoch, head learns (--freeze)": "transfer, an epoch, plain tutorial loop",
    }
    for name, other in plain.items():
        assert rows[name]["of_plain"] == pytest.approx(rows[name]["seconds"] / rows[other]["seconds"])
    assert rows["an epoch's batches"]["images"] == 8 and rows["preprocessing"]["images"] == 2
    assert rows["matrix product 2048 x 2048, float32"]["gflop_per_second"] > 0
    assert rows["training step"]["of_limit"] > 0 and rows["training step"]["gflop"] > rows["inference L4"]["gflop"]


@pytest.mark.slow
def test_the_transfer_rows(place):
    result = run_script("tools.benchmark", "--only", "transfer", *PLACES, cwd=place)
    rows = re.findall(r"^\| transfer, an epoch, (.*?) \| [\d.]+ m?s \| ([\d.]+) \|", result.stdout, re.MULTILINE)
    assert [name for name, _ in rows][0] == "plain tutorial loop" and len(rows) == 4 and float(rows[0][1]) == 1


@pytest.mark.parametrize("name", ["transfer", "loading", "preprocess"])
def test_rows_without_their_data(tmp_path, name):
    places = ("--data_dir", "gone", "--dataset", "gone", "--raw", "gone")
    said = run_script("tools.benchmark", "--only", name, *places, cwd=tmp_path, ok=False).stderr
    assert f"gone: no such file or folder; the {name} rows time what is in it" in said


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "fast"])
@pytest.mark.parametrize(("kind", "learns"), [("train", True), ("evaluate", False)])
def test_a_training_step_learns_and_a_validation_step_does_not(monkeypatch, one_thread, kind, learns, plain):
    monkeypatch.setattr(archs, "upsample", archs.upsample)  # the plain way replaces it
    monkeypatch.setattr(steps, "BATCH", 2)
    monkeypatch.setattr(steps, "SIDE", 32)
    built, build = [], steps.build_run
    monkeypatch.setattr(steps, "build_run", lambda task: built.append(build(task)) or built[0])
    step, about = steps.WORKERS[kind]({"plain": plain, "device": "cpu", "dataset": "any"})
    [(run, config)] = built
    before = [parameter.clone() for parameter in run.model.parameters()]
    assert step() is None
    changed = [not torch.equal(*pair) for pair in zip(before, run.model.parameters(), strict=True)]
    assert all(changed) if learns else not any(changed)
    assert run.scheduler.last_epoch == (2 if learns else 0)  # the first step counted the GFLOP
    assert about["precision"] == config["amp"]
    uncounted = not learns and torch.__version__.startswith("2.5.")  # it counts nothing in inference mode
    assert about["gflop"] > 0 or uncounted
    assert (archs.upsample is archs.interpolate) == plain
    if plain:
        assert run.amp is None and not config["channels_last"]


@pytest.mark.slow
def test_loading_and_preprocessing(place):
    """Real workers; the transfer rows are left out with a note, since their data are missing."""
    options = ("--only", "loading", "preprocess", "transfer", *PLACES, "--data_dir", "gone", "--json", "rows.json")
    result = run_script("tools.benchmark", *options, cwd=place)
    assert "no transfer rows: gone does not exist" in result.stderr
    assert "medians of 1 rounds" in result.stdout
    written = json.loads((place / "rows.json").read_text())
    rows = {row["what"]: row for row in written["rows"]}
    plain = {"an epoch's batches": "an epoch's batches, plain", "preprocessing": "preprocessing, one thread"}
    assert set(rows) == {*plain, *plain.values()}
    assert rows["an epoch's batches"]["images"] == 8 and rows["preprocessing"]["images"] == 2
    for name, row in rows.items():
        assert row["seconds"] > 0 and row["bytes"] > 10e6 and f"| {name} |" in result.stdout
        assert row["of_plain"] == pytest.approx(row["seconds"] / rows[plain.get(name, name)]["seconds"])
    assert {"torch", "numpy"} <= written["versions"].keys() and written["threads"] == 1
    assert sorted(path.name for path in place.iterdir()) == ["inputs", "pictures", "raw", "rows.json"]


@pytest.mark.slow
def test_the_network_rows(tmp_path):
    options = ("--only", "limit", "training", "inference", "--rounds", 1, "--threads", 1, "--json", "rows.json")
    run_script("tools.benchmark", *options, cwd=tmp_path, timeout=900)
    rows = {row["what"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    arithmetic = {4: 9.70, 3: 5.71, 2: 2.90, 1: 1.12}
    for level, gflop in arithmetic.items():
        assert rows[f"inference L{level}"]["gflop"] / benchmark.BATCH == pytest.approx(gflop, abs=0.01)
    assert rows["training step"]["gflop"] > 2.9 * rows["inference L4"]["gflop"]  # a backward pass is about two forwards
    assert all(row["of_limit"] > 0 for row in rows.values() if "of_limit" in row)


def test_medians_in_turns_without_the_warm_up():
    times = {"a": iter([90.0, 1.0, 5.0, 2.0]), "b": iter([80.0, 4.0, 3.0, 9.0])}
    order = []

    def step(name):
        order.append(name)
        return next(times[name])

    calls = {name: lambda name=name: step(name) for name in times}
    assert workers.in_turns(calls, 3) == {"a": 2.0, "b": 4.0}
    assert order == ["a", "b"] * 4


def test_fractions_and_the_table_by_hand():
    rows = [
        benchmark.row("plain", 2.0, 2.0, gflop=100, precision="off", bytes=2**30),
        benchmark.row("fast", 0.5, 2.0, gflop=100, precision="bf16", bytes=2**29, memory_of_plain=0.5),
        {"what": "product", "gflop_per_second": 400.4},
        benchmark.row("epoch", 12.0, share_of_epoch=0.0561),
    ]
    benchmark.add_fractions(rows, {"off": 100, "bf16": 400})
    assert (rows[0]["of_limit"], rows[1]["of_limit"]) == (0.5, 0.5)
    assert benchmark.markdown(rows).split("\n") == [
        "| | time | of plain | peak memory | of plain | notes |",
        "|---|---|---|---|---|---|",
        "| plain | 2000 ms | 1.000 | 1,024 MB | | 100.0 GFLOP, 50% of the limit in float32 |",
        "| fast | 500 ms | 0.250 | 512 MB | 0.50 | 100.0 GFLOP, 50% of the limit in bfloat16 |",
        "| product | | | | | 400 GFLOP/s |",
        "| epoch | 12.0 s | | | | 5.6% of a training epoch |",
    ]


def test_a_worker_that_fails_ends_in_one_line(tmp_path):
    (tmp_path / "inputs" / "empty").mkdir(parents=True)
    said = run_script("tools.benchmark", "--only", "loading", "--dataset", "empty", cwd=tmp_path, ok=False).stderr
    assert "images: no such folder" in said
    assert "a worker process ended with status 2; its message is printed above" in said


def test_no_folder_for_the_json(tmp_path):
    said = run_script("tools.benchmark", "--only", "limit", "--json", "gone/rows.json", cwd=tmp_path, ok=False).stderr
    assert "gone: no such folder to write rows.json in" in said
