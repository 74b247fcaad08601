"""What the user sees of the command line. The verbs themselves load when they are called.

Exit codes: 0 ok, 1 failed, 2 usage or config, 3 bad data, 4 a gate not met, 130 and 143
interrupted after saving.
"""

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from vovnet.cli.measure import app as measuring
from vovnet.cli.options import (
    Data,
    DataFormat,
    Device,
    Engine,
    Json,
    LabelledData,
    MaxDetections,
    Model,
    Precision,
    TestTimeViews,
    Threads,
    run_verb,
)
from vovnet.errors import ConfigError, DataError, TrainingError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Runs the command line; errors that a user can mend are one line and an exit code."""
    # As an exception, so that half-written files are cleared away.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        app()
    except ConfigError as error:
        _fail(error, 2)
    except DataError as error:
        _fail(error, 3)
    except (TrainingError, ImportError, OSError) as error:
        _fail(error, 1)
    except KeyboardInterrupt:
        sys.exit(130)


def _fail(error: Exception, code: int) -> None:
    print(f"vovnet: {error}", file=sys.stderr)
    sys.exit(code)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version  # it takes as long as all the rest

        print(version("vovnet"))
        raise typer.Exit


@app.callback()
def common_options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print it."),
    ] = False,
) -> None:
    """VoVNet classifiers, detectors and instance segmenters, and what they cost."""


@app.command()
def models(
    pattern: Annotated[str, typer.Argument(help="Shell pattern, such as 'centermask*'.")] = "*",
    task: Annotated[str | None, typer.Option(help="classify, detect or segment.")] = None,
    json: Json = False,
) -> None:
    """List the models that can be built, and those that come with the package."""
    run_verb("models", pattern, task, json)


@app.command()
def recipes(
    pattern: Annotated[
        str, typer.Argument(help="Shell pattern, such as 'centermask*'; a name shows all of it.")
    ] = "*",
    json: Json = False,
) -> None:
    """List the trainings that come with the package: what they reach, and their commands."""
    run_verb("recipes", pattern, json)


@app.command()
def check(
    data: Data,
    split: Annotated[
        list[str] | None, typer.Option(help="Split to look at; repeatable; default: train, val.")
    ] = None,
    format: DataFormat = "auto",
    json: Json = False,
) -> None:
    """Name every bad file and annotation of a data set; exit code 3 if there is one."""
    run_verb("check", data, split or ["train", "val"], format, json)


@app.command("convert-data")
def convert_data(
    data: Data,
    to: Annotated[str, typer.Option(help="coco, voc or yolo.")],
    output: Annotated[Path, typer.Option(help="Folder to write; must not hold anything.")],
    split: Annotated[
        list[str] | None,
        typer.Option(help="Split to convert; repeatable; default: train, val and test."),
    ] = None,
    format: DataFormat = "auto",
    link: Annotated[
        bool, typer.Option("--link/--copy", help="Link to the image files, or copy them.")
    ] = False,
    json: Json = False,
) -> None:
    """Write a data set in another format, no label lost: COCO, Pascal VOC or YOLO."""
    run_verb("convert-data", data, to, output, split or [], format, link, json)


@app.command()
def convert(
    file: Annotated[Path, typer.Argument(help="Checkpoint: .pth or .safetensors.")],
    to: Annotated[Path, typer.Option(help="Model folder to write; must not hold anything.")],
    leave_out: Annotated[
        list[str] | None,
        typer.Option(help="Shell pattern of tensors that are not wanted; repeatable."),
    ] = None,
    json: Json = False,
) -> None:
    """Turn a checkpoint of another VoVNet project into a model folder, with a report."""
    run_verb("convert", file, to, leave_out or [], json)


@app.command()
def train(
    data: Annotated[
        Path | None,
        typer.Option(help="Data set: COCO, Pascal VOC, YOLO; a folder for each class, shards."),
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="classify, detect or segment; default: what the model does.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="One of `vovnet models`.")] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Settings of a published run: one of `vovnet recipes`.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the train split.")] = None,
    max_minutes: Annotated[
        float | None, typer.Option(help="Instead of --epochs: minutes of wall time.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images in a step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="After the warm-up.")] = None,
    image_size: Annotated[
        int | None, typer.Option(help="Side of the square crops that a training learns from.")
    ] = None,
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Start from published ImageNet weights.")
    ] = False,
    freeze: Annotated[
        int | None, typer.Option(help="Parts that stay as loaded: 1 the stem, 2 stage 2 too, ...")
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="Model to learn from: a folder; for a classifier also timm:NAME, torchvision:NAME "
            "(@FILE) or FILE.py:FUNCTION; for a detector also an exported file or YOLOX's .onnx."
        ),
    ] = None,
    backbone_weights: Annotated[
        str | None, typer.Option(help="FILE or folder to start it from, or 'hub' (--pretrained).")
    ] = None,
    init: Annotated[
        str | None, typer.Option(help="Model folder or bundled model to start from.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:N or auto.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that load images.")] = None,
    threads: Threads = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, order, augmentation.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run folder.")] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any other setting, as NAME=VALUE (YAML); repeatable."),
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Run folder to go on with.")] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave bad files and annotations out.")
    ] = False,
    format: Annotated[
        str | None, typer.Option(help="Of the data set: auto, coco, voc or yolo.")
    ] = None,
) -> None:
    """Train on a folder of labelled images; settings: flags over --config over --recipe."""
    flags = {
        "data": None if data is None else str(data),
        "data_format": format,
        "task": task,
        "model": model,
        "epochs": epochs,
        "max_minutes": max_minutes,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "image_size": image_size,
        "freeze": freeze,
        "teacher": teacher,
        "backbone_weights": backbone_weights or ("hub" if pretrained else None),
        "init": init,
        "device": device,
        "workers": workers,
        "threads": threads,
        "seed": seed,
        "name": name,
    }
    run_verb("train", recipe, config, flags, setting or [], resume, skip_bad)


@app.command()
def pretrain(
    data: Annotated[
        Path | None,
        typer.Option(help="Data set as for train, whose labels count for nothing, or pictures."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Backbone; default: that of vovdet_n.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the pictures.")] = None,
    max_minutes: Annotated[
        float | None, typer.Option(help="Instead of --epochs: minutes of wall time.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Pictures in a step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="After the warm-up.")] = None,
    image_size: Annotated[int | None, typer.Option(help="Side of the square views.")] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="Learn its features instead: a model folder, timm:NAME, torchvision:NAME (@FILE) "
            "or FILE.py:FUNCTION."
        ),
    ] = None,
    backbone_weights: Annotated[
        str | None, typer.Option(help="FILE or folder to start from, or 'hub'.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:N or auto.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that load images.")] = None,
    threads: Threads = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, order, views.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run folder.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder of run folders; default: runs/pretrain.")
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any other setting, as NAME=VALUE (YAML); repeatable."),
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Run folder to go on with.")] = None,
    format: Annotated[
        str | None, typer.Option(help="Of the data set: auto, coco, voc or yolo.")
    ] = None,
) -> None:
    """Pretrain a backbone on pictures without labels, for `train --backbone-weights RUN/model`."""
    flags = {
        "data": None if data is None else str(data),
        "data_format": format,
        "model": model,
        "epochs": epochs,
        "max_minutes": max_minutes,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "image_size": image_size,
        "teacher": teacher,
        "backbone_weights": backbone_weights,
        "device": device,
        "workers": workers,
        "threads": threads,
        "seed": seed,
        "name": name,
        "runs_dir": None if output is None else str(output),
    }
    run_verb("pretrain", config, flags, setting or [], resume)


@app.command()
def val(
    model: Model,
    data: LabelledData,
    split: Annotated[str, typer.Option(help="Split to measure on.")] = "val",
    format: DataFormat = "auto",
    max_detections: MaxDetections = None,
    bootstrap: Annotated[int, typer.Option(min=0, help="Resamples for the intervals.")] = 200,
    device: Device = "auto",
    threads: Threads = None,
    json: Json = False,
    engine: Engine = "auto",
    precision: Precision = "auto",
    output: Annotated[
        Path | None, typer.Option(help="Folder for a classifier's pictures and predictions.")
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave bad files and annotations out.")
    ] = False,
    metric: Annotated[
        str | None, typer.Option(help="Detector: coco, voc07 or voc12; default: coco.")
    ] = None,
    tta: TestTimeViews = None,
    html: Annotated[Path | None, typer.Option(help="Detector: write a page of it all.")] = None,
) -> None:
    """Measure a model on a labelled split: box and mask AP, or accuracy of a classifier."""
    run_on = (device, threads, json, engine, precision, output, skip_bad)
    detector = (max_detections, metric, tta, html)
    run_verb("val", model, data, split, format, bootstrap, *run_on, detector)


@app.command()
def predict(
    model: Annotated[
        str,
        typer.Option(help="Model folder, exported file, bundled model, or published weights."),
    ],
    source: Annotated[str, typer.Option(help="A file, a folder, or a quoted pattern.")],
    output: Annotated[
        Path | None, typer.Option(help="Folder for the results; default: runs/predict/NAME-N.")
    ] = None,
    save: Annotated[
        bool | None, typer.Option("--save/--no-save", help="Detector: draw and save pictures.")
    ] = None,
    score_threshold: Annotated[
        list[str] | None,
        typer.Option(help="Detector: least score, or NAME=SCORE for one class; repeatable."),
    ] = None,
    max_detections: MaxDetections = None,
    tile: Annotated[
        int | None, typer.Option(min=32, help="Detector: look at tiles of this side.")
    ] = None,
    overlap: Annotated[
        int | None, typer.Option(min=0, help="Pixels that tiles share; default: 128 at most.")
    ] = None,
    tta: TestTimeViews = None,
    top: Annotated[
        int | None, typer.Option(min=1, help="Classifier: classes per image; default: 5.")
    ] = None,
    features: Annotated[
        Path | None, typer.Option(help="Classifier: write embeddings, to a .npz or .parquet file.")
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1, max=1024, help="Images at once; default: classifier 8, GPU 64; detector 1."
        ),
    ] = None,
    fast_decode: Annotated[
        bool | None,
        typer.Option("--fast-decode", help="Classifier: read large JPEGs at a smaller size."),
    ] = None,
    test_size: Annotated[
        bool | None,
        typer.Option("--test-size", help="Published weights: the larger size of their test."),
    ] = None,
    engine: Engine = "auto",
    precision: Precision = "auto",
    device: Device = "auto",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Find objects in images, or name their classes; writes pictures, tables and JSON lines."""
    common = (model, source, output, engine, precision, device, threads, json, batch_size)
    detector = (save, score_threshold or None, max_detections, tile, overlap, tta)
    classifier = (top, features, fast_decode, test_size)
    run_verb("predict", *common, detector, classifier)


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="Folder, bundled model, or published weights.")],
    format: Annotated[str, typer.Option(help="onnx, openvino or torch-export.")] = "onnx",
    precision: Annotated[str, typer.Option(help="fp32, fp16 or int8 (openvino).")] = "fp32",
    output: Annotated[
        Path | None, typer.Option(help="File; default: beside the weights, or in runs/export.")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Detector: choose no detections.")] = False,
    images: Annotated[str | None, typer.Option(help="To compare on; default: made-up.")] = None,
    json: Json = False,
    data: Annotated[Path | None, typer.Option(help="int8: data set, as for val.")] = None,
    split: Annotated[str, typer.Option(help="int8: split that accuracy is held on.")] = "val",
    calibration: Annotated[int, typer.Option(min=1, help="int8: train pictures for ranges.")] = 300,
    max_drop: Annotated[float, typer.Option(min=0, help="int8: points it may lose.")] = 0.5,
) -> None:
    """Write a model as one file for other engines, once it answers as torch does; else exit 4."""
    int8 = (data, split, calibration, max_drop)
    run_verb("export", model, format, precision, output, raw, images, json, int8)


app.add_typer(measuring)
