import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vovnet.drawing import FEW_OBJECTS, draw_detections
from vovnet.results import Detections, MaskCrop

SIZE = (400, 600)
ALPHA = 0.4


def disc(diameter: int = 30) -> np.ndarray:
    rows, columns = np.mgrid[:diameter, :diameter] - (diameter - 1) / 2
    return np.asarray(rows**2 + columns**2 < (diameter / 2) ** 2)


def on_a_grid(
    count: int,
    *,
    size: tuple[int, int] = SIZE,
    names: tuple[str, ...] = ("nucleus",),
    with_masks: bool = True,
    step: int = 40,
) -> Detections:
    """Return discs of 30 pixels that do not touch, `step` apart, labels in turn."""
    per_row = size[1] // step
    corners = [(step * (i % per_row), step * (i // per_row)) for i in range(count)]
    boxes = np.array([(x, y, x + 30, y + 30) for x, y in corners], dtype=np.float32)
    return Detections(
        boxes_xyxy=boxes.reshape(-1, 4),
        scores=np.linspace(0.95, 0.5, count, dtype=np.float32),
        labels=np.arange(count, dtype=np.int64) % len(names),
        image_size=size,
        class_names=names,
        masks=tuple(MaskCrop(x, y, disc()) for x, y in corners) if with_masks else None,
    )


def ground(size: tuple[int, int] = SIZE, level: int = 60) -> np.ndarray:
    return np.full((*size, 3), level, dtype=np.uint8)


def draw(detections: Detections, **options: Any) -> np.ndarray:
    return draw_detections(ground(detections.image_size), detections, **options)


def changed(drawn: np.ndarray) -> np.ndarray:
    """Return (H, W), True where the picture differs from the even ground."""
    return np.asarray((drawn != 60).any(axis=2))


@pytest.mark.parametrize("with_masks", [True, False])
def test_nothing_found_gives_an_equal_copy(with_masks: bool) -> None:
    image = ground()
    drawn = draw_detections(image, Detections.empty(SIZE, ("a",), with_masks=with_masks))
    np.testing.assert_array_equal(drawn, image)
    assert not np.shares_memory(drawn, image)


@pytest.mark.parametrize("with_masks", [True, False])
@pytest.mark.parametrize("names", [("a",), ("a", "b")])
def test_the_input_stays_and_the_output_is_its_like(with_masks: bool, names: tuple[str]) -> None:
    image = ground()
    image.flags.writeable = False
    drawn = draw_detections(image, on_a_grid(5, names=names, with_masks=with_masks))
    assert drawn.shape == image.shape
    assert drawn.dtype == np.uint8
    assert drawn.flags.writeable
    assert (image == 60).all()
    assert changed(drawn).any()


def test_masks_are_drawn_where_they_are_and_nowhere_else() -> None:
    detections = on_a_grid(20)
    drawn = draw(detections)
    np.testing.assert_array_equal(changed(drawn), detections.dense_masks().any(axis=0))


def test_masks_are_blended_inside_and_outlined_at_full_strength() -> None:
    detections = on_a_grid(20)
    drawn = draw(detections, mask_alpha=ALPHA).astype(int)
    outline, inside = drawn[14, 40], drawn[14, 54]
    np.testing.assert_allclose(inside, 60 + ALPHA * (outline - 60), atol=0.51)
    assert np.ptp(outline) > 60
    unfilled = draw(detections, mask_alpha=0)
    assert (unfilled[14, 54] == 60).all()
    np.testing.assert_array_equal(unfilled[14, 40], outline)
    np.testing.assert_array_equal(draw(detections, mask_alpha=1)[14, 54], outline)


def test_a_small_object_lies_over_a_large_one_whatever_their_order() -> None:
    large, small = MaskCrop(0, 0, np.ones((60, 60), np.bool_)), MaskCrop(20, 20, disc())
    boxes = np.array([[0, 0, 60, 60], [20, 20, 50, 50]], dtype=np.float32)
    for order in ([0, 1], [1, 0]):
        detections = Detections(
            boxes_xyxy=boxes[order],
            scores=np.full(2, 0.5, np.float32),
            labels=np.array([0, 1])[order],
            image_size=SIZE,
            class_names=("large", "small"),
            masks=(large, small) if order[0] == 0 else (small, large),
        )
        drawn = draw(detections, show_labels=False)
        assert not np.array_equal(drawn[35, 35], drawn[10, 10])


def test_one_class_has_a_colour_for_each_object() -> None:
    drawn = draw(on_a_grid(100), mask_alpha=1)
    colours = {
        tuple(drawn[40 * row + 15, 40 * column + 15]) for row in range(6) for column in range(15)
    }
    assert len(colours) == 90


def test_neighbouring_colours_are_far_apart_and_never_dark() -> None:
    drawn = draw(on_a_grid(12), mask_alpha=1).astype(int)
    colours = np.array([drawn[15, 40 * column + 15] for column in range(12)])
    distances = np.abs(colours[:, None] - colours[None]).sum(axis=2) + 1000 * np.eye(12)
    assert distances.min() > 60
    assert (colours @ (0.299, 0.587, 0.114)).min() > 85


def test_several_classes_have_a_colour_each() -> None:
    drawn = draw(on_a_grid(8, names=("a", "b")), mask_alpha=1, show_labels=False)
    colours = [tuple(drawn[15, 40 * column + 15]) for column in range(8)]
    assert colours == colours[:2] * 4
    assert colours[0] != colours[1]


def test_boxes_are_drawn_where_there_are_no_masks() -> None:
    drawn = changed(draw(on_a_grid(20, with_masks=False)))
    assert drawn[0:30, 0].all()
    assert drawn[0, 0:30].all()
    assert drawn[29, 0:30].all()
    assert drawn[0:30, 29].all()
    assert not drawn[:, 30:40].any()
    assert not drawn[5:25, 5:25].any()


@pytest.mark.parametrize(
    ("detections", "labelled"),
    [
        (on_a_grid(FEW_OBJECTS), True),
        (on_a_grid(FEW_OBJECTS + 1), False),
        (on_a_grid(3, size=(256, 256)), False),
        (on_a_grid(20, names=("a", "b")), True),
        (on_a_grid(3, size=(256, 256), names=("a", "b")), True),
    ],
    ids=["few", "many", "few but small", "classes", "classes small"],
)
@pytest.mark.parametrize("with_masks", [True, False])
def test_labels_by_themselves(detections: Detections, labelled: bool, with_masks: bool) -> None:
    if not with_masks:
        detections = on_a_grid(
            len(detections),
            size=detections.image_size,
            names=detections.class_names,
            with_masks=False,
        )
    drawn = draw(detections)
    np.testing.assert_array_equal(drawn, draw(detections, show_labels=labelled))
    assert (drawn != draw(detections, show_labels=not labelled)).any()


def test_a_label_stands_above_its_box_and_inside_the_image() -> None:
    boxes = [[300, 200, 340, 240], [100, 0, 140, 40], [570, 100, 600, 130]]
    detections = Detections(
        boxes_xyxy=np.array(boxes, dtype=np.float32),
        scores=np.full(3, 0.5, np.float32),
        labels=np.zeros(3, np.int64),
        image_size=SIZE,
        class_names=("nucleus",),
    )
    bare, labelled = draw(detections, show_labels=False), draw(detections, show_labels=True)
    rows, columns = np.nonzero((bare != labelled).any(axis=2))
    middle = (columns > 250) & (columns < 450)
    assert rows[middle].max() < 200
    assert rows[middle].min() >= 180
    assert columns[middle].min() == 300
    at_the_top = columns < 250
    assert rows[at_the_top].min() >= 0
    at_the_right = columns > 450
    assert columns[at_the_right].max() == 599
    assert columns[at_the_right].min() < 570


def test_the_text_of_a_label_tells_class_and_score() -> None:
    def plate(name: str, score: float) -> bytes:
        detections = Detections(
            boxes_xyxy=np.array([[300, 200, 340, 240]], dtype=np.float32),
            scores=np.array([score], dtype=np.float32),
            labels=np.zeros(1, np.int64),
            image_size=SIZE,
            class_names=(name,),
        )
        return draw(detections, show_labels=True).tobytes()

    plates = [plate("cell", 0.91), plate("cell", 0.92), plate("call", 0.91)]
    assert len(set(plates)) == 3
    assert plate("cell", 0.91) == plates[0]


@pytest.mark.parametrize("name", ["", "two\nlines", "\0", "細胞 é", "x" * 500, "\ud800"])
def test_any_class_name_can_be_drawn(name: str) -> None:
    draw(on_a_grid(3, names=(name,)), show_labels=True)


@given(
    boxes=st.lists(
        st.tuples(
            *[
                st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)
                | st.floats(-50, 100, width=32, allow_subnormal=False)
            ]
            * 4
        ),
        max_size=5,
    ),
    size=st.tuples(st.integers(1, 60), st.integers(1, 60)),
)
@settings(deadline=None, max_examples=60)
def test_any_box_in_any_image_can_be_drawn(
    boxes: list[tuple[float, ...]], size: tuple[int, int]
) -> None:
    corners = np.array(boxes, dtype=np.float32).reshape(-1, 2, 2)
    detections = Detections(
        boxes_xyxy=np.sort(corners, axis=1).reshape(-1, 4),
        scores=np.full(len(boxes), 0.5, np.float32),
        labels=np.zeros(len(boxes), np.int64),
        image_size=size,
        class_names=("a",),
    )
    assert draw(detections, show_labels=True).shape == (*size, 3)


def test_masks_at_the_borders_empty_and_as_large_as_the_image() -> None:
    masks = (
        MaskCrop(0, 0, np.ones(SIZE, np.bool_)),
        MaskCrop(600, 400, np.zeros((0, 0), np.bool_)),
        MaskCrop(0, 399, np.ones((1, 600), np.bool_)),
        MaskCrop(5, 5, np.zeros((9, 9), np.bool_)),
    )
    detections = on_a_grid(4)
    detections = Detections(
        boxes_xyxy=detections.boxes_xyxy,
        scores=detections.scores,
        labels=detections.labels,
        image_size=SIZE,
        class_names=("a",),
        masks=masks,
    )
    assert changed(draw(detections)).all()


@pytest.mark.parametrize(
    "image",
    [ground((400, 601)), ground().astype(np.float32), ground()[:, :, :1], ground()[:, :, 0]],
)
def test_another_image_is_refused(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"image: expected uint8 of shape \(400, 600, 3\)"):
        draw_detections(image, on_a_grid(3))


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_an_impossible_alpha_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match="mask_alpha: expected 0 to 1"):
        draw(on_a_grid(3), mask_alpha=alpha)


def test_500_objects_are_quick() -> None:
    detections = on_a_grid(500, size=(1040, 1388))
    times_s = []
    for _ in range(5):
        start = time.thread_time()  # other programs on the machine do not count
        draw(detections)
        times_s.append(time.thread_time() - start)
    assert min(times_s) < 0.3
