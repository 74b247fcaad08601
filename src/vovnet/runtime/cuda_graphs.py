"""A network's pass on a GPU as one recorded graph: a launch instead of hundreds."""

import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Pass = Callable[[Tensor, Tensor], dict[str, Tensor]]

MOST_SHAPES = 8
WARM_UPS = 3  # batches of a shape that run as they are, before it is recorded


class GraphedPass:
    """Runs a pass whose work depends on shapes alone, recorded for each shape of batches.

    The first batches of a shape run on a stream of their own, as recording wants it; the next is
    recorded, and all later ones replay it. At most eight shapes are recorded, for each holds its
    inputs: the rest runs as it is. So does everything, with a warning, once a recording has failed.
    Recordings share their memory and take turns in it; results are the caller's own.
    """

    def __init__(self, run: Pass, device: torch.device) -> None:
        self._run = run
        self._device = device
        self._lock = threading.Lock()
        self._recorded: dict[tuple[torch.Size, torch.Size], _Recording] = {}
        self._seen: dict[tuple[torch.Size, torch.Size], int] = {}
        self._fault = ""
        self._pool = torch.cuda.graph_pool_handle()
        self._done = torch.cuda.Event()  # the last replay, on whatever stream

    @property
    def shapes(self) -> int:
        """How many are recorded."""
        return len(self._recorded)

    def __call__(self, images: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        """As the pass itself, on tensors of the device."""
        shape = (images.shape, sizes.shape)
        with self._lock:
            if shape not in self._recorded:
                if self._fault or len(self._recorded) >= MOST_SHAPES:
                    return self._run(images, sizes)
                seen = self._seen[shape] = self._seen.get(shape, 0) + 1
                if seen <= WARM_UPS:
                    return self._warm_up(images, sizes)
                if not self._record(shape, images, sizes):
                    return self._run(images, sizes)
            self._done.wait()
            found = self._recorded[shape].replay(images, sizes)
            self._done.record()
            return found

    def _warm_up(self, images: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        ours = torch.cuda.current_stream(self._device)
        side = torch.cuda.Stream(self._device)
        side.wait_stream(ours)
        with torch.cuda.stream(side):
            found = self._run(images, sizes)
        ours.wait_stream(side)
        for value in found.values():
            value.record_stream(ours)
        return found

    def _record(self, shape: tuple[torch.Size, torch.Size], images: Tensor, sizes: Tensor) -> bool:
        try:
            with torch.cuda.device(self._device):
                self._recorded[shape] = _Recording(self._run, images, sizes, self._pool)
        except RuntimeError as error:
            self._fault = str(error).partition("\n")[0]
            warnings.warn(
                f"batches run without CUDA graphs, which is slower: {self._fault}",
                RuntimeWarning,
                stacklevel=3,
            )
        return not self._fault


class _Recording:
    """The pass of one shape, with the memory that it reads from and writes to."""

    def __init__(self, run: Pass, images: Tensor, sizes: Tensor, pool: Any) -> None:
        self._inputs = images.clone(), sizes.clone()
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._found = run(*self._inputs)

    def replay(self, images: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        for kept, given in zip(self._inputs, (images, sizes), strict=True):
            kept.copy_(given)
        self._graph.replay()
        return {name: value.clone() for name, value in self._found.items()}
