"""From photographs of two megapixels to detections: how near the pipeline comes to its two parts,
and to others.

    python benchmarks/end_to_end.py --model FILE --pictures DIR [--count 24] [--rounds 5]
        [--peers-python PYTHON] [--own-alone] [--threads N] [--json FILE]

FILE is an export of the bundled CenterMask-Lite or one like it (`vovnet export nuclei --format
openvino --precision int8 --data DIR`), DIR a folder of photographs, which are enlarged to two
megapixels and stored as JPEG of quality 90. All networks see them with a short side of 480 pixels.

In one interleaved run, a folder each in random order:
    pipeline        predict_files, as `vovnet predict --no-save` runs it, several at a time;
                    then one at a time, and in batches of 4
    decode          read and resize alone, on all cores
    network         the engine alone, on prepared pictures, several at a time as in the pipeline
    eager           the same network in eager torch, picture after picture, BatchNorm unfolded
    Mask R-CNN      torchvision's R50-FPN in eager torch, random weights, with as many detections a
                    picture as ours has on average
    YOLO11n-seg     Ultralytics' own `predict` of its export to OpenVINO at 640 pixels, random
                    weights, which find nothing to draw; with --peers-python, an environment with
                    ultralytics and openvino
`bound` is 1 / (1/decode + 1/network), what a pipeline without any overlap could reach at best.
"""

import argparse
import json
import os
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from inference import rows_of, write_record
from numpy.typing import NDArray
from PIL import Image
from torchvision.models.detection import maskrcnn_resnet50_fpn

from vovnet.images import read_image
from vovnet.model_folder import load_config, resolve_model
from vovnet.models.deploy import DeployGraph
from vovnet.predict import Predictor
from vovnet.predict_files import predict_files
from vovnet.preprocess import Preprocess
from vovnet.profiling.compare import Sampling, interleave
from vovnet.runtime.engine import load_engine
from vovnet.runtime.stream import infer_stream
from vovnet.runtime.torch import TorchEngine, build_model

Run = Callable[[], object]
SHORT_SIDE, LONG_SIDE, MEGAPIXELS, QUALITY = 480, 640, 2.0, 90
YOLO = "yolo11n-seg"


def enlarge(folder: Path, target: Path, count: int) -> list[Path]:
    """The first pictures of a folder at two megapixels."""
    target.mkdir()
    written = []
    for path in sorted(folder.iterdir())[:count]:
        picture = Image.fromarray(read_image(path))
        factor = (MEGAPIXELS * 1e6 / (picture.width * picture.height)) ** 0.5
        size = (round(picture.width * factor), round(picture.height * factor))
        written.append(target / f"{path.stem}.jpg")
        picture.resize(size, Image.Resampling.BICUBIC).save(written[-1], quality=QUALITY)
    return written


def pipeline_run(predictor: Predictor, paths: list[Path], output: Path, batch_size: int) -> Run:
    def run() -> object:
        report = predict_files(predictor, paths, output, save_pictures=False, batch_size=batch_size)
        assert report.images == len(paths)
        assert not report.errors
        return report

    return run


def decode_run(preprocess: Preprocess, paths: list[Path], threads: int) -> Run:
    def prepare(path: Path) -> NDArray[np.uint8]:
        return preprocess.resize(read_image(path))

    def run() -> object:
        with ThreadPoolExecutor(threads) as pool:
            return len(list(pool.map(prepare, paths)))

    return run


def network_run(predictor: Predictor, paths: list[Path]) -> Run:
    preprocess = predictor.preprocess
    given = [preprocess.batch([preprocess.resize(read_image(path))]) for path in paths]
    return lambda: list(infer_stream(predictor.engine, given))


def eager_run(model: str, predictor: Predictor, paths: list[Path]) -> Run:
    folder = resolve_model(model)
    preprocess = predictor.preprocess
    network = build_model(folder, overrides={"min_score": float(predictor.thresholds.min())})
    graph = DeployGraph(network, mean=preprocess.mean, std=preprocess.std)
    engine = TorchEngine(graph, device=torch.device("cpu"))
    graph.to(memory_format=torch.contiguous_format)
    plain = Predictor(
        engine, preprocess, predictor.class_names, score_threshold=float(predictor.thresholds[0])
    )
    return lambda: [len(plain(path)) for path in paths]


def mask_rcnn_run(paths: list[Path], detections: int) -> Run:
    torch.manual_seed(0)
    network = maskrcnn_resnet50_fpn(
        weights=None,
        weights_backbone=None,
        num_classes=2,
        min_size=SHORT_SIDE,
        max_size=LONG_SIDE,
        box_detections_per_img=detections,
    ).eval()

    def run() -> object:
        found = 0
        with torch.inference_mode():
            for path in paths:
                pixels = torch.from_numpy(read_image(path)).permute(2, 0, 1).float() / 255
                found += len(network([pixels])[0]["scores"])
        return found

    return run


class YoloServer:
    """Ultralytics in an environment of its own, asked for one round at a time."""

    def __init__(self, python: Path, pictures: Path, work: Path, threads: int) -> None:
        program = (
            "import sys\n"
            "from ultralytics import YOLO\n"
            f"source = YOLO('{YOLO}.yaml', task='segment').export(\n"
            "    format='openvino', imgsz=640, int8=False, dynamic=False)\n"
            "model = YOLO(source, task='segment')\n"
            "for line in sys.stdin:\n"
            f"    found = model.predict({str(pictures)!r}, imgsz=640, stream=True, verbose=False)\n"
            "    sum(1 for _ in found)\n"
            "    print('DONE', flush=True)\n"
        )
        environment = dict(os.environ, OMP_NUM_THREADS=str(threads), YOLO_OFFLINE="true")
        self.process = subprocess.Popen(
            [python, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=work,
            env=environment,
        )

    def run(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("round\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.strip() == "DONE":
                return
        raise SystemExit("the environment of Ultralytics ended; its words are above")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="exported file, .xml or .onnx")
    parser.add_argument("--weights", default="nuclei", help="model folder that it is an export of")
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--peers-python", type=Path)
    parser.add_argument("--own-alone", action="store_true", help="no eager torch, no Mask R-CNN")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        paths = enlarge(given.pictures, work / "pictures", given.count)
        config = load_config(given.model)
        values = config.preprocess | {"scale": 1.0, "short_side": SHORT_SIDE}
        preprocess = Preprocess.from_dict(values | {"max_long_side": LONG_SIDE})
        assert isinstance(config.score_threshold, float)
        several, single = (
            Predictor(
                load_engine(
                    given.model,
                    threads=given.threads,
                    settings={"min_score": config.score_threshold},
                    mode=mode,
                ),
                preprocess,
                tuple(config.class_names),
                score_threshold=config.score_threshold,
            )
            for mode in ("throughput", "latency")
        )
        detections = max(1, round(sum(len(single(path)) for path in paths) / len(paths)))
        runs: dict[str, Run] = {
            "pipeline": pipeline_run(several, paths, work, 1),
            "pipeline, one at a time": pipeline_run(single, paths, work, 1),
            "pipeline, batches of 4": pipeline_run(single, paths, work, 4),
            "decode": decode_run(preprocess, paths, given.threads),
            "network": network_run(several, paths),
        }
        if not given.own_alone:
            runs["eager"] = eager_run(given.weights, single, paths)
            runs["Mask R-CNN"] = mask_rcnn_run(paths, detections)
        if given.peers_python:
            server = YoloServer(given.peers_python, work / "pictures", work, given.threads)
            runs[YOLO] = server.run
        measured = interleave(runs, Sampling(min_rounds=given.rounds, max_s=given.seconds))
    rows = rows_of(config.architecture, given.count, measured)
    per_s = {str(row["engine"]): float(str(row["images_per_s"])) for row in rows}
    bound = 1 / (1 / per_s["decode"] + 1 / per_s["network"])
    for row in rows:
        print("  ".join(f"{value}" for value in row.values()))
    summary = {
        "engine": several.engine.name,
        "precision": several.engine.precision,
        "detections_per_picture": detections,
        "bound_images_per_s": round(bound, 2),
        "share_of_bound": round(per_s["pipeline"] / bound, 3),
    }
    print(json.dumps(summary, indent=2))
    if given.json:
        write_record(given.json, [*rows, summary], threads=given.threads)


if __name__ == "__main__":
    main()
