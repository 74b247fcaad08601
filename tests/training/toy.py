"""A detector and a data set of a few numbers, for tests of the loop."""

from pathlib import Path

import torch
from torch import Tensor, nn

from vovnet.data.augment import collate_train
from vovnet.models.boxes import Target
from vovnet.models.layers import Normalize
from vovnet.training.checkpoint import Position
from vovnet.training.loop import (
    Budget,
    Schedule,
    count_batches,
    endless_batches,
    epoch_order,
    train_steps,
)
from vovnet.training.optim import Ema, build_optimizer
from vovnet.training.step import DetectorStep


class ToyDetector(nn.Module):
    """Has what makes resuming hard: BatchNorm's statistics and draws from the global generator."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.norm(self.conv(images)).relu().mean((2, 3))
        return {"size": self.head(nn.functional.dropout(features, 0.5, self.training))}

    def loss(self, raw: dict[str, Tensor], targets: list[Target], sizes: Tensor):
        sides = torch.stack([t.boxes_xyxy[:, 2:].mean(0) for t in targets]) / sizes
        return {
            "loss_size": (raw["size"] - sides).square().mean(),
            "loss_small": raw["size"].abs().mean(),
        }


class ToyDataset:
    """Sample i of an epoch depends on both; remembers which samples were loaded."""

    def __init__(self, length: int = 10, bad_index: int | None = None) -> None:
        self.length = length
        self.bad_index = bad_index
        self.epoch = -1
        self.loaded: list[int] = []

    def set_place(self, epoch: int, progress: float) -> None:
        self.epoch, self.progress = epoch, progress

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Target, Path]:
        self.loaded.append(index)
        generator = torch.Generator().manual_seed(1000 * self.epoch + index)
        image = torch.randint(0, 256, (8, 8, 3), generator=generator, dtype=torch.uint8)
        boxes = torch.tensor([[0.0, 0.0, 3.0, float("nan") if index == self.bad_index else 4.0]])
        target = Target(boxes_xyxy=boxes, labels=torch.zeros(1, dtype=torch.int64))
        return image, target, Path(f"image{index}.png")


class ToyTraining:
    """Everything that a loop needs, made anew from the seed."""

    batch_size = 3
    seed = 5

    def __init__(
        self,
        *,
        total_steps: int = 8,
        workers: int = 0,
        learning_rate: float = 0.1,
        bad: int | None = None,
    ) -> None:
        torch.manual_seed(self.seed)
        self.detector = ToyDetector()
        self.loss_step = DetectorStep(self.detector, Normalize((128.0,) * 3, (64.0,) * 3))
        self.optimizer = build_optimizer(
            self.detector, "sgd", learning_rate=learning_rate, momentum=0.9, weight_decay=1e-4
        )
        self.ema = Ema(self.detector, 0.9)
        self.dataset = ToyDataset(bad_index=bad)
        self.position = Position()
        self.workers = workers
        self.schedule = Schedule(
            learning_rate=learning_rate,
            warmup_fraction=0.2,
            warmup_steps=None,
            budget=Budget(total_steps=total_steps),
        )

    def batches(self, position: Position) -> "torch.utils.data.DataLoader[object]":
        return endless_batches(
            self.dataset,
            collate_train,
            lambda epoch: epoch_order(len(self.dataset), seed=self.seed, epoch=epoch),
            position=position,
            batch_size=self.batch_size,
            progress_at=lambda epoch, batch: 0.0,
            workers=self.workers,
            seed=self.seed,
        )

    def steps(self, *, clip_norm: float | None = 1.0, autocast_dtype: torch.dtype | None = None):
        return train_steps(
            self.loss_step,
            self.detector,
            self.optimizer,
            self.ema,
            batches=self.batches(self.position),
            batches_per_epoch=count_batches(len(self.dataset), self.batch_size),
            position=self.position,
            schedule=self.schedule,
            clip_norm=clip_norm,
            autocast_dtype=autocast_dtype,
            device=torch.device("cpu"),
        )
