"""The one in-memory form of labelled images, and their masks decoded on demand."""

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from vovnet.errors import DataError
from vovnet.results import MaskCrop


class Rle(TypedDict):
    """Compressed run lengths of a mask, column by column, as pycocotools takes them."""

    size: list[int]
    counts: bytes


Polygons = list[list[float]]
Segmentation = Rle | Polygons | None


@dataclass(frozen=True, slots=True)
class Annotation:
    """One labelled object: `label` counts from 0 in the order of the classes, the box is in pixels.

    What is difficult (Pascal VOC) is neither rewarded nor punished, in training or in evaluation.
    """

    id: int
    label: int
    box_xyxy: tuple[float, float, float, float]
    segmentation: Segmentation
    area: float
    is_crowd: bool
    is_difficult: bool = False

    @property
    def is_ignored(self) -> bool:
        """Whether it is no object to learn and to count: a crowd region or a difficult one."""
        return self.is_crowd or self.is_difficult


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One image with its declared size in pixels and its annotations, crowd regions included."""

    id: int
    path: Path
    height: int
    width: int
    annotations: tuple[Annotation, ...]


@dataclass(frozen=True, slots=True)
class DetectionData:
    """A data set: `class_names[label]` and `category_ids[label]` belong to a label."""

    images: tuple[ImageRecord, ...]
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    annotation_file: Path


def brief(value: object) -> str:
    """A value of a hostile file, short enough for one line."""
    return reprlib.repr(value)[:120]


def rle_runs(counts: bytes, height: int, width: int) -> list[int]:
    """Run lengths of a compressed RLE, background first, column by column.

    Raises DataError unless they are not negative and fill height x width pixels exactly.
    """
    runs: list[int] = []
    value = shift = 0
    # A loop, as most masks have less than a hundred characters: numpy would take longer.
    for character in counts:
        code = character - 48
        if not 0 <= code < 64 or shift > 30:
            raise DataError(f"broken RLE: expected characters of run lengths, got {brief(counts)}")
        value |= (code & 31) << shift
        shift += 5
        if code < 32:  # the last of this number
            value -= (code & 16) << (shift - 4)
            # From the fourth on, a number is the difference to the one two before it.
            runs.append(value + runs[-2] if len(runs) > 2 else value)
            value = shift = 0
    if shift or not runs or min(runs) < 0 or sum(runs) != height * width:
        raise DataError(
            f"broken RLE: expected runs of {height} x {width} = {height * width} pixels, "
            f"got {brief(runs)}, {sum(runs)} pixels"
        )
    return runs


def mask_runs(annotation: Annotation, height: int, width: int) -> list[int] | None:
    """Run lengths of the segmentation as in `rle_runs`, None where there is none.

    Raises DataError on a broken RLE.
    """
    if annotation.segmentation is None:
        return None
    if isinstance(annotation.segmentation, dict):
        return rle_runs(annotation.segmentation["counts"], height, width)
    parts = coco_mask.frPyObjects(annotation.segmentation, height, width)
    return rle_runs(coco_mask.merge(parts)["counts"], height, width)


def decode_mask(annotation: Annotation, height: int, width: int) -> MaskCrop:
    """The mask as the smallest crop that holds all of it, 0 x 0 where it is empty.

    Without a segmentation it is the box, rounded to pixels. Raises DataError on a broken RLE.
    """
    runs = mask_runs(annotation, height, width)
    if runs is None:
        return _box_mask(annotation.box_xyxy, height, width)
    ends = np.cumsum(runs, dtype=np.int64)
    foreground_ends = ends[1::2]
    foreground_starts = ends[::2][: len(foreground_ends)]
    filled = foreground_ends > foreground_starts
    starts, stops = foreground_starts[filled], foreground_ends[filled]
    if not len(starts):
        return MaskCrop(0, 0, np.zeros((0, 0), dtype=bool))
    first_column = int(starts[0]) // height
    last_column = (int(stops[-1]) - 1) // height
    # Only the columns that hold something are decoded: masks are far smaller than images.
    steps = np.zeros((last_column - first_column + 1) * height + 1, dtype=np.int8)
    steps[starts - first_column * height] += 1
    steps[stops - first_column * height] -= 1
    columns = np.cumsum(steps[:-1], dtype=np.int8).reshape(-1, height).astype(bool)
    rows = np.flatnonzero(columns.any(axis=0))
    top, bottom = int(rows[0]), int(rows[-1]) + 1
    return MaskCrop(first_column, top, np.ascontiguousarray(columns[:, top:bottom].T))


def _box_mask(box_xyxy: tuple[float, float, float, float], height: int, width: int) -> MaskCrop:
    x1, x2 = (min(max(round(value), 0), width) for value in box_xyxy[::2])
    y1, y2 = (min(max(round(value), 0), height) for value in box_xyxy[1::2])
    if x2 <= x1 or y2 <= y1:
        return MaskCrop(0, 0, np.zeros((0, 0), dtype=bool))
    return MaskCrop(x1, y1, np.ones((y2 - y1, x2 - x1), dtype=bool))


def decode_masks(annotations: Sequence[Annotation], height: int, width: int) -> NDArray[np.bool_]:
    """Masks (N, height, width) of the annotations of one image; see `decode_mask`."""
    masks = np.zeros((len(annotations), height, width), dtype=bool)
    for mask, annotation in zip(masks, annotations, strict=True):
        crop = decode_mask(annotation, height, width)
        rows, columns = crop.pixels.shape
        mask[crop.y : crop.y + rows, crop.x : crop.x + columns] = crop.pixels
    return masks


def has_masks(data: DetectionData) -> bool:
    """Whether any object of the data set, crowds aside, has a segmentation."""
    return any(
        annotation.segmentation is not None and not annotation.is_crowd
        for image in data.images
        for annotation in image.annotations
    )
