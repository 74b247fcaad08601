"""Errors by kind, made one by one; figures equal to evaluate_coco's; counts that add up."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vovnet.data.labels import Annotation, DetectionData, ImageRecord
from vovnet.error_analysis import (
    ErrorKind,
    analyse_errors,
    class_figures,
    coco_curves,
)
from vovnet.evaluation import evaluate_coco

Box = tuple[float, float, float, float]
A, B, C, D = (0, 0, 20, 20), (40, 0, 60, 20), (0, 40, 20, 60), (40, 40, 60, 60)


def make(*images: list[tuple[Box, int]], ignored: tuple[int, ...] = ()) -> DetectionData:
    """Images with (box, label) each; the places in `ignored` of the first are difficult."""
    records = []
    for number, entries in enumerate(images):
        made = tuple(
            Annotation(
                i,
                label,
                box,
                None,
                (box[2] - box[0]) * (box[3] - box[1]),
                False,
                is_difficult=number == 0 and i in ignored,
            )
            for i, (box, label) in enumerate(entries)
        )
        records.append(ImageRecord(10 + number, Path(f"{number}.png"), 100, 100, made))
    return DetectionData(tuple(records), ("cat", "dog", "cow"), (5, 2, 9), Path("made"))


def found(box: Box, label: int, score: float = 0.9, image: int = 10) -> dict[str, Any]:
    x1, y1, x2, y2 = box
    bbox = [x1, y1, x2 - x1, y2 - y1]
    return {"image_id": image, "category_id": (5, 2, 9)[label], "bbox": bbox, "score": score}


CASES: list[tuple[ErrorKind, dict[str, Any], int | None, float, int]] = [
    # kind, detection beside one of A as cat, label of the object it is about, overlap, missed
    (ErrorKind.DUPLICATE, found((0, 0, 20, 18), 0, 0.8), 0, 0.9, 1),
    (ErrorKind.CLASS, found(B, 2, 0.8), 1, 1.0, 0),
    (ErrorKind.LOCALISATION, found((40, 0, 60, 9), 1, 0.8), 1, 0.45, 0),
    (ErrorKind.BOTH, found((40, 0, 60, 9), 2, 0.8), 1, 0.45, 1),
    (ErrorKind.BACKGROUND, found((70, 70, 90, 90), 0, 0.8), None, 0.0, 1),
    (ErrorKind.BACKGROUND, found((40, 0, 60, 1.9), 1, 0.8), None, 0.0, 1),
]


@pytest.mark.parametrize(("kind", "wrong", "label", "overlap", "missed"), CASES)
def test_each_kind_by_itself(
    kind: ErrorKind, wrong: dict[str, Any], label: int | None, overlap: float, missed: int
) -> None:
    data = make([(A, 0), (B, 1)])
    errors = analyse_errors(data, [wrong, found(A, 0)], min_score=0.5)
    assert errors.num_correct == 1
    (finding,) = errors.of_kind(kind)
    assert finding.true_label == label
    assert finding.overlap == pytest.approx(overlap)
    assert finding.score == 0.8
    assert len(errors.of_kind(ErrorKind.MISSED)) == missed
    assert len(errors.findings) == 1 + missed


def test_confusions_by_hand() -> None:
    data = make([(A, 0), (B, 1), (C, 1), (D, 2)], [(A, 0)])
    predictions = [
        found(A, 0),
        found(B, 2),  # a dog taken for a cow
        found((0, 0, 20, 19), 1, 0.6),  # on A, which is found: background
        found(D, 2, 0.4),  # below the score: missed
        found(A, 0, 0.7, image=11),
    ]
    errors = analyse_errors(data, predictions, min_score=0.5)
    expected = [[2, 0, 0, 0], [0, 0, 1, 1], [0, 0, 0, 1], [0, 1, 0, 0]]
    assert errors.confusion.tolist() == expected
    assert errors.num_correct == 2
    assert [f.true_label for f in errors.of_kind(ErrorKind.MISSED)] == [1, 2]


def test_a_detection_finds_its_own_class_before_another() -> None:
    data = make([(A, 0), ((0, 0, 20, 18), 1)])
    predictions = [found(A, 1, 0.9), found(A, 0, 0.8)]
    errors = analyse_errors(data, predictions, min_score=0.5)
    assert errors.confusion.diagonal().tolist() == [1, 1, 0, 0]
    assert not errors.findings


def test_what_is_difficult_counts_for_nothing() -> None:
    data = make([(A, 0), (B, 1)], ignored=(1,))
    errors = analyse_errors(data, [found(A, 0), found(B, 1)], min_score=0.5)
    assert not errors.findings
    assert errors.confusion.sum() == 1


def test_the_best_come_first() -> None:
    data = make([(A, 0), (B, 1), ((30, 30, 90, 90), 1)])
    wrong = [found((95, 95, 99, 99), 0, score) for score in (0.6, 0.9, 0.7)]
    errors = analyse_errors(data, wrong, min_score=0.5)
    assert [f.score for f in errors.of_kind(ErrorKind.BACKGROUND)] == [0.9, 0.7, 0.6]
    assert errors.of_kind(ErrorKind.MISSED)[0].truth == (30, 30, 90, 90)


def test_nothing_found_and_nothing_there() -> None:
    errors = analyse_errors(make([]), [], min_score=0.5)
    assert not errors.findings
    assert errors.confusion.sum() == 0
    errors = analyse_errors(make([], [(A, 0)]), [found(A, 0)], min_score=0.5)
    assert len(errors.findings) == 2


def random_case(seed: int) -> tuple[DetectionData, list[dict[str, Any]]]:
    generator = np.random.default_rng(seed)
    images, predictions = [], []
    for number in range(4):
        entries = []
        for _ in range(int(generator.integers(0, 12))):
            x, y = generator.uniform(0, 50, 2)
            w, h = generator.uniform(5, 50, 2)
            label = int(generator.integers(3))
            entries.append(((x, y, x + w, y + h), label))
            for _ in range(int(generator.integers(0, 3))):
                dx, dy = generator.normal(0, 4, 2)
                guess = label if generator.random() < 0.8 else int(generator.integers(3))
                box = (x + dx, y + dy, x + dx + w, y + dy + h)
                predictions.append(found(box, guess, float(generator.random()), 10 + number))
        images.append(entries)
    return make(*images, ignored=(0, 3)), predictions


@pytest.mark.parametrize("seed", range(8))
def test_counts_add_up_and_agree_with_pycocotools(seed: int) -> None:
    data, predictions = random_case(seed)
    errors = analyse_errors(data, predictions, min_score=0.3)
    shown = [p for p in predictions if p["score"] >= 0.3]
    objects = [a for image in data.images for a in image.annotations if not a.is_ignored]
    rows = np.bincount([a.label for a in objects], minlength=3)
    assert errors.confusion[:3].sum(1).tolist() == rows.tolist()
    assert errors.confusion.diagonal()[:3].sum() == errors.num_correct
    wrong = [f for f in errors.findings if f.kind is not ErrorKind.MISSED]
    assert errors.confusion[:, :3].sum() == errors.num_correct + len(wrong) <= len(shown)
    # The recall at overlap 0.5 of what is shown is that of the matches.
    curves = coco_curves(data, shown, iou_type="bbox", max_detections=100)
    recall = curves.recall[curves.place(0.5), :, 0]
    hits = errors.confusion.diagonal()[:3][rows > 0] / rows[rows > 0]
    np.testing.assert_allclose(recall[rows > 0], hits)


@pytest.mark.parametrize("seed", range(4))
def test_figures_are_those_of_evaluate_coco(seed: int) -> None:
    data, predictions = random_case(seed)
    expected = evaluate_coco(data, predictions, iou_types=("bbox",)).by_type["bbox"]
    curves = coco_curves(data, predictions, iou_type="bbox", max_detections=100)
    everything, *classes = class_figures(curves)
    assert everything.ap == expected.ap
    assert (everything.ap50, everything.ap75) == (expected.ap50, expected.ap75)
    by_area = (expected.ap_small, expected.ap_medium, expected.ap_large)
    np.testing.assert_array_equal(everything.ap_by_area, by_area)
    assert everything.ar == expected.ar
    np.testing.assert_array_equal([c.ap for c in classes], expected.ap_per_class)
    assert [c.name for c in classes] == list(data.class_names)


def test_classes_keep_their_figures_where_their_ids_are_not_sorted() -> None:
    data, predictions = random_case(1)
    assert list(data.category_ids) != sorted(data.category_ids)
    figures = evaluate_coco(data, predictions, iou_types=("bbox",)).by_type["bbox"]
    for label, category_id in enumerate(data.category_ids):
        alone = DetectionData(
            tuple(
                replace(
                    image,
                    annotations=tuple(
                        replace(a, label=0) for a in image.annotations if a.label == label
                    ),
                )
                for image in data.images
            ),
            (data.class_names[label],),
            (category_id,),
            data.annotation_file,
        )
        mine = [p for p in predictions if p["category_id"] == category_id]
        expected = evaluate_coco(alone, mine, iou_types=("bbox",)).by_type["bbox"].ap
        assert figures.ap_per_class[label] == pytest.approx(expected, nan_ok=True)
