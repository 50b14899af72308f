"""benchmark.py runs what it measures: here on a handful of pictures, where only the form of the answer counts."""

import re

import numpy as np
from conftest import run_script

from images import write_png


def test_the_transfer_rows(tmp_path):
    rng = np.random.default_rng(0)
    for part, count in (("train", 4), ("val", 2)):
        for label in ("ants", "bees"):
            folder = tmp_path / "pictures" / part / label
            folder.mkdir(parents=True)
            for k in range(count):
                write_png(folder / f"{k}.png", rng.integers(0, 256, (64, 64, 3), np.uint8))
    result = run_script("benchmark.py", "--only", "transfer", "--rounds", 1, "--data_dir", "pictures", cwd=tmp_path)
    rows = re.findall(r"^(.*\S) +[\d.]+ s an epoch +([\d.]+) of the plain loop$", result.stdout, re.MULTILINE)
    assert [name for name, _ in rows][0] == "plain loop" and len(rows) == 4 and float(rows[0][1]) == 1
