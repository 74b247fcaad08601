"""A profile as a table on a terminal, as plain text, and as CSV."""

import csv
import io
from collections.abc import Callable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vovnet.profiling.records import ModelProfile, PointResult, Profile, printable

_PLAIN_WIDTH = 220
MISSING = "-"

Column = tuple[str, Callable[[ModelProfile, PointResult], str]]


def figure(value: float | None, digits: int = 3, scale: float = 1.0) -> str:
    """A number in significant digits, or a dash where there is none."""
    if value is None:
        return MISSING
    shown = f"{value / scale:.{digits}g}"
    return f"{value / scale:.0f}" if "e+" in shown else shown


def milliseconds(value: float | None) -> str:
    """A time of the size that milliseconds have, with one or two decimals."""
    if value is None:
        return MISSING
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _median(model: ModelProfile, result: PointResult) -> str:
    times = result.timings
    if times is None:
        return MISSING
    interval = f"{milliseconds(times.median_low_ms)}-{milliseconds(times.median_high_ms)}"
    return f"{milliseconds(times.median_ms)} ({interval})"


def _joules(model: ModelProfile, result: PointResult) -> str:
    energy = result.energy
    if energy is None:
        return MISSING
    return "unavailable" if energy.unavailable else figure(energy.energy_per_image_j)


def _of_ceiling(model: ModelProfile, result: PointResult) -> str:
    if model.whole is None or result is not model.main:
        return MISSING
    return f"{100 * model.whole.of_ceiling:.0f} % ({model.whole.bound})"


COLUMNS: tuple[Column, ...] = (
    ("model", lambda model, result: model.name),
    (
        "accuracy",
        lambda model, result: (
            MISSING
            if model.accuracy is None
            else f"{model.accuracy.metric} {model.accuracy.value:.3f}"
        ),
    ),
    ("point", lambda model, result: result.point.format()),
    ("engine", lambda model, result: result.engine or MISSING),
    ("params M", lambda m, r: figure(None if r.counts is None else r.counts.parameters, 4, 1e6)),
    ("GMACs", lambda m, r: figure(None if r.counts is None else r.counts.macs, 4, 1e9)),
    (
        "memory access M",
        lambda m, r: figure(None if r.counts is None else r.counts.memory_access, 4, 1e6),
    ),
    ("batch ms (95 %)", _median),
    ("p90", lambda m, r: milliseconds(None if r.timings is None else r.timings.p90_ms)),
    ("p99", lambda m, r: milliseconds(None if r.timings is None else r.timings.p99_ms)),
    ("min", lambda m, r: milliseconds(None if r.timings is None else r.timings.min_ms)),
    ("n", lambda m, r: MISSING if r.timings is None else str(r.timings.count)),
    ("images/s", lambda model, result: figure(result.images_per_s)),
    ("GFLOP/s", lambda model, result: figure(result.achieved_flops_per_s, 3, 1e9)),
    ("of ceiling", _of_ceiling),
    ("J/image", _joules),
)


def print_profile(profile: Profile, console: Console, *, layers: int = 10) -> None:
    """Print the tables: networks, ratios, stages, the `layers` slowest layers, and the method."""
    style = box.SIMPLE_HEAD if console.is_terminal else None
    console.print(network_table(profile, style), soft_wrap=not console.is_terminal)
    for ratio in profile.ratios:
        console.print(plain(f"ratio  {ratio.format()}"))
    for model in profile.models:
        _print_model(model, console, style, layers)
    for line in [*reasons(profile), *footing(profile)]:
        console.print(plain(line), style="dim")


def plain(text: str) -> Text:
    """The text as it is: neither markup nor emoji nor control characters act."""
    return Text(printable(text))


def plain_console(file: io.TextIOBase | None = None) -> Console:
    """A console for a terminal; wide, without colours and frames where stdout is none."""
    console = Console(file=file, highlight=False)  # type: ignore[arg-type]
    if console.is_terminal:
        return console
    return Console(file=file, highlight=False, width=_PLAIN_WIDTH)  # type: ignore[arg-type]


def network_table(profile: Profile, style: box.Box | None) -> Table:
    """One row for each model and point; columns without any figure are left out."""
    rows = [
        [show(model, result) for _, show in COLUMNS]
        for model in profile.models
        for result in model.results
    ]
    used = [index for index in range(len(COLUMNS)) if any(row[index] != MISSING for row in rows)]
    table = Table(box=style, pad_edge=False)
    for index in used:
        left = COLUMNS[index][0] in ("model", "accuracy", "point", "engine")
        table.add_column(COLUMNS[index][0], justify="left" if left else "right")
    for row in rows:
        table.add_row(*(plain(row[index]) for index in used))
    return table


def reasons(profile: Profile) -> list[str]:
    """Why figures are missing, and what to mind, each reason once."""
    lines = [
        f"{model.name}, {result.point.format()}: {result.error}"
        for model in profile.models
        for result in model.results
        if result.error
    ]
    lines += [f"{model.name}: {note}" for model in profile.models for note in model.notes]
    lines += [
        f"energy unavailable: {result.energy.unavailable}"
        for model in profile.models
        for result in model.results
        if result.energy is not None and result.energy.unavailable
    ]
    return list(dict.fromkeys(lines))


def footing(profile: Profile) -> list[str]:
    """Hardware, versions, date and method: what every figure stands on."""
    machine = profile.machine
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return [
        f"{machine['device_name']} ({machine['device']}), {machine['processor']}, "
        f"{machine['threads']} of {machine['cores']} cores; {machine['system']}, "
        f"Python {machine['python']}, {versions}; {machine['date']}",
        *profile.method,
    ]


def to_csv(profile: Profile) -> str:
    """One line for each model and point, with units in the names of the columns."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    rows = [
        _csv_row(profile, model, result) for model in profile.models for result in model.results
    ]
    writer.writerow(rows[0].keys() if rows else [])
    writer.writerows(map(_csv_cell, row.values()) for row in rows)
    return stream.getvalue()


def _csv_cell(value: object) -> object:
    """A text that a spreadsheet would run as a formula gets an apostrophe before it."""
    return f"'{value}" if isinstance(value, str) and value.startswith(tuple("=+-@")) else value


def _csv_row(profile: Profile, model: ModelProfile, result: PointResult) -> dict[str, object]:
    point, counts, times, energy = result.point, result.counts, result.timings, result.energy
    accuracy = model.accuracy
    return {
        "model": model.name,
        "kind": model.kind,
        "task": model.task,
        "accuracy": accuracy and accuracy.value,
        "accuracy_metric": accuracy and accuracy.metric,
        "accuracy_data": accuracy and accuracy.data,
        "batch_size": point.batch_size,
        "height": point.height,
        "width": point.width,
        "threads": point.threads or profile.machine["threads"],
        "precision": point.precision,
        "layout": point.layout,
        "engine": result.engine,
        "device": result.device,
        "parameters": counts and counts.parameters,
        "macs": counts and counts.macs,
        "flops": counts and counts.flops,
        "memory_access_elements": counts and counts.memory_access,
        "peak_activation_elements": counts and counts.peak_activation_elements,
        "n": times and times.count,
        "median_ms": times and times.median_ms,
        "median_low_ms": times and times.median_low_ms,
        "median_high_ms": times and times.median_high_ms,
        "p90_ms": times and times.p90_ms,
        "p99_ms": times and times.p99_ms,
        "min_ms": times and times.min_ms,
        "iqr_ms": times and times.iqr_ms,
        "images_per_s": result.images_per_s,
        "achieved_flops_per_s": result.achieved_flops_per_s,
        "energy_per_image_j": energy and energy.energy_per_image_j,
        "active_energy_per_image_j": energy and energy.active_energy_per_image_j,
        "power_w": energy and energy.power_w,
        "error": result.error,
        "hardware": profile.machine["device_name"],
        "date": profile.machine["date"],
    }


def _print_model(model: ModelProfile, console: Console, style: box.Box | None, layers: int) -> None:
    if model.accuracy is not None:
        console.print()
        console.print(plain(f"{model.name}: {model.accuracy.format()}"))
    stages = dict(model.stages)
    if model.cold_start is not None:
        stages["fresh process"] = model.cold_start
    if stages:
        rows = [[name, times.format()] for name, times in stages.items()]
        if model.peak_memory_bytes is not None:
            rows.append(["memory of that process", f"{model.peak_memory_bytes / 1e6:.0f} MB"])
        console.print(_table(["one image, file to results", "time"], rows, style))
    slowest = sorted(model.layers, key=lambda layer: layer.time_ms, reverse=True)[:layers]
    if not slowest:
        return
    total_ms = sum(layer.time_ms for layer in model.layers)
    rows = [
        [
            layer.name,
            layer.kind,
            milliseconds(layer.time_ms),
            f"{100 * layer.time_ms / total_ms:.0f} %",
            figure(layer.achieved_flops_per_s, 3, 1e9),
            figure(layer.intensity),
            layer.bound,
            f"{100 * layer.of_ceiling:.0f} %",
        ]
        for layer in slowest
    ]
    header = [f"{model.name}: slowest {len(slowest)} of {len(model.layers)} layers", "kind", "ms"]
    header += ["share", "GFLOP/s", "flops/byte", "bound by", "of ceiling"]
    console.print(_table(header, rows, style))


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], style: box.Box | None) -> Table:
    table = Table(box=style, pad_edge=False)
    for index, name in enumerate(header):
        table.add_column(plain(name), justify="left" if index < 2 else "right")
    for row in rows:
        table.add_row(*map(plain, row))
    return table
