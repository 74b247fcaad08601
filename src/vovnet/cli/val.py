"""`vovnet val`."""

import json
from itertools import chain
from pathlib import Path

from vovnet.data.check import load_checked
from vovnet.data.coco import find_split
from vovnet.data.labels import has_masks
from vovnet.errors import ConfigError
from vovnet.evaluation import IouType, evaluate_coco, predict_images
from vovnet.predict import Predictor


def val(
    model: str,
    data_dir: Path,
    split: str,
    max_detections: int | None,
    bootstrap: int,
    device: str,
    threads: int | None,
    as_json: bool,
) -> int:
    """Prints box and mask AP with the detection limit and intervals."""
    data, _ = load_checked(*find_split(data_dir, split), read_pixels=False)
    predictor = Predictor.load(
        model,
        device=device,
        threads=threads,
        score_threshold=0.0,  # AP ranks all that the detector finds
        max_detections=max_detections,
    )
    if predictor.class_names != data.class_names:
        raise ConfigError(
            f"{data_dir}: expected the model's classes {', '.join(predictor.class_names)}, "
            f"found {', '.join(data.class_names)}"
        )
    iou_types: tuple[IouType, ...] = ("bbox",)
    if has_masks(data) and predictor.engine.has_masks:
        iou_types = ("bbox", "segm")
    metrics = evaluate_coco(
        data,
        list(chain.from_iterable(predict_images(predictor, data))),
        iou_types=iou_types,
        max_detections=predictor.engine.max_detections,
        bootstrap=bootstrap,
    )
    print(json.dumps(metrics.to_dict()) if as_json else metrics.format())
    return 0
