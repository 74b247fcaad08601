"""How near layers come to what this device can do: its own ceilings, and the time of each layer.

Williams, Waterman and Patterson, "Roofline: an insightful visual performance model", 2009.
"""

import json
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from vovnet.errors import ConfigError
from vovnet.files import atomic_write_json, cache_folder
from vovnet.hardware import available_cores
from vovnet.profiling.machine import device_name
from vovnet.profiling.records import Placement

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class Workload:
    """How large the pieces of work are that find the ceilings, and how long each is repeated.

    Short pieces: on a machine that others use too, the best repeat is one that nobody interrupted.
    """

    matrices: tuple[int, ...]
    images: int
    copy_bytes: int
    repeat_s: float


CPU_WORKLOAD = Workload(matrices=(512, 1024), images=1, copy_bytes=64 * 2**20, repeat_s=1.0)
GPU_WORKLOAD = Workload(matrices=(4096, 8192), images=64, copy_bytes=2**30, repeat_s=1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """The best that was seen of a device: flop rate by precision, and bytes copied (read + write)
    per second.
    """

    device: str
    threads: int
    cores: int
    torch: str
    date: str
    bytes_per_s: float
    flops_per_s: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name, as plain JSON types."""
        return asdict(self)


def find_ceilings(
    device: torch.device,
    precisions: Sequence[str],
    *,
    folder: Path | None = None,
    workload: Workload | None = None,
    afresh: bool = False,
) -> Ceilings:
    """The ceilings of a device, from the cache or measured now and kept there.

    The cache is a file for each device, torch version and number of threads in `folder`, by default
    XDG_CACHE_HOME/vovnet; `afresh` measures again. What cannot be written there is not kept.
    Raises ConfigError on an unknown precision.
    """
    for precision in precisions:
        if precision not in DTYPES:
            raise ConfigError(f"precision: expected one of {', '.join(DTYPES)}; got {precision!r}")
    path = (folder or cache_folder()) / f"ceilings-{_cache_key(device)}.json"
    known = None if afresh else _read_cache(path, device)
    missing = [name for name in precisions if known is None or name not in known.flops_per_s]
    if known is not None and not missing:
        return known
    work = workload or (GPU_WORKLOAD if device.type == "cuda" else CPU_WORKLOAD)
    rates = {} if known is None else dict(known.flops_per_s)
    rates |= {name: measure_flops_per_s(device, DTYPES[name], work) for name in missing}
    found = Ceilings(
        device=device_name(device),
        threads=torch.get_num_threads(),
        cores=available_cores(),
        torch=str(torch.__version__),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        bytes_per_s=measure_bytes_per_s(device, work) if known is None else known.bytes_per_s,
        flops_per_s=rates,
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_json(path, found.to_dict())
    except OSError:
        pass  # a read-only home must not keep anyone from profiling
    return found


def measure_flops_per_s(device: torch.device, dtype: torch.dtype, work: Workload) -> float:
    """The best of square matrix products and a 3x3 convolution of 128 channels at 56 x 56."""
    images = torch.ones(work.images, 128, 56, 56, dtype=dtype, device=device)
    images = images.to(memory_format=torch.channels_last)
    weight = torch.ones(128, 128, 3, 3, dtype=dtype, device=device)
    weight = weight.to(memory_format=torch.channels_last)
    convolve = partial(nn.functional.conv2d, images, weight, padding=1)
    pieces: list[tuple[Callable[[], Tensor], int]] = [
        (convolve, 2 * images.numel() * 128 * 9)  # as many output as input elements
    ]
    for side in work.matrices:
        matrix = torch.ones(side, side, dtype=dtype, device=device)
        pieces.append((partial(torch.matmul, matrix, matrix), 2 * side**3))
    with torch.inference_mode():
        return max(flops / _best_s(run, device, work.repeat_s) for run, flops in pieces)


def measure_bytes_per_s(device: torch.device, work: Workload) -> float:
    """Bytes read and written in a second by a large copy, best repeat."""
    source = torch.ones(work.copy_bytes // 4, dtype=torch.float32, device=device)
    target = torch.zeros_like(source)
    return 2 * source.nbytes / _best_s(lambda: target.copy_(source), device, work.repeat_s)


def place(
    name: str,
    kind: str,
    *,
    time_s: float,
    flops: int,
    memory_bytes: int,
    ceilings: Ceilings,
    precision: str,
) -> Placement:
    """Put a piece of work under the roofline; raises ConfigError unless time and bytes are > 0."""
    if time_s <= 0 or memory_bytes <= 0:
        raise ConfigError(f"{name}: expected time and bytes above 0, got {time_s}, {memory_bytes}")
    intensity = flops / memory_bytes
    compute, memory = ceilings.flops_per_s[precision], intensity * ceilings.bytes_per_s
    return Placement(
        name=name,
        kind=kind,
        time_ms=1000 * time_s,
        flops=flops,
        memory_bytes=memory_bytes,
        intensity=intensity,
        achieved_flops_per_s=flops / time_s,
        ceiling_flops_per_s=min(compute, memory),
        bound="compute" if compute <= memory else "memory",
    )


def time_layers(
    run: Callable[[], object],
    layers: Mapping[str, nn.Module],
    *,
    device: torch.device,
    rounds: int = 10,
) -> dict[str, float]:
    """Median seconds that each named module takes within one pass of `run`, over `rounds` passes.

    A module that runs several times in a pass counts with all of them, one that never runs is left
    out. On a GPU each layer is waited for: that serialises the pass, so the sum of the layers is
    more than the time of the network.
    """
    passes = []
    run()
    for _ in range(rounds):
        with _timed_modules(layers, device) as times_s:
            run()
        passes.append(times_s)
    return {
        name: median(times_s[name] for times_s in passes)
        for name in layers
        if all(name in times_s for times_s in passes)
    }


@contextmanager
def _timed_modules(
    layers: Mapping[str, nn.Module], device: torch.device
) -> Iterator[dict[str, float]]:
    times_s: dict[str, float] = {}
    started_s: dict[str, float] = {}

    def before(name: str) -> None:
        synchronize(device)
        started_s[name] = time.perf_counter()

    def after(name: str) -> None:
        synchronize(device)
        passed_s = time.perf_counter() - started_s[name]
        times_s[name] = times_s.get(name, 0.0) + passed_s

    hooks = []
    try:
        for name, module in layers.items():
            hooks.append(module.register_forward_pre_hook(lambda *_, name=name: before(name)))
            hooks.append(module.register_forward_hook(lambda *_, name=name: after(name)))
        yield times_s
    finally:
        for hook in hooks:
            hook.remove()


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _best_s(run: Callable[[], object], device: torch.device, repeat_s: float) -> float:
    best_s, end_s = math.inf, time.perf_counter() + repeat_s
    for number in range(1_000_000):
        synchronize(device)
        start_s = time.perf_counter()
        run()
        synchronize(device)
        now_s = time.perf_counter()
        best_s = min(best_s, now_s - start_s)
        if now_s >= end_s and number >= 2:
            break
    return best_s


def _cache_key(device: torch.device) -> str:
    text = (
        f"{device_name(device)}-{torch.__version__}-{torch.get_num_threads()}of{available_cores()}"
    )
    return re.sub(r"[^A-Za-z0-9.]+", "_", text)


def _read_cache(path: Path, device: torch.device) -> Ceilings | None:
    """The ceilings of a file, or None where there is none or it does not hold what it should."""
    try:
        found = Ceilings(**json.loads(path.read_text(encoding="utf-8")))
        rates = [found.bytes_per_s, *found.flops_per_s.values()]
        usable = all(math.isfinite(rate) and rate > 0 for rate in rates)
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    return found if usable and found.device == device_name(device) else None
