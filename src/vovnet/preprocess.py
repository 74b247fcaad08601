"""The one preprocess of a model: how large an image becomes, and how images form a batch.

Normalisation, (pixel - mean) / std and then zero padding, happens inside the network, so that
every engine does it alike; the numbers live here because they travel with the weights.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .errors import ConfigError

RGB = tuple[float, float, float]

# Beyond these nothing but memory runs out.
MAX_SIDE = 65_536
MAX_SCALE = 100.0
MAX_RESIZED_PIXELS = 2**30


@dataclass(frozen=True, slots=True)
class Preprocess:
    """The size rule and the normalisation of a model; raises ConfigError on impossible values.

    mean, std         of the red, green and blue channel, in pixel units 0..255
    scale             factor on both sides; must stay 1.0 where `short_side` is set
    short_side        pixels the shorter side is resized to, or None for `scale`
    max_long_side     pixels the longer side may have after that, or None for no limit
    size_divisor      batches are padded to multiples of this many pixels
    """

    mean: RGB = (123.675, 116.28, 103.53)
    std: RGB = (58.395, 57.12, 57.375)
    scale: float = 1.0
    short_side: int | None = None
    max_long_side: int | None = 1333
    size_divisor: int = 32

    def __post_init__(self) -> None:
        _require(_is_rgb(self.mean), "mean", "three finite numbers", self.mean)
        positive = _is_rgb(self.std) and min(self.std) > 0
        _require(positive, "std", "three finite numbers above 0", self.std)
        allowed = _is_number(self.scale) and 0 < self.scale <= MAX_SCALE
        _require(allowed, "scale", f"a number above 0, at most {MAX_SCALE:g}", self.scale)
        for name in ("short_side", "max_long_side"):
            value = getattr(self, name)
            allowed = value is None or _is_count(value)
            _require(allowed, name, f"a whole number in 1..{MAX_SIDE}, or None", value)
        allowed = _is_count(self.size_divisor)
        _require(allowed, "size_divisor", f"a whole number in 1..{MAX_SIDE}", self.size_divisor)
        allowed = self.short_side is None or self.scale == 1.0
        _require(allowed, "scale", "1.0 where short_side is set", self.scale)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the (height, width) in pixels that an image of this size is resized to.

        Raises ConfigError where that is more than MAX_RESIZED_PIXELS.
        """
        if height < 1 or width < 1:
            raise ValueError(f"image size: expected sides of at least 1, got {height} x {width}")
        ratio = self.scale
        if self.short_side is not None:
            ratio = self.short_side / min(height, width)
        long_side = max(height, width)
        limit = math.inf if self.max_long_side is None else self.max_long_side
        ratio = min(ratio, limit / long_side)
        resized = _scaled(height, ratio), _scaled(width, ratio)
        if resized[0] * resized[1] > MAX_RESIZED_PIXELS:
            raise ConfigError(
                f"preprocess: expected at most {MAX_RESIZED_PIXELS} pixels after the resize, "
                f"got {resized[0]} x {resized[1]} for an image of {height} x {width}"
            )
        return resized

    def resize(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Resize a uint8 (H, W, 3) RGB image to its `output_size`, bilinear and antialiased.

        Returns the input itself when its size stays. Raises ValueError on another dtype or shape.
        """
        _check_image(image, "image")
        height, width = image.shape[:2]
        new_height, new_width = self.output_size(height, width)
        if (new_height, new_width) == (height, width):
            return image
        source = Image.fromarray(np.ascontiguousarray(image))
        return np.array(source.resize((new_width, new_height), Image.Resampling.BILINEAR))

    def batch(
        self, images: Sequence[NDArray[np.uint8]]
    ) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Stack resized uint8 (H, W, 3) images, each at the top left of a common canvas.

        Returns pixels, uint8 (B, H, W, 3), zero outside the images, H and W the smallest
        multiples of `size_divisor` that hold them all, and sizes, int64 (B, 2), the (height,
        width) of each image. Raises ValueError on no image or on another dtype or shape.
        """
        if not images:
            raise ValueError("images: expected at least one, got none")
        for index, image in enumerate(images):
            _check_image(image, f"images[{index}]")
        sizes = np.array([image.shape[:2] for image in images], dtype=np.int64)  # (B, 2)
        height, width = (-(-int(side) // self.size_divisor) for side in sizes.max(axis=0))
        shape = (len(images), height * self.size_divisor, width * self.size_divisor, 3)
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

        Raises ConfigError on an unknown or missing key and on a value of the wrong type or range.
        """
        if not isinstance(value, Mapping):
            raise ConfigError(f"preprocess: expected a mapping, got {type(value).__name__}")
        expected = [field.name for field in fields(cls)]
        if set(value) != set(expected):
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
