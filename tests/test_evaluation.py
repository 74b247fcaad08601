import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_api
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from vovnet.data.coco import to_coco_dict
from vovnet.data.labels import Annotation, DetectionData, ImageRecord
from vovnet.evaluation import (
    _collect_matches,
    _count_score,
    evaluate_coco,
    match_image,
    predict_images,
    resampled_precision,
)
from vovnet.results import Detections, MaskCrop

SIZE = 240


def encode(box: tuple[float, float, float, float]) -> dict[str, Any]:
    """An ellipse in the box, as RLE."""
    x1, y1, x2, y2 = box
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    inside = ((x - (x1 + x2) / 2) / (x2 - x1)) ** 2 + ((y - (y1 + y2) / 2) / (y2 - y1)) ** 2 < 0.25
    return mask_api.encode(np.asfortranarray(inside.astype(np.uint8)))


def make_data(
    *, images: int = 6, objects: int = 12, seed: int = 0, category_ids: tuple[int, ...] = (3, 8)
) -> DetectionData:
    """Random ellipses, a tenth of them crowds, ids from 0 on, the last image without objects."""
    generator = np.random.default_rng(seed)
    records, next_id = [], 0
    for number in range(images):
        annotations = []
        for _ in range(objects if number < images - 1 else 0):
            size = generator.uniform(8, 200, 2)
            x1, y1 = generator.uniform(0, SIZE - size)
            box = (float(x1), float(y1), float(x1 + size[0]), float(y1 + size[1]))
            rle = encode(box)
            annotations.append(
                Annotation(
                    id=next_id,
                    label=int(generator.integers(len(category_ids))),
                    box_xyxy=box,
                    segmentation={"size": rle["size"], "counts": rle["counts"]},
                    area=float(mask_api.area(rle)),
                    is_crowd=bool(generator.random() < 0.1),
                )
            )
            next_id += 1
        path = Path(f"{number}.png")
        records.append(ImageRecord(10 * number, path, SIZE, SIZE, tuple(annotations)))
    names = tuple(f"class {category_id}" for category_id in category_ids)
    return DetectionData(tuple(records), names, category_ids, Path("made.json"))


def make_predictions(
    data: DetectionData, *, seed: int = 1, false: int = 5, jitter: float = 4.0
) -> list[dict[str, Any]]:
    """Most objects a little off, some with the wrong class, and some that are not there."""
    generator = np.random.default_rng(seed)
    predictions = []
    for record in data.images:
        boxes = [(a.box_xyxy, a.label) for a in record.annotations if generator.random() < 0.85]
        for _ in range(false):
            x1, y1 = generator.uniform(0, SIZE - 60, 2)
            boxes.append(((x1, y1, x1 + 40, y1 + 50), 0))
        for box, label in boxes:
            moved = np.array(box) + generator.normal(0, jitter, 4)
            x1, y1 = np.minimum(moved[:2], moved[2:] - 2)
            x2, y2 = moved[2:]
            label = label if generator.random() < 0.9 else 0
            rle = encode((x1, y1, x2, y2))
            predictions.append(
                {
                    "image_id": record.id,
                    "category_id": data.category_ids[label],
                    "bbox": [float(x1), float(y1), float(x2 - x1), float(y2 - y1)],
                    "score": float(generator.random()),
                    "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
                }
            )
    return predictions


def run_pycocotools(
    data: DetectionData, predictions: list[dict[str, Any]], iou_type: str
) -> COCOeval:
    """pycocotools in its own way: loadRes, its own limits, its own summary."""
    truth = COCO()
    content = to_coco_dict(data)
    truth.dataset = content | {
        "annotations": [a | {"id": i} for i, a in enumerate(content["annotations"], 1)]
    }
    truth.createIndex()
    # With a box in a result, loadRes takes the box's area for the mask's.
    unwanted = {"bbox": "segmentation", "segm": "bbox"}[iou_type]
    results = [{k: v for k, v in p.items() if k != unwanted} for p in predictions]
    evaluator = COCOeval(truth, truth.loadRes(results), iou_type)
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
    return evaluator


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_figures_are_those_of_pycocotools(seed, iou_type):
    data = make_data(seed=seed)
    predictions = make_predictions(data, seed=seed)
    stats = run_pycocotools(data, predictions, iou_type).stats
    found = evaluate_coco(data, predictions).by_type[iou_type]
    figures = [found.ap, found.ap50, found.ap75, found.ap_small, found.ap_medium, found.ap_large]
    np.testing.assert_array_equal([*figures, found.ar], [*stats[:6], stats[8]])
    assert 0.05 < found.ap < 0.9  # neither all nor nothing


def test_matching_is_that_of_pycocotools():
    data = make_data(images=3, objects=25, seed=4)
    # Coarse boxes and scores: many overlaps and scores are exactly equal.
    predictions = [
        p | {"bbox": [8 * round(v / 8) or 8 for v in p["bbox"]], "score": round(p["score"], 1)}
        for p in make_predictions(data, false=40)
    ]
    predictions += [p | {"score": 0.5} for p in predictions[::2]]
    evaluator = run_pycocotools(data, predictions, "bbox")
    matched = 0
    for category_id in data.category_ids:
        for area_range in evaluator.params.areaRng:
            for image in data.images:
                arguments = (image.id, category_id, area_range, 100)
                found = match_image(evaluator, *arguments)
                expected = evaluator.evaluateImg(*arguments)
                assert (found is None) == (expected is None)
                for name in found or ():
                    values = np.asarray(expected[name])
                    values = values.astype(bool) if name == "dtMatches" else values
                    np.testing.assert_array_equal(found[name], values)
                matched += 0 if found is None else int(found["dtMatches"].sum())
    assert matched > 200


def test_nothing_is_printed(capsys):
    data = make_data(images=2)
    evaluate_coco(data, make_predictions(data))
    assert capsys.readouterr().out == ""


def average_precision(data: DetectionData, predictions: list[dict[str, Any]], limit: int) -> float:
    """Box AP of one class without crowds, restated: one overlap at a time, one image at a time."""
    recalls = np.linspace(0, 1, 101)
    num_objects = sum(len(record.annotations) for record in data.images)
    values = []
    for threshold in np.arange(0.5, 1.0, 0.05):
        scores, hits = [], []
        for record in data.images:
            own = [p for p in predictions if p["image_id"] == record.id]
            own = sorted(own, key=lambda p: -p["score"])[:limit]
            truth = np.array([annotation.box_xyxy for annotation in record.annotations])
            free = np.ones(len(truth))
            for prediction in own:
                overlaps = iou(corners(prediction), truth) * free
                best = int(np.argmax(overlaps))
                hits.append(overlaps[best] >= threshold)
                scores.append(prediction["score"])
                free[best] -= hits[-1]
        true = np.cumsum(np.array(hits)[np.argsort(-np.array(scores), kind="stable")])
        precision = true / np.arange(1, len(true) + 1)
        recall = true / num_objects
        values += [max(precision[recall >= r], default=0.0) for r in recalls]
    return float(np.mean(values))


def corners(prediction: dict[str, Any]) -> np.ndarray:
    x, y, width, height = prediction["bbox"]
    return np.array([x, y, x + width, y + height])


def iou(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Of a box (4,) with others (N, 4), xyxy."""
    low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    shared = (high - low).clip(min=0).prod(axis=1)
    areas = (others[:, 2:] - others[:, :2]).prod(axis=1) + (box[2:] - box[:2]).prod()
    return shared / (areas - shared)


def make_grid(rows: int) -> tuple[DetectionData, list[dict[str, Any]]]:
    """Two images of rows x rows separate boxes, each found once, up to a few pixels off."""
    generator = np.random.default_rng(0)
    records, predictions = [], []
    for image_id in (1, 2):
        annotations = []
        for index in range(rows * rows):
            x, y = 20.0 * (index % rows), 20.0 * (index // rows)
            box = (x, y, x + 14, y + 14)
            annotations.append(Annotation(index, 0, box, None, 196.0, False))
            offset = generator.uniform(-3, 3, 2)
            score = float(generator.random())
            bbox = [x + offset[0], y + offset[1], 14.0, 14.0]
            entry = {"image_id": image_id, "category_id": 1, "bbox": bbox, "score": score}
            predictions.append(entry)
        records.append(ImageRecord(image_id, Path("a.png"), 500, 500, tuple(annotations)))
    return DetectionData(tuple(records), ("nucleus",), (1,), Path("made.json")), predictions


@pytest.mark.parametrize("limit", [10, 100, 500])
def test_other_limits_equal_a_restatement(limit):
    data, predictions = make_grid(11)  # 121 objects in an image
    metrics = evaluate_coco(data, predictions, iou_types=("bbox",), max_detections=limit)
    expected = average_precision(data, predictions, limit)
    assert metrics.by_type["bbox"].ap == pytest.approx(expected, abs=1e-9)
    assert f"at most {limit} detections" in metrics.format()
    assert metrics.to_dict()["max_detections"] == limit


def test_no_predictions_and_no_objects():
    data = make_data(images=3)
    figures = evaluate_coco(data, []).by_type["segm"]
    assert (figures.ap, figures.ar) == (0.0, 0.0)
    assert math.isnan(figures.best_f1)
    bare = replace(data, images=tuple(replace(image, annotations=()) for image in data.images))
    for predictions in ([], make_predictions(data)):
        metrics = evaluate_coco(bare, predictions, bootstrap=3)
        assert math.isnan(metrics.main())
        assert metrics.to_dict()["mask"]["ap"] is None
        assert "AP n/a" in metrics.format()


def test_crowds_neither_count_nor_punish():
    def annotate(number: int, box: tuple[float, float, float, float], crowd: bool) -> Annotation:
        rle = encode(box)
        segmentation = {"size": rle["size"], "counts": rle["counts"]}
        return Annotation(number, 0, box, segmentation, float(mask_api.area(rle)), crowd)

    def predict(box: tuple[float, float, float, float], score: float) -> dict[str, Any]:
        rle = encode(box)
        return {
            "image_id": 0,
            "category_id": 3,
            "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
            "score": score,
            "segmentation": rle,
        }

    objects = (annotate(0, (10, 10, 60, 60), False), annotate(1, (80, 80, 230, 230), True))
    data = make_data(images=1)
    data = replace(data, images=(replace(data.images[0], annotations=objects),))
    inside = [predict((100, 100, 150, 150), 0.9), predict((150, 150, 190, 190), 0.8)]
    outside = [predict((10, 150, 60, 200), 0.7)]
    right = [predict((10, 10, 60, 60), 0.5)]
    for iou_type in ("bbox", "segm"):
        good = evaluate_coco(data, inside + right).by_type[iou_type]
        assert (good.ap, good.best_f1) == pytest.approx((1.0, 1.0))
        assert math.isnan(good.ap_per_class[1])
        worse = evaluate_coco(data, inside + outside + right).by_type[iou_type]
        assert worse.ap == pytest.approx(0.5)


def test_masks_are_ranked_by_their_own_score():
    data = make_data(images=2, objects=4, category_ids=(1,))
    predictions = make_predictions(data, false=6)
    turned = [p | {"mask_score": 1.0 - p["score"]} for p in predictions]
    swapped = [p | {"score": 1.0 - p["score"]} for p in predictions]
    result = evaluate_coco(data, turned).by_type
    assert result["segm"] == evaluate_coco(data, swapped).by_type["segm"]
    assert result["bbox"] == evaluate_coco(data, predictions).by_type["bbox"]


def counted(labelled: list[int]) -> DetectionData:
    """Images with so many objects each, of which the count alone matters."""
    objects = [
        tuple(
            Annotation(
                id=i,
                label=0,
                box_xyxy=(0.0, 0.0, 2.0, 2.0),
                segmentation=None,
                area=4.0,
                is_crowd=False,
            )
            for i in range(count)
        )
        for count in labelled
    ]
    images = tuple(
        ImageRecord(id=i, path=Path("x"), height=9, width=9, annotations=annotations)
        for i, annotations in enumerate(objects)
    )
    return DetectionData(
        images=images, class_names=("a",), category_ids=(1,), annotation_file=Path("x")
    )


def found(image_id: int, scores: list[float]) -> list[dict[str, Any]]:
    return [{"image_id": image_id, "score": score} for score in scores]


def test_count_score_counts_every_image_alike():
    crowded = found(0, [0.9] * 50 + [0.3] * 50)  # 100 objects: right below 0.3
    sparse = [entry for i in (1, 2) for entry in found(i, [0.8, 0.4, 0.35])]  # one object each
    assert 0.4 < _count_score(crowded + sparse, counted([100, 1, 1])) <= 0.8
    assert _count_score(crowded, counted([100])) <= 0.3
    # Neither do two images decide where only one of twenty objects has a label.
    right = [entry for i in range(6) for entry in found(i, [0.5] * 20)]
    assert _count_score(right, counted([20, 20, 20, 20, 1, 1])) <= 0.5


def test_count_score_is_the_middle_of_equals_and_takes_part_in_what_it_shows():
    assert _count_score(found(0, [0.6, 0.2]), counted([1])) == pytest.approx(0.41)
    assert _count_score(found(0, [0.5, 0.5, 0.49]), counted([2])) == 0.5


def test_count_score_without_detections_or_objects():
    assert math.isnan(_count_score([], counted([3])))
    assert math.isnan(_count_score(found(0, [0.5]), counted([0])))


def test_best_f1_is_that_of_its_threshold():
    data, predictions = make_grid(5)
    wrong = [p | {"bbox": [490.0, 490.0, 5.0, 5.0], "score": 0.3} for p in predictions[:20]]
    figures = evaluate_coco(data, predictions + wrong, iou_types=("bbox",)).by_type["bbox"]
    shown = [p for p in predictions + wrong if p["score"] >= figures.best_f1_score]
    again = evaluate_coco(data, shown, iou_types=("bbox",)).by_type["bbox"]
    assert again.best_f1 == figures.best_f1
    hits = 0
    for prediction in shown:
        image = next(image for image in data.images if image.id == prediction["image_id"])
        boxes = np.array([annotation.box_xyxy for annotation in image.annotations])
        hits += bool(iou(corners(prediction), boxes).max() >= 0.5)
    assert figures.best_f1 == pytest.approx(2 * hits / (len(shown) + 50))


def weighted_ap(
    data: DetectionData, predictions: list[dict[str, Any]], weights: list[int]
) -> float:
    evaluator = run_pycocotools(data, predictions, "bbox")
    values = [
        resampled_precision(entry, np.array(weights)) for entry in _collect_matches(evaluator)
    ]
    return float(np.mean([value for value in values if value is not None]))


def test_a_resample_equals_the_data_set_it_stands_for():
    data = make_data(images=5)
    predictions = make_predictions(data)
    whole = evaluate_coco(data, predictions).by_type["bbox"].ap
    assert weighted_ap(data, predictions, [1] * 5) == pytest.approx(whole, abs=1e-12)
    weights = [3, 0, 1, 2, 1]
    images, copies = [], []
    for image, weight in zip(data.images, weights, strict=True):
        for copy in range(weight):
            image_id = image.id + copy + 1
            images.append(replace(image, id=image_id))
            copies += [p | {"image_id": image_id} for p in predictions if p["image_id"] == image.id]
    expected = evaluate_coco(replace(data, images=tuple(images)), copies).by_type["bbox"].ap
    assert weighted_ap(data, predictions, weights) == pytest.approx(expected, abs=1e-12)


def test_intervals_hold_the_figure_and_repeat():
    data = make_data(images=8, objects=4)
    predictions = make_predictions(data)
    metrics = evaluate_coco(data, predictions, bootstrap=30, seed=3)
    for figures in metrics.by_type.values():
        low, high = figures.ap_interval
        assert low < figures.ap < high
        low, high = figures.ap50_interval
        assert low < figures.ap50 < high
    assert metrics == evaluate_coco(data, predictions, bootstrap=30, seed=3)
    assert metrics != evaluate_coco(data, predictions, bootstrap=30, seed=4)
    assert "95 % of 30 resamples" in metrics.format()
    assert metrics.to_dict()["mask"]["ap_interval"] == list(metrics.by_type["segm"].ap_interval)


def without_mask(predictions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in p.items() if k != "segmentation"} for p in predictions]


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda p: [p[0] | {"image_id": 77}], {}, r"predictions\[0\]: .*made\.json, got 77"),
        (without_mask, {}, r"predictions\[0\]: expected a segmentation as RLE .* got NoneType"),
        (lambda p: p, {"max_detections": 0}, "max_detections >= 1"),
        (lambda p: p, {"bootstrap": -1}, "bootstrap >= 0"),
    ],
)
def test_wrong_arguments_are_named(
    change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]],
    options: dict[str, int],
    message: str,
):
    data = make_data(images=2)
    with pytest.raises(ValueError, match=message):
        evaluate_coco(data, change(make_predictions(data)), **options)


def find_square(class_names: tuple[str, ...]) -> Callable[[np.ndarray], Detections]:
    def predict(image: np.ndarray) -> Detections:
        return Detections(
            boxes_xyxy=np.array([[2, 3, 12, 13]], dtype=np.float32),
            scores=np.array([0.5], dtype=np.float32),
            labels=np.array([1]),
            image_size=image.shape[:2],
            class_names=class_names,
            masks=(MaskCrop(x=2, y=3, pixels=np.ones((10, 10), dtype=bool)),),
            mask_scores=np.array([0.25], dtype=np.float32),
        )

    return predict


def test_predictions_of_a_data_set(tmp_path):
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    image = ImageRecord(5, tmp_path / "a.png", 20, 30, ())
    data = DetectionData((image,), ("cat", "dog"), (3, 8), Path("made.json"))
    ((result,),) = predict_images(find_square(("cat", "dog")), data)
    assert (result["image_id"], result["category_id"]) == (5, 8)
    assert (result["bbox"], result["score"], result["mask_score"]) == ([2, 3, 10, 10], 0.5, 0.25)
    with pytest.raises(ValueError, match=r"expected the classes .*dog.* got .*bird"):
        list(predict_images(find_square(("cat", "bird")), data))
