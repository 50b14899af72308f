"""The command line of every script: options with bounds, a settings file beneath them, errors in one line.

from cli import Parser, number, parse_options, run_script
"""

import argparse
import math
import os
import signal
import sys
from pathlib import Path

from distributed import is_main, speak_in_turn


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

    return parse


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line and whose options cannot be abbreviated."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message):
        speak_in_turn()
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")


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
        of_file = build_parser()
        of_file.prog += f": {options.config}"  # so that a wrong value names its file
        of_file.parse_args(tokens)
    unset = object()  # a value that no default replaces
    explicit = build_parser().parse_args(tokens + argv, argparse.Namespace(**dict.fromkeys(known, unset)))
    given = {name for name, value in vars(explicit).items() if value is not unset}
    return build_parser().parse_args(tokens + argv), given


class Terminated(KeyboardInterrupt):
    """SIGTERM, as a cluster that wants its machine back sends it; scripts unwind as at Ctrl-C."""


def _terminate(signum, frame):
    raise Terminated


def run_script(main):
    """Run a script's main and exit: a user's mistake (ValueError, OSError) is one line on stderr and status 2.

    So is a GPU's or the machine's memory that does not suffice. Ctrl-C is status 130, SIGTERM 143. With DEBUG=1 in the
    environment the traceback is shown instead. Of torchrun's processes only the main one speaks of being stopped.
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
            if type(error).__name__ != "OutOfMemoryError":
                raise
            error = "the GPU's memory does not suffice; take a smaller --batch_size or image"
        if is_main():  # torchrun's SIGTERM, as another process fails too, shall not interrupt the message
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        message = " ".join(str(error).split()) or type(error).__name__
        speak_in_turn()
        print(f"{name}: error: {message}", file=sys.stderr)
        sys.exit(2)
