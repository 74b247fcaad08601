"""What `vovnet predict --fast-decode` saves on large JPEGs, and how the pixels differ.

    python benchmarks/fast_decode.py [--pictures DIR] [--count 4] [--short-side 1100 3000]

Enlarges pictures (default $VOVNET_DATA/coco-free), adds grain, stores them as JPEG of quality
90, and prepares each for ese_vovnet39b with and without scaled decoding. Prints milliseconds of
decoding and resizing, and the differences in grey levels.
"""

import argparse
import io
import os
import random
import time
from pathlib import Path

import numpy as np
from PIL import Image

from vovnet.images import find_images, read_image
from vovnet.published import published_preprocess


def enlarge(path: Path, short_side: int) -> bytes:
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    factor = short_side / min(image.size)
    size = tuple(round(side * factor) for side in image.size)
    grain = np.random.default_rng(0).normal(0, 6, (size[1], size[0], 3))
    pixels = np.asarray(image.resize(size, Image.Resampling.BICUBIC)) + grain
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def prepare(data: bytes, min_side: int | None) -> tuple[np.ndarray, float]:
    started = time.perf_counter()
    pixels = PREPROCESS.resize(read_image(data, min_side=min_side))
    return pixels.astype(int), 1e3 * (time.perf_counter() - started)


PREPROCESS = published_preprocess("ese_vovnet39b")


def main() -> None:
    default = Path(os.environ.get("VOVNET_DATA", "../shared/data")) / "coco-free"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=Path, default=default)
    parser.add_argument("--count", type=int, default=4)
    parser.add_argument("--short-side", type=int, nargs="+", default=[1100, 3000])
    options = parser.parse_args()
    paths = random.Random(0).sample(find_images(str(options.pictures)), options.count)
    for short_side in options.short_side:
        for path in paths:
            data = enlarge(path, short_side)
            whole, whole_ms = prepare(data, None)
            fast, fast_ms = prepare(data, PREPROCESS.short_side)
            difference = np.abs(whole - fast)
            print(
                f"{short_side} {path.name}: {whole_ms:.1f} ms, fast {fast_ms:.1f} ms; grey levels "
                f"{difference.mean():.2f} on average, {difference.max()} at most",
                flush=True,
            )


if __name__ == "__main__":
    main()
