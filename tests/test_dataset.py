"""dataset.py: ids and splits, what is read and what is refused; test_augmentation.py has the random streams."""

import shutil

import cv2
import numpy as np
import pytest
import tifffile
import torch
from conftest import write_data_set
from PIL import Image
from sklearn.model_selection import train_test_split

from augmentation import augmentation
from common.images import read_picture, to_channels
from data_folder import list_ids
from dataset import NAMED_AT_MOST, Dataset, build_dataset, changes, check_split, make_loader, split_ids

IDS = [f"img{number:02d}" for number in range(6)]


def open_dataset(folder, ids=IDS, num_classes=1, transform=None, **options):
    return Dataset(ids, folder / "images", folder / "masks", ".png", ".png", num_classes, transform, **options)


def write(path, array):
    """(H, W) or RGB(A) (H, W, C)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if array.ndim == 3:
        array = cv2.cvtColor(array, cv2.COLOR_RGB2BGR if array.shape[2] == 3 else cv2.COLOR_RGBA2BGRA)
    assert cv2.imwrite(str(path), array)


@pytest.fixture
def cells(tmp_path):
    """Six 8 x 12 RGB images of noise, two classes, numbers that a test can compute with -> (folder, images, masks)."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 8, 12, 3), np.uint8)
    masks = (rng.random((6, 2, 8, 12)) < 0.3).astype(np.uint8)
    for number, img_id in enumerate(IDS):
        write(tmp_path / "images" / f"{img_id}.png", images[number])
        for k in (0, 1):
            write(tmp_path / "masks" / str(k) / f"{img_id}.png", masks[number, k] * 255)
    return tmp_path, images, masks


# ---------------------------------------------------------------- ids and split


def test_ids_are_sorted_and_odd_extensions_go(tmp_path):
    for name in ("b_img.png", "a_img.png", "B.2_img.png", "a_mask.png", "notes.txt", "._a_img.png", "_img.png"):
        (tmp_path / name).write_text("")
    (tmp_path / "folder_img.png").mkdir()
    assert list_ids(tmp_path, "_img.png") == ["B.2", "a", "b"]
    assert list_ids(tmp_path, ".png") == ["B.2_img", "_img", "a_img", "a_mask", "b_img"]
    with pytest.raises(ValueError, match=r"no \*\.jpg file.*--img_ext"):
        list_ids(tmp_path, ".jpg")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        list_ids(tmp_path / "nowhere", ".png")


@pytest.mark.parametrize("count", [2, 3, 7, 670])
def test_the_split_is_scikit_learns(count):
    ids = [f"{number * 7919 % 1000:03d}" for number in range(count)]
    train, val = train_test_split(sorted(ids), test_size=0.2, random_state=41)
    assert split_ids(ids) == {"train": train, "val": val} == split_ids(ids[::-1])
    assert len(val) == -(-count // 5)
    train, val = train_test_split(sorted(ids), test_size=0.2, random_state=5)
    assert split_ids(ids, split_seed=5) == {"train": train, "val": val}


def test_one_image_cannot_be_split():
    with pytest.raises(ValueError, match="at least 2 images, found 1"):
        split_ids(["a"])


def test_a_split_of_ones_own():
    split = {"train": ["b", "a"], "val": ["c"], "test": ["d"]}
    assert check_split(split | {"fingerprint": {"train": "0f"}}, "split.yml") == split
    assert check_split({"train": ["b"], "val": ["c"], "test": []}, "split.yml") == {"train": ["b"], "val": ["c"]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"train": ["a"]}, "expected the lists"),
        ({"train": ["a"], "val": []}, "expected the lists"),
        ({"train": ["a"], "val": "b"}, "`val` must be a list"),
        ({"train": ["a", 17], "val": ["b"]}, "`train` must be a list of strings.*quotes"),
        ({"train": {"a": 1}, "val": ["b"]}, "`train` must be a list"),
        ({"train": ["a", "b"], "val": ["b"]}, "b is in train and again in val"),
        ({"train": ["a", "a"], "val": ["b"]}, "a is in train and again in train"),
        ({"train": ["a"], "val": ["b"], "test": ["a"]}, "a is in train and again in test"),
    ],
)
def test_splits_that_are_refused(content, message):
    with pytest.raises(ValueError, match=f"my.yml: {message}"):
        check_split(content, "my.yml")


# ---------------------------------------------------------------- items


def test_items_by_hand(cells):
    folder, images, masks = cells
    dataset = open_dataset(folder, num_classes=2)
    assert len(dataset) == 6
    for index in (0, 5):
        image, mask, info = dataset[index]
        assert image.dtype == mask.dtype == torch.float32 and image.shape == (3, 8, 12) and mask.shape == (2, 8, 12)
        torch.testing.assert_close(image, torch.from_numpy(images[index].transpose(2, 0, 1) / 255).float())
        assert torch.equal(mask, torch.from_numpy(masks[index]).float()) and info == {"img_id": IDS[index]}
    image = open_dataset(folder, ids=["img03"], mean=[0.1, 0.2, 0.3], std=[0.5, 1.0, 2.0])[0][0]
    expected = (images[3] / 255 - [0.1, 0.2, 0.3]) / [0.5, 1, 2]
    torch.testing.assert_close(image, torch.from_numpy(expected.transpose(2, 0, 1)).float())


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("stored", [1, 3, 4])
def test_channels(tmp_path, channels, stored):
    grey = np.full((4, 6), 40, np.uint8)  # grey in every form: what each channel must be is plain
    write(tmp_path / "images" / "a.png", grey if stored == 1 else np.dstack([grey] * 3 + [grey + 160] * (stored - 3)))
    write(tmp_path / "masks" / "0" / "a.png", grey * 0)
    dataset = open_dataset(
        tmp_path, ids=["a"], input_channels=channels, transform=augmentation("flips,mild", 4, 6, channels > 1)
    )
    alpha = {1: [], 3: [], 4: [200 if stored == 4 else 255]}[channels]
    assert dataset.arrays(0)[0].tolist() == [[[40] * min(channels, 3) + alpha] * 6] * 4
    image, mask, _ = dataset[0]
    assert image.shape == (channels, 4, 6) and mask.shape == (1, 4, 6)


def test_channels_that_do_not_exist(cells):
    with pytest.raises(ValueError, match="input_channels 2: expected 1"):
        open_dataset(cells[0], input_channels=2)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_everything_is_resized_together(tmp_path, channels):
    image = np.zeros((40, 20, 3), np.uint8)
    image[:20] = 200
    write(tmp_path / "images" / "a.png", image)
    write(tmp_path / "masks" / "0" / "a.png", image[..., 0] // 200 * 255)
    dataset = open_dataset(tmp_path, ids=["a"], size=(8, 16), input_channels=channels)
    image, mask = dataset.arrays(0)
    assert image.shape == (8, 16, channels) and image.dtype == mask.dtype == np.uint8
    assert (image[:4, :, 0] == 200).all() and (image[4:, :, 0] == 0).all()
    assert mask[..., 0].tolist() == [[1] * 16] * 4 + [[0] * 16] * 4


@pytest.mark.parametrize("form", ["0 and 1", "0 and 255", "RGB", "RGBA", "empty", "full"])
def test_forms_of_a_mask(tmp_path, form):
    plane = np.array([[0, 1, 0, 1], [1, 1, 0, 0]], np.uint8)
    plane = {"empty": plane * 0, "full": plane * 0 + 1}.get(form, plane)
    stored = plane if form == "0 and 1" else plane * 255
    if form in ("RGB", "RGBA"):
        stored = np.dstack([stored, stored, stored])
    if form == "RGBA":
        stored = np.dstack([stored, np.full_like(plane, 77)])
    write(tmp_path / "images" / "a.png", np.zeros((2, 4, 3), np.uint8))
    write(tmp_path / "masks" / "0" / "a.png", stored)
    dataset = open_dataset(tmp_path, ids=["a"])
    assert dataset.check()["foreground"] == [plane.mean()]
    assert dataset[0][1].tolist() == [plane.tolist()]


@pytest.mark.parametrize(
    ("ending", "mode"),
    [("png", "RGB"), ("bmp", "RGB"), ("tif", "RGB"), ("jpg", "RGB"), ("png", "RGBA"), ("tif", "RGBA")],
)
def test_red_is_the_first_channel_whoever_wrote_the_file(tmp_path, ending, mode):
    """Pillow writes."""
    (tmp_path / "images").mkdir()
    image = Image.new("RGB", (16, 16), (200, 120, 40)).convert(mode)
    image.save(tmp_path / "images" / f"a.{ending}", **({"quality": 100} if ending == "jpg" else {}))
    write(tmp_path / "masks" / "0" / "a.png", np.eye(16, dtype=np.uint8) * 255)
    for size in (None, (8, 8)):
        dataset = Dataset(["a"], tmp_path / "images", tmp_path / "masks", f".{ending}", ".png", 1, size=size)
        dataset.check()
        assert np.abs(dataset.arrays(0)[0].astype(int) - (200, 120, 40)).max() <= 2 * (ending == "jpg")
        tensor = dataset[0][0]
        assert tensor.mean((1, 2)).tolist() == pytest.approx([200 / 255, 120 / 255, 40 / 255], abs=0.01)


def test_sixteen_bits_are_trained_on_as_they_are_predicted(tmp_path):
    """A dim picture with a hot pixel, and a mask of floats."""
    (tmp_path / "images").mkdir()
    (tmp_path / "masks" / "0").mkdir(parents=True)
    dim = 100 + 3 * np.repeat(np.arange(32, dtype=np.uint16)[None], 24, 0)
    dim[5, 6] = 65535
    tifffile.imwrite(tmp_path / "images" / "a.tif", dim)
    tifffile.imwrite(tmp_path / "masks" / "0" / "a.tif", (dim > 150).astype(np.float32))
    dataset = Dataset(["a"], tmp_path / "images", tmp_path / "masks", ".tif", ".tif", 1)
    dataset.check()
    image, mask = dataset.arrays(0)
    assert np.array_equal(image, to_channels(read_picture(tmp_path / "images" / "a.tif"), 3))
    assert image[0, [0, 31]].tolist() == [[0, 0, 0], [255, 255, 255]] and np.array_equal(mask[..., 0], dim > 150)


def test_stacks_and_channels_are_named(tmp_path):
    (tmp_path / "images").mkdir()
    for img_id, array, axes in (("a", (3, 8, 9), "TYX"), ("b", (3, 8, 9), "TYX"), ("c", (2, 8, 9), "CYX")):
        file = tmp_path / "images" / f"{img_id}.tif"
        tifffile.imwrite(file, np.zeros(array, np.uint8), ome=True, metadata={"axes": axes}, photometric="minisblack")
        write(tmp_path / "masks" / "0" / f"{img_id}.png", np.zeros((8, 9), np.uint8))
    dataset = Dataset(["a", "b", "c"], tmp_path / "images", tmp_path / "masks", ".tif", ".png", 1)
    with pytest.raises(ValueError) as caught:
        dataset.check()
    images = tmp_path / "images"
    first, second = str(caught.value).removeprefix(f"{tmp_path}: ").split("; image ")
    pages = f"image has 3 pages, expected 1; save each page as a file of its own ({images}), 2 of the ids: a, b"
    assert first == pages and second.startswith("has 2 channels (0, 1), expected 1 or 3; ")


def test_image_and_mask_are_turned_upright(tmp_path):
    """Both were stored lying on their side: the top left quarter is bright, the top right one as meant."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    lying = np.zeros((8, 12), np.uint8)
    lying[:4, :6] = 255
    for folder in ("images", "masks/0"):
        (tmp_path / folder).mkdir(parents=True)
    Image.fromarray(np.dstack([lying] * 3)).save(tmp_path / "images" / "a.jpg", exif=exif, quality=100)
    Image.fromarray(lying).save(tmp_path / "masks" / "0" / "a.png", exif=exif)
    dataset = Dataset(["a"], tmp_path / "images", tmp_path / "masks", ".jpg", ".png", 1)
    assert dataset.check()["sizes"] == {"8 x 12": 1}
    image, mask = dataset.arrays(0)
    expected = np.zeros((12, 8), np.uint8)
    expected[:6, 4:] = 1
    assert np.array_equal(mask[..., 0], expected) and np.array_equal(image[..., 0] > 127, expected > 0)


# ---------------------------------------------------------------- the check before the first step


def test_all_that_is_wrong_is_in_one_message(cells):
    folder, _, masks = cells
    (folder / "images" / "img00.png").unlink()
    (folder / "masks" / "1" / "img00.png").unlink()
    (folder / "masks" / "0" / "img01.png").unlink()
    whole = (folder / "images" / "img02.png").read_bytes()
    (folder / "images" / "img02.png").write_bytes(whole[:100])
    (folder / "masks" / "1" / "img02.png").write_bytes(b"")
    write(folder / "masks" / "0" / "img03.png", np.zeros((12, 8), np.uint8))
    grey = masks[4, 0] * 255
    grey[4, 6] = 128  # far from the corner
    write(folder / "masks" / "0" / "img04.png", grey)
    mixed = masks[5, 1] * 255
    mixed[4, 6] = 1
    write(folder / "masks" / "1" / "img05.png", mixed)
    dataset = open_dataset(folder, num_classes=2)
    with pytest.raises(ValueError) as caught:
        dataset.check(cache=True)
    said = str(caught.value)
    assert said.startswith(f"{folder}: ") and "\n" not in said
    images, zero, one = folder / "images", folder / "masks" / "0", folder / "masks" / "1"
    advice = ": python import_labels.py turns maps of classes or objects into masks"
    assert set(said.removeprefix(f"{folder}: ").split("; ")) == {
        f"no image ({images}), 1 of the ids: img00",
        f"no mask ({one}), 1 of the ids: img00",
        f"no mask ({zero}), 1 of the ids: img01",
        f"image unreadable: no whole picture of 8 or 16 bits ({images}), 1 of the ids: img02",
        f"mask unreadable: no whole picture of 8 or 16 bits ({one}), 1 of the ids: img02",
        f"mask and image differ in size ({zero}): 8 x 12 and 12 x 8 pixels in img03, 1 of the ids: img03",
        f"mask values other than 0 and 255, or 0 and 1 ({zero}{advice}): 0, 128, 255 in img04, 1 of the ids: img04",
        f"mask values other than 0 and 255, or 0 and 1 ({one}{advice}): 0, 1, 255 in img05, 1 of the ids: img05",
    }


def test_swapped_folders_are_called_so(cells):
    folder = cells[0]
    (folder / "masks" / "0").rename(folder / "kept")
    (folder / "images").rename(folder / "masks" / "0")
    (folder / "kept").rename(folder / "images")
    with pytest.raises(ValueError) as caught:
        open_dataset(folder).check()
    values = np.unique(cv2.imread(str(folder / "masks" / "0" / "img00.png"), cv2.IMREAD_UNCHANGED)).tolist()
    assert str(caught.value) == (
        f"{folder}: mask values other than 0 and 255, or 0 and 1 ({folder / 'masks' / '0'}; the image has only these: "
        f"are images and masks swapped?): {', '.join(map(str, values[:5]))} and {len(values) - 5} more in img00, "
        f"6 of the ids: {', '.join(IDS)}"
    )


def test_black_and_white_images_and_sizes_are_counted(cells):
    folder, images, masks = cells
    assert open_dataset(folder).check()["two_valued"] == 0
    write(folder / "images" / "img00.png", masks[0, 0] * 255)
    write(folder / "images" / "img01.png", np.dstack([masks[1, 0]] * 3))
    for img_id, kind in (("img02", "images"), ("img02", "masks/0")):
        write(folder / kind / f"{img_id}.png", np.zeros((9, 7), np.uint8))
    found = open_dataset(folder, size=(16, 16)).check()
    assert found["two_valued"] == 3 and found["sizes"] == {"12 x 8": 5, "7 x 9": 1}
    seen = []
    open_dataset(folder, size=(16, 16)).check(each=seen.append)
    assert [image.shape for image in seen] == [(16, 16, 3)] * 6


def test_what_has_changed_is_said():
    now = {"fingerprint": "0f", "sizes": {"96 x 96": 2}}
    split = {"train": ["a", "b", "c", "d"], "val": ["e", "f"]}
    split |= {"fingerprint": {"train": "1", "val": "0f"}, "sizes": {"train": {"96 x 96": 4}, "val": {"96 x 96": 2}}}
    assert changes(split, list("fedcba"), {"val": now}) == []
    assert changes(split, list("xyfe"), {"val": now}) == [
        "4 of its images are gone (a, b, c and 1 more)",
        "2 images are new (x, y)",
    ]
    assert changes(split, list("abcdefx"), {"val": now}, every=False) == []
    assert changes(split | {"test": ["x"]}, list("abcdefx"), {"val": now}) == []
    other = now | {"fingerprint": "2"}
    assert changes(split, list("abcdef"), {"val": other}) == ["the val images or masks have other contents"]
    larger = other | {"sizes": {"256 x 256": 1, "320 x 256": 1}}
    assert changes(split, list("abcdef"), {"val": larger}) == [
        "the val images were 96 x 96, now 256 x 256 and 320 x 256"
    ]
    del split["sizes"]  # a run of an earlier version
    assert changes(split, list("abcdef"), {"val": larger}) == ["the val images or masks have other contents"]


def test_many_ids_are_counted(cells):
    ids = [f"x{number:03d}" for number in range(NAMED_AT_MOST + 3)]
    with pytest.raises(ValueError) as caught:
        open_dataset(cells[0], ids=ids).check()
    said = str(caught.value)
    assert f"no image ({cells[0] / 'images'}), 23 of the ids: x000, x001" in said and "x019 and 3 more" in said
    assert "x020" not in said


@pytest.mark.parametrize("size", [None, (16, 16)])
def test_what_check_finds(cells, size):
    folder, images, masks = cells
    dataset = open_dataset(folder, num_classes=2, size=size)
    found = dataset.check()
    if size:
        arrays = [dataset.arrays(index) for index in range(6)]
        images, masks = np.stack([a for a, _ in arrays]), np.stack([b for _, b in arrays]).transpose(0, 3, 1, 2)
    pixels = images.reshape(-1, 3) / 255
    assert found["mean"] == pytest.approx(pixels.mean(0), abs=1e-6)
    assert found["std"] == pytest.approx(pixels.std(0), abs=1e-6)
    assert found["foreground"] == pytest.approx(masks.mean((0, 2, 3)), rel=1e-12)
    assert found["bytes"] == images.nbytes + masks.nbytes and found["cached"] is True
    assert all(type(value) is float for key in ("mean", "std", "foreground") for value in found[key])


def test_images_without_any_contrast_have_a_standard_deviation(tmp_path):
    write(tmp_path / "images" / "a.png", np.full((4, 4, 3), 99, np.uint8))
    write(tmp_path / "masks" / "0" / "a.png", np.zeros((4, 4), np.uint8))
    assert open_dataset(tmp_path, ids=["a"]).check()["std"] == [1e-3] * 3


def test_an_empty_channel_is_not_blown_up(tmp_path):
    """DAPI drawn in blue: a level of red is no hundred standard deviations. The floor is a quarter of the largest."""
    image = np.zeros((4, 4, 3), np.uint8)
    image[:2, :, 2] = 102  # half of the pixels, 0.4: a standard deviation of 0.2
    write(tmp_path / "images" / "a.png", image)
    write(tmp_path / "masks" / "0" / "a.png", np.zeros((4, 4), np.uint8))
    assert open_dataset(tmp_path, ids=["a"]).check()["std"] == pytest.approx([0.05, 0.05, 0.2])


def test_the_fingerprint_is_of_ids_order_and_content(cells, tmp_path_factory):
    folder = cells[0]
    first = open_dataset(folder).check()["fingerprint"]
    copy = tmp_path_factory.mktemp("copy") / "elsewhere"
    shutil.copytree(folder, copy)
    assert open_dataset(copy).check(cache=False)["fingerprint"] == first
    others = {first, open_dataset(folder, ids=IDS[::-1]).check()["fingerprint"]}
    others |= {open_dataset(folder, ids=IDS[:5]).check()["fingerprint"]}
    others |= {open_dataset(folder, num_classes=2).check()["fingerprint"]}
    for changed in (copy / "images" / "img03.png", copy / "masks" / "0" / "img05.png"):
        array = cv2.imread(str(changed), cv2.IMREAD_UNCHANGED)
        array[0, 0] = 255 - array[0, 0]
        write(changed, array)
        others |= {open_dataset(copy).check()["fingerprint"]}
    assert len(others) == 6


@pytest.mark.parametrize("cache", [True, "auto"])
def test_cached_files_are_not_read_again(cells, cache):
    folder, images, _ = cells
    dataset = open_dataset(folder)
    assert dataset.check(cache)["cached"] is True
    shutil.rmtree(folder / "images")
    assert np.array_equal(dataset.arrays(4)[0], images[4]) and dataset[4][2] == {"img_id": "img04"}


def test_without_a_cache_files_are_read_again(cells):
    folder, images, _ = cells
    dataset = open_dataset(folder)
    assert dataset.check(cache=False)["cached"] is False
    write(folder / "images" / "img04.png", 255 - images[4])
    assert np.array_equal(dataset.arrays(4)[0], 255 - images[4])


def test_the_memory_is_that_of_all_images(tmp_path, monkeypatch):
    """Of any sizes, and in any order."""
    for name, side in (("a", 4), ("b", 60), ("c", 4)):
        write(tmp_path / "images" / f"{name}.png", np.full((side, side, 3), 50, np.uint8))
        write(tmp_path / "masks" / "0" / f"{name}.png", np.eye(side, dtype=np.uint8) * 255)
    dataset = Dataset("abc", tmp_path / "images", tmp_path / "masks", ".png", ".png", 1)
    needed = (2 * 4**2 + 60**2) * (3 + 1)
    assert dataset.check(cache=True)["bytes"] == needed
    for room, fits in ((needed + 1, True), (needed - 1, False)):
        monkeypatch.setattr("dataset.memory", lambda room=room: 4 * room)
        assert dataset.check()["cached"] is fits


def test_auto_keeps_what_fits_in_a_quarter_of_the_memory(cells, monkeypatch):
    needed = 6 * 8 * 12 * (3 + 1)
    monkeypatch.setattr("dataset.memory", lambda: 4 * needed)
    assert open_dataset(cells[0]).check() == open_dataset(cells[0]).check(cache=False)
    assert open_dataset(cells[0]).check(cache=True)["cached"] is True
    monkeypatch.setattr("dataset.memory", lambda: 4 * needed + 4)
    assert open_dataset(cells[0]).check()["cached"] is True


# ---------------------------------------------------------------- loaders


@pytest.mark.parametrize("shuffle", [False, True])
def test_the_last_small_batch_is_kept(cells, shuffle):
    for batch_size, expected in ((4, [4, 2]), (5, [5, 1]), (6, [6]), (100, [6])):
        loader = make_loader(open_dataset(cells[0]), batch_size, shuffle=shuffle)
        assert len(loader) == len(expected)
        sizes = [(len(images), len(masks), len(info["img_id"])) for images, masks, info in loader]
        assert sizes == [(size, size, size) for size in expected]


def test_without_shuffling_the_order_is_that_of_the_ids(cells):
    ids = IDS[::-1]
    order = [img_id for batch in make_loader(open_dataset(cells[0], ids), 4) for img_id in batch[2]["img_id"]]
    assert order == ids


def test_build_dataset_reads_a_config(tmp_path, monkeypatch):
    write_data_set(tmp_path / "inputs" / "cells", count=3, size=(20, 10), num_classes=2)
    monkeypatch.chdir(tmp_path)
    config = {"dataset": "cells", "img_ext": ".png", "mask_ext": ".png", "num_classes": 2, "input_channels": 3}
    config |= {"input_h": 16, "input_w": 32, "seed": 7}
    plain = build_dataset(config, ["img01", "img00"])
    image, mask, info = plain[0]
    assert image.shape == (3, 16, 32) and mask.shape == (2, 16, 32) and info == {"img_id": "img01"}
    assert plain.transform is None and plain.seed == 7
    shifted = build_dataset(config | {"mean": [0.5] * 3, "std": [0.5] * 3}, ["img01"])
    torch.testing.assert_close(shifted[0][0], 2 * image - 1)
    config["augment"] = "flips,cutmix"
    augmented = build_dataset(config, ["img01"], augment=True)
    assert augmented.transform is not None and augmented.cutmix == 0.5
    plain = build_dataset(config | {"augment": "none"}, ["img01"], augment=True)
    assert plain.transform is None and plain.cutmix == 0
    assert build_dataset(config, ["img01"]).transform is None
