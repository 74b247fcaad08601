"""An exported file run by ONNX Runtime, on the CPU and without torch."""

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vovnet.errors import ConfigError
from vovnet.runtime.exported import ExportedFile, open_exported
from vovnet.runtime.threads import check_threads

_FATAL_ONLY = 4  # of onnxruntime's levels of logging; errors come as exceptions


class OnnxRuntimeEngine:
    """An Engine around an exported .onnx file; raises ConfigError."""

    name = "onnxruntime"
    device = "cpu"
    precision = "fp32"
    chosen_because = ""
    parallel = 1

    def __init__(self, file: ExportedFile, *, threads: int | None) -> None:
        onnxruntime = import_onnxruntime()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _FATAL_ONLY
        options.intra_op_num_threads = threads or 0
        self.file = file
        self.max_detections = file.max_detections
        self.has_masks = file.has_masks
        self._session = open_session(onnxruntime, file.path, options)
        self._names = [output.name for output in self._session.get_outputs()]

    def infer(self, images: NDArray[np.uint8], sizes: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """As Engine.infer."""
        found = self._session.run(self._names, self.file.feeds(images, sizes))
        return self.file.results(self._names, found)


def load(
    model: Path,
    *,
    precision: str,
    device: str,
    threads: int | None,
    settings: Mapping[str, object],
) -> OnnxRuntimeEngine:
    """The engine of an exported .onnx file, which computes in fp32; raises ConfigError."""
    check_threads(threads)
    if precision not in ("auto", "fp32"):
        raise ConfigError(f"precision: expected fp32 of onnxruntime on the CPU, got {precision!r}")
    return OnnxRuntimeEngine(
        open_exported(model, device=device, settings=settings), threads=threads
    )


def import_onnxruntime() -> Any:
    """The package, without its telemetry; raises ConfigError where it is not installed."""
    # Read once, when its library loads: else it keeps a device id in ~/.cache and reports home.
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    try:
        onnxruntime: Any = importlib.import_module("onnxruntime")
    except ImportError:
        raise ConfigError(
            "engine: expected onnxruntime to be installed: pip install 'vovnet[export]'"
        ) from None
    onnxruntime.disable_telemetry_events()  # where others imported it before
    return onnxruntime


def open_session(onnxruntime: Any, path: Path, options: Any) -> Any:
    """A session on an .onnx file; raises ConfigError where ONNX Runtime cannot read it."""
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions share no other base
        reason = str(error).strip().splitlines()[-1]
        raise ConfigError(f"{path}: expected a network that ONNX Runtime reads: {reason}") from None
