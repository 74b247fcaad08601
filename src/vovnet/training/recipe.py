"""What recipes share: the plain SGD of the papers' trainings, and the commands that run them."""

import math
from collections.abc import Mapping, Sequence

from vovnet.published import PUBLISHED
from vovnet.training.config import Recipe, TrainConfig

_NEAR = {"ese_vovnet39_d2": "ese_vovnet39b", "ese_vovnet57_d2": "ese_vovnet57b"}


def sgd_config(
    *,
    model: str,
    model_overrides: Mapping[str, object],
    preprocess: Mapping[str, object],
    augment: Mapping[str, object],
    batch_size: int,
    max_steps: int,
    drop_steps: Sequence[int],
    learning_rate: float,
    weight_decay: float,
    warmup_steps: int,
    eval_every_epochs: int,
    train_split: str = "train",
    val_split: str = "val",
) -> TrainConfig:
    """A detector's training by SGD with a momentum of 0.9, its rate a tenth after each drop step.

    As the papers' programs do it: float32, no clipped gradients, no averaged weights.
    """
    return TrainConfig(
        model=model,
        model_overrides=dict(model_overrides),
        preprocess=dict(preprocess),
        augment=dict(augment),
        train_split=train_split,
        val_split=val_split,
        batch_size=batch_size,
        max_steps=max_steps,
        drops_at=[step / max_steps for step in drop_steps],
        optimizer="sgd",
        momentum=0.9,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        warmup_steps=warmup_steps,
        clip_norm=None,
        ema_decay=0.0,
        precision="fp32",
        eval_every_epochs=eval_every_epochs,
    )


def free_weights_note(detector: str, backbone: str) -> str:
    """Which free ImageNet weights a backbone of vovnet-detectron2 can start from."""
    plain = backbone.replace("_dcn", "")
    if plain == "ese_vovnet19_dw_d2":
        return "timm's ese_vovnet19b_dw.ra_in1k (Apache-2.0) fits: give its model.safetensors."
    if plain in _NEAR:
        deformable = " --set 'model_overrides={deformable_stages: [3, 4, 5]}'"
        return (
            "The nearest free weights are timm's (Apache-2.0), of a network with eSE in the last "
            f"block of a stage alone: --model {detector}_{_NEAR[plain]} --pretrained"
            f"{deformable if plain != backbone else ''}."
        )
    return f"No free weights fit: train some with --recipe timm_ra --model {plain}."


def command(recipe: Recipe) -> str:
    """The command for the 8 GPUs of one machine, 4 where 8 cannot share the images of a step; for
    one device where the recipe is for one.
    """
    if recipe.one_gpu_batch is None:
        return _train(recipe)
    processes = math.gcd(8, recipe.config.batch_size)
    return f"torchrun --nproc-per-node {processes} -m {_train(recipe)}"


def one_gpu_command(recipe: Recipe) -> str:
    """The command for one GPU, scaled as `one_gpu_settings` says."""
    options = {"batch_size": "--batch-size ", "learning_rate": "--learning-rate "}
    scaled = [
        f"{options.get(name, f'--set {name}=')}{value}"
        for name, value in one_gpu_settings(recipe).items()
    ]
    return " ".join([_train(recipe), *scaled])


def _train(recipe: Recipe) -> str:
    return f"vovnet train --recipe {recipe.name} --data DIR{_weights(recipe)}"


def _weights(recipe: Recipe) -> str:
    if not recipe.needs_weights:
        return ""
    return " --pretrained" if recipe.config.model in PUBLISHED else " --backbone-weights FILE"


def blanks(recipe: Recipe) -> str:
    """What a user puts in place of the capitals in a recipe's commands, in one line."""
    weights = "; FILE: ImageNet weights of its backbone" if " FILE" in _weights(recipe) else ""
    return f"DIR: your data set{weights}"


def one_gpu_settings(recipe: Recipe) -> dict[str, float]:
    """What changes with smaller steps, by the linear rule: the learning rate by the same factor,
    the numbers of steps by its inverse. A length in epochs stays. Goyal et al. 2017, section 2.1.
    """
    config, batch_size = recipe.config, recipe.one_gpu_batch
    if batch_size is None or batch_size >= config.batch_size:
        return {}
    factor = batch_size / config.batch_size
    settings = {
        "batch_size": batch_size,
        "learning_rate": float(f"{config.learning_rate * factor:.6g}"),
    }
    for name in ("max_steps", "warmup_steps"):
        steps = getattr(config, name)
        if steps:
            settings[name] = math.ceil(steps / factor)
    return settings
