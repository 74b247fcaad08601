import pytest
import torch
from torch import nn

from vovnet.profiling.count import count_macs, count_parameters


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.norm(self.depthwise(self.conv(images)))
        return self.head(features.mean((2, 3)))


@pytest.mark.parametrize("batch", [1, 3])
def test_macs_of_convolutions_and_linear_layers_are_exact(batch: int) -> None:
    macs = count_macs(Network(), (torch.rand(batch, 3, 16, 12),))
    per_image = 8 * 6 * (8 * 3 * 9) + 8 * 6 * (8 * 9) + 8 * 5
    assert macs == batch * per_image


def test_counting_leaves_the_network_as_it_was() -> None:
    network = Network()
    network.norm.eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    count_macs(network, (torch.rand(2, 3, 8, 8),))
    for name, value in network.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert network.training
    assert network.conv.training
    assert not network.norm.training


def test_the_mode_is_restored_when_the_pass_fails() -> None:
    network = Network()
    with pytest.raises(RuntimeError):
        count_macs(network, (torch.rand(1, 4, 8, 8),))
    assert network.training


def test_parameters_without_statistics_and_shared_once() -> None:
    network = Network()
    expected = 3 * 8 * 9 + 8 * 9 + 8 + 8 + 8 + 8 * 5 + 5
    assert count_parameters(network) == expected
    assert count_parameters(nn.ModuleList([network, network])) == expected
