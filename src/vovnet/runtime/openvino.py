"""An exported file run by OpenVINO, on the CPU and without torch."""

import importlib
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vovnet.errors import ConfigError
from vovnet.runtime.exported import ExportedFile, open_exported
from vovnet.runtime.threads import check_threads

LEAST_SIDE = 64
"""Pixels: of less the third pool, of three cells, sees two, which OpenVINO refuses."""
_HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}


class OpenVinoEngine:
    """An Engine around an exported file, .xml or .onnx; raises ConfigError.

    precision fp32, or what the processor has of bf16 and fp16; of a file in int8 it is that of what
    is not quantised. auto is fp32, of a file in int8 bf16 where the processor has it; int8 is the
    same, and asks for such a file. mode throughput computes as many batches at the same time as
    OpenVINO finds right for the machine, each with fewer threads.
    """

    name = "openvino"
    device = "cpu"
    chosen_because = ""

    def __init__(
        self, file: ExportedFile, *, precision: str, threads: int | None, mode: str = "latency"
    ) -> None:
        core = openvino_core()
        capabilities = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        float_precision = _float_precision(file, precision, capabilities)
        options = {
            "PERFORMANCE_HINT": mode.upper(),
            "INFERENCE_PRECISION_HINT": _HINTS[float_precision],
        }
        if threads is not None:
            options |= {"INFERENCE_NUM_THREADS": str(threads)}
        compiled = core.compile_model(read_model(core, file.path), "CPU", options)
        self.file = file
        self.compiled = compiled
        self.precision = "int8" if file.is_int8 else float_precision
        self.max_detections = file.max_detections
        self.has_masks = file.has_masks
        self._names = [output.get_any_name() for output in compiled.outputs]
        best: int = compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
        self.parallel = best if mode == "throughput" else 1
        self._requests: SimpleQueue[Any] = SimpleQueue()  # each holds one batch at a time
        for _ in range(self.parallel):
            self._requests.put(compiled.create_infer_request())

    def infer(self, images: NDArray[np.uint8], sizes: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """As Engine.infer."""
        if self.file.sides is None and "sizes" in self.file.inputs:
            images = with_least_sides(images)
        feeds = self.file.feeds(images, sizes)
        request = self._requests.get()
        try:
            found = request.infer(feeds, share_inputs=True)
        finally:
            self._requests.put(request)
        return self.file.results(self._names, list(found.values()))


def with_least_sides(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Images (B, H, W, 3) with padding up to LEAST_SIDE, themselves where both sides reach it."""
    height, width = (max(LEAST_SIDE - side, 0) for side in images.shape[1:3])
    if height == width == 0:
        return images
    return np.pad(images, ((0, 0), (0, height), (0, width), (0, 0)))


def load(
    model: Path,
    *,
    precision: str,
    device: str,
    threads: int | None,
    settings: Mapping[str, object],
    mode: str = "latency",
) -> OpenVinoEngine:
    """The engine of an exported file; raises ConfigError."""
    check_threads(threads)
    file = open_exported(model, device=device, settings=settings)
    return OpenVinoEngine(file, precision=precision, threads=threads, mode=mode)


def import_openvino() -> Any:
    """The package, without its telemetry; raises ConfigError where it is not installed."""
    # Importing openvino alone reports home and writes to ~/intel, unless this package is missing.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        return importlib.import_module("openvino")
    except ImportError:
        raise ConfigError(
            "engine: expected openvino to be installed: pip install 'vovnet[export]'"
        ) from None


@cache
def openvino_core() -> Any:
    """The process's one Core; raises ConfigError where openvino is not installed.

    With a second one the next signal would end the process: each puts the calling thread's signal
    stack aside, and when they end in the order they came, the thread is left with a freed one.
    """
    return import_openvino().Core()


def read_model(core: Any, path: Path) -> Any:
    """The network of an .onnx or .xml file; raises ConfigError where OpenVINO cannot read it."""
    try:
        return core.read_model(str(path))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ConfigError(f"{path}: expected a network that OpenVINO reads: {reason}") from None


def _float_precision(file: ExportedFile, precision: str, capabilities: list[str]) -> str:
    """What is not quantised computes in."""
    if precision == "int8" and not file.is_int8:
        raise ConfigError(
            f"precision: expected a file in int8, which `vovnet export --precision int8` writes, "
            f"found {file.path} in float"
        )
    if precision in ("auto", "int8"):
        return "bf16" if file.is_int8 and "BF16" in capabilities else "fp32"
    if precision != "fp32" and precision.upper() not in capabilities:
        known = [name for name in _HINTS if name.upper() in capabilities]
        raise ConfigError(
            f"precision: expected {' or '.join(known)}, which this processor has in OpenVINO, "
            f"got {precision!r}"
        )
    return precision
