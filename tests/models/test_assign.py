"""Task-aligned assignment against a plain restatement, and what it promises by construction."""

import numpy as np
import pytest
import torch
from torch import Tensor

from vovnet.models.assign import Alignment, assign_aligned, in_regions
from vovnet.models.boxes import Target, grid_points

SIDE, STRIDE = 96, 8


def predictions(seed: int, classes: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Scores (A, C), boxes (A, 4) around their points, and the points (A, 2) of a 12 x 12 map."""
    generator = torch.Generator().manual_seed(seed)
    points = grid_points(SIDE // STRIDE, SIDE // STRIDE, STRIDE, torch.device("cpu")).double()
    scores = torch.rand(len(points), classes, generator=generator, dtype=torch.float64)
    reach = torch.rand(len(points), 4, generator=generator, dtype=torch.float64) * 30 + 2
    return scores, torch.cat([points - reach[:, :2], points + reach[:, 2:]], 1), points


def objects(seed: int, count: int) -> Target:
    rng = np.random.default_rng(seed)
    corner = rng.uniform(-4, SIDE - 20, (count, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(3, 60, (count, 2))], 1)
    return Target(torch.from_numpy(boxes), torch.from_numpy(rng.integers(0, 3, count)))


def assign(scores: Tensor, boxes: Tensor, points: Tensor, target: Target, **changes) -> Alignment:
    settings = {"count": 5, "alpha": 0.5, "beta": 6.0, "least_side": 8.0} | changes
    usable = settings.pop("usable", torch.ones(len(points), dtype=torch.bool))
    return assign_aligned(scores, boxes, points, usable, target, **settings)


def overlap(a: list[float], b: list[float]) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return width * height / (sum(areas) - width * height)


def assign_slowly(scores, boxes, points, target, usable, count):
    claims: dict[int, list[tuple[float, int, float]]] = {}
    for o, (truth, label) in enumerate(zip(target.boxes_xyxy.tolist(), target.labels.tolist())):  # noqa: B905
        x, y = (truth[0] + truth[2]) / 2, (truth[1] + truth[3]) / 2
        half_x, half_y = (max(truth[i + 2] - truth[i], 8) / 2 for i in (0, 1))
        ranked = []
        for a, (px, py) in enumerate(points.tolist()):
            if usable[a] and abs(px - x) <= half_x and abs(py - y) <= half_y:
                iou = overlap(truth, boxes[a].tolist())
                ranked.append((float(scores[a, label]) ** 0.5 * iou**6, a, iou))
        for metric, a, iou in sorted(ranked, reverse=True)[:count]:
            claims.setdefault(a, []).append((iou, o, metric))
    owner, metrics, ious = [-1] * len(points), [0.0] * len(points), [0.0] * len(points)
    for a, rivals in claims.items():
        ious[a], owner[a], metrics[a] = max(rivals)
    quality = [0.0] * len(points)
    for a, o in enumerate(owner):
        if o >= 0:
            own = [b for b, other in enumerate(owner) if other == o]
            quality[a] = metrics[a] / max(metrics[b] for b in own) * max(ious[b] for b in own)
    return owner, quality


@pytest.mark.parametrize("count", [1, 5, 500])
@pytest.mark.parametrize("number", [1, 7, 70])
def test_as_its_restatement(count: int, number: int) -> None:
    scores, boxes, points = predictions(number)
    target = objects(number, number)
    usable = points[:, 0] < 80
    found = assign(scores, boxes, points, target, count=count, usable=usable)
    owner, quality = assign_slowly(scores, boxes, points, target, usable, count)
    assert found.owner.tolist() == owner
    np.testing.assert_allclose(found.quality.numpy(), quality, rtol=1e-9, atol=1e-12)
    assert len(set(owner)) > 1


def test_one_location_is_one_prediction() -> None:
    """With a count of one no object has two locations, and no location two objects."""
    scores, boxes, points = predictions(0)
    found = assign(scores, boxes, points, objects(0, 40), count=1)
    owners = found.owner[found.owner >= 0]
    assert len(owners) > 20
    assert len(owners.unique()) == len(owners)
    assert ((found.quality > 0) == (found.owner >= 0)).all()


def test_an_object_between_the_points_has_the_nearest() -> None:
    scores, boxes, points = predictions(0)
    target = Target(torch.tensor([[5.5, 5.5, 7.5, 7.5]]), torch.tensor([0]))
    found = assign(scores, boxes, points, target)
    assert torch.nonzero(found.owner == 0).flatten().tolist() == [0]
    assert assign(scores, boxes, points, target, least_side=0.0).owner.amax() == -1


def test_nothing_to_find() -> None:
    scores, boxes, points = predictions(0)
    found = assign(scores, boxes, points, objects(0, 0))
    assert (found.owner == -1).all()
    assert (found.quality == 0).all()
    nowhere = assign(scores, boxes, points, objects(0, 3), usable=torch.zeros(144).bool())
    assert (nowhere.owner == -1).all()


def test_boxes_that_miss_their_object_are_no_nan() -> None:
    scores, boxes, points = predictions(0)
    found = assign(scores, torch.full_like(boxes, -50.0), points, objects(0, 5))
    assert found.quality.isfinite().all()
    assert (found.quality == 0).all()


def test_points_in_regions() -> None:
    points = torch.tensor([[4.0, 4], [12, 4], [12, 30]])
    regions = torch.tensor([[10.0, 0, 20, 10], [0, 0, 4, 4]])
    assert in_regions(points, regions).tolist() == [True, True, False]
    assert in_regions(points, regions[:0]).tolist() == [False] * 3
