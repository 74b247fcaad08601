"""Two views of each picture, and the regions that both show: what self-supervision compares."""

import random
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from vovnet.data.class_batches import DEFAULT_CACHE_BYTES, crop_box
from vovnet.data.classes import ClassData
from vovnet.errors import ConfigError, DataError, ImageError

Window = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels of the picture."""

_TRIES = 20
_LEAST_SHARED = 0.25
"""Of the smaller window's area."""
_REGION_SIDES = (0.25, 1.0)
"""Of what both views share."""
_BLUR = {"kernel_size": 9, "sigma": (0.1, 2.0)}


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewPreset:
    """The views of a picture; raises ConfigError on impossible values.

    image_size          side of the square views in pixels
    regions             boxes in what both views show, of which the first is all of it
    scale, ratio        area (share of the picture) and width / height of a view's crop
    horizontal_flip, vertical_flip, grayscale, blur         probabilities
    brightness, contrast, saturation, hue   largest change, as torchvision's ColorJitter
    """

    image_size: int = 192
    regions: int = 8
    scale: tuple[float, float] = (0.15, 0.7)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    horizontal_flip: float = 0.5
    vertical_flip: float = 0.0
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    grayscale: float = 0.2
    blur: float = 0.3

    def __post_init__(self) -> None:
        for name, (expected, allowed) in _RULES.items():
            value = getattr(self, name)
            if not allowed(value):
                raise ConfigError(f"augment.{name}: expected {expected}, got {value!r}")

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> "ViewPreset":
        """Build from plain values; raises ConfigError naming an unknown field."""
        names = [field.name for field in fields(cls)]
        for key in value:
            if key not in names:
                raise ConfigError(f"augment: expected one of {', '.join(names)}, got {key!r}")
        values: dict[str, Any] = {
            key: tuple(item) if isinstance(item, list) else item for key, item in value.items()
        }
        return cls(**values)


@dataclass(frozen=True, slots=True)
class ViewItem:
    """Both views of a picture, uint8 (2, S, S, 3) RGB, and the same regions in each, float32
    (2, R, 4) xyxy in pixels of the view.
    """

    views: NDArray[np.uint8]
    regions: NDArray[np.float32]
    path: Path


@dataclass(slots=True)
class ViewBatch:
    """Views uint8 (2B, S, S, 3) RGB, the first of all B pictures before the second of all.

    targets     the regions, float32 (2B, R, 4); rows i and B + i belong to one picture
    """

    images: Tensor
    sizes: Tensor
    targets: Tensor
    paths: list[Path]

    def to(self, device: torch.device | str) -> "ViewBatch":
        """The same batch on a device."""
        images = self.images.to(device, non_blocking=True)
        return ViewBatch(images, self.sizes.to(device), self.targets.to(device), self.paths)


class ViewDataset(Dataset[ViewItem]):
    """Augmented pairs of views; those of a picture in an epoch depend on the seed and these alone.

    Decoded pictures are kept up to cache_bytes in each process that loads them. Items raise
    DataError naming a file that cannot be decoded.
    """

    def __init__(
        self,
        data: ClassData,
        *,
        preset: ViewPreset,
        seed: int = 0,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> None:
        self.data = data
        self.preset = preset
        self.seed = seed
        self._epoch = 0
        self._cache: dict[int, NDArray[np.uint8]] = {}
        self._cache_left = cache_bytes
        self._colours = v2.Compose(
            [
                v2.ColorJitter(preset.brightness, preset.contrast, preset.saturation, preset.hue),
                v2.RandomGrayscale(preset.grayscale),
                v2.RandomApply([v2.GaussianBlur(**_BLUR)], preset.blur),
            ]
        )

    def set_place(self, epoch: int, progress: float) -> None:
        """Choose the views of an epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> ViewItem:
        source = self._read(index)
        seed = zlib.crc32(f"{self.seed} {self._epoch} {index}".encode())
        draw = random.Random(seed)
        height, width = source.shape[:2]
        windows = draw_windows(height, width, self.preset, draw)
        regions = draw_regions(*windows, self.preset.regions, draw)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            pairs = [self._view(source, window, regions, draw) for window in windows]
        views, boxes = zip(*pairs, strict=True)
        return ViewItem(np.stack(views), np.stack(boxes), Path(self.data.name(index)))

    def _view(
        self,
        source: NDArray[np.uint8],
        window: Window,
        regions: NDArray[np.float64],
        draw: random.Random,
    ) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """A window as the network sees it, and where the regions lie in that."""
        left, top, right, bottom = window
        size = self.preset.image_size
        crop = Image.fromarray(np.ascontiguousarray(source[top:bottom, left:right]))
        image = crop.resize((size, size), Image.Resampling.BILINEAR)
        boxes = (regions - [left, top, left, top]) * (
            size / np.array([right - left, bottom - top] * 2)
        )
        if draw.random() < self.preset.horizontal_flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            boxes[:, [0, 2]] = size - boxes[:, [2, 0]]
        if draw.random() < self.preset.vertical_flip:
            image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
            boxes[:, [1, 3]] = size - boxes[:, [3, 1]]
        return np.array(self._colours(image)), boxes.astype(np.float32)

    def _read(self, index: int) -> NDArray[np.uint8]:
        cached = self._cache.get(index)
        if cached is not None:
            return cached
        try:
            pixels = self.data.read(index, min_side=2 * self.preset.image_size)
        except ImageError as error:  # it was whole when the training began
            raise DataError(str(error)) from error
        if pixels.nbytes <= self._cache_left:
            self._cache[index] = pixels
            self._cache_left -= pixels.nbytes
        return pixels


def collate_views(items: Sequence[ViewItem]) -> ViewBatch:
    """Batch of items."""
    images = np.concatenate([[item.views[n] for item in items] for n in range(2)])
    regions = np.concatenate([[item.regions[n] for item in items] for n in range(2)])
    size = images.shape[1]
    return ViewBatch(
        torch.from_numpy(images),
        torch.full((len(images), 2), size, dtype=torch.int64),
        torch.from_numpy(regions),
        [item.path for item in items],
    )


def draw_windows(
    height: int, width: int, preset: ViewPreset, draw: random.Random
) -> tuple[Window, Window]:
    """Two random windows that share a part; the same one twice where none such was found."""
    first = crop_box(height, width, preset, draw)
    for _ in range(_TRIES):
        second = crop_box(height, width, preset, draw)
        left, top, right, bottom = shared_part(first, second)
        shared = max(right - left, 0) * max(bottom - top, 0)
        if shared >= _LEAST_SHARED * min(_area(first), _area(second)):
            return first, second
    return first, first


def draw_regions(
    first: Window, second: Window, count: int, draw: random.Random
) -> NDArray[np.float64]:
    """Boxes (count, 4) xyxy in pixels of the picture, inside both windows; the first is all that
    they share.
    """
    left, top, right, bottom = shared_part(first, second)
    regions = [(float(left), float(top), float(right), float(bottom))]
    for _ in range(count - 1):
        width = (right - left) * draw.uniform(*_REGION_SIDES)
        height = (bottom - top) * draw.uniform(*_REGION_SIDES)
        x, y = draw.uniform(left, right - width), draw.uniform(top, bottom - height)
        regions.append((x, y, x + width, y + height))
    return np.array(regions, dtype=np.float64)


def shared_part(first: Window, second: Window) -> Window:
    """The intersection, of which right < left or bottom < top where there is none."""
    return (
        max(first[0], second[0]),
        max(first[1], second[1]),
        min(first[2], second[2]),
        min(first[3], second[3]),
    )


def _area(window: Window) -> int:
    return (window[2] - window[0]) * (window[3] - window[1])


def _is_number(value: object, low: float, high: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def _is_range(value: object, high: float) -> bool:
    pair = (
        isinstance(value, tuple) and len(value) == 2 and all(_is_number(v, 0, high) for v in value)
    )
    return pair and 0 < value[0] <= value[1]  # type: ignore[index]


def _is_count(value: object, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


_SHARE = ("a number in 0..1", lambda value: _is_number(value, 0, 1))
_CHANGE = ("a number in 0..10", lambda value: _is_number(value, 0, 10))
_RULES: dict[str, Any] = {
    "image_size": ("a whole number in 32..4096", lambda value: _is_count(value, 32, 4096)),
    "regions": ("a whole number in 1..1000", lambda value: _is_count(value, 1, 1000)),
    "scale": ("two shares, the lower one first", lambda value: _is_range(value, 1)),
    "ratio": ("two numbers above 0, the lower one first", lambda value: _is_range(value, 100)),
    "hue": ("a number in 0..0.5", lambda value: _is_number(value, 0, 0.5)),
    **dict.fromkeys(("horizontal_flip", "vertical_flip", "grayscale", "blur"), _SHARE),
    **dict.fromkeys(("brightness", "contrast", "saturation"), _CHANGE),
}
