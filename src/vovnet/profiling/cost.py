"""What a forward pass costs, as data: one row for each layer, and the whole.

Definitions, with their sources, are in docs/metrics.md.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod, sqrt
from typing import Any, Literal

Kind = Literal["conv", "conv_transpose", "deform_conv", "linear", "matmul", "attention"]

CONVENTIONS = (
    "macs: multiply-accumulates of convolutions (transposed, grouped and deformable ones too), "
    "linear layers and matrix products, without biases; flops = 2 * macs. "
    "memory_access: elements of input, output and weight of each such layer, each once (VoVNet, "
    "equation 1). activations: output elements of the convolutions. "
    "peak_activation_elements: most elements alive at once, by the last use of each tensor, "
    "weights not included, operators not fused. All for the whole batch, in evaluation mode."
)

_CONVOLUTIONS = frozenset({"conv", "conv_transpose", "deform_conv"})
_BOUNDED = frozenset({"conv", "conv_transpose", "linear"})


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCost:
    """One operation of a network, as often as it runs: a head on five maps gives five rows."""

    name: str
    """Dotted path of the module that runs it; empty for the network itself."""
    kind: Kind
    input_shape: tuple[int, ...]
    """Of the tensor that is worked on, batch first; linear layers see rows and features."""
    output_shape: tuple[int, ...]
    kernel: tuple[int, ...] | None = None
    stride: tuple[int, ...] | None = None
    groups: int = 1
    parameters: int
    """Elements of weight and bias; 0 for products of two activations."""
    macs: int
    memory_access: int
    """Elements read and written: inputs, output and weight, each once."""
    activations: int
    """Output elements of a convolution; 0 for the other kinds."""
    lower_bound: float | None
    """Least memory_access at these macs, kernel and map sizes; None where there is none."""

    @property
    def flops(self) -> int:
        """Operations, a multiplication and an addition counted as two."""
        return 2 * self.macs

    @property
    def ratio(self) -> float | None:
        """memory_access over its lower bound, at least 1; None where there is no bound."""
        return self.memory_access / self.lower_bound if self.lower_bound else None


@dataclass(frozen=True, slots=True, kw_only=True)
class CostReport:
    """What one forward pass of a network costs, layer by layer in the order of execution."""

    layers: tuple[LayerCost, ...]
    parameters: int
    """Learned values, shared ones once."""
    peak_activation_elements: int
    peak_activation_at: str
    """Dotted path of the module at work at the peak."""
    concat_memory_access: int
    """Elements that concatenations read and write; not part of memory_access."""
    input_shapes: tuple[tuple[int, ...], ...]
    dtype: str
    element_bytes: int
    fallback_reason: str | None = None
    """Why the pass was computed on the given values, where shapes alone did not do; then the
    figures hold for these values."""

    @property
    def macs(self) -> int:
        """Multiply-accumulate operations of the whole batch."""
        return sum(layer.macs for layer in self.layers)

    @property
    def flops(self) -> int:
        """2 * macs."""
        return 2 * self.macs

    @property
    def memory_access(self) -> int:
        """Elements read and written by convolutions, linear layers and matrix products."""
        return sum(layer.memory_access for layer in self.layers)

    @property
    def memory_access_bytes(self) -> int:
        """memory_access at the report's dtype."""
        return self.memory_access * self.element_bytes

    @property
    def activations(self) -> int:
        """Output elements of the convolutions."""
        return sum(layer.activations for layer in self.layers)

    @property
    def peak_activation_bytes(self) -> int:
        """peak_activation_elements at the report's dtype."""
        return self.peak_activation_elements * self.element_bytes

    @property
    def ratio(self) -> float | None:
        """memory_access over the lower bound, summed over the layers that have one."""
        bounded = [layer for layer in self.layers if layer.lower_bound]
        bound = sum(layer.lower_bound or 0.0 for layer in bounded)
        return sum(layer.memory_access for layer in bounded) / bound if bound else None

    @property
    def conventions(self) -> str:
        """What the figures mean, and how they were found, in one paragraph."""
        if self.fallback_reason is None:
            return f"{CONVENTIONS} Counted from shapes; nothing was computed."
        return (
            f"{CONVENTIONS} Counted while the network ran on the given values, for which alone "
            f"the figures hold, because shapes did not do: {self.fallback_reason}."
        )

    def to_dict(self) -> dict[str, Any]:
        """Return totals, layers and conventions as plain JSON types."""
        totals = ("macs", "flops", "memory_access", "memory_access_bytes", "activations")
        names = (*totals, "peak_activation_bytes", "ratio", "conventions")
        layers = [asdict(layer) | {"ratio": layer.ratio} for layer in self.layers]
        return asdict(self) | {name: getattr(self, name) for name in names} | {"layers": layers}


def lower_bound(inputs: int, outputs: int, weights: int) -> float:
    """Least memory access (elements) of a layer with the same macs and map sizes.

    At fixed macs, kernel, groups and positions the product of input and output channels is fixed,
    and the sum of the maps is smallest where both hold equally many elements. For stride 1 and one
    group this is the VoVNet paper's 2 * sqrt(h * w * B) / k + B / (h * w), with B in macs.
    """
    return 2 * sqrt(inputs * outputs) + weights


def layer_cost(
    name: str,
    kind: Kind,
    shapes: Sequence[Sequence[int]],
    *,
    output: Sequence[int],
    macs: int,
    weight: Sequence[int] | None = None,
    bias_elements: int = 0,
    kernel: Sequence[int] | None = None,
    stride: Sequence[int] | None = None,
    groups: int = 1,
) -> LayerCost:
    """Fill in what follows from the shapes: `shapes` of all that is read but the weight."""
    read = sum(prod(shape) for shape in shapes)
    weights = 0 if weight is None else prod(weight)
    written = prod(output)
    return LayerCost(
        name=name,
        kind=kind,
        input_shape=tuple(shapes[0]),
        output_shape=tuple(output),
        kernel=None if kernel is None else tuple(kernel),
        stride=None if stride is None else tuple(stride),
        groups=groups,
        parameters=weights + bias_elements,
        macs=macs,
        memory_access=read + written + weights,
        activations=written if kind in _CONVOLUTIONS else 0,
        lower_bound=lower_bound(read, written, weights) if kind in _BOUNDED else None,
    )
