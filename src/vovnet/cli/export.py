"""`vovnet export`."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import cast, get_args

from vovnet.errors import ConfigError
from vovnet.export.check import Comparison, made_up_pictures
from vovnet.export.model import SUFFIXES, Export, Format, Precision, export_model, load_source
from vovnet.exported import ONNX_FILE, OPENVINO_FILE
from vovnet.files import new_run_dir
from vovnet.images import find_images, read_image
from vovnet.model_folder import bundled_models, resolve_model
from vovnet.published import find_published

MAX_PICTURES = 8
_BESIDE = {"onnx": ONNX_FILE, "openvino": OPENVINO_FILE}


def export(
    model: str,
    format: str,
    precision: str,
    output: Path | None,
    raw: bool,
    images: str | None,
    as_json: bool,
) -> int:
    """Writes the file and prints how far it is from torch; 4 and no file where that is too far."""
    form, stored = _check_options(format, precision, output)
    paths = find_images(images)[:MAX_PICTURES] if images is not None else []
    pictures = [read_image(path) for path in paths] or made_up_pictures()
    source = load_source(model)
    target = output or _default_output(model, form, raw=raw)
    done = export_model(source, target, pictures, format=form, precision=stored, raw=raw)
    if as_json:
        print(json.dumps(_to_json(done)))
    else:
        for comparison in done.comparisons:
            print(_line(comparison))
        for file in done.files:
            print(f"{file}: {file.stat().st_size / 1e6:.1f} MB")
    for problem in done.problems:
        print(f"vovnet: {problem}", file=sys.stderr)
    if done.problems:
        print(f"vovnet: {target}: not written, for it differs from torch", file=sys.stderr)
    return 4 if done.problems else 0


def _check_options(format: str, precision: str, output: Path | None) -> tuple[Format, Precision]:
    for name, value, known in (
        ("format", format, get_args(Format)),
        ("precision", precision, get_args(Precision)),
    ):
        if value not in known:
            raise ConfigError(f"{name}: expected {' or '.join(known)}, got {value!r}")
    form = cast(Format, format)
    if output is not None and output.suffix != SUFFIXES[form]:
        raise ConfigError(f"output: expected a {SUFFIXES[form]} file, got {output}")
    if output is not None and output.is_dir():
        raise ConfigError(f"output: expected a file, found the folder {output}")
    return form, cast(Precision, precision)


def _default_output(model: str, form: Format, *, raw: bool) -> Path:
    """Beside a folder's weights; in a run folder what is raw, or has no folder of its own."""
    if find_published(model) is not None:
        name = model
    else:
        folder = resolve_model(model)
        if not raw and folder not in bundled_models().values():
            return folder / _BESIDE[form]
        name = folder.resolve().name
    return new_run_dir(Path("runs/export"), name) / f"model{SUFFIXES[form]}"


def _to_json(done: Export) -> dict[str, object]:
    return {
        "files": [str(file) for file in done.files],
        "comparisons": [asdict(comparison) for comparison in done.comparisons],
    }


def _line(comparison: Comparison) -> str:
    far = ", ".join(f"{name} {value:.1e}" for name, value in comparison.differences.items())
    return f"{comparison.engine}: {comparison.compared} compared with torch: {far}"
