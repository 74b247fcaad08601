"""What is folded into weights leaves the results as they were, at the rim above all."""

import pytest
import torch
from torch import nn

from vovnet.errors import ConfigError
from vovnet.export.fuse import CenteredInput, fuse_network, large_weights, round_weights
from vovnet.models.layers import Normalize
from vovnet.models.vovnet import VARIANTS
from vovnet.models.zoo import create_model

MEAN, STD = (123.675, 116.28, 103.53), (40.0, 60.0, 90.0)
SMALL = {
    "stem_channels": (16, 16, 32),
    "stage_conv_channels": (16, 16, 32, 32),
    "stage_out_channels": (32, 32, 64, 64),
}


def small_network(variant: str) -> nn.Module:
    """A variant with few channels whose BatchNorms do something."""
    torch.manual_seed(0)
    network = create_model(variant, num_classes=5, overrides=SMALL).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return network


@pytest.mark.parametrize("variant", sorted(VARIANTS))
@pytest.mark.parametrize(
    ("side", "sizes"),
    [
        ((65, 97), [[65, 97]]),  # odd, nothing padded
        ((64, 96), [[64, 96], [33, 41]]),  # a batch with padding
    ],
)
def test_the_fused_network_gives_the_same(
    variant: str, side: tuple[int, int], sizes: list[list[int]]
) -> None:
    network = small_network(variant)
    images = torch.randint(
        0,
        256,
        (len(sizes), *side, 3),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(1),
    )
    given = torch.tensor(sizes)
    exact, fused = (_features(network, torch.float64, images, given, f) for f in (False, True))
    assert exact.std() > 1e-3 * exact.abs().max() > 0
    assert (fused - exact).abs().max() <= 1e-10 * exact.abs().max()
    plain, fused = (_features(network, torch.float32, images, given, f) for f in (False, True))
    rounding = (plain - exact).abs().max()  # of the network itself; large in the deepest
    assert (fused - exact).abs().max() <= max(1e-5 * exact.abs().max(), 3 * rounding)


def _features(
    network: nn.Module, dtype: torch.dtype, images: torch.Tensor, sizes: torch.Tensor, fuse: bool
) -> torch.Tensor:
    """The last map, in float64."""
    network.to(dtype)
    body = fuse_network(network, std=STD) if fuse else network
    entry = CenteredInput(MEAN) if fuse else Normalize(MEAN, STD)
    with torch.inference_mode():
        return body.forward_features(entry.to(dtype)(images, sizes)).double()


def test_the_original_stays_as_it_was() -> None:
    network = small_network("ese_vovnet19b")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    fused = fuse_network(network, std=STD)
    assert {name for name, _ in fused.named_modules()} == {
        name for name, _ in network.named_modules()
    }
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    after = network.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_without_padding_sizes_are_not_needed() -> None:
    images = torch.randint(0, 256, (2, 5, 7, 3), dtype=torch.uint8)
    sizes = torch.tensor([[5, 7], [5, 7]])
    center = CenteredInput(MEAN)
    assert torch.equal(center(images), center(images, sizes))
    cut = center(images, torch.tensor([[5, 7], [3, 4]]))
    assert (cut[1, :, 3:] == 0).all()
    assert (cut[1, :, :, 4:] == 0).all()
    assert torch.equal(cut[1, :, :3, :4], center(images)[1, :, :3, :4])


def test_rounded_weights_are_those_of_half_precision() -> None:
    network = small_network("ese_vovnet19b")
    rounded = dict(round_weights(network).named_parameters())
    large = {name for name, _ in large_weights(network)}
    for name, value in network.named_parameters():
        expected = value.half().float() if name in large else value
        assert torch.equal(rounded[name], expected)
    assert "head.fc.weight" in large
    assert "head.fc.bias" not in large


def test_weights_beyond_half_precision_are_refused() -> None:
    network = small_network("ese_vovnet19b")
    nn.init.constant_(network.head.fc.weight, 1e6)
    with pytest.raises(ConfigError, match=r"head\.fc\.weight: expected values that half"):
        round_weights(network)
