"""Augmentation of the nuclei job: the parts that --augment combines, and CutMix.

transform = augmentation("flips,mild", 96, 96)
drawn = transform(image=image, mask=mask)   # (H, W, C) and (H, W, num_classes), uint8; drawn["image"], drawn["mask"]
"""

import os

import cv2

AUGMENTATIONS = ("flips", "mild", "colour", "copies", "affine", "cutmix")  # the parts that --augment combines


def augmentation(parts, input_h, input_w, rgb=True):
    """An albumentations Compose of parts such as "flips,mild", for uint8 images without alpha and their masks.

    flips: the eight flips and rotations by 90 degrees, or four flips where height and width differ.
    mild, colour: small or large changes of brightness and contrast, of hue and saturation (RGB only), and, in colour,
        of gamma. Brightness changes in proportion to the image: a shift by 15 % of the 255 levels would turn a dim
        fluorescence image black.
    copies: occasionally the negative or (RGB only) the grey image, as fluorescence is to histology.
    affine: half of the images, rotated by any angle, scaled by 0.7 to 1.4 and shifted by up to a tenth; the outside is
        filled by reflection.
    cutmix: nothing here. It takes two items, so Dataset applies it, with `paste`.
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
    if "copies" in parts:
        if rgb:
            chosen.append(A.ToGray(p=0.1))
        chosen.append(A.InvertImg(p=0.1))
    return A.Compose(chosen)


def paste(image, mask, other_image, other_mask, stream):
    """CutMix (Yun et al., ICCV 2019, https://arxiv.org/abs/1905.04899): a rectangle of another item replaces its own.

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
