import json

import numpy as np
import pytest

from vovnet.errors import ConfigError
from vovnet.profiling.latency import summary, warm_up


class FakeClock:
    """A clock that moves only when a run takes its time."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_seconds_become_milliseconds() -> None:
    timings = summary([index / 1000 for index in range(101)])
    assert timings.count == 101
    assert timings.median_ms == pytest.approx(50)
    assert (timings.p10_ms, timings.p90_ms) == (pytest.approx(10), pytest.approx(90))
    assert timings.p99_ms == pytest.approx(99)
    assert timings.iqr_ms == pytest.approx(50)
    assert (timings.min_ms, timings.max_ms) == (0.0, pytest.approx(100))
    assert timings.format() == "50.0 ms (10.0 to 90.0, p10 to p90, n = 101)"
    assert json.loads(json.dumps(timings.to_dict()))["count"] == 101


def test_one_time_has_no_spread() -> None:
    timings = summary([0.25])
    assert (timings.p10_ms, timings.median_ms, timings.p90_ms) == (250.0, 250.0, 250.0)
    assert (timings.median_low_ms, timings.median_high_ms) == (250.0, 250.0)


@pytest.mark.parametrize("times_s", [[], [-1.0], [float("nan")], [1.0, float("inf")]])
def test_times_that_are_none(times_s: list[float]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        summary(times_s)


def test_the_interval_holds_the_true_median_as_often_as_it_says() -> None:
    """600 samples of 40 skewed times with the median 20 ms: about 95 of 100 intervals hold it."""
    rng = np.random.default_rng(0)
    samples = rng.exponential(0.02 / np.log(2), (600, 40))
    intervals = [(s.median_low_ms, s.median_high_ms) for s in map(summary, samples)]
    share = np.mean([low <= 20 <= high for low, high in intervals])
    assert 0.93 <= share <= 0.99


def test_times_that_follow_each_other_give_a_wider_interval() -> None:
    """A machine that drifts says less: the same times sorted in time have a wider interval."""
    times_s = np.random.default_rng(1).normal(0.1, 0.01, 200)
    drifting = summary(np.sort(times_s))
    assert drifting.median_ms == summary(times_s).median_ms
    assert drifting.relative_error() > 2 * summary(times_s).relative_error()


def test_warm_up_ends_when_times_stop_falling() -> None:
    clock = FakeClock()
    times_s = iter([8.0, 4.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])

    def run() -> None:
        clock.now_s += next(times_s)

    found = warm_up(run, max_s=100.0, clock=clock)
    # The last three and the three before them agree for the first time after eight calls.
    assert (found.count, found.time_s, found.stable) == (8, 19.0, True)


def test_warm_up_gives_up_after_its_time() -> None:
    clock = FakeClock()
    times_s = iter(100 * 0.5**index for index in range(100))

    def run() -> None:
        clock.now_s += next(times_s)

    found = warm_up(run, max_s=180.0, clock=clock)
    assert (found.count, found.stable) == (4, False)
