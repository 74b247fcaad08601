"""Batches through an engine: order, what is in flight, exceptions, an early end."""

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from vovnet.runtime.stream import Batch, infer_stream


class Engine:
    """Gives the first pixel of a batch back, after the milliseconds that its size says."""

    def __init__(self, parallel: int) -> None:
        self.parallel = parallel
        self.running, self.done = 0, []
        self._lock = threading.Lock()

    def infer(self, images: np.ndarray, sizes: np.ndarray) -> dict[str, np.ndarray]:
        number = int(images[0, 0, 0, 0])
        with self._lock:
            self.running += 1
        time.sleep(sizes[0, 0] / 1e3)
        with self._lock:
            self.running -= 1
            self.done.append(number)
        if sizes[0, 1] < 0:
            raise RuntimeError(f"batch {number}")
        return {"number": images[:, 0, 0, 0]}


def batch(number: int, *, wait_ms: int = 1, bad: bool = False) -> Batch:
    return np.full((1, 2, 2, 3), number, np.uint8), np.array([[wait_ms, -1 if bad else 1]])


def numbers(engine: Engine, batches: Iterator[Batch] | list[Batch]) -> list[int]:
    return [int(found["number"][0]) for found in infer_stream(engine, batches)]


class BackwardsEngine(Engine):
    """Of each `parallel` batches the last is done first: they have to run at the same time."""

    def __init__(self, parallel: int, count: int) -> None:
        super().__init__(parallel)
        self._ends = [threading.Event() for _ in range(count)]

    def infer(self, images: np.ndarray, sizes: np.ndarray) -> dict[str, np.ndarray]:
        number = int(images[0, 0, 0, 0])
        if (number + 1) % self.parallel:
            assert self._ends[number + 1].wait(60), f"batch {number + 1} has not begun"
        found = super().infer(images, sizes)
        self._ends[number].set()
        return found


@pytest.mark.parametrize("parallel", [1, 2, 5])
def test_results_come_in_order_whatever_finishes_first(parallel: int) -> None:
    engine = BackwardsEngine(parallel, 10)
    assert numbers(engine, [batch(number) for number in range(10)]) == list(range(10))
    backwards = sorted(range(10), key=lambda number: (number // parallel, -number))
    assert engine.done == backwards


@pytest.mark.parametrize("parallel", [1, 3])
def test_no_more_are_taken_than_run_and_one(parallel: int) -> None:
    taken: list[int] = []

    def batches() -> Iterator[Batch]:
        for number in range(12):
            taken.append(number)
            yield batch(number)

    for done, _ in enumerate(infer_stream(Engine(parallel), batches()), start=1):
        assert len(taken) <= done + parallel
    assert len(taken) == done == 12


def test_the_next_is_made_while_the_network_runs() -> None:
    made = [threading.Event() for _ in range(4)]

    class WaitingEngine(Engine):
        def infer(self, images: np.ndarray, sizes: np.ndarray) -> dict[str, np.ndarray]:
            following = int(images[0, 0, 0, 0]) + 1
            assert made[min(following, 3)].wait(60), f"batch {following} was not made"
            return super().infer(images, sizes)

    def batches() -> Iterator[Batch]:
        for number in range(4):
            made[number].set()
            yield batch(number)

    assert numbers(WaitingEngine(1), batches()) == [0, 1, 2, 3]


def test_batches_are_made_in_the_callers_thread() -> None:
    threads = []

    def batches() -> Iterator[Batch]:
        threads.append(threading.current_thread())
        yield batch(0)

    assert numbers(Engine(3), batches()) == [0]
    assert threads == [threading.main_thread()]


@pytest.mark.parametrize("parallel", [1, 3])
def test_an_exception_comes_in_its_turn(parallel: int) -> None:
    engine = Engine(parallel)
    stream = infer_stream(engine, [batch(number, bad=number == 2) for number in range(20)])
    assert [int(next(stream)["number"][0]) for _ in range(2)] == [0, 1]
    with pytest.raises(RuntimeError, match="batch 2"):
        next(stream)
    assert next(stream, None) is None
    assert (engine.running, len(engine.done) <= 3 + parallel) == (0, True)


@pytest.mark.parametrize("parallel", [1, 3])
def test_an_exception_of_the_making_comes_after_the_results_before(parallel: int) -> None:
    def batches() -> Iterator[Batch]:
        yield batch(0, wait_ms=20)
        yield batch(1)
        raise OSError("no more")

    stream = infer_stream(Engine(parallel), batches())
    assert [int(next(stream)["number"][0]) for _ in range(2)] == [0, 1]
    with pytest.raises(OSError, match="no more"):
        next(stream)


@pytest.mark.parametrize("parallel", [1, 3])
def test_an_early_end_leaves_nothing_running(parallel: int) -> None:
    engine, before = Engine(parallel), threading.active_count()
    stream = infer_stream(engine, [batch(number, wait_ms=30) for number in range(20)])
    next(stream)
    stream.close()
    done = len(engine.done)
    assert (engine.running, threading.active_count()) == (0, before)
    time.sleep(0.08)
    assert len(engine.done) == done <= 1 + parallel


def test_nothing_in_nothing_out() -> None:
    assert numbers(Engine(2), []) == []
