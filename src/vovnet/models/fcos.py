"""FCOS (Tian et al. 2019) as CenterMask uses it: centre sampling, centerness on the box tower,
GIoU, focal loss.

Shapes: B images, L locations over all five levels (P3 first, row by row), C classes, K kept
detections.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import log, prod

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import sigmoid_focal_loss

from vovnet.models.boxes import (
    Target,
    class_wise_nms,
    distances_to_boxes,
    grid_points,
    pad_rows,
    smallest_centered,
)
from vovnet.models.layers import at_least_float32
from vovnet.models.losses import centerness_target, giou_loss_ltrb

STRIDES = (8, 16, 32, 64, 128)
_IGNORED = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class FCOSConfig:
    """The settings of FCOS; the defaults are those of CenterMask's released configuration."""

    num_classes: int = 80
    neck_channels: int = 256
    tower_convs: int = 4
    level_limits: tuple[int, int, int, int] = (64, 128, 256, 512)  # pixels, between the five levels
    center_radius: float = 1.5  # in strides
    score_threshold: float = 0.05  # on the class probability alone
    pre_nms_top_k: int = 1000  # per level
    min_score: float = 0.0  # of sqrt(class probability x centerness); less is dropped unseen
    nms_threshold: float = 0.6
    max_detections: int = 50  # K


class FCOSHead(nn.Module):
    """Class, box and centerness predictions, one set of weights for all levels, one scale per
    level.
    """

    def __init__(self, channels: int, num_classes: int, *, tower_convs: int) -> None:
        super().__init__()
        self.cls_tower = self._tower(channels, tower_convs)
        self.box_tower = self._tower(channels, tower_convs)
        self.logits = nn.Conv2d(channels, num_classes, 3, padding=1)
        self.distances = nn.Conv2d(channels, 4, 3, padding=1)
        self.centerness = nn.Conv2d(channels, 1, 3, padding=1)
        self.scales = nn.Parameter(torch.ones(len(STRIDES)))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        nn.init.constant_(self.logits.bias, -log((1 - 0.01) / 0.01))  # type: ignore[arg-type]
        nn.init.ones_(self.distances.bias)  # type: ignore[arg-type]  # else half the ReLUs start dead

    @staticmethod
    def _tower(channels: int, count: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for _ in range(count):
            layers += [
                nn.Conv2d(channels, channels, 3, padding=1),
                nn.GroupNorm(32, channels),
                nn.ReLU(inplace=True),
            ]
        return nn.Sequential(*layers)

    def forward(self, pyramid: Sequence[Tensor]) -> dict[str, Tensor]:
        """Maps P3 to P7 to logits (B, L, C), distances (B, L, 4) in strides, centerness (B, L)
        logits.
        """
        logits, distances, centerness = [], [], []
        for feature, scale in zip(pyramid, self.scales, strict=True):
            box_feature = self.box_tower(feature)
            logits.append(self.logits(self.cls_tower(feature)))
            distances.append(functional.relu(self.distances(box_feature) * scale))
            centerness.append(self.centerness(box_feature))
        return {
            "logits": _flatten_levels(logits),
            "distances": _flatten_levels(distances),
            "centerness": _flatten_levels(centerness).squeeze(2),
        }


class FCOS(nn.Module):
    """Backbone, neck, head. Input (B, 3, H, W) float, normalised and zero-padded to multiples of
    32.
    """

    has_masks = False

    def __init__(
        self, backbone: nn.Module, neck: nn.Module, head: nn.Module, config: FCOSConfig
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = neck
        self.head = head
        self.config = config

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Raw outputs: those of FCOSHead, and the pyramid as p3 to p7 (B, neck_channels,
        H_l, W_l).
        """
        pyramid = self.neck(self.backbone(images))
        levels = {f"p{level}": feature for level, feature in enumerate(pyramid, start=3)}
        return self.head(pyramid) | levels  # type: ignore[no-any-return]

    def loss(
        self, raw: dict[str, Tensor], targets: Sequence[Target], sizes: Tensor
    ) -> dict[str, Tensor]:
        """loss_cls, loss_box, loss_centerness (scalars) of a batch; sizes (B, 2) is not
        used here.
        """
        return fcos_loss(raw, targets, self.config)

    def detect(self, raw: dict[str, Tensor], sizes: Tensor) -> dict[str, Tensor]:
        """boxes (B, K, 4) in input pixels, not clipped; scores, labels, valid (B, K), best
        first.
        """
        return fcos_detect(raw, self.config, max_detections=self.config.max_detections)


def _flatten_levels(maps: Sequence[Tensor]) -> Tensor:
    """Maps (B, C, H_l, W_l) to (B, L, C)."""
    return at_least_float32(torch.cat([m.flatten(2) for m in maps], dim=2).transpose(1, 2))


def level_points(raw: dict[str, Tensor]) -> list[Tensor]:
    """The locations (H_l * W_l, 2) of each level as x, y in input pixels."""
    maps = [raw[f"p{level}"] for level in range(3, 3 + len(STRIDES))]
    return [
        grid_points(m.shape[-2], m.shape[-1], stride, m.device)
        for m, stride in zip(maps, STRIDES, strict=True)
    ]


# --- loss ---


def fcos_loss(
    raw: dict[str, Tensor], targets: Sequence[Target], config: FCOSConfig
) -> dict[str, Tensor]:
    """loss_cls: focal sum / positives; loss_centerness: BCE sum / positives; loss_box:
    centerness-weighted GIoU.
    """
    points = level_points(raw)
    assigned = [assign_points(points, target, config) for target in targets]
    labels = torch.stack([label for label, _ in assigned])  # (B, L)
    positive = (labels >= 0) & (labels < config.num_classes)
    counted = labels != _IGNORED
    one_hot = functional.one_hot(labels.clamp(min=0), config.num_classes + 1)[..., :-1]
    num_positive = positive.sum().clamp(min=1)
    logits = raw["logits"]
    focal = sigmoid_focal_loss(logits[counted], one_hot[counted].to(logits.dtype), 0.25, 2.0)

    truth = torch.stack([distances for _, distances in assigned])[positive].to(logits.dtype)
    predicted = raw["distances"][positive]
    centerness = raw["centerness"][positive]
    weight = centerness_target(truth)
    ctr = functional.binary_cross_entropy_with_logits(centerness, weight, reduction="sum")
    box = (weight * giou_loss_ltrb(predicted, truth)).sum() / weight.sum().clamp(min=1e-6)
    return {
        "loss_cls": focal.sum() / num_positive,
        "loss_box": box,
        "loss_centerness": ctr / num_positive,
    }


def assign_points(
    points: Sequence[Tensor], target: Target, config: FCOSConfig
) -> tuple[Tensor, Tensor]:
    """What each location has to predict: labels (L,) and distances (L, 4) in strides.

    A location belongs to the smallest object whose centre region (center_radius strides, cut at the
    box) it lies strictly inside and whose longest distance fits its level. Label num_classes is
    background, -1 neither (inside a crowd region).
    """
    if len(target.boxes_xyxy) == 0:
        location = torch.cat(list(points))
        labels = torch.full_like(location[:, 0], config.num_classes)
        distances = target.boxes_xyxy.new_zeros((len(location), 4))
        return _ignore_crowds(labels, location, target, config.num_classes), distances
    limits = pairwise((0, *config.level_limits, torch.inf))
    per_level = [
        _assign_level(location, stride, limit, target, config)
        for location, stride, limit in zip(points, STRIDES, limits, strict=True)
    ]
    labels = torch.cat([label for label, _ in per_level])
    distances = torch.cat([distance for _, distance in per_level])
    return _ignore_crowds(labels, torch.cat(list(points)), target, config.num_classes), distances


def _assign_level(
    location: Tensor, stride: int, limits: tuple[float, float], target: Target, config: FCOSConfig
) -> tuple[Tensor, Tensor]:
    boxes = target.boxes_xyxy
    owner = smallest_centered(
        location, boxes, reach=config.center_radius * stride, least=limits[0], most=limits[1]
    )
    own = owner.clamp(min=0)
    labels = torch.where(owner < 0, config.num_classes, target.labels[own])
    points = location.to(boxes.dtype)
    distances = torch.cat([points - boxes[own, :2], boxes[own, 2:] - points], dim=1)
    return labels, distances / stride


def _ignore_crowds(labels: Tensor, location: Tensor, target: Target, background: int) -> Tensor:
    if len(target.ignore_xyxy) == 0:
        return labels
    x, y = location[:, :, None].unbind(1)
    x0, y0, x1, y1 = target.ignore_xyxy.unbind(1)
    crowded = ((x >= x0) & (x <= x1) & (y >= y0) & (y <= y1)).any(1)
    return torch.where(crowded & (labels == background), _IGNORED, labels)


# --- detect ---


def fcos_detect(
    raw: dict[str, Tensor], config: FCOSConfig, *, max_detections: int
) -> dict[str, Tensor]:
    """The padded detections of FCOS.detect: candidates per level, then class-wise NMS over all
    levels.
    """
    points = level_points(raw)
    counts = [len(location) for location in points]
    logits = raw["logits"].split(counts, dim=1)
    distances = raw["distances"].split(counts, dim=1)
    centerness = raw["centerness"].split(counts, dim=1)
    levels = [
        level_candidates(
            *one_level,
            count=min(config.pre_nms_top_k, prod(one_level[0].shape[1:])),
            config=config,
        )
        for one_level in zip(logits, distances, centerness, points, STRIDES, strict=True)
    ]
    boxes, scores, labels = (torch.cat(parts, dim=1) for parts in zip(*levels, strict=True))
    boxes = boxes.float()  # as the released code: NMS and what follows see float32 boxes

    kept = []
    for image in range(len(boxes)):
        wanted = (scores[image] > 0) & (scores[image] >= config.min_score)
        candidates = torch.nonzero(wanted).squeeze(1)
        best = class_wise_nms(
            boxes[image, candidates],
            scores[image, candidates],
            labels[image, candidates],
            threshold=config.nms_threshold,
            keep=max_detections,
        )
        kept.append(candidates[best])
    images = range(len(boxes))
    return {
        "boxes": pad_rows([boxes[i, kept[i]] for i in images], max_detections),
        "scores": pad_rows([scores[i, kept[i]] for i in images], max_detections),
        "labels": pad_rows([labels[i, kept[i]] for i in images], max_detections),
        "valid": pad_rows(
            [torch.ones_like(kept[i], dtype=torch.bool) for i in images], max_detections
        ),
    }


def level_candidates(
    logits: Tensor,
    distances: Tensor,
    centerness: Tensor,
    points: Tensor,
    stride: int,
    *,
    count: int,
    config: FCOSConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    """The `count` best boxes (B, count, 4), scores and labels (B, count) of one level; score 0
    below the threshold.
    """
    probability = logits.sigmoid()  # (B, P, C)
    joint = probability * centerness.sigmoid()[:, :, None]
    joint = torch.where(probability > config.score_threshold, joint, 0).flatten(1)
    best, index = joint.topk(count)
    location = index // config.num_classes
    chosen = distances.gather(1, location[:, :, None].expand(-1, -1, 4))
    boxes = distances_to_boxes(points[location], chosen * stride)
    return boxes, best.sqrt(), index % config.num_classes
