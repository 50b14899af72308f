"""cli.py: bounds, one-line errors, which setting wins, and the exit status of a script."""

import argparse
import math
import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import REPOSITORY

from common.cli import Parser, Stops, Terminated, in_one_line, interruptible, listed, number, parse_options
from common.files import read_yaml
from utils import str2bool

# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("kind", "bounds", "text", "value"),
    [
        (int, (1,), "1", 1),
        (int, (0, 2**32 - 1), "4294967295", 2**32 - 1),
        (int, (), "-7", -7),
        (float, (0, 1), "0", 0.0),
        (float, (0, 1), "1", 1.0),
        (float, (0,), "2e-3", 0.002),
        (float, (), "-1.5", -1.5),
    ],
)
def test_numbers_within_bounds(kind, bounds, text, value):
    found = number(kind, *bounds)(text)
    assert found == value and type(found) is kind


@pytest.mark.parametrize(
    ("kind", "bounds", "text", "message"),
    [
        (int, (1,), "0", "expected an integer >= 1, found '0'"),
        (int, (1, 1024), "1025", "expected an integer from 1 to 1024, found '1025'"),
        (int, (0, 2**32 - 1), "4294967296", "expected an integer from 0 to 4294967295, found '4294967296'"),
        (int, (), "1.0", "expected an integer, found '1.0'"),
        (int, (), "", "expected an integer, found ''"),
        (int, (), "inf", "expected an integer, found 'inf'"),
        (float, (0,), "-1e-9", "expected a number >= 0, found '-1e-9'"),
        (float, (0, 0.999999), "1", "expected a number from 0 to 0.999999, found '1'"),
        (float, (-math.inf, 3), "4", "expected a number <= 3, found '4'"),
        (float, (), "nan", "expected a number, found 'nan'"),
        (float, (), "inf", "expected a number, found 'inf'"),
        (float, (), "-inf", "expected a number, found '-inf'"),
        (float, (), "1e999", "expected a number, found '1e999'"),
        (float, (), "ten", "expected a number, found 'ten'"),
    ],
)
def test_numbers_that_are_refused(kind, bounds, text, message):
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        number(kind, *bounds)(text)
    assert str(caught.value) == message


# ---------------------------------------------------------------- options


def build_parser():
    parser = Parser(prog="my.py")
    parser.add_argument("--config")
    parser.add_argument("--lr", "--learning_rate", type=number(float, 0), default=1e-3)
    parser.add_argument("-b", "--batch_size", type=number(int, 1), default=16)
    parser.add_argument("--name")
    parser.add_argument("--amp", choices=("auto", "off"), default="auto")
    parser.add_argument("--nesterov", type=str2bool, default=False)
    parser.add_argument("--milestones", type=lambda text: text.strip("[] "), default="1,2")
    parser.add_argument("--overwrite", action="store_true")
    return parser


def options_of(*argv):
    return parse_options(build_parser, [str(word) for word in argv], read_yaml)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lr", "fast"], "argument --lr/--learning_rate: expected a number >= 0, found 'fast'"),
        (["--batch", "4"], "unrecognized arguments: --batch 4"),  # no abbreviations
        (["--learning", "1"], "unrecognized arguments: --learning 1"),
        (["-b", "0"], "argument -b/--batch_size: expected an integer >= 1, found '0'"),
        (["--amp", "on"], "argument --amp: invalid choice: 'on'"),
        (["--nesterov", "maybe"], "argument --nesterov: 'maybe' is neither True nor False"),
        (["--lr"], "argument --lr/--learning_rate: expected one argument"),
        (["stray"], "unrecognized arguments: stray"),
    ],
)
def test_wrong_options_are_one_line_and_status_2(argv, message, capsys):
    with pytest.raises(SystemExit) as caught:
        options_of(*argv)
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and out == "" and err.count("\n") == 1
    assert err.startswith(f"my.py: error: {message}") and err.endswith("(--help lists the options)\n")


def test_default_then_file_then_command_line(tmp_path):
    config = tmp_path / "my.yml"
    config.write_text("lr: 1e-4\nbatch_size: 8\nnesterov: yes\namp: off\nmilestones: [20, 40]\nname:\n")
    options, given = options_of()
    assert (options.lr, options.batch_size, options.nesterov, options.amp, options.name) == (
        1e-3,
        16,
        False,
        "auto",
        None,
    )
    assert given == set()
    options, given = options_of("--config", config, "-b", "4")
    assert (options.lr, options.batch_size, options.nesterov, options.amp) == (1e-4, 4, True, "off")
    assert options.milestones == "20, 40" and options.name is None and options.overwrite is False
    assert given == {"config", "lr", "batch_size", "nesterov", "amp", "milestones"}
    # an option given its own default is given all the same, and beats the file
    options, given = options_of("--lr", "1e-3", "--config", config)
    assert options.lr == 1e-3 and "lr" in given
    options, given = options_of("--overwrite", "--name", "run1")
    assert options.overwrite is True and options.name == "run1" and given == {"overwrite", "name"}


def test_values_of_the_file_are_checked_by_their_option(tmp_path, capsys):
    config = tmp_path / "my.yml"
    for line, message in (
        ("batch_size: 0", "argument -b/--batch_size: expected an integer >= 1, found '0'"),
        ("batch_size: 4.5", "argument -b/--batch_size: expected an integer >= 1, found '4.5'"),
        ("lr: .nan", "argument --lr/--learning_rate: expected a number >= 0, found 'nan'"),
        ("nesterov: 7", "argument --nesterov: '7' is neither True nor False"),
        ("overwrite: 2", "argument --overwrite: '2' is neither True nor False"),
    ):
        config.write_text(line)
        with pytest.raises(SystemExit) as caught:
            options_of("--config", config)
        err = capsys.readouterr().err
        assert caught.value.code == 2 and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "switch", "files"),
    [
        ("", False, []),
        ("--tta", True, []),
        ("--tta a.png", True, ["a.png"]),  # a file is no value
        ("--tta True a.png", True, ["a.png"]),
        ("--tta no a.png", False, ["a.png"]),
        ("a.png --tta=False", False, ["a.png"]),
        ("a.png --tta", True, ["a.png"]),
        ("--tta --tta False", False, []),
    ],
)
def test_switches_stand_alone_or_take_a_bool(words, switch, files):
    parser = Parser()
    parser.add_argument("paths", nargs="*")
    parser.add_argument_group("group").add_argument("--tta", action="store_true")
    options = parser.parse_args(words.split())
    assert (options.tta, options.paths) == (switch, files)


def test_a_value_with_a_dash_or_a_space_in_the_file(tmp_path):
    (tmp_path / "my.yml").write_text('name: "--lr 5"\n')
    options, given = options_of("--config", tmp_path / "my.yml")
    assert options.name == "--lr 5" and options.lr == 1e-3 and given == {"config", "name"}


def test_a_wrong_value_names_its_file(tmp_path, capsys):
    (tmp_path / "my.yml").write_text("batch_size: none\n")
    with pytest.raises(SystemExit) as stop:
        parse_options(build_parser, ["--config", str(tmp_path / "my.yml")], read_yaml)
    assert stop.value.code == 2 and f"{tmp_path / 'my.yml'}: error: argument" in capsys.readouterr().err


def test_unknown_keys_in_the_file(tmp_path):
    config = tmp_path / "my.yml"
    config.write_text("lr: 1\nlearning_rat: 1\n17: 2\n")
    with pytest.raises(
        ValueError, match=r"my.yml: unknown options 17, learning_rat; expected some of amp, batch_size,"
    ):
        options_of("--config", config)
    with pytest.raises(FileNotFoundError, match="no such file"):
        options_of("--config", tmp_path / "nowhere.yml")


def test_scripts_without_a_settings_file(monkeypatch):
    def plain():
        parser = Parser(prog="my.py")
        parser.add_argument("--size", type=int, default=3)
        return parser

    monkeypatch.setattr(sys, "argv", ["my.py", "--size", "5"])
    options, given = parse_options(plain)
    assert vars(options) == {"size": 5} and given == {"size"}


# ---------------------------------------------------------------- messages


class Broken(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        raise OSError("inputs/x: a: no image (gone)")


def test_an_error_in_one_line():
    assert in_one_line(ValueError("found this,\n  expected that")) == "found this, expected that"
    assert in_one_line(MemoryError()) == "MemoryError"
    with pytest.raises(OSError) as caught:
        list(torch.utils.data.DataLoader(Broken(), num_workers=1))
    assert "Traceback" in str(caught.value) and in_one_line(caught.value) == "inputs/x: a: no image (gone)"


# ---------------------------------------------------------------- running


def ran(tmp_path, body, **environment):
    script = tmp_path / "my.py"
    script.write_text(f"from common.cli import run_script\n\n\ndef main():\n    {body}\n\n\nrun_script(main)\n")
    variables = {"PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1", **environment}
    return subprocess.run([sys.executable, script], capture_output=True, text=True, env=variables, timeout=60)


@pytest.mark.parametrize(
    ("body", "status", "stderr"),
    [
        ("print('done')", 0, ""),
        ("return 3", 3, ""),
        ("raise ValueError('found this,\\n  expected that')", 2, "my.py: error: found this, expected that\n"),
        ("raise FileNotFoundError('x.yml: no such file')", 2, "my.py: error: x.yml: no such file\n"),
        ("open('/nowhere/x')", 2, "my.py: error: [Errno 2] No such file or directory: '/nowhere/x'\n"),
        ("raise MemoryError", 2, "my.py: error: MemoryError\n"),
        ("raise KeyboardInterrupt", 130, "\nmy.py: stopped\n"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", 143, "\nmy.py: stopped\n"),
        (
            "raise type('OutOfMemoryError', (RuntimeError,), {})('CUDA out of memory')",
            2,
            "my.py: error: not enough GPU memory; use a smaller --batch_size or image\n",
        ),
    ],
)
def test_exit_status_and_one_line(tmp_path, body, status, stderr):
    result = ran(tmp_path, body)
    assert (result.returncode, result.stderr) == (status, stderr)
    assert result.stdout == ("done\n" if status == 0 else "")


def test_names_that_the_console_cannot_show(tmp_path):
    """As on Windows, where the output of a pipe is in the code page."""
    result = ran(tmp_path, "print('Zelle \u7d30\u80de')", PYTHONIOENCODING="cp1252")
    assert (result.returncode, result.stdout, result.stderr) == (0, "Zelle \\u7d30\\u80de\n", "")


def test_only_a_terminal_is_told_that_libraries_are_loaded(tmp_path):
    """And only until main begins."""
    pty = pytest.importorskip("pty", reason="no pseudo-terminals on this system")
    lines = ("from common.cli import Parser, answer_early, run_script", "answer_early(__name__, Parser)")
    (tmp_path / "my.py").write_text("\n".join((*lines, "run_script(lambda: print('done'))")))
    command, environment = [sys.executable, tmp_path / "my.py"], {"PYTHONPATH": str(REPOSITORY)}
    ours, theirs = pty.openpty()
    options = {"env": environment, "stdout": subprocess.PIPE, "timeout": 60, "check": True}
    assert subprocess.run(command, stderr=theirs, **options).stdout == b"done\n"
    os.close(theirs)
    assert os.read(ours, 1000) == b"loading ...\r           \r"
    os.close(ours)
    assert subprocess.run(command, stderr=subprocess.PIPE, **options).stderr == b""


def test_our_own_mistakes_keep_their_traceback(tmp_path):
    result = ran(tmp_path, "raise KeyError('lr')")
    assert result.returncode == 1 and "Traceback" in result.stderr and "KeyError: 'lr'" in result.stderr
    result = ran(tmp_path, "raise ValueError('mine')", DEBUG="1")
    assert result.returncode == 1 and "Traceback" in result.stderr and "ValueError: mine" in result.stderr


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_an_interruptible_block_in_a_process_that_would_just_end(number, kind):
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with pytest.raises(kind), interruptible():
            os.kill(os.getpid(), number)
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_a_signal_waits_for_the_check_and_the_second_does_not(number, kind):
    before = signal.getsignal(number)
    with pytest.raises(kind), Stops() as stops:
        stops.check()
        os.kill(os.getpid(), number)
        waited = True
        stops.check()
    with pytest.raises(kind), Stops():
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        pytest.fail("the second signal waits")
    assert waited and signal.getsignal(number) is before


def test_a_signal_that_nobody_checks_is_answered_at_the_end():
    with pytest.raises(KeyboardInterrupt), Stops():
        os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), Stops():  # such as of loader processes that got the same signal
        os.kill(os.getpid(), signal.SIGINT)
        raise RuntimeError("DataLoader worker exited unexpectedly")
    with pytest.raises(OSError, match="disk"), Stops():  # but the user shall know of the disk
        os.kill(os.getpid(), signal.SIGINT)
        raise OSError("disk")


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Stops() as stops:
            os.kill(os.getpid(), signal.SIGINT)
            stops.check()
    finally:
        signal.signal(signal.SIGINT, before)


def test_long_lists_are_counted():
    assert listed([]) == "" and listed(["a"]) == "a"
    assert listed(list("abcde")) == "a, b, c, d, e" and listed(list("abcdef")) == "a, b, c, d, e and 1 more"
    assert listed(range(10), most=3) == "0, 1, 2 and 7 more"
