"""The verbs that measure and compare models."""

from pathlib import Path
from typing import Annotated

import typer

from vovnet.cli.options import Device, Json, Threads, run_verb

app = typer.Typer()


@app.command()
def profile(
    models: Annotated[
        list[str],
        typer.Argument(help="Folders, exports, bundled models, architectures, .onnx files."),
    ],
    engine: Annotated[
        list[str] | None, typer.Option(help="auto, or an engine of model folders; repeatable.")
    ] = None,
    device: Device = "auto",
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Batch size; repeatable.")] = None,
    image_size: Annotated[
        list[str] | None, typer.Option(help="SIDE or HEIGHTxWIDTH in pixels; repeatable.")
    ] = None,
    threads: Annotated[
        list[int] | None, typer.Option(min=1, help="CPU threads; repeatable.")
    ] = None,
    precision: Annotated[
        list[str] | None, typer.Option(help="auto, fp32, bf16 or fp16; repeatable.")
    ] = None,
    layout: Annotated[
        list[str] | None, typer.Option(help="nhwc or nchw, of torch modules; repeatable.")
    ] = None,
    source: Annotated[
        Path | None, typer.Option(help="Picture to look at; default: random pixels.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Least number of times.")] = 30,
    max_seconds: Annotated[
        float, typer.Option(min=0, help="Time after which no further rounds start.")
    ] = 60.0,
    energy: Annotated[bool, typer.Option(help="Measure joules where there is a meter.")] = True,
    end_to_end: Annotated[bool, typer.Option(help="Time the stages from file to results.")] = True,
    cold_starts: Annotated[int, typer.Option(min=0, help="Fresh processes to time.")] = 3,
    roofline: Annotated[bool, typer.Option(help="Time and place each layer.")] = True,
    new_ceilings: Annotated[
        bool, typer.Option("--new-ceilings", help="Measure the device's ceilings afresh.")
    ] = False,
    layers: Annotated[int, typer.Option(min=0, help="Slowest layers to print.")] = 10,
    data: Annotated[
        Path | None, typer.Option(help="Data set to measure accuracy on; default: as recorded.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of --data.")] = "val",
    csv: Annotated[Path | None, typer.Option(help="Write a CSV file.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write one HTML page with plots.")] = None,
    update_card: Annotated[
        bool, typer.Option("--update-card", help="Write the cost into the folder's config.json.")
    ] = False,
    baseline: Annotated[
        str | None,
        typer.Option(help="Saved --json, or a model folder to run against; exit code 4 on a rise."),
    ] = None,
    max_increase: Annotated[str, typer.Option(help="Rise that is allowed: 5% or 0.05.")] = "5%",
    seed: Annotated[int, typer.Option(help="Of the order of rounds.")] = 0,
    transition_weights: Annotated[
        Path | None,
        typer.Option(help="Draw which depths each aggregation uses (.png, .svg), and end."),
    ] = None,
    json: Json = False,
) -> None:
    """Measure what an image costs: operations, milliseconds, joules, and the roofline."""
    if transition_weights is not None:
        run_verb("transition", models, transition_weights)
    sweep = (batch or [], image_size or [], threads or [], precision or [], layout or [])
    measured = (energy, end_to_end, cold_starts, roofline, new_ceilings, layers)
    outputs = (data, split, csv, html, update_card, baseline, max_increase, seed, json)
    arguments = (models, engine or ["auto"], device, *sweep, source, rounds, max_seconds)
    run_verb("profile", *arguments, *measured, *outputs)


@app.command()
def choose(
    folders: Annotated[
        list[str] | None, typer.Argument(help="Model folders beside the bundled ones.")
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="classify, detect or segment; default: what the models do, if all alike."
        ),
    ] = None,
    max_ms: Annotated[
        float | None, typer.Option(help="Milliseconds one image may take, file to results.")
    ] = None,
    max_joules: Annotated[float | None, typer.Option(help="Joules one image may take.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Data set to measure accuracy on; default: as recorded.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of --data.")] = "val",
    architectures: Annotated[
        str | None, typer.Option(help="Pattern of architectures to list with their counts.")
    ] = None,
    engine: Annotated[str, typer.Option(help="auto, or the engine to run on.")] = "auto",
    device: Device = "auto",
    precision: Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16.")] = "fp32",
    threads: Threads = None,
    source: Annotated[
        Path | None, typer.Option(help="Picture to look at; default: random pixels.")
    ] = None,
    image_size: Annotated[
        str | None, typer.Option(help="SIDE or HEIGHTxWIDTH in pixels; default: 512, 224.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Least number of times.")] = 30,
    max_seconds: Annotated[
        float, typer.Option(min=0, help="Time after which no further rounds start.")
    ] = 60.0,
    json: Json = False,
) -> None:
    """Find the most accurate model that fits a budget on this machine; 4 when none does."""
    limits = (folders or [], task, max_ms, max_joules, data, split, architectures)
    running = (engine, device, precision, threads, source, image_size, rounds, max_seconds)
    run_verb("choose", *limits, *running, json)
