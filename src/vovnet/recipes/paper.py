"""ImageNet as the released VoVNet code trains it: 90 epochs of SGD, the rate falling in steps.

Command: torchrun --nproc-per-node 8 -m vovnet train --recipe paper --data DIR
"""

from vovnet.training.config import Recipe, TrainConfig


def config() -> TrainConfig:
    """Batch 256 at a rate of 0.1, a tenth of it from epoch 30 and again from 60; test 256 to 224.

    From VoVNet.pytorch's training script; the paper itself names no settings.
    """
    return TrainConfig(
        task="classify",
        model="vovnet39",
        augment={"image_size": 224},
        preprocess={"interpolation": "bilinear"},
        batch_size=256,
        epochs=90,
        optimizer="sgd",
        learning_rate=0.1,
        momentum=0.9,
        weight_decay=1e-4,
        warmup_steps=0,
        drops_at=[1 / 3, 2 / 3],
        clip_norm=None,
        ema_decay=0.0,
        name="paper",
    )


RECIPES = (
    Recipe(
        name="paper",
        config=config(),
        data="ImageNet-1k",
        source="VoVNet.pytorch, main.py and README",
        expected={"top-1": 76.77, "top-5": 93.43},
        one_gpu_batch=32,
        notes=(
            "The README says 128 images in a step where the script's default is 256.",
            "For VoVNet-57, --model vovnet57: top-1 77.73, top-5 93.72.",
        ),
    ),
)
