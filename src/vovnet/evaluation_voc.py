"""Pascal VOC's average precision, as the development kit counts: by 11 points or by all."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_api

from vovnet.data.labels import DetectionData

VocMetric = Literal["voc07", "voc12"]
MIN_OVERLAP = 0.5

_POINTS = {"voc07": "11 points", "voc12": "all points"}


@dataclass(frozen=True, slots=True, kw_only=True)
class VocPrecision:
    """VOC's figures of box detections, 0..1; nan where there is nothing to find.

    voc07 is the mean of the best precision at recalls of 0, 0.1, ... 1; voc12 the area under the
    envelope of the precision.
    """

    metric: VocMetric
    mean_ap: float
    ap_per_class: tuple[float, ...]  # in the order of the class names
    class_names: tuple[str, ...]
    num_images: int
    num_objects: int  # without the difficult ones

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, with null for what does not exist."""
        values = zip(self.class_names, self.ap_per_class, strict=True)
        return {
            "metric": self.metric,
            "overlap": MIN_OVERLAP,
            "num_images": self.num_images,
            "num_objects": self.num_objects,
            "mean_ap": _plain(self.mean_ap),
            "ap_per_class": {name: _plain(value) for name, value in values},
        }

    def format(self) -> str:
        """The mean under a line that says how it was counted, then a line for each class."""
        width = max(len("mean"), *(len(name) for name in self.class_names))
        values = zip(self.class_names, self.ap_per_class, strict=True)
        return "\n".join(
            [
                f"VOC AP ({self.metric}: {_POINTS[self.metric]}) at overlap {MIN_OVERLAP} over "
                f"{self.num_images} images, {self.num_objects} objects",
                f"{'mean':<{width}} {_show(self.mean_ap)}",
                *(f"{name:<{width}} {_show(value)}" for name, value in values),
            ]
        )


def evaluate_voc(
    data: DetectionData, predictions: Sequence[Mapping[str, Any]], *, metric: VocMetric
) -> VocPrecision:
    """VOC's AP of COCO results (bbox xywh in pixels), per class and their mean.

    Each detection, best first, counts with the object of its class and image that it overlaps
    most, found at 0.5 and the first time only; one on a difficult object or a crowd counts as
    nothing. Everingham et al. 2010, section 4.2; VOCevaldet.m of the development kit, whose boxes
    include their last pixel, which makes their overlaps those of ours. A recall of exactly k/10
    reaches the point k/10. Raises ValueError on a result of an unknown image or category.
    """
    places = {record.id: index for index, record in enumerate(data.images)}
    labels = {category_id: label for label, category_id in enumerate(data.category_ids)}
    for index, entry in enumerate(predictions):
        if entry["image_id"] not in places or entry["category_id"] not in labels:
            raise ValueError(
                f"predictions[{index}]: expected an image and a category of "
                f"{data.annotation_file}, got {entry['image_id']!r} and {entry['category_id']!r}"
            )
    average = _eleven_points if metric == "voc07" else _all_points
    values, num_objects = [], 0
    for label, category_id in enumerate(data.category_ids):
        chosen = [entry for entry in predictions if entry["category_id"] == category_id]
        true, false, objects = _match_class(data, chosen, label, places)
        num_objects += objects
        values.append(average(np.cumsum(true), np.cumsum(false), objects) if objects else math.nan)
    existing = [value for value in values if not math.isnan(value)]
    return VocPrecision(
        metric=metric,
        mean_ap=float(np.mean(existing)) if existing else math.nan,
        ap_per_class=tuple(values),
        class_names=data.class_names,
        num_images=len(data.images),
        num_objects=num_objects,
    )


def _match_class(
    data: DetectionData,
    predictions: Sequence[Mapping[str, Any]],
    label: int,
    places: Mapping[int, int],
) -> tuple[NDArray[np.bool_], NDArray[np.bool_], int]:
    """True and false detections (D,), best first, and the number of objects to find."""
    order = np.argsort([-entry["score"] for entry in predictions], kind="stable")
    image = np.array([places[predictions[index]["image_id"]] for index in order], dtype=np.int64)
    true, false = np.zeros(len(order), dtype=bool), np.zeros(len(order), dtype=bool)
    num_objects = 0
    for number, record in enumerate(data.images):
        objects = [a for a in record.annotations if a.label == label]
        ignored = np.array([a.is_ignored for a in objects], dtype=bool)
        num_objects += int((~ignored).sum())
        found = np.flatnonzero(image == number)
        boxes = [predictions[order[index]]["bbox"] for index in found]
        truth = [_xywh(a.box_xyxy) for a in objects]
        hit = _first_hits(_overlaps(boxes, truth), ignored)
        true[found], false[found] = hit == 1, hit == -1
    return true, false, num_objects


def _first_hits(overlaps: NDArray[np.float64], ignored: NDArray[np.bool_]) -> NDArray[np.int64]:
    """1 for the first detection (D,) of an object (G,), 0 on an ignored one, -1 for all others."""
    hit = np.full(len(overlaps), -1, dtype=np.int64)
    taken = np.zeros(overlaps.shape[1], dtype=bool)
    for index in np.flatnonzero(overlaps.max(axis=1, initial=0) >= MIN_OVERLAP):
        best = int(overlaps[index].argmax())
        if ignored[best]:
            hit[index] = 0
        elif not taken[best]:
            hit[index], taken[best] = 1, True
    return hit


def _overlaps(
    found_xywh: Sequence[Sequence[float]], truth_xywh: Sequence[Sequence[float]]
) -> NDArray[np.float64]:
    """Intersection over union (D, G)."""
    if not found_xywh or not truth_xywh:
        return np.zeros((len(found_xywh), len(truth_xywh)))
    found, truth = (np.array(boxes, dtype=np.float64) for boxes in (found_xywh, truth_xywh))
    overlaps: NDArray[np.float64] = mask_api.iou(found, truth, [0] * len(truth))
    return overlaps


def _xywh(box_xyxy: Sequence[float]) -> list[float]:
    x1, y1, x2, y2 = box_xyxy
    return [x1, y1, x2 - x1, y2 - y1]


def _eleven_points(true: NDArray[np.int64], false: NDArray[np.int64], objects: int) -> float:
    precision = true / np.maximum(true + false, 1)
    # In whole numbers, as 3/10 of a count is no binary fraction.
    best = [precision[10 * true >= tenth * objects].max(initial=0.0) for tenth in range(11)]
    return float(np.mean(best))


def _all_points(true: NDArray[np.int64], false: NDArray[np.int64], objects: int) -> float:
    precision = true / np.maximum(true + false, 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    gained = np.diff(true, prepend=0) / objects
    return float((envelope * gained).sum())


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else value


def _show(value: float) -> str:
    return "n/a" if math.isnan(value) else f"{value:.3f}"
