"""The network run by torch itself: what every other engine is compared with."""

import os
import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vovnet.errors import ConfigError
from vovnet.model_folder import load_config, load_tensors
from vovnet.models.deploy import ClassifierGraph, DeployGraph, fold_batch_norms
from vovnet.models.vovnet import VoVNet
from vovnet.models.weights import load_tensors as load_into
from vovnet.models.zoo import create_model, task_of
from vovnet.preprocess import Preprocess
from vovnet.published import find_published, published_preprocess
from vovnet.runtime.cuda_graphs import GraphedPass
from vovnet.runtime.packed import Packing, prepare_packing
from vovnet.runtime.threads import check_threads

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class TorchEngine:
    """An Engine around a graph that is already built; the graph moves to the device."""

    name = "torch"
    chosen_because = ""
    parallel = 1

    def __init__(
        self,
        graph: DeployGraph | ClassifierGraph,
        *,
        device: torch.device,
        precision: str = "fp32",
    ) -> None:
        if precision == "fp16" and device.type == "cpu":
            raise ConfigError("precision: expected fp32 or bf16 on the CPU, got 'fp16'")
        self.graph = graph.eval().to(device).to(memory_format=torch.channels_last)
        self.precision = precision
        self.device = str(device)
        detector: Any = graph.detector if isinstance(graph, DeployGraph) else None
        self.max_detections: int = detector.config.max_detections if detector else 0
        self.has_masks: bool = detector is not None and detector.has_masks
        self.packing: Packing | None = None
        self.graphed: GraphedPass | None = None

    def infer(self, images: NDArray[np.uint8], sizes: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """As Engine.infer; copying the results to the CPU waits for the device."""
        kind = self.device.partition(":")[0]
        dtype = DTYPES.get(self.precision)
        packing = self.packing.batch(images.shape) if self.packing else nullcontext()
        # What a recorded graph reads must not lie in a cache that is emptied behind it.
        cached, enabled = self.graphed is None, dtype is not None
        autocast = torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=cached)
        with torch.inference_mode(), autocast, packing:
            found = self._run(
                torch.from_numpy(images).to(self.device), torch.from_numpy(sizes).to(self.device)
            )
        return {name: to_numpy(value) for name, value in found.items()}

    def _run(self, images: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        if self.graphed is None:
            return self.graph(images, sizes)  # type: ignore[no-any-return]
        found = self.graphed(images, sizes)
        if isinstance(self.graph, ClassifierGraph):
            return found
        return self.graph.detector.detect(found, sizes)  # type: ignore[operator, no-any-return]


def load(
    model: str | Path,
    *,
    precision: str,
    device: str,
    threads: int | None,
    settings: Mapping[str, object],
) -> TorchEngine:
    """The engine of a model folder or of published weights by their name, BatchNorm folded; fp32
    unless stated.

    Raises ConfigError.
    """
    chosen = choose_device(device)
    set_threads(threads)
    variant = find_published(model)
    if variant is None:
        folder = Path(model)
        network = build_model(folder, overrides=settings)
        preprocess = Preprocess.from_dict(load_config(folder).preprocess)
    else:
        network = create_model(variant, pretrained=True, overrides=settings).eval()
        preprocess = published_preprocess(variant)
    fold_batch_norms(network)
    mean, std = preprocess.mean, preprocess.std
    if isinstance(network, VoVNet):
        graph: ClassifierGraph | DeployGraph = ClassifierGraph(network, mean=mean, std=std)
    else:
        graph = DeployGraph(network, mean=mean, std=std)
    engine = TorchEngine(
        graph, device=chosen, precision="fp32" if precision == "auto" else precision
    )
    if chosen.type == "cuda":
        prepare_for_gpu(engine)
    return engine


def prepare_for_gpu(engine: TorchEngine) -> None:
    """Has the weights in the precision that is computed in, and the network's pass recorded as CUDA
    graphs: a classifier's whole, of a detector what comes before the choice of detections, whose
    work depends on what is seen.
    """
    dtype = DTYPES.get(engine.precision)
    if dtype is not None:
        cast_weights(engine.graph, dtype)
    graph = engine.graph
    engine.graphed = GraphedPass(
        graph if isinstance(graph, ClassifierGraph) else graph.predict, torch.device(engine.device)
    )


def cast_weights(network: nn.Module, dtype: torch.dtype) -> None:
    """Casts, in place, what autocast to dtype would cast again in every pass: the same results."""
    for part in network.modules():
        if isinstance(part, nn.Conv1d | nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            part.to(dtype)


def load_packed(
    model: str | Path,
    *,
    precision: str,
    device: str,
    threads: int | None,
    settings: Mapping[str, object],
) -> TorchEngine:
    """As `load`, with weights laid out for the shape of batches that come again and again.

    The same picture then answers in the last digits otherwise than before, which is why this is an
    engine of its own. Raises ConfigError, also on a GPU.
    """
    if device not in ("auto", "cpu"):
        raise ConfigError(f"device: expected cpu for torch-packed, got {device!r}")
    loaded = load(model, precision=precision, device="cpu", threads=threads, settings=settings)
    loaded.name = "torch-packed"
    loaded.packing = prepare_packing(loaded.graph, DTYPES.get(loaded.precision, torch.float32))
    return loaded


def load_compiled(
    model: str | Path,
    *,
    precision: str,
    device: str,
    threads: int | None,
    settings: Mapping[str, object],
) -> TorchEngine:
    """As `load`, with the network compiled by torch.compile: a minute at the first batch, and again
    at the first batch of another size.

    The choice of detections is not compiled. Raises ConfigError, also where there is no C++
    compiler.
    """
    loaded = load(model, precision=precision, device=device, threads=threads, settings=settings)
    if not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")):
        raise ConfigError(
            "engine: expected a C++ compiler for torch-compile (g++, clang++ or $CXX), found none"
        )
    loaded.name = "torch-compile"
    loaded.graphed = None  # a compiled network is not recorded
    graph = loaded.graph
    (graph.detector if isinstance(graph, DeployGraph) else graph).compile()
    return loaded


def set_threads(threads: int | None) -> None:
    """Sets the CPU threads of the process, None leaves them; raises ConfigError."""
    check_threads(threads)
    if threads is not None:
        torch.set_num_threads(threads)


def choose_device(name: str) -> torch.device:
    """The device of a name, the first GPU for `auto` where there is one; raises ConfigError."""
    try:
        device = torch.device(
            ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
        )
    except RuntimeError as error:
        raise ConfigError(f"device: expected cpu, cuda, cuda:N or auto, found {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device: expected cpu, cuda, cuda:N or auto, found {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device: expected a usable GPU for {name!r}, found none")
    return device


def build_model(folder: Path, *, overrides: Mapping[str, object] | None = None) -> nn.Module:
    """The network of a model folder with its weights, as float32; raises ConfigError.

    overrides go over the folder's own settings of the network.
    """
    config = load_config(folder)
    task = task_of(config.architecture)
    if (task == "classify") != (config.task == "classify"):
        raise ConfigError(
            f"{folder}: task: expected {task}, as the architecture {config.architecture} does, "
            f"found {config.task}"
        )
    arguments = dict(config.model_args)
    own = arguments.pop("overrides", None) or {}
    if not isinstance(own, Mapping):
        raise ConfigError(f"{folder}: overrides: expected a mapping, found {type(own).__name__}")
    settings = {**own, **(overrides or {})}
    num_classes = arguments.pop("num_classes", None)
    if arguments or num_classes != len(config.class_names):
        raise ConfigError(
            f"{folder}: model_args: expected num_classes {len(config.class_names)} (one per class "
            f"name) and overrides, found num_classes {num_classes} and {sorted(arguments)}"
        )
    try:
        model = create_model(config.architecture, num_classes=num_classes, overrides=settings)
    except ConfigError as error:
        raise ConfigError(f"{folder}: {error}") from error
    tensors = {name: torch.from_numpy(value) for name, value in load_tensors(folder).items()}
    load_into(model, tensors, where=str(folder))
    return model.eval()


def to_numpy(value: Tensor) -> NDArray[Any]:
    """A tensor of any device; bfloat16, which numpy has not, as float32."""
    value = value.cpu()
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()
