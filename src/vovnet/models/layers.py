"""Building blocks that all our networks share."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from math import log2
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import DeformConv2d, FrozenBatchNorm2d, deform_conv2d

NormKind = Literal["bn", "frozen_bn", "gn", "evonorm_s0"]
HeadNorm = Literal["none", "gn"]
ConvKind = Literal["plain", "depthwise", "deformable"]
Attention = Literal["none", "ese", "eca", "se"]


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
    groups = 32 if channels % 32 == 0 else 16  # 80 and 112, of the slim networks, have no 32
    if kind == "gn":
        return nn.GroupNorm(groups, channels)
    if kind == "evonorm_s0":
        return EvoNormS0(channels, groups=groups)
    raise ValueError(f"norm: expected bn, frozen_bn, gn or evonorm_s0, got {kind!r}")


def make_activation(norm: NormKind) -> nn.Module:
    """ReLU, or nothing where the norm already holds the activation."""
    return nn.Identity() if norm == "evonorm_s0" else nn.ReLU(inplace=True)


def make_conv(in_channels: int, out_channels: int, *, kernel: int, norm: HeadNorm) -> nn.Module:
    """A convolution of a neck or head (padding k // 2): with bias, or with GroupNorm instead."""
    padding = kernel // 2
    if norm == "none":
        return nn.Conv2d(in_channels, out_channels, kernel, padding=padding)
    conv = nn.Conv2d(in_channels, out_channels, kernel, padding=padding, bias=False)
    parts: dict[str, nn.Module] = {"conv": conv, "norm": make_norm(norm, out_channels)}
    return nn.Sequential(OrderedDict(parts))


class ConvNormAct(nn.Module):
    """Convolution (no bias, padding k // 2 times the dilation), norm, ReLU unless `activation` is
    false: (B, C_in, H, W) to (B, C_out, H / stride, W / stride).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel: int,
        stride: int,
        norm: NormKind,
        dilation: int = 1,
        activation: bool = True,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel,
            stride=stride,
            padding=kernel // 2 * dilation,
            dilation=dilation,
            bias=False,
        )
        self.bn = make_norm(norm, out_channels)
        self.act = make_activation(norm) if activation else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))  # type: ignore[no-any-return]


class SeparableConvNormAct(nn.Module):
    """3x3 depthwise, 1x1 pointwise, norm, ReLU; neither norm nor activation between the two."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int,
        norm: NormKind,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(
            in_channels,
            in_channels,
            3,
            stride=stride,
            padding=dilation,
            dilation=dilation,
            groups=in_channels,
            bias=False,
        )
        self.conv_pw = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.bn = make_norm(norm, out_channels)
        self.act = make_activation(norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv_pw(self.conv_dw(x))))  # type: ignore[no-any-return]


class DeformableConvNormAct(nn.Module):
    """Modulated deformable 3x3 (DCNv2, Zhu et al. 2019) without bias, norm, ReLU.

    A plain 3x3 predicts 27 channels per pixel: 18 offsets (vertical, horizontal for each of the
    nine taps, in pixels of the map before dilation) and nine gates before the sigmoid. It starts at
    zero: no offset, every gate one half.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int,
        norm: NormKind,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        self.stride = stride
        self.dilation = dilation
        self.conv_offset = nn.Conv2d(
            in_channels, 27, 3, stride=stride, padding=dilation, dilation=dilation
        )
        self.conv = DeformConv2d(in_channels, out_channels, 3, bias=False)
        self.bn = make_norm(norm, out_channels)
        self.act = make_activation(norm)

    def forward(self, x: Tensor) -> Tensor:
        offsets, gates = self.conv_offset(x).split((18, 9), dim=1)
        y = deform_conv2d(  # there is no half-precision version of it on every device
            at_least_float32(x),
            at_least_float32(offsets) * self.dilation,
            at_least_float32(self.conv.weight),
            stride=self.stride,
            padding=self.dilation,
            dilation=self.dilation,
            mask=at_least_float32(gates).sigmoid(),
        )
        return self.act(self.bn(y.to(x.dtype)))  # type: ignore[no-any-return]


_CONVS_3X3: dict[ConvKind, Callable[..., nn.Module]] = {
    "plain": partial(ConvNormAct, kernel=3),
    "depthwise": SeparableConvNormAct,
    "deformable": DeformableConvNormAct,
}


def make_conv3x3(
    kind: ConvKind,
    in_channels: int,
    out_channels: int,
    *,
    stride: int,
    norm: NormKind,
    dilation: int = 1,
) -> nn.Module:
    """A 3x3 convolution of a kind, with norm and ReLU."""
    return _CONVS_3X3[kind](in_channels, out_channels, stride=stride, norm=norm, dilation=dilation)


class AtrousMaxPool(nn.Module):
    """MaxPool2d(3, stride=2, ceil_mode=True) at every pixel: the same windows, nothing left out.

    Each window begins at its pixel and spans three taps that lie `dilation` apart; beyond the map
    there is nothing. Every second pixel of the result is what the strided pool gives.
    """

    def __init__(self, dilation: int) -> None:
        super().__init__()
        self.dilation = dilation

    def forward(self, x: Tensor) -> Tensor:
        reach = 2 * self.dilation
        x = functional.pad(x, (0, reach, 0, reach), value=float("-inf"))
        return functional.max_pool2d(x, 3, stride=1, dilation=self.dilation)


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
    """ECA (Wang et al. 2020): a 1-D convolution over neighbouring channels of the pooled map gates
    the channels.

    It is wider for more channels, by their rule with gamma 2 and b 1: 5 for 256 to 1024.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        kernel = int((log2(channels) + 1) / 2) // 2 * 2 + 1  # the next odd number
        self.conv = nn.Conv1d(1, 1, kernel, padding=kernel // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate: Tensor = self.conv(x.mean((2, 3)).unsqueeze(1)).sigmoid()  # (B, 1, C)
        return x * gate.squeeze(1)[:, :, None, None]


class SqueezeExcite(nn.Module):
    """SE (Hu et al. 2018): two layers on the pooled map, C to C / 16 to C, gate the channels.

    No published VoVNet has it; the ratio of 16 is that of the SE paper.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        reduced = max(channels // 16, 1)
        self.fc1 = nn.Conv2d(channels, reduced, 1)
        self.fc2 = nn.Conv2d(reduced, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate: Tensor = self.fc2(self.fc1(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return x * gate


_ATTENTIONS: dict[Attention, Callable[[int], nn.Module]] = {
    "none": nn.Identity,
    "ese": EffectiveSqueezeExcite,
    "eca": EfficientChannelAttention,
    "se": SqueezeExcite,
}


def make_attention(kind: Attention, channels: int) -> nn.Module:
    """The channel attention after the aggregation."""
    return _ATTENTIONS[kind](channels)


class ClassifierHead(nn.Module):
    """Global average pool, dropout, one linear layer (none for num_classes 0).

    Raises ValueError on an unknown pool.
    """

    def __init__(
        self, in_channels: int, num_classes: int, *, drop_rate: float, pool: Literal["avg", ""]
    ) -> None:
        super().__init__()
        if pool not in ("avg", ""):
            raise ValueError(f"global_pool: expected 'avg' or '', got {pool!r}")
        self.pool = pool
        self.drop = nn.Dropout(drop_rate)
        self.fc = nn.Linear(in_channels, num_classes) if num_classes else nn.Identity()

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, C, H, W) to logits (B, num_classes), or to the pooled embedding (B, C)."""
        if self.pool:
            x = x.mean((2, 3))
        x = self.drop(x)
        return x if pre_logits else self.fc(x)


def init_weights(module: nn.Module) -> None:
    """Kaiming-normal convolutions (fan out), zero biases, zero offsets; for `Module.apply`."""
    if isinstance(module, nn.Conv2d | DeformConv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
        nn.init.zeros_(module.bias)
    if isinstance(module, DeformableConvNormAct):
        nn.init.zeros_(module.conv_offset.weight)


class FeatureInfo(list[dict[str, Any]]):
    """Channels, stride and module of each feature map, finest first."""

    def channels(self, indices: Sequence[int] | None = None) -> list[int]:
        """Channel counts of the maps at indices (all when None)."""
        return [self[index]["num_chs"] for index in self._pick(indices)]

    def reduction(self, indices: Sequence[int] | None = None) -> list[int]:
        """Strides in input pixels of the maps at indices (all when None)."""
        return [self[index]["reduction"] for index in self._pick(indices)]

    def _pick(self, indices: Sequence[int] | None) -> Sequence[int]:
        return range(len(self)) if indices is None else indices


def resolve_indices(indices: int | Sequence[int] | None, count: int) -> tuple[int, ...]:
    """Feature indices from timm's three ways of saying them; raises ValueError when out of
    range.
    """
    if indices is None:
        return tuple(range(count))
    if isinstance(indices, int):
        indices = range(count - indices, count)
    resolved = tuple(index + count if index < 0 else index for index in indices)
    if not resolved or not all(0 <= index < count for index in resolved):
        raise ValueError(f"feature indices: expected some of 0..{count - 1}, got {tuple(indices)}")
    return resolved


def adapt_input_channels(weight: Tensor, in_chans: int) -> Tensor:
    """The weight of a first convolution (C_out, C_in, k, k) for images of another channel count.

    One channel gets the sum over C_in; any other count repeats the weights in turn and scales them
    by C_in / in_chans, so that the map keeps its scale (timm's rule). Raises ValueError where
    in_chans is below 1.
    """
    if in_chans < 1:
        raise ValueError(f"in_chans: expected at least 1, got {in_chans}")
    known = weight.shape[1]
    if in_chans == known:
        return weight
    if in_chans == 1:
        return at_least_float32(weight).sum(1, keepdim=True).to(weight.dtype)
    turns = torch.arange(in_chans, device=weight.device) % known
    return (at_least_float32(weight)[:, turns] * (known / in_chans)).to(weight.dtype)


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


def flatten_anchors(maps: Tensor, values: int) -> Tensor:
    """Predictions (B, R * values, H, W) of R anchors per cell to (B, H * W * R, values), at least
    float32.
    """
    split = maps.unflatten(1, (-1, values)).permute(0, 3, 4, 1, 2)
    return at_least_float32(split.flatten(1, 3))
