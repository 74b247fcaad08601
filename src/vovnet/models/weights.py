"""Published weights, and reading weights from files without running anything that is in them."""

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vovnet.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedWeights:
    """Where weights lie, and how images must be prepared for them (mean, std: RGB in 0..1
    units).
    """

    hub_repository: str
    licence: str
    image_size: int
    crop_fraction: float
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    top1_percent: float  # on ImageNet-1k, as timm publishes it
    top5_percent: float


PUBLISHED: dict[str, PublishedWeights] = {
    "ese_vovnet19b_dw": PublishedWeights(
        hub_repository="timm/ese_vovnet19b_dw.ra_in1k",
        licence="apache-2.0",
        image_size=224,
        crop_fraction=0.875,
        top1_percent=76.828,
        top5_percent=93.276,
    ),
    "ese_vovnet39b": PublishedWeights(
        hub_repository="timm/ese_vovnet39b.ra_in1k",
        licence="apache-2.0",
        image_size=224,
        crop_fraction=0.875,
        top1_percent=79.312,
        top5_percent=94.722,
    ),
    "ese_vovnet57b": PublishedWeights(
        hub_repository="timm/ese_vovnet57b.ra4_e3600_r256_in1k",
        licence="apache-2.0",
        image_size=256,
        crop_fraction=0.95,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        top1_percent=82.460,
        top5_percent=96.006,
    ),
}


def fetch_published(name: str) -> dict[str, Tensor]:
    """The published ImageNet weights of a variant from the hub or its cache (HF_HOME,
    HF_HUB_OFFLINE).

    Raises ConfigError where the variant has none or they cannot be had.
    """
    if name not in PUBLISHED:
        raise ConfigError(
            f"pretrained: expected a variant with published weights, {', '.join(PUBLISHED)}, "
            f"got {name}"
        )
    repository = PUBLISHED[name].hub_repository
    try:
        path = hf_hub_download(repository, "model.safetensors")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"pretrained {name}: model.safetensors of hub repository {repository} is neither "
            f"cached nor reachable ({type(error).__name__}); download it elsewhere and give its "
            "path instead"
        ) from error
    return read_weights(Path(path))


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or .pth file; pickles are read with weights_only, never
    otherwise.

    Raises ConfigError where the file is missing, broken, or holds anything but tensors.
    """
    if not path.is_file():
        raise ConfigError(f"weights: expected a file, found none at {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(f"weights {path}: cannot be read as plain tensors: {reason}") from error
    for wrapper in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ConfigError(f"weights {path}: expected named tensors, found {type(content).__name__}")
    return {name.removeprefix("module."): value for name, value in content.items()}


def load_tensors(module: nn.Module, tensors: Mapping[str, Tensor], *, where: str) -> None:
    """Copies tensors into a module whose keys and shapes must be the same; floats are converted.

    Raises ConfigError that lists missing, unexpected and mis-shaped keys.
    """
    own = module.state_dict()
    missing = sorted(own.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - own.keys())
    shapes = [
        f"{name} (expected {tuple(own[name].shape)}, found {tuple(tensors[name].shape)})"
        for name in sorted(own.keys() & tensors.keys())
        if own[name].shape != tensors[name].shape
    ]
    unusable = [
        f"{name} ({value.dtype})"
        for name, value in sorted(tensors.items())
        if name in own
        and own[name].is_floating_point()
        and not (value.is_floating_point() and value.isfinite().all())
    ]
    problems = {
        "missing": missing,
        "unexpected": unexpected,
        "wrong shape": shapes,
        "not finite floats": unusable,
    }
    if any(problems.values()):
        text = "; ".join(
            f"{len(names)} {kind}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
            for kind, names in problems.items()
            if names
        )
        raise ConfigError(f"{where}: the tensors do not fit this model: {text}")
    module.load_state_dict(dict(tensors))


def load_backbone(backbone: nn.Module, tensors: Mapping[str, Tensor], *, where: str) -> None:
    """Loads a classifier's weights into a backbone, leaving the classifier out; raises
    ConfigError.
    """
    own = backbone.state_dict()
    kept = {name: value for name, value in own.items() if name.startswith("head.")}
    wanted = {
        name: value
        for name, value in tensors.items()
        if not name.startswith("head.")
        and (
            name in own or not name.endswith("num_batches_tracked")
        )  # frozen BatchNorm counts nothing
    }
    load_tensors(backbone, wanted | kept, where=where)
