"""Which part of an image a training sample shows: a window of one scale, SSD's random crop, or all
of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from vovnet.data.labels import ImageRecord
from vovnet.preprocess import Preprocess

ZOOM_OUT_PROBABILITY, ZOOM_OUT_SIDES = 0.5, (1.0, 4.0)
CROP_SCALES, CROP_RATIOS = (0.3, 1.0), (0.5, 2.0)
CROP_OVERLAPS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
"""Least overlap of a crop with some object; 0 takes any crop, 1 leaves the picture whole."""
CROP_TRIALS = 50
_LEAST_SIDE = 4  # a crop of 0.3 of it still has a pixel


@dataclass(frozen=True, slots=True)
class Window:
    """A part of an image, in its own pixels, and where it goes, after it was transposed.

    output_size    height and width it is resized to
    canvas_size    those of the sample
    offset         row and column of the part in the sample; all around it is filled
    centres_only   objects whose centre the part does not hold are left out
    """

    top: int
    left: int
    height: int
    width: int
    transposed: bool
    output_size: tuple[int, int]
    canvas_size: tuple[int, int]
    offset: tuple[int, int] = (0, 0)
    centres_only: bool = False


def random_window(
    record: ImageRecord,
    preprocess: Preprocess,
    *,
    output_size: tuple[int, int],
    scale_range: tuple[float, float],
    quarter_turn: float,
) -> Window:
    """A window that becomes the output size, or all of a side that is too short for it.

    scale_range is relative to the preprocess' resize, quarter_turn a probability. Draws from
    torch's generator.
    """
    low, high = scale_range
    # Uniform in the logarithm: half the size is as likely as twice the size.
    scale = low * (high / low) ** float(torch.rand(()))
    transposed = bool(torch.rand(()) < quarter_turn)
    wanted = output_size[::-1] if transposed else output_size
    sides = (record.height, record.width)
    starts, lengths, outputs = [], [], []
    for side, base, output in zip(sides, preprocess.output_size(*sides), wanted, strict=True):
        factor = scale * base / side
        length = min(side, max(1, round(output / factor)))
        starts.append(int(torch.randint(side - length + 1, ())))
        lengths.append(length)
        # A window cut short by the image keeps the scale, not the output size.
        outputs.append(output if length < side else min(output, max(1, round(side * factor))))
    resized = (outputs[1], outputs[0]) if transposed else (outputs[0], outputs[1])
    return Window(starts[0], starts[1], lengths[0], lengths[1], transposed, resized, resized)


def whole_window(
    record: ImageRecord,
    preprocess: Preprocess,
    *,
    short_sides: Sequence[int],
    quarter_turn: float,
) -> Window:
    """All of an image, as the preprocess would resize it if its short_side were one of these.

    quarter_turn is a probability. Draws from torch's generator.
    """
    short_side = short_sides[int(torch.randint(len(short_sides), ()))]
    transposed = bool(torch.rand(()) < quarter_turn)
    rule = replace(preprocess, short_side=short_side, scale=1.0, square=None, crop_size=None)
    height, width = rule.output_size(record.height, record.width)
    resized = (width, height) if transposed else (height, width)
    return Window(0, 0, record.height, record.width, transposed, resized, resized)


def ssd_window(
    record: ImageRecord, boxes_xyxy: Tensor, *, output_size: tuple[int, int], quarter_turn: float
) -> Window:
    """SSD's view of an image with objects (N, 4): zoomed out, then cropped, stretched to the size.

    The zoom shows the picture on a canvas of up to 4 times its sides, every second time; the crop
    has 0.3..1 of both sides, a ratio of 1/2..2, and a least overlap with some object. Draws from
    torch's generator, by torchvision's RandomZoomOut and RandomIoUCrop, which only choose here:
    no pixel moves before it is known which are needed. Liu et al. 2016, section 2.2 (3.6 of the
    journal version for the zoom).
    """
    canvas = (record.height, record.width)
    top = left = 0
    if float(torch.rand(())) < ZOOM_OUT_PROBABILITY:
        zoom = v2.RandomZoomOut(side_range=ZOOM_OUT_SIDES, p=1.0)
        left, top, right, bottom = zoom.make_params([_no_pixels(canvas)])["padding"]
        canvas = (top + record.height + bottom, left + record.width + right)
    y, x, height, width = _iou_crop(boxes_xyxy + torch.tensor([left, top, left, top]), canvas)
    transposed = bool(torch.rand(()) < quarter_turn)
    wanted = output_size[::-1] if transposed else output_size
    rows = _shown(y - top, height, record.height, wanted[0])
    columns = _shown(x - left, width, record.width, wanted[1])
    sizes, offsets = (rows[2], columns[2]), (rows[3], columns[3])
    if transposed:
        sizes, offsets = sizes[::-1], offsets[::-1]
    return Window(
        rows[0], columns[0], rows[1], columns[1], transposed, sizes, output_size, offsets, True
    )


def _iou_crop(boxes_xyxy: Tensor, canvas: tuple[int, int]) -> tuple[int, int, int, int]:
    """Top, left, height and width of the crop; all of the canvas where nothing can be cropped."""
    whole = (0, 0, *canvas)
    if not len(boxes_xyxy) or min(canvas) < _LEAST_SIDE:
        return whole
    crop = v2.RandomIoUCrop(*CROP_SCALES, *CROP_RATIOS, list(CROP_OVERLAPS), CROP_TRIALS)
    boxes = tv_tensors.BoundingBoxes(boxes_xyxy, format="XYXY", canvas_size=canvas)
    chosen = crop.make_params([_no_pixels(canvas), boxes])
    names = ("top", "left", "height", "width")
    return tuple(int(chosen[name]) for name in names) if chosen else whole  # type: ignore[return-value]


def _no_pixels(canvas: tuple[int, int]) -> tv_tensors.Image:
    """An image of this size that takes one byte: a choice looks at the size alone."""
    return tv_tensors.Image(torch.zeros(1, dtype=torch.uint8).expand(3, *canvas))


def _shown(start: int, length: int, side: int, output: int) -> tuple[int, int, int, int]:
    """What of a crop's side lies in the image: its start and length, then its output and offset.

    The crop may begin before the image and end behind it; all of it becomes `output` pixels.
    """
    first = min(max(start, 0), side - 1)
    last = max(min(start + length, side), first + 1)
    scale = output / length
    resized = min(output, max(1, round((last - first) * scale)))
    return (
        first,
        last - first,
        resized,
        min(max(0, round((first - start) * scale)), output - resized),
    )
