"""`vovnet val` of classifiers."""

import csv
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table

from vovnet.class_pictures import (
    TILE,
    check_drawing,
    draw_confusion,
    draw_mistakes,
    find_mistakes,
)
from vovnet.classify import Classifier, softmax
from vovnet.cli.engines import print_engine
from vovnet.data.classes import ClassData
from vovnet.errors import ConfigError, DataError
from vovnet.evaluation_classes import (
    ClassFigures,
    ClassMetrics,
    evaluate_classes,
    load_known_classes,
    predict_logits,
)
from vovnet.files import atomic_path, atomic_write_bytes, atomic_write_json
from vovnet.profiling.report import plain, plain_console

CONFUSION, MISTAKES, PREDICTIONS, METRICS = (
    "confusion.png",
    "mistakes.png",
    "predictions.csv",
    "metrics.json",
)
TOP = 5
MAX_ROWS = 100
WORST_ROWS = 20


def val_classes(
    model: str,
    data_dir: Path,
    split: str,
    *,
    bootstrap: int,
    engine: str,
    precision: str,
    device: str,
    threads: int | None,
    output: Path | None,
    skip_bad: bool,
    as_json: bool,
) -> int:
    """Prints accuracy and the table of classes; with `output` writes pictures and answers there."""
    if output is not None:
        check_drawing()
        if output.exists() and not output.is_dir():
            raise ConfigError(f"output: expected a folder, found the file {output}")
    classifier = Classifier.load(
        model, engine=engine, precision=precision, device=device, threads=threads
    )
    if not classifier.class_names:
        raise ConfigError(f"{model}: expected a classifier, found a backbone without classes")
    data = load_known_classes(data_dir, split, classifier.class_names)
    print_engine(classifier.engine)
    logits, data, skipped = _predict(classifier, data, skip_bad)
    metrics = evaluate_classes(logits, data.labels, classifier.class_names, bootstrap=bootstrap)
    report = metrics.to_dict(with_confusion=True) | {"split": split, "skipped": skipped}
    if as_json:
        print(json.dumps(report, allow_nan=False))
    else:
        console = plain_console()
        for line in metrics.format().splitlines():
            console.print(plain(line), soft_wrap=True)
        _print_classes(metrics.per_class, console)
    if output is not None:  # last, so that a full disk does not cost the figures
        _write(output, data, logits, metrics, report)
        print(f"vovnet: written to {output}", file=sys.stderr)
    return 0


def _predict(
    classifier: Classifier, data: ClassData, skip_bad: bool
) -> tuple[NDArray[np.float32], ClassData, list[dict[str, str]]]:
    """Logits, the pictures they belong to, and those that were left out."""
    bad: dict[int, str] = {}

    def leave_out(index: int, reason: str) -> None:
        bad[index] = reason
        print(f"vovnet: left out: {reason}", file=sys.stderr)

    console = Console(stderr=True)
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("classifying", total=len(data))
        logits = predict_logits(
            classifier,
            data,
            on_bad=leave_out if skip_bad else None,
            on_batch=lambda done: progress.update(task, completed=done),
        )
    kept = [index for index in range(len(data)) if index not in bad]
    if not kept:
        raise DataError(f"{data.source}: expected a picture that can be read, found none")
    skipped = [{"file": data.name(index), "reason": reason} for index, reason in bad.items()]
    return logits, data.chosen(kept), skipped


def _write(
    output: Path,
    data: ClassData,
    logits: NDArray[np.float32],
    metrics: ClassMetrics,
    report: dict[str, Any],
) -> None:
    output.mkdir(parents=True, exist_ok=True)
    probabilities = softmax(logits)
    names = metrics.class_names
    sheet = draw_mistakes(
        find_mistakes(probabilities, data.labels),
        lambda index: data.read(index, min_side=TILE),
        names,
    )
    with atomic_path(output / MISTAKES) as temporary:
        Image.fromarray(sheet).save(temporary, format="PNG")
    draw_confusion(metrics.confusion, names, output / CONFUSION)
    # A file name need not be Unicode.
    text = _predictions(data, probabilities, names).encode(errors="backslashreplace")
    atomic_write_bytes(output / PREDICTIONS, text)
    atomic_write_json(output / METRICS, report, indent=None)


def _predictions(data: ClassData, probabilities: NDArray[np.float32], names: Sequence[str]) -> str:
    """CSV: file, true class, and the best classes with their probabilities, best first."""
    count = min(TOP, len(names))
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    columns = [f"{what}{place}" for place in range(1, count + 1) for what in ("top", "probability")]
    writer.writerow(["file", "true", *columns])
    for index, row in enumerate(probabilities):
        best = np.argsort(-row, kind="stable")[:count].tolist()
        answers = [value for label in best for value in (names[label], f"{row[label]:.6f}")]
        writer.writerow([data.name(index), names[data.labels[index]], *answers])
    return stream.getvalue()


def _print_classes(classes: Sequence[ClassFigures], console: Console) -> None:
    """A row for each class that has images or answers; of very many the worst."""
    shown = [entry for entry in classes if entry.count or entry.precision == entry.precision]
    if len(shown) > MAX_ROWS:
        console.print(plain(f"the {WORST_ROWS} classes of least F1 of {len(shown)}:"))
        shown = sorted(shown, key=lambda entry: entry.f1)[:WORST_ROWS]
    table = Table(box=box.SIMPLE_HEAD if console.is_terminal else None, pad_edge=False)
    table.add_column("class")
    for name in ("images", "recall", "precision", "F1"):
        table.add_column(name, justify="right")
    for entry in shown:
        figures = (entry.recall, entry.precision, entry.f1)
        texts = ["-" if value != value else f"{value:.3f}" for value in figures]
        table.add_row(plain(entry.name), str(entry.count), *texts)
    console.print(table, soft_wrap=not console.is_terminal)
