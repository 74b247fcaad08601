"""Does every detector of the zoo learn eight pictures by heart? A test of training as a whole.

    python benchmarks/overfit.py [--data DIR] [--families fcos_lite,...] [--side 192] [--steps 400]
        [--threads N] [--device auto] [--work-dir DIR] [--output FILE]

DIR is a data set in COCO's form; by default coco-free in $VOVNET_DATA or ../shared/data. Of its
train split the first eight pictures count, in order of image id, that have one to eight objects, no
crowd, and no object shorter than 24 pixels on either side once the picture is resized to a square.
Each family trains on them alone, by the library's own `train`, without augmentation, from random
weights on its smallest backbone, and is evaluated on the same eight by COCO's rule: box AP50 of at
least 0.99 and AP of at least 0.80 is passed. All take the same settings; prints a table, and ends
with status 1 where one fails.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from vovnet.data.coco import write_split
from vovnet.data.formats import load_split
from vovnet.data.labels import DetectionData, ImageRecord
from vovnet.files import atomic_write_json
from vovnet.training.config import TrainConfig
from vovnet.training.run import train

BACKBONES = {
    "fcos_lite": "ese_vovnet19b_slim_dw",
    "centermask_lite": "ese_vovnet19b_slim_dw",
    "faster_rcnn_lite": "ese_vovnet19b_slim_dw",
    "mask_rcnn_lite": "ese_vovnet19b_slim_dw",
    "refinedet": "ese_vovnet19b_slim_dw",
    "dsod": "ese_vovnet19b_slim_dw",
    "vovdet": "ese_vovnet19b_slim_dw",
    "vovdet_seg": "ese_vovnet19b_slim_dw",
}
OVERRIDES: dict[str, dict[str, object]] = {
    # 512 regions are for pictures with many objects, and most of the time; 64 are too few to learn
    # which of two classes it is in 400 steps. Masks are learnt of the positives alone, and are most
    # of Mask R-CNN's time.
    "faster_rcnn_lite": {"rois_per_image": 192},
    "mask_rcnn_lite": {"rois_per_image": 192, "roi_positive_fraction": 0.125},
}
NUM_IMAGES = 8
MAX_OBJECTS = 8
LEAST_SIDE = 24  # pixels after the resize
BATCH_SIZE = 4
AP50_BAR, AP_BAR = 0.99, 0.80


def is_eligible(record: ImageRecord, side: int) -> bool:
    """Whether a picture has few objects, none a crowd, all large enough to be seen."""
    annotations = record.annotations
    if not 1 <= len(annotations) <= MAX_OBJECTS or any(one.is_crowd for one in annotations):
        return False
    boxes = np.array([one.box_xyxy for one in annotations])
    sides = (boxes[:, 2:] - boxes[:, :2]) * side / np.array([record.width, record.height])
    return bool((sides >= LEAST_SIDE).all())


def choose(data: DetectionData, side: int) -> DetectionData:
    ordered = sorted(data.images, key=lambda record: record.id)
    chosen = [record for record in ordered if is_eligible(record, side)][:NUM_IMAGES]
    if len(chosen) < NUM_IMAGES:
        raise SystemExit(f"expected {NUM_IMAGES} pictures that fit, found {len(chosen)}")
    used = sorted({one.label for record in chosen for one in record.annotations})
    place = {label: index for index, label in enumerate(used)}
    images = tuple(
        replace(
            record,
            annotations=tuple(replace(a, label=place[a.label]) for a in record.annotations),
        )
        for record in chosen
    )
    return replace(
        data,
        images=images,
        class_names=tuple(data.class_names[label] for label in used),
        category_ids=tuple(data.category_ids[label] for label in used),
    )


def write_twice(data: DetectionData, folder: Path) -> None:
    """A data set of these pictures alone, with the same ones to train and to evaluate on."""
    for split in ("train", "val"):
        write_split(folder, split, data, [record.path.name for record in data.images])
        for record in data.images:
            (folder / "images" / split / record.path.name).symlink_to(record.path.resolve())


def overfit(family: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Trains a family and returns its figures."""
    epochs = options.steps * BATCH_SIZE / NUM_IMAGES
    side = options.side
    config = TrainConfig(
        model=f"{family}_{BACKBONES[family]}",
        model_overrides=OVERRIDES.get(family, {}),
        data=str(folder),
        preprocess={"square": side},
        augment={
            "output_size": (side, side),
            "scale_range": (1.0, 1.0),
            "horizontal_flip": 0.0,
        },
        batch_size=BATCH_SIZE,
        epochs=epochs,
        eval_every_epochs=10**6,  # at the end alone
        optimizer="adamw",
        learning_rate=1e-3,
        warmup_fraction=0.05,
        weight_decay=0.0,
        ema_decay=0.9,
        precision="fp32",
        device=options.device,
        threads=options.threads,
        workers=0,
        runs_dir=str(options.work_dir / "runs"),
    )
    started_s = time.monotonic()
    metrics = train(config).metrics
    assert metrics is not None
    box = metrics.by_type["bbox"]
    return {
        "family": family,
        "backbone": BACKBONES[family],
        "steps": options.steps,
        "side": side,
        "ap": box.ap,
        "ap50": box.ap50,
        "objects": metrics.num_objects,
        "minutes": round((time.monotonic() - started_s) / 60, 2),
        "passed": box.ap50 >= AP50_BAR and box.ap >= AP_BAR,
    }


def table_of(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title=f"{NUM_IMAGES} pictures by heart: AP50 >= {AP50_BAR}, AP >= {AP_BAR}")
    for name in ("family", "backbone", "steps", "box AP50", "box AP", "minutes", "passed"):
        table.add_column(name)
    for row in rows:
        table.add_row(
            row["family"],
            row["backbone"],
            str(row["steps"]),
            f"{row['ap50']:.3f}",
            f"{row['ap']:.3f}",
            f"{row['minutes']:.1f}",
            "yes" if row["passed"] else "NO",
        )
    return table


def default_data() -> Path:
    root = Path(__file__).parent.parent.parent / "shared" / "data"
    return Path(os.environ.get("VOVNET_DATA", root)) / "coco-free"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=default_data())
    parser.add_argument("--families", default=",".join(BACKBONES))
    parser.add_argument("--side", type=int, default=192)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--work-dir", type=Path, default=None)
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    families = options.families.split(",")
    unknown = set(families) - set(BACKBONES)
    if unknown:
        parser.error(f"--families: expected some of {', '.join(BACKBONES)}, got {unknown}")
    if options.work_dir is None:
        options.work_dir = Path(tempfile.mkdtemp(prefix="overfit-"))
    data, _ = load_split(options.data, "train")
    folder = Path(tempfile.mkdtemp(prefix="data-", dir=options.work_dir))
    write_twice(choose(data, options.side), folder)
    rows = []
    for family in families:
        rows.append(overfit(family, folder, options))
        print(json.dumps(rows[-1]), flush=True)
        if options.output is not None:
            report = {"torch": torch.__version__, "data": options.data.name, "families": rows}
            atomic_write_json(options.output, report)
    Console().print(table_of(rows))
    sys.exit(0 if all(row["passed"] for row in rows) else 1)


if __name__ == "__main__":
    main()
