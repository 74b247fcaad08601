"""What the user sees of the command line. The verbs themselves load when they are called.

Exit codes: 0 ok, 1 failed, 2 usage or config, 3 bad data, 130 and 143 interrupted after saving.
"""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from vovnet._lazy import COMMANDS, load
from vovnet.errors import ConfigError, DataError, TrainingError

app = typer.Typer(
    help="VoVNet detectors and instance segmenters, and what they cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Option(help="A model folder, or the name of a bundled model.")]
Data = Annotated[
    Path, typer.Option(help="Data set: annotations/SPLIT.json (COCO) and images beside it.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:N, or auto: the GPU if there is one.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; default: torch's own.")]
MaxDetections = Annotated[
    int | None, typer.Option(min=1, help="Objects per image; default: the model's own limit.")
]


def main() -> None:
    """Runs the command line; errors that a user can mend are one line and an exit code."""
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


def _call(verb: str, *arguments: Any) -> None:
    """Runs a verb's function, whose result is the exit code."""
    run: Any = load(COMMANDS[verb])
    raise typer.Exit(run(*arguments))


@app.command()
def models(
    pattern: Annotated[str, typer.Argument(help="Shell pattern, such as 'centermask*'.")] = "*",
    task: Annotated[str | None, typer.Option(help="classify, detect or segment.")] = None,
    json: Json = False,
) -> None:
    """List the models that can be built, and those that come with the package."""
    _call("models", pattern, task, json)


@app.command()
def check(
    data: Data,
    split: Annotated[str, typer.Option(help="Split to look at.")] = "train",
    json: Json = False,
) -> None:
    """Name every bad file and annotation of a data set; exit code 3 if there is one."""
    _call("check", data, split, json)


@app.command()
def train(
    data: Annotated[
        Path | None,
        typer.Option(help="Data set: annotations/{train,val}.json (COCO), images beside it."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="One of `vovnet models`.")] = None,
    recipe: Annotated[str | None, typer.Option(help="Settings of a published run.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the train split.")] = None,
    max_minutes: Annotated[float | None, typer.Option(help="Or: minutes of wall time.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images in a step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="After the warm-up.")] = None,
    backbone_weights: Annotated[
        str | None, typer.Option(help="FILE with ImageNet weights, or 'hub'.")
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
) -> None:
    """Train on a folder of labelled images; settings: flags over --config over --recipe."""
    flags = {
        "data": None if data is None else str(data),
        "model": model,
        "epochs": epochs,
        "max_minutes": max_minutes,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "backbone_weights": backbone_weights,
        "init": init,
        "device": device,
        "workers": workers,
        "threads": threads,
        "seed": seed,
        "name": name,
    }
    _call("train", recipe, config, flags, setting or [], resume, skip_bad)


@app.command()
def val(
    model: Model,
    data: Data,
    split: Annotated[str, typer.Option(help="Split to measure on.")] = "val",
    max_detections: MaxDetections = None,
    bootstrap: Annotated[int, typer.Option(min=0, help="Resamples for the intervals.")] = 200,
    device: Device = "auto",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Measure box and mask AP of a model on a labelled split."""
    _call("val", model, data, split, max_detections, bootstrap, device, threads, json)


@app.command()
def predict(
    model: Model,
    source: Annotated[str, typer.Option(help="A file, a folder, or a quoted pattern.")],
    output: Annotated[
        Path | None, typer.Option(help="Folder for the results; default: runs/predict/NAME-N.")
    ] = None,
    save: Annotated[bool, typer.Option(help="Draw and save pictures.")] = True,
    score_threshold: Annotated[
        list[str] | None,
        typer.Option(help="Least score, or NAME=SCORE for one class; repeatable."),
    ] = None,
    max_detections: MaxDetections = None,
    tile: Annotated[int | None, typer.Option(min=32, help="Look at tiles of this side.")] = None,
    overlap: Annotated[
        int | None, typer.Option(min=0, help="Pixels that tiles share; default: 128 at most.")
    ] = None,
    device: Device = "auto",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Find objects in images; writes pictures, COCO results and JSON lines."""
    arguments = (model, source, output, save, score_threshold or [], max_detections)
    _call("predict", *arguments, tile, overlap, device, threads, json)
