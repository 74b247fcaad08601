"""Speed for `boxes_vs_peers.py`: every trained detector in every engine it was exported for."""

import argparse
import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from box_peers import (
    MAX_DETECTIONS,
    TORCHVISION_PEERS,
    Found,
    as_input,
    ask_peer,
    category_ids,
    load_peer,
    load_yolo,
    resized_size,
    write_yolo_data,
)
from peers import THREADS, Predict, load_split, quiet_ultralytics
from PIL import Image

from vovnet.exported import check_export, read_export_info
from vovnet.model_folder import load_config
from vovnet.predict import Predictor
from vovnet.profiling.compare import Sampling, interleave
from vovnet.profiling.energy import measure_energy

YOLO_EXPORTS = {"fp32": "yolo_openvino_model/yolo.xml", "int8": "yolo_int8_openvino_model/yolo.xml"}
"""Where Ultralytics writes them in the work folder."""
NMS_OVERLAP = 0.7  # Ultralytics' own


@dataclass(frozen=True, slots=True)
class Contestant:
    """A detector in one engine."""

    detect: Callable[[Path], int]
    """From a file to the number of detections in it: reading, resizing and suppression included."""
    network: Callable[[], object]
    """The network alone, on a picture prepared before."""


def export_yolo(work_dir: Path, data_dir: Path, *, side: int) -> None:
    """Let Ultralytics export YOLO11n to OpenVINO, in fp32 and, calibrated on the train split, in
    int8, for the padded size that a picture of the set has.
    """
    quiet_ultralytics(work_dir)
    info = next(iter(load_split(data_dir, "test").imgs.values()))
    size = [32 * math.ceil(length / 32) for length in resized_size(info, side)]
    data = write_yolo_data(data_dir, work_dir / "yolo-data")
    load = importlib.import_module("ultralytics").YOLO
    for bits in (32, 8):
        load(str(work_dir / "yolo.pt")).export(
            format="openvino", imgsz=size, quantize=bits, data=str(data), verbose=False
        )
    torch.set_num_threads(THREADS)


@dataclass(frozen=True, slots=True)
class OpenvinoYolo:
    """An export of YOLO11n, run by OpenVINO with as many threads as all, Ultralytics around it."""

    request: Any
    letterbox: Any
    size: tuple[int, int]

    def prepare(self, image: np.ndarray) -> np.ndarray:
        """Return a uint8 BGR image (H, W, 3) as the export takes it: float32 RGB (1, 3, h, w)."""
        padded = self.letterbox(image=image)
        return np.ascontiguousarray(padded[..., ::-1].transpose(2, 0, 1)[None], np.float32) / 255

    def run(self, given: np.ndarray) -> np.ndarray:
        """Return the candidates, (1, 4 + classes, anchors)."""
        return self.request.infer([given], share_inputs=True)[0]

    def detect(self, image: np.ndarray, confidence: float) -> np.ndarray:
        """Return what a uint8 BGR image holds (N, 6): xyxy in its pixels, score, class index."""
        nms = importlib.import_module("ultralytics.utils.nms")
        ops = importlib.import_module("ultralytics.utils.ops")
        candidates = torch.from_numpy(self.run(self.prepare(image)).copy())
        found = nms.non_max_suppression(
            candidates, confidence, NMS_OVERLAP, max_det=MAX_DETECTIONS
        )[0]
        found[:, :4] = ops.scale_boxes(self.size, found[:, :4], image.shape)
        return found.numpy()


def load_openvino_yolo(path: Path) -> OpenvinoYolo:
    """Load an export in fp32 arithmetic, or int8 of one that is quantised, for one picture."""
    openvino = importlib.import_module("openvino")
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": str(THREADS),
    }
    compiled = openvino.Core().compile_model(str(path), "CPU", settings)
    _, _, height, width = compiled.input(0).shape
    augment = importlib.import_module("ultralytics.data.augment")
    letterbox = augment.LetterBox(new_shape=(height, width), auto=False)
    return OpenvinoYolo(compiled.create_infer_request(), letterbox, (height, width))


def ask_openvino_yolo(path: Path, ids: list[int], confidence: float) -> Predict:
    """Return a function from a uint8 RGB image to what the export finds in it."""
    yolo = load_openvino_yolo(path)

    def predict(image: np.ndarray) -> Found:
        found = yolo.detect(np.ascontiguousarray(image[:, :, ::-1]), confidence)
        return found[:, 4], found[:, :4], np.array(ids)[found[:, 5].astype(int)]

    return predict


def read_picture(path: Path) -> np.ndarray:
    """Read a file as uint8 (H, W, 3) RGB."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def ours_files(folder: Path) -> dict[str, tuple[Path, str]]:
    """Return what can run of a model folder: of each name the path to load, and the engine."""
    found = {"torch fp32": (folder, "torch")}
    onnx = folder / "model.onnx"
    if onnx.is_file():
        found |= {f"{engine} fp32": (onnx, engine) for engine in ("onnxruntime", "openvino")}
    for path in sorted(folder.rglob("*.xml")):
        found[f"openvino {read_export_info(path).precision}"] = (path, "openvino")
    for path, _ in found.values():
        if path != folder:
            check_export(path, folder)
    return found


def ours_contestants(folder: Path, picture: Path, confidence: float) -> dict[str, Contestant]:
    """Return a model folder in torch and in the engines of the exports that lie in it."""
    name = load_config(folder).architecture
    contestants = {}
    for kind, (path, engine) in ours_files(folder).items():
        predictor = Predictor.load(
            path,
            engine=engine,
            device="cpu",
            threads=THREADS,
            score_threshold=confidence,
            max_detections=MAX_DETECTIONS,
        )
        given = predictor.preprocess.batch([predictor.preprocess.resize(read_picture(picture))])
        contestants[f"{name} {kind}"] = Contestant(
            lambda path, predictor=predictor: len(predictor(path)),
            lambda predictor=predictor, given=given: predictor.engine.infer(*given),
        )
    return contestants


def torchvision_contestant(
    model: torch.nn.Module, picture: Path, ids: list[int], confidence: float
) -> Contestant:
    """Return a detector of torchvision in eager mode."""
    predict = ask_peer(model, ids, confidence)
    tensors = model.transform([as_input(read_picture(picture))])[0].tensors

    @torch.inference_mode()
    def network() -> object:
        return model.head(list(model.backbone(tensors).values()))

    return Contestant(lambda path: len(predict(read_picture(path))[0]), network)


def yolo_contestant(work_dir: Path, picture: Path, confidence: float, *, side: int) -> Contestant:
    """Return YOLO11n as Ultralytics runs it, its BatchNorm folded."""
    model, settings = load_yolo(work_dir, confidence, side=side)
    model.predict(str(picture), **settings)
    torch.set_num_threads(THREADS)
    image = model.predictor.preprocess([read_picture(picture)[:, :, ::-1]])

    @torch.inference_mode()
    def network() -> object:
        return model.predictor.model(image)

    return Contestant(lambda path: len(model.predict(str(path), **settings)[0]), network)


def openvino_contestant(path: Path, picture: Path, confidence: float) -> Contestant:
    """Return an export of YOLO11n, pictures read by OpenCV as Ultralytics does."""
    cv2, yolo = importlib.import_module("cv2"), load_openvino_yolo(path)
    given = yolo.prepare(cv2.imread(str(picture)))
    return Contestant(
        lambda path: len(yolo.detect(cv2.imread(str(path)), confidence)),
        lambda: yolo.run(given),
    )


def peer_contestants(arguments: argparse.Namespace, picture: Path) -> dict[str, Contestant]:
    """Return the peers whose weights lie in the work folder."""
    work_dir, side, confidence = arguments.work_dir, arguments.side, arguments.confidence
    ids = category_ids(arguments.data)
    contestants = {}
    if (work_dir / "yolo.pt").exists():
        quiet_ultralytics(work_dir)
        for precision, name in YOLO_EXPORTS.items():
            if (work_dir / name).exists():
                contestant = openvino_contestant(work_dir / name, picture, confidence)
                contestants[f"yolo openvino {precision}"] = contestant
        contestants["yolo torch fp32"] = yolo_contestant(work_dir, picture, confidence, side=side)
    for name in TORCHVISION_PEERS:
        if (work_dir / f"{name}.pt").exists():
            model = load_peer(name, work_dir, num_classes=len(ids), side=side)
            contestant = torchvision_contestant(model, picture, ids, confidence)
            contestants[f"{name} torch fp32"] = contestant
    return contestants


def time_all(runs: Mapping[str, Callable[[], object]], images: int, sampling: Sampling) -> Any:
    """Return of each run its images per second over rounds in which all took their turns."""
    times_s = interleave(runs, sampling).times_s
    return {name: [images / value for value in values] for name, values in times_s.items()}


def measure_speed(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time every contestant, from files and the network alone, by turns; and its energy.

    The pictures are the first ones of the test split, one at a time.
    """
    infos = list(load_split(arguments.data, "test").imgs.values())[: arguments.images]
    paths = [arguments.data / "images" / info["file_name"] for info in infos]
    contestants = peer_contestants(arguments, paths[0])
    for folder in arguments.models:
        contestants |= ours_contestants(folder, paths[0], arguments.confidence)

    def detect_all(contestant: Contestant) -> int:
        for path in paths:
            contestant.detect(path)
        return len(paths)

    from_files = {name: partial(detect_all, one) for name, one in contestants.items()}
    networks = {name: one.network for name, one in contestants.items()}
    sampling = Sampling(min_rounds=arguments.rounds, max_s=arguments.seconds, warm_up_s=2.0)
    return {
        "images": len(paths),
        "side": arguments.side,
        "input": resized_size(infos[0], arguments.side),
        "confidence": arguments.confidence,
        "detections": {name: sum(map(one.detect, paths)) for name, one in contestants.items()},
        "end_to_end_images_per_s": time_all(from_files, len(paths), sampling),
        "network_images_per_s": time_all(networks, 1, sampling),
        "energy": {name: measure_energy(run).format() for name, run in from_files.items()},
    }
