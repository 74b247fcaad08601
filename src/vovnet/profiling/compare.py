"""Several things timed in one run: rounds in random order, so that ratios survive a noisy machine.

What slows the machine down slows all members of a round, and cancels in their ratio; what is timed
in separate runs does not compare.
"""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vovnet.errors import ConfigError
from vovnet.profiling.latency import Clock, Timings, WarmUp, summary, warm_up

_CHECK_EVERY = 10
_RESAMPLES = 2000
# Below this, the caches that another member has emptied would be part of the figure.
_SETTLE_BELOW_S = 0.1


@dataclass(frozen=True, slots=True)
class Sampling:
    """When measuring ends: not before min_rounds; then once every figure is known to `precision`
    (half the width of its 95 % interval, as a share of it), or after max_s seconds.
    """

    min_rounds: int = 30
    max_s: float = 60.0
    precision: float = 0.05
    warm_up_s: float = 10.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.min_rounds < 1 or not self.max_s >= 0 or not 0 < self.precision < 1:
            raise ConfigError(
                "sampling: expected min_rounds >= 1, max_s >= 0 and a precision in 0..1, "
                f"got {self.min_rounds}, {self.max_s} and {self.precision}"
            )


@dataclass(frozen=True, slots=True)
class Ratio:
    """Time of one member over that of the baseline: the median over rounds, with 95 % interval."""

    name: str
    baseline: str
    ratio: float
    low: float
    high: float
    rounds: int
    within: bool  # the interval is as narrow as was asked for
    sizes: str = ""  # what both ran on, where that differs

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name, as plain JSON types."""
        return asdict(self)

    def format(self) -> str:
        """Return one line that says when the interval stayed too wide, and where sizes differ."""
        wide = "" if self.within else "; the interval stayed wider than asked for"
        return (
            f"{self.name} / {self.baseline}: {self.ratio:.3f} "
            f"({self.low:.3f} to {self.high:.3f}, n = {self.rounds}{wide})"
            + (f", of other sizes: {self.sizes}" if self.sizes else "")
        )


@dataclass(frozen=True, slots=True)
class Comparison:
    """Times of each member over the same rounds, and ratios to the first member."""

    times_s: Mapping[str, tuple[float, ...]]
    warm_ups: Mapping[str, WarmUp]
    ratios: tuple[Ratio, ...]
    failures: Mapping[str, Exception] = field(default_factory=dict)

    def timings(self, name: str) -> Timings:
        """Median and spread of one member."""
        return summary(self.times_s[name])


def interleave(
    members: Mapping[str, Callable[[], object]],
    sampling: Sampling | None = None,
    *,
    clock: Clock = time.perf_counter,
    tolerate: tuple[type[Exception], ...] = (),
) -> Comparison:
    """Time the members by turns, each round in another random order; the first is the baseline.

    A member ends only when its device has finished. One that raises an exception of `tolerate`
    leaves the comparison and is named in its failures. Raises ConfigError when there is no member.
    """
    if not members:
        raise ConfigError("expected at least one thing to time, got none")
    sampling = sampling or Sampling()
    active = dict(members)
    failures: dict[str, Exception] = {}
    warm_ups: dict[str, WarmUp] = {}
    for name, run in members.items():
        try:
            warm_ups[name] = warm_up(run, max_s=sampling.warm_up_s, clock=clock)
        except tolerate as error:
            failures[name] = error
            del active[name]
    times_s = _rounds(active, warm_ups, sampling, clock, failures, tolerate)
    kept = {name: tuple(times_s[name]) for name in members if name not in failures}
    return Comparison(kept, warm_ups, tuple(_ratios(kept, sampling)), failures)


def ratio_interval(
    times_s: Sequence[float], baseline_s: Sequence[float], *, seed: int = 0
) -> tuple[float, float, float]:
    """Median of the paired ratios with its 95 % bootstrap interval over rounds.

    Raises ConfigError unless there are as many times of one as of the other, all above 0.
    """
    over, under = np.asarray(times_s, np.float64), np.asarray(baseline_s, np.float64)
    if over.shape != under.shape or over.ndim != 1 or over.size == 0:
        raise ConfigError(f"expected pairs of times, got {over.shape} and {under.shape}")
    if (over <= 0).any() or (under <= 0).any():
        raise ConfigError("expected times above 0 s: the clock is too coarse for what was timed")
    ratios = over / under
    drawn: NDArray[np.float64] = np.random.default_rng(seed).choice(
        ratios, (_RESAMPLES, ratios.size)
    )
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    return float(np.median(ratios)), float(low), float(high)


def _rounds(
    active: dict[str, Callable[[], object]],
    warm_ups: Mapping[str, WarmUp],
    sampling: Sampling,
    clock: Clock,
    failures: dict[str, Exception],
    tolerate: tuple[type[Exception], ...],
) -> dict[str, list[float]]:
    order = random.Random(sampling.seed)
    times_s: dict[str, list[float]] = {name: [] for name in active}
    start_s = clock()
    for number in range(1, 1_000_000):
        for name in order.sample(sorted(active), len(active)):
            warm = warm_ups[name]
            settle = len(active) > 1 and warm.time_s / warm.count < _SETTLE_BELOW_S
            try:
                times_s[name].append(_timed(active[name], settle, clock))
            except tolerate as error:
                failures[name] = error
                del active[name], times_s[name]
        over = clock() - start_s >= sampling.max_s
        if number >= sampling.min_rounds and (
            over or (number % _CHECK_EVERY == 0 and _is_precise(times_s, sampling))
        ):
            break
    return times_s


def _timed(run: Callable[[], object], settle: bool, clock: Clock) -> float:
    if settle:
        run()
    before_s = clock()
    run()
    return clock() - before_s


def _is_precise(times_s: Mapping[str, Sequence[float]], sampling: Sampling) -> bool:
    single = all(
        summary(times).relative_error() <= sampling.precision for times in times_s.values()
    )
    if len(times_s) < 2:
        return single
    return all(ratio.within for ratio in _ratios(times_s, sampling))


def _ratios(times_s: Mapping[str, Sequence[float]], sampling: Sampling) -> list[Ratio]:
    names = list(times_s)
    found = []
    for name in names[1:]:
        ratio, low, high = ratio_interval(times_s[name], times_s[names[0]], seed=sampling.seed)
        within = (high - low) / 2 <= sampling.precision * ratio
        found.append(Ratio(name, names[0], ratio, low, high, len(times_s[name]), within))
    return found
