"""The settings of the augmentation: what a training image may be turned into."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from vovnet.errors import ConfigError

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
    "photometric": 1.0,
    "mosaic": 1.0,
    "mixup": 1.0,
    "copy_paste": 1.0,
    "mixed_until": 1.0,
    "full_size_from": 1.0,
}

SSD_PRESET: dict[str, Any] = {"geometry": "ssd", "photometric": 0.5, "horizontal_flip": 0.5}
"""The fields of TrainPreset that make SSD's augmentation; the output size is the network's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainPreset:
    """Random changes of a training image; raises ConfigError on a value out of range.

    output_size         height and width of the crop that the network gets
    scale_range         lowest and highest resize factor, relative to the evaluation's resize
    horizontal_flip, vertical_flip, quarter_turn, grayscale, invert    probabilities
    brightness, contrast, saturation    factors are drawn from 1 - value .. 1 + value
    hue                 largest turn of the colour circle, of at most 0.5
    min_mask_pixels     objects of which fewer pixels are left in the crop are dropped
    geometry            "window": a crop at a scale of the range; "ssd": SSD's zoom out and crops,
                        stretched to the output size by a random kind of resampling; "whole": all of
                        the picture, its aspect kept, without an output size and a scale
    short_sides         pixels, of the "whole" picture's shorter side: one is drawn; the longer one
                        has at most the preprocess' max_long_side
    photometric         probability of each of SSD's four changes of colour
    output_scale_range  each batch's sides are the output size times a factor of this range, to
                        multiples of 32 pixels; objects grow with them. (1, 1): as they are
    first_scale         a further such factor at the start of the training, which grows evenly to 1
    full_size_from      share of the training from which that factor is 1
    mosaic, mixup, copy_paste    probabilities: four pictures in one, two blended, objects of
                        another picture pasted by their masks
    mixed_until         share of the training after which these three no longer happen
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
    geometry: Literal["window", "ssd", "whole"] = "window"
    short_sides: tuple[int, ...] = ()
    photometric: float = 0.0
    output_scale_range: tuple[float, float] = (1.0, 1.0)
    first_scale: float = 1.0
    full_size_from: float = 0.7
    mosaic: float = 0.0
    mixup: float = 0.0
    copy_paste: float = 0.0
    mixed_until: float = 0.85

    def __post_init__(self) -> None:
        sizes = (*_pair(self.output_size, "output_size"), self.min_mask_pixels)
        if not all(isinstance(value, int) and value >= 1 for value in sizes):
            raise ConfigError(
                "augment: expected whole numbers of at least 1 as output_size and "
                f"min_mask_pixels, got {self.output_size!r} and {self.min_mask_pixels!r}"
            )
        for name in ("scale_range", "output_scale_range"):
            low, high = _pair(getattr(self, name), name)
            if not (_is_number(low) and _is_number(high) and 0 < low <= high < math.inf):
                raise ConfigError(
                    f"augment.{name}: expected 0 < low <= high, got {getattr(self, name)!r}"
                )
        if self.geometry not in ("window", "ssd", "whole"):
            raise ConfigError(
                f"augment.geometry: expected window, ssd or whole, got {self.geometry!r}"
            )
        if not (_is_number(self.first_scale) and 0 < self.first_scale <= 1):
            raise ConfigError(
                f"augment.first_scale: expected a number above 0, at most 1, "
                f"got {self.first_scale!r}"
            )
        _check_short_sides(self)
        for name, limit in _LIMITS.items():
            value = getattr(self, name)
            if not (_is_number(value) and 0 <= value <= limit):
                raise ConfigError(f"augment.{name}: expected 0..{limit}, got {value!r}")

    def scale_at(self, progress: float) -> float:
        """The factor of a batch's sides when this share of the training is done."""
        if progress >= self.full_size_from:
            return 1.0
        return self.first_scale + (1 - self.first_scale) * progress / self.full_size_from

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


def _check_short_sides(preset: TrainPreset) -> None:
    sides, whole = preset.short_sides, preset.geometry == "whole"
    allowed = isinstance(sides, tuple) and all(type(side) is int and side >= 1 for side in sides)
    if not allowed or bool(sides) != whole:
        expected = "at least one whole number above 0" if whole else "none without geometry whole"
        raise ConfigError(f"augment.short_sides: expected {expected}, got {sides!r}")
    if whole and (preset.mosaic or preset.mixup or preset.copy_paste):
        raise ConfigError(
            "augment.geometry: expected window or ssd with mosaic, mixup or copy_paste, which need "
            "pictures of one size, got 'whole'"
        )
    if whole and (*preset.output_scale_range, preset.first_scale) != (1.0, 1.0, 1.0):
        raise ConfigError(
            "augment.output_scale_range, first_scale: expected (1, 1) and 1 with geometry whole, "
            f"got {preset.output_scale_range!r} and {preset.first_scale!r}"
        )


def _pair(value: object, name: str) -> tuple[Any, Any]:
    if not isinstance(value, tuple) or len(value) != 2:
        raise ConfigError(f"augment.{name}: expected two numbers, got {value!r}")
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
