"""An OpenVINO network in eight bits: quantised by NNCF, and what OSA needs beside that."""

import importlib
import logging
import os
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vovnet.errors import ConfigError
from vovnet.runtime.openvino import import_openvino, openvino_core, read_model

Feeds = Mapping[str, NDArray[Any]]

LAYERS = ("Convolution", "GroupConvolution", "ConvolutionBackpropData", "MatMul")
_CHOICES = ("TopK", "NonMaxSuppression", "NonZero", "ROIAlign")
"""What chooses by value: an error before it changes a number, one in it the detection."""
_PASSING = ("MaxPool", "Concat", "Reshape", "Transpose")
"""What hands values on as they are, so that the quantiser before it is the next layer's."""
_INT8 = ("i8", "u8")


def read_network(path: Path) -> Any:
    """The network of an .xml file with all that is constant in it computed; raises ConfigError."""
    model = read_model(openvino_core(), path)
    passes: Any = importlib.import_module("openvino.passes")
    names = layer_names(model)
    manager = passes.Manager()
    manager.register_pass(passes.ConstantFolding())
    manager.run_passes(model)
    for layer in _of_type(model, LAYERS):  # a weight that was reshaped has a new name
        name = names.get(layer.get_friendly_name())
        if name is not None:
            layer.input_value(1).get_node().set_friendly_name(f"{name}.weight")
    return model


def quantize(model: Any, feeds: Sequence[Feeds], *, keep_float: Collection[str]) -> Any:
    """The network with weights and activations of its layers in eight bits.

    feeds are the inputs that ranges are taken from, a picture each, and may be read on access.
    keep_float names layers that stay as they are; so do those that read a pooled map, and all
    behind the first choice of detections. The metadata is the network's.
    """
    nncf = import_nncf()
    names = {*float_part(model), *layers_of_pooled(model), *keep_float}
    with _quiet():
        return place_behind_pools(
            nncf.quantize(
                model,
                nncf.Dataset(range(len(feeds)), lambda index: dict(feeds[index])),
                subset_size=len(feeds),
                ignored_scope=nncf.IgnoredScope(names=sorted(names), validate=False),
                # Without VNNI products of full weights overflow the sum of two: seven bits of a
                # weight give one answer on every processor.
                advanced_parameters=nncf.AdvancedQuantizationParameters(
                    overflow_fix=nncf.OverflowFix.ENABLE
                ),
            )
        )


def place_behind_pools(model: Any) -> Any:
    """The same network, each quantiser that stands before a max-pool moved behind it.

    The largest of rounded values is the rounded largest, so every number stays. Of a stage of OSA
    the pool feeds both the first convolution and the concatenation: with the quantiser before the
    pool engines run those in float on processors with matrix units, behind it in eight bits.
    """
    import_openvino()
    operations: Any = importlib.import_module("openvino.opset13")
    for pool in _of_type(model, ("MaxPool",)):
        before = pool.input_value(0).get_node()
        if before.get_type_name() != "FakeQuantize":
            continue
        readers = list(pool.output(0).get_target_inputs())
        pool.input(0).replace_source_output(before.input_value(0))
        ranges = [before.input_value(index) for index in range(1, 5)]
        behind = operations.fake_quantize(pool.output(0), *ranges, _levels(before))
        behind.set_friendly_name(f"{pool.get_friendly_name()}/fq_output_0")
        for reader in readers:
            reader.replace_source_output(behind.output(0))
    model.validate_nodes_and_infer_types()
    return model


def float_part(model: Any) -> list[str]:
    """Names of the operations that no layer before the first choice of detections needs."""
    behind_choice: set[str] = set()
    nodes = model.get_ordered_ops()
    for node in nodes:
        inputs = {value.get_node().get_friendly_name() for value in node.input_values()}
        if node.get_type_name() in _CHOICES or not behind_choice.isdisjoint(inputs):
            behind_choice.add(node.get_friendly_name())
    needed: set[str] = set()
    for node in reversed(nodes):
        name = node.get_friendly_name()
        if name in needed or (node.get_type_name() in LAYERS and name not in behind_choice):
            needed |= {name, *(one.get_node().get_friendly_name() for one in node.input_values())}
    left = ("Parameter", "Constant", "Result")
    every = (node for node in nodes if node.get_type_name() not in left)
    return [one.get_friendly_name() for one in every if one.get_friendly_name() not in needed]


def layers_of_pooled(model: Any) -> list[str]:
    """Names of the layers that read the mean of a map: gates of eSE, and a classifier's last.

    With one value of a channel they take next to no time, and their errors reach every pixel.
    """
    found = []
    for layer in _of_type(model, LAYERS):
        node = layer.input_value(0).get_node()
        while node.get_type_name() in ("Reshape", "Squeeze"):
            node = node.input_value(0).get_node()
        if node.get_type_name() == "ReduceMean":
            found.append(layer.get_friendly_name())
    return found


def layer_names(model: Any) -> dict[str, str]:
    """Of each layer before the first choice its operation's name, and the name that people know:
    its weight's.
    """
    outside = set(float_part(model))
    layers = [node for node in _of_type(model, LAYERS) if node.get_friendly_name() not in outside]
    return {node.get_friendly_name(): _weight_name(node) for node in layers}


def layer_errors(model: Any, quantized: Any, feeds: Sequence[Feeds]) -> dict[str, float]:
    """Of each quantised layer, by its operation's name, the error that its own quantisers make, as
    a share of the signal (root of the summed powers): of what it reads, on feeds, and of its
    weight.
    """
    weights = _weights(model)
    rounded = _weights(quantized)
    layers = [node for node in _of_type(quantized, LAYERS) if _quantizers(node.input_value(0))]
    before = {node.get_friendly_name(): _quantizers(node.input_value(0)) for node in layers}
    noise = _read_noise(quantized, [one for group in before.values() for one in group], feeds)
    return {
        name: float(
            np.sqrt(
                _noise(weights[name], rounded[name])
                + max(noise[one.get_friendly_name()] for one in group)
            )
        )
        for name, group in before.items()
    }


def layers_run(compiled: Any) -> tuple[list[str], list[str]]:
    """Layers of a compiled network that run in eight bits, and those that run in float."""
    in_int8: list[str] = []
    in_float: list[str] = []
    for node in compiled.get_runtime_model().get_ordered_ops():
        told = node.get_rt_info()
        if told["layerType"].astype(str) in ("Convolution", "GroupConvolution"):
            chosen = in_int8 if told["runtimePrecision"].astype(str) in _INT8 else in_float
            chosen.append(node.get_friendly_name())
    return in_int8, in_float


def import_nncf() -> Any:
    """The package, without its telemetry; raises ConfigError where it is not installed."""
    import_openvino()  # hides the package that telemetry, NNCF's too, is sent by
    os.environ["NNCF_CI"] = "1"  # and its own switch, where that had been imported before
    try:
        with _quiet():
            return importlib.import_module("nncf")
    except ImportError:
        raise ConfigError(
            "export: expected nncf to be installed for int8: pip install 'vovnet[export]'"
        ) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without NNCF's bars, logs and warnings; stdout is for results."""
    loggers = [logging.getLogger(name) for name in ("nncf", "torch.utils.cpp_extension")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _of_type(model: Any, types: Collection[str]) -> list[Any]:
    return [node for node in model.get_ordered_ops() if node.get_type_name() in types]


def _levels(quantizer: Any) -> int:
    return int(quantizer.get_attributes()["levels"])


def _weight_name(layer: Any) -> str:
    """Name of the weight, without its last part; of a grouped convolution's reshaped one too."""
    node = layer.input_value(1).get_node()
    while node.get_type_name() in ("Reshape", "Transpose", "Convert"):
        node = node.input_value(0).get_node()
    name: str = node.get_friendly_name()
    return name.removesuffix(".weight") if name.endswith(".weight") else layer.get_friendly_name()


def _quantizers(value: Any) -> list[Any]:
    """The quantisers whose values come through to here, none where one of them comes unrounded."""
    node = value.get_node()
    if node.get_type_name() == "FakeQuantize":
        return [node]
    if node.get_type_name() not in _PASSING:
        return []
    count = node.get_input_size() if node.get_type_name() == "Concat" else 1
    return [one for index in range(count) for one in _quantizers(node.input_value(index))]


def _weights(model: Any) -> dict[str, NDArray[Any]]:
    """The weight of each layer as it is computed with, by the layer's name."""
    layers = _of_type(model, LAYERS)
    # A copy: outputs that are constants would become part of the network.
    openvino = import_openvino()
    constant = [layer for layer in layers if _is_constant(layer.input_value(1))]
    graph = openvino.Model([layer.input_value(1) for layer in constant], [])
    compiled = openvino_core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = compiled({})
    names = [layer.get_friendly_name() for layer in constant]
    return {name: np.array(found[index]) for index, name in enumerate(names)}


def _is_constant(value: Any) -> bool:
    node = value.get_node()
    if node.get_type_name() == "Parameter":
        return False
    return all(_is_constant(one) for one in node.input_values())


def _read_noise(model: Any, quantizers: Sequence[Any], feeds: Sequence[Feeds]) -> dict[str, float]:
    """Of each quantiser, by name, the power of its error over that of the signal."""
    openvino = import_openvino()
    by_name = {one.get_friendly_name(): one for one in quantizers}
    graph = openvino.Model([one.input_value(0) for one in by_name.values()], model.get_parameters())
    compiled = openvino_core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    noises: dict[str, list[float]] = {name: [] for name in by_name}
    for given in feeds:
        found = compiled(dict(given))
        for index, (name, quantizer) in enumerate(by_name.items()):
            values = found[index]
            noises[name].append(_noise(values, _round(values, quantizer)))
    return {name: float(np.mean(values)) for name, values in noises.items()}


def _round(values: NDArray[Any], quantizer: Any) -> NDArray[Any]:
    """What a quantiser makes of values; its ranges are the same on both sides."""
    low, high = (quantizer.input_value(index).get_node().data for index in (1, 2))
    steps = _levels(quantizer) - 1
    places = np.rint((values.clip(low, high) - low) / (high - low) * steps)
    rounded: NDArray[Any] = places / steps * (high - low) + low
    return rounded


def _noise(values: NDArray[Any], rounded: NDArray[Any]) -> float:
    power = float(np.square(values, dtype=np.float64).sum())
    return float(np.square(values - rounded, dtype=np.float64).sum()) / power if power else 0.0
