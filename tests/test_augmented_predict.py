"""Views of an image: mirrored and scaled back exactly, and voted by hand."""

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from vovnet import Detections, Predictor
from vovnet.augmented_predict import (
    PLAIN,
    View,
    mirrored,
    parse_views,
    predict_augmented,
    scale_preprocess,
    vote,
)
from vovnet.errors import ConfigError
from vovnet.preprocess import Preprocess
from vovnet.results import MaskCrop


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def detections(
    boxes: list[list[float]], scores: list[float], labels: list[int] | None = None
) -> Detections:
    return Detections(
        boxes_xyxy=np.array(boxes, np.float32).reshape(-1, 4),
        scores=np.array(scores, np.float32),
        labels=np.array(labels or [0] * len(scores), np.int64),
        image_size=(100, 100),
        class_names=("cat", "dog"),
    )


def bright_columns(image: np.ndarray) -> Detections:
    """A fake detector that treats left and right alike: the white part of the image, and a mask."""
    columns = np.flatnonzero(image[0, :, 0] == 255)
    height = image.shape[0]
    x1, x2 = int(columns[0]), int(columns[-1]) + 1
    pixels = np.ascontiguousarray(image[:, x1:x2, 1] == 255)
    return Detections(
        boxes_xyxy=np.array([[x1, 0, x2, height]], np.float32),
        scores=np.array([0.8], np.float32),
        labels=np.zeros(1, np.int64),
        image_size=image.shape[:2],
        class_names=("cat",),
        masks=(MaskCrop(x1, 0, pixels),),
    )


def scene() -> np.ndarray:
    image = np.zeros((6, 20, 3), np.uint8)
    image[:, 3:9, 0] = 255
    image[:3, 3:5, 1] = 255  # the mask is not symmetric
    return image


def test_a_mirrored_view_finds_what_the_plain_one_finds() -> None:
    predictor = cast(Predictor, bright_columns)
    plain, image = bright_columns(scene()), scene()
    flipped = predict_augmented(predictor, image, [View(flip=True)])
    np.testing.assert_array_equal(flipped.boxes_xyxy, plain.boxes_xyxy)
    np.testing.assert_array_equal(flipped.dense_masks(), plain.dense_masks())
    both = predict_augmented(predictor, image, [PLAIN, View(flip=True)])
    assert len(both) == 1
    np.testing.assert_allclose(both.boxes_xyxy, plain.boxes_xyxy)
    np.testing.assert_array_equal(both.dense_masks(), plain.dense_masks())


def test_mirroring_twice_changes_nothing() -> None:
    found = bright_columns(scene())
    once = mirrored(found)
    assert once.boxes_xyxy.tolist() == [[11, 0, 17, 6]]
    np.testing.assert_array_equal(once.dense_masks(), found.dense_masks()[..., ::-1])
    np.testing.assert_array_equal(mirrored(once).dense_masks(), found.dense_masks())


def test_a_flip_view_is_the_mirrored_result_of_the_mirrored_image(model_folder: Path) -> None:
    predictor, image = Predictor.load(model_folder), noise(48, 64)
    expected = mirrored(predictor(np.ascontiguousarray(image[:, ::-1])))
    found = predict_augmented(predictor, image, [View(flip=True)])
    np.testing.assert_array_equal(found.boxes_xyxy, expected.boxes_xyxy)
    plain = predict_augmented(predictor, image, [PLAIN])
    np.testing.assert_array_equal(plain.boxes_xyxy, predictor(image).boxes_xyxy)


def test_views_of_another_scale_are_in_pixels_of_the_image(model_folder: Path) -> None:
    predictor, image = Predictor.load(model_folder), noise(48, 64)
    seen: list[tuple[int, ...]] = []
    infer = predictor.engine.infer

    def noted(images: Any, sizes: Any) -> Any:
        seen.append(tuple(sizes[0].tolist()))
        return infer(images, sizes)

    predictor.engine.infer = noted  # type: ignore[method-assign]
    views = [PLAIN, View(scale=2.0), View(flip=True, scale=0.5)]
    merged = predict_augmented(predictor, image, views, max_detections=7)
    assert seen == [(72, 96), (144, 192), (36, 48)]
    assert len(merged) == 7
    assert merged.image_size == (48, 64)
    assert (np.diff(merged.scores) <= 0).all()
    assert predictor.preprocess.scale == 1.5  # the predictor itself stays


def test_voting_by_hand() -> None:
    found = detections(
        [[0, 0, 10, 10], [0, 0, 10, 8], [1, 0, 11, 10], [0, 0, 10, 10], [50, 50, 60, 60]],
        [0.6, 0.3, 0.1, 0.9, 0.2],
        [0, 0, 0, 1, 0],
    )
    merged = vote(found)
    assert merged.labels.tolist() == [1, 0, 0]
    np.testing.assert_allclose(merged.scores, [0.9, 0.6, 0.2])
    # Overlaps of 0.8 and 9/11 with the best: 0.6, 0.3 and 0.1 of the boxes.
    expected = [0.1, 0.0, 0.6 * 10 + 0.3 * 10 + 0.1 * 11, 0.6 * 10 + 0.3 * 8 + 0.1 * 10]
    np.testing.assert_allclose(merged.boxes_xyxy[1], expected, rtol=1e-6)
    np.testing.assert_allclose(merged.boxes_xyxy[0], [0, 0, 10, 10])
    np.testing.assert_allclose(merged.boxes_xyxy[2], [50, 50, 60, 60])


def test_below_the_overlap_both_stay() -> None:
    boxes = [[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 5.9]]
    assert len(vote(detections(boxes, [0.9, 0.8]))) == 2
    boxes[1][3] = 6.0
    assert len(vote(detections(boxes, [0.9, 0.8]))) == 1


def test_nothing_empty_boxes_and_scores_of_zero() -> None:
    assert len(vote(detections([], []))) == 0
    found = vote(detections([[5, 5, 5, 5], [5, 5, 5, 5], [0, 0, 4, 4]], [0.5, 0.4, 0.0]))
    assert len(found) == 3


def test_no_view_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        predict_augmented(cast(Predictor, bright_columns), scene(), [])


def test_views_as_text() -> None:
    assert parse_views("flip") == (PLAIN, View(flip=True))
    views = parse_views(" flip, 0.8 ,1.25,flip*0.8,0.8,1")
    expected = (View(True), View(scale=0.8), View(scale=1.25), View(True, 0.8))
    assert views == (PLAIN, *expected)


@pytest.mark.parametrize("text", ["", "flop", "0", "11", "-1", "nan", "flip*flip", "1*2", "flip*"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"tta: expected flip, scales of 0\.1\.\.10"):
        parse_views(text)


def test_scaled_preprocesses() -> None:
    assert scale_preprocess(Preprocess(scale=1.5), 0.5).output_size(100, 200) == (75, 150)
    short = Preprocess(short_side=100, max_long_side=150)
    assert scale_preprocess(short, 1.2).output_size(50, 200) == (45, 180)
    assert scale_preprocess(Preprocess(square=320), 1.25).output_size(50, 200) == (400, 400)
    assert scale_preprocess(short, 0.001).output_size(50, 200) == (1, 1)
