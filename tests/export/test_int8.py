"""Eight bits on a small network of OSA in OpenVINO's own operations; no torch is needed."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vovnet.export import int8
from vovnet.exported import OPENVINO_FILE
from vovnet.runtime.openvino import import_openvino, openvino_core

openvino = import_openvino()
ops: Any = importlib.import_module("openvino.opset13")
SIDE = 32
LAYERS = 8  # quantised ones: stem, three of each block, head


def conv(value: Any, name: str, width: int, size: int = 3, *, spread: float = 0.2) -> Any:
    """A convolution and its ReLU; weights are those of the name, drawn by it."""
    channels = value.output(0).get_partial_shape()[1].get_length()
    random = np.random.default_rng(sum(map(ord, name)))
    values = random.normal(0, spread, (width, channels, size, size)).astype(np.float32)
    weight = ops.constant(values, name=f"{name}.weight")
    pad = [size // 2] * 2
    done = ops.convolution(value.output(0), weight, [1, 1], pad, pad, [1, 1], name=f"{name}/conv")
    return ops.relu(done)


def osa(value: Any, name: str) -> Any:
    """A block of two layers and their aggregation, under the gate of eSE."""
    first = conv(value, f"{name}.a", 8)
    second = conv(first, f"{name}.b", 8)
    every = ops.concat([one.output(0) for one in (value, first, second)], 1)
    maps = conv(every, f"{name}.last", 16, 1)
    mean = ops.reduce_mean(maps, ops.constant([2, 3]), True)
    gate = ops.hsigmoid(conv(mean, f"{name}.gate", 16, 1))
    return ops.multiply(maps, gate)


def network() -> Any:
    """uint8 pictures, a stem, two stages with a max-pool between them, and what chooses three."""
    images = ops.parameter([-1, SIDE, SIDE, 3], np.uint8, name="images")
    pixels = ops.convert(ops.transpose(images, ops.constant([0, 3, 1, 2])), np.float32)
    stem = conv(ops.subtract(pixels, ops.constant(np.float32(20))), "stem", 8, spread=0.02)
    stage = osa(stem, "one")
    pooled = ops.max_pool(stage, [2, 2], [1, 1], [0, 0], [0, 0], [2, 2])
    maps = osa(pooled, "two")
    logits = conv(maps, "head", 4, 1)
    flat = ops.reshape(logits, ops.constant([0, -1]), True)
    chosen = ops.topk(flat, ops.constant(3), 1, "max", "value")
    factor = ops.constant(np.full((1, 3), 0.5, np.float32))
    scaled = ops.multiply(chosen.output(0), factor, name="decode")
    after = ops.matmul(scaled, ops.constant(np.eye(3, dtype=np.float32)), False, False)
    after.set_friendly_name("after/matmul")
    logits.output(0).set_names({"maps"})
    after.output(0).set_names({"best"})
    return openvino.Model([logits, after], [images], "small")


def feeds(count: int, *, seed: int = 0, brightest: int = 256) -> list[dict[str, Any]]:
    random = np.random.default_rng(seed)
    shape = (1, SIDE, SIDE, 3)
    return [{"images": random.integers(0, brightest, shape, dtype=np.uint8)} for _ in range(count)]


def run(model: Any, given: dict[str, Any]) -> list[Any]:
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": "1"}
    found = openvino_core().compile_model(model, "CPU", options)(given)
    return [np.array(value) for value in found.values()]


def types_before(model: Any, kind: str) -> list[str]:
    return [
        node.input_value(0).get_node().get_type_name()
        for node in model.get_ordered_ops()
        if node.get_type_name() == kind
    ]


@pytest.fixture(scope="module")
def stock() -> Any:
    """Quantised as NNCF places the quantisers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int8, "place_behind_pools", lambda model: model)
        return int8.quantize(network(), feeds(4), keep_float=())


@pytest.fixture(scope="module")
def quantized(stock: Any) -> Any:
    return int8.place_behind_pools(stock.clone())


@pytest.fixture(scope="module")
def dark() -> Any:
    """Calibrated on dark pictures, and with a layer kept in float."""
    return int8.quantize(network(), feeds(2, brightest=60), keep_float=["one.b/conv"])


def test_quantisers_stand_behind_the_pools_and_nothing_changes(stock: Any, quantized: Any) -> None:
    assert types_before(stock, "MaxPool") == ["FakeQuantize"]
    assert types_before(quantized, "MaxPool") == ["Multiply"]
    (pool,) = (node for node in quantized.get_ordered_ops() if node.get_type_name() == "MaxPool")
    (behind,) = (one.get_node() for one in pool.output(0).get_target_inputs())
    assert behind.get_type_name() == "FakeQuantize"
    readers = {one.get_node().get_type_name() for one in behind.output(0).get_target_inputs()}
    assert readers == {"Convolution", "Concat"}
    for given in feeds(2, seed=1):
        for expected, found in zip(run(stock, given), run(quantized, given), strict=True):
            assert np.ptp(expected) > 0.01
            np.testing.assert_array_equal(found, expected)


def test_every_convolution_runs_in_int8(quantized: Any) -> None:
    compiled = openvino_core().compile_model(
        quantized, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": "1"}
    )
    in_int8, in_float = int8.layers_run(compiled)
    assert len(in_int8) == LAYERS
    assert [name for name in in_float if "gate" not in name] == []
    plain = openvino_core().compile_model(network(), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert int8.layers_run(plain)[0] == []


def test_it_answers_nearly_as_in_float(quantized: Any) -> None:
    (given,) = feeds(1, seed=2)
    expected, found = run(network(), given)[0], run(quantized, given)[0]
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert 1e-4 < error < 0.1


def test_what_follows_the_choice_stays_in_float(quantized: Any) -> None:
    outside = int8.float_part(network())
    assert {"decode", "after/matmul"} <= set(outside)
    assert not {"stem/conv", "one.gate/conv", "two.last/conv", "head/conv"} & set(outside)
    (matmul,) = (n for n in quantized.get_ordered_ops() if n.get_friendly_name() == "after/matmul")
    kinds = [matmul.input_value(index).get_node().get_type_name() for index in (0, 1)]
    assert kinds == ["Multiply", "Constant"]


def test_of_a_segmenter_the_masks_stay_in_float(exported_folder: Path) -> None:
    model = int8.read_network(exported_folder / OPENVINO_FILE)
    outside, names = set(int8.float_part(model)), int8.layer_names(model)
    layers = {
        node.get_friendly_name()
        for node in model.get_ordered_ops()
        if node.get_type_name() in int8.LAYERS
    }
    parts = {".".join(name.split(".")[:3]) for name in names.values()}
    assert parts == {f"detector.fcos.{part}" for part in ("backbone", "neck", "head")}
    assert len(layers & outside) == 10  # four and two convolutions, a deconvolution, three linear
    assert set(names) == layers - outside
    gates = [names[name] for name in int8.layers_of_pooled(model)]
    assert [name.rpartition("attn")[2] for name in gates] == [".fc"] * 4


def test_a_layer_can_be_kept_in_float(dark: Any) -> None:
    weights = {
        node.get_friendly_name(): node.input_value(1).get_node().get_type_name()
        for node in dark.get_ordered_ops()
        if node.get_type_name() == "Convolution"
    }
    kept_names = [name for name, kind in weights.items() if kind == "Constant"]
    assert kept_names == ["one.b/conv", "one.gate/conv", "two.gate/conv"]
    assert len(weights) == LAYERS + 2


def test_layers_are_called_by_their_weights() -> None:
    names = int8.layer_names(network())
    assert names["one.last/conv"] == "one.last"
    assert list(names.values())[-1] == "head"
    assert len(names) == LAYERS + 2


def test_errors_point_to_the_layer_that_clips(quantized: Any, dark: Any) -> None:
    """Ranges from dark pictures cut bright ones off at the first layer; those behind it follow."""
    model = network()
    right = int8.layer_errors(model, quantized, feeds(2, seed=3))
    assert len(right) == LAYERS
    assert all(1e-4 < error < 0.05 for error in right.values())
    # Seven bits of a weight: a step is 1/63 of the largest, its error evenly spread.
    weight = np.random.default_rng(sum(map(ord, "stem"))).normal(0, 0.02, (8, 3, 3, 3))
    steps = np.abs(weight).max(axis=(1, 2, 3)) / 63
    lone = np.sqrt((steps**2 / 12).mean() / np.square(weight).mean())
    assert right["stem/conv"] == pytest.approx(lone, rel=0.3)
    wrong = int8.layer_errors(model, dark, feeds(2, seed=3))
    assert min(wrong[name] / right[name] for name in wrong) > 0.9
    assert wrong["stem/conv"] > 10 * right["stem/conv"]


FRESH_PROCESS = """
import sys
seen = []
watched = ("socket.connect", "socket.getaddrinfo", "socket.sendto", "os.fork", "os.system")
# That of torch's own look at its compilers.
harmless = {"ldconfig", "which", "nvcc", "c++", "g++", "gcc"}
def watch(event, arguments):
    program = str(arguments[0]).rpartition("/")[2] if event == "subprocess.Popen" else ""
    if event in watched or (event == "subprocess.Popen" and program not in harmless):
        seen.append((event, str(arguments)[:80]))
        raise OSError("no network here")
sys.addaudithook(watch)
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_int8 as made
from vovnet.export import int8
model = int8.quantize(made.network(), made.feeds(2), keep_float=())
print(seen, "openvino_telemetry" in [n for n, m in sys.modules.items() if m is not None])
"""


def test_nothing_is_sent_and_nothing_written(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key not in ("CI", "NNCF_CI")}
    here = Path(__file__)
    source = str(here.parents[2] / "src")
    done = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS, str(here.parent)],
        env=environment
        | {
            "HOME": str(tmp_path),
            "TMPDIR": str(tmp_path),
            "PYTHONPATH": source,
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "[] False\n"), done.stderr
    assert done.stderr == ""
    assert list(tmp_path.rglob("*")) == []


def test_without_nncf_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(int8.ConfigError, match=r"expected nncf .* pip install 'vovnet\[export\]'"):
        int8.import_nncf()
