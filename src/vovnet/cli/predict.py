"""`vovnet predict`."""

import json
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TimeRemainingColumn

from vovnet.augmented_predict import PLAIN, parse_views
from vovnet.classify import Classifier, is_classifier
from vovnet.classify_files import ClassifiedImage, classify_files
from vovnet.cli.engines import print_engine
from vovnet.errors import ConfigError
from vovnet.files import new_run_dir
from vovnet.hardware import available_cores
from vovnet.images import find_images, printable
from vovnet.model_folder import name_of, resolve_model
from vovnet.predict import Predictor
from vovnet.predict_files import predict_files, return_large_blocks
from vovnet.published import find_published

TOP = 5
_FILE_COLUMNS, _CLASS_COLUMNS = 120, 24


@dataclass(frozen=True, slots=True)
class DetectorOptions:
    """What only a detector takes; None where it was not given."""

    save: bool | None
    score_threshold: Sequence[str] | None
    max_detections: int | None
    tile: int | None
    overlap: int | None
    tta: str | None


@dataclass(frozen=True, slots=True)
class ClassifierOptions:
    """What only a classifier takes; None where it was not given."""

    top: int | None
    features: Path | None
    fast_decode: bool | None
    test_size: bool | None


@dataclass(slots=True)
class Run:
    """A run with its bar; `signals` holds what ended it."""

    progress: Progress
    task: TaskID
    started_s: float
    signals: list[int]

    def exit_code(self, *, interrupted: bool, errors: Sequence[str]) -> int:
        """3 when a file could not be read, 130 and 143 after a signal."""
        if interrupted:
            return 128 + self.signals[0] if self.signals else 130
        return 3 if errors else 0


def predict(
    model: str,
    source: str,
    output: Path | None,
    engine: str,
    precision: str,
    device: str,
    threads: int | None,
    as_json: bool,
    batch_size: int | None,
    detector: tuple[
        bool | None, Sequence[str] | None, int | None, int | None, int | None, str | None
    ],
    classifier: tuple[int | None, Path | None, bool | None, bool | None],
) -> int:
    """Predicts and writes; 3 when a file could not be read, 130 and 143 after a signal.

    detector and classifier are the fields of DetectorOptions and ClassifierOptions.
    """
    if output is not None and output.exists() and not output.is_dir():
        raise ConfigError(f"output: expected a folder, found the file {output}")
    common = (model, source, output, engine, precision, device, threads, as_json, batch_size)
    if is_classifier(model):
        _refuse(DetectorOptions(*detector), model, "a classifier")
        return classify(*common, ClassifierOptions(*classifier))
    _refuse(ClassifierOptions(*classifier), model, "a detector")
    return detect(*common, DetectorOptions(*detector))


def detect(
    model: str,
    source: str,
    output: Path | None,
    engine: str,
    precision: str,
    device: str,
    threads: int | None,
    as_json: bool,
    batch_size: int | None,
    options: DetectorOptions,
) -> int:
    """Finds objects; writes pictures, COCO results and JSON lines."""
    tile, overlap = options.tile, options.overlap
    if overlap is None:
        overlap = 128 if tile is None else min(128, tile // 4)
    if tile is not None and overlap >= tile:
        raise ConfigError(f"overlap: expected less than the tile's {tile} pixels, got {overlap}")
    if tile is not None and options.tta is not None:
        raise ConfigError("expected one of --tile and --tta, got both")
    if batch_size is not None and (tile, options.tta) != (None, None):
        raise ConfigError("expected no --batch-size with --tile or --tta, which go one at a time")
    views = (PLAIN,) if options.tta is None else parse_views(options.tta)
    return_large_blocks()
    paths = find_images(source)
    predictor = Predictor.load(
        model,
        engine=engine,
        precision=precision,
        device=device,
        threads=threads,
        mode=_mode(len(paths), threads, whole=tile is None and options.tta is None),
        score_threshold=_parse_thresholds(options.score_threshold or []),
        max_detections=options.max_detections,
    )
    print_engine(predictor.engine)
    output = _make_output(output, model)
    with _started(len(paths)) as run:
        report = predict_files(
            predictor,
            paths,
            output,
            save_pictures=options.save is not False,
            tile=tile,
            overlap=overlap,
            views=views,
            batch_size=batch_size or 1,
            on_image=lambda path, found: run.progress.advance(run.task),
            on_error=_print_error,
        )
    seconds = time.perf_counter() - run.started_s
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
        if report.images and not report.objects:
            least = predictor.thresholds.min()
            print(f"vovnet: none has a score of {least:.3g} (--score-threshold)", file=sys.stderr)
    return run.exit_code(interrupted=report.interrupted, errors=report.errors)


def _mode(files: int, threads: int | None, *, whole: bool) -> str:
    """Several pictures at a time where there are enough to keep every core busy to the end."""
    return "throughput" if whole and files >= 4 * (threads or available_cores()) else "latency"


def classify(
    model: str,
    source: str,
    output: Path | None,
    engine: str,
    precision: str,
    device: str,
    threads: int | None,
    as_json: bool,
    batch_size: int | None,
    options: ClassifierOptions,
) -> int:
    """Prints the top classes of each image; writes them, and embeddings where asked for."""
    paths = find_images(source)
    classifier = Classifier.load(
        model,
        engine=engine,
        precision=precision,
        device=device,
        threads=threads,
        test_size=bool(options.test_size),
    )
    print_engine(classifier.engine)
    # A backbone writes nothing but its features.
    if classifier.class_names or options.features is None:
        output = _make_output(output, model)
    width = min(max(len(printable(path)) for path in paths), _FILE_COLUMNS)

    def show(image: ClassifiedImage) -> None:
        run.progress.advance(run.task)
        if image.top and not as_json:
            print(_line(image, width))

    with _started(len(paths)) as run:
        report = classify_files(
            classifier,
            paths,
            output or Path(),
            top=options.top or TOP,
            batch_size=batch_size,
            features=options.features,
            fast_decode=bool(options.fast_decode),
            on_image=show,
            on_error=_print_error,
        )
    seconds = time.perf_counter() - run.started_s
    written = [str(path) for path in (output, options.features) if path is not None]
    summary = {
        "output": None if output is None else str(output),
        "features": None if options.features is None else str(options.features),
        "images": len(report.images),
        "errors": report.errors,
        "seconds": round(seconds, 3),
        "predictions": [image.to_json(i) for i, image in enumerate(report.images, start=1)],
    }
    if as_json:
        print(json.dumps(summary))
    else:
        count = len(report.images)
        speed = f"{count / seconds:.2f} images/s"
        bad = f"{len(report.errors)} bad files"
        print(f"{count} images, {speed}, {bad}: {', '.join(written)}", file=sys.stderr)
    return run.exit_code(interrupted=report.interrupted, errors=report.errors)


def _refuse(options: DetectorOptions | ClassifierOptions, model: str, what: str) -> None:
    """Raises ConfigError where an option is given that means nothing for this model."""
    given = [field.name for field in fields(options) if getattr(options, field.name) is not None]
    if given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ConfigError(f"{model}: expected no {flags}, which {what} does not have")


def _make_output(output: Path | None, model: str) -> Path:
    if output is None:
        is_name = find_published(model) is not None
        name = model if is_name else name_of(resolve_model(model))
        return new_run_dir(Path("runs/predict"), name)
    output.mkdir(parents=True, exist_ok=True)
    return output


@contextmanager
def _started(count: int) -> Iterator[Run]:
    """A bar on the terminal, and SIGTERM as KeyboardInterrupt, until the end of the block."""
    console = Console(stderr=True)
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    started_s = time.perf_counter()
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, stop)
    bar = Progress(
        *columns,
        console=console,
        disable=not console.is_terminal,
        redirect_stdout=sys.stdout.isatty(),  # else what goes to a pipe would go to the bar
    )
    with bar as progress:
        yield Run(progress, progress.add_task("predict", total=count), started_s, received)
    signal.signal(signal.SIGTERM, previous)


def _line(image: ClassifiedImage, width: int) -> str:
    """File, page after the first, and the classes with their probabilities, in columns."""
    page = f" [{image.page + 1}]" if image.page else ""
    cells = [f"{share:.3f} {printable(name):<{_CLASS_COLUMNS}}" for name, share in image.top]
    return f"{printable(image.file) + page:<{width}}  {'  '.join(cells)}".rstrip()


def _print_error(text: str) -> None:
    print(f"vovnet: {text}", file=sys.stderr)


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
