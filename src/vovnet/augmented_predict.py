"""Test-time augmentation: several views of one image, their detections merged by voting."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from vovnet.errors import ConfigError
from vovnet.predict import Predictor
from vovnet.preprocess import Preprocess
from vovnet.results import Detections, MaskCrop

VOTING_OVERLAP = 0.6
MIN_VIEW_SCALE, MAX_VIEW_SCALE = 0.1, 10.0

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class View:
    """How an image is looked at: mirrored left to right, at a factor of the model's own size."""

    flip: bool = False
    scale: float = 1.0


PLAIN = View()


def parse_views(text: str) -> tuple[View, ...]:
    """The plain view and those of a list such as "flip,0.8,1.25,flip*0.8", each once.

    Raises ConfigError on anything else, and on a scale outside 0.1..10.
    """
    views = [PLAIN]
    for entry in text.split(","):
        words = [word.strip() for word in entry.split("*")]
        flip = words[0] == "flip"
        try:
            scales = [float(word) for word in words[1 if flip else 0 :]]
        except ValueError:
            scales = [math.nan]
        if len(scales) > 1 or not all(MIN_VIEW_SCALE <= s <= MAX_VIEW_SCALE for s in scales):
            raise ConfigError(
                f"tta: expected flip, scales of {MIN_VIEW_SCALE:g}..{MAX_VIEW_SCALE:g}, or "
                f"flip*SCALE, with commas between, got {entry!r}"
            )
        views.append(View(flip, scales[0] if scales else 1.0))
    return tuple(dict.fromkeys(views))


def predict_augmented(
    predictor: Predictor,
    image: Pixels,
    views: Sequence[View],
    *,
    max_detections: int | None = None,
) -> Detections:
    """Detections of an image (H, W, 3) uint8 RGB, looked at in several ways.

    Each view's detections are mapped back to the image; those of more than one are merged by
    `vote`, and the best max_detections kept, None for all. Raises ValueError without a view.
    """
    if not views:
        raise ValueError("views: expected at least one, got none")
    parts = [_look(predictor, image, view) for view in views]
    if len(parts) == 1:
        return parts[0]
    return vote(Detections.concatenate(parts))[:max_detections]


def vote(found: Detections, *, min_overlap: float = VOTING_OVERLAP) -> Detections:
    """The best detections, each box the mean, weighted by score, of all it stands for, best first.

    Greedy by class: the best that is left stands for those left of its class that overlap it by
    min_overlap (IoU) or more, itself included; its score, mask and mask score stay its own. The
    voting of Gidaris & Komodakis 2015 (section 5), with each detection voting once.
    """
    boxes = found.boxes_xyxy.astype(np.float64)
    order = np.argsort(-found.scores, kind="stable")
    free = np.ones(len(found), dtype=bool)
    kept: list[int] = []
    voted = boxes.copy()
    for index in order.tolist():
        if not free[index]:
            continue
        group = free & (found.labels == found.labels[index])
        group &= _overlaps(boxes[index], boxes) >= min_overlap
        group[index] = True  # an empty box overlaps nothing, not even itself
        free &= ~group
        kept.append(index)
        weights = found.scores[group].astype(np.float64)
        if weights.sum() > 0:
            voted[index] = weights @ boxes[group] / weights.sum()
    merged = replace(found, boxes_xyxy=voted.astype(np.float32))
    return merged[np.array(kept, dtype=np.int64)]


def _look(predictor: Predictor, image: Pixels, view: View) -> Detections:
    """The detections of one view, in pixels of the image."""
    seen = np.ascontiguousarray(image[:, ::-1]) if view.flip else image
    predict: Callable[[Pixels], Detections] = predictor
    if view.scale != 1.0:
        scaled = copy.copy(predictor)
        scaled.preprocess = scale_preprocess(predictor.preprocess, view.scale)
        predict = scaled
    found = predict(seen)
    return mirrored(found) if view.flip else found


def mirrored(found: Detections) -> Detections:
    """The same objects in the image turned left to right."""
    width = found.image_size[1]
    x1, y1, x2, y2 = found.boxes_xyxy.T
    masks = None
    if found.masks is not None:
        masks = tuple(
            MaskCrop(width - crop.x - crop.pixels.shape[1], crop.y, crop.pixels[:, ::-1].copy())
            for crop in found.masks
        )
    return replace(found, boxes_xyxy=np.stack([width - x2, y1, width - x1, y2], 1), masks=masks)


def scale_preprocess(preprocess: Preprocess, scale: float) -> Preprocess:
    """The preprocess that resizes to `scale` times the size; at least a pixel."""
    short, long, square = (
        None if side is None else max(1, round(side * scale))
        for side in (preprocess.short_side, preprocess.max_long_side, preprocess.square)
    )
    by_factor = preprocess.short_side is None and preprocess.square is None
    factor = preprocess.scale * scale if by_factor else 1.0
    return replace(preprocess, scale=factor, short_side=short, max_long_side=long, square=square)


def _overlaps(box: NDArray[np.float64], boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Intersection over union of one box with others (N, 4), 0 where both are empty."""
    low, high = np.maximum(box[:2], boxes[:, :2]), np.minimum(box[2:], boxes[:, 2:])
    shared = (high - low).clip(min=0).prod(axis=1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    together = (box[2:] - box[:2]).prod() + areas - shared
    overlaps: NDArray[np.float64] = shared / np.maximum(together, 1e-12)
    return overlaps
