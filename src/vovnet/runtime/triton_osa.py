"""OSA blocks on a GPU whose end Triton computes, and the engine that runs them."""

import os
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vovnet.errors import ConfigError
from vovnet.models.layers import EffectiveSqueezeExcite
from vovnet.models.vovnet import OsaBlock
from vovnet.runtime.torch import DTYPES, TorchEngine
from vovnet.runtime.torch import load as load_torch
from vovnet.runtime.triton_kernels import (
    MOST_MAPS,
    Tile,
    aggregate_maps,
    gate_map,
    input_precision,
    triton,
)

_TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
_TF32_TOLERANCE = 5e-3


class TritonOsaBlock(OsaBlock):
    """An OSA block in eval mode whose end the kernels compute; it takes over the parts of `block`.

    Anything they are not for takes the plain way, with a warning.
    """

    def __init__(self, block: OsaBlock, *, tile: Tile | None = None) -> None:
        nn.Module.__init__(self)
        self.identity = block.identity
        for name, part in block.named_children():
            self.add_module(name, part)
        self.train(block.training)
        self.tile = tile
        self._ready: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}

    def forward(self, x: Tensor) -> Tensor:
        if x.is_meta or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
            return super().forward(x)  # it is counted or traced, which kernels would escape
        obstacle = _find_obstacle(self, x)
        if obstacle:
            _warn_once(f"an OSA block takes the plain way: {obstacle}")
            return super().forward(x)
        maps = [x]
        y: Tensor = self.conv_reduction(x)
        for conv in self.conv_mid:
            y = conv(y)
            maps.append(y)
        return self._finish(maps)

    def _finish(self, maps: Sequence[Tensor]) -> Tensor:
        weight, bias = self._weights(_compute_dtype(maps[0]), maps[0].device)
        attention = self.attn
        alone = isinstance(attention, nn.Identity)
        pools = isinstance(attention, EffectiveSqueezeExcite)
        y, means = aggregate_maps(
            maps, weight, bias, adds=self.identity and alone, pools=pools, tile=self.tile
        )
        if isinstance(attention, EffectiveSqueezeExcite) and means is not None:
            gates = attention.fc(means[:, :, None, None]).flatten(1)
            return gate_map(y, gates, maps[0] if self.identity else None)
        if alone:
            return y
        attended: Tensor = attention(y)
        return attended + maps[0] if self.identity else attended

    def _weights(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """Made once: the block's weights no longer change."""
        if (dtype, device) not in self._ready:
            conv = self.conv_concat.conv
            bias = conv.bias
            assert bias is not None
            weight = conv.weight.detach().flatten(1).to(device, dtype).contiguous()
            self._ready = {(dtype, device): (weight, bias.detach().to(device, torch.float32))}
        return self._ready[dtype, device]


def prepare_aggregation(network: nn.Module, *, tile: Tile | None = None) -> int:
    """Puts the kernels into the OSA blocks of a network in eval mode, BatchNorm folded, in place;
    returns the number of blocks.

    Blocks that they are not for stay as they are, with a warning.
    """
    done, left = 0, []
    for parent in list(network.modules()):
        for name, part in list(parent.named_children()):
            if type(part) is not OsaBlock:
                continue
            fault = find_block_fault(part)
            if fault:
                left.append(fault)
                continue
            setattr(parent, name, TritonOsaBlock(part, tile=tile))
            done += 1
    if left:
        _warn(f"{len(left)} of {done + len(left)} OSA blocks stay plain: {left[0]}")
    return done


def find_block_fault(block: OsaBlock) -> str:
    """What in a block the kernels do not compute, empty where they do."""
    last = block.conv_concat
    maps = len(block.conv_mid) + 1
    if maps > MOST_MAPS:
        return f"expected at most {MOST_MAPS} maps to aggregate, found {maps}"
    if not isinstance(last.bn, nn.Identity) or last.conv.bias is None:
        return f"expected a BatchNorm that is folded, found {type(last.bn).__name__}"
    if not isinstance(last.act, nn.ReLU):
        return f"expected ReLU, found {type(last.act).__name__}"
    return ""


def find_fault(device: torch.device, dtype: torch.dtype) -> str:
    """What keeps the kernels from use on a device, empty where they compute what they should."""
    if triton is None:
        return "Triton is not installed"
    if device.type != "cuda" and not _is_interpreted():
        return f"expected a GPU, found {device}"
    try:
        with torch.inference_mode():
            far = _probe(device, dtype)
    except Exception as error:  # of Triton, its compiler and the driver: no common one
        reason = str(error).strip() or type(error).__name__
        return f"Triton {triton.__version__}: {reason.splitlines()[0]}"
    tf32 = dtype == torch.float32 and device.type == "cuda" and input_precision() == "tf32"
    allowed = _TF32_TOLERANCE if tf32 else _TOLERANCES[dtype]
    return "" if far <= allowed else f"the aggregation is off by {far:.1g}"


def _probe(device: torch.device, dtype: torch.dtype) -> float:
    """The greatest difference to the plain end of a block, as a share of the greatest value."""
    random = torch.Generator().manual_seed(0)
    first = torch.randn(2, 40, 5, 7, generator=random).to(device, dtype)
    second = torch.randn(2, 24, 5, 7, generator=random).to(device, dtype)
    weight = torch.randn(40, 64, generator=random).div(8).to(device, dtype)
    bias, gates = torch.randn(2, 2, 40, generator=random).to(device, torch.float32)
    values, means = aggregate_maps([first, second], weight, bias[0], pools=True)
    assert means is not None
    whole = torch.cat([first, second], 1).double()
    expected = torch.einsum("bkhw,nk->bnhw", whole, weight.double())
    expected = (expected + bias[0].double()[:, None, None]).relu()
    errors = [(means.double() - expected.mean((2, 3))).abs().max()]
    gated = expected * functional.hardsigmoid(gates.double())[:, :, None, None] + first.double()
    errors.append((gate_map(values, gates, first).double() - gated).abs().max())
    return float(max(errors) / gated.abs().max())


def load(
    model: str | Path,
    *,
    precision: str,
    device: str,
    threads: int | None,
    settings: Mapping[str, object],
) -> TorchEngine:
    """As runtime.torch.load, on a GPU, with the kernels in the OSA blocks.

    Where they do not work, it warns and computes as the engine torch. Raises ConfigError, also
    without a GPU.
    """
    given = {"precision": precision, "threads": threads, "settings": settings}
    loaded = load_torch(model, device=device, **given)  # type: ignore[arg-type]
    if not loaded.device.startswith("cuda"):
        raise ConfigError(f"device: expected a GPU for torch-triton, found {loaded.device}")
    loaded.name = "torch-triton"
    fault = find_fault(torch.device(loaded.device), DTYPES.get(loaded.precision, torch.float32))
    if fault:
        _warn(f"torch-triton computes as torch does: {fault}")
    else:
        prepare_aggregation(loaded.graph)
    return loaded


def aggregation_bytes_saved(network: nn.Module, images: Tensor, dtype: torch.dtype) -> int:
    """Bytes that a pass over images (B, 3, H, W), on any device, reads and writes less than with
    BatchNorm folded and every operation on its own; values have the type `dtype`.

    Not written and read again: the concat, the convolution's result for ReLU and for eSE's mean,
    the gated map for the residual. The sums of the tiles are left out.
    """
    saved = 0

    def count(block: Any, inputs: tuple[Tensor, ...], y: Tensor) -> None:
        nonlocal saved
        pixels = y.numel() // y.shape[1]
        saved += 2 * pixels * block.conv_concat.conv.in_channels + 2 * y.numel()
        saved += y.numel() * isinstance(block.attn, EffectiveSqueezeExcite)
        saved += 2 * y.numel() * block.identity

    blocks = [part for part in network.modules() if isinstance(part, TritonOsaBlock)]
    hooks = [block.register_forward_hook(count) for block in blocks]
    try:
        with torch.inference_mode():
            network(images)
    finally:
        for hook in hooks:
            hook.remove()
    return saved * dtype.itemsize


def _find_obstacle(block: OsaBlock, x: Tensor) -> str:
    """Why the kernels cannot compute this pass, empty where they can."""
    if block.training:
        return "expected eval mode"
    if torch.is_grad_enabled():
        return "expected torch.no_grad or torch.inference_mode"
    if triton is None or not (x.is_cuda or _is_interpreted()):
        return f"expected Triton and a GPU, found {'no Triton' if triton is None else x.device}"
    if x.numel() == 0:
        return "expected an image at least"
    if _compute_dtype(x) not in _TOLERANCES:
        return f"expected float32 or half precision, found {_compute_dtype(x)}"
    return ""


def _is_interpreted() -> bool:
    """Whether Triton's kernels run step by step on the CPU."""
    return triton is not None and os.environ.get("TRITON_INTERPRET") == "1"


def _compute_dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


@cache
def _warn_once(text: str) -> None:
    _warn(text)


def _warn(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=3)
