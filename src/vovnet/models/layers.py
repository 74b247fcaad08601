"""Building blocks that all our networks share."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import FrozenBatchNorm2d

NormKind = Literal["bn", "frozen_bn", "gn", "evonorm_s0"]


class EvoNormS0(nn.Module):
    """Normalisation and activation in one: x * sigmoid(v x) / group std (Liu et al. 2020,
    EvoNorm-S0).
    """

    def __init__(self, channels: int, *, groups: int = 32, eps: float = 1e-5) -> None:
        super().__init__()
        self.groups = groups
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.v = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1, 1, 1)
        grouped = x.unflatten(1, (self.groups, -1))
        variance = grouped.float().var(dim=(2, 3, 4), unbiased=False, keepdim=True)
        std = (variance + self.eps).sqrt().expand_as(grouped).reshape(x.shape).to(x.dtype)
        x = x * (x * self.v.view(shape)).sigmoid() / std
        return x * self.weight.view(shape) + self.bias.view(shape)


def make_norm(kind: NormKind, channels: int) -> nn.Module:
    """The normalisation layer of a convolution; raises ValueError on an unknown kind."""
    if kind == "bn":
        return nn.BatchNorm2d(channels)
    if kind == "frozen_bn":
        frozen: nn.Module = FrozenBatchNorm2d(channels)
        return frozen
    if kind == "gn":
        return nn.GroupNorm(32 if channels % 32 == 0 else 16, channels)
    if kind == "evonorm_s0":
        return EvoNormS0(channels)
    raise ValueError(f"norm: expected bn, frozen_bn, gn or evonorm_s0, got {kind!r}")


def make_activation(norm: NormKind) -> nn.Module:
    """ReLU, or nothing where the norm already holds the activation."""
    return nn.Identity() if norm == "evonorm_s0" else nn.ReLU(inplace=True)


class ConvNormAct(nn.Module):
    """Convolution (no bias, padding k // 2), norm, ReLU: (B, C_in, H, W) to (B, C_out, H / stride,
    W / stride).
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, kernel: int, stride: int, norm: NormKind
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel, stride=stride, padding=kernel // 2, bias=False
        )
        self.bn = make_norm(norm, out_channels)
        self.act = make_activation(norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))  # type: ignore[no-any-return]


class SeparableConvNormAct(nn.Module):
    """3x3 depthwise, 1x1 pointwise, norm, ReLU; neither norm nor activation between the two."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int, norm: NormKind) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(
            in_channels, in_channels, 3, stride=stride, padding=1, groups=in_channels, bias=False
        )
        self.conv_pw = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.bn = make_norm(norm, out_channels)
        self.act = make_activation(norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv_pw(self.conv_dw(x))))  # type: ignore[no-any-return]


class EffectiveSqueezeExcite(nn.Module):
    """eSE: one C x C layer on the pooled map gates the channels (VoVNetV2; hard sigmoid as in all
    released code).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * functional.hardsigmoid(self.fc(x.mean((2, 3), keepdim=True)))


class EfficientChannelAttention(nn.Module):
    """ECA: a 1-D convolution over neighbouring channels of the pooled map gates the channels."""

    def __init__(self, channels: int, *, kernel: int = 5) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, kernel, padding=kernel // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate: Tensor = self.conv(x.mean((2, 3)).unsqueeze(1)).sigmoid()  # (B, 1, C)
        return x * gate.squeeze(1)[:, :, None, None]


class Normalize(nn.Module):
    """Turns padded uint8 images into the network's input.

    mean and std are RGB in units of 0..255. Non-persistent buffers: they travel in the preprocess,
    never in the weights.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32), persistent=False)

    def forward(self, images: Tensor, sizes: Tensor) -> Tensor:
        """images (B, H, W, 3) uint8 RGB, sizes (B, 2) height and width of the picture in each.

        Returns (B, 3, H, W) float, exactly zero outside the picture: normalised first, then padded.
        """
        rows = torch.arange(images.shape[1], device=images.device)
        columns = torch.arange(images.shape[2], device=images.device)
        inside_rows = rows[None, :] < sizes[:, :1]  # (B, H)
        inside_columns = columns[None, :] < sizes[:, 1:]  # (B, W)
        inside = (inside_rows[:, :, None] & inside_columns[:, None, :])[..., None]
        normalised = (images.to(self.mean.dtype) - self.mean) / self.std * inside
        return normalised.permute(0, 3, 1, 2)


def at_least_float32(x: Tensor) -> Tensor:
    """Half-precision tensors as float32, all others as they are: losses and box arithmetic
    need it.
    """
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
