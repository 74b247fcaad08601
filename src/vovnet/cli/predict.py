"""`vovnet predict`."""

import json
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from vovnet.errors import ConfigError
from vovnet.files import new_run_dir
from vovnet.images import find_images
from vovnet.model_folder import resolve_model
from vovnet.predict import Predictor
from vovnet.predict_files import predict_files, return_large_blocks


def predict(
    model: str,
    source: str,
    output: Path | None,
    save: bool,
    score_thresholds: Sequence[str],
    max_detections: int | None,
    tile: int | None,
    overlap: int | None,
    device: str,
    threads: int | None,
    as_json: bool,
) -> int:
    """Predicts and writes; 3 when a file could not be read, 130 and 143 after a signal."""
    if overlap is None:
        overlap = 128 if tile is None else min(128, tile // 4)
    if tile is not None and overlap >= tile:
        raise ConfigError(f"overlap: expected less than the tile's {tile} pixels, got {overlap}")
    if output is not None and output.exists() and not output.is_dir():
        raise ConfigError(f"output: expected a folder, found the file {output}")
    return_large_blocks()
    paths = find_images(source)
    predictor = Predictor.load(
        model,
        device=device,
        threads=threads,
        score_threshold=_parse_thresholds(score_thresholds),
        max_detections=max_detections,
    )
    if output is None:
        output = new_run_dir(Path("runs/predict"), resolve_model(model).resolve().name)
    else:
        output.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    started_s = time.perf_counter()
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, stop)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("predict", total=len(paths))
        report = predict_files(
            predictor,
            paths,
            output,
            save_pictures=save,
            tile=tile,
            overlap=overlap,
            on_image=lambda path, found: progress.advance(task),
            on_error=lambda text: print(f"vovnet: {text}", file=sys.stderr),
        )
    signal.signal(signal.SIGTERM, previous)
    seconds = time.perf_counter() - started_s
    summary = {
        "output": str(output),
        "images": report.images,
        "objects": report.objects,
        "errors": report.errors,
        "seconds": round(seconds, 3),
    }
    if as_json:
        print(json.dumps(summary))
    else:
        print(
            f"{report.objects} objects in {report.images} images, "
            f"{report.images / seconds:.2f} images/s, {len(report.errors)} bad files: {output}"
        )
    if report.interrupted:
        return 128 + received[0] if received else 130
    return 3 if report.errors else 0


def _parse_thresholds(texts: Sequence[str]) -> float | dict[str, float] | None:
    """One number, or NAME=SCORE pairs; None when nothing is given. Raises ConfigError."""
    if not texts:
        return None
    pairs = [text.rpartition("=") for text in texts]
    try:
        values = [float(value) for _, _, value in pairs]
    except ValueError:
        values = [-1.0]
    named = [name for name, equals, _ in pairs if equals]
    if not all(0 <= value <= 1 for value in values) or len(named) not in (0, len(pairs)):
        raise ConfigError(
            f"score-threshold: expected one number in 0..1, or NAME=NUMBER, got {', '.join(texts)}"
        )
    if not named:
        if len(values) > 1:
            raise ConfigError(f"score-threshold: expected one number, got {', '.join(texts)}")
        return values[0]
    return dict(zip(named, values, strict=True))
