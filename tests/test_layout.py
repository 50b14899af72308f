"""The house: imports go downhill only, a file opens with what it is for, and nothing happens at import."""

import ast
import gc
import subprocess
import sys

import pytest
from conftest import REPOSITORY

FOLDERS = ("common", "classification", "label_forms", "nuclei", "tools")
FILES = sorted(
    str(path.relative_to(REPOSITORY))
    for folder in (".", *FOLDERS)
    for path in (REPOSITORY / folder).glob("*.py")
    if path.name != "__init__.py"
)
MODULES = {file.removesuffix(".py").replace("/", "."): file for file in FILES}

# From the ground upwards: a module imports what stands in an earlier row, and, in its own row, only where said below.
HOUSE = (
    {"utils"},
    {name for name in MODULES if name.startswith("common.")},
    {"losses", "metrics", "instances", "augmentation", "encoders", "data_folder"},
    {"archs", "labels"},
    {name for name in MODULES if name.startswith(("classification.", "label_forms."))},
    {"dataset", "dsb2018", "tasks", "run_config"},
    {name for name in MODULES if name.startswith("nuclei.")} - {"nuclei.find", "nuclei.predictions"},
    {"engine"},
    {"inference", "levels", "predictions", "training_data"},
    {"nuclei.find", "nuclei.predictions", "evaluation"},
    {"sessions"},
    {"app", "import_labels", "preprocess_dsb2018", "train", "val", "predict", "export", "transfer_resnet18"},
    {name for name in MODULES if name.startswith("tools.")},
)
# The rows of these may import one another, but not in a circle; see below.
NEIGHBOURS = {"common", "classification", "label_forms", "nuclei", "tools"}
LIBRARIES = {
    "archs": {"torch", "encoders"},
    "losses": {"torch"},
    "metrics": {"numpy", "torch"},
    "instances": {"numpy", "scipy", "skimage"},
}


@pytest.fixture(autouse=True, scope="module")
def no_garbage():
    """CPython 3.11's parser fails with a SystemError when an earlier test's object is finalised while it runs."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def parsed(name):
    return ast.parse((REPOSITORY / name).read_text(encoding="utf-8"))


def imported(tree):
    """The full names of every import, those inside functions too: `from common import cli` is common.cli."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "this repository has no relative imports"
            names |= {f"{node.module}.{alias.name}" if node.module in FOLDERS else node.module for alias in node.names}
    return names


def row_of(module):
    return next(k for k, row in enumerate(HOUSE) if module in row)


def test_imports_go_downhill():
    new = [module for module in MODULES if not any(module in row for row in HOUSE)]
    assert not new, f"{new} are new: say where in HOUSE and docs/CONTRIBUTING.md"
    uphill = []
    for module in MODULES:
        for other in imported(parsed(MODULES[module])) & MODULES.keys():
            neighbours = row_of(other) == row_of(module) and module.split(".")[0] in NEIGHBOURS
            if not neighbours and row_of(other) >= row_of(module):
                uphill.append(f"{module} imports {other}")
    assert not uphill


def test_no_module_is_reached_from_itself():
    imports = {module: imported(parsed(file)) & MODULES.keys() for module, file in MODULES.items()}
    for start in MODULES:
        reached, waiting = set(), list(imports[start])
        while waiting:
            module = waiting.pop()
            if module not in reached:
                reached.add(module)
                waiting += imports[module]
        assert start not in reached


@pytest.mark.parametrize("module", LIBRARIES)
def test_the_mathematics_imports_few_libraries(module):
    names = {name.split(".")[0] for name in imported(parsed(MODULES[module]))} - LIBRARIES[module]
    assert names <= sys.stdlib_module_names - {"os", "pathlib", "sys", "io"}


def test_files_open_with_what_they_are_for():
    without = []
    for name in FILES:
        summary, *rest = (ast.get_docstring(parsed(name)) or "").split("\n")
        if not (summary.endswith((".", "?")) and len(summary) > 20 and "".join(rest).strip()):
            without.append(name)
    assert not without, f"{without} have no docstring, or no line to run in it"


def test_files_only_define():
    """At the top: a docstring, imports, constants, functions, classes; a script also has answer_early and runs main."""
    defines = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.FunctionDef, ast.ClassDef)
    early = ("answer_early(__name__, build_parser)", "answer_early(__name__)")
    runs = "if __name__ == '__main__':\n    run_script(main)"
    others = [
        f"{name}:{node.lineno}"
        for name in FILES
        for node in parsed(name).body[1:]
        if not isinstance(node, defines) and ast.unparse(node) not in (*early, runs)
    ]
    assert not others, f"{others} do something at import"


IMPORT_ALL = """
import importlib, random, socket, sys

def refuse(*args, **kwargs):
    raise AssertionError("the network is used at import")

socket.socket.connect = socket.getaddrinfo = refuse
state = random.getstate()
for module in {modules!r}:
    importlib.import_module(module)
assert random.getstate() == state, "a global random stream is moved"
assert not {unwanted!r} & sys.modules.keys(), {unwanted!r} & sys.modules.keys()
"""


@pytest.mark.parametrize(
    ("modules", "unwanted"),
    [
        (list(MODULES), set()),
        (["preprocess_dsb2018"], {"torch", "albumentations", "sklearn", "pandas"}),
        (["import_labels"], {"torch", "albumentations", "sklearn", "pandas", "pycocotools", "roifile", "tifffile"}),
        (["val"], {"albumentations", "sklearn", "torchvision"}),
    ],
    ids=["everything", "preprocess_dsb2018", "import_labels", "val"],
)
def test_nothing_happens_at_import(tmp_path, modules, unwanted):
    code = IMPORT_ALL.format(modules=modules, unwanted=unwanted)
    command = [sys.executable, "-B", "-W", "error::DeprecationWarning", "-W", "error::FutureWarning", "-c", code]
    environment = {"PYTHONPATH": str(REPOSITORY), "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, "--no-such-option"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert not any(path.suffix in (".py", ".yml", ".csv", ".pth") for path in tmp_path.rglob("*"))
    assert not any((tmp_path / name).exists() for name in ("inputs", "models", "outputs"))
