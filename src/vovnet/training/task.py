"""What a training does for one kind of model, and what its evaluations give."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from vovnet.model_folder import ModelConfig
from vovnet.training.checkpoint import Position
from vovnet.training.loop import EpochDataset, StopSignals
from vovnet.training.step import LossStep

ADVICE = "try it: vovnet predict --model {folder} --source FILES"


class Metrics(Protocol):
    """What an evaluation gives."""

    def main(self) -> float:
        """The figure by which the best weights are chosen, higher is better."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""

    def format(self) -> str:
        """A few lines of text."""


class Task(Protocol):
    """What a training does for one kind of model.

    spent_s        seconds that its preparation took of the time the training may take
    skipped        what of the data was left out, one line each
    notes          what else its user should know before it begins, one line each
    chooses_best   whether the weights of the best evaluation are kept, else those of the last
    advice         what to do with the model, in whose place {folder} stands
    """

    spent_s: float
    skipped: list[str]
    notes: list[str]
    chooses_best: bool
    advice: str
    class_names: tuple[str, ...]

    @property
    def dataset(self) -> EpochDataset:
        """Augmented samples of the train split."""

    @property
    def num_train(self) -> int:
        """Pictures to train on."""

    @property
    def num_val(self) -> int:
        """Pictures to evaluate on."""

    def build_model(self) -> nn.Module:
        """The network for the data's classes, weights as the config says."""

    def loss_step(self, model: nn.Module, frozen: Sequence[nn.Module]) -> LossStep:
        """From a batch to the named losses of the model."""

    def collate(self, items: Any) -> Any:
        """A batch of the data set's items."""

    def order_of(self, epoch: int) -> Sequence[int]:
        """The order of the pictures in an epoch."""

    def evaluate(
        self, model: nn.Module, *, bootstrap: int = 0, stop: StopSignals | None = None
    ) -> Metrics | None:
        """Figures on the validation split; None when stopped."""

    def model_config(
        self, metrics: Any, *, position: Position, device: torch.device
    ) -> ModelConfig:
        """The model folder's config.json."""

    def card(
        self, model_config: ModelConfig, model: nn.Module, metrics: Any, *, file_bytes: int
    ) -> str:
        """README.md of the model folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """How a training ended; without metrics and model folder when it was interrupted, and in all
    processes but the first.
    """

    run_dir: Path
    interrupted_by: int | None = None  # number of the signal
    model_dir: Path | None = None
    metrics: Metrics | None = None

    @property
    def exit_code(self) -> int:
        """0, or 130 after Ctrl-C and 143 after SIGTERM."""
        return 0 if self.interrupted_by is None else 128 + self.interrupted_by
