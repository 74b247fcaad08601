import json
from dataclasses import replace

import numpy as np
import pytest
import timm
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_transform, resolve_data_config

from vovnet.errors import ConfigError
from vovnet.preprocess import MAX_RESIZED_PIXELS, Preprocess
from vovnet.published import PUBLISHED, published_preprocess

sides = st.integers(1, 20_000)


def noise(height: int, width: int, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("preprocess", "size", "expected"),
    [
        (Preprocess(), (480, 640), (480, 640)),
        (Preprocess(), (1040, 1388), (999, 1333)),
        (Preprocess(), (1388, 1040), (1333, 999)),
        (Preprocess(max_long_side=None), (3000, 4000), (3000, 4000)),
        (Preprocess(scale=2.0), (100, 201), (200, 402)),
        (Preprocess(scale=0.5), (101, 203), (51, 102)),
        (Preprocess(scale=2.0, max_long_side=300), (100, 200), (150, 300)),
        (Preprocess(short_side=800), (480, 640), (800, 1067)),
        (Preprocess(short_side=800), (640, 480), (1067, 800)),
        (Preprocess(short_side=800), (400, 1000), (533, 1333)),
        (Preprocess(short_side=600, max_long_side=1000), (1040, 1388), (600, 801)),
        (Preprocess(short_side=8), (1, 20_000), (1, 1333)),
        (Preprocess(scale=0.001), (10, 10), (1, 1)),
        (Preprocess(square=320), (480, 640), (320, 320)),
        (Preprocess(square=1400), (1, 20_000), (1400, 1400)),
    ],
)
def test_output_size(
    preprocess: Preprocess, size: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert preprocess.output_size(*size) == expected


@given(
    height=sides,
    width=sides,
    short_side=st.none() | st.integers(1, 2000),
    limit=st.none() | st.integers(1, 4000),
)
@example(height=1, width=388, short_side=1664, limit=None)
@settings(deadline=None)
def test_output_size_keeps_to_its_limits_and_to_the_aspect(
    height: int, width: int, short_side: int | None, limit: int | None
) -> None:
    preprocess = Preprocess(short_side=short_side, max_long_side=limit)
    aspect = max(height, width) / min(height, width)
    enlarged = (short_side or 0) ** 2 * aspect  # pixels
    if limit is None and enlarged > 1.01 * MAX_RESIZED_PIXELS:
        with pytest.raises(ConfigError, match="pixels after the resize"):
            preprocess.output_size(height, width)
        return
    assume(limit is not None or enlarged < 0.99 * MAX_RESIZED_PIXELS)  # rounding decides between
    new_height, new_width = preprocess.output_size(height, width)
    assert min(new_height, new_width) >= 1
    assert limit is None or max(new_height, new_width) <= limit
    if short_side is not None and (limit is None or max(new_height, new_width) < limit):
        assert min(new_height, new_width) == short_side
    ratio = max(new_height, new_width) / max(height, width)
    assert abs(min(new_height, new_width) - min(height, width) * ratio) <= 1
    assert preprocess.output_size(width, height) == (new_width, new_height)


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (-1, 5)])
def test_output_size_refuses_empty_images(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="expected sides of at least 1"):
        Preprocess().output_size(*size)


def test_resize_returns_the_input_itself_when_its_size_stays() -> None:
    image = noise(20, 30)
    assert Preprocess().resize(image) is image


def test_resize_is_the_same_every_time_and_for_every_memory_layout() -> None:
    image = noise(57, 83)
    preprocess = Preprocess(short_side=40)
    first = preprocess.resize(image)
    assert first.shape == (40, 58, 3)
    assert first.dtype == np.uint8
    assert first.flags.writeable
    np.testing.assert_array_equal(preprocess.resize(image.copy()), first)
    np.testing.assert_array_equal(preprocess.resize(np.asfortranarray(image)), first)
    np.testing.assert_array_equal(preprocess.resize(image[:, ::-1])[:, ::-1], first)


def test_resize_keeps_a_gradient_and_averages_when_it_shrinks() -> None:
    gradient = np.broadcast_to(np.arange(0, 200, 2, dtype=np.uint8)[None, :, None], (50, 100, 3))
    grown = Preprocess(scale=2.0).resize(gradient)
    np.testing.assert_allclose(grown[0, 4:-4, 0], np.arange(200)[4:-4] - 0.5, atol=1)
    # Lines of one pixel, black and white: antialiased they are grey, picked points are not.
    lines = np.zeros((64, 64, 3), dtype=np.uint8)
    lines[:, ::2] = 255
    shrunk = Preprocess(scale=0.25).resize(lines)
    assert 100 < shrunk[:, 1:-1].min() <= shrunk[:, 1:-1].max() < 155


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4, 3), dtype=np.float32),
        np.zeros((4, 4), dtype=np.uint8),
        np.zeros((4, 4, 4), dtype=np.uint8),
        np.zeros((0, 4, 3), dtype=np.uint8),
    ],
)
def test_other_arrays_are_refused(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"image: expected uint8 of shape \(H, W, 3\), got"):
        Preprocess().resize(image)
    with pytest.raises(ValueError, match=r"images\[1\]: expected uint8 of shape"):
        Preprocess().batch([noise(4, 4), image])


@given(
    sizes=st.lists(st.tuples(st.integers(1, 70), st.integers(1, 70)), min_size=1, max_size=4),
    divisor=st.sampled_from([1, 7, 32]),
)
@settings(deadline=None)
def test_batch_pads_with_zeros_to_the_smallest_multiple(
    sizes: list[tuple[int, int]], divisor: int
) -> None:
    images = [noise(*size, seed=seed) for seed, size in enumerate(sizes)]
    pixels, found_sizes = Preprocess(size_divisor=divisor).batch(images)
    assert pixels.dtype == np.uint8
    assert found_sizes.dtype == np.int64
    assert found_sizes.tolist() == [list(size) for size in sizes]
    for padded, side in zip(pixels.shape[1:3], found_sizes.max(axis=0), strict=True):
        assert padded % divisor == 0
        assert side <= padded < side + divisor
    for canvas, image in zip(pixels, images, strict=True):
        height, width = image.shape[:2]
        np.testing.assert_array_equal(canvas[:height, :width], image)
        assert not canvas[height:].any()
        assert not canvas[:, width:].any()


def test_batch_of_no_images_is_refused() -> None:
    with pytest.raises(ValueError, match="expected at least one"):
        Preprocess().batch([])


@pytest.mark.parametrize(
    "preprocess",
    [
        Preprocess(),
        Preprocess(mean=(0.0, 1.0, 2.0), std=(1.0, 2.0, 3.0), scale=1.5, max_long_side=None),
        Preprocess(short_side=600, size_divisor=1),
        Preprocess(short_side=256, crop_size=224, interpolation="bicubic"),
    ],
)
def test_round_trip_through_json(preprocess: Preprocess) -> None:
    assert Preprocess.from_dict(json.loads(json.dumps(preprocess.to_dict()))) == preprocess


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mean", [1.0, 2.0]),
        ("mean", "123"),
        ("mean", [1.0, 2.0, "3"]),
        ("mean", [1.0, 2.0, float("nan")]),
        ("std", [1.0, 0.0, 1.0]),
        ("std", [1.0, -1.0, 1.0]),
        ("std", 5.0),
        ("scale", True),
        ("scale", 0.0),
        ("scale", float("inf")),
        ("scale", None),
        ("short_side", 600.0),
        ("short_side", 0),
        ("max_long_side", "1333"),
        ("max_long_side", -1),
        ("size_divisor", None),
        ("size_divisor", 0),
        ("size_divisor", True),
        ("size_divisor", 10**9),
        ("scale", 1e9),
        ("short_side", 10**9),
        ("crop_size", 224),
        ("crop_size", 0),
        ("interpolation", "nearest"),
        ("interpolation", None),
    ],
)
def test_from_dict_refuses_wrong_values(name: str, value: object) -> None:
    wrong = Preprocess().to_dict() | {name: value}
    with pytest.raises(ConfigError, match=rf"preprocess\.{name}: expected .*, got "):
        Preprocess.from_dict(wrong)


def test_from_dict_refuses_unknown_and_missing_keys() -> None:
    values = Preprocess().to_dict()
    with pytest.raises(ConfigError, match=r"expected the keys mean, .*, got .*shortside"):
        Preprocess.from_dict(values | {"shortside": 600})
    del values["std"]
    with pytest.raises(ConfigError, match="expected the keys mean, std"):
        Preprocess.from_dict(values)
    with pytest.raises(ConfigError, match="got none"):
        Preprocess.from_dict({})
    with pytest.raises(ConfigError, match="expected a mapping, got list"):
        Preprocess.from_dict([])  # type: ignore[arg-type]


def test_a_resize_that_no_memory_holds_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"got 1000000 x 1000000 for an image of 10000 x 10000"):
        Preprocess(scale=100.0, max_long_side=None).output_size(10_000, 10_000)


def test_two_size_rules_at_once_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"preprocess\.scale: expected 1\.0 where short_side"):
        replace(Preprocess(scale=2.0), short_side=600)


def test_whole_numbers_are_taken_for_floats() -> None:
    values = Preprocess().to_dict() | {"scale": 2, "mean": [0, 0, 0]}
    preprocess = Preprocess.from_dict(values)
    assert (preprocess.scale, preprocess.mean) == (2.0, (0.0, 0.0, 0.0))
    assert isinstance(preprocess.scale, float)


# Classifiers

SIDES = [(375, 500), (500, 375), (256, 256), (256, 391), (257, 303), (97, 1200), (1, 1), (2, 900)]


def picture(height: int, width: int) -> Image.Image:
    """A picture with slow and fast changes, as a photograph has."""
    smooth = Image.fromarray(noise(7, 9, seed=height)).resize((width, height), Image.BICUBIC)
    return Image.blend(smooth, Image.fromarray(noise(height, width)), 0.3)


@pytest.mark.parametrize("size", SIDES, ids=str)
@pytest.mark.parametrize("test_size", [False, True])
@pytest.mark.parametrize("name", PUBLISHED)
def test_classifiers_see_what_timm_shows_them(
    name: str, test_size: bool, size: tuple[int, int]
) -> None:
    image = picture(*size)
    config = timm.get_pretrained_cfg(name).to_dict()
    transform = create_transform(
        **resolve_data_config(pretrained_cfg=config, use_test_size=test_size)
    )
    preprocess = published_preprocess(name, test_size=test_size)
    mean, std = (np.array(v, np.float32) for v in (preprocess.mean, preprocess.std))
    expected = transform(image).numpy().transpose(1, 2, 0) * std + mean  # grey levels
    found = preprocess.resize(np.array(image))
    assert found.shape == expected.shape
    assert found.dtype == np.uint8
    assert preprocess.output_size(*size) == found.shape[:2]
    assert np.abs(found - expected).max() < 1.01


def test_a_crop_is_taken_from_the_middle_without_a_resize() -> None:
    image = noise(64, 90)
    found = Preprocess(short_side=64, crop_size=40).resize(image)
    np.testing.assert_array_equal(found, image[12:52, 25:65])
    assert found.flags.writeable


def test_interpolation_is_the_one_asked_for() -> None:
    image = noise(50, 50)
    found = Preprocess(short_side=30, max_long_side=None, interpolation="bicubic").resize(image)
    expected = Image.fromarray(image).resize((30, 30), Image.BICUBIC)
    np.testing.assert_array_equal(found, np.array(expected))


def test_crops_need_no_padding() -> None:
    preprocess = Preprocess(short_side=50, crop_size=45)
    pixels, sizes = preprocess.batch([preprocess.resize(noise(60, 80))] * 2)
    assert pixels.shape == (2, 45, 45, 3)
    assert sizes.tolist() == [[45, 45]] * 2


def test_a_crop_beyond_the_short_side_is_refused() -> None:
    with pytest.raises(ConfigError, match="crop_size: expected at most the short_side, 64"):
        Preprocess(short_side=64, crop_size=65)


def test_an_extreme_aspect_needs_no_memory() -> None:
    preprocess = Preprocess(short_side=256, max_long_side=None, crop_size=224)
    assert preprocess.resize(noise(1, 60_000)).shape == (224, 224, 3)


def test_a_square_does_not_keep_the_aspect() -> None:
    """The middle of the picture stays the middle of each side, and the padding is the divisor's."""
    image = np.zeros((40, 120, 3), dtype=np.uint8)
    image[:, 60:] = 200
    image[20:] += 50
    preprocess = Preprocess(square=80)
    resized = preprocess.resize(image)
    assert resized.shape == (80, 80, 3)
    assert [resized[10, 10, 0], resized[10, 70, 0], resized[70, 10, 0]] == [0, 200, 50]
    pixels, sizes = preprocess.batch([resized])
    assert pixels.shape == (1, 96, 96, 3)
    assert sizes.tolist() == [[80, 80]]
    assert Preprocess.from_dict(preprocess.to_dict()) == preprocess


@pytest.mark.parametrize("other", [{"short_side": 300}, {"scale": 2.0}])
def test_a_square_beside_another_size_rule_is_refused(other: dict) -> None:
    with pytest.raises(ConfigError, match=r"preprocess\.square: expected None where"):
        Preprocess(square=320, **other)


def test_folders_written_before_classifiers_are_read() -> None:
    values = Preprocess(scale=2.0).to_dict()
    del values["crop_size"], values["interpolation"]
    assert Preprocess.from_dict(values) == Preprocess(scale=2.0)
