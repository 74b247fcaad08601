"""Which model to take: the most accurate of those that fit a budget on this machine."""

from collections.abc import Sequence
from dataclasses import dataclass

from vovnet.profiling.energy import EnergyResult
from vovnet.profiling.latency import Timings
from vovnet.profiling.records import Accuracy


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A model folder with what was measured of it here; `time` is of one image."""

    name: str
    accuracy: Accuracy | None = None
    time: Timings | None = None
    energy: EnergyResult | None = None
    engine: str | None = None
    precision: str | None = None
    image_size: tuple[int, int] | None = None
    """Height and width in pixels of the picture that was timed."""
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """A candidate, and why it fell out: no reason for one that fits."""

    candidate: Candidate
    reasons: tuple[str, ...]


def rank(
    candidates: Sequence[Candidate], *, max_ms: float | None = None, max_joules: float | None = None
) -> list[Choice]:
    """Those that fit, most accurate first, then those that do not, nearest to fitting first.

    A time fits when the upper end of its median's interval does, joules when the largest window
    does; what cannot be measured or has no accuracy does not fit. Figures of different data sets
    do not compare: the reader sees which each is of.
    """
    choices = [Choice(one, tuple(_reasons(one, max_ms, max_joules))) for one in candidates]
    return sorted(choices, key=_order)


def chosen(choices: Sequence[Choice]) -> Candidate | None:
    """The first of ranked choices, None where that does not fit."""
    return choices[0].candidate if choices and not choices[0].reasons else None


def verdict(choices: Sequence[Choice], task: str) -> str:
    """One line on ranked choices: which model to take and why, or why none."""
    best = chosen(choices)
    if not choices:
        return f"chosen: none (no model to {task} was given)"
    if best is None:
        nearest = choices[0]
        return f"chosen: none ({nearest.candidate.name}: {'; '.join(nearest.reasons)})"
    fitting = [choice.candidate for choice in choices if not choice.reasons]
    why = "the only one that fits"
    if len(fitting) > 1:
        why = f"the most accurate of {len(fitting)} that fit"
        figures = {(one.accuracy.metric, one.accuracy.data) for one in fitting if one.accuracy}
        if len(figures) > 1:
            why += ", by accuracies of different data or metrics, which --data would compare"
    facts = [best.accuracy.format()] if best.accuracy else []
    facts += [f"{best.time.median_ms:.1f} ms an image"] if best.time else []
    return f"chosen: {best.name} ({why}: {', '.join(facts)})"


def _order(choice: Choice) -> tuple[int, float, float]:
    accuracy, time = choice.candidate.accuracy, choice.candidate.time
    value = -accuracy.value if accuracy else 0.0
    time_ms = time.median_ms if time else float("inf")
    return (1, time_ms, value) if choice.reasons else (0, value, time_ms)


def _reasons(one: Candidate, max_ms: float | None, max_joules: float | None) -> list[str]:
    if one.error is not None:
        return [one.error]
    reasons = []
    if one.accuracy is None:
        reasons.append("no recorded accuracy (give --data to measure it)")
    if max_ms is not None and one.time is None:
        reasons.append("its time was not measured")
    elif max_ms is not None and one.time is not None and one.time.median_high_ms > max_ms:
        reasons.append(_slow(one.time, max_ms))
    if max_joules is not None:
        reasons += _costly(one.energy, max_joules)
    return reasons


def _slow(time: Timings, max_ms: float) -> str:
    interval = f"95 % {time.median_low_ms:.1f} to {time.median_high_ms:.1f} ms"
    if time.median_ms <= max_ms:
        return f"not surely fast enough: {time.median_ms:.1f} ms, {interval}"
    return (
        f"too slow by {time.median_ms - max_ms:.1f} ms ({time.median_ms / max_ms:.3g} x the limit; "
        f"{interval})"
    )


def _costly(energy: EnergyResult | None, max_joules: float) -> list[str]:
    if energy is None:
        return ["joules unavailable: not measured"]
    if energy.energy_per_image_max_j is None or energy.energy_per_image_j is None:
        return [f"joules unavailable: {energy.unavailable}"]
    if energy.energy_per_image_max_j <= max_joules:
        return []
    over = energy.energy_per_image_j / max_joules
    return [f"takes {energy.energy_per_image_j:.3g} J an image, {over:.2f} x the limit"]
