"""`vovnet val` of detectors and segmenters."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vovnet.augmented_predict import parse_views, predict_augmented
from vovnet.cli.engines import print_engine
from vovnet.data.formats import load_split
from vovnet.data.labels import DetectionData, has_masks
from vovnet.error_analysis import analyse_errors, coco_curves
from vovnet.errors import ConfigError
from vovnet.evaluation import IouType, Metrics, evaluate_coco, predict_images
from vovnet.evaluation_voc import VocMetric, evaluate_voc
from vovnet.files import atomic_write_text
from vovnet.model_folder import load_config, name_of, resolve_model
from vovnet.predict import Predictor
from vovnet.results import Detections
from vovnet.val_page import val_page

METRICS: tuple[VocMetric, ...] = ("voc07", "voc12")


@dataclass(frozen=True, slots=True)
class DetectorOptions:
    """What only a detector takes; None where it was not given."""

    max_detections: int | None
    metric: str | None  # coco, voc07 or voc12
    tta: str | None
    html: Path | None


def val_detections(
    model: str,
    data_dir: Path,
    split: str,
    options: DetectorOptions,
    *,
    format: str,
    bootstrap: int,
    engine: str,
    precision: str,
    device: str,
    threads: int | None,
    skip_bad: bool,
    as_json: bool,
) -> int:
    """Prints box and mask AP with the detection limit and intervals, or VOC's AP of boxes."""
    metric = _check_options(options)
    data, _ = load_split(data_dir, split, format=format, skip_bad=skip_bad, read_pixels=False)
    predictor = Predictor.load(
        model,
        engine=engine,
        precision=precision,
        device=device,
        threads=threads,
        score_threshold=0.0,  # AP ranks all that the detector finds
        max_detections=options.max_detections,
    )
    if predictor.class_names != data.class_names:
        raise ConfigError(
            f"{data_dir}: expected the model's classes {', '.join(predictor.class_names)}, "
            f"found {', '.join(data.class_names)}"
        )
    print_engine(predictor.engine)
    predict = _with_views(predictor, options.tta)
    predictions = list(chain.from_iterable(predict_images(predict, data)))
    with_masks = has_masks(data) and predictor.engine.has_masks
    coco = partial(
        evaluate_coco,
        data,
        predictions,
        iou_types=("bbox", "segm") if with_masks else ("bbox",),
        max_detections=predictor.engine.max_detections,
    )
    metrics = (
        coco(bootstrap=bootstrap)
        if metric is None
        else evaluate_voc(data, predictions, metric=metric)
    )
    print(json.dumps(metrics.to_dict()) if as_json else metrics.format())
    if options.html is not None:  # last, so that a full disk does not cost the figures
        shown = metrics if isinstance(metrics, Metrics) else coco()
        _write_page(options.html, model, f"{data_dir} ({split})", data, predictions, shown)
        print(f"vovnet: page: {options.html}", file=sys.stderr)
    return 0


def _check_options(options: DetectorOptions) -> VocMetric | None:
    """VOC's metric, None for COCO's; raises ConfigError before anything is loaded."""
    if options.html is not None and not options.html.absolute().parent.is_dir():
        raise ConfigError(f"html: expected an existing folder, got {options.html.parent}")
    if options.html is not None and options.html.is_dir():
        raise ConfigError(f"html: expected a file, found the folder {options.html}")
    for metric in METRICS:
        if options.metric == metric:
            return metric
    if options.metric not in (None, "coco"):
        raise ConfigError(f"metric: expected coco, voc07 or voc12, got {options.metric!r}")
    return None


def _with_views(predictor: Predictor, tta: str | None) -> Callable[[NDArray[np.uint8]], Detections]:
    if tta is None:
        return predictor
    return partial(
        predict_augmented,
        predictor,
        views=parse_views(tta),
        max_detections=predictor.engine.max_detections,
    )


def _write_page(
    path: Path,
    model: str,
    source: str,
    data: DetectionData,
    predictions: Sequence[Mapping[str, Any]],
    metrics: Metrics,
) -> None:
    """The errors are those of detections that the model would show."""
    iou_types: list[IouType] = [name for name in ("bbox", "segm") if name in metrics.by_type]
    curves = [
        coco_curves(data, predictions, iou_type=name, max_detections=metrics.max_detections)
        for name in iou_types
    ]
    min_score = load_config(resolve_model(model)).score_threshold
    if min_score is None:
        min_score = np.nan_to_num(metrics.by_type["bbox"].best_f1_score)
    errors = analyse_errors(data, predictions, min_score=float(min_score))
    name = name_of(resolve_model(model))
    atomic_write_text(path, val_page(f"{name} on {source}", data, metrics, curves, errors))
