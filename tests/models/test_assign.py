"""Both assignments against plain restatements, and what they promise by construction."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou

from vovnet.models.assign import Alignment, assign_aligned, assign_centers, in_regions
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


@pytest.mark.parametrize("seed", range(4))
def test_centers_as_restated(seed: int) -> None:
    """Three levels, objects smaller than a stride and larger than the image among them."""
    rng = np.random.default_rng(seed)
    maps = [
        grid_points(96 // stride, 96 // stride, stride, torch.device("cpu")).double()
        for stride in (8, 16, 32)
    ]
    points = torch.cat(maps)
    strides = torch.cat(
        [torch.full_like(one[:, :1], s) for one, s in zip(maps, (8, 16, 32), strict=True)]
    )
    corner = rng.uniform(-20, 90, (12, 2))
    truth = np.concatenate([corner, corner + np.exp(rng.uniform(1, 5, (12, 2)))], 1)
    target = Target(torch.from_numpy(truth), torch.zeros(12, dtype=torch.int64))
    boxes = torch.cat([points - 9, points + 11], 1)
    usable = torch.from_numpy(rng.random(len(points)) < 0.8)
    found = assign_centers(boxes, points, strides, usable, target, radius=1.5, limits=(20.0, 48.0))
    bounds = {8: (0.0, 20.0), 16: (20.0, 48.0), 32: (48.0, np.inf)}
    overlaps = box_iou(torch.from_numpy(truth), boxes)
    for place, ((x, y), stride) in enumerate(
        zip(points.tolist(), strides[:, 0].tolist(), strict=True)
    ):
        takers = []
        for number, (x0, y0, x1, y1) in enumerate(truth.tolist()):
            far = (x - x0, y - y0, x1 - x, y1 - y)
            near = max(abs(x - (x0 + x1) / 2), abs(y - (y0 + y1) / 2)) < 1.5 * stride
            low, high = bounds[stride]
            if usable[place] and min(far) > 0 and near and low <= max(far) <= high:
                takers.append(((x1 - x0) * (y1 - y0), number))
        owner = min(takers)[1] if takers else -1
        assert found.owner[place] == owner
        quality = overlaps[owner, place] if takers else 0.0
        assert found.quality[place] == pytest.approx(float(quality))
    assert (found.owner >= 0).sum() > 5


def test_centers_without_objects() -> None:
    scores, boxes, points = predictions(0)
    empty = Target(torch.zeros(0, 4, dtype=torch.float64), torch.zeros(0, dtype=torch.int64))
    found = assign_centers(
        boxes,
        points,
        torch.full_like(points[:, :1], 8),
        scores[:, 0] >= 0,
        empty,
        radius=1.5,
        limits=(),
    )
    assert (found.owner == -1).all()
    assert (found.quality == 0).all()
