"""Mosaic, mixup and copy-paste on pictures small enough to write down."""

import numpy as np
import pytest
import torch

from vovnet.data.mixing import (
    Picture,
    join_mosaic,
    mix_pictures,
    mosaic_quarters,
    paste_objects,
    place_on_canvas,
    tight_boxes,
)
from vovnet.models.boxes import Target
from vovnet.models.roi import BitmapMasks


def picture(
    size: tuple[int, int], value: int, box: tuple[int, int, int, int], label: int = 0
) -> Picture:
    """One value all over, an object in a box of value + 1, and a crowd in its first pixel."""
    image = torch.full((*size, 3), value, dtype=torch.uint8)
    x1, y1, x2, y2 = box
    image[y1:y2, x1:x2] = value + 1
    mask = torch.zeros((1, *size), dtype=torch.uint8)
    mask[0, y1:y2, x1:x2] = 1
    target = Target(
        torch.tensor([box], dtype=torch.float32),
        torch.tensor([label]),
        BitmapMasks(mask),
        torch.tensor([[0.0, 0.0, 1.0, 1.0]]),
    )
    return image, target


def masks_of(target: Target) -> torch.Tensor:
    assert isinstance(target.masks, BitmapMasks)
    return target.masks.pixels


def test_a_canvas_holds_the_picture_at_its_place() -> None:
    image, target = place_on_canvas(picture((4, 6), 10, (1, 2, 3, 4)), (9, 8), (3, 1), (7, 8, 9))
    assert image.shape == (9, 8, 3)
    assert image[0, 0].tolist() == [7, 8, 9]
    assert (image[3:7, 1:7] >= 10).all()
    assert (image >= 10).all(2).sum() == 24
    assert target.boxes_xyxy.tolist() == [[2, 5, 4, 7]]
    assert target.ignore_xyxy.tolist() == [[1, 3, 2, 4]]
    assert torch.equal(tight_boxes(masks_of(target)), target.boxes_xyxy)
    assert torch.equal(masks_of(target)[0].bool(), image[..., 0] == 11)


def test_four_pictures_meet_at_the_centre() -> None:
    quarters = mosaic_quarters((5, 4), (12, 10))
    assert quarters == [(5, 4), (5, 6), (7, 4), (7, 6)]
    parts = [
        picture(size, 10 * (number + 1), (1, 1, 3, 3), label=number)
        for number, size in enumerate(quarters)
    ]
    parts[0] = picture((3, 4), 10, (1, 1, 3, 3))  # too low for its quarter
    parts[2] = picture((7, 3), 30, (1, 1, 3, 3), label=2)  # too narrow
    before = [part[0].clone() for part in parts]
    image, target = join_mosaic(parts, (5, 4), (12, 10), (0, 0, 0))
    assert image[..., 0][[2, 2, 11, 11], [0, 9, 1, 9]].tolist() == [10, 20, 30, 40]
    assert image[:2, :4].max() == image[5:, 0].max() == 0
    assert target.labels.tolist() == [0, 1, 2, 3]
    expected = [[1, 3, 3, 5], [5, 1, 7, 3], [2, 6, 4, 8], [5, 6, 7, 8]]
    assert target.boxes_xyxy.tolist() == expected
    for mask, value in zip(masks_of(target), (11, 21, 31, 41), strict=True):
        assert torch.equal(mask.bool(), image[..., 0] == value)
    assert len(target.ignore_xyxy) == 4
    assert all(torch.equal(part[0], old) for part, old in zip(parts, before, strict=True))


def test_mixed_pictures_keep_the_objects_of_both() -> None:
    first, second = picture((4, 8), 100, (1, 1, 3, 3)), picture((6, 5), 200, (0, 2, 4, 6), label=2)
    image, target = mix_pictures(first, second, 0.25)
    assert image.shape == (6, 8, 3)
    assert image.dtype == torch.uint8
    np.testing.assert_array_equal(image[0, [0, 7], 0], [175, 25])  # 7 is beyond the second
    assert image[5, 4, 0] == 150
    assert target.labels.tolist() == [0, 2]
    assert target.boxes_xyxy.tolist() == [[1, 1, 3, 3], [0, 2, 4, 6]]
    assert masks_of(target).shape == (2, 6, 8)
    assert torch.equal(tight_boxes(masks_of(target)), target.boxes_xyxy)


def test_pasted_objects_cover_what_they_lie_on() -> None:
    below = picture((6, 8), 100, (1, 1, 5, 4))
    above = picture((5, 9), 200, (3, 2, 9, 5), label=1)
    image, target = paste_objects(below, above, torch.tensor([True]), 4)
    assert target.labels.tolist() == [0, 1]
    covered = torch.zeros(6, 8, dtype=torch.bool)
    covered[2:5, 3:8] = True  # what lies in both pictures
    assert torch.equal(image[..., 0] == 201, covered)
    assert (image[..., 0][~covered] <= 101).all()
    assert set(masks_of(target).unique().tolist()) == {0, 1}
    assert torch.equal(masks_of(target)[1].bool(), covered)
    assert masks_of(target)[0].sum() == 12 - 4
    assert target.boxes_xyxy.tolist() == [[1, 1, 5, 4], [3, 2, 8, 5]]
    assert target.ignore_xyxy.tolist() == [[0, 0, 1, 1]]
    assert (below[0] == 101).any()
    assert not (below[0] == 201).any()  # the picture itself stays


@pytest.mark.parametrize(("least", "labels"), [(8, [0, 1]), (9, [1])])
def test_covered_objects_are_dropped_when_little_is_left(least: int, labels: list[int]) -> None:
    below = picture((6, 8), 100, (1, 1, 5, 4))
    above = picture((6, 8), 200, (3, 2, 8, 5), label=1)
    _, target = paste_objects(below, above, torch.tensor([True]), least)
    assert target.labels.tolist() == labels


def test_nothing_chosen_changes_nothing() -> None:
    below, above = picture((6, 8), 100, (1, 1, 5, 4)), picture((6, 8), 200, (3, 2, 8, 5))
    image, target = paste_objects(below, above, torch.tensor([False]), 4)
    assert torch.equal(image, below[0])
    assert torch.equal(masks_of(target), masks_of(below[1]))


def test_pictures_without_masks() -> None:
    parts = []
    for number, size in enumerate(mosaic_quarters((2, 2), (4, 4))):
        image, target = picture(size, 10 * number, (0, 0, 2, 1))
        parts.append((image, Target(target.boxes_xyxy, target.labels)))
    _, target = join_mosaic(parts, (2, 2), (4, 4), (0, 0, 0))
    assert target.masks is None
    assert target.ignore_xyxy.shape == (0, 4)
    assert mix_pictures(parts[0], parts[1], 0.5)[1].masks is None


def test_tight_boxes_of_touching_and_empty_masks() -> None:
    masks = torch.zeros(3, 4, 6, dtype=torch.uint8)
    masks[0] = 1
    masks[1, 2, 3] = 1
    assert tight_boxes(masks).tolist() == [[0, 0, 6, 4], [3, 2, 4, 3], [0, 0, 0, 0]]
    assert tight_boxes(masks[:0]).shape == (0, 4)
