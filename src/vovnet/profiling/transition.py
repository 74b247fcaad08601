"""How strongly each layer of a dense or one-shot block uses those before it (VoVNet, figure 2)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torchvision.models.densenet import DenseNet

from vovnet.errors import ConfigError
from vovnet.models.layers import SeparableConvNormAct
from vovnet.models.vovnet import OsaBlock


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TransitionMap:
    """One block: mean absolute weight from each source layer into each target layer."""

    name: str
    """Dotted path of the block."""
    sources: tuple[str, ...]
    """Rows, the block's input first."""
    targets: tuple[str, ...]
    """Columns, the aggregation (transition) last."""
    weights: Tensor
    """(sources, targets) float32; NaN where a target does not see a source."""
    normalised: bool = False
    """Whether each column was divided by its maximum."""


def transition_weights(model: nn.Module, *, normalise: bool = True) -> list[TransitionMap]:
    """Measure every OSA block and every dense block of a network, wherever they are inside it.

    A value is mean |w| over the target's weights that meet the source's channels: of the first
    convolution behind a dense layer's concatenation, of an OSA layer's convolution (the pointwise
    one of a depthwise separable layer), of the 1x1 aggregation, and of the classifier behind the
    last dense block. With `normalise` each column is divided by its maximum, which the paper's
    scale of 0 to 1 suggests but its text does not say. Blocks: ours (`OsaBlock`), and those of
    torchvision's DenseNet.

    Raises ConfigError when there is no such block.
    """
    maps = [block_map for name, part in model.named_modules() for block_map in _maps_of(part, name)]
    if not maps:
        raise ConfigError(
            "transition weights: expected a network with OSA blocks or a torchvision DenseNet, "
            f"got {type(model).__name__}"
        )
    return [_normalise(block_map) for block_map in maps] if normalise else maps


def _maps_of(part: nn.Module, name: str) -> Iterator[TransitionMap]:
    if isinstance(part, OsaBlock):
        yield _osa_map(part, name)
    elif isinstance(part, DenseNet):
        yield from _dense_maps(part, f"{name}." if name else "")


def _osa_map(block: OsaBlock, name: str) -> TransitionMap:
    layers = [f"conv {index + 1}" for index in range(len(block.conv_mid))]
    chain = [_mixing_weight(layer) for layer in block.conv_mid]
    aggregation = _mixing_weight(block.conv_concat)
    widths = [weight.shape[0] for weight in chain]
    widths = [aggregation.shape[1] - sum(widths), *widths]
    weights = torch.full((len(chain) + 1, len(chain) + 1), torch.nan)
    for index, weight in enumerate(chain):
        weights[index, index] = _mean_magnitude(weight)  # each layer sees the one before alone
    weights[:, -1] = _per_source(aggregation, widths)
    return TransitionMap(
        name=name,
        sources=("input", *layers),
        targets=(*layers, "aggregation"),
        weights=weights,
    )


def _mixing_weight(layer: nn.Module) -> Tensor:
    """The weight (out, in, ...) through which a layer's channels meet."""
    conv = layer.conv_pw if isinstance(layer, SeparableConvNormAct) else layer.conv
    return conv.weight  # type: ignore[return-value, union-attr]


def _dense_maps(network: DenseNet, prefix: str) -> Iterator[TransitionMap]:
    parts = dict(network.features.named_children())
    blocks = [name for name in parts if name.startswith("denseblock")]
    for name in blocks:
        follower = parts.get(name.replace("denseblock", "transition"))
        last = network.classifier.weight if follower is None else follower.conv.weight
        layers = dict(parts[name].named_children())
        growth = [layer.conv2.weight.shape[0] for layer in layers.values()]
        columns = [layer.conv1.weight for layer in layers.values()] + [last]
        yield TransitionMap(
            name=f"{prefix}features.{name}",
            sources=("input", *(f"layer {index + 1}" for index in range(len(layers)))),
            targets=(
                *(f"layer {index + 1}" for index in range(len(layers))),
                "classifier" if follower is None else "transition",
            ),
            weights=_dense_matrix(columns, [last.shape[1] - sum(growth), *growth]),
        )


def _dense_matrix(columns: Sequence[Tensor], widths: Sequence[int]) -> Tensor:
    weights = torch.full((len(widths), len(columns)), torch.nan)
    for index, weight in enumerate(columns):
        weights[: index + 1, index] = _per_source(weight, widths[: index + 1])
    return weights


def _per_source(weight: Tensor, widths: Sequence[int]) -> Tensor:
    """Mean |w| of the input channels of each source; raises where they do not add up."""
    return torch.stack([_mean_magnitude(part) for part in weight.split(list(widths), dim=1)])


def _mean_magnitude(weight: Tensor) -> Tensor:
    return weight.detach().float().abs().mean().cpu()


def _normalise(block_map: TransitionMap) -> TransitionMap:
    """Divide each column by its maximum; a column of zeros stays."""
    maxima = block_map.weights.nan_to_num(0.0).amax(0)
    weights = block_map.weights / torch.where(maxima > 0, maxima, 1.0)
    return replace(block_map, weights=weights, normalised=True)
