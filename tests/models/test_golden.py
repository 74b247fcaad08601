"""Our networks compute what the authors' own code computes (figures in tests/golden, float64)."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from tests.models.golden import (
    backbone_key,
    centermask_weights,
    golden_value,
    rcnn_weights,
    read,
)
from vovnet.models.boxes import Target
from vovnet.models.fcos import level_points
from vovnet.models.zoo import create_model

OUR_NAME = {
    "vovnet27_slim": "vovnet27_slim",
    "vovnet39": "vovnet39",
    "V-19-slim-dw-eSE": "ese_vovnet19_slim_dw_d2",
    "V-19-slim-eSE": "ese_vovnet19_slim_d2",
    "V-39-eSE": "ese_vovnet39_d2",
}
BACKBONES = {case["name"]: case for case in read("backbones.json")}


def assert_summary(actual: Tensor, expected: dict, *, relative: float) -> None:
    assert list(actual.shape) == expected["shape"]
    flat = actual.detach().double().flatten()
    scale = max(abs(v) for v in expected["value"]) or 1.0
    assert flat.mean().item() == pytest.approx(expected["mean"], rel=relative, abs=relative)
    assert flat.abs().sum().item() == pytest.approx(expected["abs_sum"], rel=relative)
    values = flat[expected["index"]].numpy()
    np.testing.assert_allclose(values, expected["value"], rtol=relative, atol=relative * scale)


@pytest.mark.parametrize("name", OUR_NAME)
def test_backbone_equals_the_authors(name: str) -> None:
    case = BACKBONES[name]
    frozen = not any(key.endswith("num_batches_tracked") for key in case["keys"])
    model = create_model(
        OUR_NAME[name],
        num_classes=0 if frozen else 1000,
        overrides={"norm": "frozen_bn"} if frozen else None,
    )
    weights = {backbone_key(k): golden_value(k, shape) for k, shape in case["keys"].items()}
    model.double().eval().load_state_dict(weights)
    for output in case["outputs"]:
        images = torch.from_numpy(np.random.RandomState(0).standard_normal(output["input"]))
        with torch.no_grad():
            last, maps = model.forward_intermediates(images)
            stem = model.stem(images)
        named = {"stem": stem} | {f"stage{i}": m for i, m in enumerate(maps[1:], start=2)}
        if "logits" in output["features"]:
            named["logits"] = model.forward_head(last)
        for key, expected in output["features"].items():
            assert_summary(named[key], expected, relative=1e-9)


GOLDEN = read("det_centermask_lite_V_19_slim_eSE.json")
RCNN = read("det_faster_rcnn_V_19_slim_FPNLite.json")


@dataclass
class PolygonMasks:
    """COCO polygons, rasterised as the COCO API does."""

    polygons: list[np.ndarray]  # (points, 2) in input pixels

    def to(self, device: str) -> "PolygonMasks":
        return self

    def rasterize(self, boxes_xyxy: Tensor, indices: Tensor, size: int) -> Tensor:
        return torch.stack(
            [
                torch.from_numpy(self._inside(box, index, (size, size), scaled=True))
                for box, index in zip(boxes_xyxy.double().numpy(), indices.tolist(), strict=True)
            ]
        ).double()

    def visible_fraction(self, boxes_xyxy: Tensor, indices: Tensor) -> Tensor:
        fractions = []
        for box, index in zip(boxes_xyxy.double().numpy(), indices.tolist(), strict=True):
            width, height = int(box[2] - box[0]), int(box[3] - box[1])
            inside = self._inside(box, index, (height, width), scaled=False).sum()
            x, y = self.polygons[index].T
            area = 0.5 * abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1)))
            fractions.append(np.clip(inside / area, 1e-10, 1.0))
        return torch.tensor(fractions)

    def _inside(self, box, index, shape: tuple[int, int], *, scaled: bool) -> np.ndarray:
        polygon = self.polygons[index] - box[:2]
        if scaled:
            polygon = polygon * np.array([shape[1], shape[0]]) / np.maximum(box[2:] - box[:2], 0.1)
        rle = coco_mask.merge(coco_mask.frPyObjects([polygon.flatten().tolist()], *shape))
        return coco_mask.decode(rle)


def ellipse(box: list[float]) -> np.ndarray:
    angle = 2 * np.pi * np.arange(32) / 32
    x0, y0, x1, y1 = box
    return np.stack(
        [
            (x0 + x1) / 2 + (x1 - x0) / 2 * np.cos(angle),
            (y0 + y1) / 2 + (y1 - y0) / 2 * np.sin(angle),
        ],
        axis=1,
    )


def golden_images(case: dict) -> tuple[Tensor, Tensor]:
    """The normalised, padded batch and the sizes before padding."""
    mean, std = (  # stored in float32 by the authors' code
        np.array(case["config"][key], dtype=np.float32).astype(np.float64)[:, None, None]
        for key in ("pixel_mean", "pixel_std")
    )
    batch = torch.zeros(case["padded_batch"], dtype=torch.float64)
    sizes = []
    for index, image in enumerate(case["images"]):
        pixels = np.random.RandomState(image["seed"]).randint(0, 256, image["shape"])
        pixels = (pixels.astype(np.uint8) - mean) / std
        sizes.append(image["shape"][1:])
        batch[index, :, : sizes[-1][0], : sizes[-1][1]] = torch.from_numpy(pixels)
    return batch, torch.tensor(sizes)


@pytest.fixture(scope="module")
def detector() -> torch.nn.Module:
    model = create_model(
        "centermask_lite_ese_vovnet19_slim_d2",
        overrides={"norm": "frozen_bn"},
    )
    model.double().eval().load_state_dict(centermask_weights(GOLDEN["keys"]))
    return model


@pytest.fixture(scope="module")
def raw(detector: torch.nn.Module) -> dict[str, Tensor]:
    with torch.no_grad():
        return detector(golden_images(GOLDEN)[0])


def test_pyramid_and_raw_outputs(raw: dict[str, Tensor]) -> None:
    for level, expected in GOLDEN["fpn"].items():
        assert_summary(raw[level], expected, relative=1e-9)
    counts = [len(points) for points in level_points(raw)]
    names = {"logits": "logits", "distances": "reg", "centerness": "ctrness"}
    for ours, theirs in names.items():
        for index, part in enumerate(raw[ours].split(counts, dim=1)):
            shape = GOLDEN["fcos"][theirs][index]["shape"]
            part = part.reshape(2, counts[index], -1).transpose(1, 2).reshape(shape)
            assert_summary(part, GOLDEN["fcos"][theirs][index], relative=1e-9)


def test_detections(detector: torch.nn.Module, raw: dict[str, Tensor]) -> None:
    with torch.no_grad():
        found = detector.detect(raw, golden_images(GOLDEN)[1])
    for image, expected in enumerate(GOLDEN["detections"]):
        assert found["valid"][image].all()
        np.testing.assert_allclose(found["boxes"][image].numpy(), expected["boxes"], atol=1e-4)
        assert found["labels"][image].tolist() == expected["classes"]
        np.testing.assert_allclose(found["scores"][image].numpy(), expected["scores"], rtol=1e-6)
        scores = np.array(expected["mask_scores"])
        np.testing.assert_allclose(
            found["mask_scores"][image].numpy(), scores, atol=1e-6 * np.abs(scores).max()
        )
        summary = expected["mask_probabilities"]
        probs = found["mask_probs"][image].reshape(summary["shape"])
        assert_summary(probs, summary, relative=1e-6)


def golden_targets() -> list[Target]:
    return [
        Target(
            torch.tensor(target["boxes"], dtype=torch.float64),
            torch.tensor(target["classes"]),
            PolygonMasks([ellipse(box) for box in target["boxes"]]),
        )
        for target in GOLDEN["targets"]
    ]


def test_losses(detector: torch.nn.Module, raw: dict[str, Tensor]) -> None:
    targets = golden_targets()
    losses = detector.loss(raw, targets, golden_images(GOLDEN)[1])
    expected = GOLDEN["losses_full"]
    names = {
        "loss_cls": "loss_fcos_cls",
        "loss_box": "loss_fcos_loc",
        "loss_centerness": "loss_fcos_ctr",
        "loss_mask": "loss_mask",
    }
    for ours, theirs in names.items():
        assert losses[ours].item() == pytest.approx(expected[theirs], rel=1e-7), ours
    assert losses["loss_mask_iou"].item() == pytest.approx(expected["loss_maskiou"], rel=1e-4)
    boxes, _ = detector._foreground(raw, targets)
    assert [len(box) for box in boxes] == [15, 35]


def test_faster_rcnn_equals_the_authors() -> None:
    model = create_model("faster_rcnn_lite_ese_vovnet19_slim_d2", overrides={"norm": "frozen_bn"})
    model.double().eval().load_state_dict(rcnn_weights(RCNN["keys"]))
    images, sizes = golden_images(RCNN)
    with torch.no_grad():
        raw = model(images)
        found = model.detect(raw, sizes)
    for level, expected in RCNN["fpn"].items():
        assert_summary(raw[level], expected, relative=1e-9)
    for image, expected in enumerate(RCNN["detections"]):
        assert found["valid"][image].all()
        np.testing.assert_allclose(found["boxes"][image].numpy(), expected["boxes"], atol=1e-3)
        assert found["labels"][image].tolist() == expected["classes"]
        np.testing.assert_allclose(found["scores"][image].numpy(), expected["scores"], atol=1e-5)
