import json
import sys
import time
from dataclasses import FrozenInstanceError, replace
from types import ModuleType, SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from vovnet.results import Classification, Detections, MaskCrop, encode_masks

NAMES = ("cell", "platelet", "nucleus")
IMAGE_SIZE = (40, 60)


def fields(count: int = 3, *, with_masks: bool = True) -> dict[str, Any]:
    """Return the arguments of valid detections in an image of 40 x 60."""
    left_top = np.arange(count, dtype=np.float32)[:, None] * np.array([4, 3], dtype=np.float32)
    square = np.ones((5, 6), dtype=np.bool_)
    square[0, 0] = False
    crops = tuple(MaskCrop(x=4 * i, y=3 * i, pixels=square) for i in range(count))
    return {
        "boxes_xyxy": np.concatenate([left_top, left_top + 7.25], axis=1),
        "scores": np.linspace(1, 0, count, dtype=np.float32),
        "labels": np.arange(count, dtype=np.int64) % 3,
        "image_size": IMAGE_SIZE,
        "class_names": NAMES,
        "masks": crops if with_masks else None,
        "mask_scores": np.linspace(0.9, 0, count, dtype=np.float32) if with_masks else None,
    }


def detections(count: int = 3, *, with_masks: bool = True) -> Detections:
    return Detections(**fields(count, with_masks=with_masks))


def without_mask_scores(value: Detections) -> Detections:
    return replace(value, mask_scores=None)


def assert_same(left: Detections, right: Detections) -> None:
    assert json.dumps(left.to_json()) == json.dumps(right.to_json())
    np.testing.assert_array_equal(left.boxes_xyxy, right.boxes_xyxy)
    np.testing.assert_array_equal(left.scores, right.scores)
    assert (left.mask_scores is None) == (right.mask_scores is None)
    if left.mask_scores is not None and right.mask_scores is not None:
        np.testing.assert_array_equal(left.mask_scores, right.mask_scores)


@st.composite
def crops_in_images(draw: st.DrawFn) -> tuple[MaskCrop, tuple[int, int]]:
    """Draw a crop of any place, size (also none and all) and content, and its image's size."""
    height, width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    y, x = draw(st.integers(0, height)), draw(st.integers(0, width))
    rows, columns = draw(st.integers(0, height - y)), draw(st.integers(0, width - x))
    if draw(st.booleans()):
        y, rows = 0, height
    seed = draw(st.integers(0, 2**32 - 1))
    density = draw(st.sampled_from([0.1, 0.5, 0.9]))
    pixels = np.random.default_rng(seed).random((rows, columns)) < density
    fill = draw(st.sampled_from([None, None, True, False]))
    return MaskCrop(x, y, pixels if fill is None else np.full_like(pixels, fill)), (height, width)


def dense(crop: MaskCrop, image_size: tuple[int, int]) -> np.ndarray:
    mask = np.zeros(image_size, dtype=np.bool_)
    rows, columns = crop.pixels.shape
    mask[crop.y : crop.y + rows, crop.x : crop.x + columns] = crop.pixels
    return mask


def encoded(masks: np.ndarray) -> list[dict[str, Any]]:
    """Return the reference's RLE of dense (N, H, W) masks, with str counts."""
    rles = coco_mask.encode(np.asfortranarray(masks.transpose(1, 2, 0).astype(np.uint8)))
    return [{"size": rle["size"], "counts": rle["counts"].decode("ascii")} for rle in rles]


@given(crops_in_images())
@settings(deadline=None, max_examples=200)
def test_run_lengths_equal_those_of_the_dense_mask(
    drawn: tuple[MaskCrop, tuple[int, int]],
) -> None:
    crop, image_size = drawn
    assert encode_masks([crop], image_size) == encoded(dense(crop, image_size)[None])


@pytest.mark.parametrize("order", ["C", "F"])
def test_run_lengths_of_many_masks_of_a_large_image(order: Literal["C", "F"]) -> None:
    rng = np.random.default_rng(0)
    image_size = (700, 900)
    crops = []
    for _ in range(20):
        rows, columns = rng.integers(1, [701, 901])
        pixels = np.array(rng.random((rows, columns)) < rng.random(), order=order)
        corner = rng.integers(0, [900 - columns + 1, 700 - rows + 1])
        crops.append(MaskCrop(int(corner[0]), int(corner[1]), pixels))
    expected = encoded(np.stack([dense(crop, image_size) for crop in crops]))
    assert encode_masks(crops, image_size) == expected


def test_run_lengths_of_500_objects_are_quick() -> None:
    rows, columns = np.mgrid[:30, :30]
    disc = (rows - 14.5) ** 2 + (columns - 14.5) ** 2 < 200
    crops = [MaskCrop(x=2 * i, y=i, pixels=disc) for i in range(500)]
    times_ms = []
    for _ in range(7):
        start = time.thread_time()  # other programs on the machine do not count
        encode_masks(crops, (1040, 1388))
        times_ms.append((time.thread_time() - start) * 1e3)
    assert min(times_ms) < 50


def test_valid_detections_are_kept_as_they_are() -> None:
    arguments = fields()
    made = Detections(**arguments)
    assert len(made) == 3
    assert made.boxes_xyxy is arguments["boxes_xyxy"]
    with pytest.raises(FrozenInstanceError):
        made.scores = made.scores  # type: ignore[misc]


def changed(array: np.ndarray, index: Any, value: float) -> np.ndarray:
    array = array.copy()
    array[index] = value
    return array


WRONG_FIELDS = {
    "box dtype": ({"boxes_xyxy": fields()["boxes_xyxy"].astype(np.float64)}, "float32"),
    "box shape": ({"boxes_xyxy": np.zeros((3, 5), np.float32)}, r"shape \(3, 4\).*\(3, 5\)"),
    "box count": ({"boxes_xyxy": np.zeros((2, 4), np.float32)}, r"shape \(3, 4\).*\(2, 4\)"),
    "box nan": ({"boxes_xyxy": changed(fields()["boxes_xyxy"], (1, 2), np.nan)}, "at index 1"),
    "box inf": ({"boxes_xyxy": changed(fields()["boxes_xyxy"], (1, 2), np.inf)}, "at index 1"),
    "box turned x": ({"boxes_xyxy": changed(fields()["boxes_xyxy"], (2, 0), 50)}, "left <= right"),
    "box turned y": ({"boxes_xyxy": changed(fields()["boxes_xyxy"], (2, 1), 50)}, "top <= bottom"),
    "score dtype": ({"scores": np.zeros(3)}, "scores: expected float32.*float64"),
    "score shape": ({"scores": np.zeros((3, 1), np.float32)}, r"scores: .*\(3,\)"),
    "score nan": ({"scores": changed(fields()["scores"], 2, np.nan)}, "got nan at index 2"),
    "score high": ({"scores": changed(fields()["scores"], 0, 1.5)}, r"0 to 1, got 1\.5"),
    "score low": ({"scores": changed(fields()["scores"], 1, -0.5)}, r"got -0\.5 at index 1"),
    "label dtype": ({"labels": np.zeros(3, np.int32)}, "labels: expected int64.*int32"),
    "label high": ({"labels": np.array([0, 3, 0])}, "0 to 2, got 3 at index 1"),
    "label low": ({"labels": np.array([0, 0, -1])}, "got -1 at index 2"),
    "image size": ({"image_size": (0, 60)}, r"image_size: expected .* got \(0, 60\)"),
    "image size length": ({"image_size": (40, 60, 3)}, "image_size: expected"),
    "mask score dtype": ({"mask_scores": np.zeros(3)}, "mask_scores: expected float32"),
    "mask score count": ({"mask_scores": np.zeros(2, np.float32)}, r"mask_scores: .*\(3,\)"),
    "mask score range": (
        {"mask_scores": np.array([0, 0, 1.5], np.float32)},
        r"mask_scores: expected 0 to 1, got 1\.5 at index 2",
    ),
    "mask count": ({"masks": fields()["masks"][:2]}, "masks: expected 3, one per box, got 2"),
    "mask right": (
        {"masks": (*fields()["masks"][:2], MaskCrop(55, 0, np.ones((5, 6), np.bool_)))},
        "image of 40 x 60, got 5 x 6 at row 0, column 55 at index 2",
    ),
    "mask below": (
        {"masks": (*fields()["masks"][:2], MaskCrop(0, 36, np.ones((5, 6), np.bool_)))},
        "at row 36, column 0 at index 2",
    ),
}


@pytest.mark.parametrize(("change", "message"), WRONG_FIELDS.values(), ids=WRONG_FIELDS)
def test_wrong_fields_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Detections(**(fields() | change))


@pytest.mark.parametrize(
    ("x", "y", "pixels", "message"),
    [
        (0, 0, np.ones((2, 2), np.uint8), r"expected bool of shape \(h, w\), got uint8"),
        (0, 0, np.ones(4, np.bool_), r"got bool of \(4,\)"),
        (-1, 0, np.ones((2, 2), np.bool_), "at least 0, got -1, 0"),
        (0, -1, np.ones((2, 2), np.bool_), "at least 0, got 0, -1"),
    ],
)
def test_wrong_mask_crops_are_refused(x: int, y: int, pixels: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskCrop(x, y, pixels)


def test_a_crop_may_fill_the_image() -> None:
    crop = MaskCrop(0, 0, np.ones(IMAGE_SIZE, np.bool_))
    made = Detections(**(fields(1) | {"masks": (crop,)}))
    assert made.dense_masks().all()


@pytest.mark.parametrize("with_masks", [True, False])
@pytest.mark.parametrize(
    ("index", "expected"),
    [
        (slice(None), [0, 1, 2]),
        (slice(None, None, -2), [2, 0]),
        (np.array([False, True, True]), [1, 2]),
        ([True, False, False], [0]),
        (np.zeros(3, np.bool_), []),
        (np.array([2, 0, 0], np.int32), [2, 0, 0]),
        ([-1], [2]),
        ([], []),
        (1, [1]),
        (np.int64(-3), [0]),
    ],
)
def test_indexing(index: Any, expected: list[int], with_masks: bool) -> None:
    whole = detections(with_masks=with_masks)
    part = whole[index]
    np.testing.assert_array_equal(part.boxes_xyxy, whole.boxes_xyxy[expected])
    np.testing.assert_array_equal(part.scores, whole.scores[expected])
    np.testing.assert_array_equal(part.labels, whole.labels[expected])
    assert (part.image_size, part.class_names) == (whole.image_size, whole.class_names)
    if whole.masks is None:
        assert part.masks is None
        assert part.mask_scores is None
    else:
        assert part.masks is not None
        assert part.mask_scores is not None
        assert whole.mask_scores is not None
        np.testing.assert_array_equal(part.mask_scores, whole.mask_scores[expected])
        assert all(a is whole.masks[i] for a, i in zip(part.masks, expected, strict=True))


@pytest.mark.parametrize(
    "index", [3, [-4], [0.5], np.ones(2, np.bool_), np.zeros((1, 1), np.int64), "cell"]
)
def test_indexing_outside_is_refused(index: Any) -> None:
    with pytest.raises(IndexError):
        detections()[index]


def test_iteration_yields_single_objects_and_ends() -> None:
    singles = list(detections())  # type: ignore[call-overload]
    assert [len(single) for single in singles] == [1, 1, 1]
    assert_same(Detections.concatenate(singles), detections())


@pytest.mark.parametrize("with_masks", [True, False])
def test_empty_is_a_result_like_any_other(with_masks: bool) -> None:
    whole = without_mask_scores(detections(with_masks=with_masks))
    empty = Detections.empty(IMAGE_SIZE, NAMES, with_masks=with_masks)
    assert len(empty) == 0
    assert (empty.masks is not None) == with_masks
    assert empty.to_coco(1, [1, 2, 3]) == []
    assert empty.to_json()["detections"] == []
    assert_same(empty[np.zeros(0, np.bool_)], empty)
    assert_same(Detections.concatenate([empty, whole, empty]), whole)
    assert_same(whole[:0], empty)


@given(st.integers(0, 4), st.booleans())
@settings(deadline=None)
def test_concatenate_undoes_a_cut(cut: int, with_masks: bool) -> None:
    whole = detections(4, with_masks=with_masks)
    assert_same(Detections.concatenate([whole[:cut], whole[cut:]]), whole)


def test_concatenate_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Detections.concatenate([])
    others = [
        detections(with_masks=False),
        without_mask_scores(detections()),
        Detections(**(fields() | {"image_size": (41, 60)})),
        Detections(**(fields() | {"class_names": ("a", "b", "c")})),
    ]
    for other in others:
        with pytest.raises(ValueError, match=r"parts\[1\]: expected"):
            Detections.concatenate([detections(), other])


@pytest.mark.parametrize("with_masks", [True, False])
def test_moved_into_a_larger_image(with_masks: bool) -> None:
    part = detections(with_masks=with_masks)
    whole = part.moved(7, 11, (100, 200))
    assert whole.image_size == (100, 200)
    np.testing.assert_array_equal(whole.boxes_xyxy, part.boxes_xyxy + np.array([7, 11, 7, 11]))
    np.testing.assert_array_equal(whole.scores, part.scores)
    if with_masks:
        expected = np.zeros((3, 100, 200), dtype=np.bool_)
        expected[:, 11:51, 7:67] = part.dense_masks()
        np.testing.assert_array_equal(whole.dense_masks(), expected)
        with pytest.raises(ValueError, match="expected crops inside the image"):
            part.moved(100, 0, (100, 105))


def test_to_coco() -> None:
    made = detections()
    results = made.to_coco(17, [5, 9, 1])
    assert [result["category_id"] for result in results] == [5, 9, 1]
    assert {result["image_id"] for result in results} == {17}
    assert results[1]["bbox"] == [4.0, 3.0, 7.25, 7.25]
    assert [result["score"] for result in results] == [1.0, 0.5, 0.0]
    assert [result["segmentation"] for result in results] == encoded(made.dense_masks())
    assert json.loads(json.dumps(results)) == results
    assert "segmentation" not in detections(with_masks=False).to_coco(1, [1, 2, 3])[0]
    with pytest.raises(ValueError, match="category_ids: expected 3, one per class, got 2"):
        made.to_coco(17, [5, 9])


def test_to_json() -> None:
    found = detections().to_json()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["image_size"] == [40, 60]
    assert found["class_names"] == list(NAMES)
    second = found["detections"][1]
    assert second["box_xyxy"] == [4.0, 3.0, 11.25, 10.25]
    assert (second["score"], second["label"], second["class_name"]) == (0.5, 1, "platelet")
    assert second["mask"] == encoded(detections().dense_masks())[1]
    made = detections()
    assert made.to_json(made.segmentations()) == found
    assert made.to_coco(1, [1, 2, 3], made.segmentations()) == made.to_coco(1, [1, 2, 3])
    assert "mask" not in detections(with_masks=False).to_json()["detections"][0]


def test_dense_masks_need_masks() -> None:
    with pytest.raises(ValueError, match="expected detections with masks"):
        detections(with_masks=False).dense_masks()


@pytest.mark.parametrize("with_masks", [True, False])
def test_to_supervision(monkeypatch: pytest.MonkeyPatch, with_masks: bool) -> None:
    fake = ModuleType("supervision")
    fake.Detections = SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "supervision", fake)
    made = detections(with_masks=with_masks)
    found = made.to_supervision()
    np.testing.assert_array_equal(found.xyxy, made.boxes_xyxy)
    np.testing.assert_array_equal(found.confidence, made.scores)
    np.testing.assert_array_equal(found.class_id, made.labels)
    assert found.data["class_name"].tolist() == list(NAMES)
    if with_masks:
        np.testing.assert_array_equal(found.mask, made.dense_masks())
    else:
        assert found.mask is None


def test_to_supervision_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ImportError, match="extra `vision`"):
        detections().to_supervision()


def test_classification_top_is_stable_and_ends_with_the_classes() -> None:
    made = Classification(np.array([0.25, 0.5, 0.25], dtype=np.float32), NAMES)
    assert made.top(1) == [("platelet", 0.5)]
    assert made.top(9) == [("platelet", 0.5), ("cell", 0.25), ("nucleus", 0.25)]
    with pytest.raises(ValueError, match="k: expected at least 1, got 0"):
        made.top(0)


@pytest.mark.parametrize(
    ("probabilities", "message"),
    [
        (np.zeros(3), "expected float32"),
        (np.zeros(2, np.float32), r"shape \(3,\)"),
        (np.array([0, 2, 0], np.float32), "0 to 1, got 2"),
        (np.array([0, np.nan, 0], np.float32), "got nan at index 1"),
    ],
)
def test_wrong_classifications_are_refused(probabilities: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Classification(probabilities, NAMES)
