"""The training loop: batches, forward, losses, backward, clip, step, average; nothing hooks in."""

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Protocol, Self, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from vovnet.data.augment import TrainBatch, collate_train
from vovnet.errors import TrainingError
from vovnet.training.checkpoint import Position
from vovnet.training.optim import Ema, learning_rate_factor, set_learning_rate
from vovnet.training.step import LossStep, total_loss


class EpochDataset(Protocol):
    """A data set whose samples depend on the epoch."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the samples of an epoch."""

    def __len__(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Budget:
    """How long a training lasts: steps, or seconds of wall time; exactly one is set."""

    total_steps: int | None = None
    max_seconds: float | None = None

    def spent_fraction(self, position: Position) -> float:
        """Share of the training that is done, 0..1."""
        if self.total_steps is not None:
            return min(1.0, position.step / self.total_steps)
        assert self.max_seconds is not None
        return min(1.0, position.spent_s / self.max_seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """The learning rate over a training."""

    learning_rate: float
    warmup_fraction: float | None
    warmup_steps: int | None
    budget: Budget

    def at(self, position: Position) -> float:
        """Learning rate of the step that follows `position`."""
        return self.learning_rate * learning_rate_factor(
            self.budget.spent_fraction(position),
            position.step,
            warmup_fraction=self.warmup_fraction,
            warmup_steps=self.warmup_steps,
        )


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What one step did."""

    losses: dict[str, float]
    learning_rate: float
    gradient_norm: float
    num_images: int


def train_steps(
    loss_step: LossStep,
    optimizer: torch.optim.Optimizer,
    ema: Ema,
    *,
    batches_of: Callable[[int, int], Iterable[TrainBatch]],
    batches_per_epoch: int,
    position: Position,
    schedule: Schedule,
    clip_norm: float | None,
    autocast_dtype: torch.dtype | None,
    device: torch.device,
) -> Iterator[StepRecord]:
    """Train from `position` to the end of the schedule's budget, giving a record after each step.

    `batches_of(epoch, first_batch)` gives the batches of an epoch from one of them on. `position`
    moves along and is exact whenever a record is given: a checkpoint of then goes on from there.
    Raises TrainingError naming the batch's images when a loss or a gradient is not finite.
    """
    started_s = time.monotonic() - position.spent_s
    while schedule.budget.spent_fraction(position) < 1.0:
        if position.batch >= batches_per_epoch:  # resumed with fewer images than before
            position.epoch, position.batch = position.epoch + 1, 0
        for batch in batches_of(position.epoch, position.batch):
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
            ema.update(loss_step.detector)
            position.step += 1
            position.batch += 1
            if position.batch == batches_per_epoch:
                position.epoch, position.batch = position.epoch + 1, 0
            position.spent_s = time.monotonic() - started_s
            yield StepRecord(losses, learning_rate, gradient_norm, len(batch.paths))
            if schedule.budget.spent_fraction(position) >= 1.0:
                return


def train_step(
    loss_step: LossStep,
    optimizer: torch.optim.Optimizer,
    batch: TrainBatch,
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


def epoch_batches(
    dataset: EpochDataset, *, epoch: int, first_batch: int, batch_size: int, seed: int, workers: int
) -> DataLoader[TrainBatch]:
    """The batches of an epoch from `first_batch` on; those before it are not even loaded."""
    dataset.set_epoch(epoch)
    order = epoch_order(len(dataset), seed=seed, epoch=epoch)
    starts = range(0, count_batches(len(order), batch_size) * batch_size, batch_size)
    batches = [order[start : start + batch_size] for start in starts]
    return DataLoader(
        cast(Dataset[TrainBatch], dataset),
        batch_sampler=batches[first_batch:],
        num_workers=workers,
        collate_fn=collate_train,
        worker_init_fn=detach_worker,
        # Its own generator: the loader would draw from the global one, once for each start.
        generator=torch.Generator().manual_seed(seed),
    )


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
