"""The house: imports go downhill only, a file opens with what it is for, and nothing happens at import."""

import ast
import subprocess
import sys

import pytest
from conftest import REPOSITORY

FILES = sorted(path.name for path in REPOSITORY.glob("*.py"))
GROUND = {"utils", "images", "devices", "distributed"}  # import no file of the project
SHARED = {"cli", "runs", "report", "download", "synthetic"}  # for every stage
SEGMENTATION = {"archs", "losses", "metrics", "dataset", "lookalikes"}
TRANSFER = {"folders", "resnet18", "classification"}
STAGES = {"train", "val", "export", "preprocess_dsb2018", "transfer_resnet18"}

MAY_IMPORT = {
    **dict.fromkeys(GROUND, set()),
    **dict.fromkeys(SHARED | SEGMENTATION | TRANSFER, GROUND),
    **dict.fromkeys(("archs", "losses", "metrics"), set()),
    "levels": GROUND | SHARED | SEGMENTATION,
    "val": GROUND | SHARED | SEGMENTATION | {"levels"},
    "train": GROUND | SHARED | SEGMENTATION | {"val"},
    "predict": GROUND | SHARED | SEGMENTATION | {"val"},
    "export": GROUND | SHARED | SEGMENTATION | {"val"},
    "preprocess_dsb2018": GROUND | SHARED,
    "transfer_resnet18": GROUND | SHARED | TRANSFER,
    "benchmark": GROUND | SHARED | SEGMENTATION | TRANSFER | STAGES,  # it stands above them
}
LIBRARIES = {"archs": {"torch"}, "losses": {"torch"}, "metrics": {"numpy", "torch"}}


def parsed(name):
    return ast.parse((REPOSITORY / name).read_text(encoding="utf-8"))


def imported(tree):
    """The top-level names of every import, those inside functions too."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a flat repository has no relative imports"
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("name", FILES)
def test_imports_go_downhill(name):
    stem, project = name.removesuffix(".py"), {file.removesuffix(".py") for file in FILES}
    assert stem in MAY_IMPORT, f"{name} is new: say in this table, and in the README, where it stands"
    uphill = imported(parsed(name)) & project - MAY_IMPORT[stem]
    assert not uphill, f"{name} imports {', '.join(sorted(uphill))}"


@pytest.mark.parametrize("stem", LIBRARIES)
def test_the_mathematics_imports_few_libraries(stem):
    assert imported(parsed(f"{stem}.py")) - LIBRARIES[stem] <= sys.stdlib_module_names - {"os", "pathlib", "sys", "io"}


@pytest.mark.parametrize("name", FILES)
def test_files_open_with_what_they_are_for(name):
    docstring = ast.get_docstring(parsed(name))
    assert docstring, f"{name} has no docstring"
    summary, *rest = docstring.split("\n")
    assert summary.endswith((".", "?")) and len(summary) > 20 and "".join(rest).strip(), f"{name}: no line to run"


@pytest.mark.parametrize("name", FILES)
def test_files_only_define(name):
    """At the top: a docstring, imports, constants, functions, classes, and the call of main in a script."""
    docstring, *statements = parsed(name).body
    for node in statements:
        if isinstance(node, ast.If):
            assert ast.unparse(node.test) == "__name__ == '__main__'", f"{name}:{node.lineno}"
            assert [ast.unparse(line) for line in node.body] == ["run_script(main)"], f"{name}:{node.lineno}"
        else:
            allowed = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.FunctionDef, ast.ClassDef)
            assert isinstance(node, allowed), f"{name}:{node.lineno} does something at import"


IMPORT_ALL = """
import random, socket, sys

def refuse(*args, **kwargs):
    raise AssertionError("the network is used at import")

socket.socket.connect = socket.getaddrinfo = refuse
state = random.getstate()
for stem in {stems!r}:
    __import__(stem)
assert random.getstate() == state, "a global random stream is moved"
assert not {unwanted!r} & sys.modules.keys(), {unwanted!r} & sys.modules.keys()
"""


@pytest.mark.parametrize(
    ("stems", "unwanted"),
    [
        ([file.removesuffix(".py") for file in FILES], set()),
        (["preprocess_dsb2018"], {"torch", "albumentations", "sklearn", "pandas"}),
        (["val"], {"albumentations", "sklearn", "torchvision"}),
    ],
    ids=["everything", "preprocess_dsb2018", "val"],
)
def test_nothing_happens_at_import(tmp_path, stems, unwanted):
    code = IMPORT_ALL.format(stems=stems, unwanted=unwanted)
    command = [sys.executable, "-B", "-W", "error::DeprecationWarning", "-W", "error::FutureWarning", "-c", code]
    environment = {"PYTHONPATH": str(REPOSITORY), "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, "--no-such-option"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert not any(path.suffix in (".py", ".yml", ".csv", ".pth") for path in tmp_path.rglob("*"))
    assert not any((tmp_path / name).exists() for name in ("inputs", "models", "outputs"))


def test_the_table_is_of_a_house_without_circles():
    """No file is reached from itself, and nobody but the benchmark imports train."""
    for start in MAY_IMPORT:
        reached, waiting = set(), list(MAY_IMPORT[start])
        while waiting:
            stem = waiting.pop()
            if stem not in reached:
                reached.add(stem)
                waiting += MAY_IMPORT[stem]
        assert start not in reached and ("train" not in reached or start == "benchmark")
