"""Energy per image, read from the machine's own meters; never estimated.

A machine without a meter gives a result that says so and why. Meters are read through zeus:
the energy counters of NVIDIA and AMD GPUs, and RAPL for processors and their memory.
"""

import importlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from statistics import median
from typing import Any, Protocol

from vovnet.errors import ConfigError


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
    """Energy of one image by all metered devices together, idle power included.

    The figures are medians over `windows` measuring windows, or None where `unavailable` holds
    the reason.
    """

    unavailable: str | None = None
    meter: str | None = None
    not_metered: tuple[str, ...] = ()
    energy_per_image_j: float | None = None
    energy_per_image_min_j: float | None = None
    energy_per_image_max_j: float | None = None
    energy_per_image_by_device_j: dict[str, float] = field(default_factory=dict)
    power_w: float | None = None
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
    meter: Meter | None = None,
) -> EnergyResult:
    """Measure the energy of one image while `run` repeats.

    `run` processes one batch, waits until the device is done, and returns the number of images.
    It is called once to warm up, then again and again for `windows` windows of at least
    `min_window_s` seconds each: the counters tick about every 0.1 s, so shorter windows are
    inexact. Without `meter`, all devices that zeus finds are summed.
    Raises ConfigError when an argument is out of range or `run` returns no image.
    """
    if windows < 1 or not min_window_s >= 0:
        raise ConfigError(
            f"expected windows >= 1 and min_window_s >= 0, got {windows} and {min_window_s}"
        )
    try:
        chosen = find_meter() if meter is None else meter
        chosen.read_j()  # the first reading may start helpers of the meter
        _count_images(run)
        measured = [_measure_window(run, chosen, min_window_s) for _ in range(windows)]
    except MeterError as error:
        return EnergyResult(unavailable=str(error))
    return _summarise(measured, chosen)


def find_meter() -> Meter:
    """Return a meter of every GPU and processor that can be read on this machine.

    Raises MeterError with the reason for each kind of device when there is none.
    """
    try:
        gpu = importlib.import_module("zeus.device.gpu")
        cpu = importlib.import_module("zeus.device.cpu")
        errors = (importlib.import_module("zeus.exception").ZeusBaseError, OSError, ValueError)
    except ImportError as error:
        raise MeterError(f"zeus is missing, install the extra `energy`: {error}") from None
    counters: dict[str, Callable[[], float]] = {}
    reasons = []
    for kind, find in (("GPU", partial(_gpu_counters, gpu)), ("CPU", partial(_cpu_counters, cpu))):
        try:
            counters |= find()
        except (MeterError, *errors) as error:
            reasons.append(f"{kind}: {error}")
    if not counters:
        raise MeterError("; ".join(reasons))
    return _Counters(counters, reasons, errors)


class _Counters:
    def __init__(
        self,
        counters: Mapping[str, Callable[[], float]],
        not_metered: Sequence[str],
        errors: tuple[type[Exception], ...],
    ) -> None:
        self.devices = tuple(counters)
        self.not_metered = tuple(not_metered)
        self._counters = counters
        self._errors = errors

    def read_j(self) -> list[float]:
        readings = []
        for device, read in self._counters.items():
            try:
                readings.append(read())
            except self._errors as error:
                raise MeterError(f"{device}: {error}") from None
        return readings


def _gpu_counters(zeus_gpu: Any) -> dict[str, Callable[[], float]]:
    counters: dict[str, Callable[[], float]] = {}
    for index, gpu in enumerate(zeus_gpu.get_gpus().gpus):
        name = f"GPU {index} {gpu.get_name()}"
        if not gpu.supports_get_total_energy_consumption():
            raise MeterError(f"{name} has no energy counter")
        counters[name] = partial(_read_gpu_j, gpu)
    if not counters:
        raise MeterError("no device visible")
    return counters


def _cpu_counters(zeus_cpu: Any) -> dict[str, Callable[[], float]]:
    counters: dict[str, Callable[[], float]] = {}
    for index, cpu in enumerate(zeus_cpu.get_cpus().cpus):
        # The zone of the whole platform holds the packages' energy: it would count twice.
        if getattr(getattr(cpu, "rapl_file", None), "name", None) != "psys":
            counters[f"CPU {index} RAPL"] = partial(_read_cpu_j, cpu)
    if not counters:
        raise MeterError("RAPL lists no processor")
    return counters


def _read_gpu_j(gpu: Any) -> float:
    return float(gpu.get_total_energy_consumption()) / 1000


def _read_cpu_j(cpu: Any) -> float:
    reading = cpu.get_total_energy_consumption()
    return float(reading.cpu_mj + (reading.dram_mj or 0.0)) / 1000


def _measure_window(run: Callable[[], int], meter: Meter, min_window_s: float) -> _Window:
    before_j = meter.read_j()
    start_s = time.perf_counter()
    images = _count_images(run)
    while time.perf_counter() - start_s < min_window_s:
        images += _count_images(run)
    after_j = meter.read_j()
    time_s = time.perf_counter() - start_s
    energies_j = tuple(after - before for before, after in zip(before_j, after_j, strict=True))
    for device, energy_j in zip(meter.devices, energies_j, strict=True):
        if not math.isfinite(energy_j) or energy_j < 0:
            raise MeterError(f"{device}: the counter must only rise, but changed by {energy_j} J")
    if sum(energies_j) == 0:
        raise MeterError(f"{', '.join(meter.devices)}: no counter moved within {time_s:.2f} s")
    return _Window(energies_j, images, time_s)


def _count_images(run: Callable[[], int]) -> int:
    images = run()
    if images < 1:
        raise ConfigError(f"expected run() to return the number of images, got {images}")
    return images


def _summarise(measured: Sequence[_Window], meter: Meter) -> EnergyResult:
    per_image_j = [window.energy_j / window.images for window in measured]
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
        power_w=median(window.energy_j / window.time_s for window in measured),
        windows=len(measured),
        shortest_window_s=min(window.time_s for window in measured),
        images=sum(window.images for window in measured),
    )
