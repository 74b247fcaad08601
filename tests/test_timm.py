"""Our variants under timm's create_model, and timm's own left alone."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vovnet.models.layers import adapt_input_channels
from vovnet.models.vovnet import VARIANTS, VoVNet
from vovnet.models.zoo import create_model

timm = pytest.importorskip("timm", reason="timm is what is extended here (extra `dev`)")
vovnet_timm = importlib.import_module("vovnet.timm")
BEFORE = {
    name
    for name in timm.list_models()
    if timm.models.model_entrypoint(name).__module__ != vovnet_timm.__name__
}
OURS = [name for name in VARIANTS if name not in BEFORE]
SMALL = "ese_vovnet19_slim_dw_d2"


def test_only_absent_names_are_added() -> None:
    assert set(timm.list_models()) - BEFORE == set(OURS)
    assert "ese_vovnet19b" in OURS
    assert "ese_vovnet39b" not in OURS
    assert set(vovnet_timm.__all__) == set(OURS)
    assert all(hasattr(vovnet_timm, name) for name in OURS)


def test_the_names_of_timm_still_build_its_networks() -> None:
    shared = [name for name in VARIANTS if name in timm.models.vovnet.default_cfgs]
    assert len(shared) == 10
    for name in shared:
        assert timm.models.model_entrypoint(name) is getattr(timm.models.vovnet, name)
    with torch.device("meta"):
        assert not isinstance(timm.create_model("ese_vovnet19b_slim_dw"), VoVNet)


def test_a_second_registration_changes_nothing() -> None:
    entry = timm.models.model_entrypoint(SMALL)
    assert vovnet_timm.register() == []
    assert timm.models.model_entrypoint(SMALL) is entry


@pytest.mark.parametrize("name", OURS)
def test_every_added_name_builds_its_variant(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
        ours = create_model(name)
    assert isinstance(model, VoVNet)
    assert model.config == VARIANTS[name]
    assert model.state_dict().keys() == ours.state_dict().keys()
    assert model.pretrained_cfg["architecture"] == name
    assert model.pretrained_cfg["first_conv"] + ".weight" in model.state_dict()
    assert model.pretrained_cfg["classifier"] + ".weight" in model.state_dict()
    assert name in timm.list_models("*vovnet*")
    assert name not in timm.list_pretrained()


def test_the_arguments_of_timm() -> None:
    torch.manual_seed(0)
    model = timm.create_model(
        "vovnet39", num_classes=5, in_chans=1, drop_rate=0.2, drop_path_rate=0.3, norm="gn"
    )
    assert model(torch.randn(2, 1, 64, 64)).shape == (2, 5)
    assert model.head.drop.p == 0.2
    assert model.stages[3].blocks[1].drop_path.p == pytest.approx(0.3)
    assert model.config.norm == "gn"
    assert VARIANTS["vovnet39"].norm == "bn"
    with pytest.raises(TypeError, match="no_such_setting"):
        timm.create_model("vovnet39", no_such_setting=1)


def test_feature_maps_are_those_of_our_own_backbone() -> None:
    torch.manual_seed(0)
    backbone = timm.create_model(SMALL, features_only=True, out_indices=(1, 3), output_stride=8)
    ours = create_model(SMALL, features_only=True, out_indices=(1, 3), output_stride=8)
    whole = timm.create_model(SMALL, output_stride=8)
    assert backbone.feature_info.channels() == ours.feature_info.channels() == [112, 384]
    assert backbone.feature_info.reduction() == ours.feature_info.reduction() == [4, 8]
    tensors = {key.replace("_", ".", 1): value for key, value in backbone.state_dict().items()}
    for model in (ours, whole):
        model.load_state_dict(tensors, strict=False)
        model.eval()
    images = torch.randn(1, 3, 65, 48)
    with torch.no_grad():
        expected = ours(images)
        found = backbone.eval()(images)
        hidden = whole.forward_intermediates(images, (1, 3), intermediates_only=True)
    for one, other, third in zip(expected, found, hidden, strict=True):
        torch.testing.assert_close(other, one)
        torch.testing.assert_close(third, one)


def test_weights_from_a_file_with_other_channels_and_classes(tmp_path: Path) -> None:
    source = create_model(SMALL)
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    overlay = {"file": str(tmp_path / "weights.safetensors"), "crop_pct": 0.95}
    model = timm.create_model(
        SMALL, pretrained=True, pretrained_cfg_overlay=overlay, in_chans=4, num_classes=7
    )
    assert model.pretrained_cfg["crop_pct"] == 0.95
    first = adapt_input_channels(source.stem[0].conv.weight, 4)
    torch.testing.assert_close(model.stem[0].conv.weight, first)
    assert torch.equal(
        model.stages[3].blocks[0].attn.fc.weight, source.stages[3].blocks[0].attn.fc.weight
    )
    assert model.head.fc.weight.shape == (7, 512)


def test_one_step_of_training_with_the_optimizer_of_timm() -> None:
    torch.manual_seed(0)
    model = timm.create_model(SMALL, num_classes=3)
    create_optimizer = importlib.import_module("timm.optim").create_optimizer_v2
    optimizer = create_optimizer(model, opt="adamw", lr=1e-3, layer_decay=0.7)
    scales = {group["lr_scale"] for group in optimizer.param_groups}
    assert max(scales) == 1  # the head; stages below it learn more slowly
    assert len(scales) == 6  # stem, four blocks, head
    images, labels = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 0])
    losses = []
    for _ in range(3):
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_without_timm_the_error_says_so() -> None:
    code = "import sys; sys.modules['timm'] = None; import vovnet.timm"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ImportError: vovnet.timm needs timm" in done.stderr


def test_models_do_not_load_timm() -> None:
    code = "import sys, vovnet.models.zoo; assert 'timm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
