import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from vovnet.errors import ConfigError, DataError
from vovnet.models.zoo import create_model
from vovnet.profiling.count import count_costs
from vovnet.profiling.onnx_count import count_onnx

Size = int | str | None


def save(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    *,
    shape: Sequence[Size] = (1, 4, 6, 6),
    weights: dict[str, np.ndarray] | None = None,
    input_type: int = TensorProto.FLOAT,
) -> Path:
    """A graph from input `x` to output `y`."""
    stored = [numpy_helper.from_array(value, name) for name, value in (weights or {}).items()]
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", input_type, shape)],
        [helper.make_empty_tensor_value_info("y")],
        stored,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]), path)
    return path


def floats(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def weight_of(values: Tensor) -> np.ndarray:
    return np.asarray(values.detach())


# Single layers against the same layer of torch, which test_count.py counts by hand.
LAYERS: dict[str, tuple[nn.Module, str, dict[str, object]]] = {
    "conv": (nn.Conv2d(4, 6, 3, padding=1), "Conv", {"pads": [1] * 4}),
    "stride": (nn.Conv2d(4, 6, 3, stride=(2, 1)), "Conv", {"strides": [2, 1]}),
    "groups": (nn.Conv2d(4, 6, 3, groups=2, bias=False), "Conv", {"group": 2}),
    "dilation": (nn.Conv2d(4, 4, 3, dilation=2), "Conv", {"dilations": [2, 2]}),
    "transposed": (nn.ConvTranspose2d(4, 6, 2, 2), "ConvTranspose", {"strides": [2, 2]}),
    "transposed, groups": (
        nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False),
        "ConvTranspose",
        {"group": 2},
    ),
}


@pytest.mark.parametrize("case", LAYERS)
def test_convolutions_cost_what_they_cost_in_torch(case: str, tmp_path: Path) -> None:
    layer, operator, attributes = LAYERS[case]
    weights = {name: weight_of(value) for name, value in layer.named_parameters()}
    node = helper.make_node(operator, ["x", *weights], ["y"], name="it", **attributes)
    found = count_onnx(save(tmp_path / "layer.onnx", [node], weights=weights))
    expected = count_costs(layer, (torch.empty(1, 4, 6, 6, device="meta"),))
    assert [row.name for row in found.layers] == ["it"]
    assert str(found.layers[0]).replace("'it'", "''") == str(expected.layers[0])
    assert found.to_dict() | {"layers": ()} == (
        expected.to_dict() | {"layers": (), "peak_activation_at": "it"}
    )


def test_a_deformable_convolution_reads_offsets_and_mask(tmp_path: Path) -> None:
    weights = {
        "w": floats(6, 4, 3, 3),
        "offset_w": floats(18, 4, 1, 1),
        "mask_w": floats(9, 4, 1, 1),
    }
    nodes = [
        helper.make_node("Conv", ["x", "offset_w"], ["offset"]),
        helper.make_node("Conv", ["x", "mask_w"], ["mask"]),
        helper.make_node("DeformConv", ["x", "w", "offset", "", "mask"], ["y"], pads=[1] * 4),
    ]
    row = count_onnx(save(tmp_path / "layer.onnx", nodes, weights=weights)).layers[2]
    assert (row.kind, row.macs) == ("deform_conv", 36 * 6 * 4 * 9)
    assert row.memory_access == 36 * (4 + 18 + 9 + 6) + 6 * 4 * 9
    assert row.parameters == 6 * 4 * 9
    assert row.name == "y"


@pytest.mark.parametrize(("transposed", "shape"), [(0, (5, 4)), (1, (4, 5))])
def test_gemm_is_a_linear_layer(transposed: int, shape: tuple[int, int], tmp_path: Path) -> None:
    node = helper.make_node("Gemm", ["x", "w", "b"], ["y"], transA=transposed, transB=1)
    weights = {"w": floats(7, 4), "b": floats(7)}
    report = count_onnx(save(tmp_path / "layer.onnx", [node], shape=shape, weights=weights))
    row = report.layers[0]
    assert (row.kind, row.macs, row.parameters) == ("linear", 5 * 4 * 7, 35)
    assert row.memory_access == 20 + 28 + 35
    assert report.parameters == 35


def test_a_matrix_product_is_linear_where_one_side_is_stored(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("MatMul", ["v", "a"], ["b"]),
        helper.make_node("Transpose", ["b"], ["t"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["b", "t"], ["y"]),
    ]
    weights = {"w": floats(4, 5), "v": floats(2, 3)}
    path = save(tmp_path / "products.onnx", nodes, shape=(6, 3, 4), weights=weights)
    rows = count_onnx(path).layers
    assert [(row.kind, row.macs, row.parameters) for row in rows] == [
        ("linear", 6 * 3 * 4 * 5, 20),
        ("linear", 6 * 2 * 3 * 5, 6),
        ("matmul", 6 * 2 * 5 * 2, 0),
    ]
    assert rows[2].memory_access == 6 * (10 + 10 + 4)


def test_quantised_weights_count_as_weights(tmp_path: Path) -> None:
    weights = {
        "w": np.zeros((6, 4, 3, 3), np.int8),
        "scale": np.ones((), np.float32),
        "zero": np.zeros((), np.int8),
    }
    scaled = ["scale", "zero"]
    path = save(
        tmp_path / "pairs.onnx",
        [
            helper.make_node("DequantizeLinear", ["w", *scaled], ["wide"]),
            helper.make_node("Conv", ["x", "wide"], ["y"]),
        ],
        weights=weights,
    )
    pairs = count_onnx(path)
    assert pairs.layers[0].parameters == 6 * 4 * 9
    assert pairs.peak_activation_elements == 4 * 36 + 6 * 16  # the weight is none of them
    path = save(
        tmp_path / "whole.onnx",
        [
            helper.make_node("QuantizeLinear", ["x", *scaled], ["q"]),
            helper.make_node("QLinearConv", ["q", *scaled, "w", *scaled, *scaled], ["r"]),
            helper.make_node("DequantizeLinear", ["r", *scaled], ["y"]),
        ],
        weights=weights,
    )
    whole = count_onnx(path)
    assert whole.layers[0].macs == pairs.layers[0].macs == 16 * 6 * 4 * 9
    assert whole.parameters == pairs.parameters == 6 * 4 * 9 + 2


def test_views_and_concatenations(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("Reshape", ["a", "shape"], ["b"]),
        helper.make_node("Sigmoid", ["b"], ["c"]),
        helper.make_node("Concat", ["b", "c"], ["y"], axis=1),
    ]
    path = save(
        tmp_path / "views.onnx", nodes, shape=(1, 10), weights={"shape": np.array([1, 5, 2])}
    )
    report = count_onnx(path)
    assert report.peak_activation_elements == 10 + 10 + 20
    assert report.peak_activation_at == "y"
    assert report.concat_memory_access == 20 + 20
    assert report.parameters == 0
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("Flatten", ["a"], ["b"]),
        helper.make_node("Add", ["a", "b"], ["y"]),
    ]
    path = save(tmp_path / "shared.onnx", nodes, shape=(1, 10))
    assert count_onnx(path).peak_activation_elements == 10 + 10


def export(model: nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's older exporter, which needs onnx alone
        torch.onnx.export(
            model.eval(),
            (torch.zeros(2, 3, 64, 96),),
            str(path),
            dynamo=False,
            input_names=["images"],
            dynamic_axes={"images": {0: "batch", 2: "height", 3: "width"}},
        )
    return path


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = create_model("ese_vovnet19b_slim_dw", num_classes=10)
    return export(model, tmp_path_factory.mktemp("onnx") / "model.onnx")


def test_an_exported_network_costs_what_it_costs_in_torch(exported: Path) -> None:
    found = count_onnx(exported, input_shapes={"images": (1, 3, 64, 96)})
    model = create_model("ese_vovnet19b_slim_dw", num_classes=10)
    expected = count_costs(model, (torch.empty(1, 3, 64, 96, device="meta"),))
    for name in ("macs", "memory_access", "activations", "concat_memory_access", "input_shapes"):
        assert getattr(found, name) == getattr(expected, name), name
    assert len(found.layers) == len(expected.layers)


def test_only_the_batch_may_stay_open(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'images'.* fits \(open, 3, open, open\), got none"):
        count_onnx(exported)
    node = helper.make_node("Conv", ["x", "w"], ["y"])
    path = save(
        tmp_path / "open.onnx", [node], shape=("n", 4, 6, 6), weights={"w": floats(2, 4, 3, 3)}
    )
    assert count_onnx(path).input_shapes == ((1, 4, 6, 6),)
    assert count_onnx(path, input_shapes={"x": (3, 4, 6, 6)}).macs == 3 * count_onnx(path).macs


def test_what_the_exporter_noted_of_its_own_batch_does_not_matter(tmp_path: Path) -> None:
    nodes = [helper.make_node("Relu", ["x"], ["a"]), helper.make_node("MatMul", ["a", "w"], ["y"])]
    path = save(tmp_path / "noted.onnx", nodes, shape=("n", 4), weights={"w": floats(4, 5)})
    model = onnx.load(path)
    model.graph.value_info.append(helper.make_tensor_value_info("a", TensorProto.FLOAT, (8, 4)))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, (8, 5)))
    onnx.save(model, path)
    assert count_onnx(path).macs == 4 * 5


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"images": (1, 4, 64, 64)}, r"fits \(open, 3, open, open\), got \(1, 4, 64, 64\)"),
        ({"images": (3, 64, 64)}, r"got \(3, 64, 64\)"),
        ({"image": (1, 3, 64, 64)}, "expected inputs images, got 'image'"),
    ],
)
def test_shapes_that_do_not_fit(
    exported: Path, shapes: dict[str, tuple[int, ...]], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        count_onnx(exported, input_shapes=shapes)


def test_sizes_that_contradict_each_other(tmp_path: Path) -> None:
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    path = save(tmp_path / "bad.onnx", [node], shape=(2, 3), weights={"w": floats(4, 5)})
    with pytest.raises(ConfigError, match=r"bad\.onnx: these shapes do not go through: .*MatMul"):
        count_onnx(path)


def test_sizes_that_depend_on_data(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("NonZero", ["x"], ["found"]),
        helper.make_node("Cast", ["found"], ["rows"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["w", "rows"], ["y"]),
    ]
    path = save(tmp_path / "data.onnx", nodes, shape=(2, 3), weights={"w": floats(5, 2)})
    with pytest.raises(ConfigError, match="depend on data"):
        count_onnx(path)


def test_operators_that_cannot_be_counted_are_refused(tmp_path: Path) -> None:
    node = helper.make_node("Einsum", ["x", "w"], ["y"], equation="ij,jk->ik", name="sum")
    path = save(tmp_path / "sum.onnx", [node], shape=(2, 3), weights={"w": floats(3, 5)})
    with pytest.raises(ConfigError, match="sum: expected an operator that can be counted, got Ein"):
        count_onnx(path)


@pytest.mark.parametrize("content", [b"", b"\x08\x07", b"this is a text\n" * 20])
def test_what_is_no_model(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"model\.onnx: expected an ONNX model"):
        count_onnx(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        count_onnx(tmp_path / "none.onnx")


def test_without_onnx(monkeypatch: pytest.MonkeyPatch, exported: Path) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ConfigError, match=r"found none; .* vovnet\[export\]"):
        count_onnx(exported)
