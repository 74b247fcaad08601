"""The Triton kernels against the plain end of a block in float64.

Triton decides when it is imported whether its kernels are compiled for a GPU or run step by step on
the CPU, so the tests of the kernels run in a process of their own.
"""

import importlib
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from vovnet.errors import ConfigError
from vovnet.models.deploy import fold_batch_norms
from vovnet.models.vovnet import VARIANTS, OsaBlock, VoVNet
from vovnet.profiling.count import count_costs
from vovnet.profiling.trace import Recorder
from vovnet.runtime import triton_kernels, triton_osa
from vovnet.runtime.engine import load_engine
from vovnet.runtime.triton_kernels import Tile, aggregate_maps, choose_tile, gate_map
from vovnet.runtime.triton_osa import (
    TritonOsaBlock,
    aggregation_bytes_saved,
    find_fault,
    prepare_aggregation,
)

CPU = torch.device("cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SMALL = Tile(rows=16, columns=16, inner=16)
with_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter's process")
compiled = pytest.mark.skipif(INTERPRETED, reason="not in the interpreter's process")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@with_triton
@compiled
def test_the_kernels_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [*command, "-W", "ignore", __file__],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


@with_triton
@compiled
@pytest.mark.parametrize(("kind", "capability"), [("bf16", 90), ("fp32", 80)])
def test_the_kernels_compile_for_a_gpu(
    monkeypatch: pytest.MonkeyPatch, kind: str, capability: int
) -> None:
    """To machine code, which needs no GPU; the interpreter lets pass what the compiler does not."""
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # as it is; unset it warns
    compiler = importlib.import_module("triton.compiler")
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", capability, 32)
    ends = {f"end{index}": 64 + 32 * min(index, 4) for index in range(6)}
    constants = {"num_columns": 96, "all_sizes": 192, **ends, "images": 2, "rows_block": 64}
    constants |= {"columns_block": 64, "inner": 32, "tiles_block": 32, "block": 1024}
    constants |= {"pools": True, "adds": True, "precision": "ieee" if kind == "fp32" else "tf32"}
    of_sums = {"bias": "*fp32", "partial": "*fp32"}
    for kernel in (triton_kernels._aggregate, triton_kernels._pool, triton_kernels._gate):
        names = kernel.arg_names
        types = {
            name: "constexpr"
            if name in constants
            else of_sums.get(name, "i32" if "num_" in name or "image_" in name else f"*{kind}")
            for name in names
        }
        places = {(names.index(name),): constants[name] for name in names if name in constants}
        done = compiler.compile(compiler.ASTSource(kernel, types, places), target=target)
        assert done.asm["cubin"]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def plain_end(maps: list[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
    whole = torch.cat(maps, 1).double()
    return (torch.einsum("bkhw,nk->bnhw", whole, weight.double()) + bias[:, None, None]).relu()


def near(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    far = (found.double() - expected).abs().max()
    return bool(far <= tolerance * expected.abs().max())


# batch, channels of the maps, channels out, height and width, the tile
SHAPES = [
    (1, (16,), 16, (4, 4), SMALL),
    (3, (45, 17, 33, 8, 16, 9), 45, (5, 7), SMALL),
    (3, (20, 12), 50, (1, 3), Tile(64, 32, 32)),  # many images in a tile
    (2, (48, 16, 16), 33, (13, 11), Tile(32, 16, 16)),  # many tiles in an image
    (1, (7, 5, 3, 1), 1, (1, 1), SMALL),
    (2, (8, 8), 16, (25, 23), SMALL),  # more tiles in an image than one turn of the sum takes
    (2, (24, 24), 24, (9, 40), None),
]


@interpreted
@pytest.mark.parametrize(("batch", "sizes", "columns", "sides", "tile"), SHAPES)
def test_the_convolution_and_its_means(
    batch: int, sizes: tuple[int, ...], columns: int, sides: tuple[int, int], tile: Tile | None
) -> None:
    maps = [noise(batch, size, *sides, seed=size) for size in sizes]
    weight, bias = noise(columns, sum(sizes), seed=100) / 5, noise(columns, seed=101)
    y, means = aggregate_maps(maps, weight, bias, pools=True, tile=tile)
    expected = plain_end(maps, weight, bias)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert near(y, expected)
    assert means is not None
    assert near(means, expected.mean((2, 3)))
    again, _ = aggregate_maps(maps, weight, bias, tile=tile)
    assert torch.equal(again, y)


@interpreted
def test_the_residual_and_half_precision() -> None:
    maps = [noise(2, 24, 5, 3).half(), noise(2, 16, 5, 3, seed=1).half()]
    weight, bias = (noise(24, 40) / 5).half(), noise(24)
    y, _ = aggregate_maps(maps, weight, bias, adds=True, tile=SMALL)
    assert y.dtype == torch.float16
    assert near(y, plain_end(maps, weight, bias) + maps[0], 2e-3)


@interpreted
@pytest.mark.parametrize("shortcut", [True, False])
def test_the_gate(shortcut: bool) -> None:
    values = noise(3, 21, 7, 5).contiguous(memory_format=torch.channels_last)
    gates, added = 4 * noise(3, 21, seed=1), noise(3, 21, 7, 5, seed=2)
    expected = values.double() * functional.hardsigmoid(gates.double())[:, :, None, None]
    found = gate_map(values.clone(), gates, added if shortcut else None)
    assert near(found, expected + added if shortcut else expected)


@interpreted
def test_what_is_no_number_stays_none() -> None:
    maps = [noise(2, 20, 3, 3)]  # the block of inputs reaches into the next pixel
    maps[0][1, 4, 0, 0] = float("nan")
    y, means = aggregate_maps(maps, noise(16, 20), noise(16), pools=True, tile=SMALL)
    assert means is not None
    gated = gate_map(y.clone(memory_format=torch.preserve_format), means, None)
    for value in (y[:, :, 0, 0], means, gated[:, :, 1, 1]):
        assert value[1].isnan().all()
        assert value[0].isfinite().all()


FAMILIES = [
    "ese_vovnet19b_dw",  # a reduced first convolution
    "ese_vovnet39_d2",  # eSE in every block
    "ese_vovnet99b",  # five layers, residuals without eSE
    "vovnet39_paper",  # neither
    "vovnet39",
    "eca_vovnet39b",  # another attention
]


def small(name: str) -> VoVNet:
    """A variant with few channels, its BatchNorms folded."""
    torch.manual_seed(0)
    config = replace(
        VARIANTS[name],
        stem_channels=(8, 8, 8),
        stage_conv_channels=(8, 10, 8, 12),
        stage_out_channels=(16, 20, 24, 28),
        blocks_per_stage=(1, 1, 2, 2),
    )
    network = VoVNet(config, num_classes=5).eval()
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_var.uniform_(0.5, 2)
            part.bias.data.normal_(0, 0.3)
    fold_batch_norms(network)
    return network


def oracle(name: str, images: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = small(name).double()(images.double())
    return result


@interpreted
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_equals_the_plain_network(name: str) -> None:
    network = small(name)
    blocks = sum(type(part) is OsaBlock for part in network.modules())
    assert prepare_aggregation(network, tile=Tile(64, 32, 32)) == blocks == 6
    images = noise(3, 3, 37, 50)
    images[1, :, 25:], images[2, :, :, 30:] = 0, 0  # smaller pictures in the batch
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("error")
        found = network(images)
    assert near(found, oracle(name, images))


@interpreted
def test_a_fault_of_the_kernels_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_fault(CPU, torch.float32) == ""

    def wrong(*arguments: Any, **options: Any) -> Any:
        y, means = aggregate_maps(*arguments, **options)
        return y, means * 1.01 if means is not None else None

    monkeypatch.setattr(triton_osa, "aggregate_maps", wrong)
    assert find_fault(CPU, torch.float32).startswith("the aggregation is off by")
    monkeypatch.setattr(triton_osa, "gate_map", None)
    assert "'NoneType' object is not callable" in find_fault(CPU, torch.float32)


@pytest.fixture
def _warn_again() -> None:
    triton_osa._warn_once.cache_clear()


def as_is(network: VoVNet) -> None:
    return None


@pytest.mark.usefixtures("_warn_again")
@pytest.mark.parametrize(
    ("change", "grad", "reason"),
    [
        pytest.param(as_is, False, "Triton and a GPU", marks=compiled),
        (as_is, True, "expected torch.no_grad"),
        (lambda network: network.stages.train(), False, "expected eval mode"),
    ],
)
def test_the_plain_way_is_taken_aloud(
    change: Callable[[VoVNet], None], grad: bool, reason: str
) -> None:
    network, images = small("ese_vovnet39b"), noise(1, 3, 33, 40)
    prepare_aggregation(network)
    change(network)
    with torch.set_grad_enabled(grad):
        with pytest.warns(RuntimeWarning, match=reason) as seen:
            found = network(images)
        assert len(seen) == 1  # not one of each block
    assert near(found.detach(), oracle("ese_vovnet39b", images))


def test_blocks_that_the_kernels_are_not_for_stay_aloud() -> None:
    network = VoVNet(VARIANTS["ese_vovnet39b"]).eval()  # nothing folded
    with pytest.warns(RuntimeWarning, match="6 of 6 OSA blocks stay plain: expected a BatchNorm"):
        assert prepare_aggregation(network) == 0
    config = replace(VARIANTS["ese_vovnet19b_slim"], layers_per_block=6)
    deep = VoVNet(config).eval()
    fold_batch_norms(deep)
    with pytest.warns(RuntimeWarning, match="expected at most 6 maps to aggregate, found 7"):
        assert prepare_aggregation(deep) == 0


def test_parameters_keep_their_names() -> None:
    network = small("ese_vovnet39b")
    names = list(network.state_dict())
    prepare_aggregation(network)
    assert list(network.state_dict()) == names
    blocks = [part for part in network.modules() if isinstance(part, TritonOsaBlock)]
    assert [block.training for block in blocks] == [False] * 6


def test_tiles_leave_no_multiprocessor_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vovnet.runtime.triton_kernels._processors", lambda device: 132)

    class OnGpu:
        is_cuda, device = True, CPU

        def __init__(self, itemsize: int) -> None:
            self.itemsize = itemsize

    half, full = OnGpu(2), OnGpu(4)
    assert choose_tile(256 * 56 * 56, 256, [128, 64], half) == Tile(128, 128, 64, 8)
    assert choose_tile(14 * 14, 768, [512, 192], half) == Tile(16, 64, 64, 4)
    assert choose_tile(56 * 56, 256, [112, 80], half) == Tile(64, 64, 32, 4)
    assert choose_tile(256 * 56 * 56, 256, [128, 64], full).inner == 32


def test_bytes_saved_are_those_that_the_profiler_counts() -> None:
    """The concat's part is the profiler's own count of it; the rest is counted by hand."""
    network, images = small("ese_vovnet39_d2").to("meta"), torch.empty(2, 3, 64, 96, device="meta")
    concat = count_costs(network, (images,)).concat_memory_access
    prepare_aggregation(network)
    with torch.no_grad():
        saved = aggregation_bytes_saved(network, images, torch.bfloat16)
    assert all(isinstance(part, TritonOsaBlock) for part in network.stages[0].blocks)
    stages = [(16, 16 * 24, 1), (20, 8 * 12, 1), (24, 4 * 6, 2), (28, 2 * 3, 2)]
    rest = sum(2 * c * n * (3 * blocks + 2 * (blocks - 1)) for c, n, blocks in stages)
    assert saved == 2 * (concat + rest)


@interpreted
def test_what_is_counted_takes_the_plain_way() -> None:
    network, images = small("ese_vovnet39b"), noise(1, 3, 33, 40)
    expected = count_costs(network, (images,))
    prepare_aggregation(network)
    seen = Recorder(network, (images,))
    with torch.no_grad(), seen.follow(network), seen:  # on values, as where meta tensors fail
        network(images)
    assert sum(layer.macs for layer in seen.layers) == expected.macs > 0


def test_the_engine_wants_a_gpu(classifier_folder: Path) -> None:
    with pytest.raises(ConfigError, match="expected a GPU for torch-triton, found cpu"):
        load_engine(classifier_folder, engine="torch-triton", device="cpu")


@on_gpu
@compiled
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_engine_on_a_gpu(classifier_folder: Path, precision: str) -> None:
    network = small("ese_vovnet39_d2").cuda()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    torch.backends.cudnn.allow_tf32 = False
    assert find_fault(torch.device("cuda"), dtype) == ""
    prepare_aggregation(network)
    images = noise(3, 3, 64, 65)
    with torch.inference_mode(), torch.autocast("cuda", dtype, enabled=precision != "fp32"):
        found = network(images.cuda()).cpu()
    assert near(found, oracle("ese_vovnet39_d2", images), 1e-4 if precision == "fp32" else 3e-2)
    engine = load_engine(classifier_folder, engine="torch-triton", precision=precision)
    assert engine.name == "torch-triton"
