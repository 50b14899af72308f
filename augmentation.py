"""Augmentation of the nuclei job: the parts that --augment combines, CutMix, and pasted nuclei.

transform = augmentation("flips,mild", 96, 96)
drawn = transform(image=image, mask=mask)   # (H, W, C) and (H, W, num_classes), uint8; drawn["image"], drawn["mask"]
"""

import os

import cv2
import numpy as np

AUGMENTATIONS = (  # the parts that --augment combines
    *("flips", "mild", "colour", "copies", "affine", "cutmix"),
    *("stain", "light", "noise", "paste"),
)
WHOLE_IMAGES = ("affine", "cutmix")  # for --target masks alone
OF_NUCLEI = ("paste",)  # for --target instances alone
COVERED = 0.2  # largest fraction of a pasted nucleus that lies on other ones


def augmentation(parts, input_h, input_w, rgb=True):
    """An albumentations Compose of parts such as "flips,mild", for uint8 images without alpha and their masks.

    flips: the eight flips and rotations by 90 degrees, or four flips where height and width differ.
    mild, colour: small or large changes of brightness and contrast, of hue and saturation (RGB only), and, in colour,
        of gamma. Brightness changes in proportion to the image: a shift by 15 % of the 255 levels would turn a dim
        fluorescence image black.
    copies: occasionally the negative or (RGB only) the grey image, as fluorescence is to histology.
    affine: half of the images, rotated by any angle, scaled by 0.7 to 1.4 and shifted by up to a tenth; the outside is
        filled by reflection.
    stain: half of the images, small changes of hue and saturation (RGB only); a third, another tone curve for each
        channel, as another stain or lamp would give.
    light: half of the images, a gamma of 0.5 to 2; half, brightness by -50 to +20 %, contrast by -30 to +20 %.
    noise: a sixth of the images each, blurred by up to 1.2 pixels, and with noise of up to 5 % of the range.
    cutmix, paste: nothing here. They take two items, or single nuclei, so the data sets apply them.
    """
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # otherwise importing it asks the network for a newer version
    import albumentations as A  # late: it takes three seconds, and validation does not need it

    parts, chosen = parts.split(","), []
    if "affine" in parts:
        place = {"scale": (0.7, 1.4), "keep_ratio": True, "rotate": (-180, 180), "translate_percent": (-0.1, 0.1)}
        chosen.append(A.Affine(**place, border_mode=cv2.BORDER_REFLECT_101, p=0.5))
    if "flips" in parts:
        chosen += [A.D4(p=1)] if input_h == input_w else [A.HorizontalFlip(p=0.5), A.VerticalFlip(p=0.5)]
    for part, darker, hue, saturation in (("mild", 0.15, 10, 15), ("colour", 0.3, 30, 40)):
        if part not in parts:
            continue
        light = (-darker, 0.15)  # more would turn the nuclei of bright images white
        chosen.append(A.RandomBrightnessContrast(light, light, brightness_by_max=False, p=0.5))
        if part == "colour":
            chosen.append(A.RandomGamma(gamma_limit=(60, 120), p=0.5))
        if rgb:
            chosen.append(A.HueSaturationValue(hue, saturation, val_shift_limit=0, p=0.5))
    if "stain" in parts:
        if rgb:
            chosen.append(A.HueSaturationValue(20, 30, val_shift_limit=0, p=0.5))
        chosen.append(A.RandomToneCurve(scale=0.15, per_channel=True, p=0.33))
    if "light" in parts:
        chosen.append(A.RandomGamma(gamma_limit=(50, 200), p=0.5))
        chosen.append(A.RandomBrightnessContrast((-0.5, 0.2), (-0.3, 0.2), brightness_by_max=False, p=0.5))
    if "copies" in parts:
        if rgb:
            chosen.append(A.ToGray(p=0.1))
        chosen.append(A.InvertImg(p=0.1))
    if "noise" in parts:
        chosen.append(A.GaussianBlur(blur_limit=0, sigma_limit=(0.3, 1.2), p=0.17))
        chosen.append(A.GaussNoise(std_range=(0.01, 0.05), per_channel=False, p=0.17))
    return A.Compose(chosen)


def paste(image, mask, other_image, other_mask, stream):
    """CutMix (Yun et al., ICCV 2019, https://arxiv.org/abs/1905.04899): a rectangle is replaced by another item's.

    All arrays are (H, W, C); stream is a numpy Generator. The sides of the rectangle are a quarter to three quarters of
    the image's. Returns new arrays, image and mask.
    """
    h, w = image.shape[:2]
    height, width = (max(1, round(side * stream.uniform(0.25, 0.75))) for side in (h, w))
    top, left = stream.integers(h - height + 1), stream.integers(w - width + 1)
    part = slice(top, top + height), slice(left, left + width)
    image, mask = image.copy(), mask.copy()
    image[part], mask[part] = other_image[part], other_mask[part]
    return image, mask


def paste_nuclei(image, labels, stream, most=8):
    """Copy-paste within one crop (Ghiasi et al., CVPR 2021, https://arxiv.org/abs/2012.07177): more nuclei touch.

    Up to `most` copies of the crop's own nuclei, turned and flipped, are set beside other nuclei of it and cover what
    is there. A copy that would leave the crop, or lie with more than COVERED of itself on nuclei, is left out.
    image: (H, W, C) uint8; labels: (H, W) int32 label map. stream is a numpy Generator. Returns new arrays.
    """
    image, labels = image.copy(), labels.copy()
    originals, first_new = whole_nuclei(image, labels), labels.max(initial=0) + 1
    for number in range(first_new, first_new + int(stream.integers(1, most + 1))):
        if not originals:
            break
        picture, shape, _, radius = originals[stream.integers(len(originals))]
        _, _, centre, other_radius = originals[stream.integers(len(originals))]
        turns, flip, angle = int(stream.integers(4)), int(stream.choice((1, -1))), stream.uniform(0, 2 * np.pi)
        picture, shape = np.rot90(picture, turns)[:, ::flip], np.rot90(shape, turns)[:, ::flip]
        place = centre + (radius + other_radius) * np.array([np.sin(angle), np.cos(angle)])
        top, left = np.rint(place - np.array(shape.shape) / 2).astype(int)
        bottom, right = top + shape.shape[0], left + shape.shape[1]
        if min(top, left) < 0 or bottom > labels.shape[0] or right > labels.shape[1]:
            continue
        part = slice(top, bottom), slice(left, right)
        if (labels[part][shape] > 0).mean() > COVERED:
            continue
        weight = cv2.blur(shape.astype(np.float32), (3, 3))[..., None]  # a soft edge
        image[part] = np.rint(image[part] * (1 - weight) + picture * weight)
        labels[part][shape] = number
    return image, labels


def whole_nuclei(image, labels):
    """-> [(its pixels (h, w, C) with a margin of one, its shape (h, w) bool, its centre (y, x), its radius), ...].

    Nuclei at the border of the crop, which may be cut, are left out.
    """
    from scipy import ndimage  # late: --help does without it

    found = []
    for label, box in enumerate(ndimage.find_objects(labels), 1):
        if box is None or any(side.start < 1 or side.stop >= n for side, n in zip(box, labels.shape, strict=True)):
            continue
        wider = tuple(slice(side.start - 1, side.stop + 1) for side in box)
        shape = labels[wider] == label
        centre = np.array([(side.start + side.stop) / 2 for side in wider])
        found.append((image[wider].copy(), shape, centre, np.sqrt(shape.sum() / np.pi)))
    return found
