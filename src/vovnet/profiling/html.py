"""A profile as one HTML page that needs nothing else: no scripts, no files, no network."""

from collections.abc import Sequence
from html import escape

from vovnet.profiling.plots import Plot
from vovnet.profiling.records import ModelProfile, Profile
from vovnet.profiling.report import COLUMNS, MISSING, figure, footing, milliseconds, reasons

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem;
  color: #1c1c1c; background: #fff }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
table { border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #ddd;
  white-space: nowrap }
th { border-bottom: 1px solid #333 } td:first-child, th:first-child { text-align: left }
figure { margin: 1rem 0 } figure svg { max-width: 100%; height: auto }
figcaption, .footing { color: #555; font-size: 13px }
"""


def to_html(profile: Profile, plots: Sequence[Plot]) -> str:
    """The whole page: table, ratios, plots, stages and layers, each with hardware, n and date."""
    names = ", ".join(model.name for model in profile.models)
    parts = [
        f"<h1>What an image costs: {escape(names)}</h1>",
        _paragraphs(footing(profile)[:1]),
        "<h2>Networks</h2>",
        _network_table(profile),
        _paragraphs(reasons(profile)),
    ]
    if profile.ratios:
        parts += ["<h2>Ratios of times</h2>", _paragraphs([r.format() for r in profile.ratios])]
    parts += [_plot_part(plot, profile) for plot in plots]
    for model in profile.models:
        parts += _model_parts(model, profile)
    parts += ["<h2>Method</h2>", _paragraphs(footing(profile))]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(names)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _network_table(profile: Profile) -> str:
    rows = [
        [show(model, result) for _, show in COLUMNS]
        for model in profile.models
        for result in model.results
    ]
    used = [index for index in range(len(COLUMNS)) if any(row[index] != MISSING for row in rows)]
    header = [COLUMNS[index][0] for index in used]
    return _table(header, [[row[index] for index in used] for row in rows])


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
        parts += [f"<h2>{escape(model.name)}: one image, file to results</h2>"]
        parts += [_table(["stage", "time"], rows)]
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
        parts += [_table([*header, "bound by", "of ceiling"], rows)]
        parts += [_paragraphs([_ceiling_line(profile)])]
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


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"


def _paragraphs(lines: Sequence[str]) -> str:
    return "\n".join(f'<p class="footing">{escape(line)}</p>' for line in lines)
