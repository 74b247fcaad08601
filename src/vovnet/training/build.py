"""The network that a training's settings stand for, and the preprocess of its weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vovnet.errors import ConfigError
from vovnet.model_folder import CONFIG_FILE, load_config, resolve_model
from vovnet.model_folder import load_tensors as load_arrays
from vovnet.models.vovnet import VoVNet
from vovnet.models.weights import fetch_published, load_backbone, load_tensors, read_backbone
from vovnet.models.zoo import create_model, split_name, task_of
from vovnet.preprocess import Preprocess
from vovnet.published import PUBLISHED
from vovnet.training.config import TrainConfig, check_task

_CLASS_LAYERS = (
    "head.fc",
    ".logits",
    ".logits.conv",
    ".logits.bn",
    "box_head.deltas",
    "mask_head.predictor",
    "mask_iou_head.iou",
)


def preprocess_fields(config: TrainConfig) -> dict[str, object]:
    """The fields of Preprocess, mean and std those of the backbone's weights."""
    values: dict[str, object] = Preprocess().to_dict()
    _, backbone = split_name(config.model)
    if config.backbone_weights == "hub" and backbone in PUBLISHED:
        published = PUBLISHED[backbone]
        values["mean"] = [round(255 * value, 3) for value in published.mean]
        values["std"] = [round(255 * value, 3) for value in published.std]
    elif config.backbone_weights and (Path(config.backbone_weights) / CONFIG_FILE).is_file():
        of_folder = load_config(Path(config.backbone_weights)).preprocess
        values |= {name: of_folder[name] for name in ("mean", "std") if name in of_folder}
    return values


def build_model(config: TrainConfig, class_names: Sequence[str], *, notes: list[str]) -> nn.Module:
    """The network, its weights random but those that the config names; what was loaded is noted."""
    if config.model_overrides.get("norm") == "frozen_bn" and config.backbone_weights is None:
        raise ConfigError(
            "model_overrides.norm: expected bn or gn for a backbone without loaded weights "
            "(--backbone-weights), found 'frozen_bn'"
        )
    if config.freeze and config.backbone_weights is None and config.init is None:
        raise ConfigError(
            "freeze: expected weights to keep (--pretrained, --backbone-weights or --init), "
            f"found random ones to freeze {config.freeze} parts of"
        )
    model = create_model(
        config.model,
        num_classes=len(class_names),
        drop_path_rate=config.drop_path_rate,
        drop_rate=config.drop_rate,
        overrides=model_overrides(config),
    )
    if config.backbone_weights is not None:
        _, backbone = split_name(config.model)
        if config.backbone_weights == "hub":
            tensors = fetch_published(backbone)
        else:
            tensors = read_backbone(Path(config.backbone_weights), name=backbone)
        where = f"backbone_weights {config.backbone_weights}"
        load_backbone(backbone_of(model), tensors, where=where)
        own = {name for name in backbone_of(model).state_dict() if not name.startswith("head.")}
        notes.append(f"{where}: {len(own & tensors.keys())} tensors loaded")
    if config.init is not None:
        _load_trained(model, config.init, config.model, class_names, notes=notes)
    return model


def checked_task(config: TrainConfig) -> str:
    """What a training is for: what its model does, or pretrain.

    Raises ConfigError on a detector to pretrain, on another task than the config's, and on settings
    without use for it.
    """
    kind, backbone = split_name(config.model)
    task = "pretrain" if config.task == "pretrain" else task_of(config.model)
    if task == "pretrain" and kind is not None:
        raise ConfigError(
            f"model: expected a backbone to pretrain, got the detector {config.model}; its "
            f"backbone is {backbone}"
        )
    check_task(config, task)
    return task


def backbone_of(model: nn.Module) -> VoVNet:
    """The VoVNet in a model, which a classifier is itself."""
    backbone = model if isinstance(model, VoVNet) else model.get_submodule("backbone")
    assert isinstance(backbone, VoVNet)
    return backbone


def frozen_parts(model: nn.Module, count: int) -> list[nn.Module]:
    """The first `count` parts of a model's backbone: the stem and the stages after it."""
    backbone = backbone_of(model)
    return [backbone.stem, *backbone.stages][:count]


def _load_trained(
    model: nn.Module,
    folder_or_name: str,
    architecture: str,
    class_names: Sequence[str],
    *,
    notes: list[str],
) -> None:
    """Loads a model folder's weights; layers of other classes keep their random ones."""
    folder = resolve_model(folder_or_name)
    trained = load_config(folder)
    same_classes = trained.class_names == list(class_names)
    tensors = {name: torch.from_numpy(value) for name, value in load_arrays(folder).items()}
    others = {
        name: own
        for name, own in model.state_dict().items()
        if name.rpartition(".")[0].endswith(_CLASS_LAYERS) and name in tensors and not same_classes
    }
    try:
        load_tensors(model, tensors | others, where=f"init {folder}")
    except ConfigError as error:
        if trained.architecture == architecture:
            raise
        hint = "" if trained.class_names else "; a backbone goes to --backbone-weights"
        raise ConfigError(
            f"init {folder}: expected the weights of {architecture}, found those of "
            f"{trained.architecture}{hint}"
        ) from error
    random = f", {len(others)} of other classes left random" if others else ""
    notes.append(f"init {folder}: {len(tensors) - len(others)} tensors loaded{random}")


def model_overrides(config: TrainConfig) -> dict[str, Any]:
    """What the model's settings are, beside the number of classes."""
    if task_of(config.model) == "classify":
        return config.model_overrides
    return {"max_detections": config.max_detections} | config.model_overrides
