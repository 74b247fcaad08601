"""Training throughput of a classifier beside a loop of timm's public parts.

The same network, batch, crop size, augmentation and pictures; each variant runs in a process of
its own, in turn, and the ratios are of neighbours in time.

    python benchmarks/classify_train.py --data DIR --model ese_vovnet19b_dw --output RESULT.json

timm-default has the flags that timm's training script defaults to (float32, NCHW, four loading
processes); timm-best adds channels_last, bfloat16 where the hardware has it, and one loading
process for each core. ours is `vovnet train` with its defaults.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

WARM_UP_STEPS = 3
CPU = torch.device("cpu")


def run_timm(options: argparse.Namespace, *, best: bool) -> dict[str, float]:
    """Images per second of a loop as timm's script has it."""
    import timm
    import timm.data
    import timm.loss
    import timm.optim

    from vovnet.training.loop import computes_bf16

    dataset = timm.data.create_dataset("", root=str(options.data), split="train")
    loader = timm.data.create_loader(
        dataset,
        input_size=(3, options.image_size, options.image_size),
        batch_size=options.batch_size,
        is_training=True,
        use_prefetcher=False,
        color_jitter=0.4,
        interpolation="random",
        num_workers=(os.cpu_count() or 1) if best else 4,
        device=CPU,
    )
    model = timm.create_model(options.model, num_classes=10).train()
    layout = torch.channels_last if best else torch.contiguous_format
    model.to(memory_format=layout)
    optimizer = timm.optim.create_optimizer_v2(model, opt="sgd", lr=0.05, momentum=0.9)
    loss_of = timm.loss.LabelSmoothingCrossEntropy(smoothing=0.1)
    bf16 = best and computes_bf16(CPU)
    stream, times, waits = iter(loader), [], []
    for _ in range(WARM_UP_STEPS + options.steps):
        started_s = time.perf_counter()
        try:
            images, labels = next(stream)
        except StopIteration:
            stream = iter(loader)
            images, labels = next(stream)
        waits.append(time.perf_counter() - started_s)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            loss = loss_of(model(images.to(memory_format=layout)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        times.append(time.perf_counter() - started_s)
    return _figures(times, waits, options.batch_size)


def run_ours(options: argparse.Namespace) -> dict[str, float]:
    """Images per second of `vovnet train`."""
    from vovnet.training.checkpoint import Position
    from vovnet.training.classify import ClassifierTask
    from vovnet.training.config import load_config
    from vovnet.training.loop import (
        Budget,
        Schedule,
        autocast_dtype,
        count_batches,
        endless_batches,
        train_steps,
    )
    from vovnet.training.optim import Ema, build_optimizer

    augment = {
        "image_size": options.image_size,
        "interpolation": "random",
        "brightness": 0.4,
        "contrast": 0.4,
        "saturation": 0.4,
        "label_smoothing": 0.1,
    }
    flags = {"task": "classify", "model": options.model, "data": str(options.data)}
    config = load_config(None, None, flags | {"augment": augment, "batch_size": options.batch_size})
    task = ClassifierTask(config, skip_bad=False, device=CPU)
    model = task.build_model()
    step = task.loss_step(model, ()).to(memory_format=torch.channels_last)
    position = Position()
    optimizer = build_optimizer(
        step, "sgd", learning_rate=0.05, momentum=0.9, weight_decay=config.weight_decay
    )
    total = WARM_UP_STEPS + options.steps
    budget = Budget(total_steps=total)
    times, waits = [], []
    started_s = time.perf_counter()
    for record in train_steps(
        step,
        model,
        optimizer,
        Ema(model, config.ema_decay),
        batches=endless_batches(
            task.dataset,
            task.collate,
            task.order_of,
            position=position,
            batch_size=config.batch_size,
            progress_at=lambda epoch, batch: 0.0,
            workers=config.workers,
            seed=0,
        ),
        batches_per_epoch=count_batches(task.num_train, config.batch_size),
        position=position,
        schedule=Schedule(
            learning_rate=0.05, warmup_fraction=0.1, warmup_steps=None, budget=budget
        ),
        clip_norm=config.clip_norm,
        autocast_dtype=autocast_dtype(config.precision, CPU),
        device=CPU,
    ):
        waits.append(record.waited_s)
        times.append(time.perf_counter() - started_s)
        started_s = time.perf_counter()
    return _figures(times, waits, options.batch_size)


def _figures(times: list[float], waits: list[float], batch_size: int) -> dict[str, float]:
    used, waited = times[WARM_UP_STEPS:], waits[WARM_UP_STEPS:]
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "images_per_s": batch_size * len(used) / sum(used),
        "waiting_share": sum(waited) / sum(used),
        "peak_main_mb": own / 1024,
        "peak_largest_worker_mb": children / 1024,
    }


VARIANTS = {
    "timm-default": lambda options: run_timm(options, best=False),
    "timm-best": lambda options: run_timm(options, best=True),
    "ours": run_ours,
}


def main() -> None:
    """Runs the variants in turn, or one of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="train/CLASS/ with pictures")
    parser.add_argument("--model", default="ese_vovnet19b_dw")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(VARIANTS[options.one](options)))
        return
    rounds: list[dict[str, Any]] = []
    for _ in range(options.rounds):
        figures = {}
        for name in VARIANTS:
            command = [sys.executable, __file__, *sys.argv[1:], "--one", name]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            figures[name] = json.loads(done.stdout.splitlines()[-1])
            print(name, figures[name], flush=True)
        rounds.append(figures)
    for peer in ("timm-default", "timm-best"):
        ratios = [r["ours"]["images_per_s"] / r[peer]["images_per_s"] for r in rounds]
        print(
            f"ours / {peer}: {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        )
    if options.output:
        settings = {key: str(value) for key, value in vars(options).items()}
        options.output.write_text(json.dumps({"settings": settings, "rounds": rounds}, indent=1))


if __name__ == "__main__":
    main()
