"""Counts of every variant, timm's outputs and keys, the feature interface."""

import pytest
import torch

from vovnet.models.vovnet import VARIANTS, VoVNet
from vovnet.models.zoo import create_model
from vovnet.profiling.count import count_macs, count_parameters

timm = pytest.importorskip("timm", reason="timm is the oracle of these tests (extra `train`)")

# Facts: parameters with a 1000-way classifier, and macs (convolutions, eSE and classifier) at 224 x
# 224.
COUNTS = {
    "vovnet39a": (22_600_296, 14_144_454_656 // 2),
    "vovnet57a": (36_640_296, 17_860_288_512 // 2),
    "ese_vovnet19b_slim_dw": (1_897_752, 796_142_752 // 2),
    "ese_vovnet19b_dw": (6_543_080, 2_666_979_648 // 2),
    "ese_vovnet19b_slim": (3_166_136, 3_360_429_568 // 2),
    "ese_vovnet19b": (11_205_416, 8_243_875_840 // 2),
    "ese_vovnet39b": (24_568_936, 14_148_386_816 // 2),
    "ese_vovnet57b": (38_608_936, 17_864_220_672 // 2),
    "ese_vovnet99b": (63_199_272, 32_976_429_056 // 2),
    "eca_vovnet39b": (22_600_316, 14_144_480_256 // 2),
    "ese_vovnet39b_evos": (24_579_144, 14_148_386_816 // 2),
    "vovnet27_slim": (3_525_736, 2_176_695_296),
    "vovnet39": (22_600_296, 7_072_227_328),
    "vovnet57": (36_640_296, 8_930_144_256),
    # The third convolution of the paper's stem works on four times as many pixels.
    "vovnet27_slim_paper": (3_525_736, 2_176_695_296 + 3 * 231_211_008),
    "vovnet39_paper": (22_600_296, 7_072_227_328 + 3 * 231_211_008),
    "vovnet57_paper": (36_640_296, 8_930_144_256 + 3 * 231_211_008),
    "ese_vovnet19_slim_dw_d2": (1_897_752, 397_559_376 + 512_000),
    "ese_vovnet19_dw_d2": (6_543_080, 1_332_465_824 + 1_024_000),
    "ese_vovnet19_slim_d2": (3_166_136, 1_679_702_784 + 512_000),
    "ese_vovnet19_d2": (11_205_416, 4_120_913_920 + 1_024_000),
    "ese_vovnet39_d2": (26_209_128, 7_074_807_808 + 1_024_000),
    "ese_vovnet57_d2": (42_479_912, 8_934_952_960 + 1_024_000),
    "ese_vovnet99_d2": (70_548_520, 16_494_530_560 + 1_024_000),
}
# By hand: 27 channels of 9 taps and a bias for each 3x3 convolution of stages 3 to 5, whose input
# channels add up to 7,296 (25 convolutions), 12,288 (40) and 22,272 (75).
OFFSET_PARAMETERS = {"39": 1_773_603, "57": 2_987_064, "99": 5_414_121}
IN_TIMM = [name for name in VARIANTS if name in timm.models.vovnet.default_cfgs]
SMALL = "ese_vovnet19b_slim_dw"


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_and_macs_equal_the_published_counts(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name)
        images = torch.zeros(1, 3, 224, 224)
    assert (count_parameters(model), count_macs(model, (images,))) == COUNTS[name]


@pytest.mark.parametrize("size", OFFSET_PARAMETERS)
def test_deformable_convolutions_add_their_offsets(size: str) -> None:
    with torch.device("meta"):
        plain = create_model(f"ese_vovnet{size}_d2")
        deformable = create_model(f"ese_vovnet{size}_dcn_d2")
    added = count_parameters(deformable) - count_parameters(plain)
    assert added == OFFSET_PARAMETERS[size]


def test_every_variant_is_counted() -> None:
    deformable = {f"ese_vovnet{size}_dcn_d2" for size in OFFSET_PARAMETERS}
    assert set(VARIANTS) == {*COUNTS, *deformable, "vovnet19_thin_dw", "vovnet19_slim"}


def test_the_slim_one_is_v2s_without_its_attention() -> None:
    weights = create_model("ese_vovnet19b_slim").state_dict()
    plain = create_model("vovnet19_slim")
    left_out = {name for name in weights if ".attn." in name}
    assert left_out
    plain.load_state_dict({name: weights[name] for name in weights.keys() - left_out})


def test_the_thin_one_has_the_widths_that_its_name_says() -> None:
    settings = {
        "stem_chs": [32, 32, 48],
        "stage_conv_chs": [48, 80, 96, 112],
        "stage_out_chs": [80, 192, 384, 512],
        "layer_per_block": 3,
        "block_per_stage": [1, 1, 1, 1],
        "residual": True,
        "depthwise": True,
        "attn": "",
    }
    theirs = timm.models.vovnet.VovNet(settings).eval()
    ours = create_model("vovnet19_thin_dw").eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images))


def test_timm_has_the_names_that_we_share() -> None:
    assert len(IN_TIMM) == 10  # all but ese_vovnet19b, which timm has no entry for


@pytest.mark.parametrize("name", IN_TIMM)
def test_outputs_and_keys_equal_timm(name: str) -> None:
    torch.manual_seed(0)
    theirs = timm.create_model(name).eval()
    for module in theirs.modules():  # else BatchNorm is the identity
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    with torch.device("meta"):
        ours = create_model(name).eval()
    ours.load_state_dict(theirs.state_dict(), assign=True)
    for size in ((64, 96), (97, 65)):
        images = torch.randn(2, 3, *size)
        with torch.no_grad():
            expected, actual = theirs(images), ours(images)
            last, maps = theirs.forward_intermediates(images)
            our_last, our_maps = ours.forward_intermediates(images)
        for one, other in [(expected, actual), (last, our_last), *zip(maps, our_maps, strict=True)]:
            assert one.shape == other.shape
            assert (one - other).norm() <= 1e-5 * one.norm()


def test_feature_info_equals_timm() -> None:
    theirs = timm.create_model(SMALL, features_only=True)
    ours = create_model(SMALL, features_only=True)
    assert ours.feature_info.channels() == theirs.feature_info.channels()
    assert ours.feature_info.reduction() == theirs.feature_info.reduction()


def small(**arguments: object) -> VoVNet:
    torch.manual_seed(0)
    return create_model(SMALL, **arguments)


def test_head_in_parts_is_the_whole() -> None:
    model = small().eval()
    images = torch.randn(2, 3, 64, 64)
    features = model.forward_features(images)
    assert features.shape == (2, 512, 2, 2)
    assert model.forward_head(features, pre_logits=True).shape == (2, 512)
    torch.testing.assert_close(model.forward_head(features), model(images))


def test_reset_classifier_changes_the_head_alone() -> None:
    model = small()
    before = {k: v.clone() for k, v in model.named_parameters() if not k.startswith("head.")}
    model.reset_classifier(7)
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 7)
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())
    model.reset_classifier(0, global_pool="")
    assert model.get_classifier().__class__ is torch.nn.Identity
    assert model.eval()(torch.randn(1, 3, 64, 64)).shape == (1, 512, 2, 2)


def test_drop_path_spares_blocks_without_identity() -> None:
    torch.manual_seed(0)
    model = create_model("ese_vovnet39b", drop_path_rate=0.9999)
    dropped = [m.p for m in model.modules() if m.__class__.__name__ == "StochasticDepth"]
    assert len(dropped) == 2  # the second blocks of stages 4 and 5
    assert model(torch.randn(2, 3, 64, 64)).abs().sum() > 0


@pytest.mark.parametrize("size", [(32, 32), (224, 40)])
def test_any_size_from_32(size: tuple[int, int]) -> None:
    assert small().eval()(torch.randn(1, 3, *size)).isfinite().all()


def test_other_input_channels() -> None:
    assert small(in_chans=5, num_classes=2).eval()(torch.randn(1, 5, 32, 32)).shape == (1, 2)


@pytest.mark.parametrize("indices", [(), (5,), (-6,)])
def test_wrong_indices_are_refused(indices: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected some of 0\.\.4"):
        small().forward_intermediates(torch.randn(1, 3, 32, 32), indices)


def test_early_stop_and_last_n() -> None:
    model = small().eval()
    images = torch.randn(1, 3, 64, 64)
    _, maps = model.forward_intermediates(images, 2)
    early = model.forward_intermediates(images, (0, 1), stop_early=True, intermediates_only=True)
    assert [m.shape[1] for m in maps] == [384, 512]
    assert [m.shape[1] for m in early] == [64, 112]
