"""The one preprocess of a model: how large an image becomes, and how images form a batch.

Normalisation, (pixel - mean) / std and then zero padding, happens inside the network, so that
every engine does it alike; the numbers live here because they travel with the weights.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .errors import ConfigError

RGB = tuple[float, float, float]
Interpolation = Literal["bilinear", "bicubic"]

# Beyond these nothing but memory runs out.
MAX_SIDE = 65_536
MAX_SCALE = 100.0
MAX_RESIZED_PIXELS = 2**30
MAX_WHOLE_ASPECT = 4
"""Of an image that is resized whole before its middle is cut out."""

_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_ADDED = ("crop_size", "interpolation", "square")
"""Fields that folders written before them lack."""


@dataclass(frozen=True, slots=True)
class Preprocess:
    """The size rule and the normalisation of a model; raises ConfigError on impossible values.

    mean, std         of the red, green and blue channel, in pixel units 0..255
    scale             factor on both sides; must stay 1.0 where `short_side` is set
    short_side        pixels the shorter side is resized to, or None for `scale`
    max_long_side     pixels the longer side may have after that, or None for no limit
    size_divisor      batches are padded to multiples of this many pixels
    crop_size         side of the square that is cut from the middle after the resize, for
                      classifiers, or None; needs `short_side`, and the two limits above count for
                      nothing then
    interpolation     of the resize: bilinear or bicubic, both antialiased
    square            pixels that both sides are resized to, the aspect not kept, as SSD-type
                      detectors do, or None; `max_long_side` counts for nothing then
    """

    mean: RGB = (123.675, 116.28, 103.53)
    std: RGB = (58.395, 57.12, 57.375)
    scale: float = 1.0
    short_side: int | None = None
    max_long_side: int | None = 1333
    size_divisor: int = 32
    crop_size: int | None = None
    interpolation: Interpolation = "bilinear"
    square: int | None = None

    def __post_init__(self) -> None:
        _require(_is_rgb(self.mean), "mean", "three finite numbers", self.mean)
        positive = _is_rgb(self.std) and min(self.std) > 0
        _require(positive, "std", "three finite numbers above 0", self.std)
        allowed = _is_number(self.scale) and 0 < self.scale <= MAX_SCALE
        _require(allowed, "scale", f"a number above 0, at most {MAX_SCALE:g}", self.scale)
        for name in ("short_side", "max_long_side", "crop_size", "square"):
            value = getattr(self, name)
            allowed = value is None or _is_count(value)
            _require(allowed, name, f"a whole number in 1..{MAX_SIDE}, or None", value)
        allowed = _is_count(self.size_divisor)
        _require(allowed, "size_divisor", f"a whole number in 1..{MAX_SIDE}", self.size_divisor)
        allowed = self.short_side is None or self.scale == 1.0
        _require(allowed, "scale", "1.0 where short_side is set", self.scale)
        allowed = self.crop_size is None or (
            self.short_side is not None and self.crop_size <= self.short_side
        )
        expected = f"at most the short_side, {self.short_side}"
        _require(allowed, "crop_size", expected, self.crop_size)
        allowed = self.square is None or (self.short_side is None and self.scale == 1.0)
        _require(allowed, "square", "None where short_side or scale is set", self.square)
        names = get_args(Interpolation)
        allowed = self.interpolation in names
        _require(allowed, "interpolation", " or ".join(names), self.interpolation)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the (height, width) in pixels that an image of this size is resized, or resized
        and cut, to.

        Raises ConfigError where that is more than MAX_RESIZED_PIXELS.
        """
        if height < 1 or width < 1:
            raise ValueError(f"image size: expected sides of at least 1, got {height} x {width}")
        if self.crop_size is not None:
            return self.crop_size, self.crop_size
        ratio = self.scale
        if self.short_side is not None:
            ratio = self.short_side / min(height, width)
        long_side = max(height, width)
        limit = math.inf if self.max_long_side is None else self.max_long_side
        ratio = min(ratio, limit / long_side)
        resized = _scaled(height, ratio), _scaled(width, ratio)
        if self.square is not None:
            resized = self.square, self.square
        if resized[0] * resized[1] > MAX_RESIZED_PIXELS:
            raise ConfigError(
                f"preprocess: expected at most {MAX_RESIZED_PIXELS} pixels after the resize, "
                f"got {resized[0]} x {resized[1]} for an image of {height} x {width}"
            )
        return resized

    def resize(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Resize a uint8 (H, W, 3) RGB image to its `output_size`, and cut it where the model does.

        Returns the input itself when its size stays. Raises ValueError on another dtype or shape.
        """
        _check_image(image, "image")
        height, width = image.shape[:2]
        if self.crop_size is not None:
            return self._resize_and_crop(image)
        new_height, new_width = self.output_size(height, width)
        if (new_height, new_width) == (height, width):
            return image
        source = Image.fromarray(np.ascontiguousarray(image))
        return np.array(source.resize((new_width, new_height), _FILTERS[self.interpolation]))

    def _resize_and_crop(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The middle of the resized image.

        The sizes and the place of the cut are those of torchvision's Resize and CenterCrop, which
        timm's published accuracies were measured with.
        """
        assert self.short_side is not None
        assert self.crop_size is not None
        crop, resample = self.crop_size, _FILTERS[self.interpolation]
        sides = image.shape[:2]
        height, width = (side * self.short_side // min(sides) for side in sides)  # rounded down
        top, left = round((height - crop) / 2), round((width - crop) / 2)
        if (height, width) == sides:
            return np.ascontiguousarray(image[top : top + crop, left : left + crop])
        source = Image.fromarray(np.ascontiguousarray(image))
        if max(height, width) <= MAX_WHOLE_ASPECT * self.short_side:
            whole = np.asarray(source.resize((width, height), resample))
            return whole[top : top + crop, left : left + crop].copy()
        # The same without the parts that are cut away, which no memory may hold; Pillow rounds
        # a little differently then.
        horizontal, vertical = sides[1] / width, sides[0] / height
        right, bottom = left + crop, top + crop
        box = (left * horizontal, top * vertical, right * horizontal, bottom * vertical)
        return np.array(source.resize((crop, crop), resample, box=box))

    def padded_size(self, height: int, width: int) -> tuple[int, int]:
        """The (height, width) in pixels of the canvas that `batch` puts a resized image on."""
        divisor = self.size_divisor if self.crop_size is None else 1
        return -(-height // divisor) * divisor, -(-width // divisor) * divisor

    def batch(
        self, images: Sequence[NDArray[np.uint8]]
    ) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Stack resized uint8 (H, W, 3) images, each at the top left of a common canvas.

        Returns pixels, uint8 (B, H, W, 3), zero outside the images, H and W the smallest
        multiples of `size_divisor` that hold them all (of 1 for a classifier), and sizes, int64
        (B, 2), the (height, width) of each image. Raises ValueError on no image or on another
        dtype or shape.
        """
        if not images:
            raise ValueError("images: expected at least one, got none")
        for index, image in enumerate(images):
            _check_image(image, f"images[{index}]")
        sizes = np.array([image.shape[:2] for image in images], dtype=np.int64)  # (B, 2)
        shape = (len(images), *self.padded_size(*sizes.max(axis=0).tolist()), 3)
        pixels = np.zeros(shape, dtype=np.uint8)
        for canvas, image in zip(pixels, images, strict=True):
            canvas[: image.shape[0], : image.shape[1]] = image
        return pixels, sizes

    def to_dict(self) -> dict[str, object]:
        """Return the fields as plain JSON values; `from_dict` takes them back."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls, value: Mapping[str, object]) -> "Preprocess":
        """Build from what `to_dict` gave.

        A folder written before there were classifiers has no crop_size, interpolation or square.
        Raises ConfigError on an unknown or missing key and on a value of the wrong type or range.
        """
        if not isinstance(value, Mapping):
            raise ConfigError(f"preprocess: expected a mapping, got {type(value).__name__}")
        expected = [field.name for field in fields(cls)]
        if set(value) | set(_ADDED) != set(expected):
            raise ConfigError(
                f"preprocess: expected the keys {', '.join(expected)}, "
                f"got {', '.join(sorted(map(str, value))) or 'none'}"
            )
        return cls(
            mean=_as_rgb(value["mean"], "mean"),
            std=_as_rgb(value["std"], "std"),
            scale=_as_float(value["scale"], "scale"),
            short_side=_as_optional_int(value["short_side"], "short_side"),
            max_long_side=_as_optional_int(value["max_long_side"], "max_long_side"),
            size_divisor=_as_int(value["size_divisor"], "size_divisor"),
            crop_size=_as_optional_int(value.get("crop_size"), "crop_size"),
            interpolation=cast(Interpolation, value.get("interpolation", "bilinear")),
            square=_as_optional_int(value.get("square"), "square"),
        )


def _scaled(side: int, ratio: float) -> int:
    return max(1, math.floor(side * ratio + 0.5))


def _check_image(image: NDArray[np.uint8], name: str) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(
            f"{name}: expected uint8 of shape (H, W, 3), got {image.dtype} of {image.shape}"
        )


def _require(allowed: bool, name: str, expected: str, got: object) -> None:
    if not allowed:
        raise ConfigError(f"preprocess.{name}: expected {expected}, got {got!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_SIDE


def _is_rgb(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 3 and all(map(_is_number, value))


def _as_rgb(value: object, name: str) -> RGB:
    if not isinstance(value, list | tuple) or len(value) != 3:
        raise ConfigError(f"preprocess.{name}: expected three numbers, got {value!r}")
    red, green, blue = (_as_float(channel, name) for channel in value)
    return red, green, blue


def _as_float(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"preprocess.{name}: expected a number, got {value!r}")
    return float(value)


def _as_int(value: object, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"preprocess.{name}: expected a whole number, got {value!r}")
    return value


def _as_optional_int(value: object, name: str) -> int | None:
    return None if value is None else _as_int(value, name)
