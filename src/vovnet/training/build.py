"""What a training's settings stand for: data, preprocess, augmentation, the network, the device."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from vovnet.data.check import describe, load_checked
from vovnet.data.coco import find_split
from vovnet.data.labels import DetectionData, has_masks
from vovnet.errors import ConfigError, DataError
from vovnet.evaluation import IouType
from vovnet.model_folder import CONFIG_FILE, load_config, resolve_model
from vovnet.model_folder import load_tensors as load_arrays
from vovnet.models.weights import (
    PUBLISHED,
    fetch_published,
    load_backbone,
    load_tensors,
    read_backbone,
)
from vovnet.models.zoo import create_model, split_name, task_of
from vovnet.preprocess import Preprocess
from vovnet.training.config import TrainConfig

_CLASS_LAYERS = ("head.logits", "box_head.deltas", "mask_head.predictor", "mask_iou_head.iou")


def load_splits(
    config: TrainConfig, *, skip_bad: bool
) -> tuple[DetectionData, DetectionData, list[str]]:
    """The data to train and to evaluate on, and what was left out under `skip_bad`, one line each.

    Raises DataError naming what is bad, on an empty split, and on splits of different classes.
    """
    assert config.data is not None
    loaded: list[DetectionData] = []
    skipped: list[str] = []
    for split in (config.train_split, config.val_split):
        annotation_file, image_dir = find_split(Path(config.data), split)
        data, found = load_checked(annotation_file, image_dir, skip_bad=skip_bad)
        skipped += [f"{annotation_file}: {describe(problem)}" for problem in found.problems]
        loaded.append(data)
    train, val = loaded
    if train.class_names != val.class_names:
        raise DataError(
            f"{val.annotation_file}: expected the classes of {train.annotation_file}, "
            f"{', '.join(train.class_names)}; found {', '.join(val.class_names)}"
        )
    return train, val, skipped


def build_preprocess(config: TrainConfig) -> Preprocess:
    """The evaluation's preprocess; mean and std of the backbone's weights unless stated."""
    values: dict[str, object] = Preprocess().to_dict()
    _, backbone = split_name(config.model)
    if config.backbone_weights == "hub" and backbone in PUBLISHED:
        published = PUBLISHED[backbone]
        values["mean"] = [round(255 * value, 3) for value in published.mean]
        values["std"] = [round(255 * value, 3) for value in published.std]
    elif config.backbone_weights and (Path(config.backbone_weights) / CONFIG_FILE).is_file():
        of_folder = load_config(Path(config.backbone_weights)).preprocess
        values |= {name: of_folder[name] for name in ("mean", "std") if name in of_folder}
    return Preprocess.from_dict(values | config.preprocess)


def build_detector(config: TrainConfig, num_classes: int) -> nn.Module:
    """The detector, its weights random but those of the backbone where the config names some."""
    overrides = model_overrides(config)
    if task_of(config.model) == "classify":
        raise ConfigError(f"model: expected a detector or segmenter, found {config.model!r}")
    if overrides.get("norm") == "frozen_bn" and config.backbone_weights is None:
        raise ConfigError(
            "model_overrides.norm: expected bn or gn for a backbone without loaded weights "
            "(--backbone-weights), found 'frozen_bn'"
        )
    detector = create_model(config.model, num_classes=num_classes, overrides=overrides)
    if config.backbone_weights is not None:
        _, backbone = split_name(config.model)
        if config.backbone_weights == "hub":
            tensors = fetch_published(backbone)
        else:
            tensors = read_backbone(Path(config.backbone_weights), name=backbone)
        module: nn.Module = detector.get_submodule("backbone")
        load_backbone(module, tensors, where=f"backbone_weights {config.backbone_weights}")
    if config.init is not None:
        _load_trained(detector, config.init)
    return detector


def _load_trained(detector: nn.Module, folder_or_name: str) -> None:
    """Loads a model folder's weights; layers of other classes keep their random ones."""
    folder = resolve_model(folder_or_name)
    tensors = {name: torch.from_numpy(value) for name, value in load_arrays(folder).items()}
    for name, own in detector.state_dict().items():
        per_class = name.rpartition(".")[0].endswith(_CLASS_LAYERS)
        if per_class and name in tensors and tensors[name].shape != own.shape:
            tensors[name] = own
    load_tensors(detector, tensors, where=f"init {folder}")


def model_overrides(config: TrainConfig) -> dict[str, Any]:
    """What the model's settings are, beside the number of classes."""
    return {"max_detections": config.max_detections} | config.model_overrides


def iou_types_of(config: TrainConfig, data: DetectionData) -> tuple[IouType, ...]:
    """The overlaps that can be evaluated: of masks too where the model and the data have them."""
    with_masks = task_of(config.model) == "segment" and has_masks(data)
    return ("bbox", "segm") if with_masks else ("bbox",)
