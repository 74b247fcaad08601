"""What comparisons with peers trained from scratch share: the peers' environment, the budget,
training torchvision's and Ultralytics' networks within it, and scoring with intervals over images.
"""

import argparse
import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import random
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

THREADS = int(os.environ.get("THREADS", "2"))
SEED = 0
PEER_PACKAGES = (
    "ultralytics==8.4.190",
    "ultralytics-thop==2.2.3",
    "opencv-python-headless==5.0.0.93",
    "scipy==1.17.1",
    "polars==2.1.0",
    "polars-runtime-32==2.1.0",
    "psutil==7.2.2",
    "py-cpuinfo==9.0.0",
)
Predict = Callable[[np.ndarray], Any]
ToResults = Callable[[int, Any], list[dict[str, Any]]]
Example = tuple[torch.Tensor, dict[str, Any]]


@dataclass
class Budget:
    """Processor seconds a training may spend, counted from its creation over all threads."""

    cpu_seconds: float
    log_file: Path
    started_cpu: float = field(default_factory=time.process_time)
    started_wall: float = field(default_factory=time.perf_counter)

    def fraction(self) -> float:
        """Return the spent fraction of the budget; above 1 once it is overdrawn."""
        return (time.process_time() - self.started_cpu) / self.cpu_seconds

    def rate_factor(self, warmup: float = 0.05) -> float:
        """Return the learning-rate factor in [0, 1]: linear warm-up, then cosine to zero."""
        spent = min(self.fraction(), 1.0)
        if spent < warmup:
            return spent / warmup
        return 0.5 * (1.0 + math.cos(math.pi * (spent - warmup) / (1.0 - warmup)))

    def check(self, step: int, losses: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the sum of the losses, which must be finite; log every tenth step as JSON."""
        total = torch.stack([value.sum() for value in losses.values()]).sum()
        if not torch.isfinite(total):
            raise RuntimeError(f"expected a finite loss, got {total} at step {step}")
        if step % 10 == 0:
            values = {name: round(value.sum().item(), 4) for name, value in losses.items()}
            row = {"step": step, "spent": round(self.fraction(), 4), **values}
            with self.log_file.open("a" if step else "w") as stream:
                print(json.dumps(row), file=stream)
        return total

    def summary(self, *, images_seen: int, epoch_size: int, steps: int) -> dict[str, Any]:
        """Return what the training spent and saw, as plain JSON types."""
        return {
            "cpu_seconds": round(time.process_time() - self.started_cpu, 1),
            "core_minutes": round((time.process_time() - self.started_cpu) / 60, 1),
            "wall_seconds": round(time.perf_counter() - self.started_wall, 1),
            "images_seen": images_seen,
            "epochs": round(images_seen / epoch_size, 2),
            "steps": steps,
        }


def load_split(data_dir: Path, split: str) -> COCO:
    """Load the annotations of a split of a COCO folder quietly."""
    with contextlib.redirect_stdout(None):
        return COCO(str(data_dir / "annotations" / f"{split}.json"))


def read_rgb(data_dir: Path, info: dict[str, Any]) -> np.ndarray:
    """Read an image of the folder as uint8 (H, W, 3) RGB."""
    with Image.open(data_dir / "images" / info["file_name"]) as image:
        return np.asarray(image.convert("RGB"))


def make_environment(folder: Path) -> None:
    """Make the peers' environment: this interpreter's packages, this source, and Ultralytics."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    ask = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    own = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout
    shared = (sysconfig.get_paths()["purelib"], Path(__file__).resolve().parents[1] / "src")
    (Path(own.strip()) / "project.pth").write_text("\n".join(map(str, shared)))
    subprocess.run([python, "-m", "pip", "install", "--no-deps", *PEER_PACKAGES], check=True)


def start(arguments: argparse.Namespace) -> None:
    """Make the work folder, and set the threads and the seed that every contestant shares.

    Begins the program anew with threads that sleep while they wait, unless they do already.
    """
    if os.environ.get("OMP_WAIT_POLICY") != "passive":
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.execv(sys.executable, [sys.executable, *sys.argv])
    arguments.work_dir = arguments.work_dir.resolve()
    arguments.work_dir.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(THREADS)
    torch.manual_seed(SEED)
    random.seed(SEED)


def machine() -> dict[str, Any]:
    """Return what the numbers depend on: versions, processor, threads."""
    model = platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), model)
    packages = ("torch", "torchvision", "pycocotools", "ultralytics")
    found = [package for package in packages if importlib.util.find_spec(package)]
    return {
        "versions": {package: importlib.metadata.version(package) for package in found},
        "hardware": f"{model}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "precision": "fp32",
    }


def precision_summary(evaluation: COCOeval) -> list[float]:
    """Return AP, AP50, AP75 at the detection limit, from eval['precision'] (T, R, K, 1, 1)."""
    precision = evaluation.eval["precision"]
    return [
        float(np.mean(values[values > -1])) for values in (precision, precision[0], precision[5])
    ]


def score(
    truth: COCO,
    results: list[dict[str, Any]],
    *,
    iou_type: str,
    max_detections: int,
    resamples: int = 500,
) -> np.ndarray:
    """Return AP, AP50, AP75, and then the same of images drawn with replacement: (1 + n, 3).

    The draws are the same for every contestant, so differences of two of them are paired.
    """
    with contextlib.redirect_stdout(None):
        found = truth.loadRes(results) if results else COCO()
        evaluation = COCOeval(truth, found, iou_type)
        evaluation.params.maxDets = [max_detections]
        evaluation.params.areaRng = evaluation.params.areaRng[:1]
        evaluation.params.areaRngLbl = ["all"]
        evaluation.evaluate()
        evaluation.accumulate()
        summaries = [precision_summary(evaluation)]
        num_images = len(evaluation.params.imgIds)
        by_class = np.array(evaluation.evalImgs, dtype=object).reshape(-1, num_images)
        generator = np.random.default_rng(SEED)
        for _ in range(resamples):
            drawn = generator.integers(num_images, size=num_images)
            evaluation.evalImgs = by_class[:, drawn].ravel().tolist()
            evaluation.accumulate()
            summaries.append(precision_summary(evaluation))
    return np.array(summaries)


def interval(samples: np.ndarray) -> list[float]:
    """Return the 95 % interval of bootstrap samples."""
    return [round(float(value), 4) for value in np.percentile(samples, (2.5, 97.5))]


def evaluate(
    arguments: argparse.Namespace,
    name: str,
    *,
    predict: Predict,
    to_results: ToResults,
    iou_type: str,
    max_detections: int,
    outcome: dict[str, Any],
    split: str = "test",
) -> None:
    """Predict and score a split; write `<name>.json`, its predictions and its samples."""
    truth = load_split(arguments.data, split)
    results: list[dict[str, Any]] = []
    for image_id, info in truth.imgs.items():
        results += to_results(image_id, predict(read_rgb(arguments.data, info)))
    (arguments.work_dir / f"{name}_predictions.json").write_text(json.dumps(results))
    samples = score(truth, results, iou_type=iou_type, max_detections=max_detections)
    np.save(arguments.work_dir / f"{name}_samples.npy", samples)
    record: dict[str, Any] = {"name": name, "num_images": len(truth.imgs)}
    for index, metric in enumerate(("ap", "ap50", "ap75")):
        record[metric] = round(float(samples[0, index]), 4)
        record[f"{metric}_interval"] = interval(samples[1:, index])
    record |= {"num_detections": len(results), "max_detections": max_detections}
    record |= machine() | outcome
    (arguments.work_dir / f"{name}.json").write_text(json.dumps(record, indent=1))
    print(json.dumps(record, indent=1))


def accuracy_row(row: dict[str, Any], shown: Sequence[str]) -> str:
    """Return one line of the accuracy table, of a record and the names of its last cells."""
    cells = []
    for metric in ("ap", "ap50", "ap75"):
        low, high = row[f"{metric}_interval"]
        cells.append(f"{row[metric]:.3f} ({low:.3f} to {high:.3f})")
    cells += [str(row.get(key, "-")) for key in shown]
    return f"| {row['name']} | " + " | ".join(cells) + " |"


def difference(work_dir: Path, ours: str, peer: str) -> str:
    """Return one line: the AP of ours less the peer's, with its paired interval."""
    first, second = (np.load(work_dir / f"{name}_samples.npy")[:, 0] for name in (ours, peer))
    low, high = interval((first - second)[1:])
    return f"AP of {ours} less {peer}: {first[0] - second[0]:+.3f} ({low:+.3f} to {high:+.3f})"


def endless(image_ids: list[int]) -> Iterator[int]:
    """Yield the images in passes, each in another random order."""
    while True:
        yield from random.sample(image_ids, len(image_ids))


def train_torchvision(
    model: torch.nn.Module,
    image_ids: list[int],
    read: Callable[[int], Example],
    *,
    budget: Budget,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Train a detector of torchvision until the budget is spent; return what was spent and seen.

    read gives an image (3, H, W) in [0, 1] and its target, augmented anew each time.
    """
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=settings["weight_decay"])
    order = endless(image_ids)
    step = 0
    while budget.fraction() < 1:
        batch = [read(next(order)) for _ in range(settings["batch_size"])]
        for group in optimizer.param_groups:
            group["lr"] = settings["learning_rate"] * budget.rate_factor()
        losses = model([image for image, _ in batch], [target for _, target in batch])
        optimizer.zero_grad()
        budget.check(step, losses).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings["gradient_clip"])
        optimizer.step()
        step += 1
    seen = step * settings["batch_size"]
    return budget.summary(images_seen=seen, epoch_size=len(image_ids), steps=step)


def quiet_ultralytics(work_dir: Path) -> None:
    """Keep Ultralytics from the network and its settings in the work folder, before its import."""
    os.environ |= {
        "YOLO_OFFLINE": "true",
        "YOLO_AUTOINSTALL": "false",
        "YOLO_CONFIG_DIR": str(work_dir / "ultralytics"),
    }
    (work_dir / "ultralytics").mkdir(parents=True, exist_ok=True)
    importlib.import_module("ultralytics").settings.update({"sync": False})


def setup_trainer(trainer_class: Any, work_dir: Path, settings: dict[str, Any]) -> Any:
    """Return Ultralytics' own trainer for random weights, set up but not run."""
    quiet = {"amp": False, "plots": False, "val": False, "deterministic": False, "verbose": False}
    trainer = trainer_class(
        overrides={
            "epochs": 10,
            "device": "cpu",
            "workers": 0,
            "cache": "ram",
            "pretrained": False,
            "project": str(work_dir),
            "name": "yolo-run",
            "exist_ok": True,
            "seed": SEED,
            **settings,
            **quiet,
        }
    )
    trainer._setup_train()
    return trainer


def train_yolo(trainer: Any, *, budget: Budget, mosaic_until: float) -> dict[str, Any]:
    """Train with Ultralytics' data, loss, optimizer and averaging under the processor budget."""
    torch.set_num_threads(THREADS)
    trainer._model_train()
    seen = step = 0
    mosaic = True
    while budget.fraction() < 1:
        for batch in trainer.train_loader:
            if mosaic and budget.fraction() > mosaic_until:
                mosaic = False
                trainer._close_dataloader_mosaic()
            for group in trainer.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * budget.rate_factor()
            total, parts = trainer.model(trainer.preprocess_batch(batch))
            budget.check(step, parts)
            total.sum().backward()
            trainer.optimizer_step()
            step += 1
            seen += len(batch["img"])
            if budget.fraction() >= 1:
                break
    epoch_size = len(trainer.train_loader.dataset)
    return budget.summary(images_seen=seen, epoch_size=epoch_size, steps=step)


def save_yolo(trainer: Any, path: Path) -> None:
    """Save the averaged weights as Ultralytics loads them."""
    averaged = trainer.ema.ema
    averaged.criterion = None
    torch.save({"model": averaged, "train_args": vars(trainer.args)}, path)
