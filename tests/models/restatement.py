"""The published VoVNets once more, as plain functions of weights by their original names.

Nothing of the package is used: the channel tables, key names and formulas are those of the papers
and of the authors' two repositories. Weights follow the rule of `golden.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tests.models.golden import golden_value


@dataclass(frozen=True, kw_only=True)
class Published:
    """A network; stages 2 to 5 in order. Classifiers are of VoVNet.pytorch, the rest backbones."""

    stem: tuple[int, int, int] = (64, 64, 128)
    mid: tuple[int, int, int, int] = (128, 160, 192, 224)
    out: tuple[int, int, int, int] = (256, 512, 768, 1024)
    layers: int
    blocks: tuple[int, int, int, int]
    depthwise: bool = False
    ese: bool = True
    identity: bool = True
    pools_before_stage_2: bool = False
    deformable: tuple[int, ...] = ()
    classifier: bool = False


class Weights(dict[str, Tensor]):
    """The weights of one network, each made when it is first asked for."""

    def __init__(self, *, counters: bool) -> None:
        super().__init__()
        self.counters = counters

    def get_value(self, key: str, *shape: int) -> Tensor:
        if key not in self:
            self[key] = golden_value(key, list(shape))
        return self[key]


def run(net: Published, weights: Weights, images: Tensor) -> dict[str, Tensor]:
    """images (1, 3, H, W) float64 to stem, stage2 to stage5 and, of a classifier, logits."""
    strides = (2, 1, 1) if net.pools_before_stage_2 else (2, 1, 2)
    x = images
    for index, (channels, stride) in enumerate(zip(net.stem, strides, strict=True)):
        conv = separable if net.depthwise and index else plain
        x = conv(weights, f"stem.stem_{index + 1}", x, channels, stride=stride)
    maps = {"stem": x}
    for number in (2, 3, 4, 5):
        if number > 2 or net.pools_before_stage_2:
            x = functional.max_pool2d(x, 3, 2, ceil_mode=True)
        x = run_stage(net, weights, number, x)
        maps[f"stage{number}"] = x
    if net.classifier:
        matrix = weights.get_value("classifier.weight", 1000, net.out[-1])
        maps["logits"] = x.mean((2, 3)) @ matrix.T + weights.get_value("classifier.bias", 1000)
    return maps


def run_stage(net: Published, weights: Weights, number: int, x: Tensor) -> Tensor:
    mid, out = net.mid[number - 2], net.out[number - 2]
    kinds: dict[bool, Callable[..., Tensor]] = {True: separable, False: plain}
    conv = deformable if number in net.deformable else kinds[net.depthwise]
    for block in range(1, net.blocks[number - 2] + 1):
        name = f"OSA{number}_{block}"
        key = f"stage{number}.{name}"
        before = x
        outputs = [x]
        if net.depthwise and x.shape[1] != mid:
            reduction = f"{key}.conv_reduction.{name}_reduction_0"
            x = plain(weights, reduction, x, mid, kernel=1)
        for layer in range(net.layers):
            x = conv(weights, f"{key}.layers.{layer}.{name}_{layer}", x, mid)
            outputs.append(x)
        x = plain(weights, f"{key}.concat.{name}_concat", torch.cat(outputs, 1), out, kernel=1)
        if net.ese:
            x = effective_squeeze(weights, f"{key}.ese.fc", x)
        if net.identity and block > 1:
            x = x + before
    return x


def plain(
    weights: Weights, key: str, x: Tensor, out: int, *, kernel: int = 3, stride: int = 1
) -> Tensor:
    kernels = weights.get_value(f"{key}/conv.weight", out, x.shape[1], kernel, kernel)
    x = functional.conv2d(x, kernels, stride=stride, padding=kernel // 2)
    return normalise(weights, f"{key}/norm", x).relu()


def separable(weights: Weights, key: str, x: Tensor, out: int, *, stride: int = 1) -> Tensor:
    count = x.shape[1]
    kernels = weights.get_value(f"{key}/dw_conv3x3.weight", count, 1, 3, 3)
    x = functional.conv2d(x, kernels, stride=stride, padding=1, groups=count)
    matrix = weights.get_value(f"{key}/pw_conv1x1.weight", out, count, 1, 1)
    return normalise(weights, f"{key}/pw_norm", functional.conv2d(x, matrix)).relu()


def deformable(weights: Weights, key: str, x: Tensor, out: int) -> Tensor:
    """Tap by tap: the map read between its pixels, gated, times the weights of that tap."""
    count, height, width = x.shape[1:]
    kernels = weights.get_value(f"{key}/conv.weight", out, count, 3, 3)
    guide = functional.conv2d(
        x,
        weights.get_value(f"{key}/conv_offset.weight", 27, count, 3, 3),
        weights.get_value(f"{key}/conv_offset.bias", 27),
        padding=1,
    )
    first, second, gates = guide.chunk(3, dim=1)
    offsets = torch.cat([first, second], dim=1)[0]
    rows = torch.arange(height, dtype=x.dtype)[:, None]
    columns = torch.arange(width, dtype=x.dtype)[None, :]
    total = torch.zeros(1, out, height, width, dtype=x.dtype)
    for tap in range(9):
        down, right = divmod(tap, 3)
        read = read_between(
            x[0],
            rows + down - 1 + offsets[2 * tap],
            columns + right - 1 + offsets[2 * tap + 1],
        )
        gate = 1 / (1 + (-gates[0, tap]).exp())
        total += torch.einsum("oc,chw->ohw", kernels[:, :, down, right], read * gate)
    return normalise(weights, f"{key}/norm", total).relu()


def read_between(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """x (C, H, W) at real positions (H, W), bilinear, zero beyond the map."""
    total = torch.zeros_like(x)
    for row in (rows.floor(), rows.floor() + 1):
        for column in (columns.floor(), columns.floor() + 1):
            share = (1 - (rows - row).abs()) * (1 - (columns - column).abs())
            inside = (row >= 0) & (row < x.shape[1]) & (column >= 0) & (column < x.shape[2])
            nearest_row = row.clamp(0, x.shape[1] - 1).long()
            nearest_column = column.clamp(0, x.shape[2] - 1).long()
            total += x[:, nearest_row, nearest_column] * share * inside
    return total


def normalise(weights: Weights, key: str, x: Tensor) -> Tensor:
    weight, bias, mean, variance = (
        weights.get_value(f"{key}.{name}", x.shape[1])[:, None, None]
        for name in ("weight", "bias", "running_mean", "running_var")
    )
    if weights.counters:
        weights.get_value(f"{key}.num_batches_tracked")
    return (x - mean) / (variance + 1e-5).sqrt() * weight + bias


def effective_squeeze(weights: Weights, key: str, x: Tensor) -> Tensor:
    count = x.shape[1]
    matrix = weights.get_value(f"{key}.weight", count, count, 1, 1)[:, :, 0, 0]
    gate = x.mean((2, 3)) @ matrix.T + weights.get_value(f"{key}.bias", count)
    return x * ((gate + 3).clamp(0, 6) / 6)[:, :, None, None]


_SLIM = (64, 80, 96, 112)
_SLIM_V1 = {"mid": _SLIM, "out": (128, 256, 384, 512), "layers": 5, "blocks": (1, 1, 1, 1)}
_SLIM_V2 = {"mid": _SLIM, "out": (112, 256, 384, 512), "layers": 3, "blocks": (1, 1, 1, 1)}
_V19 = {"layers": 3, "blocks": (1, 1, 1, 1)}
_V39 = {"layers": 5, "blocks": (1, 1, 2, 2)}
_V57 = {"layers": 5, "blocks": (1, 1, 4, 3)}
_V99 = {"layers": 5, "blocks": (1, 3, 9, 3)}
_CODE = {"ese": False, "classifier": True}
_PAPER = _CODE | {"identity": False, "pools_before_stage_2": True}
_DEPTHWISE = {"stem": (64, 64, 64), "depthwise": True}
_DEFORMABLE = {"deformable": (3, 4, 5)}

PUBLISHED = {
    "vovnet27_slim": Published(**_SLIM_V1, **_CODE),
    "vovnet39": Published(**_V39, **_CODE),
    "vovnet57": Published(**_V57, **_CODE),
    "vovnet27_slim_paper": Published(**_SLIM_V1, **_PAPER),
    "vovnet39_paper": Published(**_V39, **_PAPER),
    "vovnet57_paper": Published(**_V57, **_PAPER),
    "ese_vovnet19_slim_dw_d2": Published(**_SLIM_V2, **_DEPTHWISE),
    "ese_vovnet19_dw_d2": Published(**_V19, **_DEPTHWISE),
    "ese_vovnet19_slim_d2": Published(**_SLIM_V2),
    "ese_vovnet19_d2": Published(**_V19),
    "ese_vovnet39_d2": Published(**_V39),
    "ese_vovnet57_d2": Published(**_V57),
    "ese_vovnet99_d2": Published(**_V99),
    "ese_vovnet39_dcn_d2": Published(**_V39, **_DEFORMABLE),
    "ese_vovnet57_dcn_d2": Published(**_V57, **_DEFORMABLE),
    "ese_vovnet99_dcn_d2": Published(**_V99, **_DEFORMABLE),
}
"""By our name: every network that the papers and the authors' repositories publish."""
