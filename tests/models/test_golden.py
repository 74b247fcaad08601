"""Our networks compute what the authors' own code computes (figures in tests/golden, float64)."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from tests.models.golden import (
    CENTERMASK,
    FASTER_RCNN,
    assert_summary,
    golden_input,
    original,
    rebuild,
)
from vovnet.models.boxes import Target
from vovnet.models.convert import convert
from vovnet.models.fcos import level_points


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


@pytest.fixture(scope="module")
def detector() -> torch.nn.Module:
    return rebuild(convert(original(CENTERMASK)), norm="frozen_bn")


@pytest.fixture(scope="module")
def sizes() -> Tensor:
    return golden_input(CENTERMASK, convert(original(CENTERMASK)))[1]


@pytest.fixture(scope="module")
def raw(detector: torch.nn.Module) -> dict[str, Tensor]:
    with torch.no_grad():
        return detector(golden_input(CENTERMASK, convert(original(CENTERMASK)))[0])


def test_pyramid_and_raw_outputs(raw: dict[str, Tensor]) -> None:
    for level, expected in CENTERMASK["fpn"].items():
        assert_summary(raw[level], expected, relative=1e-9)
    counts = [len(points) for points in level_points(raw)]
    names = {"logits": "logits", "distances": "reg", "centerness": "ctrness"}
    for ours, theirs in names.items():
        for index, part in enumerate(raw[ours].split(counts, dim=1)):
            shape = CENTERMASK["fcos"][theirs][index]["shape"]
            part = part.reshape(2, counts[index], -1).transpose(1, 2).reshape(shape)
            assert_summary(part, CENTERMASK["fcos"][theirs][index], relative=1e-9)


def golden_targets() -> list[Target]:
    return [
        Target(
            torch.tensor(target["boxes"], dtype=torch.float64),
            torch.tensor(target["classes"]),
            PolygonMasks([ellipse(box) for box in target["boxes"]]),
        )
        for target in CENTERMASK["targets"]
    ]


def test_losses(detector: torch.nn.Module, raw: dict[str, Tensor], sizes: Tensor) -> None:
    targets = golden_targets()
    losses = detector.loss(raw, targets, sizes)
    expected = CENTERMASK["losses_full"]
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


def test_pyramid_of_faster_rcnn() -> None:
    conversion = convert(original(FASTER_RCNN))
    model = rebuild(conversion, norm="frozen_bn")
    with torch.no_grad():
        raw = model(golden_input(FASTER_RCNN, conversion)[0])
    for level, expected in FASTER_RCNN["fpn"].items():
        assert_summary(raw[level], expected, relative=1e-9)
