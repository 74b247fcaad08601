"""DSOD: sources, priors, loss and detections, and the distance to the VoVNet paper's figures."""

from itertools import product
from math import sqrt

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vovnet.errors import ConfigError
from vovnet.models.boxes import Target
from vovnet.models.deploy import DeployGraph
from vovnet.models.dsod import DenseSource, DSODConfig, ScaledNorm, prior_shapes
from vovnet.models.multibox import assign_priors, multibox_loss
from vovnet.models.weights import load_backbone
from vovnet.models.zoo import create_model
from vovnet.profiling.count import count_macs, count_parameters

NAME = "dsod_ese_vovnet19b_slim_dw"
SMALL = {"source_channels": 16, "extra_channels": [16, 16, 16, 16]}
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
BOXES = [[4.2, 4.9, 60.3, 50.1], [70.4, 60.2, 120.6, 127.3], [10.7, 80.1, 30.2, 100.8]]


def detector(**overrides: object) -> nn.Module:
    torch.manual_seed(0)
    return create_model(NAME, num_classes=3, overrides=SMALL | overrides)


def target_of(boxes: list[list[float]], **fields: Tensor) -> Target:
    tensor = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return Target(tensor, torch.arange(len(boxes)) % 3, **fields)


def square(side: int, count: int = 2) -> Tensor:
    return torch.full((count, 2), side)


def test_costs_at_300_stay_near_the_papers() -> None:
    """The paper's table 2 says 5.6 G and 5.9 M; how it attached the backbone is not published."""
    with torch.device("meta"):
        model = create_model("dsod_vovnet27_slim_paper", num_classes=20)
        images = torch.zeros(1, 3, 300, 300)
    assert count_macs(model, (images,)) == 5_766_301_952  # 3.0 % more
    assert count_parameters(model) == 5_840_380  # 1.0 % less


@pytest.mark.parametrize(
    ("side", "maps"), [(300, (37, 18, 9, 5, 3, 2)), (320, (40, 20, 10, 5, 3, 2))]
)
def test_sources_and_priors(side: int, maps: tuple[int, ...]) -> None:
    with torch.device("meta"):
        raw = create_model(NAME, num_classes=20, overrides=SMALL)(torch.zeros(2, 3, side, side))
    count = sum(n * m**2 for n, m in zip((4, 6, 6, 6, 4, 4), maps, strict=True))
    assert {name: tuple(value.shape) for name, value in raw.items()} == {
        "logits": (2, count, 21),
        "deltas": (2, count, 4),
        "anchors": (count, 4),
    }


def priors_slowly(maps: tuple[int, ...]) -> list[list[float]]:
    """SSD's priors said again: each level's square, the larger square, and the ratios."""
    sizes = [30, 60, 111, 162, 213, 264, 315]
    steps = [8, 16, 32, 64, 100, 300]
    ratios = [[2], [2, 3], [2, 3], [2, 3], [2], [2]]
    boxes = []
    for level, cells in enumerate(maps):
        size, larger = sizes[level], sqrt(sizes[level] * sizes[level + 1])
        sides = [(size, size), (larger, larger)]
        for ratio in ratios[level]:
            sides.append((size * sqrt(ratio), size / sqrt(ratio)))
            sides.append((size / sqrt(ratio), size * sqrt(ratio)))
        for row, column in product(range(cells), range(cells)):
            x, y = (column + 0.5) * steps[level], (row + 0.5) * steps[level]
            boxes += [[x - w / 2, y - h / 2, x + w / 2, y + h / 2] for w, h in sides]
    return boxes


def test_priors_equal_their_restatement() -> None:
    with torch.no_grad():
        anchors = detector().eval()(torch.zeros(1, 3, 160, 160))["anchors"]
    expected = priors_slowly((20, 10, 5, 3, 2, 1))
    np.testing.assert_allclose(anchors.numpy(), expected, rtol=1e-5, atol=1e-4)
    assert [len(shapes) for shapes in prior_shapes(DSODConfig())] == [4, 6, 6, 6, 4, 4]


def test_half_of_a_dense_source_is_taken_over() -> None:
    torch.manual_seed(0)
    source = DenseSource(6, 4).eval()
    x = torch.randn(1, 6, 5, 7)
    with torch.no_grad():
        out = source(x)
        # BatchNorm at its start divides by sqrt(1 + 1e-5), hardly anything.
        pooled = torch.stack([
            x[0, :, i : i + 2, j : j + 2].amax((1, 2)) for i, j in product((0, 2, 4), (0, 2, 4, 6))
        ])  # fmt: skip
        expected = pooled.relu() @ source.pooled.conv.weight[:, :, 0, 0].T
    assert out.shape == (1, 8, 3, 4)
    torch.testing.assert_close(out[0, :4].flatten(1).T, expected, rtol=1e-4, atol=1e-4)


def test_the_first_two_sources_are_stage_3_and_stage_4_beside_it() -> None:
    made = detector().eval()
    seen: dict[int, Tensor] = {}
    for level, predictor in enumerate(made.head.predictors):
        predictor.register_forward_pre_hook(lambda _, x, level=level: seen.update({level: x[0]}))
    images = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        made(images)
        first, second = made.backbone(images)
    assert torch.equal(seen[0], first)
    assert [tuple(seen[level].shape[1:]) for level in range(6)] == [
        (256, 12, 12), (32, 6, 6), (32, 3, 3), (32, 2, 2), (32, 1, 1), (32, 1, 1),
    ]  # fmt: skip
    with torch.no_grad():
        torch.testing.assert_close(seen[1][:, :16], made.head.second(second))
    assert len(made.backbone.stages) == 3


def test_scaled_norm_by_hand() -> None:
    norm = ScaledNorm(2)
    assert norm.weight.tolist() == [20, 20]
    with torch.no_grad():
        norm.weight[1] = 10
        out = norm(torch.tensor([[3.0, 0], [4, 0]]).reshape(1, 2, 1, 2))
    torch.testing.assert_close(out.flatten(), torch.tensor([12.0, 0, 8, 0]))


def test_the_loss_is_the_multibox_loss_of_its_priors() -> None:
    made = detector()
    raw = made(torch.randn(2, 3, 128, 128))
    targets = [target_of(BOXES), target_of(BOXES[1:2])]
    losses = made.loss(raw, targets, square(128))
    anchors = raw["anchors"]
    inside = ((anchors[:, :2] + anchors[:, 2:]) / 2 < 128).all(1)
    found = [assign_priors(anchors, t, inside, made.config, iou=(0.5, 0.5)) for t in targets]
    cls, box = multibox_loss(
        raw["logits"], raw["deltas"], anchors.expand(2, -1, -1), found,
        [t.boxes_xyxy for t in targets], [t.labels for t in targets], per_positive=3,
    )  # fmt: skip
    assert losses["loss_cls"].item() == pytest.approx(cls.item())
    assert losses["loss_box"].item() == pytest.approx(box.item())
    assert (~inside).any()
    assert set(losses) == {"loss_cls", "loss_box"}


def test_a_perfect_prediction_is_found_and_costs_little() -> None:
    """Logits and deltas written by hand for one prior: the object's box comes out."""
    made = detector().eval()
    with torch.no_grad():
        raw = made(torch.zeros(1, 3, 128, 128))
    raw["logits"] = torch.zeros_like(raw["logits"])
    raw["logits"][..., 3] = 12.0
    raw["deltas"] = torch.zeros_like(raw["deltas"])
    target = target_of([[20.0, 24, 60, 54]])
    inside = torch.ones(len(raw["anchors"]), dtype=torch.bool)
    found = assign_priors(raw["anchors"], target, inside, made.config, iou=(0.5, 0.5))
    for prior in torch.nonzero(found.positive)[:, 0].tolist():
        x0, y0, x1, y1 = raw["anchors"][prior].tolist()
        raw["logits"][0, prior] = torch.tensor([12.0, 0, 0, 0])
        raw["deltas"][0, prior] = torch.tensor([
            (40 - (x0 + x1) / 2) / (x1 - x0) * 10, (39 - (y0 + y1) / 2) / (y1 - y0) * 10,
            np.log(40 / (x1 - x0)) * 5, np.log(30 / (y1 - y0)) * 5,
        ])  # fmt: skip
    detected = made.detect(raw, square(128, 1))
    assert detected["valid"].sum() == 1
    torch.testing.assert_close(detected["boxes"][0, 0], target.boxes_xyxy[0], rtol=0, atol=1e-3)
    assert detected["labels"][0, 0] == 0
    losses = made.loss(raw, [target], square(128, 1))
    assert losses["loss_box"] < 1e-6
    assert losses["loss_cls"] < 1e-2


def test_every_parameter_gets_a_gradient() -> None:
    made = detector()
    boxes = [[10.0, 10, 40, 42], [30, 40, 100, 110], [90, 10, 300, 150], [1, 5, 310, 316],
             [20, 30, 200, 180], [5, 5, 260, 250]]  # fmt: skip
    losses = made.loss(made(torch.randn(2, 3, 320, 320)), [target_of(boxes)] * 2, square(320))
    sum(losses.values()).backward()
    for key, parameter in made.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.any(), key


@pytest.mark.parametrize("crowds", [torch.zeros(0, 4), torch.tensor([[-999.0, -999, 999, 999]])])
def test_images_without_objects(crowds: Tensor) -> None:
    made = detector()
    targets = [target_of([], ignore_xyxy=crowds)] * 2
    losses = made.loss(made(torch.randn(2, 3, 96, 96)), targets, square(96))
    assert losses["loss_cls"] == losses["loss_box"] == 0
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in made.parameters())


def test_one_image_and_a_padded_batch_agree() -> None:
    made = detector(score_threshold=0.0, max_detections=20)
    graph = DeployGraph(made, mean=MEAN, std=STD).double().eval()
    rng = np.random.default_rng(0)
    batch = torch.zeros(2, 64, 96, 3, dtype=torch.uint8)
    batch[0] = torch.from_numpy(rng.integers(0, 256, (64, 96, 3), dtype=np.uint8))
    batch[1, :40, :50] = torch.from_numpy(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8))
    with torch.no_grad():
        alone = graph(batch[:1], torch.tensor([[64, 96]]))
        together = graph(batch, torch.tensor([[64, 96], [40, 50]]))
    for key, value in alone.items():
        torch.testing.assert_close(together[key][:1], value, msg=key)
    assert together["valid"].all()
    assert (together["boxes"][1] <= torch.tensor([50, 40, 50, 40])).all()


def test_a_prior_beyond_the_image_cannot_win() -> None:
    made = detector().eval()
    sizes = torch.tensor([[40, 50]])
    with torch.no_grad():
        raw = made(torch.zeros(1, 3, 64, 64))
        before = made.detect(raw, sizes)
        x, y = ((raw["anchors"][:, :2] + raw["anchors"][:, 2:]) / 2).unbind(1)
        raw["logits"][0, (x >= 50) | (y >= 40), 0] = 99.0
        after = made.detect(raw, sizes)
    assert before["valid"].any()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("size", [(32, 32), (50, 70), (33, 257)])
def test_images_of_any_size(size: tuple[int, int]) -> None:
    made = detector(score_threshold=0.0).eval()
    with torch.no_grad():
        found = made.detect(made(torch.randn(1, 3, *size)), torch.tensor([size]))
    assert found["boxes"].isfinite().all()
    assert found["valid"].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    made = detector(score_threshold=0.0).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        raw = made(images)
        found = made.detect(raw, square(64, 1))
        losses = made.loss(raw, [target_of(BOXES[:1])], square(64, 1))
    with torch.no_grad():
        again = made.to(dtype)(images.to(dtype))
    for values in (found, losses, raw, again):
        for name, value in values.items():
            assert value.isfinite().all(), name
            assert value.dtype not in (torch.bfloat16, torch.float16), name


def test_state_dict_round_trip() -> None:
    made, other = detector().eval(), detector().eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.1)
    other.load_state_dict(made.state_dict())
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        found, again = (m.detect(m(images), square(64, 1)) for m in (made, other))
    assert all(torch.equal(found[key], again[key]) for key in found)


def test_a_classifiers_weights_start_it_without_the_stage_that_it_has_not() -> None:
    classifier, made = create_model("ese_vovnet19b_slim_dw"), detector()
    load_backbone(made.backbone, classifier.state_dict(), where="test")
    key = "stages.2.blocks.0.attn.fc.weight"
    assert torch.equal(made.backbone.state_dict()[key], classifier.state_dict()[key])
    broken = {k: v for k, v in classifier.state_dict().items() if not k.startswith("stages.1.")}
    with pytest.raises(ConfigError, match=r"missing: stages\.1"):
        load_backbone(made.backbone, broken, where="test")


@pytest.mark.parametrize(
    "overrides",
    [
        {"anchor_sizes": [30, 60]},
        {"anchor_steps": [8, 16]},
        {"anchor_steps": [8, 16, 32, 64, 100, 0]},
        {"anchor_ratios": [[2]] * 5},
        {"anchor_ratios": [2] * 6},
        {"anchor_ratios": [["x"]] * 6},
        {"extra_channels": [1, 2, 3]},
        {"source_channels": 0},
    ],
)
def test_a_wrong_setting_is_named(overrides: dict) -> None:
    (name,) = overrides
    with torch.device("meta"), pytest.raises(ConfigError, match=name):
        create_model(NAME, overrides=overrides)
