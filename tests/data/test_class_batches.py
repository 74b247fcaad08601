import math
import random

import numpy as np
import pytest
import torch
from tests.class_folders import make_class_folders

from vovnet.data.class_batches import (
    ClassItem,
    ClassPreset,
    ClassTrainDataset,
    balanced_order,
    collate_classes,
    crop_box,
)
from vovnet.data.classes import load_classes
from vovnet.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return load_classes(make_class_folders(tmp_path_factory.mktemp("data")), "train")


def make_items(dataset, indices, epoch=0):
    dataset.set_place(epoch, 0.0)
    return [dataset[index] for index in indices]


ALL_ON = ClassPreset(
    image_size=32,
    interpolation="random",
    vertical_flip=0.5,
    brightness=0.3,
    hue=0.1,
    rand_augment="rand-m9-mstd0.5",
    erase=0.5,
    mixup=0.2,
    cutmix=1.0,
    label_smoothing=0.1,
)


def test_a_sample_depends_on_seed_epoch_and_index_alone(data):
    first = ClassTrainDataset(data, preset=ALL_ON, seed=3)
    second = ClassTrainDataset(data, preset=ALL_ON, seed=3, cache_bytes=0)
    expected = make_items(first, range(6), epoch=2)
    random.seed(9)
    torch.rand(3)
    found = make_items(second, reversed(range(6)), epoch=2)[::-1]
    for a, b in zip(expected, found, strict=True):
        assert np.array_equal(a.image, b.image)
    other_epoch = make_items(first, range(6), epoch=3)
    other_seed = make_items(ClassTrainDataset(data, preset=ALL_ON, seed=4), range(6), epoch=2)
    for others in (other_epoch, other_seed):
        pairs = zip(expected, others, strict=True)
        assert not any(np.array_equal(a.image, b.image) for a, b in pairs)


def test_global_generators_are_left_alone(data):
    dataset = ClassTrainDataset(data, preset=ALL_ON, seed=3)
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    expected = torch.rand(1), random.random(), np.random.rand()
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    collate_classes(make_items(dataset, range(4)), data=data, preset=ALL_ON, seed=0)
    assert (torch.rand(1), random.random(), np.random.rand()) == expected


def test_batches(data):
    dataset = ClassTrainDataset(data, preset=ClassPreset(image_size=32))
    batch = collate_classes(
        make_items(dataset, [0, 7, 14]), data=data, preset=dataset.preset, seed=0
    )
    assert batch.images.shape == (3, 32, 32, 3)
    assert batch.images.dtype == torch.uint8
    assert batch.sizes.tolist() == [[32, 32]] * 3
    assert torch.equal(batch.targets.labels, torch.eye(3))
    assert [str(path) for path in batch.paths] == [data.name(index) for index in (0, 7, 14)]
    # Of blue, green and red pictures whatever the crop: the brightest channel.
    assert batch.images.float().mean((1, 2)).argmax(1).tolist() == [2, 1, 0]


def test_crops_lie_in_the_picture_and_have_the_stated_areas():
    draw = random.Random(0)
    preset = ClassPreset(scale=(0.2, 0.5), ratio=(0.5, 2.0))
    shares, ratios = [], []
    for _ in range(500):
        left, top, right, bottom = crop_box(60, 90, preset, draw)
        assert 0 <= left < right <= 90
        assert 0 <= top < bottom <= 60
        shares.append((right - left) * (bottom - top) / 5400)
        ratios.append((right - left) / (bottom - top))
    assert 0.18 < min(shares) < 0.24
    assert 0.46 < max(shares) < 0.52
    assert 0.45 < min(ratios) < 0.6
    assert 1.7 < max(ratios) < 2.2


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 500), (300, 2), (3, 3)])
def test_tiny_and_thin_pictures_have_a_crop(height, width):
    for seed in range(20):
        box = crop_box(height, width, ClassPreset(), random.Random(seed))
        assert 0 <= box[0] < box[2] <= width
        assert 0 <= box[1] < box[3] <= height


def test_sizes_grow_with_the_training():
    preset = ClassPreset(image_size=96, first_image_size=48, full_size_from=0.5)
    sizes = [preset.size_at(progress) for progress in (0.0, 0.1, 0.25, 0.4, 0.5, 1.0)]
    assert sizes == [48, 64, 80, 80, 96, 96]
    assert ClassPreset(image_size=90).size_at(0.0) == 90


def test_the_size_of_a_batch_is_that_of_its_progress(data):
    preset = ClassPreset(image_size=64, first_image_size=32)
    dataset = ClassTrainDataset(data, preset=preset)
    assert dataset[0].image.shape == (32, 32, 3)
    dataset.set_place(0, 1.0)
    assert dataset[0].image.shape == (64, 64, 3)


def flat_items(values, size=16):
    images = [np.full((size, size, 3), value, np.uint8) for value in values]
    return [ClassItem(image, index, 0) for index, image in enumerate(images)]


def test_mixup_mixes_pictures_labels_and_lessons_alike(data):
    preset = ClassPreset(mixup=1.0)
    lesson = np.arange(len(data), dtype=np.float32)[:, None] * 10
    items = flat_items([0, 100, 200])
    batch = collate_classes(
        items, data=data.chosen([0, 7, 14]), preset=preset, seed=5, teacher=lesson
    )
    share = float(batch.targets.labels[0, 0])
    assert 0 < share < 1
    assert batch.targets.labels[0].tolist() == pytest.approx([share, 0, 1 - share])
    assert batch.targets.labels[1].tolist() == pytest.approx([0, 1, 0])
    assert float(batch.images[0].float().mean()) == pytest.approx(200 * (1 - share), abs=0.5)
    assert float(batch.images[2].float().mean()) == pytest.approx(200 * share, abs=0.5)
    assert batch.targets.teacher is not None
    expected = [20 * (1 - share), 10, 20 * share]
    assert batch.targets.teacher.flatten().tolist() == pytest.approx(expected, rel=1e-5)


def test_cutmix_pastes_the_share_that_the_labels_say(data):
    preset = ClassPreset(cutmix=1.0)
    for seed in range(10):
        items = flat_items([0, 200], size=40)
        batch = collate_classes(items, data=data.chosen([0, 14]), preset=preset, seed=seed)
        pasted = float((batch.images[0] == 200).float().mean())
        assert batch.targets.labels[0].tolist() == pytest.approx([1 - pasted, 0, pasted], abs=1e-6)
        assert set(batch.images.unique().tolist()) <= {0, 200}


def test_smoothed_labels(data):
    preset = ClassPreset(label_smoothing=0.3)
    batch = collate_classes(flat_items([0, 1]), data=data, preset=preset, seed=0)
    assert batch.targets.labels[0].tolist() == pytest.approx([0.8, 0.1, 0.1])


def test_erased_rectangles(data):
    erased = ClassPreset(image_size=64, scale=(1, 1), horizontal_flip=0, erase=1.0)
    plain = ClassPreset(image_size=64, scale=(1, 1), horizontal_flip=0)
    for index in range(len(data)):
        a = ClassTrainDataset(data, preset=erased)[index].image
        b = ClassTrainDataset(data, preset=plain)[index].image
        changed = (a != b).any(axis=2)
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        box = (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
        assert 0.01 < box / 64**2 < 0.4
        assert changed.sum() > 0.95 * box


def test_balanced_orders():
    labels = np.array([0] * 90 + [1] * 9 + [3] * 1)
    order = balanced_order(labels, seed=0, epoch=0)
    assert len(order) == 100
    counts = np.bincount(labels[order], minlength=4)
    assert sorted(counts[[0, 1, 3]].tolist()) == [33, 33, 34]
    assert np.bincount(np.array(order))[90:99].min() >= 3  # each of the nine as often as the others
    assert order == balanced_order(labels, seed=0, epoch=0)
    assert order != balanced_order(labels, seed=0, epoch=1)


def test_files_that_vanish_are_named(data, tmp_path):
    folder = make_class_folders(tmp_path / "data")
    gone = load_classes(folder, "train")
    (folder / "train" / "blue" / "0.png").unlink()
    with pytest.raises(DataError, match=r"blue/0.png: no such file; --skip-bad"):
        ClassTrainDataset(gone, preset=ClassPreset())[0]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("image_size", 8, "augment.image_size: expected a whole number in 16..4096, got 8"),
        ("scale", (0.5, 1.5), "augment.scale: expected two shares"),
        ("scale", (0.5, 0.2), "augment.scale"),
        ("ratio", 3, "augment.ratio: expected two numbers"),
        ("erase", 2, r"augment.erase: expected a number in 0..1, got 2"),
        ("mixup", math.nan, "augment.mixup: expected a number of at least 0, got nan"),
        ("hue", 0.7, r"augment.hue: expected a number in 0..0.5"),
        ("label_smoothing", 1, "augment.label_smoothing: expected a number from 0 to below 1"),
        ("interpolation", "nearest", "augment.interpolation: expected bilinear, bicubic or random"),
        ("rand_augment", 9, "augment.rand_augment: expected a text"),
        ("flip", 0.5, "augment: expected one of image_size, .*got 'flip'"),
    ],
)
def test_wrong_settings_say_expected_and_got(field, value, message):
    with pytest.raises(ConfigError, match=message):
        ClassPreset.from_dict({field: value})


def test_a_wrong_description_of_rand_augment(data):
    with pytest.raises(ConfigError, match=r"such as 'rand-m9-mstd0.5', got 'strong'"):
        ClassTrainDataset(data, preset=ClassPreset(rand_augment="strong"))
