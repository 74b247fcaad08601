"""The counts of an ONNX file, by shape inference: nothing runs."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from vovnet.errors import ConfigError, DataError
from vovnet.profiling.cost import CostReport, Kind, LayerCost, layer_cost
from vovnet.profiling.liveness import Peak, Step, peak_live

Shape = tuple[int, ...]
# Messages of onnx, which is optional: annotations must not import it.
Model = Any
Graph = Any
Node = Any
Entry = Any


@dataclass(frozen=True, slots=True)
class _Operator:
    """Where among its inputs a layer finds what it reads, its weight, and its bias."""

    kind: Kind
    reads: tuple[int, ...]
    weight: int
    bias: int | None = None


_OPERATORS = {
    "Conv": _Operator("conv", (0,), 1, 2),
    "ConvInteger": _Operator("conv", (0,), 1),
    "QLinearConv": _Operator("conv", (0,), 3, 8),
    "ConvTranspose": _Operator("conv_transpose", (0,), 1, 2),
    "DeformConv": _Operator("deform_conv", (0, 2, 4), 1, 3),
    "Gemm": _Operator("linear", (0,), 1, 2),
    "MatMul": _Operator("linear", (0,), 1),
    "MatMulInteger": _Operator("linear", (0,), 1),
    "QLinearMatMul": _Operator("linear", (0,), 3),
}
_VIEWS = {"Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"}
_NOT_COUNTED = {"Attention", "Einsum", "GRU", "If", "LSTM", "Loop", "RNN", "Scan"}
_ELEMENT_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
_NO_WEIGHTS = {"bool", "int64", "str"}


@dataclass(frozen=True, slots=True)
class _Tensors:
    """The tensors of a graph by name: shapes, and those that no input has a part in."""

    shapes: Mapping[str, Shape]
    constants: frozenset[str]
    where: str

    def shape(self, name: str) -> Shape:
        if name not in self.shapes:
            raise ConfigError(
                f"{self.where}: tensor {name!r}: expected sizes that follow from those of the "
                "inputs, got open ones: they depend on data, or on an operator that onnx lacks"
            )
        return self.shapes[name]

    def elements(self, name: str) -> int:
        return prod(self.shape(name))

    def flowing(self, names: Sequence[str]) -> list[str]:
        """Those that exist and are no constants."""
        return [name for name in names if name and name not in self.constants]


def count_onnx(
    path: Path, *, input_shapes: Mapping[str, Sequence[int]] | None = None
) -> CostReport:
    """Count one pass of an ONNX file as `count_costs` counts a module; layers have nodes' names.

    An open batch size (the first of an input's sizes) counts as 1. Other open sizes must be given:
    `input_shapes` maps names of inputs to whole shapes, batch first. `parameters` are the elements
    of all stored tensors but int64, bool and text ones: running statistics too, where they are not
    folded. Bytes are at the type of the first stored floating tensor.

    Raises ConfigError when onnx is missing, a size is open, contradicts the file or depends on
    data, or an operator cannot be counted; DataError when the file is missing or no ONNX model.
    """
    graph = _infer_shapes(_load(path), input_shapes or {}, where=str(path)).graph
    tensors = _read_tensors(graph, where=str(path))
    peak = _find_peak(graph, tensors)
    dtype = _floating_dtype(graph)
    return CostReport(
        layers=tuple(_layer(node, tensors) for node in graph.node if node.op_type in _OPERATORS),
        parameters=_count_parameters(graph),
        peak_activation_elements=peak.elements,
        peak_activation_at=peak.name,
        concat_memory_access=sum(
            tensors.elements(name)
            for node in graph.node
            if node.op_type == "Concat" and tensors.flowing(node.output)
            for name in (*node.input, *node.output)
        ),
        input_shapes=tuple(tensors.shape(entry.name) for entry in _inputs(graph)),
        dtype=dtype,
        element_bytes=_ELEMENT_BYTES[dtype],
    )


def _load(path: Path) -> Model:
    try:
        import onnx
        import onnx.inliner
    except ImportError as error:
        raise ConfigError(
            f"{path}: expected onnx to read it, found none; install vovnet with its extra: "
            "vovnet[export]"
        ) from error
    try:
        model = onnx.load(path, load_external_data=False)
    except OSError as error:
        raise DataError(f"{path}: expected a readable file, got: {error.strerror}") from None
    except Exception as error:  # protobuf's, which this package does not depend on
        raise DataError(f"{path}: expected an ONNX model, got: {error}") from None
    if not model.graph.node:
        raise DataError(f"{path}: expected an ONNX model, found a graph without operators")
    return onnx.inliner.inline_local_functions(model) if model.functions else model


def _infer_shapes(model: Model, input_shapes: Mapping[str, Sequence[int]], *, where: str) -> Model:
    from onnx import shape_inference

    entries = {entry.name: entry for entry in _inputs(model.graph)}
    for name in input_shapes:
        if name not in entries:
            raise ConfigError(f"{where}: expected inputs {', '.join(entries)}, got {name!r}")
    for name, entry in entries.items():
        _set_shape(entry, input_shapes.get(name), where=where)
    for node in model.graph.node:
        if node.op_type in _NOT_COUNTED:
            raise ConfigError(
                f"{where}: {_name(node)}: expected an operator that can be counted, "
                f"got {node.op_type}"
            )
    # What an exporter has noted holds for its open sizes.
    del model.graph.value_info[:]
    for output in model.graph.output:
        output.type.tensor_type.ClearField("shape")
    try:
        return shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    except shape_inference.InferenceError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{where}: these shapes do not go through: {reason}") from None


def _set_shape(entry: Entry, given: Sequence[int] | None, *, where: str) -> None:
    dims = entry.type.tensor_type.shape.dim
    stored = [dim.dim_value if dim.HasField("dim_value") else None for dim in dims]
    if given is None:
        given = [1 if size is None and axis == 0 else size or 0 for axis, size in enumerate(stored)]
    fits = len(given) == len(stored) and all(
        size > 0 and expected in (None, size) for size, expected in zip(given, stored, strict=True)
    )
    if not fits:
        sizes = ", ".join("open" if size is None else str(size) for size in stored)
        raise ConfigError(
            f"{where}: input {entry.name!r}: expected a shape in input_shapes that fits ({sizes}), "
            f"got {'none' if 0 in given else tuple(given)}"
        )
    for dim, size in zip(dims, given, strict=True):
        dim.dim_value = size


def _inputs(graph: Graph) -> list[Entry]:
    stored = {tensor.name for tensor in graph.initializer}  # old files list these as inputs too
    return [entry for entry in graph.input if entry.name not in stored]


def _read_tensors(graph: Graph, *, where: str) -> _Tensors:
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for entry in (*graph.input, *graph.value_info, *graph.output):
        sizes = entry.type.tensor_type
        if sizes.HasField("shape") and all(dim.HasField("dim_value") for dim in sizes.shape.dim):
            shapes[entry.name] = tuple(dim.dim_value for dim in sizes.shape.dim)
    constants = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        names = [name for name in node.input if name]
        if node.op_type == "Constant" or (names and constants.issuperset(names)):
            constants.update(node.output)
    return _Tensors(shapes, frozenset(constants), where)


def _layer(node: Node, tensors: _Tensors) -> LayerCost:
    operator = _OPERATORS[node.op_type]
    if operator.kind == "linear":
        return _product(node, operator, tensors)
    weight = tensors.shape(node.input[operator.weight])
    output = tensors.shape(node.output[0])
    reads = [tensors.shape(node.input[i]) for i in operator.reads if _has(node, i)]
    spread = reads[0] if operator.kind == "conv_transpose" else output
    attributes: dict[str, Any] = {attribute.name: attribute for attribute in node.attribute}
    kernel = weight[2:]
    return layer_cost(
        _name(node),
        operator.kind,
        reads,
        output=output,
        macs=prod(spread) // spread[1] * prod(weight),
        weight=weight,
        bias_elements=_bias_elements(node, operator, tensors),
        kernel=kernel,
        stride=attributes["strides"].ints if "strides" in attributes else (1,) * len(kernel),
        groups=attributes["group"].i if "group" in attributes else 1,
    )


def _product(node: Node, operator: _Operator, tensors: _Tensors) -> LayerCost:
    left, right = node.input[operator.reads[0]], node.input[operator.weight]
    output = tensors.shape(node.output[0])
    transposed = any(item.name == "transA" and item.i for item in node.attribute)
    macs = prod(output) * tensors.shape(left)[0 if transposed else -1]
    for weight, other in ((right, left), (left, right)):
        if weight in tensors.constants:
            return layer_cost(
                _name(node),
                "linear",
                [tensors.shape(other)],
                output=output,
                macs=macs,
                weight=tensors.shape(weight),
                bias_elements=_bias_elements(node, operator, tensors),
            )
    shapes = [tensors.shape(left), tensors.shape(right)]
    return layer_cost(_name(node), "matmul", shapes, output=output, macs=macs)


def _bias_elements(node: Node, operator: _Operator, tensors: _Tensors) -> int:
    if operator.bias is None or not _has(node, operator.bias):
        return 0
    name = node.input[operator.bias]
    return tensors.elements(name) if name in tensors.constants else 0


def _has(node: Node, index: int) -> bool:
    return index < len(node.input) and node.input[index] != ""


def _name(node: Node) -> str:
    return str(node.name or node.output[0])


def _find_peak(graph: Graph, tensors: _Tensors) -> Peak:
    buffers: dict[str, int] = {}  # views share the number of what they show
    sizes: dict[int, int] = {}
    steps = []

    def number(name: str) -> int:
        if name not in buffers:
            buffers[name] = len(sizes)
            sizes[buffers[name]] = tensors.elements(name)
        return buffers[name]

    inputs = [number(entry.name) for entry in _inputs(graph)]
    for node in graph.node:
        read, written = tensors.flowing(node.input), tensors.flowing(node.output)
        if node.op_type in _VIEWS and read and written:
            buffers[written[0]] = number(read[0])
        if written:
            steps.append(Step(_name(node), tuple(map(number, (*read, *written)))))
    outputs = map(number, tensors.flowing([entry.name for entry in graph.output]))
    return peak_live(steps, sizes, inputs=inputs, outputs=list(outputs))


def _stored(graph: Graph) -> Iterator[tuple[str, int]]:
    """Type and elements of each stored tensor."""
    from onnx import helper

    for tensor in graph.initializer:
        yield helper.tensor_dtype_to_np_dtype(tensor.data_type).name, prod(tensor.dims)


def _floating_dtype(graph: Graph) -> str:
    return next((dtype for dtype, _ in _stored(graph) if dtype in _ELEMENT_BYTES), "float32")


def _count_parameters(graph: Graph) -> int:
    return sum(elements for dtype, elements in _stored(graph) if dtype not in _NO_WEIGHTS)
