"""What the engines of exported files share: which inputs a file takes, and what comes out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vovnet.errors import ConfigError
from vovnet.exported import read_export_info

# The stored precision is no setting here: what is computed in is the engine's.
_SETTINGS = ("min_score", "max_detections")


@dataclass(frozen=True, slots=True)
class ExportedFile:
    """An exported file and how it is to be run."""

    path: Path
    inputs: tuple[str, ...]  # of images, sizes, min_score those that the file takes
    sides: tuple[int, int] | None  # height and width that the images must have
    min_score: float  # detections below it are not looked for
    max_detections: int  # K; 0 of a classifier
    has_masks: bool
    is_int8: bool  # quantised, whatever the rest computes in

    def feeds(self, images: NDArray[np.uint8], sizes: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """The file's inputs by name: images (B, H, W, 3) and, of a detector, sizes (B, 2) and
        min_score (1,).

        Raises ValueError on images of another size than the file's, and on a classifier's that hold
        padding, which would count.
        """
        if self.sides is not None and images.shape[1:3] != self.sides:
            raise ValueError(
                f"images: expected height and width {self.sides}, which {self.path.name} was "
                f"exported for, got {images.shape[1:3]}"
            )
        if "sizes" not in self.inputs and (sizes != images.shape[1:3]).any():
            raise ValueError(
                f"sizes: expected those of the images, {images.shape[1:3]}, got {sizes.tolist()}"
            )
        values: dict[str, NDArray[Any]] = {
            "images": np.ascontiguousarray(images),
            "sizes": np.ascontiguousarray(sizes),
            "min_score": np.array([self.min_score], np.float32),
        }
        return {name: values[name] for name in self.inputs}

    def results(
        self, names: Sequence[str], values: Sequence[NDArray[Any]]
    ) -> dict[str, NDArray[Any]]:
        """The outputs by name, with no more than max_detections of each image: the best come
        first.
        """
        found = dict(zip(names, values, strict=True))
        if not self.max_detections:
            return found
        return {name: value[:, : self.max_detections] for name, value in found.items()}


def open_exported(
    path: Path, *, device: str, settings: Mapping[str, object], raw: bool = False
) -> ExportedFile:
    """Reads what a file says of itself; raises ConfigError on a device or setting that it has not,
    and on a file of raw outputs unless they are what is wanted.
    """
    if device not in ("auto", "cpu"):
        raise ConfigError(f"device: expected cpu or auto for {path}, got {device!r}")
    info = read_export_info(path)
    if info.raw and not raw:
        raise ConfigError(f"{path}: expected a whole export, found one of raw outputs (--raw)")
    unknown = sorted(set(settings) - set(_SETTINGS))
    if unknown:
        raise ConfigError(
            f"model settings: expected one of {', '.join(_SETTINGS)} for an exported file, "
            f"got {', '.join(unknown)}"
        )
    return ExportedFile(
        path=path,
        inputs=tuple(info.inputs),
        sides=info.sides,
        min_score=_number(settings.get("min_score", info.min_score)),
        max_detections=_limit(settings.get("max_detections"), info.max_detections),
        has_masks=info.has_masks,
        is_int8=info.precision == "int8",
    )


def _number(value: object) -> float:
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ConfigError(f"min_score: expected a number in 0..1, got {value!r}")
    return float(value)


def _limit(value: object, exported: int) -> int:
    if value is None:
        return exported
    if type(value) is not int or not 1 <= value <= exported:
        raise ConfigError(
            f"max_detections: expected a whole number in 1..{exported}, which the file was "
            f"exported with, got {value!r}"
        )
    return value
