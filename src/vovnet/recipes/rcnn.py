"""Faster and Mask R-CNN on VoVNet: table 5 of the VoVNet paper, and the tables of the authors'
repositories VoVNet-Detectron (2x) and vovnet-detectron2 (3x).

Command: torchrun --nproc-per-node 8 -m vovnet train --recipe mask_rcnn_ese_vovnet39_3x --data DIR
--backbone-weights FILE
"""

from collections.abc import Mapping, Sequence

from vovnet.training.config import Recipe, TrainConfig
from vovnet.training.recipe import free_weights_note, sgd_config

_V1_NOTES = (
    "Its repository trains on COCO 2014's train and valminusminival, and tests on minival: the "
    "pictures of 2017's train and val.",
    "The warm-up begins at a third of the rate there, at a thousandth here; biases have twice the "
    "learning rate there.",
    "RoIAlign takes 2 x 2 samples in each cell there; here their number grows with the region.",
)
_DEEP_NOTE = "The blocks of each stage are those of the repository's code; no paper names them."
_V2_NOTES = (
    "Momentum, warm-up and test size are detectron2's defaults, which its repository does not "
    "change; detectron2 decays biases too, here they are not.",
    "The source starts from its authors' ImageNet weights (CC-BY-NC-4.0).",
)
_SHORT_SIDES_3X = tuple(range(640, 801, 32))


def _config(
    model: str,
    overrides: Mapping[str, object],
    *,
    short_sides: Sequence[int],
    max_steps: int,
    drop_steps: Sequence[int],
    warmup_steps: int,
) -> TrainConfig:
    return sgd_config(
        model=model,
        model_overrides=overrides,
        preprocess={"short_side": 800, "max_long_side": 1333},
        augment={"geometry": "whole", "short_sides": short_sides, "horizontal_flip": 0.5},
        batch_size=16,
        max_steps=max_steps,
        drop_steps=drop_steps,
        learning_rate=0.02,
        weight_decay=1e-4,
        warmup_steps=warmup_steps,
        eval_every_epochs=12,
    )


def _scratch(depth: int, box_ap: float, mask_ap: float) -> Recipe:
    return Recipe(
        name=f"mask_rcnn_gn_vovnet{depth}_3x",
        config=_config(
            f"mask_rcnn_vovnet{depth}",
            {"norm": "gn", "head_norm": "gn"},
            short_sides=(800,),
            max_steps=270_000,
            drop_steps=(210_000, 250_000),
            warmup_steps=500,
        ),
        data="COCO 2017",
        source="VoVNet paper, table 5; VoVNet-Detectron's configuration",
        expected={"box AP": box_ap, "mask AP": mask_ap},
        one_gpu_batch=2,
        notes=_V1_NOTES,
    )


def _detectron(detector: str, depth: int, expected: Mapping[str, float]) -> Recipe:
    """A row of VoVNet-Detectron's README."""
    deeper = {75: [1, 2, 6, 3], 93: [1, 3, 8, 3]}
    blocks = {"blocks_per_stage": deeper[depth]} if depth in deeper else {}
    own = f" --set 'model_overrides={{blocks_per_stage: {deeper[depth]}}}'" if blocks else ""
    weights_note = (
        "The source starts from its authors' ImageNet weights, which have no licence; no free ones "
        f"fit: train some with --recipe paper --model vovnet{min(depth, 57)}{own}."
    )
    return Recipe(
        name=f"{detector}_vovnet{depth}_2x",
        config=_config(
            f"{detector}_vovnet{min(depth, 57)}",
            {"norm": "frozen_bn", **blocks},
            short_sides=(800,),
            max_steps=180_000,
            drop_steps=(120_000, 160_000),
            warmup_steps=500,
        ),
        data="COCO 2017",
        source="VoVNet-Detectron, README",
        expected=expected,
        needs_weights=True,
        one_gpu_batch=2,
        notes=(*_V1_NOTES, weights_note, *([_DEEP_NOTE] if blocks else [])),
    )


def _detectron2(detector: str, size: str, expected: Mapping[str, float]) -> Recipe:
    """A row of vovnet-detectron2's README."""
    backbone = f"ese_vovnet{size}_d2"
    return Recipe(
        name=f"{detector}_ese_vovnet{size}_3x",
        config=_config(
            f"{detector}_{backbone}",
            {"norm": "frozen_bn"},
            short_sides=_SHORT_SIDES_3X,
            max_steps=270_000,
            drop_steps=(210_000, 250_000),
            warmup_steps=1000,
        ),
        data="COCO 2017",
        source="vovnet-detectron2, README",
        expected=expected,
        needs_weights=True,
        one_gpu_batch=2,
        notes=(*_V2_NOTES, free_weights_note(detector, backbone)),
    )


RECIPES = (
    _scratch(39, 41.7, 36.8),
    _scratch(57, 41.9, 37.0),
    _detectron("faster_rcnn", 39, {"box AP": 39.8}),
    _detectron("faster_rcnn", 57, {"box AP": 40.8}),
    _detectron("faster_rcnn", 75, {"box AP": 41.2}),
    _detectron("faster_rcnn", 93, {"box AP": 41.8}),
    _detectron("mask_rcnn", 39, {"box AP": 41.0, "mask AP": 36.7}),
    _detectron("mask_rcnn", 57, {"box AP": 42.0, "mask AP": 37.5}),
    _detectron("mask_rcnn", 75, {"box AP": 42.4, "mask AP": 37.7}),
    _detectron("mask_rcnn", 93, {"box AP": 42.7, "mask AP": 38.0}),
    _detectron2("faster_rcnn_lite", "19_slim_dw", {"box AP": 32.4}),
    _detectron2("faster_rcnn_lite", "19_slim", {"box AP": 35.2}),
    _detectron2("faster_rcnn_lite", "19_dw", {"box AP": 36.7}),
    _detectron2("faster_rcnn_lite", "19", {"box AP": 38.9}),
    _detectron2("faster_rcnn", "19", {"box AP": 38.9}),
    _detectron2("faster_rcnn", "39", {"box AP": 42.7}),
    _detectron2("faster_rcnn", "57", {"box AP": 43.3}),
    _detectron2("faster_rcnn", "99", {"box AP": 44.1}),
    _detectron2("mask_rcnn_lite", "19", {"box AP": 39.7, "mask AP": 36.4}),
    _detectron2("mask_rcnn", "19", {"box AP": 40.1, "mask AP": 36.6}),
    _detectron2("mask_rcnn", "39", {"box AP": 43.8, "mask AP": 39.3}),
    _detectron2("mask_rcnn", "57", {"box AP": 44.2, "mask AP": 39.7}),
    _detectron2("mask_rcnn", "99", {"box AP": 44.9, "mask AP": 40.3}),
)
