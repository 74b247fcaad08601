"""Milliseconds of classifiers in int8 beside others' int8 and float:
`python benchmarks/int8.py [--models NAME ...] [--seconds S] [--json FILE]`.

Random weights of each architecture, for speed alone, are exported and
quantised once on the same pictures: `int8` as the library places the quantisers, `stock` as NNCF
does with its own settings, `onnxruntime int8` by ONNX Runtime's static quantisation (QDQ, per
channel). All run interleaved, one batch each in random order. `speed` is the paired ratio
to `stock`, with its 95 % interval.
"""

import argparse
import importlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from inference import rows_of, save_classifier, write_record

from vovnet.export import int8
from vovnet.export.check import made_up_pictures
from vovnet.export.model import export_model, load_source
from vovnet.profiling.compare import Sampling, interleave
from vovnet.runtime.onnxruntime import import_onnxruntime
from vovnet.runtime.openvino import import_openvino, openvino_core

Run = Callable[[], object]
MODELS = ("ese_vovnet39b", "ese_vovnet19b_dw")
BATCHES = (1, 16)
CALIBRATION = 4
SIDE = 224


def feeds(count: int, batch: int = 1) -> list[dict[str, Any]]:
    random = np.random.default_rng(0)
    shape = (batch, SIDE, SIDE, 3)
    return [{"images": random.integers(0, 256, shape, dtype=np.uint8)} for _ in range(count)]


def write_files(name: str, work: Path) -> dict[str, Path]:
    """Of each competitor its file."""
    folder = save_classifier(name, work / name)
    files = {key: folder / f"{key.replace(' ', '_')}.xml" for key in ("stock", "int8", "fp32")}
    files["onnxruntime int8"] = folder / "onnxruntime_int8.onnx"
    source, onnx_file = load_source(folder), folder / "model.onnx"
    for file, form in ((onnx_file, "onnx"), (files["fp32"], "openvino")):
        done = export_model(source, file, made_up_pictures(), format=form)
        if done.problems:
            raise SystemExit("\n".join(done.problems))
    nncf, openvino = int8.import_nncf(), import_openvino()
    pictures = feeds(CALIBRATION)
    stock = nncf.quantize(
        int8.read_network(files["fp32"]), nncf.Dataset(pictures), subset_size=CALIBRATION
    )
    openvino.save_model(stock, str(files["stock"]), compress_to_fp16=False)
    ours = int8.quantize(int8.read_network(files["fp32"]), pictures, keep_float=())
    openvino.save_model(ours, str(files["int8"]), compress_to_fp16=False)
    quantize_by_onnxruntime(onnx_file, files["onnxruntime int8"], pictures)
    return files


def quantize_by_onnxruntime(source: Path, target: Path, pictures: list[dict[str, Any]]) -> None:
    import_onnxruntime()
    quantization: Any = importlib.import_module("onnxruntime.quantization")

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(pictures)

        def get_next(self) -> dict[str, Any] | None:
            return next(self.left, None)

    quantization.quantize_static(
        str(source), str(target), Reader(), per_channel=True, reduce_range=True
    )


def runs_of(files: dict[str, Path], batch: int, threads: int) -> dict[str, Run]:
    onnxruntime, core = import_onnxruntime(), openvino_core()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    (given,) = feeds(1, batch)
    runs: dict[str, Run] = {}
    for name, file in files.items():
        if file.suffix == ".onnx":
            session = onnxruntime.InferenceSession(
                str(file), options, providers=["CPUExecutionProvider"]
            )
            runs[name] = lambda session=session: session.run(None, given)
            continue
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": str(threads),
        }
        compiled = core.compile_model(str(file), "CPU", settings)
        in_int8, in_float = int8.layers_run(compiled)
        print(f"{name}: {len(in_int8)} convolutions in int8, {len(in_float)} in float", flush=True)
        request = compiled.create_infer_request()
        runs[name] = lambda request=request: request.infer(given, share_inputs=True)
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--rounds", type=int, default=10, help="of each model and batch, at least")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each model and batch")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for model in given.models:
            files = write_files(model, Path(name))
            for batch in given.batches:
                runs = runs_of(files, batch, given.threads)
                sampling = Sampling(min_rounds=given.rounds, max_s=given.seconds)
                rows += rows_of(model, batch, interleave(runs, sampling))
                for row in rows[-len(runs) :]:
                    print("  ".join(f"{value}" for value in row.values()), flush=True)
    if given.json:
        write_record(given.json, rows, threads=given.threads)


if __name__ == "__main__":
    main()
