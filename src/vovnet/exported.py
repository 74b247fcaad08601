"""What an exported file says of itself, and where exports lie beside a model folder."""

import hashlib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from vovnet.errors import ConfigError
from vovnet.graph_file import is_graph_file, read_metadata
from vovnet.model_folder import WEIGHTS_FILE, load_config

EXPORT_KEY = "vovnet_export"
ONNX_FILE = "model.onnx"
OPENVINO_FILE = "openvino/model.xml"
TORCH_EXPORT_FILE = "model.pt2"
BESIDE = {
    "openvino": (OPENVINO_FILE, ONNX_FILE),
    "onnxruntime": (ONNX_FILE,),
    "torch-export": (TORCH_EXPORT_FILE,),  # where it is asked for by name
}
"""Of each engine, the files in a model folder that it can run, the best first."""


InputName = Literal["images", "sizes", "min_score"]


class Int8Info(BaseModel):
    """What an export in eight bits was judged by; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    metric: Literal["top1", "box_ap", "mask_ap"]
    accuracy: float
    """0..1, as the other."""
    float_accuracy: float
    """Of the same network in fp32, on the same pictures."""
    split: str
    pictures: int
    calibration_pictures: int
    float_layers: list[str]
    """Those left in float, because of their errors."""


class ExportInfo(BaseModel):
    """What an export is of, beside the config that it carries; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    format_version: Literal[1] = 1
    weights_sha256: str
    """Of model.safetensors that the network was built from."""
    vovnet_version: str
    precision: Literal["fp32", "fp16", "int8"]
    """That the weights are stored in; int8: computed with, too."""
    raw: bool
    """The outputs are the network's own; no detections have been chosen."""
    inputs: list[InputName]
    """Of images, sizes and min_score, in the order of the file."""
    sides: tuple[int, int] | None = None
    """Height and width that every image must have; None: multiples of 32, of a classifier any."""
    min_score: float = 0.0
    """The detector's own, where nothing else is asked for."""
    max_detections: int = 0
    """K, 0 of a classifier."""
    has_masks: bool = False
    int8: Int8Info | None = None
    """Of a file in eight bits."""


def read_export_info(path: Path) -> ExportInfo:
    """What an exported file says of itself; raises ConfigError where it is none of ours."""
    text = read_metadata(path).get(EXPORT_KEY)
    if text is None:
        raise ConfigError(f"{path}: expected a file that `vovnet export` wrote")
    try:
        return ExportInfo.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{path}: {EXPORT_KEY}: {where}: {first['msg']}") from None


def is_export(path: Path) -> bool:
    """Whether a path is a file that `vovnet export` wrote and an engine can run: none of raw
    outputs.
    """
    if not is_graph_file(path) or not path.is_file():
        return False
    try:
        return EXPORT_KEY in read_metadata(path) and not read_export_info(path).raw
    except ConfigError:
        return False


def find_export(folder: Path, engine: str) -> Path | None:
    """The file in a model folder that an engine can run, None where there is none."""
    files = (folder / name for name in BESIDE.get(engine, ()))
    return next((file for file in files if file.is_file()), None)


def check_export(file: Path, folder: Path) -> None:
    """Raises ConfigError where a model folder is no longer what was exported from it."""
    exported, config = load_config(file), load_config(folder)
    same = [
        read_export_info(file).weights_sha256 == sha256(folder / WEIGHTS_FILE),
        exported.architecture == config.architecture,
        exported.model_args == config.model_args,
        exported.preprocess == config.preprocess,
    ]
    if not all(same):
        raise ConfigError(
            f"{file}: expected an export of {folder} as it is now, found one of other weights or "
            f"settings; write it again with `vovnet export {folder}`, delete it, or choose "
            "--engine torch"
        )


def sha256(path: Path) -> str:
    """Of a file's content, hexadecimal; raises ConfigError where it cannot be read."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"{path}: expected a readable file, got: {error.strerror}") from None
