"""What can be taken out of a network before it is exported, with the same results."""

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

from vovnet.errors import ConfigError
from vovnet.models.deploy import fold_batch_norms
from vovnet.models.vovnet import VoVNet


def fuse_network(network: nn.Module, *, std: Sequence[float]) -> nn.Module:
    """A copy of a classifier or detector in eval mode that takes (pixel - mean), zero-padded, where
    the original takes (pixel - mean) / std: std (RGB in 0..255) goes into the first convolution's
    weights, each BatchNorm into the convolution before it.

    The mean cannot go there too: a convolution pads with zeros behind it, and at the rim its bias
    would count for taps that lie outside.
    """
    fused = deepcopy(network).eval().requires_grad_(False)
    fold_batch_norms(fused)
    weight = first_convolution(fused).weight  # (C, 3, k, k)
    weight.div_(weight.new_tensor(std)[None, :, None, None])
    return fused


def first_convolution(network: nn.Module) -> nn.Conv2d:
    """The one that reads the image."""
    backbone = network if isinstance(network, VoVNet) else network.backbone
    first = backbone.stem[0].conv  # type: ignore[union-attr,index]
    assert isinstance(first, nn.Conv2d)
    return first


def round_weights(network: nn.Module) -> nn.Module:
    """A copy whose large parameters hold values that half precision has.

    Raises ConfigError where one is beyond its range.
    """
    rounded = deepcopy(network)
    for name, weight in large_weights(rounded):
        weight.data = weight.data.half().float()
        if not bool(weight.data.isfinite().all()):
            raise ConfigError(f"export: {name}: expected values that half precision has")
    return rounded


def large_weights(network: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Those of convolutions and linear layers; biases and scales are not worth rounding."""
    return [(name, weight) for name, weight in network.named_parameters() if weight.ndim >= 2]


class CenteredInput(nn.Module):
    """Turns padded uint8 images into what a fused network takes; mean is RGB in 0..255."""

    mean: Tensor

    def __init__(self, mean: Sequence[float]) -> None:
        super().__init__()
        values = torch.tensor(mean, dtype=torch.float32)[None, :, None, None]
        self.register_buffer("mean", values, persistent=False)

    def forward(self, images: Tensor, sizes: Tensor | None = None) -> Tensor:
        """images (B, H, W, 3) uint8 RGB, sizes (B, 2) height and width, None where nothing is
        padded. Returns (B, 3, H, W) float, exactly zero outside the picture.
        """
        centered: Tensor = images.permute(0, 3, 1, 2).to(self.mean.dtype) - self.mean
        if sizes is None:
            return centered
        rows = torch.arange(images.shape[1], device=images.device)[None] < sizes[:, :1]  # (B, H)
        columns = torch.arange(images.shape[2], device=images.device)[None] < sizes[:, 1:]
        inside = rows[:, None, :, None] & columns[:, None, None, :]
        return centered * inside
