"""The pages of many files, read by threads ahead of their use; bad files are passed over."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vovnet.errors import ImageError
from vovnet.images import count_pages

Page = tuple[Path, int]  # of a file, counted from 0
Pixels = NDArray[np.uint8]

_MAX_THREADS = 16


def read_ahead(
    paths: Sequence[Path],
    read: Callable[[Path, int], Pixels],
    *,
    ahead: int,
    on_error: Callable[[str], None],
) -> Generator[tuple[Page, Pixels]]:
    """Every page that can be read, in the order of paths; at most `ahead` are held at a time.

    `read` runs in threads. Of a file that it raises ImageError on, on_error is told once.
    """
    failed: Path | None = None
    with ThreadPoolExecutor(min(os.cpu_count() or 1, ahead, _MAX_THREADS)) as pool:
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


def _submitted(
    pool: ThreadPoolExecutor,
    read: Callable[[Path, int], Pixels],
    paths: Sequence[Path],
    ahead: int,
) -> Iterator[tuple[Page, Future[Pixels]]]:
    waiting: deque[tuple[Page, Future[Pixels]]] = deque()
    for path in paths:
        for number, failure in _pages_of(path):
            page = _failed(failure) if failure else pool.submit(read, path, number)
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


def _failed(error: ImageError) -> Future[Pixels]:
    future: Future[Pixels] = Future()
    future.set_exception(error)
    return future
