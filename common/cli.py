"""The command line of every script: options with bounds, a settings file beneath them, errors in one line.

from cli import Parser, Stops, number, parse_options, run_script
"""

import argparse
import math
import os
import signal
import sys
import threading
from pathlib import Path

from common.distributed import is_main, launched, speak_in_turn

MAX_MESSAGE = 4000  # characters: a message may name some twenty ids


def number(kind, low=-math.inf, high=math.inf):
    """An argparse type: an int or a float (`kind`) within [low, high]; NaN and infinity are refused."""

    def parse(text):
        try:
            value = kind(text)
        except (ValueError, OverflowError):
            value = math.nan
        if not (math.isfinite(value) and low <= value <= high):
            bounds = f" from {low}" * (low > -math.inf) + f" up to {high}" * (high < math.inf)
            raise argparse.ArgumentTypeError(f"{text!r} is no {'integer' if kind is int else 'number'}{bounds}")
        return value

    parse.kind, parse.low, parse.high = kind, low, high
    return parse


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line and whose options cannot be abbreviated."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message):
        speak_in_turn()
        self.exit(2, f"{self.prog}: error: {in_one_line(message)} (--help lists the options)\n")


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
    """The options in a run's config.yml, each read again by its option's own type -> config; else one line and exit.

    ValueError for a switch (store_true) that is neither true nor false and for an option without its value.
    """
    parser = build_parser()
    options = {action.dest: action for action in parser._actions if action.dest in config}
    switches = {key for key, action in options.items() if action.nargs == 0}
    wrong = [key for key in switches if not isinstance(config[key], bool)]
    wrong += [key for key in options if config[key] is None and parser.get_default(key) is not None]
    if wrong:
        raise ValueError(f"{source} is damaged: {', '.join(f'{key} is {config[key]!r}' for key in sorted(wrong))}")
    given = {key: config[key] for key in options.keys() - switches if config[key] is not None}
    found = _parse(build_parser, [f"--{key}={value}" for key, value in given.items()], source)
    return {**config, **{key: getattr(found, key) for key in given}}


def _parse(build_parser, tokens, source):
    parser = build_parser()
    parser.prog += f": {source}"  # so that a wrong value names its file
    return parser.parse_args(tokens)


def in_one_line(error):
    """An error's message as one line of printable characters, not longer than a screen.

    Of an error that a loader's process passed on, it is its traceback's last line.
    """
    message = str(error).strip()
    if " in DataLoader worker process " in message.split("\n", 1)[0]:
        message = message.rsplit("\n", 1)[-1].partition(": ")[2]
    line = "".join(c if c.isprintable() else "?" for c in " ".join(message.split())) or type(error).__name__
    return line if len(line) <= MAX_MESSAGE else f"{line[: MAX_MESSAGE - 4]} ..."


def listed(items, most=5):
    """The first `most` items as text, and how many more there are."""
    names = [str(item) for item in items]
    text = ", ".join(names[:most])
    return f"{text} and {len(names) - most} more" if len(names) > most else text


class Terminated(KeyboardInterrupt):
    """SIGTERM, as a cluster that wants its machine back sends it; scripts unwind as at Ctrl-C."""


def _terminate(signum, frame):
    raise Terminated


class Stops:
    """Within it Ctrl-C and SIGTERM wait: `with Stops() as stops: ... stops.check()`; check raises what was asked for.

    An exception between any two lines can be swallowed (by a library's destructor) or come while a file is written.
    The second signal does not wait. A signal that is ignored (a shell's background job) stays so.
    """

    KINDS = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}
    asked = None

    def __enter__(self):
        self.before = {}
        # no other thread may set handlers; and who waits for torchrun's other processes may wait for one that has ended
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


def run_script(main):
    """Run a script's main and exit: a user's mistake (ValueError, OSError) is one line on stderr and status 2.

    So is memory that does not suffice. Ctrl-C is status 130, SIGTERM 143. With DEBUG=1 in the environment the traceback
    is shown instead. Of torchrun's processes only the main one speaks of being stopped.
    """
    if os.environ.get("DEBUG"):
        sys.exit(main())
    name = Path(sys.argv[0]).name
    if is_main():
        signal.signal(signal.SIGTERM, _terminate)
    else:  # it writes no files: let it end even where it waits for the others inside a library
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        sys.exit(main())
    except KeyboardInterrupt as stop:
        print(f"\n{name}: stopped", file=sys.stderr)
        sys.exit(143 if isinstance(stop, Terminated) else 130)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError):  # only memory is the user's: torch is not imported here to name its class
            of_gpu = type(error).__name__ == "OutOfMemoryError"
            if not of_gpu and "DefaultCPUAllocator" not in str(error):
                raise
            error = (
                f"the {'GPU' if of_gpu else 'machine'}'s memory does not suffice; take a smaller --batch_size or image"
            )
        if is_main():  # torchrun's SIGTERM, as another process fails too, shall not interrupt the message
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        speak_in_turn()
        print(f"{name}: error: {in_one_line(error)}", file=sys.stderr)
        sys.exit(2)
