import json

import pytest

from vovnet.errors import ConfigError
from vovnet.profiling.latency import Timings, summary


def test_seconds_become_milliseconds() -> None:
    timings = summary([index / 1000 for index in range(101)])
    assert timings == Timings(
        count=101,
        median_ms=pytest.approx(50),
        p10_ms=pytest.approx(10),
        p90_ms=pytest.approx(90),
        min_ms=0.0,
        max_ms=pytest.approx(100),
    )
    assert timings.format() == "50.0 ms (10.0 to 90.0, p10 to p90, n = 101)"
    assert json.loads(json.dumps(timings.to_dict()))["count"] == 101


def test_one_time_has_no_spread() -> None:
    timings = summary([0.25])
    assert (timings.p10_ms, timings.median_ms, timings.p90_ms) == (250.0, 250.0, 250.0)


@pytest.mark.parametrize("times_s", [[], [-1.0], [float("nan")], [1.0, float("inf")]])
def test_times_that_are_none(times_s: list[float]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        summary(times_s)
