"""Images per second of exported classifiers and detectors, engine by engine, beside timm's eager
network: `python benchmarks/inference.py [--models NAME ...] [--seconds S] [--json FILE]`.

Random weights of each architecture are exported once; then all engines run in one interleaved run,
one batch each in random order, so that what the machine does besides meets all alike. `speed` is
the paired ratio to timm (for a detector, to the torch engine) with its 95 % interval. Precision is
fp32 throughout.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import timm
import torch

from vovnet import Classifier, Predictor
from vovnet.export.check import made_up_pictures
from vovnet.export.model import export_model, load_source
from vovnet.export.onnx import write_openvino
from vovnet.exported import ONNX_FILE, OPENVINO_FILE
from vovnet.model_folder import ModelConfig, bundled_models, save_model_folder
from vovnet.models.zoo import create_model
from vovnet.preprocess import Preprocess
from vovnet.profiling.compare import Comparison, Sampling, interleave
from vovnet.profiling.machine import describe_machine

Run = Callable[[], object]
CLASSIFIERS = ("ese_vovnet39b", "ese_vovnet19b_dw")
BATCHES = (1, 16)
WARM_UP = 2


def save_classifier(name: str, folder: Path) -> Path:
    torch.manual_seed(0)
    model = create_model(name, num_classes=1000)
    config = ModelConfig(
        architecture=name,
        model_args={"num_classes": 1000},
        task="classify",
        class_names=[str(index) for index in range(1000)],
        category_ids=list(range(1000)),
        preprocess=Preprocess(short_side=256, max_long_side=None, crop_size=224).to_dict(),
        licence="Apache-2.0",
    )
    tensors = {key: value.numpy() for key, value in model.state_dict().items()}
    save_model_folder(folder, config, tensors, card="# random weights\n")
    return folder


def add_exports(folder: Path, target: Path) -> dict[str, Path]:
    target.mkdir(parents=True, exist_ok=True)
    done = export_model(load_source(folder), target / ONNX_FILE, made_up_pictures())
    if done.problems:
        raise SystemExit("\n".join(done.problems))
    (target / OPENVINO_FILE).parent.mkdir(exist_ok=True)
    write_openvino(target / ONNX_FILE, target / OPENVINO_FILE)
    return {"onnxruntime": target / ONNX_FILE, "openvino": target / OPENVINO_FILE}


def classifier_runs(name: str, batch: int, work: Path, threads: int) -> dict[str, Run]:
    folder = work / name
    files = (
        {"onnxruntime": folder / ONNX_FILE, "openvino": folder / OPENVINO_FILE}
        if folder.exists()
        else add_exports(save_classifier(name, folder), folder)
    )
    images = np.random.default_rng(0).integers(0, 256, (batch, 224, 224, 3), dtype=np.uint8)
    sizes = np.full((batch, 2), 224)
    eager = timm.create_model(name).eval()
    mean, std = (torch.tensor(v) for v in ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)))

    def run_timm() -> object:
        with torch.inference_mode():
            pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().float()
            return eager((pixels - mean[:, None, None]) / std[:, None, None])

    runs: dict[str, Run] = {"timm eager": run_timm}
    for engine in ("torch", "torch-packed", "onnxruntime", "openvino"):
        source = files.get(engine, folder)
        loaded = Classifier.load(source, engine=engine, device="cpu", threads=threads).engine
        runs[engine] = lambda loaded=loaded: loaded.infer(images, sizes)
    return runs


def detector_runs(name: str, batch: int, work: Path, threads: int) -> dict[str, Run]:
    folder = bundled_models()[name]
    target = work / name
    files = (
        {"onnxruntime": target / ONNX_FILE, "openvino": target / OPENVINO_FILE}
        if target.exists()
        else add_exports(folder, target)
    )
    runs: dict[str, Run] = {}
    for engine in ("torch", "onnxruntime", "openvino"):
        source = files.get(engine, folder)
        predictor = Predictor.load(source, engine=engine, device="cpu", threads=threads)
        pictures = [predictor.preprocess.resize(made_up_pictures()[0])] * batch
        given = predictor.preprocess.batch(pictures)
        runs[engine] = lambda predictor=predictor, given=given: predictor.engine.infer(*given)
    return runs


def rows_of(model: str, batch: int, measured: Comparison) -> list[dict[str, object]]:
    first = next(iter(measured.times_s))
    ratios = {ratio.name: ratio for ratio in measured.ratios}
    rows: list[dict[str, object]] = []
    for engine in measured.times_s:
        times = measured.timings(engine)
        row: dict[str, object] = {"model": model, "batch": batch, "engine": engine}
        row |= {"images_per_s": round(1000 * batch / times.median_ms, 2), "rounds": times.count}
        row |= {"ms": round(times.median_ms, 2)}
        row |= {"ms_p10": round(times.p10_ms, 2), "ms_p90": round(times.p90_ms, 2)}
        if engine != first:  # ratios are of times, the first the base
            ratio = ratios[engine]
            row |= {"speed": round(1 / ratio.ratio, 2)}
            row |= {"speed_low": round(1 / ratio.high, 2), "speed_high": round(1 / ratio.low, 2)}
        rows.append(row)
    return rows


def write_record(path: Path, rows: list[dict[str, object]], *, threads: int) -> None:
    machine = describe_machine(torch.device("cpu"))
    record = {"machine": machine, "threads": threads, "rows": rows}
    path.write_text(json.dumps(record, indent=2, default=str) + "\n")


def main() -> None:
    bundled = sorted(bundled_models())
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=[*CLASSIFIERS, *bundled])
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--rounds", type=int, default=10, help="of each model and batch, at least")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each model and batch")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for model in given.models:
            make = detector_runs if model in bundled else classifier_runs
            for batch in given.batches:
                runs = make(model, batch, Path(name), given.threads)
                sampling = Sampling(min_rounds=given.rounds, max_s=given.seconds)
                rows += rows_of(model, batch, interleave(runs, sampling))
                for row in rows[-len(runs) :]:
                    print("  ".join(f"{value}" for value in row.values()), flush=True)
    if given.json:
        write_record(given.json, rows, threads=given.threads)


if __name__ == "__main__":
    main()
