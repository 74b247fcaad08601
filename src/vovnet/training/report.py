"""What a training shows and leaves behind: live progress, metrics.jsonl, and its curves."""

import importlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn

from vovnet.errors import ConfigError
from vovnet.files import atomic_path, atomic_write_text

Record = dict[str, Any]
Point = tuple[int, float]

_OF_STEPS = ("losses", "learning rate")
_FEW_POINTS = 20

_CURVES: dict[str, dict[str, tuple[str, ...]]] = {
    "validation": {
        "box AP": ("box", "ap"),
        "box AP50": ("box", "ap50"),
        "mask AP": ("mask", "ap"),
        "mask AP50": ("mask", "ap50"),
        "top-1": ("top1",),
        "matched": ("matched",),
    },
    "spread of the features": {"feature_std": ("feature_std",)},
    "directions of the features": {"feature_rank": ("feature_rank",)},
}
"""Of each drawing its curves, and where their values stand in the metrics of an evaluation."""


class ProgressReport:
    """Messages on stderr, and on a terminal a bar that moves with every step."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(file=sys.stderr, highlight=False, soft_wrap=True)
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._progress = Progress(
                BarColumn(bar_width=24),
                TaskProgressColumn(),
                TextColumn("{task.description}"),
                console=self.console,
            )
            self._task = self._progress.add_task("starting", total=1.0)
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def message(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, markup=False)

    def step(self, record: Record, spent_fraction: float) -> None:
        """The state after a step; moves the bar where there is one."""
        if self._progress is not None and self._task is not None:
            text = describe_step(record)
            self._progress.update(self._task, completed=spent_fraction, description=text)

    def busy(self, text: str) -> None:
        """What takes a while without steps; shown where there is a bar."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description=text)

    def log(self, record: Record) -> None:
        """A line of metrics.jsonl; shown as a line where no bar shows it."""
        if self._progress is None:
            self.message(describe_step(record))


class SilentReport(ProgressReport):
    """Shows nothing: for the processes beside the one that does."""

    def __init__(self) -> None:
        super().__init__(Console(quiet=True))


class TensorboardLog:
    """The records as TensorBoard's event files in the run folder."""

    def __init__(self, folder: Path) -> None:
        try:
            tensorboard: Any = importlib.import_module("torch.utils.tensorboard")
        except ImportError as error:
            raise ConfigError(
                "tensorboard: expected the package tensorboard, found none; install vovnet with "
                "its extra: vovnet[train]"
            ) from error
        self._writer = tensorboard.SummaryWriter(str(folder))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._writer.close()

    def write(self, record: Mapping[str, Any]) -> None:
        """Every number of a record, by the path of its keys."""
        for name, value in _numbers(record):
            self._writer.add_scalar(f"{record['kind']}/{name}", value, record["step"])


def _numbers(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and key not in ("kind", "step"):
            yield f"{prefix}{key}", float(value)


def describe_step(record: Record) -> str:
    """One line: where the training is, each loss, learning rate, speed, and the time left."""
    losses = " ".join(f"{name} {value:.3f}" for name, value in record["losses"].items())
    eta_s = record["eta_s"]
    left = "?" if eta_s is None else f"{int(eta_s) // 60}:{int(eta_s) % 60:02d}"
    return (
        f"epoch {record['epoch']:.2f} step {record['step']}  {losses}  "
        f"lr {record['learning_rate']:.2e}  {record['images_per_s']:.1f} images/s  {left} left"
    )


def describe_length(steps: int, epochs: float, minutes: float) -> str:
    """One line at a training's end, with a hint where it was too short to mean anything."""
    short = ", less than one pass over the images: it needs more time" if epochs < 1 else ""
    return f"trained {steps} steps, {epochs:.2f} epochs, in {minutes:.1f} minutes{short}"


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Add a line of JSON to the file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, allow_nan=False) + "\n")


def read_records(path: Path) -> list[Record]:
    """The lines of a metrics file; a last line that a crash has cut off is left out."""
    records: list[Record] = []
    if not path.is_file():
        return records
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def drop_records_after(path: Path, step: int) -> None:
    """Remove the lines of steps that a resumed training does again."""
    kept = [json.dumps(record) for record in read_records(path) if record["step"] <= step]
    atomic_write_text(path, "".join(f"{line}\n" for line in kept))


def require_matplotlib() -> None:
    """Raise ConfigError, before hours of training, where the curves could not be drawn after."""
    try:
        importlib.import_module("matplotlib")
    except ImportError as error:
        raise ConfigError(
            "training: expected matplotlib, which draws the curves, found none; "
            "install vovnet with its extra: vovnet[train]"
        ) from error


def draw_curves(path: Path, records: Sequence[Record]) -> None:
    """A PNG of the losses, the learning rate and what evaluations measured, over the steps."""
    drawings = curves_of(records)
    figure = importlib.import_module("matplotlib.figure").Figure(
        figsize=(5 * len(drawings), 4), layout="constrained"
    )
    every_axes = figure.subplots(1, len(drawings))
    for axes, (title, curves) in zip(every_axes, drawings.items(), strict=True):
        for name, points in curves.items():
            marker = "." if len(points) <= _FEW_POINTS or title not in _OF_STEPS else None
            axes.plot(*zip(*points, strict=True), marker=marker, label=name)
        axes.set(title=title, xlabel="step")
        axes.ticklabel_format(axis="y", scilimits=(-2, 4))
        axes.locator_params(axis="x", nbins=6, integer=True)
        axes.grid(alpha=0.3)
        if curves and title in ("losses", "validation"):
            axes.legend(fontsize="small")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def curves_of(records: Sequence[Record]) -> dict[str, dict[str, list[Point]]]:
    """Of each drawing its curves by name, as (step, value); drawings of evaluations that none of
    the records holds a value of are left out, but the first.
    """
    steps = [record for record in records if record["kind"] == "train"]
    evaluations = [record for record in records if record["kind"] == "eval"]
    names = steps[-1]["losses"] if steps else ()
    drawings: dict[str, dict[str, list[Point]]] = {
        "losses": {name: _points(steps, ("losses", name)) for name in names},
        "learning rate": {"learning rate": _points(steps, ("learning_rate",))},
    }
    for title, curves in _CURVES.items():
        found = {name: _points(evaluations, ("metrics", *at)) for name, at in curves.items()}
        drawings[title] = {name: points for name, points in found.items() if points}
    shown = (*_OF_STEPS, "validation")
    return {title: curves for title, curves in drawings.items() if curves or title in shown}


def _points(records: Sequence[Record], keys: Sequence[str]) -> list[Point]:
    points = [(record["step"], _at(record, keys)) for record in records]
    return [(step, value) for step, value in points if value is not None]


def _at(values: Any, keys: Sequence[str]) -> Any:
    """The value under nested keys, None where there is none."""
    for key in keys:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values
