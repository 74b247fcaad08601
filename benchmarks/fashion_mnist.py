"""Fashion-MNIST with the small stem: a VoVNet for pictures of 28 x 28, from shards, by recipe.

    python benchmarks/fashion_mnist.py --source DIR --work DIR [--epochs 15]

--source holds the four files of the data set (train-images-idx3-ubyte.gz, ...), for instance
/usr/share/datasets/fashion-mnist of Debian's dataset-fashion-mnist (MIT). The last 5,000 training
pictures choose the weights; the 10,000 of the test split are looked at once, at the end.
"""

import argparse
import gzip
import io
import json
import tarfile
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vovnet.classify import Classifier
from vovnet.data.classes import load_classes
from vovnet.evaluation_classes import evaluate_classes, predict_logits
from vovnet.training.config import load_config
from vovnet.training.run import train

NAMES = (
    "t-shirt", "trouser", "pullover", "dress", "coat",
    "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
VALIDATION = 5_000
PER_SHARD = 10_000
SETTINGS = {
    "model": "ese_vovnet19b_slim",
    "model_overrides": {
        "stem": "small",
        "stem_channels": [16, 32, 48],
        "stage_conv_channels": [40, 48, 64, 80],
        "stage_out_channels": [80, 128, 192, 256],
    },
    "preprocess": {"mean": [72.94] * 3, "std": [90.02] * 3, "short_side": 28, "crop_size": 28},
    "augment": {
        "image_size": 28,
        "first_image_size": None,
        "scale": [0.7, 1.0],
        "ratio": [0.9, 1.1],
        "brightness": 0.0,
        "contrast": 0.0,
        "saturation": 0.0,
        "erase": 0.3,
        "label_smoothing": 0.1,
    },
    "batch_size": 128,
    "learning_rate": 4e-3,
    "ema_decay": 0.998,
    "eval_every_epochs": 1,
    "name": "fashion_mnist",
}


def read_idx(path: Path) -> NDArray[np.uint8]:
    """The array of a gzipped IDX file of bytes."""
    with gzip.open(path) as stream:
        content = stream.read()
    axes = content[3]
    shape = np.frombuffer(content, ">u4", count=axes, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)


def write_shards(folder: Path, split: str, images: NDArray[np.uint8], labels: list[int]) -> None:
    """PNG pictures and their labels as tar shards."""
    for start in range(0, len(images), PER_SHARD):
        with tarfile.open(folder / f"{split}-{start // PER_SHARD:03}.tar", "w") as tar:
            for index in range(start, min(start + PER_SHARD, len(images))):
                stream = io.BytesIO()
                Image.fromarray(images[index]).save(stream, "PNG", compress_level=1)
                members = (("png", stream.getvalue()), ("cls", str(labels[index]).encode()))
                for ending, content in members:
                    member = tarfile.TarInfo(f"{index:05}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def prepare(source: Path, folder: Path) -> None:
    """Writes the three splits as shards, once."""
    if (folder / "classes.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    images, labels = (
        read_idx(source / f"train-{kind}.gz") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")
    )
    last = len(images) - VALIDATION
    write_shards(folder, "train", images[:last], labels[:last].tolist())
    write_shards(folder, "val", images[last:], labels[last:].tolist())
    images, labels = (
        read_idx(source / f"t10k-{kind}.gz") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")
    )
    write_shards(folder, "test", images, labels.tolist())
    (folder / "classes.json").write_text(json.dumps(NAMES))


def main() -> None:
    """Prepares, trains, and measures on the test split."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--epochs", type=float, default=15)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    data = options.work / "data"
    prepare(options.source, data)
    flags = SETTINGS | {
        "data": str(data),
        "runs_dir": str(options.work / "runs"),
        "epochs": options.epochs,
        "workers": options.workers,
        "threads": options.threads,
        "seed": options.seed,
    }
    started_s, used_s = time.monotonic(), time.process_time()
    result = train(load_config("fast", None, flags))
    minutes, processor = (time.monotonic() - started_s) / 60, (time.process_time() - used_s) / 60
    if result.model_dir is None:
        return
    classifier = Classifier.load(result.model_dir)
    test = load_classes(data, "test", class_names=classifier.class_names)
    metrics = evaluate_classes(
        predict_logits(classifier, test, batch_size=128),
        test.labels,
        test.class_names,
        bootstrap=500,
    )
    print(metrics.format())
    figures = {"minutes": minutes, "processor_minutes": processor, "epochs": options.epochs}
    print(json.dumps(figures | metrics.to_dict()))


if __name__ == "__main__":
    main()
