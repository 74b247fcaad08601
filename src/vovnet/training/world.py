"""The processes that train together: one alone, or those that torchrun has started."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import distributed, nn

from vovnet.errors import ConfigError

# Process 0 evaluates while the others wait.
WAIT_LIMIT = timedelta(hours=12)


@dataclass(frozen=True, slots=True)
class World:
    """This process's place among `size` processes; process 0 alone writes, shows and evaluates."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this is process 0."""
        return self.rank == 0

    def share(self, values: Sequence[float]) -> list[float]:
        """The values of process 0, in every process; all of them have to call it."""
        if self.size == 1:
            return list(values)
        shared = torch.tensor(values, dtype=torch.float64, device=_device_of_group())
        distributed.broadcast(shared, src=0)
        received: list[float] = shared.tolist()
        return received

    def wrap(self, module: nn.Module, device: torch.device) -> nn.Module:
        """The module with its gradients averaged over the processes."""
        if self.size == 1:
            return module
        places = [device.index] if device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(module, device_ids=places)


ALONE = World()


@contextmanager
def joined_world(device_type: str) -> Iterator[World]:
    """The world that torchrun's environment describes, left again at the end.

    Raises ConfigError where the environment names more processes than there are GPUs here.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    if device_type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"torchrun: expected at most {torch.cuda.device_count()} processes, one for each "
                f"GPU here, got one with the local rank {local_rank}"
            )
        torch.cuda.set_device(local_rank)
    backend = "nccl" if device_type == "cuda" else "gloo"
    distributed.init_process_group(backend, timeout=WAIT_LIMIT)
    try:
        yield World(rank, size, local_rank)
    finally:
        distributed.destroy_process_group()


def _device_of_group() -> torch.device:
    return torch.device("cuda" if distributed.get_backend() == "nccl" else "cpu")
