"""Reading ahead: in order, no more than asked for, past bad files."""

import time
from pathlib import Path
from threading import Lock

import numpy as np
import pytest
from PIL import Image

from vovnet.errors import ImageError
from vovnet.images import read_image
from vovnet.pages import read_ahead


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
