"""Every detector's recipe builds at its own size, and trains two steps at a small one.

What is shrunk in the steps: channels of backbone, neck and heads, the convolutions of a block (to
one), proposals and sampled regions, the picture's sides (64 to 96 pixels), the images of a step (to
two). Kept: the kind of network and of norm, the blocks of each stage, the kind of augmentation, the
optimizer, its rate and warm-up, and that the backbone starts from a file of weights.
"""

import json
import math
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vovnet.cli.models import count_parameters
from vovnet.models.vovnet import VoVNetConfig
from vovnet.models.zoo import create_model, split_name
from vovnet.training.build import model_overrides
from vovnet.training.checkpoint import Position
from vovnet.training.config import Recipe, TrainConfig, list_recipes, load_config
from vovnet.training.detect import DetectorTask
from vovnet.training.loop import Budget, Schedule, train_step
from vovnet.training.optim import build_optimizer, set_learning_rate
from vovnet.training.report import read_records
from vovnet.training.run import train

DETECTORS = [r for r in list_recipes() if r.config.max_steps is not None]
BACKBONE_FIELDS = {field.name for field in fields(VoVNetConfig)}
SHAPE_SETTINGS = ("norm", "head_norm", "blocks_per_stage")
SMALL_BACKBONE = {
    "stem_channels": [16, 16, 16],
    "stage_conv_channels": [16, 16, 16, 16],
    "stage_out_channels": [32, 32, 32, 32],
    "layers_per_block": 1,
}
SMALL_FCOS = {"neck_channels": 32, "tower_convs": 1}
SMALL_RCNN = {
    "neck_channels": 32,
    "box_width": 16,
    "box_conv_channels": 16,
    "rpn_samples": 32,
    "rois_per_image": 16,
    "proposals_train": 30,
}
SMALL_MASKS = {"mask_convs": 1, "mask_channels": 16}
SMALL_HEADS = {
    "centermask": SMALL_FCOS | SMALL_MASKS | {"mask_iou_width": 16, "train_proposals": 4},
    "faster_rcnn": SMALL_RCNN,
    "mask_rcnn": SMALL_RCNN | SMALL_MASKS,
    "refinedet": {"neck_channels": 16},
    "dsod": {"source_channels": 16, "extra_channels": [16, 8, 8, 8]},
}


def name_of(recipe: Recipe) -> str:
    return recipe.name


def small_sizes(config: TrainConfig) -> dict[str, object]:
    """Settings under which pictures are small, of the same kind of augmentation."""
    if config.augment["geometry"] == "whole":
        sides = {"short_sides": [64, 80][: len(config.augment["short_sides"])]}
        return {"augment": sides, "preprocess": {"short_side": 64, "max_long_side": 96}}
    return {"augment": {"output_size": [64, 64]}, "preprocess": {"square": 64}}


def small_config(recipe: Recipe, data_dir: Path, weights: Path) -> TrainConfig:
    kind, _ = split_name(recipe.config.model)
    assert kind is not None
    flags = {
        "data": str(data_dir),
        "batch_size": 2,
        "model_overrides": SMALL_BACKBONE | SMALL_HEADS[kind.removesuffix("_lite")],
        "backbone_weights": str(weights) if recipe.needs_weights else None,
    }
    return load_config(recipe.name, None, flags | small_sizes(recipe.config))


@pytest.fixture(scope="module")
def save_backbone(tmp_path_factory):
    """Saves random weights of the shrunk backbone of a recipe, once for all that share it."""
    folder = tmp_path_factory.mktemp("weights")

    def save(recipe: Recipe) -> Path:
        _, backbone = split_name(recipe.config.model)
        plain = backbone.replace("_dcn", "")  # that is what its recipe starts from
        own = {k: v for k, v in recipe.config.model_overrides.items() if k in BACKBONE_FIELDS}
        blocks = {k: v for k, v in own.items() if k == "blocks_per_stage"}
        path = folder / f"{plain}{sum(sum(v) for v in blocks.values())}.safetensors"
        if not path.exists():
            torch.manual_seed(1)
            network = create_model(plain, num_classes=3, overrides=SMALL_BACKBONE | blocks)
            save_file(network.state_dict(), path)
        return path

    return save


def test_every_family_is_there() -> None:
    names = [recipe.name for recipe in list_recipes()]
    assert len(set(names)) == len(names)
    kinds = {split_name(recipe.config.model)[0] for recipe in DETECTORS}
    assert {kind.removesuffix("_lite") for kind in kinds if kind} == SMALL_HEADS.keys()
    assert {recipe.name for recipe in list_recipes()} - {recipe.name for recipe in DETECTORS} == {
        "fast",
        "finetune",
        "nuclei",
        "nuclei_fast",
        "paper",
        "timm_ra",
        "vovdet",
        *(f"vovdet_{size}{suffix}_coco" for size in "nsml" for suffix in ("", "_seg")),
    }


def count_numbers(model: torch.nn.Module) -> int:
    """Learned numbers, those of frozen norms too, which are buffers."""
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    state = model.state_dict()
    return sum(v.numel() for k, v in state.items() if not k.endswith(statistics))


@cache
def count_full(model: str, shape: str, num_classes: int) -> int:
    with torch.device("meta"):
        network = create_model(model, num_classes=num_classes, overrides=json.loads(shape))
    return count_numbers(network)


def full_size(recipe: Recipe, num_classes: int = 80) -> int:
    """Learned numbers of the recipe's network, counted once for all that share it."""
    settings = recipe.config.model_overrides
    shape = {name: settings[name] for name in SHAPE_SETTINGS if name in settings}
    return count_full(recipe.config.model, json.dumps(shape), num_classes)


@pytest.mark.parametrize("recipe", DETECTORS, ids=name_of)
def test_the_network_has_the_size_of_its_name(recipe: Recipe) -> None:
    found = full_size(recipe)
    if recipe.config.model_overrides.keys() & {"blocks_per_stage", "head_norm"}:
        assert 1.0 < found / count_parameters(recipe.config.model) < 1.6
    else:
        assert found == count_parameters(recipe.config.model)


@pytest.mark.parametrize(
    ("name", "num_classes", "millions"),
    [
        ("dsod300_vovnet27_slim_voc", 20, 5.9),  # the paper's tables 2 and 4
        ("refinedet320_vovnet39_coco", 80, 56.28),
        ("refinedet320_vovnet57_coco", 80, 70.32),
        ("faster_rcnn_ese_vovnet19_3x", 80, 28.1),  # by the released checkpoints' shapes
        ("faster_rcnn_ese_vovnet39_3x", 80, 43.1),
        ("faster_rcnn_ese_vovnet57_3x", 80, 59.4),
        ("faster_rcnn_ese_vovnet99_3x", 80, 87.4),
    ],
)
def test_the_network_has_the_published_size(name, num_classes, millions) -> None:
    recipe = next(recipe for recipe in DETECTORS if recipe.name == name)
    assert full_size(recipe, num_classes) / 1e6 == pytest.approx(millions, rel=0.012)


@pytest.mark.parametrize("depth", [75, 93])
@pytest.mark.parametrize("detector", ["faster_rcnn", "mask_rcnn"])
def test_the_deep_ones_have_the_layers_of_their_names(detector: str, depth: int) -> None:
    config = load_config(
        f"{detector}_vovnet{depth}_2x", None, {"data": "a", "backbone_weights": "b"}
    )
    with torch.device("meta"):
        model = create_model(config.model, overrides=model_overrides(config))
    blocks = sum(len(stage.blocks) for stage in model.backbone.stages)
    assert 3 + blocks * (5 + 1) == depth


def two_steps(config: TrainConfig) -> tuple[list[dict[str, float]], bool]:
    """The losses of each, and whether the stem's weights have changed."""
    device = torch.device("cpu")
    task = DetectorTask(config, skip_bad=False, device=device)
    torch.manual_seed(0)
    step = task.loss_step(task.build_model(), ()).train()
    optimizer = build_optimizer(
        step,
        config.optimizer,
        learning_rate=config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )
    schedule = Schedule(
        learning_rate=config.learning_rate,
        warmup_fraction=config.warmup_fraction,
        warmup_steps=config.warmup_steps,
        budget=Budget.of(
            max_minutes=config.max_minutes,
            max_steps=config.max_steps,
            epochs=config.epochs,
            batches_per_epoch=1,
        ),
        drops_at=config.drops_at,
    )
    stem = next(v for k, v in step.named_parameters() if k.endswith("stem.0.conv.weight"))
    before, losses = stem.detach().clone(), []
    for number in range(2):
        task.dataset.set_place(number, 0.0)
        batch = task.collate(task.dataset.__getitems__(task.order_of(number)))
        set_learning_rate(optimizer, schedule.at(Position(step=number)))
        values, _ = train_step(
            step,
            optimizer,
            batch,
            clip_norm=config.clip_norm,
            autocast_dtype=None,
            device=device,
        )
        losses.append(values)
    return losses, not torch.equal(before, stem)


@pytest.mark.parametrize("recipe", DETECTORS, ids=name_of)
def test_two_steps_of_the_shrunk_network(recipe: Recipe, data_dir, save_backbone) -> None:
    config = small_config(recipe, data_dir, save_backbone(recipe))
    losses, changed = two_steps(config)
    assert changed
    assert losses[0].keys() == losses[1].keys()
    assert ("loss_mask" in losses[0]) == ("mask AP" in recipe.expected)
    assert all(math.isfinite(value) for values in losses for value in values.values())


@pytest.mark.parametrize(
    "name",
    [
        "dsod300_vovnet27_slim_voc",
        "refinedet320_vovnet39_voc",
        "faster_rcnn_lite_ese_vovnet19_slim_dw_3x",
        "centermask_lite_ese_vovnet19_slim_dw_4x",
    ],
)
def test_two_steps_of_a_whole_network(name: str, data_dir, tmp_path) -> None:
    """Of each family, at its own widths; the pictures are small, and two are a step."""
    recipe = next(recipe for recipe in DETECTORS if recipe.name == name)
    flags = {"data": str(data_dir), "batch_size": 2} | small_sizes(recipe.config)
    if recipe.needs_weights:
        _, backbone = split_name(recipe.config.model)
        save_file(create_model(backbone).state_dict(), tmp_path / "weights.safetensors")
        flags["backbone_weights"] = str(tmp_path / "weights.safetensors")
    losses, changed = two_steps(load_config(name, None, flags))
    assert changed
    assert all(math.isfinite(value) for values in losses for value in values.values())


def test_a_run_ends_after_its_steps(data_dir, tmp_path, save_backbone) -> None:
    recipe = next(r for r in DETECTORS if r.name == "faster_rcnn_lite_ese_vovnet19_slim_dw_3x")
    small = small_config(recipe, data_dir, save_backbone(recipe))
    changes = {"max_steps": 3, "runs_dir": str(tmp_path), "workers": 0, "log_every_steps": 1}
    result = train(small.model_copy(update=changes | {"device": "cpu"}))
    records = read_records(result.run_dir / "metrics.jsonl")
    rates = [r["learning_rate"] for r in records if r["kind"] == "train"]
    assert rates == pytest.approx([0.02 * (0.001 + 0.999 * n / 1000) for n in (1, 2, 3)])
    assert result.metrics is not None
