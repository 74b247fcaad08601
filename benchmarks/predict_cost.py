"""How much of `vovnet predict` is the network, and how much memory it takes at most.

    python benchmarks/predict_cost.py --model nuclei --data DIR [--split test] [--threads 2]

Predicts every image of a split as the command does, pictures included, in a temporary folder, and
prints the share of the wall time after start that the network took, and the process's peak memory.
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import torch

from vovnet.data.coco import find_split, load_coco
from vovnet.predict import Predictor
from vovnet.predict_files import predict_files, return_large_blocks
from vovnet.runtime.engine import Engine


class TimedEngine:
    """An engine that adds up the seconds its network takes."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.network_s = 0.0

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def infer(self, images, sizes):
        started = time.perf_counter()
        raw = self.engine.infer(images, sizes)
        self.network_s += time.perf_counter() - started
        return raw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="nuclei")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    data = load_coco(*find_split(options.data, options.split))
    paths = [record.path for record in data.images]
    return_large_blocks()
    started = time.perf_counter()
    predictor = Predictor.load(options.model, threads=options.threads)
    timed = predictor.engine = TimedEngine(predictor.engine)
    start_s = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        report = predict_files(predictor, paths, Path(folder))
        wall_s = time.perf_counter() - started
    result = {
        "images": report.images,
        "objects": report.objects,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load_s": round(start_s, 3),
        "wall_s": round(wall_s, 2),
        "network_s": round(timed.network_s, 2),
        "network_share": round(timed.network_s / wall_s, 4),
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
