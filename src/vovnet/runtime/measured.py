"""Which engine is the fastest for a model on this machine: measured, then read from a file for a
month.
"""

import datetime
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vovnet.files import atomic_write_json, cache_folder
from vovnet.hardware import available_cores, package_version, processor_name

CACHE_FILE = "engines.json"
MAX_ENTRIES = 200
BUDGET_S, MAX_ROUNDS = 1.0, 20
MAX_AGE_DAYS = 30
"""After which a measurement counts no more; one of a busy machine counts for its day alone."""
BUSY_LOAD = 0.5
"""Average load of a minute, for each core, from which on a machine is busy."""

Key = dict[str, Any]


class Measured(BaseModel):
    """How long the engines took; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    ms_per_image: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(
        min_length=2
    )
    """Of each engine by its name."""
    precisions: dict[str, str]
    """What each computed in."""
    date: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\d$")]
    """Of the day in UTC, YYYY-MM-DD."""
    busy: bool = False
    """Whether the machine had other work then, so that the figures may mislead."""

    @property
    def fastest(self) -> str:
        """The name of the engine that took the least time."""
        return min(self.ms_per_image, key=self.ms_per_image.__getitem__)

    def describe(self) -> str:
        """In words, why it is the fastest."""
        best = self.fastest
        others = " and ".join(
            f"{one:.1f} in {name} ({self.precisions[name]})"
            for name, one in self.ms_per_image.items()
            if name != best
        )
        own = f"{self.ms_per_image[best]:.1f} ms a picture ({self.precisions[best]})"
        busy = ", while it was busy" if self.busy else ""
        return f"{own} against {others}, measured on this machine on {self.date}{busy}"

    def is_current(self, today: datetime.date) -> bool:
        """Whether it still counts on a day in UTC."""
        try:
            age_days = (today - datetime.date.fromisoformat(self.date)).days
        except ValueError:
            return False
        return 0 <= age_days <= (0 if self.busy else MAX_AGE_DAYS)


def measurement_key(
    files: Mapping[str, Sequence[str]], *, precision: str, threads: int | None
) -> Key:
    """All that a measurement depends on, as plain JSON values.

    files holds, of each engine by its name, the sha256 of what it would run.
    """
    return {
        "processor": processor_name(),
        "cores": available_cores(),
        "threads": threads,
        "precision": precision,
        "versions": {name: package_version(name) for name in files},
        "sha256": {name: list(hashes) for name, hashes in files.items()},
    }


def time_engines(
    runs: Mapping[str, Callable[[], object]], *, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """The median milliseconds of each run, in rounds by turns for about BUDGET_S seconds.

    The first round warms up and counts only where there is time for no other.
    """
    start_s = clock()
    rounds: list[dict[str, float]] = []
    while not rounds or (len(rounds) < MAX_ROUNDS and clock() - start_s < BUDGET_S):
        rounds.append({name: _second_s(run, clock) for name, run in runs.items()})
    timed = rounds[1:] or rounds
    return {name: 1e3 * median(one[name] for one in timed) for name in runs}


def _second_s(run: Callable[[], object], clock: Callable[[], float]) -> float:
    # The first of two meets the caches as another engine left them, and its threads, which spin.
    run()
    start_s = clock()
    run()
    return clock() - start_s


def is_busy() -> bool:
    """Whether the machine has had other work in the last minute; False where it does not say."""
    try:
        return os.getloadavg()[0] >= BUSY_LOAD * available_cores()
    except (AttributeError, OSError):
        return False


def find_measured(key: Key, *, today: datetime.date | None = None) -> Measured | None:
    """What was measured under a key and still counts today (in UTC), None where nothing was or the
    file cannot be read.
    """
    day = today or datetime.datetime.now(datetime.UTC).date()
    found = [_parse(entry, key) for entry in _read_entries() if entry.get("key") == key]
    return next((one for one in found if one is not None and one.is_current(day)), None)


def keep_measured(key: Key, measured: Measured) -> None:
    """Puts a measurement into the file, which keeps the last MAX_ENTRIES; does nothing where it
    cannot be written.
    """
    others = [entry for entry in _read_entries() if entry.get("key") != key]
    entries = [*others, {"key": key, "measured": measured.model_dump()}][-MAX_ENTRIES:]
    try:
        path = _cache_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_json(path, entries)
    except (OSError, ValueError, RuntimeError):
        pass  # a read-only home, or none, must not keep anyone from predicting


def _cache_file() -> Path:
    return cache_folder() / CACHE_FILE


def _read_entries() -> list[dict[str, Any]]:
    try:
        entries = json.loads(_cache_file().read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):
        return []
    return [one for one in entries if isinstance(one, dict)] if isinstance(entries, list) else []


def _parse(entry: Mapping[str, Any], key: Key) -> Measured | None:
    """The measurement of an entry, None where it does not hold what it should."""
    try:
        measured = Measured.model_validate(entry.get("measured"))
    except ValidationError:
        return None
    names = set(measured.ms_per_image)
    return measured if names == set(measured.precisions) and names <= set(key["sha256"]) else None
