"""A path aggregation network (Liu et al. 2018, PANet): up to stride 32."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from vovnet.models.layers import ConvKind, ConvNormAct, init_weights, make_conv3x3
from vovnet.models.vovnet import make_pool


class Pan(nn.Module):
    """Coarse maps go down to the fine ones, then fine ones up to the coarse.

    1x1 convolutions bring all maps to out_channels; each fusion is the concat of two of them
    through a 3x3 convolution, which learnt faster than an OSA block of as many macs. What goes up
    is pooled as between the backbone's stages, which costs nothing, fits maps of odd sides and is
    exact in int8.
    """

    def __init__(self, in_channels: Sequence[int], *, out_channels: int, conv: ConvKind) -> None:
        super().__init__()

        def fusion() -> nn.Module:
            return make_conv3x3(conv, 2 * out_channels, out_channels, stride=1, norm="bn")

        self.lateral = nn.ModuleList(
            ConvNormAct(channels, out_channels, kernel=1, stride=1, norm="bn")
            for channels in in_channels
        )
        self.top_down = nn.ModuleList(fusion() for _ in in_channels[1:])
        self.bottom_up = nn.ModuleList(fusion() for _ in in_channels[1:])
        self.pool = make_pool(dilation=1)
        self.apply(init_weights)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Maps, finest first, to maps (B, out_channels, H_l, W_l) of the same strides."""
        maps = [conv(feature) for conv, feature in zip(self.lateral, features, strict=True)]
        for level in range(len(maps) - 2, -1, -1):
            coarser = functional.interpolate(maps[level + 1], size=maps[level].shape[-2:])
            maps[level] = self.top_down[level](torch.cat([maps[level], coarser], dim=1))
        for level, fuse in enumerate(self.bottom_up, start=1):
            maps[level] = fuse(torch.cat([maps[level], self.pool(maps[level - 1])], dim=1))
        return maps
