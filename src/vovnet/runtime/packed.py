"""Convolutions on the CPU with their weights laid out ahead, and the aggregation without a fresh
concat.

oneDNN wants the weights of a convolution in an order that depends on the shape of its input; torch
brings them there in every call. Here this happens once, when a batch shape comes back, and the ReLU
is part of the same call. The operators that do this are private to torch: they are probed first,
and where one is missing or wrong everything stays as it was.
"""

import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from vovnet.models.layers import ConvNormAct, SeparableConvNormAct
from vovnet.models.vovnet import OsaBlock

Aggregation = Literal["concat", "buffer", "accumulate"]
AGGREGATIONS: tuple[Aggregation, ...] = get_args(Aggregation)

_REPEATS = 8  # of a batch shape in a row before it is packed for: fewer do not pay it back
_MOST_REPEATS = 64
_PROBES = (  # kernel, stride, dilation, groups of 16 channels
    (3, 1, 1, 1),
    (3, 2, 1, 1),
    (3, 1, 2, 1),
    (3, 1, 1, 16),
    (1, 1, 1, 1),
)
_TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@dataclass(frozen=True, slots=True)
class _ForShape:
    """What was made for inputs of one shape and precision; no copy of a network takes it along."""

    shape: torch.Size
    dtype: torch.dtype

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def fits(self, x: Tensor) -> bool:
        """Whether it is for x, as the network computes it now."""
        return x.shape == self.shape and _compute_dtype(x) == self.dtype


@dataclass(frozen=True, slots=True)
class PackedWeight(_ForShape):
    """The weight and bias of a convolution in oneDNN's order."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True, slots=True)
class Plan(_ForShape):
    """How a block aggregates, after the shape of its first map; slices where it accumulates."""

    aggregation: Aggregation
    slices: tuple[PackedWeight, ...]


class _Pass(threading.local):
    """The parts that the pass of this thread has met, None where it does not pack."""

    met: set[nn.Module] | None = None


_PASS = _Pass()


def _packs_now(part: nn.Module) -> bool:
    """Whether this pass packs, and meets the part for the first time."""
    if _PASS.met is None or part in _PASS.met:
        return False
    _PASS.met.add(part)
    return True


class PackedConv(nn.Conv2d):
    """A convolution, with its ReLU where `relu` says so, that packs its weights for the shape of
    its first input of a pass that packs; any other shape takes the plain way.

    It shares the parameters of `conv` and has their keys.
    """

    def __init__(self, conv: nn.Conv2d, *, relu: bool) -> None:
        sizes = (conv.in_channels, conv.out_channels, conv.kernel_size)
        settings = (conv.stride, conv.padding, conv.dilation, conv.groups)
        given: Any = (*sizes, *settings, conv.bias is not None, "zeros", "meta")
        super().__init__(*given)
        self.weight, self.bias = conv.weight, conv.bias
        self.train(conv.training)
        self.relu = relu
        self.packed: PackedWeight | None = None

    def forward(self, input: Tensor) -> Tensor:
        """(B, C_in, H, W) to (B, C_out, H', W')."""
        if torch.is_inference_mode_enabled():
            packed = self.packed  # read once: another thread may replace it
            if packed is not None and packed.fits(input):
                _packs_now(self)  # met: a later shape of this pass leaves it so
                return convolve(self, packed, input, relu=self.relu)
            if _packs_now(self) and _is_packable(input):
                return self._pack(input)
        return self._plain(input)

    def _plain(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return functional.relu_(y) if self.relu else y

    def _pack(self, x: Tensor) -> Tensor:
        """Packs for x and gives its result; stays plain, with a warning, where oneDNN refuses."""
        try:
            packed = pack_weight(self, self.weight, self.bias, x)
            y = convolve(self, packed, x, relu=self.relu)
        except RuntimeError as error:
            warnings.warn(
                f"a convolution of {tuple(x.shape)} stays plain: {_first_line(error)}",
                RuntimeWarning,
                stacklevel=2,
            )
            self.packed = None
            return self._plain(x)
        self.packed = packed
        return y


def pack_weight(conv: nn.Conv2d, weight: Tensor, bias: Tensor | None, x: Tensor) -> PackedWeight:
    """The weight of a convolution with the settings of `conv`, laid out for inputs like x."""
    dtype = _compute_dtype(x)
    packed = torch.ops.mkldnn._reorder_convolution_weight(
        weight.detach().to(dtype), *_settings(conv), list(x.shape)
    )
    return PackedWeight(x.shape, dtype, packed, bias if bias is None else bias.detach().to(dtype))


def convolve(conv: nn.Conv2d, packed: PackedWeight, x: Tensor, *, relu: bool) -> Tensor:
    """The convolution of x (B, C_in, H, W) in one call."""
    unary = "relu" if relu else "none"
    y: Tensor = torch.ops.mkldnn._convolution_pointwise(
        x.to(packed.dtype), packed.weight, packed.bias, *_settings(conv), unary, [], ""
    )
    return y


def accumulate(conv: PackedConv, slices: Sequence[PackedWeight], maps: Sequence[Tensor]) -> Tensor:
    """The 1x1 convolution of concatenated maps (B, C_i, H, W), each map in turn added to one sum.

    slices holds the weight of each map; the first one has the bias.
    """
    total = convolve(conv, slices[0], maps[0], relu=False)
    add_to = torch.ops.mkldnn._convolution_pointwise_.binary
    for index, (packed, x) in enumerate(zip(slices[1:], maps[1:], strict=True), start=2):
        given = total, x, packed.weight, packed.bias, *_settings(conv)
        unary = "relu" if conv.relu and index == len(maps) else None
        total = add_to(*given, "add", 1.0, unary, [], "")
    return total


class Scratch:
    """Memory that concatenated maps take turns in, of which no two threads get the same piece."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return Scratch, ()

    @contextmanager
    def concat(self, maps: Sequence[Tensor]) -> Iterator[Tensor]:
        """The concat of maps (B, C_i, H, W) in channels-last order, valid inside the context."""
        batch, _, height, width = maps[0].shape
        shape = (batch, height, width, sum(x.shape[1] for x in maps))
        size = torch.Size(shape).numel()
        memory = self._take(size, maps[0].dtype)
        whole = memory[:size].view(shape).permute(0, 3, 1, 2)
        yield torch.cat(list(maps), dim=1, out=whole)
        self._free.append(memory)

    def clear(self) -> None:
        """Gives the memory back."""
        self._free.clear()

    def _take(self, size: int, dtype: torch.dtype) -> Tensor:
        try:
            memory = self._free.pop()
        except IndexError:
            return torch.empty(size, dtype=dtype)
        fits = memory.numel() >= size and memory.dtype == dtype
        return memory if fits else torch.empty(size, dtype=dtype)


class PackedOsaBlock(OsaBlock):
    """An OSA block that aggregates in the way that was fastest for its shape, or in the one that
    `forced` names.

    It takes over the parts of `block`, whose convolutions are PackedConv.
    """

    def __init__(
        self, block: OsaBlock, scratch: Scratch, *, forced: Aggregation | None = None
    ) -> None:
        nn.Module.__init__(self)
        self.identity = block.identity
        for name, part in block.named_children():
            self.add_module(name, part)
        self.scratch = scratch
        self.forced = forced
        self.plan: Plan | None = None
        self._fastest: dict[torch.Size, Aggregation] = {}

    def aggregate(self, outputs: list[Tensor]) -> Tensor:
        """As in OsaBlock."""
        if torch.is_inference_mode_enabled():
            if _packs_now(self) and not (self.plan and self.plan.fits(outputs[0])):
                self.plan = self._choose(outputs)
            plan = self.plan
            if plan is not None and plan.fits(outputs[0]):
                return self._aggregate_by(plan, outputs)
        return super().aggregate(outputs)

    def _aggregate_by(self, plan: Plan, outputs: list[Tensor]) -> Tensor:
        if plan.aggregation == "buffer":
            with self.scratch.concat(outputs) as whole:
                return self.conv_concat(whole)  # type: ignore[no-any-return]
        if plan.aggregation == "accumulate":
            y = accumulate(self._conv, plan.slices, outputs)
            return self.conv_concat.act(self.conv_concat.bn(y))  # type: ignore[no-any-return]
        return super().aggregate(outputs)

    @property
    def _conv(self) -> PackedConv:
        conv = self.conv_concat.conv
        assert isinstance(conv, PackedConv)
        return conv

    def _choose(self, outputs: list[Tensor]) -> Plan | None:
        """The plan for these maps; None where the 1x1 convolution cannot be packed for them."""
        super().aggregate(outputs)  # packs it
        if self._conv.packed is None or len({x.dtype for x in outputs}) > 1:
            return None
        shape = outputs[0].shape
        known = self.forced or self._fastest.get(shape)
        names = (known,) if known else _exact_aggregations(outputs[0])
        plans = [self._plan(name, outputs) for name in names]
        fastest = _fastest(plans, lambda plan: self._aggregate_by(plan, outputs))
        self._fastest[shape] = fastest.aggregation
        if fastest.aggregation == "accumulate":
            self._conv.packed = None
        return fastest

    def _plan(self, aggregation: Aggregation, outputs: list[Tensor]) -> Plan:
        x = outputs[0]
        accumulates = aggregation == "accumulate"
        slices = tuple(_pack_slices(self._conv, outputs)) if accumulates else ()
        return Plan(x.shape, _compute_dtype(x), aggregation, slices)


def _exact_aggregations(x: Tensor) -> tuple[Aggregation, ...]:
    """Those that round as the plain one does: sums in half precision would at each addition."""
    return AGGREGATIONS if _compute_dtype(x) == torch.float32 else ("concat", "buffer")


def _pack_slices(conv: PackedConv, maps: Sequence[Tensor]) -> Iterator[PackedWeight]:
    weights = conv.weight.split([x.shape[1] for x in maps], dim=1)
    for index, (weight, x) in enumerate(zip(weights, maps, strict=True)):
        yield pack_weight(conv, weight, None if index else conv.bias, x)


def _fastest(plans: Sequence[Plan], run: Callable[[Plan], object]) -> Plan:
    """The plan of the shorter second run: the first ones make oneDNN ready."""
    if len(plans) == 1:
        return plans[0]
    times = [[_seconds(run, plan) for plan in plans] for _ in range(2)][1]
    return plans[times.index(min(times))]


def _seconds(run: Callable[[Plan], object], plan: Plan) -> float:
    start = time.perf_counter()
    run(plan)
    return time.perf_counter() - start


class Packing:
    """When a network packs: at the second batch of one shape in a row.

    The weights of one batch shape are held, about as many bytes as the network's own, and memory
    for its largest concat. A shape that comes back after another took its place has to repeat twice
    as often each time, so that a folder of changing sizes does not pack without end.
    """

    def __init__(self, scratch: Scratch) -> None:
        self.passes = 0  # that packed
        self._scratch = scratch
        self._lock = threading.Lock()
        self._last: tuple[int, ...] = ()
        self._repeats = 0
        self._packed: tuple[int, ...] = ()
        self._busy = False
        self._waits: dict[tuple[int, ...], int] = {}

    @contextmanager
    def batch(self, shape: tuple[int, ...]) -> Iterator[None]:
        """The context in which the network meets a batch of this shape; in any thread."""
        if not self._is_due(shape):
            yield
            return
        _PASS.met = set()
        try:
            self._scratch.clear()
            yield
            self._packed = shape
        finally:
            _PASS.met = None
            self._busy = False

    def _is_due(self, shape: tuple[int, ...]) -> bool:
        with self._lock:
            self._repeats = self._repeats + 1 if shape == self._last else 1
            self._last = shape
            needed = self._waits.get(shape, _REPEATS)
            if self._busy or shape == self._packed or self._repeats < needed:
                return False
            self._waits[shape] = min(2 * needed, _MOST_REPEATS)
            self._busy = True
            self.passes += 1
            return True


def prepare_packing(
    network: nn.Module, dtype: torch.dtype, *, forced: Aggregation | None = None
) -> Packing | None:
    """Makes the convolutions of a network on the CPU, BatchNorm folded, ready to pack, in place.

    dtype is what they compute in. None, and nothing changed, where the processor has no bf16, and,
    with a warning, where torch's operators are not what they should be.
    """
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    if not can_pack(dtype):
        return None
    scratch = Scratch()
    for part in list(network.modules()):
        if isinstance(part, ConvNormAct):
            _merge_relu(part, "conv")
        elif isinstance(part, SeparableConvNormAct):
            _merge_relu(part, "conv_pw")
    _replace(network, _packed_conv)
    _replace(network, lambda part: _packed_block(part, scratch, forced))
    return Packing(scratch)


def _merge_relu(part: ConvNormAct | SeparableConvNormAct, name: str) -> None:
    if isinstance(part.bn, nn.Identity) and isinstance(part.act, nn.ReLU):
        setattr(part, name, PackedConv(getattr(part, name), relu=True))
        part.act = nn.Identity()


def _packed_conv(part: nn.Module) -> nn.Module:
    if type(part) is nn.Conv2d and part.padding_mode == "zeros" and type(part.padding) is tuple:
        return PackedConv(part, relu=False)
    return part


def _packed_block(part: nn.Module, scratch: Scratch, forced: Aggregation | None) -> nn.Module:
    return PackedOsaBlock(part, scratch, forced=forced) if type(part) is OsaBlock else part


def _replace(network: nn.Module, make: Callable[[nn.Module], nn.Module]) -> None:
    """Puts make(part) in the place of each part, the same one wherever a part is shared."""
    made: dict[nn.Module, nn.Module] = {}
    for parent in list(network.modules()):
        for name, part in parent.named_children():
            if part not in made:
                made[part] = make(part)
            setattr(parent, name, made[part])


@cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether torch's private operators exist and compute what they should; warns once if not."""
    fault = find_fault(dtype)
    if fault:
        warnings.warn(
            f"the torch engine keeps to plain convolutions, which are slower: {fault}",
            RuntimeWarning,
            stacklevel=2,
        )
    return not fault


def find_fault(dtype: torch.dtype) -> str:
    """What keeps the private operators of torch from use, empty where nothing does."""
    try:
        with torch.inference_mode():
            for probe in _PROBES:
                error = _probe(*probe, dtype=dtype)
                if not error <= _TOLERANCES[dtype]:
                    return f"a convolution {probe} of oneDNN is off by {error:.1g}"
    except (AttributeError, RuntimeError, TypeError) as error:
        return f"torch {torch.__version__}: {_first_line(error)}"
    return ""


def _probe(kernel: int, stride: int, dilation: int, groups: int, *, dtype: torch.dtype) -> float:
    """The greatest difference, as a share of the greatest value, of a convolution to the plain one;
    where it keeps the size the plain one is added to it as well.
    """
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, 16, 9, 7, generator=random, dtype=dtype)
    padding = kernel // 2 * dilation
    conv = nn.Conv2d(16, 16, kernel, stride, padding, dilation, groups, dtype=dtype, device="meta")
    conv.weight = nn.Parameter(torch.randn(conv.weight.shape, generator=random, dtype=dtype))
    conv.bias = nn.Parameter(torch.randn(16, generator=random, dtype=dtype))
    packed = PackedConv(conv, relu=True)
    weight = pack_weight(conv, conv.weight, conv.bias, x)
    expected = conv(x).relu()
    errors = [convolve(conv, weight, x, relu=True) - expected]
    if kernel == 1:
        errors.append(accumulate(packed, [weight, weight], [x, x]) - (2 * conv(x)).relu())
    return float(max(error.abs().max() for error in errors) / expected.abs().max())


def _settings(conv: nn.Conv2d) -> tuple[Any, ...]:
    return conv.padding, conv.stride, conv.dilation, conv.groups


def _compute_dtype(x: Tensor) -> torch.dtype:
    """What a convolution of x computes in here."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def _is_packable(x: Tensor) -> bool:
    return x.ndim == 4 and x.numel() > 0 and _compute_dtype(x) in _TOLERANCES


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
