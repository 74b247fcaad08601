"""Boxes: training targets, grid points, and non-maximum suppression. Boxes are xyxy in input
pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from vovnet.models.roi import InstanceMasks


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


def distances_to_boxes(points: Tensor, distances: Tensor) -> Tensor:
    """Points (..., 2) and distances to left, top, right, bottom (..., 4) in pixels to boxes
    xyxy.
    """
    return torch.cat([points - distances[..., :2], points + distances[..., 2:]], dim=-1)


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
