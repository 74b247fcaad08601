"""Names, settings and weights of models; wrong ones are refused with a useful sentence."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vovnet.errors import ConfigError
from vovnet.models.centermask import CenterMask
from vovnet.models.dsod import DSOD
from vovnet.models.fcos import FCOS
from vovnet.models.rcnn import FasterRCNN, MaskRCNN
from vovnet.models.refinedet import RefineDet
from vovnet.models.vovdet import VovDet
from vovnet.models.vovnet import VARIANTS
from vovnet.models.weights import PUBLISHED, fetch_published, load_backbone, read_weights
from vovnet.models.zoo import SIZED, create_model, list_models, split_name, task_of
from vovnet.profiling.count import count_parameters

SMALL = "ese_vovnet19b_slim_dw"


def test_every_backbone_and_every_detector_can_be_built() -> None:
    detectors = list_models(f"*_{SMALL}")
    assert len(list_models()) == len(VARIANTS) * (1 + len(detectors)) + len(SIZED)
    for name in [*VARIANTS, *detectors, *SIZED]:
        with torch.device("meta"):
            model = create_model(name)
        has_masks = {"classify": None, "detect": False, "segment": True}
        assert getattr(model, "has_masks", None) == has_masks[task_of(name)]


@pytest.mark.parametrize(
    ("kind", "network", "strides"),
    [
        ("fcos", FCOS, [8, 16, 32]),
        ("centermask_lite", CenterMask, [8, 16, 32]),
        ("faster_rcnn", FasterRCNN, [4, 8, 16, 32]),
        ("mask_rcnn_lite", MaskRCNN, [4, 8, 16, 32]),
        ("refinedet", RefineDet, [8, 16, 32]),
        ("dsod", DSOD, [8, 16]),
        ("vovdet", VovDet, [8, 16, 32]),
        ("vovdet_seg", VovDet, [8, 16, 32]),
    ],
)
def test_a_name_says_the_network(kind: str, network: type, strides: list[int]) -> None:
    with torch.device("meta"):
        model = create_model(f"{kind}_{SMALL}", in_chans=4, drop_path_rate=0.1)
    assert type(model) is network
    assert model.backbone.feature_info.reduction() == strides
    assert model.backbone.stem[0].conv.in_channels == 4


def test_listing_by_pattern_and_task() -> None:
    assert list_models("ese_vovnet39b") == ["ese_vovnet39b"]
    segmenters = list_models(task="segment")
    assert {split_name(name)[0] for name in segmenters} == {
        "centermask", "centermask_lite", "mask_rcnn", "mask_rcnn_lite",
        "vovdet_seg", "vovdet_n_seg", "vovdet_s_seg", "vovdet_m_seg", "vovdet_l_seg",
    }  # fmt: skip
    assert list_models("no such model") == []


def test_lite_is_smaller_where_the_paper_says() -> None:
    with torch.device("meta"):
        full = create_model("centermask_ese_vovnet19b_slim")
        lite = create_model("centermask_lite_ese_vovnet19b_slim")
    assert full.fcos.neck.p6.in_channels == 256
    assert lite.fcos.neck.p6.in_channels == 128
    assert len(full.mask_head.convs) == len(full.fcos.head.cls_tower) // 3 == 4
    assert len(lite.mask_head.convs) == len(lite.fcos.head.cls_tower) // 3 == 2
    assert count_parameters(lite) < count_parameters(full) / 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"name": "ese_vovnet39c"}, "ese_vovnet39b"),
        ({"name": "centermask_lite_resnet50"}, "expected a known name"),
        ({"name": SMALL, "overrides": {"max_detections": 5}}, "expected one of"),
        ({"name": f"fcos_{SMALL}", "overrides": {"nms_treshold": 0.5}}, "nms_threshold"),
        ({"name": f"fcos_{SMALL}", "features_only": True}, "expected a backbone"),
        ({"name": f"fcos_{SMALL}", "overrides": {"max_detections": 0}}, "whole number"),
        ({"name": f"fcos_{SMALL}", "overrides": {"max_detections": "9"}}, "whole number"),
        ({"name": f"fcos_{SMALL}", "overrides": {"nms_threshold": float("nan")}}, "0..1"),
        ({"name": "ese_vovnet19b", "pretrained": True}, "ese_vovnet57b"),
        ({"name": SMALL, "checkpoint_path": "no/such/file.pth"}, "found neither at"),
    ],
)
def test_wrong_arguments_say_what_was_expected(call: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_model(**call)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_from_a_file(tmp_path: Path, suffix: str) -> None:
    source = create_model(SMALL, num_classes=3)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        wrapped = {f"module.{k}": v for k, v in source.state_dict().items()}
        torch.save({"state_dict": wrapped, "epoch": 3}, path)
    else:
        save_file(source.state_dict(), path)
    loaded = create_model(SMALL, num_classes=3, checkpoint_path=path)
    for name, value in source.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


class Payload:
    """A pickle that would write a file when loaded carelessly."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


def test_hostile_files_are_refused_and_run_nothing(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    torch.save({"a": Payload(trap)}, tmp_path / "pickle.pth")
    (tmp_path / "short.safetensors").write_bytes(b"\xff" * 20)
    (tmp_path / "empty.pth").write_bytes(b"")
    torch.save([1, 2], tmp_path / "list.pth")
    for name in ("pickle.pth", "short.safetensors", "empty.pth", "list.pth"):
        with pytest.raises(ConfigError, match=name):
            read_weights(tmp_path / name)
    assert not trap.exists()


def test_tensors_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    weights = create_model(SMALL, num_classes=3).state_dict()
    weights.pop("stem.0.bn.bias")
    weights["extra"] = torch.zeros(1)
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(ConfigError) as caught:
        create_model(SMALL, num_classes=4, checkpoint_path=tmp_path / "w.safetensors")
    text = str(caught.value)
    assert "1 missing: stem.0.bn.bias" in text
    assert "1 unexpected: extra" in text
    assert "head.fc.weight (expected (4, 512), found (3, 512))" in text


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    weights = create_model(SMALL).state_dict()
    weights["stem.0.conv.weight"][0] = float("nan")
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(ConfigError, match=r"1 not finite floats: stem\.0\.conv\.weight"):
        create_model(SMALL, checkpoint_path=tmp_path / "w.safetensors")


def test_a_classifier_starts_a_detector_even_with_frozen_norm() -> None:
    classifier = create_model("ese_vovnet19b_slim")
    detector = create_model("fcos_ese_vovnet19b_slim", overrides={"norm": "frozen_bn"})
    load_backbone(detector.backbone, classifier.state_dict(), where="test")
    assert torch.equal(
        detector.backbone.state_dict()["stages.3.blocks.0.attn.fc.weight"],
        classifier.state_dict()["stages.3.blocks.0.attn.fc.weight"],
    )


def test_published_weights_offline_name_the_file(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ConfigError, match=r"model\.safetensors of hub repository timm/ese_vovnet39b"
    ):
        fetch_published("ese_vovnet39b")


def test_published_weights_go_into_models_and_backbones(monkeypatch, tmp_path: Path) -> None:
    published = create_model("ese_vovnet19b_dw")
    path = tmp_path / "model.safetensors"
    save_file(published.state_dict(), path)
    asked = []
    monkeypatch.setattr(
        "vovnet.models.weights.hf_hub_download",
        lambda repository, file, **_: asked.append((repository, file)) or str(path),
    )
    whole = create_model("ese_vovnet19b_dw", pretrained=True)
    other = create_model("ese_vovnet19b_dw", pretrained=True, num_classes=4)
    detector = create_model("fcos_lite_ese_vovnet19b_dw", pretrained=True)
    assert set(asked) == {(PUBLISHED["ese_vovnet19b_dw"].hub_repository, "model.safetensors")}
    key = "stem.0.conv.weight"
    for model in (whole, other, detector.backbone):
        assert torch.equal(model.state_dict()[key], published.state_dict()[key])
    assert torch.equal(whole.head.fc.weight, published.head.fc.weight)


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ("", {"stage_out_channels": ["112", 256, 384, 512]}),
        ("", {"stage_out_channels": 5}),
        ("", {"stage_out_channels": [1e9] * 4}),
        ("", {"stage_out_channels": [10**9] * 4}),
        ("", {"stage_conv_channels": [64, -1, 96, 112]}),
        ("", {"stem_channels": [64]}),
        ("", {"layers_per_block": "3"}),
        ("", {"layers_per_block": 0}),
        ("", {"layers_per_block": True}),
        ("", {"deformable_stages": 3}),
        ("", {"depthwise": "yes"}),
        ("", {"identity": "no"}),
        ("", {"identity": None}),
        ("", {"attention": ["ese"]}),
        ("", {"blocks_per_stage": (0, 0, 0, 0)}),
        ("", {"blocks_per_stage": (1, 1)}),
        ("faster_rcnn_", {"anchor_sizes": 5}),
        ("faster_rcnn_", {"anchor_sizes": [32, 64, 128, 256, float("inf")]}),
        ("faster_rcnn_", {"anchor_sizes": [32, 64, 128, 256, 10**400]}),
        ("faster_rcnn_", {"anchor_ratios": ["x", 1, 2]}),
        ("faster_rcnn_", {"anchor_ratios": [0, 1, 2]}),
        ("faster_rcnn_", {"anchor_ratios": [True, 1, 2]}),
        ("faster_rcnn_", {"rpn_positive_iou": 1.1}),
        ("faster_rcnn_", {"nms_threshold": 5}),
        ("fcos_", {"nms_threshold": "0.5"}),
        ("fcos_", {"level_limits": [1, 2, 3]}),
        ("fcos_", {"level_limits": [64, 256, 128, 512]}),
        ("vovdet_", {"level_limits": [128, 64]}),
        ("vovdet_seg_", {"level_limits": [64, 64]}),
        ("fcos_", {"center_radius": -1.0}),
        ("fcos_", {"neck_channels": 48}),
        ("centermask_", {"mask_rois_per_image": 2.5}),
    ],
)
def test_a_wrong_setting_is_named(kind: str, overrides: dict) -> None:
    with torch.device("meta"), pytest.raises(ConfigError) as caught:
        create_model(kind + SMALL, overrides=overrides)
    (name,) = overrides
    assert f"{name}: expected" in str(caught.value)


def test_lists_and_whole_numbers_are_settings_too() -> None:
    overrides = {"stem_channels": [32, 32, 64], "anchor_ratios": [1, 2], "nms_threshold": 1}
    with torch.device("meta"):
        model = create_model(f"faster_rcnn_{SMALL}", overrides=overrides)
    assert model.backbone.config.stem_channels == (32, 32, 64)
    assert model.config.anchor_ratios == (1, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        *(({"in_chans": value}, "in_chans: expected") for value in (0, "3", 3.0, 100_001)),
        *(({"num_classes": value}, "num_classes: expected") for value in (-1, 2.5, 100_001)),
        ({"name": f"fcos_{SMALL}", "num_classes": 0}, "num_classes: expected"),
        *(({"drop_rate": value}, "drop_rate: expected") for value in (1, -0.1, "0", True)),
        ({"drop_path_rate": float("nan")}, "drop_path_rate: expected"),
        *(
            ({"features_only": True, "out_indices": value}, "out_indices: ")
            for value in ("12", [1.0], [True], True, [], [5], 0, 6, 1.5)
        ),
        ({"name": ["x"]}, "expected a name"),
        ({"output_stride": 32.0}, "output_stride"),
        ({"overrides": [1]}, "overrides: expected"),
        ({"overrides": {1: 2}}, "overrides: expected"),
        (
            {"name": f"fcos_{SMALL}", "num_classes": 3, "overrides": {"num_classes": 3}},
            "got both",
        ),
        ({"overrides": {"norm": "gn", "stem_channels": [60, 64, 64]}}, "multiples of 16"),
        (
            {"name": f"mask_rcnn_{SMALL}", "overrides": {"head_norm": "gn", "neck_channels": 40}},
            "multiples of 16",
        ),
    ],
)
def test_wrong_arguments_are_refused(call: dict, message: str) -> None:
    with torch.device("meta"), pytest.raises(ConfigError, match=message):
        create_model(**{"name": SMALL} | call)


def test_a_number_of_maps_takes_the_last_ones() -> None:
    with torch.device("meta"):
        model = create_model(SMALL, features_only=True, out_indices=2)
    assert model.feature_info.reduction() == [16, 32]
