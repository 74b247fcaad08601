"""RefineDet320 and RefineDet512: table 4 of the VoVNet paper, and the authors' other scripts.

Command: torchrun --nproc-per-node 8 -m vovnet train --recipe refinedet320_vovnet39_coco --data DIR
--backbone-weights FILE
"""

from dataclasses import dataclass

from vovnet.data.preset import SSD_PRESET
from vovnet.training.config import Recipe
from vovnet.training.recipe import sgd_config


@dataclass(frozen=True, slots=True)
class _Schedule:
    """A script of VoVNet-RefineDet; the learning rate is 0.001 in all of them."""

    side: int  # pixels
    batch_size: int
    max_steps: int
    drop_steps: tuple[int, int]


@dataclass(frozen=True, slots=True)
class _Data:
    title: str
    train_split: str
    val_split: str
    weight_decay: float
    arm_iou: tuple[float, float]  # of positives, of negatives
    eval_every_epochs: int
    figure_note: str


_DATA = {
    "coco": _Data(
        "COCO 2017",
        "train",
        "val",
        5e-4,
        (0.5, 0.5),
        12,
        "The paper measures on test-dev, training here on val2017.",
    ),
    "voc": _Data(
        "VOC 2007+2012 trainval, 2007 test",
        "trainval",
        "test",
        1e-4,
        (0.7, 0.3),
        20,
        "Training reports COCO's AP; the paper's kind: vovnet val --split test --metric voc07.",
    ),
}
_SCHEDULES = {
    "coco": (
        _Schedule(320, 32, 400_000, (280_000, 360_000)),
        _Schedule(512, 20, 540_000, (400_000, 480_000)),
    ),
    "voc": (
        _Schedule(320, 32, 120_000, (80_000, 100_000)),
        _Schedule(512, 20, 180_000, (130_000, 160_000)),
    ),
}
_EXPECTED = {
    "refinedet320_vovnet39_coco": {"box AP (test-dev)": 33.5},
    "refinedet320_vovnet57_coco": {"box AP (test-dev)": 33.9},
}
_NOTES = (
    "Whether the source's BatchNorm was frozen in the backbone is unknown; here none is. Its "
    "processes have 8 images (5 at 512 pixels), ours share the step.",
)
_OTHER_DEPTH = "Of this depth no script is published: the settings are those of VoVNet-39."


def _recipe(depth: int, data_name: str, schedule: _Schedule) -> Recipe:
    name = f"refinedet{schedule.side}_vovnet{depth}_{data_name}"
    data = _DATA[data_name]
    positive, negative = data.arm_iou
    config = sgd_config(
        model=f"refinedet_vovnet{depth}_paper",
        model_overrides={
            "arm_positive_iou": positive,
            "arm_negative_iou": negative,
            "max_detections": 500,
        },
        preprocess={"square": schedule.side},
        augment={**SSD_PRESET, "output_size": (schedule.side, schedule.side)},
        batch_size=schedule.batch_size,
        max_steps=schedule.max_steps,
        drop_steps=schedule.drop_steps,
        learning_rate=1e-3,
        weight_decay=data.weight_decay,
        warmup_steps=0,
        eval_every_epochs=data.eval_every_epochs,
        train_split=data.train_split,
        val_split=data.val_split,
    )
    weights = (
        "The source starts from its authors' Caffe weights. No published weights fit the paper's "
        f"stem: train some with --recipe paper --model vovnet{depth}_paper."
    )
    other = (_OTHER_DEPTH,) if depth != 39 else ()
    return Recipe(
        name=name,
        config=config,
        data=data.title,
        source="VoVNet paper, table 4; VoVNet-RefineDet's scripts",
        expected=_EXPECTED.get(name, {}),
        needs_weights=True,
        one_gpu_batch=schedule.batch_size,
        notes=(data.figure_note, *_NOTES, weights, *other),
    )


RECIPES = tuple(
    _recipe(depth, data_name, schedule)
    for data_name, schedules in _SCHEDULES.items()
    for schedule in schedules
    for depth in (39, 57)
)
