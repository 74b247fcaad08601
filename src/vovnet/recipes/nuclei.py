"""Nuclei in microscopy images, from scratch on a CPU: CenterMask-Lite, and VovDet.

Commands: vovnet train --recipe nuclei --data DIR
          vovnet train --recipe nuclei_fast --data DIR
"""

from vovnet.training.config import OWN_SOURCE, Recipe, TrainConfig


def config() -> TrainConfig:
    """Settings for many small objects of one class: images enlarged 1.5 times, 500 detections.

    Small crops, few masks for each and many steps: on a CPU that gave the most AP for the time.
    """
    return TrainConfig(
        model="centermask_lite_ese_vovnet19b_slim",
        model_overrides={
            "max_detections": 500,
            "pre_nms_top_k": 2000,
            "mask_iou_width": 256,
            "mask_rois_per_image": 6,
        },
        preprocess={"scale": 1.5, "max_long_side": 2048},
        augment={
            "output_size": (192, 192),
            "scale_range": (0.7, 1.4),
            "horizontal_flip": 0.5,
            "vertical_flip": 0.5,
            "quarter_turn": 0.5,
            "brightness": 0.2,
            "contrast": 0.2,
            "saturation": 0.2,
            "grayscale": 0.1,
            "invert": 0.1,
        },
        batch_size=4,
        epochs=13,
        optimizer="adamw",
        learning_rate=1e-3,
        weight_decay=0.05,
        warmup_steps=50,
        clip_norm=10.0,
        ema_decay=0.996,
        eval_every_epochs=4,
        max_detections=500,
        export_half=True,
        name="nuclei",
    )


def fast_config() -> TrainConfig:
    """The same pictures for VovDet, in crops that grow from half their side: more steps."""
    base = config()
    crops = {"output_size": (256, 256), "first_scale": 0.5, "saturation": 0.3, "hue": 0.015}
    return base.model_copy(
        update={
            "model": "vovdet_n_seg",
            "model_overrides": {"max_detections": 500, "pre_nms_top_k": 2000},
            "augment": base.augment | crops,
            "epochs": 48,
            "warmup_steps": None,
            "warmup_fraction": 0.05,
            "eval_every_epochs": 8,
            "name": "nuclei_fast",
        }
    )


RECIPES = (
    Recipe(
        name="nuclei",
        config=config(),
        data="nuclei in microscopy images",
        source=OWN_SOURCE,
        notes=("The run behind the bundled model nuclei.",),
    ),
    Recipe(
        name="nuclei_fast",
        config=fast_config(),
        data="nuclei in microscopy images",
        source=OWN_SOURCE,
        notes=("The run behind the bundled model nuclei_fast.",),
    ),
)
