"""VovDet: for a small data set on one machine, and for COCO on 8 GPUs.

Command: vovnet train --recipe vovdet --data DIR
Command: torchrun --nproc-per-node 8 -m vovnet train --recipe vovdet_s_coco --data DIR
"""

from vovnet.training.config import OWN_SOURCE, Recipe, TrainConfig

_COLOURS = {"brightness": 0.2, "contrast": 0.2, "saturation": 0.3, "hue": 0.015}


def config() -> TrainConfig:
    """Settings for some hundred to some thousand pictures: the smallest network, pictures that grow
    from half their size, mosaic for the first three quarters, another size in each step.
    """
    return TrainConfig(
        model="vovdet_n",
        preprocess={"short_side": 384, "max_long_side": 640},
        augment={
            "output_size": (384, 384),
            "scale_range": (0.6, 1.5),
            "output_scale_range": (0.75, 1.25),
            "first_scale": 0.5,
            "horizontal_flip": 0.5,
            "mosaic": 0.5,
            "mixed_until": 0.75,
            **_COLOURS,
        },
        batch_size=8,
        epochs=100,
        optimizer="adamw",
        learning_rate=1e-3,
        weight_decay=0.05,
        warmup_fraction=0.03,
        clip_norm=10.0,
        ema_decay=0.998,
        eval_every_epochs=5,
        name="vovdet",
    )


def coco_config(model: str) -> TrainConfig:
    """Settings for COCO, 300 epochs from scratch; objects are pasted where the model has masks."""
    return TrainConfig(
        model=model,
        preprocess={"short_side": 640, "max_long_side": 640},
        augment={
            "output_size": (640, 640),
            "scale_range": (0.5, 1.5),
            "output_scale_range": (0.75, 1.25),
            "horizontal_flip": 0.5,
            "mosaic": 1.0,
            "mixup": 0.1,
            "copy_paste": 0.1 if model.endswith("_seg") else 0.0,
            "mixed_until": 0.93,
            **_COLOURS,
        },
        batch_size=64,
        epochs=300,
        optimizer="adamw",
        learning_rate=1e-3,
        weight_decay=0.05,
        warmup_steps=2000,
        clip_norm=10.0,
        ema_decay=0.9998,
        eval_every_epochs=10,
        workers=8,
        name=f"{model}_coco",
    )


def _coco_recipe(model: str) -> Recipe:
    return Recipe(
        name=f"{model}_coco",
        config=coco_config(model),
        data="COCO 2017",
        source="this project; never trained",
        one_gpu_batch=16,
        notes=("No figure is known of it.",),
    )


RECIPES = (
    Recipe(
        name="vovdet",
        config=config(),
        data="own pictures with boxes",
        source=OWN_SOURCE,
        notes=(
            "--model vovdet_s, vovdet_m or vovdet_l for more accuracy and cost, vovdet_n_seg and "
            "the like for masks.",
        ),
    ),
    *(_coco_recipe(f"vovdet_{size}{suffix}") for suffix in ("", "_seg") for size in "nsml"),
)
