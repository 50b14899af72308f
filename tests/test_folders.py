"""folders.py: lists and splits of class folders, and views that depend on (seed, epoch, index) alone."""

import numpy as np
import pytest
import torch
from PIL import Image

from classification import folders
from common.loaders import EpochSampler, WholeBatches, build_loader, set_epoch


def save(path, size=(40, 30), colour=(200, 30, 30), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)


@pytest.fixture
def tree(tmp_path):
    for part, count in (("train", 4), ("val", 2)):
        for index in range(count):
            save(tmp_path / part / "ants" / f"{index}.jpg", colour=(20 * index, 0, 0))
            save(tmp_path / part / "bees" / "more" / f"{index}.PNG", colour=(0, 0, 20 * index))
    return tmp_path


def test_classes_and_samples_are_sorted_and_strays_named(tree):
    (tree / "train" / "ants" / "not_found.gif").write_bytes(b"GIF89a")
    (tree / "train" / "readme.txt").write_text("hello")
    (tree / "val" / "bees" / ".DS_Store").write_text("")
    classes, samples, notes = folders.list_pictures(tree)
    assert classes == ["ants", "bees"]
    assert [label for _, label in samples["train"]] == [0] * 4 + [1] * 4
    assert [path.name for path, _ in samples["val"]] == ["0.jpg", "1.jpg", "0.PNG", "1.PNG"]
    assert len(notes) == 1 and "not_found.gif" in notes[0] and "readme.txt" in notes[0] and "DS_Store" not in notes[0]


def test_a_tree_one_level_deeper_is_found(tree, tmp_path_factory):
    outer = tmp_path_factory.mktemp("outer")
    tree.rename(outer / "hymenoptera_data")
    assert folders.list_pictures(outer)[0] == ["ants", "bees"]


@pytest.mark.parametrize("root", ["train", "."])
def test_without_val_a_seeded_stratified_split(tree, root):
    for path in (tree / "val").rglob("*.*"):
        path.unlink()
    for folder in ("ants", "bees/more", "bees", ""):
        (tree / "val" / folder).rmdir()
    found, again = (folders.list_pictures(tree / root, 0.5, seed=3)[1] for _ in range(2))
    assert found == again and not set(found["train"]) & set(found["val"])
    for part in found.values():
        assert [label for _, label in part] == [0, 0, 1, 1]
    drawn = {tuple(folders.list_pictures(tree / root, 0.5, seed=seed)[1]["val"]) for seed in range(8)}
    assert len(drawn) > 1
    assert "no val folder" in folders.list_pictures(tree / root)[2][0]


def test_a_class_always_keeps_a_picture_on_either_side():
    samples = [(f"{label}{index}", label) for label in (0, 1) for index in range(2)]
    for fraction in (0.01, 0.9):
        train, val = folders.stratified_split(samples, fraction, seed=0)
        assert [label for _, label in train] == [label for _, label in val] == [0, 1]


def test_mistakes_are_one_clear_line(tree):
    def message(kind=ValueError):
        with pytest.raises(kind) as caught:
            folders.list_pictures(tree)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    (tree / "val" / "wasps").mkdir()
    assert "lacks: wasps" in message()
    (tree / "val" / "wasps").rmdir()
    (tree / "train" / "wasps").mkdir()
    assert "wasps holds no picture" in message()
    (tree / "train" / "wasps").rmdir()
    save(tree / "train" / "wasps" / "1.jpg")
    assert "no pictures of wasps" in folders.list_pictures(tree)[2][0]
    (tree / "train").rename(tree / "hidden")
    (tree / "val").rename(tree / "gone")
    for folder in ("hidden", "gone"):
        for path in sorted((tree / folder).rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
    assert "no picture" in message()
    (tree / "gone").rmdir()
    assert "1 class folder" in message()


def test_unreadable_pictures_are_named_together(tree):
    (tree / "train" / "ants" / "9.jpg").write_bytes(b"\xff\xd8 no jpeg")
    whole = (tree / "train" / "ants" / "1.jpg").read_bytes()
    (tree / "train" / "ants" / "8.jpg").write_bytes(whole[: len(whole) // 2])
    samples = folders.list_pictures(tree)[1]["train"]
    expected = r"8.jpg is not a readable picture .*, .*9.jpg is not a readable picture .*; repair or remove them"
    with pytest.raises(ValueError, match=expected) as caught:
        folders.Pictures(samples, 32)
    assert "\n" not in str(caught.value)


def test_middle_is_the_central_square_of_the_known_recipe():
    picture = torch.zeros(3, 256, 400, dtype=torch.uint8)
    picture[:, 16:240, 88:312] = torch.randint(0, 256, (3, 224, 224), dtype=torch.uint8)
    assert torch.equal(folders.middle(picture, 224), picture[:, 16:240, 88:312])  # resize to 256, centre crop 224


def noisy(tree, count=6):
    samples = []
    for index in range(count):
        path = tree / "noise" / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.random.default_rng(index).integers(0, 256, (48, 40, 3), np.uint8)).save(path)
        samples.append((path, index % 2))
    return samples


def test_views_depend_on_seed_epoch_and_index_alone(tree):
    samples = noisy(tree)
    dataset = folders.Pictures(samples, 32, folders.augmentation(32), seed=1)
    before = torch.random.get_rng_state()
    image, label = dataset[3, 5]
    assert torch.equal(torch.random.get_rng_state(), before), "the global stream was touched"
    assert image.shape == (3, 32, 32) and image.dtype == torch.float32 and label == 1
    torch.manual_seed(99)
    assert torch.equal(dataset[3, 5][0], image)
    for other in (dataset[3, 6], dataset[2, 5], folders.Pictures(samples, 32, folders.augmentation(32), 2)[3, 5]):
        assert not torch.equal(other[0], image)


def test_workers_and_resuming_see_the_same_batches(tree):
    dataset = folders.Pictures(noisy(tree), 32, folders.augmentation(32), seed=1)

    def batches(workers, epochs):
        loader = build_loader(dataset, WholeBatches(EpochSampler(len(dataset), seed=1), 2), workers)
        found = {}
        for epoch in epochs:
            set_epoch(loader, epoch)
            found[epoch] = torch.cat([images for images, _ in loader])
        return found

    plain, parallel, resumed = batches(0, (1, 2)), batches(2, (1, 2)), batches(0, (2,))
    assert torch.equal(plain[1], parallel[1]) and torch.equal(plain[2], parallel[2])
    assert torch.equal(plain[2], resumed[2]) and not torch.equal(plain[1], plain[2])


def test_files_are_read_again_when_memory_is_short(tree, monkeypatch):
    samples = noisy(tree)
    kept = folders.Pictures(samples, 32)
    monkeypatch.setattr(folders, "CACHE_BYTES", 1000)
    lean = folders.Pictures(samples, 32)
    assert kept.kept and not lean.kept
    assert all(torch.equal(kept[index][0], lean[index][0]) for index in range(len(samples)))
