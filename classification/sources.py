"""Where the transfer job's pictures come from: a download, a zip that is there already, or a generator.

from classification.sources import provide_data

provide_data("inputs/two_classes", demo=True)     # two_classes/{train,val}/{ants,bees}/*.png
"""

from pathlib import Path

from common import download
from common.files import new_folder
from common.images import write_png
from common.synthetic import two_classes
from data_folder import INPUTS

DATA_URL = "https://download.pytorch.org/tutorial/hymenoptera_data.zip"
DATA_SHA256 = "fbc41b31d544714d18dd1230b1e2b455e1557766e13e67f9f5a7a23af7c02209"


def provide_data(data_dir, fetched=False, raw=None, demo=False):
    """Make sure that data_dir exists: download it, unpack the zip `raw`, or generate it.

    FileNotFoundError, which names the three options, when none was asked for and it is missing.
    """
    data_dir = Path(data_dir)
    if raw:
        download.safe_extract(raw, data_dir)
    elif fetched and not data_dir.exists():
        archive = INPUTS / Path(DATA_URL).name
        if not archive.is_file():
            download.fetch(DATA_URL, archive, sha256=DATA_SHA256)
        download.safe_extract(archive, data_dir)
    elif demo and not data_dir.exists():
        write_demo(data_dir)
    elif not data_dir.is_dir():
        raise FileNotFoundError(
            f"{data_dir}: no such folder; --download fetches the ants and bees, --raw ZIP unpacks a zip that you have, "
            "--demo trains on generated pictures"
        )


def write_demo(output, counts=(("train", 60), ("val", 20)), size=96):
    """Generated ants and bees as <output>/{train,val}/{ants,bees}/*.png, in place only when all are written."""
    seed = 0
    with new_folder(output) as folder:
        for part, count in counts:
            for label in ("ants", "bees"):
                target = folder / part / label
                target.mkdir(parents=True)
                for index in range(count):
                    write_png(target / f"{index:03d}.png", two_classes(seed, label, size))
                    seed += 1
