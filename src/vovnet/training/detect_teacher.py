"""A detector that teaches another: objects that it finds and that the labels miss are learnt, too.

Self-training as Sohn et al. (2020, "A Simple Semi-Supervised Learning Framework for Object
Detection") do it: the teacher looks once at plain pictures, and what it is sure of becomes a label.
What it is less sure of is neither rewarded nor punished, like a difficult object of Pascal VOC.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.ops import batched_nms

from vovnet.data.labels import Annotation, DetectionData, ImageRecord, Rle
from vovnet.errors import ConfigError
from vovnet.graph_file import is_graph_file, read_metadata
from vovnet.images import read_image
from vovnet.model_folder import CONFIG_KEY
from vovnet.predict import Predictor
from vovnet.results import Detections, encode_masks
from vovnet.runtime.onnxruntime import import_onnxruntime, open_session

YOLOX_STRIDES = (8, 16, 32)
UNSURE = 0.5
"""Share of the score of an object, from which on a place counts for nothing."""
KNOWN_IOU = 0.3
"""Of a detection and a label, of any class: from it on, it is the labelled object."""
COVERED = 0.5
"""Share of a detection in a crowd or a difficult object, from which on it belongs to that."""

_NMS_IOU = 0.45
_GREY = 114  # around a picture that is not square
_SHOWN_NAMES = 5

COCO_NAMES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat",
    "traffic light", "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat",
    "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "backpack",
    "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball",
    "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket",
    "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple",
    "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair",
    "couch", "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote",
    "keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book",
    "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
"""The classes of COCO 2017 in the order of networks trained on it."""


@dataclass(frozen=True, slots=True)
class DetectorTeacher:
    """A detector: `detect` takes a picture, uint8 (H, W, 3) RGB."""

    detect: Callable[[NDArray[np.uint8]], Detections]
    class_names: tuple[str, ...]
    has_masks: bool


@dataclass(frozen=True, slots=True)
class Lessons:
    """Data with what a teacher has added, and how much that is."""

    data: DetectionData
    objects: int
    unsure: int
    unknown: Counter[str]  # detections of classes that the data do not have

    def describe(self) -> str:
        """One line of text."""
        text = f"{self.objects} objects learnt, {self.unsure} unsure ones ignored"
        if not self.unknown:
            return text
        shown = ", ".join(f"{name} {n}" for name, n in self.unknown.most_common(_SHOWN_NAMES))
        more = ", ..." if len(self.unknown) > _SHOWN_NAMES else ""
        left = f"{self.unknown.total()} detections of other classes left alone ({shown}{more})"
        return f"{text}; {left}"


def load_detector(spec: str, *, score: float, device: torch.device) -> DetectorTeacher:
    """The detector a specification means, which gives detections from `score` on.

    A model folder, a bundled name or an exported file of this library; or YOLOX as an ONNX file.
    Raises ConfigError naming the specification.
    """
    path = Path(spec)
    exported = is_graph_file(spec) and path.is_file()
    if exported and path.suffix == ".onnx" and CONFIG_KEY not in read_metadata(path):
        return DetectorTeacher(_Yolox(path, score=score).detect, COCO_NAMES, has_masks=False)
    try:
        predictor = Predictor.load(
            spec, device="cpu" if exported else str(device), score_threshold=score
        )
    except ConfigError as error:
        raise ConfigError(f"teacher {spec}: {error}") from error
    return DetectorTeacher(predictor, predictor.class_names, predictor.engine.has_masks)


def teach(
    data: DetectionData,
    teacher: DetectorTeacher,
    *,
    score: float,
    with_masks: bool,
    where: str,
    check_time: Callable[[], None] = lambda: None,
) -> Lessons:
    """The data with the teacher's detections of its classes that no label accounts for.

    Those from `score` on are objects, with_masks with their masks; those from UNSURE times that on
    are difficult. Raises ConfigError where the two share no class, or masks are wanted that the
    teacher does not have, and ImageError on a bad picture; check_time, asked before each picture,
    raises what ends it.
    """
    if with_masks and not teacher.has_masks:
        raise ConfigError(f"{where}: expected a segmenter, got a detector without masks")
    shared = set(teacher.class_names) & set(data.class_names)
    if not shared:
        raise ConfigError(
            f"{where}: expected a detector of some of the classes "
            f"{', '.join(data.class_names[:20])}, got one of {', '.join(teacher.class_names[:20])}"
        )
    ids = count(1 + max((a.id for image in data.images for a in image.annotations), default=0))
    images: list[ImageRecord] = []
    unknown: Counter[str] = Counter()
    added: Counter[bool] = Counter()
    for record in data.images:
        check_time()
        found = teacher.detect(read_image(record.path, expected_size=(record.height, record.width)))
        names = [found.class_names[label] for label in found.labels]
        sure = found.scores >= UNSURE * score
        unknown.update(n for n, ok in zip(names, sure, strict=True) if ok and n not in shared)
        is_new = missing_labels(found.boxes_xyxy, record) & sure
        chosen = [i for i, name in enumerate(names) if is_new[i] and name in shared]
        learnt = found[np.array(chosen, dtype=np.int64)]
        new = _annotations(learnt, data.class_names, score, with_masks=with_masks)
        added.update(annotation.is_difficult for annotation in new)
        taught = tuple(replace(annotation, id=next(ids)) for annotation in new)
        images.append(replace(record, annotations=record.annotations + taught))
    return Lessons(replace(data, images=tuple(images)), added[False], added[True], unknown)


def missing_labels(boxes_xyxy: NDArray[np.float32], record: ImageRecord) -> NDArray[np.bool_]:
    """(N,) whether no label of the picture accounts for each box (N, 4)."""
    missing = np.ones(len(boxes_xyxy), dtype=bool)
    for annotation in record.annotations:
        label = np.array(annotation.box_xyxy)
        sides = np.minimum(boxes_xyxy[:, 2:], label[2:]) - np.maximum(boxes_xyxy[:, :2], label[:2])
        shared = sides.clip(min=0).prod(1)
        own = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).prod(1)
        if annotation.is_ignored:
            missing &= shared < COVERED * own
        else:
            missing &= shared < KNOWN_IOU * (own + (label[2:] - label[:2]).prod() - shared)
    return missing


def _annotations(
    found: Detections, class_names: tuple[str, ...], score: float, *, with_masks: bool
) -> list[Annotation]:
    """The detections as labels, by the data's classes; their ids are still to be given."""
    masks: list[Rle | None] = [None] * len(found)
    if with_masks and found.masks is not None:
        encoded = encode_masks(found.masks, found.image_size)
        masks = [Rle(size=list(one["size"]), counts=one["counts"].encode()) for one in encoded]
    annotations = []
    for box, label, value, mask in zip(
        found.boxes_xyxy.tolist(), found.labels, found.scores, masks, strict=True
    ):
        x1, y1, x2, y2 = box
        annotation = Annotation(
            id=0,
            label=class_names.index(found.class_names[label]),
            box_xyxy=(x1, y1, x2, y2),
            segmentation=mask,
            area=(x2 - x1) * (y2 - y1),
            is_crowd=False,
            is_difficult=bool(value < score),
        )
        annotations.append(annotation)
    return annotations


class _Yolox:
    """YOLOX (Ge et al., 2021) as an ONNX file with its output not yet decoded."""

    def __init__(self, path: Path, *, score: float) -> None:
        onnxruntime = import_onnxruntime()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.path, self.score = path, score
        self._session: Any = open_session(onnxruntime, path, options)
        inputs, outputs = (
            [one.shape for one in values]
            for values in (self._session.get_inputs(), self._session.get_outputs())
        )
        self.side = inputs[0][-1] if inputs and inputs[0] else 0
        expected = [[1, _places(self.side), 5 + len(COCO_NAMES)]]
        if inputs != [[1, 3, self.side, self.side]] or outputs != expected:
            raise ConfigError(
                f"teacher {path}: expected a file of `vovnet export`, or YOLOX of COCO's "
                f"{len(COCO_NAMES)} classes with an input [1, 3, S, S] and S / 8 whole, got "
                f"{inputs} to {outputs}"
            )
        self._input = self._session.get_inputs()[0].name

    def detect(self, image: NDArray[np.uint8]) -> Detections:
        """Detections of a picture, uint8 (H, W, 3) RGB."""
        canvas, ratio = letterbox(image, self.side)
        (raw,) = self._session.run(None, {self._input: canvas})
        boxes, probabilities = decode_yolox(raw[0], self.side)
        labels, scores = probabilities.argmax(1), probabilities.max(1)
        shown = np.flatnonzero(scores >= self.score)
        kept = batched_nms(
            torch.from_numpy(boxes[shown]),
            torch.from_numpy(scores[shown]),
            torch.from_numpy(labels[shown]),
            _NMS_IOU,
        ).numpy()
        height, width = image.shape[:2]
        limits = np.array([width, height] * 2, np.float32)
        clipped = (boxes[shown][kept] / ratio).clip(0, limits).astype(np.float32)
        real = (clipped[:, 2:] > clipped[:, :2]).all(1)
        return Detections(
            boxes_xyxy=clipped[real],
            scores=scores[shown][kept][real].astype(np.float32),
            labels=labels[shown][kept][real].astype(np.int64),
            image_size=(height, width),
            class_names=COCO_NAMES,
        )


def letterbox(image: NDArray[np.uint8], side: int) -> tuple[NDArray[np.float32], float]:
    """A picture uint8 (H, W, 3) RGB, resized to fit the top left of a grey square, as YOLOX wants
    it: float32 (1, 3, side, side) BGR of 0..255; and the factor of the resize.
    """
    height, width = image.shape[:2]
    ratio = min(side / height, side / width)
    size = max(int(width * ratio), 1), max(int(height * ratio), 1)
    resized = Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)
    canvas = np.full((side, side, 3), _GREY, np.uint8)
    canvas[: size[1], : size[0]] = np.asarray(resized)
    batch = canvas[None, :, :, ::-1].transpose(0, 3, 1, 2)
    return np.ascontiguousarray(batch, dtype=np.float32), ratio


def decode_yolox(
    raw: NDArray[np.float32], side: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Boxes (N, 4) xyxy in pixels of the square and probabilities (N, C), of YOLOX's (N, 5 + C).

    A row holds the centre from its cell's corner and the log of the sides, in strides, then the
    probability of an object and of each class; the cells of stride 8 come first, row by row.
    """
    corners, strides = [], []
    for stride in YOLOX_STRIDES:
        cells = side // stride
        y, x = np.divmod(np.arange(cells * cells), cells)
        corners.append(np.stack([x, y], 1))
        strides.append(np.full((cells * cells, 1), stride))
    stride_of = np.concatenate(strides).astype(np.float32)  # (N, 1)
    centres = (raw[:, :2] + np.concatenate(corners)) * stride_of
    halves = np.exp(raw[:, 2:4]) * stride_of / 2
    boxes = np.concatenate([centres - halves, centres + halves], 1).astype(np.float32)
    return boxes, raw[:, 4:5] * raw[:, 5:]


def _places(side: object) -> int:
    """Rows of the output for an input of this side; 0 where it is no whole number of cells."""
    if not isinstance(side, int):
        return 0
    return sum((side // stride) ** 2 for stride in YOLOX_STRIDES)
