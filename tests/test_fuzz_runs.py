"""Hostile and broken YAML, checkpoints, runs and ONNX files end in one line or a right answer; see test_fuzz.py.

python -m pytest -q -s tests/test_fuzz_runs.py
python -m pytest -q -s -m slow tests/test_fuzz_runs.py
"""

import copy
import itertools
import math
import pickle
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from conftest import REPOSITORY, call, write_data_set
from fuzzing import Trap, broken, fuzz, judge

import dataset
import engine
import export
import preprocess_dsb2018
import train
import training_data
import transfer_resnet18
import val
from archs import build_model
from classification import resnet18
from classification.predict import load_run
from common.cli import parse_options
from common.files import load_checkpoint, load_weights, read_yaml, write_yaml
from common.images import standardise
from common.runs import run_folder
from data_folder import check_places
from inference import load_trained, start_from

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = "--dataset tiny --width 1 --input_w 32 --input_h 32 --epochs 1 --device cpu --amp off --name run"
WRONG = (
    *(None, True, "", "text", "../../x", "/etc", "a\0b", "a\nb", "\u202e", "nan", "1e999", "😀" * 300),
    *(-1, 0, 7, 2**31, 10**30, 0.5, -1e300, math.nan, math.inf, [], ["a"], [0.5], [[[]]], {}, {"a": {"b": 1}}),
)
LAUGHS = "a0: &a0 [lol, lol]\n" + "".join(f"a{k}: &a{k} [*a{k - 1}, *a{k - 1}]\n" for k in range(1, 60))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, one_thread):
    """A folder with inputs/tiny and models/run of train.py, whose config.yml says that an epoch is still to come."""
    folder = tmp_path_factory.mktemp("trained")
    write_data_set(folder / "inputs" / "tiny", count=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(engine, "plot_curves", lambda *args, **kwargs: None)
        call(patch, train, TINY, "--deep_supervision True")
    path = folder / "models" / "run" / "config.yml"
    path.write_text(path.read_text().replace("epochs: 1", "epochs: 2"))
    return folder


@pytest.fixture
def run(trained, sandbox, monkeypatch):
    """A fresh copy of it in the sandbox -> models/run."""
    shutil.copytree(trained, ".", dirs_exist_ok=True)
    monkeypatch.setattr(engine, "plot_curves", lambda *args, **kwargs: None)
    return Path("models/run")


def spoilt(content, number, seed):
    """number cases: copies of nested dicts and lists in which one thing, wherever it stands, is wrong or missing."""
    rng, places = random.Random(seed), list(_places(content))
    for _ in range(number):
        place, changed = rng.choice(places), copy.deepcopy(content)
        inside = changed
        for key in place[:-1]:
            inside = inside[key]
        choice = rng.choice([*wrong_for(inside[place[-1]]), KeyError])
        if choice is KeyError:
            del inside[place[-1]]
        else:
            inside[place[-1]] = choice
        yield f"{'.'.join(map(str, place))}: {choice!r:.60}", changed


def wrong_for(value):
    """What a stranger may put in the place of a value."""
    if not torch.is_tensor(value):
        return WRONG
    tensors = value[None], torch.zeros(0), torch.full_like(value.float(), math.nan), value.to(torch.float16)
    return *WRONG, *tensors


def _places(value, place=()):
    if place:
        yield place
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inside in items:
        yield from _places(inside, (*place, key))


def text_of(mapping):
    return yaml.dump(mapping, allow_unicode=True)


# ---------------------------------------------------------------- YAML

HOSTILE_YAML = {
    "laughs": LAUGHS,
    "laughs in a merge": "a: &a {x: 1}\nb: {<<: *a}\n",
    "holds itself": "&a a: *a",
    "deep list": "a: " + "[" * 50_000,
    "deep dict": "{a: " * 5000,
    "deep lines": "".join(" " * k + "a:\n" for k in range(1500)),
    "code": "a: !!python/object/apply:os.system ['mkdir pwned']",
    "module": "a: !!python/module:os",
    "int": 'a: !!int ""',
    "time": "a: !!timestamp x",
    "bool": "a: !!bool x",
    "float": "a: !!float x",
    "binary": "a: !!binary 'äöü'",
    "month": "a: 2020-13-45",
    "digits": "a: " + "9" * 100_000,
    "sexagesimal": "a: 1" + ":59" * 3000,
    "list as a key": "? [a, b]\n: c",
    "no such character": 'a: "\\Uffffffff"',
    "another document": "a: 1\n---\nb: 2\n",
    "two bytes": "a: 1".encode("utf-16"),
    "control": b"a: \x01\x02",
    "large": b"a: 1\n" * 2**22,
}


def test_yaml(count, run, sandbox, capfd):
    bases = {path.name: path.read_bytes() for path in (run / "config.yml", run / "split.yml")}
    bases["demo.yml"] = (REPOSITORY / "configs" / "demo.yml").read_bytes()
    hostile = {name: text if isinstance(text, bytes) else text.encode() for name, text in HOSTILE_YAML.items()}

    def read(data):
        Path("free/a.yml").write_bytes(data)
        assert isinstance(read_yaml("free/a.yml"), dict)

    fuzz("files.read_yaml", [*bases.items(), *hostile.items(), *broken(bases, 2 * count, 11)], read, sandbox, capfd)
    assert all(judge(read, data) == "accepted" for data in bases.values())
    for name, data in hostile.items():
        assert judge(read, data) == ("accepted" if name == "sexagesimal" else "refused"), name


def test_written_yaml_has_no_aliases(sandbox):
    shared = [0.5]
    write_yaml("free/a.yml", {"mean": shared, "std": shared})
    assert read_yaml("free/a.yml") == {"mean": [0.5], "std": [0.5]}


def test_splits(count, run, sandbox, capfd):
    whole = read_yaml(run / "split.yml")
    whole["test"] = ["another"]
    climbing = [{**whole, "val": [name]} for name in ("../tiny/images/img00", "/etc/passwd", "..", "", "a\0b", "a/b")]

    def read(mapping):
        Path("free/a.yml").write_text(text_of(mapping))
        split = dataset.check_split(read_yaml("free/a.yml"), "free/a.yml")
        assert all(Path(img_id).name == img_id for ids in split.values() for img_id in ids)

    cases = [*((f"climbing {k}", mapping) for k, mapping in enumerate(climbing)), *spoilt(whole, count, 12)]
    fuzz("dataset.check_split", cases, read, sandbox, capfd)
    assert judge(read, whole) == "accepted" and all(judge(read, mapping) == "refused" for mapping in climbing)


def test_recipes(count, sandbox, capfd):
    """Every option of train.py in a file of a stranger, with values of every kind."""
    defaults = vars(train.build_parser().parse_args([])).items()
    whole = {key: value for key, value in defaults if key not in train.ABOUT_THE_COMMAND}

    def read(mapping):
        Path("free/a.yml").write_text(text_of(mapping))
        options, given = parse_options(train.build_parser, ["--config", "free/a.yml"], train.read_recipe)
        config = train.new_config(options)
        run_folder(config["name"])
        with torch.device("meta"):
            build_model(config)
        check_places(config)

    fuzz("train.py --config", spoilt(whole, 2 * count, 13), read, sandbox, capfd)
    assert judge(read, whole) == "accepted"


def test_configs_of_runs(count, run, sandbox, capfd):
    """What val.py, predict.py and export.py read of a stranger's run."""
    whole = read_yaml(run / "config.yml")

    def read(mapping):
        (run / "config.yml").write_text(text_of(mapping))
        model, config = load_trained("run", torch.device("cpu"))
        images = torch.zeros(1, config["input_channels"], 32, 32, dtype=torch.uint8)
        with torch.inference_mode():
            heads = model(standardise(images, config["mean"], config["std"]))
        assert all(torch.isfinite(head).all() for head in heads)
        list(dataset.build_dataset(config, ["img00"])[0])
        export.images_of({**config, "name": "run"}, "val", 2)

    fuzz("load_trained, config.yml", spoilt(whole, 2 * count, 14), read, sandbox, capfd)
    assert judge(read, whole) == "accepted"
    for key, value in (("dataset", "../../x"), ("img_ext", "/../a"), ("arch", "os.system"), ("width", 10**6)):
        assert judge(read, {**whole, key: value}) == "refused", key


def test_dataset_yml(count, run, sandbox, capfd):
    config, split = read_yaml(run / "config.yml"), read_yaml(run / "split.yml")
    about = {"source": "x", "img_size": 32, "images": 5, "scale": 0.4, "skipped": {"a": "b"}}

    def read(mapping):
        Path("inputs/tiny/dataset.yml").write_text(text_of(mapping))
        training_data.build_data(dict(config), split)

    fuzz("dataset.yml", spoilt(about, count, 15), read, sandbox, capfd)
    assert judge(read, about) == "accepted" and judge(read, {**about, "scale": "a"}) == "refused"


# ---------------------------------------------------------------- checkpoints


def hostile_checkpoints(state):
    """{name: bytes} of files made to harm."""
    torch.save({**state, "x": Trap()}, "free/trap.pth")
    trap = Path("free/trap.pth").read_bytes()
    return {"trap": trap, "pickle": pickle.dumps(Trap()), "old": pickle.dumps(Trap(), 2), "empty": b"", "zip": b"PK"}


def test_checkpoints(count, run, sandbox, capfd):
    state = load_checkpoint(run / "model.pth")
    bases = {path.name: path.read_bytes() for path in (run / "model.pth", run / "last.pth")}
    torch.save(state, "free/old.pth", _use_new_zipfile_serialization=False)
    bases["old.pth"] = Path("free/old.pth").read_bytes()
    hostile = hostile_checkpoints(state)

    def read(data):
        Path("free/a.pth").write_bytes(data)
        load_checkpoint("free/a.pth")

    cases = [*bases.items(), *hostile.items(), *broken(bases, 3 * count, 16, list(bases.values()))]
    fuzz("files.load_checkpoint", cases, read, sandbox, capfd)
    assert all(judge(read, data) == "accepted" for data in bases.values())
    assert all(judge(read, data) == "refused" for data in hostile.values())


def test_weights_of_runs(count, run, sandbox, capfd):
    """model.pth as val.py loads it, and as train.py --weights does."""
    state, config = load_checkpoint(run / "model.pth"), read_yaml(run / "config.yml")
    whole = copy.deepcopy(state)

    def evaluate(found):
        torch.save(found, run / "model.pth")
        model, _ = load_trained("run", torch.device("cpu"))
        with torch.inference_mode():
            assert all(torch.isfinite(head).all() for head in model(torch.zeros(1, 3, 32, 32)))

    def start(found):
        torch.save(found, "free/a.pth")
        start_from(build_model(config), {**config, "weights": "free/a.pth"})

    fuzz("val.py, model.pth", spoilt(state, count, 17), evaluate, sandbox, capfd)
    fuzz("train.py --weights", spoilt({"state_dict": state}, count, 18), start, sandbox, capfd)
    assert judge(evaluate, whole) == judge(start, whole) == "accepted"
    (run / "model.pth").unlink()


def test_a_damaged_last_pth_is_named(run, monkeypatch):
    """Unreadable, or of another network; what else is wrong in one of our own files may end in any error."""
    whole, state = (run / "last.pth").read_bytes(), load_checkpoint(run / "last.pth")
    before = {path.name: path.read_bytes() for path in run.iterdir()}

    def resume():
        call(monkeypatch, train, "--name run --resume --device cpu")

    def refused(match):
        assert judge(resume) == "refused" and re.search(match, judge.line), judge.line
        assert {path.name for path in run.iterdir()} == before.keys()
        assert all(path.read_bytes() == before[path.name] for path in run.iterdir() if path.name != "last.pth")

    for data in (b"", b"noise", whole[:1000], whole[:-1000], *hostile_checkpoints(state).values()):
        (run / "last.pth").write_bytes(data)
        refused("models/run/last.pth is not a checkpoint of tensors and plain values")
    wider = {key: torch.cat([value, value]) for key, value in state["model"].items() if value.dim()}
    for content in ({**state, "model": wider}, {"model": state["model"]}, {}, [], 7):
        torch.save(content, run / "last.pth")
        refused("models/run/last.pth does not hold the training that config.yml describes")
    (run / "last.pth").write_bytes(whole)
    assert judge(resume) == "accepted"


# ---------------------------------------------------------------- the transfer job


@pytest.fixture
def transferred(sandbox):
    """The config and weights of a run of transfer_resnet18.py on two classes -> models/run in the sandbox."""
    folder = Path("models/run")
    folder.mkdir(parents=True)
    torch.save(resnet18.ResNet18(2).state_dict(), folder / "model.pth")
    write_yaml(folder / "config.yml", {"classes": ["ants", "bees"], "mirror": True, "img_size": 32, "name": "run"})
    return folder


def test_runs_of_the_transfer_job(count, transferred, sandbox, capfd):
    """What --predict reads of a stranger's run before it looks at a picture."""
    whole = read_yaml(transferred / "config.yml")
    hostile = hostile_checkpoints({})

    def read_config(mapping):
        (transferred / "config.yml").write_text(text_of(mapping))
        model, config = load_run("run", torch.device("cpu"))
        assert model.fc.out_features == len(config["classes"]) == 2

    fuzz("transfer --predict, config.yml", spoilt(whole, count // 2, 22), read_config, sandbox, capfd)
    assert judge(read_config, whole) == "accepted"
    for data in (*hostile.values(), (transferred / "model.pth").read_bytes()[:-1000]):
        (transferred / "model.pth").write_bytes(data)
        assert judge(load_run, "run", torch.device("cpu")) == "refused"


def test_weights_of_the_transfer_job(count, sandbox, capfd):
    """--weights PATH: a ResNet-18 of a stranger."""
    model = resnet18.ResNet18(2)

    def start(found):
        torch.save(found, "free/a.pth")
        resnet18.fill_body(model, load_weights("free/a.pth"), "free/a.pth")

    fuzz("transfer --weights", spoilt(model.state_dict(), count // 3, 24), start, sandbox, capfd)
    assert judge(start, {"state_dict": model.state_dict()}) == "accepted"


# ---------------------------------------------------------------- ONNX

WORKER = """
import sys, pathlib
import predict
from fuzzing import judge

for path in sorted(pathlib.Path("free").glob("*.onnx")):
    print("begin", path, flush=True)
    sys.argv = ["predict.py", "--onnx", str(path), "--device", "cpu", "free/picture.png"]
    print("end", judge(predict.main), flush=True)
"""


def test_onnx_files(count, trained, sandbox, capfd):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(trained)
        model, config = load_trained("run", torch.device("cpu"), level="1")
    config["name"] = "run"
    about = {key: config[key] for key in export.IN_CONFIG if key in config}
    deployed = export.Deployed(model, config["mean"], config["std"])
    export.write_onnx(deployed, Path("free/whole"), 3, about)
    whole = Path("free/whole").read_bytes()
    cv2.imwrite("free/picture.png", np.zeros((40, 40, 3), np.uint8))
    cases = [("whole", whole), *broken({"onnx": whole}, count // 2, 26)]
    pairs = [*itertools.product(("name", "input_h", "scale"), ("..", "../../x", "", "nan", "1e99", "-1", "0"))]
    for key, value in pairs[:: 1 if count > 100 else 3]:
        changed = onnx.load_from_string(whole)
        onnx.helper.set_model_props(
            changed, {**about, "level": "1", key: value} | {k: str(v) for k, v in about.items() if k != key}
        )
        cases.append((f"{key} {value}", changed.SerializeToString()))
    for number, (_, data) in enumerate(cases):
        Path(f"free/{number:04d}.onnx").write_bytes(data)
    before = {path for path in sandbox.rglob("*") if "outputs" not in path.parts}
    environment = {
        "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}",
        "PATH": "/usr/bin:/bin",
        "OMP_NUM_THREADS": "1",
    }
    result = subprocess.run(
        [sys.executable, "-B", "-c", WORKER], env=environment, capture_output=True, text=True, timeout=900
    )
    verdicts = [line.split()[1] for line in result.stdout.splitlines() if line.startswith("end ")]
    last = cases[min(len(verdicts), len(cases) - 1)][0]
    assert result.returncode == 0 and len(verdicts) == len(cases), (
        f"at {last}: {result.returncode} {result.stderr[-2000:]}"
    )
    assert verdicts[0] == "accepted" and {path for path in sandbox.rglob("*") if "outputs" not in path.parts} == before
    assert {path.name for path in Path("outputs").rglob("predict")} == {"predict"} and not Path("predict").exists()
    with capfd.disabled():
        refused = verdicts.count("refused")
        print(f"\npredict --onnx: {len(cases)} mutations, {refused} refused, {len(cases) - refused} accepted", end="")


# ---------------------------------------------------------------- the scripts themselves


def write(path, content):
    return lambda: Path(path).write_bytes(content.encode() if isinstance(content, str) else content)


@pytest.mark.parametrize(
    ("script", "options", "spoil"),
    [
        (val, "--name run --device cpu", write("models/run/split.yml", "train: [a]\nval: [../../../x]")),
        (val, "--name run --device cpu", lambda: torch.save({"x": Trap()}, "models/run/model.pth")),
        (preprocess_dsb2018, "--raw a.zip", write("a.zip", b"PK\x05\x06" + bytes(18))),
        (train, "--config a.yml", write("a.yml", LAUGHS)),
        (train, "--config a.yml", write("a.yml", 'device: "a\\nb \\e[31m"')),
        (train, "--dataset tiny --split a.yml", write("a.yml", "train: [../x]\nval: [y]")),
        (train, "--dataset ../inputs/tiny", None),
        (train, "--dataset tiny --width 257", None),
        (transfer_resnet18, "--name run --predict x.png", None),
    ],
)
def test_scripts_end_in_one_line(run, monkeypatch, script, options, spoil):
    if spoil:
        spoil()
    assert judge(call, monkeypatch, script, options) == "refused" and judge.line.strip().isprintable()
    assert not Path("pwned").exists()
