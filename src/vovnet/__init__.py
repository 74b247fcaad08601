"""VoVNet backbones, detectors and instance segmenters. Public names load on first use."""

from importlib import import_module
from typing import TYPE_CHECKING

from vovnet._lazy import ATTRIBUTES, load

if TYPE_CHECKING:
    from vovnet.classify import Classifier
    from vovnet.data.coco import load_coco
    from vovnet.drawing import draw_detections
    from vovnet.evaluation import evaluate_coco
    from vovnet.images import read_image
    from vovnet.models.deploy import DeployGraph
    from vovnet.models.zoo import create_model, list_models
    from vovnet.predict import Predictor
    from vovnet.preprocess import Preprocess
    from vovnet.results import Classification, Detections

__all__ = [
    "Classification",
    "Classifier",
    "DeployGraph",
    "Detections",
    "Predictor",
    "Preprocess",
    "__version__",
    "create_model",
    "draw_detections",
    "evaluate_coco",
    "list_models",
    "load_coco",
    "read_image",
]


def __getattr__(name: str) -> object:
    if name == "__version__":
        # importlib.metadata alone takes longer to load than the rest of this package.
        value = import_module("importlib.metadata").version("vovnet")
    elif name in ATTRIBUTES:
        value = load(ATTRIBUTES[name])
    else:
        raise AttributeError(f"module 'vovnet' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
