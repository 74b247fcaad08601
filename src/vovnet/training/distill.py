"""Learning from a teacher: what it says of each training picture is computed once, beforehand."""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from vovnet.classify import Classifier
from vovnet.data.classes import ClassData
from vovnet.errors import ConfigError
from vovnet.evaluation_classes import predict_logits
from vovnet.graph_file import is_graph_file
from vovnet.models.layers import Normalize
from vovnet.models.weights import load_tensors, read_weights
from vovnet.preprocess import Preprocess

Kind = Literal["logits", "features", "head"]
TEMPERATURE = 2.0
"""Of both distributions where logits are learnt (Hinton et al., 2015)."""

_HEAD_STEPS = 100
_HEAD_DECAY = 1e-3


@dataclass(frozen=True, slots=True)
class Lesson:
    """What a teacher said of N pictures: float32 (N, F) features or (N, C) logits."""

    values: NDArray[np.float32]
    is_logits: bool


class ForeignEngine:
    """An Engine around any classifier that ends in a linear layer.

    mean and std are RGB in pixel units 0..255. Gives logits, and as the embedding what comes into
    the last linear layer.
    """

    name, precision, chosen_because = "torch", "fp32", ""
    parallel, max_detections, has_masks = 1, 0, False

    def __init__(
        self, module: nn.Module, preprocess: Preprocess, device: torch.device, *, where: str
    ) -> None:
        linear = [part for part in module.modules() if isinstance(part, nn.Linear)]
        if not linear:
            raise ConfigError(f"{where}: expected a classifier with a linear layer, found none")
        self.where = where
        self.module = module.eval().to(device).to(memory_format=torch.channels_last)
        self.normalize = Normalize(preprocess.mean, preprocess.std).to(device)
        self.device = str(device)
        self._embedding: Tensor | None = None
        linear[-1].register_forward_pre_hook(self._keep)

    def _keep(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._embedding = inputs[0].flatten(1)

    def infer(self, images: NDArray[np.uint8], sizes: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """As Engine.infer: logits (B, C) and embedding (B, F); raises ConfigError."""
        with torch.inference_mode():
            moved = torch.from_numpy(images).to(self.device)
            x = self.normalize(moved, torch.from_numpy(sizes).to(self.device))
            try:
                logits = self.module(x)
            except Exception as error:  # of any code
                raise _failed(self.where, "to run on a batch of images", error) from error
            if not isinstance(logits, Tensor) or logits.ndim != 2 or self._embedding is None:
                found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
                raise ConfigError(
                    f"{self.where}: expected logits (B, C) out of its last linear layer, "
                    f"got {found}"
                )
            return {"logits": _to_numpy(logits), "embedding": _to_numpy(self._embedding)}


def load_teacher(spec: str, *, device: torch.device) -> Classifier:
    """The classifier a specification means.

    A model folder, a bundled or published name; timm:NAME or torchvision:NAME with their own
    pretrained weights, or @FILE with others of that architecture; FILE.py:FUNCTION, which returns
    a module and runs as your own code. A module of timm or of a function is prepared for by its
    `pretrained_cfg` (input_size, crop_pct, mean, std in 0..1 units, interpolation).
    Raises ConfigError naming the specification.
    """
    kind, _, rest = spec.partition(":")
    if kind not in ("timm", "torchvision") and not kind.endswith(".py"):
        if not spec:
            raise ConfigError("teacher: expected a name, a folder or a file, got ''")
        # Of a folder the network itself: an export beside it can be rounded, or of one size.
        wanted = "auto" if is_graph_file(Path(spec)) else "torch"
        try:
            return Classifier.load(spec, device=str(device), engine=wanted)
        except ConfigError as error:
            raise ConfigError(f"teacher: {error}") from None
    name, _, weights = rest.partition("@")
    tensors = read_weights(Path(weights)) if weights else {}
    names: tuple[str, ...] = ()
    if kind == "timm":
        module = _from_timm(name, pretrained=not weights, where=spec)
        described = _described(getattr(module, "pretrained_cfg", None) or {}, where=spec)
    elif kind == "torchvision":
        module, described, names = _from_torchvision(name, pretrained=not weights, where=spec)
    else:
        module = _from_function(Path(kind), name, where=spec)
        described = _described(getattr(module, "pretrained_cfg", None) or {}, where=spec)
    if weights:
        load_tensors(module, tensors, where=f"teacher {weights}")
        names = ()
    engine = ForeignEngine(module, described, device, where=f"teacher {spec}")
    return Classifier(engine, described, names)


def attend(
    teacher: Classifier, data: ClassData, kind: Literal["auto"] | Kind, *, where: str
) -> Lesson:
    """Ask the teacher about every picture.

    `auto` takes its logits where its classes are those of the data, else its features. `head` fits
    a linear classifier on its features to the data's labels, and takes that one's logits.
    Raises ConfigError where logits are asked for and the classes differ.
    """
    agree = teacher.class_names == data.class_names
    if kind == "logits" and not agree:
        found = ", ".join(map(repr, teacher.class_names[:5])) or "classes that it does not name"
        raise ConfigError(
            f"distill: expected features or head, since {where} has other classes than the data: "
            f"{len(teacher.class_names)} ({found}, ...) instead of {len(data.class_names)}; "
            "got logits"
        )
    if kind == "logits" or (kind == "auto" and agree):
        return Lesson(predict_logits(teacher, data), True)
    features = predict_logits(_Embedder(teacher), data)
    if kind != "head":
        return Lesson(features, False)
    return Lesson(fit_head(features, data.labels, len(data.class_names)), True)


def fit_head(
    features: NDArray[np.float32], labels: NDArray[np.int64], classes: int
) -> NDArray[np.float32]:
    """Logits (N, C) of a linear classifier fitted to features (N, F): softmax regression, its
    weights held small, on features of mean 0 and variance 1.
    """
    x = torch.from_numpy(features)
    x = (x - x.mean(0)) / x.std(0).clamp(min=1e-6)
    y = torch.from_numpy(labels)
    weight = torch.zeros(classes, x.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=_HEAD_STEPS, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(x @ weight.T + bias, y) + _HEAD_DECAY * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    logits: NDArray[np.float32] = (x @ weight.T + bias).detach().numpy()
    return logits


def logit_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Divergence of the student's distribution from the teacher's, (B, C) logits each."""
    return TEMPERATURE**2 * F.kl_div(
        F.log_softmax(student.float() / TEMPERATURE, dim=1),
        F.log_softmax(teacher / TEMPERATURE, dim=1),
        reduction="batchmean",
        log_target=True,
    )


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of 1 - cosine between the student's projected features and the teacher's, (B, F)."""
    return 1 - F.cosine_similarity(student.float(), teacher, dim=1).mean()


class _Embedder:
    """A classifier whose embedding stands where its logits stood."""

    def __init__(self, classifier: Classifier) -> None:
        self.preprocess = classifier.preprocess
        self.class_names = classifier.class_names
        self.engine = self
        self._engine = classifier.engine

    def infer(self, images: NDArray[np.uint8], sizes: NDArray[np.int64]) -> dict[str, Any]:
        return {"logits": self._engine.infer(images, sizes)["embedding"]}


def _from_timm(name: str, *, pretrained: bool, where: str) -> nn.Module:
    try:
        timm: Any = importlib.import_module("timm")
    except ImportError as error:
        raise ConfigError(f"teacher {where}: expected timm to be installed: {error}") from error
    if ":" not in name and not timm.is_model(name):  # with a colon it names a hub's repository
        raise ConfigError(
            f"teacher {where}: expected a known model, as timm.list_models() lists them, "
            f"got {name!r}"
        )
    try:
        module: nn.Module = timm.create_model(name, pretrained=pretrained)
    except Exception as error:  # of unreachable weights, many types
        raise _not_found(where, error) from error
    return module


def _from_torchvision(
    name: str, *, pretrained: bool, where: str
) -> tuple[nn.Module, Preprocess, tuple[str, ...]]:
    models: Any = importlib.import_module("torchvision.models")
    if name not in models.list_models(module=models):  # those of other tasks are in modules below
        raise ConfigError(
            f"teacher {where}: expected a known model that classifies, as "
            f"torchvision.models.list_models(module=torchvision.models) lists them, got {name!r}"
        )
    try:
        weights = models.get_model_weights(name).DEFAULT
        module: nn.Module = models.get_model(name, weights=weights if pretrained else None)
    except Exception as error:  # as above
        raise _not_found(where, error) from error
    transforms = weights.transforms()
    described = {
        "input_size": (3, transforms.crop_size[0], transforms.crop_size[0]),
        "crop_pct": transforms.crop_size[0] / transforms.resize_size[0],
        "mean": transforms.mean,
        "std": transforms.std,
        "interpolation": transforms.interpolation.value,
    }
    return module, _described(described, where=where), tuple(weights.meta["categories"])


def _from_function(path: Path, name: str, *, where: str) -> nn.Module:
    spec = importlib.util.spec_from_file_location(path.stem, path) if path.is_file() else None
    if spec is None or spec.loader is None:
        raise ConfigError(f"teacher {where}: expected a Python file, found none at {path}")
    namespace = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(namespace)
    except Exception as error:  # of any code
        raise _failed(f"teacher {where}", f"{path} to be imported", error) from error
    make: object = getattr(namespace, name, None)
    if not callable(make):
        raise ConfigError(f"teacher {where}: expected a function {name!r} in {path}, found none")
    try:
        module = make()
    except Exception as error:  # as above
        raise _failed(f"teacher {where}", f"{name}() to return a torch module", error) from error
    if not isinstance(module, nn.Module):
        raise ConfigError(
            f"teacher {where}: expected {name}() to return a torch module, "
            f"got {type(module).__name__}"
        )
    return module


def _described(settings: Mapping[str, Any], *, where: str) -> Preprocess:
    try:
        size = int(settings.get("input_size", (3, 224, 224))[-1])
        return Preprocess(
            mean=_pixel_units(settings.get("mean", (0.485, 0.456, 0.406))),
            std=_pixel_units(settings.get("std", (0.229, 0.224, 0.225))),
            short_side=int(size / float(settings.get("crop_pct", 0.875))),
            max_long_side=None,
            crop_size=size,
            interpolation=settings.get("interpolation", "bicubic"),
        )
    except (ArithmeticError, AttributeError, ConfigError, LookupError, TypeError, ValueError) as e:
        expected = (
            "a pretrained_cfg with input_size (3, H, W), crop_pct in 0..1, mean and std of three "
            "numbers, and interpolation bilinear or bicubic"
        )
        raise _failed(f"teacher {where}", expected, e) from e


def _pixel_units(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = (255 * float(value) for value in values)
    return red, green, blue


def _to_numpy(value: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = value.float().cpu().numpy()
    return array


def _not_found(where: str, error: Exception) -> ConfigError:
    expected = "its weights to be at hand or reachable (@FILE names a file of them)"
    return _failed(f"teacher {where}", expected, error)


def _failed(where: str, expected: str, error: Exception) -> ConfigError:
    reason = " ".join(str(error).split())[:200]
    return ConfigError(f"{where}: expected {expected}, got {type(error).__name__}: {reason}")
