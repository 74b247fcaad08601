import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from vovnet.errors import ConfigError
from vovnet.hardware import processor_name
from vovnet.profiling import roofline
from vovnet.profiling.roofline import (
    Ceilings,
    Workload,
    find_ceilings,
    measure_bytes_per_s,
    measure_flops_per_s,
    place,
    time_layers,
)

CPU = torch.device("cpu")
SMALL = Workload(matrices=(8, 64), images=1, copy_bytes=4096, repeat_s=0.0)
CEILINGS = Ceilings(
    device="x",
    threads=1,
    cores=1,
    torch="2",
    date="2026-11-22",
    bytes_per_s=10.0,
    flops_per_s={"fp32": 100.0, "bf16": 1000.0},
)


class FakeTime:
    """One second passes between any two looks at the clock."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def perf_counter(self) -> float:
        self.now_s += 1.0
        return self.now_s


@pytest.mark.parametrize(
    ("flops", "memory_bytes", "precision", "ceiling", "bound"),
    [
        (400, 8, "fp32", 100.0, "compute"),  # 50 flops a byte: 500 by memory, 100 by compute
        (40, 8, "fp32", 50.0, "memory"),  # 5 flops a byte
        (400, 8, "bf16", 500.0, "memory"),
        (80, 8, "fp32", 100.0, "compute"),  # the ridge itself
    ],
)
def test_place(flops: int, memory_bytes: int, precision: str, ceiling: float, bound: str) -> None:
    placed = place(
        "a",
        "conv",
        time_s=8.0,
        flops=flops,
        memory_bytes=memory_bytes,
        ceilings=CEILINGS,
        precision=precision,
    )
    assert (placed.ceiling_flops_per_s, placed.bound) == (ceiling, bound)
    assert placed.intensity == flops / memory_bytes
    assert placed.achieved_flops_per_s == flops / 8
    assert placed.of_ceiling == pytest.approx(flops / 8 / ceiling)
    assert placed.time_ms == 8000


def test_place_needs_time_and_bytes() -> None:
    with pytest.raises(ConfigError, match="above 0"):
        place("a", "conv", time_s=0, flops=1, memory_bytes=1, ceilings=CEILINGS, precision="fp32")


def test_rates_are_work_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every piece takes one second by this clock, so the largest piece of work is the rate."""
    monkeypatch.setattr(roofline, "time", FakeTime())
    convolution = 2 * 56 * 56 * 128 * 128 * 9
    assert measure_flops_per_s(CPU, torch.float32, SMALL) == convolution
    larger = Workload(matrices=(1024,), images=1, copy_bytes=4096, repeat_s=0.0)
    assert measure_flops_per_s(CPU, torch.float32, larger) == 2 * 1024**3
    assert measure_bytes_per_s(CPU, SMALL) == 2 * 4096


def test_layers_are_timed_by_name_over_all_their_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeTime()
    monkeypatch.setattr(roofline, "time", clock)

    class Slow(nn.Module):
        def __init__(self, seconds: float) -> None:
            super().__init__()
            self.seconds = seconds

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            clock.now_s += self.seconds
            return x

    shared, single, unused = Slow(10.0), Slow(100.0), Slow(1.0)

    def run() -> None:
        shared(single(shared(torch.zeros(1))))

    layers = {"shared": shared, "single": single, "unused": unused}
    found = time_layers(run, layers, device=CPU, rounds=3)
    assert found == {"shared": 22.0, "single": 101.0}
    assert not shared._forward_hooks
    assert not shared._forward_pre_hooks


def test_ceilings_are_measured_once_and_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = find_ceilings(CPU, ["fp32"], folder=tmp_path, workload=SMALL)
    assert first.device == processor_name()
    assert first.bytes_per_s > 0
    (path,) = tmp_path.iterdir()
    assert str(torch.get_num_threads()) in path.stem
    monkeypatch.setattr(roofline, "measure_bytes_per_s", lambda *_: math.nan)
    monkeypatch.setattr(roofline, "measure_flops_per_s", lambda *_: 7.0)
    assert find_ceilings(CPU, ["fp32"], folder=tmp_path, workload=SMALL) == first
    # Another precision is added to what is known.
    both = find_ceilings(CPU, ["fp32", "bf16"], folder=tmp_path, workload=SMALL)
    assert both.flops_per_s == {**first.flops_per_s, "bf16": 7.0}
    assert both.bytes_per_s == first.bytes_per_s
    monkeypatch.setattr(roofline, "measure_bytes_per_s", lambda *_: 5.0)
    afresh = find_ceilings(CPU, ["fp32"], folder=tmp_path, workload=SMALL, afresh=True)
    assert (afresh.bytes_per_s, afresh.flops_per_s) == (5.0, {"fp32": 7.0})


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"device": "other"}', '{"flops_per_s": 3}', "null"]
)
def test_a_spoilt_cache_is_measured_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str
) -> None:
    monkeypatch.setattr(roofline, "measure_bytes_per_s", lambda *_: 5.0)
    monkeypatch.setattr(roofline, "measure_flops_per_s", lambda *_: 7.0)
    find_ceilings(CPU, ["fp32"], folder=tmp_path)
    (path,) = tmp_path.iterdir()
    known = json.loads(path.read_text())
    for spoilt in (content, json.dumps({**known, "device": "other"})):
        path.write_text(spoilt)
        assert find_ceilings(CPU, ["fp32"], folder=tmp_path).bytes_per_s == 5.0
        assert json.loads(path.read_text())["device"] == processor_name()


def test_a_cache_that_cannot_be_written_stops_nobody(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(roofline, "measure_bytes_per_s", lambda *_: 5.0)
    monkeypatch.setattr(roofline, "measure_flops_per_s", lambda *_: 7.0)
    (tmp_path / "file").write_text("")
    assert find_ceilings(CPU, ["fp32"], folder=tmp_path / "file").bytes_per_s == 5.0


def test_an_unknown_precision(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="precision: expected one of fp32, bf16, fp16"):
        find_ceilings(CPU, ["fp8"], folder=tmp_path)
