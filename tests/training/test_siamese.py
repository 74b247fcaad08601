import math

import numpy as np
import pytest
import torch
from torch import nn

from vovnet.models.layers import Normalize
from vovnet.models.zoo import create_model
from vovnet.training.siamese import (
    RegionHead,
    SiameseStep,
    TeacherStep,
    effective_rank,
    pool_regions,
    siamese_loss,
)

SMALL = {
    "stem_channels": (8, 8, 16),
    "stage_conv_channels": (8, 8, 8, 8),
    "stage_out_channels": (16, 16, 24, 32),
}
NORMALIZE = ((120.0,) * 3, (60.0,) * 3)


def make_backbone() -> nn.Module:
    torch.manual_seed(0)
    return create_model("ese_vovnet19b_slim", num_classes=0, overrides=SMALL)


def make_batch(count: int = 8, side: int = 64, seed: int = 0):
    """Views of patterns: each picture two stripes of its own colours, other brightness by view."""
    draw = np.random.default_rng(seed)
    views = []
    for _ in range(count):
        tile = draw.integers(0, 200, (4, 4, 3))
        picture = tile.repeat(side // 4, 0).repeat(side // 4, 1)
        views.append([picture + draw.integers(0, 25, (side, side, 3)) + k for k in (0, 30)])
    images = np.stack([v[k] for k in (0, 1) for v in views]).astype(np.uint8)
    boxes = np.sort(draw.uniform(0, side, (count, 4, 2, 2)), axis=2).reshape(count, 4, 4)
    boxes[..., 2:] = np.maximum(boxes[..., 2:], boxes[..., :2] + 16)
    regions = np.concatenate([boxes, boxes]).astype(np.float32)
    sizes = torch.full((2 * count, 2), side)
    return torch.from_numpy(images), sizes, torch.from_numpy(regions)


def test_the_loss_equals_its_definition():
    generator = np.random.default_rng(0)
    projected, predicted = generator.normal(size=(2, 6, 5)).astype(np.float32)
    cosines = []
    for n in range(3):
        for a, b in ((n, n + 3), (n + 3, n)):
            p, z = predicted[a], projected[b]
            cosines.append(p @ z / math.sqrt((p @ p) * (z @ z)))
    loss = siamese_loss(torch.from_numpy(projected), torch.from_numpy(predicted))
    assert float(loss) == pytest.approx(1 - np.mean(cosines), abs=1e-6)


def test_no_gradient_flows_through_what_is_predicted():
    projected = torch.randn(6, 5, requires_grad=True)
    predicted = torch.randn(6, 5, requires_grad=True)
    siamese_loss(projected, predicted).backward()
    assert projected.grad is None
    assert predicted.grad.abs().max() > 0


def test_regions_are_means_of_what_lies_in_them():
    """A map that holds its own coordinates: a region's mean is its centre."""
    stride, cells = 16, 8
    axis = (torch.arange(cells) + 0.5) * stride
    one = torch.stack([axis.expand(cells, cells), axis[:, None].expand(cells, cells)])  # x, y
    maps = torch.stack([one, one + 1000])
    regions = torch.tensor([[[16.0, 24, 80, 56], [32, 32, 96, 96]], [[24, 16, 40, 112]] * 2])
    pooled = pool_regions(maps, regions, stride)
    centres = (regions[..., :2] + regions[..., 2:]) / 2
    centres[1] += 1000
    assert torch.allclose(pooled, centres.flatten(0, 1), atol=1e-3)


def test_the_step_learns_without_collapse():
    """In some steps on ever new pictures. Without the stopped gradient, or without the predictor,
    the losses are below 0.05 by then, and what is left of the projections is a line or two: ranks
    of 1.7 and 2.4, with the deviation still near 1.
    """
    torch.manual_seed(0)
    step = SiameseStep(make_backbone(), Normalize(*NORMALIZE)).train()
    optimizer = torch.optim.SGD(step.parameters(), lr=0.2, momentum=0.9)
    totals = []
    for number in range(30):
        losses = step(*make_batch(seed=number + 1))
        assert set(losses) == {"loss_stride16", "loss_stride32"}
        total = sum(losses.values())
        totals.append(total.item())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    assert np.mean(totals[-5:]) < totals[0] - 0.5
    images, sizes, regions = make_batch()
    with torch.no_grad():
        normalized = step.normalize(images, sizes)
        maps = step.model.forward_intermediates(normalized, (4,), intermediates_only=True)
        projected, _ = step.heads["32"](pool_regions(maps[0], regions, 32))
    unit = nn.functional.normalize(projected, dim=1)
    assert float(unit.std(0).mean() * unit.shape[1] ** 0.5) > 0.5
    assert effective_rank(projected) > 3


def test_the_rank_counts_directions():
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q
    for directions in (1, 3, 8):
        codes = torch.randn(4000, directions, generator=generator)
        found = effective_rank(5 + codes @ basis[:directions])
        assert found == pytest.approx(directions, rel=0.02)
    assert effective_rank(torch.ones(10, 4)) == 0.0


def test_every_weight_but_the_classifier_gets_a_gradient():
    step = SiameseStep(make_backbone(), Normalize(*NORMALIZE)).train()
    sum(step(*make_batch(4)).values()).backward()
    without = [n for n, p in step.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_a_region_head_predicts_from_its_projection():
    torch.manual_seed(0)
    head = RegionHead(12).train()
    features = torch.randn(16, 12)
    projected, predicted = head(features)
    assert projected.shape == predicted.shape == (16, 256)
    assert torch.allclose(projected.mean(0), torch.zeros(256), atol=1e-5)
    assert torch.allclose(head.predictor(projected), predicted, atol=1e-5)
    assert not torch.allclose(projected, predicted, atol=0.1)


def test_a_teachers_map_is_learnt_at_every_place():
    """The teacher tells the mean colour of each place; the student comes to say the same."""
    images, sizes, regions = make_batch()

    def teacher(pictures, _):
        pixels = pictures.permute(0, 3, 1, 2).float()
        return nn.functional.adaptive_avg_pool2d(pixels, 2)

    torch.manual_seed(1)
    step = TeacherStep(make_backbone(), Normalize(*NORMALIZE), teacher, 3).train()
    assert not any("teacher" in name for name in step.state_dict())
    shown = teacher(images, sizes)
    mean, std = shown.mean((0, 2, 3)), shown.std((0, 2, 3), correction=0)
    whitened = (shown - mean[:, None, None]) / std[:, None, None]
    learnt = step.projection(step.model.forward_features(step.normalize(images, sizes)))
    cosines = nn.functional.cosine_similarity(learnt, whitened, dim=1)
    first = step(images, sizes, regions)["loss_teacher"]
    assert first.item() == pytest.approx(1 - cosines.mean().item(), abs=1e-3)
    optimizer = torch.optim.SGD(step.parameters(), lr=0.1, momentum=0.9)
    for _ in range(20):
        optimizer.zero_grad()
        loss = step(images, sizes, regions)["loss_teacher"]
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * first.item()
