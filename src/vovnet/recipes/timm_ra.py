"""ImageNet in the manner of timm's RandAugment recipes: long, strongly augmented, averaged.

Command: torchrun --nproc-per-node 8 -m vovnet train --recipe timm_ra --data DIR
"""

from vovnet.training.config import TrainConfig


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
