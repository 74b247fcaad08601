"""Pretraining a backbone on pictures without labels; what is learnt stands in siamese.py."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vovnet.classify import Classifier
from vovnet.data.classes import ClassData, bad_pictures
from vovnet.data.pictures import load_pictures
from vovnet.data.views import ViewBatch, ViewDataset, ViewItem, ViewPreset, collate_views
from vovnet.errors import DataError
from vovnet.model_folder import ModelConfig
from vovnet.models.deploy import ClassifierGraph
from vovnet.models.layers import Normalize
from vovnet.preprocess import Preprocess
from vovnet.runtime.torch import TorchEngine
from vovnet.training.build import build_model, preprocess_fields
from vovnet.training.checkpoint import Position
from vovnet.training.config import TrainConfig
from vovnet.training.distill import ForeignEngine, load_teacher
from vovnet.training.loop import StopSignals, epoch_order
from vovnet.training.package import provenance
from vovnet.training.siamese import FeatureMaps, SiameseStep, TeacherStep, effective_rank
from vovnet.training.step import LossStep

PRETRAIN: dict[str, Any] = {
    "task": "pretrain",
    "model": "vovnet19_thin_dw",
    "batch_size": 16,
    "epochs": 100,
    "optimizer": "adamw",
    "learning_rate": 1e-3,
    "weight_decay": 1e-4,
    "warmup_fraction": 0.05,
    "ema_decay": 0.99,
    "eval_every_epochs": 10,
    "runs_dir": "runs/pretrain",
}
"""Settings under those that the user gives."""

CHECKED_PICTURES = 100_000
"""Up to so many are decoded before the first step; of more, a bad one ends the training."""
LEAST_STD, LEAST_RANK = 0.05, 1.5
"""Of features that tell pictures apart; random weights have a spread of some thousandths."""
_LEAST_PICTURES = 2
_EVALUATED = 128
_EVALUATED_AT_ONCE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainMetrics:
    """How far apart a backbone keeps pictures; it says whether training failed, not how good it is.

    feature_std     of the pooled last map, scaled to length 1, over the pictures, times the root of
                    its channels: 0 where all are alike
    feature_rank    directions in which these differ: about 1 where they have collapsed into a line
    matched         share of the pictures whose second view is the nearest of all to their first
    """

    feature_std: float
    feature_rank: float
    matched: float
    num_pictures: int

    def main(self) -> float:
        """The share of matched pictures."""
        return self.matched

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    @property
    def is_useless(self) -> bool:
        """Whether all pictures look nearly alike to the backbone."""
        return not (self.feature_std >= LEAST_STD and self.feature_rank >= LEAST_RANK)  # NaN is

    def format(self) -> str:
        """One line of text, and another where the features are of no use."""
        text = (
            f"{self.matched:.1%} of {self.num_pictures} pictures known again in another view, "
            f"spread of their features {self.feature_std:.3f} in {self.feature_rank:.1f} directions"
        )
        return f"{text}\n{self._warning()}" if self.is_useless else text

    def _warning(self) -> str:
        found = []
        if not self.feature_std >= LEAST_STD:
            found.append(f"spread {self.feature_std:.3f}, expected {LEAST_STD:g} or more")
        if not self.feature_rank >= LEAST_RANK:
            found.append(f"{self.feature_rank:.1f} directions, expected {LEAST_RANK:g} or more")
        return (
            f"warning: all pictures look nearly alike to this backbone ({'; '.join(found)}): it "
            "has not learnt yet, or has collapsed; do not start a training from it, but pretrain "
            "longer or on more pictures, and where that does not help at a lower learning rate"
        )


class PretrainTask:
    """The pretraining of a backbone as `train` runs it; see its Task."""

    chooses_best = False
    advice = (
        "with no warning above, start from it: "
        "vovnet train --backbone-weights {folder} --model ... --data ..."
    )
    class_names: tuple[str, ...] = ()

    def __init__(self, config: TrainConfig, *, skip_bad: bool, device: torch.device) -> None:
        assert config.data is not None
        self.config = config
        self.preset = ViewPreset.from_dict(config.augment)
        if config.image_size is not None:
            self.preset = replace(self.preset, image_size=config.image_size)
        self.preprocess = backbone_preprocess(config, self.preset.image_size)
        splits = (config.train_split, config.val_split)
        found = load_pictures(Path(config.data), splits, format=config.data_format)
        # Always, as no label is lost with a picture.
        self.data, self.skipped = without_bad(found, threads=max(config.workers, 1))
        if len(self.data) < _LEAST_PICTURES:
            raise DataError(
                f"{config.data}: expected at least {_LEAST_PICTURES} pictures, which a backbone "
                f"learns to tell apart, found {len(self.data)}"
            )
        cache_bytes = _cache_bytes(config.workers)
        self.dataset = ViewDataset(
            self.data, preset=self.preset, seed=config.seed, cache_bytes=cache_bytes
        )
        self.notes: list[str] = []
        started_s = time.monotonic()
        self.teacher = None if config.teacher is None else self._teacher(config.teacher, device)
        self.spent_s = time.monotonic() - started_s

    @property
    def num_train(self) -> int:
        """Pictures to train on."""
        return len(self.data)

    @property
    def num_val(self) -> int:
        """Pictures to evaluate on, which are some of the same."""
        return min(len(self.data), _EVALUATED)

    def build_model(self) -> nn.Module:
        """The backbone, without a classifier."""
        return build_model(self.config, self.class_names, notes=self.notes)

    def loss_step(self, model: nn.Module, frozen: Sequence[nn.Module]) -> LossStep:
        """What the backbone learns."""
        normalize = Normalize(self.preprocess.mean, self.preprocess.std)
        if self.teacher is None:
            return SiameseStep(model, normalize, frozen=frozen)
        maps, channels = self.teacher
        return TeacherStep(model, normalize, maps, channels, frozen=frozen)

    def collate(self, items: Sequence[ViewItem]) -> ViewBatch:
        """A batch of the data set's items."""
        return collate_views(items)

    def order_of(self, epoch: int) -> Sequence[int]:
        """The order of the pictures in an epoch."""
        return epoch_order(self.num_train, seed=self.config.seed, epoch=epoch)

    def evaluate(
        self, model: nn.Module, *, bootstrap: int = 0, stop: StopSignals | None = None
    ) -> PretrainMetrics | None:
        """How far apart the backbone keeps the pictures, by the same views each time; None when
        stopped.
        """
        device = next(model.parameters()).device
        graph = ClassifierGraph(model, mean=self.preprocess.mean, std=self.preprocess.std)  # type: ignore[arg-type]
        engine = TorchEngine(graph, device=device)
        # Another seed than the training's, and always the first epoch.
        dataset = ViewDataset(self.data, preset=self.preset, seed=-1, cache_bytes=0)
        chosen = np.linspace(0, len(self.data) - 1, self.num_val).astype(int).tolist()
        first, second = [], []
        for start in range(0, len(chosen), _EVALUATED_AT_ONCE):
            items = [dataset[index] for index in chosen[start : start + _EVALUATED_AT_ONCE]]
            batch = collate_views(items)
            embedding = engine.infer(batch.images.numpy(), batch.sizes.numpy())["embedding"]
            one, two = torch.from_numpy(embedding).float().chunk(2)
            first.append(one)
            second.append(two)
            if stop is not None and stop.received is not None:
                return None
        return compare_views(torch.cat(first), torch.cat(second))

    def model_config(
        self, metrics: PretrainMetrics, *, position: Position, device: torch.device
    ) -> ModelConfig:
        """The model folder's config.json."""
        training = provenance(self.config, position=position, device=device)
        return ModelConfig(
            architecture=self.config.model,
            model_args={"num_classes": 0, "overrides": dict(self.config.model_overrides)},
            task="classify",
            class_names=[],
            category_ids=[],
            preprocess=self.preprocess.to_dict(),
            licence=self.config.licence,
            training=training | {"pretraining": metrics.to_dict()},
        )

    def card(
        self,
        model_config: ModelConfig,
        model: nn.Module,
        metrics: PretrainMetrics,
        *,
        file_bytes: int,
    ) -> str:
        """README.md of the model folder."""
        return backbone_card(model_config, metrics, num_pictures=self.num_train)

    def _teacher(self, spec: str, device: torch.device) -> tuple[FeatureMaps, int]:
        maps = feature_maps(load_teacher(spec, device=device))
        side = self.preset.image_size
        black = torch.zeros((1, side, side, 3), dtype=torch.uint8, device=device)
        channels = maps(black, torch.full((1, 2), side, device=device)).shape[1]
        return maps, channels


def compare_views(first: Tensor, second: Tensor) -> PretrainMetrics:
    """Figures of the embeddings (N, F) of both views of N pictures."""
    centre = torch.cat([first, second]).mean(0)
    one, two = F.normalize(first - centre, dim=1), F.normalize(second - centre, dim=1)
    lengths = F.normalize(first, dim=1)
    nearest = (one @ two.T).argmax(1)
    own = torch.arange(len(first))
    return PretrainMetrics(
        feature_std=float(lengths.std(0, correction=0).mean() * lengths.shape[1] ** 0.5),
        feature_rank=effective_rank(lengths),
        matched=float((nearest == own).float().mean()),
        num_pictures=len(first),
    )


def feature_maps(teacher: Classifier) -> FeatureMaps:
    """The teacher's last feature map where its network gives it, else its embedding, one place."""
    engine: Any = teacher.engine
    network, normalize = None, None
    if isinstance(engine, ForeignEngine):
        network, normalize = engine.module, engine.normalize
    elif isinstance(engine, TorchEngine):
        graph: Any = engine.graph
        network, normalize = graph.classifier, graph.normalize
    forward: Any = getattr(network, "forward_features", None)

    def embeddings(images: Tensor, sizes: Tensor) -> Tensor:
        found = engine.infer(images.cpu().numpy(), sizes.cpu().numpy())["embedding"]
        return torch.from_numpy(found).to(images.device)[:, :, None, None]

    def maps(images: Tensor, sizes: Tensor) -> Tensor:
        assert normalize is not None
        with torch.no_grad():
            found: Tensor = forward(normalize(images, sizes))
        return found if found.ndim == 4 else embeddings(images, sizes)

    return embeddings if forward is None else maps


def without_bad(data: ClassData, *, threads: int) -> tuple[ClassData, list[str]]:
    """The pictures that can be decoded, and a line on each other; raises DataError where none is
    left.
    """
    if len(data) > CHECKED_PICTURES:
        return data, []
    with ThreadPoolExecutor(threads) as pool:
        bad = bad_pictures(data, map_over=pool.map)
    if len(bad) == len(data):
        shown = "".join(f"\n  {reason}" for _, reason in bad[:10])
        raise DataError(f"{data.source}: expected pictures that can be decoded, found none:{shown}")
    kept = np.setdiff1d(np.arange(len(data)), [index for index, _ in bad])
    return data.chosen(kept), [reason for _, reason in bad]


def backbone_preprocess(config: TrainConfig, image_size: int) -> Preprocess:
    """The preprocess that the backbone's folder names; its mean and std are those learnt with."""
    values: dict[str, object] = {
        "short_side": image_size,
        "crop_size": image_size,
        "max_long_side": None,
        "interpolation": "bilinear",
    }
    return Preprocess.from_dict(preprocess_fields(config) | values | config.preprocess)


def backbone_card(config: ModelConfig, metrics: PretrainMetrics, *, num_pictures: int) -> str:
    """README.md of the model folder."""
    training = config.training
    teacher = training["config"]["teacher"]
    how = "on the feature maps of a teacher" if teacher else "without labels (SimSiam on regions)"
    return f"""# {config.architecture}

A backbone of the vovnet library, without classes, licence: {config.licence}.

Pretrained {how} on {num_pictures} pictures of `{training["data"]}` for {training["minutes"]}
minutes ({training["steps"]} steps) on {training["hardware"]}, with vovnet {training["library"]}.
At the end {metrics.format()}.

```sh
vovnet train --backbone-weights path/of/this/folder --model DETECTOR --data DIR
```
"""


def _cache_bytes(workers: int) -> int:
    return 2**29 // max(workers, 1)
