"""A gate on cost: what rose against a baseline, by more than is allowed and more than noise is."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vovnet.errors import ConfigError, DataError
from vovnet.profiling.compare import Ratio
from vovnet.profiling.records import (
    FORMAT_VERSION,
    Counts,
    ModelProfile,
    Point,
    PointResult,
    Profile,
    printable,
)

COUNTED = ("macs", "parameters", "memory_access", "peak_activation_elements")
_MAX_BASELINE_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Rise:
    """One figure that rose by more than is allowed."""

    model: str
    figure: str
    baseline: float
    now: float
    note: str = ""

    def format(self) -> str:
        """Return one line with both figures and the increase."""
        increase = "" if self.baseline == 0 else f" (+{100 * (self.now / self.baseline - 1):.1f} %)"
        note = f"; {self.note}" if self.note else ""
        rise = f"from {self.baseline:g} to {self.now:g}{increase}"
        return f"{self.model}: {self.figure} rose {rise}{note}"


def parse_increase(text: str) -> float:
    """The share of 5% or 0.05; raises ConfigError unless it is a number of at least 0."""
    stripped = text.strip()
    try:
        value = float(stripped.removesuffix("%")) / (100 if stripped.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ConfigError(f"max-increase: expected a share such as 5% or 0.05, got {text!r}")
    return value


def read_baseline(path: Path) -> dict[str, Any]:
    """A stored profile; raises DataError unless it is one of this format."""
    try:
        if path.stat().st_size > _MAX_BASELINE_BYTES:
            raise DataError(f"{path}: expected a profile, found a file of over 64 MB")
        content = json.loads(
            path.read_text(encoding="utf-8"),
            parse_int=_number,
            parse_float=_number,
            parse_constant=_number,
        )
    except FileNotFoundError:
        raise DataError(f"{path}: expected a profile or a model folder, found none") from None
    except RecursionError:
        raise DataError(f"{path}: expected a profile, found JSON nested too deep") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: expected a profile as JSON, found: {error}") from None
    if not isinstance(content, dict) or content.get("format_version") != FORMAT_VERSION:
        raise DataError(f"{path}: expected a profile of format {FORMAT_VERSION}")
    models = content.get("models")
    if not isinstance(models, list) or not all(
        isinstance(model, dict) and isinstance(model.get("results"), list) for model in models
    ):
        raise DataError(f"{path}: expected models with their results")
    return content


def _number(text: str) -> int | float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]}, which is no finite number")
    return int(text) if text.removeprefix("-").isdecimal() else value


def check_against_file(
    profile: Profile, baseline: Mapping[str, Any], max_increase: float, *, where: str
) -> list[Rise]:
    """What rose against a stored profile: counts by more than max_increase; times and joules only
    where the whole interval lies above the stored one by that much, and only on the same machine.

    Models are matched by name, or a single one with a single one, and their points by setting.
    Of a single round no time is compared: it has no interval. Raises DataError when nothing can
    be compared.
    """
    stored = {str(model.get("name")): model for model in baseline["models"]}
    alone = len(stored) == len(profile.models) == 1
    rises: list[Rise] = []
    compared = 0
    same_hardware = same_machine(profile, baseline)
    for model in profile.models:
        other = next(iter(stored.values())) if alone else stored.get(model.name)
        for result in model.results:
            before = _stored_result(other, result.point) if other is not None else None
            if before is None:
                continue
            compared += _is_comparable(result, before, same_hardware)
            rises += _counted(model.name, result.counts, before.get("counts"), max_increase)
            if same_hardware:
                rises += _measured(model.name, result, before, max_increase)
    if not compared:
        known = printable(", ".join(stored)) or "none"
        raise DataError(
            f"{where}: expected one of the profiled models at the same point, with counts or times "
            f"to compare, found {known}"
        )
    return rises


def check_interleaved(
    model: ModelProfile, baseline: ModelProfile, ratio: Ratio | None, max_increase: float
) -> list[Rise]:
    """What rose against a baseline that ran in the same rounds: its time only where the whole
    interval of the ratio lies above 1 + max_increase.
    """
    rises: list[Rise] = []
    for now, before in zip(model.results, baseline.results, strict=True):
        if before.counts is not None:
            stored = {name: getattr(before.counts, name) for name in COUNTED}
            rises += _counted(model.name, now.counts, stored, max_increase)
    if ratio is not None and ratio.rounds > 1 and ratio.low > 1 + max_increase:
        note = f"relative time, interval {ratio.low:.3f} to {ratio.high:.3f}, n = {ratio.rounds}"
        rises.append(Rise(model.name, "latency", 1.0, ratio.ratio, note))
    now_j, before_j = (_joules(one) for one in (model, baseline))
    if now_j and before_j and _is_above(now_j[1], before_j[2], max_increase):
        rises.append(Rise(model.name, "energy_per_image_j", before_j[0], now_j[0]))
    return rises


def _is_comparable(result: PointResult, before: Mapping[str, Any], same_hardware: bool) -> bool:
    counts = before.get("counts") if result.counts is not None else None
    figures = [counts.get(name) for name in COUNTED] if isinstance(counts, Mapping) else []
    counted = any(isinstance(value, int | float) for value in figures)
    return counted or (same_hardware and _has_times(result, before))


def _has_times(result: PointResult, before: Mapping[str, Any]) -> bool:
    """Whether both sides have times of more than one round."""
    (count,) = _stored(before, "timings", "count")
    return result.timings is not None and result.timings.count > 1 and (count or 0) > 1


def _counted(name: str, counts: Counts | None, stored: object, max_increase: float) -> list[Rise]:
    if counts is None or not isinstance(stored, Mapping):
        return []
    pairs = [(figure, stored.get(figure), getattr(counts, figure)) for figure in COUNTED]
    return [
        Rise(name, figure, before, now)
        for figure, before, now in pairs
        if isinstance(before, int | float) and now > before * (1 + max_increase)
    ]


def _measured(
    name: str, result: PointResult, before: Mapping[str, Any], max_increase: float
) -> list[Rise]:
    rises = []
    times, energy = result.timings, result.energy
    low, middle, high = _stored(before, "timings", "median_low_ms", "median_ms", "median_high_ms")
    timed = times is not None and _has_times(result, before)
    if timed and times is not None and _is_above(times.median_low_ms, high, max_increase):
        note = f"interval {times.median_low_ms:.4g} to {times.median_high_ms:.4g} "
        note += f"against {low:.4g} to {high:.4g}"
        rises.append(Rise(name, "median_ms", middle or 0.0, times.median_ms, note))
    middle, high = _stored(before, "energy", "energy_per_image_j", "energy_per_image_max_j")
    if energy is not None and _is_above(energy.energy_per_image_min_j, high, max_increase):
        now_j = energy.energy_per_image_j or 0.0
        rises.append(Rise(name, "energy_per_image_j", middle or 0.0, now_j))
    return rises


def _is_above(low: float | None, stored_high: float | None, max_increase: float) -> bool:
    if low is None or stored_high is None:
        return False
    return low > stored_high * (1 + max_increase)


def _stored(before: Mapping[str, Any], part: str, *keys: str) -> list[float | None]:
    """Figures of a part of a stored result; None for each unless all are numbers."""
    given = before.get(part)
    values = [given.get(key) for key in keys] if isinstance(given, Mapping) else [None]
    numbers = [float(value) for value in values if isinstance(value, int | float)]
    return [*numbers] if len(numbers) == len(keys) else [None] * len(keys)


def same_machine(profile: Profile, baseline: Mapping[str, Any]) -> bool:
    """Whether times of a stored profile compare with these: same device and number of threads."""
    stored = baseline.get("machine")
    keys = ("device_name", "threads")
    return isinstance(stored, Mapping) and all(
        stored.get(key) == profile.machine[key] for key in keys
    )


def _stored_result(model: Mapping[str, Any], point: Point) -> Mapping[str, Any] | None:
    wanted = (point.batch_size, point.height, point.width, point.precision, point.layout)
    keys = ("batch_size", "height", "width", "precision", "layout")
    results: Sequence[Mapping[str, Any]] = model["results"]
    for result in results:
        stored = result.get("point") if isinstance(result, Mapping) else None
        if isinstance(stored, Mapping) and tuple(stored.get(key) for key in keys) == wanted:
            return result
    return None


def _joules(model: ModelProfile) -> tuple[float, float, float] | None:
    energy = model.main.energy if model.main else None
    if energy is None or energy.energy_per_image_j is None:
        return None
    low, high = energy.energy_per_image_min_j, energy.energy_per_image_max_j
    return energy.energy_per_image_j, low or 0.0, high or 0.0
