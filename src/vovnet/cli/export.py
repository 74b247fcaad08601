"""`vovnet export`."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast, get_args

import numpy as np
from numpy.typing import NDArray

from vovnet.errors import ConfigError
from vovnet.export.check import Comparison, made_up_pictures
from vovnet.export.model import (
    SUFFIXES,
    Export,
    Format,
    Precision,
    Source,
    export_model,
    load_source,
)
from vovnet.export.quantize import Int8Export, export_int8, make_trial
from vovnet.exported import ONNX_FILE, OPENVINO_FILE, TORCH_EXPORT_FILE
from vovnet.files import kept_if_filled, new_run_dir, remove_empty
from vovnet.images import find_images, read_image
from vovnet.model_folder import bundled_models, resolve_model
from vovnet.published import find_published

MAX_PICTURES = 8
RUNS_DIR = Path("runs/export")
_BESIDE = {"onnx": ONNX_FILE, "openvino": OPENVINO_FILE, "torch-export": TORCH_EXPORT_FILE}


@dataclass(frozen=True, slots=True)
class Int8Options:
    """What only int8 takes; data is None where it was not given."""

    data: Path | None
    split: str
    calibration: int
    max_drop: float  # points of a hundred


def export(
    model: str,
    format: str,
    precision: str,
    output: Path | None,
    raw: bool,
    images: str | None,
    as_json: bool,
    int8: tuple[Path | None, str, int, float],
) -> int:
    """Writes the file and prints how far it is from torch; 4 and no file where that is too far.

    int8 are the fields of Int8Options.
    """
    form = _check_options(format, precision, output)
    options = Int8Options(*int8)
    if precision == "int8":
        _check_int8(model, form, options, raw=raw)
    elif options.data is not None:
        raise ConfigError("data: expected none but for --precision int8")
    paths = find_images(images)[:MAX_PICTURES] if images is not None else []
    pictures = [read_image(path) for path in paths] or made_up_pictures()
    source = load_source(model)
    if precision == "int8":
        return _export_int8(model, source, output, pictures, options, as_json=as_json)
    stored = cast(Precision, precision)
    with _output_file(output, model, form, raw=raw) as target:
        done = export_model(
            source, target, pictures, format=form, precision=stored, raw=raw, progress=_say
        )
    if as_json:
        print(json.dumps(_to_json(done)))
    else:
        _print_done(done)
    return _judge(done.problems, target, "it differs from torch")


def _export_int8(
    model: str,
    source: Source,
    output: Path | None,
    pictures: Sequence[NDArray[np.uint8]],
    options: Int8Options,
    *,
    as_json: bool,
) -> int:
    """As export; 4 and no file where accuracy falls by more than asked for."""
    assert options.data is not None
    trial = make_trial(
        source, options.data, options.split, calibration=options.calibration, progress=_say
    )
    with _output_file(output, model, "openvino", raw=False) as target:
        done = export_int8(
            source, target, pictures, trial=trial, max_drop=options.max_drop, progress=_say
        )
    if as_json:
        print(json.dumps(_to_json(done) | _int8_to_json(done)))
    else:
        _print_done(done)
        print(_accuracy_line(done))
    for name, error in done.blamed:
        _say(f"{name}: error {100 * error:.1f} % of the signal")
    reason = "it differs from torch" if done.int8 is None else "it loses too much"
    return _judge(done.problems, target, reason)


def _check_options(format: str, precision: str, output: Path | None) -> Format:
    if format == "tensorrt":
        raise ConfigError(
            "format: TensorRT builds its engine from the ONNX file, on the GPU that runs it: "
            "--format onnx, then the trtexec line of docs/deploy.md"
        )
    for name, value, known in (
        ("format", format, get_args(Format)),
        ("precision", precision, (*get_args(Precision), "int8")),
    ):
        if value not in known:
            raise ConfigError(f"{name}: expected {' or '.join(known)}, got {value!r}")
    form = cast(Format, format)
    if output is not None and output.suffix != SUFFIXES[form]:
        raise ConfigError(f"output: expected a {SUFFIXES[form]} file, got {output}")
    if output is not None and output.is_dir():
        raise ConfigError(f"output: expected a file, found the folder {output}")
    return form


def _check_int8(model: str, form: Format, options: Int8Options, *, raw: bool) -> None:
    if form != "openvino":
        raise ConfigError(f"format: expected openvino for int8, got {form!r}: --format openvino")
    if raw:
        raise ConfigError("raw: expected a whole export for int8, whose accuracy is measured")
    if options.data is None:
        raise ConfigError(
            "data: expected --data for int8, a data set as `vovnet val` takes it: its split train "
            f"sets the ranges of {model}, its split {options.split} judges the result"
        )


@contextmanager
def _output_file(given: Path | None, model: str, form: Format, *, raw: bool) -> Iterator[Path]:
    """The given file, or one beside a folder's weights; in a run folder what is raw, or has no
    folder of its own. A run folder into which nothing is written is taken away.
    """
    if given is not None:
        yield given
        return
    folder = None if find_published(model) is not None else resolve_model(model)
    if folder is not None and not raw and folder not in bundled_models().values():
        yield folder / _BESIDE[form]
    else:
        with kept_if_filled(RUNS_DIR):
            made = new_run_dir(RUNS_DIR, model if folder is None else folder.resolve().name)
            try:
                yield made / f"model{SUFFIXES[form]}"
            finally:
                remove_empty([made])


def _say(text: str) -> None:
    print(f"vovnet: {text}", file=sys.stderr)


def _judge(problems: Sequence[str], target: Path, reason: str) -> int:
    """The exit code, and why nothing was written."""
    for problem in problems:
        _say(problem)
    if problems:
        _say(f"{target}: not written, for {reason}")
    return 4 if problems else 0


def _print_done(done: Export | Int8Export) -> None:
    for comparison in done.comparisons:
        print(_line(comparison))
    for file in done.files:
        print(f"{file}: {file.stat().st_size / 1e6:.1f} MB")


def _to_json(done: Export | Int8Export) -> dict[str, object]:
    return {
        "files": [str(file) for file in done.files],
        "comparisons": [asdict(comparison) for comparison in done.comparisons],
    }


def _int8_to_json(done: Int8Export) -> dict[str, object]:
    return {
        "int8": None if done.int8 is None else done.int8.model_dump(),
        "convolutions_in_int8": done.run_in_int8,
        "convolutions_in_float": done.run_in_float,
        "blamed": [{"layer": name, "error": error} for name, error in done.blamed],
    }


def _accuracy_line(done: Int8Export) -> str:
    if done.int8 is None:
        return "int8: not tried"
    info = done.int8
    kept = ", ".join(info.float_layers) or "none"
    return (
        f"int8: {info.metric} {info.accuracy:.4f}, in float {info.float_accuracy:.4f}, on "
        f"{info.pictures} pictures of {info.split}; {done.run_in_int8} of "
        f"{done.run_in_int8 + done.run_in_float} convolutions run in int8 here; "
        f"kept in float: {kept}"
    )


def _line(comparison: Comparison) -> str:
    far = ", ".join(f"{name} {value:.1e}" for name, value in comparison.differences.items())
    return f"{comparison.engine}: {comparison.compared} compared with torch: {far}"
