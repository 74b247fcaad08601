"""Instance masks as sums of prototype masks (Bolya et al. 2019, YOLACT).

Shapes: B images, P prototypes, M regions.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import roi_align

from vovnet.models.layers import (
    ConvKind,
    ConvNormAct,
    at_least_float32,
    init_weights,
    make_conv3x3,
)

MASK_SIZE = 28
_STRIDE = 4  # of the prototypes
_MARGIN = 0.1  # of a side


class PrototypeHead(nn.Module):
    """Prototypes (B, P, 2H, 2W), none below 0, from the map of stride 8 (B, C, H, W)."""

    def __init__(self, channels: int, prototypes: int, *, conv: ConvKind) -> None:
        super().__init__()
        self.conv = make_conv3x3(conv, channels, channels, stride=1, norm="bn")
        self.fine_conv = make_conv3x3(conv, channels, channels, stride=1, norm="bn")
        self.project = ConvNormAct(channels, prototypes, kernel=1, stride=1, norm="bn")
        self.apply(init_weights)

    def forward(self, feature: Tensor) -> Tensor:
        enlarged = functional.interpolate(self.conv(feature), scale_factor=2.0)
        return at_least_float32(self.project(self.fine_conv(enlarged)))


def cut_masks(maps: Tensor, boxes_xyxy: Tensor) -> Tensor:
    """Mask logits (M, 28, 28): RoIAlign of each map (M, H / 4, W / 4) in its own region (M, 4), in
    input pixels.

    A map is the sum of an image's prototypes with a region's coefficients. To cut the prototypes
    first and to sum then gives the same, for both are linear, but cuts P times as much.
    """
    own = torch.arange(maps.shape[0], device=maps.device, dtype=boxes_xyxy.dtype)
    rois = torch.cat([own[:, None], boxes_xyxy], dim=1)
    maps = at_least_float32(maps)[:, None]
    return roi_align(  # type: ignore[no-any-return]
        maps, rois, MASK_SIZE, 1 / _STRIDE, sampling_ratio=0, aligned=True
    )[:, 0]


def grow_boxes(boxes_xyxy: Tensor) -> Tensor:
    """Boxes (M, 4) a tenth of their sides larger on each side, so that a mask learns to end where
    its object does, not where its box does.
    """
    margin = _MARGIN * (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2])
    return torch.cat([boxes_xyxy[:, :2] - margin, boxes_xyxy[:, 2:] + margin], dim=1)
