"""The ImageNet weights that others have published: where they lie, and how they want images."""

import math
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path

from vovnet.errors import ConfigError
from vovnet.preprocess import RGB, Preprocess


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedWeights:
    """Where weights lie, and how images must be prepared for them (mean, std: RGB in 0..1
    units).
    """

    hub_repository: str
    licence: str
    image_size: int
    crop_fraction: float
    test_image_size: int
    test_crop_fraction: float
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    top1_percent: float  # on ImageNet-1k at image_size, as timm publishes it
    top5_percent: float
    sha256: str | None = None  # of model.safetensors; None: only the hub's own figure is checked

    @property
    def tag(self) -> str:
        """Which of several weights of a variant these are, as timm writes it behind a dot."""
        return self.hub_repository.partition(".")[2]


PUBLISHED: dict[str, PublishedWeights] = {
    "ese_vovnet19b_dw": PublishedWeights(
        hub_repository="timm/ese_vovnet19b_dw.ra_in1k",
        licence="apache-2.0",
        image_size=224,
        crop_fraction=0.875,
        test_image_size=288,
        test_crop_fraction=0.95,
        top1_percent=76.828,
        top5_percent=93.276,
    ),
    "ese_vovnet39b": PublishedWeights(
        hub_repository="timm/ese_vovnet39b.ra_in1k",
        licence="apache-2.0",
        image_size=224,
        crop_fraction=0.875,
        test_image_size=288,
        test_crop_fraction=0.95,
        top1_percent=79.312,
        top5_percent=94.722,
    ),
    "ese_vovnet57b": PublishedWeights(
        hub_repository="timm/ese_vovnet57b.ra4_e3600_r256_in1k",
        licence="apache-2.0",
        image_size=256,
        crop_fraction=0.95,
        test_image_size=320,
        test_crop_fraction=1.0,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        top1_percent=82.460,
        top5_percent=96.006,
    ),
}


def find_published(name: str | Path) -> str | None:
    """The variant whose published weights a name means: the variant, or it with timm's tag.

    None for anything else, and where a file or folder has this name. Raises ConfigError on another
    tag than the published one.
    """
    variant, dot, tag = str(name).partition(".")
    if variant not in PUBLISHED or Path(name).exists():
        return None
    expected = PUBLISHED[variant].tag
    if dot and tag != expected:
        raise ConfigError(f"model: expected {variant}.{expected}, got {name!s}")
    return variant


def published_preprocess(variant: str, *, test_size: bool = False) -> Preprocess:
    """How images are prepared for a variant's published weights.

    test_size takes the larger images at which timm reports its best figures for them.
    """
    weights = PUBLISHED[variant]
    size = weights.test_image_size if test_size else weights.image_size
    fraction = weights.test_crop_fraction if test_size else weights.crop_fraction
    return Preprocess(
        mean=_in_pixel_units(weights.mean),
        std=_in_pixel_units(weights.std),
        short_side=math.floor(size / fraction),
        max_long_side=None,
        crop_size=size,
        interpolation="bicubic",
    )


@cache
def imagenet_class_names() -> tuple[str, ...]:
    """The 1000 names of ImageNet-1k in the order of the published weights' outputs."""
    weights = import_module("torchvision.models").ResNet18_Weights.IMAGENET1K_V1
    return tuple(weights.meta["categories"])


def _in_pixel_units(channels: RGB) -> RGB:
    red, green, blue = (255 * value for value in channels)
    return red, green, blue
