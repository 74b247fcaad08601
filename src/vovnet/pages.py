"""The pages of many files, read by threads ahead of their use; bad files are passed over, pages of
one kind put together.
"""

from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from vovnet.errors import ImageError
from vovnet.hardware import available_cores
from vovnet.images import count_pages

Page = tuple[Path, int]  # of a file, counted from 0
Read = TypeVar("Read")
Item = TypeVar("Item")

_MAX_THREADS = 16


def read_ahead(
    paths: Sequence[Path],
    read: Callable[[Path, int], Read],
    *,
    ahead: int,
    on_error: Callable[[str], None],
) -> Generator[tuple[Page, Read]]:
    """Every page that can be read, in the order of paths; at most `ahead` are held at a time.

    `read` runs in threads. Of a file that it raises ImageError on, on_error is told once.
    """
    failed: Path | None = None
    with ThreadPoolExecutor(min(available_cores(), ahead, _MAX_THREADS)) as pool:
        try:
            for page, waiting in _submitted(pool, read, paths, ahead):
                try:
                    if page[0] != failed:  # what follows in a broken file is not told again
                        yield page, waiting.result()
                except ImageError as error:
                    failed = page[0]
                    on_error(str(error))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def group_alike(
    items: Iterable[Item], kind: Callable[[Item], Hashable], *, size: int, window: int
) -> Iterator[list[tuple[int, Item]]]:
    """Groups of at most `size` items of one kind, each item with its number from 0.

    An item waits for others of its kind until `window` items from it on have come, so that no more
    than those are held. Raises ValueError unless 1 <= size <= window.
    """
    if not 1 <= size <= window:
        raise ValueError(f"groups: expected 1 <= size <= window, got {size} and {window}")
    waiting: dict[Hashable, list[tuple[int, Item]]] = {}  # the one of the oldest item first
    for number, item in enumerate(items):
        key = kind(item)
        group = waiting.setdefault(key, [])
        group.append((number, item))
        if len(group) == size:
            yield waiting.pop(key)
        oldest = next(iter(waiting), None)
        if oldest is not None and number - waiting[oldest][0][0] + 1 >= window:
            yield waiting.pop(oldest)
    yield from waiting.values()


def in_order(numbered: Iterable[tuple[int, Item]]) -> Iterator[Item]:
    """The items by their numbers 0, 1, 2, ..., each as soon as those before it have come."""
    early: dict[int, Item] = {}
    following = 0
    for number, item in numbered:
        early[number] = item
        while following in early:
            yield early.pop(following)
            following += 1


def _submitted(
    pool: ThreadPoolExecutor,
    read: Callable[[Path, int], Read],
    paths: Sequence[Path],
    ahead: int,
) -> Iterator[tuple[Page, Future[Read]]]:
    waiting: deque[tuple[Page, Future[Read]]] = deque()
    for path in paths:
        for number, failure in _pages_of(path):
            page = Future() if failure else pool.submit(read, path, number)
            if failure:
                page.set_exception(failure)
            waiting.append(((path, number), page))
            if len(waiting) >= ahead:
                yield waiting.popleft()
    while waiting:
        yield waiting.popleft()


def _pages_of(path: Path) -> list[tuple[int, ImageError | None]]:
    """The pages of a file; of one that breaks off the first, and what is wrong with the next."""
    try:
        return [(number, None) for number in range(count_pages(path))]
    except ImageError as error:
        return [(0, None), (1, error)]
