"""Predictor: sizes, lists, thresholds, tiles, mask pasting, and folders that are not right."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from vovnet import Detections, Predictor
from vovnet.errors import ConfigError, ImageError
from vovnet.model_folder import load_tensors
from vovnet.predict import _cut_by_tile, _merge_tiles, _tile_starts, paste_mask


@pytest.fixture(scope="module")
def predictor(model_folder: Path) -> Predictor:
    return Predictor.load(model_folder)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def detections(boxes: list[list[float]], scores: list[float], size=(100, 100)) -> Detections:
    return Detections(
        boxes_xyxy=np.array(boxes, np.float32).reshape(-1, 4),
        scores=np.array(scores, np.float32),
        labels=np.zeros(len(scores), np.int64),
        image_size=size,
        class_names=("cat",),
    )


@pytest.mark.parametrize("size", [(64, 64), (1, 1), (3, 200), (71, 45)])
def test_images_of_any_size(predictor: Predictor, size: tuple[int, int]) -> None:
    found = predictor(noise(*size))
    assert found.image_size == size
    assert found.class_names == ("cat", "dog")
    assert (found.boxes_xyxy[:, 2:] <= size[::-1]).all()


def test_a_list_gives_a_list_and_single_equals_listed(predictor: Predictor) -> None:
    assert predictor([]) == []
    images = [noise(64, 64), noise(40, 70, 1)]
    one, other = predictor(images)
    np.testing.assert_array_equal(one.boxes_xyxy, predictor(images[0]).boxes_xyxy)
    assert other.image_size == (40, 70)
    assert len(one) == 20
    assert one.masks is not None
    assert one.mask_scores is not None


def test_scale_of_the_preprocess_is_undone(predictor: Predictor) -> None:
    image = noise(64, 64)
    resized = predictor.preprocess.resize(image)
    assert resized.shape == (96, 96, 3)
    raw = predictor.engine.infer(*predictor.preprocess.batch([resized]))
    expected = (raw["boxes"][0] / 1.5).clip(0, 64)
    found = predictor(image)
    np.testing.assert_allclose(found.boxes_xyxy, expected[: len(found)], atol=1e-4)


def test_max_detections_and_thresholds(model_folder: Path) -> None:
    image = noise(64, 64)
    everything = Predictor.load(model_folder)(image)
    assert len(Predictor.load(model_folder, max_detections=5)(image)) == 5
    middle = float(np.median(everything.scores))
    above = Predictor.load(model_folder, score_threshold=middle)(image)
    assert len(above) == (everything.scores >= np.float32(middle)).sum()
    no_dogs = Predictor.load(model_folder, score_threshold={"dog": 1.0})(image)
    assert len(no_dogs) == (everything.labels == 0).sum()
    with pytest.raises(ConfigError, match=r"cat, dog.*got bird"):
        Predictor.load(model_folder, score_threshold={"bird": 0.5})


def test_classes_without_a_threshold_of_their_own_keep_the_models(
    model_folder: Path, tmp_path: Path
) -> None:
    image = noise(64, 64)
    everything = Predictor.load(model_folder)(image)
    one = int(everything.labels[0])
    scores = everything.scores[everything.labels == one]
    middle = float(np.median(scores))
    folder = shutil.copytree(model_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | {"score_threshold": middle}
    (folder / "config.json").write_text(json.dumps(config))
    other = everything.class_names[1 - one]
    found = Predictor.load(folder, score_threshold={other: 1.0})(image)
    assert 0 < len(found) == (scores >= np.float32(middle)).sum() < len(scores)


def test_pasting_equals_grid_sampling() -> None:
    rng = np.random.default_rng(0)
    for box in ([3.2, 4.7, 30.1, 20.9], [-8.0, -3.5, 12.0, 50.0], [0.0, 0.0, 40.0, 25.0]):
        probabilities = rng.random((28, 28), dtype=np.float32)
        x0, y0, x1, y1 = box
        x = (torch.arange(40) + 0.5 - x0) / (x1 - x0) * 2 - 1
        y = (torch.arange(25) + 0.5 - y0) / (y1 - y0) * 2 - 1
        grid = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=-1)[None]
        source = torch.from_numpy(probabilities)[None, None]
        dense = functional.grid_sample(source, grid, align_corners=False)[0, 0] >= 0.5
        expected = dense.numpy()
        crop = paste_mask(probabilities, np.array(box, np.float32), 25, 40)
        height, width = crop.pixels.shape
        pasted = np.zeros((25, 40), bool)
        pasted[crop.y : crop.y + height, crop.x : crop.x + width] = crop.pixels
        inside = np.zeros((25, 40), bool)
        inside[crop.y : crop.y + height, crop.x : crop.x + width] = True
        np.testing.assert_array_equal(pasted, expected & inside)


@pytest.mark.parametrize(
    ("side", "starts"), [(90, [0]), (100, [0]), (101, [0, 1]), (250, [0, 80, 150])]
)
def test_tiles_cover_a_side(side: int, starts: list[int]) -> None:
    assert _tile_starts(side, 100, 20) == starts


def test_objects_cut_by_an_inner_border_are_left_to_the_neighbour() -> None:
    found = detections(
        [[0, 10, 9, 20], [40, 10, 60, 20], [91, 0, 100, 9], [0, 30, 50, 40]], [1] * 4
    )
    cut = _cut_by_tile(found, 0, 100, (100, 300), 20)
    assert cut.tolist() == [True, False, True, False]  # the last is wider than the overlap


def test_what_two_tiles_found_is_kept_once() -> None:
    boxes = [[10, 10, 30, 30], [11, 10, 31, 30], [60, 60, 80, 80], [12, 12, 20, 20]]
    assert _merge_tiles(detections(boxes, [0.5, 0.9, 0.4, 0.3])).scores.tolist() == pytest.approx(
        [0.9, 0.4]
    )


def test_one_tile_is_the_whole_image(predictor: Predictor) -> None:
    image = noise(64, 80)
    tiled = predictor.tiled(image, tile=128, overlap=16)
    whole = predictor(image)
    assert {tuple(box) for box in tiled.boxes_xyxy} <= {tuple(box) for box in whole.boxes_xyxy}
    many = predictor.tiled(image, tile=48, overlap=16)
    assert many.image_size == (64, 80)
    with pytest.raises(ValueError, match="overlap < tile"):
        predictor.tiled(image, tile=32, overlap=32)


def test_a_bad_file_is_named(predictor: Predictor, tmp_path: Path) -> None:
    path = tmp_path / "broken.png"
    path.write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"broken\.png"):
        predictor(path)


def test_the_bundled_model_keeps_its_size() -> None:
    predictor = Predictor.load("nuclei")
    assert predictor.class_names == ("nucleus",)
    assert predictor.engine.max_detections == 500


def change(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"architecture": "centermask_lite_ese_vovnet19b_slin_dw"}, "expected a known name"),
        (
            {"class_names": ["a"], "category_ids": [1]},
            "expected num_classes 1.*found num_classes 2",
        ),
        ({"colour": "blue"}, "colour"),
        ({"preprocess": {"scale": 2.0}}, "expected the keys"),
        ({"model_args": {"num_classes": 2, "overrides": {"mask_iou_width": 8}}}, "wrong shape"),
        ({"model_args": {"num_classes": 2, "overrides": {"width": 8}}}, "got 'width'"),
    ],
)
def test_wrong_folders_say_expected_and_found(
    model_folder: Path, tmp_path: Path, values: dict, message: str
) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "model")
    change(folder, **values)
    with pytest.raises(ConfigError, match=message):
        Predictor.load(folder)


def test_missing_weights_are_named(model_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "model")
    assert load_tensors(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"model\.safetensors: expected this file"):
        Predictor.load(folder)


def test_a_threshold_skips_masks_and_changes_nothing_above_it(model_folder: Path) -> None:
    image = noise(64, 64)
    everything = Predictor.load(model_folder, score_threshold=0.0)(image)
    middle = float(np.median(everything.scores))
    predictor = Predictor.load(model_folder, score_threshold=middle)
    batch = predictor.preprocess.batch([predictor.preprocess.resize(image)])
    above = everything[everything.scores >= np.float32(middle)]
    assert predictor.engine.infer(*batch)["valid"].sum() == len(above)
    np.testing.assert_allclose(predictor(image).boxes_xyxy, above.boxes_xyxy, atol=1e-4)
