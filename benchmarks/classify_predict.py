"""Images/s of `vovnet predict` on a folder of photographs beside a timm loader and model loop.

    python benchmarks/classify_predict.py [--model NAME ...] [--images 2000] [--rounds 5]
        [--engine torch|openvino|onnxruntime]

The photographs are the pictures of --pictures (default $VOVNET_DATA/clothing-160), enlarged and
stored as JPEG; without that folder, smooth noise. Both programs read the same files with the same
random weights, from one state dict, in fp32. timm's side is create_loader with its defaults and the
eager model; its batch size is the best of --timm-batch, tried once before the rounds. The order of
the two within a round is random. Printed: images/s of each, the ratio's median and range over the
rounds, the largest difference of the logits beside their spread, and the share of our time that the
network took.
"""

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import create_dataset, create_loader, resolve_data_config

from vovnet.classify import Classifier
from vovnet.classify_files import classify_files
from vovnet.export.check import made_up_pictures
from vovnet.export.model import export_model, load_source
from vovnet.images import find_images
from vovnet.model_folder import ModelConfig, save_model_folder
from vovnet.published import imagenet_class_names, published_preprocess
from vovnet.runtime.engine import Engine

ENGINES = ("openvino", "onnxruntime")


class TimedEngine:
    """An engine that keeps its logits and adds up the seconds its network takes."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.device = engine.device
        self.network_s = 0.0
        self.logits: list[np.ndarray] = []

    def infer(self, images, sizes):
        started = time.perf_counter()
        raw = self.engine.infer(images, sizes)
        self.network_s += time.perf_counter() - started
        self.logits.append(raw["logits"])
        return raw


def make_photographs(folder: Path, pictures: Path, *, count: int, short_side: int) -> list[Path]:
    """JPEG files of this short side, 3:2, made of pictures or, where there are none, of noise."""
    folder.mkdir(parents=True)
    size = (short_side * 3 // 2, short_side)
    sources = find_images(str(pictures)) if pictures.is_dir() else [None]
    generator = np.random.default_rng(0)
    paths = []
    for number, source in enumerate(islice(cycle(sources), count)):
        noise = generator.integers(0, 256, (12, 18, 3), dtype=np.uint8)
        image = Image.fromarray(noise) if source is None else Image.open(source).convert("RGB")
        grain = generator.normal(0, 4, (size[1], size[0], 3))
        pixels = np.asarray(image.resize(size, Image.Resampling.BICUBIC)) + grain
        paths.append(folder / f"{number:06d}.jpg")
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(paths[-1], quality=90)
    return paths


def save_random(name: str, folder: Path) -> torch.nn.Module:
    """timm's model with random weights, and the same weights as a model folder."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    torch.nn.init.normal_(model.head.fc.weight)  # else all logits are nearly zero
    config = ModelConfig(
        architecture=name,
        model_args={"num_classes": 1000},
        task="classify",
        class_names=list(imagenet_class_names()),
        category_ids=list(range(1000)),
        preprocess=published_preprocess(name).to_dict(),
        licence="none",
    )
    tensors = {key: value.numpy() for key, value in model.state_dict().items()}
    save_model_folder(folder, config, tensors, card="random weights\n")
    return model


def load_ours(folder: Path, engine: str) -> Classifier:
    """The classifier of a model folder; for an engine beside torch, exported for it first."""
    if engine != "torch":
        form, suffix = ("openvino", ".xml") if engine == "openvino" else ("onnx", ".onnx")
        target = folder / f"exported{suffix}"
        problems = export_model(
            load_source(folder), target, made_up_pictures(), format=form
        ).problems
        if problems:
            raise SystemExit(f"export: {problems}")
        return Classifier.load(target, engine=engine)
    return Classifier.load(folder, engine=engine)


def run_timm(model: torch.nn.Module, root: Path, *, batch_size: int, device: torch.device):
    """timm's loop: seconds and logits (N, C)."""
    config = resolve_data_config({}, model=model)
    started = time.perf_counter()
    loader = create_loader(
        create_dataset("", root=str(root)),
        input_size=config["input_size"],
        batch_size=batch_size,
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
        crop_pct=config["crop_pct"],
        device=device,
        use_prefetcher=device.type == "cuda",
    )
    with torch.inference_mode():
        found = [model(images.to(device)).cpu() for images, _ in loader]
    return time.perf_counter() - started, torch.cat(found).numpy()


def run_ours(classifier: Classifier, paths: list[Path], output: Path):
    """`vovnet predict` after its start: seconds, logits (N, C), seconds of the network."""
    timed = TimedEngine(classifier.engine)
    started = time.perf_counter()
    classify_files(Classifier(timed, classifier.preprocess, classifier.class_names), paths, output)
    return time.perf_counter() - started, np.concatenate(timed.logits), timed.network_s


def compare(name: str, options: argparse.Namespace, folder: Path, paths: list[Path]) -> dict:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = save_random(name, folder / name).to(device)
    classifier = load_ours(folder / name, options.engine)
    root = paths[0].parent.parent
    warm: Callable[[int], float] = lambda batch: run_timm(  # noqa: E731
        model, root, batch_size=batch, device=device
    )[0]
    timm_batch = min(options.timm_batch, key=warm)
    run_ours(classifier, paths[: 2 * 64], folder)
    ratios, speeds, shares = [], {"vovnet": [], "timm": []}, []
    order = random.Random(0)
    for _ in range(options.rounds):
        found = {}
        for side in order.sample(["vovnet", "timm"], 2):
            if side == "timm":
                found[side] = run_timm(model, root, batch_size=timm_batch, device=device)
            else:
                found[side] = run_ours(classifier, paths, folder)
            speeds[side].append(len(paths) / found[side][0])
        shares.append(found["vovnet"][2] / found["vovnet"][0])
        ratios.append(found["timm"][0] / found["vovnet"][0])
    difference = np.abs(found["vovnet"][1] - found["timm"][1]).max()
    return {
        "model": name,
        "engine": options.engine,
        "images": len(paths),
        "short_side": options.short_side,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "timm_batch": timm_batch,
        "images_per_s": {side: round(statistics.median(v), 2) for side, v in speeds.items()},
        "ratio_median": round(statistics.median(ratios), 3),
        "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
        "network_share": round(statistics.median(shares), 3),
        "logits_max_difference": float(difference),
        "logits_std": float(found["timm"][1].std()),
        "same_top1": float((found["vovnet"][1].argmax(1) == found["timm"][1].argmax(1)).mean()),
        "versions": {"torch": torch.__version__, "timm": timm.__version__},
    }


def main() -> None:
    default = Path(os.environ.get("VOVNET_DATA", "../shared/data")) / "clothing-160"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", nargs="+", default=["ese_vovnet19b_dw", "ese_vovnet39b"])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--short-side", type=int, default=375)
    parser.add_argument("--pictures", type=Path, default=default)
    parser.add_argument("--timm-batch", type=int, nargs="+", default=[8, 32, 256])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--engine", choices=("torch", *ENGINES), default="torch")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        photographs = folder / "photographs" / "one_class"
        paths = make_photographs(
            photographs, options.pictures, count=options.images, short_side=options.short_side
        )
        for model in options.model:
            print(json.dumps(compare(model, options, folder, paths), indent=2), flush=True)


if __name__ == "__main__":
    main()
