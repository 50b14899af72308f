"""Processes that take turns: each builds one thing to measure and does one step of it when it is told to.

    tasks = {"plain": {"kind": "train", "plain": True}, "fast": {"kind": "train", "plain": False}}
    with workers(options, tasks) as started:
        seconds = in_turns(started, rounds=5)   # {"plain": median seconds of a step, "fast": ...}
        peak = started["fast"].close()          # bytes

A process of its own shows how much memory a way needs, and taking turns is fair on a machine whose speed changes.
benchmark.py starts `python -m tools.workers TASK`. The task, the answers and what they hold are JSON, one line each.
"""

import contextlib
import io
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

from common.cli import run_script
from tools.steps import WORKERS

# ---------------------------------------------------------------- in the process that measures


class Worker:
    """A process that does a step of one of steps.WORKERS whenever it is called.

    task: "kind", the name in WORKERS, and what that worker reads. Device, threads, clock and data set come from the
    options of benchmark.py. Attributes: about (what the worker reports once it is ready) and result (of its last step).
    """

    def __init__(self, options, task):
        common = {"device": options.device, "threads": options.threads, "clock": options.clock}
        task = {**common, "dataset": options.dataset, **task}
        self.clock = "wall" if task["kind"] == "preprocess" else options.clock  # more threads do no less work
        settings = {"OMP_NUM_THREADS": str(options.threads), "PYTHONPATH": str(Path(__file__).parents[1])}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tools.workers", json.dumps(task)],
            env={**os.environ, **settings},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.about = self.result = None

    def answer(self):
        """The next line that the process writes. ValueError when it has ended instead."""
        line = self.process.stdout.readline()
        if not line:
            raise ValueError(f"a worker process ended with status {self.process.wait()}; its message is printed above")
        return json.loads(line)

    def wait_until_ready(self):
        self.about = self.answer()

    def __call__(self):
        """Do a step -> its seconds, as the worker measures them."""
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        answer = self.answer()
        self.result = answer["result"]
        return answer[self.clock]

    def close(self):
        """End the process -> bytes: its peak memory, or that of its tensors on a GPU; None where that is unknown."""
        self.process.stdin.close()
        return self.answer()

    def kill(self):
        """End the process, if it still runs, and close its pipes."""
        with self.process:
            self.process.kill()


@contextlib.contextmanager
def workers(options, tasks):
    """{name: task} -> {name: Worker}, all of them ready; none is left running."""
    started = {}
    try:
        for name, task in tasks.items():
            started[name] = Worker(options, task)
        for worker in started.values():
            worker.wait_until_ready()
        yield started
    finally:
        for worker in started.values():
            worker.kill()


def in_turns(steps, rounds):
    """{name: function that returns seconds} -> {name: median seconds}. One more round comes first, to warm up."""
    seconds = {name: [] for name in steps}
    for k in range(rounds + 1):
        for name, step in steps.items():
            seconds[name].append(step())
        times = ", ".join(f"{name} {times[-1]:.3g} s" for name, times in seconds.items())
        print(f"round {k}: {times}", file=sys.stderr, flush=True)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


# ---------------------------------------------------------------- in the worker's process


def peak_memory():
    """Bytes: the most that this process has used, or its tensors on a GPU; None where that is unknown."""
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    if Path("/proc/self/status").is_file():  # Linux, whose ru_maxrss begins with the peak of the parent process
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main():
    """Build what the task says, do a step for each line of standard input, and at its end tell the peak memory."""
    task, output = json.loads(sys.argv[1]), sys.stdout

    def say(answer):
        print(json.dumps(answer), file=output, flush=True)

    with contextlib.redirect_stdout(sys.stderr if os.environ.get("DEBUG") else io.StringIO()):
        step, about = WORKERS[task["kind"]](task)
        say(about)
        for _ in sys.stdin:
            wall, cpu = time.perf_counter(), time.process_time()
            result = step()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            say({"result": result, "wall": wall, "cpu": cpu})
        say(peak_memory())


if __name__ == "__main__":
    run_script(main)
