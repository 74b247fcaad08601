"""Which engine is the fastest for a model on this machine: measured once, then read from a file."""

import json
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
    date: str
    """Of the day in UTC, YYYY-MM-DD."""

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
        return f"{own} against {others}, measured on this machine on {self.date}"


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


def find_measured(key: Key) -> Measured | None:
    """What was measured under a key, None where nothing was or the file cannot be read."""
    found = [_parse(entry, key) for entry in _read_entries() if entry.get("key") == key]
    return next((one for one in found if one is not None), None)


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
