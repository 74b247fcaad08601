"""Weights and key maps for the outputs of the authors' own networks in tests/golden."""

import json
import re
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).parent.parent / "golden"


def read(name: str):
    return json.loads((FOLDER / name).read_text())


def golden_value(key: str, shape: list[int]) -> Tensor:
    """The weight that the golden run had under this original key."""
    if key.endswith("num_batches_tracked"):
        return torch.tensor(0)
    random = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)
    if re.search(r"(objectness_logits|anchor_deltas|box_predictor\.\w+)\.weight$", key):
        value = random * np.sqrt(2.0 / np.prod(shape[1:])) * 0.02
    elif len(shape) >= 2:
        value = random * np.sqrt(2.0 / np.prod(shape[1:]))
    elif key.endswith("running_var"):
        value = 1 + 0.1 * np.abs(random)
    elif key.endswith("scale"):
        value = 1 + 0.1 * random
    elif key.endswith("fcos_head.bbox_pred.bias"):
        value = 4 + 0.1 * random
    elif key.endswith("weight"):
        value = 1 + 0.1 * random
    else:
        value = 0.1 * random
    return torch.from_numpy(np.asarray(value))


def backbone_key(key: str) -> str:
    """VoVNet.pytorch's and detectron2's key to ours."""
    key = re.sub(r"^stem\.stem_(\d)", lambda m: f"stem.{int(m[1]) - 1}", key)
    key = re.sub(
        r"^stage(\d)\.OSA\d_(\d+)\.",
        lambda m: f"stages.{int(m[1]) - 2}.blocks.{int(m[2]) - 1}.",
        key,
    )
    key = re.sub(r"\.layers\.(\d+)\.OSA\d_\d+_\d+", r".conv_mid.\1", key)
    key = re.sub(r"\.conv_reduction\.OSA\w+_reduction_0", ".conv_reduction", key)
    key = re.sub(r"\.concat\.OSA\w+_concat", ".conv_concat", key)
    key = key.replace(".ese.", ".attn.").replace("classifier.", "head.fc.")
    names = {
        "/dw_conv3x3": ".conv_dw",
        "/pw_conv1x1": ".conv_pw",
        "/pw_norm": ".bn",
        "/conv": ".conv",
        "/norm": ".bn",
    }
    for original, ours in names.items():
        key = key.replace(original, ours)
    return key


CENTERMASK_RULES = {
    r"^backbone\.fpn_lateral(\d)\.": lambda m: f"fcos.neck.lateral.{int(m[1]) - 3}.",
    r"^backbone\.fpn_output(\d)\.": lambda m: f"fcos.neck.output.{int(m[1]) - 3}.",
    r"^backbone\.top_block\.": "fcos.neck.",
    r"^proposal_generator\.fcos_head\.": "fcos.head.",
    r"\.cls_logits\.": ".logits.",
    r"\.bbox_tower\.": ".box_tower.",
    r"\.bbox_pred\.": ".distances.",
    r"\.ctrness\.": ".centerness.",
    r"^roi_heads\.mask_head\.": "mask_head.",
    r"^roi_heads\.maskiou_head\.": "mask_iou_head.",
    r"\.mask_fcn(\d)\.": lambda m: f".convs.{int(m[1]) - 1}.",
    r"\.maskiou_fcn(\d)\.": lambda m: f".convs.{int(m[1]) - 1}.",
    r"\.spatialAtt\.": ".attention.",
    r"\.maskiou_fc(\d)\.": r".fc\1.",
    r"\.maskiou\.": ".iou.",
}


RCNN_RULES = {
    r"^backbone\.fpn_(lateral|output)(\d)\.": lambda m: f"neck.{m[1]}.{int(m[2]) - 2}.",
    r"^proposal_generator\.rpn_head\.": "rpn.",
    r"\.objectness_logits\.": ".objectness.",
    r"\.anchor_deltas\.": ".deltas.",
    r"^roi_heads\.box_head\.fc(\d)\.": lambda m: f"box_head.fcs.{int(m[1]) - 1}.",
    r"^roi_heads\.box_predictor\.cls_score\.": "box_head.logits.",
    r"^roi_heads\.box_predictor\.bbox_pred\.": "box_head.deltas.",
}


def rcnn_weights(keys: dict[str, list[int]]) -> dict[str, Tensor]:
    """The keys of Faster R-CNN in detectron2 to our state dict."""
    weights = {}
    for key, shape in keys.items():
        if key in ("pixel_mean", "pixel_std"):
            continue
        if key.startswith("backbone.bottom_up."):
            ours = "backbone." + backbone_key(key.removeprefix("backbone.bottom_up."))
        else:
            ours = _rename(key, RCNN_RULES)
        weights[ours] = golden_value(key, shape)
    return weights


def centermask_weights(keys: dict[str, list[int]]) -> dict[str, Tensor]:
    """CenterMask2's keys to our state dict; the five scales become one parameter."""
    weights, scales = {}, []
    for key, shape in keys.items():
        if key in ("pixel_mean", "pixel_std"):
            continue
        value = golden_value(key, shape)
        if key.endswith(".scale"):
            scales.append(value)
            continue
        if key.startswith("backbone.bottom_up."):
            ours = "fcos.backbone." + backbone_key(key.removeprefix("backbone.bottom_up."))
        else:
            ours = _rename(key, CENTERMASK_RULES)
        weights[ours] = value
    return weights | {"fcos.head.scales": torch.cat(scales)}


def _rename(key: str, rules: dict) -> str:
    for pattern, replacement in rules.items():
        key = re.sub(pattern, replacement, key)
    return key
