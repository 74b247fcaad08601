"""Published layouts against a restatement of them, and the options that no variant has."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.models.golden import BACKBONES
from tests.models.restatement import PUBLISHED, Published, Weights, run
from vovnet.errors import ConfigError
from vovnet.models.convert import convert
from vovnet.models.layers import (
    AtrousMaxPool,
    DeformableConvNormAct,
    adapt_input_channels,
    make_norm,
)
from vovnet.models.rename import rename
from vovnet.models.vovnet import VARIANTS, VoVNet, VoVNetConfig
from vovnet.models.zoo import create_model

GOLDEN = {case["name"]: case for case in BACKBONES}
GOLDEN_NAMES = {
    "vovnet27_slim": "vovnet27_slim",
    "vovnet39": "vovnet39",
    "ese_vovnet19_slim_dw_d2": "V-19-slim-dw-eSE",
    "ese_vovnet19_slim_d2": "V-19-slim-eSE",
    "ese_vovnet39_d2": "V-39-eSE",
}
BEYOND_GOLDEN = [name for name in PUBLISHED if name not in GOLDEN_NAMES]
ALSO_AT_224 = {"vovnet27_slim_paper", "ese_vovnet19_dw_d2"}


def random_images(height: int, width: int) -> Tensor:
    return torch.from_numpy(np.random.RandomState(0).standard_normal((1, 3, height, width)))


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_the_restatement_is_what_the_authors_ran(name: str) -> None:
    case = GOLDEN[GOLDEN_NAMES[name]]
    weights = Weights(counters=PUBLISHED[name].classifier)
    maps = run(PUBLISHED[name], weights, random_images(97, 65))
    assert {key: list(value.shape) for key, value in weights.items()} == case["keys"]
    for part, expected in case["outputs"][1]["features"].items():
        assert list(maps[part].shape) == expected["shape"]
        assert maps[part].abs().sum().item() == pytest.approx(expected["abs_sum"], rel=1e-9)
        values = maps[part].flatten()[expected["index"]].tolist()
        assert values == pytest.approx(expected["value"], rel=1e-9, abs=1e-9)


def assert_same(net: Published, model: nn.Module, sizes: list[tuple[int, int]]) -> Weights:
    """The network with the weights of the restatement, converted, against the restatement."""
    weights = Weights(counters=net.classifier)
    restated = [run(net, weights, random_images(*size)) for size in sizes]
    problems = model.double().eval().load_state_dict(rename(weights).tensors, strict=False)
    assert problems.unexpected_keys == []
    assert all(key.endswith("num_batches_tracked") for key in problems.missing_keys)
    for size, expected in zip(sizes, restated, strict=True):
        images = random_images(*size)
        if not net.classifier:
            images = images.flip(1)  # detectron2's networks see BGR, and ours RGB
        with torch.no_grad():
            last, maps = model.forward_intermediates(images)
        actual = dict(zip(("stage2", "stage3", "stage4", "stage5"), maps[1:], strict=True))
        if net.classifier:
            actual["logits"] = model.forward_head(last)
        for part, value in actual.items():
            assert value.shape == expected[part].shape
            assert (value - expected[part]).norm() <= 1e-11 * expected[part].norm(), part
    return weights


@pytest.mark.parametrize("name", BEYOND_GOLDEN)
def test_a_published_network_equals_its_restatement(name: str) -> None:
    net = PUBLISHED[name]
    model = create_model(name, num_classes=1000 if net.classifier else 0)
    sizes = [(97, 65), (224, 224)] if name in ALSO_AT_224 else [(97, 65)]
    weights = assert_same(net, model, sizes)
    if not net.pools_before_stage_2:  # of the paper's own layout there is no checkpoint
        assert convert(weights).architecture == name


def test_depthwise_with_several_blocks_per_stage() -> None:
    widths = {"stem": (64, 64, 64), "mid": (64, 80, 96, 112), "out": (112, 256, 384, 512)}
    net = Published(**widths, layers=3, blocks=(1, 2, 3, 2), depthwise=True)
    config = replace(VARIANTS["ese_vovnet19_slim_dw_d2"], blocks_per_stage=net.blocks)
    assert_same(net, VoVNet(config, num_classes=0), [(97, 65)])


def assert_equals_timm(config: VoVNetConfig, **settings: object) -> None:
    vovnet = pytest.importorskip("timm.models.vovnet", reason="timm is the oracle of this test")
    torch.manual_seed(0)
    theirs = vovnet.VovNet(vovnet.model_cfgs["ese_vovnet19b"] | settings).eval()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    with torch.device("meta"):
        ours = VoVNet(config).eval()
    ours.load_state_dict(theirs.state_dict(), assign=True)
    images = torch.randn(2, 3, 97, 65)
    with torch.no_grad():
        expected, actual = theirs(images), ours(images)
    assert (actual - expected).norm() <= 1e-5 * expected.norm()


def test_the_network_without_a_name_in_timm_equals_its_class() -> None:
    assert_equals_timm(VARIANTS["ese_vovnet19b"])


def test_squeeze_and_excitation_and_the_stem_of_the_paper_equal_timm() -> None:
    config = replace(VARIANTS["ese_vovnet19b"], attention="se", stem="paper")
    assert_equals_timm(config, attn="se", stem_stride=2)


def test_narrow_channel_attention_equals_timm() -> None:
    out = (112, 256, 384, 512)
    config = replace(VARIANTS["ese_vovnet19b"], attention="eca", stage_out_channels=out)
    assert_equals_timm(config, attn="eca", stage_out_chs=list(out))


TINY = VoVNetConfig(
    stem_channels=(8, 8, 16),
    stage_conv_channels=(8, 8, 8, 8),
    stage_out_channels=(16, 16, 24, 32),
    layers_per_block=2,
    blocks_per_stage=(1, 1, 2, 2),
)


@pytest.mark.parametrize(
    "settings",
    [{}, {"stem": "paper"}, {"depthwise": True}, {"deformable_stages": (3, 4, 5)}],
    ids=["plain", "paper", "depthwise", "deformable"],
)
@pytest.mark.parametrize("output_stride", [8, 16])
def test_dilation_keeps_the_values_of_the_strided_network(
    settings: dict, output_stride: int
) -> None:
    torch.manual_seed(0)
    strided = VoVNet(replace(TINY, **settings), num_classes=0).double().eval()
    for module in strided.modules():
        if isinstance(module, DeformableConvNormAct):  # whole pixels need no reading in between
            module.conv_offset.bias.data[:18] = torch.randint(-2, 3, (18,)).double()
            module.conv_offset.weight.data[18:].normal_()
    dilated = VoVNet(replace(TINY, **settings), num_classes=0, output_stride=output_stride)
    dilated.double().eval().load_state_dict(strided.state_dict())
    images = torch.randn(2, 3, 128, 64).double()
    with torch.no_grad():
        coarse = strided.forward_intermediates(images, intermediates_only=True)
        fine = dilated.forward_intermediates(images, intermediates_only=True)
    for one, other, info in zip(coarse, fine, dilated.feature_info, strict=True):
        assert other.shape[2:] == (128 // info["reduction"], 64 // info["reduction"])
        step = other.shape[2] // one.shape[2]
        torch.testing.assert_close(other[:, :, ::step, ::step], one)
    assert dilated.feature_info.reduction()[-1] == output_stride


@pytest.mark.parametrize("size", [(7, 8), (3, 4), (1, 2)])
def test_the_pool_at_every_pixel_holds_the_strided_one(size: tuple[int, int]) -> None:
    images = -torch.rand(1, 2, *size)  # below zero: nothing beyond the map may win
    strided = nn.functional.max_pool2d(images, 3, 2, ceil_mode=True) if min(size) > 2 else None
    fine = AtrousMaxPool(1)(images)
    assert fine.shape == images.shape
    assert fine.isfinite().all()
    if strided is not None:
        height, width = strided.shape[2:]
        torch.testing.assert_close(fine[:, :, ::2, ::2][:, :, :height, :width], strided)


def test_frozen_statistics_give_the_same_map() -> None:
    torch.manual_seed(0)
    trained = VoVNet(TINY, num_classes=3)
    trained(torch.randn(4, 3, 64, 64))  # moves the statistics
    frozen = VoVNet(replace(TINY, norm="frozen_bn"), num_classes=3)
    frozen.load_state_dict(trained.state_dict(), strict=False)
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(frozen.train()(images), trained.eval()(images))


@pytest.mark.parametrize("norm", ["gn", "evonorm_s0"])
def test_every_norm_goes_with_slim_widths(norm: str) -> None:
    config = replace(VARIANTS["ese_vovnet19b_slim"], norm=norm)
    with torch.device("meta"):
        logits = VoVNet(config)(torch.zeros(2, 3, 64, 64))
    assert logits.shape == (2, 1000)


def test_group_statistics_are_of_each_group() -> None:
    torch.manual_seed(0)
    for channels, groups in ((64, 32), (112, 16)):
        images = torch.randn(2, channels, 3, 5) * torch.rand(channels)[:, None, None]
        grouped = images.reshape(2, groups, -1)
        std = (grouped.var(2, unbiased=False) + 1e-5).sqrt()
        std = std.repeat_interleave(channels // groups, 1)[:, :, None, None]
        expected = images * images.sigmoid() / std
        torch.testing.assert_close(make_norm("evonorm_s0", channels)(images), expected)


@pytest.mark.parametrize("in_chans", [1, 2, 3, 4, 6, 7])
def test_input_channels_are_adapted_as_in_timm(in_chans: int) -> None:
    timm_models = pytest.importorskip("timm.models", reason="timm is the oracle of this test")
    weight = torch.randn(8, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    adapted = adapt_input_channels(weight, in_chans)
    torch.testing.assert_close(adapted, timm_models.adapt_input_conv(in_chans, weight.clone()))
    assert adapt_input_channels(weight.double(), in_chans).dtype == torch.float64


def test_a_grey_image_gives_the_same_map_by_one_channel_or_by_three() -> None:
    weight = torch.randn(8, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    grey = torch.randn(1, 1, 9, 9)
    expected = nn.functional.conv2d(grey.expand(-1, 3, -1, -1), weight)
    for in_chans in (1, 6):
        images = grey.expand(-1, in_chans, -1, -1)
        actual = nn.functional.conv2d(images, adapt_input_channels(weight, in_chans))
        torch.testing.assert_close(actual, expected)
    with pytest.raises(ValueError, match="expected at least 1, got 0"):
        adapt_input_channels(weight, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention": "cbam"}, "attention: expected one of none, ese, eca, se, got 'cbam'"),
        ({"norm": "ln"}, "norm: expected one of bn, frozen_bn, gn, evonorm_s0, got 'ln'"),
        ({"stem": "v2"}, "stem: expected one of code, paper, small"),
        ({"attention_in": "all"}, "attention_in: expected one of last_block, every_block"),
        ({"deformable_stages": (1,)}, r"expected some of 2\.\.5, got \(1,\)"),
        ({"deformable_stages": (5,), "depthwise": True}, "expected none in a depthwise network"),
    ],
)
def test_a_choice_that_there_is_not_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_model("vovnet27_slim", overrides=settings)


@pytest.mark.parametrize("arguments", [{}, {"features_only": True}])
def test_a_wrong_output_stride_is_refused(arguments: dict) -> None:
    with pytest.raises(ConfigError, match="expected 8, 16 or 32, got 4"):
        create_model("vovnet27_slim", output_stride=4, **arguments)
    with pytest.raises(ConfigError, match="expected 32 in a detector, got 16"):
        create_model("fcos_vovnet27_slim", output_stride=16)


def test_the_small_stem_keeps_twice_the_resolution():
    small, usual = (
        create_model("ese_vovnet19b_slim_dw", features_only=True, overrides={"stem": stem}).eval()
        for stem in ("small", "code")
    )
    assert small.feature_info.reduction() == [1, 2, 4, 8, 16]
    with torch.no_grad():
        sizes = [tuple(m.shape[2:]) for m in small(torch.zeros(1, 3, 28, 28))]
        expected = [tuple(m.shape[2:]) for m in usual(torch.zeros(1, 3, 56, 56))]
    assert sizes == expected
    assert sizes[:3] == [(28, 28), (14, 14), (7, 7)]
