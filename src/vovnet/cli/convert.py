"""`vovnet convert`."""

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torchvision.models import ResNet50_Weights
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from vovnet.errors import ConfigError, DataError
from vovnet.model_folder import ModelConfig, save_model_folder
from vovnet.models.convert import Conversion, check_fit
from vovnet.models.convert import convert as convert_tensors
from vovnet.models.weights import read_weights
from vovnet.models.zoo import create_model, task_of
from vovnet.preprocess import Preprocess
from vovnet.published import PUBLISHED, published_preprocess

SHOWN = 8  # names of each kind in the printed report; --json has all

# Short side and long side in pixels that the released detectors were measured at.
FULL_SIZES = (800, 1333)
CENTERMASK_LITE_SIZES = (600, 1000)
# Resize and middle crop of VoVNet.pytorch's own test.
IMAGENET_RESIZE, IMAGENET_CROP = 256, 224


def convert(file: Path, folder: Path, leave_out: Sequence[str], as_json: bool) -> int:
    """Prints what became of each tensor and writes the folder; 3 and no folder where a part of the
    model is missing or has no place.
    """
    _check_target(folder)
    if file.is_dir():
        raise ConfigError(f"convert: expected a checkpoint file, found the folder {file}")
    conversion = convert_checkpoint(file, leave_out=leave_out)
    report = conversion.report
    if not report.problems:
        write_model_folder(conversion, folder, source=file)
    output = None if report.problems else folder
    print(json.dumps(to_json(conversion, output)) if as_json else to_text(conversion, output))
    if report.problems:
        kinds = ", ".join(f"{len(names)} {kind}" for kind, names in report.problems.items())
        advice = "; name what is not wanted with --leave-out" if report.unexpected else ""
        print(
            f"vovnet: {file}: no whole {conversion.architecture}: {kinds}; "
            f"nothing was written{advice}",
            file=sys.stderr,
        )
        return 3
    return 0


def convert_checkpoint(file: Path, *, leave_out: Sequence[str] = ()) -> Conversion:
    """The file as one of our models, compared with that model; see models.convert.convert.

    Raises ConfigError on a file that cannot be read, DataError on an unknown layout or network.
    """
    tensors = read_weights(file)
    try:
        conversion = convert_tensors(tensors, leave_out=leave_out)
    except DataError as error:
        raise DataError(f"{file}: {error}") from error
    if conversion.layout.name == "timm" and conversion.architecture in PUBLISHED:
        published = PUBLISHED[conversion.architecture]
        conversion = replace(
            conversion, mean=_to_pixels(published.mean), std=_to_pixels(published.std)
        )
    try:
        with torch.device("meta"):
            model = create_model(conversion.architecture, **conversion.model_args)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error
    return check_fit(conversion, model.state_dict())


def write_model_folder(conversion: Conversion, folder: Path, *, source: Path) -> None:
    """Writes the converted model; raises ConfigError where it cannot be stored."""
    with source.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    config = build_config(conversion, source_name=printable(source.name), sha256=sha256)
    arrays = {
        name: (value.float() if value.dtype is torch.bfloat16 else value).numpy()
        for name, value in conversion.tensors.items()
    }
    save_model_folder(folder, config, arrays, card=build_card(config))


def build_config(conversion: Conversion, *, source_name: str, sha256: str) -> ModelConfig:
    """config.json of the converted model: classes of COCO or ImageNet where their number fits."""
    names, ids = class_names(conversion)
    return ModelConfig(
        architecture=conversion.architecture,
        model_args=conversion.model_args,
        task=task_of(conversion.architecture),
        class_names=names,
        category_ids=ids,
        preprocess=build_preprocess(conversion).to_dict(),
        licence=conversion.layout.licence,
        training={
            "converted_from": source_name,
            "sha256": sha256,
            "layout": conversion.layout.name,
            "source": conversion.layout.source,
            "notes": list(conversion.report.notes),
        },
    )


def build_preprocess(conversion: Conversion) -> Preprocess:
    """The size rule that the released detectors, or ImageNet's classifiers, were measured with, and
    the layout's mean and std.
    """
    if conversion.layout.name == "timm" and conversion.architecture in PUBLISHED:
        return published_preprocess(conversion.architecture)
    if conversion.layout.detector is None:
        return Preprocess(
            mean=conversion.mean,
            std=conversion.std,
            short_side=IMAGENET_RESIZE,
            max_long_side=None,
            crop_size=IMAGENET_CROP,
        )
    short_side, long_side = FULL_SIZES
    if conversion.architecture.startswith("centermask_lite"):
        short_side, long_side = CENTERMASK_LITE_SIZES
    return Preprocess(
        mean=conversion.mean, std=conversion.std, short_side=short_side, max_long_side=long_side
    )


def class_names(conversion: Conversion) -> tuple[list[str], list[int]]:
    """Names and ids of the classes: COCO's 80, ImageNet's 1000, else numbers."""
    count = conversion.model_args["num_classes"]
    if conversion.layout.detector is not None and count == 80:
        categories = FasterRCNN_ResNet50_FPN_Weights.DEFAULT.meta["categories"]
        ids = [i for i, name in enumerate(categories) if name not in ("__background__", "N/A")]
        return [categories[i] for i in ids], ids
    if conversion.layout.detector is None and count == 1000:
        return list(ResNet50_Weights.DEFAULT.meta["categories"]), list(range(1000))
    return [f"class {index}" for index in range(count)], list(range(count))


def build_card(config: ModelConfig) -> str:
    """README.md of a converted model."""
    origin = config.training
    notes = "\n".join(f"- {note}" for note in origin["notes"])
    return f"""# {config.architecture}

Converted by the vovnet library from `{origin["converted_from"]}`
(sha256 `{origin["sha256"]}`), layout {origin["layout"]} ({origin["source"]}).

Licence of the weights: {config.licence}.

{notes}
"""


def to_json(conversion: Conversion, output: Path | None) -> dict[str, object]:
    """The whole report; output is the folder written, or None."""
    report = conversion.report
    return {
        "layout": conversion.layout.name,
        "source": conversion.layout.source,
        "licence": conversion.layout.licence,
        "architecture": conversion.architecture,
        "model_args": conversion.model_args,
        "mean": list(conversion.mean),
        "std": list(conversion.std),
        "mapped": report.mapped,
        "ignored": report.ignored,
        "left_out": list(report.left_out),
        "unexpected": list(report.unexpected),
        "missing": list(report.missing),
        "mis_shaped": list(report.mis_shaped),
        "not_finite": list(report.not_finite),
        "notes": list(report.notes),
        "output": None if output is None else str(output),
    }


def to_text(conversion: Conversion, output: Path | None) -> str:
    """The report for people: how many tensors of each kind, and the first names."""
    report = conversion.report
    ignored = [f"{name} ({why})" for name, why in report.ignored.items()]
    table = Table("tensors", "count", "names", box=None, pad_edge=False)
    rows = {"ignored": ignored, "left out": report.left_out, **report.problems}
    table.add_row("mapped", str(len(report.mapped)), "")
    for kind, names in rows.items():
        more = [f"... {len(names) - SHOWN} more"] if len(names) > SHOWN else []
        table.add_row(kind, str(len(names)), "\n".join([*map(printable, names[:SHOWN]), *more]))
    console = Console(width=max(100, Console().width), highlight=False, markup=False)
    with console.capture() as captured:
        for line in (
            f"layout        {conversion.layout.name} ({conversion.layout.source})",
            f"licence       {conversion.layout.licence}",
            f"architecture  {conversion.architecture} {conversion.model_args}",
        ):
            console.print(line, soft_wrap=True)
        console.print(table)
        for note in (
            *report.notes,
            *([f"written: {printable(str(output))}"] if output is not None else []),
        ):
            console.print(note, soft_wrap=True)
    return captured.get().rstrip()


def printable(name: str) -> str:
    """The name with everything escaped that UTF-8 does not have or Markdown's code marks end."""
    return "".join(
        char if char.isprintable() and char != "`" else f"\\u{ord(char):04x}" for char in name
    )


def _check_target(folder: Path) -> None:
    if folder.is_symlink() and not folder.exists():
        raise ConfigError(
            f"to: expected a new or an empty folder, found a link to nothing, {folder}"
        )
    if folder.is_file():
        raise ConfigError(f"to: expected a new or an empty folder, found the file {folder}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"to: expected a new or an empty folder, found {folder} with content")


def _to_pixels(values: tuple[float, float, float]) -> tuple[float, float, float]:
    red, green, blue = (round(255 * value, 3) for value in values)
    return red, green, blue
