"""How long `create_model` takes beside timm's, in one process and in turns.

    python benchmarks/create_model.py [--name ese_vovnet39b] [--repeats 15] [--threads 1]

Prints median and quartiles of both in milliseconds, and of the ratio of each pair (ours / timm):
by the clock, and by processor time, which other programs on the machine disturb less.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import timm
import torch

from vovnet.models.zoo import create_model


def build_ms(build: Callable[[str], object], name: str) -> tuple[float, float]:
    """Milliseconds by the clock and of the processor."""
    wall, processor = time.perf_counter(), time.process_time()
    build(name)
    return 1000 * (time.perf_counter() - wall), 1000 * (time.process_time() - processor)


def summary(values: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4)
    return {"median": round(median, 3), "quartile_1": round(low, 3), "quartile_3": round(high, 3)}


def compare(pairs: list[tuple[float, float]]) -> dict[str, dict[str, float]]:
    return {
        "ours_ms": summary([ours for ours, _ in pairs]),
        "timm_ms": summary([theirs for _, theirs in pairs]),
        "ratio": summary([ours / theirs for ours, theirs in pairs]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", default="ese_vovnet39b")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    builders = (create_model, timm.create_model)
    for build in builders:
        build(options.name)
    wall_pairs, processor_pairs = [], []
    for repeat in range(options.repeats):
        order = builders if repeat % 2 else builders[::-1]
        times = {build: build_ms(build, options.name) for build in order}
        ours, theirs = times[create_model], times[timm.create_model]
        wall_pairs.append((ours[0], theirs[0]))
        processor_pairs.append((ours[1], theirs[1]))
    result = {
        "name": options.name,
        "n": options.repeats,
        "threads": options.threads,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "wall": compare(wall_pairs),
        "processor": compare(processor_pairs),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
