"""Where a detector errs: COCO's curves per class and size, confusions, and each error by kind."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_api

from vovnet.data.coco import to_coco_dict
from vovnet.data.labels import Annotation, DetectionData, ImageRecord
from vovnet.evaluation import IouType, mean_existing, run_pycocotools

AREAS = ("all", "small", "medium", "large")
"""In the order of pycocotools' arrays: below 32 x 32 pixels is small, above 96 x 96 large."""

MIN_OVERLAP, BACKGROUND_OVERLAP = 0.5, 0.1

Box = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Curves:
    """pycocotools' arrays for one kind of overlap, -1 where there is nothing to find.

    precision (T, 101, K, A) at the overlaps (T,) and recalls of 0, 0.01, ... 1, recall (T, K, A),
    for K classes and the areas of AREAS.
    """

    iou_type: IouType
    overlaps: NDArray[np.float64]
    precision: NDArray[np.float64]
    recall: NDArray[np.float64]
    class_names: tuple[str, ...]

    def place(self, overlap: float) -> int:
        """The index of an overlap such as 0.75."""
        return int(np.abs(self.overlaps - overlap).argmin())


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassFigures:
    """COCO's figures of one class or of all, 0..1, nan where there is nothing to find."""

    name: str
    ap: float
    ap50: float
    ap75: float
    ap_by_area: tuple[float, ...]  # small, medium, large
    ar: float
    ar_by_area: tuple[float, ...]


class ErrorKind(StrEnum):
    """What is wrong with a detection, or that there is none."""

    CLASS = "wrong class"
    LOCALISATION = "badly placed"
    BOTH = "wrong class and badly placed"
    DUPLICATE = "doubled"
    BACKGROUND = "nothing there"
    MISSED = "missed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One error: what was found, what is there, and how much (IoU) the two overlap."""

    kind: ErrorKind
    image: int  # place in the data set's images
    found: Box | None = None  # xyxy in pixels; None where something was missed
    found_label: int | None = None
    score: float = 0.0
    truth: Box | None = None  # the object that it is about; None where nothing is there
    true_label: int | None = None
    overlap: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ErrorAnalysis:
    """The errors of the detections of min_score and above, and who was taken for whom.

    confusion (C + 1, C + 1) counts true classes in rows and found ones in columns, the last of
    each being background: what was missed and what is not there.
    """

    findings: tuple[Finding, ...]
    confusion: NDArray[np.int64]
    num_correct: int
    min_score: float

    def of_kind(self, kind: ErrorKind) -> list[Finding]:
        """The errors of one kind, those of the highest score first; missed ones by area."""

        def weight(finding: Finding) -> float:
            x1, y1, x2, y2 = finding.truth or (0, 0, 0, 0)
            return (x2 - x1) * (y2 - y1) if kind is ErrorKind.MISSED else finding.score

        return sorted((f for f in self.findings if f.kind is kind), key=weight, reverse=True)


def coco_curves(
    data: DetectionData,
    predictions: Sequence[Mapping[str, Any]],
    *,
    iou_type: IouType,
    max_detections: int,
) -> Curves:
    """The arrays behind evaluate_coco's figures, of the same results at the same limit."""
    evaluator = run_pycocotools(to_coco_dict(data), predictions, iou_type, max_detections)
    return Curves(
        iou_type=iou_type,
        overlaps=evaluator.params.iouThrs,
        precision=evaluator.eval["precision"][..., 0],
        recall=evaluator.eval["recall"][..., 0],
        class_names=data.class_names,
    )


def class_figures(curves: Curves) -> list[ClassFigures]:
    """Those of all classes together, named "all", then of each class."""
    everything = slice(0, len(curves.class_names))
    figures = [_figures(curves, "all", everything)]
    names = enumerate(curves.class_names)
    return figures + [_figures(curves, name, slice(k, k + 1)) for k, name in names]


def _figures(curves: Curves, name: str, classes: slice) -> ClassFigures:
    precision, recall = curves.precision[:, :, classes], curves.recall[:, classes]
    return ClassFigures(
        name=name,
        ap=mean_existing(precision[..., 0]),
        ap50=mean_existing(precision[curves.place(0.5), ..., 0]),
        ap75=mean_existing(precision[curves.place(0.75), ..., 0]),
        ap_by_area=tuple(mean_existing(precision[..., a]) for a in range(1, len(AREAS))),
        ar=mean_existing(recall[..., 0]),
        ar_by_area=tuple(mean_existing(recall[..., a]) for a in range(1, len(AREAS))),
    )


def analyse_errors(
    data: DetectionData, predictions: Sequence[Mapping[str, Any]], *, min_score: float
) -> ErrorAnalysis:
    """Every error of COCO results (bbox xywh in pixels), of min_score and above, by their boxes.

    Detections are matched as for AP50. One that is not is, by its overlaps (IoU) with objects:
    doubled, 0.5 with one of its class, which was found already; wrong class, 0.5 with one of
    another; badly placed, 0.1 with one of its class; both, 0.1 with one of another; else nothing is
    there. An object is missed unless it was found or a wrong class or bad place explains it. The
    kinds of TIDE (Bolya et al. 2020, section 2.2). Crowds and difficult objects count for nothing.
    """
    labels = {category_id: label for label, category_id in enumerate(data.category_ids)}
    by_image: dict[int, list[Mapping[str, Any]]] = {record.id: [] for record in data.images}
    for entry in predictions:
        if entry["score"] >= min_score:
            by_image[entry["image_id"]].append(entry)
    findings: list[Finding] = []
    confusion = np.zeros((len(labels) + 1, len(labels) + 1), dtype=np.int64)
    correct = 0
    for place, record in enumerate(data.images):
        scene = _look_at(record, by_image[record.id], labels)
        matched = _match(scene)
        correct += int((matched >= 0).sum())
        _count_confusions(scene, matched, confusion)
        findings += _find_errors(scene, matched, place)
    return ErrorAnalysis(
        findings=tuple(findings), confusion=confusion, num_correct=correct, min_score=min_score
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Scene:
    """The detections (D) of one image, best first, its objects (G), and how much they overlap."""

    boxes: list[Box]
    scores: list[float]
    found: NDArray[np.int64]  # (D,) labels
    objects: list[Annotation]
    true: NDArray[np.int64]  # (G,) labels
    overlaps: NDArray[np.float64]  # (D, G)
    on_ignored: NDArray[np.bool_]  # (D,) lies on a crowd or difficult object of its class


def _look_at(
    record: ImageRecord, entries: Sequence[Mapping[str, Any]], labels: Mapping[int, int]
) -> _Scene:
    entries = sorted(entries, key=lambda entry: -entry["score"])
    objects = [a for a in record.annotations if not a.is_ignored]
    ignored = [a for a in record.annotations if a.is_ignored]
    found = np.array([labels[entry["category_id"]] for entry in entries], dtype=np.int64)
    boxes_xywh = [list(entry["bbox"]) for entry in entries]
    alike = found[:, None] == np.array([a.label for a in ignored], dtype=np.int64)
    on_ignored = (alike & (_overlaps(boxes_xywh, ignored) >= MIN_OVERLAP)).any(axis=1)
    return _Scene(
        boxes=[(x, y, x + width, y + height) for x, y, width, height in boxes_xywh],
        scores=[float(entry["score"]) for entry in entries],
        found=found,
        objects=objects,
        true=np.array([a.label for a in objects], dtype=np.int64),
        overlaps=_overlaps(boxes_xywh, objects),
        on_ignored=on_ignored,
    )


def _overlaps(
    boxes_xywh: Sequence[Sequence[float]], objects: Sequence[Annotation]
) -> NDArray[np.float64]:
    """IoU (D, G) as COCO counts it: on an ignored region the share of the detection inside it."""
    if not boxes_xywh or not objects:
        return np.zeros((len(boxes_xywh), len(objects)))
    corners = np.array([a.box_xyxy for a in objects], dtype=np.float64)
    corners[:, 2:] -= corners[:, :2]
    ignored = [int(a.is_ignored) for a in objects]
    overlaps: NDArray[np.float64] = mask_api.iou(np.array(boxes_xywh, float), corners, ignored)
    return overlaps


def _match(scene: _Scene) -> NDArray[np.int64]:
    """The object (D,) of its class that each detection finds; -1 none, -2 an ignored one."""
    alike = scene.found[:, None] == scene.true
    matched = _greedy(np.where(alike, scene.overlaps, 0.0))
    matched[(matched < 0) & scene.on_ignored] = -2
    return matched


def _greedy(overlaps: NDArray[np.float64]) -> NDArray[np.int64]:
    """The free object (D,) that each detection in turn overlaps most, from 0.5 on; -1 for none."""
    matched = np.full(len(overlaps), -1, dtype=np.int64)
    left = overlaps.copy()
    for index in np.flatnonzero(overlaps.max(axis=1, initial=0.0) >= MIN_OVERLAP):
        best = int(left[index].argmax())
        if left[index, best] >= MIN_OVERLAP:
            matched[index] = best
            left[:, best] = 0.0
    return matched


def _count_confusions(
    scene: _Scene, matched: NDArray[np.int64], confusion: NDArray[np.int64]
) -> None:
    """Pairs of one class first, then whatever else lies on one another, then what is left."""
    background = len(confusion) - 1
    true = np.append(scene.true, background)  # -1 picks the background
    open_, taken = matched == -1, matched[matched >= 0]
    others = scene.overlaps * open_[:, None]
    others[:, taken] = 0.0
    pairs = np.where(open_, _greedy(others), matched)
    counted = pairs > -2
    np.add.at(confusion, (true[pairs[counted]], scene.found[counted]), 1)
    left = np.setdiff1d(np.arange(len(scene.true)), pairs)
    np.add.at(confusion, (scene.true[left], background), 1)


def _find_errors(scene: _Scene, matched: NDArray[np.int64], image: int) -> list[Finding]:
    findings, explained = [], set(matched.tolist())
    for index in np.flatnonzero(matched == -1).tolist():
        kind, place = _classify(scene, index)
        if kind in (ErrorKind.CLASS, ErrorKind.LOCALISATION) and place is not None:
            explained.add(place)
        truth = None if place is None else scene.objects[place]
        findings.append(
            Finding(
                kind=kind,
                image=image,
                found=scene.boxes[index],
                found_label=int(scene.found[index]),
                score=scene.scores[index],
                truth=None if truth is None else truth.box_xyxy,
                true_label=None if truth is None else truth.label,
                overlap=0.0 if place is None else float(scene.overlaps[index, place]),
            )
        )
    return findings + [
        Finding(kind=ErrorKind.MISSED, image=image, truth=a.box_xyxy, true_label=a.label)
        for place, a in enumerate(scene.objects)
        if place not in explained
    ]


def _classify(scene: _Scene, index: int) -> tuple[ErrorKind, int | None]:
    """What is wrong with a detection that matched nothing, and the object that it is about."""
    overlaps = scene.overlaps[index]
    alike = scene.true == scene.found[index]
    rules = (
        (ErrorKind.DUPLICATE, alike, MIN_OVERLAP),
        (ErrorKind.CLASS, ~alike, MIN_OVERLAP),
        (ErrorKind.LOCALISATION, alike, BACKGROUND_OVERLAP),
        (ErrorKind.BOTH, ~alike, BACKGROUND_OVERLAP),
    )
    for kind, counted, least in rules:
        values = np.where(counted, overlaps, 0.0)
        if values.max(initial=0.0) >= least:
            return kind, int(values.argmax())
    return ErrorKind.BACKGROUND, None
