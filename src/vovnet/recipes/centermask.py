"""CenterMask on VoVNetV2: the tables of the authors' repositories centermask2 (3x, 4x) and
CenterMask (24, 36 and 48 epochs).

Command: torchrun --nproc-per-node 8 -m vovnet train --recipe centermask_ese_vovnet39_3x --data DIR
--backbone-weights FILE
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vovnet.training.config import Recipe
from vovnet.training.recipe import free_weights_note, sgd_config


@dataclass(frozen=True, slots=True)
class _Source:
    """What all configurations of a repository share."""

    title: str
    short_sides: Sequence[int]
    lite_short_sides: Sequence[int]
    warmup_steps: int
    model_overrides: Mapping[str, object]
    notes: tuple[str, ...]


_CENTERMASK2 = _Source(
    title="centermask2, README",
    short_sides=tuple(range(640, 801, 32)),
    lite_short_sides=(580, 600),
    warmup_steps=1000,
    model_overrides={"norm": "frozen_bn", "max_detections": 50},
    notes=(
        "Momentum, warm-up and test size are detectron2's defaults, which its repository does not "
        "change; detectron2 decays biases too, here they are not.",
        "The source starts from its authors' ImageNet weights (CC-BY-NC-4.0).",
    ),
)
_CENTERMASK1 = _Source(
    title="CenterMask, README and configurations",
    short_sides=tuple(range(640, 801)),
    lite_short_sides=tuple(range(580, 601)),
    warmup_steps=500,
    model_overrides={"norm": "frozen_bn", "score_threshold": 0.03},
    notes=(
        "Its repository trains on COCO 2014's train and valminusminival, and tests on minival: the "
        "pictures of 2017's train and val.",
        "For the warm-up's 500 steps the rate is a third there; here it rises. Biases have twice "
        "the learning rate there.",
        "The source starts from its authors' ImageNet weights, which have no free licence.",
    ),
)
_STEPS = {
    "24e": (180_000, (120_000, 160_000)),
    "36e": (270_000, (210_000, 250_000)),
    "48e": (360_000, (300_000, 340_000)),
    "3x": (270_000, (210_000, 250_000)),
    "4x": (360_000, (300_000, 340_000)),
}
_ROW_NOTES = {
    "centermask_ese_vovnet19_36e": (
        "The source predicts no mask IoU with this backbone; here it is predicted."
    ),
    "centermask_ese_vovnet99_36e": "On test-dev: 45.8 box AP, 40.6 mask AP.",
    "centermask_lite_ese_vovnet19_48e": "Of which split of COCO the figures are is unknown here.",
    "centermask_lite_ese_vovnet39_48e": "Of which split of COCO the figures are is unknown here.",
}


def _recipe(
    source: _Source, detector: str, size: str, length: str, mask_ap: float, box_ap: float
) -> Recipe:
    """A row of a README."""
    lite = detector.endswith("lite")
    backbone = f"ese_vovnet{size}_d2"
    max_steps, drop_steps = _STEPS[length]
    name = f"{detector}_ese_vovnet{size}_{length}"
    row_notes = (_ROW_NOTES[name],) if name in _ROW_NOTES else ()
    return Recipe(
        name=name,
        config=sgd_config(
            model=f"{detector}_{backbone}",
            model_overrides=source.model_overrides,
            preprocess={
                "short_side": 600 if lite else 800,
                "max_long_side": 1000 if lite else 1333,
            },
            augment={
                "geometry": "whole",
                "short_sides": source.lite_short_sides if lite else source.short_sides,
                "horizontal_flip": 0.5,
            },
            batch_size=16,
            max_steps=max_steps,
            drop_steps=drop_steps,
            learning_rate=0.01,
            weight_decay=1e-4,
            warmup_steps=source.warmup_steps,
            eval_every_epochs=12,
        ),
        data="COCO 2017",
        source=source.title,
        expected={"box AP": box_ap, "mask AP": mask_ap},
        needs_weights=True,
        one_gpu_batch=2,
        notes=(*source.notes, free_weights_note(detector, backbone), *row_notes),
    )


RECIPES = (
    _recipe(_CENTERMASK2, "centermask", "39", "3x", 39.7, 44.2),
    _recipe(_CENTERMASK2, "centermask", "57", "3x", 40.5, 45.1),
    _recipe(_CENTERMASK2, "centermask", "99", "3x", 41.4, 46.0),
    _recipe(_CENTERMASK2, "centermask", "39_dcn", "3x", 40.3, 45.1),
    _recipe(_CENTERMASK2, "centermask", "57_dcn", "3x", 40.9, 45.5),
    _recipe(_CENTERMASK2, "centermask", "99_dcn", "3x", 42.0, 46.9),
    _recipe(_CENTERMASK2, "centermask_lite", "19_slim_dw", "4x", 27.1, 29.5),
    _recipe(_CENTERMASK2, "centermask_lite", "19_slim", "4x", 29.8, 32.5),
    _recipe(_CENTERMASK2, "centermask_lite", "19", "4x", 32.8, 35.9),
    _recipe(_CENTERMASK2, "centermask_lite", "39", "4x", 36.7, 40.9),
    _recipe(_CENTERMASK1, "centermask", "19", "36e", 34.7, 39.7),
    _recipe(_CENTERMASK1, "centermask", "39", "24e", 37.7, 42.6),
    _recipe(_CENTERMASK1, "centermask", "39", "36e", 38.5, 43.5),
    _recipe(_CENTERMASK1, "centermask", "57", "24e", 38.5, 43.8),
    _recipe(_CENTERMASK1, "centermask", "57", "36e", 39.4, 44.6),
    _recipe(_CENTERMASK1, "centermask", "99", "24e", 39.6, 44.8),
    _recipe(_CENTERMASK1, "centermask", "99", "36e", 40.2, 45.6),
    _recipe(_CENTERMASK1, "centermask_lite", "19", "48e", 32.4, 35.9),
    _recipe(_CENTERMASK1, "centermask_lite", "39", "48e", 36.3, 40.7),
)
