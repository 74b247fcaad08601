"""What tests of several modules share: small model folders with random weights."""

import fcntl
import os
import shutil
from pathlib import Path

import pytest
import torch

from vovnet.export.check import made_up_pictures
from vovnet.export.model import export_model, load_source
from vovnet.export.onnx import write_openvino
from vovnet.exported import ONNX_FILE, OPENVINO_FILE
from vovnet.model_folder import ModelConfig, save_model_folder
from vovnet.models.zoo import create_model
from vovnet.preprocess import Preprocess

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores

SMALL_DETECTOR = "centermask_lite_ese_vovnet19b_slim_dw"
SMALL_CLASSIFIER = "ese_vovnet19b_slim_dw"


@pytest.fixture(autouse=True)
def engines_measured_here(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """What the user's own cache knows of engines decides nothing here, and nothing is put there."""
    folder = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setattr("vovnet.runtime.measured.cache_folder", lambda: folder)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A segmenter of two classes that finds 20 arbitrary objects in any image."""
    torch.manual_seed(0)
    overrides = {"mask_iou_width": 16, "max_detections": 20, "score_threshold": 0.0}
    model = create_model(SMALL_DETECTOR, num_classes=2, overrides=overrides)
    torch.nn.init.normal_(model.mask_head.predictor.weight)
    torch.nn.init.constant_(model.mask_iou_head.iou.bias, 0.5)
    folder = tmp_path_factory.mktemp("models") / "small"
    config = ModelConfig(
        architecture=SMALL_DETECTOR,
        model_args={"num_classes": 2, "overrides": overrides},
        task="segment",
        class_names=["cat", "dog"],
        category_ids=[7, 3],
        preprocess=Preprocess(scale=1.5).to_dict(),
        licence="Apache-2.0",
    )
    tensors = {name: value.numpy() for name, value in model.state_dict().items()}
    save_model_folder(folder, config, tensors, card="# small\n")
    return folder


@pytest.fixture(scope="session")
def classifier_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of three classes, whose answers differ from image to image."""
    return save_classifier(
        tmp_path_factory.mktemp("models") / "classifier", class_names=["кот", "개", "bird"]
    )


@pytest.fixture(scope="session")
def backbone_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network without classes."""
    return save_classifier(tmp_path_factory.mktemp("models") / "backbone", class_names=[])


@pytest.fixture(scope="session")
def exported_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The segmenter with its exports beside."""
    return export_once(model_folder, tmp_path_factory)


@pytest.fixture(scope="session")
def exported_classifier_folder(
    classifier_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The classifier with its exports beside."""
    return export_once(classifier_folder, tmp_path_factory)


def export_once(source: Path, temporary: pytest.TempPathFactory) -> Path:
    """A copy of a model folder with both exports, which all workers share: a detector's takes the
    exporter most of a minute. Tests only read it.
    """
    base = temporary.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = shared / f"exported-{source.name}"
    with (shared / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            add_exports(source, temporary.mktemp("exports") / source.name).rename(folder)
    return folder


def add_exports(source: Path, folder: Path) -> Path:
    """A copy of a model folder with both exports, which are compared with torch on the way."""
    shutil.copytree(source, folder)
    done = export_model(load_source(folder), folder / ONNX_FILE, made_up_pictures())
    assert {one.engine for one in done.comparisons} == {"onnxruntime", "openvino"}
    assert done.problems == []
    (folder / OPENVINO_FILE).parent.mkdir()
    write_openvino(folder / ONNX_FILE, folder / OPENVINO_FILE)
    return folder


def save_classifier(folder: Path, *, class_names: list[str]) -> Path:
    torch.manual_seed(0)
    model = create_model(SMALL_CLASSIFIER, num_classes=len(class_names))
    if class_names:
        torch.nn.init.normal_(model.head.fc.weight, std=30)
    config = ModelConfig(
        architecture=SMALL_CLASSIFIER,
        model_args={"num_classes": len(class_names)},
        task="classify",
        class_names=class_names,
        category_ids=list(range(len(class_names))),
        preprocess=Preprocess(
            short_side=72, max_long_side=None, crop_size=64, interpolation="bicubic"
        ).to_dict(),
        licence="Apache-2.0",
    )
    tensors = {name: value.numpy() for name, value in model.state_dict().items()}
    save_model_folder(folder, config, tensors, card="# small\n")
    return folder
