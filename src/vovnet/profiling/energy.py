"""Energy per image, read from the machine's own meters; never estimated.

A machine without a meter gives a result that says so and why. Meters are read through zeus:
the energy counters of NVIDIA and AMD GPUs, RAPL for processors and their memory, and the boards of
Jetson and Apple. zeus' own total holds GPUs only, so the devices are summed here.
"""

import contextlib
import importlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from statistics import median
from typing import Any, Protocol

from vovnet.errors import ConfigError

# No processor or accelerator draws this much: a counter that says so has jumped.
MAX_DEVICE_POWER_W = 20_000.0


class MeterError(RuntimeError):
    """No meter, or one whose readings cannot be used."""


class Meter(Protocol):
    """Energy counters that only rise."""

    @property
    def devices(self) -> Sequence[str]:
        """Name of each metered device."""
        ...

    @property
    def not_metered(self) -> Sequence[str]:
        """Kinds of device that cannot be read, each with the reason."""
        ...

    def read_j(self) -> Sequence[float]:
        """Joules that each device has used since some fixed moment; raises MeterError."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EnergyResult:
    """Energy of one image by all metered devices together.

    energy_per_image_j counts all that was metered while images ran, idle power included: average
    power / images per second, as in the VoVNet paper (equation 2). active_energy_per_image_j is
    less idle power x time, where idle power was measured. The figures are medians over `windows`
    measuring windows, or None where `unavailable` holds the reason.
    """

    unavailable: str | None = None
    meter: str | None = None
    not_metered: tuple[str, ...] = ()
    energy_per_image_j: float | None = None
    energy_per_image_min_j: float | None = None
    energy_per_image_max_j: float | None = None
    energy_per_image_by_device_j: dict[str, float] = field(default_factory=dict)
    active_energy_per_image_j: float | None = None
    power_w: float | None = None
    idle_power_w: float | None = None
    windows: int = 0
    shortest_window_s: float | None = None
    images: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name, as plain JSON types."""
        return asdict(self)

    def format(self) -> str:
        """Return one line: the figure with its spread and meter, or why there is none."""
        if self.energy_per_image_j is None:
            return f"unavailable ({self.unavailable})"
        without = f"; not metered: {'; '.join(self.not_metered)}" if self.not_metered else ""
        if self.active_energy_per_image_j is not None:
            without = (
                f"; {self.active_energy_per_image_j:.4g} J/image above the "
                f"{self.idle_power_w:.1f} W of idling{without}"
            )
        return (
            f"{self.energy_per_image_j:.4g} J/image "
            f"({self.energy_per_image_min_j:.4g} to {self.energy_per_image_max_j:.4g} over "
            f"{self.windows} windows of at least {self.shortest_window_s:.1f} s, "
            f"{self.power_w:.1f} W, {self.meter}{without})"
        )


@dataclass(frozen=True, slots=True)
class _Window:
    energies_j: tuple[float, ...]  # one for each device
    images: int
    time_s: float

    @property
    def energy_j(self) -> float:
        return sum(self.energies_j)


def measure_energy(
    run: Callable[[], int],
    *,
    min_window_s: float = 3.0,
    windows: int = 3,
    idle_s: float = 0.0,
    meter: Meter | None = None,
) -> EnergyResult:
    """Measure the energy of one image while `run` repeats.

    `run` processes one batch, waits until the device is done, and returns the number of images.
    It is called once to warm up, then again and again for `windows` windows of at least
    `min_window_s` seconds each: the counters tick about every 0.1 s, so shorter windows are
    inexact. `idle_s` seconds of doing nothing before the first window measure idle power; 0 leaves
    the active energy out. Without `meter`, all devices that zeus finds are summed.
    Raises ConfigError when an argument is out of range or `run` returns no image.
    """
    if windows < 1 or not min_window_s >= 0 or not idle_s >= 0:
        raise ConfigError(
            "expected windows >= 1, min_window_s >= 0 and idle_s >= 0, "
            f"got {windows}, {min_window_s} and {idle_s}"
        )
    try:
        chosen = find_meter() if meter is None else meter
        chosen.read_j()  # the first reading may start helpers of the meter
        _count_images(run)
        idle_power_w = _measure_idle_w(chosen, idle_s) if idle_s else None
        measured = [_measure_window(run, chosen, min_window_s) for _ in range(windows)]
    except MeterError as error:
        return EnergyResult(unavailable=str(error))
    return _summarise(measured, chosen, idle_power_w)


def find_meter() -> Meter:
    """Return a meter of every GPU and processor that can be read on this machine.

    Raises MeterError with the reason for each kind of device when there is none.
    """
    try:
        errors = (importlib.import_module("zeus.exception").ZeusBaseError, OSError, ValueError)
    except ImportError as error:
        raise MeterError(f"zeus is missing, install the extra `energy`: {error}") from None
    counters: list[_Counter] = []
    reasons = []
    for kind, find in (("GPU", _gpu_counters), ("CPU", _cpu_counters)):
        try:
            counters += find()
        except (MeterError, *errors) as error:
            reasons.append(f"{kind}: {error}")
    # Most machines are no such board, and miss nothing by it.
    with contextlib.suppress(*errors):
        counters += _board_counters()
    if not counters:
        raise MeterError("; ".join(reasons))
    return _Counters(counters, reasons, errors)


@dataclass(frozen=True, slots=True)
class _Counter:
    name: str
    read_j: Callable[[], float]
    wraps_at_j: float | None = None


class _Counters:
    """A Meter of several counters, each unrolled where it wraps around.

    zeus notices a wrap-around up to a second late, so that its sum may fall back or leap by one
    range; the rise modulo the range is right in both cases as long as a range outlasts the time
    between two readings (minutes, for RAPL).
    """

    def __init__(
        self,
        counters: Sequence[_Counter],
        not_metered: Sequence[str],
        errors: tuple[type[Exception], ...],
    ) -> None:
        self.devices = tuple(counter.name for counter in counters)
        self.not_metered = tuple(not_metered)
        self._counters = counters
        self._errors = errors
        self._last_j: list[float] = []
        self._total_j: list[float] = []

    def read_j(self) -> list[float]:
        readings = [self._read(counter) for counter in self._counters]
        if not self._total_j:
            self._total_j = list(readings)
        for index, last_j in enumerate(self._last_j):
            rise_j = readings[index] - last_j
            range_j = self._counters[index].wraps_at_j
            self._total_j[index] += rise_j if range_j is None else rise_j % range_j
        self._last_j = readings
        return list(self._total_j)

    def _read(self, counter: _Counter) -> float:
        try:
            return counter.read_j()
        except self._errors as error:
            raise MeterError(f"{counter.name}: {error}") from None


def _gpu_counters() -> list[_Counter]:
    counters = []
    for index, gpu in enumerate(importlib.import_module("zeus.device.gpu").get_gpus().gpus):
        name = f"GPU {index} {gpu.get_name()}"
        if not gpu.supports_get_total_energy_consumption():
            raise MeterError(f"{name} has no energy counter")
        counters.append(_Counter(name, partial(_read_gpu_j, gpu)))
    if not counters:
        raise MeterError("no device visible")
    return counters


def _cpu_counters() -> list[_Counter]:
    counters = []
    for index, cpu in enumerate(importlib.import_module("zeus.device.cpu").get_cpus().cpus):
        # The zone of the whole platform holds the packages' energy: it would count twice.
        if getattr(getattr(cpu, "rapl_file", None), "name", None) == "psys":
            continue
        zones = {"cpu_mj": ("", "rapl_file"), "dram_mj": (" memory", "dram")}
        reading = cpu.get_total_energy_consumption()
        for key, (suffix, attribute) in zones.items():
            if getattr(reading, key) is not None:
                range_uj = getattr(getattr(cpu, attribute, None), "max_energy_range_uj", None)
                range_j = None if range_uj is None else range_uj / 1e6
                read = partial(_read_millijoules, cpu, (key,))
                counters.append(_Counter(f"CPU {index} RAPL{suffix}", read, range_j))
    if not counters:
        raise MeterError("RAPL lists no processor")
    return counters


# Sums that hold each part of the board once: Jetson's input rail, and Apple's four domains.
_BOARD_FIELDS = (("total_energy_mj",), ("cpu_total_mj", "gpu_mj", "dram_mj", "ane_mj"))


def _board_counters() -> list[_Counter]:
    board = importlib.import_module("zeus.device.soc").get_soc()
    available = board.get_available_metrics()
    for fields in _BOARD_FIELDS:
        present = tuple(name for name in fields if name in available)
        if present:
            kind = type(board).__name__
            return [_Counter(kind, partial(_read_millijoules, board, present))]
    raise ValueError(f"no total among the board's meters ({', '.join(sorted(available))})")


def _read_gpu_j(gpu: Any) -> float:
    return float(gpu.get_total_energy_consumption()) / 1000


def _read_millijoules(device: Any, keys: Sequence[str]) -> float:
    reading = device.get_total_energy_consumption()
    return sum(float(getattr(reading, key)) for key in keys) / 1000


def _measure_idle_w(meter: Meter, idle_s: float) -> float:
    before_j, start_s = meter.read_j(), time.perf_counter()
    time.sleep(idle_s)
    after_j, time_s = meter.read_j(), time.perf_counter() - start_s
    return sum(_rises_j(meter, before_j, after_j, time_s)) / time_s


def _rises_j(
    meter: Meter, before_j: Sequence[float], after_j: Sequence[float], time_s: float
) -> tuple[float, ...]:
    rises_j = tuple(after - before for before, after in zip(before_j, after_j, strict=True))
    for device, rise_j in zip(meter.devices, rises_j, strict=True):
        if not math.isfinite(rise_j) or rise_j < 0:
            raise MeterError(f"{device}: the counter must only rise, but changed by {rise_j} J")
        if rise_j > MAX_DEVICE_POWER_W * max(time_s, 1.0):
            raise MeterError(f"{device}: the counter leapt by {rise_j:.0f} J in {time_s:.2f} s")
    return rises_j


def _measure_window(run: Callable[[], int], meter: Meter, min_window_s: float) -> _Window:
    before_j = meter.read_j()
    start_s = time.perf_counter()
    images = _count_images(run)
    while time.perf_counter() - start_s < min_window_s:
        images += _count_images(run)
    after_j = meter.read_j()
    time_s = time.perf_counter() - start_s
    energies_j = _rises_j(meter, before_j, after_j, time_s)
    if sum(energies_j) == 0:
        raise MeterError(f"{', '.join(meter.devices)}: no counter moved within {time_s:.2f} s")
    return _Window(energies_j, images, time_s)


def _count_images(run: Callable[[], int]) -> int:
    images = run()
    if images < 1:
        raise ConfigError(f"expected run() to return the number of images, got {images}")
    return images


def _summarise(
    measured: Sequence[_Window], meter: Meter, idle_power_w: float | None
) -> EnergyResult:
    per_image_j = [window.energy_j / window.images for window in measured]
    active_j = [
        (window.energy_j - (idle_power_w or 0.0) * window.time_s) / window.images
        for window in measured
    ]
    by_device_j = {
        device: median(window.energies_j[index] / window.images for window in measured)
        for index, device in enumerate(meter.devices)
    }
    return EnergyResult(
        meter=" + ".join(meter.devices),
        not_metered=tuple(meter.not_metered),
        energy_per_image_j=median(per_image_j),
        energy_per_image_min_j=min(per_image_j),
        energy_per_image_max_j=max(per_image_j),
        energy_per_image_by_device_j=by_device_j,
        active_energy_per_image_j=None if idle_power_w is None else median(active_j),
        power_w=median(window.energy_j / window.time_s for window in measured),
        idle_power_w=idle_power_w,
        windows=len(measured),
        shortest_window_s=min(window.time_s for window in measured),
        images=sum(window.images for window in measured),
    )
