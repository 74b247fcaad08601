"""What every engine is, and choosing one; the engines themselves load on first use."""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from vovnet import _lazy
from vovnet.errors import ConfigError
from vovnet.exported import BESIDE, check_export, find_export
from vovnet.graph_file import is_graph_file
from vovnet.model_folder import resolve_model
from vovnet.published import find_published

ENGINES = ("auto", *_lazy.ENGINES)
PRECISIONS = ("fp32", "bf16", "fp16", "int8")
_OF_TORCH = ("torch", "torch-packed", "torch-compile")
_READERS = {".onnx": ("onnxruntime", "openvino"), ".xml": ("openvino",)}
"""Of each exported form, the engines that run it, the first choice first."""


class Engine(Protocol):
    """A loaded network: a batch of pictures in, the arrays of DeployGraph or ClassifierGraph out.

    name            of ENGINES
    chosen_because  why `auto` came to it, in words; empty where it was named
    precision       what the convolutions compute in
    device          cpu, cuda:0, ...
    max_detections  K, the padded number of detections of an image; 0 of a classifier
    has_masks       whether mask_probs and mask_scores are among the results
    """

    name: str
    chosen_because: str
    precision: str
    device: str
    max_detections: int
    has_masks: bool

    def infer(self, images: NDArray[np.uint8], sizes: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """images (B, H, W, 3) RGB, sizes (B, 2) height and width of the picture in each.

        Returns boxes (B, K, 4) xyxy in pixels of the images, scores, labels, valid (B, K) and,
        of a segmenter, mask_probs (B, K, 28, 28) and mask_scores (B, K). A classifier returns
        logits (B, C) and embedding (B, F), a backbone the embedding alone. The results are
        complete when it returns.
        """


def load_engine(
    folder_or_name: str | Path,
    *,
    engine: str = "auto",
    precision: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    settings: Mapping[str, object] | None = None,
) -> Engine:
    """An engine with the network of a model folder, a bundled model, published weights or an
    exported file.

    engine `auto` is an exported file's own; of a folder an export that lies in it, where its engine
    is installed and no GPU is asked for, else torch. precision `auto` is fp32, or int8 of a file
    that is quantised. threads sets the CPU threads. settings go over the folder's own settings of
    the network (min_score, max_detections).
    Raises ConfigError on an unknown engine, precision or device, on a folder that is not complete
    and right, and on an export of other weights than the folder's.
    """
    if engine not in ENGINES:
        raise ConfigError(f"engine: expected {', '.join(ENGINES)}; got {engine!r}")
    if precision not in ("auto", *PRECISIONS):
        raise ConfigError(f"precision: expected auto, {', '.join(PRECISIONS)}; got {precision!r}")
    name, model, because = choose_engine(folder_or_name, engine, device)
    if precision == "int8" and name in _OF_TORCH:
        raise ConfigError(
            f"precision: expected fp32, bf16 or fp16 for the engine {name}, got 'int8'; `vovnet "
            f"export {folder_or_name} --format openvino --precision int8` makes what runs in it"
        )
    load = cast(Callable[..., Engine], _lazy.load(_lazy.ENGINES[name]))
    loaded = load(
        model, precision=precision, device=device, threads=threads, settings=settings or {}
    )
    loaded.chosen_because = because if engine == "auto" else ""
    return loaded


def choose_engine(
    folder_or_name: str | Path, engine: str, device: str
) -> tuple[str, str | Path, str]:
    """The name of the engine that `load_engine` takes, the path or name that it loads, and why.

    Raises ConfigError where there is nothing that the engine runs.
    """
    if find_published(folder_or_name) is not None:
        if engine not in ("auto", *_OF_TORCH):
            raise ConfigError(
                f"engine: expected torch for {folder_or_name}; for {engine} name a file that "
                f"`vovnet export {folder_or_name}` wrote"
            )
        name = "torch" if engine == "auto" else engine
        return name, str(folder_or_name), "it runs published weights"
    model = resolve_model(folder_or_name)
    if is_graph_file(model):
        return _choose_for_file(model, engine)
    return _choose_for_folder(model, engine, device)


def _choose_for_file(file: Path, engine: str) -> tuple[str, Path, str]:
    readers = _READERS[file.suffix]
    if engine == "auto":
        installed = [name for name in readers if find_spec(name) is not None]
        return (installed or list(readers))[0], file, f"it runs {file.suffix} files"
    if engine not in readers:
        raise ConfigError(f"engine: expected {' or '.join(readers)} for {file}, got {engine!r}")
    return engine, file, ""


def _choose_for_folder(folder: Path, engine: str, device: str) -> tuple[str, Path, str]:
    if engine in _OF_TORCH:
        return engine, folder, ""
    if engine == "auto":
        wanted = [name for name in BESIDE if device in ("auto", "cpu") and find_spec(name)]
        for name in wanted:
            file = find_export(folder, name)
            if file is not None:
                check_export(file, folder)
                return name, file, f"{file} lies beside the weights"
        return "torch", folder, "no export lies beside the weights"
    file = find_export(folder, engine)
    if file is None:
        names = " or ".join(BESIDE[engine])
        raise ConfigError(
            f"{folder}: expected {names} for the engine {engine}, found none; "
            f"`vovnet export {folder}` writes it"
        )
    check_export(file, folder)
    return engine, file, ""
