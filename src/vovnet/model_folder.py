"""The folder that a trained model lives in: config.json, model.safetensors and a README card.

This module reads and writes data only. It builds no network and unpickles nothing.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from vovnet.errors import ConfigError
from vovnet.files import atomic_write_bytes
from vovnet.graph_file import is_graph_file, read_metadata

TRAINED_FOLDER = "model"  # in the run folder of a training
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "README.md"
BUNDLED_DIR = Path(__file__).parent / "bundled"
CONFIG_KEY = "vovnet_config"
"""Of the text in an exported file that config.json is in a folder."""

# A config holds settings and a few hundred figures. Anything larger is not one of ours.
MAX_CONFIG_BYTES = 16 * 2**20

_DTYPES: dict[str, type[np.generic]] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


class ModelConfig(BaseModel):
    """What is needed to rebuild a model and to read its answers; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    format_version: Literal[1] = 1
    architecture: str = Field(min_length=1)
    """A name that `create_model` knows."""
    model_args: dict[str, Any]
    """Arguments of `create_model`: num_classes and overrides."""
    task: Literal["detect", "segment", "classify"]
    class_names: list[str]
    """In the order of the network's outputs; none for a backbone, whose task is classify."""
    category_ids: list[int]
    """The data set's own id of each class, in the order of class_names."""
    preprocess: dict[str, Any]
    score_threshold: float | None = Field(None, ge=0, le=1)
    """What is shown by default: the score at which the validation images' counts err least."""
    licence: str
    training: dict[str, Any] = {}
    """Where the weights come from: data, recipe, seed, versions."""
    metrics: dict[str, Any] = {}
    """Measured accuracy; null where a figure does not exist."""
    cost: dict[str, Any] = {}
    """Measured cost: macs, parameters, times, energy; null where not measured."""

    @field_validator("model_args", "preprocess", "training", "metrics", "cost", mode="before")
    @classmethod
    def _json(cls, value: object) -> object:
        return _to_json(value)

    @field_validator("training", "metrics", "cost")
    @classmethod
    def _no_nan(cls, value: dict[str, Any]) -> dict[str, Any]:
        return {key: _null_for_nan(item) for key, item in value.items()}

    @field_validator("model_args", "preprocess")
    @classmethod
    def _finite(cls, value: dict[str, Any]) -> dict[str, Any]:
        if _null_for_nan(value) != value:
            raise ValueError("every number must be finite")
        return value

    @model_validator(mode="after")
    def _one_category_per_class(self) -> Self:
        if not self.class_names and self.task != "classify":
            raise ValueError("'class_names' must name at least 1 class")
        if len(self.category_ids) != len(self.class_names):
            raise ValueError(
                f"category_ids must name one id for each of the {len(self.class_names)} "
                f"class_names, got {len(self.category_ids)}"
            )
        if len(set(self.category_ids)) != len(self.category_ids):
            raise ValueError(f"category_ids must be unique, got {self.category_ids}")
        return self


def save_model_folder(
    folder: Path, config: ModelConfig, tensors: Mapping[str, NDArray[Any]], *, card: str
) -> None:
    """Write a model folder: weights first, then the card, config.json last.

    Each file appears whole or not at all. `tensors` maps names to arrays of any shape and of a
    float, integer or bool type; `card` is the Markdown text of README.md.
    Raises ConfigError when a tensor's type or a text cannot be stored; nothing is written then.
    """
    storable = {np.dtype(dtype) for dtype in _DTYPES.values()}
    for name, tensor in tensors.items():
        if tensor.dtype not in storable:
            expected = ", ".join(sorted(dtype.name for dtype in storable))
            raise ConfigError(f"tensor {name!r}: expected one of {expected}, got {tensor.dtype}")
    contiguous = {name: tensor.copy(order="C") for name, tensor in tensors.items()}
    try:
        contents = {
            # Not save_file: its files are private (0600), whatever the folder's owner wants.
            WEIGHTS_FILE: save(contiguous, metadata={"format": "pt"}),
            CARD_FILE: card.encode(),
            CONFIG_FILE: config.model_dump_json(indent=2).encode() + b"\n",
        }
    except ValueError as error:  # of both encoders
        raise ConfigError(f"{folder}: expected names and texts in Unicode: {error}") from error
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        atomic_write_bytes(folder / name, content)


def load_config(folder: Path) -> ModelConfig:
    """Read and check config.json of a model folder, or what stands for it in an exported file.

    Raises ConfigError naming the file, the key, what was expected and what was found.
    """
    content: str | bytes
    if is_graph_file(folder) and folder.is_file():
        path, content = folder, _read_exported(folder)
    else:
        path = folder / CONFIG_FILE
        content = _read_bytes(path, limit=MAX_CONFIG_BYTES)
    try:
        return ModelConfig.model_validate_json(content)
    except ValidationError as error:
        details = error.errors(include_url=False)
        raise ConfigError(f"{path}: " + "; ".join(map(_describe, details))) from None


def load_tensors(folder: Path) -> dict[str, NDArray[Any]]:
    """Read model.safetensors of a model folder as writable numpy arrays; bfloat16 as float32.

    Raises ConfigError when the file is missing, truncated, not safetensors, or holds a type that
    numpy does not have.
    """
    path = folder / WEIGHTS_FILE
    content = _read_bytes(path)
    try:
        stored = deserialize(content)
    except SafetensorError as error:
        raise ConfigError(
            f"{path}: expected a safetensors file, found {len(content)} bytes that are none "
            f"({error})"
        ) from None
    return {
        name: _to_array(view["data"], view["dtype"], view["shape"], where=f"{path}: {name!r}")
        for name, view in stored
    }


def bundled_models() -> dict[str, Path]:
    """Return the folder of each model that comes with the package, by its name."""
    return {path.parent.name: path.parent for path in BUNDLED_DIR.glob(f"*/{CONFIG_FILE}")}


def resolve_model(folder_or_name: str | Path) -> Path:
    """Return the model folder or exported file for a path, or the folder of a bundled model's name.

    A folder that holds config.json goes before a bundled model of the same name.
    Raises ConfigError listing the bundled names when it is none of them.
    """
    folder = Path(folder_or_name)
    if (folder / CONFIG_FILE).is_file() or (is_graph_file(folder) and folder.is_file()):
        return folder
    bundled = bundled_models()
    if str(folder_or_name) in bundled:
        return bundled[str(folder_or_name)]
    if folder.is_dir():
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "nothing"
        raise ConfigError(f"{folder}: expected a model folder with {CONFIG_FILE}, found {found}")
    if is_graph_file(folder):
        raise ConfigError(f"{folder}: expected a file that `vovnet export` wrote, found none")
    names = ", ".join(sorted(bundled)) or "none"
    raise ConfigError(
        f"expected a model folder or the name of a bundled model ({names}), found neither at "
        f"{folder_or_name!s}; an architecture of `vovnet models` has to be trained first"
    )


def name_of(model: Path) -> str:
    """What to call a model folder: its run's name where `train` wrote it, else its own."""
    path = model.resolve()
    return path.parent.name if path.name == TRAINED_FOLDER else path.name


def _read_bytes(path: Path, *, limit: int | None = None) -> bytes:
    try:
        size = path.stat().st_size
        if limit is not None and size > limit:
            raise ConfigError(f"{path}: expected at most {limit} bytes, found {size}")
        return path.read_bytes()
    except FileNotFoundError:
        if path.parent.is_dir():
            files = ", ".join(sorted(entry.name for entry in path.parent.iterdir())[:10])
            found = files or "an empty folder"
        else:
            found = "no such folder"
        raise ConfigError(
            f"{path}: expected this file in the model folder, found {found}"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path}: expected a readable file, got: {error.strerror}") from None


def _read_exported(path: Path) -> str:
    found = read_metadata(path).get(CONFIG_KEY)
    if found is None:
        raise ConfigError(
            f"{path}: expected a file that `vovnet export` wrote, found one that does not say "
            "which classes it has and how it wants its images"
        )
    return found


def _to_array(data: bytearray, dtype: str, shape: list[int], *, where: str) -> NDArray[Any]:
    if dtype == "BF16":
        high_half = np.frombuffer(data, np.uint16).astype(np.uint32) << 16
        return high_half.view(np.float32).reshape(shape)
    if dtype not in _DTYPES:
        raise ConfigError(f"{where}: expected one of {', '.join(_DTYPES)}, BF16, found {dtype}")
    return np.frombuffer(data, _DTYPES[dtype]).reshape(shape)


def _describe(error: ErrorDetails) -> str:
    key = ".".join(map(str, error["loc"]))
    match error["type"]:
        case "missing":
            return f"expected key {key!r}, found none"
        case "extra_forbidden":
            return f"key {key!r}: expected only {', '.join(ModelConfig.model_fields)}"
        case "json_invalid":
            return f"expected JSON, found: {error['msg']}"
        case "model_type":
            return f"expected a JSON object, found {_shorten(error['input'])}"
        case "value_error":
            reason = error["msg"].removeprefix("Value error, ")
            return f"key {key!r}: {reason}" if key else reason
        case _:
            expected = error["msg"].replace("Input should", "expected to", 1)
            return f"key {key!r}: {expected}, found {_shorten(error['input'])}"


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _to_json(value: object) -> object:
    """Tuples, mappings and numpy scalars as the types that JSON has; ValueError on others."""
    if isinstance(value, Mapping):
        return {str(key): _to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(item) for item in value]
    if isinstance(value, np.generic):
        return _to_json(value.item())
    if value is None or isinstance(value, str | int | float):
        return value
    raise ValueError(f"expected a type that JSON has, got {type(value).__name__}")


def _null_for_nan(value: Any) -> Any:
    # JSON has no NaN, and a figure that does not exist must not make a finished training fail.
    if isinstance(value, dict):
        return {key: _null_for_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_null_for_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
