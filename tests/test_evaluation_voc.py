"""VOC's AP against the development kit's loops restated, and counts made by hand."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vovnet.data.labels import Annotation, DetectionData, ImageRecord
from vovnet.evaluation_voc import VocMetric, evaluate_voc

Box = tuple[float, float, float, float]


def make(boxes: list[list[tuple[Box, int, bool]]]) -> DetectionData:
    """Images with (box, label, difficult) each."""
    records = [
        ImageRecord(
            10 + number,
            Path(f"{number}.png"),
            100,
            100,
            tuple(
                Annotation(i, label, box, None, 1.0, False, is_difficult=difficult)
                for i, (box, label, difficult) in enumerate(entries)
            ),
        )
        for number, entries in enumerate(boxes)
    ]
    return DetectionData(tuple(records), ("cat", "dog"), (5, 2), Path("made"))


def found(image: int, box: Box, score: float, category: int = 5) -> dict[str, Any]:
    x1, y1, x2, y2 = box
    bbox = [x1, y1, x2 - x1, y2 - y1]
    return {"image_id": image, "category_id": category, "bbox": bbox, "score": score}


def inclusive_overlap(a: Box, b: Box) -> float:
    """As the kit computes it: corners counted from 1, the last pixel inside."""
    ax1, ay1, ax2, ay2 = a[0] + 1, a[1] + 1, a[2], a[3]
    bx1, by1, bx2, by2 = b[0] + 1, b[1] + 1, b[2], b[3]
    width = min(ax2, bx2) - max(ax1, bx1) + 1
    height = min(ay2, by2) - max(ay1, by1) + 1
    if width <= 0 or height <= 0:
        return 0.0
    union = (ax2 - ax1 + 1) * (ay2 - ay1 + 1) + (bx2 - bx1 + 1) * (by2 - by1 + 1)
    return width * height / (union - width * height)


def restated(
    data: DetectionData, predictions: list[dict[str, Any]], label: int, kind: str
) -> float:
    """The kit's loop over one class."""
    objects = {
        record.id: [
            [a.box_xyxy, a.is_difficult, False] for a in record.annotations if a.label == label
        ]
        for record in data.images
    }
    positives = sum(not o[1] for entries in objects.values() for o in entries)
    if not positives:
        return math.nan
    mine = [p for p in predictions if p["category_id"] == data.category_ids[label]]
    true, false = [], []
    for p in sorted(mine, key=lambda p: -p["score"]):
        x, y, w, h = p["bbox"]
        best, chosen = -1.0, None
        for entry in objects[p["image_id"]]:
            overlap = inclusive_overlap((x, y, x + w, y + h), entry[0])
            if overlap > best:
                best, chosen = overlap, entry
        hit = miss = 0
        if chosen is not None and best >= 0.5:
            if not chosen[1]:
                if chosen[2]:
                    miss = 1
                else:
                    hit, chosen[2] = 1, True
        else:
            miss = 1
        true.append(hit)
        false.append(miss)
    recall, precision = [], []
    for k in range(len(true)):
        t, f = sum(true[: k + 1]), sum(false[: k + 1])
        recall.append(t / positives)
        precision.append(t / (t + f) if t + f else 0.0)
    if kind == "voc07":
        total = 0.0
        for tenth in range(11):
            reached = [p for r, p in zip(recall, precision, strict=True) if r >= tenth / 10 - 1e-9]
            total += max(reached, default=0.0) / 11
        return total
    mrec, mpre = [0.0, *recall, 1.0], [0.0, *precision, 0.0]
    for i in range(len(mpre) - 2, -1, -1):
        mpre[i] = max(mpre[i], mpre[i + 1])
    return sum((mrec[i + 1] - mrec[i]) * mpre[i + 1] for i in range(len(mrec) - 1))


def random_case(seed: int) -> tuple[DetectionData, list[dict[str, Any]]]:
    generator = np.random.default_rng(seed)

    def box() -> Box:
        x, y = generator.integers(0, 60, 2)
        w, h = generator.integers(5, 40, 2)
        return float(x), float(y), float(x + w), float(y + h)

    images = [
        [(box(), int(generator.integers(2)), bool(generator.random() < 0.25)) for _ in range(count)]
        for count in (6, 0, 9, 3)
    ]
    predictions = []
    for number, entries in enumerate(images):
        for (x1, y1, x2, y2), label, _ in entries:
            for _ in range(int(generator.integers(0, 3))):
                dx, dy = generator.normal(0, 3, 2)
                moved = (x1 + dx, y1 + dy, x2 + dx, y2 + dy)
                category = (5, 2)[label if generator.random() < 0.9 else 1 - label]
                predictions.append(found(10 + number, moved, float(generator.random()), category))
        predictions.append(found(10 + number, box(), float(generator.random())))
    return make(images), predictions


@pytest.mark.parametrize("metric", ["voc07", "voc12"])
@pytest.mark.parametrize("seed", range(6))
def test_equal_to_the_kit(metric: VocMetric, seed: int) -> None:
    data, predictions = random_case(seed)
    result = evaluate_voc(data, predictions, metric=metric)
    expected = [restated(data, predictions, label, metric) for label in range(2)]
    assert result.ap_per_class == pytest.approx(expected, abs=1e-12, nan_ok=True)
    assert result.mean_ap == pytest.approx(np.nanmean(expected), abs=1e-12)
    assert result.num_objects == sum(
        not a.is_difficult for image in data.images for a in image.annotations
    )


def test_by_hand() -> None:
    a, b, c = (0.0, 0.0, 10.0, 10.0), (20.0, 0.0, 30.0, 10.0), (50.0, 50.0, 60.0, 60.0)
    data = make([[(a, 0, False), (b, 0, False), (c, 0, True)]])
    predictions = [
        found(10, a, 0.9),  # true
        found(10, (0, 0, 10, 9), 0.8),  # the same again: false
        found(10, c, 0.7),  # difficult: nothing
        found(10, (70, 70, 80, 80), 0.6),  # false
        found(10, (20, 0, 30, 5), 0.5),  # overlap of exactly one half: true
    ]
    # Precision 1 to a recall of a half, then 2 of 4.
    eleven = evaluate_voc(data, predictions, metric="voc07")
    assert eleven.ap_per_class[0] == pytest.approx((6 * 1.0 + 5 * 0.5) / 11)
    everything = evaluate_voc(data, predictions, metric="voc12")
    assert everything.ap_per_class[0] == pytest.approx(0.75)
    assert math.isnan(everything.ap_per_class[1])
    assert everything.mean_ap == pytest.approx(0.75)
    assert everything.num_objects == 2


def test_a_recall_of_exactly_three_tenths_reaches_the_point() -> None:
    boxes = [(10.0 * i, 0.0, 10.0 * i + 8, 8.0) for i in range(10)]
    data = make([[(box, 0, False) for box in boxes]])
    predictions = [found(10, box, 0.9) for box in boxes[:3]]
    assert evaluate_voc(data, predictions, metric="voc07").mean_ap == pytest.approx(4 / 11)


def test_nothing_found_and_nothing_to_find() -> None:
    data = make([[((0, 0, 9, 9), 0, False)], []])
    assert evaluate_voc(data, [], metric="voc12").mean_ap == 0
    empty = replace(data, images=data.images[1:])
    result = evaluate_voc(empty, [found(11, (0, 0, 5, 5), 0.5)], metric="voc07")
    assert math.isnan(result.mean_ap)
    assert result.to_dict()["mean_ap"] is None
    assert "mean n/a" in result.format()


def test_its_lines_and_its_json() -> None:
    data = make([[((0, 0, 9, 9), 0, False)]])
    result = evaluate_voc(data, [found(10, (0, 0, 9, 9), 0.5)], metric="voc12")
    lines = result.format().splitlines()
    assert lines[0] == "VOC AP (voc12: all points) at overlap 0.5 over 1 images, 1 objects"
    assert lines[1:] == ["mean 1.000", "cat  1.000", "dog  n/a"]
    assert result.to_dict()["ap_per_class"] == {"cat": 1.0, "dog": None}


@pytest.mark.parametrize("change", [{"image_id": 99}, {"category_id": 7}])
def test_results_of_something_else_are_refused(change: dict[str, int]) -> None:
    data = make([[((0, 0, 9, 9), 0, False)]])
    with pytest.raises(ValueError, match=r"predictions\[0\]: expected an image and a category"):
        evaluate_voc(data, [found(10, (0, 0, 9, 9), 0.5) | change], metric="voc07")
