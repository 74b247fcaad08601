"""Times of one stage, summed up in milliseconds."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from vovnet.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Timings:
    """Median and spread of `count` measured times, in milliseconds."""

    count: int
    median_ms: float
    p10_ms: float
    p90_ms: float
    min_ms: float
    max_ms: float

    def to_dict(self) -> dict[str, float]:
        """Return the fields by name, as plain JSON numbers."""
        return asdict(self)

    def format(self) -> str:
        """Return one line: median, the 10th to 90th percentile, and the number of times."""
        return (
            f"{self.median_ms:.1f} ms "
            f"({self.p10_ms:.1f} to {self.p90_ms:.1f}, p10 to p90, n = {self.count})"
        )


def summary(times_s: Sequence[float]) -> Timings:
    """Sum up times given in seconds; percentiles are interpolated linearly.

    Raises ConfigError when there is no time, or one that is negative or not finite.
    """
    times_ms = np.asarray(times_s, np.float64) * 1000
    if times_ms.ndim != 1 or times_ms.size == 0:
        raise ConfigError(f"expected at least one time in seconds, got shape {times_ms.shape}")
    if not np.isfinite(times_ms).all() or (times_ms < 0).any():
        raise ConfigError(f"expected finite times of at least 0 s, got {list(times_s)}")
    p10, median, p90 = np.percentile(times_ms, [10, 50, 90])
    return Timings(
        count=times_ms.size,
        median_ms=float(median),
        p10_ms=float(p10),
        p90_ms=float(p90),
        min_ms=float(times_ms.min()),
        max_ms=float(times_ms.max()),
    )
