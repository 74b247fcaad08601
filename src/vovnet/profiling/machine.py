"""The machine that figures belong to: without its name a time says nothing."""

import os
import platform
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

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
        "versions": {name: version for name in _LIBRARIES if (version := _version(name))},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def device_name(device: torch.device) -> str:
    """Name of the GPU, or of the processor for the CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()


def available_cores() -> int:
    """Cores that this process may use, which can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The name the processor gives itself, or the kind of machine where there is none."""
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
