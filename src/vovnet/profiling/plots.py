"""The figures of a profile as SVG: accuracy against cost, roofline, time and memory of layers."""

import importlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vovnet.errors import ConfigError
from vovnet.profiling.records import ModelProfile, Placement, Profile

_MAX_BARS = 40
_MARKERS = "osD^v<>P*"  # one fewer than there are colours, so that both together do not repeat
_LINEAR_SPAN = 8  # beyond it the cheap ones would lie on one another


@dataclass(frozen=True, slots=True)
class Plot:
    """A drawing, or the reason why there is none, under its title."""

    title: str
    svg: str = ""
    reason: str = ""
    basis: str = ""
    """What was measured how often: belongs beside the drawing."""


def profile_plots(profile: Profile) -> list[Plot]:
    """Accuracy against milliseconds and joules, then roofline and layers of each model.

    Raises ConfigError when matplotlib is missing.
    """
    plots = [
        _accuracy_plot(profile, "ms", "milliseconds for an image", _image_ms),
        _accuracy_plot(profile, "J", "joules for an image", _image_j),
    ]
    for model in profile.models:
        if not model.layers:
            plots.append(Plot(f"{model.name}: layers", reason="the layers were not measured"))
            continue
        plots.append(_roofline_plot(profile, model))
        plots.append(_bars(model, "time of each layer", "ms", lambda layer: layer.time_ms))
        plots.append(
            _bars(
                model,
                "memory access of each layer",
                "MB",
                lambda layer: layer.memory_bytes / 1e6,
            )
        )
    return plots


def _image_ms(model: ModelProfile) -> tuple[float, float, float] | None:
    """Median, and the ends of its interval."""
    result = model.main
    if result is None or result.timings is None:
        return None
    times, batch = result.timings, result.point.batch_size
    return times.median_ms / batch, times.median_low_ms / batch, times.median_high_ms / batch


def _image_j(model: ModelProfile) -> tuple[float, float, float] | None:
    energy = model.main.energy if model.main else None
    if energy is None or energy.energy_per_image_j is None:
        return None
    low, high = energy.energy_per_image_min_j, energy.energy_per_image_max_j
    return energy.energy_per_image_j, low or 0.0, high or 0.0


def _accuracy_plot(
    profile: Profile,
    unit: str,
    label: str,
    cost_of: Callable[[ModelProfile], tuple[float, float, float] | None],
) -> Plot:
    title = f"Accuracy against {label}"
    shown = [
        (model, cost)
        for model in profile.models
        if model.accuracy is not None and (cost := cost_of(model)) is not None
    ]
    if not shown:
        return Plot(title, reason="no model has both a recorded accuracy and this figure")
    figure = _figure(8.0, max(4.2, 0.5 + 0.22 * len(shown)))
    axes = figure.add_subplot()
    data = sorted({model.accuracy.data for model, _ in shown if model.accuracy})
    labels: dict[str, Any] = {}
    for index, (model, (middle, low, high)) in enumerate(shown):
        one = model.accuracy
        assert one is not None
        # An interval by resamples of few pictures may lie beside its figure.
        below = max(one.value - one.low, 0) if one.low is not None else 0
        above = max(one.high - one.value, 0) if one.high is not None else 0
        bars = axes.errorbar(
            middle,
            one.value,
            xerr=[[middle - low], [high - middle]],
            yerr=[[below], [above]],
            fmt=_MARKERS[index % len(_MARKERS)],
        )
        labels[model.name if len(data) == 1 else f"{model.name} ({one.data})"] = bars.lines[0]
    costs = [cost for _, (_, low, high) in shown for cost in (low, high)]
    if min(costs) > 0 and max(costs) > _LINEAR_SPAN * min(costs):
        axes.set_xscale("log")
        ticker = importlib.import_module("matplotlib.ticker")
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(ticker.NullLocator())
        axes.xaxis.set_major_formatter("{x:g}")
    else:
        axes.set_xlim(left=0)
    interval = ", 95 % interval" if unit == "ms" else ""
    axes.set_xlabel(f"{label} ({unit}){interval}")
    metrics = " / ".join(sorted({m.accuracy.metric for m, _ in shown if m.accuracy}))
    axes.set_ylabel(f"{metrics} on {data[0]}" if len(data) == 1 else metrics)
    names = axes.legend(
        labels.values(), labels, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8
    )
    for text in names.get_texts():
        text.set_parse_math(False)
    axes.grid(alpha=0.3, which="both")
    bases = {_basis(model) for model, _ in shown}
    each = "; ".join(f"{model.name}: {_basis(model)}" for model, _ in shown)
    return Plot(title, _svg(figure, title), basis=bases.pop() if len(bases) == 1 else each)


def _basis(model: ModelProfile) -> str:
    """Point of the main result, and the number of times or energy windows behind it."""
    result = model.main
    if result is None or result.timings is None:
        return "not measured"
    windows = result.energy.windows if result.energy is not None else 0
    energy = f", {windows} energy windows" if windows else ""
    return f"{result.point.format()}, n = {result.timings.count}{energy}"


def _layer_basis(model: ModelProfile) -> str:
    return f"{_basis(model)}; layers: median of {model.layer_rounds} passes"


def _roofline_plot(profile: Profile, model: ModelProfile) -> Plot:
    title = f"{model.name}: layers under the roofline of this device"
    precision = model.results[0].point.precision
    peak = profile.ceilings["flops_per_s"][precision]
    bandwidth = profile.ceilings["bytes_per_s"]
    points = [*model.layers, *([model.whole] if model.whole else [])]
    intensities = [layer.intensity for layer in points]
    span = np.geomspace(min(intensities) / 2, max([*intensities, peak / bandwidth]) * 2, 100)
    figure = _figure(6.4, 4.2)
    axes = figure.add_subplot()
    axes.loglog(span, np.minimum(peak, span * bandwidth) / 1e9, color="black", linewidth=1)
    kinds = sorted({layer.kind for layer in model.layers})
    for kind in kinds:
        layers = [layer for layer in model.layers if layer.kind == kind]
        axes.scatter(
            [layer.intensity for layer in layers],
            [layer.achieved_flops_per_s / 1e9 for layer in layers],
            s=[8 + 60 * layer.time_ms / max(x.time_ms for x in model.layers) for layer in layers],
            alpha=0.6,
            label=kind,
        )
    if model.whole is not None:
        whole = model.whole
        axes.plot(whole.intensity, whole.achieved_flops_per_s / 1e9, "k*", ms=12, label="network")
    axes.set_xlabel("flops per byte of memory access")
    axes.set_ylabel(f"GFLOP/s ({precision})")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3, which="both")
    return Plot(title, _svg(figure, title), basis=_layer_basis(model))


def _bars(
    model: ModelProfile, name: str, unit: str, value_of: Callable[[Placement], float]
) -> Plot:
    """Layers in the order of execution; of more than 40 the largest 40."""
    title = f"{model.name}: {name}"
    largest = sorted(model.layers, key=value_of, reverse=True)[:_MAX_BARS]
    layers = [layer for layer in model.layers if layer in largest]
    if len(layers) < len(model.layers):
        title += f" (the largest {len(layers)} of {len(model.layers)})"
    figure = _figure(7.2, 1.2 + 0.16 * len(layers))
    axes = figure.add_subplot()
    colours = ["tab:blue" if layer.bound == "compute" else "tab:orange" for layer in layers]
    axes.barh(range(len(layers)), [value_of(layer) for layer in layers], color=colours)
    names = [layer.name for layer in layers]
    axes.set_yticks(range(len(layers)), names, fontsize=6, parse_math=False)
    axes.invert_yaxis()
    axes.set_xlabel(f"{unit} (blue: bound by compute, orange: by memory)")
    return Plot(title, _svg(figure, title), basis=_layer_basis(model))


def _figure(width: float, height: float) -> Any:
    try:
        module = importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise ConfigError(f"plots need matplotlib, install the extra `profile`: {error}") from None
    return module.Figure(figsize=(width, height), layout="constrained")


def _svg(figure: Any, salt: str) -> str:
    """The drawing without prologue, metadata and date; ids differ between the plots of a page."""
    matplotlib = importlib.import_module("matplotlib")
    stream = io.StringIO()
    nothing: dict[str, Sequence[str] | None] = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(stream, format="svg", metadata=nothing)
    text = stream.getvalue()
    return text[text.index("<svg") :]
