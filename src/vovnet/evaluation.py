"""COCO's average precision by pycocotools, at any detection limit, with intervals over images."""

import contextlib
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_api
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from vovnet.data.coco import to_coco_dict
from vovnet.data.labels import DetectionData
from vovnet.images import read_image
from vovnet.results import Detections

IouType = Literal["bbox", "segm"]
Interval = tuple[float, float]

_LABELS = {"bbox": "box", "segm": "mask"}
_ALL, _SMALL, _MEDIUM, _LARGE = range(4)  # places of the area ranges in pycocotools' arrays


@dataclass(frozen=True, slots=True, kw_only=True)
class AveragePrecision:
    """COCO's figures for one kind of overlap, 0..1; nan where there is nothing to find.

    Areas: small below 32 x 32 pixels, large above 96 x 96. `ar` is the recall averaged over the
    overlaps. Intervals are the central 95 % over resampled images, None where not asked for.
    """

    ap: float
    ap50: float
    ap75: float
    ap_small: float
    ap_medium: float
    ap_large: float
    ar: float
    ap_per_class: tuple[float, ...]  # in the order of the class names
    best_f1: float  # at overlap 0.5, over all classes together
    best_f1_score: float  # showing the detections of this score and above gives best_f1
    ap_interval: Interval | None = None
    ap50_interval: Interval | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """Figures by kind of overlap ("bbox", "segm"), and what they were measured on."""

    by_type: Mapping[str, AveragePrecision]
    class_names: tuple[str, ...]
    max_detections: int
    num_images: int
    num_objects: int
    count_score: float  # from this score up the images' counts are nearest to the labelled ones
    num_resamples: int = 0

    def main(self) -> float:
        """Mask AP where masks were evaluated, else box AP; nan where there is nothing to find."""
        return self.by_type["segm" if "segm" in self.by_type else "bbox"].ap

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, with null for what does not exist."""
        result: dict[str, Any] = {
            "max_detections": self.max_detections,
            "num_images": self.num_images,
            "num_objects": self.num_objects,
            "count_score": _plain(self.count_score),
            "num_resamples": self.num_resamples,
        }
        for iou_type, figures in self.by_type.items():
            names = (name for name in AveragePrecision.__slots__ if name != "ap_per_class")
            entry: dict[str, Any] = {name: _plain(getattr(figures, name)) for name in names}
            values = zip(self.class_names, figures.ap_per_class, strict=True)
            entry["ap_per_class"] = {name: _plain(value) for name, value in values}
            result[_LABELS[iou_type]] = entry
        return result

    def format(self) -> str:
        """A line for each kind of overlap, under one that states the detection limit."""
        lines = [
            f"COCO AP over {self.num_images} images, {self.num_objects} objects, "
            f"at most {self.max_detections} detections per image and class"
        ]
        for iou_type, figures in self.by_type.items():
            parts = [
                f"AP {_show(figures.ap, figures.ap_interval)}",
                f"AP50 {_show(figures.ap50, figures.ap50_interval)}",
                f"AP75 {_show(figures.ap75)}",
                f"small {_show(figures.ap_small)}",
                f"medium {_show(figures.ap_medium)}",
                f"large {_show(figures.ap_large)}",
                f"AR {_show(figures.ar)}",
            ]
            lines.append(f"{_LABELS[iou_type]:<4} {'  '.join(parts)}")
        if self.num_resamples:
            lines.append(f"[low-high]: 95 % of {self.num_resamples} resamples of the images")
        return "\n".join(lines)


def predict_images(
    predict: Callable[[NDArray[np.uint8]], Detections], data: DetectionData
) -> Iterator[list[dict[str, Any]]]:
    """COCO results of each image in turn, by a function from uint8 (H, W, 3) RGB to detections.

    The function's classes must be the data set's, in their order; raises ImageError on a bad file.
    """
    for record in data.images:
        image = read_image(record.path, expected_size=(record.height, record.width))
        found = predict(image)
        if found.class_names != data.class_names:
            raise ValueError(
                f"predictions: expected the classes {data.class_names}, got {found.class_names}"
            )
        yield found.to_coco(record.id, data.category_ids)


def evaluate_coco(
    data: DetectionData,
    predictions: Sequence[Mapping[str, Any]],
    *,
    iou_types: Sequence[IouType] = ("bbox", "segm"),
    max_detections: int = 100,
    bootstrap: int = 0,
    seed: int = 0,
) -> Metrics:
    """Average precision of COCO results (bbox xywh in pixels, segmentation RLE) by pycocotools.

    Masks are ranked by a result's `mask_score` where it has one, else by its `score`.
    `max_detections` is the limit per image and class; `bootstrap` the number of resamples of the
    images behind the intervals. Raises ValueError on a result of an unknown image, without a mask
    where masks are asked for, or on a limit below 1.
    """
    if max_detections < 1 or bootstrap < 0:
        raise ValueError(
            f"expected max_detections >= 1 and bootstrap >= 0, got {max_detections}, {bootstrap}"
        )
    known = {record.id for record in data.images}
    for index, prediction in enumerate(predictions):
        if prediction["image_id"] not in known:
            raise ValueError(
                f"predictions[{index}]: expected the id of an image of {data.annotation_file}, "
                f"got {prediction['image_id']!r}"
            )
    truth = to_coco_dict(data)
    num_objects = sum(not annotation["iscrowd"] for annotation in truth["annotations"])
    return Metrics(
        by_type={
            iou_type: _evaluate(truth, predictions, iou_type, max_detections, bootstrap, seed)
            for iou_type in iou_types
        },
        class_names=data.class_names,
        max_detections=max_detections,
        num_images=len(data.images),
        num_objects=num_objects,
        count_score=_count_score(predictions, data),
        num_resamples=bootstrap,
    )


def _count_score(predictions: Sequence[Mapping[str, Any]], data: DetectionData) -> float:
    """The score, in hundredths, from which on up the counts err least; nan where there is nothing.

    The error of an image is |found - labelled| / the larger of both, so that every image counts
    alike: a sum of objects would let a few crowded images decide, and a division by the labelled
    those where most objects have no label. Of equally good scores the middle one.
    """
    labelled = {
        image.id: sum(not annotation.is_ignored for annotation in image.annotations)
        for image in data.images
    }
    if not predictions or not any(labelled.values()):
        return math.nan
    scores: dict[int, list[float]] = {image_id: [] for image_id in labelled}
    for prediction in predictions:
        scores[prediction["image_id"]].append(prediction["score"])
    limits = np.arange(1, 100) / 100  # (T,)
    errors = np.zeros_like(limits)
    for image_id, count in labelled.items():
        ranked = np.sort(scores[image_id])
        found = len(ranked) - np.searchsorted(ranked, limits, side="left")
        errors += np.abs(found - count) / np.maximum(found, max(count, 1))
    best = np.flatnonzero(errors == errors.min())
    return float(limits[best[len(best) // 2]])


def _evaluate(
    truth: dict[str, Any],
    predictions: Sequence[Mapping[str, Any]],
    iou_type: IouType,
    max_detections: int,
    bootstrap: int,
    seed: int,
) -> AveragePrecision:
    evaluator = run_pycocotools(truth, predictions, iou_type, max_detections)
    precision: NDArray[np.float64] = evaluator.eval["precision"][..., 0]  # (T, R, K, A)
    recall: NDArray[np.float64] = evaluator.eval["recall"][..., 0]  # (T, K, A)
    thresholds = [round(float(value), 2) for value in evaluator.params.iouThrs]
    low, high = thresholds.index(0.5), thresholds.index(0.75)
    matches = _collect_matches(evaluator)
    best_f1, best_f1_score = _best_f1(matches, low)
    intervals = _intervals(matches, len(evaluator.params.imgIds), low, bootstrap, seed)
    return AveragePrecision(
        ap=mean_existing(precision[..., _ALL]),
        ap50=mean_existing(precision[low, ..., _ALL]),
        ap75=mean_existing(precision[high, ..., _ALL]),
        ap_small=mean_existing(precision[..., _SMALL]),
        ap_medium=mean_existing(precision[..., _MEDIUM]),
        ap_large=mean_existing(precision[..., _LARGE]),
        ar=mean_existing(recall[..., _ALL]),
        ap_per_class=tuple(
            mean_existing(precision[:, :, k, _ALL]) for k in range(precision.shape[2])
        ),
        best_f1=best_f1,
        best_f1_score=best_f1_score,
        ap_interval=intervals[0],
        ap50_interval=intervals[1],
    )


def run_pycocotools(
    truth: dict[str, Any],
    predictions: Sequence[Mapping[str, Any]],
    iou_type: IouType,
    max_detections: int,
) -> Any:
    """pycocotools' COCOeval after its accumulate(), of what to_coco_dict gave and COCO results.

    The class axis of its precision and recall is in the order of the categories.
    """
    # pycocotools finds annotations by id; in data put together from parts these may repeat.
    objects = [entry | {"id": i} for i, entry in enumerate(truth["annotations"], start=1)]
    results = [_result(entry, i, iou_type) for i, entry in enumerate(predictions, start=1)]
    truth, found = truth | {"annotations": objects}, truth | {"annotations": results}
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        evaluator = COCOeval(_index(truth), _index(found), iou_type)
        evaluator.params.maxDets = [max_detections]
        evaluator.evaluateImg = partial(match_image, evaluator)
        evaluator.evaluate()
        evaluator.accumulate()
    # It sorts the classes by id.
    order = np.searchsorted(evaluator.params.catIds, [c["id"] for c in truth["categories"]])
    evaluator.eval["precision"] = evaluator.eval["precision"][:, :, order]
    evaluator.eval["recall"] = evaluator.eval["recall"][:, order]
    return evaluator


def match_image(
    evaluator: Any,
    image_id: int,
    category_id: int,
    area_range: tuple[float, float],
    max_detections: int,
) -> dict[str, Any] | None:
    """pycocotools' matching of one image and class, over all overlaps (T) at once.

    Equal to COCOeval.evaluateImg in all that its accumulate() reads, and many times as fast where
    an image holds hundreds of objects (D detections, G objects): that one loops over T x D x G.
    """
    truth = evaluator._gts[image_id, category_id]
    found = evaluator._dts[image_id, category_id]
    if not truth and not found:
        return None
    order = np.argsort([-entry["score"] for entry in found], kind="mergesort")[:max_detections]
    found = [found[index] for index in order]
    low, high = area_range
    is_crowd = np.array([bool(entry["iscrowd"]) for entry in truth], dtype=bool)
    is_ignored = is_crowd | np.array([not low <= e["area"] <= high for e in truth], dtype=bool)
    is_outside = np.array([not low <= e["area"] <= high for e in found], dtype=bool)
    overlaps = np.asarray(evaluator.ious[image_id, category_id], dtype=np.float64)
    overlaps = overlaps.reshape(len(found), len(truth))
    thresholds = np.minimum(evaluator.params.iouThrs, 1 - 1e-10)[:, None]  # (T, 1)
    matched = np.zeros((len(thresholds), len(found)), dtype=bool)  # (T, D)
    ignored = np.zeros_like(matched)
    free = np.ones((len(thresholds), len(truth)), dtype=bool)  # (T, G)
    for index in np.flatnonzero((overlaps >= thresholds.min()).any(axis=1)):
        possible = free & (overlaps[index] >= thresholds)
        counted = possible & ~is_ignored
        candidates = np.where(counted.any(axis=1, keepdims=True), counted, possible)
        values = np.where(candidates, overlaps[index], -1.0)
        best = values.shape[1] - 1 - values[:, ::-1].argmax(axis=1)  # the last of equal ones
        hits = np.flatnonzero(candidates.any(axis=1))
        matched[hits, index] = True
        ignored[hits, index] = is_ignored[best[hits]]
        free[hits, best[hits]] = is_crowd[best[hits]]
    return {
        "dtScores": [entry["score"] for entry in found],
        "dtMatches": matched,
        "dtIgnore": ignored | (~matched & is_outside),
        "gtIgnore": np.sort(is_ignored),
    }


def _index(content: dict[str, Any]) -> COCO:
    # Not COCO.loadRes: it fails on no results at all.
    coco = COCO()
    coco.dataset = content
    coco.createIndex()
    return coco


def _result(prediction: Mapping[str, Any], number: int, iou_type: IouType) -> dict[str, Any]:
    """A result as pycocotools' evaluation reads it; its area is that of what is compared."""
    result = {
        "id": number,
        "image_id": prediction["image_id"],
        "category_id": prediction["category_id"],
        "score": prediction["score"],
        "iscrowd": 0,
    }
    if iou_type == "bbox":
        _, _, width, height = prediction["bbox"]
        return result | {"bbox": prediction["bbox"], "area": width * height}
    segmentation = prediction.get("segmentation")
    if not isinstance(segmentation, dict):
        raise ValueError(
            f"predictions[{number - 1}]: expected a segmentation as RLE for mask AP, "
            f"got {type(segmentation).__name__}"
        )
    score = prediction.get("mask_score", prediction["score"])
    area = float(mask_api.area(segmentation))
    return result | {"segmentation": segmentation, "area": area, "score": score}


def mean_existing(values: NDArray[np.float64]) -> float:
    """Mean of what exists, nan of nothing; pycocotools writes -1 where there is nothing to find."""
    existing = values[values > -1]
    return float(existing.mean()) if existing.size else math.nan


@dataclass(frozen=True, slots=True)
class _ClassMatches:
    """The matched detections of one class in all images, best first, and its objects per image."""

    scores: NDArray[np.float64]  # (D,)
    image: NDArray[np.int64]  # (D,) place of each detection's image
    true: NDArray[np.bool_]  # (T, D)
    false: NDArray[np.bool_]  # (T, D)
    objects: NDArray[np.int64]  # (number of images,)


def _intervals(
    matches: Sequence[_ClassMatches], num_images: int, place_50: int, resamples: int, seed: int
) -> tuple[Interval | None, Interval | None]:
    """Central 95 % of AP and AP50 over resamples of the images with replacement; None without.

    A resample that holds an image n times counts its objects and detections n times.
    """
    generator = np.random.default_rng(seed)
    ap, ap50 = [], []
    for _ in range(resamples):
        chosen = generator.integers(num_images, size=num_images)
        weights = np.bincount(chosen, minlength=num_images)
        precision = [resampled_precision(entry, weights) for entry in matches]
        existing = [values for values in precision if values is not None]
        if existing:
            ap.append(float(np.mean(existing)))
            ap50.append(float(np.mean([values[place_50] for values in existing])))
    return (_central(ap), _central(ap50)) if ap else (None, None)


def _collect_matches(evaluator: Any) -> list[_ClassMatches]:
    num_images = len(evaluator.params.imgIds)
    areas = len(evaluator.params.areaRng)
    collected = []
    for class_index in range(len(evaluator.params.catIds)):
        start = (class_index * areas + _ALL) * num_images
        entries = evaluator.evalImgs[start : start + num_images]
        present = [(i, entry) for i, entry in enumerate(entries) if entry is not None]
        objects = np.zeros(num_images, dtype=np.int64)
        for i, entry in present:
            objects[i] = np.count_nonzero(np.asarray(entry["gtIgnore"]) == 0)
        if not present:
            continue
        scores = np.concatenate([np.asarray(e["dtScores"], dtype=float) for _, e in present])
        image = np.concatenate([np.full(len(e["dtScores"]), i) for i, e in present])
        matched = np.concatenate([e["dtMatches"] for _, e in present], axis=1).astype(bool)
        ignored = np.concatenate([e["dtIgnore"] for _, e in present], axis=1).astype(bool)
        order = np.argsort(-scores, kind="mergesort")
        true, false = (matched & ~ignored)[:, order], (~matched & ~ignored)[:, order]
        collected.append(
            _ClassMatches(scores[order], image[order].astype(np.int64), true, false, objects)
        )
    return collected


def _best_f1(matches: Sequence[_ClassMatches], place: int) -> tuple[float, float]:
    """The best F1 that one score threshold gives at an overlap, and that threshold; nan without."""
    objects = sum(int(entry.objects.sum()) for entry in matches)
    if objects == 0 or not sum(len(entry.scores) for entry in matches):
        return math.nan, math.nan
    scores = np.concatenate([entry.scores for entry in matches])
    order = np.argsort(-scores, kind="mergesort")
    true = np.cumsum(np.concatenate([entry.true[place] for entry in matches])[order])
    false = np.cumsum(np.concatenate([entry.false[place] for entry in matches])[order])
    f1 = 2.0 * true / (true + false + objects)
    best = int(f1.argmax())
    return float(f1[best]), math.floor(float(scores[order][best]) * 1e4) / 1e4


def resampled_precision(
    matches: _ClassMatches, weights: NDArray[np.int64]
) -> NDArray[np.float64] | None:
    """Mean precision over COCO's 101 recalls, for each overlap (T,); None without an object.

    `weights` says how often each image is in the resample.
    """
    total = int(weights @ matches.objects)
    if total == 0:
        return None
    counts = weights[matches.image]
    kept = counts > 0
    true = np.cumsum(matches.true[:, kept] * counts[kept], axis=1)
    false = np.cumsum(matches.false[:, kept] * counts[kept], axis=1)
    precision = true / np.maximum(true + false, 1)
    envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    recalls = np.linspace(0.0, 1.0, 101)
    result = np.zeros(len(true))
    for t in range(len(true)):
        places = np.searchsorted(true[t] / total, recalls, side="left")
        reached = places[places < envelope.shape[1]]
        result[t] = envelope[t, reached].sum() / len(recalls)
    return result


def _central(values: list[float]) -> Interval:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def _plain(value: object) -> object:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _show(value: float, interval: Interval | None = None) -> str:
    around = "" if interval is None else f" [{interval[0]:.3f}-{interval[1]:.3f}]"
    return "n/a" if math.isnan(value) else f"{value:.3f}{around}"
