"""A path aggregation network (Liu et al. 2018, PANet): up to stride 32."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from vovnet.models.layers import ConvKind, ConvNormAct, NeckBlock, init_weights, make_conv3x3
from vovnet.models.vovnet import OsaBlock, make_pool


class Pan(nn.Module):
    """Coarse maps go down to the fine ones, then fine ones up to the coarse.

    1x1 convolutions bring all maps to out_channels; each fusion is the concat of two of them
    through an OSA block, or through one 3x3 convolution, which has no conv_channels and layers.
    What goes up is pooled as between the backbone's stages, which costs nothing, fits maps of odd
    sides and is exact in int8.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        *,
        out_channels: int,
        block: NeckBlock,
        conv_channels: int,
        layers: int,
        conv: ConvKind,
    ) -> None:
        super().__init__()

        def fusion() -> nn.Module:
            if block == "conv":
                return make_conv3x3(conv, 2 * out_channels, out_channels, stride=1, norm="bn")
            return OsaBlock(
                2 * out_channels,
                conv_channels,
                out_channels,
                layers=layers,
                conv=conv,
                dilation=1,
                attention="none",
                identity=False,
                norm="bn",
                drop_path=0.0,
            )

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
