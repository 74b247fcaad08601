"""The tensors of another project's checkpoint by our names, and how they fit a model of ours.

Pure functions on names and tensors: no file is read and no network is built.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from vovnet.errors import DataError
from vovnet.models.layouts import (
    FIRST_CONV,
    IGNORED,
    IMAGENET_MEAN,
    OUR_BACKBONE,
    RELEASED_BACKBONE,
    RGB,
    STD_OF_PREFIX,
    Layout,
    apply_rules,
    find_prefix,
    is_released,
    recognise,
)

COUNTER = "num_batches_tracked"  # of BatchNorm; a frozen one has none, and nothing depends on it


@dataclass(frozen=True, slots=True)
class Report:
    """What became of each tensor of a checkpoint, by its name there."""

    mapped: dict[str, str] = field(default_factory=dict)  # to our name
    ignored: dict[str, str] = field(default_factory=dict)  # to the reason
    left_out: tuple[str, ...] = ()  # as asked for
    unexpected: tuple[str, ...] = ()  # no place in our model
    missing: tuple[str, ...] = ()  # of our model, by our name
    mis_shaped: tuple[str, ...] = ()  # our name, expected and found shape
    not_finite: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def problems(self) -> dict[str, tuple[str, ...]]:
        """What stands in the way of a whole model, by kind; empty where nothing does."""
        found = {
            "unexpected": self.unexpected,
            "missing": self.missing,
            "wrong shape": self.mis_shaped,
            "not finite floats": self.not_finite,
        }
        return {kind: names for kind, names in found.items() if names}


@dataclass(frozen=True, slots=True, kw_only=True)
class Renamed:
    """A checkpoint's tensors by our names, before it is known which model they make."""

    layout: Layout
    tensors: dict[str, Tensor]
    mean: RGB
    std: RGB
    report: Report


def rename(tensors: Mapping[str, Tensor], *, backbone_only: bool = False) -> Renamed:
    """A checkpoint's tensors by our names, for RGB pixels; raises DataError on an unknown layout.

    backbone_only leaves out what is not the backbone's, and the backbone gets no prefix.
    """
    layout = recognise(tensors)
    prefix = find_prefix(tensors)
    report = _sort_names(tensors, layout, prefix, backbone_only)
    converted = _join_parts({ours: tensors[name] for name, ours in report.mapped.items()})
    mean, std = _normalisation(tensors, layout, prefix)
    origin = "in the file" if layout.bgr and "pixel_mean" in tensors else "assumed, not in the file"
    notes = [f"pixels: mean {list(mean)}, deviation {list(std)} (RGB, 0..255; {origin})"]
    if layout.bgr:
        first = ("" if backbone_only else layout.backbone_prefix) + FIRST_CONV
        if converted[first].ndim == 4:  # all else is found to be of a wrong shape
            converted[first] = converted[first].flip(1)
        notes.append(f"BGR pixels became RGB: the input channels of {first} are turned round")
    return Renamed(
        layout=layout,
        tensors=converted,
        mean=mean,
        std=std,
        report=replace(report, notes=tuple(notes)),
    )


def _sort_names(names: Iterable[str], layout: Layout, prefix: str, backbone_only: bool) -> Report:
    """What each name becomes: mapped, ignored, or unexpected, as a second one of the same place
    is.
    """
    backbone_rules = RELEASED_BACKBONE if is_released(layout) else OUR_BACKBONE
    our_prefix = "" if backbone_only else layout.backbone_prefix
    places: dict[str, str] = {}
    ignored: dict[str, str] = {}
    unexpected = []
    for name in sorted(names):
        inside = name.startswith(prefix)
        ours = apply_rules(backbone_rules, name.removeprefix(prefix)) if inside else None
        if ours is not None:
            ours = our_prefix + ours
        elif not backbone_only:
            ours = apply_rules(layout.rules, name)
        why = apply_rules(IGNORED, name)
        if ours is not None and ours not in places:
            places[ours] = name
        elif why is not None or (backbone_only and not inside):
            ignored[name] = why or "not of the backbone"
        else:
            unexpected.append(name)
    mapped = {name: ours for ours, name in places.items()}
    return Report(mapped, ignored, unexpected=tuple(unexpected))


def mis_shaped(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Names whose shape is not the model's, with both shapes."""
    return tuple(
        f"{name} (expected {tuple(own[name].shape)}, found {tuple(tensors[name].shape)})"
        for name in sorted(own.keys() & tensors.keys())
        if own[name].shape != tensors[name].shape
    )


def not_finite(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Names, with their type, that should hold finite floats of the model's type and shape and do
    not; of a variance also those below 0.
    """
    return tuple(
        f"{name} ({tensors[name].dtype})"
        for name in sorted(own.keys() & tensors.keys())
        # A wrong shape may stand for more numbers than there is memory.
        if own[name].is_floating_point() and own[name].shape == tensors[name].shape
        if not _holds_figures(name, tensors[name], own[name].dtype)
    )


def _holds_figures(name: str, value: Tensor, dtype: torch.dtype) -> bool:
    if not value.is_floating_point() or not value.to(dtype).isfinite().all():
        return False
    return not (name.endswith("running_var") and bool((value < 0).any()))


def _join_parts(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors named x[0], x[1] ... become the one tensor x."""
    whole: dict[str, Tensor] = {}
    parts: dict[str, list[Tensor]] = {}
    for name, value in sorted(tensors.items()):
        if name.endswith("]"):
            parts.setdefault(name.partition("[")[0], []).append(value.reshape(-1))
        else:
            whole[name] = value
    return whole | {name: torch.cat(values) for name, values in parts.items()}


def _normalisation(tensors: Mapping[str, Tensor], layout: Layout, prefix: str) -> tuple[RGB, RGB]:
    """Mean and deviation in RGB order: those in the checkpoint, else those of its family."""
    found = []
    default = (IMAGENET_MEAN, STD_OF_PREFIX.get(prefix, layout.std))
    for name, usual in zip(("pixel_mean", "pixel_std"), default, strict=True):
        if name in tensors and layout.bgr:
            values = tensors[name].flatten().tolist() if tensors[name].numel() == 3 else []
            if len(values) != 3 or not all(abs(value) < 1e6 for value in values):
                raise DataError(f"checkpoint: {name}: expected three finite numbers, got {values}")
            # Stored in float32; the shortest decimal that means the same is what was configured.
            blue, green, red = (float(str(np.float32(value))) for value in values)
            found.append((red, green, blue))
        else:
            found.append(usual)
    mean, std = found
    if min(std) <= 0:
        raise DataError(f"checkpoint: pixel_std: expected numbers above 0, got {std}")
    return mean, std
