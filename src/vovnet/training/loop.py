"""The training loop: batches, forward, losses, backward, clip, step, average; nothing hooks in."""

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from vovnet.errors import ConfigError, DataError, TrainingError
from vovnet.training.checkpoint import Position
from vovnet.training.optim import Ema, learning_rate_factor, set_learning_rate
from vovnet.training.step import Batch, total_loss
from vovnet.training.world import ALONE, World


class EpochDataset(Protocol):
    """A data set whose samples depend on the epoch."""

    def set_place(self, epoch: int, progress: float) -> None:
        """Choose the samples of an epoch; progress is the share of the training done, 0..1."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


@dataclass(frozen=True, slots=True)
class Budget:
    """How long a training lasts: steps, or seconds of wall time; exactly one is set."""

    total_steps: int | None = None
    max_seconds: float | None = None

    @classmethod
    def of(
        cls,
        *,
        max_minutes: float | None,
        max_steps: int | None,
        epochs: float | None,
        batches_per_epoch: int,
    ) -> "Budget":
        """The length of which one is given."""
        if max_minutes is not None:
            return cls(max_seconds=60 * max_minutes)
        if max_steps is not None:
            return cls(total_steps=max_steps)
        assert epochs is not None
        return cls(total_steps=max(1, math.ceil(epochs * batches_per_epoch)))

    def spent_fraction(self, position: Position) -> float:
        """Share of the training that is done, 0..1; what a teacher took before it is no part."""
        if self.total_steps is not None:
            return min(1.0, position.step / self.total_steps)
        assert self.max_seconds is not None
        return min(1.0, position.trained_s / max(self.max_seconds - position.taught_s, 1e-9))


def check_time_left(max_minutes: float | None, spent_s: float) -> None:
    """Raise ConfigError where a training's preparation has left it no time."""
    if max_minutes is not None and spent_s >= 60 * max_minutes:
        raise ConfigError(
            f"max_minutes: expected more than the {spent_s / 60:.2g} minutes for which the teacher "
            f"looked at the pictures, got {max_minutes:g}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """The learning rate over a training."""

    learning_rate: float
    warmup_fraction: float | None
    warmup_steps: int | None
    budget: Budget
    drops_at: Sequence[float] = ()  # shares of the training; none: half a cosine

    def at(self, position: Position) -> float:
        """Learning rate of the step that follows `position`."""
        return self.learning_rate * learning_rate_factor(
            self.budget.spent_fraction(position),
            position.step,
            warmup_fraction=self.warmup_fraction,
            warmup_steps=self.warmup_steps,
            drops_at=self.drops_at,
        )


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What one step did."""

    losses: dict[str, float]
    learning_rate: float
    gradient_norm: float
    num_images: int
    waited_s: float = field(compare=False)  # for the batch


def train_steps(
    loss_step: nn.Module,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: Ema,
    *,
    batches: Iterable[Batch | DataError],
    batches_per_epoch: int,
    position: Position,
    schedule: Schedule,
    clip_norm: float | None,
    autocast_dtype: torch.dtype | None,
    device: torch.device,
    world: World = ALONE,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[StepRecord]:
    """Train from `position` to the end of the schedule's budget, giving a record after each step.

    `loss_step` computes the losses of `model`, of which `ema` keeps the average. `batches` goes on
    from `position` without end; the budget's seconds are those of `clock`. `position` moves along
    and is exact whenever a record is given: a checkpoint of then goes on from there.
    Raises TrainingError naming the batch's images when a loss or a gradient is not finite, and the
    DataError that stands in a batch's place.
    """
    started_s = clock() - position.spent_s
    if position.batch >= batches_per_epoch:  # resumed with fewer images than before
        position.epoch, position.batch = position.epoch + 1, 0
    stream = iter(batches)
    while schedule.budget.spent_fraction(position) < 1.0:
        asked_s = time.monotonic()
        batch = next(stream)
        if isinstance(batch, DataError):
            raise batch
        waited_s = time.monotonic() - asked_s
        learning_rate = schedule.at(position)
        set_learning_rate(optimizer, learning_rate)
        loss_step.train()
        losses, gradient_norm = train_step(
            loss_step,
            optimizer,
            batch,
            clip_norm=clip_norm,
            autocast_dtype=autocast_dtype,
            device=device,
        )
        ema.update(model)
        position.step += 1
        position.batch += 1
        if position.batch >= batches_per_epoch:
            position.epoch, position.batch = position.epoch + 1, 0
        (position.spent_s,) = world.share([clock() - started_s])
        yield StepRecord(losses, learning_rate, gradient_norm, len(batch.paths), waited_s)


def train_step(
    loss_step: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    *,
    clip_norm: float | None,
    autocast_dtype: torch.dtype | None,
    device: torch.device,
) -> tuple[dict[str, float], float]:
    """One optimizer step; returns each loss and the norm of all gradients before clipping.

    Raises TrainingError, with the weights as they were, when either is not finite or the GPU's
    memory does not hold the batch.
    """
    moved = batch.to(device)
    try:
        with torch.autocast(device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None):
            losses = loss_step(moved.images, moved.sizes, moved.targets)
        values = finite_losses(losses, batch.paths)
        optimizer.zero_grad(set_to_none=True)
        total_loss(losses).backward()
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"{device}: out of memory with a batch of {tuple(batch.images.shape)}, "
            f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB used; lower batch_size"
        ) from error
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise TrainingError(
            f"BatchNorm: expected more than one value per channel, got one from a batch of "
            f"{tuple(batch.images.shape)}; raise batch_size, or the size of the images"
        ) from error
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    limit = math.inf if clip_norm is None else clip_norm
    gradient_norm = float(nn.utils.clip_grad_norm_(parameters, limit))
    if not math.isfinite(gradient_norm):
        raise TrainingError(
            f"expected finite gradients, got a norm of {gradient_norm}, with the losses "
            f"{_list_losses(values)}, on the images {_list_paths(batch.paths)}"
        )
    optimizer.step()
    return values, gradient_norm


def finite_losses(losses: Mapping[str, Tensor], paths: list[Path]) -> dict[str, float]:
    """Losses as numbers; raises TrainingError naming all and the images when one is not finite."""
    stacked = torch.stack([value.detach().float() for value in losses.values()])
    values = dict(zip(losses, stacked.tolist(), strict=True))  # one wait for the device, not many
    if not all(math.isfinite(value) for value in values.values()):
        raise TrainingError(
            f"expected finite losses, got {_list_losses(values)}, on the images "
            f"{_list_paths(paths)}; a lower learning_rate or clip_norm may help, the latest "
            "checkpoint is as it was"
        )
    return values


def epoch_order(num_images: int, *, seed: int, epoch: int) -> list[int]:
    """The order of the images in an epoch: a permutation from the seed and the epoch alone."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    order: list[int] = torch.randperm(num_images, generator=generator).tolist()
    return order


def count_batches(num_images: int, batch_size: int) -> int:
    """Batches in an epoch: whole ones only, or one smaller one where the images make none."""
    return max(1, num_images // batch_size)


@dataclass(frozen=True, slots=True)
class _Place:
    """One sample of a training."""

    epoch: int
    index: int
    progress: float


class _PlacedDataset(Dataset[Any]):
    """A data set asked for by places; loading processes keep it, and what it holds, to the end."""

    def __init__(self, dataset: EpochDataset) -> None:
        self.dataset = dataset

    def __getitems__(self, places: Sequence[_Place]) -> Sequence[Any]:
        """The items of a batch, together where the data set has a way of its own for that."""
        self.dataset.set_place(places[0].epoch, places[0].progress)
        indices = [place.index for place in places]
        together = getattr(self.dataset, "__getitems__", None)
        try:
            return together(indices) if together else [self.dataset[index] for index in indices]
        except DataError as error:  # from a loading process it would arrive as a traceback
            return [error]


class _EndlessBatches(Sampler[list[_Place]]):
    """The places of each batch, epoch after epoch; of the others' batches this process has none."""

    def __init__(
        self,
        order_of: Callable[[int], Sequence[int]],
        *,
        batch_size: int,
        epoch: int,
        first_batch: int,
        progress_at: Callable[[int, int], float],
        world: World,
    ) -> None:
        self.order_of, self.batch_size = order_of, batch_size
        self.epoch, self.first_batch = epoch, first_batch
        self.progress_at, self.world = progress_at, world

    def __iter__(self) -> Iterator[list[_Place]]:
        epoch, first = self.epoch, self.first_batch
        while True:
            order = self.order_of(epoch)
            for number in range(first, count_batches(len(order), self.batch_size)):
                start = number * self.batch_size
                mine = order[start : start + self.batch_size][self.world.rank :: self.world.size]
                progress = self.progress_at(epoch, number)
                yield [_Place(epoch, index, progress) for index in mine]
            epoch, first = epoch + 1, 0


def endless_batches(
    dataset: EpochDataset,
    collate: Callable[[Sequence[Any]], Batch],
    order_of: Callable[[int], Sequence[int]],
    *,
    position: Position,
    batch_size: int,
    progress_at: Callable[[int, int], float],
    workers: int,
    seed: int,
    world: World = ALONE,
) -> DataLoader[Any]:
    """Batches from `position` on, without end or pause; those before it are not even loaded.

    order_of(epoch) gives the indices of an epoch, progress_at(epoch, batch) the share of the
    training done when that batch begins. batch_size counts the images of all processes together.
    """
    sampler = _EndlessBatches(
        order_of,
        batch_size=batch_size,
        epoch=position.epoch,
        first_batch=position.batch,
        progress_at=progress_at,
        world=world,
    )
    return DataLoader(
        _PlacedDataset(dataset),
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=partial(_collate_unless_failed, collate),
        worker_init_fn=detach_worker,
        # Its own generator: the loader would draw from the global one, once for each start.
        generator=torch.Generator().manual_seed(seed),
    )


def _collate_unless_failed(
    collate: Callable[[Sequence[Any]], Batch], items: Sequence[Any]
) -> Batch | DataError:
    return items[0] if isinstance(items[0], DataError) else collate(items)


def detach_worker(worker: int) -> None:
    """Keep Ctrl-C and signals to the process group from a loading process; the main one ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.setpgrp()


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The type the network computes in, None for float32; `auto` is bf16 where hardware has it."""
    if precision == "bf16" or (precision == "auto" and computes_bf16(device)):
        return torch.bfloat16
    return None


def computes_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 in hardware; emulated, it would be slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    flags = torch.cpu.get_capabilities()
    in_hardware = flags.get("amx_bf16", False) or flags.get("avx512_bf16", False)
    return bool(in_hardware and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class StopSignals:
    """Within this context Ctrl-C and SIGTERM are noted; a second one acts as it did before.

    Python takes signals in the main thread only; in another one nothing is noted.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        in_main_thread = threading.current_thread() is threading.main_thread()
        for number in (signal.SIGINT, signal.SIGTERM) if in_main_thread else ():
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous = {}


def _list_losses(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.6g}" for name, value in values.items())


def _list_paths(paths: list[Path]) -> str:
    return ", ".join(str(path) for path in paths)
