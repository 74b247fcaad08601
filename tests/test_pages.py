"""Reading ahead: in order, no more than asked for, past bad files."""

import time
from collections.abc import Iterator
from pathlib import Path
from threading import Lock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vovnet.errors import ImageError
from vovnet.images import read_image
from vovnet.pages import group_alike, in_order, read_ahead


def save_grey(path: Path, *levels: int) -> Path:
    """A page of one pixel for each level; several need a .tif."""
    pages = [Image.fromarray(np.full((1, 1, 3), level, np.uint8)) for level in levels]
    options = {"save_all": True, "append_images": pages[1:]} if len(pages) > 1 else {}
    pages[0].save(path, **options)
    return path


def read(path: Path, page: int) -> np.ndarray:
    return read_image(path, page=page)


def test_pages_come_in_order_and_a_broken_file_is_told_once(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"none")
    paths = [
        save_grey(tmp_path / "a.tif", 1, 2, 3),
        tmp_path / "broken.png",
        save_grey(tmp_path / "b.png", 4),
        tmp_path / "missing.png",
    ]
    told: list[str] = []
    found = list(read_ahead(paths, read, ahead=3, on_error=told.append))
    assert [(page[0].name, page[1], pixels[0, 0, 0]) for page, pixels in found] == [
        ("a.tif", 0, 1),
        ("a.tif", 1, 2),
        ("a.tif", 2, 3),
        ("b.png", 0, 4),
    ]
    assert [text.split(":")[0] for text in told] == [str(paths[1]), str(paths[3])]


def test_a_file_that_breaks_on_a_later_page_is_told_once(tmp_path: Path) -> None:
    path = save_grey(tmp_path / "a.tif", *range(6))

    def fail_later(path: Path, page: int) -> np.ndarray:
        if page >= 2:
            raise ImageError(f"page {page}")
        return read(path, page)

    told: list[str] = []
    found = list(read_ahead([path], fail_later, ahead=4, on_error=told.append))
    assert (len(found), told) == (2, ["page 2"])


def test_a_file_that_is_cut_off_gives_its_first_page_and_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_grey(tmp_path / "a.tif", 7, 8)

    def cannot_count(path: Path) -> int:
        raise ImageError(f"{path}: cut off")

    monkeypatch.setattr("vovnet.pages.count_pages", cannot_count)
    told: list[str] = []
    found = list(read_ahead([path], read, ahead=2, on_error=told.append))
    assert ([page for page, _ in found], told) == ([(path, 0)], [f"{path}: cut off"])


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_no_more_than_asked_for_are_held(tmp_path: Path, ahead: int) -> None:
    paths = [save_grey(tmp_path / f"{number}.png", number) for number in range(12)]
    begun, lock = [], Lock()

    def note(path: Path, page: int) -> np.ndarray:
        with lock:
            begun.append(path)
        return read(path, page)

    pages = read_ahead(paths, note, ahead=ahead, on_error=print)
    for done in range(3):
        next(pages)
        time.sleep(0.05)
        assert len(begun) <= done + ahead
    pages.close()
    time.sleep(0.05)
    assert len(begun) < len(paths)


def group(kinds: str, *, size: int, window: int) -> list[str]:
    """The kinds with their numbers, a word for each group."""
    groups = group_alike(kinds, lambda kind: kind, size=size, window=window)
    return [" ".join(f"{kind}{number}" for number, kind in one) for one in groups]


@pytest.mark.parametrize(
    ("kinds", "size", "window", "expected"),
    [
        ("", 2, 8, []),
        ("abab", 1, 4, ["a0", "b1", "a2", "b3"]),
        ("aaaaa", 2, 8, ["a0 a1", "a2 a3", "a4"]),
        ("abab", 2, 8, ["a0 a2", "b1 b3"]),
        ("abbbbb", 2, 4, ["b1 b2", "a0", "b3 b4", "b5"]),  # a waits until four have come
        ("abc", 2, 8, ["a0", "b1", "c2"]),
        ("abcdef", 3, 3, ["a0", "b1", "c2", "d3", "e4", "f5"]),
    ],
)
def test_those_of_a_kind_go_together(
    kinds: str, size: int, window: int, expected: list[str]
) -> None:
    assert group(kinds, size=size, window=window) == expected


@given(st.text("abc", max_size=40), st.integers(1, 5), st.integers(0, 6))
def test_groups_hold_everything_once_and_no_more_than_the_window(
    kinds: str, size: int, more: int
) -> None:
    came: list[str] = []

    def items() -> Iterator[tuple[int, str]]:
        for number, kind in enumerate(kinds):
            came.append(kind)
            yield number, kind

    seen: list[int] = []
    for one in group_alike(items(), lambda item: item[1], size=size, window=size + more):
        assert 1 <= len(one) <= size
        assert len({kind for _, (_, kind) in one}) == 1
        assert all(number == item[0] for number, item in one)
        seen += [number for number, _ in one]
        waiting = set(range(len(came))) - set(seen)
        assert len(came) - min(waiting, default=len(came)) <= size + more
    assert sorted(seen) == list(range(len(kinds)))


def test_groups_need_room() -> None:
    for size, window in ((0, 4), (3, 2)):
        with pytest.raises(ValueError, match="expected 1 <= size <= window"):
            group("a", size=size, window=window)


@given(st.permutations(range(12)))
def test_numbers_bring_the_order_back(order: list[int]) -> None:
    come: list[int] = []

    def numbered() -> Iterator[tuple[int, str]]:
        for number in order:
            come.append(number)
            yield number, f"item {number}"

    needed = [max(order.index(number) for number in range(end + 1)) + 1 for end in range(12)]
    for following, item in enumerate(in_order(numbered())):
        assert item == f"item {following}"
        assert len(come) == needed[following]  # and not later
    assert following == 11
