"""Latency, throughput and energy of VoVNets on a GPU, beside timm's compiled by torch and beside
ResNet and DenseNet: `python benchmarks/gpu.py [--models NAME ...] [--output FILE.md]`.

Networks alone, with random weights, in bf16 and channels_last, on pictures that lie on the GPU. All
engines of one model and batch run in one interleaved run, one batch each in random order; `speed`
is the paired ratio to timm compiled with max-autotune, with its 95 % interval. The ceiling is the
rate of a large product of matrices in the same precision, measured between the models. Joules are
those of NVML's counter and of every other meter that zeus finds, idle power included. Exit code 2
where there is no GPU.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from inference import rows_of
from torch import Tensor, nn

from vovnet.models.deploy import fold_batch_norms
from vovnet.models.zoo import create_model
from vovnet.profiling.compare import Sampling, interleave
from vovnet.profiling.count import count_macs
from vovnet.profiling.energy import MeterError, find_meter, measure_energy
from vovnet.profiling.machine import describe_machine
from vovnet.runtime.cuda_graphs import GraphedPass
from vovnet.runtime.triton_osa import find_fault, prepare_aggregation

Run = Callable[[], object]
Row = dict[str, object]
OURS = ("ese_vovnet19b_slim", "ese_vovnet39b", "ese_vovnet57b", "ese_vovnet99b")
PEERS = ("resnet50", "densenet161", "densenet201")
BATCHES = (1, 256)
SIDE = 224
COLUMNS = (
    *("model", "batch", "engine", "images_per_s", "ms", "ms_p10", "ms_p90", "rounds"),
    *("speed", "speed_low", "speed_high", "tflops", "ceiling_percent", "energy_per_image_j"),
)


def prepare(network: nn.Module) -> nn.Module:
    prepared = network.eval().cuda().to(dtype=torch.bfloat16, memory_format=torch.channels_last)
    return prepared.requires_grad_(False)


def folded(name: str) -> nn.Module:
    torch.manual_seed(0)
    network = create_model(name).eval()
    fold_batch_norms(network)
    return prepare(network)


def compiled(name: str) -> nn.Module:
    network: Any = torch.compile(prepare(timm.create_model(name)), mode="max-autotune")
    return network


def graphed(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """The network with its pass recorded as a CUDA graph."""
    device = torch.device("cuda", torch.cuda.current_device())
    record = GraphedPass(lambda images, _: {"y": network(images)}, device)
    nothing = torch.zeros(1, device=device)
    return lambda images: record(images, nothing)["y"]


def engines_of(name: str) -> dict[str, Callable[[Tensor], Tensor]]:
    """What is timed of a model, the baseline first."""
    found: dict[str, Callable[[Tensor], Tensor]] = {"timm max-autotune": compiled(name)}
    if name in PEERS:
        return found | {"timm eager": prepare(timm.create_model(name))}
    found |= {"torch": folded(name), "torch, CUDA graphs": graphed(folded(name))}
    fault = find_fault(torch.device("cuda"), torch.bfloat16)
    if fault:
        print(f"gpu.py: torch-triton is left out: {fault}", file=sys.stderr)
        return found
    first, second = folded(name), folded(name)
    prepare_aggregation(first)
    prepare_aggregation(second)
    return found | {"torch-triton": first, "torch-triton, CUDA graphs": graphed(second)}


def waiting(network: Callable[[Tensor], Tensor], images: Tensor) -> None:
    with torch.inference_mode():
        network(images)
    torch.cuda.synchronize()


def matmul_flops_per_s(side: int = 8192, repeats: int = 20) -> float:
    """The median rate of a bf16 product of two square matrices."""
    matrix = torch.randn(side, side, device="cuda", dtype=torch.bfloat16)
    times = []
    for _ in range(repeats + 5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        torch.matmul(matrix, matrix)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * side**3 / statistics.median(times[5:])


def joules(run: Run, batch: int) -> object:
    """Per image, or why they cannot be had."""

    def count() -> int:
        run()
        return batch

    try:
        return measure_energy(count, meter=find_meter()).energy_per_image_j
    except MeterError as error:
        return f"unavailable ({error})"


def complete(
    rows: Sequence[Row], macs: int, ceiling_flops_per_s: float, energies: Mapping[str, object]
) -> list[Row]:
    """Rows of `rows_of` with the work done per second, its share of the ceiling, and joules."""
    done = []
    for row in rows:
        rate = 2 * macs * float(str(row["images_per_s"]))
        done.append(
            row
            | {
                "tflops": round(rate / 1e12, 2),
                "ceiling_percent": round(100 * rate / ceiling_flops_per_s, 1),
                "energy_per_image_j": energies[str(row["engine"])],
            }
        )
    return done


def to_markdown(
    rows: Sequence[Row], machine: Mapping[str, object], ceilings: Sequence[float]
) -> str:
    """The record: what it was measured on, then a row for each model, batch and engine."""
    lines = ["# Inference on a GPU", "", "Written by `benchmarks/gpu.py`, which says how.", ""]
    lines += [f"- {key}: {value}" for key, value in machine.items()]
    least, most = min(ceilings) / 1e12, max(ceilings) / 1e12
    lines += [f"- matmul ceiling, bf16: {least:.0f} to {most:.0f} TFLOP/s", ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    lines += ["| " + " | ".join(str(row.get(key, "")) for key in COLUMNS) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def measure(name: str, batch: int, sampling: Sampling, ceiling: float) -> list[Row]:
    shape = (batch, 3, SIDE, SIDE)
    images = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    images = images.to(memory_format=torch.channels_last)
    engines = engines_of(name)
    runs = {label: partial(waiting, engine, images) for label, engine in engines.items()}
    for run in runs.values():
        for _ in range(8):  # compiled, tuned and recorded before the first round
            run()
    rows = rows_of(name, batch, interleave(runs, sampling))
    energies = {label: joules(run, batch) for label, run in runs.items()}
    counted = timm.create_model(name).eval()
    macs = count_macs(counted, (torch.empty(1, 3, SIDE, SIDE),))
    return complete(rows, macs, ceiling, energies)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=[*OURS, *PEERS])
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--rounds", type=int, default=50, help="of each model and batch, at least")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each model and batch")
    parser.add_argument("--output", type=Path, help="write the record as Markdown")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu.py: expected a GPU, found none", file=sys.stderr)
        raise SystemExit(2)
    rows: list[Row] = []
    ceilings = []
    for model in given.models:
        for batch in given.batches:
            ceilings.append(matmul_flops_per_s())
            sampling = Sampling(min_rounds=given.rounds, max_s=given.seconds)
            found = measure(model, batch, sampling, ceilings[-1])
            for row in found:
                print("  ".join(f"{value}" for value in row.values()), flush=True)
            rows += found
            torch.compiler.reset()
    if given.output:
        machine = describe_machine(torch.device("cuda"))
        given.output.write_text(to_markdown(rows, machine, ceilings))


if __name__ == "__main__":
    main()
