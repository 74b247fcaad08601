"""Times of one stage: warming up, measuring one after another, and summing up in milliseconds."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from vovnet.errors import ConfigError

Clock = Callable[[], float]

_MAX_AUTOCORRELATION = 0.9
_NORMAL_975 = 1.959964


@dataclass(frozen=True, slots=True)
class Timings:
    """Median and spread of `count` measured times, in milliseconds.

    median_low_ms to median_high_ms holds the true median with 95 % confidence. It comes from the
    order of the times alone (binomial), and is wider where neighbouring times resemble each other,
    because such times say less than independent ones.
    """

    count: int
    median_ms: float
    p10_ms: float
    p90_ms: float
    min_ms: float
    max_ms: float
    p99_ms: float
    iqr_ms: float
    median_low_ms: float
    median_high_ms: float

    def to_dict(self) -> dict[str, float]:
        """Return the fields by name, as plain JSON numbers."""
        return asdict(self)

    def format(self) -> str:
        """Return one line: median, the 10th to 90th percentile, and the number of times."""
        return (
            f"{self.median_ms:.1f} ms "
            f"({self.p10_ms:.1f} to {self.p90_ms:.1f}, p10 to p90, n = {self.count})"
        )

    def relative_error(self) -> float:
        """Half the width of the median's interval, as a share of the median; inf for a median 0."""
        if self.median_ms == 0:
            return math.inf
        return (self.median_high_ms - self.median_low_ms) / 2 / self.median_ms


@dataclass(frozen=True, slots=True)
class WarmUp:
    """What came before the first measured time; `stable` when the last times agreed."""

    count: int
    time_s: float
    stable: bool


def summary(times_s: Sequence[float]) -> Timings:
    """Sum up times given in seconds, in the order they were taken.

    Percentiles are interpolated linearly. Raises ConfigError when there is no time, or one that is
    negative or not finite.
    """
    times_ms = np.asarray(times_s, np.float64) * 1000
    if times_ms.ndim != 1 or times_ms.size == 0:
        raise ConfigError(f"expected at least one time in seconds, got shape {times_ms.shape}")
    if not np.isfinite(times_ms).all() or (times_ms < 0).any():
        raise ConfigError(f"expected finite times of at least 0 s, got {list(times_s)}")
    p10, p25, median, p75, p90, p99 = np.percentile(times_ms, [10, 25, 50, 75, 90, 99])
    low, high = _median_interval(times_ms)
    return Timings(
        count=times_ms.size,
        median_ms=float(median),
        p10_ms=float(p10),
        p90_ms=float(p90),
        min_ms=float(times_ms.min()),
        max_ms=float(times_ms.max()),
        p99_ms=float(p99),
        iqr_ms=float(p75 - p25),
        median_low_ms=low,
        median_high_ms=high,
    )


def warm_up(
    run: Callable[[], object],
    *,
    max_s: float = 10.0,
    tolerance: float = 0.1,
    clock: Clock = time.perf_counter,
) -> WarmUp:
    """Call `run` until its times are stable: the last three are, by median, as fast as the three
    before them within `tolerance`, or `max_s` seconds are over after the first call.
    """
    times_s: list[float] = []
    start_s = clock()
    while True:
        before_s = clock()
        run()
        after_s = clock()
        times_s.append(after_s - before_s)
        if len(times_s) >= 6:
            last, earlier = np.median(times_s[-3:]), np.median(times_s[-6:-3])
            if last >= earlier * (1 - tolerance):
                return WarmUp(len(times_s), after_s - start_s, True)
        if after_s - start_s >= max_s:
            return WarmUp(len(times_s), after_s - start_s, False)


def _median_interval(times_ms: NDArray[np.float64]) -> tuple[float, float]:
    """Two of the times that hold the true median with 95 %, by the binomial's normal limit."""
    count = times_ms.size
    independent = max(count * _independence(times_ms), 1.0)
    share = _NORMAL_975 / (2 * math.sqrt(independent))
    ordered = np.sort(times_ms)
    low = max(math.floor(count * (0.5 - share)), 0)
    high = min(math.ceil(count * (0.5 + share)), count - 1)
    return float(ordered[low]), float(ordered[high])


def _independence(times_ms: NDArray[np.float64]) -> float:
    """Share of the times that count as independent, by the ranks' correlation with the next one."""
    if times_ms.size < 8:
        return 1.0
    ranks = times_ms.argsort(kind="stable").argsort(kind="stable").astype(np.float64)
    centred = ranks - ranks.mean()
    lag_one = float((centred[1:] * centred[:-1]).sum() / (centred**2).sum())
    correlation = min(max(lag_one, 0.0), _MAX_AUTOCORRELATION)
    return (1 - correlation) / (1 + correlation)
