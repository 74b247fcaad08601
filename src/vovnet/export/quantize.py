"""An export in eight bits, which is kept only where accuracy on the user's data holds."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vovnet.classify import Classifier
from vovnet.data.formats import load_split
from vovnet.data.labels import DetectionData, has_masks
from vovnet.errors import ConfigError, DataError
from vovnet.evaluation import evaluate_coco, predict_images
from vovnet.evaluation_classes import evaluate_classes, load_known_classes, predict_logits
from vovnet.export.check import Batch, Comparison, find_unsound, make_batches
from vovnet.export.int8 import (
    Feeds,
    layer_errors,
    layer_names,
    layers_run,
    quantize,
    read_network,
)
from vovnet.export.model import (
    Progress,
    Source,
    export_model,
    move_files,
    preprocess_of,
    work_folder,
)
from vovnet.exported import EXPORT_KEY, ExportInfo, Int8Info, read_export_info
from vovnet.images import read_image
from vovnet.predict import Predictor
from vovnet.preprocess import Preprocess
from vovnet.runtime.engine import Engine
from vovnet.runtime.exported import ExportedFile, open_exported
from vovnet.runtime.openvino import OpenVinoEngine, import_openvino

Pixels = NDArray[np.uint8]
Metric = Literal["top1", "box_ap", "mask_ap"]

CALIBRATION_SPLIT = "train"
FLOAT_SHARES = (0.05, 0.1, 0.2)
"""Of the layers, those of the largest error that each further try leaves in float."""
TOLD_EVERY_S = 10.0
"""Between two counts of the pictures that an accuracy is measured on."""
_LOOKED_AT = 8  # pictures that errors of layers are measured on
_BLAMED = 10
_FLOAT_FILE, _TRIED_FILE = "float.xml", "tried.xml"


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Of an engine on the labelled pictures of a split, 0..1."""

    metric: Metric
    value: float
    pictures: int


@dataclass(frozen=True, slots=True)
class Trial:
    """What a network is calibrated on and judged by."""

    split: str
    preprocess: Preprocess
    settings: dict[str, object]  # of the engine, as for AP
    calibration: tuple[Callable[[], Pixels], ...]  # pictures (H, W, 3) uint8 RGB, read on call
    looked_at: tuple[Callable[[], Pixels], ...]  # a few of the split
    measure: Callable[[Engine], Accuracy]


@dataclass(frozen=True, slots=True)
class Int8Export:
    """What was written, nothing where there are problems."""

    files: tuple[Path, ...]
    comparisons: tuple[Comparison, ...]  # of the float network with torch
    int8: Int8Info | None  # the last try
    run_in_int8: int  # of its convolutions on this processor
    run_in_float: int
    problems: tuple[str, ...]
    blamed: tuple[tuple[str, float], ...]  # layers and their errors, the largest first


@dataclass(frozen=True, slots=True)
class _Try:
    """A quantised network with what its file says, and what it came to."""

    model: Any
    told: ExportInfo
    info: Int8Info
    counts: tuple[int, int]  # convolutions run in eight bits, and in float
    unsound: tuple[str, ...]

    @property
    def drop(self) -> float:
        """Points of a hundred below the float file."""
        return 100 * (self.info.float_accuracy - self.info.accuracy)

    def holds(self, max_drop: float) -> bool:
        """Whether it may be kept."""
        return not self.unsound and self.drop <= max_drop


@dataclass(frozen=True, slots=True)
class _Reference:
    """The float file, what it came to, and pictures that others must answer in its form."""

    file: ExportedFile
    engine: Engine
    accuracy: Accuracy
    batches: tuple[Batch, ...]


def make_trial(
    source: Source,
    data_dir: Path,
    split: str,
    *,
    calibration: int,
    seed: int = 0,
    progress: Progress = lambda text: None,
) -> Trial:
    """The trial of a network on a data set as `vovnet val` takes it: accuracy on `split`, ranges
    from `calibration` pictures of the split train, drawn by chance. progress is told how far a
    measurement is, now and then.

    Raises ConfigError on other classes than the network's, DataError on data that is not there.
    """
    make = _class_trial if source.config.task == "classify" else _detection_trial
    return make(source, data_dir, split, calibration, np.random.default_rng(seed), progress)


def export_int8(
    source: Source,
    output: Path,
    pictures: Sequence[Pixels],
    *,
    trial: Trial,
    max_drop: float,
    progress: Progress = lambda text: None,
) -> Int8Export:
    """Writes a network in eight bits to `output`, .xml with .bin beside it, where its accuracy
    falls by no more than max_drop, in points of a hundred, below that of the same file in float.

    Layers with the largest errors are left in float where that is needed. The float file is
    compared with torch on pictures (H, W, 3) uint8 RGB first. A file that is refused is not kept,
    one of the same name that was there stays. progress is told each stage as it begins. Raises
    ConfigError where a package is missing.
    """
    with work_folder(output) as folder:
        done = export_model(
            source, folder / _FLOAT_FILE, pictures, format="openvino", progress=progress
        )
        if done.problems:
            return Int8Export((), done.comparisons, None, 0, 0, tuple(done.problems), ())
        progress(f"measuring accuracy on the split {trial.split} in float")
        reference = _measure_float(folder, trial, pictures)
        return _search(folder, output, trial, max_drop, reference, done.comparisons, progress)


def _measure_float(folder: Path, trial: Trial, pictures: Sequence[Pixels]) -> _Reference:
    file = _open(folder / _FLOAT_FILE, trial)
    engine = OpenVinoEngine(file, precision="fp32", threads=None)
    found = trial.measure(engine)
    if not np.isfinite(found.value):
        raise DataError(f"split {trial.split}: expected something to find, found nothing to judge")
    return _Reference(file, engine, found, tuple(make_batches(trial.preprocess, pictures)))


def _search(
    folder: Path,
    output: Path,
    trial: Trial,
    max_drop: float,
    reference: _Reference,
    comparisons: tuple[Comparison, ...],
    progress: Progress,
) -> Int8Export:
    """Tries with ever more layers in float until one holds."""
    model = read_network(reference.file.path)
    progress("measuring accuracy in int8")
    tried = _try(model, folder, trial, reference, {})
    if not tried.holds(max_drop):
        progress("; ".join((*tried.unsound, *_problems(tried, max_drop))))
        names = layer_names(model)
        looked_at = _Feeds(reference.file, trial.preprocess, trial.looked_at)
        errors = _sorted(layer_errors(model, tried.model, looked_at))
        for share in FLOAT_SHARES:
            kept = {name: names[name] for name in list(errors)[: math.ceil(share * len(errors))]}
            progress(f"measuring accuracy in int8 with {len(kept)} layers in float")
            tried = _try(model, folder, trial, reference, kept)
            if tried.holds(max_drop):
                break
            progress("; ".join((*tried.unsound, *_problems(tried, max_drop))))
        else:
            problems = (*tried.unsound, *_problems(tried, max_drop))
            blamed = _by_weight(errors, names)[:_BLAMED]
            return Int8Export((), comparisons, tried.info, *tried.counts, problems, blamed)
    files = _keep(tried, folder, output)
    return Int8Export(files, comparisons, tried.info, *tried.counts, (), ())


def _try(
    model: Any, folder: Path, trial: Trial, reference: _Reference, kept: Mapping[str, str]
) -> _Try:
    """A quantised network and how accurate its file is; kept layers by the names of operations."""
    told = read_export_info(reference.file.path).model_copy(update={"precision": "int8"})
    pictures = _Feeds(reference.file, trial.preprocess, trial.calibration)
    quantized = quantize(model, pictures, keep_float=kept)
    _save(quantized, told, folder / _TRIED_FILE)
    engine = OpenVinoEngine(_open(folder / _TRIED_FILE, trial), precision="auto", threads=None)
    found = trial.measure(engine)
    int8 = Int8Info(
        metric=found.metric,
        accuracy=found.value,
        float_accuracy=reference.accuracy.value,
        split=trial.split,
        pictures=found.pictures,
        calibration_pictures=len(pictures),
        float_layers=sorted(set(kept.values())),
    )
    told = told.model_copy(update={"int8": int8})
    in_int8, in_float = layers_run(engine.compiled)
    unsound = find_unsound(reference.engine.infer, engine.infer, reference.batches)
    return _Try(quantized, told, int8, (len(in_int8), len(in_float)), tuple(unsound))


def _problems(tried: _Try, max_drop: float) -> Iterator[str]:
    info = tried.info
    if not tried.drop <= max_drop:  # NaN is too much, too
        yield (
            f"{info.metric}: expected at most {max_drop:g} points less than in float, found "
            f"{tried.drop:.2f} less ({100 * info.accuracy:.2f} of {100 * info.float_accuracy:.2f}, "
            f"{info.pictures} pictures of {info.split}), with {len(info.float_layers)} layers in "
            "float"
        )


def _keep(tried: _Try, folder: Path, output: Path) -> tuple[Path, ...]:
    written = folder / "kept" / output.name
    written.parent.mkdir()
    _save(tried.model, tried.told, written)
    return move_files(written, output)


def _save(model: Any, told: ExportInfo, path: Path) -> None:
    model.set_rt_info(told.model_dump_json(), ["framework", EXPORT_KEY])
    import_openvino().save_model(model, str(path), compress_to_fp16=False)


def _open(path: Path, trial: Trial) -> ExportedFile:
    return open_exported(path, device="cpu", settings=trial.settings)


def _sorted(errors: Mapping[str, float]) -> dict[str, float]:
    return dict(sorted(errors.items(), key=lambda entry: -entry[1]))


def _by_weight(
    errors: Mapping[str, float], names: Mapping[str, str]
) -> tuple[tuple[str, float], ...]:
    """Sorted errors by the names that people know; of a head that every level runs, the largest."""
    largest: dict[str, float] = {}
    for name, error in errors.items():
        largest.setdefault(names[name], error)
    return tuple(largest.items())


class _Feeds(Sequence[Feeds]):
    """Pictures as a file's inputs, each read when it is asked for."""

    def __init__(
        self, file: ExportedFile, preprocess: Preprocess, pictures: Sequence[Callable[[], Pixels]]
    ) -> None:
        self._file, self._preprocess, self._pictures = file, preprocess, pictures

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: Any) -> Any:
        resized = self._preprocess.resize(self._pictures[index]())
        return self._file.feeds(*self._preprocess.batch([resized]))


def _class_trial(
    source: Source,
    data_dir: Path,
    split: str,
    calibration: int,
    random: np.random.Generator,
    progress: Progress,
) -> Trial:
    preprocess, names = preprocess_of(source), tuple(source.config.class_names)
    if not names:
        raise ConfigError("int8: expected a classifier, found a backbone without classes")
    judged = load_known_classes(data_dir, split, names)
    known = load_known_classes(data_dir, CALIBRATION_SPLIT, names)

    def measure(engine: Engine) -> Accuracy:
        count = _counter(progress, len(judged))
        logits = predict_logits(Classifier(engine, preprocess, names), judged, on_batch=count)
        return Accuracy("top1", evaluate_classes(logits, judged.labels, names).top1, len(judged))

    return Trial(
        split=split,
        preprocess=preprocess,
        settings={},
        calibration=tuple(partial(known.read, i) for i in _draw(len(known), calibration, random)),
        looked_at=tuple(partial(judged.read, i) for i in _draw(len(judged), _LOOKED_AT, random)),
        measure=measure,
    )


def _detection_trial(
    source: Source,
    data_dir: Path,
    split: str,
    calibration: int,
    random: np.random.Generator,
    progress: Progress,
) -> Trial:
    judged, _ = load_split(data_dir, split, read_pixels=False)
    known, _ = load_split(data_dir, CALIBRATION_SPLIT, read_pixels=False)
    names = tuple(source.config.class_names)
    if judged.class_names != names:
        raise ConfigError(
            f"{data_dir}: expected the model's classes {', '.join(names)}, found "
            f"{', '.join(judged.class_names)}"
        )
    return Trial(
        split=split,
        preprocess=preprocess_of(source),
        settings={"min_score": 0.0},  # AP ranks all that the detector finds
        calibration=_readers(known, _draw(len(known.images), calibration, random)),
        looked_at=_readers(judged, _draw(len(judged.images), _LOOKED_AT, random)),
        measure=partial(_measure_detections, source, judged, progress),
    )


def _measure_detections(
    source: Source, data: DetectionData, progress: Progress, engine: Engine
) -> Accuracy:
    config = source.config
    names, ids = tuple(config.class_names), tuple(config.category_ids)
    preprocess = preprocess_of(source)
    predictor = Predictor(engine, preprocess, names, category_ids=ids, score_threshold=0.0)
    masks = has_masks(data) and engine.has_masks
    count = _counter(progress, len(data.images))
    found: list[dict[str, Any]] = []
    for number, results in enumerate(predict_images(predictor, data), start=1):
        found += results
        count(number)
    metrics = evaluate_coco(
        data,
        found,
        iou_types=("segm",) if masks else ("bbox",),
        max_detections=engine.max_detections,
    )
    return Accuracy("mask_ap" if masks else "box_ap", metrics.main(), len(data.images))


def _counter(progress: Progress, total: int) -> Callable[[int], None]:
    """Tells progress from time to time how many pictures of the total are done."""
    told_s = time.monotonic()

    def count(done: int) -> None:
        nonlocal told_s
        if time.monotonic() - told_s >= TOLD_EVERY_S:
            told_s = time.monotonic()
            progress(f"{done} of {total} pictures")

    return count


def _readers(data: DetectionData, indices: Sequence[int]) -> tuple[Callable[[], Pixels], ...]:
    return tuple(partial(read_image, data.images[index].path) for index in indices)


def _draw(count: int, wanted: int, random: np.random.Generator) -> list[int]:
    """Places of as many of count as there are, at most wanted, in their order."""
    drawn = random.choice(count, size=min(count, wanted), replace=False)
    return sorted(int(place) for place in drawn)
