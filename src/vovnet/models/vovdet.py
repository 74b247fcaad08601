"""VovDet: a real-time, anchor-free detector and instance segmenter of our own.

A decoupled head gives each object the locations about its centre (Tian et al. 2019, FCOS), or those
that are task-aligned (Feng et al. 2021, TOOD), with distributions of the four distances (Li et al.
2020, GFL). Boxes are suppressed, or the best of neighbouring locations detects, as CenterNet's
peaks do (Zhou et al. 2019). Where one_to_one is set, a second head learns a single location for
each object beside it and detects (Wang et al. 2024, YOLOv10). Masks are sums of prototypes (Bolya
et al. 2019, YOLACT).

Shapes: B images, L locations over the maps of strides 8, 16, 32, row by row, or 4 to 32, C classes,
N bins of a distance, P prototypes, M regions, K kept detections.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import generalized_box_iou_loss

from vovnet.models.assign import (
    Alignment,
    assign_aligned,
    assign_centers,
    crowded_background,
    wanted_scores,
)
from vovnet.models.boxes import (
    Target,
    class_wise_nms,
    clip_boxes,
    distances_to_boxes,
    grid_points,
    pad_rows,
)
from vovnet.models.layers import ConvKind, flatten_anchors, init_weights, make_conv3x3
from vovnet.models.losses import distribution_focal_loss, mask_loss, quality_focal_loss
from vovnet.models.prototypes import MASK_SIZE, cut_masks, grow_boxes

STRIDES = {"p2": 4, "p3": 8, "p4": 16, "p5": 32}  # of the neck's maps by name; p2 where asked for
# What is kept: what no better box of its class overlaps, the best of neighbours on a map, all.
Suppression = Literal["nms", "peaks", "none"]
Assignment = Literal["centers", "aligned"]
PEAK_WINDOW = 5  # locations
_UNLIKELY = -1e4  # a logit whose probability is exactly 0
_TINY_BOX = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class VovDetConfig:
    """The settings of VovDet.

    Boxes reach box_bins - 1 strides from their location: 480 pixels with 16 bins on stride 32.
    """

    num_classes: int = 80
    neck_channels: int = 96
    depthwise: bool = False  # neck and box towers; class towers always are
    tower_convs: int = 2
    box_bins: int = 16
    one_to_one: bool = False  # a second head, which learns one location for each object, detects
    suppression: Suppression = "nms"  # with one head, "none" leaves each object many detections
    # An object's locations: those about its centre, or those that predict it best.
    assignment: Assignment = "centers"
    center_radius: float = 1.5  # in strides
    # Pixels, between the levels; three of them add the level of stride 4, for small objects.
    level_limits: tuple[int, ...] = (64, 128)
    alignment_alpha: float = 0.5  # power of the score
    alignment_beta: float = 6.0  # power of the IoU
    locations_per_object: int = 10  # where they are aligned
    focal_gamma: float = 2.0
    cls_weight: float = 1.0  # of the losses
    box_weight: float = 5.0
    distribution_weight: float = 1.25
    score_threshold: float = 0.001
    min_score: float = 0.0  # a second limit, which callers set to what they show
    pre_nms_top_k: int = 1000  # where suppression is nms
    nms_threshold: float = 0.65
    max_detections: int = 100  # K


@dataclass(frozen=True, slots=True, kw_only=True)
class VovDetSegConfig(VovDetConfig):
    """The settings of VovDet with masks."""

    prototypes: int = 32
    mask_samples: int = 64  # locations per image that the mask losses look at, drawn at random
    mask_weight: float = 1.0


class LevelHead(nn.Module):
    """The predictions of one level; the class tower is depthwise, as light as YOLOv10's."""

    def __init__(self, config: VovDetConfig) -> None:
        super().__init__()
        channels = config.neck_channels
        box_conv: ConvKind = "depthwise" if config.depthwise else "plain"
        self.cls_tower = _make_tower("depthwise", channels, config.tower_convs)
        self.box_tower = _make_tower(box_conv, channels, config.tower_convs)
        self.logits = nn.Conv2d(channels, config.num_classes, 1)
        self.distribution = nn.Conv2d(channels, 4 * config.box_bins, 1)
        prototypes = config.prototypes if isinstance(config, VovDetSegConfig) else 0
        self.coefficients = nn.Conv2d(channels, prototypes, 1) if prototypes else None
        self.apply(init_weights)
        for predictor in (self.logits, self.distribution):
            nn.init.normal_(predictor.weight, std=0.01)
        nn.init.constant_(self.logits.bias, -log((1 - 0.01) / 0.01))  # type: ignore[arg-type]

    def forward(self, feature: Tensor) -> dict[str, Tensor]:
        box_feature = self.box_tower(feature)
        logits = self.logits(self.cls_tower(feature))
        distribution = self.distribution(box_feature)
        found = {
            "logits": flatten_anchors(logits, logits.shape[1]),
            "distributions": flatten_anchors(distribution, distribution.shape[1]),
        }
        if self.coefficients is not None:
            coefficients = self.coefficients(box_feature)
            found["coefficients"] = flatten_anchors(coefficients, coefficients.shape[1])
        return found


def _make_tower(conv: ConvKind, channels: int, count: int) -> nn.Sequential:
    return nn.Sequential(
        *(make_conv3x3(conv, channels, channels, stride=1, norm="bn") for _ in range(count))
    )


class VovDetHead(nn.Module):
    """A LevelHead for each level."""

    def __init__(self, config: VovDetConfig) -> None:
        super().__init__()
        self.levels = nn.ModuleList(LevelHead(config) for _ in range(1 + len(config.level_limits)))

    def forward(self, pyramid: Sequence[Tensor]) -> dict[str, Tensor]:
        """logits (B, L, C), distributions (B, L, 4 * N) as logits; with masks coefficients
        (B, L, P).
        """
        levels = [head(feature) for head, feature in zip(self.levels, pyramid, strict=True)]
        return {name: torch.cat([one[name] for one in levels], dim=1) for name in levels[0]}


class VovDet(nn.Module):
    """Backbone, neck, one or two heads, and prototypes where it has masks. Input (B, 3, H, W)
    float, normalised and zero-padded to multiples of 32.
    """

    def __init__(
        self,
        backbone: nn.Module,
        neck: nn.Module,
        many_head: nn.Module,
        one_head: nn.Module | None,
        prototype_head: nn.Module | None,
        config: VovDetConfig,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = neck
        self.many_head = many_head
        self.one_head = one_head
        self.prototype_head = prototype_head
        self.config = config
        self.has_masks = prototype_head is not None

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Raw outputs: those of the head that detects, the pyramid as p3 (or p2) to p5 (B,
        neck_channels, H_l, W_l), and with masks prototypes (B, P, H / 4, W / 4).
        """
        pyramid = self.neck(self.backbone(images))
        found = self.many_head(pyramid) if self.one_head is None else self._one_to_one(pyramid)
        raw: dict[str, Tensor] = found | dict(
            zip([*STRIDES][-len(pyramid) :], pyramid, strict=True)
        )
        if self.prototype_head is not None:
            raw["prototypes"] = self.prototype_head(raw["p3"])
        return raw

    def _one_to_one(self, pyramid: Sequence[Tensor]) -> dict[str, Tensor]:
        """It learns from the features, and teaches them nothing (YOLOv10, section 3.1)."""
        assert self.one_head is not None
        return self.one_head([feature.detach() for feature in pyramid])  # type: ignore[no-any-return]

    def loss(
        self, raw: dict[str, Tensor], targets: Sequence[Target], sizes: Tensor
    ) -> dict[str, Tensor]:
        """loss_cls, loss_box, loss_distribution, with masks loss_mask, of the one-to-many head, and
        the same as loss_one_... of the other where there is one; locations beyond sizes (B, 2),
        height and width, take no part.
        """
        config = self.config
        if self.one_head is None:
            return head_losses(raw, targets, sizes, config, one_to_one=False)
        shared = {name: raw[name] for name in ("prototypes", *levels_of(raw)) if name in raw}
        many = self.many_head([raw[level] for level in levels_of(raw)])
        losses = head_losses(many | shared, targets, sizes, config, one_to_one=False)
        own = {name: value.detach() for name, value in shared.items()}
        single = head_losses(raw | own, targets, sizes, config, one_to_one=True)
        return losses | {f"loss_one_{name[5:]}": value for name, value in single.items()}

    def detect(self, raw: dict[str, Tensor], sizes: Tensor) -> dict[str, Tensor]:
        """boxes (B, K, 4) in input pixels, cut at the image; scores, labels, valid (B, K), best
        first; with masks mask_probs (B, K, 28, 28) and mask_scores (B, K), the scores.
        """
        config = self.config
        if config.suppression == "nms":
            found = suppress_candidates(raw, sizes, config)
        else:
            found = best_candidates(
                raw, sizes, config, count=config.max_detections, min_score=config.min_score
            )
        return finish_detections(raw, found)


@dataclass(frozen=True, slots=True)
class Locations:
    """The locations of all levels in input pixels."""

    points: Tensor  # (L, 2) x, y
    strides: Tensor  # (L, 1)


def levels_of(raw: dict[str, Tensor]) -> list[str]:
    """The names of the neck's maps among raw outputs, from the finest."""
    return [name for name in STRIDES if name in raw]


def locate(raw: dict[str, Tensor]) -> Locations:
    """The locations of raw outputs, in the order of their logits."""
    points, strides = [], []
    for level in levels_of(raw):
        feature, stride = raw[level], STRIDES[level]
        one = grid_points(feature.shape[-2], feature.shape[-1], stride, feature.device)
        points.append(one.to(raw["logits"].dtype))
        strides.append(torch.full_like(points[-1][:, :1], stride))
    return Locations(torch.cat(points), torch.cat(strides))


def decode_distributions(distributions: Tensor, points: Tensor, strides: Tensor) -> Tensor:
    """Boxes (..., 4) whose distances from points (..., 2) are the means of distributions
    (..., 4 * N), logits, in strides (..., 1).
    """
    shares = distributions.unflatten(-1, (4, -1)).softmax(-1)
    bins = torch.arange(shares.shape[-1], dtype=shares.dtype, device=shares.device)
    return distances_to_boxes(points, (shares * bins).sum(-1) * strides)


def _inside(points: Tensor, sizes: Tensor) -> Tensor:
    """Which points (L, 2) are in each image (B, L); sizes (B, 2) height and width."""
    return (points[None] < sizes.flip(1)[:, None]).all(2)


def head_losses(
    raw: dict[str, Tensor],
    targets: Sequence[Target],
    sizes: Tensor,
    config: VovDetConfig,
    *,
    one_to_one: bool,
) -> dict[str, Tensor]:
    """The weighted losses of one head, each a sum over the batch divided by the sum of qualities.

    With one_to_one an object has one location, which is aligned. Background in a crowd region
    teaches nothing.
    """
    where = locate(raw)
    logits, distributions = raw["logits"], raw["distributions"]
    boxes = decode_distributions(distributions, where.points, where.strides)  # (B, L, 4)
    usable = _inside(where.points, sizes)
    scores, found = logits.detach().sigmoid(), boxes.detach()
    aligned = [
        assign_centers(
            *(found[image], where.points, where.strides, usable[image], target),
            radius=config.center_radius,
            limits=config.level_limits,
        )
        if config.assignment == "centers" and not one_to_one
        else assign_aligned(
            *(scores[image], found[image], where.points, usable[image], target),
            count=1 if one_to_one else config.locations_per_object,
            alpha=config.alignment_alpha,
            beta=config.alignment_beta,
            least_side=STRIDES[levels_of(raw)[0]],
        )
        for image, target in enumerate(targets)
    ]
    quality = torch.stack([one.quality for one in aligned])  # (B, L)
    total = quality.sum().clamp(min=1)
    counted = usable & ~crowded_background(where.points, aligned, targets)
    wanted = wanted_scores(logits, aligned, targets)
    focal = quality_focal_loss(logits, wanted, gamma=config.focal_gamma).sum(2)
    positive = torch.stack([one.owner >= 0 for one in aligned])
    box, distribution = _box_losses(raw, boxes, positive, aligned, targets, where)
    weight = quality[positive] / total
    losses = {
        "loss_cls": config.cls_weight * focal.masked_fill(~counted, 0).sum() / total,
        "loss_box": config.box_weight * (weight * box).sum(),
        "loss_distribution": config.distribution_weight * (weight * distribution).sum(),
    }
    if isinstance(config, VovDetSegConfig):
        losses["loss_mask"] = config.mask_weight * _mask_loss(raw, aligned, targets, config)
    return losses


def _box_losses(
    raw: dict[str, Tensor],
    boxes: Tensor,
    positive: Tensor,
    aligned: Sequence[Alignment],
    targets: Sequence[Target],
    where: Locations,
) -> tuple[Tensor, Tensor]:
    """Generalised IoU loss and distribution focal loss, a mean of four, of each positive."""
    owners = [one.owner[one.owner >= 0] for one in aligned]
    truth = torch.cat([t.boxes_xyxy[n] for t, n in zip(targets, owners, strict=True)]).to(boxes)
    location = torch.nonzero(positive)[:, 1]
    points, strides = where.points[location], where.strides[location]
    distances = torch.cat([points - truth[:, :2], truth[:, 2:] - points], dim=1) / strides
    logits = raw["distributions"][positive].unflatten(1, (4, -1))
    distribution = distribution_focal_loss(logits, distances).mean(1)
    return generalized_box_iou_loss(boxes[positive], truth), distribution


def _mask_loss(
    raw: dict[str, Tensor],
    aligned: Sequence[Alignment],
    targets: Sequence[Target],
    config: VovDetSegConfig,
) -> Tensor:
    """The mean mask loss of locations drawn from each image's positives."""
    maps, regions, truth = [], [], []
    for image, (one, target) in enumerate(zip(aligned, targets, strict=True)):
        located = torch.nonzero(one.owner >= 0)[:, 0]
        drawn = located[torch.randperm(len(located))[: config.mask_samples].to(located.device)]
        prototypes = raw["prototypes"][image]
        summed = raw["coefficients"][image, drawn] @ prototypes.flatten(1)
        maps.append(summed.unflatten(1, prototypes.shape[1:]))
        regions.append(grow_boxes(target.boxes_xyxy[one.owner[drawn]].to(prototypes.dtype)))
        if len(drawn):
            if target.masks is None:
                raise ValueError(
                    "VovDet's mask loss: expected masks in every target, got a target without"
                )
            truth.append(target.masks.rasterize(regions[-1], one.owner[drawn], MASK_SIZE))
    logits = cut_masks(torch.cat(maps), torch.cat(regions))
    if not truth:
        return logits.sum()  # of nothing; keeps every parameter in the graph
    return mask_loss(logits, torch.cat(truth).to(logits.dtype)).mean()


def keep_peaks(raw: dict[str, Tensor]) -> Tensor:
    """The logits (B, L, C) that are highest within PEAK_WINDOW on their map, the others at -1e4."""
    maps = [raw[level].shape[-2:] for level in levels_of(raw)]
    levels = raw["logits"].split([height * width for height, width in maps], dim=1)
    kept = []
    for logits, sides in zip(levels, maps, strict=True):
        grid = logits.transpose(1, 2).unflatten(2, sides)  # (B, C, H, W)
        highest = functional.max_pool2d(grid, PEAK_WINDOW, stride=1, padding=PEAK_WINDOW // 2)
        kept.append(torch.where(grid < highest, _UNLIKELY, grid).flatten(2).transpose(1, 2))
    return torch.cat(kept, dim=1)


def best_candidates(
    raw: dict[str, Tensor],
    sizes: Tensor,
    config: VovDetConfig,
    *,
    count: int,
    min_score: float | Tensor,
) -> dict[str, Tensor]:
    """The `count` best pairs of location and class, of those that are peaks where suppression is
    peaks: boxes (B, count, 4), scores, labels, valid and location (B, count), best first; what is
    not valid is zero.
    """
    where = locate(raw)
    logits = keep_peaks(raw) if config.suppression == "peaks" else raw["logits"]
    usable = _inside(where.points, sizes)
    # The best pairs are among the best locations, of which there are far fewer to sort.
    highest = torch.where(usable, logits.amax(2), _UNLIKELY)
    highest = functional.pad(highest, (0, count), value=_UNLIKELY)  # there are always enough
    best, location = highest.topk(count)
    location = torch.where(best > _UNLIKELY, location, 0)
    rows = location[:, :, None]
    chosen = logits.gather(1, rows.expand(-1, -1, logits.shape[2]))  # (B, count, C)
    chosen = torch.where((best > _UNLIKELY)[:, :, None], chosen, _UNLIKELY)
    values, pair = chosen.flatten(1).topk(count)
    scores = values.sigmoid()
    valid = (scores > config.score_threshold) & (scores >= min_score)
    location = location.gather(1, pair // config.num_classes)
    rows = location[:, :, None].expand(-1, -1, raw["distributions"].shape[2])
    boxes = decode_distributions(
        raw["distributions"].gather(1, rows), where.points[location], where.strides[location]
    )
    return {
        "boxes": clip_boxes(boxes, sizes).float() * valid[:, :, None],
        "scores": scores * valid,
        "labels": pair % config.num_classes * valid,
        "valid": valid,
        "location": location * valid,
    }


def suppress_candidates(
    raw: dict[str, Tensor], sizes: Tensor, config: VovDetConfig
) -> dict[str, Tensor]:
    """The max_detections best of best_candidates, none overlapping a better one of its class."""
    found = best_candidates(
        raw, sizes, config, count=config.pre_nms_top_k, min_score=config.min_score
    )
    kept = []
    for image, valid in enumerate(found["valid"]):
        candidates = torch.nonzero(valid)[:, 0]
        best = class_wise_nms(
            found["boxes"][image, candidates],
            found["scores"][image, candidates],
            found["labels"][image, candidates],
            threshold=config.nms_threshold,
            keep=config.max_detections,
        )
        kept.append(candidates[best])
    return {
        name: pad_rows([v[k] for v, k in zip(values, kept, strict=True)], config.max_detections)
        for name, values in found.items()
    }


def finish_detections(raw: dict[str, Tensor], found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Detections without their locations, and with their masks where raw has prototypes."""
    location = found["location"]
    found = {name: value for name, value in found.items() if name != "location"}
    if "prototypes" not in raw:
        return found
    valid, boxes = found["valid"], found["boxes"]
    tiny = boxes.new_tensor(_TINY_BOX)  # not every engine can pool a box without area
    boxes = torch.where(valid[:, :, None], boxes, tiny).to(raw["prototypes"].dtype)
    rows = location[:, :, None].expand(-1, -1, raw["coefficients"].shape[2])
    coefficients, prototypes = raw["coefficients"].gather(1, rows), raw["prototypes"]
    maps = (coefficients @ prototypes.flatten(2)).unflatten(2, prototypes.shape[2:])
    logits = cut_masks(maps.flatten(0, 1), boxes.flatten(0, 1))
    probabilities = logits.sigmoid().unflatten(0, (-1, boxes.shape[1]))
    return found | {
        "mask_probs": probabilities * valid[:, :, None, None],
        "mask_scores": found["scores"],
    }
