"""A trained network: how good it is, and what is kept of it in a model folder."""

import math
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import JsonValue
from torch import Tensor, nn

from vovnet.data.labels import DetectionData
from vovnet.evaluation import IouType, Metrics, evaluate_coco, predict_images
from vovnet.model_folder import ModelConfig
from vovnet.models.deploy import DeployGraph
from vovnet.models.zoo import task_of
from vovnet.predict import Predictor
from vovnet.preprocess import Preprocess
from vovnet.runtime.torch import TorchEngine
from vovnet.training.build import model_overrides
from vovnet.training.checkpoint import Position, library_version
from vovnet.training.config import TrainConfig
from vovnet.training.loop import StopSignals


def evaluate_model(
    detector: nn.Module,
    data: DetectionData,
    *,
    preprocess: Preprocess,
    iou_types: Sequence[IouType],
    max_detections: int,
    bootstrap: int = 0,
    stop: StopSignals | None = None,
) -> Metrics | None:
    """Average precision of a detector by the way that prediction takes; None when stopped."""
    device = next(detector.parameters()).device
    graph = DeployGraph(detector, mean=preprocess.mean, std=preprocess.std).eval()
    engine = TorchEngine(graph, device=device)
    predictor = Predictor(engine, preprocess, data.class_names)
    predictions: list[dict[str, Any]] = []
    for found in predict_images(predictor, data):
        predictions += found
        if stop is not None and stop.received is not None:
            return None
    return evaluate_coco(
        data,
        predictions,
        iou_types=iou_types,
        max_detections=max_detections,
        bootstrap=bootstrap,
    )


def stored_tensor(value: Tensor, half: bool) -> Tensor:
    """A tensor as the model folder stores it: with `half`, weights of two axes and more in 16 bits.

    Norms and biases stay as they are: they are few, and a variance may be below what 16 bits hold.
    """
    return value.half() if half and value.is_floating_point() and value.ndim > 1 else value


def build_model_config(
    config: TrainConfig,
    data: DetectionData,
    preprocess: Preprocess,
    *,
    metrics: Metrics,
    position: Position,
    device: torch.device,
) -> ModelConfig:
    """The model folder's config.json, with the training's settings but none of its paths."""
    settings = config.model_dump(mode="json", exclude={"data", "runs_dir", "name"})
    for name in ("init", "backbone_weights"):
        if settings[name] is not None:
            settings[name] = Path(settings[name]).name
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    threshold = metrics.count_score
    return ModelConfig(
        architecture=config.model,
        model_args={"num_classes": len(data.class_names), "overrides": model_overrides(config)},
        task="segment" if task_of(config.model) == "segment" else "detect",
        class_names=list(data.class_names),
        category_ids=list(data.category_ids),
        preprocess=cast("dict[str, JsonValue]", preprocess.to_dict()),
        score_threshold=None if math.isnan(threshold) else threshold,
        licence=config.licence,
        training={
            "config": settings,
            "data": Path(config.data or "").resolve().name,
            "library": library_version(),
            "torch": torch.__version__,
            "hardware": gpu or f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
            "steps": position.step,
            "best_step": position.best_step,
            "minutes": round(position.spent_s / 60, 1),
        },
        metrics={config.val_split: metrics.to_dict()},
    )


def model_card(config: ModelConfig, metrics: Metrics) -> str:
    """README.md of the model folder."""
    split = next(iter(config.metrics))
    return f"""# {config.architecture}

A model of the vovnet library ({config.task}), licence: {config.licence}.

Classes: {", ".join(config.class_names)}

Trained on `{config.training["data"]}` for {config.training["minutes"]} minutes
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
