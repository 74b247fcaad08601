import json
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import pytest

from vovnet.errors import ConfigError
from vovnet.profiling import energy
from vovnet.profiling.energy import EnergyResult, MeterError, find_meter, measure_energy


class FakeMeter:
    """Two devices whose counters advance by fixed joules with every call of run."""

    def __init__(self, *joules_per_run: float, images_per_run: int = 4) -> None:
        self.devices = [f"device {index}" for index in range(len(joules_per_run))]
        self.not_metered = ["CPU: permission denied"]
        self.joules_per_run = joules_per_run
        self.images_per_run = images_per_run
        self.counters_j = [100.0] * len(joules_per_run)

    def run(self) -> int:
        for index, joules in enumerate(self.joules_per_run):
            self.counters_j[index] += joules
        return self.images_per_run

    def read_j(self) -> list[float]:
        return list(self.counters_j)


def test_constant_energy_is_found_exactly_and_devices_are_summed() -> None:
    meter = FakeMeter(6.0, 2.0)
    result = measure_energy(meter.run, min_window_s=0.001, windows=3, meter=meter)
    assert result.unavailable is None
    assert result.energy_per_image_j == pytest.approx(2.0)
    assert result.energy_per_image_min_j == pytest.approx(2.0)
    assert result.energy_per_image_max_j == pytest.approx(2.0)
    assert result.energy_per_image_by_device_j == pytest.approx({"device 0": 1.5, "device 1": 0.5})
    assert result.meter == "device 0 + device 1"
    assert result.not_metered == ("CPU: permission denied",)
    assert result.windows == 3
    assert result.shortest_window_s is not None
    assert result.shortest_window_s >= 0.001


def test_median_spread_power_and_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock_s = iter(range(0, 1000, 2))  # two seconds pass between any two looks at the clock
    monkeypatch.setattr(energy.time, "perf_counter", lambda: float(next(clock_s)))
    meter = FakeMeter(0.0, images_per_run=10)
    joules = iter([999.0, 10.0, 40.0, 20.0])  # the warm-up, then one run in each window

    def run() -> int:
        meter.counters_j[0] += next(joules)
        return 10

    result = measure_energy(run, min_window_s=1.0, windows=3, meter=meter)
    assert result.energy_per_image_j == 2.0
    assert (result.energy_per_image_min_j, result.energy_per_image_max_j) == (1.0, 4.0)
    assert result.shortest_window_s == 4.0
    assert result.power_w == 5.0
    assert result.images == 30


def test_a_window_lasts_until_its_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    clock_s = iter(range(1000))
    monkeypatch.setattr(energy.time, "perf_counter", lambda: float(next(clock_s)))
    meter = FakeMeter(1.0, images_per_run=1)
    result = measure_energy(meter.run, min_window_s=5.0, windows=1, meter=meter)
    assert result.images == 5


def test_format_states_figure_spread_windows_and_meter() -> None:
    meter = FakeMeter(8.0)
    text = measure_energy(meter.run, min_window_s=0, windows=2, meter=meter).format()
    assert text.startswith("2 J/image (2 to 2 over 2 windows of at least 0.0 s, ")
    assert text.endswith(" W, device 0; not metered: CPU: permission denied)")


@pytest.mark.parametrize(
    ("joules", "reason"),
    [
        ((-1.0,), r"device 0: the counter must only rise, but changed by -1\.0 J"),
        ((5.0, -1.0), r"device 1: the counter must only rise"),
        ((float("nan"),), "device 0: the counter must only rise, but changed by nan J"),
        ((0.0, 0.0), "device 0, device 1: no counter moved within"),
    ],
)
def test_unusable_counters_are_unavailable(joules: tuple[float, ...], reason: str) -> None:
    meter = FakeMeter(*joules)
    assert_unavailable(measure_energy(meter.run, min_window_s=0, windows=1, meter=meter), reason)


def test_permission_denied_while_reading_is_unavailable() -> None:
    class Denied(FakeMeter):
        def read_j(self) -> list[float]:
            raise MeterError("CPU 0 RAPL: permission denied")

    meter = Denied(1.0)
    assert_unavailable(measure_energy(meter.run, meter=meter), "CPU 0 RAPL: permission denied")


def assert_unavailable(result: EnergyResult, reason: str) -> None:
    assert result.unavailable is not None
    assert result.energy_per_image_j is None
    assert result.power_w is None
    assert result.energy_per_image_by_device_j == {}
    with pytest.raises(MeterError, match=reason):
        raise MeterError(result.unavailable)
    assert result.format() == f"unavailable ({result.unavailable})"
    assert json.loads(json.dumps(result.to_dict()))["energy_per_image_j"] is None


def test_errors_of_run_are_not_hidden() -> None:
    def run() -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        measure_energy(run, meter=FakeMeter(1.0))


@pytest.mark.parametrize(("windows", "seconds"), [(0, 1.0), (1, -1.0), (1, float("nan"))])
def test_arguments_out_of_range(windows: int, seconds: float) -> None:
    with pytest.raises(ConfigError, match="expected windows >= 1"):
        measure_energy(lambda: 1, min_window_s=seconds, windows=windows, meter=FakeMeter(1.0))


def test_run_without_images() -> None:
    with pytest.raises(ConfigError, match="number of images, got 0"):
        measure_energy(lambda: 0, meter=FakeMeter(1.0))


class FakeZeusError(Exception):
    pass


def fake_gpu(*, millijoules: int = 5000, supported: bool = True) -> SimpleNamespace:
    return SimpleNamespace(
        get_name=lambda: "H200",
        supports_get_total_energy_consumption=lambda: supported,
        get_total_energy_consumption=lambda: millijoules,
    )


def fake_cpu(name: str, *, dram_mj: float | None = 500.0) -> SimpleNamespace:
    reading = SimpleNamespace(cpu_mj=2000.0, dram_mj=dram_mj)
    zone = SimpleNamespace(name=name, max_energy_range_uj=10e6)
    return SimpleNamespace(rapl_file=zone, get_total_energy_consumption=lambda: reading)


def refuse(error: Exception) -> Callable[[], object]:
    def get() -> object:
        raise error

    return get


def install_zeus(
    monkeypatch: pytest.MonkeyPatch,
    get_gpus: Callable[[], object],
    get_cpus: Callable[[], object],
    get_soc: Callable[[], object] | None = None,
) -> None:
    for name, attributes in {
        "zeus": {},
        "zeus.device": {},
        "zeus.device.gpu": {"get_gpus": get_gpus},
        "zeus.device.cpu": {"get_cpus": get_cpus},
        "zeus.device.soc": {"get_soc": get_soc or refuse(FakeZeusError("no board"))},
        "zeus.exception": {"ZeusBaseError": FakeZeusError},
    }.items():
        module = ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)


def test_all_devices_of_zeus_are_read_in_joules(monkeypatch: pytest.MonkeyPatch) -> None:
    install_zeus(
        monkeypatch,
        lambda: SimpleNamespace(gpus=[fake_gpu(), fake_gpu(millijoules=7000)]),
        lambda: SimpleNamespace(cpus=[fake_cpu("package-0"), fake_cpu("package-1", dram_mj=None)]),
    )
    meter = find_meter()
    names = ["GPU 0 H200", "GPU 1 H200", "CPU 0 RAPL", "CPU 0 RAPL memory", "CPU 1 RAPL"]
    assert list(meter.devices) == names
    assert meter.read_j() == [5.0, 7.0, 2.0, 0.5, 2.0]
    assert list(meter.not_metered) == []


def test_the_platform_zone_is_not_counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    install_zeus(
        monkeypatch,
        lambda: SimpleNamespace(gpus=[]),
        lambda: SimpleNamespace(cpus=[fake_cpu("package-0"), fake_cpu("psys")]),
    )
    assert find_meter().read_j() == [2.0, 0.5]


def test_a_kind_that_cannot_be_read_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    install_zeus(
        monkeypatch,
        lambda: SimpleNamespace(gpus=[fake_gpu()]),
        refuse(FakeZeusError("RAPL requires root")),
    )
    meter = find_meter()
    assert list(meter.devices) == ["GPU 0 H200"]
    assert list(meter.not_metered) == ["CPU: RAPL requires root"]


@pytest.mark.parametrize(
    ("get_gpus", "get_cpus", "reason"),
    [
        (
            refuse(FakeZeusError("no NVML")),
            refuse(PermissionError(13, "Permission denied")),
            r"GPU: no NVML; CPU: \[Errno 13\] Permission denied",
        ),
        (
            lambda: SimpleNamespace(gpus=[fake_gpu(supported=False)]),
            lambda: SimpleNamespace(cpus=[]),
            "GPU: GPU 0 H200 has no energy counter; CPU: RAPL lists no processor",
        ),
        (
            lambda: SimpleNamespace(gpus=[]),
            refuse(FakeZeusError("no RAPL")),
            "GPU: no device visible; CPU: no RAPL",
        ),
    ],
)
def test_no_device_gives_every_reason(
    monkeypatch: pytest.MonkeyPatch,
    get_gpus: Callable[[], object],
    get_cpus: Callable[[], object],
    reason: str,
) -> None:
    install_zeus(monkeypatch, get_gpus, get_cpus)
    assert_unavailable(measure_energy(lambda: 1), reason)


def test_a_counter_that_fails_later_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = fake_gpu()
    gpu.get_total_energy_consumption = refuse(FakeZeusError("GPU is lost"))
    install_zeus(monkeypatch, lambda: SimpleNamespace(gpus=[gpu]), refuse(FakeZeusError("no RAPL")))
    assert_unavailable(measure_energy(lambda: 1), "GPU 0 H200: GPU is lost")


def test_without_zeus_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "zeus"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "zeus", None)
    assert_unavailable(measure_energy(lambda: 1), "install the extra `energy`")


def test_this_machine_gives_a_figure_or_a_reason() -> None:
    def run() -> int:
        sum(range(10_000))
        return 1

    result = measure_energy(run, min_window_s=0.2, windows=1)
    assert (result.energy_per_image_j is None) == (result.unavailable is not None)


def test_active_energy_is_less_idle_power_times_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Idling draws 3 W for 2 s; then windows of 4 s use 40 J for 10 images."""
    now_s = 0.0
    meter = FakeMeter(40.0, images_per_run=10)

    def sleep(seconds: float) -> None:
        nonlocal now_s
        now_s += seconds
        meter.counters_j[0] += 3.0 * seconds

    def run() -> int:
        nonlocal now_s
        now_s += 4.0
        return meter.run()

    monkeypatch.setattr(energy.time, "perf_counter", lambda: now_s)
    monkeypatch.setattr(energy.time, "sleep", sleep)
    result = measure_energy(run, min_window_s=4.0, windows=2, idle_s=2.0, meter=meter)
    assert result.energy_per_image_j == pytest.approx(4.0)
    assert result.idle_power_w == pytest.approx(3.0)
    assert result.active_energy_per_image_j == pytest.approx((40 - 3 * 4) / 10)
    assert "2.8 J/image above the 3.0 W of idling" in result.format()


def test_without_idle_time_there_is_no_active_energy() -> None:
    meter = FakeMeter(8.0)
    result = measure_energy(meter.run, min_window_s=0, windows=1, meter=meter)
    assert (result.idle_power_w, result.active_energy_per_image_j) == (None, None)


@pytest.mark.parametrize("late_s", [0, 1])
def test_a_counter_that_wraps_around_is_unrolled(
    monkeypatch: pytest.MonkeyPatch, late_s: int
) -> None:
    """zeus adds the range of 10 J when it notices the wrap-around: at once, or a second late."""
    readings_j = [8.0, 9.0, 11.0, 12.0] if late_s == 0 else [8.0, 9.0, 1.0, 12.0]
    left = iter(readings_j)
    cpu = fake_cpu("package-0", dram_mj=None)
    cpu.get_total_energy_consumption = lambda: SimpleNamespace(
        cpu_mj=1000 * next(left, readings_j[-1]), dram_mj=None
    )
    install_zeus(monkeypatch, refuse(FakeZeusError("none")), lambda: SimpleNamespace(cpus=[cpu]))
    meter = find_meter()  # takes one reading to see which zones there are
    assert [meter.read_j() for _ in range(3)] == [[9.0], [11.0], [12.0]]


def test_a_counter_that_leaps_is_unavailable() -> None:
    meter = FakeMeter(1e6)
    reason = "device 0: the counter leapt by 1000000 J"
    assert_unavailable(measure_energy(meter.run, min_window_s=0, windows=1, meter=meter), reason)


@pytest.mark.parametrize(
    ("figures_mj", "expected_j"),
    [
        ({"cpu_energy_mj": 1000.0, "gpu_energy_mj": 1000.0, "total_energy_mj": 5000.0}, 5.0),
        ({"cpu_total_mj": 1000, "gpu_mj": 2000, "dram_mj": 500, "efficiency_cores_mj": [9]}, 3.5),
    ],
)
def test_a_board_is_summed_without_counting_twice(
    monkeypatch: pytest.MonkeyPatch, figures_mj: dict[str, object], expected_j: float
) -> None:
    board = SimpleNamespace(
        get_available_metrics=lambda: set(figures_mj),
        get_total_energy_consumption=lambda: SimpleNamespace(**figures_mj),
    )
    nothing = refuse(FakeZeusError("none"))
    install_zeus(monkeypatch, nothing, nothing, lambda: board)
    assert find_meter().read_j() == [expected_j]
