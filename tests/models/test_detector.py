"""Assignment, losses and detection of FCOS and CenterMask in the corners that users meet."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from vovnet.models.boxes import Target, class_wise_nms, distances_to_boxes, grid_points
from vovnet.models.deploy import DeployGraph, fold_batch_norms
from vovnet.models.fcos import STRIDES, FCOSConfig, assign_points, fcos_loss
from vovnet.models.layers import Normalize
from vovnet.models.losses import centerness_target, giou_loss_ltrb
from vovnet.models.roi import BitmapMasks, assign_levels, pool_regions
from vovnet.models.zoo import create_model

NAME = "centermask_lite_ese_vovnet19b_slim_dw"
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def points_of(height: int, width: int) -> list[Tensor]:
    return [grid_points(-(-height // s), -(-width // s), s, torch.device("cpu")) for s in STRIDES]


def target_of(boxes: list[list[float]], size: int = 128, **fields: object) -> Target:
    pixels = torch.zeros(len(boxes), size, size, dtype=torch.uint8)
    for mask, (x0, y0, x1, y1) in zip(pixels, boxes, strict=True):
        mask[int(y0) : int(y1), int(x0) : int(x1)] = 1
    tensor = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    labels = torch.zeros(len(boxes), dtype=torch.int64)
    return Target(tensor, labels, BitmapMasks(pixels), **fields)


def detector(name: str = NAME, **overrides: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return create_model(name, num_classes=1, overrides={"mask_iou_width": 32} | overrides)


# --- assignment ---


def assign_slowly(points: list[Tensor], target: Target, config: FCOSConfig) -> list[int]:
    """The rule of assign_points said again, one location and one object at a time: object or -1."""
    limits = (0, *config.level_limits, float("inf"))
    chosen = []
    for level, stride in enumerate(STRIDES):
        for x, y in points[level].tolist():
            best, best_area = -1, float("inf")
            for index, (x0, y0, x1, y1) in enumerate(target.boxes_xyxy.tolist()):
                cx, cy, r = (x0 + x1) / 2, (y0 + y1) / 2, config.center_radius * stride
                in_x = max(cx - r, x0) < x < min(cx + r, x1)
                in_y = max(cy - r, y0) < y < min(cy + r, y1)
                longest = max(x - x0, y - y0, x1 - x, y1 - y)
                area = (x1 - x0) * (y1 - y0)
                fits = limits[level] <= longest <= limits[level + 1]
                if in_x and in_y and fits and area < best_area:
                    best, best_area = index, area
            chosen.append(best)
    return chosen


def test_assignment_equals_its_restatement_on_random_boxes() -> None:
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(40, 2, generator=generator) * 180
    sides = torch.rand(40, 2, generator=generator) ** 3 * 200 + 2
    boxes = torch.cat([corner, corner + sides], dim=1)
    target = Target(boxes, torch.arange(40) % 3)
    config = FCOSConfig(num_classes=3)
    points = points_of(256, 256)
    labels, distances = assign_points(points, target, config)
    expected = assign_slowly(points, target, config)
    strides = torch.cat([torch.full((len(p),), s) for p, s in zip(points, STRIDES, strict=True)])
    assert any(index >= 0 for index in expected)
    for location, index in enumerate(expected):
        assert labels[location] == (target.labels[index] if index >= 0 else 3)
    positive = torch.tensor(expected) >= 0
    decoded = distances_to_boxes(torch.cat(points), distances * strides[:, None])
    matched = boxes[torch.tensor(expected)]
    torch.testing.assert_close(decoded[positive], matched[positive])


def test_crowds_are_neither_object_nor_background() -> None:
    target = target_of([[8, 8, 40, 40]], ignore_xyxy=torch.tensor([[0.0, 0, 64, 64]]))
    labels, _ = assign_points(points_of(128, 128), target, FCOSConfig(num_classes=1))
    inside = (torch.cat(points_of(128, 128)) <= 64).all(1)
    assert (labels[inside] != 1).all()
    assert (labels == 0).any()
    assert (labels[~inside] == 1).all()


def test_a_crowd_over_everything_leaves_no_class_loss() -> None:
    model = detector().eval()
    with torch.no_grad():
        raw = model(torch.zeros(1, 3, 128, 128))
    everywhere = target_of([], ignore_xyxy=torch.tensor([[-1.0, -1, 999, 999]]))
    assert fcos_loss(raw, [everywhere], model.config)["loss_cls"] == 0
    assert fcos_loss(raw, [target_of([])], model.config)["loss_cls"] > 0


# --- losses ---


def test_giou_loss_by_hand() -> None:
    # 4 x 4 and 2 x 4 around one point: I = 8, U = 16, enclosing 16
    loss = giou_loss_ltrb(torch.tensor([[2.0, 2, 2, 2]]), torch.tensor([[1.0, 2, 1, 2]]))
    assert loss.item() == pytest.approx(1 - 9 / 17)
    # 2 x 2 each, shifted: I = 1, U = 7, enclosing 9
    loss = giou_loss_ltrb(
        torch.tensor([[1.5, 1.5, 0.5, 0.5]]), torch.tensor([[0.5, 0.5, 1.5, 1.5]])
    )
    assert loss.item() == pytest.approx(1 - (2 / 8 - 2 / 9))


def test_centerness_by_hand() -> None:
    distances = torch.tensor([[1.0, 1, 3, 1], [2.0, 2, 2, 2]])
    assert centerness_target(distances).tolist() == pytest.approx([(1 / 3) ** 0.5, 1.0])


@pytest.mark.parametrize("boxes", [[], [[4, 4, 30, 40]], [[1, 1, 3, 3], [0, 0, 128, 128]]])
def test_every_parameter_gets_a_finite_gradient(boxes: list[list[float]]) -> None:
    model = detector()
    raw = model(torch.randn(2, 3, 128, 128))
    losses = model.loss(raw, [target_of(boxes), target_of([])], torch.full((2, 2), 128))
    assert set(losses) == {
        "loss_cls", "loss_box", "loss_centerness", "loss_mask", "loss_mask_iou",
    }  # fmt: skip
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_a_thousand_objects() -> None:
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(1000, 2, generator=generator) * 110
    boxes = torch.cat([corner, corner + 6 + torch.rand(1000, 2, generator=generator) * 10], dim=1)
    model = detector(
        mask_channels=16, mask_rois_per_image=16, max_detections=1000, score_threshold=0.0
    )
    raw = model(torch.randn(1, 3, 128, 128))
    losses = model.loss(raw, [target_of(boxes.tolist())], torch.full((1, 2), 128))
    assert all(value.isfinite() for value in losses.values())
    found = model.detect(raw, torch.full((1, 2), 128))
    assert found["boxes"].shape == (1, 1000, 4)


def test_mask_loss_without_masks_is_refused() -> None:
    model = detector()
    target = replace(target_of([[4, 4, 90, 90]]), masks=None)
    with pytest.raises(ValueError, match="expected masks in every target"):
        model.loss(model(torch.randn(1, 3, 128, 128)), [target], torch.full((1, 2), 128))


def test_the_limit_of_mask_regions_holds() -> None:
    model = detector(mask_rois_per_image=3)
    boxes = [[8 * i, 8 * i, 8 * i + 30, 8 * i + 30] for i in range(10)]
    raw = model(torch.randn(1, 3, 128, 128))
    kept, matches = model._foreground(raw, [target_of(boxes)])
    assert len(kept[0]) == len(matches[0]) == 3


def test_a_few_steps_learn_one_image() -> None:
    torch.manual_seed(0)
    model = detector(score_threshold=0.3)
    image = torch.zeros(1, 3, 64, 64)
    boxes = [[6, 6, 28, 28], [34, 30, 58, 56]]
    for x0, y0, x1, y1 in boxes:
        image[:, :, y0:y1, x0:x1] = 2.0
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    sizes = torch.full((1, 2), 64)
    for _ in range(35):
        losses = model.loss(model(image), [target_of(boxes, 64)], sizes)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10)
        optimizer.step()
    with torch.no_grad():  # in training mode: BatchNorm's averages have not settled yet
        found = model.detect(model(image), sizes)
    boxes_found = found["boxes"][0, found["valid"][0]][:2]
    order = boxes_found[:, 0].argsort()
    np.testing.assert_allclose(boxes_found[order].numpy(), boxes, atol=5)
    assert (found["mask_probs"][0, :2, 6:22, 6:22] > 0.5).float().mean() > 0.9


# --- regions ---


def test_levels_by_equation_2() -> None:
    area = 1024.0 * 1024.0
    sides = torch.tensor([1024.0, 725.0, 513.0, 512.0, 511.0, 100.0, 0.0])
    boxes = torch.stack([sides * 0, sides * 0, sides, sides], dim=1)
    levels = assign_levels(boxes, torch.full((7,), area), min_level=3, max_level=5)
    assert levels.tolist() == [5, 5, 4, 3, 3, 3, 3]
    assert assign_levels(boxes[:1] * 9, torch.tensor([area]), min_level=3, max_level=5) == 5


def test_regions_come_back_in_order_from_their_own_level() -> None:
    features = [torch.full((2, 4, 16, 16), float(level)) for level in range(3)]
    boxes = torch.tensor([[0.0, 0, 32, 32]]).expand(5, 4)
    levels = torch.tensor([2, 0, 1, 0, 2])
    images = torch.tensor([0, 1, 0, 1, 1])
    pooled = pool_regions(features, (8, 16, 32), boxes, images, levels, size=14)
    assert pooled[:, 0, 7, 7].tolist() == [2, 0, 1, 0, 2]


def test_bitmaps_inside_boxes() -> None:
    masks = target_of([[10, 10, 30, 30], [0, 0, 8, 8]], size=64).masks
    boxes = torch.tensor([[10.0, 10, 30, 30], [10, 10, 50, 30], [20, 10, 40, 30], [0, 0, 16, 16]])
    indices = torch.tensor([0, 0, 0, 1])
    assert masks.visible_fraction(boxes, indices).tolist() == pytest.approx([1, 1, 0.5, 1])
    raster = masks.rasterize(boxes, indices, 28)
    assert raster.mean((1, 2)).tolist() == pytest.approx([1, 0.5, 0.5, 0.25], abs=0.02)
    assert masks.visible_fraction(boxes[:0], indices[:0]).shape == (0,)


# --- detect ---


def test_nms_keeps_classes_apart_where_boxes_are_negative() -> None:
    boxes = torch.tensor([[-50.0, -50, -1, -1], [-50, -50, -1, -1], [-49, -50, -1, -1]])
    scores, labels = torch.tensor([0.9, 0.8, 0.7]), torch.tensor([0, 1, 0])
    assert class_wise_nms(boxes, scores, labels, threshold=0.6, keep=9).tolist() == [0, 1]
    assert class_wise_nms(boxes, scores, labels, threshold=0.6, keep=1).tolist() == [0]


def test_nothing_found_is_empty() -> None:
    model = detector(score_threshold=0.9999).eval()
    with torch.no_grad():
        found = model.detect(model(torch.randn(2, 3, 64, 64)), torch.full((2, 2), 64))
    assert not found["valid"].any()
    assert all(not value.any() for value in found.values())
    assert found["mask_probs"].shape == (2, 50, 28, 28)


def test_thresholds_are_settings() -> None:
    model = detector(score_threshold=0.0, max_detections=7).eval()
    with torch.no_grad():
        found = model.detect(model(torch.randn(1, 3, 64, 64)), torch.full((1, 2), 64))
    assert found["valid"].shape == (1, 7)
    assert found["valid"].all()


def test_one_image_and_a_padded_batch_agree() -> None:
    model = detector(score_threshold=0.0, max_detections=20)
    model.double()
    graph = DeployGraph(model, mean=MEAN, std=STD).double().eval()
    rng = np.random.default_rng(0)
    small = torch.from_numpy(rng.integers(0, 256, (1, 64, 96, 3), dtype=np.uint8))
    batch = torch.zeros(2, 64, 96, 3, dtype=torch.uint8)
    batch[0] = small[0]
    batch[1, :40, :50] = torch.from_numpy(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8))
    with torch.no_grad():
        alone = graph(small, torch.tensor([[64, 96]]))
        together = graph(batch, torch.tensor([[64, 96], [40, 50]]))
    for name, value in alone.items():
        torch.testing.assert_close(together[name][:1], value, msg=name)


@pytest.mark.parametrize("size", [(32, 32), (50, 70), (33, 257)])
def test_images_of_any_size(size: tuple[int, int]) -> None:
    model = detector(score_threshold=0.0).eval()
    with torch.no_grad():
        found = model.detect(model(torch.randn(1, 3, *size)), torch.tensor([size]))
    assert found["boxes"].isfinite().all()


def test_fcos_alone_has_no_masks() -> None:
    model = create_model("fcos_ese_vovnet19b_slim_dw", num_classes=3).eval()
    with torch.no_grad():
        raw = model(torch.randn(1, 3, 64, 64))
        found = model.detect(raw, torch.full((1, 2), 64))
    assert set(found) == {"boxes", "scores", "labels", "valid"}
    losses = model.loss(raw, [target_of([[4, 4, 40, 40]])], torch.full((1, 2), 64))
    assert set(losses) == {"loss_cls", "loss_box", "loss_centerness"}


def test_normalisation_comes_before_padding() -> None:
    normalize = Normalize(MEAN, STD)
    images = torch.full((1, 4, 4, 3), 200, dtype=torch.uint8)
    result = normalize(images, torch.tensor([[2, 3]]))
    assert result.shape == (1, 3, 4, 4)
    expected = (200 - torch.tensor(MEAN)) / torch.tensor(STD)
    torch.testing.assert_close(result[0, :, 1, 2], expected)
    assert (result[:, :, 2:] == 0).all()
    assert (result[:, :, :, 3:] == 0).all()
    assert not normalize.state_dict()


@pytest.mark.parametrize("name", [NAME, "centermask_lite_ese_vovnet19b_slim"])
def test_folded_norms_change_nothing(name: str) -> None:
    model = detector(name, score_threshold=0.0).double().eval()
    for part in model.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.running_mean.normal_(0, 0.1)
            part.running_var.uniform_(0.5, 2)
    images = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        before = model(images)
        fold_batch_norms(model)
        after = model(images)
    assert not any(isinstance(part, torch.nn.BatchNorm2d) for part in model.modules())
    for key, value in before.items():
        torch.testing.assert_close(after[key], value)
