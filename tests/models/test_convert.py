"""Checkpoints of other projects become our models and compute what they did (tests/golden)."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.models.golden import (
    BACKBONES,
    CENTERMASK,
    FASTER_RCNN,
    assert_summary,
    golden_pixels,
    original,
    rebuild,
)
from vovnet.errors import DataError
from vovnet.models.convert import check_fit, convert
from vovnet.models.deploy import DeployGraph
from vovnet.models.layers import Normalize
from vovnet.models.layouts import recognise
from vovnet.models.vovnet import VARIANTS
from vovnet.models.weights import read_weights
from vovnet.models.zoo import create_model

KEYS = {case["name"]: case["keys"] for case in BACKBONES}
OUR_NAME = {
    "vovnet27_slim": "vovnet27_slim",
    "vovnet39": "vovnet39",
    "V-19-slim-dw-eSE": "ese_vovnet19_slim_dw_d2",
    "V-19-slim-eSE": "ese_vovnet19_slim_d2",
    "V-39-eSE": "ese_vovnet39_d2",
}


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        *((name, "bn") for name in OUR_NAME),
        ("V-19-slim-dw-eSE", "frozen_bn"),
        ("V-19-slim-eSE", "frozen_bn"),
    ],
)
def test_backbones_compute_what_they_did(tmp_path: Path, name: str, norm: str) -> None:
    case = next(case for case in BACKBONES if case["name"] == name)
    torch.save({"model": original(case), "iteration": 7}, tmp_path / "model.pth")
    conversion = convert(read_weights(tmp_path / "model.pth"))
    assert conversion.architecture == OUR_NAME[name]
    assert conversion.layout.name == case["source"]
    model = rebuild(conversion, norm=norm)
    for output in case["outputs"][norm == "frozen_bn" :]:
        images = torch.from_numpy(np.random.RandomState(0).standard_normal(output["input"]))
        if conversion.layout.bgr:
            images = images.flip(1)
        with torch.no_grad():
            last, maps = model.forward_intermediates(images)
            named = {f"stage{i}": m for i, m in enumerate(maps[1:], start=2)}
            named |= {"stem": model.stem(images), "logits": model.forward_head(last)}
        for key, expected in output["features"].items():
            assert_summary(named[key], expected, relative=1e-9)


def test_normalised_pixels_are_equal_in_the_other_order() -> None:
    config = CENTERMASK["config"]
    conversion = convert(original(CENTERMASK))
    assert list(conversion.mean) == config["pixel_mean"][::-1]
    assert list(conversion.std) == config["pixel_std"][::-1]
    pixels, sizes = golden_pixels(CENTERMASK)
    ours = Normalize(conversion.mean, conversion.std).double()(pixels, sizes)
    mean, std = (
        np.array(config[key], np.float32).astype(np.float64)[:, None, None]
        for key in ("pixel_mean", "pixel_std")
    )
    for index, image in enumerate(CENTERMASK["images"]):
        bgr = np.random.RandomState(image["seed"]).randint(0, 256, image["shape"])
        _, height, width = image["shape"]
        theirs = torch.from_numpy((bgr - mean) / std)
        assert torch.equal(ours[index, :, :height, :width].flip(0), theirs)


def test_centermask_detects_what_it_did(tmp_path: Path) -> None:
    torch.save({"model": original(CENTERMASK)}, tmp_path / "model.pth")
    conversion = convert(read_weights(tmp_path / "model.pth"))
    assert conversion.architecture == "centermask_lite_ese_vovnet19_slim_d2"
    model = rebuild(conversion)
    graph = DeployGraph(model, mean=conversion.mean, std=conversion.std).double().eval()
    with torch.no_grad():
        found = graph(*golden_pixels(CENTERMASK))
    for image, expected in enumerate(CENTERMASK["detections"]):
        assert found["valid"][image].all()
        np.testing.assert_allclose(found["boxes"][image].numpy(), expected["boxes"], atol=1e-4)
        assert found["labels"][image].tolist() == expected["classes"]
        np.testing.assert_allclose(found["scores"][image].numpy(), expected["scores"], rtol=1e-6)
        scores = np.array(expected["mask_scores"])
        limit = 1e-6 * np.abs(scores).max()
        np.testing.assert_allclose(found["mask_scores"][image].numpy(), scores, atol=limit)
        summary = expected["mask_probabilities"]
        probabilities = found["mask_probs"][image].reshape(summary["shape"])
        assert_summary(probabilities, summary, relative=1e-6)


def test_faster_rcnn_detects_what_it_did(tmp_path: Path) -> None:
    torch.save({"model": original(FASTER_RCNN)}, tmp_path / "model.pth")
    conversion = convert(read_weights(tmp_path / "model.pth"))
    assert conversion.architecture == "faster_rcnn_lite_ese_vovnet19_slim_d2"
    graph = DeployGraph(rebuild(conversion), mean=conversion.mean, std=conversion.std)
    with torch.no_grad():
        found = graph.double().eval()(*golden_pixels(FASTER_RCNN))
    for image, expected in enumerate(FASTER_RCNN["detections"]):
        assert found["valid"][image].all()
        np.testing.assert_allclose(found["boxes"][image].numpy(), expected["boxes"], atol=1e-3)
        assert found["labels"][image].tolist() == expected["classes"]
        np.testing.assert_allclose(found["scores"][image].numpy(), expected["scores"], atol=1e-5)


# All other published networks by names and shapes alone, on the meta device.

TO_RELEASED = (
    (r"stem\.(\d)\.", lambda m: f"stem.stem_{int(m[1]) + 1}/"),
    (
        r"stages\.(\d)\.blocks\.(\d+)\.",
        lambda m: f"stage{int(m[1]) + 2}.OSA{int(m[1]) + 2}_{int(m[2]) + 1}.",
    ),
    (r"\.(OSA\d_\d+)\.conv_mid\.(\d)\.", r".\1.layers.\2.\1_\2/"),
    (r"\.(OSA\d_\d+)\.conv_reduction\.", r".\1.conv_reduction.\1_reduction_0/"),
    (r"\.(OSA\d_\d+)\.conv_concat\.", r".\1.concat.\1_concat/"),
    (r"\.attn\.", ".ese."),
    (r"^head\.fc\.", "classifier."),
)


def released_names(names: list[str]) -> dict[str, str]:
    """Our names of a backbone to those of the authors' code."""
    separable = {name.split(".conv_dw.")[0] for name in names if ".conv_dw." in name}
    result = {}
    for name in names:
        there = name
        for pattern, replacement in TO_RELEASED:
            there = re.sub(pattern, replacement, there)
        unit = re.sub(r"\.bn\.\w+$", "", name)
        there = there.replace("/bn.", "/pw_norm." if unit in separable else "/norm.")
        there = there.replace("/conv_dw.", "/dw_conv3x3.").replace("/conv_pw.", "/pw_conv1x1.")
        result[name] = there
    return result


def meta_state(name: str, **arguments: Any) -> dict[str, Tensor]:
    """The state dict of a model without its numbers."""
    with torch.device("meta"):
        return create_model(name, **arguments).state_dict()


def test_the_inverse_names_are_the_golden_ones() -> None:
    for case in BACKBONES:
        names = released_names(list(meta_state(OUR_NAME[case["name"]])))
        assert set(case["keys"]) <= set(names.values())


RELEASED = [name for name in VARIANTS if name.endswith("_d2") or name.startswith("vovnet")]
RELEASED = [name for name in RELEASED if not name.endswith(("a", "_paper"))]


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        *((name, "") for name in RELEASED),
        ("ese_vovnet19_slim_dw_d2", "img_backbone."),
        ("ese_vovnet19_slim_d2", "backbone.bottom_up."),
        ("ese_vovnet19_slim_d2", "bottom_up."),
        ("vovnet27_slim", "img_backbone."),
    ],
)
def test_every_released_network_is_recognised(name: str, prefix: str) -> None:
    state = meta_state(name, num_classes=0)
    names = released_names(list(state))
    conversion = convert({prefix + names[ours]: value for ours, value in state.items()})
    assert conversion.architecture == name
    assert conversion.tensors.keys() == state.keys()
    assert not conversion.report.unexpected
    assert conversion.layout.bgr == name.endswith("_d2")
    if conversion.layout.bgr:
        divided = (58.395, 57.12, 57.375) if prefix == "img_backbone." else (1.0, 1.0, 1.0)
        assert conversion.std == divided


@pytest.mark.parametrize("name", [n for n in VARIANTS if n.endswith(("b", "b_slim", "b_dw"))])
def test_timms_networks_keep_their_names(name: str) -> None:
    timm = pytest.importorskip("timm", reason="timm is the oracle of this test (extra `dev`)")
    if name == "ese_vovnet19b":
        pytest.skip("timm has no entry for it")
    with torch.device("meta"):
        state = timm.create_model(name, num_classes=7).state_dict()
    conversion = convert({f"module.{key}": value for key, value in state.items()})
    assert (conversion.architecture, conversion.model_args["num_classes"]) == (name, 7)
    assert conversion.tensors.keys() == state.keys()
    assert conversion.layout.licence.startswith("not in the file")


@pytest.mark.parametrize("name", ["vovnet39a", "vovnet57a", "ese_vovnet39b_evos"])
def test_timms_other_names(name: str) -> None:
    assert convert(meta_state(name)).architecture == name


@pytest.mark.parametrize(
    "kind",
    [
        *("fcos", "fcos_lite", "centermask", "centermask_lite"),
        *("faster_rcnn", "faster_rcnn_lite", "mask_rcnn", "mask_rcnn_lite"),
    ],
)
def test_our_own_detectors_keep_their_names(kind: str) -> None:
    name = f"{kind}_ese_vovnet19b_slim_dw"
    state = meta_state(name, num_classes=3)
    conversion = convert(state)
    assert (conversion.architecture, conversion.model_args["num_classes"]) == (name, 3)
    again = meta_state(name, **conversion.model_args)
    assert {k: v.shape for k, v in again.items()} == {
        k: v.shape for k, v in conversion.tensors.items()
    }


@pytest.mark.parametrize("detector", ["fcos", "mask_rcnn"])
def test_the_other_released_detectors(detector: str) -> None:
    """A FCOS is a CenterMask without its masks, a Mask R-CNN a Faster R-CNN with some."""
    names = {"fcos": CENTERMASK, "mask_rcnn": FASTER_RCNN}[detector]["keys"]
    keys = {key: shape for key, shape in names.items() if ".mask" not in key}
    if detector == "mask_rcnn":
        keys["roi_heads.mask_head.deconv.weight"] = [256, 256, 2, 2]
        keys["roi_heads.mask_head.deconv.bias"] = [256]
        keys["roi_heads.mask_head.predictor.weight"] = [80, 256, 1, 1]
        keys["roi_heads.mask_head.predictor.bias"] = [80]
        for index in range(1, 5):
            keys[f"roi_heads.mask_head.mask_fcn{index}.weight"] = [
                256,
                128 if index == 1 else 256,
                3,
                3,
            ]
            keys[f"roi_heads.mask_head.mask_fcn{index}.bias"] = [256]
    conversion = convert({key: torch.zeros(shape) for key, shape in keys.items()})
    assert conversion.architecture == f"{detector}_lite_ese_vovnet19_slim_d2"
    own = meta_state(conversion.architecture, **conversion.model_args)
    assert check_fit(conversion, own).report.problems == {}


def test_mean_and_deviation_of_the_file_go_before_the_layouts() -> None:
    tensors = original(FASTER_RCNN) | {
        "pixel_mean": torch.tensor([103.53, 116.28, 123.675]).reshape(3, 1, 1),
        "pixel_std": torch.tensor([4.0, 5.0, 6.0]).reshape(3, 1, 1),
        "proposal_generator.anchor_generator.cell_anchors.0": torch.zeros(3, 4),
    }
    conversion = convert(tensors)
    assert conversion.mean == (123.675, 116.28, 103.53)
    assert conversion.std == (6.0, 5.0, 4.0)
    assert len(conversion.report.ignored) == 3
    for bad in (torch.zeros(3, 1, 1), torch.ones(2), torch.tensor([1.0, float("nan"), 1.0])):
        with pytest.raises(DataError, match="pixel_std"):
            convert(tensors | {"pixel_std": bad})


def test_a_detector_without_its_head_is_a_backbone() -> None:
    conversion = convert(original(CENTERMASK), leave_out=["proposal_generator.*"])
    assert conversion.architecture == "ese_vovnet19_slim_d2"
    assert conversion.model_args == {"num_classes": 0, "overrides": {}}
    assert conversion.report.ignored["roi_heads.mask_head.deconv.bias"] == "not of the backbone"
    assert "proposal_generator.fcos_head.ctrness.bias" in conversion.report.left_out
    own = meta_state(conversion.architecture, num_classes=0)
    assert check_fit(conversion, own).report.problems == {}
    without_masks = convert(original(CENTERMASK), leave_out=["roi_heads.*"])
    assert without_masks.architecture == "fcos_lite_ese_vovnet19_slim_d2"
    with pytest.raises(DataError, match=r"'roi_haeds\.\*' is of none"):
        convert(original(CENTERMASK), leave_out=["roi_haeds.*"])


def test_the_report_names_every_kind_of_problem() -> None:
    tensors = original(CENTERMASK)
    missing = tensors.pop("roi_heads.maskiou_head.maskiou_fc2.bias")
    tensors["roi_heads.maskiou_head.maskiou_fc3.bias"] = missing
    tensors["backbone.bottom_up.stem.stem_2/pw_norm.bias"] = torch.zeros(64)  # a second norm
    tensors["backbone.fpn_lateral3.bias"] = torch.zeros(127)
    tensors["backbone.fpn_lateral4.bias"] = torch.full((128,), float("inf"), dtype=torch.float64)
    conversion = convert(tensors)
    own = meta_state(conversion.architecture, **conversion.model_args)
    report = check_fit(conversion, own).report
    assert report.unexpected == (
        "backbone.bottom_up.stem.stem_2/pw_norm.bias",
        "roi_heads.maskiou_head.maskiou_fc3.bias",
    )
    assert report.missing == ("mask_iou_head.fc2.bias",)
    assert report.mis_shaped == ("fcos.neck.lateral.0.bias (expected (128,), found (127,))",)
    assert report.not_finite == ("fcos.neck.lateral.1.bias (torch.float64)",)
    assert len(report.mapped) == len(tensors) - 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.clear(), "found no tensor"),
        (lambda t: t.pop("stem.stem_1/conv.weight"), "expected the tensor names of a VoVNet"),
        (lambda t: t.update({"ema.stem.stem_1/conv.weight": torch.zeros(1)}), "one backbone"),
        (lambda t: t.update({"stem.stem_1/conv.weight": torch.zeros(1)}), "published VoVNet"),
        (lambda t: t.update({"stem.stem_2/conv.weight": torch.zeros(48, 64, 3, 3)}), "64, 48, 128"),
    ],
)
def test_what_is_not_known_is_refused(change, message: str) -> None:
    tensors = {key: torch.zeros(shape) for key, shape in KEYS["V-19-slim-eSE"].items()}
    change(tensors)
    with pytest.raises(DataError, match=message):
        convert(tensors)


def test_recognition_needs_names_alone() -> None:
    assert recognise(CENTERMASK["keys"]).name == "centermask2 CenterMask"
    assert recognise(FASTER_RCNN["keys"]).licence.startswith("CC-BY-NC-4.0")
    assert recognise(KEYS["vovnet39"]).licence.startswith("none stated")


@pytest.mark.parametrize(
    ("name", "value"),
    [("stem.0.bn.weight", 1e300), ("stem.0.bn.running_var", -1.0)],
)
def test_figures_that_no_model_holds_are_refused(name: str, value: float) -> None:
    with torch.device("meta"):
        own = create_model("ese_vovnet19b_slim_dw").state_dict()
    tensors = {key: torch.ones(tensor.shape) for key, tensor in own.items()}
    tensors[name] = torch.full(own[name].shape, value, dtype=torch.float64)
    report = check_fit(convert(tensors), own).report
    assert [text.partition(" ")[0] for text in report.not_finite] == [name]


def test_a_block_number_without_end_has_no_place() -> None:
    with torch.device("meta"):
        own = create_model("ese_vovnet19b_slim_dw").state_dict()
    tensors = {key: torch.ones(tensor.shape) for key, tensor in own.items()}
    endless = f"stages.0.blocks.{'9' * 5000}.conv_concat.conv.weight"
    report = convert(tensors | {endless: torch.ones(1)}).report
    assert report.unexpected == (endless,)
