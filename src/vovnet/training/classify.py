"""Training a classifier: its data, losses, evaluation, and what is kept of it."""

import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vovnet.cards import architecture_words, classifier_card
from vovnet.classify import Classifier
from vovnet.data.class_batches import (
    DEFAULT_CACHE_BYTES,
    ClassBatch,
    ClassItem,
    ClassPreset,
    ClassTargets,
    ClassTrainDataset,
    balanced_order,
    collate_classes,
)
from vovnet.data.classes import ClassData, bad_pictures, load_classes
from vovnet.data.shards import shard_order
from vovnet.errors import DataError
from vovnet.evaluation_classes import ClassMetrics, evaluate_classes, predict_logits
from vovnet.model_folder import ModelConfig
from vovnet.models.deploy import ClassifierGraph
from vovnet.models.layers import Normalize
from vovnet.preprocess import Preprocess
from vovnet.profiling.count import count_costs
from vovnet.runtime.torch import TorchEngine
from vovnet.training.build import build_model, preprocess_fields
from vovnet.training.checkpoint import Position
from vovnet.training.config import TrainConfig
from vovnet.training.distill import Lesson, attend, feature_loss, load_teacher, logit_loss
from vovnet.training.loop import StopSignals, epoch_order
from vovnet.training.package import provenance
from vovnet.training.step import LossStep
from vovnet.training.task import ADVICE

CHECKED_PICTURES = 100_000
"""Up to so many are decoded before the first step; of more, bad ones show when they are met, unless
they are to be left out."""


class ClassifierStep(LossStep):
    """Cross-entropy to the labels, and the distance to what a teacher said."""

    def __init__(
        self,
        model: nn.Module,
        normalize: nn.Module,
        *,
        frozen: Sequence[nn.Module] = (),
        class_weights: Tensor | None = None,
        lesson: Lesson | None = None,
        teacher_weight: float = 1.0,
    ) -> None:
        super().__init__(model, normalize, frozen=frozen)
        self.register_buffer("class_weights", class_weights, persistent=False)
        self.teacher_weight = teacher_weight
        self.learns_logits = lesson is not None and lesson.is_logits
        self.projection: nn.Linear | None = None
        if lesson is not None and not lesson.is_logits:
            features: Any = model.num_features
            self.projection = nn.Linear(features, lesson.values.shape[1])

    def forward(self, images: Tensor, sizes: Tensor, targets: ClassTargets) -> dict[str, Tensor]:
        """Losses of uint8 RGB images (B, H, W, 3), named scalars to be summed."""
        model: Any = self.model
        normalized = self.normalize(images, sizes)
        if self.projection is None:
            logits = model(normalized)
            losses = {}
        else:
            features = model.forward_features(normalized)
            logits = model.forward_head(features)
            embedding = model.forward_head(features, pre_logits=True)
            assert targets.teacher is not None
            distance = feature_loss(self.projection(embedding), targets.teacher)
            losses = {"loss_teacher": self.teacher_weight * distance}
        if self.learns_logits:
            assert targets.teacher is not None
            losses = {"loss_teacher": self.teacher_weight * logit_loss(logits, targets.teacher)}
        weights: Tensor | None = self.class_weights  # type: ignore[assignment]
        return {"loss_class": F.cross_entropy(logits.float(), targets.labels, weights)} | losses


class _StoppedError(Exception):
    """A signal has come during an evaluation."""


class ClassifierTask:
    """The training of a classifier as `train` runs it; see its Task."""

    chooses_best = True
    advice = ADVICE

    def __init__(self, config: TrainConfig, *, skip_bad: bool, device: torch.device) -> None:
        assert config.data is not None
        self.config = config
        self.preset = ClassPreset.from_dict(config.augment)
        if config.image_size is not None:
            self.preset = replace(self.preset, image_size=config.image_size)
        self.preprocess = classifier_preprocess(config, self.preset)
        self.train_data = load_classes(Path(config.data), config.train_split)
        names = self.train_data.class_names
        self.val_data = load_classes(Path(config.data), config.val_split, class_names=names)
        self.skipped: list[str] = []
        self.notes: list[str] = []
        self.train_data = self._checked(self.train_data, skip_bad)
        self.val_data = self._checked(self.val_data, skip_bad)
        self.class_names = names
        if config.teacher is not None:  # what the model refuses is refused before hours of teaching
            build_model(config, names, notes=[])
        started_s = time.monotonic()
        self.lesson = self._lesson(device)
        self.spent_s = time.monotonic() - started_s
        cache_bytes = DEFAULT_CACHE_BYTES // max(config.workers, 1)
        self.dataset = ClassTrainDataset(
            self.train_data, preset=self.preset, seed=config.seed, cache_bytes=cache_bytes
        )

    @property
    def num_train(self) -> int:
        """Pictures to train on."""
        return len(self.train_data)

    @property
    def num_val(self) -> int:
        """Pictures to evaluate on."""
        return len(self.val_data)

    def build_model(self) -> nn.Module:
        """The classifier with a head for the data's classes."""
        return build_model(self.config, self.class_names, notes=self.notes)

    def loss_step(self, model: nn.Module, frozen: Sequence[nn.Module]) -> LossStep:
        """The losses of the model, those of frozen parts aside."""
        weights = None
        if self.config.class_balance == "loss":
            weights = inverse_frequencies(self.train_data)
        return ClassifierStep(
            model,
            Normalize(self.preprocess.mean, self.preprocess.std),
            frozen=frozen,
            class_weights=weights,
            lesson=self.lesson,
            teacher_weight=self.config.teacher_weight,
        )

    def collate(self, items: Sequence[ClassItem]) -> ClassBatch:
        """A batch of the data set's items."""
        return collate_classes(
            items,
            data=self.train_data,
            preset=self.preset,
            seed=self.config.seed,
            teacher=None if self.lesson is None else self.lesson.values,
        )

    def order_of(self, epoch: int) -> Sequence[int]:
        """The order of the pictures in an epoch."""
        seed = self.config.seed
        if self.config.class_balance == "sampler":
            return balanced_order(self.train_data.labels, seed=seed, epoch=epoch)
        if len(self.train_data.files) < len(self.train_data):  # shards
            order: list[int] = shard_order(self.train_data, seed=seed, epoch=epoch).tolist()
            return order
        return epoch_order(len(self.train_data), seed=seed, epoch=epoch)

    def evaluate(
        self, model: nn.Module, *, bootstrap: int = 0, stop: StopSignals | None = None
    ) -> ClassMetrics | None:
        """Accuracy by the way that prediction takes; None when stopped."""
        device = next(model.parameters()).device
        mean, std = self.preprocess.mean, self.preprocess.std
        graph = ClassifierGraph(model, mean=mean, std=std)  # type: ignore[arg-type]
        engine = TorchEngine(graph, device=device)
        classifier = Classifier(engine, self.preprocess, self.class_names)

        def check(done: int) -> None:
            if stop is not None and stop.received is not None:
                raise _StoppedError

        threads = max(self.config.workers, 1)
        try:
            logits = predict_logits(classifier, self.val_data, threads=threads, on_batch=check)
        except _StoppedError:
            return None
        return evaluate_classes(logits, self.val_data.labels, self.class_names, bootstrap=bootstrap)

    def model_config(
        self, metrics: ClassMetrics, *, position: Position, device: torch.device
    ) -> ModelConfig:
        """The model folder's config.json."""
        return ModelConfig(
            architecture=self.config.model,
            model_args={
                "num_classes": len(self.class_names),
                "overrides": dict(self.config.model_overrides),
            },
            task="classify",
            class_names=list(self.class_names),
            category_ids=list(range(len(self.class_names))),
            preprocess=self.preprocess.to_dict(),
            licence=self.config.licence,
            training=provenance(self.config, position=position, device=device),
            metrics={self.config.val_split: metrics.to_dict()},
        )

    def card(
        self,
        model_config: ModelConfig,
        model: nn.Module,
        metrics: ClassMetrics,
        *,
        file_bytes: int,
    ) -> str:
        """README.md of the model folder."""
        size = self.preprocess.crop_size or self.preset.image_size
        costs = count_costs(model, (torch.zeros(1, 3, size, size, device="meta"),))
        return classifier_card(
            model_config,
            macs=costs.macs,
            parameters=costs.parameters,
            file_bytes=file_bytes,
            layers=architecture_words(type(part).__name__ for part in model.modules()),
        )

    def _checked(self, data: ClassData, skip_bad: bool) -> ClassData:
        """The data without what cannot be decoded; raises DataError unless that is wanted."""
        if len(data) > CHECKED_PICTURES and not skip_bad:
            return data
        with ThreadPoolExecutor(max(self.config.workers, 1)) as pool:
            bad = bad_pictures(data, map_over=pool.map)
        if not bad:
            return data
        lines = [reason for _, reason in bad]
        if not skip_bad:
            shown = "".join(f"\n  {line}" for line in lines[:10])
            raise DataError(
                f"{data.source}: expected pictures that can be decoded, found {len(bad)} that "
                f"cannot (--skip-bad leaves them out):{shown}"
            )
        self.skipped += lines
        kept = np.setdiff1d(np.arange(len(data)), [index for index, _ in bad])
        empty = set(data.labels.tolist()) - set(data.labels[kept].tolist())
        if empty:
            names = ", ".join(data.class_names[label] for label in sorted(empty))
            raise DataError(f"{data.source}: no picture of {names} can be decoded")
        return data.chosen(kept)

    def _lesson(self, device: torch.device) -> Lesson | None:
        if self.config.teacher is None:
            return None
        teacher = load_teacher(self.config.teacher, device=device)
        where = f"teacher {self.config.teacher}"
        return attend(teacher, self.train_data, self.config.distill, where=where)


def classifier_preprocess(config: TrainConfig, preset: ClassPreset) -> Preprocess:
    """The evaluation's preprocess: a centre crop of the training's size unless stated."""
    size = config.test_image_size or preset.image_size
    values: dict[str, object] = {
        "short_side": math.floor(size / config.crop_fraction),
        "crop_size": size,
        "max_long_side": None,
        "interpolation": "bicubic",
    }
    return Preprocess.from_dict(preprocess_fields(config) | values | config.preprocess)


def inverse_frequencies(data: ClassData) -> Tensor:
    """A weight for each class, (C,): as if all had equally many pictures; of mean 1 over them."""
    counts = np.bincount(data.labels, minlength=len(data.class_names))
    weights = len(data) / (len(counts) * counts.clip(min=1))
    return torch.from_numpy(weights.astype(np.float32))
