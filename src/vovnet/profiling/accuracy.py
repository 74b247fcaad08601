"""Accuracy beside cost: measured on the user's labelled split, and the cost block of a model."""

from itertools import chain
from pathlib import Path
from typing import Any

from vovnet.classify import Classifier, is_classifier
from vovnet.data.formats import load_split
from vovnet.data.labels import has_masks
from vovnet.errors import ConfigError
from vovnet.evaluation import IouType, evaluate_coco, predict_images
from vovnet.evaluation_classes import evaluate_classes, load_known_classes, predict_logits
from vovnet.files import atomic_write_text
from vovnet.model_folder import CONFIG_FILE, load_config
from vovnet.predict import Predictor
from vovnet.profiling.records import Accuracy, ModelProfile, Profile, printable


def measure_accuracy(
    folder: Path,
    data_dir: Path,
    *,
    split: str = "val",
    engine: str = "auto",
    device: str = "auto",
    bootstrap: int = 200,
) -> Accuracy:
    """Top-1 of a classifier, mask AP of a segmenter on labelled masks, else box AP.

    All as `vovnet val` measures them. Raises ConfigError where the classes are not the model's or
    nothing is labelled, and DataError on a data set that is not complete and right.
    """
    if is_classifier(folder):
        return _measure_classifier(folder, data_dir, split, engine, device, bootstrap)
    data, _ = load_split(data_dir, split, read_pixels=False)
    predictor = Predictor.load(folder, engine=engine, device=device, score_threshold=0.0)
    if predictor.class_names != data.class_names:
        raise ConfigError(
            f"{data_dir}: expected the model's classes {', '.join(predictor.class_names)}, "
            f"found {', '.join(data.class_names)}"
        )
    masks = has_masks(data) and predictor.engine.has_masks
    iou_type: IouType = "segm" if masks else "bbox"
    metrics = evaluate_coco(
        data,
        list(chain.from_iterable(predict_images(predictor, data))),
        iou_types=(iou_type,),
        max_detections=predictor.engine.max_detections,
        bootstrap=bootstrap,
    )
    figures = metrics.by_type[iou_type]
    if not figures.ap == figures.ap:  # nan: nothing is labelled
        raise ConfigError(f"{data_dir}: expected labelled objects in the split {split}, found none")
    low, high = figures.ap_interval or (None, None)
    return Accuracy(
        value=figures.ap,
        metric="mask AP" if masks else "box AP",
        data=printable(f"{data_dir.resolve().name} {split}"),
        low=low,
        high=high,
    )


def _measure_classifier(
    folder: Path, data_dir: Path, split: str, engine: str, device: str, bootstrap: int
) -> Accuracy:
    classifier = Classifier.load(folder, engine=engine, device=device)
    data = load_known_classes(data_dir, split, classifier.class_names)
    logits = predict_logits(classifier, data)
    metrics = evaluate_classes(logits, data.labels, data.class_names, bootstrap=bootstrap)
    low, high = metrics.top1_interval or (None, None)
    return Accuracy(
        value=metrics.top1,
        metric="top-1",
        data=printable(f"{data_dir.resolve().name} {split}"),
        low=low,
        high=high,
    )


def cost_block(profile: Profile, model: ModelProfile) -> dict[str, Any]:
    """What a model folder records of its cost: figures of the main point, hardware, method, date.

    Raises ConfigError where nothing was measured.
    """
    result = model.main
    if result is None or result.timings is None or result.counts is None:
        raise ConfigError(f"{model.name}: expected times and counts to record, found none")
    energy, counts, machine = result.energy, result.counts, profile.machine
    point = result.point
    return {
        "input": [point.batch_size, point.height, point.width, 3],
        "precision": point.precision,
        "engine": result.engine,
        "parameters": counts.parameters,
        "macs": counts.macs,
        "flops": counts.flops,
        "memory_access_elements": counts.memory_access,
        "peak_activation_elements": counts.peak_activation_elements,
        "counted": counts.note or "the whole network",
        "network_ms": result.timings.to_dict(),
        "stages_ms": {name: times.to_dict() for name, times in model.stages.items()},
        "images_per_s": result.images_per_s,
        "energy": None if energy is None else energy.to_dict(),
        "hardware": machine["device_name"],
        "threads": machine["threads"],
        "versions": dict(machine["versions"]),
        "method": list(profile.method),
        "date": machine["date"],
    }


def update_card(folder: Path, cost: dict[str, Any]) -> None:
    """Write the cost block into config.json of a model folder, whole or not at all.

    Raises ConfigError on a folder that is none, OSError where it cannot be written.
    """
    config = load_config(folder)
    fields = {**config.model_dump(), "cost": cost}
    updated = type(config).model_validate(fields)
    atomic_write_text(folder / CONFIG_FILE, updated.model_dump_json(indent=2) + "\n")
