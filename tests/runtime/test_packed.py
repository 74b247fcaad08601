"""Packed convolutions against the plain network in float64, and when they pack."""

import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from vovnet.models.deploy import ClassifierGraph, fold_batch_norms
from vovnet.models.layers import ConvNormAct
from vovnet.models.vovnet import VARIANTS, OsaBlock, VoVNet
from vovnet.models.zoo import create_model
from vovnet.runtime import packed
from vovnet.runtime.engine import load_engine
from vovnet.runtime.packed import (
    AGGREGATIONS,
    PackedConv,
    PackedOsaBlock,
    Packing,
    Scratch,
    can_pack,
    find_fault,
    prepare_packing,
)
from vovnet.runtime.torch import TorchEngine

MEAN, STD = (123.7, 116.3, 103.5), (58.4, 57.1, 57.4)
SIZES = np.array([[65, 97], [40, 33], [64, 50]], np.int64)
FAMILIES = [
    "ese_vovnet19b_dw",
    "ese_vovnet39_d2",
    "vovnet39_paper",
    "vovnet39",
    "eca_vovnet39b",
    "ese_vovnet39b_evos",
    "ese_vovnet39_dcn_d2",
]


@pytest.fixture(autouse=True)
def _pack_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "_REPEATS", 2)


@pytest.fixture(autouse=True)
def _probe_again() -> Iterator[None]:
    can_pack.cache_clear()
    yield
    can_pack.cache_clear()


def small(name: str = "ese_vovnet39b", **arguments: Any) -> VoVNet:
    """A variant with few channels and BatchNorms that change something."""
    torch.manual_seed(0)
    config = replace(
        VARIANTS[name],
        stem_channels=(16, 16, 16),
        stage_conv_channels=(16, 16, 16, 32),
        stage_out_channels=(32, 32, 48, 64),
        layers_per_block=2,
        blocks_per_stage=(1, 1, 2, 1),
    )
    network = VoVNet(config, num_classes=5, **arguments).eval()
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(0, 0.1)
            part.running_var.uniform_(0.5, 2)
            part.bias.data.normal_(0, 0.3)
    return network


def graph_of(network: VoVNet) -> ClassifierGraph:
    return ClassifierGraph(network, mean=MEAN, std=STD)


def packing_engine(network: VoVNet, *, forced: Any = None) -> TorchEngine:
    network = deepcopy(network)
    fold_batch_norms(network)
    engine = TorchEngine(graph_of(network), device=torch.device("cpu"))
    engine.packing = prepare_packing(engine.graph, torch.float32, forced=forced)
    return engine


def pictures(batch: int, height: int = 65, width: int = 97) -> np.ndarray:
    random = np.random.default_rng(0)
    return random.integers(0, 256, (batch, height, width, 3), dtype=np.uint8)


def oracle(network: VoVNet, images: np.ndarray, sizes: np.ndarray) -> dict[str, np.ndarray]:
    """The network in float64, nothing folded."""
    graph = graph_of(deepcopy(network)).double()
    with torch.no_grad():
        found = graph(torch.from_numpy(images), torch.from_numpy(sizes))
    return {name: value.numpy() for name, value in found.items()}


def check_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert np.abs(found[name] - value).max() <= 1e-5 * np.abs(value).max(), name


def parts(network: nn.Module, kind: type) -> list[Any]:
    return [part for part in network.modules() if isinstance(part, kind)]


def check_three_batches(network: VoVNet, engine: TorchEngine, batch: int) -> None:
    """The plain one, the one that packs, the packed one."""
    images, sizes = pictures(batch), SIZES[:batch]
    expected = oracle(network, images, sizes)
    for passes in (0, 1, 1):
        check_equal(engine.infer(images, sizes), expected)
        assert engine.packing is not None
        assert engine.packing.passes == passes


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_equals_the_plain_network(name: str, batch: int) -> None:
    network = small(name)
    engine = packing_engine(network)
    check_three_batches(network, engine, batch)
    assert all(block.plan for block in parts(engine.graph, PackedOsaBlock))


@pytest.mark.parametrize("arguments", [{"output_stride": 8}, {"in_chans": 3, "global_pool": "avg"}])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_each_aggregation_equals_the_plain_network(aggregation: str, arguments: dict) -> None:
    network = small(**arguments)
    engine = packing_engine(network, forced=aggregation)
    check_three_batches(network, engine, 3)
    blocks = parts(engine.graph, PackedOsaBlock)
    assert [block.plan.aggregation for block in blocks] == [aggregation] * 5
    accumulates = aggregation == "accumulate"
    for block in blocks:  # the weights of the other way are not kept
        assert (block.conv_concat.conv.packed is None) == accumulates
        assert len(block.plan.slices) == (3 if accumulates else 0)


@pytest.mark.parametrize("norm", ["frozen_bn", "gn"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_norm_that_is_not_folded_stays_behind_the_convolution(
    aggregation: str, norm: Any
) -> None:
    network = small()
    network = VoVNet(replace(network.config, norm=norm), num_classes=5).eval()
    check_three_batches(network, packing_engine(network, forced=aggregation), 1)


def test_relu_is_part_of_the_call_and_parameters_are_shared() -> None:
    network = small("ese_vovnet19b_dw")
    fold_batch_norms(network)
    keys, weights = list(network.state_dict()), list(network.parameters())
    before = torch.get_rng_state()
    assert prepare_packing(network, torch.float32) is not None
    assert torch.equal(torch.get_rng_state(), before)
    assert list(network.state_dict()) == keys
    assert [id(one) for one in network.parameters()] == [id(one) for one in weights]
    assert not parts(network, nn.ReLU)
    assert all(isinstance(part, PackedConv) for part in parts(network, nn.Conv2d))
    assert all(isinstance(part, PackedOsaBlock) for part in parts(network, OsaBlock))
    relus = {name: part.relu for name, part in network.named_modules() if hasattr(part, "relu")}
    assert relus["stem.0.conv"]
    assert relus["stem.1.conv_pw"]
    assert not relus["stem.1.conv_dw"]
    assert not relus["stages.0.blocks.0.attn.fc"]


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ([3.0, 1.0, 2.0], "buffer"),
        ([1.0, 2.0, 3.0], "concat"),
        ([3.0, 2.0, 1.0], "accumulate"),
    ],
)
def test_the_fastest_aggregation_is_taken(
    monkeypatch: pytest.MonkeyPatch, times: list[float], expected: str
) -> None:
    engine = packing_engine(small())
    of_plan = dict(zip(AGGREGATIONS, times, strict=True))
    monkeypatch.setattr(packed, "_seconds", lambda _, plan: of_plan[plan.aggregation])
    for _ in range(2):
        engine.infer(pictures(1), SIZES[:1])
    chosen = [block.plan.aggregation for block in parts(engine.graph, PackedOsaBlock)]
    assert chosen == [expected] * 5


def count_calls(monkeypatch: pytest.MonkeyPatch, name: str) -> list[torch.Size]:
    """The shapes of the inputs of each call, as they come."""
    shapes, function = [], getattr(packed, name)

    def counted(*arguments: Any, **options: Any) -> Any:
        shapes.extend(x.shape for x in arguments if type(x) is Tensor and x.ndim == 4)
        return function(*arguments, **options)

    monkeypatch.setattr(packed, name, counted)
    return shapes


def test_only_the_shape_that_was_packed_for_takes_the_packed_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = small()
    engine = packing_engine(network)
    for _ in range(2):
        engine.infer(pictures(1), SIZES[:1])
    shapes = count_calls(monkeypatch, "convolve")
    engine.infer(pictures(1), SIZES[:1])
    assert len(shapes) >= len(parts(engine.graph, PackedConv)) - 5  # those that accumulate
    assert shapes[0] == (1, 3, 65, 97)
    shapes.clear()
    other = pictures(2, 70, 66)
    sizes = np.array([[70, 66], [33, 40]])
    check_equal(engine.infer(other, sizes), oracle(network, other, sizes))
    assert {shape[2:] for shape in shapes} <= {(1, 1)}
    assert shapes == []


def passes_of(packing: Packing, shapes: Sequence[str]) -> list[int]:
    found = []
    for shape in shapes:
        with packing.batch((ord(shape),)):
            found.append(packing.passes)
    return found


def test_a_shape_is_packed_for_at_its_second_batch_in_a_row() -> None:
    assert passes_of(Packing(Scratch()), "ABABAABAAAB") == [0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1]


def test_shapes_that_displace_each_other_wait_longer_each_time() -> None:
    passes = passes_of(Packing(Scratch()), "AABB" * 10)
    assert passes[:4] == [0, 1, 1, 2]
    assert passes[-1] == 2
    assert passes_of(Packing(Scratch()), "AABBAAAAA")[4:] == [2, 2, 2, 3, 3]
    assert passes_of(Packing(Scratch()), "".join(c * 70 for c in "AB" * 8))[-1] == 16


def test_one_pass_packs_at_a_time_and_a_failed_one_is_made_up_for() -> None:
    packing = Packing(Scratch())
    passes_of(packing, "A")
    with packing.batch((ord("A"),)):
        assert passes_of(packing, "BBB") == [1, 1, 1]
    assert passes_of(packing, "B") == [2]
    packing = Packing(Scratch())
    passes_of(packing, "A")
    with pytest.raises(MemoryError), packing.batch((ord("A"),)):
        raise MemoryError
    assert passes_of(packing, "AAAA") == [1, 2, 2, 2]


def test_a_folder_of_alternating_sizes_never_packs_and_is_right() -> None:
    network = small()
    engine = packing_engine(network)
    wide, tall = pictures(1, 65, 97), pictures(1, 97, 65)
    for images in (wide, tall) * 3:
        sizes = np.array([images.shape[1:3]])
        check_equal(engine.infer(images, sizes), oracle(network, images, sizes))
    assert engine.packing is not None
    assert engine.packing.passes == 0
    assert not any(part.packed for part in parts(engine.graph, PackedConv))


def test_a_head_of_all_levels_is_packed_for_the_first() -> None:
    torch.manual_seed(0)
    detector = create_model("centermask_lite_ese_vovnet19b_slim_dw", num_classes=2).eval()
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        plain = deepcopy(detector).double()(images.double())
    fold_batch_norms(detector)
    packing = prepare_packing(detector, torch.float32)
    assert packing is not None
    for _ in range(3):
        with torch.inference_mode(), packing.batch((1, 64, 96)):
            raw = detector(images)
        for name, expected in plain.items():
            assert (raw[name] - expected).abs().max() <= 1e-5 * expected.abs().max(), name
    tower = [part for part in parts(detector.fcos.head, PackedConv) if part.packed]
    assert tower
    assert {part.packed.shape[2:] for part in tower} == {(8, 12)}


def test_weights_for_the_first_level_outlive_the_later_ones() -> None:
    network = nn.Sequential(nn.Conv2d(16, 16, 3))
    packing = prepare_packing(network, torch.float32)
    assert packing is not None
    fine, coarse = torch.randn(1, 16, 8, 8), torch.randn(1, 16, 4, 4)
    for batch in (1, 1, 2, 2):
        with torch.inference_mode(), packing.batch((batch,)):
            network(fine)
            network(coarse)
    assert packing.passes == 2
    assert network[0].packed.shape == fine.shape


def test_threads_share_one_engine() -> None:
    network = small()
    engine = packing_engine(network, forced="buffer")
    given = [(pictures(1, 65, 97), SIZES[:1]), (pictures(3, 65, 97), SIZES)]
    expected = [oracle(network, *one) for one in given]

    def run(index: int) -> None:
        turn = index // 4 % 2
        check_equal(engine.infer(*given[turn]), expected[turn])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, range(32)))
    assert engine.packing is not None
    assert engine.packing.passes >= 1


def test_no_two_concats_at_a_time_share_memory() -> None:
    scratch = Scratch()
    first, second = (torch.full((2, 3, 4, 5), float(value)) for value in (1, 2))
    with torch.inference_mode():
        with scratch.concat([first, second]) as one, scratch.concat([second, second]) as other:
            assert one.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(one, torch.cat([first, second], dim=1))
            assert torch.equal(other, torch.cat([second, second], dim=1))
            places = {one.data_ptr(), other.data_ptr()}
        with scratch.concat([first]) as again:
            assert again.data_ptr() in places
            assert torch.equal(again, first)
        with scratch.concat([first]) as one, scratch.concat([second]) as other:
            assert one.data_ptr() != other.data_ptr()
        with scratch.concat([first.double(), second.double()]) as whole:
            assert whole.dtype == torch.float64


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_gradients_and_copies_take_the_plain_way(aggregation: str) -> None:
    engine = packing_engine(small(), forced=aggregation)
    images, sizes = pictures(1), SIZES[:1]
    for _ in range(2):
        before = engine.infer(images, sizes)
    arguments = torch.from_numpy(images), torch.from_numpy(sizes)
    engine.graph(*arguments)["logits"].sum().backward()
    assert engine.graph.classifier.stem[0].conv.weight.grad.abs().sum() > 0
    copied = deepcopy(engine.graph)
    assert not any(part.packed for part in parts(copied, PackedConv))
    assert not any(block.plan for block in parts(copied, PackedOsaBlock))
    with torch.inference_mode():
        check_equal({k: v.numpy() for k, v in copied(*arguments).items()}, before)


def plain_operators() -> SimpleNamespace:
    """The operators in torch's public functions."""

    def convolve(x, w, b, padding, stride, dilation, groups, attr, *_) -> Tensor:
        y = functional.conv2d(x, w, b, stride, padding, dilation, groups)
        return y.relu() if attr == "relu" else y

    def add(total, x, w, b, padding, stride, dilation, groups, _, alpha, unary, *__) -> Tensor:
        y = total + alpha * functional.conv2d(x, w, b, stride, padding, dilation, groups)
        return total.copy_(y.relu() if unary == "relu" else y)

    return SimpleNamespace(
        _is_mkldnn_bf16_supported=lambda: True,
        _reorder_convolution_weight=lambda weight, *_: weight.clone(),
        _convolution_pointwise=convolve,
        _convolution_pointwise_=SimpleNamespace(binary=add),
    )


WRONG = {
    "_reorder_convolution_weight": lambda weight, *_: 1.001 * weight,
    "_convolution_pointwise": lambda x, w, b, *rest: plain_operators()._convolution_pointwise(
        x, w, b, *rest[:4], "none"
    ),
    "_convolution_pointwise_": SimpleNamespace(binary=lambda total, *_: total),
}


def check_falls_back_aloud(model_folder: Path, message: str) -> None:
    with pytest.warns(RuntimeWarning, match=message) as caught:
        engine = load_engine(model_folder, engine="torch-packed", device="cpu")
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        load_engine(model_folder, engine="torch-packed", device="cpu")
    assert engine.packing is None
    assert not parts(engine.graph, PackedConv)
    found = [engine.infer(pictures(1, 64, 64), SIZES[:1]) for _ in range(3)]
    assert np.array_equal(found[0]["logits"], found[2]["logits"])


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_operator_is_not_used(
    monkeypatch: pytest.MonkeyPatch, classifier_folder: Path, name: str
) -> None:
    operators = plain_operators()
    monkeypatch.setattr(torch.ops, "mkldnn", operators)
    assert find_fault(torch.float32) == ""
    setattr(operators, name, WRONG[name])
    check_falls_back_aloud(classifier_folder, "keeps to plain convolutions.* is off by")


@pytest.mark.parametrize("name", WRONG)
def test_a_missing_operator_is_not_used(
    monkeypatch: pytest.MonkeyPatch, classifier_folder: Path, name: str
) -> None:
    operators = plain_operators()
    monkeypatch.setattr(torch.ops, "mkldnn", operators)
    delattr(operators, name)
    check_falls_back_aloud(classifier_folder, f"keeps to plain convolutions.*{name}")


def test_a_convolution_that_onednn_refuses_stays_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    network = small()
    engine = packing_engine(network)
    engine.infer(pictures(1), SIZES[:1])

    def refuse(*_: object) -> None:
        raise RuntimeError("could not create a primitive\nat a place")

    monkeypatch.setattr(packed, "pack_weight", refuse)
    expected = oracle(network, pictures(1), SIZES[:1])
    with pytest.warns(RuntimeWarning, match="stays plain: could not create a primitive$"):
        check_equal(engine.infer(pictures(1), SIZES[:1]), expected)
    check_equal(engine.infer(pictures(1), SIZES[:1]), expected)
    assert not any(block.plan for block in parts(engine.graph, PackedOsaBlock))


def half_precision_engine(network: VoVNet) -> TorchEngine:
    network = deepcopy(network)
    fold_batch_norms(network)
    return TorchEngine(graph_of(network), device=torch.device("cpu"), precision="bf16")


def test_half_precision_is_that_of_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    network = small()
    plain, packs = half_precision_engine(network), half_precision_engine(network)
    monkeypatch.setattr(torch.ops, "mkldnn", plain_operators())
    monkeypatch.setattr(packed, "_seconds", lambda _, plan: plan.aggregation != "accumulate")
    packs.packing = prepare_packing(packs.graph, torch.bfloat16)
    expected = plain.infer(pictures(3), SIZES)
    for _ in range(3):
        found = packs.infer(pictures(3), SIZES)
        assert all(np.array_equal(found[name], value) for name, value in expected.items())
    for part in parts(packs.graph, PackedConv):
        assert part.packed.weight.dtype == torch.bfloat16
    plans = [block.plan.aggregation for block in parts(packs.graph, PackedOsaBlock)]
    assert "accumulate" not in plans


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="the processor has no bf16"
)
def test_half_precision_stays_within_its_own_error() -> None:
    network = small()
    plain, packs = half_precision_engine(network), half_precision_engine(network)
    packs.packing = prepare_packing(packs.graph, torch.bfloat16)
    assert packs.packing is not None
    images, sizes = pictures(3), SIZES
    exact = oracle(network, images, sizes)["logits"]
    for _ in range(3):
        found = packs.infer(images, sizes)["logits"]
    error = np.abs(plain.infer(images, sizes)["logits"] - exact).max()
    assert np.abs(found - exact).max() <= 1.5 * error


def test_no_bf16_means_plain_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops, "mkldnn", plain_operators())
    torch.ops.mkldnn._is_mkldnn_bf16_supported = lambda: False
    engine = half_precision_engine(small())
    engine.packing = prepare_packing(engine.graph, torch.bfloat16)
    assert engine.packing is None
    assert parts(engine.graph, ConvNormAct)
    assert not parts(engine.graph, PackedConv)


def test_loaded_engines_pack(classifier_folder: Path) -> None:
    engine = load_engine(classifier_folder, engine="torch-packed", device="cpu")
    assert isinstance(engine, TorchEngine)
    images, sizes = pictures(1, 64, 64), np.array([[64, 64]])
    first, _, third = [engine.infer(images, sizes) for _ in range(3)]
    check_equal(third, first)
    assert engine.packing is not None
    assert engine.packing.passes == 1
    assert all(block.plan for block in parts(engine.graph, PackedOsaBlock))
