"""How much profiling adds to what it times: the profiler's own loop against a bare loop.

    python benchmarks/profile_overhead.py [--blocks 40] [--calls 10] [--side 64]

Blocks of calls alternate in random order in one process. Printed are ratios to the bare loop with
their 95 % intervals: of the mean time that the profiler reports, and of the processor seconds that
its block takes, which other processes do not disturb.
"""

import argparse
import json
import random
import time

import torch

from vovnet.models.zoo import create_model
from vovnet.profiling.compare import Sampling, interleave, ratio_interval
from vovnet.profiling.machine import describe_machine
from vovnet.profiling.records import Point
from vovnet.profiling.target import open_module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="ese_vovnet19b_slim_dw")
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--blocks", type=int, default=40)
    parser.add_argument("--calls", type=int, default=10)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module = create_model(options.model).eval()
    images = torch.randn(1, 3, options.side, options.side)
    run = open_module(module, (images,), Point(), device=device).run
    sampling = Sampling(min_rounds=options.calls, max_s=0, warm_up_s=0)

    def bare() -> tuple[float, float]:
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        for _ in range(options.calls):
            run()
        wall_s, cpu_s = time.perf_counter() - start_s, time.process_time() - start_cpu_s
        return wall_s / options.calls, cpu_s / options.calls

    def profiled() -> tuple[float, float]:
        start_cpu_s = time.process_time()
        times_s = interleave({"network": run}, sampling).times_s["network"]
        # One more call than are timed warms up.
        cpu_s = (time.process_time() - start_cpu_s) / (options.calls + 1)
        return sum(times_s) / options.calls, cpu_s

    bare_s, bare_cpu_s, timed_s, cpu_s = [], [], [], []
    bare(), profiled()
    for _ in range(options.blocks):
        first = random.random() < 0.5
        before = bare() if first else None
        timed, cpu = profiled()
        wall_bare, cpu_bare = bare() if before is None else before
        bare_s.append(wall_bare)
        bare_cpu_s.append(cpu_bare)
        timed_s.append(timed)
        cpu_s.append(cpu)
    result = {
        "machine": describe_machine(device),
        "model": options.model,
        "side": options.side,
        "blocks": options.blocks,
        "calls_in_a_block": options.calls,
        "bare_ms": 1000 * sorted(bare_s)[options.blocks // 2],
        "reported_over_bare": ratio_interval(timed_s, bare_s),
        "processor_seconds_over_bare": ratio_interval(cpu_s, bare_cpu_s),
        "figures": "ratio, low and high end of its 95 % interval",
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
