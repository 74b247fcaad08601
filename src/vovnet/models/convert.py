"""A checkpoint of another project as one of our models: which one, and its tensors by our names.

Pure functions on names and tensors: no file is read and no network is built. Reading order:
`rename` (models.rename), `convert`, `check_fit`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from vovnet.errors import DataError
from vovnet.models.layouts import RGB, Layout, find_prefix, is_released, recognise
from vovnet.models.rename import COUNTER, Report, mis_shaped, not_finite, rename
from vovnet.models.vovnet import VARIANTS


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """A checkpoint as one of our models: `create_model(architecture, **model_args)`.

    mean and std are of the red, green and blue channel in units of 0..255.
    """

    layout: Layout
    architecture: str
    model_args: dict[str, Any]
    tensors: dict[str, Tensor]
    mean: RGB
    std: RGB
    report: Report


def convert(tensors: Mapping[str, Tensor], *, leave_out: Sequence[str] = ()) -> Conversion:
    """A checkpoint of any known layout as one of our models; `check_fit` completes its report.

    leave_out: shell patterns of names that are not wanted. Where they take the head of a detector,
    only the backbone is converted. The first convolution of a network that took BGR pixels is
    turned round: ours take RGB. Raises DataError on an unknown layout or network.
    """
    left_out = _match_patterns(tensors, leave_out)
    kept = {name: value for name, value in tensors.items() if name not in left_out}
    headless = recognise(tensors).detector is not None and recognise(kept).detector is None
    renamed = rename(kept, backbone_only=headless)
    layout = renamed.layout
    architecture, norm = _identify_backbone(renamed.tensors, layout)
    settings = _settings(renamed.tensors)
    num_classes = settings.pop("num_classes", 0)
    if layout.detector is not None:
        lite = "_lite" if settings.get("neck_channels") == 128 else ""
        architecture = f"{layout.detector}{lite}_{architecture}"
    return Conversion(
        layout=layout,
        architecture=architecture,
        model_args={"num_classes": num_classes, "overrides": settings | norm},
        tensors=renamed.tensors,
        mean=renamed.mean,
        std=renamed.std,
        report=replace(renamed.report, left_out=tuple(sorted(left_out))),
    )


def check_fit(conversion: Conversion, own: Mapping[str, Tensor]) -> Conversion:
    """The conversion with its report completed against the state dict of the model it names.

    BatchNorm's counters are set to 0 where the checkpoint, of a frozen BatchNorm, has none.
    """
    tensors = dict(conversion.tensors)
    counters = {
        name: torch.zeros((), dtype=torch.int64)
        for name in own
        if name.endswith(COUNTER) and name not in tensors
    }
    tensors |= counters
    original = {ours: name for name, ours in conversion.report.mapped.items()}
    extra = sorted(original.get(name, name) for name in tensors.keys() - own.keys())
    report = conversion.report
    notes = report.notes
    if counters:
        notes += (f"frozen BatchNorm became BatchNorm with the same figures ({len(counters)})",)
    return replace(
        conversion,
        tensors=tensors,
        report=replace(
            report,
            unexpected=tuple(sorted({*report.unexpected, *extra})),
            missing=tuple(sorted(own.keys() - tensors.keys())),
            mis_shaped=mis_shaped(own, tensors),
            not_finite=not_finite(own, tensors),
            notes=notes,
        ),
    )


def _match_patterns(names: Iterable[str], patterns: Sequence[str]) -> set[str]:
    names = list(names)
    found: set[str] = set()
    for pattern in patterns:
        matching = {name for name in names if fnmatchcase(name, pattern)}
        if not matching:
            raise DataError(f"leave out: expected a pattern of some names, {pattern!r} is of none")
        found |= matching
    return found


def _identify_backbone(tensors: Mapping[str, Tensor], layout: Layout) -> tuple[str, dict[str, str]]:
    """The variant whose shape the tensors have, and its norm where that is not the variant's own.

    Names do not tell whether blocks add their input: those of the authors' code do, and timm's with
    attention. Raises DataError where there is no such variant.
    """
    prefix = find_prefix(tensors)
    own = {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }
    found = _shape_of(own)
    norm = {} if "stem.0.bn.running_mean" in own or "stem.0.bn.v" in own else {"norm": "gn"}
    if max(found["blocks_per_stage"]) > 1:
        found["identity"] = is_released(layout) or found["attention"] != "none"
    elif found["attention"] != "none":
        found["attention_in"] = layout.attention_in
    for name, config in VARIANTS.items():
        if all(getattr(config, key) == value for key, value in found.items()):
            return name, norm
    shape = ", ".join(f"{key} {value}" for key, value in found.items())
    raise DataError(f"checkpoint: expected the shape of a published VoVNet, found {shape}")


def _shape_of(own: Mapping[str, Tensor]) -> dict[str, Any]:
    """Settings of VoVNetConfig that the names and shapes of a backbone show."""
    block = r"stages\.{}\.blocks\.([0-9]+)\."
    blocks = [_numbers(own, block.format(stage) + r"conv_concat\..+") for stage in range(4)]
    attended = [_numbers(own, block.format(stage) + r"attn\..+") for stage in range(4)]
    attention = {name.split(".attn.")[1].partition(".")[0] for name in own if ".attn." in name}
    deformable = _numbers(own, r"stages\.([0-9]+)\..+\.conv_offset\.weight")
    first = "stages.{}.blocks.0.{}"
    return {
        "stem_channels": tuple(_width(own, f"stem.{index}.conv") for index in range(3)),
        "stage_conv_channels": tuple(
            _width(own, first.format(stage, "conv_mid.0.conv")) for stage in range(4)
        ),
        "stage_out_channels": tuple(
            _width(own, first.format(stage, "conv_concat.conv")) for stage in range(4)
        ),
        "layers_per_block": len(_numbers(own, r"stages\.0\.blocks\.0\.conv_mid\.([0-9]+)\..+")),
        "blocks_per_stage": tuple(len(numbers) for numbers in blocks),
        "depthwise": any(".conv_dw." in name for name in own),
        "attention": next((kind for part, kind in _ATTENTION.items() if part in attention), "none"),
        "attention_in": "every_block" if any(attended) and attended == blocks else "last_block",
        "stem": "code",
        "norm": "evonorm_s0" if "stem.0.bn.v" in own else "bn",
        "deformable_stages": tuple(sorted(stage + 2 for stage in deformable)),
    }


def _numbers(names: Iterable[str], pattern: str) -> set[int]:
    """The different numbers that the first group of a pattern takes."""
    matches = (re.fullmatch(pattern, name) for name in names)
    return {int(match[1]) for match in matches if match is not None}


def _width(tensors: Mapping[str, Tensor], conv: str) -> int:
    """Output channels of a convolution, plain or separable (0 where there is none)."""
    for name in (f"{conv}.weight", f"{conv}_pw.weight"):
        if name in tensors and tensors[name].ndim == 4:
            return tensors[name].shape[0]
    return 0


def _settings(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The widths and counts that the names and shapes of heads show."""
    settings: dict[str, Any] = {}
    for setting, pattern, axis, less in _SETTINGS:
        found = [value for name, value in tensors.items() if re.fullmatch(pattern, name)]
        if found:
            shape = found[0].shape
            count = len(found) if axis is None else shape[axis] if axis < len(shape) else 0
            settings[setting] = count - less
    return settings


_ATTENTION = {"fc": "ese", "conv": "eca", "fc1": "se"}


_SETTINGS: tuple[tuple[str, str, int | None, int], ...] = (
    ("num_classes", r"head\.fc\.weight", 0, 0),
    ("num_classes", r"(fcos\.)?head\.logits\.weight", 0, 0),
    ("num_classes", r"(faster_rcnn\.)?box_head\.logits\.weight", 0, 1),  # the last is background
    ("neck_channels", r"(fcos\.)?neck\.p6\.weight", 0, 0),
    ("neck_channels", r"(faster_rcnn\.)?rpn\.conv\.weight", 0, 0),
    ("tower_convs", r"(fcos\.)?head\.cls_tower\.(0|3|6|9|12)\.weight", None, 0),
    ("box_width", r"(faster_rcnn\.)?box_head\.fcs\.0\.weight", 0, 0),
    ("mask_convs", r"mask_head\.convs\.[0-9]+\.weight", None, 0),
    ("mask_channels", r"mask_head\.predictor\.weight", 1, 0),
    ("mask_iou_width", r"mask_iou_head\.fc1\.weight", 0, 0),
)
