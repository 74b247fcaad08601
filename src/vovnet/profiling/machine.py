"""The machine that figures belong to: without its name a time says nothing."""

import platform
from datetime import UTC, datetime
from typing import Any

import torch

from vovnet.hardware import available_cores, package_version, processor_name

_LIBRARIES = ("vovnet", "torch", "torchvision", "onnxruntime", "openvino", "tensorrt", "zeus")


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Name of the processor and of the device, cores, threads, versions and the date (UTC)."""
    return {
        "processor": processor_name(),
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "device_name": device_name(device),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: version for name in _LIBRARIES if (version := package_version(name))},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def device_name(device: torch.device) -> str:
    """Name of the GPU, or of the processor for the CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
