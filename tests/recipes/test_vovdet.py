"""The recipes of VovDet train, shrunk, from the first picture to a model folder that predicts."""

import math
from pathlib import Path

import pytest

from vovnet.images import read_image
from vovnet.models.zoo import task_of
from vovnet.predict import Predictor
from vovnet.training.config import find_recipe, list_recipes, load_config
from vovnet.training.recipe import command, one_gpu_settings
from vovnet.training.run import train

SMALL = {
    "stem_channels": [16, 16, 16],
    "stage_conv_channels": [16, 16, 16, 16],
    "stage_out_channels": [32, 32, 32, 32],
    "neck_channels": 16,
}


def test_a_recipe_for_each_size_on_coco() -> None:
    found = {r.name: r for r in list_recipes() if r.name.startswith("vovdet_")}
    assert len(found) == 8
    for name, recipe in found.items():
        config = recipe.config
        assert name == f"{config.model}_coco"
        assert (config.augment["copy_paste"] > 0) == (task_of(config.model) == "segment")
        assert command(recipe).startswith("torchrun --nproc-per-node 8 ")
        assert one_gpu_settings(recipe) == {
            "batch_size": 16, "learning_rate": 2.5e-4, "warmup_steps": 8000,
        }  # fmt: skip
    assert command(find_recipe("vovdet")) == "vovnet train --recipe vovdet --data DIR"


@pytest.mark.parametrize("name", ["vovdet", "vovdet_n_seg_coco"])
def test_a_shrunk_training(name: str, data_dir: Path, tmp_path: Path) -> None:
    flags = {
        "data": str(data_dir),
        "model_overrides": SMALL,
        "preprocess": {"short_side": 64, "max_long_side": 96},
        "augment": {"output_size": [64, 64]},
        "batch_size": 2,
        "max_steps": 3,
        "workers": 0,
        "device": "cpu",
        "precision": "fp32",
        "runs_dir": str(tmp_path),
    }
    result = train(load_config(name, None, flags))
    assert result.metrics is not None
    assert not math.isnan(result.metrics.by_type["bbox"].ap)
    predictor = Predictor.load(result.run_dir / "model", engine="torch", score_threshold=0.0)
    found = predictor(read_image(data_dir / "images" / "1.png"))
    assert 0 < len(found) <= 100
