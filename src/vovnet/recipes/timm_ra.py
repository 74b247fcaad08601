"""ImageNet in the manner of timm's RandAugment recipes: long, strongly augmented, averaged.

Command: torchrun --nproc-per-node 8 -m vovnet train --recipe timm_ra --data DIR
"""

from vovnet.training.config import Recipe, TrainConfig


def config() -> TrainConfig:
    """SGD and half a cosine, RandAugment, mixup or cutmix, label smoothing, averaged weights.

    The arguments behind timm's ese_vovnet weights are not published; these are our choice of the
    parts that its cards name, run by timm's own RandAugment.
    """
    return TrainConfig(
        task="classify",
        model="ese_vovnet39b",
        augment={
            "image_size": 224,
            "interpolation": "random",
            "rand_augment": "rand-m9-mstd0.5-inc1",
            "erase": 0.2,
            "mixup": 0.1,
            "cutmix": 1.0,
            "label_smoothing": 0.1,
        },
        batch_size=1024,
        epochs=300,
        optimizer="sgd",
        nesterov=True,
        learning_rate=0.5,
        momentum=0.9,
        weight_decay=2e-5,
        warmup_fraction=0.0167,
        clip_norm=None,
        ema_decay=0.9998,
        drop_rate=0.2,
        drop_path_rate=0.1,
        name="timm_ra",
    )


RECIPES = (
    Recipe(
        name="timm_ra",
        config=config(),
        data="ImageNet-1k",
        source="cards of timm's ra_in1k weights; timm, results-imagenet.csv",
        expected={"top-1": 79.312, "top-5": 94.722},
        one_gpu_batch=128,
        notes=(
            "The figures are of timm's weights ese_vovnet39b.ra_in1k, whose exact settings are not "
            "published: these are our choice of the parts that the card names.",
        ),
    ),
)
