import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vovnet.data.pictures import load_pictures
from vovnet.data.views import (
    ViewDataset,
    ViewPreset,
    collate_views,
    draw_regions,
    draw_windows,
    shared_part,
)
from vovnet.errors import ConfigError, DataError

PLAIN = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0, "grayscale": 0.0}
NO_COLOURS = ViewPreset(image_size=64, regions=4, blur=0.0, horizontal_flip=0.5, vertical_flip=0.5,
                        **PLAIN)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pictures whose red tells the column and whose green tells the row, 0..1 of the sides."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, (height, width) in enumerate([(200, 300), (256, 256), (300, 150)]):
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[..., 0] = np.linspace(0, 255, width)
        pixels[..., 1] = np.linspace(0, 255, height)[:, None]
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return load_pictures(folder, ("train",))


def test_regions_show_the_same_place_in_both_views_whatever_the_flips(data):
    dataset = ViewDataset(data, preset=NO_COLOURS)
    flipped = set()
    for epoch in range(12):
        dataset.set_place(epoch, 0.0)
        for index in range(len(data)):
            item = dataset[index]
            places = []
            for view, boxes in zip(item.views.astype(float), item.regions, strict=True):
                assert boxes.min() >= -1e-4
                assert boxes.max() <= 64 + 1e-4
                assert (boxes[:, 2:] > boxes[:, :2]).all()
                centres = ((boxes[:, :2] + boxes[:, 2:]) / 2).astype(int).clip(0, 63)
                places.append(view[centres[:, 1], centres[:, 0], :2])
                flipped.add((view[0, 0, 0] > view[0, -1, 0], view[0, 0, 1] > view[-1, 0, 1]))
            # A pixel of a view is at most a 64th of the picture, twice that for both roundings.
            assert np.abs(places[0] - places[1]).max() < 2 * 255 / 64 + 1
    assert len(flipped) == 4


def test_windows_share_enough_and_regions_lie_in_both():
    preset = ViewPreset(scale=(0.15, 0.3))
    for seed in range(200):
        draw = random.Random(seed)
        first, second = draw_windows(120, 160, preset, draw)
        left, top, right, bottom = shared_part(first, second)
        areas = [(w[2] - w[0]) * (w[3] - w[1]) for w in (first, second)]
        assert (right - left) * (bottom - top) >= 0.25 * min(areas)
        regions = draw_regions(first, second, 6, draw)
        assert regions[0].tolist() == [left, top, right, bottom]
        assert (regions[:, :2] >= [left, top]).all()
        assert (regions[:, 2:] <= np.array([right, bottom]) + 1e-9).all()
        sides = regions[:, 2:] - regions[:, :2]
        assert (sides >= 0.25 * np.array([right - left, bottom - top]) - 1e-9).all()


def test_an_item_depends_on_seed_epoch_and_index_alone(data):
    def item(seed=0, epoch=0, index=0, before=()):
        dataset = ViewDataset(data, preset=ViewPreset(image_size=32), seed=seed)
        for other in before:
            dataset[other]
        dataset.set_place(epoch, 0.5)
        return dataset[index]

    reference = item()
    again = item(before=(1, 2))
    assert np.array_equal(reference.views, again.views)
    assert np.array_equal(reference.regions, again.regions)
    for change in ({"seed": 1}, {"epoch": 1}, {"index": 1}):
        assert not np.array_equal(reference.views, item(**change).views)
    assert not np.array_equal(reference.views[0], reference.views[1])


def test_a_batch_holds_all_first_views_before_all_second_ones(data):
    dataset = ViewDataset(data, preset=NO_COLOURS)
    items = [dataset[0], dataset[1]]
    batch = collate_views(items)
    assert batch.images.shape == (4, 64, 64, 3)
    assert batch.sizes.tolist() == [[64, 64]] * 4
    for n, item in enumerate(items):
        for half in (0, 1):
            assert np.array_equal(batch.images[2 * half + n], item.views[half])
            assert np.array_equal(batch.targets[2 * half + n], item.regions[half])
    assert batch.paths == [Path(data.files[0]), Path(data.files[1])]


def test_a_picture_that_breaks_later_is_named(tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    found = load_pictures(tmp_path, ("train",))
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"a\.png"):
        ViewDataset(found, preset=ViewPreset(image_size=32))[0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_size": 31}, "image_size: expected a whole number in 32"),
        ({"regions": 0}, "regions"),
        ({"regions": True}, "regions"),
        ({"scale": [0.5, 0.2]}, "scale: expected two shares"),
        ({"scale": [0.5, 1.2]}, "scale"),
        ({"ratio": 1}, "ratio"),
        ({"hue": 0.6}, "hue"),
        ({"blur": -0.1}, "blur"),
        ({"contrast": float("nan")}, "contrast"),
        ({"mosaic": 1}, "expected one of image_size, regions"),
    ],
)
def test_impossible_presets_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        ViewPreset.from_dict(values)
