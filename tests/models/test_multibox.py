"""Matching, hard negatives, the multibox loss and the choice of detections, each said again in
loops.
"""

from itertools import product
from math import exp, log

import numpy as np
import pytest
import torch
from torch import Tensor

from vovnet.models.boxes import Target, grid_boxes
from vovnet.models.multibox import (
    Assignment,
    MultiboxConfig,
    assign_priors,
    hardest_negatives,
    match_one_to_one,
    multibox_loss,
    priors_inside,
    select_detections,
)

CONFIG = MultiboxConfig(num_classes=3)
HALF = (0.5, 0.5)
Box = list[float]


def random_boxes(count: int, size: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator, dtype=torch.float64) * size * 0.8
    sides = torch.rand(count, 2, generator=generator, dtype=torch.float64) * size * 0.4 + 4
    return torch.cat([corner, corner + sides], dim=1)


def overlap(a: Box, b: Box) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return width * height / (sum(areas) - width * height)


def target_of(boxes: Tensor, **fields: Tensor) -> Target:
    return Target(boxes, torch.arange(len(boxes)) % 3, **fields)


def assign_slowly(
    priors: list[Box], objects: list[Box], usable: list[bool], *, iou: tuple[float, float]
) -> tuple[dict[int, int], set[int]]:
    """The object of each positive prior, and the negatives, one pair after the other."""
    matched: dict[int, int] = {}
    waiting = set(range(len(objects)))
    while waiting:
        pairs = [
            (overlap(priors[p], objects[o]), p, o)
            for p, o in product(range(len(priors)), waiting)
            if usable[p] and p not in matched
        ]
        best = max(pairs, default=(0.0, 0, 0))
        if best[0] <= 1e-6:
            break
        matched[best[1]] = best[2]
        waiting.remove(best[2])
    forced = set(matched)
    negatives = set()
    for p, box in enumerate(priors):
        overlaps = [overlap(box, one) for one in objects]
        top = max(overlaps, default=0.0)
        if p in forced or not usable[p]:
            continue
        if top >= iou[0]:
            matched[p] = overlaps.index(top)
        elif top < iou[1]:
            negatives.add(p)
    return matched, negatives


def as_sets(found: Assignment) -> tuple[dict[int, int], set[int]]:
    positive = torch.nonzero(found.positive)[:, 0].tolist()
    return {p: int(found.matched[p]) for p in positive}, set(
        torch.nonzero(found.negative)[:, 0].tolist()
    )


@pytest.mark.parametrize("iou", [HALF, (0.7, 0.3)])
@pytest.mark.parametrize("objects", [0, 1, 7, 40])
def test_matching_equals_its_restatement(objects: int, iou: tuple[float, float]) -> None:
    priors, boxes = random_boxes(150, 100, seed=1), random_boxes(objects, 100, seed=2)
    if objects > 2:
        boxes = torch.cat([boxes, priors[3:5], torch.tensor([[900.0, 900, 950, 950]])])
    usable = torch.rand(150, generator=torch.Generator().manual_seed(3)) < 0.8
    found = assign_priors(priors, target_of(boxes), usable, CONFIG, iou=iou)
    expected = assign_slowly(priors.tolist(), boxes.tolist(), usable.tolist(), iou=iou)
    assert as_sets(found) == expected
    assert not (found.positive & found.negative).any()


def test_every_object_gets_a_prior_even_where_two_want_the_same() -> None:
    priors = torch.tensor([[0.0, 0, 10, 10], [0, 0, 40, 40], [50, 50, 60, 60]])
    boxes = torch.tensor([[0.0, 0, 9, 10], [0, 0, 10, 10]])
    found = assign_priors(priors, target_of(boxes), torch.ones(3).bool(), CONFIG, iou=HALF)
    assert as_sets(found) == ({0: 1, 1: 0}, {2})


def test_one_to_one_leaves_out_whom_nothing_overlaps() -> None:
    table = torch.tensor([[0.5, 0.4, 0.0], [0.6, 0.0, 0.0], [0.0, 0.0, 0.0], [0.7, 0.6, 0.0]])
    objects, priors = match_one_to_one(table)
    found = dict(zip(objects.tolist(), priors.tolist(), strict=True))
    assert found == {3: 0, 0: 1}


def test_who_loses_a_prior_to_a_better_one_gets_another() -> None:
    """Object 2 drives object 1 from prior 1 to prior 0, and that drives object 0 to prior 2."""
    table = torch.tensor([[0.5, 0.0, 0.3], [0.6, 0.9, 0.0], [0.0, 0.95, 0.0]])
    objects, priors = match_one_to_one(table)
    found = dict(zip(objects.tolist(), priors.tolist(), strict=True))
    assert found == {0: 2, 1: 0, 2: 1}


def test_equal_boxes_each_get_their_own() -> None:
    priors = grid_boxes((8, 8), torch.tensor([[16.0, 16]]), step=8, offset=0.5)
    boxes = torch.tensor([[10.0, 10, 30, 30]]).expand(9, 4)
    found = assign_priors(priors, target_of(boxes), torch.ones(64).bool(), CONFIG, iou=(1.0, 0.5))
    matched, _ = as_sets(found)
    assert sorted(matched.values()) == list(range(9))


def test_background_in_a_crowd_is_no_example() -> None:
    priors = random_boxes(100, 100, seed=1)
    boxes = random_boxes(4, 100, seed=2)
    crowd = torch.tensor([[0.0, 0, 50, 100]])
    usable = torch.ones(100, dtype=torch.bool)
    plain = assign_priors(priors, target_of(boxes), usable, CONFIG, iou=HALF)
    target = target_of(boxes, ignore_xyxy=crowd)
    crowded = assign_priors(priors, target, usable, CONFIG, iou=HALF)
    assert torch.equal(plain.positive, crowded.positive)
    for p, (x0, y0, x1, y1) in enumerate(priors.tolist()):
        covered = max(min(x1, 50) - x0, 0) * (min(y1, 100) - y0) / ((x1 - x0) * (y1 - y0))
        assert crowded.negative[p] == (plain.negative[p] and covered <= 0.5)
    assert crowded.negative.sum() < plain.negative.sum()


def test_priors_beyond_the_image_are_not_inside() -> None:
    priors = torch.tensor([[0.0, 0, 20, 20], [10, 0, 30, 20], [0, 10, 20, 30], [-9, -9, 19, 19]])
    inside = priors_inside(priors, torch.tensor([[20, 30], [15, 15], [25, 20]]))
    assert inside.tolist() == [
        [True, True, False, True],
        [True, False, False, True],
        [True, False, True, True],
    ]


@pytest.mark.parametrize("ratio", [1, 3, 100])
def test_hard_negatives_equal_their_restatement(ratio: int) -> None:
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(4, 50, generator=generator)
    kind = torch.randint(3, (4, 50), generator=generator)
    kind[2][kind[2] == 1] = 0  # no positive, so no negative
    kind[3] = 1  # nothing but positives
    found = hardest_negatives(losses, kind == 1, kind == 2, per_positive=ratio)
    for image in range(4):
        negatives = [i for i in range(50) if kind[image, i] == 2]
        negatives.sort(key=lambda i: -losses[image, i])
        limit = ratio * int((kind[image] == 1).sum())
        assert set(torch.nonzero(found[image])[:, 0].tolist()) == set(negatives[:limit])
    assert not found[2:].any()


def smooth_l1(difference: float) -> float:
    size = abs(difference)
    return 0.5 * size**2 if size < 1 else size - 0.5


def loss_slowly(
    logits: Tensor, deltas: Tensor, priors: Tensor, found: list[Assignment], targets: list[Target]
) -> tuple[float, float]:
    """Both losses, one prior after the other."""
    cls = box = 0.0
    count = 0
    for image, target in enumerate(targets):
        cross = {}
        for p, row in enumerate(logits[image].tolist()):
            matched = int(found[image].matched[p])
            wanted = int(target.labels[matched]) if found[image].positive[p] else len(row) - 1
            cross[p] = log(sum(exp(value) for value in row)) - row[wanted]
        positives = torch.nonzero(found[image].positive)[:, 0].tolist()
        negatives = sorted(
            torch.nonzero(found[image].negative)[:, 0].tolist(), key=lambda p: -cross[p]
        )
        count += len(positives)
        cls += sum(cross[p] for p in [*positives, *negatives[: 3 * len(positives)]])
        for p in positives:
            px0, py0, px1, py1 = priors[image, p].tolist()
            x0, y0, x1, y1 = target.boxes_xyxy[int(found[image].matched[p])].tolist()
            wanted_deltas = [
                ((x0 + x1) - (px0 + px1)) / 2 / (px1 - px0) / 0.1,
                ((y0 + y1) - (py0 + py1)) / 2 / (py1 - py0) / 0.1,
                log((x1 - x0) / (px1 - px0)) / 0.2,
                log((y1 - y0) / (py1 - py0)) / 0.2,
            ]
            given = deltas[image, p].tolist()
            box += sum(smooth_l1(g - w) for g, w in zip(given, wanted_deltas, strict=True))
    return cls / count, box / count


def random_case() -> tuple[Tensor, Tensor, Tensor, list[Assignment], list[Target]]:
    """Logits, deltas and priors of three images; the second has no object."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 80, 4, generator=generator, dtype=torch.float64) * 3
    deltas = torch.randn(3, 80, 4, generator=generator, dtype=torch.float64) * 2
    priors = torch.stack([random_boxes(80, 100, seed=seed) for seed in range(3)])
    boxes = [random_boxes(count, 100, seed=9 + count) for count in (5, 0, 2)]
    targets = [target_of(one) for one in boxes]
    usable = torch.ones(80, dtype=torch.bool)
    found = [
        assign_priors(own, target, usable, CONFIG, iou=HALF)
        for own, target in zip(priors, targets, strict=True)
    ]
    return logits, deltas, priors, found, targets


def loss_of(
    logits: Tensor, deltas: Tensor, priors: Tensor, found: list[Assignment], targets: list[Target]
) -> tuple[Tensor, Tensor]:
    boxes, labels = [t.boxes_xyxy for t in targets], [t.labels for t in targets]
    return multibox_loss(logits, deltas, priors, found, boxes, labels, per_positive=3)


def test_the_losses_equal_their_restatement() -> None:
    case = random_case()
    cls, box = loss_of(*case)
    expected_cls, expected_box = loss_slowly(*case)
    assert cls.item() == pytest.approx(expected_cls, rel=1e-9)
    assert box.item() == pytest.approx(expected_box, rel=1e-9)


def test_a_batch_without_objects_teaches_nothing_and_keeps_the_graph() -> None:
    logits, deltas, priors, found, targets = random_case()
    logits, deltas = logits.requires_grad_(), deltas.requires_grad_()
    empty = [logits[1:2], deltas[1:2], priors[1:2], found[1:2], targets[1:2]]
    losses = loss_of(*empty)
    assert [value.item() for value in losses] == [0, 0]
    sum(losses).backward()
    assert logits.grad is not None
    assert not logits.grad.any()
    assert not deltas.grad.any()


def test_a_gradient_reaches_positives_and_their_hardest_negatives_only() -> None:
    logits, deltas, priors, found, targets = random_case()
    logits.requires_grad_()
    loss_of(logits, deltas, priors, found, targets)[0].backward()
    learning = logits.grad.any(2)
    positive = torch.stack([one.positive for one in found])
    assert learning[positive].all()
    assert torch.equal(learning.sum(1), 4 * positive.sum(1))


def test_a_thousand_objects_are_matched_in_time() -> None:
    priors = grid_boxes((40, 40), torch.tensor([[30.0, 30], [20, 40]]), step=8, offset=0.5)
    target = target_of(random_boxes(1000, 320, seed=5).float())
    usable = torch.ones(len(priors), dtype=torch.bool)
    found = assign_priors(priors, target, usable, CONFIG, iou=HALF)
    matched = found.matched[found.positive]
    overlapped = [o for o in range(1000) if o in set(matched.tolist())]
    assert len(overlapped) > 900
    assert len(matched) >= len(overlapped)


def select_slowly(
    boxes: list[Box], probabilities: list[list[float]], size: tuple[int, int], limits: dict
) -> list[tuple[int, int]]:
    """Prior and class of what is kept, best first."""
    kept: list[tuple[float, int, int]] = []
    for label in range(len(probabilities[0])):
        order = sorted(range(len(boxes)), key=lambda p: -probabilities[p][label])
        own: list[int] = []
        for p in order[: limits["pre_nms_top_k"]]:
            shown = probabilities[p][label] > limits["score_threshold"]
            if shown and all(overlap(boxes[p], boxes[q]) <= 0.45 for q in own):
                own.append(p)
                kept.append((probabilities[p][label], p, label))
    kept.sort(key=lambda one: -one[0])
    return [(p, label) for _, p, label in kept[: limits["max_detections"]]]


@pytest.mark.parametrize(
    "limits",
    [
        {"pre_nms_top_k": 400, "score_threshold": 0.01, "max_detections": 200},
        {"pre_nms_top_k": 12, "score_threshold": 0.2, "max_detections": 9},
        {"pre_nms_top_k": 30, "score_threshold": 0.5, "max_detections": 100},
    ],
)
def test_detections_equal_their_restatement(limits: dict) -> None:
    boxes = torch.stack([random_boxes(60, 100, seed=seed) - 10 for seed in (1, 2)])
    generator = torch.Generator().manual_seed(0)
    probabilities = (torch.randn(2, 60, 3, generator=generator).double() * 2).softmax(2)
    sizes = [(100, 100), (50, 70)]
    found = select_detections(
        boxes, probabilities, torch.tensor(sizes), MultiboxConfig(num_classes=3, **limits)
    )
    for image, (height, width) in enumerate(sizes):
        own = boxes[image].tolist()
        expected = select_slowly(own, probabilities[image].tolist(), (height, width), limits)
        valid = found["valid"][image]
        assert valid.tolist() == [k < len(expected) for k in range(limits["max_detections"])]
        assert found["labels"][image][valid].tolist() == [label for _, label in expected]
        scores = [probabilities[image, p, label].item() for p, label in expected]
        np.testing.assert_allclose(found["scores"][image][valid].numpy(), scores)
        limit = np.array([width, height] * 2)
        cut = [np.clip(own[p], 0, limit) for p, _ in expected]
        np.testing.assert_allclose(found["boxes"][image][valid].numpy(), cut, atol=1e-4)


def test_only_the_best_of_each_class_are_looked_at() -> None:
    boxes = grid_boxes((5, 5), torch.tensor([[8.0, 8]]), step=10, offset=0.5)[None]
    scores = torch.rand(1, 25, 2, generator=torch.Generator().manual_seed(0)) + 0.1
    config = MultiboxConfig(num_classes=2, pre_nms_top_k=4)
    found = select_detections(boxes, scores, torch.tensor([[50, 50]]), config)
    assert found["valid"].sum() == 8
    best = scores[0].topk(4, dim=0).values.flatten().sort(descending=True).values
    assert torch.equal(found["scores"][0, :8], best)


def test_what_is_below_min_score_is_dropped() -> None:
    boxes = random_boxes(30, 100, seed=1)[None]
    scores = torch.linspace(0.02, 0.9, 30)[None, :, None]
    sizes = torch.tensor([[200, 200]])
    whole = select_detections(boxes, scores, sizes, MultiboxConfig(num_classes=1))
    limit = whole["scores"][0, 4].item()
    fewer = select_detections(boxes, scores, sizes, MultiboxConfig(num_classes=1, min_score=limit))
    assert fewer["valid"].sum() == 5
    assert torch.equal(fewer["boxes"][0, :5], whole["boxes"][0, :5])


def test_grid_boxes_by_hand() -> None:
    boxes = grid_boxes((2, 1), torch.tensor([[4.0, 2], [8, 8]]), step=10, offset=0.5)
    assert boxes.tolist() == [[3, 4, 7, 6], [1, 1, 9, 9], [3, 14, 7, 16], [1, 11, 9, 19]]
