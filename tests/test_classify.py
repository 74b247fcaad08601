"""From pictures to classes: timm's logits, batches, backbones, what is refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

from tests.hub import fill_hub
from vovnet import Classifier, Predictor
from vovnet.classify import is_classifier, softmax
from vovnet.errors import ConfigError, ImageError
from vovnet.model_folder import load_config, load_tensors
from vovnet.preprocess import Preprocess


def noise(height: int, width: int, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def classifier(classifier_folder: Path) -> Classifier:
    return Classifier.load(classifier_folder)


def test_published_weights_answer_as_in_timm(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = fill_hub(monkeypatch, tmp_path, "ese_vovnet19b_dw")
    image = noise(300, 400)
    transform = create_transform(**resolve_data_config(model=model))
    with torch.inference_mode():
        features = model.forward_features(transform(Image.fromarray(image))[None])
        embedding = model.forward_head(features, pre_logits=True).numpy()
        logits = model.forward_head(features).numpy()
    ours = Classifier.load("ese_vovnet19b_dw.ra_in1k")
    spread = logits.std()
    assert np.abs(ours.logits([image]) - logits).max() < 1e-3 * spread
    assert np.abs(ours.embeddings([image]) - embedding).max() < 1e-3 * embedding.std()
    best = np.argsort(-logits[0])[:5]
    assert [name for name, _ in ours(image).top(5)] == [ours.class_names[i] for i in best]
    larger = Classifier.load("ese_vovnet19b_dw", test_size=True)
    assert larger.preprocess.crop_size == 288


def test_a_folder_answers_as_its_network_in_timm(
    classifier: Classifier, classifier_folder: Path
) -> None:
    config = load_config(classifier_folder)
    model = timm.create_model(config.architecture, num_classes=3).eval()
    model.load_state_dict(
        {name: torch.from_numpy(value) for name, value in load_tensors(classifier_folder).items()}
    )
    images = [noise(64, 90, seed=1), noise(200, 100, seed=2)]
    mean, std = (torch.tensor(v) for v in (classifier.preprocess.mean, classifier.preprocess.std))
    pixels = np.stack([classifier.preprocess.resize(image) for image in images])
    with torch.inference_mode():
        expected = model(((torch.from_numpy(pixels) - mean) / std).permute(0, 3, 1, 2)).numpy()
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(classifier.logits(images), expected, rtol=1e-3, atol=1e-4)
    found = classifier(images)
    np.testing.assert_allclose(
        [one.probabilities for one in found],
        torch.softmax(torch.from_numpy(expected), 1).numpy(),
        atol=1e-4,
    )


def test_pictures_files_and_lists(classifier: Classifier, tmp_path: Path) -> None:
    image = noise(80, 70)
    path = tmp_path / "image.png"
    Image.fromarray(image).save(path)
    whole = classifier(image).probabilities
    assert whole.sum() == pytest.approx(1)
    for found in (classifier(path), classifier(str(path)), *classifier([image, path])):
        np.testing.assert_allclose(found.probabilities, whole, atol=1e-5)
    assert classifier([]) == []
    assert classifier.logits([]).shape == (0, 3)
    assert classifier(image).class_names == ("кот", "개", "bird")
    with pytest.raises(ImageError, match="no such file"):
        classifier(tmp_path / "missing.jpg")


@pytest.mark.parametrize("mode", ["L", "RGBA", "I;16", "P", "1"])
def test_images_of_other_kinds(classifier: Classifier, tmp_path: Path, mode: str) -> None:
    Image.new(mode, (1, 1)).save(tmp_path / "i.png")
    assert len(classifier(tmp_path / "i.png").top(5)) == 3


def test_without_a_crop_every_picture_is_looked_at_alone(classifier: Classifier) -> None:
    preprocess = Preprocess(size_divisor=1)
    free = Classifier(classifier.engine, preprocess, classifier.class_names)
    images = [noise(64, 96), noise(70, 40)]
    together = free.logits(images)
    for image, row in zip(images, together, strict=True):
        np.testing.assert_allclose(free.logits([image])[0], row, rtol=1e-5)


def test_a_backbone_embeds_and_names_nothing(backbone_folder: Path) -> None:
    backbone = Classifier.load(backbone_folder)
    assert backbone.embeddings([noise(70, 70)]).shape == (1, 512)
    with pytest.raises(ConfigError, match="found a backbone without classes"):
        backbone.logits([noise(70, 70)])
    with pytest.raises(ConfigError, match="found a backbone without classes"):
        backbone(noise(70, 70))


def test_what_is_a_classifier(
    classifier_folder: Path, backbone_folder: Path, model_folder: Path
) -> None:
    assert is_classifier(classifier_folder)
    assert is_classifier(backbone_folder)
    assert is_classifier("ese_vovnet57b")
    assert not is_classifier(model_folder)
    assert not is_classifier("nuclei")
    with pytest.raises(ConfigError, match=r"published weights have the names .*39b\.ra_in1k"):
        is_classifier("ese_vovnet99b")


def test_the_wrong_kind_of_model_is_refused(classifier_folder: Path, model_folder: Path) -> None:
    with pytest.raises(ConfigError, match="expected a classifier, found a model that detects"):
        Classifier.load(model_folder)
    with pytest.raises(ConfigError, match="found a classifier"):
        Predictor.load(classifier_folder)
    with pytest.raises(ConfigError, match="test size: expected published weights"):
        Classifier.load(classifier_folder, test_size=True)


def test_published_weights_that_cannot_be_had(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ConfigError,
        match=r"not cached, and HF_HUB_OFFLINE .*--backbone-weights FILE .*model folder",
    ):
        Classifier.load("ese_vovnet39b.ra_in1k")


def test_softmax_holds_for_any_logits() -> None:
    rows = np.array([[0, 0], [1e4, -1e4], [-5e30, -5e30]], np.float32)
    np.testing.assert_allclose(softmax(rows), [[0.5, 0.5], [1, 0], [0.5, 0.5]])


def test_the_preprocess_of_a_folder_is_its_own(classifier: Classifier) -> None:
    assert classifier.preprocess == replace(
        Preprocess(short_side=72, max_long_side=None, crop_size=64, interpolation="bicubic"),
        size_divisor=1,
    )
