"""The picture of transition weights, in the manner of the VoVNet paper's figure 2."""

from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import Any

from vovnet.errors import ConfigError
from vovnet.files import atomic_path
from vovnet.profiling.transition import TransitionMap

# Of matplotlib, which is optional: annotations must not import it.
Axes = Any
AxesImage = Any

COLUMNS = 4
PANEL_INCHES = 3.2
MAX_TICKS = 13


def draw_transition(maps: Sequence[TransitionMap], path: Path) -> None:
    """Draw one panel for each block into a picture (.png, .svg, .pdf), whole or not at all.

    Rows are sources with the block's input on top, columns are targets with the aggregation last;
    white means no connection. All panels share the colours: from 0 to the largest value.
    Raises ConfigError when there is no map, matplotlib is missing, or it cannot write the suffix.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "drawing: expected matplotlib, found none; install vovnet with its extra: "
            "vovnet[profile]"
        ) from error
    if not maps:
        raise ConfigError("drawing: expected at least one transition map, got none")
    columns = min(COLUMNS, len(maps))
    rows = ceil(len(maps) / columns)
    size = (columns * PANEL_INCHES + 1, rows * (PANEL_INCHES + 0.6))
    figure = Figure(figsize=size, layout="constrained")
    suffix = path.suffix.removeprefix(".").lower()
    if suffix not in figure.canvas.get_supported_filetypes():
        raise ConfigError(f"{path}: expected a picture's suffix such as .png, got {path.suffix!r}")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    largest = max(float(block_map.weights.nan_to_num(0.0).max()) for block_map in maps)
    for axes, block_map in zip(panels, maps, strict=False):
        shown = _draw_panel(axes, block_map, largest)
    for axes in panels[len(maps) :]:
        axes.set_axis_off()
    label = "mean |w| / column's maximum" if maps[0].normalised else "mean |w|"
    figure.colorbar(shown, ax=list(panels), label=label, shrink=0.8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=suffix, dpi=120, bbox_inches="tight")


def _draw_panel(axes: Axes, block_map: TransitionMap, largest: float) -> AxesImage:
    shown = axes.imshow(block_map.weights.numpy(), cmap="viridis", vmin=0, vmax=largest or 1.0)
    axes.set_title(block_map.name, fontsize=8)
    row_step = ceil(len(block_map.sources) / MAX_TICKS)
    column_step = ceil(len(block_map.targets) / MAX_TICKS)
    axes.set_yticks(
        range(0, len(block_map.sources), row_step), block_map.sources[::row_step], fontsize=7
    )
    axes.set_xticks(
        range(0, len(block_map.targets), column_step),
        block_map.targets[::column_step],
        fontsize=7,
        rotation=90,
    )
    return shown
