"""common/lookalikes.py: twins by hand and by slow loops, and splits that keep twins together.

PYTHONPATH=. python tests/test_lookalikes.py stage1_train.zip      # the figures in its docstring
"""

import sys
import zipfile
from collections import Counter
from fractions import Fraction

import cv2
import numpy as np
import pytest

from common import lookalikes
from common.images import decode, squeeze, to_channels
from common.lookalikes import (
    ALIKE,
    Sketches,
    about_groups,
    about_twins,
    grouped_split,
    groups,
    kind,
    kind_of,
    seams,
    twins,
)


def flat(value, size=(96, 96)):
    return np.full((*size, 3), value, np.uint8)


def texture(seed, size=(96, 96), channels=3):
    """Soft blots, large enough to be seen across a border."""
    noise = np.random.default_rng(seed).normal(size=(*size, channels)).astype(np.float32)
    soft = cv2.GaussianBlur(noise, (0, 0), 3).reshape(*size, channels)
    return np.clip(128 + 60 * soft / soft.std(), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def slide():
    """Four crops of one field (upper left, upper right, lower left, lower right) and three strangers."""
    field = texture(0, (192, 192))
    crops = [field[y : y + 96, x : x + 96] for y in (0, 96) for x in (0, 96)]
    return Sketches([*crops, *(texture(seed) for seed in (1, 2, 3))])


# ---------------------------------------------------------------- sketches


def test_colour_and_texture_by_hand():
    (look,) = Sketches([flat(100)]).looks
    assert look.tolist() == [80] * 21 + [0] * 4  # 8 * sqrt(100)
    stripes = flat(0)
    stripes[:, ::2] = (100, 49, 225)
    (look,) = Sketches([stripes]).looks
    quantiles, steps = look[:21].reshape(7, 3), look[21:]
    assert quantiles.tolist() == [[0, 0, 0]] * 3 + [[80, 56, 120]] * 4  # the upper half begins at the median
    mean = (100 + 49 + 225) / 3  # of pixels side by side, 0 of those one above the other
    assert steps.tolist() == [round(8 * (2 * mean) ** 0.5), 0, 0, 0]


def test_kinds():
    assert [kind_of(look) for look in Sketches([flat(30), flat(200), flat((200, 150, 220))]).looks] == [
        "dark grey",
        "bright grey",
        "bright coloured",
    ]
    assert kind(flat(30)[..., :1]) == "dark grey" and kind(flat((200, 150, 220), (300, 40))) == "bright coloured"


def test_flips_and_turns_are_the_same_image_and_one_pixel_makes_another():
    image = texture(0, (40, 60))
    turned = [np.rot90(view, k) for view in (image, image[:, ::-1]) for k in range(4)]
    assert len(set(Sketches(turned).digests)) == 1
    other = image.copy()
    other[7, 9, 1] ^= 1
    opaque = np.dstack([image, np.full((40, 60), 255, np.uint8)])
    assert Sketches([image, other]).digests[0] != Sketches([image, other]).digests[1]
    assert Sketches([image]).digests == Sketches([opaque]).digests
    grey = texture(0, (40, 60), 1)
    assert Sketches([grey]).digests == Sketches([grey[..., [0, 0, 0]]]).digests
    assert len(set(Sketches([flat(9, (40, 60)), flat(9, (60, 41))]).digests)) == 2


# ---------------------------------------------------------------- seams


def slow_mismatch(one, other):
    """Of two borders, exactly."""
    one, other = (np.array(border, object).reshape(96, 3) for border in (one.tolist(), other.tolist()))
    spread = sum(
        sum(v * v for v in line[:, c]) - Fraction(sum(line[:, c]) ** 2, 96) for line in (one, other) for c in range(3)
    )
    return Fraction(((one - other) ** 2).sum()) / spread


def test_seams_by_a_slow_loop(slide):
    borders, expected = slide.borders, []
    for end, start in ((0, 1), (2, 3)):
        table = {
            (i, j): slow_mismatch(borders[i, end], borders[j, start]) for i in range(7) for j in range(7) if i != j
        }
        for (i, j), value in table.items():
            rivals = [other for (a, b), other in table.items() if (a == i) != (b == j)]
            if value < Fraction(3, 20) and all(value < Fraction(3, 5) * rival for rival in rivals):
                expected.append((i, j))
    assert sorted(seams(borders)) == sorted(expected) == [(0, 1), (0, 2), (1, 3), (2, 3)]


@pytest.mark.parametrize("block", [1, 2, 5])
def test_blocks_change_nothing(slide, block, monkeypatch):
    before = seams(slide.borders), groups(slide).tolist(), twins(slide, list("abcd"), list("efg"))
    monkeypatch.setattr(lookalikes, "BLOCK", block)
    assert (seams(slide.borders), groups(slide).tolist(), twins(slide, list("abcd"), list("efg"))) == before


def test_what_all_borders_share_is_no_seam():
    """Empty borders, and the same shadow at each: they fit, but not one image alone."""
    shade = np.abs(np.linspace(-1, 1, 96))
    shadow = (120 * np.maximum(shade[:, None], shade)).astype(np.int16)[..., None]
    lit = [np.clip(220 - shadow + texture(seed, channels=1) // 16, 0, 255).astype(np.uint8) for seed in range(8)]
    assert seams(Sketches(lit).borders) == []
    assert seams(Sketches([flat(50), flat(50), flat(90)]).borders) == []
    assert seams(Sketches([texture(0)]).borders) == []


# ---------------------------------------------------------------- twins and groups


def test_alike_up_to_the_threshold():
    sketches = Sketches([flat(100), flat(104), flat(105)])
    looks = sketches.looks.astype(int)
    assert [abs(looks[0] - look).sum() for look in looks] == [0, 42, 42]  # 8 sqrt: 80, 81.6, 82.0
    one_channel = Sketches([flat((100, 100, 100)), flat((100, 100, 104)), flat((100, 100, 106))])
    assert [int(np.abs(one_channel.looks[0] - look).sum()) for look in one_channel.looks] == [0, 14, 14]
    assert ALIKE == 25 and len(set(groups(one_channel))) == 1 and len(set(groups(sketches))) == 2  # 104 and 105: 82


def test_the_most_telling_twin_is_named(slide):
    assert twins(slide, list("abc"), list("wxyz")) == {"identical": {}, "seam": {"w": "b"}, "alike": {}}
    images = [flat(100), flat((100, 100, 104)), texture(5)]
    sketches = Sketches([*images, texture(5)[::-1], flat((100, 100, 105)), flat(10)])
    found = twins(sketches, ["p", "q", "r"], ["same", "near", "far"])
    assert found == {"identical": {"same": "r"}, "seam": {}, "alike": {"near": "q"}}
    assert about_twins(found, 3) == (
        "look-alikes: 2 of 3 validation images have a twin in training (1 the same pixels, 1 alike in colour and "
        "texture), listed in split.yml: same, near; --split grouped keeps twins together"
    )
    many = {"identical": {}, "seam": {str(k): "t" for k in range(5)}, "alike": {}}
    assert "5 of 9" in about_twins(many, 9) and ": 0, 1, 2 and 2 more;" in about_twins(many, 9)
    none = dict.fromkeys(("identical", "seam", "alike"), {})
    assert about_twins(none, 4) == "look-alikes: no validation image has a twin in training"


def test_twins_of_twins_are_one_group(slide):
    assert groups(slide).tolist() == [0, 0, 0, 0, 4, 5, 6]
    chain = Sketches([flat((100, 100, 100)), flat(10), flat((100, 100, 106)), flat((100, 100, 112)), flat(10)])
    assert np.abs(chain.looks[0] - chain.looks[3]).sum() > ALIKE  # joined by the one between
    assert groups(chain).tolist() == [0, 1, 0, 0, 1]
    assert about_groups(groups(chain)) == "groups of look-alikes: 2, the largest has 3 images"


# ---------------------------------------------------------------- the split


def families(*sizes, values=(5, 15, 30, 50, 75, 110, 150, 200, 250)):
    """A group of equal images for each size, of values far apart: the first five dark, the others bright."""
    images = [flat(values[k]) for k, size in enumerate(sizes) for _ in range(size)]
    return [f"i{k:03d}" for k in range(len(images))], Sketches(images)


def test_no_group_is_cut_and_a_fifth_is_held():
    ids, sketches = families(9, 5, 6, 3, 2, 9, 6, 6, 4)
    labels = dict(zip(ids, groups(sketches).tolist(), strict=True))
    found = set()
    for seed in range(8):
        split = grouped_split(ids, sketches, seed)
        assert split == grouped_split(ids, sketches, seed) and sorted(split["train"] + split["val"]) == ids
        assert not {labels[img_id] for img_id in split["train"]} & {labels[img_id] for img_id in split["val"]}
        assert 8 <= len(split["val"]) <= 10
        kinds = Counter(int(img_id[1:]) >= 25 for img_id in split["val"])
        assert kinds[False] and kinds[True]  # the first 25 of the 50 are dark
        found.add(tuple(split["val"]))
    assert len(found) > 1


def test_a_small_kind_is_on_both_sides_where_it_can_be():
    ids, sketches = families(10, 10, 10, 10, 10, 2, 2)  # a fifth of the 4 bright images is less than a group
    for seed in range(4):
        val = grouped_split(ids, sketches, seed)["val"]
        assert len(val) == 12 and sum(int(img_id[1:]) >= 50 for img_id in val) == 2
    ids, sketches = families(10, 10, 10, 10, 10, 4)  # and here it cannot
    assert all(int(img_id[1:]) < 50 for img_id in grouped_split(ids, sketches, 0)["val"])


def test_without_twins_it_is_a_plain_fifth():
    ids = [f"i{k}" for k in range(9)]
    split = grouped_split(ids, Sketches(texture(k) // 2 + 28 * k // 9 * 4 for k in range(9)), 1)
    assert len(split["val"]) in (1, 2) and len(split["train"]) + len(split["val"]) == 9


@pytest.mark.parametrize("sizes", [(10,), (40, 1), (5, 5)])
def test_groups_too_large_to_split_say_so(sizes):
    ids, sketches = families(*sizes)
    with pytest.raises(ValueError, match=f"fall into {len(sizes)} group.*largest of {max(sizes)}.*--split FILE"):
        grouped_split(ids, sketches, 0)


def test_the_order_does_not_matter_to_the_groups():
    images = [*(texture(k % 5) for k in range(15)), *(flat(k * 16) for k in range(15))]
    order = np.random.default_rng(0).permutation(30)
    plain, mixed = groups(Sketches(images)), groups(Sketches([images[k] for k in order]))
    assert np.array_equal(plain[order][:, None] == plain[order], mixed[:, None] == mixed)


def test_thousands_of_twins_are_no_burden():
    sketches = Sketches([flat(30)])
    sketches.digests, sketches._looks, sketches._borders = (
        part * 1500 for part in (sketches.digests, sketches._looks, sketches._borders)
    )
    assert about_groups(groups(sketches)) == "groups of look-alikes: 1, the largest has 1500 images"


# ---------------------------------------------------------------- the real images


def neighbours(images):
    """Full-size images -> {(a, b): does b's border go on where a ends, to the right or below: 2 surely, 1 nearly}."""
    of_size, found = {}, {}
    for img_id, image in images.items():
        of_size.setdefault(image.shape, []).append(img_id)
    for ids in of_size.values():
        stack = np.stack([images[img_id] for img_id in ids]).astype(np.float32)
        for lines in (stack, stack.transpose(0, 2, 1, 3)):
            (end, before), (start, after) = (lines[:, :, -1], lines[:, :, -2]), (lines[:, :, 0], lines[:, :, 1])
            own = np.abs(end - before).mean((1, 2))[:, None] + np.abs(start - after).mean((1, 2))
            ends, starts = ((line - line.mean(1, keepdims=True)).reshape(len(ids), -1) for line in (end, start))
            norms = np.linalg.norm(ends, axis=1)[:, None], np.linalg.norm(starts, axis=1)
            alike = ends @ starts.T / (norms[0] * norms[1] + 1e-6)
            clear = np.minimum(*norms) > 2 * ends.shape[1] ** 0.5
            differs = np.stack([np.abs(line - start).mean((1, 2)) for line in end]) / (own / 2 + 1e-3)
            level = 1 * ((alike > 0.5) & (differs < 5)) + 1 * ((alike > 0.8) & (differs < 2) & clear)
            for i, j in zip(*np.nonzero(level), strict=True):
                if i != j:
                    found[ids[i], ids[j]] = max(int(level[i, j]), found.get((ids[i], ids[j]), 0))
    return found


def main(path):
    archive = zipfile.ZipFile(path)
    names = sorted(name for name in archive.namelist() if "/images/" in name and name.endswith(".png"))
    images = {name.split("/")[-3]: to_channels(decode(archive.read(name)), 3) for name in names}
    ids, raw = list(images), neighbours(images)
    sketches = Sketches(squeeze(image, (96, 96)) for image in images.values())
    found = Counter(raw.get((ids[i], ids[j]), 0) for i, j in seams(sketches.borders))
    print(f"{sum(level == 2 for level in raw.values())} pairs fit at full size; found at 96 x 96 {found.total()}:")
    print(f"  {found[2]} of those, {found[1]} that come near, {found[0]} others")
    close = np.argwhere(np.triu(lookalikes._distances(sketches.looks, sketches.looks) <= ALIKE, 1))
    other = sum(images[ids[i]].shape != images[ids[j]].shape for i, j in close)
    print(f"{len(close)} pairs are alike in colour and texture, {other} of them of different sizes")
    print(about_groups(groups(sketches)))


if __name__ == "__main__":
    main(sys.argv[1])
