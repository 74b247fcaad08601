"""What the network sees: random windows, flips, colours in training; else only the resize."""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
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
from vovnet.data.mixing import (
    Picture,
    join_mosaic,
    mix_pictures,
    mosaic_quarters,
    paste_objects,
    place_on_canvas,
    tight_boxes,
    visible_masks,
)
from vovnet.data.preset import TrainPreset
from vovnet.data.ssd_augment import FILL_RGB, distort_colours, resize_randomly
from vovnet.data.windows import Window, random_window, ssd_window, whole_window
from vovnet.errors import ConfigError, DataError
from vovnet.images import read_image
from vovnet.models.boxes import Target
from vovnet.models.roi import BitmapMasks
from vovnet.preprocess import Preprocess
from vovnet.results import MaskCrop

BATCH_DIVISOR = 32
DEFAULT_CACHE_BYTES = 512 * 1024**2
_OVERHEAD_BYTES = 256  # of the objects around the pixels, which are few in a small mask

_BLACK = (0, 0, 0)
_PASTED = 0.5  # probability of each object of the other picture
_MIXED = 32.0  # both of Beta's parameters: shares near one half, as both keep their objects
_CENTRE = (0.25, 0.75)  # of the mosaic, of its sides


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
    and W are the preset's output size, or less where the image is smaller than the window; those
    that the shorter side leads to where the preset shows whole images. Crowd
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
        if preset.copy_paste and not self.with_masks:
            raise ConfigError("augment.copy_paste: expected 0, as no object of the data has a mask")
        self._epoch, self._progress = 0, 0.0
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

    def set_place(self, epoch: int, progress: float) -> None:
        """Choose the samples of epoch 0, 1, ...; progress is the share of the training done."""
        self._epoch, self._progress = epoch, progress

    def __len__(self) -> int:
        return len(self.data.images)

    def __getitem__(self, index: int) -> TrainItem:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[TrainItem]:
        """The items of one batch, of one output size; the loader asks for them so."""
        output_size = self._output_size(indices[0])
        return [self._item(index, output_size) for index in indices]

    def _output_size(self, index: int) -> tuple[int, int]:
        """Of the batch that begins with this image."""
        (low, high), (height, width) = self.preset.output_scale_range, self.preset.output_size
        factor = self.preset.scale_at(self._progress)
        if (low, high, factor) == (1, 1, 1):
            return height, width
        generator = np.random.default_rng([self.seed, self._epoch, index, 1])
        factor *= generator.uniform(low, high)
        sides = (max(1, round(side * factor / BATCH_DIVISOR)) for side in (height, width))
        return next(sides) * BATCH_DIVISOR, next(sides) * BATCH_DIVISOR

    def _item(self, index: int, output_size: tuple[int, int]) -> TrainItem:
        preset = self.preset
        mixed = self._progress < preset.mixed_until
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(_item_seed(self.seed, self._epoch, index))
            if mixed and _happens(preset.mosaic):
                picture = self._mosaic(index, output_size)
            else:
                picture = self._picture(index, output_size)
            if mixed and _happens(preset.copy_paste):
                source = self._picture(self._any_index(), output_size)
                chosen = torch.rand(len(source[1].labels)) < _PASTED
                picture = paste_objects(picture, source, chosen, preset.min_mask_pixels)
            if mixed and _happens(preset.mixup):
                share = float(torch.distributions.Beta(_MIXED, _MIXED).sample())
                other = self._picture(self._any_index(), output_size)
                picture = mix_pictures(picture, other, share)
        return *picture, self.data.images[index].path

    def _any_index(self) -> int:
        return int(torch.randint(len(self), ()))

    def _mosaic(self, index: int, output_size: tuple[int, int]) -> Picture:
        """This image and three others, each a quarter of its own; beside short ones it is black."""
        low, high = _CENTRE
        share = low + (high - low) * torch.rand(2)
        height, width = (
            max(1, round(side * float(part))) for side, part in zip(output_size, share, strict=True)
        )
        quarters = mosaic_quarters((height, width), output_size)
        indices = [index, *(self._any_index() for _ in range(3))]
        parts = [self._picture(i, size) for i, size in zip(indices, quarters, strict=True)]
        return join_mosaic(parts, (height, width), output_size, _BLACK)

    def _picture(self, index: int, output_size: tuple[int, int]) -> Picture:
        """One image as it is seen: cut out, turned, resized, in other colours."""
        record = self.data.images[index]
        pixels = self._images.get(index, partial(_read, record))
        window = self._window(record, output_size)
        labels, sample = self._crop(pixels, index, window)
        # Turned and flipped before the resize, while the many masks are still small.
        if window.transposed:
            sample = _transpose(sample)
        image, boxes, crowds, masks = self._flips(*sample)
        steps: list[Callable[..., Any]] = [partial(self._resize, window), self._recolour]
        # Colours cost most of the time, so they go where the pixels are fewer.
        enlarged = math.prod(window.output_size) > window.height * window.width
        for step in reversed(steps) if enlarged else steps:
            image, boxes, crowds = step(image, boxes, crowds)
        masks = None if masks is None else _resize_masks(masks, window.output_size)
        target = _build_target(labels, boxes, crowds, masks, self.preset.min_mask_pixels)
        picture = image.as_subclass(Tensor).permute(1, 2, 0).contiguous(), target
        return place_on_canvas(picture, window.canvas_size, window.offset, FILL_RGB)

    def _window(self, record: ImageRecord, output_size: tuple[int, int]) -> Window:
        preset = self.preset
        if preset.geometry == "ssd":
            objects = [a.box_xyxy for a in record.annotations if not a.is_ignored]
            boxes = torch.tensor(objects, dtype=torch.float64).reshape(-1, 4)
            return ssd_window(
                record, boxes, output_size=output_size, quarter_turn=preset.quarter_turn
            )
        if preset.geometry == "whole":
            return whole_window(
                record,
                self.preprocess,
                short_sides=preset.short_sides,
                quarter_turn=preset.quarter_turn,
            )
        grown = output_size[0] / preset.output_size[0]  # of an output size drawn for the batch
        low, high = preset.scale_range
        return random_window(
            record,
            self.preprocess,
            output_size=output_size,
            scale_range=(low * grown, high * grown),
            quarter_turn=preset.quarter_turn,
        )

    def _resize(self, window: Window, *sample: Any) -> Any:
        if self.preset.geometry != "ssd":
            return v2.Resize(list(window.output_size), antialias=True)(*sample)
        image, *boxes = sample
        image = tv_tensors.Image(resize_randomly(image.as_subclass(Tensor), window.output_size))
        return image, *(functional.resize(x, list(window.output_size)) for x in boxes)

    def _recolour(self, image: tv_tensors.Image, *boxes: Any) -> Any:
        if self.preset.photometric:
            image = tv_tensors.Image(distort_colours(image, self.preset.photometric))
        return self._colours(image, *boxes)

    def _crop(
        self, pixels: NDArray[np.uint8], index: int, window: Window
    ) -> tuple[Tensor, "_Sample"]:
        """Labels (N,) of the objects in the window, and the window with what it shows."""
        rows = slice(window.top, window.top + window.height)
        columns = slice(window.left, window.left + window.width)
        image = tv_tensors.Image(torch.from_numpy(pixels[rows, columns]).permute(2, 0, 1))
        annotations = self.data.images[index].annotations
        boxes = torch.tensor([a.box_xyxy for a in annotations], dtype=torch.float64).reshape(-1, 4)
        boxes -= torch.tensor([window.left, window.top] * 2)
        touches = (boxes[:, 2:] > 0) & (boxes[:, :2] < torch.tensor([window.width, window.height]))
        is_ignored = torch.tensor([a.is_ignored for a in annotations], dtype=torch.bool)
        is_object = touches.all(1) & ~is_ignored
        if window.centres_only:
            centres = (boxes[:, :2] + boxes[:, 2:]) / 2
            inside = (centres > 0) & (centres < torch.tensor([window.width, window.height]))
            is_object &= inside.all(1)
        objects = is_object.nonzero()[:, 0].tolist()
        labels = torch.tensor([annotations[i].label for i in objects], dtype=torch.int64)
        size = (window.height, window.width)
        crowds = _tv_boxes(boxes[touches.all(1) & is_ignored].float(), size)
        masks = self._crop_masks(index, objects, window) if self.with_masks else None
        return labels, (image, _tv_boxes(boxes[objects].float(), size), crowds, masks)

    def _crop_masks(self, index: int, objects: Sequence[int], window: Window) -> tv_tensors.Mask:
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


def _happens(probability: float) -> bool:
    """Draws nothing where it cannot happen: samples stay those of a preset without the setting."""
    return probability > 0 and float(torch.rand(())) < probability


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


def _paste(mask: NDArray[np.uint8], crop: MaskCrop, window: Window) -> None:
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
        visible &= visible_masks(masks, min_mask_pixels)
    return Target(
        boxes_xyxy=boxes_xyxy[visible],
        labels=labels[visible],
        masks=None if masks is None else BitmapMasks(masks if visible.all() else masks[visible]),
        ignore_xyxy=ignore_xyxy[(ignore_xyxy[:, 2:] - ignore_xyxy[:, :2]).amin(1) >= 1],
    )
