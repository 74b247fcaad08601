"""SSD's view of an image: what the choices are, against the rule restated, and its arithmetic; all
of an image at a size that is drawn.
"""

from pathlib import Path

import pytest
import torch

from vovnet.data.labels import ImageRecord
from vovnet.data.windows import CROP_OVERLAPS, Window, _shown, ssd_window, whole_window
from vovnet.preprocess import Preprocess

HEIGHT, WIDTH = 90, 120
OUTPUT = (64, 48)


def record(height: int = HEIGHT, width: int = WIDTH) -> ImageRecord:
    return ImageRecord(1, Path("a.png"), height, width, ())


def draw(count: int, boxes: torch.Tensor, *, quarter_turn: float = 0.0) -> list[Window]:
    torch.manual_seed(0)
    return [
        ssd_window(record(), boxes, output_size=OUTPUT, quarter_turn=quarter_turn)
        for _ in range(count)
    ]


def overlap(box: list[float], window: Window) -> float:
    """IoU with a window that lies inside the image."""
    x1, y1 = max(box[0], window.left), max(box[1], window.top)
    x2 = min(box[2], window.left + window.width)
    y2 = min(box[3], window.top + window.height)
    shared = max(0.0, x2 - x1) * max(0.0, y2 - y1)
    area = (box[2] - box[0]) * (box[3] - box[1])
    return shared / (area + window.width * window.height - shared)


def test_crops_obey_the_rule_of_the_paper() -> None:
    box = [50.0, 40.0, 80.0, 70.0]
    windows = draw(60, torch.tensor([box], dtype=torch.float64))
    filled = [w for w in windows if w.output_size == OUTPUT]  # not zoomed out, or cropped inside
    assert len(filled) > 15
    whole = sum((w.height, w.width) == (HEIGHT, WIDTH) for w in filled)
    assert 0.0 < whole / 60 < 0.35  # an option of seven, of the half that is not zoomed out
    for window in windows:
        assert window.canvas_size == OUTPUT
        assert 0 <= window.top <= HEIGHT - window.height
        assert 0 <= window.left <= WIDTH - window.width
        x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        assert window.left < x < window.left + window.width
        assert window.top < y < window.top + window.height
    cropped = [w for w in filled if (w.height, w.width) != (HEIGHT, WIDTH)]
    # Some overlap best with nothing asked for, some with the strictest that this box allows.
    overlaps = sorted(overlap(box, window) for window in cropped)
    assert overlaps[0] < 0.3
    assert overlaps[-1] > 0.5


def test_half_of_the_pictures_are_zoomed_out_by_up_to_four() -> None:
    windows = draw(400, torch.zeros(0, 4, dtype=torch.float64))  # nothing to crop around
    shares = [w.output_size[0] / OUTPUT[0] for w in windows]
    zoomed = [share for share in shares if share < 1]
    assert 160 < len(zoomed) < 240
    assert 0.24 < min(zoomed) < 0.3
    # Uniform in the factor: its mean is 2.5.
    assert sum(1 / share for share in zoomed) / len(zoomed) == pytest.approx(2.5, abs=0.2)
    for window in windows:
        assert (window.top, window.left, window.height, window.width) == (0, 0, HEIGHT, WIDTH)
        for offset, size, side in zip(window.offset, window.output_size, OUTPUT, strict=True):
            assert 0 <= offset <= side - size
    corners = {tuple(offset > 12 for offset in w.offset) for w in windows}
    assert len(corners) == 4


def test_turned_windows_exchange_the_sides() -> None:
    upright = draw(20, torch.tensor([[5.0, 5.0, 60.0, 50.0]]))
    turned = draw(20, torch.tensor([[5.0, 5.0, 60.0, 50.0]]), quarter_turn=1.0)
    assert all(w.transposed and w.canvas_size == OUTPUT for w in turned)
    assert not any(w.transposed for w in upright)
    for one in turned:
        assert one.offset[0] + one.output_size[0] <= OUTPUT[0]
        assert one.offset[1] + one.output_size[1] <= OUTPUT[1]


@pytest.mark.parametrize("size", [(1, 1), (3, 50), (50, 2), (4, 4), (1000, 7)])
def test_images_of_any_size(size: tuple[int, int]) -> None:
    torch.manual_seed(1)
    box = torch.tensor([[0.0, 0.0, size[1], size[0]]], dtype=torch.float64)
    for _ in range(8):
        window = ssd_window(record(*size), box, output_size=(32, 32), quarter_turn=0.5)
        assert min(window.height, window.width, *window.output_size) >= 1
        assert window.top + window.height <= size[0]
        assert window.left + window.width <= size[1]


def test_the_part_of_a_crop_that_lies_in_the_image() -> None:
    assert _shown(-10, 40, 100, 80) == (0, 30, 60, 20)  # 10 of 40 lie before it
    assert _shown(80, 40, 100, 80) == (80, 20, 40, 0)  # 20 lie behind it
    assert _shown(10, 20, 100, 80) == (10, 20, 80, 0)
    assert _shown(-100, 400, 200, 100) == (0, 200, 50, 25)


def test_numbers_of_the_authors() -> None:
    assert CROP_OVERLAPS == (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)


def whole(count: int, *, short_sides: tuple[int, ...], preprocess: Preprocess, turn: float = 0.0):
    torch.manual_seed(0)
    return [
        whole_window(record(), preprocess, short_sides=short_sides, quarter_turn=turn)
        for _ in range(count)
    ]


def test_all_of_an_image_keeps_its_aspect_at_each_of_the_sides() -> None:
    # Of 90 x 120 pixels: the longer side is 4/3 of the shorter one, and 100 at most.
    rule = Preprocess(short_side=60, max_long_side=100)
    windows = whole(300, short_sides=(30, 60, 90), preprocess=rule)
    for window in windows:
        assert (window.top, window.left, window.height, window.width) == (0, 0, HEIGHT, WIDTH)
        assert window.output_size == window.canvas_size
        assert not window.transposed
    sizes = [window.output_size for window in windows]
    assert set(sizes) == {(30, 40), (60, 80), (75, 100)}
    assert all(sizes.count(size) >= 70 for size in set(sizes))


def test_the_rule_of_evaluation_gives_way_to_the_sides_but_for_its_limit() -> None:
    for rule in (Preprocess(scale=3.0, max_long_side=64), Preprocess(square=50, max_long_side=64)):
        (window,) = whole(1, short_sides=(60,), preprocess=rule)
        assert window.output_size == (48, 64)
    windows = whole(30, short_sides=(30,), preprocess=Preprocess(), turn=0.5)
    assert {(w.transposed, w.output_size) for w in windows} == {
        (False, (30, 40)),
        (True, (40, 30)),
    }
