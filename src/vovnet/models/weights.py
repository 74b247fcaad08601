"""Published weights, and reading weights from files without running anything that is in them."""

import hashlib
import pickle
import re
import socket
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies
from warnings import warn

import torch
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vovnet.errors import ConfigError, DataError
from vovnet.model_folder import CONFIG_FILE, WEIGHTS_FILE, ModelConfig, load_config
from vovnet.models.layers import adapt_input_channels
from vovnet.models.layouts import FIRST_CONV, is_released
from vovnet.models.rename import COUNTER, Renamed, mis_shaped, not_finite, rename
from vovnet.models.vovnet import VoVNet
from vovnet.preprocess import Preprocess
from vovnet.published import PUBLISHED

MAX_WEIGHTS_BYTES = 8 * 2**30  # the largest detector with its optimizer is below 2 GiB
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
"""Where training programs put the weights in a checkpoint; averaged ones go first, as in timm."""

_STAGES = 4  # of a whole backbone
_OFFSETS = ".conv_offset."  # in the names of a deformable convolution's own weights
_FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
_TYPES = _FLOATS | {torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool}


_UNTRAINED: dict[str, Any] = {
    "input_size": (3, 224, 224),
    "interpolation": "bicubic",
    "crop_pct": 0.875,
    "crop_mode": "center",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "num_classes": 1000,
    "pool_size": (7, 7),
    "first_conv": "stem.0.conv",
    "classifier": "head.fc",
}


def pretrained_cfg(name: str) -> dict[str, Any]:
    """What timm calls so: the preprocess, classifier and origin of a variant's published weights.

    mean and std are RGB in 0..1 units. A variant without published weights has the tag "untrained".
    """
    if name not in PUBLISHED:
        return _UNTRAINED | {"architecture": name, "tag": "untrained"}
    published = PUBLISHED[name]
    size, test_size = published.image_size, published.test_image_size
    return _UNTRAINED | {
        "architecture": name,
        "tag": published.tag,
        "hf_hub_id": published.hub_repository,
        "license": published.licence,
        "input_size": (3, size, size),
        "test_input_size": (3, test_size, test_size),
        "crop_pct": published.crop_fraction,
        "test_crop_pct": published.test_crop_fraction,
        "pool_size": (size // 32, size // 32),
        "mean": published.mean,
        "std": published.std,
    }


def fetch_published(name: str) -> dict[str, Tensor]:
    """The published ImageNet weights of a variant; see fetch_published_file.

    Raises ConfigError.
    """
    return read_weights(fetch_published_file(name))


def fetch_published_file(name: str) -> Path:
    """The file of the published ImageNet weights of a variant, from the hub or its cache (HF_HOME,
    HF_HUB_OFFLINE).

    Raises ConfigError where the variant has none, they cannot be had, or the file is damaged.
    """
    if name not in PUBLISHED:
        raise ConfigError(
            f"pretrained: expected a variant with published weights, {', '.join(PUBLISHED)}, "
            f"got {name}"
        )
    published = PUBLISHED[name]
    repository = published.hub_repository
    try:
        path = Path(
            hf_hub_download(repository, WEIGHTS_FILE, local_files_only=not _hub_is_reachable())
        )
    except (OSError, ValueError) as error:
        folder = Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"
        raise ConfigError(
            f"pretrained {name}: {WEIGHTS_FILE} of hub repository {repository} is not cached, and "
            f"{_why_unfetched(error)}; copy the folder {folder} from a machine that has it "
            "(HF_HOME says where that is), or download the file and name it by --backbone-weights "
            "FILE (train) or checkpoint_path (Python); to predict or measure, name a model folder "
            "instead"
        ) from error
    check_sha256(path, published.sha256)
    return path


def _why_unfetched(error: Exception) -> str:
    """Which of the things that can be wrong it was, as far as the hub's client knows."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE keeps it from being fetched"
    if not _hub_is_reachable():
        return f"there is no network: {urlsplit(constants.ENDPOINT).hostname} has no address"
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        return f"the hub refused it with status {error.response.status_code}"
    return f"fetching it failed ({type(error).__name__}); a later try may do"


def _hub_is_reachable() -> bool:
    """Whether the hub's name resolves, or a proxy does that: without a network the hub's client
    would try again and again for half a minute.
    """
    if getproxies():
        return True
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, None)
    except OSError:
        return False
    return True


def check_sha256(path: Path, expected: str | None) -> None:
    """Raises ConfigError where a file has not the expected sha256 (hexadecimal).

    None stands for the hub's own figure, which names the file that a cache's link leads to; a file
    without one is not checked.
    """
    stored_as = path.resolve().name
    if expected is None and re.fullmatch(r"[0-9a-f]{64}", stored_as):
        expected = stored_as
    if expected is None:
        return
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != expected:
        raise ConfigError(
            f"weights {path}: expected sha256 {expected}, found {found}: the file is damaged or "
            f"not the published one; delete {path.resolve()} and fetch it again"
        )


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or .pth file, or of a model folder, by their names there.

    Wrappers (WRAPPERS) and the prefix `module.` are taken off. Pickles are read with weights_only,
    never otherwise. Raises ConfigError where the file is missing, broken, larger than
    MAX_WEIGHTS_BYTES, or holds anything but plain tensors.
    """
    if path.is_dir():
        path = path / WEIGHTS_FILE
    if not path.is_file():
        raise ConfigError(f"weights: expected a file or a model folder, found neither at {path}")
    if path.stat().st_size > MAX_WEIGHTS_BYTES:
        raise ConfigError(
            f"weights {path}: expected at most {MAX_WEIGHTS_BYTES} bytes, "
            f"found {path.stat().st_size}"
        )
    try:
        content = load_file(path) if path.suffix == ".safetensors" else _load_pickle(path)
    except pickle.UnpicklingError:
        raise ConfigError(
            f"weights {path}: expected named tensors alone, as torch.save(model.state_dict()) "
            "writes them, found a damaged file or Python objects, which are never loaded: they can "
            "run code"
        ) from None
    except Exception as error:  # a stranger's bytes may make a parser fail in any way
        # Not torch's own words: they advise to load what can run code.
        reason = str(error) if isinstance(error, SafetensorError | _WrongArchiveError) else ""
        reason = (reason or type(error).__name__).splitlines()[0]
        raise ConfigError(f"weights {path}: cannot be read as plain tensors: {reason}") from None
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping):
        raise ConfigError(f"weights {path}: expected named tensors, found {type(content).__name__}")
    tensors: dict[str, Tensor] = {}
    for name, value in content.items():
        _check_tensor(name, value, path)
        short = name.removeprefix("module.")
        if short in tensors:
            raise ConfigError(f"weights {path}: expected {short!r} once, found it also as {name!r}")
        tensors[short] = value.detach().resolve_neg()
    stored = sum(value.nbytes for value in tensors.values())
    if stored > 2 * path.stat().st_size:  # twice: tied weights are stored once
        raise ConfigError(
            f"weights {path}: expected tensors of about {path.stat().st_size} bytes, the file's "
            f"size, found {stored}"
        )
    return tensors


class _WrongArchiveError(ValueError):
    """A zip archive that torch.save did not write."""


def _load_pickle(path: Path) -> object:
    """The content of a .pth file. Raises _WrongArchiveError on a zip archive that is larger inside
    or holds a program.
    """
    with path.open("rb") as stream:
        is_archive = stream.read(2) == b"PK"  # not is_zipfile, which looks at the end
    if is_archive:
        with zipfile.ZipFile(path) as archive:
            declared = sum(entry.file_size for entry in archive.infolist())
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                raise _WrongArchiveError("a TorchScript archive, which holds a program")
        if declared > path.stat().st_size:
            raise _WrongArchiveError(
                f"an archive that declares {declared} bytes in {path.stat().st_size}, "
                "though torch compresses nothing"
            )
    return torch.load(path, map_location="cpu", weights_only=True)


def _check_tensor(name: object, value: object, path: Path) -> None:
    """Raises ConfigError unless it is a dense tensor of a usual type that owns all its numbers."""
    where = f"weights {path}: {str(name)[:80]!r}"
    if not isinstance(name, str) or not isinstance(value, Tensor):
        raise ConfigError(f"{where}: expected a named tensor, found {type(value).__name__}")
    plain = value.layout is torch.strided and not (value.is_meta or value.is_nested)
    if not plain or value.dtype not in _TYPES:
        raise ConfigError(
            f"{where}: expected a dense tensor of floats or whole numbers, found {value.dtype}, "
            f"{value.layout}"
        )
    if value.nbytes > value.untyped_storage().nbytes():
        raise ConfigError(
            f"{where}: expected numbers for shape {tuple(value.shape)}, found "
            f"{value.untyped_storage().nbytes()} bytes"
        )


def load_checkpoint(model: nn.Module, path: Path, *, name: str) -> None:
    """Loads a file or a model folder into the model of this name.

    Files of any known layout may be given (vovnet.models.layouts); of a whole detector or of a
    larger network, a backbone takes its own part. A backbone without classifier leaves the file's
    out, and a file without one leaves the model's as it is. The first convolution is adapted to the
    model's input channels. The backbone's `pretrained_cfg` says the pixels' mean and std (RGB in
    0..1 units) and the licence, and a licence that is not open is warned of. Raises ConfigError
    where something does not fit.
    """
    folder = _check_folder(path, name) if (path / CONFIG_FILE).is_file() else None
    tensors = read_weights(path)
    try:
        renamed = rename(tensors, backbone_only=isinstance(model, VoVNet))
    except DataError:  # what is missing is said below, by name
        load_tensors(model, tensors, where=str(path))
        return
    backbone = model if isinstance(model, VoVNet) else model.get_submodule("backbone")
    assert isinstance(backbone, VoVNet)
    _check_arrangement(backbone, renamed, where=str(path))
    _describe_origin(backbone, renamed, path)
    if folder is not None:
        _describe_folder(backbone, folder)
    unexpected = {key: tensors[key] for key in renamed.report.unexpected}
    fitted = _fit_input(model, renamed.tensors | unexpected)
    if isinstance(model, VoVNet) and not ("head.fc.weight" in fitted and model.num_classes):
        load_backbone(model, fitted, where=str(path))
    else:
        load_tensors(model, fitted, where=str(path))


def load_published(backbone: nn.Module, name: str) -> None:
    """Loads a variant's published weights; a classifier of other than 1000 classes stays as it is.

    Raises ConfigError where they cannot be had.
    """
    tensors = _fit_input(backbone, fetch_published(name))
    where = PUBLISHED[name].hub_repository
    if isinstance(backbone, VoVNet) and backbone.num_classes == 1000:
        load_tensors(backbone, tensors, where=where)
    else:
        load_backbone(backbone, tensors, where=where)


def read_backbone(path: Path, *, name: str) -> dict[str, Tensor]:
    """The tensors of the backbone of this name in a file or model folder, for RGB pixels.

    Raises ConfigError on a layout whose pixels are prepared in another way than ImageNet's: its
    mean and std would be lost here, and `vovnet convert` keeps them. Raises DataError on an unknown
    layout.
    """
    if (path / CONFIG_FILE).is_file():
        _check_folder(path, name)
    tensors = read_weights(path)
    renamed = rename(tensors, backbone_only=True)
    if renamed.layout.bgr:
        raise ConfigError(
            f"weights {path}: expected weights for RGB pixels, found the layout "
            f"{renamed.layout.name}; run `vovnet convert {path} --to FOLDER` and give the folder"
        )
    return renamed.tensors | {key: tensors[key] for key in renamed.report.unexpected}


def load_tensors(module: nn.Module, tensors: Mapping[str, Tensor], *, where: str) -> None:
    """Copies tensors into a module whose keys and shapes must be the same; floats are converted.

    The counters of BatchNorm may be missing or too many: a frozen one has none, and nothing depends
    on them. Raises ConfigError that lists missing, unexpected and mis-shaped keys.
    """
    own = module.state_dict()
    given = {k: v for k, v in tensors.items() if k in own or not k.endswith(COUNTER)}
    counters = {k: v for k, v in own.items() if k.endswith(COUNTER) and k not in given}
    problems = {
        "missing": sorted(own.keys() - given.keys() - counters.keys()),
        "unexpected": sorted(given.keys() - own.keys()),
        "wrong shape": mis_shaped(own, given),
        "not finite floats": not_finite(own, given),
    }
    if any(problems.values()):
        text = "; ".join(
            f"{len(names)} {kind}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
            for kind, names in problems.items()
            if names
        )
        raise ConfigError(f"{where}: the tensors do not fit this model: {text}")
    module.load_state_dict(given | counters)


def load_backbone(backbone: nn.Module, tensors: Mapping[str, Tensor], *, where: str) -> None:
    """Loads a classifier's weights into a backbone, leaving the classifier out, and the stages that
    the backbone ends before; raises ConfigError.

    The offsets of deformable convolutions stay as they are, zero at first, where a plain network's
    weights have none.
    """
    stages: nn.Module = backbone.get_submodule("stages")
    unused = ("head.", *(f"stages.{n}." for n in range(len(list(stages.children())), _STAGES)))
    own = backbone.state_dict()
    kept = {name: value for name, value in own.items() if name.startswith("head.")}
    if not any(_OFFSETS in name for name in tensors):
        kept |= {name: value for name, value in own.items() if _OFFSETS in name}
    wanted = {name: value for name, value in tensors.items() if not name.startswith(unused)}
    load_tensors(backbone, wanted | kept, where=where)


def _fit_input(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with the first convolution adapted to the model's input channels."""
    fitted = dict(tensors)
    for name, own in model.state_dict().items():
        if name.endswith(FIRST_CONV) and name in fitted and fitted[name].ndim == 4:
            fitted[name] = adapt_input_channels(fitted[name], own.shape[1])
    return fitted


def _check_folder(folder: Path, name: str) -> ModelConfig:
    """The config of a model folder; raises ConfigError unless it holds the network asked for, or
    has it within.
    """
    config = load_config(folder)
    found = config.architecture
    plain = name.replace("_dcn", "")  # a deformable network starts from the plain one's
    if not any(found == one or found.endswith(f"_{one}") for one in (name, plain)):
        raise ConfigError(
            f"{folder}: expected the weights of {name}, found those of {found}: take a model on "
            "that backbone, or other weights"
        )
    return config


def _check_arrangement(model: VoVNet, renamed: Renamed, *, where: str) -> None:
    """Raises ConfigError where names and shapes fit, but the network computes something else."""
    config = model.config
    if is_released(renamed.layout) and not (config.identity and config.stem == "code"):
        raise ConfigError(
            f"{where}: expected a network whose blocks add their input and whose stem has strides "
            f"2, 1, 2, as the layout {renamed.layout.name} needs; timm's vovnet39a, vovnet57a and "
            "the papers' variants differ: take vovnet27_slim, vovnet39 or vovnet57"
        )


def _describe_folder(model: VoVNet, config: ModelConfig) -> None:
    """Says in pretrained_cfg what the model folder says."""
    preprocess = Preprocess.from_dict(config.preprocess)
    model.pretrained_cfg |= {
        "tag": "model folder",
        "license": config.licence,
        "mean": tuple(value / 255 for value in preprocess.mean),
        "std": tuple(value / 255 for value in preprocess.std),
    }
    model.pretrained_cfg.pop("hf_hub_id", None)


def _describe_origin(model: VoVNet, renamed: Renamed, path: Path) -> None:
    """Says in pretrained_cfg how pixels are prepared, and in a warning what licence holds."""
    if not is_released(renamed.layout):
        return
    layout = renamed.layout
    model.pretrained_cfg.pop("hf_hub_id", None)
    model.pretrained_cfg |= {
        "tag": layout.name,
        "license": layout.licence,
        "mean": tuple(value / 255 for value in renamed.mean),
        "std": tuple(value / 255 for value in renamed.std),
    }
    warn(f"weights {path}: layout {layout.name}, licence {layout.licence}", stacklevel=4)
