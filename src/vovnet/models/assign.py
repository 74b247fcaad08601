"""Which locations have to predict which object: those about its centre (Tian et al. 2019, FCOS), or
those that predict it best, in class and box together (Feng et al. 2021, TOOD).

Shapes: A locations of one image, C classes, N objects, k locations of an object.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torchvision.ops import box_iou

from vovnet.models.boxes import Target, smallest_centered

_CHUNK = 64  # objects looked at together: A x 64 overlaps are in memory, never A x N


@dataclass(frozen=True, slots=True)
class Alignment:
    """What the locations of one image have to predict."""

    owner: Tensor  # (A,) int64, the object of each location; -1: none
    quality: Tensor  # (A,) in 0..1, what the score of the owner's class is to be


@dataclass(frozen=True, slots=True)
class _Picks:
    """The best locations of each object, all (N, k)."""

    location: Tensor
    metric: Tensor  # below 0: no candidate
    iou: Tensor


@torch.no_grad()
def assign_centers(
    boxes_xyxy: Tensor,
    points: Tensor,
    strides: Tensor,
    usable: Tensor,
    target: Target,
    *,
    radius: float,
    limits: Sequence[float],
) -> Alignment:
    """Matches locations (A,) with predicted boxes (A, 4) to the objects of one image, whatever they
    predict.

    A usable location belongs to the smallest object that it lies inside, less than radius strides
    (A, 1) from the centre, and whose farthest side fits the level: limits, in pixels, part the
    levels. The quality is the IoU of its box.
    """
    least, most = torch.zeros_like(strides), torch.full_like(strides, torch.inf)
    levels = strides.unique()  # ascending
    for stride, (low, high) in zip(levels, pairwise((0.0, *limits, torch.inf)), strict=True):
        least, most = (
            bound.masked_fill(strides == stride, value)
            for bound, value in ((least, low), (most, high))
        )
    truth = target.boxes_xyxy
    owner = smallest_centered(points, truth, reach=radius * strides, least=least, most=most)
    owner = owner.where(usable, -1)
    quality = torch.zeros_like(boxes_xyxy[:, 0])
    own = owner >= 0
    mine, yours = boxes_xyxy[own], truth[owner[own]].to(boxes_xyxy)
    quality[own] = _iou_of_pairs(mine, yours)
    return Alignment(owner, quality)


def _iou_of_pairs(one_xyxy: Tensor, two_xyxy: Tensor) -> Tensor:
    """(N,) of boxes (N, 4) and boxes (N, 4)."""
    low = torch.maximum(one_xyxy[:, :2], two_xyxy[:, :2])
    high = torch.minimum(one_xyxy[:, 2:], two_xyxy[:, 2:])
    shared = (high - low).clamp(min=0).prod(1)
    areas = [(box[:, 2:] - box[:, :2]).prod(1) for box in (one_xyxy, two_xyxy)]
    return (shared / (areas[0] + areas[1] - shared)).nan_to_num()


@torch.no_grad()
def assign_aligned(
    scores: Tensor,
    boxes_xyxy: Tensor,
    points: Tensor,
    usable: Tensor,
    target: Target,
    *,
    count: int,
    alpha: float,
    beta: float,
    least_side: float,
) -> Alignment:
    """Matches locations (A,) with class scores (A, C) in 0..1 and predicted boxes (A, 4) to the
    objects of one image.

    An object takes the `count` usable locations with the highest score^alpha * IoU^beta among those
    whose points (A, 2) lie in its box, which counts as least_side pixels wide and high at least. A
    location that several take goes to the one with the highest IoU. The quality is the metric,
    scaled so that the highest of each object is its highest IoU (TOOD, equation 5).
    """
    starts = range(0, len(target.boxes_xyxy), _CHUNK)
    if not starts:
        return Alignment(
            torch.full_like(usable, -1, dtype=torch.int64), torch.zeros_like(scores[:, 0])
        )
    count = min(count, len(points))
    chunks = []
    for start in starts:
        truth = target.boxes_xyxy[start : start + _CHUNK].to(boxes_xyxy)
        labels = target.labels[start : start + _CHUNK]
        iou = box_iou(truth, boxes_xyxy).nan_to_num()  # (n, A)
        metric = scores[:, labels].t() ** alpha * iou**beta
        candidate = usable & _contain(truth, points.to(truth), least_side)
        best, location = metric.masked_fill(~candidate, -1.0).topk(count, dim=1)
        chunks.append(_Picks(location, best, iou.gather(1, location)))
    return _settle(
        _Picks(
            torch.cat([one.location for one in chunks]),
            torch.cat([one.metric for one in chunks]),
            torch.cat([one.iou for one in chunks]),
        ),
        len(points),
    )


def _contain(boxes_xyxy: Tensor, points: Tensor, least_side: float) -> Tensor:
    """Whether each box (n, 4), grown to least_side pixels, holds each point (A, 2): (n, A)."""
    centers = (boxes_xyxy[:, :2] + boxes_xyxy[:, 2:]) / 2
    reach = ((boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]) / 2).clamp(min=least_side / 2)
    return ((points[None] - centers[:, None]).abs() <= reach[:, None]).all(2)


def _settle(picks: _Picks, count: int) -> Alignment:
    """Gives each of `count` locations to the taker with the highest IoU, of equals the first."""
    nobody, k = picks.location.shape
    objects = torch.arange(nobody, device=picks.location.device)[:, None].expand(-1, k)
    taken = picks.metric >= 0
    highest = picks.iou.new_zeros(count).scatter_reduce(
        0, picks.location[taken], picks.iou[taken], "amax"
    )
    wins = taken & (picks.iou == highest[picks.location])
    owner = torch.full((count,), nobody, device=objects.device).scatter_reduce(
        0, picks.location[wins], objects[wins], "amin"
    )
    own = wins & (owner[picks.location] == objects)
    metric = picks.metric.where(own, 0.0)
    best_iou = picks.iou.where(own, 0.0).amax(1, keepdim=True)
    scaled = (metric / metric.amax(1, keepdim=True)).nan_to_num() * best_iou
    quality = picks.iou.new_zeros(count)
    quality[picks.location[own]] = scaled[own]
    return Alignment(owner.masked_fill(owner == nobody, -1), quality)


def crowded_background(
    points: Tensor, aligned: Sequence[Alignment], targets: Sequence[Target]
) -> Tensor:
    """Which background (B, L) lies in a crowd region."""
    return torch.stack(
        [
            (one.owner < 0) & in_regions(points, target.ignore_xyxy.to(points))
            for one, target in zip(aligned, targets, strict=True)
        ]
    )


def wanted_scores(
    logits: Tensor, aligned: Sequence[Alignment], targets: Sequence[Target]
) -> Tensor:
    """The quality (B, L, C) at each location's class, 0 elsewhere."""
    wanted = torch.zeros_like(logits)
    for scores, one, target in zip(wanted, aligned, targets, strict=True):
        location = torch.nonzero(one.owner >= 0)[:, 0]
        labels = target.labels[one.owner[location]]
        scores[location, labels] = one.quality[location].to(scores.dtype)
    return wanted


def in_regions(points: Tensor, regions_xyxy: Tensor) -> Tensor:
    """Which points (A, 2) lie in any of M regions (M, 4): (A,) bool."""
    x, y = points[:, :, None].unbind(1)  # (A, 1)
    x0, y0, x1, y1 = regions_xyxy.unbind(1)
    return ((x >= x0) & (x <= x1) & (y >= y0) & (y <= y1)).any(1)
