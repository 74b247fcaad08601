"""From the bytes of a file to results: the time of each stage, and of a fresh process."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from vovnet.classify import Classifier
from vovnet.errors import ConfigError
from vovnet.images import read_image
from vovnet.predict import Pixels, Predictor
from vovnet.profiling.latency import Clock, Timings, summary

STAGES = ("decode", "preprocess", "network", "postprocess")
WHOLE = "all stages"

# Not ru_maxrss, which is never below the memory of the process that started this one.
_FRESH_PROCESS = """
import importlib, json, sys
from pathlib import Path
(module, name), model, image, options = json.loads(sys.argv[1])
getattr(importlib.import_module(module), name).load(model, **options)(image)
status = Path("/proc/self/status")
lines = status.read_text().splitlines() if status.exists() else []
print(next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0))
"""


def time_stages(
    predictor: Classifier | Predictor,
    image: Path,
    *,
    rounds: int = 30,
    warm_up: int = 2,
    clock: Clock = time.perf_counter,
) -> dict[str, Timings]:
    """Times of decoding, preprocessing, network and postprocessing of one image file, and of all.

    The file comes from the system's cache from the second time on. Raises ImageError on a file
    that cannot be read, ConfigError when rounds is below 1.
    """
    if rounds < 1:
        raise ConfigError(f"expected at least one round, got {rounds}")
    times_s: dict[str, list[float]] = {name: [] for name in STAGES}
    for number in range(warm_up + rounds):
        marks = [clock()]
        pixels = read_image(image)
        marks.append(clock())
        resized = predictor.preprocess.resize(pixels)
        images, sizes = predictor.preprocess.batch([resized])
        marks.append(clock())
        raw = predictor.engine.infer(images, sizes)
        marks.append(clock())
        if isinstance(predictor, Classifier):
            predictor.classifications(raw["logits"])
        else:
            shapes = {"image_size": pixels.shape[:2], "resized_size": resized.shape[:2]}
            predictor.postprocess(raw, 0, **shapes)
        marks.append(clock())
        if number >= warm_up:
            for values, start, end in zip(times_s.values(), marks, marks[1:], strict=False):
                values.append(end - start)
    whole = [sum(stages) for stages in zip(*times_s.values(), strict=True)]
    return {name: summary(values) for name, values in (times_s | {WHOLE: whole}).items()}


def time_cold_start(
    kind: type[Classifier] | type[Predictor],
    model: Path,
    image: Path,
    *,
    engine: str,
    precision: str,
    device: str,
    threads: int | None,
    runs: int = 3,
) -> tuple[Timings, int | None]:
    """Times from starting a fresh Python process to the end of it with one result of `image`, and
    the most bytes of memory that one held; None where the system does not say.

    The first run may find the files in no cache; that is part of the spread.
    Raises ConfigError with what the process said when it fails.
    """
    options = {"engine": engine, "precision": precision, "device": device, "threads": threads}
    place = (kind.__module__, kind.__name__)
    arguments = json.dumps([place, str(model.resolve()), str(image.resolve()), options])
    times_s, peaks = [], []
    for _ in range(runs):
        start_s = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", _FRESH_PROCESS, arguments],
            capture_output=True,
            text=True,
            check=False,
        )
        times_s.append(time.perf_counter() - start_s)
        if done.returncode:
            said = done.stderr.strip().splitlines() or ["nothing"]
            raise ConfigError(f"{model}: expected a first result, the process said: {said[-1]}")
        peaks.append(int(done.stdout.split()[-1]))
    return summary(times_s), max(peaks) or None


@contextmanager
def image_file(image: Path | None, pixels: Pixels) -> Iterator[Path]:
    """The path of `image`, or of `pixels` in a temporary PNG file where there is none."""
    if image is not None:
        yield image
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.png"
        Image.fromarray(pixels).save(path)
        yield path
