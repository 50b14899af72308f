"""sessions.py: what a visitor of the page gets, what is refused, and that two visitors do not mix.

python -m pytest -q tests/test_sessions.py
"""

import csv
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
import torch
import yaml
from conftest import REPOSITORY, BrightNuclei, call, discs

import predict
import sessions as visits
from classification.resnet18 import ResNet18
from nuclei import find, object_files
from run_config import levels_of
from sessions import COLUMNS, Question, Sessions, Stopped, as_shown, refusal, report_of


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with the weights of a run, which BrightNuclei answers for, and the picture discs.png."""
    monkeypatch.chdir(tmp_path)
    Path("models/bright").mkdir(parents=True)
    Path("models/bright/model.pth").write_bytes(b"")
    Path("temporary").mkdir()
    monkeypatch.setattr(Sessions, "load", lambda self, run, level, written: named(f"L{level or 4}"))
    cv2.imwrite("discs.png", discs(9)[0])
    return tmp_path


def named(head):
    predictor = BrightNuclei()
    predictor.head = head
    return predictor


@pytest.fixture
def sessions(place):
    return Sessions(place / "temporary", device="cpu", amp="off")


def test_an_answer_is_what_predict_writes(sessions):
    labels = discs(9)[1]
    answer = sessions.of("a").find("discs.png", Question("bright"))
    count = labels.max()
    about = rf"discs, 200 x 160: {count} nuclei, median diameter 1[78]\.\d pixels; L4, scale 0\.6\d+, \d+\.\d\d s"
    assert re.fullmatch(about, answer.about)
    names = ["discs_overlay.png", "discs_labels.tif", "objects.csv", "discs_rois.zip", "discs.geojson"]
    files = [Path(path) for path in answer.files]
    assert [path.name for path in files] == names and all(path.is_file() for path in files)
    found = tifffile.imread(files[1])
    assert found.max() == count and np.mean((found > 0) == (labels > 0)) > 0.98
    with open(files[2], newline="") as file:
        table = list(csv.DictReader(file))
    shown = [dict(zip(COLUMNS, row, strict=True)) for row in answer.rows]
    assert [int(row["area"]) for row in table] == [row["area"] for row in shown]
    assert cv2.imread(answer.overlay).shape[:2] == (512, 640)  # enlarged; the file is not
    assert cv2.imread(str(files[0])).shape[:2] == (160, 200)
    (axis,) = answer.figure.axes
    assert sum(bar.get_height() for bar in axis.patches) == count


def test_pages_and_pictures_without_nuclei(sessions):
    tifffile.imwrite("stack.tif", np.zeros((3, 40, 50), np.uint8), photometric="minisblack")
    answer = sessions.of("a").find("stack.tif", Question("bright"))
    assert answer.about.startswith("stack_p000 (page 0 of 3), 50 x 40: 0 nuclei; ") and answer.rows == []
    assert sessions.of("a").find("stack.tif", Question("bright", page=2)).about.startswith("stack_p002, ")


def test_a_picture_too_large_for_imagej_has_no_rois(sessions, monkeypatch):
    monkeypatch.setattr(object_files, "IMAGEJ_SIDE", 199)
    files = sessions.of("a").find("discs.png", Question("bright")).files
    assert [Path(path).suffix for path in files] == [".png", ".tif", ".csv", ".geojson"]


def test_levels_are_compared_until_something_else_changes(sessions):
    session = sessions.of("a")
    for level in ("4", "1", "4"):
        answer = session.find("discs.png", Question("bright", level=level))
    assert [row[0] for row in answer.tried] == ["L1", "L4"]
    assert all(row[1] == discs(9)[1].max() and row[3] >= 0 for row in answer.tried)
    answer = session.find("discs.png", Question("bright", level="4", diameter=20))
    assert [row[0] for row in answer.tried] == ["L4"]


def test_an_option_reaches_the_network(sessions, monkeypatch):
    kept, seen = named("L4"), []
    monkeypatch.setattr(sessions, "load", lambda run, level, written: kept)

    def look(predictor, picture, diameter, each):
        seen.append((predictor.tta, predictor.config["mask_threshold"], predictor.config["smallest"]))
        return found_nuclei(predictor, picture, diameter, each=lambda: seen.append("batch") or each())

    found_nuclei = find.find_nuclei
    monkeypatch.setattr(find, "find_nuclei", look)
    sessions.of("a").find("discs.png", Question("bright", tta=True, threshold=0.3))
    assert seen[0] == (True, 0.3, 4) and seen[-1] == "batch"
    assert kept.tta is False and kept.config["mask_threshold"] == 0.6  # other visitors have it, too


def test_stop_ends_the_work_and_keeps_the_last_answer(sessions):
    session = sessions.of("a")
    before = session.find("discs.png", Question("bright"))
    counts = []

    def each(count):
        counts.append(count)
        session.stop()

    with pytest.raises(Stopped):
        session.find("discs.png", Question("bright"), each)
    assert counts == [1] and all(Path(path).is_file() for path in before.files)
    assert session.find("discs.png", Question("bright")).about  # the next question is answered


def test_visitors_do_not_mix(sessions):
    """Four at once, each with a picture and a folder of his own."""
    radii = {"a": 6, "b": 9, "c": 14, "d": 20}
    for name, radius in radii.items():
        cv2.imwrite(f"{name}.png", discs(radius)[0])
    with ThreadPoolExecutor(4) as threads:
        answers = threads.map(lambda name: sessions.of(name).find(f"{name}.png", Question("bright")), radii)
        answers = dict(zip(radii, answers, strict=True))
    for name, radius in radii.items():
        assert answers[name].about.startswith(f"{name}, ") and len(answers[name].rows) == discs(radius)[1].max()
        assert tifffile.imread(answers[name].files[1]).max() == discs(radius)[1].max()
    sessions.end("a")
    sessions.end("nobody")
    assert not any(Path(path).exists() for path in answers["a"].files)
    assert all(Path(path).is_file() for path in answers["b"].files)
    sessions.end_all()
    assert not any(Path("temporary").iterdir())


def test_a_new_question_ends_the_one_before(sessions):
    """Of two at once in one visit the later one is answered; the earlier one leaves no files."""
    session, started = sessions.of("a"), threading.Event()

    def each(count):
        started.set()
        session.waiting.wait(60)

    session.waiting = threading.Event()
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(session.find, "discs.png", Question("bright"), each)
        assert started.wait(60)
        answer = session.find("discs.png", Question("bright", diameter=18))
        session.waiting.set()
        with pytest.raises(Stopped):
            first.result()
    assert [path.parent for path in map(Path, answer.files)] == [Path(answer.overlay).parent] * 5
    assert list(session.folder.iterdir()) == [Path(answer.overlay).parent]


def test_each_answer_has_files_of_its_own(sessions):
    """A browser that is given the address of before shows what it has kept."""
    first, second = (sessions.of("a").find("discs.png", Question("bright")) for _ in range(2))
    assert first.overlay != second.overlay and not Path(first.overlay).exists() and Path(second.overlay).exists()


def test_a_visit_that_ended_gets_no_files(sessions):
    session = sessions.of("a")
    with pytest.raises(Stopped):
        session.find("discs.png", Question("bright"), lambda count: sessions.end("a"))
    assert not session.folder.exists()


def test_with_a_trained_network(tmp_path, monkeypatch):
    """The run that came with the repository, once more with another level's name."""
    monkeypatch.chdir(tmp_path)
    Path("models").symlink_to(REPOSITORY / "models")
    session = Sessions(tmp_path, device="cpu", amp="off").of("a")
    name = next(visits.runs_of_nuclei())
    answer = session.find(REPOSITORY / "docs" / "picture.png", Question(name))
    assert 30 <= len(answer.rows) <= 60 and "; L4, " in answer.about  # 42 were drawn
    with pytest.raises(ValueError, match="nuclei_L2 was cut to level 2 and has no other"):
        session.find(REPOSITORY / "docs" / "picture.png", Question("nuclei_L2", level="3"))


@pytest.mark.parametrize(
    ("size", "shown"), [((100, 50), (640, 320)), ((700, 900), (700, 900)), ((20, 3200), (10, 1600))]
)
def test_outlines_fit_the_page(size, shown):
    labels = np.zeros(size, np.int32)
    labels[5:15, 5:40] = 1
    drawn = as_shown(np.full((*size, 3), 99, np.uint8), labels)
    assert drawn.shape == (*shown, 3) and (drawn != drawn[-1, -1]).any()


def write_bad(name):
    """A file that predict.py refuses."""
    picture = discs(9)[0]
    if name == "broken.png":
        Path(name).write_bytes(cv2.imencode(".png", picture)[1].tobytes()[:200])
    elif name == "text.png":
        Path(name).write_text("no picture")
    elif name == "large.png":
        cv2.imwrite(name, np.zeros((300, 300), np.uint8))
    else:
        tifffile.imwrite(name, np.zeros((5, 40, 50), np.uint8), photometric="minisblack", planarconfig="separate")


@pytest.mark.parametrize("name", ["broken.png", "text.png", "large.png", "five.tif"])
def test_what_predict_refuses_in_its_words(sessions, monkeypatch, capsys, name):
    write_bad(name)
    sessions.max_pixels = 50_000
    with pytest.raises((ValueError, OSError)) as caught:
        sessions.of("a").find(name, Question("bright"))
    monkeypatch.setattr(predict, "build_predictor", lambda *_: named("L4"))
    with pytest.raises(ValueError) as of_predict:
        call(monkeypatch, predict, f"--max_pixels 50000 {name}")
    assert str(of_predict.value).endswith(refusal(name, caught.value))


@pytest.mark.parametrize(
    ("question", "words"),
    [
        (Question("bright", diameter=0.5), "diameter 0.5: expected 1 to 10,000 pixels"),
        (Question("bright", pixel_size=-1), "-1 micrometres per pixel: expected"),
        (Question("bright", channels=(7,)), "has no channel 7"),
        (Question("bright", page=-1), "page -1: pages are counted from 0"),
        (Question("../bright"), "expected the plain name"),
        (Question("gone"), "the run gone is gone; reload the page"),
    ],
)
def test_wrong_questions(sessions, question, words):
    with pytest.raises((ValueError, OSError), match=words):
        sessions.of("a").find("discs.png", question)


def test_examples_are_pictures(sessions):
    examples = sessions.examples()
    assert len(examples) == 3 and all(cv2.imread(path).shape == (256, 256, 3) for path, _ in examples)


def write_run(name, **config):
    folder = Path("models") / name
    folder.mkdir(parents=True, exist_ok=True)
    common = {"arch": "NestedUNet", "dataset": "d", "loss": "l", "img_ext": ".png", "mask_ext": ".png", "width": 8}
    common |= {"input_h": 32, "input_w": 32, "input_channels": 1, "mean": [0.5], "std": [0.5], "seed": 0}
    (folder / "config.yml").write_text(yaml.safe_dump({**common, "num_classes": 1, **config}))
    (folder / "model.pth").touch()


def test_the_table_of_runs(place):
    write_run("masks", deep_supervision=False)
    write_run("deep", deep_supervision=True)
    write_run("cut", deep_supervision=True, level=2)
    Path("models/insects").mkdir()
    Path("models/insects/config.yml").write_text("classes: [ants, bees]")
    Path("models/insects/model.pth").touch()
    Path("models/nuclei").mkdir()
    Path("models/nuclei/config.yml").write_text("{arch: NestedUNet, target: instances}")
    Path("models/nuclei/model.pth").touch()
    assert list(visits.runs_of_nuclei()) == ["nuclei"]
    configs = {name: yaml.safe_load(Path(f"models/{name}/config.yml").read_text()) for name in ("masks", "deep", "cut")}
    assert [levels_of(config) for config in configs.values()] == [[4], [1, 2, 3, 4], [2]]
    report = Path("outputs/deep/report.html")
    report.parent.mkdir(parents=True)
    report.touch()
    rows = {name: rest for name, *rest in visits.about_runs()}
    assert rows["deep"] == ["masks", "d", str(report)] and rows["insects"] == ["classes", "ants, bees", "–"]
    for name in ("../deep", "/etc", ""):
        with pytest.raises(ValueError, match="plain name"):
            report_of(name)


def test_classes_and_where_it_looked(sessions):
    torch.manual_seed(0)
    model = ResNet18(2)
    torch.nn.init.normal_(model.fc.weight)
    folder = Path("models/insects")
    folder.mkdir()
    torch.save(model.state_dict(), folder / "model.pth")
    (folder / "config.yml").write_text(yaml.safe_dump({"classes": ["ants", "bees"], "mirror": False, "img_size": 64}))
    found, heat = sessions.of("a").classify("discs.png", "insects")
    assert set(found) == {"ants", "bees"} and sum(found.values()) == pytest.approx(1)
    assert heat.shape == (64, 64, 3) and heat.dtype == np.uint8 and heat.std() > 0
    Path("text.png").write_text("no picture")
    with pytest.raises(ValueError) as caught:
        sessions.of("a").classify(Path("text.png").resolve(), "insects")
    said = refusal(Path("text.png").resolve(), caught.value)
    assert said.startswith("text.png is not a readable picture (") and "/" not in said
    sessions.max_pixels = 1000
    with pytest.raises(ValueError, match="pixels are more than"):
        sessions.of("a").classify("discs.png", "insects")


def test_a_lack_of_memory_is_said_in_one_line():
    assert refusal("a.png", RuntimeError("DefaultCPUAllocator: can't allocate")).startswith(
        "a.png: not enough main memory"
    )
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        refusal("a.png", RuntimeError("a mistake of ours"))
