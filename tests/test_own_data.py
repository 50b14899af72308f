"""docs/OWN_DATA.md, followed line by line: its own commands, on two small classes, with a small and short training."""

import re
import shlex

import cv2
import numpy as np
from conftest import REPOSITORY, run_script

PAGE = REPOSITORY / "docs" / "OWN_DATA.md"
SMALLER = ["--epochs", "1", "--width", "2", "--input_w", "32", "--input_h", "32", "--batch_size", "4"]
FEWER = ["--crops", "4", "--split", "random"]  # of individual objects
SAME_NETWORK = ["--crops", "4", "--epochs", "1", "--input_w", "32", "--input_h", "32"]  # as that of models/nuclei


def commands():
    """-> the commands of the page, in its order."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return "".join(blocks).splitlines()


def write_user_data(folder, count=6):
    """photos/ and labels/: bright squares of class 1 and discs of class 2 on noise."""
    rng = np.random.default_rng(0)
    for name in ("photos", "labels"):
        (folder / name).mkdir()
    for number in range(count):
        labels = np.zeros((40, 48), np.uint8)
        x, y = map(int, rng.integers(4, 20, 2))
        for shift in (-4, 10):
            cv2.rectangle(labels, (x + shift, y), (x + shift + 8, y + 8), 1, -1)
            cv2.circle(labels, (44 - x - shift, 38 - y), 5, 2, -1)
        photo = rng.integers(0, 60, (40, 48, 3), np.uint8)
        photo[labels > 0] += np.array([[60, 20, 120], [20, 120, 60]], np.uint8)[labels[labels > 0] - 1]
        cv2.imwrite(str(folder / "photos" / f"day{number}.png"), photo)
        cv2.imwrite(str(folder / "labels" / f"day{number}.png"), labels)


def run_line(line, folder):
    words = shlex.split(line)
    if words[0] == "python":
        smaller = SMALLER if words[1] == "train.py" else []
        if "--config" in words:
            smaller = SAME_NETWORK if "--weights" in words else [*SMALLER, *FEWER]
            recipe = words.index("--config") + 1
            words[recipe] = str(REPOSITORY / words[recipe])
        return run_script(words[1], *words[2:], *smaller, cwd=folder).stdout
    if words[0] == "pip":  # the file is there; what it lists, make test has installed
        assert words[1:3] == ["install", "-r"] and (REPOSITORY / words[3]).is_file()
        return ""
    raise AssertionError(f"a command of another kind: {line}")


def test_the_page_from_its_first_command_to_its_last(tmp_path):
    write_user_data(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "nuclei").symlink_to(REPOSITORY / "models" / "nuclei")
    said = "".join(run_line(line, tmp_path) for line in commands())
    labels = cv2.imread(str(tmp_path / "labels" / "day3.png"), cv2.IMREAD_GRAYSCALE)
    for k in (0, 1):
        mask = cv2.imread(str(tmp_path / f"inputs/my_cells/masks/{k}/day3.png"), cv2.IMREAD_GRAYSCALE)
        assert ((mask == 255) == (labels == k + 1)).all() and (mask > 0).any()
    assert "is the smallest level within 0.005 of" in said
    assert (tmp_path / "outputs/cells/report.html").is_file() and any((tmp_path / "outputs/cells/predict").iterdir())
    assert (tmp_path / "models/cells_small/model.pth").is_file()
    for name in ("objects", "mine"):
        assert (tmp_path / f"outputs/{name}/predict/day3_labels.tif").is_file()
    assert "weights of models/nuclei/model.pth\n" in said and "new heads" not in said


def test_files_that_the_pages_name_are_there():
    for page in sorted((REPOSITORY / "docs").glob("*.md")):
        text = page.read_text(encoding="utf-8")
        for name in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text):
            picture = page.parent / name
            assert picture.is_file() and picture.stat().st_size < 200_000, name
        for name in re.findall(r"`((?:docs/)?\w+\.(?:py|txt))`", text):
            assert (REPOSITORY / name).is_file(), name


def test_the_table_of_levels_is_the_models():
    from archs import NestedUNet
    from utils import count_params

    model = NestedUNet(deep_supervision=True)
    text = (REPOSITORY / "docs" / "HOW_IT_WORKS.md").read_text(encoding="utf-8")
    for level in (1, 2, 3, 4):
        pruned = model.prune(level)
        assert f"| L{level} | {len(pruned.nodes)} | {count_params(pruned):,} |" in text
    source = (REPOSITORY / "archs.py").read_text(encoding="utf-8")
    [line] = re.findall(r"```python\n(.*)\n```", text)
    assert line in source
