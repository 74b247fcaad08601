"""What every engine is, and choosing one; the engines themselves load on first use."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from vovnet import _lazy
from vovnet.errors import ConfigError
from vovnet.exported import BESIDE, check_export, find_export, sha256
from vovnet.graph_file import is_graph_file
from vovnet.model_folder import load_config, resolve_model
from vovnet.preprocess import Preprocess
from vovnet.published import find_published
from vovnet.runtime.measured import (
    Key,
    Measured,
    find_measured,
    is_busy,
    keep_measured,
    measurement_key,
    time_engines,
)

ENGINES = ("auto", *_lazy.ENGINES)
PRECISIONS = ("fp32", "bf16", "fp16", "int8")
MODES = ("latency", "throughput")
_OF_TORCH = ("torch", "torch-packed", "torch-compile", "torch-triton")
_READERS = {".onnx": ("onnxruntime", "openvino"), ".xml": ("openvino",), ".pt2": ("torch-export",)}
"""Of each exported form, the engines that run it, the first choice first."""
_FLAGS = {"torch-export": " --format torch-export"}
_WITH_MODES = ("openvino",)
_MADE_UP_SIZE = 240, 320
"""Height and width of the picture that engines are timed on, before the model's own resize."""


class Engine(Protocol):
    """A loaded network: a batch of pictures in, the arrays of DeployGraph or ClassifierGraph out.

    name            of ENGINES
    chosen_because  why `auto` came to it, in words; empty where it was named
    precision       what the convolutions compute in
    device          cpu, cuda:0, ...
    parallel        batches that it computes at the same time, each `infer` in a thread of its own
    max_detections  K, the padded number of detections of an image; 0 of a classifier
    has_masks       whether mask_probs and mask_scores are among the results
    """

    name: str
    chosen_because: str
    precision: str
    device: str
    parallel: int
    max_detections: int
    has_masks: bool

    def infer(self, images: NDArray[np.uint8], sizes: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """images (B, H, W, 3) RGB, sizes (B, 2) height and width of the picture in each.

        Returns boxes (B, K, 4) xyxy in pixels of the images, scores, labels, valid (B, K) and,
        of a segmenter, mask_probs (B, K, 28, 28) and mask_scores (B, K). A classifier returns
        logits (B, C) and embedding (B, F), a backbone the embedding alone. The results are
        complete when it returns.
        """


@dataclass(frozen=True, slots=True)
class Candidate:
    """An engine by its name, the path or name of what it would load, and why it may be chosen;
    `passed_over` says which exports beside it may not, and why.
    """

    engine: str
    model: str | Path
    because: str
    passed_over: str = ""


def load_engine(
    folder_or_name: str | Path,
    *,
    engine: str = "auto",
    precision: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    settings: Mapping[str, object] | None = None,
    mode: str = "latency",
) -> Engine:
    """An engine with the network of a model folder, a bundled model, published weights or an
    exported file.

    engine `auto` is an exported file's own; of a folder the export that lies in it, where its
    engine is installed and no GPU is asked for, else torch. Where several could run, the fastest on
    this machine is taken: it is measured for about a second, and kept in the user's cache for a
    month, what a busy machine showed for the day.
    precision `auto` is fp32, or int8 of a file that is quantised. threads sets the CPU threads.
    settings go over the folder's own settings of the network (min_score, max_detections). mode
    `throughput` prepares OpenVINO for several batches at a time, as `infer_stream` gives them; the
    other engines know one way only.
    Raises ConfigError on an unknown engine, precision, device or mode, on a folder that is not
    complete and right, and on an export of other weights than the folder's.
    """
    if engine not in ENGINES:
        raise ConfigError(f"engine: expected {', '.join(ENGINES)}; got {engine!r}")
    if precision not in ("auto", *PRECISIONS):
        raise ConfigError(f"precision: expected auto, {', '.join(PRECISIONS)}; got {precision!r}")
    if mode not in MODES:
        raise ConfigError(f"mode: expected {' or '.join(MODES)}, got {mode!r}")
    candidates = find_candidates(folder_or_name, engine, device)
    if precision == "int8" and candidates[0].engine in _OF_TORCH:
        raise ConfigError(
            f"precision: expected fp32, bf16 or fp16 for the engine {candidates[0].engine}, got "
            f"'int8'; `vovnet export {folder_or_name} --format openvino --precision int8` makes "
            "what runs in it"
        )
    load = partial(
        _load, precision=precision, device=device, threads=threads, settings=settings or {}
    )
    if len(candidates) == 1:
        loaded = load(candidates[0], mode=mode)
        because = candidates[0].because + candidates[0].passed_over
        loaded.chosen_because = because if engine == "auto" else ""
        return loaded
    key = _key_of(candidates, precision=precision, threads=threads)
    return _load_fastest(candidates, load, key, mode=mode)


def find_candidates(folder_or_name: str | Path, engine: str, device: str) -> list[Candidate]:
    """What `load_engine` would load: one, or several of which it takes the fastest.

    Raises ConfigError where there is nothing that the engine runs.
    """
    if find_published(folder_or_name) is not None:
        if engine not in ("auto", *_OF_TORCH):
            raise ConfigError(
                f"engine: expected torch for {folder_or_name}; for {engine} name a file that "
                f"`vovnet export {folder_or_name}` wrote"
            )
        name = "torch" if engine == "auto" else engine
        return [Candidate(name, str(folder_or_name), "it runs published weights")]
    model = resolve_model(folder_or_name)
    if is_graph_file(model):
        return [_choose_for_file(model, engine)]
    return _candidates_of_folder(model, engine, device)


def _choose_for_file(file: Path, engine: str) -> Candidate:
    readers = _READERS[file.suffix]
    if engine == "auto":
        installed = [name for name in readers if find_spec(name) is not None]
        return Candidate((installed or list(readers))[0], file, f"it runs {file.suffix} files")
    if engine not in readers:
        raise ConfigError(f"engine: expected {' or '.join(readers)} for {file}, got {engine!r}")
    return Candidate(engine, file, "")


def _candidates_of_folder(folder: Path, engine: str, device: str) -> list[Candidate]:
    if engine in _OF_TORCH:
        return [Candidate(engine, folder, "")]
    if engine == "auto":
        installed = [name for name in BESIDE if device in ("auto", "cpu") and find_spec(name)]
        files = {name: find_export(folder, name) for name in installed}
        beside = [
            Candidate(name, file, f"{file} lies beside the weights")
            for name, file in files.items()
            if file is not None
        ]
        none = Candidate("torch", folder, "no export lies beside the weights")
        return _without_stale(beside, folder) or [none]
    file = find_export(folder, engine)
    if file is None:
        names = " or ".join(BESIDE[engine])
        raise ConfigError(
            f"{folder}: expected {names} for the engine {engine}, found none; "
            f"`vovnet export {folder}{_FLAGS.get(engine, '')}` writes it"
        )
    check_export(file, folder)
    return [Candidate(engine, file, "")]


def _without_stale(candidates: Sequence[Candidate], folder: Path) -> list[Candidate]:
    """Those that are exports of the folder as it is now; raises ConfigError where none is."""
    current, errors = [], []
    for candidate in candidates:
        try:
            check_export(Path(candidate.model), folder)
            current.append(candidate)
        except ConfigError as error:
            errors.append(error)
    if errors and not current:
        raise errors[0]
    return [replace(one, passed_over=_passed_over(errors)) for one in current]


def _passed_over(errors: Sequence[ConfigError]) -> str:
    return "".join(f"; passed over: {error}" for error in errors)


def _load(
    candidate: Candidate,
    *,
    precision: str,
    device: str,
    threads: int | None,
    settings: Mapping[str, object],
    mode: str,
) -> Engine:
    load = cast(Callable[..., Engine], _lazy.load(_lazy.ENGINES[candidate.engine]))
    modes = {"mode": mode} if candidate.engine in _WITH_MODES else {}
    return load(
        candidate.model,
        precision=precision,
        device=device,
        threads=threads,
        settings=settings,
        **modes,
    )


def _load_fastest(
    candidates: Sequence[Candidate], load: Callable[..., Engine], key: Key, *, mode: str
) -> Engine:
    """The engine that is known to be the fastest, or is found to be now."""
    by_name = {candidate.engine: candidate for candidate in candidates}
    measured, failed = find_measured(key), ""
    loaded: dict[str, Engine] = {}
    if measured is None:
        loaded, failed = _load_possible(candidates, load, key["precision"])
        if len(loaded) > 1:
            measured = _measure(loaded, Path(candidates[0].model))
            keep_measured(key, measured)
    name = measured.fastest if measured else next(iter(loaded))
    known = loaded.get(name) if mode == "latency" else None
    engine = known or load(by_name[name], mode=mode)
    because = measured.describe() if measured else by_name[name].because
    engine.chosen_because = because + by_name[name].passed_over + failed
    return engine


def _load_possible(
    candidates: Sequence[Candidate], load: Callable[..., Engine], precision: str
) -> tuple[dict[str, Engine], str]:
    """Those that can run as asked, by name, and why others cannot where no precision was asked for:
    not every engine has every precision.

    Who asks for a float precision gets a file in int8 only where there is no other. Raises
    ConfigError where none can.
    """
    loaded, errors = {}, []
    for candidate in candidates:
        try:
            loaded[candidate.engine] = load(candidate, mode="latency")
        except ConfigError as error:
            errors.append(error)
    if not loaded:
        raise errors[0]
    floats = {name: one for name, one in loaded.items() if one.precision != "int8"}
    if precision == "auto":
        return loaded, _passed_over(errors)
    return floats if floats and precision != "int8" else loaded, ""


def _measure(engines: Mapping[str, Engine], model: Path) -> Measured:
    """Times loaded engines on one made-up picture, as the model's preprocess makes it."""
    config = load_config(model)
    preprocess = Preprocess.from_dict(config.preprocess)
    if config.task == "classify":
        preprocess = replace(preprocess, size_divisor=1)  # in a pooled map padding would count
    picture = np.random.default_rng(0).integers(0, 256, (*_MADE_UP_SIZE, 3), dtype=np.uint8)
    batch = preprocess.batch([preprocess.resize(picture)])
    runs = {name: partial(engine.infer, *batch) for name, engine in engines.items()}
    busy = is_busy()
    return Measured(
        ms_per_image=time_engines(runs),
        precisions={name: engine.precision for name, engine in engines.items()},
        date=datetime.now(UTC).date().isoformat(),
        busy=busy,
    )


def _key_of(candidates: Sequence[Candidate], *, precision: str, threads: int | None) -> Key:
    files = {}
    for candidate in candidates:
        file = Path(candidate.model)
        parts = [path for path in (file, file.with_suffix(".bin")) if path.is_file()]
        files[candidate.engine] = [sha256(path) for path in parts]
    return measurement_key(files, precision=precision, threads=threads)
