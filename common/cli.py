"""The command line of every script: options with bounds, a settings file beneath them, errors in one line.

from common.cli import Parser, Stops, number, parse_options, run_script
"""

import argparse
import contextlib
import math
import os
import signal
import sys
import threading
from pathlib import Path

from common.distributed import is_main, launched
from utils import str2bool

LOADING = "loading ..."
ERASED = f"\r{' ' * len(LOADING)}\r"
MAX_MESSAGE = 4000  # characters: a message may name about twenty ids


def number(kind, low=-math.inf, high=math.inf):
    """An argparse type: an int or a float (`kind`) within [low, high]; NaN and infinity are refused."""
    expected = "an integer" if kind is int else "a number"
    if low > -math.inf and high < math.inf:
        expected += f" from {low} to {high}"
    elif low > -math.inf:
        expected += f" >= {low}"
    elif high < math.inf:
        expected += f" <= {high}"

    def parse(text):
        try:
            value = kind(text)
        except (ValueError, OverflowError):
            value = math.nan
        if not (math.isfinite(value) and low <= value <= high):
            raise argparse.ArgumentTypeError(f"expected {expected}, found {text!r}")
        return value

    parse.low, parse.high = low, high
    return parse


def data_set(text):
    """An argparse type: the name of a folder in inputs/, which may also be given as the path inputs/<name>."""
    path = Path(text)
    return str(path.relative_to("inputs")) if path.parts[:1] == ("inputs",) and len(path.parts) > 1 else text


def weights(count):
    """An argparse type: '1,2,3,4' or '[1, 2, 3, 4]' -> '1,2,3,4', `count` numbers of at least 0, not all 0."""

    def parse(text):
        found = [number(float, 0, 1e6)(part) for part in str(text).strip("[] ").split(",")]
        if len(found) != count or not any(found):
            raise argparse.ArgumentTypeError(f"{text!r}: expected {count} numbers, not all of them 0")
        return ",".join(f"{weight:g}" for weight in found)

    return parse


def interval(low, high):
    """An argparse type: '1,2' or '[1, 2]' -> '1,2', two numbers within [low, high] that do not decrease."""

    def parse(text):
        found = [number(float, low, high)(part) for part in str(text).strip("[] ").split(",")]
        if len(found) != 2 or found[0] > found[1]:
            raise argparse.ArgumentTypeError(f"{text!r}: expected two numbers, the smaller one first")
        return ",".join(f"{value:g}" for value in found)

    return parse


def channel_numbers(text):
    """An argparse type: "0" -> [0], "2,1,0" -> [2, 1, 0]."""
    parts = text.split(",")
    if len(parts) not in (1, 3) or not all(part.strip().isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"expected one number or three, such as 0 or 2,1,0, found {text!r}")
    return [int(part) for part in parts]


def auto_or_bool(text):
    """An argparse type: "auto" stays as it is, anything else is read by str2bool."""
    return text if text == "auto" else str2bool(text)


def add_machine_options(parser, training=False):
    """--device and --amp, and more for training -> the group, for more options of its kind."""
    group = parser.add_argument_group("machine")
    a = group.add_argument
    a("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    a("--amp", choices=("auto", "off", "bf16", "fp16"), default="auto", help="mixed precision")
    if training:
        workers = "loader processes; -1: none on a CPU, up to 8 with a GPU"
        a("--num_workers", type=number(int, -1, 1024), default=-1, help=workers)
        board = "curves and example pictures in models/<name>/tensorboard; needs requirements-tensorboard.txt"
        a("--tensorboard", action="store_true", help=board)
        a("--sync_bn", action="store_true", help="torchrun: batch norm over the batches of all GPUs")
    return group


class Switch(argparse.Action):
    """An option that is on when it is given alone, and takes True or False as well: `--tta`, `--tta False`."""

    def __init__(self, option_strings, dest, default=False, required=False, help=None):  # noqa: A002 (argparse names it)
        super().__init__(option_strings, dest, "?", True, default, str2bool, None, required, help, "BOOL")

    def __call__(self, parser, namespace, value, option_string=None):
        setattr(namespace, self.dest, value)


class _Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        if action.default is None or action.nargs == 0:  # the help says what happens without the option
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line and whose options cannot be abbreviated.

    Its help keeps the lines of the description, a script's docstring, and adds each option's default.
    """

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=_Formatter, **kwargs)
        self.register("action", "store_true", Switch)

    def parse_known_args(self, args=None, namespace=None):
        """As argparse does; but a word after a switch is its value only if it says True or False, not a file."""
        switches = {name for action in self._actions if isinstance(action, Switch) for name in action.option_strings}
        words = list(sys.argv[1:] if args is None else args)
        for place, word in enumerate(words):
            if word in switches and not any(map(_says_bool, words[place + 1 : place + 2])):
                words[place] = f"{word}=True"
        return super().parse_known_args(words, namespace)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {in_one_line(message)} (--help lists the options)\n")


def _says_bool(word):
    try:
        str2bool(word)
    except argparse.ArgumentTypeError:
        return False
    return True


def answer_early(name, build_parser=None):
    """Called above a script's slow imports: --help and misspelt options are answered before them.

    name: the caller's __name__; nothing happens unless the script is being run. build_parser: None where the parser
    itself needs these imports. On a terminal `LOADING` is shown until run_script, because imports take seconds.
    """
    if name == "__main__":
        if build_parser:
            build_parser().parse_args()
        _on_terminal(LOADING)


@contextlib.contextmanager
def loading():
    """While it lasts, `LOADING` is shown on a terminal; for what takes seconds and has no progress bar."""
    _on_terminal(LOADING)
    try:
        yield
    finally:
        _on_terminal(ERASED)


def _on_terminal(text):
    if sys.stderr.isatty() and is_main():
        print(text, end="", file=sys.stderr, flush=True)


def parse_options(build_parser, argv=None, read_config=None):
    """Default < `--config file.yml` < command line, each value checked by its option's own type.

    build_parser: a function returning a Parser; read_config: path -> dict, for scripts that have a --config option.
    Returns (options, given): the resolved Namespace and the set of names the user gave, in the file or in argv.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    options = build_parser().parse_args(argv)
    known, tokens = vars(options), []
    if known.get("config"):
        settings = read_config(options.config)
        if unknown := sorted(str(key) for key in settings.keys() - known.keys()):
            raise ValueError(
                f"{options.config}: unknown options {', '.join(unknown)}; expected some of {', '.join(sorted(known))}"
            )
        tokens = [f"--{key}={value}" for key, value in settings.items() if value is not None and key != "config"]
        _parse(build_parser, tokens, options.config)
    unset = object()  # a value that no default replaces
    explicit = build_parser().parse_args(tokens + argv, argparse.Namespace(**dict.fromkeys(known, unset)))
    given = {name for name, value in vars(explicit).items() if value is not unset}
    return build_parser().parse_args(tokens + argv), given


def check_config(build_parser, config, source):
    """A run's config.yml with each option read again by its own type; a wrong value ends in one line, status 2."""
    defaults = {action.dest: action.default for action in build_parser()._actions if action.nargs != 0}  # not --help
    unset = {key for key, default in defaults.items() if default is None and config.get(key) is None}
    given = {key: config[key] for key in defaults.keys() & config.keys() - unset}
    found = _parse(build_parser, [f"--{key}={value}" for key, value in given.items()], source)
    return {**config, **{key: getattr(found, key) for key in given}}


def _parse(build_parser, tokens, source):
    parser = build_parser()
    parser.prog += f": {source}"  # so that a wrong value names its file
    return parser.parse_args(tokens)


def listed(items, most=5):
    """["a", "b", ...] -> "a, b, c and 4 more": at most `most` items of a list for a message."""
    text = ", ".join(map(str, items[:most]))
    return f"{text} and {len(items) - most} more" if len(items) > most else text


def in_one_line(error):
    """An error's message as one line of printable characters, not longer than a screen.

    For an error that a loader process passed on, it is the message in the last line of the traceback.
    """
    message = str(error).strip()
    if " in DataLoader worker process " in message.split("\n", 1)[0]:
        message = message.rsplit("\n", 1)[-1].partition(": ")[2]
    line = "".join(c if c.isprintable() else "?" for c in " ".join(message.split())) or type(error).__name__
    return line if len(line) <= MAX_MESSAGE else f"{line[: MAX_MESSAGE - 4]} ..."


class Terminated(KeyboardInterrupt):
    """SIGTERM, as a cluster that wants its machine back sends it; scripts unwind as at Ctrl-C."""


def _terminate(signum, frame):
    raise Terminated


class Stops:
    """A block that defers Ctrl-C and SIGTERM: `with Stops() as stops: ... stops.check()`; check raises their exception.

    Raised between any two lines, it could be swallowed (by a library's destructor) or interrupt the writing of a file.
    A second signal takes effect at once. A signal that is ignored (as in a shell's background job) stays ignored.
    """

    KINDS = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}
    asked = None

    def __enter__(self):
        self.before = {}
        # only the main thread may set handlers; and under torchrun a process could wait for one that has ended
        if threading.current_thread() is threading.main_thread() and launched() == 1:
            for number in self.KINDS:
                if signal.getsignal(number) != signal.SIG_IGN:
                    self.before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number, frame):
        if self.asked:
            raise self.asked
        self.asked = self.KINDS[number]

    def check(self, *_):
        if self.asked:
            raise self.asked

    def __exit__(self, kind, error, trace):
        for number, handler in self.before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        if kind is None or issubclass(kind, RuntimeError):  # such as of loader processes that got the signal, too
            self.check()


def warn(text):
    """One line on stderr, which begins with the script's name."""
    print(f"{Path(sys.argv[0]).name}: warning: {text}", file=sys.stderr)


def run_script(main):
    """Run a script's main and exit: a user's mistake (ValueError, OSError) is one line on stderr and status 2.

    So is a lack of memory. Ctrl-C is status 130, SIGTERM 143. With DEBUG=1 in the environment the traceback is shown.
    """
    _on_terminal(ERASED)  # of answer_early
    for stream in (sys.stdout, sys.stderr):  # names that the console cannot show, as on Windows, end no script
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if os.environ.get("DEBUG"):
        sys.exit(main())
    name = Path(sys.argv[0]).name
    if is_main():
        signal.signal(signal.SIGTERM, _terminate)
    else:  # torchrun's other processes just end, but for what they do in `interruptible`
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        sys.exit(main())
    except KeyboardInterrupt as stop:
        if is_main():
            print(f"\n{name}: stopped", file=sys.stderr)
        sys.exit(143 if isinstance(stop, Terminated) else 130)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError):
            error = lack_of_memory(error)
        if is_main():  # torchrun's SIGTERM after another failure must not interrupt the message
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print(f"{name}: error: {in_one_line(error)}", file=sys.stderr)
        sys.exit(2)


@contextlib.contextmanager
def interruptible():
    """A block in which Ctrl-C and SIGTERM raise KeyboardInterrupt, in all of torchrun's processes."""
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: _terminate}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def lack_of_memory(error):
    """What to say of torch's RuntimeError when memory ran out; any other is our own mistake and is raised again."""
    # torch is not imported here to name its class; Apple's GPU has none
    if type(error).__name__ == "OutOfMemoryError" or str(error).startswith("MPS backend out of memory"):
        device = "GPU"
    elif "DefaultCPUAllocator" in str(error):
        device = "main"
    else:
        raise error
    return f"not enough {device} memory; use a smaller --batch_size or image"
