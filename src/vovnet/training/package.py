"""What is kept of a training in the model folder: how the weights came about, and their types."""

import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vovnet.model_folder import name_of
from vovnet.training.checkpoint import Position, library_version
from vovnet.training.config import TrainConfig

_PATHS = ("init", "backbone_weights", "teacher")


def stored_tensor(value: Tensor, half: bool) -> Tensor:
    """A tensor as the model folder stores it: with `half`, weights of two axes and more in 16 bits.

    Norms and biases stay as they are: they are few, and a variance may be below what 16 bits hold.
    """
    return value.half() if half and value.is_floating_point() and value.ndim > 1 else value


def provenance(config: TrainConfig, *, position: Position, device: torch.device) -> dict[str, Any]:
    """Data, settings and machine of a training, with none of its paths."""
    settings = config.model_dump(mode="json", exclude={"data", "runs_dir", "name"})
    for name in _PATHS:
        if settings[name] is not None:
            settings[name] = name_of(Path(settings[name]))
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "config": settings,
        "data": Path(config.data or "").resolve().name,
        "library": library_version(),
        "torch": torch.__version__,
        "hardware": gpu or f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "steps": position.step,
        "best_step": position.best_step,
        "minutes": round(position.spent_s / 60, 1),
    }
