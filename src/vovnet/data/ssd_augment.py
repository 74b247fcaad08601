"""The colours, fill and resampling of SSD's augmentation (Liu et al. 2016, its Caffe code)."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional

BRIGHTNESS = 32 / 255  # largest step up or down, of the range of values
CONTRAST = SATURATION = (0.5, 1.5)  # factors
HUE = 18 / 180  # largest turn of the colour circle; OpenCV counts half degrees
FILL_RGB = (123, 117, 104)
"""ImageNet's mean colour, around a picture that was zoomed out."""

_RESAMPLING = (
    Image.Resampling.NEAREST,
    Image.Resampling.BOX,
    Image.Resampling.BILINEAR,
    Image.Resampling.BICUBIC,
    Image.Resampling.LANCZOS,
)


def distort_colours(image: Tensor, probability: float) -> Tensor:
    """An image uint8 (3, H, W) RGB with other brightness, contrast, saturation and hue.

    Each changes with this probability; contrast comes second or last. Draws from torch's
    generator. torchvision's RandomPhotometricDistort follows another rule: it multiplies where
    SSD adds to the brightness, fades towards grey where SSD scales the values and the saturation
    of HSV, and permutes channels.
    """
    drawn = torch.rand(4)  # how much
    happens = torch.rand(4) < probability
    contrast_last = bool(torch.rand(()) < 0.5)
    pixels = image.as_subclass(Tensor).float() / 255
    steps = [_brighten, _scale, _saturate, _turn_hue]
    order = (0, 2, 3, 1) if contrast_last else (0, 1, 2, 3)
    for step in order:
        if happens[step]:
            pixels = steps[step](pixels, float(drawn[step])).clamp(0, 1)
    return (pixels * 255).round().to(torch.uint8)


def _brighten(pixels: Tensor, drawn: float) -> Tensor:
    return pixels + BRIGHTNESS * (2 * drawn - 1)


def _scale(pixels: Tensor, drawn: float) -> Tensor:
    return pixels * (CONTRAST[0] + drawn * (CONTRAST[1] - CONTRAST[0]))


def _saturate(pixels: Tensor, drawn: float) -> Tensor:
    """Scales the saturation of HSV, of at most 1: the distance of each channel to the largest."""
    factor = SATURATION[0] + drawn * (SATURATION[1] - SATURATION[0])
    peak = pixels.amax(0)
    spread = peak - pixels.amin(0)
    full = peak / spread.clamp(min=1e-6)  # the factor of saturation 1
    return peak - (peak - pixels) * full.clamp(max=factor)


def _turn_hue(pixels: Tensor, drawn: float) -> Tensor:
    turned: Tensor = functional.adjust_hue(pixels, HUE * (2 * drawn - 1))
    return turned


def resize_randomly(image: Tensor, output_size: tuple[int, int]) -> Tensor:
    """An image uint8 (3, H, W) at another size, by one of five kinds of resampling at random."""
    chosen = _RESAMPLING[int(torch.randint(len(_RESAMPLING), ()))]
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    resized = np.array(picture.resize(output_size[::-1], chosen))
    return torch.from_numpy(resized).permute(2, 0, 1)
