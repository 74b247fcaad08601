"""Choosing an engine, and what every engine gives."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from vovnet import _lazy
from vovnet.errors import ConfigError
from vovnet.runtime.engine import load_engine


def picture() -> tuple[np.ndarray, np.ndarray]:
    images = np.random.default_rng(0).integers(0, 256, (1, 64, 96, 3), dtype=np.uint8)
    return images, np.array([[60, 90]], np.int64)


# torch-compile takes a minute for a detector; a classifier has to do.
@pytest.mark.parametrize("name", ["auto", *sorted(set(_lazy.ENGINES) - {"torch-compile"})])
def test_results_have_the_declared_shapes(exported_folder: Path, name: str) -> None:
    engine = load_engine(exported_folder, engine=name)
    found = engine.infer(*picture())
    count = engine.max_detections
    assert engine.has_masks
    assert engine.name in _lazy.ENGINES
    assert {key: value.shape for key, value in found.items()} == {
        "boxes": (1, count, 4),
        "scores": (1, count),
        "labels": (1, count),
        "valid": (1, count),
        "mask_probs": (1, count, 28, 28),
        "mask_scores": (1, count),
    }


def test_settings_change_the_network(model_folder: Path) -> None:
    engine = load_engine(model_folder, settings={"max_detections": 3})
    assert engine.max_detections == 3
    assert engine.infer(*picture())["boxes"].shape == (1, 3, 4)


def test_half_precision_is_near_full_precision(model_folder: Path) -> None:
    full = load_engine(model_folder, precision="fp32")
    half = load_engine(model_folder, precision="bf16")
    assert (full.precision, half.precision) == ("fp32", "bf16")
    expected, found = full.infer(*picture()), half.infer(*picture())
    assert found["scores"].dtype == np.float32
    assert np.abs(found["scores"] - expected["scores"]).max() < 0.02
    assert (found["scores"] != expected["scores"]).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"engine": "abacus"}, "engine: expected auto, torch"),
        ({"precision": "fp7"}, "precision: expected auto, fp32"),
        ({"precision": "fp16", "device": "cpu"}, "expected fp32 or bf16 on the CPU"),
        ({"device": "toaster"}, "device: expected cpu"),
        ({"threads": 0}, "threads: expected a whole number in 1..1024, got 0"),
        ({"threads": 100_000}, "threads: expected a whole number"),
        ({"settings": {"colour": 1}}, "model settings: expected one of"),
    ],
)
def test_wrong_arguments_say_what_was_expected(
    model_folder: Path, arguments: dict, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_engine(model_folder, **arguments)


@pytest.mark.parametrize("name", ["auto", *_lazy.ENGINES])
def test_classifiers_give_logits_and_embedding(exported_classifier_folder: Path, name: str) -> None:
    engine = load_engine(exported_classifier_folder, engine=name)
    images = picture()[0][:, :, :64]  # the size of its crop, without padding
    sizes = np.array([[64, 64]], np.int64)
    found = engine.infer(images, sizes)
    assert (engine.max_detections, engine.has_masks) == (0, False)
    assert {key: value.shape for key, value in found.items()} == {
        "logits": (1, 3),
        "embedding": (1, 512),
    }
    assert found["logits"].dtype == np.float32
    expected = load_engine(exported_classifier_folder, engine="torch").infer(images, sizes)
    np.testing.assert_allclose(found["logits"], expected["logits"], atol=1e-4)


def test_compiling_needs_a_compiler(
    classifier_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ConfigError, match=r"engine: expected a C\+\+ compiler"):
        load_engine(classifier_folder, engine="torch-compile")


def test_a_task_that_is_not_the_architectures_is_named(
    classifier_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(classifier_folder, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"task": "detect"}))
    with pytest.raises(ConfigError, match=r"task: expected classify, .* found detect"):
        load_engine(tmp_path / "model", settings={"min_score": 0.0})


def test_a_backbone_gives_its_embedding_alone(backbone_folder: Path) -> None:
    assert list(load_engine(backbone_folder).infer(*picture())) == ["embedding"]
