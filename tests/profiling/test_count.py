import warnings
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from math import prod, sqrt
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import DeformConv2d, deform_conv2d

from vovnet.errors import ConfigError
from vovnet.models.deploy import DeployGraph
from vovnet.models.zoo import create_model
from vovnet.profiling.cost import LayerCost, lower_bound
from vovnet.profiling.count import CostReport, count_costs, count_macs, count_parameters

OURS = [
    "vovnet39a",
    "vovnet27_slim_paper",
    "ese_vovnet19b_slim_dw",
    "ese_vovnet19b",
    "ese_vovnet99b",
    "ese_vovnet39b_evos",
]
PEERS = ["resnet50", "resnet101", "densenet121", "densenet161", "densenet201", "mobilenet_v2"]


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        features = self.norm(self.depthwise(self.conv(images)))
        return self.head(features.mean((2, 3)))


class Function(nn.Module):
    """A function of the inputs as a network, with some weights."""

    def __init__(self, function: Callable[..., Any], **weights: Tensor) -> None:
        super().__init__()
        self.function = function
        for name, weight in weights.items():
            self.register_parameter(name, nn.Parameter(weight))

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


def meta_model(name: str) -> nn.Module:
    with torch.device("meta"):
        if name in PEERS:
            return torchvision.models.get_model(name, weights=None).eval()
        return create_model(name).eval()


def count(module: nn.Module, *shapes: tuple[int, ...]) -> CostReport:
    return count_costs(module, tuple(torch.empty(shape, device="meta") for shape in shapes))


# Single layers, counted by hand: layer, input shape, macs, elements read, written, of weights.
LAYERS: dict[str, tuple[nn.Module, tuple[int, ...], int, int, int, int]] = {
    "3x3": (nn.Conv2d(6, 8, 3, padding=1), (1, 6, 10, 12), 120 * 8 * 6 * 9, 720, 960, 432),
    "batch": (nn.Conv2d(6, 8, 3, padding=1), (2, 6, 10, 12), 240 * 432, 1440, 1920, 432),
    "stride": (nn.Conv2d(6, 8, 3, 2, 1), (1, 6, 10, 12), 5 * 6 * 432, 720, 240, 432),
    "strides": (nn.Conv2d(6, 8, (3, 5), (2, 1)), (1, 6, 11, 9), 25 * 720, 594, 200, 720),
    "groups": (nn.Conv2d(6, 8, 3, groups=2), (1, 6, 10, 12), 80 * 8 * 3 * 9, 720, 640, 216),
    "dilation": (nn.Conv2d(6, 8, 3, dilation=2), (1, 6, 10, 12), 48 * 432, 720, 384, 432),
    "depthwise": (nn.Conv2d(8, 8, 3, groups=8), (1, 8, 10, 12), 80 * 72, 960, 640, 72),
    "1d": (nn.Conv1d(4, 5, 3), (1, 4, 10), 8 * 60, 40, 40, 60),
    "3d": (nn.Conv3d(2, 3, 2), (1, 2, 4, 5, 6), 60 * 48, 240, 180, 48),
    "transposed": (nn.ConvTranspose2d(6, 8, 2, 2), (1, 6, 5, 6), 30 * 192, 180, 960, 192),
    "transposed, groups": (
        nn.ConvTranspose2d(6, 8, 3, 2, groups=2),
        (1, 6, 5, 6),
        30 * 6 * 4 * 9,
        180,
        11 * 13 * 8,
        216,
    ),
    "linear": (nn.Linear(6, 8), (3, 6), 3 * 48, 18, 24, 48),
    "linear on a sequence": (nn.Linear(6, 8, bias=False), (2, 5, 6), 10 * 48, 60, 80, 48),
    "linear on a vector": (nn.Linear(6, 8), (6,), 48, 6, 8, 48),
}


@pytest.mark.parametrize("case", LAYERS)
def test_single_layers_are_counted_as_by_hand(case: str) -> None:
    layer, shape, macs, read, written, weights = LAYERS[case]
    report = count(layer, shape)
    assert len(report.layers) == 1
    row = report.layers[0]
    assert row.macs == report.macs == macs
    assert report.flops == row.flops == 2 * macs
    assert row.memory_access == report.memory_access == read + written + weights
    assert row.parameters == report.parameters == count_parameters(layer)
    assert row.lower_bound == pytest.approx(2 * sqrt(read * written) + weights)
    assert row.activations == (0 if isinstance(layer, nn.Linear) else written)
    assert report.peak_activation_elements == read + written


def test_a_row_describes_its_layer() -> None:
    rows = count(Network(), (2, 3, 16, 12)).layers
    assert [(row.name, row.kind, row.groups) for row in rows] == [
        ("conv", "conv", 1),
        ("depthwise", "conv", 8),
        ("head", "linear", 1),
    ]
    assert rows[0].input_shape == (2, 3, 16, 12)
    assert rows[0].output_shape == (2, 8, 8, 6)
    assert (rows[0].kernel, rows[0].stride) == ((3, 3), (2, 2))
    assert (rows[2].kernel, rows[2].stride) == (None, None)


@pytest.mark.parametrize("masked", [False, True])
def test_a_deformable_convolution_reads_offsets_and_mask(masked: bool) -> None:
    shapes = [(1, 4, 8, 8), (1, 18, 8, 8), *([(1, 9, 8, 8)] if masked else [])]
    report = count(DeformConv2d(4, 6, 3, padding=1), *shapes)
    row = report.layers[0]
    assert row.kind == "deform_conv"
    assert row.macs == 64 * 6 * 4 * 9
    assert row.memory_access == 64 * (4 + 18 + 9 * masked + 6) + 6 * 4 * 9
    assert row.parameters == 6 * 4 * 9 + 6
    assert row.activations == 64 * 6
    assert row.lower_bound is None
    assert row.ratio is None


def test_functional_calls_count_where_they_are_made() -> None:
    inner = Function(
        lambda own, x: deform_conv2d(
            functional.conv2d(x, own.weight), x.new_zeros(1, 2, 6, 6), own.weight
        ),
        weight=torch.zeros(3, 3, 1, 1),
    )
    report = count(nn.Sequential(nn.ReLU(), inner), (1, 3, 6, 6))
    assert [(row.name, row.kind, row.macs) for row in report.layers] == [
        ("1", "conv", 36 * 9),
        ("1", "deform_conv", 36 * 9),
    ]
    assert report.layers[1].parameters == 9
    assert report.parameters == 9


def test_products_of_activations_are_no_linear_layers() -> None:
    product = Function(lambda own, a, b: a @ b @ own.weight, weight=torch.zeros(7, 2))
    rows = count(product, (3, 4, 5), (3, 5, 7)).layers
    assert [(row.kind, row.macs, row.parameters) for row in rows] == [
        ("matmul", 3 * 4 * 5 * 7, 0),
        ("linear", 3 * 4 * 7 * 2, 14),
    ]
    assert rows[0].memory_access == 3 * (20 + 35 + 28)
    assert rows[0].lower_bound is None


def test_a_weight_may_stand_on_the_left() -> None:
    rows = count(Function(lambda own, x: own.weight @ x, weight=torch.zeros(2, 4)), (4, 5)).layers
    assert [(row.kind, row.macs, row.parameters) for row in rows] == [("linear", 40, 8)]
    assert rows[0].input_shape == (4, 5)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_attention_has_the_macs_of_both_products(device: str) -> None:
    def attend(own: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if device == "cpu":  # what needs a value cannot stay on the meta device
            assert float(query.sum()) == 0
        return functional.scaled_dot_product_attention(query, key, value)

    inputs = tuple(torch.zeros(2, 3, size, 8, device=device) for size in (4, 5, 5))
    report = count_costs(Function(attend), inputs)
    assert report.macs == 2 * 3 * 4 * 5 * 8 * 2
    assert {row.kind for row in report.layers} == {"attention" if device == "cpu" else "matmul"}


def test_a_transformer_layer_is_counted_in_full_where_its_values_are_needed() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    with_value = Function(lambda own, x: own.layer(x) if float(x.sum()) == 0 else x)
    with_value.layer = layer
    expected = 3 * 5 * (4 * 16 * 16 + 2 * 16 * 32) + 3 * 2 * 2 * 5 * 5 * 8
    assert count(layer, (3, 5, 16)).macs == expected
    assert count_costs(with_value, (torch.zeros(3, 5, 16),)).macs == expected
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_layer_that_runs_twice_has_two_rows_and_its_parameters_once() -> None:
    shared = nn.Conv2d(3, 3, 3, padding=1)
    report = count(nn.Sequential(shared, nn.MaxPool2d(2), shared), (1, 3, 8, 8))
    assert [(row.name, row.input_shape[2]) for row in report.layers] == [("0", 8), ("0", 4)]
    assert report.parameters == 84


# Whole networks, against two other counters.


@pytest.mark.parametrize("name", [*OURS, *PEERS])
def test_networks_agree_with_torch(name: str) -> None:
    model = meta_model(name)
    images = torch.empty(2, 3, 64, 96, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images)
    assert count_macs(model, (images,)) == counter.get_total_flops() / 2


@pytest.mark.parametrize("name", ["ese_vovnet19b_slim_dw", "eca_vovnet39b", "mobilenet_v2"])
def test_networks_agree_with_fvcore_by_operator(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.jit, which fvcore traces with
        from fvcore.nn import ActivationCountAnalysis, FlopCountAnalysis

        model = meta_model(name).to_empty(device="cpu")
        images = torch.empty(1, 3, 64, 64)
        macs = FlopCountAnalysis(model, images).unsupported_ops_warnings(False).by_operator()
        activations = ActivationCountAnalysis(model, images).unsupported_ops_warnings(False)
    report = count_costs(model, (images,))
    found = Counter[str]()
    for row in report.layers:
        found[row.kind] += row.macs
    assert found == {"conv": macs["conv"], "linear": macs["linear"]}
    assert report.activations == activations.by_operator()["conv"]


def dense_layers(channels: int, growth: int, layers: int) -> list[nn.Module]:
    return [
        Dense(nn.Sequential(nn.BatchNorm2d(c), nn.ReLU(), nn.Conv2d(c, growth, 3, padding=1)))
        for c in range(channels, channels + layers * growth, growth)
    ]


class Dense(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.layer(x)], dim=1)


def densenet40() -> nn.Module:
    """DenseNet-40, growth 12, for 32 x 32 (Huang et al. 2017), without its classifier."""
    parts: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=False)]
    for channels in (16, 160, 304):
        parts += dense_layers(channels, 12, 12)
        if channels != 304:
            parts += [nn.Conv2d(channels + 144, channels + 144, 1), nn.AvgPool2d(2)]
    return nn.Sequential(*parts)


def test_densenet40_has_the_memory_access_of_the_paper() -> None:
    report = count(densenet40(), (1, 3, 32, 32))
    blocks_and_transitions = report.memory_access - report.layers[0].memory_access
    assert blocks_and_transitions == 3_659_616  # the VoVNet paper says 3.7M, with or without stem


@pytest.mark.parametrize(
    ("name", "last_channels", "expected"),
    [("ese_vovnet39b", 1024, 9_089_259_008), ("ese_vovnet19b_dw", 1024, 1_711_959_904)],
)
def test_the_figures_of_timms_model_pages(name: str, last_channels: int, expected: int) -> None:
    with torch.device("meta"):
        model = create_model(name)
    report = count(model, (1, 3, 224, 285))
    convolutions = [row for row in report.layers if row.kind == "conv"]
    biases = sum(
        (row.parameters - row.input_shape[1] // row.groups * row.output_shape[1] * prod(row.kernel))
        * prod(row.output_shape[2:])
        for row in convolutions
        if row.kernel
    )
    pool = (7 * 9 + 1) * last_channels
    assert sum(row.macs for row in convolutions) + biases + pool == expected


def test_the_concat_of_one_shot_aggregation_costs_a_fifth_of_the_traffic() -> None:
    with torch.device("meta"):
        report = count(create_model("ese_vovnet39b"), (1, 3, 224, 224))
    spatial = [row for row in report.layers if row.output_shape[2:] not in [(), (1, 1)]]
    assert round(sum(row.memory_access for row in spatial) / 1e6, 1) == 37.5
    sides = (56, 28, 14, 14, 7, 7)
    channels = (128 + 640, 256 + 800, 512 + 960, 768 + 960, 768 + 1120, 1024 + 1120)
    traffic = sum(2 * side**2 * width for side, width in zip(sides, channels, strict=True))
    assert report.concat_memory_access == traffic == 8_122_240


# The lower bound.


def paper_bound(side: int, kernel: int, macs: int) -> float:
    return 2 * sqrt(side**2 * macs) / kernel + macs / side**2


def test_the_bound_is_the_papers_and_is_met_by_equal_widths_alone() -> None:
    equal, growing = (
        count(nn.Conv2d(*channels, 3, padding=1), (1, channels[0], 14, 14)).layers[0]
        for channels in ((64, 64), (256, 16))
    )
    assert equal.macs == growing.macs
    for row in (equal, growing):
        assert row.lower_bound == pytest.approx(paper_bound(14, 3, row.macs))
    assert equal.ratio == pytest.approx(1)
    assert growing.ratio == pytest.approx((14 * 14 * 272 + 36864) / (14 * 14 * 128 + 36864))


@pytest.mark.parametrize("layer", [(8, 8, 3, 2, 1, 4), (12, 24, 1, 1, 2, 4), (6, 9, 5, 4, 1, 3)])
def test_no_other_widths_of_equal_macs_stay_below_the_bound(
    layer: tuple[int, int, int, int, int, int],
) -> None:
    inputs, outputs, kernel, stride, batch, groups = layer
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups)
    row = count(conv, (batch, inputs, 16, 16)).layers[0]
    assert row.lower_bound is not None
    read, written = prod(row.input_shape) / inputs, prod(row.output_shape) / outputs
    weights = kernel**2 * inputs * outputs / groups
    for width in range(1, 200):
        other = read * width + written * inputs * outputs / width + weights
        assert other >= row.lower_bound * (1 - 1e-9)
    best = sqrt(inputs * outputs * written / read)
    least = read * best + written * inputs * outputs / best + weights
    assert least == pytest.approx(row.lower_bound)


def test_the_ratio_of_a_network_leaves_out_what_has_no_bound() -> None:
    product = Function(lambda own, x: own.conv(x) @ own.conv(x).mT)
    product.conv = nn.Conv2d(2, 8, 1)
    report = count(product, (1, 2, 5, 5))
    assert [row.kind for row in report.layers] == ["conv", "conv", "matmul"]
    assert report.ratio == pytest.approx((50 + 200 + 16) / lower_bound(50, 200, 16))
    assert count(nn.ReLU(), (1, 2)).ratio is None


# Peak memory of the activations.


def residual(own: nn.Module, x: Tensor) -> Tensor:
    return x + own.second(functional.relu(own.first(x)))


def test_a_residual_connection_keeps_its_input() -> None:
    network = Function(residual)
    network.first, network.second = nn.Conv2d(4, 16, 1), nn.Conv2d(16, 4, 1)
    report = count(network, (1, 4, 5, 5))
    assert report.peak_activation_elements == 25 * (4 + 16 + 16)  # x, the conv's and the ReLU's
    plain = count(nn.Sequential(network.first, nn.ReLU(), network.second), (1, 4, 5, 5))
    assert plain.peak_activation_elements == 25 * (16 + 16)
    assert plain.peak_activation_at == "1"


def test_what_nobody_reads_needs_no_memory() -> None:
    network = nn.Sequential(nn.MaxPool2d(2), nn.BatchNorm2d(4))
    assert count(network, (1, 4, 6, 6)).peak_activation_elements == 4 * (36 + 9)


def test_work_in_place_and_views_need_no_memory() -> None:
    network = nn.Sequential(nn.Conv2d(4, 8, 1), nn.ReLU(inplace=True), nn.Flatten(), nn.ReLU())
    assert count(network, (1, 4, 5, 5)).peak_activation_elements == 25 * (8 + 8)
    assert count(network[:3], (1, 4, 5, 5)).peak_activation_elements == 25 * (4 + 8)


def test_a_concatenation_holds_its_parts_and_itself() -> None:
    network = Function(lambda own, x: torch.cat([x, x.relu(), x.sigmoid()], dim=1))
    report = count(network, (1, 4, 5, 5))
    assert report.peak_activation_elements == 25 * (4 + 4 + 4 + 12)
    assert report.concat_memory_access == 25 * (12 + 12)
    assert report.memory_access == 0


def test_meta_and_real_runs_agree_on_the_peak() -> None:
    torch.manual_seed(0)
    model = create_model("ese_vovnet19b_slim_dw")
    needs_values = Function(lambda own, x: own.model(x) if x.sum() == 0 else x)
    needs_values.model = model
    images = torch.zeros(1, 3, 64, 64)
    by_shape, by_value = count_costs(model, (images,)), count_costs(needs_values, (images,))
    assert by_shape.fallback_reason is None
    assert by_value.fallback_reason is not None
    assert by_shape.peak_activation_elements == by_value.peak_activation_elements
    assert by_shape.peak_activation_at == "stem.0.bn"
    assert by_value.peak_activation_at == "model.stem.0.bn"


class Osa(nn.Module):
    def __init__(self, channels: int, width: int, layers: int) -> None:
        super().__init__()
        widths = [channels, *[width] * layers]
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        outputs = [x]
        for layer in self.layers:
            outputs.append(layer(outputs[-1]))
        return torch.cat(outputs, dim=1)


def test_one_shot_aggregation_reads_less_than_dense_connections() -> None:
    dense = nn.Sequential(*dense_layers(16, 12, 12))
    one_shot = Osa(16, 12, 12)
    of_dense, of_osa = count(dense, (1, 16, 32, 32)), count(one_shot, (1, 16, 32, 32))
    assert of_osa.peak_activation_elements == 1024 * 2 * (16 + 144)  # the concat and its parts
    assert of_dense.peak_activation_elements == 1024 * 3 * (16 + 132)  # map, its norm, its ReLU
    assert of_osa.concat_memory_access == 1024 * 2 * 160
    concats = sum(2 * (16 + 12 * index) for index in range(1, 13))
    assert of_dense.concat_memory_access == 1024 * concats
    assert of_osa.ratio == pytest.approx(1, abs=0.01)
    assert of_dense.ratio is not None
    assert of_dense.ratio > 1.3


# What is reported beside the counts.


def test_bytes_follow_the_type() -> None:
    images = (torch.empty(1, 3, 8, 8),)
    report = count_costs(Network(), images)
    assert (report.dtype, report.element_bytes) == ("float32", 4)
    half = count_costs(Network(), images, dtype=torch.float16)
    assert (half.dtype, half.memory_access) == ("float16", report.memory_access)
    assert 2 * half.memory_access_bytes == report.memory_access_bytes == 4 * report.memory_access
    assert half.peak_activation_bytes == 2 * half.peak_activation_elements
    assert count_costs(Network().bfloat16(), (images[0].bfloat16(),)).dtype == "bfloat16"


def test_a_report_is_plain_data() -> None:
    found = count(Network(), (2, 3, 16, 12)).to_dict()
    assert found["macs"] == sum(layer["macs"] for layer in found["layers"])
    assert found["input_shapes"] == ((2, 3, 16, 12),)
    assert (
        found["layers"][0]["ratio"]
        == found["layers"][0]["memory_access"] / (found["layers"][0]["lower_bound"])
    )
    assert "flops = 2 * macs" in found["conventions"]


@pytest.mark.parametrize("batch", [1, 3])
def test_macs_of_convolutions_and_linear_layers_are_exact(batch: int) -> None:
    macs = count_macs(Network(), (torch.rand(batch, 3, 16, 12),))
    per_image = 8 * 6 * (8 * 3 * 9) + 8 * 6 * (8 * 9) + 8 * 5
    assert macs == batch * per_image


def needs_values(network: Network) -> Function:
    wrapped = Function(lambda own, x: own.network(x[x.flatten(1).sum(1) >= 0]))
    wrapped.network = network
    return wrapped


@pytest.mark.parametrize("by_value", [False, True])
def test_counting_leaves_the_network_as_it_was(by_value: bool) -> None:
    network = Network()
    network.norm.eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    count_macs(needs_values(network) if by_value else network, (torch.rand(2, 3, 8, 8),))
    for name, value in network.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert network.training
    assert network.conv.training
    assert not network.norm.training
    assert not network.conv._forward_hooks


def test_nothing_is_computed_where_shapes_do() -> None:
    model = meta_model("ese_vovnet19b")
    report = count(model, (2**20, 3, 224, 224))  # its first layer alone would write 3 TB
    assert report.fallback_reason is None
    assert report.macs == 2**20 * (4_120_913_920 + 1_024_000)


def test_a_network_may_make_tensors_of_its_own() -> None:
    network = Function(lambda own, x: torch.cat([x, torch.zeros(1, 2, 4, 4)], dim=1))
    report = count(network, (1, 3, 4, 4))
    assert report.fallback_reason is None
    assert report.concat_memory_access == 16 * (5 + 5)


def test_what_depends_on_data_is_counted_on_real_values_and_says_so() -> None:
    network = needs_values(Network())
    images = torch.stack([torch.ones(3, 8, 8), -torch.ones(3, 8, 8)])
    report = count_costs(network, (images,))
    assert report.layers[0].input_shape == (1, 3, 8, 8)
    assert "on the given values" in report.conventions
    with pytest.raises(ConfigError, match="expected real weights and inputs"):
        count_costs(network, (images.to("meta"),))


def test_a_whole_detector_is_counted_with_its_second_stage() -> None:
    torch.manual_seed(0)
    overrides = {"score_threshold": 0.0, "max_detections": 5, "mask_iou_width": 16}
    model = create_model(
        "centermask_lite_ese_vovnet19b_slim_dw", num_classes=2, overrides=overrides
    )
    dense = count(model, (1, 3, 64, 64))
    assert dense.fallback_reason is None
    assert not any("mask" in row.name for row in dense.layers)
    graph = DeployGraph(model, mean=(0, 0, 0), std=(255, 255, 255))
    inputs = (torch.full((1, 64, 64, 3), 9, dtype=torch.uint8), torch.tensor([[64, 64]]))
    whole = count_costs(graph, inputs)
    assert whole.fallback_reason is not None
    in_masks = [row for row in whole.layers if "mask" in row.name]
    assert whole.macs - dense.macs == sum(row.macs for row in in_masks)
    assert in_masks[0].input_shape == (5, 128, 14, 14)
    assert "detector.mask_head.deconv" in {row.name for row in in_masks}


# Networks that do not run.


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_wrong_shape_names_the_part_and_the_reason(device: str) -> None:
    network = nn.Sequential(nn.Identity(), Network())
    with pytest.raises(ConfigError, match=r"inputs \(\(1, 4, 8, 8\),\).* in 1\.conv \(Conv2d\): ."):
        count_costs(network, (torch.empty(1, 4, 8, 8, device=device),))
    assert network.training
    assert not network[1].conv._forward_hooks


def test_an_error_that_a_network_catches_itself_misplaces_no_name() -> None:
    def forward(own: Any, x: Tensor) -> Tensor:
        with pytest.raises(RuntimeError):
            own.wrong(x)
        return own.right(functional.conv2d(x, own.weight))

    network = Function(forward, weight=torch.zeros(3, 3, 1, 1))
    network.wrong, network.right = nn.Sequential(nn.Conv2d(5, 2, 1)), nn.Conv2d(3, 2, 1)
    outer = Function(
        lambda own, x: functional.conv2d(own.inner(x), own.weight), weight=torch.zeros(1, 2, 1, 1)
    )
    outer.inner = network
    rows = count(outer, (1, 3, 4, 4)).layers
    assert [row.name for row in rows][-2:] == ["inner.right", ""]


def test_inputs_are_a_tuple() -> None:
    with pytest.raises(ConfigError, match="expected a tuple of tensors, got Tensor"):
        count_costs(Network(), torch.empty(1, 3, 8, 8))  # type: ignore[arg-type]


def test_rows_are_frozen() -> None:
    row = count(Network(), (1, 3, 8, 8)).layers[0]
    assert isinstance(row, LayerCost)
    with pytest.raises(AttributeError):
        row.macs = 0  # type: ignore[misc]


def test_parameters_without_statistics_and_shared_once() -> None:
    network = Network()
    expected = 3 * 8 * 9 + 8 * 9 + 8 + 8 + 8 + 8 * 5 + 5
    assert count_parameters(network) == expected
    assert count_parameters(nn.ModuleList([network, network])) == expected
