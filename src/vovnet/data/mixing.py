"""Training samples made of several: mosaic, mixup, copy-paste. An image is uint8 (H, W, 3) RGB."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vovnet.models.boxes import Target
from vovnet.models.roi import BitmapMasks

Picture = tuple[Tensor, Target]
"""An image uint8 (H, W, 3) RGB and its target, with BitmapMasks or none."""

RGB = tuple[int, int, int]


def place_on_canvas(
    picture: Picture, canvas_size: tuple[int, int], offset: tuple[int, int], fill_rgb: RGB
) -> Picture:
    """The picture at a row and column of a canvas (height, width) that holds it whole."""
    image, target = picture
    if tuple(image.shape[:2]) == canvas_size:
        return picture
    canvas = _filled(canvas_size, fill_rgb)
    _paint(canvas, image, offset)
    return canvas, _moved(target, canvas_size, offset)


def join_mosaic(
    parts: Sequence[Picture], centre: tuple[int, int], size: tuple[int, int], fill_rgb: RGB
) -> Picture:
    """Four pictures around a centre (row, column) of an image of this size (height, width).

    They come in reading order, none larger than its quarter; smaller ones touch the centre.
    Bochkovskiy et al. 2020 (YOLOv4), figure 3.
    """
    joined = _filled(size, fill_rgb)
    targets = []
    for number, (image, target) in enumerate(parts):
        above, before = number < 2, number % 2 == 0
        row = centre[0] - image.shape[0] * above
        column = centre[1] - image.shape[1] * before
        _paint(joined, image, (row, column))
        targets.append(_moved(target, size, (row, column)))
    return joined, _concatenate(targets)


def mosaic_quarters(centre: tuple[int, int], size: tuple[int, int]) -> list[tuple[int, int]]:
    """Heights and widths of the quarters around a centre, in reading order."""
    heights, widths = (centre[0], size[0] - centre[0]), (centre[1], size[1] - centre[1])
    return [(height, width) for height in heights for width in widths]


def mix_pictures(first: Picture, second: Picture, share: float) -> Picture:
    """`share` of the first image over the rest of the second, with the objects of both.

    Both lie at the top left of a canvas that holds them; what is outside is black. Zhang et al.
    2018 (mixup), for detection Zhang et al. 2019 (Bag of freebies), section 3.1.
    """
    sizes = [picture[0].shape[:2] for picture in (first, second)]
    size = (max(height for height, _ in sizes), max(width for _, width in sizes))
    one, other = (place_on_canvas(p, size, (0, 0), (0, 0, 0)) for p in (first, second))
    blended = share * one[0].float() + (1 - share) * other[0].float()
    return blended.round().to(torch.uint8), _concatenate([one[1], other[1]])


def paste_objects(
    picture: Picture, source: Picture, chosen: Tensor, min_mask_pixels: int
) -> Picture:
    """The picture with some objects, chosen bool (N,), of another pasted over it by their masks.

    Objects that they cover lose those pixels, and are dropped below min_mask_pixels. What lies
    beyond the picture is cut. Ghiasi et al. 2021 (Simple copy-paste), section 3.
    """
    (image, target), (other, donor) = picture, source
    assert isinstance(target.masks, BitmapMasks)
    assert isinstance(donor.masks, BitmapMasks)
    height, width = (min(a, b) for a, b in zip(image.shape[:2], other.shape[:2], strict=True))
    picked = donor.masks.pixels[chosen]
    pasted = torch.zeros((len(picked), *image.shape[:2]), dtype=picked.dtype)
    pasted[:, :height, :width] = picked[:, :height, :width]
    cover = pasted.bool().any(0)
    result = image.clone()
    result[:height, :width][cover[:height, :width]] = other[:height, :width][cover[:height, :width]]
    masks = torch.cat([target.masks.pixels * ~cover, pasted])
    labels = torch.cat([target.labels, donor.labels[chosen]])
    visible = visible_masks(masks, min_mask_pixels)
    masks, labels = masks[visible], labels[visible]
    return result, Target(tight_boxes(masks), labels, BitmapMasks(masks), target.ignore_xyxy)


def visible_masks(masks: Tensor, min_mask_pixels: int) -> Tensor:
    """Bool (N,): which masks uint8 (N, H, W) have at least so many pixels."""
    pixels = [int(np.count_nonzero(mask)) for mask in masks.numpy()]
    return torch.tensor(pixels, dtype=torch.int64) >= min_mask_pixels


def tight_boxes(masks: Tensor) -> Tensor:
    """Boxes float32 (N, 4) xyxy around masks uint8 (N, H, W) of 0 and 1, zero for an empty mask."""
    sides = []
    for dimension in (1, 2):
        present = masks.amax(dimension)  # (N, W), then (N, H)
        first = present.argmax(1)
        last = present.shape[1] - present.flip(1).argmax(1)
        sides.append((first, torch.where(present.amax(1) > 0, last, first)))
    (x1, x2), (y1, y2) = sides
    return torch.stack([x1, y1, x2, y2], dim=1).float()


def _filled(size: tuple[int, int], colour: RGB) -> Tensor:
    return torch.tensor(colour, dtype=torch.uint8).expand(*size, 3).clone()


def _paint(canvas: Tensor, image: Tensor, offset: tuple[int, int]) -> None:
    (row, column), (height, width) = offset, image.shape[:2]
    canvas[row : row + height, column : column + width] = image


def _moved(target: Target, canvas_size: tuple[int, int], offset: tuple[int, int]) -> Target:
    row, column = offset
    step = torch.tensor([column, row, column, row], dtype=torch.float32)
    masks = None
    if isinstance(target.masks, BitmapMasks):
        pixels = target.masks.pixels
        height, width = pixels.shape[1:]
        moved = torch.zeros((len(pixels), *canvas_size), dtype=pixels.dtype)
        moved[:, row : row + height, column : column + width] = pixels
        masks = BitmapMasks(moved)
    return Target(target.boxes_xyxy + step, target.labels, masks, target.ignore_xyxy + step)


def _concatenate(targets: Sequence[Target]) -> Target:
    """The objects of targets of one canvas."""
    pixels = [target.masks.pixels for target in targets if isinstance(target.masks, BitmapMasks)]
    return Target(
        torch.cat([target.boxes_xyxy for target in targets]),
        torch.cat([target.labels for target in targets]),
        BitmapMasks(torch.cat(pixels)) if pixels else None,
        torch.cat([target.ignore_xyxy for target in targets]),
    )
