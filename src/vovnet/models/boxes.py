"""Boxes: training targets, coding, matching, sampling, and non-maximum suppression. Boxes are xyxy
in input pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import log
from typing import Protocol

import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_iou

MAX_LOG_SCALE = log(1000 / 16)  # of a decoded width or height over its reference's


class InstanceMasks(Protocol):
    """The true masks of N objects, asked for as the mask losses need them."""

    def to(self, device: torch.device | str) -> "InstanceMasks":
        """The same masks on a device."""

    def rasterize(self, boxes_xyxy: Tensor, indices: Tensor, size: int) -> Tensor:
        """(M, size, size) of 0 and 1: object indices[m] inside box m, resampled."""

    def visible_fraction(self, boxes_xyxy: Tensor, indices: Tensor) -> Tensor:
        """(M,) in (0, 1]: the part of object indices[m]'s area that lies inside box m."""


@dataclass(slots=True)
class Target:
    """The labelled objects of one image, N objects, M regions that neither reward nor punish."""

    boxes_xyxy: Tensor  # (N, 4) float
    labels: Tensor  # (N,) int64, 0-based
    masks: InstanceMasks | None = None
    ignore_xyxy: Tensor = field(default_factory=lambda: torch.zeros(0, 4))  # (M, 4), crowds

    def to(self, device: torch.device | str) -> "Target":
        """The same target on a device."""
        masks = None if self.masks is None else self.masks.to(device)
        return Target(
            self.boxes_xyxy.to(device), self.labels.to(device), masks, self.ignore_xyxy.to(device)
        )


def grid_points(height: int, width: int, stride: int, device: torch.device) -> Tensor:
    """Locations (height * width, 2) as x, y in input pixels: stride * index + stride // 2
    (FCOS).
    """
    y = torch.arange(height, device=device) * stride + stride // 2
    x = torch.arange(width, device=device) * stride + stride // 2
    grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([grid_x, grid_y], dim=-1).reshape(-1, 2)


def grid_boxes(grid: tuple[int, int], sides: Tensor, *, step: float, offset: float) -> Tensor:
    """Boxes (H * W * R, 4) of sides (R, 2), width and height, for each cell of a map of H x W.

    Their centres are (index + offset) * step, row by row, the sides innermost; in the dtype and on
    the device of the sides.
    """
    rows, columns = (torch.arange(n, dtype=sides.dtype, device=sides.device) for n in grid)
    grid_y, grid_x = torch.meshgrid(rows, columns, indexing="ij")
    centers = (torch.stack([grid_x, grid_y], dim=-1).reshape(-1, 1, 2) + offset) * step
    return torch.cat([centers - sides / 2, centers + sides / 2], dim=-1).reshape(-1, 4)


def distances_to_boxes(points: Tensor, distances: Tensor) -> Tensor:
    """Points (..., 2) and distances to left, top, right, bottom (..., 4) in pixels to boxes
    xyxy.
    """
    return torch.cat([points - distances[..., :2], points + distances[..., 2:]], dim=-1)


def encode_boxes(
    boxes_xyxy: Tensor, references_xyxy: Tensor, *, weights: tuple[float, float, float, float]
) -> Tensor:
    """What leads from references (..., 4) to boxes (..., 4), as dx, dy, dw, dh times weights
    (R-CNN).

    dx, dy: distance of the centres in widths and heights of the reference; dw, dh: logarithm of the
    ratio of the sides.
    """
    reference_sides = references_xyxy[..., 2:] - references_xyxy[..., :2]
    sides = boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]
    centers = boxes_xyxy[..., :2] + sides / 2
    offsets = centers - (references_xyxy[..., :2] + reference_sides / 2)
    deltas = torch.cat([offsets / reference_sides, torch.log(sides / reference_sides)], dim=-1)
    return deltas * deltas.new_tensor(weights)


def decode_boxes(
    deltas: Tensor, references_xyxy: Tensor, *, weights: tuple[float, float, float, float]
) -> Tensor:
    """The boxes (..., 4) that encode_boxes turns to deltas; sides grow at most 1000 / 16 times."""
    deltas = deltas / deltas.new_tensor(weights)
    reference_sides = references_xyxy[..., 2:] - references_xyxy[..., :2]
    centers = references_xyxy[..., :2] + reference_sides / 2 + deltas[..., :2] * reference_sides
    half = reference_sides * deltas[..., 2:].clamp(max=MAX_LOG_SCALE).exp() / 2
    return torch.cat([centers - half, centers + half], dim=-1)


def clip_boxes(boxes_xyxy: Tensor, sizes: Tensor) -> Tensor:
    """Boxes (..., N, 4) cut at their image; sizes (..., 2) height and width."""
    limits = sizes.flip(-1).to(boxes_xyxy)
    return boxes_xyxy.clamp(min=0).minimum(torch.cat([limits, limits], dim=-1)[..., None, :])


def match_boxes(
    candidates_xyxy: Tensor, boxes_xyxy: Tensor, *, chunk: int = 32
) -> tuple[Tensor, Tensor, Tensor]:
    """For each of A candidates: its highest IoU (A,), the first of N boxes with it (A,), and
    whether no other candidate overlaps some box more (A,).

    chunk: boxes looked at together; A x chunk overlaps are in memory, never A x N.
    """
    best = candidates_xyxy.new_zeros(len(candidates_xyxy))
    matched = torch.zeros_like(best, dtype=torch.int64)
    closest = torch.zeros_like(best, dtype=torch.bool)
    for start in range(0, len(boxes_xyxy), chunk):
        # Two boxes without area share 0 / 0.
        iou = box_iou(boxes_xyxy[start : start + chunk], candidates_xyxy).nan_to_num()
        highest = iou.amax(1, keepdim=True)
        closest |= ((iou == highest) & (highest > 0)).any(0)
        value, index = iou.max(0)
        better = value > best
        best = torch.where(better, value, best)
        matched = torch.where(better, index + start, matched)
    return best, matched, closest


def smallest_centered(
    points: Tensor,
    boxes_xyxy: Tensor,
    *,
    reach: float | Tensor,
    least: float | Tensor,
    most: float | Tensor,
) -> Tensor:
    """Of each point (P, 2) the smallest box that it lies strictly inside, less than reach from the
    centre in x and y, and whose farthest side is least to most away (Tian et al. 2019, FCOS): index
    (P,), -1 where there is none. reach, least, most in pixels, a number or (P, 1).
    """
    if len(boxes_xyxy) == 0:
        return torch.full_like(points[:, 0], -1, dtype=torch.int64)
    x0, y0, x1, y1 = boxes_xyxy.unbind(1)  # (N,)
    x, y = points.to(boxes_xyxy.dtype)[:, :, None].unbind(1)  # (P, 1)
    center_x, center_y = (x0 + x1) / 2, (y0 + y1) / 2
    inside = (
        (x > torch.maximum(center_x - reach, x0))
        & (x < torch.minimum(center_x + reach, x1))
        & (y > torch.maximum(center_y - reach, y0))
        & (y < torch.minimum(center_y + reach, y1))
    )
    longest = torch.stack([x - x0, y - y0, x1 - x, y1 - y], dim=2).amax(2)  # (P, N)
    fits = inside & (longest >= least) & (longest <= most)
    areas = ((x1 - x0) * (y1 - y0)).expand_as(fits).masked_fill(~fits, torch.inf)
    smallest, chosen = areas.min(1)
    return chosen.where(smallest.isfinite(), -1)


def covered_fraction(boxes_xyxy: Tensor, regions_xyxy: Tensor) -> Tensor:
    """(N,) in 0..1: the largest part of each box's area that one of M regions covers."""
    if len(regions_xyxy) == 0:
        return boxes_xyxy.new_zeros(len(boxes_xyxy))
    low = torch.maximum(boxes_xyxy[:, None, :2], regions_xyxy[None, :, :2])
    high = torch.minimum(boxes_xyxy[:, None, 2:], regions_xyxy[None, :, 2:])
    shared = (high - low).clamp(min=0).prod(2).amax(1)
    areas = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).clamp(min=0).prod(1)
    return (shared / areas).nan_to_num()


def sample_balanced(
    positive: Tensor, negative: Tensor, *, count: int, positive_fraction: float
) -> tuple[Tensor, Tensor]:
    """Indices of at most count * positive_fraction positives, and of negatives that fill up to
    count.

    positive, negative (A,) bool. Drawn by torch's CPU generator on every device.
    """
    positives = _draw(positive, int(count * positive_fraction))
    return positives, _draw(negative, count - len(positives))


def _draw(wanted: Tensor, limit: int) -> Tensor:
    indices = torch.nonzero(wanted)[:, 0]
    return indices[torch.randperm(len(indices))[:limit].to(indices.device)]


def class_wise_nms(
    boxes_xyxy: Tensor, scores: Tensor, labels: Tensor, *, threshold: float, keep: int
) -> Tensor:
    """Indices of the at most `keep` best boxes, best first, none overlapping a better one of its
    class.

    Boxes are moved to the positive quadrant first: the class offset of batched_nms lets boxes with
    negative coordinates overlap those of the class before.
    """
    if boxes_xyxy.shape[0] == 0:
        return torch.zeros(0, dtype=torch.int64, device=boxes_xyxy.device)
    shifted = boxes_xyxy - boxes_xyxy.min()
    best: Tensor = batched_nms(shifted, scores.to(shifted.dtype), labels, threshold)
    return best[:keep]


def pad_rows(rows: Sequence[Tensor], count: int) -> Tensor:
    """Stacks tensors of n_i <= count rows to (len(rows), count, ...), missing rows zero."""
    padded = rows[0].new_zeros((len(rows), count, *rows[0].shape[1:]))
    for index, row in enumerate(rows):
        padded[index, : row.shape[0]] = row
    return padded
