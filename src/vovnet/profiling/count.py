"""Counts that depend on the network and its input size, not on the machine.

Definitions, with their sources, are in docs/metrics.md.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from vovnet.errors import ConfigError
from vovnet.profiling.cost import CONVENTIONS, CostReport, Kind, LayerCost
from vovnet.profiling.trace import Recorder, tensors_of

__all__ = [
    "CONVENTIONS",
    "CostReport",
    "Kind",
    "LayerCost",
    "count_costs",
    "count_macs",
    "count_parameters",
]


def count_costs(
    module: nn.Module, inputs: tuple[Any, ...], *, dtype: torch.dtype | None = None
) -> CostReport:
    """Count one forward pass of any network, layer by layer.

    `inputs` are the arguments of `module`: tensors, real or on the meta device, or lists and dicts
    of them; figures are for their whole batch. A copy without values runs on the meta device, so
    nothing is computed and `module` stays as it was. Where shapes depend on values (non-maximum
    suppression), the network itself runs in evaluation mode on real inputs instead, and
    `fallback_reason` says so. Bytes are at `dtype`, by default that of the parameters.

    Raises ConfigError naming the part that failed and the reason when the network cannot run on
    these inputs, and when meta tensors would need values.
    """
    if not isinstance(inputs, tuple):
        raise ConfigError(f"inputs: expected a tuple of tensors, got {type(inputs).__name__}")
    recorder, outputs, fallback_reason = _record(module, inputs)
    peak = recorder.peak(outputs)
    chosen = dtype or _floating_dtype(module, inputs)
    return CostReport(
        layers=tuple(recorder.layers),
        parameters=count_parameters(module),
        peak_activation_elements=peak.elements,
        peak_activation_at=peak.name,
        concat_memory_access=recorder.concat_memory_access,
        input_shapes=_shapes(inputs),
        dtype=str(chosen).removeprefix("torch."),
        element_bytes=chosen.itemsize,
        fallback_reason=fallback_reason,
    )


def count_macs(module: nn.Module, example_inputs: tuple[Tensor, ...]) -> int:
    """Multiply-accumulate operations of one forward pass; see `count_costs`.

    One multiplication with its addition counts once, so flops = 2 * macs. Divide by the batch size
    of `example_inputs` for macs per image.
    """
    return count_costs(module, example_inputs).macs


def count_parameters(module: nn.Module) -> int:
    """Number of learned values, shared ones once; running statistics are not among them."""
    return sum(parameter.numel() for parameter in module.parameters())


def _record(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Recorder, object, str | None]:
    """What a pass on shapes alone saw, its outputs and None; or a real pass, and its reason."""
    try:
        with torch.device("meta"):
            return *_run(_meta_copy(module), tree_map_only(Tensor, _to_meta, inputs)), None
    except Exception as error:  # whatever the network's own code raises without values
        tensors = [*module.parameters(), *module.buffers(), *tensors_of(inputs)]
        if any(tensor.is_meta for tensor in tensors):
            raise ConfigError(
                f"{error}; expected real weights and inputs if that needs values, got meta ones"
            ) from error
        reason = str(error)
    with _evaluation(module):
        return *_run(module, inputs), reason


@contextmanager
def _evaluation(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, and attention as separate operators, for as long as this lasts."""
    modes = {part: part.training for part in module.modules()}
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    module.eval()
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for part, mode in modes.items():
            part.training = mode


def _run(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Recorder, object]:
    recorder = Recorder(module, inputs)
    try:
        with torch.no_grad(), recorder.follow(module), recorder:
            return recorder, module(*inputs)
    except Exception as error:  # whatever the network's own code raises
        part = module.get_submodule(recorder.path[-1])
        where = f"{recorder.path[-1] or 'the network itself'} ({type(part).__name__})"
        reason = shorten(str(error), 240, placeholder=" ...") or type(error).__name__
        raise ConfigError(
            f"{type(module).__name__} on inputs {_shapes(inputs)}: failed in {where}: {reason}"
        ) from error


def _meta_copy(module: nn.Module) -> nn.Module:
    """The module in evaluation mode with weights that have a shape and no values."""
    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(_to_meta(parameter), requires_grad=parameter.requires_grad)
        for parameter in module.parameters()
    }
    memo |= {id(buffer): _to_meta(buffer) for buffer in module.buffers()}
    return deepcopy(module, memo).eval()


def _to_meta(tensor: Tensor) -> Tensor:
    return tensor.detach().to("meta")


def _shapes(inputs: tuple[Any, ...]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(tensor.shape) for tensor in tensors_of(inputs))


def _floating_dtype(module: nn.Module, inputs: tuple[Any, ...]) -> torch.dtype:
    candidates = [*module.parameters(), *tensors_of(inputs)]
    return next((t.dtype for t in candidates if t.is_floating_point()), torch.float32)
