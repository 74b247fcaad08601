"""Faster R-CNN and Mask R-CNN against plain restatements, and in the corners that users meet."""

from dataclasses import replace
from itertools import product
from math import exp, floor, log2, sqrt

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.models.detection import _utils as torchvision_rcnn
from torchvision.ops import box_iou, roi_align

from vovnet.errors import ConfigError
from vovnet.models.boxes import (
    Target,
    clip_boxes,
    covered_fraction,
    decode_boxes,
    encode_boxes,
    match_boxes,
    sample_balanced,
)
from vovnet.models.deploy import DeployGraph
from vovnet.models.rcnn import RCNNConfig, _pool, sample_regions
from vovnet.models.roi import BitmapMasks, assign_levels_by_size
from vovnet.models.rpn import (
    STRIDES,
    RPNConfig,
    assign_anchors,
    level_anchors,
    propose,
    rpn_loss,
)
from vovnet.models.zoo import create_model
from vovnet.profiling.count import count_parameters

FASTER = "faster_rcnn_lite_ese_vovnet19b_slim_dw"
MASK = "mask_rcnn_lite_ese_vovnet19b_slim_dw"
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
SMALL = {
    "neck_channels": 32,
    "box_conv_channels": 32,
    "box_width": 32,
    "rois_per_image": 32,
    "proposals": 50,
    "proposals_train": 100,
}
SMALL_MASK = SMALL | {"mask_channels": 16, "mask_convs": 1}
LOSSES = {"loss_rpn_cls", "loss_rpn_box", "loss_cls", "loss_box"}
BOXES = [[4.0, 4, 60, 50], [70, 60, 120, 127], [10, 80, 30, 100]]


def detector(name: str = MASK, **overrides: object) -> torch.nn.Module:
    torch.manual_seed(0)
    small = SMALL_MASK if name.startswith("mask") else SMALL
    return create_model(name, num_classes=3, overrides=small | overrides)


def target_of(boxes: list[list[float]], size: int = 128, **fields: object) -> Target:
    pixels = torch.zeros(len(boxes), size, size, dtype=torch.uint8)
    for mask, (x0, y0, x1, y1) in zip(pixels, boxes, strict=True):
        mask[int(y0) : int(y1), int(x0) : int(x1)] = 1
    tensor = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return Target(tensor, torch.arange(len(boxes)) % 3, BitmapMasks(pixels), **fields)


def random_boxes(count: int, size: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator, dtype=torch.float64) * size * 0.8
    sides = torch.rand(count, 2, generator=generator, dtype=torch.float64) ** 2 * size + 1
    return torch.cat([corner, corner + sides], dim=1)


def random_raw(height: int, width: int, *, channels: int = 8, batch: int = 2) -> dict[str, Tensor]:
    """What a network could give, in float64, with scores and deltas that differ widely."""
    generator = torch.Generator().manual_seed(0)
    grids = [(-(-height // s), -(-width // s)) for s in STRIDES]
    anchors = 3 * sum(h * w for h, w in grids)
    raw = {
        f"p{level}": torch.randn(batch, channels, *grid, generator=generator, dtype=torch.float64)
        for level, grid in enumerate(grids, start=2)
    }
    raw["objectness"] = torch.randn(batch, anchors, generator=generator, dtype=torch.float64)
    raw["anchor_deltas"] = torch.randn(batch, anchors, 4, generator=generator).double() * 0.7
    return raw


def overlap(a: list[float], b: list[float]) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return width * height / (sum(areas) - width * height)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)])
def test_coding_equals_torchvision(weights: tuple[float, float, float, float]) -> None:
    coder = torchvision_rcnn.BoxCoder(weights)
    bigger = torch.tensor([0, 0, 20, 20])  # no side grows by more than decoding allows
    references, boxes = random_boxes(50, 300) + bigger, random_boxes(50, 300, seed=1) + bigger
    deltas = encode_boxes(boxes, references, weights=weights)
    torch.testing.assert_close(deltas, coder.encode_single(boxes, references))
    torch.testing.assert_close(decode_boxes(deltas, references, weights=weights), boxes)
    wild = torch.randn(50, 4, dtype=torch.float64) * 9
    expected = coder.decode_single(wild, references)
    torch.testing.assert_close(decode_boxes(wild, references, weights=weights), expected)


def test_boxes_are_cut_at_their_own_image() -> None:
    boxes = torch.tensor([[-5.0, -6, 300, 400], [1, 2, 3, 4]]).expand(2, 2, 4)
    cut = clip_boxes(boxes, torch.tensor([[100, 200], [50, 60]]))
    assert cut[:, 0].tolist() == [[0, 0, 200, 100], [0, 0, 60, 50]]
    assert torch.equal(cut[:, 1], boxes[:, 1])


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_matching_equals_its_restatement(chunk: int) -> None:
    candidates, boxes = random_boxes(60, 100), random_boxes(8, 100, seed=3)
    boxes = torch.cat([boxes, boxes[2:3], torch.tensor([[5.0, 5, 5, 9], [900, 900, 950, 950]])])
    candidates = torch.cat([candidates, boxes[4:5], boxes[9:10]])
    table = [[overlap(a, b) for b in boxes.tolist()] for a in candidates.tolist()]
    highest = [max(row[n] for row in table) for n in range(len(boxes))]
    best, matched, closest = match_boxes(candidates, boxes, chunk=chunk)
    np.testing.assert_allclose(best.numpy(), [max(row) for row in table])
    touched = [index for index, row in enumerate(table) if max(row) > 0]
    assert [matched[i] for i in touched] == [table[i].index(max(table[i])) for i in touched]
    expected = [any(v and v == h for v, h in zip(r, highest, strict=True)) for r in table]
    assert closest.tolist() == expected


def test_matching_nothing() -> None:
    best, matched, closest = match_boxes(random_boxes(5, 50), torch.zeros(0, 4))
    assert not best.any()
    assert not matched.any()
    assert not closest.any()


def test_covered_fraction_by_hand() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 40], [5, 5, 5, 9], [90, 90, 99, 99]])
    regions = torch.tensor([[5.0, 0, 20, 10], [0, 0, 25, 25], [25, 0, 60, 60]])
    assert covered_fraction(boxes, regions).tolist() == [1, 0.5, 0, 0]
    assert covered_fraction(boxes, regions[:1]).tolist() == [0.5, 0, 0, 0]
    assert covered_fraction(boxes, regions[:0]).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("positives", "negatives", "drawn"),
    [(100, 100, (8, 24)), (3, 100, (3, 29)), (100, 5, (8, 5)), (0, 0, (0, 0)), (0, 50, (0, 32))],
)
def test_sampling_fills_up_with_negatives(
    positives: int, negatives: int, drawn: tuple[int, int]
) -> None:
    kind = torch.tensor([1] * positives + [0] * negatives + [-1] * 20)
    order = torch.randperm(len(kind), generator=torch.Generator().manual_seed(0))
    kind = kind[order]
    torch.manual_seed(5)
    chosen = sample_balanced(kind == 1, kind == 0, count=32, positive_fraction=0.25)
    assert tuple(len(indices) for indices in chosen) == drawn
    for value, indices in zip((1, 0), chosen, strict=True):
        assert (kind[indices] == value).all()
        assert len(set(indices.tolist())) == len(indices)
    torch.manual_seed(5)
    again = sample_balanced(kind == 1, kind == 0, count=32, positive_fraction=0.25)
    assert all(torch.equal(a, b) for a, b in zip(chosen, again, strict=True))


def test_every_candidate_can_be_drawn() -> None:
    torch.manual_seed(0)
    everything = torch.ones(10, dtype=torch.bool)
    drawn = [sample_balanced(everything, ~everything, count=2, positive_fraction=1.0)[0]
             for _ in range(60)]  # fmt: skip
    assert set(torch.cat(drawn).tolist()) == set(range(10))


def anchors_slowly(height: int, width: int) -> list[list[float]]:
    """The anchors said again, one at a time."""
    anchors = []
    for stride, size in zip(STRIDES, (32, 64, 128, 256, 512), strict=True):
        for row, column in product(range(-(-height // stride)), range(-(-width // stride))):
            for ratio in (0.5, 1.0, 2.0):
                w, h = size / sqrt(ratio), size * sqrt(ratio)
                x, y = column * stride, row * stride
                anchors.append([x - w / 2, y - h / 2, x + w / 2, y + h / 2])
    return anchors


ANCHORS = anchors_slowly(64, 96)


def test_anchors_equal_their_restatement() -> None:
    anchors = level_anchors(random_raw(100, 132), RPNConfig())
    assert [len(level) for level in anchors] == [25 * 33 * 3, 13 * 17 * 3, 7 * 9 * 3, 60, 18]
    np.testing.assert_allclose(torch.cat(anchors).numpy(), anchors_slowly(100, 132), atol=1e-9)


def test_anchor_assignment_equals_torchvision() -> None:
    config = RPNConfig()
    anchors = torch.tensor(anchors_slowly(160, 160))
    target = Target(random_boxes(12, 130).float(), torch.zeros(12, dtype=torch.int64))
    positive, negative, matched = assign_anchors(anchors, target, config)
    matcher = torchvision_rcnn.Matcher(0.7, 0.3, allow_low_quality_matches=True)
    expected = matcher(box_iou(target.boxes_xyxy, anchors))
    assert torch.equal(positive, expected >= 0)
    assert torch.equal(negative, expected == matcher.BELOW_LOW_THRESHOLD)
    assert torch.equal(matched[positive], expected[positive])
    assert 12 <= positive.sum() < negative.sum()
    assert (~positive & ~negative).any()


def test_only_background_in_a_crowd_is_left_out() -> None:
    anchors = torch.tensor(anchors_slowly(128, 128))
    plain = target_of(BOXES)
    crowd = replace(plain, ignore_xyxy=torch.tensor([[0.0, 0, 64, 128]]))
    positive, negative, _ = assign_anchors(anchors, plain, RPNConfig())
    positive_too, remaining, _ = assign_anchors(anchors, crowd, RPNConfig())
    assert torch.equal(positive, positive_too)
    for index in torch.nonzero(negative)[:, 0].tolist():
        x0, y0, x1, y1 = anchors[index].tolist()
        covered = max(min(x1, 64) - max(x0, 0), 0) * max(min(y1, 128) - max(y0, 0), 0)
        assert remaining[index] == (covered <= 0.5 * (x1 - x0) * (y1 - y0))


def propose_slowly(
    raw: dict[str, Tensor], image: int, size: tuple[int, int], *, top_k: int, count: int
) -> list[list[float]]:
    """The proposals of one image said again, one box at a time."""
    height, width = size
    shapes = [raw[f"p{level}"].shape[-2:] for level in range(2, 7)]
    level_of = [level for level, (h, w) in enumerate(shapes) for _ in range(3 * h * w)]
    scores = raw["objectness"][image].tolist()
    deltas = raw["anchor_deltas"][image].tolist()
    found = []
    for level in range(5):
        members = [i for i, own in enumerate(level_of) if own == level]
        for i in sorted(members, key=lambda i: -scores[i])[:top_k]:
            x0, y0, x1, y1 = ANCHORS[i]
            w, h, (dx, dy, dw, dh) = x1 - x0, y1 - y0, deltas[i]
            x, y = (x0 + x1) / 2 + dx * w, (y0 + y1) / 2 + dy * h
            w, h = w * min(exp(dw), 62.5), h * min(exp(dh), 62.5)
            box = [
                min(max(x - w / 2, 0), width),
                min(max(y - h / 2, 0), height),
                min(max(x + w / 2, 0), width),
                min(max(y + h / 2, 0), height),
            ]
            if box[2] > box[0] and box[3] > box[1]:
                found.append((scores[i], level, box))
    kept: list[tuple[float, int, list[float]]] = []
    for score, level, box in sorted(found, key=lambda one: -one[0]):
        if all(level != own or overlap(box, other) <= 0.7 for _, own, other in kept):
            kept.append((score, level, box))
    return [box for _, _, box in kept[:count]]


def test_proposals_equal_their_restatement() -> None:
    raw = {name: value.requires_grad_() for name, value in random_raw(64, 96).items()}
    sizes = torch.tensor([[64, 96], [40, 50]])
    config = RPNConfig()
    for count in (1000, 25):
        found = propose(raw, sizes, config, pre_nms_top_k=60, count=count)
        for image, size in enumerate([(64, 96), (40, 50)]):
            expected = propose_slowly(raw, image, size, top_k=60, count=count)
            np.testing.assert_allclose(found[image].numpy(), expected, atol=1e-4)
    assert len(found[0]) == 25
    assert not found[0].requires_grad


def test_rpn_losses_equal_their_restatement() -> None:
    raw = random_raw(64, 96)
    targets = [target_of([[4, 4, 60, 50], [50, 30, 90, 64]]), target_of([])]
    config = RPNConfig(rpn_samples=100_000)  # so many that all are drawn
    losses = rpn_loss(raw, targets, config)
    cls = box = 0.0
    for image, target in enumerate(targets):
        objects = target.boxes_xyxy.tolist()
        table = [[overlap(anchor, one) for one in objects] for anchor in ANCHORS]
        highest = [max(row[n] for row in table) for n in range(len(objects))]
        for i, row in enumerate(table):
            top = max(row, default=0.0)
            positive = top >= 0.7 or any(v == h for v, h in zip(row, highest, strict=True))
            if not positive and top >= 0.3:
                continue
            logit = raw["objectness"][image, i].item()
            cls += float(np.logaddexp(0, -logit if positive else logit))
            if positive:
                (ax0, ay0, ax1, ay1), (x0, y0, x1, y1) = ANCHORS[i], objects[row.index(top)]
                wanted = [
                    ((x0 + x1) - (ax0 + ax1)) / 2 / (ax1 - ax0),
                    ((y0 + y1) - (ay0 + ay1)) / 2 / (ay1 - ay0),
                    np.log((x1 - x0) / (ax1 - ax0)),
                    np.log((y1 - y0) / (ay1 - ay0)),
                ]
                box += float(np.abs(raw["anchor_deltas"][image, i].numpy() - wanted).sum())
    assert losses["loss_rpn_cls"].item() == pytest.approx(cls / 200_000, rel=1e-6)
    assert losses["loss_rpn_box"].item() == pytest.approx(box / 200_000, rel=1e-6)
    assert box > 0


def test_an_image_that_is_one_crowd_teaches_the_proposals_nothing() -> None:
    raw = random_raw(64, 96, batch=1)
    raw = {name: value.requires_grad_() for name, value in raw.items()}
    crowd = target_of([], ignore_xyxy=torch.tensor([[-999.0, -999, 999, 999]]))
    losses = rpn_loss(raw, [crowd], RPNConfig())
    assert losses["loss_rpn_cls"] == losses["loss_rpn_box"] == 0
    sum(losses.values()).backward()
    assert not raw["objectness"].grad.any()


def test_regions_are_positives_first_and_true_boxes_take_part() -> None:
    target = target_of(BOXES, ignore_xyxy=torch.tensor([[0.0, 100, 128, 128]]))
    proposals = torch.tensor(
        [[5.0, 5, 60, 50], [70, 60, 120, 100], [0, 0, 20, 20], [0, 100, 60, 127], [4, 4, 60, 28]]
    )
    regions = sample_regions(proposals, target, RCNNConfig(num_classes=3))
    found = {tuple(box): label for box, label in zip(regions.boxes_xyxy.tolist(),
             regions.labels.tolist(), strict=True)}  # fmt: skip
    assert found == {
        (5, 5, 60, 50): 0,
        (70, 60, 120, 100): 1,
        (4, 4, 60, 28): 0,  # IoU 0.52
        (4, 4, 60, 50): 0,
        (70, 60, 120, 127): 1,
        (10, 80, 30, 100): 2,
        (0, 0, 20, 20): 3,  # background; the box in the crowd is none
    }
    boxes, labels = regions.positive()
    assert len(boxes) == len(regions.matches) == 6
    assert torch.equal(target.labels[regions.matches], labels)


def test_a_quarter_of_the_regions_is_positive_at_most() -> None:
    target = target_of(BOXES[:1])
    near = target.boxes_xyxy + torch.rand(300, 1) * 3
    proposals = torch.cat([near, random_boxes(900, 60).float() + 64])
    torch.manual_seed(0)
    regions = sample_regions(proposals, target, RCNNConfig(num_classes=3))
    assert (len(regions.boxes_xyxy), len(regions.matches)) == (512, 128)
    assert (regions.labels[128:] == 3).all()
    torch.manual_seed(0)
    again = sample_regions(proposals, target, RCNNConfig(num_classes=3))
    assert torch.equal(again.boxes_xyxy, regions.boxes_xyxy)
    other = sample_regions(proposals, target, RCNNConfig(num_classes=3))
    assert not torch.equal(other.boxes_xyxy, regions.boxes_xyxy)


def test_levels_by_equation_1() -> None:
    sides = torch.tensor([0.0, 111.9, 112, 223.9, 224, 447.9, 448, 9999])
    boxes = torch.stack([sides * 0, sides * 0, sides * 2, sides / 2], dim=1)
    levels = assign_levels_by_size(boxes, min_level=2, max_level=5)
    assert levels.tolist() == [2, 2, 3, 3, 4, 4, 5, 5]


def pool_slowly(raw: dict[str, Tensor], image: int, box: list[float], size: int) -> Tensor:
    side = sqrt((box[2] - box[0]) * (box[3] - box[1]))
    level = min(max(floor(4 + log2(side / 224 + 1e-8)), 2), 5)
    feature = raw[f"p{level}"][image : image + 1]
    rois = [feature.new_tensor([box])]
    return roi_align(feature, rois, size, 1 / 2**level, sampling_ratio=0, aligned=True)


def test_regions_are_read_from_the_level_of_their_size() -> None:
    raw = random_raw(512, 512, channels=2)
    sides = (20, 130, 300, 500)
    boxes = [torch.tensor([[3.0, 5, 3 + side, 5 + side] for side in sides]).double()] * 2
    pooled = _pool(raw, [boxes[0], boxes[1][::2]], 7)
    images = [(0, box) for box in boxes[0]] + [(1, box) for box in boxes[1][::2]]
    expected = [pool_slowly(raw, image, box.tolist(), 7) for image, box in images]
    torch.testing.assert_close(pooled, torch.cat(expected))


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    """A small Mask R-CNN in float64 whose outputs differ from class to class."""
    made = detector(rois_per_image=10_000, rpn_samples=100_000).double()
    for head in (made.faster_rcnn.box_head.deltas, made.mask_head.predictor):
        torch.nn.init.normal_(head.weight, std=0.05)
    return made


def test_losses_of_the_heads_equal_their_restatement(model: torch.nn.Module) -> None:
    raw = random_raw(128, 128, channels=32)
    targets = [target_of(BOXES), target_of(BOXES[1:2])]
    sizes = torch.tensor([[128, 128], [128, 100]])
    torch.manual_seed(3)
    losses = model.loss(raw, targets, sizes)
    torch.manual_seed(3)
    regions = model.faster_rcnn.sample_regions(raw, targets, sizes)
    cls, box, mask, positives = 0.0, 0.0, [], 0
    for image, (one, target) in enumerate(zip(regions, targets, strict=True)):
        for index, (region, label) in enumerate(
            zip(one.boxes_xyxy.tolist(), one.labels.tolist(), strict=True)
        ):
            logits, deltas = model.faster_rcnn.box_head(pool_slowly(raw, image, region, 7))
            cls += (logits.exp().sum().log() - logits[0, label]).item()
            overlaps = [overlap(region, true) for true in target.boxes_xyxy.tolist()]
            assert (label == 3) == (max(overlaps) < 0.5)
            if label == 3:
                continue
            match = overlaps.index(max(overlaps))
            assert label == target.labels[match]
            assert index < len(one.matches)
            coder = torchvision_rcnn.BoxCoder((10.0, 10.0, 5.0, 5.0))
            truth = target.boxes_xyxy[match : match + 1].double()
            wanted = coder.encode_single(truth, torch.tensor([region]).double())
            box += (deltas[0, label] - wanted).abs().sum().item()
            maps = model.mask_head(pool_slowly(raw, image, region, 14))[0, label]
            inside = target.masks.rasterize(
                torch.tensor([region]), torch.tensor([match]), 28
            ).double()
            bce = torch.logaddexp(torch.zeros_like(maps), maps) - maps * inside[0]
            mask.append(bce.mean().item())
            positives += 1
    count = sum(len(one.labels) for one in regions)
    assert positives > 4 < count - positives
    assert losses["loss_cls"].item() == pytest.approx(cls / count, rel=1e-5)
    assert losses["loss_box"].item() == pytest.approx(box / count, rel=1e-5)
    assert losses["loss_mask"].item() == pytest.approx(sum(mask) / positives, rel=1e-5)


def test_detections_equal_their_restatement(model: torch.nn.Module, monkeypatch) -> None:
    raw = random_raw(128, 128, channels=32)
    sizes = [(128, 128), (70, 100)]
    config = replace(model.config, score_threshold=0.2, max_detections=30)
    monkeypatch.setattr(model.faster_rcnn, "config", config)
    with torch.no_grad():
        found = model.detect(raw, torch.tensor(sizes))
        proposals = propose(raw, torch.tensor(sizes), config, pre_nms_top_k=1000, count=50)
    coder = torchvision_rcnn.BoxCoder((10.0, 10.0, 5.0, 5.0))
    for image, (height, width) in enumerate(sizes):
        candidates = []
        for region in proposals[image]:
            with torch.no_grad():
                pooled = pool_slowly(raw, image, region.tolist(), 7)
                logits, deltas = model.faster_rcnn.box_head(pooled)
            scores = logits[0].softmax(0).tolist()
            boxes = coder.decode_single(deltas[0], region.double().expand(3, 4))
            limit = torch.tensor([width, height] * 2)
            boxes = boxes.clamp(min=0).minimum(limit).tolist()
            candidates += [
                (scores[label], label, boxes[label]) for label in range(3) if scores[label] > 0.2
            ]
        kept: list[tuple[float, int, list[float]]] = []
        for score, label, box in sorted(candidates, key=lambda one: -one[0]):
            if all(label != own or overlap(box, other) <= 0.5 for _, own, other in kept):
                kept.append((score, label, box))
        kept = kept[:30]
        valid = found["valid"][image]
        assert valid.tolist() == [index < len(kept) for index in range(30)]
        assert found["labels"][image][valid].tolist() == [label for _, label, _ in kept]
        np.testing.assert_allclose(
            found["boxes"][image][valid].numpy(), [box for _, _, box in kept], atol=1e-3
        )
        np.testing.assert_allclose(
            found["scores"][image][valid].numpy(), [score for score, _, _ in kept], atol=1e-5
        )
        for index, (_, label, _) in enumerate(kept):
            region = found["boxes"][image, index].tolist()
            with torch.no_grad():
                maps = model.mask_head(pool_slowly(raw, image, region, 14))[0, label]
            torch.testing.assert_close(found["mask_probs"][image, index], maps.sigmoid())
    assert torch.equal(found["mask_scores"], found["scores"])


@pytest.mark.parametrize("name", [FASTER, MASK])
@pytest.mark.parametrize("norm", ["none", "gn"])
def test_every_parameter_gets_a_gradient(name: str, norm: str) -> None:
    made = detector(name, head_norm=norm)
    raw = made(torch.randn(2, 3, 128, 128))
    losses = made.loss(raw, [target_of(BOXES), target_of(BOXES[:1])], torch.full((2, 2), 128))
    assert set(losses) == (LOSSES | {"loss_mask"} if name == MASK else LOSSES)
    sum(losses.values()).backward()
    for key, parameter in made.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.any(), key


@pytest.mark.parametrize("norm", ["none", "gn"])
@pytest.mark.parametrize("crowds", [torch.zeros(0, 4), torch.tensor([[-999.0, -999, 999, 999]])])
def test_images_without_objects(norm: str, crowds: Tensor) -> None:
    made = detector(head_norm=norm)
    targets = [target_of([], ignore_xyxy=crowds), target_of([], ignore_xyxy=crowds)]
    losses = made.loss(made(torch.randn(2, 3, 64, 64)), targets, torch.full((2, 2), 64))
    assert losses["loss_rpn_box"] == losses["loss_box"] == losses["loss_mask"] == 0
    learns = len(crowds) == 0
    assert all((losses[name] > 0) == learns for name in ("loss_rpn_cls", "loss_cls"))
    sum(losses.values()).backward()
    for key, parameter in made.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


def test_a_thousand_objects() -> None:
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(1000, 2, generator=generator) * 110
    boxes = torch.cat([corner, corner + 6 + torch.rand(1000, 2, generator=generator) * 10], dim=1)
    made = detector(max_detections=1000, score_threshold=0.0, proposals=400)
    raw = made(torch.randn(1, 3, 128, 128))
    losses = made.loss(raw, [target_of(boxes.tolist())], torch.full((1, 2), 128))
    assert all(value.isfinite() for value in losses.values())
    with torch.no_grad():
        found = made.detect(raw, torch.full((1, 2), 128))
    assert found["mask_probs"].shape == (1, 1000, 28, 28)


def test_one_class() -> None:
    made = create_model(MASK, num_classes=1, overrides=SMALL_MASK)
    target = replace(target_of(BOXES), labels=torch.zeros(3, dtype=torch.int64))
    raw = made(torch.randn(1, 3, 128, 128))
    losses = made.loss(raw, [target], torch.full((1, 2), 128))
    assert all(value > 0 for value in losses.values())
    assert not made.detect(raw, torch.full((1, 2), 128))["labels"].any()


def test_a_seed_decides_the_losses() -> None:
    made = detector(rpn_samples=16).eval()
    raw = made(torch.randn(1, 3, 128, 128))
    targets, sizes = [target_of(BOXES)], torch.full((1, 2), 128)

    def loss(seed: int) -> dict[str, float]:
        torch.manual_seed(seed)
        return {name: value.item() for name, value in made.loss(raw, targets, sizes).items()}

    assert loss(1) == loss(1)
    assert loss(1)["loss_rpn_cls"] != loss(2)["loss_rpn_cls"]


def test_mask_loss_without_masks_is_refused() -> None:
    made = detector()
    target = replace(target_of(BOXES), masks=None)
    with pytest.raises(ValueError, match="expected masks in every target"):
        made.loss(made(torch.randn(1, 3, 128, 128)), [target], torch.full((1, 2), 128))


def test_one_image_and_a_padded_batch_agree() -> None:
    made = detector(score_threshold=0.0, max_detections=20)
    graph = DeployGraph(made, mean=MEAN, std=STD).double().eval()
    rng = np.random.default_rng(0)
    small = torch.from_numpy(rng.integers(0, 256, (1, 64, 96, 3), dtype=np.uint8))
    batch = torch.zeros(2, 64, 96, 3, dtype=torch.uint8)
    batch[0] = small[0]
    batch[1, :40, :50] = torch.from_numpy(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8))
    with torch.no_grad():
        alone = graph(small, torch.tensor([[64, 96]]))
        together = graph(batch, torch.tensor([[64, 96], [40, 50]]))
    for key, value in alone.items():
        torch.testing.assert_close(together[key][:1], value, msg=key)
    assert set(together) == {"boxes", "scores", "labels", "valid", "mask_probs", "mask_scores"}
    assert together["valid"].all()
    assert (together["boxes"][1] <= torch.tensor([50, 40, 50, 40])).all()


def test_nothing_found_is_empty() -> None:
    made = detector(score_threshold=0.9999).eval()
    with torch.no_grad():
        found = made.detect(made(torch.randn(2, 3, 64, 64)), torch.full((2, 2), 64))
    assert all(not value.any() for value in found.values())
    assert found["mask_probs"].shape == (2, 100, 28, 28)


def test_what_is_below_min_score_is_dropped() -> None:
    made = detector(FASTER, score_threshold=0.0).eval()
    with torch.no_grad():
        raw = made(torch.randn(1, 3, 64, 64))
        scores = made.detect(raw, torch.full((1, 2), 64))["scores"][0]
        made.config = replace(made.config, min_score=scores[10].item())
        fewer = made.detect(raw, torch.full((1, 2), 64))
    assert fewer["valid"].sum() == 11
    assert torch.equal(fewer["scores"][0, :11], scores[:11])


@pytest.mark.parametrize("size", [(32, 32), (50, 70), (33, 257)])
def test_images_of_any_size(size: tuple[int, int]) -> None:
    made = detector(score_threshold=0.0).eval()
    with torch.no_grad():
        found = made.detect(made(torch.randn(1, 3, *size)), torch.tensor([size]))
    assert found["boxes"].isfinite().all()
    assert found["valid"].any()


def test_half_precision_features() -> None:
    made = detector(score_threshold=0.0).eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        raw = made(torch.randn(1, 3, 64, 64))
        found = made.detect(raw, torch.full((1, 2), 64))
        losses = made.loss(raw, [target_of(BOXES[:1])], torch.full((1, 2), 64))
    assert raw["p2"].dtype == torch.bfloat16
    assert all(losses[name].dtype == torch.float32 for name in losses)
    assert found["boxes"].dtype == found["scores"].dtype == torch.float32


@pytest.mark.parametrize("norm", ["none", "gn"])
def test_state_dict_round_trip(norm: str) -> None:
    made, other = detector(head_norm=norm).eval(), detector(head_norm=norm).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    other.load_state_dict(made.state_dict())
    images, sizes = torch.randn(1, 3, 64, 64), torch.full((1, 2), 64)
    with torch.no_grad():
        found, again = (m.detect(m(images), sizes) for m in (made, other))
    assert all(torch.equal(found[key], again[key]) for key in found)


def test_group_norm_layout() -> None:
    with torch.device("meta"):
        keys = create_model(MASK, overrides={"head_norm": "gn"}).state_dict()
    heads = {key for key in keys if ".backbone." not in key}
    for stem in ("faster_rcnn.neck.lateral.3", "faster_rcnn.neck.output.0",
                 "faster_rcnn.box_head.convs.3", "mask_head.convs.3"):  # fmt: skip
        own = {key.removeprefix(f"{stem}.") for key in heads if key.startswith(f"{stem}.")}
        assert own == {"conv.weight", "norm.weight", "norm.bias"}
    assert keys["faster_rcnn.box_head.fcs.0.weight"].shape == (1024, 256 * 49)
    assert not any(key.startswith(("faster_rcnn.box_head.fcs.1", "mask_head.convs.4"))
                   for key in keys)  # fmt: skip


@pytest.mark.parametrize(
    ("backbone", "millions"),
    [
        ("ese_vovnet19_d2", 28.1),
        ("ese_vovnet39_d2", 43.1),
        ("ese_vovnet57_d2", 59.4),
        ("ese_vovnet99_d2", 87.4),
    ],
)
def test_parameters_are_those_of_the_published_key_shapes(backbone: str, millions: float) -> None:
    with torch.device("meta"):
        made = create_model(f"faster_rcnn_{backbone}")
    assert round(count_parameters(made) / 1e6, 1) == millions


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"head_norm": "bn"}, "expected one of none, gn, got 'bn'"),
        ({"anchor_sizes": (32, 64)}, "expected 5 anchor_sizes"),
        ({"anchor_ratios": ()}, "at least one of anchor_ratios"),
        ({"roi_positive_fraction": 1.5}, r"a number in 0\.\.1"),
        ({"rois_per_image": 0}, "whole number"),
        ({"tower_convs": 2}, "expected one of"),
    ],
)
def test_wrong_settings_say_what_was_expected(overrides: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_model(FASTER, overrides=overrides)
