"""Many batches through an engine: results in order, the next batches made ready meanwhile."""

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vovnet.runtime.engine import Engine

Batch = tuple[NDArray[np.uint8], NDArray[np.int64]]
Results = dict[str, NDArray[Any]]


def infer_stream(engine: Engine, batches: Iterable[Batch]) -> Generator[Results]:
    """The results of `engine.infer` of each batch, in the order of batches.

    The batches run in engine.parallel threads; one more is taken from `batches`, in the thread of
    the caller, before the first result is waited for. What a batch or its making raises comes in
    its turn, after the results before it, and ends the stream. Closing it early waits for what
    runs and begins nothing more.
    """
    waiting: deque[Future[Results]] = deque()
    pool = ThreadPoolExecutor(engine.parallel, thread_name_prefix="infer")
    try:
        for future in _submitted(pool, engine, batches):
            waiting.append(future)
            if len(waiting) > engine.parallel:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _submitted(
    pool: ThreadPoolExecutor, engine: Engine, batches: Iterable[Batch]
) -> Generator[Future[Results]]:
    try:
        for batch in batches:
            yield pool.submit(engine.infer, *batch)
    except Exception as error:  # of the making of a batch
        failed: Future[Results] = Future()
        failed.set_exception(error)
        yield failed
