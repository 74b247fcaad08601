"""One training step's forward pass as a module: what a compiler or a distributed wrapper wraps."""

from collections.abc import Sequence
from typing import Protocol, cast

from torch import Tensor, nn

from vovnet.models.boxes import Target


class TrainableDetector(Protocol):
    """What training needs of a detector; it is an nn.Module too."""

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Raw outputs for normalised images (B, 3, H, W)."""

    def loss(
        self, raw: dict[str, Tensor], targets: Sequence[Target], sizes: Tensor
    ) -> dict[str, Tensor]:
        """Named scalar losses, every name in every step."""


class LossStep(nn.Module):
    """From a batch of bytes and its targets to the detector's named losses."""

    def __init__(self, detector: nn.Module, normalize: nn.Module) -> None:
        super().__init__()
        self.detector = detector
        self.normalize = normalize

    def forward(
        self, images: Tensor, sizes: Tensor, targets: Sequence[Target]
    ) -> dict[str, Tensor]:
        """Losses of uint8 RGB images (B, H, W, 3), of which sizes (B, 2) hold height and width.

        Boxes of the targets are in pixels of these images. Returns named scalars to be summed.
        """
        detector = cast(TrainableDetector, self.detector)
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
