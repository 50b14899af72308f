"""What the tests of hostile files share: damaging bytes, judging a call, and a folder to do it in.

from fuzzing import broken, fuzz, judge
"""

import contextlib
import io
import itertools
import os
import random
import re
import resource
import signal
import warnings
from pathlib import Path

from common.cli import MAX_MESSAGE, in_one_line

# What the C libraries in OpenCV and Pillow say of a broken file by themselves.
CODEC = re.compile(
    r"libpng (warning|error): |Corrupt JPEG data: |Warning: |tempfile\.tif: |JPEGLib: "
    r"|_?TIFF\w+: |\w+(Decode|Setup)\w*: |\w+: .*\bTIFF\b"
)
LIMIT_SECONDS, LIMIT_BYTES = 60, 3 * 2**30
OWN = {"free", "inputs", "models", "outputs"}  # folders of the sandbox that a reader may write to


# ---------------------------------------------------------------- mutations of bytes


def mutated(data, rng, others=()):
    """The bytes with one to four random damages. others: files of other kinds, whose beginnings may be put in front."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        kind = rng.randrange(9)
        start = rng.randrange(len(data) + 1) if rng.random() < 0.5 else rng.randrange(min(len(data), 64) + 1)
        length = rng.choice((1, 2, 4, 16, 200))
        end = start + length
        if kind == 0:
            for place in range(start, min(end, len(data))):
                data[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[start:]
        elif kind == 2:
            del data[start:end]
        elif kind == 3:
            data[start:start] = rng.randbytes(length)
        elif kind == 4:
            data[start:end] = bytes(len(data[start:end]))
        elif kind == 5:
            data[start:start] = data[start:end]
        elif kind == 6:
            data[start : start + 4] = rng.choice((b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x00\x00\x00\x80"))
        elif kind == 7 and others:
            data[: rng.choice((4, 8, 40))] = rng.choice(others)[: rng.choice((4, 8, 40))]
        else:
            data[start:end] = rng.randbytes(length)
    return bytes(data)


# ---------------------------------------------------------------- judging a call


class Hang(BaseException):
    pass


def _hang(signum, frame):
    raise Hang


@contextlib.contextmanager
def limits():
    """At most LIMIT_SECONDS, and LIMIT_BYTES more than the process has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else None
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, _hang)
    if pages:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + LIMIT_BYTES, hard))
    signal.setitimer(signal.ITIMER_REAL, LIMIT_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def judge(call, *arguments):
    """'refused' or 'accepted', and in judge.line what the refusal said; any other end raises AssertionError."""
    said, judge.line = io.StringIO(), ""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            with limits(), contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
                call(*arguments)
            verdict = "accepted"
        except (ValueError, OSError) as error:
            line = judge.line = in_one_line(error)
            assert 10 < len(line) <= MAX_MESSAGE and "Traceback" not in line, line
            verdict = "refused"
        except SystemExit as stop:
            judge.line = said.getvalue()
            assert stop.code == 2 and judge.line.count("\n") == 1, judge.line
            verdict = "refused"
    assert not heard, [str(warning.message) for warning in heard]
    return verdict


def tree(folder):
    return {path for path in folder.rglob("*") if not OWN & set(path.relative_to(folder).parts)}


def fuzz(reader, cases, call, folder, capfd):
    """Judge call(case) for each of cases, [(name, argument)]; -> {"refused": n, "accepted": n}.

    Nothing may appear under folder, but in places named `free`, nor anything on the screen.
    """
    counts, before = {"refused": 0, "accepted": 0}, tree(folder)
    capfd.readouterr()
    for name, case in cases:
        try:
            counts[judge(call, case)] += 1
            if new := tree(folder) - before:
                raise AssertionError(f"written: {sorted(map(str, new))[:5]}")
        except BaseException as error:
            raise AssertionError(f"{reader}, {name}: {type(error).__name__}: {error}") from error
    printed = capfd.readouterr()
    said = [line for line in printed.err.split("\n") if line and not CODEC.match(line)]
    assert not printed.out and not said, f"{reader} lets a library print: {printed.out} {said}"
    total = sum(counts.values())
    with capfd.disabled():
        print(f"\n{reader}: {total} mutations, {counts['refused']} refused, {counts['accepted']} accepted", end="")
    assert not (folder / "pwned").exists() and not Path("pwned").exists()
    return counts


def broken(bases, count, seed, others=()):
    """count cases: each of bases, {name: bytes}, in turn, damaged."""
    rng = random.Random(seed)
    for number, (name, data) in zip(range(count), itertools.cycle(bases.items())):
        yield f"{name} {number}", mutated(data, rng, others)


class Trap:
    """A pickle that makes a folder when it is opened."""

    def __reduce__(self):
        return (os.mkdir, ("pwned",))
