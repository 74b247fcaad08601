"""Feature pyramid networks (Lin et al. 2017): P3 to P7 as in FCOS, P2 to P6 as in Mask R-CNN."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from vovnet.models.layers import HeadNorm, make_conv


class FPN(nn.Module):
    """P3 to P7 from the maps of stages 3 to 5; out_channels 256, or 128 for FPNLite.

    1x1 lateral and 3x3 output convolutions with bias, no norm, no activation; P6 and P7 are strided
    3x3 convolutions on P5.
    """

    def __init__(self, in_channels: Sequence[int], *, out_channels: int) -> None:
        super().__init__()
        self.lateral, self.output = _make_levels(in_channels, out_channels, norm="none")
        self.p6 = nn.Conv2d(out_channels, out_channels, 3, stride=2, padding=1)
        self.p7 = nn.Conv2d(out_channels, out_channels, 3, stride=2, padding=1)
        self.apply(_init_weights)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Maps of strides 8, 16, 32 to maps (B, out_channels, H_l, W_l) of strides 8, 16, 32, 64,
        128.
        """
        levels = _merge_top_down(features, self.lateral, self.output)
        p6 = self.p6(levels[-1])
        return [*levels, p6, self.p7(functional.relu(p6))]


class PooledFPN(nn.Module):
    """P2 to P6 from the maps of stages 2 to 5; out_channels 256, or 128 for FPNLite.

    As FPN, but P6 is every second position of P5. With GroupNorm (norm "gn") it follows each
    convolution, which then has no bias.
    """

    def __init__(
        self, in_channels: Sequence[int], *, out_channels: int, norm: HeadNorm = "none"
    ) -> None:
        super().__init__()
        self.lateral, self.output = _make_levels(in_channels, out_channels, norm=norm)
        self.apply(_init_weights)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Maps of strides 4, 8, 16, 32 to maps (B, out_channels, H_l, W_l) of strides 4, 8, 16, 32,
        64.
        """
        levels = _merge_top_down(features, self.lateral, self.output)
        return [*levels, functional.max_pool2d(levels[-1], 1, stride=2)]


def _make_levels(
    in_channels: Sequence[int], out_channels: int, *, norm: HeadNorm
) -> tuple[nn.ModuleList, nn.ModuleList]:
    """The lateral and the output convolution of each level."""
    lateral = [make_conv(c, out_channels, kernel=1, norm=norm) for c in in_channels]
    output = [make_conv(out_channels, out_channels, kernel=3, norm=norm) for _ in in_channels]
    return nn.ModuleList(lateral), nn.ModuleList(output)


def _merge_top_down(
    features: Sequence[Tensor], lateral: nn.ModuleList, output: nn.ModuleList
) -> list[Tensor]:
    """Adds to each level the coarser one, enlarged to its size by the nearest position."""
    laterals = [conv(feature) for conv, feature in zip(lateral, features, strict=True)]
    for finer in range(len(laterals) - 2, -1, -1):
        size = laterals[finer].shape[-2:]
        laterals[finer] = laterals[finer] + functional.interpolate(
            laterals[finer + 1], size=size, mode="nearest"
        )
    return [conv(level) for conv, level in zip(output, laterals, strict=True)]


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_uniform_(module.weight, a=1)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
