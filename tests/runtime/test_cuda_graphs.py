"""When a pass is recorded and what a replay gives; a made-up device records by remembering."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vovnet.runtime import cuda_graphs
from vovnet.runtime import torch as torch_engine
from vovnet.runtime.cuda_graphs import MOST_SHAPES, WARM_UPS, GraphedPass
from vovnet.runtime.torch import load, prepare_for_gpu

DEVICE = torch.device("cuda", 0)
PYRAMID = {f"p{level}" for level in range(3, 8)}


class Device:
    """Stands for torch.cuda: within `graph` a pass is run once and kept; a replay runs it again on
    the memory that it was recorded with.
    """

    def __init__(self, network: "Network") -> None:
        self.network = network
        self.events: list[str] = []
        self.recording: Any = None

    def current_stream(self, device: Any = None) -> Any:
        return SimpleNamespace(wait_stream=lambda other: self.events.append("wait"))

    Stream = current_stream

    def stream(self, stream: Any) -> Any:
        self.events.append("side")
        return nullcontext()

    def device(self, device: Any) -> Any:
        return nullcontext()

    def graph_pool_handle(self) -> str:
        return "pool"

    def Event(self) -> Any:  # noqa: N802
        done = lambda: self.events.append("done")  # noqa: E731
        return SimpleNamespace(wait=lambda: self.events.append("after"), record=done)

    def CUDAGraph(self) -> Any:  # noqa: N802
        return SimpleNamespace(replay=None)

    @contextmanager
    def graph(self, graph: Any, *, pool: str, capture_error_mode: str) -> Iterator[None]:
        assert (pool, capture_error_mode) == ("pool", "thread_local")
        self.events.append("record")
        yield
        inputs, found = self.network.last

        def replay() -> None:
            self.events.append("replay")
            for name, value in self.network.compute(*inputs).items():
                found[name].copy_(value)

        graph.replay = replay


class Network:
    def __init__(self) -> None:
        self.calls = 0
        self.fault = ""
        self.last: Any = None

    def compute(self, images: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        return {"sum": images.sum((1, 2)), "sizes": sizes * 2}

    def __call__(self, images: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        if self.fault and self.calls > WARM_UPS:
            raise RuntimeError(self.fault)
        self.last = (images, sizes), self.compute(images, sizes)
        return self.last[1]


@pytest.fixture
def network() -> Network:
    return Network()


@pytest.fixture
def device(network: Network, monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device(network)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda value, stream: None)
    monkeypatch.setattr(cuda_graphs, "torch", SimpleNamespace(cuda=device, Size=torch.Size))
    return device


def batch(side: int, value: int) -> tuple[Tensor, Tensor]:
    return torch.full((2, side, side), value), torch.full((2, 2), value)


def check(graphed: GraphedPass, side: int, value: int) -> dict[str, Tensor]:
    found = graphed(*batch(side, value))
    assert found["sum"].tolist() == [side * side * value] * 2
    assert found["sizes"].unique().tolist() == [2 * value]
    return found


def test_a_shape_is_recorded_after_its_first_batches(network: Network, device: Device) -> None:
    graphed = GraphedPass(network, DEVICE)
    for value in range(WARM_UPS):
        check(graphed, 4, value)
    assert (graphed.shapes, network.calls) == (0, WARM_UPS)
    assert device.events == ["wait", "side", "wait"] * WARM_UPS
    device.events.clear()
    for value in range(5, 9):
        check(graphed, 4, value)
    assert (graphed.shapes, network.calls) == (1, WARM_UPS + 1)
    assert device.events == ["record"] + ["after", "replay", "done"] * 4


def test_results_are_the_callers_own(network: Network, device: Device) -> None:
    graphed = GraphedPass(network, DEVICE)
    results = [check(graphed, 4, value) for value in range(8)]
    assert [result["sum"][0].item() for result in results] == [16 * value for value in range(8)]


def test_only_so_many_shapes_are_recorded(network: Network, device: Device) -> None:
    graphed = GraphedPass(network, DEVICE)
    for side in range(1, MOST_SHAPES + 4):
        for value in range(WARM_UPS + 2):
            check(graphed, side, value)
    assert graphed.shapes == MOST_SHAPES
    calls = network.calls
    check(graphed, 1, 3)  # recorded
    assert network.calls == calls
    check(graphed, MOST_SHAPES + 2, 3)  # not
    assert network.calls == calls + 1


def test_what_cannot_be_recorded_runs_aloud(network: Network, device: Device) -> None:
    graphed = GraphedPass(network, DEVICE)
    for value in range(WARM_UPS):
        check(graphed, 4, value)
    network.fault = "operation not permitted when stream is capturing\nmore"
    with (
        pytest.warns(RuntimeWarning, match="without CUDA graphs.*: operation not permitted"),
        pytest.raises(RuntimeError),  # the made-up network fails for good
    ):
        graphed(*batch(4, 1))
    network.fault = ""
    for side in (4, 5, 5, 5, 5, 5):
        check(graphed, side, 7)
    assert graphed.shapes == 0


def test_threads_take_turns(network: Network, device: Device) -> None:
    graphed = GraphedPass(network, DEVICE)
    wrong: list[int] = []

    def run(value: int) -> None:
        for _ in range(50):
            if graphed(*batch(4, value))["sum"].tolist() != [16 * value] * 2:
                wrong.append(value)

    threads = [threading.Thread(target=run, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert graphed.shapes == 1


class Remembering:
    """Stands for GraphedPass: runs each batch, and keeps the names of what comes out."""

    names: set[str]

    def __init__(self, run: Any, device: torch.device) -> None:
        self.run = run
        self.device = device

    def __call__(self, images: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = self.run(images, sizes)
        self.names = set(found)
        return found


@pytest.mark.parametrize(
    ("folder", "recorded", "precision"),
    [
        ("classifier_folder", {"logits", "embedding"}, "fp32"),
        ("classifier_folder", {"logits", "embedding"}, "bf16"),
        (
            "model_folder",
            {"logits", "distances", "centerness", "p3", "p4", "p5", "p6", "p7"},
            "bf16",
        ),
    ],
)
def test_what_is_recorded_and_that_it_changes_nothing(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    folder: str,
    recorded: set[str],
    precision: str,
) -> None:
    monkeypatch.setattr(torch_engine, "GraphedPass", Remembering)
    path: Path = request.getfixturevalue(folder)
    engine = load(path, precision=precision, device="cpu", threads=None, settings={})
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 96, 3), dtype=np.uint8)
    batch = images, np.array([[64, 90], [60, 96]])
    expected = engine.infer(*batch)
    prepare_for_gpu(engine)
    found = engine.infer(*batch)
    assert engine.graphed is not None
    assert engine.graphed.names == recorded  # type: ignore[attr-defined]
    assert found.keys() == expected.keys()
    assert all((found[name] == expected[name]).all() for name in expected)
    kinds = {part.weight.dtype for part in engine.graph.modules() if type(part) is torch.nn.Conv2d}
    assert kinds == {torch.bfloat16 if precision == "bf16" else torch.float32}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu() -> None:
    layer = torch.nn.Conv2d(3, 8, 3).cuda()

    def run(images: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        return {"y": layer(images).relu()}

    graphed = GraphedPass(run, torch.device("cuda"))
    sizes = torch.zeros(1, 2).cuda()
    with torch.inference_mode():
        for _ in range(WARM_UPS + 3):
            images = torch.randn(1, 3, 16, 16).cuda()
            torch.testing.assert_close(graphed(images, sizes)["y"], run(images, sizes)["y"])
    assert graphed.shapes == 1
