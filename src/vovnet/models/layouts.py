"""How checkpoints of other projects name their tensors, and our name of each: data and expressions.

A layout is a row of LAYOUTS; the rules of a layout are pairs of an expression for the whole of a
name there and a template of the name here.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from vovnet.errors import DataError

RGB = tuple[float, float, float]
Rules = tuple[tuple[str, str], ...]
Detector = Literal["fcos", "centermask", "faster_rcnn", "mask_rcnn"]

IMAGENET_MEAN: RGB = (123.675, 116.28, 103.53)
IMAGENET_STD: RGB = (58.395, 57.12, 57.375)
FIRST_CONV = "stem.0.conv.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """One way of naming a checkpoint's tensors, and what its names do not tell about the model."""

    name: str
    source: str
    licence: str
    marks: tuple[str, ...]  # expressions, each of which some name holds
    rules: Rules  # of the detector's own parts
    detector: Detector | None = None
    backbone_prefix: str = ""  # in our model
    bgr: bool = False
    std: RGB = IMAGENET_STD  # of the red, green and blue channel in 0..255; the mean is ImageNet's
    attention_in: Literal["last_block", "every_block"] = "last_block"


_PART = r"(?P<part>conv|norm|dw_conv3x3|pw_conv1x1|pw_norm|conv_offset)\.(?P<leaf>\w+)"
_OSA = r"stage(?P<stage>[2-5])\.OSA(?P=stage)_(?P<block>[0-9]{1,2})\."
_OSA_INNER = r"OSA(?P=stage)_(?P=block)_"
_BLOCK = "stages.{stage}.blocks.{block}."

RELEASED_BACKBONE: Rules = (
    (rf"stem\.stem_(?P<stem>[1-3])/{_PART}", "stem.{stem}.{part}.{leaf}"),
    (
        rf"{_OSA}layers\.(?P<layer>[0-9])\.{_OSA_INNER}(?P=layer)/{_PART}",
        _BLOCK + "conv_mid.{layer}.{part}.{leaf}",
    ),
    (
        rf"{_OSA}conv_reduction\.{_OSA_INNER}reduction_0/{_PART}",
        _BLOCK + "conv_reduction.{part}.{leaf}",
    ),
    (rf"{_OSA}concat\.{_OSA_INNER}concat/{_PART}", _BLOCK + "conv_concat.{part}.{leaf}"),
    (rf"{_OSA}ese\.fc\.(?P<leaf>\w+)", _BLOCK + "attn.fc.{leaf}"),
    (r"classifier\.(?P<leaf>\w+)", "head.fc.{leaf}"),
)
OUR_BACKBONE: Rules = ((r"(?P<name>(stem|stages|head)\..+)", "{name}"),)

_FCOS: Rules = (
    (r"backbone\.fpn_lateral(?P<level3>[3-5])\.(?P<leaf>\w+)", "neck.lateral.{level3}.{leaf}"),
    (r"backbone\.fpn_output(?P<level3>[3-5])\.(?P<leaf>\w+)", "neck.output.{level3}.{leaf}"),
    (r"backbone\.top_block\.(?P<name>p[67]\.\w+)", "neck.{name}"),
    (r"proposal_generator\.fcos_head\.(?P<name>cls_tower\.[0-9]+\.\w+)", "head.{name}"),
    (r"proposal_generator\.fcos_head\.bbox_tower\.(?P<name>[0-9]+\.\w+)", "head.box_tower.{name}"),
    (r"proposal_generator\.fcos_head\.cls_logits\.(?P<leaf>\w+)", "head.logits.{leaf}"),
    (r"proposal_generator\.fcos_head\.bbox_pred\.(?P<leaf>\w+)", "head.distances.{leaf}"),
    (r"proposal_generator\.fcos_head\.ctrness\.(?P<leaf>\w+)", "head.centerness.{leaf}"),
    (r"proposal_generator\.fcos_head\.scales\.(?P<level>[0-4])\.scale", "head.scales[{level}]"),
)
_CENTERMASK: Rules = (
    *((pattern, "fcos." + name) for pattern, name in _FCOS),
    (
        r"roi_heads\.mask_head\.mask_fcn(?P<conv>[1-9])\.(?P<leaf>\w+)",
        "mask_head.convs.{conv}.{leaf}",
    ),
    (r"roi_heads\.mask_head\.spatialAtt\.(?P<name>conv\.\w+)", "mask_head.attention.{name}"),
    (r"roi_heads\.mask_head\.(?P<name>(deconv|predictor)\.\w+)", "mask_head.{name}"),
    (
        r"roi_heads\.maskiou_head\.maskiou_fcn(?P<conv>[1-9])\.(?P<leaf>\w+)",
        "mask_iou_head.convs.{conv}.{leaf}",
    ),
    (r"roi_heads\.maskiou_head\.maskiou_(?P<name>fc[12]\.\w+)", "mask_iou_head.{name}"),
    (r"roi_heads\.maskiou_head\.maskiou\.(?P<leaf>\w+)", "mask_iou_head.iou.{leaf}"),
)
_FASTER_RCNN: Rules = (
    (r"backbone\.fpn_lateral(?P<level2>[2-5])\.(?P<leaf>\w+)", "neck.lateral.{level2}.{leaf}"),
    (r"backbone\.fpn_output(?P<level2>[2-5])\.(?P<leaf>\w+)", "neck.output.{level2}.{leaf}"),
    (r"proposal_generator\.rpn_head\.conv\.(?P<leaf>\w+)", "rpn.conv.{leaf}"),
    (
        r"proposal_generator\.rpn_head\.objectness_logits\.(?P<leaf>\w+)",
        "rpn.objectness.{leaf}",
    ),
    (r"proposal_generator\.rpn_head\.anchor_deltas\.(?P<leaf>\w+)", "rpn.deltas.{leaf}"),
    (r"roi_heads\.box_head\.fc(?P<fc>[12])\.(?P<leaf>\w+)", "box_head.fcs.{fc}.{leaf}"),
    (r"roi_heads\.box_predictor\.cls_score\.(?P<leaf>\w+)", "box_head.logits.{leaf}"),
    (r"roi_heads\.box_predictor\.bbox_pred\.(?P<leaf>\w+)", "box_head.deltas.{leaf}"),
)
_MASK_RCNN: Rules = (
    *((pattern, "faster_rcnn." + name) for pattern, name in _FASTER_RCNN),
    (
        r"roi_heads\.mask_head\.mask_fcn(?P<conv>[1-9])\.(?P<leaf>\w+)",
        "mask_head.convs.{conv}.{leaf}",
    ),
    (r"roi_heads\.mask_head\.(?P<name>(deconv|predictor)\.\w+)", "mask_head.{name}"),
)
_OUR_PARTS: Rules = (
    (r"(?P<name>((fcos|faster_rcnn)\.)?(neck|head|rpn|box_head)\..+)", "{name}"),
    (r"(?P<name>mask(_iou)?_head\..+)", "{name}"),
)

_FIRST_NUMBER = {
    "stem": 1,
    "stage": 2,
    "block": 1,
    "conv": 1,
    "fc": 1,
    "level2": 2,
    "level3": 3,
}
"""Group of a rule to the number that we count from 0."""

_OUR_PART = {
    "conv": "conv",
    "norm": "bn",
    "conv_offset": "conv_offset",
    "dw_conv3x3": "conv_dw",
    "pw_conv1x1": "conv_pw",
    "pw_norm": "bn",
}

IGNORED: Rules = (
    (r"pixel_(mean|std)", "goes into the preprocess"),
    (r"proposal_generator\.anchor_generator\.cell_anchors\.[0-9]+", "computed from its settings"),
    (r"n_averaged", "counts the steps of an average"),
)
"""Names without a place in our models, and why."""

_RELEASED_STEM = r"(?:^|\.)stem\.stem_1/conv\.weight$"
_OUR_STEM = r"(?:^|\.)stem\.0\.conv\.weight$"
_FCOS_MARK = r"^proposal_generator\.fcos_head\.cls_logits\.weight$"
_RPN_MARK = r"^proposal_generator\.rpn_head\.conv\.weight$"
_MASK_MARK = r"^roi_heads\.mask_head\.predictor\.weight$"


_CENTERMASK2 = "github.com/youngwanLEE/centermask2"
_DETECTRON2 = Layout(  # BGR pixels less their mean, eSE in every block
    name="vovnet-detectron2",
    source="github.com/youngwanLEE/vovnet-detectron2",
    licence="CC-BY-NC-4.0: not for commercial use",
    marks=(_RELEASED_STEM, r"\.ese\.fc\.weight$"),
    rules=(),
    bgr=True,
    std=(1.0, 1.0, 1.0),
    attention_in="every_block",
)
_OURS = Layout(
    name="vovnet",
    source="this library",
    licence="as the model was published",
    marks=(_OUR_STEM,),
    rules=_OUR_PARTS,
)

LAYOUTS: tuple[Layout, ...] = (
    replace(
        _DETECTRON2,
        name="centermask2 CenterMask",
        source=_CENTERMASK2,
        marks=(_RELEASED_STEM, _FCOS_MARK, _MASK_MARK),
        rules=_CENTERMASK,
        detector="centermask",
        backbone_prefix="fcos.backbone.",
    ),
    replace(
        _DETECTRON2,
        name="centermask2 FCOS",
        source=_CENTERMASK2,
        marks=(_RELEASED_STEM, _FCOS_MARK),
        rules=_FCOS,
        detector="fcos",
        backbone_prefix="backbone.",
    ),
    replace(
        _DETECTRON2,
        name="vovnet-detectron2 Mask R-CNN",
        marks=(_RELEASED_STEM, _RPN_MARK, _MASK_MARK),
        rules=_MASK_RCNN,
        detector="mask_rcnn",
        backbone_prefix="faster_rcnn.backbone.",
    ),
    replace(
        _DETECTRON2,
        name="vovnet-detectron2 Faster R-CNN",
        marks=(_RELEASED_STEM, _RPN_MARK),
        rules=_FASTER_RCNN,
        detector="faster_rcnn",
        backbone_prefix="backbone.",
    ),
    _DETECTRON2,
    Layout(
        name="VoVNet.pytorch",
        source="github.com/stigma0617/VoVNet.pytorch",
        licence="none stated: VoVNet.pytorch has no licence file",
        marks=(_RELEASED_STEM,),
        rules=(),
    ),
    replace(
        _OURS,
        name="vovnet CenterMask",
        marks=(_OUR_STEM, r"^fcos\.head\.logits\.weight$"),
        detector="centermask",
        backbone_prefix="fcos.backbone.",
    ),
    replace(
        _OURS,
        name="vovnet FCOS",
        marks=(_OUR_STEM, r"^head\.logits\.weight$"),
        detector="fcos",
        backbone_prefix="backbone.",
    ),
    replace(
        _OURS,
        name="vovnet Mask R-CNN",
        marks=(_OUR_STEM, r"^faster_rcnn\.rpn\.conv\.weight$"),
        detector="mask_rcnn",
        backbone_prefix="faster_rcnn.backbone.",
    ),
    replace(
        _OURS,
        name="vovnet Faster R-CNN",
        marks=(_OUR_STEM, r"^rpn\.conv\.weight$"),
        detector="faster_rcnn",
        backbone_prefix="backbone.",
    ),
    Layout(
        name="timm",
        source="github.com/huggingface/pytorch-image-models",
        licence="not in the file; that of timm's own weights is Apache-2.0",
        marks=(_OUR_STEM,),
        rules=(),
    ),
)
"""From the most to the least particular; the first whose marks are all there is the layout."""

STD_OF_PREFIX: dict[str, RGB] = {"img_backbone.": IMAGENET_STD}
"""Camera-3D projects (PETR, DETR3D) divide by the deviation, unlike the detectron2 family."""


def recognise(names: Iterable[str]) -> Layout:
    """The layout of a checkpoint by the names of its tensors; raises DataError on none."""
    names = list(names)
    for layout in LAYOUTS:
        if all(any(re.search(mark, name) for name in names) for mark in layout.marks):
            return layout
    shown = ", ".join(sorted(names)[:4]) or "no tensor"
    known = ", ".join(dict.fromkeys(layout.name for layout in LAYOUTS))
    raise DataError(f"expected the tensor names of a VoVNet ({known}), found {shown}")


def find_prefix(names: Iterable[str]) -> str:
    """What stands before the backbone's own names, "" for nothing; raises DataError on two
    backbones.
    """
    stems = (re.fullmatch(r"(.*?)stem\.(stem_1/|0\.)conv\.weight", name) for name in names)
    prefixes = sorted(stem[1] for stem in stems if stem is not None)
    if len(prefixes) != 1:
        raise DataError(
            f"checkpoint: expected one backbone, found {len(prefixes)}: {', '.join(prefixes[:4])}"
        )
    return prefixes[0]


def is_released(layout: Layout) -> bool:
    """Whether the backbone has the names of the authors' own code ("/" in them), not timm's."""
    return _RELEASED_STEM in layout.marks


_LONGEST_NAME = 500  # of any network; Python refuses to read numbers of thousands of digits


def apply_rules(rules: Rules, name: str) -> str | None:
    """The name that the first rule gives, or None where no rule matches the whole name."""
    if len(name) > _LONGEST_NAME:
        return None
    for pattern, template in rules:
        if (match := re.fullmatch(pattern, name)) is not None:
            groups = {
                group: int(text) - _FIRST_NUMBER[group] if group in _FIRST_NUMBER else text
                for group, text in match.groupdict().items()
            }
            if "part" in groups:
                groups["part"] = _OUR_PART[match["part"]]
            return template.format(**groups)
    return None
