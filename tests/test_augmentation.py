"""augmentation.py: what each part does to images and masks, and that draws depend on (seed, epoch, index) alone."""

import random
from collections import Counter

import cv2
import numpy as np
import pytest
import torch
from test_dataset import open_dataset, write

from augmentation import AUGMENTATIONS, COVERED, augmentation, paste, paste_nuclei
from common.loaders import set_epoch
from dataset import make_loader

USUAL = "flips,mild"
OF_ONE_IMAGE = [part for part in AUGMENTATIONS if part not in ("cutmix", "paste")]  # those take other items, or nuclei


def noisy(tmp_path, count=24, size=(16, 16), num_classes=2):
    """Red is 200 where mask 0 is 1 and 20 elsewhere, green likewise with mask 1; no mask is symmetric."""
    rng = np.random.default_rng(1)
    ids = [f"n{number:02d}" for number in range(count)]
    for img_id in ids:
        masks = (rng.random((num_classes, *size)) < 0.4).astype(np.uint8)
        image = np.full((*size, 3), 20, np.uint8)
        for k in range(num_classes):
            image[masks[k] > 0, min(k, 2)] = 200
            write(tmp_path / "masks" / str(k) / f"{img_id}.png", masks[k] * 255)
        write(tmp_path / "images" / f"{img_id}.png", image)
    return ids


def epoch_of(loader, epoch):
    """{id: (image, mask)} of one epoch, and the ids in their order."""
    set_epoch(loader, epoch)
    items, order = {}, []
    for images, masks, info in loader:
        for image, mask, img_id in zip(images, masks, info["img_id"], strict=True):
            items[img_id] = (image, mask)
            order.append(img_id)
    return items, order


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(a, b) for key in one for a, b in zip(one[key], other[key], strict=True)
    )


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker")  # more than the cores of a small machine
@pytest.mark.parametrize(("size", "parts"), [((16, 16), USUAL), ((16, 24), ",".join(AUGMENTATIONS))])
def test_streams_and_order_do_not_depend_on_workers(tmp_path, size, parts):
    ids, cutmix = noisy(tmp_path, size=size), 0.5 * ("cutmix" in parts)

    def loader(workers, seed=3):
        transform = augmentation(parts, *size)
        dataset = open_dataset(tmp_path, ids, num_classes=2, transform=transform, seed=seed, cutmix=cutmix)
        dataset.check()
        return make_loader(dataset, 5, shuffle=True, seed=seed, num_workers=workers)

    plain = loader(0)
    first, order = epoch_of(plain, 0)
    second, next_order = epoch_of(plain, 1)
    assert sorted(order) == sorted(next_order) == ids and order != next_order
    for workers in (1, 3):
        with_workers = loader(workers)
        for epoch in (0, 1):  # the same, persistent, workers
            found, found_order = epoch_of(with_workers, epoch)
            assert same(found, (first, second)[epoch]) and found_order == (order, next_order)[epoch]
    # resumed at epoch 1, with the global streams anywhere
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    assert same(epoch_of(loader(0), 1)[0], second)
    other, other_order = epoch_of(loader(0, seed=4), 0)
    assert other_order != order
    for another in (second, other):
        changed = sum(not torch.equal(first[img_id][1], another[img_id][1]) for img_id in ids)
        assert changed > len(ids) / 3


def test_loading_leaves_the_global_streams_alone(tmp_path):
    ids = noisy(tmp_path, count=6)
    loader = make_loader(open_dataset(tmp_path, ids, transform=augmentation(USUAL, 16, 16)), 2, shuffle=True)
    drawn = []
    for load in (False, True):
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        if load:
            epoch_of(loader, 0)
        drawn.append((random.random(), np.random.random(), torch.rand(1).item()))
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize(("size", "orientations"), [((16, 16), 8), ((16, 24), 4)])
def test_orientation_and_colours_are_drawn_apart(tmp_path, size, orientations):
    """One image, many epochs: each orientation comes with and without a change of the colours."""
    ids = noisy(tmp_path, count=1, size=size)
    dataset = open_dataset(tmp_path, ids, transform=augmentation(USUAL, *size))
    original, seen = dataset.arrays(0), Counter()
    for epoch in range(40 * orientations):
        dataset.set_epoch(epoch)
        image, mask, _ = dataset[0]
        mask = mask[0].numpy().astype(np.uint8)
        found = []
        for turns in range(4):
            for flip in (False, True):
                turned = np.rot90(original[1][..., 0], turns)
                if np.array_equal(turned[:, ::-1] if flip else turned, mask):
                    found.append((turns, flip))
        assert len(found) == 1
        values = {tuple(pixel) for pixel in (image * 255).round().int().flatten(1).T.tolist()}
        coloured = values != {tuple(pixel) for pixel in original[0].reshape(-1, 3).tolist()}
        seen[found[0], coloured] += 1
    for coloured in (False, True):
        counts = [count for (_, changed), count in seen.items() if changed is coloured]
        # expected 10 without (both colour transforms skipped: 1/4) and 30 with
        assert len(counts) == orientations and min(counts) >= (12 if coloured else 2)


def test_the_items_of_an_epoch_differ(tmp_path):
    """One picture sixteen times: sixteen draws, and at least four of the eight orientations among them."""
    (img_id,) = noisy(tmp_path, count=1)
    dataset = open_dataset(tmp_path, [img_id] * 16, transform=augmentation(USUAL, 16, 16))
    assert len({dataset[index][1].numpy().tobytes() for index in range(16)}) >= 4


@pytest.mark.parametrize("cutmix", [0.0, 1.0])
@pytest.mark.parametrize("num_classes", [1, 2, 6])
def test_image_and_masks_move_together(tmp_path, num_classes, cutmix):
    ids = noisy(tmp_path, num_classes=num_classes)
    parts = "flips" if cutmix else USUAL  # two pictures in one have two sets of colours
    dataset = open_dataset(tmp_path, ids, num_classes, transform=augmentation(parts, 16, 16), cutmix=cutmix)
    moved = 0
    for index in range(len(ids)):
        image, mask, _ = dataset[index]
        assert mask.shape == (num_classes, 16, 16) and set(mask.unique().tolist()) == {0.0, 1.0}
        moved += not np.array_equal(mask.permute(1, 2, 0).numpy(), dataset.arrays(index)[1])
        if num_classes == 2:  # every pixel of a kind has one colour, and no two kinds share it
            kinds = (mask[0] + 2 * mask[1]).int()
            colours = [image[:, kinds == kind].unique(dim=1) for kind in range(4)]
            assert torch.cat(colours, dim=1).unique(dim=1).shape == (3, 4) == torch.cat(colours, dim=1).shape
    assert moved > len(ids) / 2


def test_colours_stay_mild_and_change(tmp_path):
    """Brightness and contrast of at most 15 % each, of the picture's own mean; in grey no hue is drawn."""
    write(tmp_path / "images" / "a.png", np.full((8, 8), 100, np.uint8))
    write(tmp_path / "masks" / "0" / "a.png", np.zeros((8, 8), np.uint8))
    for channels in (1, 3):
        dataset = open_dataset(
            tmp_path, ["a"], input_channels=channels, transform=augmentation(USUAL, 8, 8, channels > 1)
        )
        levels = set()
        for epoch in range(60):
            dataset.set_epoch(epoch)
            levels.add(round(dataset[0][0].mean().item() * 255))
        assert len(levels) > 15 and min(levels) >= 70 - 6 and max(levels) <= 130 + 6  # saturation shifts some channels


def contrasts_of(part, nuclei, background):
    """How far the means of nuclei and background lie apart in 300 draws of a picture of these two grey levels."""
    mask = np.zeros((16, 16), np.uint8)
    mask[4:9, 5:12] = 1
    image = np.repeat(np.where(mask, nuclei, background).astype(np.uint8)[..., None], 3, axis=2)
    transform, contrasts = augmentation(part, 16, 16), []
    for seed in range(300):
        reseed(transform, seed)
        drawn = transform(image=image, mask=mask)["image"].mean(axis=2)
        contrasts.append(drawn[mask > 0].mean() - drawn[mask == 0].mean())
    return contrasts


@pytest.mark.parametrize("part, least", [("mild", 0.75), ("colour", 0.35)])
def test_dim_pictures_stay_pictures(part, least):
    """Half of the Data Science Bowl's pictures have a mean below 14 of 255, and in a tenth nuclei stand out by 20."""
    contrasts = contrasts_of(part, 25, 5)
    assert least * 20 <= min(contrasts) < 20 < max(contrasts)


@pytest.mark.parametrize("part, least", [("mild", 0.3), ("colour", 0.2)])
def test_bright_pictures_stay_pictures(part, least):
    """Bright field: nuclei of 190 on 225 may not be washed out to white."""
    assert max(contrasts_of(part, 190, 225)) <= -least * 35


def reseed(transform, seed):
    """As Dataset does; set_random_seed would give each part of it the same stream."""
    stream = np.random.default_rng(seed)
    transform.set_random_state(stream, random.Random(int(stream.integers(2**62))))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("parts", [*OF_ONE_IMAGE, ",".join(AUGMENTATIONS)])
def test_every_part_changes_pictures_and_keeps_their_form(tmp_path, parts, channels):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (16, 16, channels), np.uint8)
    mask = (rng.random((16, 16, 2)) < 0.4).astype(np.uint8)
    transform, changed = augmentation(parts, 16, 16, channels > 1), 0
    for seed in range(60):
        reseed(transform, seed)
        drawn = transform(image=image, mask=mask)
        assert drawn["image"].shape == image.shape and drawn["image"].dtype == np.uint8
        assert drawn["mask"].shape == mask.shape and set(np.unique(drawn["mask"])) <= {0, 1}
        changed += not np.array_equal(drawn["image"], image)
    assert changed >= 3


@pytest.mark.parametrize("parts", [*OF_ONE_IMAGE, ",".join(AUGMENTATIONS)])
def test_alpha_moves_with_the_masks_and_keeps_its_values(tmp_path, parts):
    """A dim image that is opaque where the mask is 1."""
    mask = (np.random.default_rng(0).random((16, 16)) < 0.4).astype(np.uint8) * 255
    image = np.dstack([np.where(mask, 25, 5).astype(np.uint8)] * 3 + [mask])
    write(tmp_path / "images" / "a.png", image)
    write(tmp_path / "masks" / "0" / "a.png", mask)
    dataset = open_dataset(tmp_path, ["a"], input_channels=4, transform=augmentation(parts, 16, 16))
    changed = 0
    for epoch in range(60):
        dataset.set_epoch(epoch)
        drawn, moved, _ = dataset[0]
        assert drawn.shape == (4, 16, 16) and moved.shape == (1, 16, 16)
        torch.testing.assert_close(drawn[3], moved[0])
        changed += not np.array_equal(drawn[:3].permute(1, 2, 0), image[..., :3].astype(np.float32) / 255)
    assert changed >= 3


def test_copies_are_negatives_and_grey_pictures():
    """A tenth each, drawn apart; the masks stay."""
    image, mask = np.dstack([np.full((4, 4), value, np.uint8) for value in (10, 60, 200)]), np.ones((4, 4, 1), np.uint8)
    transform, seen = augmentation("copies", 4, 4), Counter()
    for seed in range(600):
        reseed(transform, seed)
        drawn = transform(image=image, mask=mask)
        assert np.array_equal(drawn["mask"], mask)
        seen[tuple(drawn["image"][0, 0].tolist())] += 1
    # ITU-R BT.601: 0.299 x 10 + 0.587 x 60 + 0.114 x 200 = 61
    assert seen.keys() == {(10, 60, 200), (61, 61, 61), (245, 195, 55), (194, 194, 194)}
    assert all(35 <= seen[kind] <= 75 for kind in ((61, 61, 61), (245, 195, 55)))  # expected 54, sd 7
    assert 0 < seen[194, 194, 194] < 20  # expected 6


def test_affine_moves_image_and_mask_together_and_changes_areas():
    image, mask = np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64, 1), np.uint8)
    cv2.circle(mask, (30, 34), 12, 1, -1)
    image[mask[..., 0] > 0] = 255
    transform, areas = augmentation("affine", 64, 64), []
    for seed in range(80):
        reseed(transform, seed)
        drawn = transform(image=image, mask=mask)
        bright, moved = drawn["image"][..., 0] > 127, drawn["mask"][..., 0] > 0
        assert (bright & moved).sum() / (bright | moved).sum() > 0.9
        areas.append(moved.sum() / mask.sum())
    assert 0.4 < min(areas) < 0.7 and 1.4 < max(areas) < 2.1  # 0.49 to 1.96, but for what was rounded or mirrored
    assert 20 <= sum(area == 1 for area in areas) <= 60  # half of them stay
    whole = np.zeros((64, 64, 1), np.uint8)
    cv2.circle(whole, (31, 31), 8, 1, -1)
    for seed in range(80):
        reseed(transform, seed)
        drawn = transform(image=image, mask=whole)["mask"]
        stats = cv2.connectedComponentsWithStats(drawn[..., 0])[2][1:]  # a mirrored part of it may be another
        width, height = stats[stats[:, cv2.CC_STAT_AREA].argmax(), [cv2.CC_STAT_WIDTH, cv2.CC_STAT_HEIGHT]]
        assert abs(width - height) <= 2  # a circle stays one


def test_cutmix_takes_one_rectangle_of_another_item(tmp_path):
    """Items of one colour each: what is not an item's own is a rectangle of one other, masks likewise."""
    ids = [f"c{k}" for k in range(5)]
    for k, img_id in enumerate(ids):
        write(tmp_path / "images" / f"{img_id}.png", np.full((20, 24, 3), 10 * k, np.uint8))
        write(tmp_path / "masks" / "0" / f"{img_id}.png", np.full((20, 24), 255 * (k % 2), np.uint8))
    dataset, others, sides = open_dataset(tmp_path, ids, cutmix=0.5), Counter(), set()
    for epoch in range(80):
        dataset.set_epoch(epoch)
        for k in range(5):
            image, mask, _ = dataset[k]
            kinds = (image[0] * 25.5).round().int().numpy()
            assert np.array_equal(mask[0].numpy(), kinds % 2)
            if (kinds == k).all():
                others[None] += 1  # or a rectangle of its own
                continue
            (other,) = np.unique(kinds[kinds != k])
            rows, columns = (np.unique(axis) for axis in np.nonzero(kinds != k))
            assert (kinds[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] == other).all()
            sides.add((len(rows), len(columns)))
            others[int(other)] += 1
    heights, widths = zip(*sides, strict=True)
    assert (min(heights), max(heights), min(widths), max(widths)) == (5, 15, 6, 18)
    assert 200 <= others.pop(None) <= 280 and len(others) == 5 and min(others.values()) > 15  # expected 240 and 32 each


def test_paste_by_hand():
    class Stream:
        def uniform(self, low, high):
            return 0.5

        def integers(self, high):
            return high - 1  # the last place

    image, mask = paste(*(np.zeros((4, 2, 1)),) * 2, np.ones((4, 2, 1)), 2 * np.ones((4, 2, 1)), Stream())
    assert image[..., 0].tolist() == [[0, 0], [0, 0], [0, 1], [0, 1]] and np.array_equal(mask, 2 * image)


# ---------------------------------------------------------------- pasted nuclei


def discs():
    """Three discs of different brightness that do not touch, one of them cut by the border -> image, labels."""
    image, labels = np.full((64, 64, 3), 10, np.uint8), np.zeros((64, 64), np.int32)
    for label, (centre, radius) in enumerate((((20, 20), 6), ((44, 40), 8), ((63, 10), 7)), 1):
        cv2.circle(labels, centre, radius, label, -1)
        image[labels == label] = 60 * label
    return image, labels


def test_pasted_nuclei_are_copies_that_touch_others():
    image, labels = discs()
    before = image.copy(), labels.copy()
    areas, touching, moved = np.bincount(labels.ravel()), 0, 0
    for seed in range(40):
        drawn, found = paste_nuclei(image, labels, np.random.default_rng(seed), most=1)
        assert drawn.dtype == np.uint8 and found.dtype == np.int32 and found.max() <= 4
        new = found == 4
        assert np.array_equal(found[~new], labels[~new])  # the others stay where they are not covered
        if not new.any():
            continue
        moved += 1
        source = int(np.median(drawn[new][:, 0])) // 60
        assert new.sum() == areas[source] and source != 3  # whole copies, never of a nucleus that the border cuts
        assert (labels[new] > 0).mean() <= COVERED
        around = cv2.dilate(new.astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
        touching += len(np.unique(labels[around])) > 1
        far = cv2.dilate(new.astype(np.uint8), np.ones((3, 3), np.uint8)) == 0
        assert np.array_equal(drawn[far], image[far])
    assert moved > 20 and touching > 0.7 * moved
    assert all(np.array_equal(*pair) for pair in zip(before, (image, labels), strict=True))  # new arrays


def test_nothing_is_pasted_where_there_is_nothing_to_copy():
    image, labels = discs()
    labels[labels < 3] = 0
    for empty in (labels, np.zeros_like(labels)):
        drawn, found = paste_nuclei(image, empty, np.random.default_rng(0))
        assert np.array_equal(drawn, image) and np.array_equal(found, empty)
