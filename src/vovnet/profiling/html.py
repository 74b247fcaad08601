"""A profile as one HTML page that needs nothing else: no scripts, no files, no network."""

from collections.abc import Sequence
from html import escape

from vovnet.html_page import html_page, html_paragraphs, html_table
from vovnet.profiling.plots import Plot
from vovnet.profiling.records import ModelProfile, Profile
from vovnet.profiling.report import COLUMNS, MISSING, figure, footing, milliseconds, reasons

_MOST_NAMES = 3  # in a heading
_STYLE = "figure svg { background: #fff }"  # matplotlib's ink is black


def to_html(profile: Profile, plots: Sequence[Plot]) -> str:
    """The whole page: table, ratios, plots, stages and layers, each with hardware, n and date."""
    names = ", ".join(model.name for model in profile.models)
    if len(profile.models) > _MOST_NAMES:
        names = f"{len(profile.models)} models"
    parts = [
        f"<h1>What an image costs: {escape(names)}</h1>",
        html_paragraphs(footing(profile)[:1]),
        "<h2>Networks</h2>",
        _network_table(profile),
        html_paragraphs(reasons(profile)),
    ]
    if profile.ratios:
        parts += ["<h2>Ratios of times</h2>", html_paragraphs([r.format() for r in profile.ratios])]
    parts += [_plot_part(plot, profile) for plot in plots]
    for model in profile.models:
        parts += _model_parts(model, profile)
    parts += ["<h2>Method</h2>", html_paragraphs(footing(profile))]
    return html_page(names, parts, style=_STYLE)


def _network_table(profile: Profile) -> str:
    rows = [
        [show(model, result) for _, show in COLUMNS]
        for model in profile.models
        for result in model.results
    ]
    used = [index for index in range(len(COLUMNS)) if any(row[index] != MISSING for row in rows)]
    header = [COLUMNS[index][0] for index in used]
    return html_table(header, [[row[index] for index in used] for row in rows])


def _plot_part(plot: Plot, profile: Profile) -> str:
    if not plot.svg:
        return f"<h2>{escape(plot.title)}</h2>\n<p>Not drawn: {escape(plot.reason)}.</p>"
    machine = profile.machine
    caption = f"{machine['device_name']}, {machine['threads']} threads; {plot.basis}; "
    caption += str(machine["date"])
    return (
        f"<h2>{escape(plot.title)}</h2>\n<figure>{plot.svg}"
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _model_parts(model: ModelProfile, profile: Profile) -> list[str]:
    parts = []
    stages = dict(model.stages)
    if model.cold_start is not None:
        stages["fresh process to first result"] = model.cold_start
    if stages:
        rows = [[name, times.format()] for name, times in stages.items()]
        if model.peak_memory_bytes is not None:
            rows.append(["memory of that process", f"{model.peak_memory_bytes / 1e6:.0f} MB"])
        parts += [f"<h2>{escape(model.name)}: one image, file to results</h2>"]
        parts += [html_table(["stage", "time"], rows)]
    if model.layers:
        rows = [
            [
                layer.name,
                layer.kind,
                milliseconds(layer.time_ms),
                figure(layer.flops, 3, 1e6),
                figure(layer.memory_bytes, 3, 1e6),
                figure(layer.intensity),
                figure(layer.achieved_flops_per_s, 3, 1e9),
                layer.bound,
                f"{100 * layer.of_ceiling:.0f} %",
            ]
            for layer in model.layers
        ]
        header = ["layer", "kind", "ms", "MFLOP", "memory MB", "flops/byte", "GFLOP/s"]
        parts += [f"<h2>{escape(model.name)}: every layer</h2>"]
        parts += [html_table([*header, "bound by", "of ceiling"], rows)]
        parts += [html_paragraphs([_ceiling_line(profile)])]
    return parts


def _ceiling_line(profile: Profile) -> str:
    ceilings = profile.ceilings
    rates = ", ".join(
        f"{rate / 1e9:.0f} GFLOP/s {name}" for name, rate in ceilings["flops_per_s"].items()
    )
    return (
        f"Ceilings of {ceilings['device']} with {ceilings['threads']} threads, measured "
        f"{ceilings['date']}: {rates}, {ceilings['bytes_per_s'] / 1e9:.1f} GB/s copied."
    )
