"""Pictures of a classifier's answers, by what can be measured in them."""

import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vovnet import class_pictures
from vovnet.class_pictures import (
    COLUMNS,
    TILE,
    check_drawing,
    draw_confusion,
    draw_mistakes,
    find_mistakes,
    font_file,
    written_name,
)
from vovnet.errors import ConfigError, ImageError


def test_the_most_confident_wrong_answers_come_first() -> None:
    probabilities = np.array(
        [[0.1, 0.9], [0.6, 0.4], [0.2, 0.8], [0.5, 0.5], [0.0, 1.0], [0.9, 0.1]]
    )
    labels = np.array([0, 1, 0, 1, 1, 1])
    found = find_mistakes(probabilities, labels)
    assert [(m.index, m.true, m.given) for m in found] == [
        (0, 0, 1),
        (5, 1, 0),
        (2, 0, 1),
        (1, 1, 0),
        (3, 1, 0),
    ]
    assert [m.probability for m in found] == pytest.approx([0.9, 0.9, 0.8, 0.6, 0.5])
    assert find_mistakes(probabilities, labels, limit=2) == found[:2]
    assert find_mistakes(probabilities, probabilities.argmax(axis=1)) == []


def test_each_tile_shows_its_picture_whole() -> None:
    probabilities = np.tile([0.0, 1.0], (COLUMNS + 2, 1))
    mistakes = find_mistakes(probabilities, np.zeros(COLUMNS + 2, dtype=np.int64))
    sheet = draw_mistakes(
        mistakes,
        lambda index: np.full((40, 80, 3), 10 * index + 5, np.uint8),
        ("cat", "dog"),
    )
    assert sheet.dtype == np.uint8
    height, width = sheet.shape[0] // 2, sheet.shape[1] // COLUMNS
    for index in range(COLUMNS + 2):
        top, left = index // COLUMNS * height, index % COLUMNS * width
        tile = sheet[top : top + height, left : left + width]
        shown = (tile[: TILE + 6] == 10 * index + 5).all(axis=2)
        rows, columns = np.flatnonzero(shown.any(axis=1)), np.flatnonzero(shown.any(axis=0))
        assert np.ptp(columns) + 1 == TILE
        assert np.ptp(rows) + 1 == pytest.approx(TILE / 2, abs=1)
        assert (tile[TILE + 8 :] < 100).any()  # and something is written under it
    assert (sheet[height:, 2 * width :] == 255).all()


def test_long_names_stay_within_their_tile_and_leave_the_probability() -> None:
    mistakes = find_mistakes(np.array([[0.25, 0.75]]), np.array([0]))

    def sheet(name: str) -> np.ndarray:
        return draw_mistakes(
            mistakes, lambda index: np.zeros((4, 4, 3), np.uint8), ("W" * 200, name)
        )

    long = sheet("W" * 200)
    assert (long[:, TILE + 6 :] == 255).all()
    assert not np.array_equal(long, sheet("x"))


def test_a_sheet_without_mistakes_says_so() -> None:
    sheet = draw_mistakes([], lambda index: np.zeros((1, 1, 3), np.uint8), ("a", "b"))
    assert (sheet < 100).any()


def test_a_picture_that_went_away_leaves_its_tile_grey() -> None:
    def gone(index: int) -> np.ndarray:
        raise ImageError("gone")

    mistakes = find_mistakes(np.array([[0.0, 1.0]]), np.array([0]))
    assert (draw_mistakes(mistakes, gone, ("a", "b"))[50, 50] == 0xE8).all()


@pytest.mark.parametrize("count", [2, 10, 300])
def test_the_confusion_matrix_of_few_and_many_classes(tmp_path: Path, count: int) -> None:
    generator = np.random.default_rng(count)
    confusion = np.diag(generator.integers(1, 50, size=count))
    confusion[0, 1] = 7
    confusion[1] = 0  # a class without images
    names = ["고양이", "филин", "$x_1^{2$", "a\nb", "n" * 80][: min(count, 5)]
    names += [f"class {index}" for index in range(len(names), count)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of letters that it cannot draw
        draw_confusion(confusion, names, tmp_path / "confusion.png")
    with Image.open(tmp_path / "confusion.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    assert max(pixels.shape) <= 2200
    dark_blue = (pixels[..., 2] - pixels[..., 0] > 60) & (pixels[..., 0] < 40)
    assert dark_blue.sum() > 100


def test_numbers_are_written_where_they_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    original = class_pictures._write_counts
    monkeypatch.setattr(
        class_pictures,
        "_write_counts",
        lambda axes, confusion, shares: (
            written.append(len(confusion)),
            original(axes, confusion, shares),
        ),
    )
    monkeypatch.setattr(class_pictures, "MAX_NUMBERED_CLASSES", 3)
    for count in (3, 4):
        confusion = np.eye(count, dtype=np.int64)
        draw_confusion(confusion, [str(k) for k in range(count)], tmp_path / "c.png")
    assert written == [3]


def test_a_missing_matplotlib_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"expected matplotlib, .* vovnet\[profile\]"):
        check_drawing()
    with pytest.raises(ConfigError, match="expected matplotlib"):
        draw_confusion(np.eye(2, dtype=np.int64), ["a", "b"], tmp_path / "c.png")
    assert not list(tmp_path.iterdir())


def test_a_name_that_no_font_can_write_becomes_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(class_pictures, "FONTS", ())
    font_file.cache_clear()
    try:
        assert written_name("고양이", 4) == "class 4"
        assert written_name("cat 고양이", 5) == "class 5"
        assert written_name("cat", 6) == "cat"
    finally:
        font_file.cache_clear()


def test_a_font_that_has_the_letters_is_found() -> None:
    file = font_file("филин")
    if file is None:
        pytest.skip("no font with Cyrillic letters on this system")
    assert written_name("филин", 0) == "филин"


def test_names_are_one_short_line() -> None:
    assert written_name("a\nb\x00c", 0) == "a b c"
    assert written_name("n" * 24, 0) == "n" * 24
    assert written_name("n" * 25, 0) == "n" * 23 + "…"
