"""Counted cost of a target, and its place under the roofline."""

import importlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vovnet.errors import ConfigError
from vovnet.profiling.cost import CostReport
from vovnet.profiling.count import count_costs
from vovnet.profiling.onnx_count import count_onnx
from vovnet.profiling.records import ELEMENT_BYTES, Counts, Placement, Point, PointResult
from vovnet.profiling.roofline import Ceilings, place, time_layers
from vovnet.profiling.target import Network, Target, image_shape, load_module

DENSE_PART = "backbone, neck and dense head; what comes after depends on what is found"


def count_target(target: Target, point: Point) -> CostReport:
    """Count a target at a point: a detector's dense part, or all of anything else.

    Raises ConfigError where it cannot be counted.
    """
    if target.kind == "onnx":
        if target.path is None:
            raise ConfigError(f"{target.name}: expected the path of an ONNX file, got none")
        return count_onnx(target.path, input_shapes=_open_shapes(target.path, point))
    if target.module is not None:
        return count_costs(target.module, target.inputs)
    meta = torch.device("meta")
    shape = (point.batch_size, 3, point.height, point.width)
    return count_costs(load_module(target, device=meta), (torch.empty(shape, device=meta),))


def _open_shapes(path: Path, point: Point) -> dict[str, list[int]]:
    """Whole shapes of the image inputs of an ONNX file that leave sizes open."""
    try:
        onnx: Any = importlib.import_module("onnx")
        graph = onnx.load(path, load_external_data=False).graph
    except Exception:  # a missing package or a bad file: what counts it says what is wrong
        return {}
    stored = {tensor.name for tensor in graph.initializer}
    found = {}
    for value in graph.input:
        shape = [one.dim_value or None for one in value.type.tensor_type.shape.dim]
        if value.name not in stored and len(shape) == 4 and None in shape:
            found[value.name] = image_shape(shape, point)
    return found


def image_counts(target: Target, point: Point) -> Counts:
    """What one image of a target costs; raises ConfigError where it cannot be counted."""
    report = count_target(target, replace(point, batch_size=1))
    counts = Counts(
        parameters=report.parameters,
        macs=report.macs,
        memory_access=report.memory_access,
        activations=report.activations,
        peak_activation_elements=report.peak_activation_elements,
        note=DENSE_PART if target.task in ("detect", "segment") else "",
    )
    # Inputs that a module brings along are counted with their whole batch.
    batch = len(target.inputs[0]) if target.inputs else 1
    if batch == 1:
        return counts
    return replace(
        counts,
        macs=counts.macs // batch,
        memory_access=counts.memory_access // batch,
        activations=counts.activations // batch,
        note=f"an image's share of a batch of {batch}",
    )


def place_network(
    target: Target, result: PointResult, network: Network, *, ceilings: Ceilings, rounds: int
) -> tuple[Placement | None, tuple[Placement, ...]]:
    """The network at a measured point, and its layers by `rounds` passes, under the roofline.

    The network's flops are those that were counted: a detector's second stage adds time alone.
    None and no layers where there is no time, count or ceiling; no layers where not torch runs it.
    """
    precision = result.point.precision
    if result.counts is None or result.timings is None or precision not in ceilings.flops_per_s:
        return None, ()
    report = count_target(target, result.point)
    element_bytes = ELEMENT_BYTES[precision]
    whole = place(
        target.name,
        "network",
        time_s=result.timings.median_ms / 1000,
        flops=report.flops,
        memory_bytes=element_bytes * report.memory_access,
        ceilings=ceilings,
        precision=precision,
    )
    if network.module is None:
        return whole, ()
    costs = layer_costs(report)
    modules = dict(network.module.named_modules())
    prefix = next((f"{name}." for name in ("detector", "classifier") if name in modules), "")
    named = {name: modules[prefix + name] for name in costs if prefix + name in modules}
    device = torch.device(network.device)
    times_s = time_layers(network.run, named, device=device, rounds=rounds)
    layers = tuple(
        place(
            name,
            costs[name].kind,
            time_s=time_s,
            flops=2 * costs[name].macs,
            memory_bytes=element_bytes * costs[name].memory_access,
            ceilings=ceilings,
            precision=precision,
        )
        for name, time_s in times_s.items()
        if time_s > 0
    )
    return whole, layers


@dataclass(frozen=True, slots=True)
class LayerSum:
    """Costs of a module over all its calls in one pass."""

    kind: str
    macs: int
    memory_access: int


def layer_costs(report: CostReport) -> dict[str, LayerSum]:
    """Costs by module name: a module that runs several times (a shared head) counts with all."""
    sums: dict[str, LayerSum] = {}
    for layer in report.layers:
        known = sums.get(layer.name, LayerSum(layer.kind, 0, 0))
        sums[layer.name] = LayerSum(
            known.kind, known.macs + layer.macs, known.memory_access + layer.memory_access
        )
    return sums
