"""Training a detector or segmenter: its data, evaluation, and what is kept of it."""

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vovnet.data.augment import TrainBatch, TrainDataset, TrainItem, collate_train
from vovnet.data.check import describe
from vovnet.data.formats import load_split
from vovnet.data.labels import DetectionData, has_masks
from vovnet.data.preset import TrainPreset
from vovnet.errors import ConfigError, DataError
from vovnet.evaluation import IouType, Metrics, evaluate_coco, predict_images
from vovnet.model_folder import ModelConfig
from vovnet.models.deploy import DeployGraph
from vovnet.models.layers import Normalize
from vovnet.models.zoo import task_of
from vovnet.predict import Predictor
from vovnet.preprocess import Preprocess
from vovnet.runtime.torch import TorchEngine
from vovnet.training.build import build_model, model_overrides, preprocess_fields
from vovnet.training.checkpoint import Position
from vovnet.training.config import TrainConfig
from vovnet.training.detect_teacher import UNSURE, load_detector, teach
from vovnet.training.loop import StopSignals, check_time_left, epoch_order
from vovnet.training.package import provenance
from vovnet.training.step import DetectorStep, LossStep
from vovnet.training.task import ADVICE


class DetectorTask:
    """The training of a detector as `train` runs it; see its Task."""

    chooses_best = True
    advice = ADVICE

    def __init__(self, config: TrainConfig, *, skip_bad: bool, device: torch.device) -> None:
        self.config = config
        self.preprocess = Preprocess.from_dict(preprocess_fields(config) | config.preprocess)
        preset = TrainPreset.from_dict(config.augment)
        if config.image_size is not None:
            if preset.geometry == "whole":
                raise ConfigError(
                    "image_size: expected none where augment shows whole images; "
                    "augment.short_sides and preprocess say their size"
                )
            preset = replace(preset, output_size=(config.image_size, config.image_size))
        self.train_data, self.val_data, self.skipped = load_splits(config, skip_bad=skip_bad)
        self.class_names = self.train_data.class_names
        self.notes: list[str] = []
        started_s = time.monotonic()
        if config.teacher is not None:
            # What the model refuses is refused before hours of teaching.
            build_model(config, self.class_names, notes=[])
            self.train_data = self._taught(config.teacher, device)
        self.spent_s = time.monotonic() - started_s
        if all(one.is_ignored for image in self.train_data.images for one in image.annotations):
            raise DataError(f"{config.data}: expected labelled objects to learn, found none")
        if task_of(config.model) == "segment" and not has_masks(self.train_data):
            raise DataError(
                f"{config.data}: expected masks to train {config.model} on, found none; choose a "
                "detector, or data with masks"
            )
        self.dataset = TrainDataset(
            self.train_data, self.preprocess, preset=preset, seed=config.seed
        )
        with_masks = task_of(config.model) == "segment" and has_masks(self.val_data)
        self.iou_types: tuple[IouType, ...] = ("bbox", "segm") if with_masks else ("bbox",)

    @property
    def num_train(self) -> int:
        """Pictures to train on."""
        return len(self.train_data.images)

    @property
    def num_val(self) -> int:
        """Pictures to evaluate on."""
        return len(self.val_data.images)

    def build_model(self) -> nn.Module:
        """The detector for the data's classes."""
        return build_model(self.config, self.class_names, notes=self.notes)

    def loss_step(self, model: nn.Module, frozen: Sequence[nn.Module]) -> LossStep:
        """The losses of the model, those of frozen parts aside."""
        normalize = Normalize(self.preprocess.mean, self.preprocess.std)
        return DetectorStep(model, normalize, frozen=frozen)

    def collate(self, items: Sequence[TrainItem]) -> TrainBatch:
        """A batch of the data set's items."""
        return collate_train(items)

    def order_of(self, epoch: int) -> Sequence[int]:
        """The order of the pictures in an epoch."""
        return epoch_order(self.num_train, seed=self.config.seed, epoch=epoch)

    def evaluate(
        self, model: nn.Module, *, bootstrap: int = 0, stop: StopSignals | None = None
    ) -> Metrics | None:
        """Average precision by the way that prediction takes; None when stopped."""
        device = next(model.parameters()).device
        graph = DeployGraph(model, mean=self.preprocess.mean, std=self.preprocess.std)
        predictor = Predictor(TorchEngine(graph, device=device), self.preprocess, self.class_names)
        predictions: list[dict[str, Any]] = []
        for found in predict_images(predictor, self.val_data):
            predictions += found
            if stop is not None and stop.received is not None:
                return None
        return evaluate_coco(
            self.val_data,
            predictions,
            iou_types=self.iou_types,
            max_detections=self.config.max_detections,
            bootstrap=bootstrap,
        )

    def model_config(
        self, metrics: Metrics, *, position: Position, device: torch.device
    ) -> ModelConfig:
        """The model folder's config.json."""
        threshold = metrics.count_score
        return ModelConfig(
            architecture=self.config.model,
            model_args={
                "num_classes": len(self.class_names),
                "overrides": model_overrides(self.config),
            },
            task="segment" if task_of(self.config.model) == "segment" else "detect",
            class_names=list(self.class_names),
            category_ids=list(self.train_data.category_ids),
            preprocess=self.preprocess.to_dict(),
            score_threshold=None if math.isnan(threshold) else threshold,
            licence=self.config.licence,
            training=provenance(self.config, position=position, device=device),
            metrics={self.config.val_split: metrics.to_dict()},
        )

    def card(
        self, model_config: ModelConfig, model: nn.Module, metrics: Metrics, *, file_bytes: int
    ) -> str:
        """README.md of the model folder."""
        return model_card(model_config, metrics)

    def _taught(self, spec: str, device: torch.device) -> DetectionData:
        """The training data with what a teacher finds beside their labels."""
        score, where = self.config.teacher_score, f"teacher {spec}"
        started_s = time.monotonic()
        lessons = teach(
            self.train_data,
            load_detector(spec, score=UNSURE * score, device=device),
            score=score,
            with_masks=task_of(self.config.model) == "segment",
            where=where,
            check_time=lambda: check_time_left(
                self.config.max_minutes, time.monotonic() - started_s
            ),
        )
        self.notes.append(f"{where}: {lessons.describe()}")
        return lessons.data


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
        folder = Path(config.data)
        data, found = load_split(folder, split, format=config.data_format, skip_bad=skip_bad)
        skipped += [f"{data.annotation_file}: {describe(problem)}" for problem in found.problems]
        loaded.append(data)
    train, val = loaded
    if train.class_names != val.class_names:
        raise DataError(
            f"{val.annotation_file}: expected the classes of {train.annotation_file}, "
            f"{', '.join(train.class_names)}; found {', '.join(val.class_names)}"
        )
    return train, val, skipped


def model_card(config: ModelConfig, metrics: Metrics) -> str:
    """README.md of the model folder."""
    split = next(iter(config.metrics))
    settings = config.training["config"]
    start = settings["init"] or settings["backbone_weights"]
    weights = f"the weights of `{start}`" if start else "random weights"
    return f"""# {config.architecture}

A model of the vovnet library ({config.task}), licence: {config.licence}.

Classes: {", ".join(config.class_names)}

Trained from {weights} on `{config.training["data"]}` for {config.training["minutes"]} minutes
({config.training["steps"]} steps) on {config.training["hardware"]},
with vovnet {config.training["library"]}; the weights are the averaged ones of step
{config.training["best_step"]}, the best on the split `{split}`, on which this was measured:

```
{metrics.format()}
```

```python
from vovnet import Predictor

detections = Predictor.load("path/of/this/folder")("image.png")
```
"""
