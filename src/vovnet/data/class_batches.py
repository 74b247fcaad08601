"""Batches of labelled pictures, augmented: crops, flips, colours, RandAugment, mixup, cutmix."""

import importlib
import math
import random
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from vovnet.data.classes import ClassData
from vovnet.errors import ConfigError, DataError, ImageError

DEFAULT_CACHE_BYTES = 2**29
SIZE_STEP = 16
"""Image sizes that grow during a training are multiples of this."""

_RESAMPLING = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassPreset:
    """The augmentation of a classifier's training; raises ConfigError on impossible values.

    image_size          side of the square crop in pixels
    first_image_size    side at the start, from which it grows; None: image_size from the start
    full_size_from      share of the training after which the crop has its full size
    scale, ratio        area (share of the picture) and width / height of the random crop
    horizontal_flip     probability, as is vertical_flip
    brightness, contrast, saturation, hue   largest change, as torchvision's ColorJitter
    rand_augment        timm's description, such as "rand-m9-mstd0.5"; None: off
    erase               probability of a rectangle of noise
    mixup, cutmix       the alpha of each; 0: off; of both, one is drawn for each batch
    label_smoothing     share of the target spread over all classes
    """

    image_size: int = 224
    first_image_size: int | None = None
    full_size_from: float = 0.7
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: Literal["bilinear", "bicubic", "random"] = "bilinear"
    horizontal_flip: float = 0.5
    vertical_flip: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    rand_augment: str | None = None
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        for name in ("image_size", "first_image_size"):
            value = getattr(self, name)
            optional = name == "first_image_size" and value is None
            _require(optional or (type(value) is int and 16 <= value <= 4096), name, value)
        for name in ("horizontal_flip", "vertical_flip", "erase", "full_size_from"):
            value = getattr(self, name)
            _require(_is_number(value) and 0 <= value <= 1, name, value)
        for name in ("brightness", "contrast", "saturation", "mixup", "cutmix"):
            value = getattr(self, name)
            _require(_is_number(value) and value >= 0, name, value)
        _require(_is_number(self.hue) and 0 <= self.hue <= 0.5, "hue", self.hue)
        smoothing = self.label_smoothing
        _require(_is_number(smoothing) and 0 <= smoothing < 1, "label_smoothing", smoothing)
        for name in ("scale", "ratio"):
            _require(_is_range(getattr(self, name)), name, getattr(self, name))
        _require(self.scale[1] <= 1, "scale", self.scale)
        known = (*_RESAMPLING, "random")
        _require(self.interpolation in known, "interpolation", self.interpolation)
        text = self.rand_augment
        _require(text is None or isinstance(text, str), "rand_augment", text)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> "ClassPreset":
        """Build from plain values; raises ConfigError naming an unknown field."""
        names = [field.name for field in fields(cls)]
        for key in value:
            if key not in names:
                raise ConfigError(f"augment: expected one of {', '.join(names)}, got {key!r}")
        values: dict[str, Any] = {
            key: tuple(item) if isinstance(item, list) else item for key, item in value.items()
        }
        return cls(**values)

    def size_at(self, progress: float) -> int:
        """The crop's side when `progress` (0..1) of the training is done."""
        if self.first_image_size is None or progress >= self.full_size_from:
            return self.image_size
        grown = self.image_size - self.first_image_size
        size = self.first_image_size + grown * progress / self.full_size_from
        return int(size / SIZE_STEP + 0.5) * SIZE_STEP


@dataclass(slots=True)
class ClassTargets:
    """What a batch shows.

    labels      float32 (B, C), rows that sum to 1
    teacher     float32 (B, F), what a teacher said of the pictures, or None
    """

    labels: Tensor
    teacher: Tensor | None = None


@dataclass(slots=True)
class ClassBatch:
    """Pictures uint8 (B, H, W, 3) RGB, all of them filled: sizes int64 (B, 2) are H and W."""

    images: Tensor
    sizes: Tensor
    targets: ClassTargets
    paths: list[Path]

    def to(self, device: torch.device | str) -> "ClassBatch":
        """The same batch on a device."""
        teacher = self.targets.teacher
        moved = ClassTargets(
            self.targets.labels.to(device, non_blocking=True),
            None if teacher is None else teacher.to(device, non_blocking=True),
        )
        images = self.images.to(device, non_blocking=True)
        return ClassBatch(images, self.sizes.to(device), moved, self.paths)


@dataclass(frozen=True, slots=True)
class ClassItem:
    """One augmented picture, uint8 (S, S, 3), and where it comes from."""

    image: NDArray[np.uint8]
    index: int
    epoch: int


class ClassTrainDataset(Dataset[ClassItem]):
    """Augmented crops; the one of a picture in an epoch depends on the seed and these two alone.

    Decoded pictures are kept up to cache_bytes in each process that loads them. Items raise
    DataError naming a file that cannot be decoded.
    """

    def __init__(
        self,
        data: ClassData,
        *,
        preset: ClassPreset,
        seed: int = 0,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> None:
        self.data = data
        self.preset = preset
        self.seed = seed
        self._epoch, self._size = 0, preset.size_at(0.0)
        self._cache: dict[int, NDArray[np.uint8]] = {}
        self._cache_left = cache_bytes
        self._colours = _colour_transforms(preset)

    def set_place(self, epoch: int, progress: float) -> None:
        """Choose the samples of an epoch, and the size that belongs to the training's progress."""
        self._epoch, self._size = epoch, self.preset.size_at(progress)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> ClassItem:
        source = self._read(index)
        seed = zlib.crc32(f"{self.seed} {self._epoch} {index}".encode())
        draw = random.Random(seed)
        image = self._crop(source, draw)
        if draw.random() < self.preset.horizontal_flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if draw.random() < self.preset.vertical_flip:
            image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
        if self._colours:
            with _seeded(seed):
                for transform in self._colours:
                    image = transform(image)
        pixels = np.array(image)
        if draw.random() < self.preset.erase:
            _erase(pixels, draw)
        return ClassItem(pixels, index, self._epoch)

    def _read(self, index: int) -> NDArray[np.uint8]:
        cached = self._cache.get(index)
        if cached is not None:
            return cached
        try:
            # What a larger picture holds beyond that, only the smallest crops would show.
            pixels = self.data.read(index, min_side=2 * self.preset.image_size)
        except ImageError as error:
            raise DataError(f"{error}; --skip-bad leaves such files out") from error
        if pixels.nbytes <= self._cache_left:
            self._cache[index] = pixels
            self._cache_left -= pixels.nbytes
        return pixels

    def _crop(self, source: NDArray[np.uint8], draw: random.Random) -> Image.Image:
        height, width = source.shape[:2]
        left, top, right, bottom = crop_box(height, width, self.preset, draw)
        name = self.preset.interpolation
        if name == "random":
            name = draw.choice(("bilinear", "bicubic"))
        # Cut before it is resized: the array is a view, and Pillow reads no more than the crop.
        crop = Image.fromarray(np.ascontiguousarray(source[top:bottom, left:right]))
        return crop.resize((self._size, self._size), _RESAMPLING[name])


def collate_classes(
    items: Sequence[ClassItem],
    *,
    data: ClassData,
    preset: ClassPreset,
    seed: int,
    teacher: NDArray[np.float32] | None = None,
) -> ClassBatch:
    """Batch of items, mixed as the preset says; `teacher` (N, F) belongs to the data's pictures."""
    images = np.stack([item.image for item in items])  # (B, S, S, 3)
    indices = np.array([item.index for item in items])
    labels = _soft_labels(data.labels[indices], len(data.class_names), preset.label_smoothing)
    taught = None if teacher is None else teacher[indices]
    first = items[0]
    draw = np.random.default_rng(zlib.crc32(f"{seed} {first.epoch} {first.index}".encode()))
    share = _mix(images, preset, draw)
    if share < 1:  # each with the one at the mirrored place
        labels = share * labels + (1 - share) * labels[::-1]
        taught = None if taught is None else share * taught + (1 - share) * taught[::-1]
    size = images.shape[1]
    return ClassBatch(
        torch.from_numpy(images),
        torch.full((len(items), 2), size, dtype=torch.int64),
        ClassTargets(
            torch.from_numpy(labels.astype(np.float32)),
            None if taught is None else torch.from_numpy(taught.astype(np.float32)),
        ),
        [Path(data.name(index)) for index in indices],
    )


def balanced_order(labels: NDArray[np.int64], *, seed: int, epoch: int) -> list[int]:
    """As many indices as there are labels, drawn so that every class comes equally often."""
    draw = np.random.default_rng((seed, epoch))
    counts = np.bincount(labels)
    classes = np.flatnonzero(counts)
    per_class = np.full(len(classes), len(labels) // len(classes))
    per_class[: len(labels) % len(classes)] += 1
    draw.shuffle(per_class)
    parts = [
        _repeated(np.flatnonzero(labels == label), count, draw)
        for label, count in zip(classes, per_class, strict=True)
    ]
    order: list[int] = draw.permutation(np.concatenate(parts)).tolist()
    return order


def _repeated(
    places: NDArray[np.int64], count: int, draw: np.random.Generator
) -> NDArray[np.int64]:
    """`count` of the places: each as often as any other, give or take one."""
    rounds = [draw.permutation(places) for _ in range(math.ceil(count / len(places)))]
    return np.concatenate(rounds)[:count]


class Crops(Protocol):
    """Which crops are drawn: shares of the picture's area, and width / height."""

    @property
    def scale(self) -> tuple[float, float]: ...

    @property
    def ratio(self) -> tuple[float, float]: ...


def crop_box(
    height: int, width: int, preset: Crops, draw: random.Random
) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a crop of random area and shape (Szegedy et al., 2015)."""
    area = height * width
    low, high = (math.log(ratio) for ratio in preset.ratio)
    for _ in range(10):
        target = area * draw.uniform(*preset.scale)
        ratio = math.exp(draw.uniform(low, high))
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = draw.randint(0, width - w), draw.randint(0, height - h)
            return left, top, left + w, top + h
    # No such shape fits: the largest centred one that the ratio allows.
    ratio = min(max(width / height, preset.ratio[0]), preset.ratio[1])
    w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
    left, top = (width - max(w, 1)) // 2, (height - max(h, 1)) // 2
    return left, top, left + max(w, 1), top + max(h, 1)


def _colour_transforms(preset: ClassPreset) -> list[Callable[[Image.Image], Image.Image]]:
    transforms: list[Callable[[Image.Image], Image.Image]] = []
    if preset.rand_augment is not None:
        transforms.append(_rand_augment(preset.rand_augment))
    jitter = (preset.brightness, preset.contrast, preset.saturation, preset.hue)
    if any(jitter):
        transforms.append(v2.ColorJitter(*jitter))
    return transforms


def _rand_augment(description: str) -> Callable[[Image.Image], Image.Image]:
    try:
        timm: Any = importlib.import_module("timm.data.auto_augment")
    except ImportError as error:
        raise ConfigError(
            "augment.rand_augment: expected timm, which has it, found none; install vovnet with "
            "its extra: vovnet[train]"
        ) from error
    try:
        transform: Callable[[Image.Image], Image.Image] = timm.rand_augment_transform(
            description, {"translate_const": 100, "img_mean": (124, 116, 104)}
        )
    except (AssertionError, ValueError, KeyError, IndexError) as error:
        raise ConfigError(
            f"augment.rand_augment: expected a description such as 'rand-m9-mstd0.5', "
            f"got {description!r}"
        ) from error
    return transform


class _seeded:  # noqa: N801  # used as a function
    """Within it Python's, NumPy's and torch's global draws follow from the seed alone."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __enter__(self) -> None:
        self.states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        random.seed(self.seed)
        np.random.seed(self.seed)
        torch.default_generator.manual_seed(self.seed)  # the CPU's; torch.manual_seed takes 1 ms

    def __exit__(self, *error: object) -> None:
        python, numpy, tensor = self.states
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(tensor)


def _erase(pixels: NDArray[np.uint8], draw: random.Random) -> None:
    """A rectangle of 2 to 33 % of the area becomes noise, in place (Zhong et al., 2017)."""
    height, width = pixels.shape[:2]
    area = height * width * draw.uniform(0.02, 1 / 3)
    ratio = math.exp(draw.uniform(math.log(0.3), math.log(1 / 0.3)))
    h, w = (
        min(max(round(math.sqrt(v)), 1), s)
        for v, s in ((area * ratio, height), (area / ratio, width))
    )
    top, left = draw.randint(0, height - h), draw.randint(0, width - w)
    noise = np.frombuffer(draw.randbytes(h * w * 3), np.uint8).reshape(h, w, 3)
    pixels[top : top + h, left : left + w] = noise


def _soft_labels(labels: NDArray[np.int64], classes: int, smoothing: float) -> NDArray[np.float64]:
    soft = np.full((len(labels), classes), smoothing / classes)
    soft[np.arange(len(labels)), labels] += 1 - smoothing
    return soft


def _mix(images: NDArray[np.uint8], preset: ClassPreset, draw: np.random.Generator) -> float:
    """Mix each image with its mirror place's, in place; returns the share of its own that stays.

    Mixup (Zhang et al., 2017) or cutmix (Yun et al., 2019).
    """
    kinds = [(name, alpha) for name in ("mixup", "cutmix") if (alpha := getattr(preset, name)) > 0]
    if not kinds or len(images) < 2:
        return 1.0
    name, alpha = kinds[int(draw.integers(len(kinds)))]
    share = float(draw.beta(alpha, alpha))
    if name == "mixup":
        mixed = share * images + (1 - share) * images[::-1].astype(np.float32)
        np.copyto(images, np.rint(mixed).astype(np.uint8))
        return share
    size = images.shape[1]
    side = math.sqrt(1 - share) * size
    (x, y) = draw.integers(size, size=2)
    left, right = (int(np.clip(x + sign * side / 2, 0, size)) for sign in (-1, 1))
    top, bottom = (int(np.clip(y + sign * side / 2, 0, size)) for sign in (-1, 1))
    images[:, top:bottom, left:right] = images[::-1, top:bottom, left:right].copy()
    return 1.0 - (bottom - top) * (right - left) / float(size**2)


def _require(allowed: bool, name: str, got: object) -> None:
    if not allowed:
        raise ConfigError(f"augment.{name}: expected {_EXPECTED.get(name, _SHARE)}, got {got!r}")


_SHARE = "a number in 0..1"
_EXPECTED = {
    "image_size": "a whole number in 16..4096",
    "first_image_size": "a whole number in 16..4096, or none",
    "brightness": "a number of at least 0",
    "contrast": "a number of at least 0",
    "saturation": "a number of at least 0",
    "mixup": "a number of at least 0",
    "cutmix": "a number of at least 0",
    "hue": "a number in 0..0.5",
    "label_smoothing": "a number from 0 to below 1",
    "scale": "two shares, the lower one first",
    "ratio": "two numbers above 0, the lower one first",
    "interpolation": "bilinear, bicubic or random",
    "rand_augment": "a text, or none",
}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_range(value: object) -> bool:
    pair = isinstance(value, tuple) and len(value) == 2 and all(map(_is_number, value))
    return pair and 0 < value[0] <= value[1]  # type: ignore[index]
