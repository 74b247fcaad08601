"""A graph as a .pt2 file of torch.export."""

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule
from torch.nn.utils.parametrize import register_parametrization

from vovnet.export.fuse import large_weights
from vovnet.export.graph import ExportedClassifier, Graph, dynamic_shapes, example_inputs

_TOLD = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node", "custom")
"""Of each operation, what tells of the code and the machine that it comes from."""


def write_program(
    graph: Graph,
    path: Path,
    *,
    sides: tuple[int, int] | None,
    half: bool,
    metadata: Mapping[str, str],
) -> None:
    """Writes a graph of export.graph with its metadata, which are extra files of the archive.

    sides and half as in export.onnx.write_onnx. Nothing in the file is pickled, and no text of it
    is code: runtime.torch_export refuses others.
    """
    network = _in_half(graph) if half else graph
    inputs = example_inputs(graph, sides)
    with torch.no_grad():
        program = torch.export.export(
            network.eval(),
            tuple(inputs.values()),
            dynamic_shapes=_shapes(graph, sides),
            strict=False,
        )
    program._guards_code = []  # Python, which loading would run; ranges are checked without
    program._example_inputs = None
    for part in program.graph_module.modules():
        if isinstance(part, GraphModule):
            _strip(part)
    torch.export.save(program, path, extra_files=dict(metadata))


def _shapes(graph: Graph, sides: tuple[int, int] | None) -> dict[str, Any]:
    shapes = dynamic_shapes(graph, sides)
    if sides is None and isinstance(graph, ExportedClassifier):
        # How its pools round up makes conditions that torch cannot solve for sides with names.
        shapes["images"] |= {axis: Dim.DYNAMIC(min=32, max=4096) for axis in (1, 2)}
    return shapes


def _strip(part: GraphModule) -> None:
    for node in part.graph.nodes:
        for key in _TOLD:
            node.meta.pop(key, None)


class _Half(nn.Module):
    """A parameter that is stored as float16 and computed with as float32."""

    def forward(self, stored: Tensor) -> Tensor:
        return stored.float()


def _in_half(graph: Graph) -> nn.Module:
    copied = deepcopy(graph)
    for name, weight in large_weights(copied):
        owner, _, last = name.rpartition(".")
        weight.data = weight.data.half()
        register_parametrization(copied.get_submodule(owner), last, _Half(), unsafe=True)
    return copied
