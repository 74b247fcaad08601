"""Timing engines against each other, and the file of what was found."""

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import date, timedelta
from functools import partial
from pathlib import Path

import pytest

from vovnet.runtime import measured as module
from vovnet.runtime.measured import (
    BUSY_LOAD,
    MAX_ENTRIES,
    MAX_ROUNDS,
    Measured,
    is_busy,
    keep_measured,
    measurement_key,
    time_engines,
)
from vovnet.runtime.measured import find_measured as found_on

FILES = {"openvino": ["a" * 64, "b" * 64], "onnxruntime": ["c" * 64]}
TODAY = date(2026, 11, 22)
FOUND = Measured(
    ms_per_image={"openvino": 6.04, "onnxruntime": 4.11},
    precisions={"openvino": "int8", "onnxruntime": "fp32"},
    date=TODAY.isoformat(),
)
find_measured = partial(found_on, today=TODAY)


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The file that is kept; it does not exist yet."""
    monkeypatch.setattr(module, "cache_folder", lambda: tmp_path / "made" / "vovnet")
    return tmp_path / "made" / "vovnet" / "engines.json"


class Machine:
    """A clock that the runs themselves move on."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.calls = ""

    def run(self, name: str, *seconds: float) -> Callable[[], None]:
        """Takes the given times one after the other, the last of them from then on."""
        times = list(seconds)

        def run() -> None:
            self.calls += name
            self.now_s += times.pop(0) if len(times) > 1 else times[0]

        return run

    def clock(self) -> float:
        return self.now_s


def test_the_second_of_two_counts_by_turns_after_a_warm_up() -> None:
    machine = Machine()
    runs = {"a": machine.run("a", 9e-3, 8e-3, 7e-3, 1e-3), "b": machine.run("b", 2e-3)}
    found = time_engines(runs, clock=machine.clock)
    assert found == {"a": pytest.approx(1), "b": pytest.approx(2)}
    assert machine.calls == "aabb" * MAX_ROUNDS


def test_the_median_is_taken() -> None:
    machine = Machine()
    uneven = [1e-3, 1e-3] + [1e-3, 5e-3] + [1e-3, 90e-3] + [1e-3, 3e-3] * MAX_ROUNDS
    assert time_engines({"a": machine.run("a", *uneven)}, clock=machine.clock)["a"] == (
        pytest.approx(3)
    )


@pytest.mark.parametrize(("seconds", "rounds"), [(0.01, 20), (0.06, 5), (0.2, 2), (30.0, 1)])
def test_slow_networks_get_fewer_rounds(seconds: float, rounds: int) -> None:
    machine = Machine()
    runs = {"a": machine.run("a", seconds), "b": machine.run("b", seconds)}
    assert time_engines(runs, clock=machine.clock)["b"] == pytest.approx(1e3 * seconds)
    assert machine.calls == "aabb" * rounds


def test_what_was_kept_is_found(cache: Path) -> None:
    key = measurement_key(FILES, precision="auto", threads=2)
    assert find_measured(key) is None
    keep_measured(key, FOUND)
    assert find_measured(key) == FOUND
    assert (FOUND.fastest, [cache]) == ("onnxruntime", list(cache.parent.iterdir()))
    assert FOUND.describe() == (
        "4.1 ms a picture (fp32) against 6.0 in openvino (int8), measured on this machine on "
        "2026-11-22"
    )


@pytest.mark.parametrize(
    ("busy", "days", "counts"),
    [
        (False, 0, True),
        (False, 30, True),
        (False, 31, False),
        (False, -1, False),  # a clock that was wrong
        (True, 0, True),
        (True, 1, False),
    ],
)
def test_what_is_old_or_of_a_busy_machine_is_measured_again(
    cache: Path, busy: bool, days: int, counts: bool
) -> None:
    key = measurement_key(FILES, precision="auto", threads=None)
    kept = FOUND.model_copy(update={"busy": busy})
    keep_measured(key, kept)
    found = found_on(key, today=TODAY + timedelta(days=days))
    assert found == (kept if counts else None)
    assert kept.describe().endswith("2026-11-22, while it was busy" if busy else "2026-11-22")


def test_a_machine_is_busy_from_half_a_core_for_each_core_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "available_cores", lambda: 4)
    for load, busy in ((4 * BUSY_LOAD, True), (4 * BUSY_LOAD - 0.1, False)):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 9.0, 9.0), raising=False)
        assert is_busy() == busy
    monkeypatch.delattr(os, "getloadavg")
    assert not is_busy()


def test_another_machine_file_or_wish_is_another_key(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_measured(measurement_key(FILES, precision="auto", threads=None), FOUND)
    others = [
        measurement_key(FILES | {"onnxruntime": ["d" * 64]}, precision="auto", threads=None),
        measurement_key(FILES | {"openvino": ["a" * 64]}, precision="auto", threads=None),
        measurement_key(FILES, precision="fp32", threads=None),
        measurement_key(FILES, precision="auto", threads=1),
    ]
    for name, value in (
        ("processor_name", lambda: "Other"),
        ("available_cores", lambda: 999),
        ("package_version", lambda name: f"{name} 9"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, value)
            others.append(measurement_key(FILES, precision="auto", threads=None))
    assert [find_measured(key) for key in others] == [None] * 7
    assert find_measured(measurement_key(FILES, precision="auto", threads=None)) == FOUND


def test_the_file_keeps_the_newest(cache: Path) -> None:
    keys = [{"sha256": FILES, "number": number} for number in range(MAX_ENTRIES + 3)]
    cache.parent.mkdir(parents=True)
    entry = {"measured": FOUND.model_dump()}
    cache.write_text(json.dumps([{"key": key, **entry} for key in keys[:-1]]))
    keep_measured(keys[5], FOUND)
    keep_measured(keys[-1], FOUND)
    numbers = [entry["key"]["number"] for entry in json.loads(cache.read_text())]
    assert numbers == [3, 4, *range(6, MAX_ENTRIES + 2), 5, MAX_ENTRIES + 2]


@pytest.mark.parametrize(
    "content",
    ["", "{", "3", '{"a": 1}', "[1, null]", "[" * 100_000, "[{}]", '[{"key": "KEY"}]'],
)
def test_a_broken_file_is_measured_again(cache: Path, content: str) -> None:
    cache.parent.mkdir(parents=True)
    key = measurement_key(FILES, precision="auto", threads=None)
    cache.write_text(content.replace('"KEY"', json.dumps(key)))
    assert find_measured(key) is None
    keep_measured(key, FOUND)
    assert find_measured(key) == FOUND


@pytest.mark.parametrize(
    "change",
    [
        {"ms_per_image": {"openvino": 1.0}},
        {"ms_per_image": {"openvino": 1.0, "onnxruntime": -1.0}},
        {"ms_per_image": {"openvino": 1.0, "onnxruntime": float("inf")}},
        {"ms_per_image": {"openvino": 1.0, "onnxruntime": "2"}},
        {
            "ms_per_image": {"openvino": 1.0, "../../evil": 0.5},
            "precisions": {"openvino": "fp32", "../../evil": "fp32"},
        },
        {"precisions": {"openvino": "fp32"}},
        {"date": 3},
        {"date": "today"},
        {"date": "2026-11-99"},
        {"colour": "blue"},
    ],
)
def test_an_entry_that_is_none_of_ours_is_passed_over(cache: Path, change: dict) -> None:
    key = measurement_key(FILES, precision="auto", threads=None)
    cache.parent.mkdir(parents=True)
    right = FOUND.model_dump()
    cache.write_text(json.dumps([{"key": key, "measured": right | change}]))
    assert find_measured(key) is None
    cache.write_text(json.dumps([{"key": key, "measured": right}]))
    assert find_measured(key) == FOUND


def test_a_place_that_cannot_be_written_keeps_nobody_from_anything(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder" / "engines.json").mkdir(parents=True)
    key = measurement_key(FILES, precision="auto", threads=None)
    for place in ("file", "folder"):
        monkeypatch.setattr(module, "cache_folder", lambda place=place: tmp_path / place)
        keep_measured(key, FOUND)
        assert find_measured(key) is None


def test_many_at_once_leave_a_whole_file(cache: Path) -> None:
    keys = [{"sha256": FILES, "number": number} for number in range(24)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: keep_measured(key, FOUND), keys))
    kept = [key for key in keys if find_measured(key) == FOUND]
    assert 1 <= len(kept) == len(json.loads(cache.read_text()))
    assert list(cache.parent.iterdir()) == [cache]
