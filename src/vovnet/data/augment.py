"""What the network sees: random windows, flips, colours in training; else only the resize."""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from vovnet.data.labels import Annotation, DetectionData, ImageRecord, decode_mask, has_masks
from vovnet.errors import ConfigError, DataError
from vovnet.images import read_image
from vovnet.models.boxes import Target
from vovnet.models.roi import BitmapMasks
from vovnet.preprocess import Preprocess
from vovnet.results import MaskCrop

BATCH_DIVISOR = 32
DEFAULT_CACHE_BYTES = 512 * 1024**2
_OVERHEAD_BYTES = 256  # of the objects around the pixels, which are few in a small mask

# The largest value of each probability and strength; the smallest is 0.
_LIMITS = {
    "horizontal_flip": 1.0,
    "vertical_flip": 1.0,
    "quarter_turn": 1.0,
    "brightness": 1.0,
    "contrast": 1.0,
    "saturation": 1.0,
    "hue": 0.5,
    "grayscale": 1.0,
    "invert": 1.0,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainPreset:
    """Random changes of a training image; raises ConfigError on a value out of range.

    output_size         height and width of the crop that the network gets
    scale_range         lowest and highest resize factor, relative to the evaluation's resize
    horizontal_flip, vertical_flip, quarter_turn, grayscale, invert    probabilities
    brightness, contrast, saturation    factors are drawn from 1 - value .. 1 + value
    hue                 largest turn of the colour circle, of at most 0.5
    min_mask_pixels     objects of which fewer pixels are left in the crop are dropped
    """

    output_size: tuple[int, int] = (256, 256)
    scale_range: tuple[float, float] = (0.75, 1.33)
    horizontal_flip: float = 0.5
    vertical_flip: float = 0.0
    quarter_turn: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    grayscale: float = 0.0
    invert: float = 0.0
    min_mask_pixels: int = 4

    def __post_init__(self) -> None:
        sizes = (*_pair(self.output_size, "output_size"), self.min_mask_pixels)
        if not all(isinstance(value, int) and value >= 1 for value in sizes):
            raise ConfigError(
                "augment: expected whole numbers of at least 1 as output_size and "
                f"min_mask_pixels, got {self.output_size!r} and {self.min_mask_pixels!r}"
            )
        low, high = _pair(self.scale_range, "scale_range")
        if not (_is_number(low) and _is_number(high) and 0 < low <= high < math.inf):
            raise ConfigError(
                f"augment.scale_range: expected 0 < low <= high, got {self.scale_range!r}"
            )
        for name, limit in _LIMITS.items():
            value = getattr(self, name)
            if not (_is_number(value) and 0 <= value <= limit):
                raise ConfigError(f"augment.{name}: expected 0..{limit}, got {value!r}")

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> "TrainPreset":
        """The defaults with these fields changed; raises ConfigError on an unknown field."""
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(value) - set(known))
        if unknown:
            raise ConfigError(f"augment: expected some of {', '.join(known)}, got {unknown[0]!r}")
        # YAML and JSON have lists only.
        changes: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in value.items()
        }
        return replace(cls(), **changes)


def _pair(value: object, name: str) -> tuple[Any, Any]:
    if not isinstance(value, tuple) or len(value) != 2:
        raise ConfigError(f"augment.{name}: expected two numbers, got {value!r}")
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# Evaluation changes nothing but the size, by the rule that travels with the model.
EvalPreset = Preprocess

TrainItem = tuple[Tensor, Target, Path]
Value = TypeVar("Value", NDArray[np.uint8], MaskCrop)


@dataclass(slots=True)
class TrainBatch:
    """Images uint8 (B, H, W, 3) RGB, zero beyond their sizes int64 (B, 2), height and width."""

    images: Tensor
    sizes: Tensor
    targets: list[Target]
    paths: list[Path]

    def to(self, device: torch.device | str) -> "TrainBatch":
        """The same batch on a device."""
        targets = [target.to(device) for target in self.targets]
        return TrainBatch(self.images.to(device), self.sizes.to(device), targets, self.paths)


def collate_train(items: Sequence[TrainItem]) -> TrainBatch:
    """Batch of items, zero padded at the right and bottom to a multiple of 32 pixels."""
    sizes = torch.tensor([item[0].shape[:2] for item in items], dtype=torch.int64)  # (B, 2)
    height, width = (-(-int(side) // BATCH_DIVISOR) * BATCH_DIVISOR for side in sizes.amax(0))
    images = torch.zeros((len(items), height, width, 3), dtype=torch.uint8)
    for padded, (image, _, _) in zip(images, items, strict=True):
        padded[: image.shape[0], : image.shape[1]] = image
    return TrainBatch(images, sizes, [item[1] for item in items], [item[2] for item in items])


class EvalDataset(Dataset[tuple[NDArray[np.uint8], ImageRecord]]):
    """Images resized by the preprocess, uint8 (H, W, 3) RGB arrays, each with its record.

    Items raise ImageError on a file that cannot be used and DataError where its size is not that
    of the record.
    """

    def __init__(self, data: DetectionData, preprocess: EvalPreset) -> None:
        self.data = data
        self.preprocess = preprocess

    def __len__(self) -> int:
        return len(self.data.images)

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], ImageRecord]:
        record = self.data.images[index]
        return self.preprocess.resize(_read(record)), record


class TrainDataset(Dataset[TrainItem]):
    """Augmented samples; sample i of an epoch depends on the seed, the epoch and i alone.

    An item is the image uint8 (H, W, 3) RGB, its target in pixels of that image, and the file. H
    and W are the preset's output size, or less where the image is smaller than the window. Crowd
    regions become `ignore_xyxy`. Masks are None only where no object of the data set has one;
    among others an object without a mask gets its box. Images and masks are kept in memory, up to
    cache_bytes in each process that loads items.

    Items raise ImageError on a file that cannot be used, DataError where its size is not that of
    the record or a mask is broken.
    """

    def __init__(
        self,
        data: DetectionData,
        preprocess: Preprocess,
        *,
        preset: TrainPreset,
        seed: int = 0,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> None:
        if seed < 0:
            raise ConfigError(f"seed: expected at least 0, got {seed}")
        self.data = data
        self.preprocess = preprocess
        self.preset = preset
        self.seed = seed
        self.with_masks = has_masks(data)
        # In shared memory, so that worker processes that outlive an epoch see the next one.
        self._epoch = torch.zeros((), dtype=torch.int64)
        self._epoch.share_memory_()
        mask_bytes = cache_bytes // 4
        self._images = _Cache[NDArray[np.uint8]](cache_bytes - mask_bytes)
        self._masks = _Cache[MaskCrop](mask_bytes)
        self._flips = v2.Compose(
            [
                v2.RandomHorizontalFlip(preset.horizontal_flip),
                v2.RandomVerticalFlip(preset.vertical_flip),
            ]
        )
        self._colours = v2.Compose(
            [
                v2.ColorJitter(preset.brightness, preset.contrast, preset.saturation, preset.hue),
                v2.RandomGrayscale(preset.grayscale),
                v2.RandomInvert(preset.invert),
            ]
        )

    def set_epoch(self, epoch: int) -> None:
        """Choose the samples of epoch 0, 1, ...; call it before the epoch's first item."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.data.images)

    def __getitem__(self, index: int) -> TrainItem:
        record = self.data.images[index]
        pixels = self._images.get(index, partial(_read, record))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_item_seed(self.seed, int(self._epoch), index))
            window = _random_window(record, self.preprocess, self.preset)
            labels, sample = self._crop(pixels, index, window)
            # Turned and flipped before the resize, while the many masks are still small.
            if window.transposed:
                sample = _transpose(sample)
            image, boxes, crowds, masks = self._flips(*sample)
            steps = [v2.Resize(list(window.output_size), antialias=True), self._colours]
            # Colours cost most of the time, so they go where the pixels are fewer.
            enlarged = math.prod(window.output_size) > window.height * window.width
            for step in reversed(steps) if enlarged else steps:
                image, boxes, crowds = step(image, boxes, crowds)
        masks = None if masks is None else _resize_masks(masks, window.output_size)
        target = _build_target(labels, boxes, crowds, masks, self.preset.min_mask_pixels)
        return image.as_subclass(Tensor).permute(1, 2, 0).contiguous(), target, record.path

    def _crop(
        self, pixels: NDArray[np.uint8], index: int, window: "_Window"
    ) -> tuple[Tensor, "_Sample"]:
        """Labels (N,) of the objects in the window, and the window with what it shows."""
        rows = slice(window.top, window.top + window.height)
        columns = slice(window.left, window.left + window.width)
        image = tv_tensors.Image(torch.from_numpy(pixels[rows, columns]).permute(2, 0, 1))
        annotations = self.data.images[index].annotations
        boxes = torch.tensor([a.box_xyxy for a in annotations], dtype=torch.float64).reshape(-1, 4)
        boxes -= torch.tensor([window.left, window.top] * 2)
        touches = (boxes[:, 2:] > 0) & (boxes[:, :2] < torch.tensor([window.width, window.height]))
        is_crowd = torch.tensor([a.is_crowd for a in annotations], dtype=torch.bool)
        objects = (touches.all(1) & ~is_crowd).nonzero()[:, 0].tolist()
        labels = torch.tensor([annotations[i].label for i in objects], dtype=torch.int64)
        size = (window.height, window.width)
        crowds = _tv_boxes(boxes[touches.all(1) & is_crowd].float(), size)
        masks = self._crop_masks(index, objects, window) if self.with_masks else None
        return labels, (image, _tv_boxes(boxes[objects].float(), size), crowds, masks)

    def _crop_masks(self, index: int, objects: Sequence[int], window: "_Window") -> tv_tensors.Mask:
        """Masks uint8 (N, H, W) of these annotations of the image, in pixels of the window."""
        record = self.data.images[index]
        masks = np.zeros((len(objects), window.height, window.width), dtype=np.uint8)
        for mask, position in zip(masks, objects, strict=True):
            make = partial(_decode, record.annotations[position], record)
            _paste(mask, self._masks.get((index, position), make), window)
        return tv_tensors.Mask(torch.from_numpy(masks))


class _Cache(Generic[Value]):
    """Keeps what was made until its bytes are used up, and then for good: an epoch uses all."""

    def __init__(self, limit_bytes: int) -> None:
        self._left = limit_bytes
        self._values: dict[Hashable, Value] = {}

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value of the key, made now where it is not kept."""
        if key in self._values:
            return self._values[key]
        value = make()
        size = _OVERHEAD_BYTES + (value.pixels if isinstance(value, MaskCrop) else value).nbytes
        if size <= self._left:
            self._left -= size
            self._values[key] = value
        return value


@dataclass(frozen=True, slots=True)
class _Window:
    """A part of an image, in its own pixels, and the size it gets after it was transposed."""

    top: int
    left: int
    height: int
    width: int
    transposed: bool
    output_size: tuple[int, int]


_Sample = tuple[
    tv_tensors.Image, tv_tensors.BoundingBoxes, tv_tensors.BoundingBoxes, tv_tensors.Mask | None
]
"""Image, boxes of objects, boxes of crowds, masks of objects; transforms change all alike."""


def _read(record: ImageRecord) -> NDArray[np.uint8]:
    """The pixels, which must have the declared size: annotations rely on it."""
    image = read_image(record.path, expected_size=(record.height, record.width))
    if image.shape[:2] != (record.height, record.width):
        raise DataError(
            f"{record.path}: expected {record.height} x {record.width} pixels (height x width) "
            f"as in the annotation file, got {image.shape[0]} x {image.shape[1]}"
        )
    return image


def _decode(annotation: Annotation, record: ImageRecord) -> MaskCrop:
    try:
        return decode_mask(annotation, record.height, record.width)
    except DataError as error:
        raise DataError(f"{record.path}: annotation {annotation.id}: {error}") from error


def _item_seed(seed: int, epoch: int, index: int) -> int:
    return int(np.random.SeedSequence([seed, epoch, index]).generate_state(1, np.uint64)[0])


def _random_window(record: ImageRecord, preprocess: Preprocess, preset: TrainPreset) -> _Window:
    """A window that becomes the preset's output size, or all of a side that is too short for it."""
    low, high = preset.scale_range
    # Uniform in the logarithm: half the size is as likely as twice the size.
    scale = low * (high / low) ** float(torch.rand(()))
    transposed = bool(torch.rand(()) < preset.quarter_turn)
    wanted = preset.output_size[::-1] if transposed else preset.output_size
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
    return _Window(starts[0], starts[1], lengths[0], lengths[1], transposed, resized)


def _tv_boxes(boxes_xyxy: Tensor, canvas_size: tuple[int, int]) -> tv_tensors.BoundingBoxes:
    return tv_tensors.BoundingBoxes(boxes_xyxy, format="XYXY", canvas_size=canvas_size)


def _transpose(sample: _Sample) -> _Sample:
    """Swap x and y; with the flips that follow, quarter turns either way."""
    image, boxes, crowds, masks = sample
    size = (image.shape[2], image.shape[1])
    turned = [_tv_boxes(x.as_subclass(Tensor)[:, [1, 0, 3, 2]], size) for x in (boxes, crowds)]
    if masks is not None:
        masks = tv_tensors.Mask(masks.transpose(1, 2))
    return tv_tensors.Image(image.transpose(1, 2)), turned[0], turned[1], masks


def _paste(mask: NDArray[np.uint8], crop: MaskCrop, window: _Window) -> None:
    """Write the part of the crop that lies in the window."""
    rows, columns = crop.pixels.shape
    top, left = max(crop.y, window.top), max(crop.x, window.left)
    bottom = min(crop.y + rows, window.top + window.height)
    right = min(crop.x + columns, window.left + window.width)
    if bottom > top and right > left:
        part = crop.pixels[top - crop.y : bottom - crop.y, left - crop.x : right - crop.x]
        top, left = top - window.top, left - window.left
        mask[top : top + part.shape[0], left : left + part.shape[1]] = part


def _resize_masks(masks: Tensor, output_size: tuple[int, int]) -> Tensor:
    """The nearest pixel by centres, like the image's resize; v2's "nearest" goes by corners."""
    masks = masks.as_subclass(Tensor)
    nearest = [
        ((torch.arange(output, dtype=torch.float64) + 0.5) * side / output).long()
        for side, output in zip(masks.shape[1:], output_size, strict=True)
    ]
    # Columns first: picking whole rows, of the larger result, is the cheap half.
    return masks.index_select(2, nearest[1]).index_select(1, nearest[0])


def _build_target(
    labels: Tensor, boxes: Tensor, crowds: Tensor, masks: Tensor | None, min_mask_pixels: int
) -> Target:
    """The target of what is left to see; boxes are drawn anew around the masks that were cut."""
    boxes_xyxy = functional.clamp_bounding_boxes(boxes).as_subclass(Tensor)
    ignore_xyxy = functional.clamp_bounding_boxes(crowds).as_subclass(Tensor)
    if masks is not None:
        boxes_xyxy = tight_boxes(masks)
    visible = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).amin(1) >= 1
    if masks is not None:
        pixels = [int(np.count_nonzero(mask)) for mask in masks.numpy()]
        visible &= torch.tensor(pixels, dtype=torch.int64) >= min_mask_pixels
    return Target(
        boxes_xyxy=boxes_xyxy[visible],
        labels=labels[visible],
        masks=None if masks is None else BitmapMasks(masks if visible.all() else masks[visible]),
        ignore_xyxy=ignore_xyxy[(ignore_xyxy[:, 2:] - ignore_xyxy[:, :2]).amin(1) >= 1],
    )


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
