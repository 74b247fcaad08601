"""A graph as an ONNX file, and that as OpenVINO's."""

import importlib
import logging
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from vovnet.errors import ConfigError
from vovnet.export.fuse import large_weights
from vovnet.export.graph import Graph, dynamic_shapes, example_inputs
from vovnet.export.suppress import onnx_functions
from vovnet.runtime.openvino import import_openvino, openvino_core, read_model

OPSET = 20
_MAX_BYTES = 2**31 - 2**20  # protobuf's limit, less what is added


def write_onnx(
    graph: Graph,
    path: Path,
    *,
    sides: tuple[int, int] | None,
    half: bool,
    metadata: Mapping[str, str],
) -> None:
    """Writes a graph of export.graph with its metadata; raises ConfigError where it cannot be.

    sides: height and width of every image, None where they are open; then a detector's are
    multiples of 32. half stores large weights in half precision; what computes sees float32.
    """
    proto = _trace(graph.eval(), sides).model_proto
    _strip(proto)
    if half:
        _store_half(proto, [name for name, _ in large_weights(graph)])
    for key, value in metadata.items():
        proto.metadata_props.add(key=key, value=value)
    if proto.ByteSize() > _MAX_BYTES:
        raise ConfigError(f"export: expected less than 2 GB, got {proto.ByteSize()} bytes")
    path.write_bytes(proto.SerializeToString())


def write_openvino(onnx_file: Path, path: Path) -> None:
    """Writes an ONNX file in OpenVINO's form, .xml and beside it .bin; the metadata goes along.

    By OpenVINO's reader, never its converter, which reports home.
    """
    model = read_model(openvino_core(), onnx_file)
    import_openvino().save_model(model, str(path), compress_to_fp16=False)


def _trace(graph: Graph, sides: tuple[int, int] | None) -> Any:
    inputs = example_inputs(graph, sides)
    with _quiet(), torch.no_grad():
        return torch.onnx.export(
            graph,
            tuple(inputs.values()),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=list(graph(*inputs.values())),
            dynamic_shapes=dynamic_shapes(graph, sides),
            custom_translation_table=onnx_functions(),
            verbose=False,
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter has to say to its own authors."""
    logger = logging.getLogger("onnx_ir")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _strip(proto: Any) -> None:
    """Takes out what tells of the machine that wrote the file: the exporter notes source lines."""
    graph = proto.graph
    del proto.metadata_props[:], graph.metadata_props[:]
    for part in (graph.node, graph.input, graph.output, graph.value_info, graph.initializer):
        for entry in part:
            entry.doc_string = ""
            if hasattr(entry, "metadata_props"):
                del entry.metadata_props[:]
    proto.doc_string = graph.doc_string = ""


def _store_half(proto: Any, names: Collection[str]) -> None:
    """Stores large weights as float16 behind a Cast, which engines compute once when they load."""
    onnx: Any = importlib.import_module("onnx")
    casts = []
    for stored in proto.graph.initializer:
        if stored.name not in names:
            continue
        values, name = onnx.numpy_helper.to_array(stored), stored.name
        stored.CopyFrom(onnx.numpy_helper.from_array(values.astype("float16"), f"{name}.half"))
        casts.append(
            onnx.helper.make_node("Cast", [f"{name}.half"], [name], to=onnx.TensorProto.FLOAT)
        )
    nodes = [*casts, *proto.graph.node]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
