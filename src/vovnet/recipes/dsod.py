"""DSOD300 from scratch on Pascal VOC: table 2 of the VoVNet paper.

Command: torchrun --nproc-per-node 8 -m vovnet train --recipe dsod300_vovnet27_slim_voc --data DIR
"""

from vovnet.data.preset import SSD_PRESET
from vovnet.training.config import Recipe
from vovnet.training.recipe import sgd_config

RECIPES = (
    Recipe(
        name="dsod300_vovnet27_slim_voc",
        config=sgd_config(
            model="dsod_vovnet27_slim_paper",
            model_overrides={"max_detections": 200},
            preprocess={"square": 300},
            augment={**SSD_PRESET, "output_size": (300, 300)},
            batch_size=128,
            max_steps=100_000,
            drop_steps=(20_000, 40_000, 60_000, 80_000),
            learning_rate=0.1,
            weight_decay=5e-4,
            warmup_steps=0,
            eval_every_epochs=50,
            train_split="trainval",
            val_split="test",
        ),
        data="VOC 2007+2012 trainval, 2007 test",
        source="VoVNet paper, table 2; schedule: szq0214/DSOD",
        expected={"VOC07 mAP": 74.8},
        one_gpu_batch=32,
        notes=(
            "The schedule is DSOD's own; whether the VoVNet authors changed it is unknown, and so "
            "is where they attached the backbone (see vovnet.models.dsod).",
            "The 128 images of a step are several smaller batches in the source, so BatchNorm's "
            "statistics are of fewer images there.",
            "Pixels are normalised by ImageNet's mean and std, the batches padded to 320 x 320.",
            "Training reports COCO's AP; the figure: vovnet val --split test --metric voc07.",
        ),
    ),
)
