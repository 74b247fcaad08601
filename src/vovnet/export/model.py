"""From a trained model to a file that has been shown to answer as it does."""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from vovnet.errors import ConfigError
from vovnet.export.check import Batch, Comparison, Run, compare, make_batches
from vovnet.export.fuse import fuse_network, round_weights
from vovnet.export.graph import Graph, is_feature_map, make_graph
from vovnet.export.onnx import write_onnx, write_openvino
from vovnet.export.torch_export import write_program
from vovnet.exported import EXPORT_KEY, ExportInfo, sha256
from vovnet.files import kept_if_filled
from vovnet.graph_file import is_graph_file
from vovnet.model_folder import CONFIG_KEY, WEIGHTS_FILE, ModelConfig, load_config, resolve_model
from vovnet.models.deploy import ClassifierGraph, DeployGraph, fold_batch_norms
from vovnet.models.layers import Normalize
from vovnet.models.vovnet import VoVNet
from vovnet.models.weights import fetch_published_file
from vovnet.models.zoo import create_model
from vovnet.preprocess import Preprocess
from vovnet.published import (
    PUBLISHED,
    find_published,
    imagenet_class_names,
    published_preprocess,
)
from vovnet.runtime.engine import Engine
from vovnet.runtime.exported import ExportedFile, open_exported
from vovnet.runtime.onnxruntime import OnnxRuntimeEngine
from vovnet.runtime.openvino import OpenVinoEngine, with_least_sides
from vovnet.runtime.torch import TorchEngine, build_model
from vovnet.runtime.torch_export import TorchExportEngine

Format = Literal["onnx", "openvino", "torch-export"]
Precision = Literal["fp32", "fp16"]
Progress = Callable[[str], None]

SUFFIXES: dict[Format, str] = {"onnx": ".onnx", "openvino": ".xml", "torch-export": ".pt2"}
_CHECKED_IN: dict[Format, tuple[str, ...]] = {
    "onnx": ("onnxruntime", "openvino"),
    "openvino": ("openvino",),
    "torch-export": ("torch-export",),
}
_UNIT = (1.0, 1.0, 1.0)


@dataclass(frozen=True, slots=True)
class Source:
    """A trained network with what its file is to say of it."""

    network: nn.Module
    config: ModelConfig
    weights_sha256: str


@dataclass(frozen=True, slots=True)
class Export:
    """What was written, nothing where a comparison has problems."""

    files: tuple[Path, ...]
    comparisons: tuple[Comparison, ...]

    @property
    def problems(self) -> list[str]:
        """What is wrong, with the engine that showed it."""
        return [f"{one.engine}: {text}" for one in self.comparisons for text in one.problems]


def load_source(folder_or_name: str | Path) -> Source:
    """The network of a model folder, a bundled model or published weights; raises ConfigError."""
    variant = find_published(folder_or_name)
    if variant is not None:
        path = fetch_published_file(variant)
        network = create_model(variant, pretrained=True).eval()
        return Source(network, published_config(variant), sha256(path))
    folder = resolve_model(folder_or_name)
    if is_graph_file(folder):
        raise ConfigError(f"{folder}: expected a model folder or name, got an exported file")
    # What the weights cost in another form stays with the folder.
    told = load_config(folder).model_copy(update={"cost": {}})
    return Source(build_model(folder), told, sha256(folder / WEIGHTS_FILE))


def published_config(variant: str) -> ModelConfig:
    """What a model folder of published weights would say."""
    published, names = PUBLISHED[variant], imagenet_class_names()
    figures = {"top1": published.top1_percent / 100, "top5": published.top5_percent / 100}
    return ModelConfig(
        architecture=variant,
        model_args={"num_classes": len(names)},
        task="classify",
        class_names=list(names),
        category_ids=list(range(len(names))),
        preprocess=published_preprocess(variant).to_dict(),
        licence=published.licence,
        training={"data": "ImageNet-1k", "source": published.hub_repository},
        metrics={"val": figures},
    )


def export_model(
    source: Source,
    output: Path,
    pictures: Sequence[NDArray[np.uint8]],
    *,
    format: Format = "onnx",
    precision: Precision = "fp32",
    raw: bool = False,
    progress: Progress = lambda text: None,
) -> Export:
    """Writes a network to `output`, .onnx, .pt2, or .xml with .bin beside it, and compares it with
    torch on pictures (H, W, 3) uint8 RGB, in every installed engine that reads it.

    A file that differs is not kept, one of the same name that was there stays. raw leaves the
    choice of detections out. progress is told each stage as it begins. Raises ConfigError on what
    cannot be exported, and where no engine is installed.
    """
    engines = [name for name in _CHECKED_IN[format] if _is_installed(name)]
    if not engines:
        names = " or ".join(_CHECKED_IN[format])
        raise ConfigError(f"export: expected {names} to be installed: pip install 'vovnet[export]'")
    with work_folder(output) as folder:
        written = folder / output.name
        progress(f"exporting to {format}, {precision}")
        expected = _write(source, written, format=format, precision=precision, raw=raw)
        batches = _batches(source, pictures)
        comparisons = []
        for name in engines:
            progress(f"comparing {name} with torch")
            comparisons.append(_check(name, written, expected, batches, raw=raw))
        if any(one.problems for one in comparisons):
            return Export((), tuple(comparisons))
        return Export(move_files(written, output), tuple(comparisons))


@contextmanager
def work_folder(output: Path) -> Iterator[Path]:
    """A folder beside an output, for files that are not whole yet; at the end it is gone, and so
    are folders made for an output that was not written.
    """
    with kept_if_filled(output.parent):
        folder = Path(mkdtemp(prefix=".export-", dir=output.parent))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _batches(source: Source, pictures: Sequence[NDArray[np.uint8]]) -> list[Batch]:
    preprocess = preprocess_of(source)
    batches = make_batches(preprocess, pictures)
    if source.config.task == "classify" or _sides(preprocess, source.config.task) is not None:
        return batches
    # Torch, too, is to see what OpenVINO needs.
    return [(with_least_sides(images), sizes) for images, sizes in batches]


def _write(source: Source, path: Path, *, format: Format, precision: Precision, raw: bool) -> Run:
    """Writes the file; returns how torch runs the same weights."""
    preprocess = preprocess_of(source)
    network = fuse_network(source.network, std=preprocess.std)
    if precision == "fp16":
        network = round_weights(network)
    graph = make_graph(network, mean=preprocess.mean, raw=raw)
    sides = _sides(preprocess, source.config.task)
    metadata = _metadata(source, graph, sides, precision=precision, raw=raw)
    given: Any = {"sides": sides, "half": precision == "fp16", "metadata": metadata}
    if format == "torch-export":
        write_program(graph, path, **given)
    else:
        write_onnx(graph, path.with_suffix(".onnx"), **given)
    if format == "openvino":
        write_openvino(path.with_suffix(".onnx"), path)
        path.with_suffix(".onnx").unlink()
    if precision == "fp16":  # not the original, whose weights are not the rounded ones
        return _run_torch(network, mean=preprocess.mean, std=_UNIT, raw=raw)
    fold_batch_norms(source.network)
    return _run_torch(source.network, mean=preprocess.mean, std=preprocess.std, raw=raw)


def _metadata(
    source: Source,
    graph: Graph,
    sides: tuple[int, int] | None,
    *,
    precision: Precision,
    raw: bool,
) -> dict[str, str]:
    config: Any = getattr(source.network, "config", None)
    detects = source.config.task != "classify"
    info = ExportInfo(
        weights_sha256=source.weights_sha256,
        vovnet_version=version("vovnet"),
        precision=precision,
        raw=raw,
        inputs=list(graph.inputs),
        sides=sides,
        min_score=float(config.min_score) if detects else 0.0,
        max_detections=config.max_detections if detects and not raw else 0,
        has_masks=detects and not raw and bool(source.network.has_masks),
    )
    return {
        CONFIG_KEY: source.config.model_dump_json(),
        EXPORT_KEY: info.model_dump_json(),
    }


def _run_torch(
    network: nn.Module, *, mean: Sequence[float], std: Sequence[float], raw: bool
) -> Run:
    if raw:
        return _run_raw(network, Normalize(mean, std))
    graph = (
        ClassifierGraph(network, mean=mean, std=std)
        if isinstance(network, VoVNet)
        else DeployGraph(network, mean=mean, std=std)
    )
    return TorchEngine(graph, device=torch.device("cpu")).infer


def _run_raw(network: nn.Module, normalize: Normalize) -> Run:
    def run(images: NDArray[np.uint8], sizes: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        with torch.inference_mode():
            raw = network(normalize(torch.from_numpy(images), torch.from_numpy(sizes)))
        return {name: value.numpy() for name, value in raw.items() if not is_feature_map(name)}

    return run


def _check(
    name: str, path: Path, expected: Run, batches: Sequence[Batch], *, raw: bool
) -> Comparison:
    file = open_exported(path, device="cpu", settings={}, raw=raw)
    return compare(name, expected, _load(name, file).infer, batches)


def _load(name: str, file: ExportedFile) -> Engine:
    if name == "torch-export":
        return TorchExportEngine(file, device=torch.device("cpu"))
    if name == "openvino":
        return OpenVinoEngine(file, precision="fp32", threads=None)
    return OnnxRuntimeEngine(file, threads=None)


def _is_installed(engine: str) -> bool:
    return engine == "torch-export" or find_spec(engine) is not None


def _sides(preprocess: Preprocess, task: str) -> tuple[int, int] | None:
    """Height and width that every batch has, None where they are open."""
    divisor = preprocess.size_divisor
    if preprocess.crop_size is not None:
        return preprocess.crop_size, preprocess.crop_size
    if preprocess.square is not None:
        side = -(-preprocess.square // divisor) * divisor
        return side, side
    if task != "classify" and divisor % 32:
        raise ConfigError(
            f"export: expected a size_divisor that 32 divides, found {divisor} in the preprocess"
        )
    return None


def preprocess_of(source: Source) -> Preprocess:
    """That of a network's pictures, with a classifier's left without padding."""
    preprocess = Preprocess.from_dict(source.config.preprocess)
    # In a pooled map padding would count.
    return replace(preprocess, size_divisor=1) if source.config.task == "classify" else preprocess


def move_files(written: Path, output: Path) -> tuple[Path, ...]:
    """Puts a written file at `output`, and what belongs to it beside it, weights before the file
    that names them; returns where they are.
    """
    files = sorted(written.parent.glob(f"{written.stem}.*"), key=lambda file: file != written)
    for file in reversed(files):
        os.replace(file, output.with_name(file.name))
    return tuple(output.with_name(file.name) for file in files)
