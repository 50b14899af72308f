"""preprocess_dsb2018.py on a tiny generated stage1_train: every shape it comes in, every way it is damaged.

PYTHONPATH=. python tests/test_preprocess.py stage1_train.zip      # the table of resampling rules in its docstring
"""

import http.server
import io
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from conftest import mounted, serving

import preprocess_dsb2018 as preprocess
from common import download
from common.images import squeeze, squeeze_mask
from common.synthetic import generate_nuclei

SCRIPT = Path(__file__).parents[1] / "preprocess_dsb2018.py"
IDS = ["a1", "b2", "c3"]


def png(array):
    """RGB, RGBA or grey -> the bytes of a PNG."""
    if array.ndim == 3:
        array = cv2.cvtColor(array, cv2.COLOR_RGBA2BGRA if array.shape[2] == 4 else cv2.COLOR_RGB2BGR)
    return cv2.imencode(".png", array)[1].tobytes()


def field(number):
    """(48, 64, 4) uint8 RGBA image and three (48, 64) uint8 masks that overlap."""
    rng = np.random.default_rng(number)
    image = np.dstack([rng.integers(0, 256, (48, 64, 3), np.uint8), np.full((48, 64), 255, np.uint8)])
    masks = np.zeros((3, 48, 64), np.uint8)
    for mask in masks:
        y, x = rng.integers(0, 40, 2)
        mask[y : y + rng.integers(3, 20), x : x + rng.integers(3, 20)] = 255
    return image, masks


def stage1_files():
    """{name in stage1_train: bytes}"""
    files = {}
    for number, img_id in enumerate(IDS):
        image, masks = field(number)
        files[f"{img_id}/images/{img_id}.png"] = png(image)
        files |= {f"{img_id}/masks/m{k}.png": png(mask) for k, mask in enumerate(masks)}
    return files


def write_tree(folder, files):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def zipped(files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run("--raw", path, ...) in tmp_path -> (data set's folder, standard output). Errors are raised."""
    monkeypatch.chdir(tmp_path)

    def call(*options, output="inputs/dsb2018_16"):
        size = [] if "--img_size" in options else ["--img_size", "16"]
        monkeypatch.setattr(sys, "argv", ["preprocess_dsb2018.py", *map(str, options), *size])
        preprocess.main()
        return tmp_path / output, capsys.readouterr().out

    return call


@pytest.fixture
def raw(tmp_path):
    write_tree(tmp_path / "raw", stage1_files())
    return tmp_path / "raw"


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.png")}


def hidden(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def slow_coverage(union, size):
    """The area average, pixel by pixel: how much of each small pixel the union covers."""
    height, width = union.shape
    shares = []
    for side in (height, width):
        edges = np.linspace(0, side, size + 1)
        share = [[max(0, min(edges[i + 1], p + 1) - max(edges[i], p)) for p in range(side)] for i in range(size)]
        shares.append(np.array(share) * size / side)
    return shares[0] @ union.astype(float) @ shares[1].T


# ---------------------------------------------------------------- what is written


def test_images_and_masks_by_an_independent_way(run, raw):
    folder, out = run("--raw", raw)
    assert sorted(content(folder)) == [f"{kind}/{i}.png" for kind in ("images", "masks/0") for i in IDS]
    fractions = []
    for number, img_id in enumerate(IDS):
        image, masks = field(number)
        small = cv2.imread(str(folder / "images" / f"{img_id}.png"), cv2.IMREAD_UNCHANGED)[..., ::-1]
        expected = np.stack([slow_coverage(image[..., k], 16) for k in range(3)], 2)
        assert small.shape == (16, 16, 3) and np.abs(small - expected).max() <= 1.01
        mask = cv2.imread(str(folder / "masks" / "0" / f"{img_id}.png"), cv2.IMREAD_UNCHANGED)
        coverage = slow_coverage(masks.max(0) > 0, 16)
        assert mask.shape == (16, 16) and mask.dtype == np.uint8 and set(np.unique(mask)) == {0, 255}
        assert abs((mask > 0).sum() - coverage.sum()) <= 0.5 + 1e-6
        assert coverage[mask > 0].min() >= coverage[mask == 0].max() - 1e-4
        fractions.append((mask > 0).mean())
    described = yaml.safe_load((folder / "dataset.yml").read_text())
    assert described == {
        "source": str(raw),
        "img_size": 16,
        "images": 3,
        "masks": 9,
        "foreground": pytest.approx(np.mean(fractions), abs=1e-6),
        "foreground_full_size": pytest.approx(np.mean(fractions), abs=1 / 512),
        "scale": pytest.approx(16 / (48 * 64) ** 0.5, abs=1e-6),
        "skipped": {},
    }
    assert (
        f"3 images from 9 masks, 0 skipped, foreground {np.mean(fractions):.2%}" in out and "inputs/dsb2018_16" in out
    )


@pytest.mark.parametrize("size", [8, 50, 56, 100])
def test_enlarging_and_mixed_sides(run, raw, size):
    folder, _ = run("--raw", raw, "--img_size", size, output=f"inputs/dsb2018_{size}")
    for number, img_id in enumerate(IDS):
        mask = cv2.imread(str(folder / "masks" / "0" / f"{img_id}.png"), cv2.IMREAD_UNCHANGED)
        assert mask.shape == (size, size) and set(np.unique(mask)) <= {0, 255}
        assert (mask > 0).mean() == pytest.approx((field(number)[1].max(0) > 0).mean(), abs=0.01)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 200), (96, 96)])
def test_squeezing_any_shape(shape):
    assert squeeze(np.full((*shape, 3), 77, np.uint8), (96, 96)).tolist() == np.full((96, 96, 3), 77).tolist()
    assert squeeze_mask(np.ones(shape, bool), (96, 96)).all()
    assert not squeeze_mask(np.zeros(shape, bool), (96, 96)).any()


def test_equal_coverage_goes_to_the_better_surrounded_pixel():
    union = np.zeros((8, 8), bool)
    union[0:2, 0:2] = union[2:4, 0:2] = True  # two whole small pixels in the first column
    union[4, 0:2] = union[0, 6:8] = True  # two half ones, sum 3: only the one beside the others is taken
    assert np.argwhere(squeeze_mask(union, (4, 4))).tolist() == [[0, 0], [1, 0], [2, 0]]


def rules(size):
    """The usual ways to shrink a mask, and the one used here."""
    return {
        "nearest neighbour": lambda u: (
            cv2.resize(u.astype(np.uint8), (size, size), interpolation=cv2.INTER_NEAREST) > 0
        ),
        "area average >= 0.5": lambda u: squeeze(u.astype(np.float32), (size, size)) >= 0.5,
        "linear (cv2.resize) > 0.5": lambda u: cv2.resize(u.astype(np.float32), (size, size)) > 0.5,
        "k most covered (used here)": lambda u: squeeze_mask(u, (size, size)),
    }


def compare_rules(unions, size):
    """{rule: (n, 2): error of the foreground fraction, overlap with the coverage} over (H, W) bool unions."""
    results = {rule: [] for rule in rules(size)}
    for union in unions:
        coverage = squeeze(union.astype(np.float32), (size, size)).astype(float)
        for rule, shrink in rules(size).items():
            mask = shrink(union)
            overlap = np.minimum(mask, coverage).sum() / max(np.maximum(mask, coverage).sum(), 1e-9)
            results[rule].append((mask.mean() - union.mean(), overlap))
    return {rule: np.array(values) for rule, values in results.items()}


def test_the_rule_keeps_the_fraction_better_than_the_usual_ones():
    compared = compare_rules([generate_nuclei(seed)[1] > 0 for seed in range(12)], 96)
    *others, ours = ((np.abs(values[:, 0]).mean(), values[:, 1].mean()) for values in compared.values())
    assert np.abs(compared["k most covered (used here)"][:, 0]).max() <= 0.5 / 96**2 + 1e-7
    assert all(ours[0] < error / 5 and ours[1] > overlap - 0.002 for error, overlap in others)


# ---------------------------------------------------------------- the shapes that raw data comes in


def layouts(tmp_path):
    files = stage1_files()
    led = {f"stage1_train/{name}": data for name, data in files.items()}
    test = {f"stage1_test/{name}": data for name, data in files.items()}
    yield "parent", lambda path: write_tree(path, led | test | {"stage1_train_labels.csv": b"x"})
    yield "twice", lambda path: write_tree(path, {f"stage1_train/{name}": data for name, data in led.items()})
    yield "folder with the zip", lambda path: write_tree(path, {"stage1_train.zip": zipped(files)})
    yield "top.zip", lambda path: path.write_bytes(zipped(files))
    yield "led.zip", lambda path: path.write_bytes(zipped(led | test))
    junk = {f"__MACOSX/{name.replace('/m', '/._m')}": b"x" for name in files} | {"a1/masks/.DS_Store": b"x"}
    yield "mac.zip", lambda path: path.write_bytes(zipped(files | junk | {"a1/masks/": b""}))
    yield "windows.zip", lambda path: path.write_bytes(zipped({n.replace("/", "\\"): d for n, d in files.items()}))
    inner = {"stage1_test.zip": zipped(test), "stage1_train.zip": zipped(files), "stage1_train_labels.csv": b"x"}
    yield "kaggle.zip", lambda path: path.write_bytes(zipped(inner))


def test_every_layout_gives_the_same_data_set(run, raw, tmp_path):
    expected = content(run("--raw", raw)[0])
    for name, write in layouts(tmp_path):
        write(tmp_path / name)
        folder, _ = run("--raw", tmp_path / name, "--output", f"out {name}", output=f"out {name}")
        assert content(folder) == expected, name


def test_the_default_place_is_a_folder_or_a_zip(run, tmp_path):
    default = tmp_path / "inputs" / "data-science-bowl-2018"
    with pytest.raises(FileNotFoundError, match="--download .* --demo .* --raw"):
        run()
    assert not (tmp_path / "inputs").exists()
    write_tree(default, {"stage1_train.zip": zipped(stage1_files())})
    expected = content(run()[0])
    write_tree(default / "stage1_train", {name: data for name, data in stage1_files().items() if "a1" in name})
    folder, _ = run("--overwrite")
    assert content(folder) == {name: data for name, data in expected.items() if "a1" in name}
    (default / "stage1_train").rename(tmp_path / "elsewhere")
    (default / "stage1_train.zip").unlink()
    (default / "stage1_train").symlink_to(tmp_path / "elsewhere")
    assert len(content(run("--overwrite")[0])) == 2


@pytest.mark.parametrize(
    "data, message",
    [
        (None, "no such file or folder"),
        (b"", "not a complete zip"),
        (b"text", "not a complete zip"),
        (zipped(stage1_files())[:3000], "not a complete zip"),
        (zipped({"readme.txt": b"x"}), "expected <id>/images"),
        (zipped({"stage1_train.zip": b"broken"}), "stage1_train.zip in .* is not a complete zip"),
        (zipped({f"{part}/a/images/a.png": b"x" for part in ("x", "y")}), "several sets of images"),
    ],
)
def test_raw_data_that_is_none(run, tmp_path, data, message):
    if data is not None:
        (tmp_path / "raw.zip").write_bytes(data)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run("--raw", tmp_path / "raw.zip")
    assert not (tmp_path / "inputs").exists()


def test_an_empty_folder_is_no_raw_data(run, tmp_path):
    (tmp_path / "raw").mkdir()
    with pytest.raises(ValueError, match="expected <id>/images"):
        run("--raw", tmp_path / "raw")


# ---------------------------------------------------------------- single images


def test_damaged_images_are_skipped_with_their_reason(run, tmp_path):
    files = stage1_files()
    good, masks = files["a1/images/a1.png"], files["a1/masks/m0.png"]
    damage = {
        "corrupt": {"images/x.png": good[: len(good) // 2], "masks/m.png": masks},
        "empty": {"images/x.png": b"", "masks/m.png": masks},
        "noimage": {"masks/m.png": masks},
        "twoimages": {"images/x.png": good, "images/y.png": good, "masks/m.png": masks},
        "nomasks": {"images/x.png": good},
        "badmask": {"images/x.png": good, "masks/good.png": masks, "masks/m.png": b"no png"},
        "othershape": {"images/x.png": good, "masks/m.png": png(np.zeros((64, 48), np.uint8))},
    }
    reasons = {
        "corrupt": "images/x.png: unreadable",
        "empty": "images/x.png: unreadable",
        "noimage": "no image files, expected 1",
        "twoimages": "2 image files, expected 1",
        "nomasks": "no masks",
        "badmask": "masks/m.png: unreadable",
        "othershape": "masks/m.png has 48x64 pixels, its image 64x48",
    }
    for img_id, parts in damage.items():
        files |= {f"{img_id}/{name}": data for name, data in parts.items()}
    write_tree(tmp_path / "raw", files)
    (tmp_path / "raw.zip").write_bytes(zipped(files))
    for raw in ("raw", "raw.zip"):
        folder, out = run("--raw", tmp_path / raw, "--overwrite")
        assert sorted(path.stem for path in (folder / "images").iterdir()) == IDS
        skipped = yaml.safe_load((folder / "dataset.yml").read_text())["skipped"]
        assert skipped.keys() == reasons.keys()
        for img_id, reason in reasons.items():
            assert reason in skipped[img_id]
            assert f"skipped {img_id}: {skipped[img_id]}\n" in out
        assert "3 images from 9 masks, 7 skipped" in out


def test_a_wrong_crc_in_the_zip_is_a_skipped_image(run, tmp_path):
    with zipfile.ZipFile(tmp_path / "raw.zip", "w") as archive:
        for name, data in stage1_files().items():
            archive.writestr(name, data)
        offset = archive.getinfo("b2/images/b2.png").header_offset + 200
    data = bytearray((tmp_path / "raw.zip").read_bytes())
    data[offset] ^= 1
    (tmp_path / "raw.zip").write_bytes(data)
    folder, out = run("--raw", tmp_path / "raw.zip")
    assert "skipped b2: cannot be read: Bad CRC-32" in out and "2 images from 6 masks" in out


def test_nothing_left_is_an_error_and_leaves_nothing(run, tmp_path):
    write_tree(tmp_path / "raw", {"a/images/a.png": b"", "b/masks/b.png": b""})
    with pytest.raises(ValueError, match="none of 2 images can be used; the first, a: no masks"):
        run("--raw", tmp_path / "raw")
    assert list((tmp_path / "inputs").iterdir()) == []


def saved(image, mode):
    image_module = pytest.importorskip("PIL.Image")
    buffer = io.BytesIO()
    image_module.fromarray(image).convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


def test_kinds_of_png(run, tmp_path):
    """Grey, palette, one-bit, RGBA with a transparent half and 16-bit images become RGB; masks of any kind count."""
    grey = np.repeat(np.arange(0, 256, 8, dtype=np.uint8)[None], 32, 0)
    colour = np.dstack([grey, grey.T, 255 - grey])
    half = np.dstack([colour, np.where(grey < 128, 0, 255).astype(np.uint8)])
    bar = (grey > 100).astype(np.uint8)
    stretched = np.dstack([np.round(grey * (255 / 248))] * 3)  # 16 bits become 8 between their ends
    images = {
        "grey": (png(grey), np.dstack([grey] * 3)),
        "grey_alpha": (saved(grey, "LA"), np.dstack([grey] * 3)),
        "rgb": (png(colour), colour),
        "rgba": (png(half), colour),
        "palette": (saved((bar * 255), "P"), np.dstack([bar * 255] * 3)),
        "one_bit": (saved((bar * 255), "1"), np.dstack([bar * 255] * 3)),
        "full_16": (png(grey.astype(np.uint16) * 257), stretched),
        "camera_12": (png(1000 + grey.astype(np.uint16) * 8), stretched),
        "dim_16": (png(grey.astype(np.uint16)), stretched),
    }
    masks = {
        "255": png(bar * 255),
        "1": png(bar),
        "rgb": png(np.dstack([bar * 0, bar * 0, bar])),
        "palette": saved((bar * 255), "P"),
        "one_bit": saved((bar * 255), "1"),
        "16": png(bar.astype(np.uint16) * 65535),
        "alpha": png(np.dstack([bar, bar, bar, bar * 0 + 255])),
    }
    files = {f"{name}/images/{name}.png": data for name, (data, _) in images.items()}
    files |= {f"{name}/masks/m.png": masks["255"] for name in images}
    for name, data in masks.items():
        files |= {f"mask_{name}/images/x.png": images["rgb"][0], f"mask_{name}/masks/m.png": data}
    write_tree(tmp_path / "raw", files)
    folder, out = run("--raw", tmp_path / "raw", "--img_size", 32, output="inputs/dsb2018_32")
    assert "0 skipped" in out
    for name, (_, expected) in images.items():
        small = cv2.imread(str(folder / "images" / f"{name}.png"), cv2.IMREAD_UNCHANGED)[..., ::-1]
        assert np.abs(small.astype(int) - expected).max() <= 1, name
    for name in masks:
        small = cv2.imread(str(folder / "masks" / "0" / f"mask_{name}.png"), cv2.IMREAD_UNCHANGED)
        assert np.array_equal(small, bar * 255), name


# ---------------------------------------------------------------- the output folder


def test_an_existing_data_set_is_replaced_only_when_told_and_as_a_whole(run, raw, tmp_path):
    folder, _ = run("--raw", raw)
    (folder / "images" / "old.png").write_bytes(b"of an earlier run")
    with pytest.raises(FileExistsError, match="--overwrite"):
        run("--raw", raw)
    assert (folder / "images" / "old.png").exists()
    write_tree(tmp_path / "bad", {"a/images/a.png": b"x"})
    with pytest.raises(ValueError, match="none of 1 images"):
        run("--raw", tmp_path / "bad", "--overwrite")
    assert (folder / "images" / "old.png").exists()  # a run that fails takes nothing away
    run("--raw", raw, "--overwrite")
    assert not (folder / "images" / "old.png").exists() and len(content(folder)) == 6
    assert hidden(folder.parent) == []


def test_a_folder_of_something_else_is_never_replaced(run, raw, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("x")
    for output in ("home", "file", "."):
        with pytest.raises(FileExistsError, match="was not written by this script"):
            run("--raw", raw, "--output", output, "--overwrite")
    assert (tmp_path / "home" / "thesis.txt").exists()
    (tmp_path / "empty").mkdir()
    assert len(content(run("--raw", raw, "--output", "empty", output="empty")[0])) == 6


def test_a_data_set_that_appears_meanwhile_is_not_overwritten(run, raw, tmp_path, monkeypatch):
    output = tmp_path / "inputs" / "dsb2018_16"
    describe = preprocess.describe

    def slow_describe(*args):
        write_tree(output, {"dataset.yml": b"images: 1"})
        return describe(*args)

    monkeypatch.setattr(preprocess, "describe", slow_describe)
    with pytest.raises(OSError, match="exists; give --overwrite"):
        run("--raw", raw)
    assert (output / "dataset.yml").read_text() == "images: 1" and hidden(output.parent) == []


def test_a_full_disk_leaves_nothing_behind(run, raw, tmp_path):
    with mounted(tmp_path / "disk", "size=200k") as disk:
        with pytest.raises(OSError, match="disk/out was not written: No space left on device"):
            run("--raw", raw, "--img_size", 256, "--output", disk / "out")
        assert list(disk.iterdir()) == []


def test_a_read_only_disk_is_named(run, raw, tmp_path):
    with mounted(tmp_path / "disk", "ro") as disk, pytest.raises(OSError, match="disk/out was not written: Read-only"):
        run("--raw", raw, "--output", disk / "out")


def test_raw_data_that_go_while_they_are_read_replace_nothing(run, raw, tmp_path, monkeypatch):
    """An unplugged drive must not leave a data set of half the images in the place of a whole one."""
    folder, _ = run("--raw", raw)
    before, squeeze_mask = content(folder), preprocess.squeeze_mask

    def unplug(*args):
        shutil.rmtree(raw / "c3", ignore_errors=True)
        return squeeze_mask(*args)

    monkeypatch.setattr(preprocess, "squeeze_mask", unplug)
    with pytest.raises(OSError, match=r"dsb2018_16 was not written: No such file or directory \(.*c3/images/c3.png\)"):
        run("--raw", raw, "--overwrite", "--num_workers", 1)
    assert content(folder) == before and hidden(folder.parent) == []


# ---------------------------------------------------------------- download and demo


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves the files put into server.files; a path in server.cut is cut half-way, once."""
    monkeypatch.setattr(download, "RETRY_WAITS", (0, 0))

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            server.requests.append(self.path)
            if self.path not in server.files:
                return self.send_error(404)
            data = server.files[self.path]
            start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(data) - start))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            self.end_headers()
            end = len(data) // 2 if self.path in server.cut else len(data)
            server.cut.discard(self.path)
            return self.wfile.write(data[start:end])

        def log_message(self, *args):
            pass

    with serving(Handler) as server:
        server.files, server.cut, server.requests = {}, set(), []
        yield server


def stage1_of(count):
    """A zip of `count` tiny images."""
    image, mask = png(np.full((8, 8, 3), 9, np.uint8)), png(np.eye(8, dtype=np.uint8) * 255)
    files = {f"{number}/images/{number}.png": image for number in range(count)}
    return zipped(files | {f"{number}/masks/m.png": mask for number in range(count)})


def test_download_once_then_use_it(run, server, tmp_path):
    server.files["/stage1_train.zip"] = stage1_of(670)
    server.cut.add("/stage1_train.zip")
    url = f"{server.url}/stage1_train.zip"
    folder, out = run("--download", "--url", url)
    assert "670 images from 670 masks, 0 skipped" in out and len(server.requests) == 2  # cut, and resumed
    kept = tmp_path / "inputs" / "data-science-bowl-2018"
    assert [path.name for path in kept.iterdir()] == ["stage1_train.zip"]
    _, out = run("--download", "--url", url, "--overwrite")
    assert "is there already" in out and len(server.requests) == 2
    (kept / "stage1_train.zip").write_bytes(b"damaged since")
    run("--download", "--url", url, "--overwrite")
    assert len(server.requests) == 3 and (kept / "stage1_train.zip").read_bytes() == server.files["/stage1_train.zip"]


@pytest.mark.parametrize(
    "name, message",
    [
        ("missing", "answers 404"),
        ("truncated.zip", "not a complete zip"),
        ("few.zip", "holds 3 images, expected the 670"),
    ],
)
def test_downloads_that_fail_leave_nothing(run, server, tmp_path, name, message):
    server.files = {"/truncated.zip": stage1_of(670)[:20000], "/few.zip": zipped(stage1_files())}
    with pytest.raises((ValueError, OSError), match=message):
        run("--download", "--url", f"{server.url}/{name}")
    assert not [path for path in (tmp_path / "inputs").rglob("*") if path.is_file()]
    assert not (tmp_path / "inputs" / "dsb2018_16").exists()


def test_url_without_download_is_a_mistake(run):
    with pytest.raises(ValueError, match="--url is for --download"):
        run("--url", "http://localhost/x.zip")


def test_demo_is_deterministic_and_large_enough(run, monkeypatch):
    assert preprocess.DEMO_IMAGES >= 80
    monkeypatch.setattr(preprocess, "DEMO_IMAGES", 12)
    folder, out = run("--demo", output="inputs/demo_16")
    first = content(folder)
    assert len(first) == 24 and "12 images from" in out and "0 skipped" in out
    folder, _ = run("--demo", "--overwrite", "--num_workers", 1, output="inputs/demo_16")
    assert content(folder) == first


# ---------------------------------------------------------------- as a user runs it


def script(*options, cwd, **kwargs):
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *options],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kwargs,
    )


def test_the_script_ends_well_or_in_one_line(raw, tmp_path):
    process = script("--raw", str(raw), cwd=tmp_path)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, "") and out.count("\n") == 1
    process = script("--raw", str(raw), cwd=tmp_path)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 2 and out == ""
    assert err == "preprocess_dsb2018.py: error: inputs/dsb2018_96 exists; give --overwrite to replace it, " + (
        "or another --output\n"
    )


@pytest.mark.parametrize("name, status", [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_stopped_run_leaves_nothing(tmp_path, name, status):
    process = script("--demo", "--img_size", "768", cwd=tmp_path)
    while process.poll() is None and not any(tmp_path.glob("inputs/.demo_768.*/new/images/*.png")):
        time.sleep(0.02)
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=300)
    assert process.returncode == status and out == ""
    assert "stopped" in err and err.strip().count("\n") == 0
    assert list((tmp_path / "inputs").iterdir()) == []


if __name__ == "__main__":
    everything = (sample.load()[1] > 0 for sample in preprocess.find_samples(Path(sys.argv[1])).values())
    for rule, values in compare_rules(everything, 96).items():
        error, overlap = values.T
        print(f"{rule:28s}{np.abs(error).mean():.6f}   {error.mean():+.6f}   {overlap.mean():.4f}")
