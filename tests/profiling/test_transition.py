import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models import DenseNet

from vovnet.errors import ConfigError
from vovnet.model_folder import load_config, load_tensors, resolve_model
from vovnet.models.vovnet import OsaBlock
from vovnet.models.zoo import create_model
from vovnet.profiling.transition import TransitionMap, transition_weights
from vovnet.profiling.transition_plot import draw_transition


def set_sources(weight: Tensor, widths: list[int], values: list[float]) -> None:
    """Weights of both signs whose mean magnitude is one value for each source."""
    with torch.no_grad():
        for part, value in zip(weight.split(widths, dim=1), values, strict=True):
            part.uniform_(0.5, 1.5)
            part.mul_(value / part.mean())
            part[::2].mul_(-1)


def small_densenet() -> DenseNet:
    torch.manual_seed(0)
    return DenseNet(growth_rate=4, block_config=(2, 3), num_init_features=8, num_classes=10)


@pytest.fixture
def slim() -> nn.Module:
    torch.manual_seed(0)
    return create_model("ese_vovnet19b_slim", num_classes=2)


def test_the_aggregation_is_split_by_source(slim: nn.Module) -> None:
    block = slim.stages[1].blocks[0]
    assert isinstance(block, OsaBlock)
    set_sources(block.conv_concat.conv.weight, [112, 80, 80, 80], [0.1, 0.4, 0.2, 0.3])
    nn.init.constant_(block.conv_mid[1].conv.weight, -0.7)
    found = transition_weights(slim, normalise=False)
    assert [block_map.name for block_map in found] == [
        f"stages.{stage}.blocks.0" for stage in range(4)
    ]
    second = found[1]
    assert second.sources == ("input", "conv 1", "conv 2", "conv 3")
    assert second.targets == ("conv 1", "conv 2", "conv 3", "aggregation")
    assert not second.normalised
    torch.testing.assert_close(second.weights[:, -1], torch.tensor([0.1, 0.4, 0.2, 0.3]))
    assert float(second.weights[1, 1]) == pytest.approx(0.7)
    chain = second.weights[:, :-1]
    assert torch.equal(~chain.isnan(), torch.eye(4, dtype=torch.bool)[:, :-1])


def test_columns_are_divided_by_their_maximum(slim: nn.Module) -> None:
    raw, normal = transition_weights(slim, normalise=False)[2], transition_weights(slim)[2]
    assert normal.normalised
    maxima = raw.weights.nan_to_num(0).amax(0)
    torch.testing.assert_close(normal.weights * maxima, raw.weights, equal_nan=True)
    assert normal.weights.nan_to_num(0).amax(0).tolist() == [1.0] * 4


def test_a_column_of_zeros_stays() -> None:
    model = small_densenet()
    nn.init.zeros_(model.features.transition1.conv.weight)
    assert transition_weights(model)[0].weights[:, -1].tolist() == [0.0] * 3


def test_depthwise_layers_show_their_pointwise_weights() -> None:
    model = create_model("ese_vovnet19b_slim_dw", num_classes=2)
    block = model.stages[0].blocks[0]
    nn.init.constant_(block.conv_mid[0].conv_pw.weight, 0.25)
    nn.init.constant_(block.conv_mid[0].conv_dw.weight, 9.0)
    found = transition_weights(model, normalise=False)[0]
    assert float(found.weights[0, 0]) == 0.25
    width = block.conv_concat.conv.weight[:, :64]
    assert float(found.weights[0, -1]) == pytest.approx(float(width.abs().mean().detach()))


def test_dense_blocks_have_a_triangle() -> None:
    model = small_densenet()
    set_sources(model.features.denseblock2.denselayer3.conv1.weight, [8, 4, 4], [0.3, 0.1, 0.2])
    set_sources(model.features.transition1.conv.weight, [8, 4, 4], [0.5, 0.6, 0.7])
    set_sources(model.classifier.weight, [8, 4, 4, 4], [1, 2, 3, 4])
    first, second = transition_weights(model, normalise=False)
    assert (first.name, second.name) == ("features.denseblock1", "features.denseblock2")
    assert first.targets == ("layer 1", "layer 2", "transition")
    assert second.targets == ("layer 1", "layer 2", "layer 3", "classifier")
    torch.testing.assert_close(first.weights[:, -1], torch.tensor([0.5, 0.6, 0.7]))
    torch.testing.assert_close(second.weights[:3, 2], torch.tensor([0.3, 0.1, 0.2]))
    torch.testing.assert_close(second.weights[:, -1], torch.tensor([1.0, 2, 3, 4]))
    seen = torch.ones(4, 4, dtype=torch.bool).triu()
    assert torch.equal(~second.weights.isnan(), seen)


def test_blocks_inside_another_network_are_found() -> None:
    outer = nn.ModuleDict({"body": small_densenet(), "other": nn.Conv2d(1, 1, 1)})
    names = [block_map.name for block_map in transition_weights(outer)]
    assert names == ["body.features.denseblock1", "body.features.denseblock2"]


def test_the_bundled_detector_has_transition_weights() -> None:
    folder = resolve_model("nuclei")
    config = load_config(folder)
    model = create_model(config.architecture, **config.model_args)
    tensors = load_tensors(folder)
    model.load_state_dict({name: torch.from_numpy(value) for name, value in tensors.items()})
    found = transition_weights(model, normalise=False)
    assert [block_map.name for block_map in found] == [
        f"fcos.backbone.stages.{stage}.blocks.0" for stage in range(4)
    ]
    last = np.abs(tensors["fcos.backbone.stages.3.blocks.0.conv_concat.conv.weight"]).astype(float)
    assert float(found[3].weights[-1, -1]) == pytest.approx(float(last[:, -112:].mean()), rel=1e-5)


def test_a_network_without_such_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"expected a network with OSA blocks .* got Conv2d"):
        transition_weights(nn.Conv2d(1, 1, 1))


def striped(name: str, size: int) -> TransitionMap:
    weights = torch.full((size, size), torch.nan)
    weights[0, :] = 1.0
    names = tuple(map(str, range(size)))
    return TransitionMap(name=name, sources=names, targets=names, weights=weights)


@pytest.mark.parametrize("count", [1, 5])
def test_a_picture_is_drawn(count: int, tmp_path: Path) -> None:
    path = tmp_path / "maps.png"
    draw_transition([striped(f"block {index}", 4 + 9 * index) for index in range(count)], path)
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
    yellow = np.abs(pixels.astype(int) - (253, 231, 37)).max(1) < 8  # the top of the scale
    assert yellow.mean() > 0.005
    assert (pixels == 255).all(1).mean() > 0.3


@pytest.mark.parametrize("name", ["maps", "maps.txt"])
def test_a_suffix_that_is_no_picture_leaves_nothing(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a picture's suffix"):
        draw_transition([striped("block", 3)], tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least one"):
        draw_transition([], tmp_path / "maps.png")


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match="expected matplotlib, found none"):
        draw_transition([striped("block", 3)], tmp_path / "maps.png")
