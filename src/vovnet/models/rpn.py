"""The region proposal network of Faster R-CNN (Ren et al. 2015) over P2 to P6, as in detectron2.

Shapes: B images, R ratios, A anchors over all levels (P2 first, row by row, ratios innermost).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from vovnet.models.boxes import (
    Target,
    class_wise_nms,
    clip_boxes,
    covered_fraction,
    decode_boxes,
    encode_boxes,
    grid_boxes,
    match_boxes,
    sample_balanced,
)
from vovnet.models.layers import flatten_anchors

STRIDES = (4, 8, 16, 32, 64)
DELTA_WEIGHTS = (1.0, 1.0, 1.0, 1.0)  # of the four deltas


@dataclass(frozen=True, slots=True, kw_only=True)
class RPNConfig:
    """The settings of the proposals; the defaults are detectron2's."""

    num_classes: int = 80
    neck_channels: int = 256
    anchor_sizes: tuple[float, ...] = (32, 64, 128, 256, 512)  # pixels, one per level
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)  # height over width
    rpn_positive_iou: float = 0.7
    rpn_negative_iou: float = 0.3  # less is background; between the two nothing is learned
    rpn_samples: int = 256  # anchors per image that the losses look at
    rpn_positive_fraction: float = 0.5
    rpn_nms_threshold: float = 0.7
    pre_nms_top_k: int = 1000  # per level
    pre_nms_top_k_train: int = 2000
    proposals: int = 1000  # per image
    proposals_train: int = 1000
    crowd_fraction: float = 0.5  # a background box that lies in a crowd by more is no example


class RPNHead(nn.Module):
    """Objectness and box deltas of every anchor, one set of weights for all levels."""

    def __init__(self, channels: int, *, ratios: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.objectness = nn.Conv2d(channels, ratios, 1)
        self.deltas = nn.Conv2d(channels, 4 * ratios, 1)
        for module in (self.conv, self.objectness, self.deltas):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, pyramid: Sequence[Tensor]) -> dict[str, Tensor]:
        """Maps P2 to P6 to objectness logits (B, A) and anchor_deltas (B, A, 4)."""
        objectness, deltas = [], []
        for feature in pyramid:
            hidden = functional.relu(self.conv(feature))
            objectness.append(flatten_anchors(self.objectness(hidden), 1))
            deltas.append(flatten_anchors(self.deltas(hidden), 4))
        return {
            "objectness": torch.cat(objectness, dim=1).squeeze(2),
            "anchor_deltas": torch.cat(deltas, dim=1),
        }


def level_anchors(raw: dict[str, Tensor], config: RPNConfig) -> list[Tensor]:
    """The anchors (H_l * W_l * R, 4) of each level, xyxy in input pixels, in the deltas' dtype."""
    levels = zip(range(2, 2 + len(STRIDES)), STRIDES, config.anchor_sizes, strict=True)
    like = raw["anchor_deltas"]
    return [
        make_anchors(
            (raw[f"p{level}"].shape[-2], raw[f"p{level}"].shape[-1]),
            stride=stride,
            size=size,
            ratios=config.anchor_ratios,
            like=like,
        )
        for level, stride, size in levels
    ]


def make_anchors(
    grid: tuple[int, int], *, stride: int, size: float, ratios: Sequence[float], like: Tensor
) -> Tensor:
    """Anchors (H * W * R, 4) of a map of H x W: area size^2, centred at stride * index.

    In the dtype and on the device of `like`.
    """
    ratio = like.new_tensor(ratios)
    sides = torch.stack([size / ratio.sqrt(), size * ratio.sqrt()], dim=1)  # (R, 2)
    return grid_boxes(grid, sides, step=stride, offset=0.0)


def rpn_loss(
    raw: dict[str, Tensor], targets: Sequence[Target], config: RPNConfig
) -> dict[str, Tensor]:
    """loss_rpn_cls: BCE over sampled anchors; loss_rpn_box: L1 of the positives' deltas.

    Both are sums over the batch divided by rpn_samples * B.
    """
    anchors = torch.cat(level_anchors(raw, config))
    cls, box = [], []
    images = zip(raw["objectness"], raw["anchor_deltas"], targets, strict=True)
    for objectness, deltas, target in images:
        is_positive, is_negative, matched = assign_anchors(anchors, target, config)
        positive, negative = sample_balanced(
            is_positive,
            is_negative,
            count=config.rpn_samples,
            positive_fraction=config.rpn_positive_fraction,
        )
        logits = objectness[torch.cat([positive, negative])]
        truth = torch.cat([torch.ones_like(positive), torch.zeros_like(negative)]).to(logits)
        cls.append(functional.binary_cross_entropy_with_logits(logits, truth, reduction="sum"))
        boxes = target.boxes_xyxy[matched[positive]].to(anchors.dtype)
        wanted = encode_boxes(boxes, anchors[positive], weights=DELTA_WEIGHTS)
        box.append((deltas[positive] - wanted).abs().sum())
    examples = config.rpn_samples * len(targets)
    return {
        "loss_rpn_cls": torch.stack(cls).sum() / examples,
        "loss_rpn_box": torch.stack(box).sum() / examples,
    }


def assign_anchors(
    anchors: Tensor, target: Target, config: RPNConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Which anchors (A, 4) are positive (A,) and negative (A,), and the object of each (A,).

    Positive: an IoU of rpn_positive_iou, or the highest that some object has with any anchor.
    Negative: less than rpn_negative_iou with all, and not in a crowd region.
    """
    iou, matched, closest = match_boxes(anchors, target.boxes_xyxy.to(anchors.dtype))
    positive = (iou >= config.rpn_positive_iou) | closest
    crowded = covered_fraction(anchors, target.ignore_xyxy.to(anchors)) > config.crowd_fraction
    return positive, (iou < config.rpn_negative_iou) & ~positive & ~crowded, matched


@torch.no_grad()
def propose(
    raw: dict[str, Tensor], sizes: Tensor, config: RPNConfig, *, pre_nms_top_k: int, count: int
) -> list[Tensor]:
    """The at most `count` best boxes (N, 4) float32 of each image, best first, cut at the image.

    sizes (B, 2): height and width of the image without padding. The best pre_nms_top_k of each
    level are taken, boxes without area dropped, overlaps suppressed within each level.
    """
    anchors = level_anchors(raw, config)
    counts = [len(level) for level in anchors]
    objectness = raw["objectness"].split(counts, dim=1)
    deltas = raw["anchor_deltas"].split(counts, dim=1)
    boxes, scores, levels = [], [], []
    for level, reference in enumerate(anchors):
        best, index = objectness[level].topk(min(pre_nms_top_k, counts[level]))
        chosen = deltas[level].gather(1, index[:, :, None].expand(-1, -1, 4))
        decoded = decode_boxes(chosen, reference[index], weights=DELTA_WEIGHTS)
        boxes.append(clip_boxes(decoded, sizes).float())  # as detectron2, whatever the dtype
        scores.append(best)
        levels.append(torch.full_like(index[0], level))
    candidates = torch.cat(boxes, dim=1), torch.cat(scores, dim=1)
    threshold, level_of = config.rpn_nms_threshold, torch.cat(levels)
    return [
        _suppress(*one_image, level_of, threshold=threshold, count=count)
        for one_image in zip(*candidates, strict=True)
    ]


def _suppress(
    boxes_xyxy: Tensor, scores: Tensor, levels: Tensor, *, threshold: float, count: int
) -> Tensor:
    kept = torch.nonzero((boxes_xyxy[:, 2:] > boxes_xyxy[:, :2]).all(1))[:, 0]
    best = class_wise_nms(
        boxes_xyxy[kept], scores[kept], levels[kept], threshold=threshold, keep=count
    )
    return boxes_xyxy[kept[best]]
