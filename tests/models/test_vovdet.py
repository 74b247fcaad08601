"""VovDet against plain restatements, and in the corners that users meet."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import roi_align

from vovnet.errors import ConfigError
from vovnet.models.boxes import Target
from vovnet.models.deploy import DeployGraph, fold_batch_norms
from vovnet.models.losses import distribution_focal_loss, mask_loss, quality_focal_loss
from vovnet.models.pan import Pan
from vovnet.models.prototypes import cut_masks, grow_boxes
from vovnet.models.roi import BitmapMasks
from vovnet.models.vovdet import (
    VovDetConfig,
    best_candidates,
    decode_distributions,
    head_losses,
    keep_peaks,
)
from vovnet.models.zoo import SIZED, create_model
from vovnet.profiling.count import count_macs

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
SMALL = {
    "neck_channels": 16,
    "stem_channels": [16, 16, 16],
    "stage_conv_channels": [16, 16, 16, 16],
    "stage_out_channels": [32, 32, 32, 32],
}
BOXES = [[4.0, 4, 60, 50], [70, 60, 120, 127], [10, 80, 30, 100]]
LOSSES = {
    f"loss_{one}{part}"
    for one in ("", "one_")
    for part in ("cls", "box", "distribution")
}  # fmt: skip


def detector(kind: str = "vovdet", **overrides: object) -> nn.Module:
    torch.manual_seed(0)
    name = f"{kind}_ese_vovnet19b_slim_dw"
    return create_model(name, num_classes=3, overrides=SMALL | overrides)


def target_of(boxes: list[list[float]], *, masks: bool = False, **fields: Tensor) -> Target:
    tensor = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    pixels = torch.zeros(len(boxes), 256, 256)
    for own, (x0, y0, x1, y1) in zip(pixels, tensor.long().tolist(), strict=True):
        own[y0:y1, x0:x1] = 1
    bitmaps = BitmapMasks(pixels) if masks else None
    return Target(tensor, torch.arange(len(boxes)) % 3, bitmaps, **fields)


def sizes_of(*sizes: tuple[int, int]) -> Tensor:
    return torch.tensor(sizes)


@pytest.mark.parametrize(
    ("name", "macs_g"),
    [("vovdet_n", 2.415), ("vovdet_s", 17.28), ("vovdet_m", 40.13), ("vovdet_l", 67.64)],
)
def test_costs_of_the_sizes_at_640(name: str, macs_g: float) -> None:
    with torch.device("meta"):
        model = create_model(name)
        images = torch.zeros(1, 3, 640, 640)
    assert count_macs(model, (images,)) / 1e9 == pytest.approx(macs_g, rel=0.001)


def test_names_of_the_sizes() -> None:
    assert len(SIZED) == 8
    with torch.device("meta"):
        model = create_model("vovdet_l_seg", num_classes=2, overrides={"max_detections": 7})
    assert model.config.max_detections == 7
    assert model.has_masks
    assert model.backbone.config.layers_per_block == 5
    with pytest.raises(ConfigError, match="vovdet_n"):
        create_model("vovdet_x")


def test_quality_focal_loss() -> None:
    logits, quality = torch.tensor([-2.0, 0.5, 3.0]), torch.tensor([0.0, 0.8, 0.3])
    p = 1 / (1 + np.exp(-logits.double().numpy()))
    y = quality.double().numpy()
    expected = -(np.abs(y - p) ** 2) * ((1 - y) * np.log(1 - p) + y * np.log(p))
    found = quality_focal_loss(logits, quality, gamma=2.0)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)


def test_distribution_focal_loss() -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 4, dtype=torch.float64)
    log = torch.log_softmax(logits, 1).numpy()
    targets = torch.tensor([1.25, 0.0, 3.0, -2.0, 9.0], dtype=torch.float64)
    found = distribution_focal_loss(logits, targets).tolist()
    expected = [-0.75 * log[0, 1] - 0.25 * log[0, 2], -log[1, 0], -log[2, 3], -log[3, 0],
                -log[4, 3]]  # fmt: skip
    np.testing.assert_allclose(found, expected)


def test_mask_loss_is_least_for_the_mask_itself() -> None:
    truth = torch.zeros(2, 28, 28)
    truth[0, :10], truth[1, 5:9, 3:20] = 1, 1
    right = mask_loss(truth * 40 - 20, truth)
    assert (right < 1e-3).all()
    half = mask_loss(torch.zeros_like(truth), truth)
    area = truth.sum((1, 2))
    torch.testing.assert_close(half, np.log(2) + 1 - (area + 1) / (784 / 2 + area + 1))


def test_decoding_is_the_mean_of_each_distribution() -> None:
    rng = np.random.default_rng(0)
    logits, points = rng.normal(size=(6, 4, 5)), rng.uniform(0, 90, (6, 2))
    shares = np.exp(logits) / np.exp(logits).sum(2, keepdims=True)
    left, top, right, bottom = (shares @ np.arange(5)).T * 16
    x, y = points.T
    expected = np.stack([x - left, y - top, x + right, y + bottom], 1)
    found = decode_distributions(
        torch.from_numpy(logits.reshape(6, 20)), torch.from_numpy(points), torch.full((6, 1), 16.0)
    )
    np.testing.assert_allclose(found.numpy(), expected)


def test_masks_summed_before_or_after_the_cut_are_the_same() -> None:
    torch.manual_seed(0)
    prototypes, weights = torch.rand(2, 4, 20, 30), torch.randn(3, 4)
    rois = torch.tensor([[0, 3.0, 5, 70, 60], [1, 0, 0, 119, 79], [1, 50, 50, 51, 90]])
    parts = roi_align(prototypes, rois, 28, 0.25, sampling_ratio=0, aligned=True)
    expected = torch.einsum("mp,mphw->mhw", weights, parts)
    maps = torch.einsum("mp,mphw->mhw", weights, prototypes[rois[:, 0].long()])
    torch.testing.assert_close(cut_masks(maps, rois[:, 1:]), expected, atol=1e-5, rtol=1e-5)
    grown = grow_boxes(torch.tensor([[10.0, 20, 30, 60]]))
    assert grown.tolist() == [[8.0, 16.0, 32.0, 64.0]]


def test_the_neck_joins_every_level_both_ways_and_fits_odd_sides() -> None:
    torch.manual_seed(0)
    neck = Pan([4, 6, 8], out_channels=16, conv="plain").eval()
    maps = [torch.randn(1, c, *side) for c, side in ((4, (21, 10)), (6, (10, 5)), (8, (5, 2)))]
    levels = neck(maps)
    assert [tuple(m.shape) for m in levels] == [(1, 16, 21, 10), (1, 16, 10, 5), (1, 16, 5, 2)]
    for changed in range(3):
        other = [m + (level == changed) for level, m in enumerate(maps)]
        assert all(not torch.equal(a, b) for a, b in zip(levels, neck(other), strict=True))


def made_raw(batch: int = 2, classes: int = 3) -> dict[str, Tensor]:
    """What a network could give for images of 64 x 96 pixels."""
    generator = torch.Generator().manual_seed(0)
    maps = {f"p{n}": torch.zeros(batch, 1, 64 // 2**n, 96 // 2**n) for n in (3, 4, 5)}
    count = sum(m.shape[2] * m.shape[3] for m in maps.values())
    return maps | {
        "logits": torch.randn(batch, count, classes, generator=generator) * 2,
        "distributions": torch.randn(batch, count, 64, generator=generator),
    }


@pytest.mark.parametrize("count", [5, 40, 700])
def test_candidates_are_the_best_pairs_of_location_and_class(count: int) -> None:
    raw, sizes = made_raw(), sizes_of((64, 96), (40, 50))
    config = VovDetConfig(num_classes=3, score_threshold=0.3, suppression="none")
    found = best_candidates(raw, sizes, config, count=count, min_score=0.4)
    grid = [
        (x * s + s // 2, y * s + s // 2)
        for s in (8, 16, 32)
        for y in range(64 // s)
        for x in range(96 // s)
    ]
    for image, (height, width) in enumerate(sizes.tolist()):
        pairs = []
        for location, (x, y) in enumerate(grid):
            for label, logit in enumerate(raw["logits"][image, location].tolist()):
                score = 1 / (1 + np.exp(-logit))
                if x < width and y < height and score >= 0.4:
                    pairs.append((score, location, label))
        best = sorted(pairs, reverse=True)[:count]
        valid = found["valid"][image]
        assert valid.tolist() == [index < len(best) for index in range(count)]
        own = {name: value[image][valid] for name, value in found.items()}
        assert own["location"].tolist() == [location for _, location, _ in best]
        assert own["labels"].tolist() == [label for _, _, label in best]
        np.testing.assert_allclose(own["scores"].numpy(), [s for s, _, _ in best], rtol=1e-5)
        assert (own["boxes"] <= torch.tensor([width, height] * 2)).all()
        assert (own["boxes"] >= 0).all()
        assert all((value[image][~valid] == 0).all() for value in found.values())


def test_peaks_are_the_best_of_their_neighbours_on_one_map() -> None:
    raw = made_raw()
    kept = keep_peaks(raw)
    start = 0
    for stride in (8, 16, 32):
        height, width = 64 // stride, 96 // stride
        stop = start + height * width
        grid = raw["logits"][:, start:stop].reshape(2, height, width, 3).numpy()
        found = kept[:, start:stop].reshape(2, height, width, 3).numpy()
        for image, y, x, label in np.ndindex(*grid.shape):
            window = grid[image, max(y - 2, 0) : y + 3, max(x - 2, 0) : x + 3, label]
            is_peak = grid[image, y, x, label] == window.max()
            assert found[image, y, x, label] == (grid[image, y, x, label] if is_peak else -1e4)
        start = stop
    sizes = sizes_of((64, 96), (64, 96))
    config = VovDetConfig(num_classes=3, score_threshold=0.0, suppression="peaks")
    best = best_candidates(raw, sizes, config, count=700, min_score=0.0)
    assert best["valid"].sum() == (kept > -1e4).sum()


@pytest.mark.parametrize("one_to_one", [True, False])
def test_each_suppression_chooses_of_the_same_outputs(one_to_one: bool) -> None:
    made = {
        how: detector("vovdet_seg", one_to_one=one_to_one, suppression=how, max_detections=1008)
        for how in ("none", "peaks", "nms")
    }
    images, sizes = torch.randn(1, 3, 128, 128), sizes_of((128, 128))
    with torch.no_grad():
        raw = made["none"].eval()(images)
        found = {how: one.detect(raw, sizes) for how, one in made.items()}
    counts = {how: int(one["valid"].sum()) for how, one in found.items()}
    assert counts["none"] == raw["logits"].numel()
    assert counts["peaks"] < counts["none"]
    assert counts["nms"] < counts["none"]
    assert found["peaks"]["scores"][0, 0] == found["none"]["scores"][0, 0]


def test_losses_are_least_where_one_location_alone_has_the_object() -> None:
    config, sizes = VovDetConfig(num_classes=3), sizes_of((64, 96))
    maps = {name: value for name, value in made_raw(1).items() if name.startswith("p")}
    target = Target(torch.tensor([[24.0, 16, 72, 48]]), torch.tensor([1]))
    location = 3 * 12 + 5  # at x 44, y 28
    bins = torch.full((1, 126, 4, 16), -20.0)
    for side, pixels in enumerate((44 - 24, 28 - 16, 72 - 44, 48 - 28)):
        strides, share = divmod(pixels / 8, 1)  # halves all four: as much in both bins
        assert share == 0.5
        bins[0, location, side, int(strides) : int(strides) + 2] = 0.0
    logits = torch.full((1, 126, 3), -8.0)
    logits[0, location, 1] = 8.0
    raw = maps | {"logits": logits, "distributions": bins.flatten(2)}
    found = best_candidates(raw, sizes, config, count=5, min_score=0.5)
    assert found["valid"].tolist() == [[True] + [False] * 4]
    np.testing.assert_allclose(found["boxes"][0, 0].numpy(), [24, 16, 72, 48], atol=1e-3)
    losses = head_losses(raw, [target], sizes, config, one_to_one=True)
    assert losses["loss_cls"] < 1e-3
    assert losses["loss_box"] < 1e-3
    # Of two bins with equal shares nothing less than their entropy can be had.
    entropy = config.distribution_weight * np.log(2)
    assert losses["loss_distribution"].item() == pytest.approx(entropy, rel=1e-3)
    logits[0, location + 1, 1] = 8.0  # a second location for the same object
    assert head_losses(raw, [target], sizes, config, one_to_one=True)["loss_cls"] > 5


@pytest.fixture(scope="module", params=["vovdet", "vovdet_seg"])
def trained(request: pytest.FixtureRequest) -> nn.Module:
    """In training mode, after one backward pass with objects of all levels."""
    drawn = {"mask_samples": 500} if request.param == "vovdet_seg" else {}
    made = detector(request.param, one_to_one=True, locations_per_object=40, **drawn)
    for head in (made.many_head, made.one_head):
        for level in head.levels:  # boxes of all sizes, so that all levels have an object
            nn.init.normal_(level.distribution.bias)
    boxes = [[4.0, 4, 40, 40], [60, 60, 124, 124], [90, 10, 250, 150], [1, 5, 255, 256]]
    raw = made(torch.randn(2, 3, 256, 256))
    targets = [target_of(boxes, masks=True), target_of(boxes[1:], masks=True)]
    losses = made.loss(raw, targets, sizes_of((256, 256), (256, 256)))
    masks = {"loss_mask", "loss_one_mask"} if made.has_masks else set()
    assert set(losses) == LOSSES | masks
    sum(losses.values()).backward()
    return made


def test_every_parameter_gets_a_gradient(trained: nn.Module) -> None:
    for key, parameter in trained.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        if not key.startswith("one_head"):  # the levels without its few objects learn scores alone
            assert parameter.grad.any(), key
    ones = [p for k, p in trained.one_head.named_parameters() if "cls" in k or "logits" in k]
    assert all(parameter.grad.any() for parameter in ones)


def test_the_one_to_one_head_teaches_the_network_nothing() -> None:
    made = detector("vovdet_seg", one_to_one=True)
    raw = made(torch.randn(1, 3, 128, 128))
    losses = made.loss(raw, [target_of(BOXES, masks=True)], sizes_of((128, 128)))
    sum(value for name, value in losses.items() if name.startswith("loss_one_")).backward()
    touched = {key.split(".")[0] for key, p in made.named_parameters() if p.grad is not None}
    assert touched == {"one_head"}


def test_one_head_learns_from_one_location_the_other_from_many() -> None:
    made, sizes = detector(one_to_one=True).eval(), sizes_of((128, 128))
    targets = [target_of(BOXES)]
    with torch.no_grad():
        raw = made(torch.randn(1, 3, 128, 128))
        pyramid = [raw["p3"], raw["p4"], raw["p5"]]
        losses = made.loss(raw, targets, sizes)
        one = head_losses(raw, targets, sizes, made.config, one_to_one=True)
        many_raw = raw | made.many_head(pyramid)
        many = head_losses(many_raw, targets, sizes, made.config, one_to_one=False)
    assert losses == many | {f"loss_one_{name[5:]}": value for name, value in one.items()}


def test_without_a_second_head_the_losses_are_those_of_the_first() -> None:
    two, one = detector(one_to_one=True).eval(), detector().eval()
    one.load_state_dict({k: v for k, v in two.state_dict().items() if not k.startswith("one_head")})
    images, sizes, targets = torch.randn(1, 3, 128, 128), sizes_of((128, 128)), [target_of(BOXES)]
    with torch.no_grad():
        both, alone = (made.loss(made(images), targets, sizes) for made in (two, one))
    assert alone == {name: value for name, value in both.items() if "one" not in name}


@pytest.mark.parametrize("kind", ["vovdet", "vovdet_seg"])
def test_images_without_objects_teach_scores_alone(kind: str) -> None:
    made, sizes = detector(kind), sizes_of(*[(128, 128)] * 2)
    raw = made(torch.randn(2, 3, 128, 128))
    losses = made.loss(raw, [target_of([])] * 2, sizes)
    for name, value in losses.items():
        assert (value > 0) if name.endswith("cls") else (value == 0), name
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.parameters())
    crowds = torch.tensor([[-9.0, -9, 999, 999]])
    losses = made.loss(raw, [target_of([], ignore_xyxy=crowds)] * 2, sizes)
    assert all(value == 0 for value in losses.values())


def test_a_part_beyond_the_image_neither_teaches_nor_wins() -> None:
    """One image alone and the same one in a larger batch give the same detections."""
    made = detector("vovdet_seg", max_detections=30, score_threshold=0.0)
    graph = DeployGraph(made, mean=MEAN, std=STD).double().eval()
    rng = np.random.default_rng(0)
    batch = torch.zeros(2, 64, 96, 3, dtype=torch.uint8)
    batch[0] = torch.from_numpy(rng.integers(0, 256, (64, 96, 3), dtype=np.uint8))
    batch[1, :40, :50] = torch.from_numpy(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8))
    sizes = sizes_of((64, 96), (40, 50))
    with torch.no_grad():
        alone, together = graph(batch[:1], sizes[:1]), graph(batch, sizes)
        raw = made(graph.normalize(batch, sizes))
    for key, value in alone.items():
        torch.testing.assert_close(together[key][:1], value, msg=key)
    assert (together["boxes"][1] <= torch.tensor([50, 40, 50, 40])).all()
    x = torch.cat([torch.arange(s // 2, 96, s).repeat(64 // s) for s in (8, 16, 32)])
    moved = raw["logits"].clone()
    moved[1, x >= 50] = 9.0
    targets = [target_of(BOXES[:1], masks=True), target_of([[2, 2, 40, 38]], masks=True)]
    torch.manual_seed(0)
    before = made.loss(raw, targets, sizes)
    torch.manual_seed(0)
    after = made.loss(raw | {"logits": moved}, targets, sizes)
    assert before == after


def test_a_thousand_objects_and_boxes_on_the_border() -> None:
    generator = torch.Generator().manual_seed(0)
    corner = (torch.rand(1000, 2, generator=generator) * 140 - 10).clamp(0, 122)
    side = 6 + torch.rand(1000, 2, generator=generator) * 30
    boxes = torch.cat([corner, (corner + side).clamp(max=128)], dim=1)
    made = detector(max_detections=1000)
    raw, sizes = made(torch.randn(2, 3, 128, 128)), sizes_of((128, 128), (128, 128))
    losses = made.loss(raw, [target_of(boxes.tolist()), target_of(BOXES)], sizes)
    assert all(value.isfinite() and value > 0 for value in losses.values())
    with torch.no_grad():
        assert made.detect(raw, sizes)["boxes"].shape == (2, 1000, 4)


def test_a_third_limit_adds_a_level_for_objects_that_stride_8_passes_by() -> None:
    images, sizes = torch.randn(1, 3, 64, 96), sizes_of((64, 96))
    tiny = [target_of([[5.0, 5, 10, 10]], masks=True)]  # between the locations of stride 8
    coarse = detector("vovdet_seg")
    assert float(coarse.loss(coarse(images), tiny, sizes)["loss_box"].detach()) == 0
    fine = detector("vovdet_seg", level_limits=[32, 64, 128], score_threshold=0.0)
    raw = fine(images)
    assert [tuple(raw[f"p{n}"].shape[2:]) for n in (2, 3)] == [(16, 24), (8, 12)]
    assert raw["prototypes"].shape[2:] == (16, 24)
    assert raw["logits"].shape[1] == 16 * 24 * 85 // 64
    losses = fine.loss(raw, tiny, sizes)
    assert float(losses["loss_box"].detach()) > 0
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in fine.parameters())
    found = fine.eval().detect({name: value.detach() for name, value in raw.items()}, sizes)
    assert found["mask_probs"].shape == (1, 100, 28, 28)
    assert found["valid"].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    made = detector("vovdet_seg", score_threshold=0.0).eval()
    images, sizes = torch.randn(1, 3, 64, 64), sizes_of((64, 64))
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        raw = made(images)
        found = made.detect(raw, sizes)
        losses = made.loss(raw, [target_of(BOXES[:1], masks=True)], sizes)
    raw = {name: value for name, value in raw.items() if not name.startswith("p3")}
    for values in (found, losses, raw):
        for name, value in values.items():
            assert value.isfinite().all(), name
            if name not in ("p4", "p5"):
                assert value.dtype not in (torch.bfloat16, torch.float16), name


@pytest.mark.parametrize("size", [(32, 32), (50, 70), (33, 257)])
def test_images_of_any_size(size: tuple[int, int]) -> None:
    made = detector("vovdet_seg").eval()
    with torch.no_grad():
        found = made.detect(made(torch.randn(1, 3, *size)), sizes_of(size))
    assert all(value.isfinite().all() for value in found.values())
    assert found["valid"].any()


def test_weights_survive_saving_and_folding(trained: nn.Module) -> None:
    made = detector("vovdet_seg" if trained.has_masks else "vovdet", one_to_one=True)
    made.load_state_dict(trained.state_dict())
    images, sizes = torch.randn(1, 3, 64, 64), sizes_of((64, 64))
    with torch.no_grad():
        expected = trained.eval()(images)
        found = made.eval()(images)
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        fold_batch_norms(made)
        folded = made(images)
    trained.train()
    assert not any(isinstance(part, nn.BatchNorm2d) for part in made.modules())
    for name, value in expected.items():
        torch.testing.assert_close(folded[name], value, rtol=1e-3, atol=1e-3)
    assert made.detect(found, sizes)["valid"].any()


def test_the_graph_chooses_without_suppression_or_open_shapes() -> None:
    """Exported with an open batch: no operator whose result's size depends on the data."""
    graph = DeployGraph(detector("vovdet_seg", suppression="peaks").eval(), mean=MEAN, std=STD)
    images = torch.zeros(2, 64, 64, 3, dtype=torch.uint8)
    program = torch.export.export(graph, (images, sizes_of((64, 64), (64, 64))), strict=False)
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any(word in name for name in names for word in ("nms", "nonzero", "masked_select"))
    assert any("topk" in name for name in names)


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ({"box_bins": 1}, "box_bins"),
        ({"one_to_one": 1}, "one_to_one"),
        ({"suppression": "soft"}, "suppression"),
        ({"score_threshold": 1.5}, "score_threshold"),
        ({"alignment_beta": -1.0}, "alignment_beta"),
        ({"center_radius": 0.4}, "center_radius: expected 0.5 strides or more"),
        ({"level_limits": [64]}, "level_limits: expected 2 or 3 numbers"),
        ({"level_limits": [8, 16, 32, 64]}, "level_limits: expected 2 or 3 numbers"),
    ],
)
def test_a_wrong_setting_is_named(overrides: dict, name: str) -> None:
    with torch.device("meta"), pytest.raises(ConfigError, match=name):
        create_model("vovdet_n", overrides=overrides)
