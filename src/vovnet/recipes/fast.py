"""A classifier from scratch in little time: crops that grow from small to large (progressive
resizing), one cycle of the learning rate, averaged weights.

Command: vovnet train --task classify --recipe fast --data DIR --max-minutes 10
"""

from vovnet.training.config import OWN_SOURCE, Recipe, TrainConfig


def config() -> TrainConfig:
    """Settings for a few thousand pictures on a CPU, or as the start of one's own."""
    return TrainConfig(
        task="classify",
        model="ese_vovnet19b_slim",
        augment={
            "image_size": 64,
            "first_image_size": 32,
            "full_size_from": 0.7,
            "scale": (0.35, 1.0),
            "brightness": 0.2,
            "contrast": 0.2,
            "saturation": 0.2,
            "label_smoothing": 0.1,
        },
        batch_size=32,
        epochs=20,
        optimizer="adamw",
        learning_rate=2e-3,
        weight_decay=0.05,
        warmup_fraction=0.05,
        clip_norm=10.0,
        ema_decay=0.99,
        class_balance="none",
        name="fast",
    )


RECIPES = (
    Recipe(
        name="fast",
        config=config(),
        data="own pictures, a folder for each class",
        source=OWN_SOURCE,
    ),
)
