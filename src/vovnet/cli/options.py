"""Options that several verbs share, and how a verb is run: its module loads when it is called."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from vovnet._lazy import COMMANDS, load

Model = Annotated[str, typer.Option(help="A model folder, a bundled model, or an exported file.")]
Data = Annotated[
    Path, typer.Option(help="Data set: a folder in COCO, Pascal VOC or YOLO format, see --format.")
]
LabelledData = Annotated[Path, typer.Option(help="Data set, as for train.")]
DataFormat = Annotated[
    str, typer.Option("--format", help="auto, coco, voc or yolo; auto: the one that lies there.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:N, or auto: the GPU if there is one.")]
Engine = Annotated[
    str, typer.Option(help="auto, openvino, onnxruntime, torch, torch-packed, torch-compile, ...")
]
Precision = Annotated[str, typer.Option(help="auto, fp32, bf16, fp16 or int8 (exports).")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; default: torch's own.")]
MaxDetections = Annotated[
    int | None, typer.Option(min=1, help="Objects per image; default: the model's own limit.")
]
TestTimeViews = Annotated[
    str | None,
    typer.Option("--tta", help="Detector: merge further views, such as flip,0.8,1.25,flip*0.8."),
]


def run_verb(verb: str, *arguments: Any) -> None:
    """Runs a verb's function, whose result is the exit code."""
    run: Any = load(COMMANDS[verb])
    try:
        code = run(*arguments)
    except KeyboardInterrupt:  # of which typer would say nothing
        print("vovnet: interrupted", file=sys.stderr)
        code = 130
    raise typer.Exit(code)
