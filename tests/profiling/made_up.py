"""A profile with round figures, for tests of what is made of profiles."""

from dataclasses import replace

from vovnet.profiling.compare import Ratio
from vovnet.profiling.energy import EnergyResult
from vovnet.profiling.latency import Timings
from vovnet.profiling.records import (
    Accuracy,
    Counts,
    ModelProfile,
    Placement,
    Point,
    PointResult,
    Profile,
)

MACHINE = {
    "processor": "Test CPU",
    "cores": 2,
    "threads": 1,
    "device": "cpu",
    "device_name": "Test CPU",
    "system": "Linux x86_64",
    "python": "3.11.0",
    "versions": {"torch": "2.15.0"},
    "date": "2026-11-22T00:00:00+00:00",
}
CEILINGS = {
    "device": "Test CPU",
    "threads": 1,
    "cores": 2,
    "torch": "2.15.0",
    "date": "2026-11-22T00:00:00+00:00",
    "bytes_per_s": 10e9,
    "flops_per_s": {"fp32": 100e9},
}


def timings(median_ms: float, spread: float = 0.02) -> Timings:
    """Times around a median, the interval `spread` to both sides."""
    return Timings(
        count=40,
        median_ms=median_ms,
        p10_ms=median_ms * 0.95,
        p90_ms=median_ms * 1.1,
        min_ms=median_ms * 0.9,
        max_ms=median_ms * 1.3,
        p99_ms=median_ms * 1.2,
        iqr_ms=median_ms * 0.06,
        median_low_ms=median_ms * (1 - spread),
        median_high_ms=median_ms * (1 + spread),
    )


def energy(joules: float | None) -> EnergyResult:
    if joules is None:
        return EnergyResult(unavailable="no meter here")
    return EnergyResult(
        meter="GPU 0",
        energy_per_image_j=joules,
        energy_per_image_min_j=joules * 0.98,
        energy_per_image_max_j=joules * 1.02,
        power_w=100.0,
        windows=3,
        shortest_window_s=3.0,
        images=300,
    )


def result(
    median_ms: float = 20.0,
    *,
    joules: float | None = None,
    macs: int = 1_000_000_000,
    point: Point | None = None,
    spread: float = 0.02,
) -> PointResult:
    return PointResult(
        point=point or Point(),
        engine="torch",
        device="cpu",
        counts=Counts(
            parameters=2_000_000,
            macs=macs,
            memory_access=3_000_000,
            activations=1_500_000,
            peak_activation_elements=800_000,
        ),
        timings=timings(median_ms, spread),
        warmed_up=True,
        energy=energy(joules),
    )


def layer(name: str, time_ms: float, *, bound: str = "compute") -> Placement:
    return Placement(
        name=name,
        kind="conv",
        time_ms=time_ms,
        flops=1_000_000_000,
        memory_bytes=4_000_000,
        intensity=250.0,
        achieved_flops_per_s=1e9 / (time_ms / 1000),
        ceiling_flops_per_s=100e9,
        bound=bound,  # type: ignore[arg-type]
    )


def model(name: str, *results: PointResult, accuracy: float | None = 0.5) -> ModelProfile:
    measured = results or (result(),)
    known = Accuracy(value=accuracy or 0, metric="mask AP", data="nuclei test", low=0.45, high=0.55)
    return ModelProfile(
        name=name,
        kind="folder",
        task="segment",
        input="random pixels",
        accuracy=None if accuracy is None else known,
        results=measured,
        stages={"decode": timings(2.0), "all stages": timings(25.0)},
        cold_start=timings(3000.0),
        whole=replace(layer(name, 20.0), kind="network"),
        layer_rounds=10,
        layers=(layer("stem.conv", 15.0), layer("head.conv", 5.0, bound="memory")),
    )


def profile(*models: ModelProfile, ratios: tuple[Ratio, ...] = ()) -> Profile:
    return Profile(
        machine=MACHINE,
        method=("Times: by a made-up clock.",),
        models=models or (model("a"),),
        ratios=ratios,
        ceilings=CEILINGS,
    )
