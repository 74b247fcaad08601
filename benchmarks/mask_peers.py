"""The two peers of `train_vs_peers.py`: how each is built, trained within a budget, and asked.

Both learn at the same scale as ours, from every image of the train split, and keep what their own
toolkit gives: torchvision its model and losses; Ultralytics its trainer's data, augmentation,
losses, optimizer, clipping and weight averaging.
"""

import argparse
import importlib
import math
import random
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
from PIL import Image
from pycocotools.coco import COCO

SCALE = 1.5
MAX_DETECTIONS = 500
CONFIDENCE = 0.01


def read_masks(coco: COCO, image_id: int) -> np.ndarray:
    """Decode the masks of an image to uint8 (N, H, W)."""
    info = coco.imgs[image_id]
    masks = [coco.annToMask(annotation) for annotation in coco.imgToAnns[image_id]]
    return np.stack(masks) if masks else np.zeros((0, info["height"], info["width"]), np.uint8)


# A crop of 171 pixels is 256 for the network and holds about 11 nuclei. Torchvision's default of
# 512 sampled boxes per image, up to 128 of them with masks, would leave less than half the steps.
CROP = 171
MASKRCNN = {
    "batch_size": 4,
    "crop": CROP,
    "optimizer": "AdamW",
    "learning_rate": 3e-4,
    "weight_decay": 1e-4,
    "gradient_clip": 10.0,
    "box_batch_size_per_image": 64,
}


def build_maskrcnn() -> torch.nn.Module:
    """Build Mask R-CNN with random weights, for which torchvision takes trainable BatchNorm."""
    sizes = ((16,), (32,), (64,), (128,), (256,))
    return torchvision.models.detection.maskrcnn_resnet50_fpn(
        weights=None,
        weights_backbone=None,
        num_classes=2,
        rpn_anchor_generator=torchvision.models.detection.anchor_utils.AnchorGenerator(
            sizes, ((0.5, 1.0, 2.0),) * len(sizes)
        ),
        min_size=round(CROP * SCALE),
        max_size=4096,
        box_batch_size_per_image=MASKRCNN["box_batch_size_per_image"],
        box_detections_per_img=MAX_DETECTIONS,
    )


def random_crop(data_dir: Path, coco: COCO, image_id: int) -> Example:
    """Cut a random square, flipped and turned by quarters at random: image (3, S, S) in [0, 1]."""
    image = read_rgb(data_dir, coco.imgs[image_id])
    masks = read_masks(coco, image_id)
    top = random.randint(0, max(0, image.shape[0] - CROP))
    left = random.randint(0, max(0, image.shape[1] - CROP))
    window = (slice(top, top + CROP), slice(left, left + CROP))
    turns, mirrored = random.randrange(4), random.random() < 0.5
    image = np.rot90(image[window], turns)
    masks = np.rot90(masks[:, *window], turns, axes=(1, 2))
    if mirrored:
        image, masks = image[:, ::-1], masks[:, :, ::-1]
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).float() / 255
    mask_tensor = torch.from_numpy(np.ascontiguousarray(masks[masks.sum((1, 2)) >= 8]))
    boxes = torchvision.ops.masks_to_boxes(mask_tensor) if len(mask_tensor) else torch.zeros(0, 4)
    boxes[:, 2:] += 1
    labels = torch.ones(len(boxes), dtype=torch.int64)
    return pixels, {"boxes": boxes, "labels": labels, "masks": mask_tensor}


def train_maskrcnn(model: torch.nn.Module, data_dir: Path, *, budget: Budget) -> dict[str, Any]:
    """Train on random crops until the budget is spent; return what was spent and seen."""
    coco = load_split(data_dir, "train")
    return train_torchvision(
        model,
        sorted(coco.imgs),
        lambda image_id: random_crop(data_dir, coco, image_id),
        budget=budget,
        settings=MASKRCNN,
    )


def load_maskrcnn(work_dir: Path, confidence: float) -> Predict:
    """Return a function from a uint8 RGB image to scores, boxes_xyxy and masks bool (N, H, W)."""
    model = build_maskrcnn().eval()
    model.load_state_dict(torch.load(work_dir / "maskrcnn.pt", weights_only=True))
    model.roi_heads.score_thresh = confidence

    @torch.inference_mode()
    def predict(image: np.ndarray) -> tuple[np.ndarray, ...]:
        model.transform.min_size = (round(min(image.shape[:2]) * SCALE),)
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 255
        output = model([pixels])[0]
        masks = output["masks"][:, 0] >= 0.5
        return output["scores"].numpy(), output["boxes"].numpy(), masks.numpy()

    return predict


# Larger images are cut into tiles, because a square of 384 would shrink them. The default nominal
# batch size of 64 would add up 8 batches for a step: too few steps here. "auto" is AdamW at 0.002.
TILE = 256
YOLO = {
    "batch": 8,
    "nbs": 8,
    "imgsz": round(TILE * SCALE),
    "optimizer": "auto",
    "flipud": 0.5,
    "mosaic_until": 0.8,
}


def tile_starts(length: int) -> list[int]:
    """Return the starts of evenly spread tiles, with gaps of at most 32 of `length` pixels."""
    count = math.ceil(length / (TILE + 32))
    return [round(start) for start in np.linspace(0, max(0, length - TILE), count)]


def outline(mask: np.ndarray, cv2: Any) -> np.ndarray | None:
    """Return the outline of the largest part of a mask as (K, 2) x, y in [0, 1], or None."""
    large = cv2.resize(mask, None, fx=4, fy=4, interpolation=cv2.INTER_NEAREST)
    contours, _ = cv2.findContours(large, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    largest = cv2.approxPolyDP(max(contours, key=cv2.contourArea), 1.5, True)[:, 0]
    if len(largest) < 3:
        return None
    return (largest + 0.5) / (large.shape[1], large.shape[0])


def write_yolo_split(data_dir: Path, split: str, target: Path) -> None:
    """Write the tiles of a split and their polygons as a YOLO segmentation folder."""
    cv2 = importlib.import_module("cv2")
    coco = load_split(data_dir, split)
    for kind in ("images", "labels"):
        (target / kind / split).mkdir(parents=True, exist_ok=True)
    for image_id, info in coco.imgs.items():
        image, masks = read_rgb(data_dir, info), read_masks(coco, image_id)
        for top in tile_starts(info["height"]):
            for left in tile_starts(info["width"]):
                window = (slice(top, top + TILE), slice(left, left + TILE))
                name = f"{Path(info['file_name']).stem}_{top}_{left}"
                Image.fromarray(image[window]).save(target / "images" / split / f"{name}.png")
                parts = [part for part in masks[:, *window] if part.sum() >= 8]
                outlines = [outline(np.ascontiguousarray(part), cv2) for part in parts]
                lines = [
                    " ".join(["0", *(f"{value:.5f}" for value in points.ravel())])
                    for points in outlines
                    if points is not None
                ]
                (target / "labels" / split / f"{name}.txt").write_text("\n".join(lines))


def prepare_yolo(arguments: argparse.Namespace) -> Any:
    """Convert the data once and return Ultralytics' own trainer, set up but not run."""
    dataset = arguments.work_dir / "yolo-data"
    if not (dataset / "data.yaml").exists():
        write_yolo_split(arguments.data, "train", dataset)
        # Ultralytics wants a validation set; it is never looked at here.
        names = "names: {0: nucleus}\ntrain: images/train\nval: images/train\n"
        (dataset / "data.yaml").write_text(f"path: {dataset}\n{names}")
    own = {name: YOLO[name] for name in ("batch", "nbs", "imgsz", "optimizer", "flipud")}
    segment = importlib.import_module("ultralytics.models.yolo.segment")
    return setup_trainer(
        segment.SegmentationTrainer,
        arguments.work_dir,
        {"model": "yolo11n-seg.yaml", "data": str(dataset / "data.yaml"), **own},
    )


def load_yolo(work_dir: Path, confidence: float) -> Predict:
    """Return a function from a uint8 RGB image to scores, boxes_xyxy and masks bool (N, H, W)."""
    model = importlib.import_module("ultralytics").YOLO(str(work_dir / "yolo.pt"))

    def predict(image: np.ndarray) -> tuple[np.ndarray, ...]:
        result = model.predict(
            np.ascontiguousarray(image[:, :, ::-1]),
            imgsz=math.ceil(max(image.shape[:2]) * SCALE / 32) * 32,
            conf=confidence,
            max_det=MAX_DETECTIONS,
            retina_masks=True,
            device="cpu",
            verbose=False,
        )[0]
        torch.set_num_threads(THREADS)  # the first call sets a number of its own
        if result.masks is None:
            return np.zeros(0), np.zeros((0, 4)), np.zeros((0, *image.shape[:2]), bool)
        masks = result.masks.data.numpy().astype(bool)
        return result.boxes.conf.numpy(), result.boxes.xyxy.numpy(), masks

    return predict
