"""Registers with timm the variants that it lacks: `import vovnet.timm`, then `timm.create_model`.

Names that timm has stay timm's.
"""

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

from torch import nn

from vovnet.models.vovnet import VARIANTS, VoVNet, VoVNetConfig

_SETTINGS = {field.name for field in fields(VoVNetConfig)}
_PRETRAINED_CFG: dict[str, Any] = {
    "url": "",
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "pool_size": (7, 7),
    "crop_pct": 0.875,
    "interpolation": "bicubic",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "first_conv": "stem.0.conv",
    "classifier": "head.fc",
    "license": "apache-2.0",
}

# timm reads these two from the module of an entry point when it registers one.
__all__: list[str] = []
default_cfgs: dict[str, Any] = {}


def _import_timm() -> ModuleType:
    try:
        return import_module("timm.models")
    except ImportError as error:
        raise ImportError(
            f"vovnet.timm needs timm, which cannot be imported ({error}): pip install timm"
        ) from error


def _make_entry_point(models: ModuleType, name: str) -> Callable[..., nn.Module]:
    """timm's function of a variant: create_model calls it with the user's keyword arguments.

    Those that are settings of VoVNetConfig change the variant, all others are of VoVNet.
    """

    def entry_point(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        settings = {key: kwargs.pop(key) for key in _SETTINGS & kwargs.keys()}
        model: nn.Module = models.build_model_with_cfg(
            partial(VoVNet, replace(VARIANTS[name], **settings)),
            name,
            pretrained,
            feature_cfg={"flatten_sequential": True},
            **kwargs,
        )
        return model

    entry_point.__name__ = entry_point.__qualname__ = name
    return entry_point


def register() -> list[str]:
    """Registers every variant whose name timm lacks and returns those names.

    Runs when this module is imported; once more, it changes nothing and returns nothing. Raises
    ImportError where timm is not installed.
    """
    models = _import_timm()
    absent = [name for name in VARIANTS if not models.is_model(name)]
    default_cfgs.update(models.generate_default_cfgs(dict.fromkeys(absent, _PRETRAINED_CFG)))
    for name in absent:
        globals()[name] = models.register_model(_make_entry_point(models, name))
    return absent


register()
