"""Generated pictures for trying the scripts without a download: fields of nuclei, and insects like ants or bees.

from common.synthetic import generate_nuclei, two_classes

image, labels = generate_nuclei(seed=7)      # (256, 256, 3) uint8 RGB, (256, 256) int32: 0 background, 1 ... n nuclei
picture = two_classes(seed=7, label="bees")  # (160, 160, 3) uint8 RGB

The same seed gives the same picture, because every random number comes from a PCG64 generator with that seed. Nothing
here models biology. The pictures only need to look about as varied and as difficult as the real ones.
"""

import cv2
import numpy as np

STAINS = {  # RGB of the background, of the fibres on it, and of the nuclei
    "purple on white": ((236, 234, 233), (214, 203, 214), (104, 26, 140)),
    "purple on purple": ((190, 176, 222), (162, 138, 208), (76, 22, 176)),
    "purple on pink": ((243, 222, 236), (220, 140, 194), (98, 48, 134)),
}


def generator(seed):
    return np.random.Generator(np.random.PCG64(seed))


def clouds(rng, size, cell):
    """(size, size) float32: smooth random values around 0, with sd about 0.5, that vary over about `cell` pixels."""
    coarse = rng.standard_normal((int(size / cell) + 4,) * 2).astype(np.float32)
    side = int(coarse.shape[0] * cell)
    smooth = cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC)
    y, x = rng.integers(0, side - size + 1, 2)
    return smooth[y : y + size, x : x + size] * 0.6


def to_uint8(picture):
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


# ---------------------------------------------------------------- nuclei


def generate_nuclei(seed, size=256):
    """One field of nuclei -> (size, size, 3) uint8 RGB, (size, size) int32 labels: 0 background, 1 ... n nuclei.

    Three of four fields are fluorescence, grey on black. The others are stained tissue, purple on a light background.
    """
    rng = generator(seed)
    kind = rng.choice(["fluorescence", *STAINS], p=[0.76, 0.08, 0.09, 0.07])
    labels = scatter(rng, size, stained=kind in STAINS)
    return tissue(rng, labels, kind) if kind in STAINS else fluorescence(rng, labels), labels


def outline(rng, centre, radius, ragged):
    """An irregular ellipse as (48, 2) int32 corners in sixteenths of a pixel."""
    angle = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    stretch = rng.uniform(1, 1.9)
    waves = (rng.normal(0, ragged / wave) * np.cos(wave * angle + rng.uniform(0, 2 * np.pi)) for wave in (2, 3, 4, 5))
    wobble = 1 + sum(waves)
    x = radius * stretch**0.5 * wobble * np.cos(angle)
    y = radius / stretch**0.5 * wobble * np.sin(angle)
    turn = rng.uniform(0, np.pi)
    corners = np.stack([x * np.cos(turn) - y * np.sin(turn), x * np.sin(turn) + y * np.cos(turn)], 1) + centre
    return np.rint(corners * 16).astype(np.int32)


def scatter(rng, size, stained):
    """Nuclei of many sizes, alone, touching or overlapping -> (size, size) int32. Later ones cover earlier ones."""
    labels = np.zeros((size, size), np.int32)
    if stained:
        typical = size / 256 * rng.uniform(7, 12)  # radius in pixels
        covered = rng.uniform(0.12, 0.34)  # fraction of the area
    else:
        typical = size / 256 * (rng.choice([6.5, 9, 13, 20]) * rng.uniform(0.85, 1.2))
        covered = rng.uniform(0.04, 0.28)
    company = rng.uniform(0.1, 0.65)  # how often a nucleus is placed beside an earlier one
    placed = []
    while len(placed) < max(2, covered * size**2 / (np.pi * typical**2)):
        radius = typical * np.exp(rng.normal(0, 0.2))
        centre = rng.uniform(-0.3 * radius, size + 0.3 * radius, 2)
        if placed and rng.random() < company:
            near, near_radius = placed[rng.integers(len(placed))]
            angle = rng.uniform(0, 2 * np.pi)
            distance = (near_radius + radius) * rng.uniform(0.75, 1.05)
            centre = near + distance * np.array([np.cos(angle), np.sin(angle)])
        placed.append((centre, radius))
        shape = np.zeros((size, size), np.uint8)
        cv2.fillPoly(shape, [outline(rng, centre, radius, 0.10 if stained else 0.06)], 1, shift=4)
        hidden = (labels[shape > 0] > 0).mean() if shape.any() else 1
        if hidden < 0.35:
            labels[shape > 0] = len(placed)
    return np.unique(labels, return_inverse=True)[1].reshape(size, size).astype(np.int32)


def depth(labels):
    """(H, W) float32: for each pixel of a nucleus, its distance in pixels to the edge of that nucleus; 0 outside."""
    inside = labels > 0
    inside[:, 1:] &= labels[:, 1:] == labels[:, :-1]
    inside[1:] &= labels[1:] == labels[:-1]
    return cv2.distanceTransform(inside.astype(np.uint8), cv2.DIST_L2, 3)


def fluorescence(rng, labels):
    """Bright nuclei on a dark, unevenly lit field, slightly out of focus, with camera noise."""
    size = labels.shape[0]
    unit = size / 256
    count = labels.max() + 1
    brightest = np.exp(rng.uniform(np.log(35), np.log(215)))
    level = brightest * np.clip(np.exp(rng.normal(-0.25, rng.uniform(0.1, 0.45), count)), 0.15, 1.15)
    level[0] = 0
    inner = depth(labels)
    dome = np.clip((inner + 0.5) / (rng.uniform(2, 6) * unit), 0, 1) ** 0.6 * (labels > 0)
    grain = 1 + rng.uniform(0.1, 0.35) * clouds(rng, size, 3.5 * unit) + 0.15 * clouds(rng, size, 9 * unit)
    light = level[labels].astype(np.float32) * dome * grain
    light = cv2.GaussianBlur(light, (0, 0), rng.uniform(0.7, 1.8) * unit)
    haze = cv2.GaussianBlur(light, (0, 0), 7 * unit) * rng.uniform(0.03, 0.16)
    uneven = 1 + rng.uniform(0, 0.22) * clouds(rng, size, size / 2)
    picture = (light + haze) * uneven + rng.uniform(3, 16) * (1 + 0.25 * clouds(rng, size, size / 2.5))
    shot = np.sqrt(np.maximum(picture, 0)) * rng.uniform(0.05, 0.35) + rng.uniform(0.3, 1.6)
    picture = picture + shot * rng.standard_normal(labels.shape)
    return np.repeat(to_uint8(picture)[..., None], 3, axis=2)


def tissue(rng, labels, stain):
    """Stained nuclei, darker at the rim and mottled inside, on a background of one of STAINS."""
    size = labels.shape[0]
    unit = size / 256
    paper, fibre, ink = (np.array(colour) + rng.normal(0, 7, 3) for colour in STAINS[stain])
    strands = (
        rng.uniform(0.1, 0.5) * streaks(rng, size, unit)
        + 0.35 * clouds(rng, size, 7 * unit)
        + 0.5 * clouds(rng, size, 24 * unit)
    )
    amount = 1 / (1 + np.exp(-(strands * 4 + rng.uniform(-1.5, 1)))) * rng.uniform(0.5, 1)
    amount = np.maximum(amount, rng.uniform(0, 0.6) * ghosts(rng, size))
    ground = paper + (fibre - paper) * amount[..., None] + 4 * clouds(rng, size, 2.5 * unit)[..., None]

    dark = np.clip(rng.normal(0.8, 0.14, labels.max() + 1), 0.35, 1.05)
    dark[0] = 0
    rim = np.exp(-depth(labels) / (2.2 * unit)) * rng.uniform(0, 0.3)
    chromatin = 0.28 * clouds(rng, size, 3 * unit) + 0.2 * clouds(rng, size, 6 * unit)
    taken = dark[labels] * (0.9 + rim + chromatin) * (labels > 0)
    taken = np.clip(cv2.GaussianBlur(taken.astype(np.float32), (0, 0), rng.uniform(0.8, 1.5) * unit), 0, 1.12)
    picture = ground * (1 - taken[..., None]) + ink * taken[..., None]
    picture = picture * (1 + 0.05 * clouds(rng, size, size / 2))[..., None]
    picture = picture + rng.normal(0, rng.uniform(1, 3), picture.shape)
    return to_uint8(picture)


def ghosts(rng, size):
    """(size, size) float32 in [0, 1]: cells whose nucleus lies outside the focal plane, pale and blurred."""
    pale = scatter(rng, size, stained=True) > 0
    return cv2.GaussianBlur(pale.astype(np.float32), (0, 0), rng.uniform(1.5, 4) * size / 256)


def streaks(rng, size, unit):
    """(size, size) float32 around 0: fibres in one random direction."""
    field = clouds(rng, 2 * size, 3 * unit)
    field = cv2.GaussianBlur(field, (0, 0), sigmaX=14 * unit, sigmaY=1.8 * unit)
    turn = cv2.getRotationMatrix2D((size, size), rng.uniform(0, 180), 1)
    field = cv2.warpAffine(field, turn, (2 * size, 2 * size), borderMode=cv2.BORDER_REFLECT)
    field = field[size // 2 : size // 2 + size, size // 2 : size // 2 + size]
    return field / max(float(field.std()), 1e-6) * 0.5


# ---------------------------------------------------------------- ants and bees

GROUNDS = (  # two RGB colours each: leaves, earth, petals, stone, shade
    ((58, 96, 38), (120, 150, 70)),
    ((112, 88, 62), (176, 152, 118)),
    ((196, 120, 150), (236, 214, 120)),
    ((150, 150, 142), (205, 200, 190)),
    ((40, 60, 36), (90, 120, 52)),
)


INSECTS = {  # head towards +x: centre, length and width of each ellipse in body lengths, RGB
    "ants": (
        (-0.32, 0.38, 0.25, (40, 26, 20)),
        (-0.10, 0.10, 0.08, (50, 32, 24)),
        (0.08, 0.30, 0.13, (56, 36, 26)),
        (0.36, 0.22, 0.20, (48, 30, 22)),
    ),
    "bees": (
        (-0.24, 0.58, 0.36, (214, 150, 40)),
        (-0.44, 0.06, 0.20, (38, 28, 20)),
        (-0.30, 0.06, 0.34, (38, 28, 20)),
        (-0.16, 0.06, 0.34, (38, 28, 20)),
        (0.14, 0.32, 0.32, (150, 106, 30)),
        (0.38, 0.18, 0.24, (44, 34, 26)),
    ),
}


def two_classes(seed, label, size=160):
    """A picture for the transfer job's demo, with label "ants" or "bees" -> (size, size, 3) uint8 RGB.

    It shows one insect of random position, direction and size on leaves, earth or petals, with blur and noise. Only the
    body tells the class: size, brightness and background do not.
    """
    rng = generator([seed, 1])
    low, high = (np.array(colour) + rng.normal(0, 12, 3) for colour in GROUNDS[rng.integers(len(GROUNDS))])
    mix = 0.5 + 0.4 * clouds(rng, size, size / 5) + 0.25 * clouds(rng, size, size / 16) + 0.15 * clouds(rng, size, 2)
    picture = low + (high - low) * np.clip(mix, -0.2, 1.2)[..., None]
    body, turn, centre = size * rng.uniform(0.35, 0.6), rng.uniform(0, 2 * np.pi), rng.uniform(0.38, 0.62, 2) * size
    light, tint = rng.uniform(0.75, 1.15), rng.normal(0, 8, 3)
    for along, length, width, colour in INSECTS[label]:
        x, y = centre + along * body * np.array([np.cos(turn), np.sin(turn)])
        cover = np.zeros((size, size), np.float32)
        cv2.ellipse(cover, ((x, y), (length * body, width * body), np.degrees(turn)), 1, -1)
        cover = cv2.GaussianBlur(cover, (0, 0), 0.012 * body)[..., None]
        picture = picture * (1 - cover) + (np.array(colour) + tint) * cover
    picture *= (1 + 0.12 * clouds(rng, size, size / 2))[..., None] * light
    picture = cv2.GaussianBlur(picture, (0, 0), rng.uniform(0.3, 0.9) * size / 160)
    return to_uint8(picture + rng.normal(0, rng.uniform(2, 6), picture.shape))
