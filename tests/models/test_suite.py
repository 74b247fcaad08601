"""What every variant of the table must do, at inputs as small as they may be."""

import copy
from dataclasses import replace
from math import inf

import pytest
import torch
from torch import Tensor

from vovnet.models.vovnet import VARIANTS, VoVNet, VoVNetConfig, VoVNetFeatures
from vovnet.models.zoo import create_model

SIZE = (33, 47)


def shallow(name: str) -> VoVNetConfig:
    """A variant with at most two blocks in a stage: all that follow are like the second."""
    config = VARIANTS[name]
    first, second, third, fourth = (min(count, 2) for count in config.blocks_per_stage)
    return replace(config, blocks_per_stage=(first, second, third, fourth))


# Variants that differ in nothing but the number of blocks are one here.
LAYOUTS = {shallow(name): name for name in reversed(VARIANTS)}


@pytest.fixture(scope="module", params=VARIANTS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(name: str) -> VoVNet:
    """In training mode, its statistics moved off their start; tests leave it as it is."""
    torch.manual_seed(0)
    model = create_model(name, num_classes=10).train()
    with torch.no_grad():
        model(random_images(4))
    return model


def random_images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, *SIZE, generator=torch.Generator().manual_seed(count))


def halved(size: int, *, by_pool: bool) -> int:
    """A 3-wide window at every second pixel, padded (convolution) or cut at the end (pool)."""
    return size // 2 if by_pool and size > 1 else (size + 1) // 2


def logits_of(model: VoVNet, images: Tensor) -> Tensor:
    model.eval()
    try:
        with torch.no_grad():
            return model(images)
    finally:
        model.train()


def test_maps_are_as_declared_at_an_odd_size(name: str, model: VoVNet) -> None:
    model.eval()
    with torch.no_grad():
        _, maps = model.forward_intermediates(random_images())
    model.train()
    sizes = [tuple(halved(size, by_pool=False) for size in SIZE)]
    for stage in range(4):
        by_pool = stage > 0 or VARIANTS[name].stem == "paper"
        sizes.append(tuple(halved(size, by_pool=by_pool) for size in sizes[-1]))
    assert [one.shape[2:] for one in maps] == sizes
    assert [one.shape[1] for one in maps] == model.feature_info.channels()
    assert all(one.isfinite().all() for one in maps)


@pytest.mark.parametrize("config", LAYOUTS, ids=LAYOUTS.values())
@pytest.mark.parametrize("output_stride", [8, 16])
def test_maps_are_as_declared_with_dilation(config: VoVNetConfig, output_stride: int) -> None:
    with torch.device("meta"):
        model = VoVNetFeatures(config, output_stride=output_stride)
        maps = model(torch.zeros(1, 3, 64, 96))
    expected = [min(stride, output_stride) for stride in (2, 4, 8, 16, 32)]
    assert model.feature_info.reduction() == expected
    assert [tuple(one.shape[2:]) for one in maps] == [(64 // s, 96 // s) for s in expected]
    assert [one.shape[1] for one in maps] == model.feature_info.channels()


def gradients(model: VoVNet) -> dict[str, Tensor | None]:
    torch.manual_seed(0)
    model.zero_grad(set_to_none=True)
    model(random_images(4)).square().sum().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def test_every_parameter_learns_with_and_without_checkpointing(model: VoVNet) -> None:
    plain = gradients(model)
    for name, gradient in plain.items():
        assert gradient is not None, name
        assert 0 < gradient.abs().sum().item() < inf, name
    model.set_grad_checkpointing(True)
    checkpointed = gradients(model)
    model.set_grad_checkpointing(False)
    for name, gradient in plain.items():
        assert (checkpointed[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_channels_last_gives_the_same_logits(model: VoVNet) -> None:
    expected = logits_of(model, random_images())
    turned = copy.deepcopy(model).to(memory_format=torch.channels_last)
    actual = logits_of(turned, random_images().contiguous(memory_format=torch.channels_last))
    assert (actual - expected).norm() <= 1e-4 * expected.norm()


def test_bfloat16_gives_nearly_the_same_logits(model: VoVNet) -> None:
    expected = logits_of(model, random_images())
    half = copy.deepcopy(model).bfloat16()
    actual = logits_of(half, random_images().bfloat16())
    assert actual.dtype == torch.bfloat16
    # Eight bits of mantissa through 57 layers; the worst of the variants differs by 0.09.
    assert (actual.float() - expected).norm() <= 0.15 * expected.norm()


@pytest.mark.parametrize("config", LAYOUTS, ids=LAYOUTS.values())
def test_the_exported_graph_gives_the_same_logits(config: VoVNetConfig) -> None:
    torch.manual_seed(0)
    model = VoVNet(config, num_classes=10).eval()
    with torch.no_grad():
        expected = model(random_images())
    exported = torch.export.export(model, (random_images(),))
    with torch.no_grad():
        actual = exported.module()(random_images())
    assert (actual - expected).norm() <= 1e-5 * expected.norm()
