"""RefineDet against the VoVNet paper's figures, against plain restatements, and in the corners that
users meet.
"""

from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vovnet.errors import ConfigError
from vovnet.models.boxes import Target
from vovnet.models.deploy import DeployGraph, fold_batch_norms
from vovnet.models.refinedet import (
    RefineDet,
    RefineDetConfig,
    RefineDetHead,
    TransferBlock,
    refine_anchors,
)
from vovnet.models.zoo import create_model
from vovnet.profiling.count import count_macs, count_parameters

NAME = "refinedet_ese_vovnet19b_slim_dw"
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
BOXES = [[4.0, 4, 60, 50], [70, 60, 120, 127], [10, 80, 30, 100]]
LOSSES = {"loss_arm_cls", "loss_arm_box", "loss_cls", "loss_box"}


def detector(**overrides: object) -> nn.Module:
    torch.manual_seed(0)
    return create_model(NAME, num_classes=3, overrides={"neck_channels": 16} | overrides)


def target_of(boxes: list[list[float]], **fields: Tensor) -> Target:
    tensor = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return Target(tensor, torch.arange(len(boxes)) % 3, **fields)


def sizes_of(*sizes: tuple[int, int]) -> Tensor:
    return torch.tensor(sizes)


@pytest.mark.parametrize(
    ("backbone", "macs_g", "parameters_m"),
    [("vovnet39_paper", 32.6, 56.28), ("vovnet57_paper", 36.45, 70.32)],
)
def test_costs_at_320_are_the_papers(backbone: str, macs_g: float, parameters_m: float) -> None:
    with torch.device("meta"):
        model = create_model(f"refinedet_{backbone}")
        images = torch.zeros(1, 3, 320, 320)
    assert count_macs(model, (images,)) / 1e9 == pytest.approx(macs_g, rel=0.003)
    assert count_parameters(model) / 1e6 == pytest.approx(parameters_m, rel=0.003)


def test_anchors_at_320() -> None:
    with torch.device("meta"):
        model = create_model(NAME, overrides={"neck_channels": 16})
        raw = model(torch.zeros(2, 3, 320, 320))
        larger = model(torch.zeros(1, 3, 512, 512))["anchors"]
    assert {name: tuple(value.shape) for name, value in raw.items()} == {
        "arm_logits": (2, 6375, 2),
        "arm_deltas": (2, 6375, 4),
        "logits": (2, 6375, 81),
        "deltas": (2, 6375, 4),
        "anchors": (6375, 4),
    }
    assert len(larger) == 3 * (64**2 + 32**2 + 16**2 + 8**2)


def test_anchors_by_hand() -> None:
    with torch.no_grad():
        anchors = detector()(torch.zeros(1, 3, 320, 320))["anchors"]
    long, short = 32 * 2**0.5, 32 / 2**0.5
    expected = {
        0: (4, 4, 32, 32),  # the first cell of stride 8: square, wide, high
        1: (4, 4, long, short),
        2: (4, 4, short, long),
        3: (12, 4, 32, 32),  # then the next one to the right
        3 * 40: (4, 12, 32, 32),
        3 * 1600: (8, 8, 64, 64),  # the first of stride 16
        3 * 2000 + 2: (16, 16, 4 * short, 4 * long),
        3 * 2100: (32, 32, 256, 256),
        6374: (288, 288, 8 * short, 8 * long),  # the last of all
    }
    for index, (x, y, width, height) in expected.items():
        wanted = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
        torch.testing.assert_close(anchors[index], torch.tensor(wanted))


def test_a_transfer_block_adds_the_coarser_level_before_the_relu() -> None:
    torch.manual_seed(0)
    block = TransferBlock(3, 4, coarsest=False).eval()
    source, coarser = torch.randn(1, 3, 5, 7), torch.randn(1, 4, 3, 3)
    with torch.no_grad():
        # BatchNorm at its start divides by sqrt(1 + 1e-5), hardly anything.
        own = F.conv2d(source, block.first.conv.weight, padding=1).relu()
        own = F.conv2d(own, block.second.conv.weight, padding=1)
        enlarged = F.conv_transpose2d(coarser, block.enlarge[0].weight, stride=2)  # 6 x 6
        own[..., :6] += enlarged[:, :, :5]
        expected = F.conv2d(own.relu(), block.output.conv.weight, padding=1).relu()
        torch.testing.assert_close(block(source, coarser), expected, rtol=1e-3, atol=1e-4)


def decode_slowly(deltas: list[float], box: list[float]) -> list[float]:
    (dx, dy, dw, dh), (x0, y0, x1, y1) = deltas, box
    width, height = x1 - x0, y1 - y0
    x, y = (x0 + x1) / 2 + 0.1 * dx * width, (y0 + y1) / 2 + 0.1 * dy * height
    width, height = width * np.exp(0.2 * dw), height * np.exp(0.2 * dh)
    return [x - width / 2, y - height / 2, x + width / 2, y + height / 2]


def random_raw(count: int = 60, batch: int = 2) -> dict[str, Tensor]:
    """What a network could give, in float64, with anchors around a map of 10 x 6 cells."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(batch, count, *shape, generator=generator, dtype=torch.float64)

    cells = list(product(range(6), range(10)))[:count]
    anchors = [[10 * x - 6, 10 * y - 6, 10 * x + 16, 10 * y + 16] for y, x in cells]
    return {
        "arm_logits": random(2) * 4,
        "arm_deltas": random(4) * 2,
        "logits": random(4) * 2,
        "deltas": random(4) * 2,
        "anchors": torch.tensor(anchors, dtype=torch.float64),
    }


def overlap(a: list[float], b: list[float]) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return width * height / (sum(areas) - width * height)


def softmax(values: list[float]) -> list[float]:
    powers = np.exp(np.array(values))
    return list(powers / powers.sum())


def test_refined_anchors_equal_their_restatement_and_pass_no_gradient() -> None:
    raw = random_raw()
    raw["arm_deltas"].requires_grad_()
    refined = refine_anchors(raw)
    for image, index in product(range(2), range(60)):
        deltas = raw["arm_deltas"][image, index].tolist()
        expected = decode_slowly(deltas, raw["anchors"][index].tolist())
        np.testing.assert_allclose(refined[image, index].tolist(), expected)
    assert not refined.requires_grad


def part_losses(
    logits: Tensor,
    deltas: Tensor,
    priors: list[list[float]],
    target: Target,
    labels: list[int],
    allowed: list[bool],
) -> tuple[float, float, int]:
    """Sums of one image and one of the two multibox losses, and the positives, in loops."""
    objects = target.boxes_xyxy.tolist()
    table = [[overlap(prior, box) for box in objects] for prior in priors]
    matched: dict[int, int] = {}
    left = set(range(len(objects)))
    while left:
        top, p, o = max((table[p][o], p, o) for p in range(len(priors)) if p not in matched
                        for o in left)  # fmt: skip
        if top < 1e-6:
            break
        matched[p] = o
        left.remove(o)
    for p, row in enumerate(table):
        if p not in matched and row and max(row) >= 0.5:
            matched[p] = row.index(max(row))
    cross = []
    for p, row in enumerate(logits.tolist()):
        wanted = labels[matched[p]] if p in matched else len(row) - 1
        cross.append(-np.log(softmax(row)[wanted]))
    negatives = [
        p
        for p in range(len(priors))
        if p not in matched and max(table[p], default=0) < 0.5 and allowed[p]
    ]
    hard = sorted(negatives, key=lambda p: -cross[p])[: 3 * len(matched)]
    box = 0.0
    for p, o in matched.items():
        (ax0, ay0, ax1, ay1), (x0, y0, x1, y1) = priors[p], objects[o]
        wanted_deltas = [
            ((x0 + x1) - (ax0 + ax1)) / 2 / (ax1 - ax0) * 10,
            ((y0 + y1) - (ay0 + ay1)) / 2 / (ay1 - ay0) * 10,
            np.log((x1 - x0) / (ax1 - ax0)) * 5,
            np.log((y1 - y0) / (ay1 - ay0)) * 5,
        ]
        distance = np.abs(deltas[p].numpy() - wanted_deltas)
        box += float(np.where(distance < 1, 0.5 * distance**2, distance - 0.5).sum())
    return float(sum(cross[p] for p in [*matched, *hard])), box, len(matched)


@pytest.mark.parametrize("threshold", [0.01, 0.4])
def test_losses_equal_their_restatement(threshold: float) -> None:
    made = detector(objectness_threshold=threshold)
    raw = random_raw()
    # No two anchors overlap a box alike: which of them comes first would be anybody's choice.
    first = [[5.1, 5.4, 28.2, 27.9], [40.3, 20.8, 70.1, 44.6], [60.2, 2.9, 80.4, 20.7]]
    targets = [target_of(first), target_of([[30.2, 30.9, 50.5, 52.1]])]
    losses = made.loss(raw, targets, sizes_of((64, 128), (64, 128)))
    sums = np.zeros(6)
    for image, target in enumerate(targets):
        anchors = raw["anchors"].tolist()
        refined = [
            decode_slowly(raw["arm_deltas"][image, p].tolist(), anchors[p]) for p in range(60)
        ]
        objectness = [softmax(row)[0] for row in raw["arm_logits"][image].tolist()]
        arm = part_losses(
            raw["arm_logits"][image], raw["arm_deltas"][image], anchors, target,
            [0] * len(target.labels), [True] * 60,
        )  # fmt: skip
        odm = part_losses(
            raw["logits"][image], raw["deltas"][image], refined, target,
            target.labels.tolist(), [value >= threshold for value in objectness],
        )  # fmt: skip
        sums += np.array([*arm, *odm])
    expected = [sums[0] / sums[2], sums[1] / sums[2], sums[3] / sums[5], sums[4] / sums[5]]
    names = ("loss_arm_cls", "loss_arm_box", "loss_cls", "loss_box")
    assert [losses[name].item() for name in names] == pytest.approx(expected, rel=1e-6)


def test_the_filter_of_easy_negatives_changes_the_loss() -> None:
    raw = random_raw()
    targets = [target_of([[5, 5, 28, 27]]), target_of([[40, 20, 70, 44]])]
    sizes = sizes_of((64, 128), (64, 128))
    low, high = (
        detector(objectness_threshold=value).loss(raw, targets, sizes) for value in (0.0, 0.9)
    )
    assert low["loss_cls"] > high["loss_cls"]
    assert low["loss_arm_cls"] == high["loss_arm_cls"]


def test_detections_equal_their_restatement() -> None:
    made = detector(objectness_threshold=0.3, score_threshold=0.2, max_detections=40)
    raw = random_raw()
    sizes = [(64, 128), (35, 50)]
    with torch.no_grad():
        found = made.detect(raw, sizes_of(*sizes))
    for image, (height, width) in enumerate(sizes):
        candidates = []
        for p, anchor in enumerate(raw["anchors"].tolist()):
            x, y = (anchor[0] + anchor[2]) / 2, (anchor[1] + anchor[3]) / 2
            if x >= width or y >= height:
                continue
            if softmax(raw["arm_logits"][image, p].tolist())[0] < 0.3:
                continue
            refined = decode_slowly(raw["arm_deltas"][image, p].tolist(), anchor)
            box = decode_slowly(raw["deltas"][image, p].tolist(), refined)
            scores = softmax(raw["logits"][image, p].tolist())[:-1]
            candidates += [(s, c, box) for c, s in enumerate(scores) if s > 0.2]
        kept: list[tuple[float, int, list[float]]] = []
        for score, label, box in sorted(candidates, key=lambda one: -one[0]):
            if all(label != own or overlap(box, other) <= 0.45 for _, own, other in kept):
                kept.append((score, label, box))
        valid = found["valid"][image]
        assert 0 < len(kept) < 40
        assert valid.tolist() == [index < len(kept) for index in range(40)]
        assert found["labels"][image][valid].tolist() == [label for _, label, _ in kept]
        expected = [np.clip(box, 0, [width, height] * 2) for _, _, box in kept]
        np.testing.assert_allclose(found["boxes"][image][valid].numpy(), expected, atol=1e-4)


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """In training mode, after one backward pass over all levels."""
    made = detector()
    boxes = [[4.0, 4, 40, 40], [60, 60, 124, 124], [90, 10, 220, 150], [1, 5, 255, 256]]
    raw = made(torch.randn(2, 3, 256, 256))
    losses = made.loss(
        raw, [target_of(boxes), target_of(boxes[1:])], sizes_of((256, 256), (256, 256))
    )
    assert set(losses) == LOSSES
    sum(losses.values()).backward()
    return made


def test_every_parameter_gets_a_gradient(trained: nn.Module) -> None:
    for key, parameter in trained.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.any(), key


@pytest.mark.parametrize("crowds", [torch.zeros(0, 4), torch.tensor([[-999.0, -999, 999, 999]])])
def test_images_without_objects(crowds: Tensor) -> None:
    made = detector()
    targets = [target_of([], ignore_xyxy=crowds)] * 2
    losses = made.loss(made(torch.randn(2, 3, 128, 128)), targets, sizes_of(*[(128, 128)] * 2))
    assert all(value == 0 for value in losses.values())
    sum(losses.values()).backward()
    for key, parameter in made.named_parameters():
        assert parameter.grad is not None, key
        assert not parameter.grad.any(), key


def test_a_thousand_objects_and_boxes_on_the_border() -> None:
    generator = torch.Generator().manual_seed(0)
    corner = (torch.rand(1000, 2, generator=generator) * 140 - 10).clamp(0, 122)
    side = 6 + torch.rand(1000, 2, generator=generator) * 30
    boxes = torch.cat([corner, (corner + side).clamp(max=128)], dim=1)
    assert (boxes == 0).any()
    assert (boxes == 128).any()
    made = detector(score_threshold=0.0, max_detections=1000)
    raw = made(torch.randn(2, 3, 128, 128))
    sizes = sizes_of((128, 128), (128, 128))
    losses = made.loss(raw, [target_of(boxes.tolist()), target_of(BOXES)], sizes)
    assert all(value.isfinite() and value > 0 for value in losses.values())
    with torch.no_grad():
        found = made.detect(raw, sizes)
    assert found["boxes"].shape == (2, 1000, 4)
    assert (found["boxes"] >= 0).all()
    assert (found["boxes"] <= 128).all()


def test_a_part_beyond_the_image_neither_teaches_nor_wins() -> None:
    """One image alone and the same one in a larger batch give the same detections."""
    made = detector(score_threshold=0.0, max_detections=30)
    graph = DeployGraph(made, mean=MEAN, std=STD).double().eval()
    rng = np.random.default_rng(0)
    batch = torch.zeros(2, 64, 96, 3, dtype=torch.uint8)
    batch[0] = torch.from_numpy(rng.integers(0, 256, (64, 96, 3), dtype=np.uint8))
    batch[1, :40, :50] = torch.from_numpy(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8))
    with torch.no_grad():
        alone = graph(batch[:1], sizes_of((64, 96)))
        together = graph(batch, sizes_of((64, 96), (40, 50)))
        raw = made(graph.normalize(batch, sizes_of((64, 96), (40, 50))))
    for key, value in alone.items():
        torch.testing.assert_close(together[key][:1], value, msg=key)
    assert together["valid"].all()
    assert (together["boxes"][1] <= torch.tensor([50, 40, 50, 40])).all()
    targets = [target_of(BOXES[:1]), target_of([[2, 2, 40, 38]])]
    sizes = sizes_of((64, 96), (40, 50))
    beyond = ((raw["anchors"][:, :2] + raw["anchors"][:, 2:]) / 2 >= sizes[1].flip(0)).any(1)
    moved = raw["logits"].clone()
    moved[1, beyond] = 9.0
    before, after = (made.loss(raw | {"logits": x}, targets, sizes) for x in (raw["logits"], moved))
    assert before == after


@pytest.mark.parametrize("size", [(32, 32), (50, 70), (33, 257), (288, 96)])
def test_images_of_any_size(size: tuple[int, int]) -> None:
    made = detector(score_threshold=0.0).eval()
    with torch.no_grad():
        found = made.detect(made(torch.randn(1, 3, *size)), sizes_of(size))
    assert found["boxes"].isfinite().all()
    assert found["valid"].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    made = detector(score_threshold=0.0).eval()
    images, sizes = torch.randn(1, 3, 64, 64), sizes_of((64, 64))
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        raw = made(images)
        found = made.detect(raw, sizes)
        losses = made.loss(raw, [target_of(BOXES[:1])], sizes)
    with torch.no_grad():
        again = made.to(dtype)(images.to(dtype))
    for values in (found, losses, raw, again):
        for name, value in values.items():
            assert value.isfinite().all(), name
            assert value.dtype not in (torch.bfloat16, torch.float16), name


def test_folding_batch_norms_changes_nothing(trained: nn.Module) -> None:
    made = detector().eval()
    made.load_state_dict(trained.state_dict())
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = made(images)
        fold_batch_norms(made)
        actual = made(images)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-3, atol=1e-3)


def test_state_dict_round_trip(trained: nn.Module) -> None:
    made = detector()
    made.load_state_dict(trained.state_dict())
    images, sizes = torch.randn(1, 3, 64, 64), sizes_of((64, 64))
    with torch.no_grad():
        found, again = (m.eval().detect(m(images), sizes) for m in (made, trained))
    trained.train()
    assert all(torch.equal(found[key], again[key]) for key in found)


def test_any_backbone_of_three_maps_will_do() -> None:
    class Maps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(nn.Conv2d(3, 8 * k, k, stride=k) for k in (8, 16, 32))

        def forward(self, images: Tensor) -> list[Tensor]:
            return [part(images) for part in self.parts]

    config = RefineDetConfig(num_classes=2, neck_channels=16)
    made = RefineDet(Maps(), RefineDetHead([64, 128, 256], config), config)
    raw = made(torch.randn(2, 3, 128, 128))
    losses = made.loss(raw, [target_of([BOXES[0]])] * 2, sizes_of(*[(128, 128)] * 2))
    assert set(losses) == LOSSES
    assert not made.has_masks


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ({"anchor_sizes": [32, 64]}, "anchor_sizes"),
        ({"anchor_ratios": []}, "anchor_ratios"),
        ({"objectness_threshold": 1.5}, "objectness_threshold"),
        ({"negatives_per_positive": 0}, "negatives_per_positive"),
        ({"arm_positive_iou": -1}, "arm_positive_iou"),
    ],
)
def test_a_wrong_setting_is_named(overrides: dict, name: str) -> None:
    with torch.device("meta"), pytest.raises(ConfigError, match=name):
        create_model(NAME, overrides=overrides)


def test_other_channels_and_drop_path_reach_the_backbone() -> None:
    with torch.device("meta"):
        made = create_model("refinedet_vovnet39", in_chans=1, drop_path_rate=0.2)
    assert made.backbone.stem[0].conv.in_channels == 1
    assert made.backbone.stages[3].blocks[1].drop_path.p == pytest.approx(0.2)
