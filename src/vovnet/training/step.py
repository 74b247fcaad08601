"""One training step's forward pass as a module: what a compiler or a distributed wrapper wraps."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, Self, cast

from torch import Tensor, nn

from vovnet.models.boxes import Target


class Batch(Protocol):
    """Images uint8 (B, H, W, 3) RGB of sizes int64 (B, 2), what they show, and their files."""

    images: Tensor
    sizes: Tensor
    targets: Any
    paths: list[Path]

    def to(self, device: Any) -> Self:
        """The same batch on a device."""


class TrainableDetector(Protocol):
    """What training needs of a detector; it is an nn.Module too."""

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Raw outputs for normalised images (B, 3, H, W)."""

    def loss(
        self, raw: dict[str, Tensor], targets: Sequence[Target], sizes: Tensor
    ) -> dict[str, Tensor]:
        """Named scalar losses, every name in every step."""


class LossStep(nn.Module):
    """From a batch of bytes and its targets to the named losses of a model.

    The `frozen` parts of the model stay as they are, BatchNorm's statistics too.
    """

    def __init__(
        self, model: nn.Module, normalize: nn.Module, *, frozen: Sequence[nn.Module] = ()
    ) -> None:
        super().__init__()
        self.model = model
        self.normalize = normalize
        self.frozen = tuple(frozen)
        for part in self.frozen:
            part.requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """As in torch, without the frozen parts."""
        super().train(mode)
        for part in self.frozen:
            part.eval()
        return self


class DetectorStep(LossStep):
    """The losses of a detector, which it computes itself."""

    def forward(
        self, images: Tensor, sizes: Tensor, targets: Sequence[Target]
    ) -> dict[str, Tensor]:
        """Losses of uint8 RGB images (B, H, W, 3), of which sizes (B, 2) hold height and width.

        Boxes of the targets are in pixels of these images. Returns named scalars to be summed.
        """
        detector = cast(TrainableDetector, self.model)
        raw = detector(self.normalize(images, sizes))
        return detector.loss(raw, targets, sizes)


def total_loss(losses: dict[str, Tensor]) -> Tensor:
    """The sum that is minimised; each loss carries its own weight already."""
    values = list(losses.values())
    if not values:
        raise ValueError("losses: expected at least one named loss, got none")
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total
