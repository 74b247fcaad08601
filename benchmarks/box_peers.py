"""The three peers of `boxes_vs_peers.py`: how each is built, trained within a budget, and asked.

All see every picture of the train split so that its long side has `side` pixels (SSDLite: 320 x
320, as it is made), flipped and at another scale each time, and keep what their own toolkit gives:
torchvision its models, losses and transforms; Ultralytics its trainer's data, augmentation,
losses, optimizer, clipping and weight averaging.
"""

import importlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from peers import (
    THREADS,
    Budget,
    Example,
    Predict,
    load_split,
    read_rgb,
    setup_trainer,
    train_torchvision,
)
from pycocotools.coco import COCO
from torchvision import tv_tensors
from torchvision.transforms import v2

MAX_DETECTIONS = 100
CONFIDENCE = 0.001
Found = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Of one image: scores (N,), boxes_xyxy (N, 4) in its pixels, category ids (N,)."""


@dataclass(frozen=True, slots=True)
class TorchvisionPeer:
    """How one detector of torchvision is built and what it is trained with."""

    build: Callable[[int, int], torch.nn.Module]
    """Of the number of classes with the background and the side, with random weights."""
    augment: Callable[[tuple[int, int]], v2.Transform]
    """Of the height and width that a picture has at test."""
    settings: dict[str, Any]


def build_fcos(num_classes: int, side: int) -> torch.nn.Module:
    """Build FCOS with random weights, for which torchvision takes trainable BatchNorm."""
    return torchvision.models.detection.fcos_resnet50_fpn(
        weights=None,
        weights_backbone=None,
        num_classes=num_classes,
        min_size=side,
        max_size=side,
        detections_per_img=MAX_DETECTIONS,
    )


def build_ssdlite(num_classes: int, side: int) -> torch.nn.Module:
    """Build SSDLite with random weights; it sees 320 x 320 pixels, whatever the side."""
    return torchvision.models.detection.ssdlite320_mobilenet_v3_large(
        weights=None,
        weights_backbone=None,
        num_classes=num_classes,
        detections_per_img=MAX_DETECTIONS,
    )


COLOURS = {"brightness": 0.2, "contrast": 0.2, "saturation": 0.3, "hue": 0.015}


def jitter_scale(canvas: tuple[int, int]) -> v2.Transform:
    """Return flips, colours, and windows of the canvas's size at 0.6 to 1.5 times its scale."""
    return v2.Compose(
        [
            v2.ColorJitter(**COLOURS),
            v2.ScaleJitter((max(canvas), max(canvas)), scale_range=(0.6, 1.5)),
            v2.RandomCrop(canvas, pad_if_needed=True),
            *LAST_TRANSFORMS,
        ]
    )


def crop_by_overlap(canvas: tuple[int, int]) -> v2.Transform:
    """Return flips, colours, and SSD's crops, which the network resizes itself."""
    return v2.Compose([v2.ColorJitter(**COLOURS), v2.RandomIoUCrop(), *LAST_TRANSFORMS])


LAST_TRANSFORMS = (
    v2.RandomHorizontalFlip(),
    v2.SanitizeBoundingBoxes(min_size=2),
    v2.ToDtype(torch.float32, scale=True),
)

# The reference recipes of torchvision start FCOS from ImageNet weights and give SSDLite 600 epochs
# of COCO with SGD; in some hundred steps from random weights AdamW gets further.
TORCHVISION_PEERS = {
    "fcos": TorchvisionPeer(
        build_fcos,
        jitter_scale,
        {
            "batch_size": 4,
            "optimizer": "AdamW",
            "learning_rate": 3e-4,
            "weight_decay": 1e-4,
            "gradient_clip": 10.0,
        },
    ),
    "ssdlite": TorchvisionPeer(
        build_ssdlite,
        crop_by_overlap,
        {
            "batch_size": 8,
            "optimizer": "AdamW",
            "learning_rate": 1e-3,
            "weight_decay": 1e-4,
            "gradient_clip": 10.0,
        },
    ),
}


def category_ids(data_dir: Path) -> list[int]:
    """Return the category ids of the set; a class's index is its place in this list."""
    return sorted(load_split(data_dir, "train").cats)


def resized_size(info: dict[str, Any], side: int) -> tuple[int, int]:
    """Return the (height, width) of an image whose long side is resized to `side`."""
    longest = max(info["height"], info["width"])
    return round(info["height"] * side / longest), round(info["width"] * side / longest)


def read_boxes(coco: COCO, image_id: int, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the boxes xyxy (N, 4) in pixels and class indices (N,) of an image."""
    annotations = coco.imgToAnns[image_id]
    boxes = np.array([one["bbox"] for one in annotations], np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return boxes, np.array([ids.index(one["category_id"]) for one in annotations], np.int64)


def train_peer(
    peer: TorchvisionPeer, model: torch.nn.Module, data_dir: Path, *, side: int, budget: Budget
) -> dict[str, Any]:
    """Train on augmented pictures until the budget is spent; return what was spent and seen."""
    coco, ids = load_split(data_dir, "train"), category_ids(data_dir)
    image_ids = sorted(coco.imgs)
    sizes = np.array([resized_size(info, side) for info in coco.imgs.values()])
    augment = peer.augment(tuple(sizes.max(axis=0).tolist()))

    def read(image_id: int) -> Example:
        pixels = read_rgb(data_dir, coco.imgs[image_id])
        boxes, classes = read_boxes(coco, image_id, ids)
        image = tv_tensors.Image(torch.from_numpy(pixels.copy()).permute(2, 0, 1))
        target = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=pixels.shape[:2]),
            "labels": torch.from_numpy(classes + 1),  # 0 is the background
        }
        return augment(image, target)

    return train_torchvision(model, image_ids, read, budget=budget, settings=peer.settings)


def load_peer(name: str, work_dir: Path, *, num_classes: int, side: int) -> torch.nn.Module:
    """Return a trained detector of torchvision."""
    model = TORCHVISION_PEERS[name].build(num_classes + 1, side).eval()
    model.load_state_dict(torch.load(work_dir / f"{name}.pt", weights_only=True))
    return model


def as_input(image: np.ndarray) -> torch.Tensor:
    """Return a uint8 RGB image (H, W, 3) as torchvision's detectors take it."""
    return torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 255


def ask_peer(model: torch.nn.Module, ids: list[int], confidence: float) -> Predict:
    """Return a function from a uint8 RGB image to what is found in it."""
    model.score_thresh = confidence

    @torch.inference_mode()
    def predict(image: np.ndarray) -> Found:
        output = model([as_input(image)])[0]
        return (
            output["scores"].numpy(),
            output["boxes"].numpy(),
            np.array(ids)[output["labels"].numpy() - 1],
        )

    return predict


# The default nominal batch size of 64 would add up 8 batches for a step: too few steps here.
YOLO = {"batch": 8, "nbs": 8, "mosaic_until": 0.8}


def write_yolo_data(data_dir: Path, target: Path) -> Path:
    """Write the train split as a YOLO folder, unless it is there; return its description.

    Ultralytics wants a validation set. It is never looked at in training; calibration takes it.
    """
    description = target / "data.yaml"
    if description.exists():
        return description
    coco, ids = load_split(data_dir, "train"), category_ids(data_dir)
    for kind in ("images", "labels"):
        (target / kind / "train").mkdir(parents=True, exist_ok=True)
    for image_id, info in coco.imgs.items():
        name = Path(info["file_name"]).name
        shutil.copyfile(data_dir / "images" / info["file_name"], target / "images/train" / name)
        boxes, classes = read_boxes(coco, image_id, ids)
        centres, sizes = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
        values = np.hstack([centres, sizes]) / ([info["width"], info["height"]] * 2)
        lines = [
            " ".join([str(index), *(f"{value:.6f}" for value in row)])
            for index, row in zip(classes, values, strict=True)
        ]
        (target / "labels/train" / name).with_suffix(".txt").write_text("\n".join(lines))
    names = {index: coco.cats[category]["name"] for index, category in enumerate(ids)}
    description.write_text(
        f"path: {target}\nnames: {names}\ntrain: images/train\nval: images/train\n"
    )
    return description


def prepare_yolo(data_dir: Path, work_dir: Path, *, side: int) -> Any:
    """Return Ultralytics' own trainer with its own augmentation and optimizer, set up, not run."""
    detect = importlib.import_module("ultralytics.models.yolo.detect")
    data = write_yolo_data(data_dir, work_dir / "yolo-data")
    settings = {"model": "yolo11n.yaml", "data": str(data), "imgsz": side}
    own = {name: YOLO[name] for name in ("batch", "nbs")}
    return setup_trainer(detect.DetectionTrainer, work_dir, settings | own)


def load_yolo(work_dir: Path, confidence: float, *, side: int) -> tuple[Any, dict[str, Any]]:
    """Return YOLO11n by Ultralytics, and what its `predict` is to be called with."""
    model = importlib.import_module("ultralytics").YOLO(str(work_dir / "yolo.pt"))
    settings = {"imgsz": side, "conf": confidence, "max_det": MAX_DETECTIONS}
    return model, settings | {"device": "cpu", "verbose": False}


def ask_yolo(work_dir: Path, ids: list[int], confidence: float, *, side: int) -> Predict:
    """Return a function from a uint8 RGB image to what YOLO11n finds in it."""
    model, settings = load_yolo(work_dir, confidence, side=side)

    def predict(image: np.ndarray) -> Found:
        boxes = model.predict(np.ascontiguousarray(image[:, :, ::-1]), **settings)[0].boxes
        torch.set_num_threads(THREADS)  # the first call sets a number of its own
        return boxes.conf.numpy(), boxes.xyxy.numpy(), np.array(ids)[boxes.cls.numpy().astype(int)]

    return predict
