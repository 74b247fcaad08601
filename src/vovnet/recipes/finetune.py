"""Fine-tuning a classifier on one's own folder of pictures, from published or own weights.

Command: vovnet train --recipe finetune --pretrained --data DIR
"""

from vovnet.training.config import OWN_SOURCE, Recipe, TrainConfig


def config() -> TrainConfig:
    """Settings for a few hundred to some ten thousand pictures: low rates, early stopping."""
    return TrainConfig(
        task="classify",
        model="ese_vovnet19b_dw",
        augment={
            "image_size": 224,
            "scale": (0.35, 1.0),
            "interpolation": "random",
            "brightness": 0.2,
            "contrast": 0.2,
            "saturation": 0.2,
            "label_smoothing": 0.1,
        },
        batch_size=32,
        epochs=20,
        optimizer="adamw",
        learning_rate=3e-4,
        weight_decay=0.05,
        warmup_fraction=0.1,
        clip_norm=1.0,
        ema_decay=0.998,
        drop_rate=0.1,
        patience=8,
        name="finetune",
    )


RECIPES = (
    Recipe(
        name="finetune",
        config=config(),
        data="own pictures, a folder for each class",
        source=OWN_SOURCE,
        needs_weights=True,
    ),
)
