"""What each choice in VovDet is worth: every variant trained from scratch for the same processor
time, then scored beside VovDet as it is.

A variant changes one thing and keeps all else; `vovdet_variants.py` lists them. Trainings run on
one thread and their budget is counted in processor time of the process, so that a cheaper variant
takes more steps. A variant's run folder is for `evaluate` here: its model folder names the model
that it varies. Usage, in this order:

    python benchmarks/vovdet_ablation.py --work-dir DIR train --variant fpn --minutes 20 --seed 0
    python benchmarks/vovdet_ablation.py --work-dir DIR evaluate --variant fpn --seed 0
    python benchmarks/vovdet_ablation.py --work-dir DIR cost
    python benchmarks/vovdet_ablation.py --work-dir DIR report

`cost` times all variants by turns, one picture of 320 x 320 pixels from normalised input to
detections, fp32, eager torch, one thread, BatchNorm folded.
"""

import argparse
import json
import os
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from box_peers import CONFIDENCE, MAX_DETECTIONS, Found, category_ids
from boxes_vs_peers import to_results
from peers import evaluate, interval, start
from torch import Tensor, nn
from vovdet_variants import BASE, VOVDET_VARIANTS, Variant, build, replacing

from vovnet.files import atomic_write_json
from vovnet.model_folder import TRAINED_FOLDER, load_config, load_tensors
from vovnet.models.deploy import DeployGraph, fold_batch_norms
from vovnet.models.vovdet import VovDet
from vovnet.models.weights import load_tensors as load_into
from vovnet.predict import Predictor
from vovnet.preprocess import Preprocess
from vovnet.profiling.compare import Sampling
from vovnet.profiling.profile import Settings, module_target, profile_targets
from vovnet.profiling.records import ModelProfile
from vovnet.runtime.torch import TorchEngine
from vovnet.training import loop, run
from vovnet.training.config import TrainConfig
from vovnet.training.detect import DetectorTask

SPLITS = ("val", "test")
THREADS = 1
COST_SIDE = 320  # pixels
COST_ROUNDS = 20
ELEMENT_BYTES = 4
COLUMNS = (
    *("variant", "what changes", "seeds", "AP val", "AP test"),
    *(f"AP val less {BASE}", f"AP test less {BASE}", "steps", "core-minutes"),
    *("ms", f"times {BASE}", "M macs", "MB memory access", "M parameters", "J"),
)


class VariantTask(DetectorTask):
    """The product's training of a detector, of a variant's network."""

    def __init__(
        self, variant: Variant, config: TrainConfig, *, skip_bad: bool, device: torch.device
    ) -> None:
        super().__init__(config, skip_bad=skip_bad, device=device)
        self.variant = variant

    def build_model(self) -> nn.Module:
        """The variant for the data's classes."""
        return build(self.variant, self.config.model, num_classes=len(self.class_names))


def make_config(arguments: argparse.Namespace) -> TrainConfig:
    """The settings of every training: random weights, crops of 192 pixels that grow from half."""
    return TrainConfig(
        model=arguments.model,
        data=str(arguments.data),
        preprocess={"short_side": 240, "max_long_side": 320},
        augment={
            "output_size": (192, 192),
            "scale_range": (0.7, 1.4),
            "first_scale": 0.5,
            "horizontal_flip": 0.5,
            "vertical_flip": 0.5,
            "quarter_turn": 0.5,
            "brightness": 0.2,
            "contrast": 0.2,
            "saturation": 0.3,
            "hue": 0.015,
        },
        batch_size=arguments.batch_size,
        max_minutes=arguments.minutes,
        optimizer="adamw",
        learning_rate=1e-3,
        weight_decay=0.05,
        warmup_fraction=0.05,
        clip_norm=10.0,
        ema_decay=0.99,
        device="cpu",
        threads=THREADS,
        workers=0,
        seed=arguments.seed,
        eval_every_minutes=1000.0,  # at the end alone
        max_detections=MAX_DETECTIONS,
        name=run_name(arguments.variant, arguments.seed),
        runs_dir=str(arguments.work_dir),
    )


def run_name(variant: str, seed: int) -> str:
    """What the files of one training begin with."""
    return f"{variant}_{seed}"


def run_train(arguments: argparse.Namespace) -> None:
    """Train a variant for --minutes of processor time; write its run folder and a record."""
    variant, config = VOVDET_VARIANTS[arguments.variant], make_config(arguments)
    defaults = loop.train_steps.__kwdefaults__
    assert defaults is not None
    defaults["clock"] = time.process_time
    run.TASKS["detect"] = partial(VariantTask, variant)
    with replacing(variant.replaced):
        done = run.train(config)
    if done.model_dir is None:
        raise SystemExit("interrupted: expected a whole training, which alone compares")
    training = load_config(done.model_dir).training
    record = {
        "variant": arguments.variant,
        "change": variant.change,
        "run": done.run_dir.name,
        "steps": training["steps"],
        "crops": training["steps"] * config.batch_size,
        "core_minutes": training["minutes"],
        "settings": training["config"],
    }
    atomic_write_json(arguments.work_dir / f"{config.name}_training.json", record)
    print(f"{config.name}: {record['steps']} steps in {record['core_minutes']} core-minutes")


def load_variant(variant: Variant, folder: Path) -> Predictor:
    """The predictor of a trained variant, to be asked within `replacing`."""
    config = load_config(folder)
    model = build(variant, config.architecture, num_classes=len(config.class_names))
    tensors = {name: torch.from_numpy(value) for name, value in load_tensors(folder).items()}
    load_into(model, tensors, where=str(folder))
    fold_batch_norms(model.eval())
    preprocess = Preprocess.from_dict(config.preprocess)
    graph = DeployGraph(model, mean=preprocess.mean, std=preprocess.std)
    return Predictor(
        TorchEngine(graph, device=torch.device("cpu")),
        preprocess,
        tuple(config.class_names),
        category_ids=tuple(config.category_ids),
        score_threshold=CONFIDENCE,
    )


def run_evaluate(arguments: argparse.Namespace) -> None:
    """Score a trained variant on both splits, with samples over pictures for paired differences."""
    variant, name = VOVDET_VARIANTS[arguments.variant], run_name(arguments.variant, arguments.seed)
    training = json.loads((arguments.work_dir / f"{name}_training.json").read_text())
    predictor = load_variant(variant, arguments.work_dir / training["run"] / TRAINED_FOLDER)
    ids = np.array(predictor.category_ids)

    def predict(image: np.ndarray) -> Found:
        found = predictor(image)
        return found.scores, found.boxes_xyxy, ids[found.labels]

    for split in SPLITS:
        with replacing(variant.replaced):
            evaluate(
                arguments,
                f"{name}_{split}",
                predict=predict,
                to_results=to_results,
                iou_type="bbox",
                max_detections=MAX_DETECTIONS,
                outcome=training,
                split=split,
            )


class Detection(nn.Module):
    """A variant from normalised pictures (B, 3, H, W) to its detections."""

    def __init__(self, variant: Variant, model: VovDet) -> None:
        super().__init__()
        self.replaced = variant.replaced
        self.model = model

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Detections of pictures that fill their input."""
        sizes = images.new_tensor(images.shape[-2:]).expand(len(images), 2)
        with replacing(self.replaced):
            return self.model.detect(self.model(images), sizes)


def run_cost(arguments: argparse.Namespace) -> None:
    """Count and time every variant with random weights, by turns; write `cost.json`."""
    num_classes = len(category_ids(arguments.data))
    image = torch.randn(1, 3, COST_SIDE, COST_SIDE, generator=torch.Generator().manual_seed(0))
    targets = []
    for name, variant in VOVDET_VARIANTS.items():
        model = build(variant, arguments.model, num_classes=num_classes).eval()
        fold_batch_norms(model)
        targets.append(module_target(name, Detection(variant, model), (image,)))
    settings = Settings(
        device="cpu",
        threads=(THREADS,),
        sampling=Sampling(min_rounds=arguments.rounds, max_s=0.0, warm_up_s=2.0),
        end_to_end=False,
        roofline=False,
    )
    profile = profile_targets(targets, settings, progress=print)
    record = {"model": arguments.model, "side": COST_SIDE, "machine": profile.machine}
    record["variants"] = {model.name: cost_of(model) for model in profile.models}
    for ratio in profile.ratios:  # the base, which is the first, has none
        times = [ratio.ratio, ratio.low, ratio.high]
        record["variants"][ratio.name][f"times_{BASE}"] = times
    atomic_write_json(arguments.work_dir / "cost.json", record)
    print(json.dumps(record["variants"], indent=1))


def cost_of(model: ModelProfile) -> dict[str, Any]:
    """What one picture costs, joules None where there is no meter."""
    result = model.results[0]
    counts, times, energy = result.counts, result.timings, result.energy
    if counts is None or times is None:
        raise SystemExit(f"{model.name}: expected counts and times, got {result.error}")
    metered = energy is not None and not energy.unavailable
    return {
        "ms": times.median_ms,
        "ms_interval": [times.median_low_ms, times.median_high_ms],
        "macs": counts.macs,
        "memory_access_bytes": counts.memory_access * ELEMENT_BYTES,
        "parameters": counts.parameters,
        "energy_j": energy.energy_per_image_j if metered else None,
    }


def run_report(arguments: argparse.Namespace) -> None:
    """Print one Markdown row for each variant that has been evaluated."""
    work_dir, cost_file = arguments.work_dir, arguments.work_dir / "cost.json"
    costs = json.loads(cost_file.read_text())["variants"] if cost_file.exists() else {}
    print(
        "AP of boxes with 95 % intervals over pictures, paired where a difference; of several "
        f"seeds the mean. Costs of one picture of {COST_SIDE} x {COST_SIDE} pixels, fp32, one "
        "thread.\n"
    )
    print("| " + " | ".join(COLUMNS) + " |")
    print("|" + "---|" * len(COLUMNS))
    for name, variant in VOVDET_VARIANTS.items():
        seeds = evaluated_seeds(work_dir, name)
        if seeds:
            cells = [name, variant.change, " ".join(map(str, seeds))]
            cells += accuracy_cells(work_dir, name, seeds)
            cells += training_cells(work_dir, name, seeds) + cost_cells(costs.get(name))
            print("| " + " | ".join(cells) + " |")


def evaluated_seeds(work_dir: Path, name: str) -> list[int]:
    """The seeds with which a variant has been trained and evaluated."""
    files = work_dir.glob(f"{run_name(name, 0)[:-1]}*_{SPLITS[-1]}_samples.npy")
    return sorted(int(file.name.split("_")[1]) for file in files)


def load_samples(work_dir: Path, name: str, split: str, seeds: Sequence[int]) -> np.ndarray:
    """AP and then that of pictures drawn with replacement, for each seed: (S, 1 + n)."""
    files = [work_dir / f"{run_name(name, seed)}_{split}_samples.npy" for seed in seeds]
    return np.stack([np.load(file)[:, 0] for file in files])


def accuracy_cells(work_dir: Path, name: str, seeds: Sequence[int]) -> list[str]:
    """AP on each split, then on each what it has more than the base with the same seeds."""
    cells = []
    for split in SPLITS:
        samples = load_samples(work_dir, name, split, seeds).mean(0)
        low, high = interval(samples[1:])
        cells.append(f"{samples[0]:.3f} ({low:.3f} to {high:.3f})")
    shared = sorted(set(seeds) & set(evaluated_seeds(work_dir, BASE)))
    if name == BASE or not shared:
        return [*cells, "-", "-"]
    for split in SPLITS:
        own, base = (load_samples(work_dir, one, split, shared) for one in (name, BASE))
        cells.append(difference_cell(own - base))
    return cells


def difference_cell(samples: np.ndarray) -> str:
    """The mean difference of samples (S, 1 + n) with its interval, and each seed's of several."""
    mean = samples.mean(0)
    low, high = interval(mean[1:])
    by_seed = ", ".join(f"{value:+.3f}" for value in samples[:, 0]) if len(samples) > 1 else ""
    return f"{mean[0]:+.3f} ({low:+.3f} to {high:+.3f}{'; by seed ' if by_seed else ''}{by_seed})"


def training_cells(work_dir: Path, name: str, seeds: Sequence[int]) -> list[str]:
    """The mean number of steps and of core-minutes."""
    files = [work_dir / f"{run_name(name, seed)}_training.json" for seed in seeds]
    records = [json.loads(file.read_text()) for file in files]
    steps, minutes = (np.mean([r[key] for r in records]) for key in ("steps", "core_minutes"))
    return [f"{steps:.0f}", f"{minutes:.1f}"]


def cost_cells(cost: Mapping[str, Any] | None) -> list[str]:
    """Milliseconds, their paired ratio to the base, macs, memory access, parameters and joules; a
    dash for what is not known.
    """
    if cost is None:
        return ["-"] * 6
    low, high = cost["ms_interval"]
    ratio = cost.get(f"times_{BASE}")
    millions = (cost[key] / 1e6 for key in ("macs", "memory_access_bytes", "parameters"))
    energy_j = cost["energy_j"]
    return [
        f"{cost['ms']:.1f} ({low:.1f} to {high:.1f})",
        "{:.2f} ({:.2f} to {:.2f})".format(*ratio) if ratio else "-",
        *(f"{value:.2f}" for value in millions),
        "-" if energy_j is None else f"{energy_j:.3g}",
    ]


RUNS = {"train": run_train, "evaluate": run_evaluate, "cost": run_cost, "report": run_report}


def parse_arguments() -> argparse.Namespace:
    """Parse the command line; the data default to the environment, then to a folder beside us."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    data = Path(os.environ.get("VOVNET_DATA", "../shared/data")) / "bccd"
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--data", type=Path, default=data)
    parser.add_argument("--work-dir", type=Path, required=True)
    verbs = parser.add_subparsers(dest="verb", required=True)
    parsers = {
        name: verbs.add_parser(name, help=verb.__doc__, parents=[shared])
        for name, verb in RUNS.items()
    }
    for name in ("train", "evaluate"):
        parsers[name].add_argument("--variant", choices=VOVDET_VARIANTS, required=True)
        parsers[name].add_argument("--seed", type=int, default=0)
    for name in ("train", "cost"):
        parsers[name].add_argument("--model", default="vovdet_n")
    parsers["train"].add_argument("--minutes", type=float, default=20.0, help="of processor time")
    parsers["train"].add_argument("--batch-size", type=int, default=8)
    parsers["cost"].add_argument("--rounds", type=int, default=COST_ROUNDS)
    return parser.parse_args()


def main() -> None:
    """Run one verb on one thread."""
    arguments = parse_arguments()
    start(arguments)
    torch.set_num_threads(THREADS)
    RUNS[arguments.verb](arguments)


if __name__ == "__main__":
    main()
