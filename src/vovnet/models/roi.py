"""Regions of interest: the level each is read from, RoIAlign over levels, and the masks inside
them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import roi_align

from vovnet.models.layers import at_least_float32


@dataclass(slots=True)
class BitmapMasks:
    """Masks as pixels (N, H, W), 0 or 1, in input pixels."""

    pixels: Tensor

    def to(self, device: torch.device | str) -> "BitmapMasks":
        """The same masks on a device."""
        return BitmapMasks(self.pixels.to(device))

    def rasterize(self, boxes_xyxy: Tensor, indices: Tensor, size: int) -> Tensor:
        """RoIAlign of each object's own bitmap, cut at one half."""
        rois = torch.cat([indices[:, None].to(boxes_xyxy.dtype), boxes_xyxy], dim=1)
        bitmaps = self.pixels[:, None].to(boxes_xyxy.dtype)
        aligned = roi_align(bitmaps, rois, size, 1.0, sampling_ratio=0, aligned=True)
        inside: Tensor = aligned[:, 0] >= 0.5
        return inside.to(boxes_xyxy.dtype)

    def visible_fraction(self, boxes_xyxy: Tensor, indices: Tensor) -> Tensor:
        """Pixels whose centre lies inside the box over all pixels of the object."""
        height, width = self.pixels.shape[-2:]
        x = torch.arange(width, device=boxes_xyxy.device) + 0.5
        y = torch.arange(height, device=boxes_xyxy.device) + 0.5
        x0, y0, x1, y1 = boxes_xyxy[:, :, None].unbind(1)  # (M, 1)
        columns = ((x >= x0) & (x < x1)).float()  # (M, W)
        rows = ((y >= y0) & (y < y1)).float()  # (M, H)
        whole = self.pixels.flatten(1).count_nonzero(1)[indices].clamp(min=1)
        inside = [
            torch.einsum("h,hw,w->", row, self.pixels[index].float(), column)
            for row, column, index in zip(rows, columns, indices.tolist(), strict=True)
        ]
        if not inside:
            return boxes_xyxy.new_zeros(0)
        return (torch.stack(inside) / whole).clamp(1e-10, 1.0).to(boxes_xyxy.dtype)


def assign_levels(
    boxes_xyxy: Tensor, input_areas: Tensor, *, min_level: int, max_level: int
) -> Tensor:
    """Pyramid level of each box, (M,) int64: ceil(max_level - log2(A_input / A_RoI)) (CenterMask,
    equation 2).

    input_areas (M,): area in pixels of the unpadded image that each box is in.
    """
    width = boxes_xyxy[:, 2] - boxes_xyxy[:, 0]
    height = boxes_xyxy[:, 3] - boxes_xyxy[:, 1]
    areas = (width.clamp(min=0) * height.clamp(min=0)).clamp(min=1e-6)
    levels = torch.ceil(max_level - torch.log2(input_areas / areas))
    return levels.clamp(min_level, max_level).long()


def assign_levels_by_size(
    boxes_xyxy: Tensor,
    *,
    min_level: int,
    max_level: int,
    canonical_level: int = 4,
    canonical_size: float = 224.0,
) -> Tensor:
    """Pyramid level of each box, (M,) int64: floor(canonical_level + log2(sqrt(w h) / 224))
    (CenterMask, equation 1; FPN).

    canonical_size in pixels of the input: the side of a box that is read from canonical_level.
    """
    width = (boxes_xyxy[:, 2] - boxes_xyxy[:, 0]).clamp(min=0)
    height = (boxes_xyxy[:, 3] - boxes_xyxy[:, 1]).clamp(min=0)
    # The 1e-8 is detectron2's: it decides on which side boxes of exactly a power of two fall.
    relative = (width * height).sqrt() / canonical_size + 1e-8
    levels = torch.floor(canonical_level + torch.log2(relative))
    return levels.clamp(min_level, max_level).long()


def pool_regions(
    features: Sequence[Tensor],
    strides: Sequence[int],
    boxes_xyxy: Tensor,
    image_indices: Tensor,
    levels: Tensor,
    *,
    size: int,
) -> Tensor:
    """RoIAlign of M boxes, each from its own level: (M, C, size, size).

    levels (M,) index into features; image_indices (M,) index into the batch. Stored as NHWC, which
    the convolutions that follow are faster on.
    """
    rois = torch.cat([image_indices[:, None].to(boxes_xyxy.dtype), boxes_xyxy], dim=1)
    parts, order = [], []
    for level, (feature, stride) in enumerate(zip(features, strides, strict=True)):
        feature = at_least_float32(feature)
        chosen = torch.nonzero(levels == level).squeeze(1)
        order.append(chosen)
        parts.append(
            roi_align(
                feature,
                rois[chosen].to(feature.dtype),
                size,
                1.0 / stride,
                sampling_ratio=0,
                aligned=True,
            )
        )
    pooled = torch.cat(parts)[torch.argsort(torch.cat(order))]
    return pooled.contiguous(memory_format=torch.channels_last)
