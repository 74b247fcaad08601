"""Feature pyramid networks (Lin et al. 2017) with the two extra levels of FCOS."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional


class FPN(nn.Module):
    """P3 to P7 from the maps of stages 3 to 5; out_channels 256, or 128 for FPNLite.

    1x1 lateral and 3x3 output convolutions with bias, no norm, no activation; P6 and P7 are strided
    3x3 convolutions on P5.
    """

    def __init__(self, in_channels: Sequence[int], *, out_channels: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(c, out_channels, 1) for c in in_channels)
        self.output = nn.ModuleList(
            nn.Conv2d(out_channels, out_channels, 3, padding=1) for _ in in_channels
        )
        self.p6 = nn.Conv2d(out_channels, out_channels, 3, stride=2, padding=1)
        self.p7 = nn.Conv2d(out_channels, out_channels, 3, stride=2, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Maps of strides 8, 16, 32 to maps (B, out_channels, H_l, W_l) of strides 8, 16, 32, 64,
        128.
        """
        laterals = [conv(feature) for conv, feature in zip(self.lateral, features, strict=True)]
        for finer in range(len(laterals) - 2, -1, -1):
            size = laterals[finer].shape[-2:]
            laterals[finer] = laterals[finer] + functional.interpolate(
                laterals[finer + 1], size=size, mode="nearest"
            )
        outputs = [conv(lateral) for conv, lateral in zip(self.output, laterals, strict=True)]
        p6 = self.p6(outputs[-1])
        return [*outputs, p6, self.p7(functional.relu(p6))]
