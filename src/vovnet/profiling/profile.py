"""The profiler: counts, times, energy and roofline of several models in one interleaved run."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vovnet.classify import Classifier
from vovnet.errors import ConfigError, DataError
from vovnet.files import cache_folder
from vovnet.images import read_image
from vovnet.predict import Predictor
from vovnet.profiling.compare import Comparison, Ratio, Sampling, interleave
from vovnet.profiling.energy import EnergyResult, Meter, MeterError, find_meter, measure_energy
from vovnet.profiling.latency import Timings
from vovnet.profiling.machine import describe_machine
from vovnet.profiling.placing import image_counts, place_network
from vovnet.profiling.records import (
    LAYOUTS,
    Accuracy,
    Counts,
    ModelProfile,
    Placement,
    Point,
    PointResult,
    Profile,
    printable,
    why_unmeasured,
    with_sizes,
)
from vovnet.profiling.roofline import DTYPES, Ceilings, find_ceilings
from vovnet.profiling.stages import image_file, time_cold_start, time_stages
from vovnet.profiling.target import (
    Network,
    Target,
    UntimedError,
    default_side,
    explain,
    known_accuracy,
    open_network,
    picture,
)
from vovnet.runtime.engine import ENGINES
from vovnet.runtime.torch import choose_device


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What to measure; the sweep is every combination of the five tuples, its first one the main
    point. Empty image_sizes: the largest `default_side` of the targets.
    """

    engine: str = "auto"
    device: str = "auto"
    batch_sizes: tuple[int, ...] = (1,)
    image_sizes: tuple[tuple[int, int], ...] = ()
    threads: tuple[int | None, ...] = (None,)
    precisions: tuple[str, ...] = ("fp32",)
    layouts: tuple[str, ...] = ("nhwc",)
    sampling: Sampling = field(default_factory=Sampling)
    energy: bool = True
    energy_windows: int = 3
    energy_window_s: float = 3.0
    idle_s: float = 3.0
    end_to_end: bool = True
    cold_starts: int = 3
    roofline: bool = True
    layer_rounds: int = 10
    new_ceilings: bool = False
    """Measure the device's ceilings again instead of taking those kept from an earlier run."""
    image: Path | None = None
    """Picture that the networks see; random pixels when None."""

    def __post_init__(self) -> None:
        for name in ("batch_sizes", "threads"):
            values = [value for value in getattr(self, name) if value is not None]
            if not getattr(self, name) or any(value < 1 for value in values):
                raise ConfigError(f"{name}: expected whole numbers of at least 1, got {values}")


def check_settings(settings: Settings) -> None:
    """Refuse what no model could run with, before anything is measured.

    Raises ConfigError on an unknown engine, device, precision or layout, and ImageError on a
    picture that cannot be read.
    """
    device = choose_device(settings.device)
    known = (
        ("engine", ENGINES, (settings.engine,)),
        ("precision", ("auto", *DTYPES), settings.precisions),
        ("layout", LAYOUTS, settings.layouts),
    )
    for name, allowed, given in known:
        for value in given:
            if value not in allowed:
                raise ConfigError(f"{name}: expected {' or '.join(allowed)}, got {value!r}")
    if device.type == "cpu" and set(settings.precisions) == {"fp16"}:
        raise ConfigError("precision: expected fp32 or bf16 on the CPU, got 'fp16'")
    if settings.image is not None:
        read_image(settings.image)


def profile_module(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    *,
    name: str = "module",
    settings: Settings | None = None,
) -> Profile:
    """Profile any module on its own inputs, of which the first holds the batch.

    The module is copied and stays as it is. Sweeps run over threads, precision and layout.
    Raises ConfigError where it cannot run.
    """
    return profile_targets([module_target(name, module, inputs)], settings)


def module_target(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> Target:
    """A target of a copy of the module in evaluation mode; raises ConfigError without inputs."""
    if not isinstance(inputs, tuple):
        raise ConfigError(f"{name}: expected a tuple of inputs, got {type(inputs).__name__}")
    if not inputs or inputs[0].ndim < 1 or not len(inputs[0]):
        raise ConfigError(f"{name}: expected inputs whose first tensor holds a batch of at least 1")
    return Target(name, "module", "", None, copy.deepcopy(module).eval(), inputs)


def profile_targets(
    targets: Sequence[Target],
    settings: Settings | None = None,
    *,
    accuracies: Mapping[str, Accuracy] | None = None,
    progress: Callable[[str], None] = lambda text: None,
    require_one: bool = True,
) -> Profile:
    """Profile several targets together; ratios are to the first.

    A point that one target cannot run (out of memory, a precision the device lacks) is reported
    with its reason, and the sweep goes on; so is a target that runs at none. A file of one size
    runs at that size. `accuracies` go over those that folders record.
    Raises ConfigError when no target runs at any point and require_one is set, OSError when the
    device was lost.
    """
    settings = settings or Settings()
    if len({target.name for target in targets}) < len(targets) or not targets:
        raise ConfigError(
            f"expected different models, got {', '.join(target.name for target in targets)}"
        )
    threads_before = torch.get_num_threads()
    try:
        return _profile(targets, settings, accuracies or {}, progress, require_one)
    finally:
        torch.set_num_threads(threads_before)


def _profile(
    targets: Sequence[Target],
    settings: Settings,
    accuracies: Mapping[str, Accuracy],
    progress: Callable[[str], None],
    require_one: bool,
) -> Profile:
    device = choose_device(settings.device)
    meter = _open_meter(settings.energy)
    results: dict[str, list[PointResult]] = {target.name: [] for target in targets}
    ratios: tuple[Ratio, ...] = ()
    networks: dict[str, Network] = {}
    points = sweep(targets, settings)
    for number, point in enumerate(points):
        shown = _own_point(targets[0], point)
        progress(f"point {number + 1} of {len(points)}: {shown.format()}")
        measured = measure_point(targets, point, settings, meter=meter)
        for name, result in measured.results.items():
            results[name].append(result)
        if number == 0:
            ratios = tuple(with_sizes(one, measured.results) for one in measured.comparison.ratios)
            networks = measured.networks
    _report_unmeasured(results, progress, require_one)
    if points[0].threads is not None:  # the sweep has left it at its last point's
        torch.set_num_threads(points[0].threads)
    ceilings = _ceilings(device, points[0], settings, progress)
    models = []
    for target in targets:
        progress(f"{target.name}: stages and layers")
        models.append(
            _model_profile(
                target, tuple(results[target.name]), networks.get(target.name), settings, ceilings
            )
        )
    return Profile(
        machine=describe_machine(device),
        method=method_lines(settings),
        models=tuple(replace(m, accuracy=accuracies.get(m.name, m.accuracy)) for m in models),
        ratios=ratios,
        ceilings={} if ceilings is None else ceilings.to_dict(),
    )


@dataclass(frozen=True, slots=True)
class MeasuredPoint:
    """Results at one point by target, and the networks that ran."""

    results: Mapping[str, PointResult]
    comparison: Comparison
    networks: dict[str, Network]


def measure_point(
    targets: Sequence[Target],
    point: Point,
    settings: Settings,
    *,
    meter: Meter | EnergyResult | None = None,
) -> MeasuredPoint:
    """Time the targets interleaved at one point; `meter` adds joules, or the reason for none."""
    networks: dict[str, Network] = {}
    errors: dict[str, str] = {}
    counted_alone: set[str] = set()
    for target in targets:
        try:
            networks[target.name] = open_network(
                target,
                _own_point(target, point),
                engine=target.engine or settings.engine,
                device=settings.device,
                image=settings.image,
            )
        except (ConfigError, RuntimeError, MemoryError) as error:
            errors[target.name] = explain(error, target.name)
            counted_alone |= {target.name} if isinstance(error, UntimedError) else set()
    empty = Comparison({}, {}, ())
    runs = {name: network.run for name, network in networks.items()}
    failing = (RuntimeError, MemoryError, ValueError, TypeError)
    comparison = interleave(runs, settings.sampling, tolerate=failing) if runs else empty
    errors |= {name: explain(error, name) for name, error in comparison.failures.items()}
    results = {
        target.name: _point_result(
            target, point, networks.get(target.name), comparison, errors, settings, meter
        )
        for target in targets
    }
    results |= {name: replace(results[name], counted_alone=True) for name in counted_alone}
    return MeasuredPoint(results, comparison, networks)


def sweep(targets: Sequence[Target], settings: Settings) -> list[Point]:
    """Every combination of batch size, image size, threads, precision and layout, in that order."""
    side = max(map(default_side, targets))
    sizes = settings.image_sizes or ((side, side),)
    combinations = product(
        settings.batch_sizes, sizes, settings.threads, settings.precisions, settings.layouts
    )
    return [
        Point(batch, height, width, threads, precision, layout)
        for batch, (height, width), threads, precision, layout in combinations
    ]


def method_lines(settings: Settings) -> tuple[str, ...]:
    """How the figures came about, in sentences that stand beside them."""
    sampling = settings.sampling
    pixels = "random pixels" if settings.image is None else printable(settings.image.name)
    return (
        f"Times: warmed up until stable; rounds in random order over all models, at least "
        f"{sampling.min_rounds}, then until each interval is within "
        f"{100 * sampling.precision:g} % or {sampling.max_s:g} s are over; the device is waited "
        "for after each batch. Intervals are 95 %: of a median by rank, of a ratio by bootstrap "
        "over rounds. Stages from a file to results: one model after another, "
        f"{sampling.min_rounds} times each.",
        f"Networks see {pixels}; "
        "BatchNorm is folded in model folders and architectures, not in other modules; bf16 and "
        "fp16 are torch's autocast.",
        "Energy: all metered devices over whole windows, idle power included; active energy is "
        "less idle power x time. Without a meter there is no figure.",
        "Counts: macs of convolutions and linear layers, flops = 2 x macs; memory access is input "
        "+ output + weights of each layer, in elements.",
    )


def _own_point(target: Target, point: Point, network: Network | None = None) -> Point:
    """The point with the sizes of a target that brings its own inputs, or of a file of one size."""
    if network is not None and network.own_size is not None:
        batch_size, height, width = network.own_size
        return replace(point, batch_size=batch_size, height=height, width=width)
    if not target.inputs:
        return point
    shape = target.inputs[0].shape
    height, width = shape[-2:] if len(shape) == 4 else (1, 1)
    return replace(point, batch_size=shape[0], height=height, width=width)


def _point_result(
    target: Target,
    point: Point,
    network: Network | None,
    comparison: Comparison,
    errors: Mapping[str, str],
    settings: Settings,
    meter: Meter | EnergyResult | None,
) -> PointResult:
    name, point = target.name, _own_point(target, point, network)
    counts: Counts | None = None
    error = errors.get(name)
    try:
        counts = image_counts(target, point)
    except (ConfigError, DataError, ImportError, RuntimeError) as failure:
        error = error or f"not counted: {explain(failure, name)}"
    if network is None or name not in comparison.times_s:
        return PointResult(
            point=point, engine="", device=settings.device, counts=counts, error=error
        )
    return PointResult(
        point=replace(point, precision=network.precision),
        engine=network.engine,
        device=network.device,
        counts=counts,
        timings=comparison.timings(name),
        warmed_up=comparison.warm_ups[name].stable,
        energy=_energy(network, settings, meter),
        error=error,
    )


def _energy(
    network: Network, settings: Settings, meter: Meter | EnergyResult | None
) -> EnergyResult | None:
    if meter is None or isinstance(meter, EnergyResult):
        return meter
    return measure_energy(
        network.run,
        min_window_s=settings.energy_window_s,
        windows=settings.energy_windows,
        idle_s=settings.idle_s,
        meter=meter,
    )


def _open_meter(wanted: bool) -> Meter | EnergyResult | None:
    if not wanted:
        return None
    try:
        return find_meter()
    except MeterError as error:
        return EnergyResult(unavailable=str(error))


def _report_unmeasured(
    results: Mapping[str, Sequence[PointResult]],
    progress: Callable[[str], None],
    require_one: bool,
) -> None:
    reasons = {name: why_unmeasured(measured) for name, measured in results.items()}
    lines = [f"{name}: {reason}" for name, reason in reasons.items() if reason is not None]
    if len(lines) == len(results) and require_one:
        raise ConfigError("; ".join(lines))
    for line in lines:
        progress(f"not measured: {line}")


def _ceilings(
    device: torch.device, point: Point, settings: Settings, progress: Callable[[str], None]
) -> Ceilings | None:
    if not settings.roofline:
        return None
    progress(f"ceilings of this device, measured now or as kept in {cache_folder()}")
    precisions = [point.precision] if point.precision in DTYPES else ["fp32"]
    return find_ceilings(device, precisions, afresh=settings.new_ceilings)


def _model_profile(
    target: Target,
    results: tuple[PointResult, ...],
    network: Network | None,
    settings: Settings,
    ceilings: Ceilings | None,
) -> ModelProfile:
    whole: Placement | None = None
    layers: tuple[Placement, ...] = ()
    if ceilings is not None and network is not None:
        whole, layers = place_network(
            target, results[0], network, ceilings=ceilings, rounds=settings.layer_rounds
        )
    stages, cold_start, peak_memory_bytes = _end_to_end(target, results[0], settings)
    return ModelProfile(
        name=target.name,
        kind=target.kind,
        task=target.task,
        input="random pixels" if settings.image is None else printable(settings.image.name),
        accuracy=known_accuracy(target, results[0].engine),
        results=results,
        stages=stages,
        cold_start=cold_start,
        peak_memory_bytes=peak_memory_bytes,
        whole=whole,
        layers=layers,
        layer_rounds=settings.layer_rounds if layers else 0,
        notes=_notes(results[0], network, layers),
    )


def _notes(
    result: PointResult, network: Network | None, layers: Sequence[Placement]
) -> tuple[str, ...]:
    """What a reader must know before believing the figures."""
    notes = []
    if network is not None and network.own_size is not None:
        size = "batch {}, {} x {}".format(*network.own_size)
        notes.append(f"its file has a size of its own: it ran at {size}, not as asked")
    above = [layer.name for layer in layers if layer.of_ceiling > 1.1]
    if above:
        notes.append(
            f"{len(above)} layers run faster than the measured ceilings allow: these were measured "
            "on a busier machine, or the layer's data stayed in a cache (--new-ceilings)"
        )
    if result.timings is not None and not result.warmed_up:
        notes.append("the times were still falling when the warm-up ended")
    if result.counts is not None and result.counts.note:
        notes.append(f"counts: {result.counts.note}")
    return tuple(notes)


def _end_to_end(
    target: Target, result: PointResult, settings: Settings
) -> tuple[dict[str, Timings], Timings | None, int | None]:
    """Times of the stages and of fresh processes, and the memory of one."""
    runs = target.kind == "folder" and target.path is not None and result.timings is not None
    if not settings.end_to_end or not runs or target.path is None:
        return {}, None, None
    options: dict[str, Any] = {
        "engine": result.engine,
        "precision": result.point.precision,
        "device": result.device,
        "threads": result.point.threads,
    }
    kind = Classifier if target.task == "classify" else Predictor
    with image_file(settings.image, picture(result.point, None)) as path:
        loaded = kind.load(target.path, **options)
        if isinstance(loaded, Classifier) and not loaded.class_names:
            return {}, None, None
        stages = time_stages(loaded, path, rounds=settings.sampling.min_rounds)
        if settings.cold_starts < 1:
            return stages, None, None
        cold = time_cold_start(kind, target.path, path, runs=settings.cold_starts, **options)
    return stages, *cold
