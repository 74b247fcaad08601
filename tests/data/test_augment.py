"""Augmentation: image, masks and boxes move together, samples repeat exactly, nothing is lost."""

import hashlib
import math
import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from vovnet.data.augment import (
    EvalDataset,
    TrainDataset,
    TrainItem,
    collate_train,
)
from vovnet.data.coco import find_split, load_coco
from vovnet.data.labels import (
    Annotation,
    DetectionData,
    ImageRecord,
    decode_masks,
    has_masks,
)
from vovnet.data.mixing import tight_boxes
from vovnet.data.preset import SSD_PRESET, TrainPreset
from vovnet.errors import ConfigError, DataError
from vovnet.models.boxes import Target
from vovnet.models.roi import BitmapMasks
from vovnet.preprocess import Preprocess

DATA_DIR = Path(os.environ.get("VOVNET_DATA", "../shared/data"))
HEIGHT, WIDTH = 90, 120
# Each label is one colour, far from the others and from the black ground.
COLOURS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], dtype=np.uint8)
PLAIN = TrainPreset(output_size=(64, 80), scale_range=(1.0, 1.0), horizontal_flip=0.0)
WILD = replace(PLAIN, scale_range=(0.5, 2.5), horizontal_flip=0.5, vertical_flip=0.5)
WILD = replace(WILD, quarter_turn=0.5)
DIGESTS = ["ecf2b2af", "89de3fed", "acb7f478", "fc5126b0"]
SHAPES = [(20, 15, 57, 48), (70, 10, 110, 31), (61, 50, 84, 85)]


def annotation(
    box: tuple[int, int, int, int], label: int = 0, *, with_mask: bool = True, crowd: bool = False
) -> Annotation:
    x1, y1, x2, y2 = box
    ring = [[float(v) for v in (x1, y1, x2, y1, x2, y2, x1, y2)]]
    return Annotation(label + 1, label, box, ring if with_mask else None, 1.0, crowd)


def dataset(folder: Path, annotations: list[Annotation], *, copies: int = 1) -> DetectionData:
    """One image, black but for the annotated shapes in the colour of their label."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    for made in annotations:
        pixels[decode_masks([made], HEIGHT, WIDTH)[0]] = COLOURS[made.label]
    Image.fromarray(pixels).save(folder / "a.png")
    records = [
        ImageRecord(number, folder / "a.png", HEIGHT, WIDTH, tuple(annotations))
        for number in range(copies)
    ]
    return DetectionData(tuple(records), ("r", "g", "b"), (1, 2, 3), folder / "labels.json")


def shapes() -> list[Annotation]:
    """Two rectangles and a triangle, which shows where a mask is cut on the wrong side."""
    made = [annotation(box, label) for label, box in enumerate(SHAPES)]
    x1, y1, x2, y2 = SHAPES[0]
    ring = [[float(v) for v in (x1, y1, x2, y1, x1, y2)]]
    return [replace(made[0], segmentation=ring), *made[1:]]


def masks_of(target: Target) -> torch.Tensor:
    assert isinstance(target.masks, BitmapMasks)
    return target.masks.pixels


def equal(first: TrainItem, second: TrainItem) -> bool:
    return torch.equal(first[0], second[0]) and torch.equal(
        first[1].boxes_xyxy, second[1].boxes_xyxy
    )


def test_image_masks_and_boxes_agree(tmp_path: Path) -> None:
    data = dataset(tmp_path, shapes(), copies=40)
    train = TrainDataset(data, Preprocess(scale=1.3), preset=WILD, seed=3)
    offsets, sizes, seen = [], set(), 0
    for index in range(len(train)):
        image, target, path = train[index]
        assert path == tmp_path / "a.png"
        sizes.add(tuple(image.shape[:2]))
        visible = {
            label
            for label in range(3)
            if (image[..., label] > 127).sum() >= 4 + 2 * max(image.shape[:2])
        }
        assert visible <= set(target.labels.tolist())  # all but slivers are found
        for mask, label, box in zip(
            masks_of(target).bool(), target.labels, target.boxes_xyxy, strict=True
        ):
            seen += 1
            # The same place by colour: only the pixels that the resize blends may differ.
            painted = image[..., int(label)] > 127
            outline = 2 * float((box[2:] - box[:2]).sum())
            assert (painted ^ mask).sum() <= outline
            rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
            tight = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert box.tolist() == [float(side) for side in tight]
            if box.min() > 0 and box[3] < mask.shape[0] and box[2] < mask.shape[1]:
                centre = torch.argwhere(mask).double().mean(0)
                offsets.append(torch.argwhere(painted).double().mean(0) - centre)
    assert seen > 60
    assert {(64, 80), (80, 64)} & sizes
    assert torch.stack(offsets).mean(0).abs().max() < 0.08  # no shift between image and masks
    assert torch.stack(offsets).abs().max() < 0.8


def corner_of(item: TrainItem) -> tuple[bool, bool, bool]:
    """How an image with one wide object at its top left was turned."""
    image, target, _ = item
    x1, y1, x2, y2 = target.boxes_xyxy[0].tolist()
    height, width = image.shape[:2]
    return x1 + x2 > width, y1 + y2 > height, y2 - y1 > x2 - x1


def test_all_eight_turns_occur(tmp_path: Path) -> None:
    data = dataset(tmp_path, [annotation((5, 5, 35, 15))], copies=48)
    preset = replace(WILD, scale_range=(1.0, 1.0), output_size=(128, 128))
    train = TrainDataset(data, Preprocess(), preset=preset)
    assert {corner_of(train[index]) for index in range(48)} == {
        (a, b, c) for a in (False, True) for b in (False, True) for c in (False, True)
    }


def test_samples_depend_on_seed_epoch_and_index_alone(tmp_path: Path) -> None:
    data = dataset(tmp_path, shapes(), copies=3)
    preset = replace(WILD, brightness=0.4, hue=0.2, invert=0.3)

    def make(seed: int, cache_bytes: int = 10**7) -> TrainDataset:
        return TrainDataset(data, Preprocess(), preset=preset, seed=seed, cache_bytes=cache_bytes)

    first, second = make(1), make(1, cache_bytes=0)
    first.set_place(5, 0.0)
    items = [first[index] for index in range(3)]
    torch.manual_seed(99)
    state = torch.get_rng_state()
    second.set_place(5, 0.0)
    assert all(equal(second[index], items[index]) for index in (2, 0, 1))
    assert all(equal(first[index], items[index]) for index in (2, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert not equal(items[0], items[1])
    second.set_place(6, 0.0)
    assert not equal(second[0], items[0])
    assert not equal(make(2)[0], make(1)[0])


@pytest.mark.parametrize("mode", ["mosaic", "mixup", "copy_paste"])
def test_pictures_are_no_longer_mixed_near_the_end(tmp_path: Path, mode: str) -> None:
    data = dataset(tmp_path, shapes(), copies=3)
    mixing = replace(PLAIN, **{mode: 1.0}, mixed_until=0.9)
    plain, mixed = (TrainDataset(data, Preprocess(), preset=p) for p in (PLAIN, mixing))
    mixed.set_place(0, 0.9)
    assert all(equal(plain[index], mixed[index]) for index in range(3))
    mixed.set_place(0, 0.8)
    assert not all(equal(plain[index], mixed[index]) for index in range(3))


def test_data_sets_travel_to_other_processes(tmp_path: Path) -> None:
    train = TrainDataset(dataset(tmp_path, shapes()), Preprocess(), preset=WILD)
    before = train[0]
    assert equal(pickle.loads(pickle.dumps(train))[0], before)


def test_crowds_are_ignored_not_learned(tmp_path: Path) -> None:
    crowd = annotation((10, 20, 50, 40), 1, crowd=True)
    far = annotation((90, 60, 110, 80), 2, crowd=True)
    data = dataset(tmp_path, [annotation((12, 22, 20, 30)), crowd, far])
    preset = replace(PLAIN, output_size=(HEIGHT, WIDTH), horizontal_flip=1.0)
    _, target, _ = TrainDataset(data, Preprocess(), preset=preset)[0]
    assert target.labels.tolist() == [0]
    assert target.boxes_xyxy.tolist() == [[100, 22, 108, 30]]
    assert target.ignore_xyxy.tolist() == [[70, 20, 110, 40], [10, 60, 30, 80]]
    assert masks_of(target).shape == (1, HEIGHT, WIDTH)


def test_an_object_without_mask_among_others_gets_its_box(tmp_path: Path) -> None:
    data = dataset(tmp_path, [shapes()[0], annotation((70, 10, 90, 31), 1, with_mask=False)])
    preset = replace(PLAIN, output_size=(HEIGHT, WIDTH))
    _, target, _ = TrainDataset(data, Preprocess(), preset=preset)[0]
    expected = torch.zeros(HEIGHT, WIDTH, dtype=torch.uint8)
    expected[10:31, 70:90] = 1
    assert torch.equal(masks_of(target)[1], expected)
    assert target.boxes_xyxy[1].tolist() == [70, 10, 90, 31]


def test_boxes_alone_are_clipped_and_dropped_below_a_pixel(tmp_path: Path) -> None:
    made = [annotation(box, i, with_mask=False) for i, box in enumerate(SHAPES)]
    crowd = annotation((0, 0, 9, 9), 0, with_mask=True, crowd=True)
    data = dataset(tmp_path, [*made, crowd], copies=30)
    train = TrainDataset(data, Preprocess(), preset=WILD)
    clipped = 0
    for index in range(30):
        image, target, _ = train[index]
        assert target.masks is None  # a crowd's mask is none of an object
        height, width = image.shape[:2]
        boxes = target.boxes_xyxy
        assert boxes.dtype == torch.float32
        if len(boxes):
            assert boxes.min() >= 0
            assert (boxes[:, 2:] <= torch.tensor([width, height])).all()
            assert (boxes[:, 2:] - boxes[:, :2]).min() >= 1
        for label, box in zip(target.labels, boxes.round().int().tolist(), strict=True):
            clipped += box[0] == 0 or box[2] == width
            inside = image[box[1] + 1 : box[3] - 1, box[0] + 1 : box[2] - 1, int(label)]
            assert inside.numel() == 0 or inside.float().mean() > 200
    assert clipped > 5


def test_small_rests_are_dropped(tmp_path: Path) -> None:
    data = dataset(tmp_path, [annotation((5, 5, 8, 6), 0), annotation((20, 20, 22, 22), 1)])
    preset = replace(PLAIN, output_size=(HEIGHT, WIDTH))
    for least, labels in ((3, [0, 1]), (4, [1]), (5, [])):
        preset = replace(preset, min_mask_pixels=least)
        _, target, _ = TrainDataset(data, Preprocess(), preset=preset)[0]
        assert target.labels.tolist() == labels
        assert masks_of(target).shape == (len(labels), HEIGHT, WIDTH)


def test_boxes_below_a_pixel_are_dropped(tmp_path: Path) -> None:
    made = [annotation((20, 20, 23, 40), 0, with_mask=False)]
    made += [annotation((40, 20, 44, 40), 1, with_mask=False)]
    made += [
        annotation((60, 20, 63, 40), 2, crowd=True),
        annotation((80, 20, 84, 40), 2, crowd=True),
    ]
    data = dataset(tmp_path, made)
    _, target, _ = TrainDataset(data, Preprocess(scale=0.25), preset=PLAIN)[0]
    assert target.labels.tolist() == [1]
    assert len(target.ignore_xyxy) == 1


@pytest.mark.parametrize("with_mask", [True, False])
def test_images_without_objects(tmp_path: Path, with_mask: bool) -> None:
    filled = dataset(tmp_path, [annotation(SHAPES[0], with_mask=with_mask)])
    data = replace(filled, images=(replace(filled.images[0], annotations=()), *filled.images))
    image, target, _ = TrainDataset(data, Preprocess(), preset=PLAIN)[0]
    assert target.boxes_xyxy.shape == target.ignore_xyxy.shape == (0, 4)
    assert target.labels.shape == (0,)
    assert (target.masks is None) != with_mask
    if with_mask:
        assert masks_of(target).shape == (0, *image.shape[:2])


def test_an_image_smaller_than_the_window_stays_whole(tmp_path: Path) -> None:
    preset = replace(PLAIN, output_size=(256, 100))
    item = TrainDataset(dataset(tmp_path, shapes()), Preprocess(), preset=preset)[0]
    assert item[0].shape == (HEIGHT, 100, 3)
    other = TrainDataset(dataset(tmp_path, shapes()), Preprocess(), preset=PLAIN)[0]
    batch = collate_train([item, other])
    assert batch.images.shape == (2, 96, 128, 3)
    assert batch.images.dtype == torch.uint8
    assert batch.sizes.tolist() == [[HEIGHT, 100], [64, 80]]
    assert torch.equal(batch.images[1, :64, :80], other[0])
    assert batch.images[1, 64:].max() == batch.images[1, :, 80:].max() == 0
    assert batch.to("cpu").targets[0].labels.tolist() == item[1].labels.tolist()


def test_the_scale_is_relative_to_that_of_the_evaluation(tmp_path: Path) -> None:
    data = dataset(tmp_path, [annotation((30, 30, 60, 50))])
    preset = replace(PLAIN, output_size=(1000, 1000), scale_range=(2.0, 2.0))
    for preprocess in (Preprocess(scale=1.5), Preprocess(short_side=135)):
        image, target, _ = TrainDataset(data, preprocess, preset=preset)[0]
        assert image.shape == (HEIGHT * 3, WIDTH * 3, 3)
        assert target.boxes_xyxy.tolist() == [[90, 90, 180, 150]]


def test_scales_are_drawn_from_the_whole_range(tmp_path: Path) -> None:
    data = dataset(tmp_path, [annotation((30, 30, 60, 50))], copies=30)
    preset = replace(PLAIN, output_size=(1000, 1000), scale_range=(0.5, 2.0))
    train = TrainDataset(data, Preprocess(), preset=preset)
    scales = [math.log2(train[index][0].shape[1] / WIDTH) for index in range(30)]
    assert -1.01 < min(scales) < -0.7
    assert 0.7 < max(scales) < 1.01
    assert abs(sum(scales) / 30) < 0.35


def test_without_colour_settings_colours_stay(tmp_path: Path) -> None:
    data = dataset(tmp_path, shapes())
    whole = replace(PLAIN, output_size=(HEIGHT, WIDTH))
    image, _, path = TrainDataset(data, Preprocess(), preset=whole)[0]
    np.testing.assert_array_equal(image.numpy(), np.asarray(Image.open(path)))
    inverted = TrainDataset(data, Preprocess(), preset=replace(whole, invert=1.0))[0][0]
    assert torch.equal(inverted, 255 - image)
    grey = TrainDataset(data, Preprocess(), preset=replace(whole, grayscale=1.0))[0][0]
    assert torch.equal(grey[..., 0], grey[..., 1])


def test_resized_like_the_evaluation(tmp_path: Path) -> None:
    data = dataset(tmp_path, shapes())
    for preprocess in (Preprocess(scale=1.5), Preprocess(scale=0.6)):
        expected, record = EvalDataset(data, preprocess)[0]
        assert record is data.images[0]
        assert expected.shape[:2] == preprocess.output_size(HEIGHT, WIDTH)
        preset = replace(PLAIN, output_size=(expected.shape[0], expected.shape[1]))
        image, _, _ = TrainDataset(data, preprocess, preset=preset)[0]
        difference = np.abs(image.numpy().astype(int) - expected)
        assert difference.max() <= 2


def test_a_size_other_than_declared_is_an_error(tmp_path: Path) -> None:
    data = dataset(tmp_path, shapes())
    wrong = replace(data, images=(replace(data.images[0], width=WIDTH + 1),))
    message = r"a\.png: expected 90 x 121 .*, got 90 x 120"
    with pytest.raises(DataError, match=message):
        TrainDataset(wrong, Preprocess(), preset=PLAIN)[0]
    with pytest.raises(DataError, match=message):
        EvalDataset(wrong, Preprocess())[0]


def test_a_broken_mask_names_file_and_annotation(tmp_path: Path) -> None:
    data = dataset(tmp_path, shapes())
    rle = {"size": [HEIGHT, WIDTH], "counts": b"1"}
    broken = replace(data.images[0].annotations[0], segmentation=rle)
    data = replace(data, images=(replace(data.images[0], annotations=(broken,)),))
    preset = replace(PLAIN, output_size=(HEIGHT, WIDTH))
    with pytest.raises(DataError, match=r"a\.png: annotation 1: broken RLE"):
        TrainDataset(data, Preprocess(), preset=preset)[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_size": [0, 5]}, "at least 1 as output_size"),
        ({"output_size": 256}, "augment.output_size: expected two numbers, got 256"),
        ({"output_size": [256.0, 256]}, "whole numbers"),
        ({"scale_range": [2, 1]}, "expected 0 < low <= high"),
        ({"scale_range": [0, 1]}, "expected 0 < low <= high"),
        ({"scale_range": ["a", "b"]}, "expected 0 < low <= high"),
        ({"hue": 0.6}, r"augment.hue: expected 0..0.5, got 0.6"),
        ({"invert": "yes"}, r"augment.invert: expected 0..1.0, got 'yes'"),
        ({"invert": float("nan")}, "augment.invert"),
        ({"min_mask_pixels": 0}, "min_mask_pixels"),
        ({"mosaic": 1.5}, r"augment.mosaic: expected 0..1.0, got 1.5"),
        ({"geometry": "round"}, "augment.geometry: expected window, ssd or whole, got 'round'"),
        ({"geometry": "whole"}, "augment.short_sides: expected at least one whole number above 0"),
        ({"geometry": "whole", "short_sides": [0]}, r"short_sides: .* above 0, got \(0,\)"),
        ({"geometry": "whole", "short_sides": [64.0]}, r"short_sides: .* above 0, got \(64.0,\)"),
        ({"geometry": "whole", "short_sides": 64}, "short_sides: .* above 0, got 64"),
        ({"short_sides": [64]}, "short_sides: expected none without geometry whole, got"),
        (
            {"geometry": "whole", "short_sides": [64], "mixup": 0.5},
            "geometry: expected window or ssd with mosaic, mixup or copy_paste",
        ),
        (
            {"geometry": "whole", "short_sides": [64], "output_scale_range": [0.5, 1]},
            r"output_scale_range, first_scale: expected \(1, 1\) and 1 with geometry whole",
        ),
        ({"first_scale": 0.0}, "augment.first_scale: expected a number above 0, at most 1"),
        ({"full_size_from": 1.5}, "augment.full_size_from: expected 0..1.0"),
        ({"output_scale_range": [0.5, 0.2]}, "augment.output_scale_range: expected 0 < low"),
        ({"output_scale_range": 1}, "augment.output_scale_range: expected two numbers"),
        ({"flip": 0.5}, "expected some of output_size, .* got 'flip'"),
    ],
)
def test_presets_out_of_range(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainPreset.from_dict(changes)


def test_presets_from_lists() -> None:
    preset = TrainPreset.from_dict({"output_size": [320, 256], "hue": 0.1})
    assert preset == TrainPreset(output_size=(320, 256), hue=0.1)


@pytest.mark.parametrize("turn", [0.0, 1.0])
def test_whole_images_keep_all_objects_and_their_aspect(tmp_path: Path, turn: float) -> None:
    data = dataset(tmp_path, shapes(), copies=12)
    preset = TrainPreset(
        geometry="whole", short_sides=(45, 180), horizontal_flip=0.0, quarter_turn=turn
    )
    train = TrainDataset(data, Preprocess(short_side=800), preset=preset)
    items = [train[index] for index in range(len(data.images))]
    factors = {item[0].shape[0] / (WIDTH if turn else HEIGHT) for item in items}
    assert factors == {0.5, 2.0}
    for image, target, _ in items:
        factor = image.shape[0] / (WIDTH if turn else HEIGHT)
        expected = torch.tensor(SHAPES) * factor
        if turn:
            expected = expected[:, [1, 0, 3, 2]]
        assert target.boxes_xyxy[1:] == pytest.approx(expected[1:], abs=1)
        assert masks_of(target).shape[1:] == image.shape[:2]
        assert target.labels.tolist() == [0, 1, 2]
        rule = Preprocess(short_side=min(image.shape[:2]))
        evaluated = EvalDataset(data, rule)[0][0].astype(int)
        difference = np.abs(image.numpy() - (evaluated.swapaxes(0, 1) if turn else evaluated))
        assert difference.max() <= 2


def test_negative_seed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="seed"):
        TrainDataset(dataset(tmp_path, []), Preprocess(), preset=PLAIN, seed=-1)


def test_settings_that_are_off_draw_nothing(tmp_path: Path) -> None:
    """Samples are those of before there were mosaics: these numbers come from that code."""
    data = dataset(tmp_path, shapes(), copies=4)
    train = TrainDataset(data, Preprocess(), preset=replace(WILD, scale_range=(1.0, 1.0)), seed=7)
    train.set_place(3, 0.0)
    digests = []
    for index in range(4):
        image, target, _ = train[index]
        digest = hashlib.sha256(image.numpy().tobytes())  # turned and flipped, not resampled
        digest.update(target.boxes_xyxy.numpy().tobytes() + masks_of(target).numpy().tobytes())
        digests.append(digest.hexdigest()[:8])
    assert digests == DIGESTS


def check_item(item: TrainItem, *, with_masks: bool) -> None:
    """Boxes inside and not empty, one mask and one label for each, boxes around their masks."""
    image, target, _ = item
    height, width = image.shape[:2]
    assert image.dtype == torch.uint8
    assert image.is_contiguous()
    assert len(target.labels) == len(target.boxes_xyxy)
    for boxes in (target.boxes_xyxy, target.ignore_xyxy):
        assert boxes.dtype == torch.float32
        assert (boxes[:, :2] >= 0).all()
        assert (boxes[:, 2:] <= torch.tensor([width, height])).all()
        assert ((boxes[:, 2:] - boxes[:, :2]) > 0).all()
    assert (target.masks is not None) == with_masks
    if with_masks:
        assert masks_of(target).shape == (len(target.labels), height, width)
        assert torch.equal(tight_boxes(masks_of(target)), target.boxes_xyxy)


MODES: dict[str, dict[str, object]] = {
    "ssd": dict(SSD_PRESET),
    "mosaic": {"mosaic": 1.0},
    "mixup": {"mixup": 1.0},
    "copy_paste": {"copy_paste": 1.0},
    "all": {**SSD_PRESET, "mosaic": 0.5, "mixup": 0.5, "copy_paste": 0.5, "quarter_turn": 0.5},
    "batch sizes": {"output_scale_range": (0.5, 2.0)},
    "growing": {"first_scale": 0.5},
}


@st.composite
def scenes(draw: st.DrawFn) -> list[tuple[int, int, int, int, int, bool]]:
    """Boxes anywhere in the image, on its border too, some of them crowds."""
    made = []
    for _ in range(draw(st.integers(0, 6))):
        x1, y1 = draw(st.integers(0, WIDTH - 1)), draw(st.integers(0, HEIGHT - 1))
        x2, y2 = draw(st.integers(x1 + 1, WIDTH)), draw(st.integers(y1 + 1, HEIGHT))
        made.append((x1, y1, x2, y2, draw(st.integers(0, 2)), draw(st.booleans())))
    return made


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=6, deadline=None, derandomize=True)
@given(scene=scenes(), with_masks=st.booleans(), seed=st.integers(0, 99))
def test_every_augmentation_keeps_boxes_and_masks_together(
    tmp_path_factory: pytest.TempPathFactory,
    mode: str,
    scene: list[tuple[int, int, int, int, int, bool]],
    with_masks: bool,
    seed: int,
) -> None:
    made = [
        annotation((x1, y1, x2, y2), label, with_mask=with_masks, crowd=crowd)
        for x1, y1, x2, y2, label, crowd in scene
    ]
    data = dataset(tmp_path_factory.mktemp("scene"), made, copies=3)
    preset = TrainPreset.from_dict({"output_size": (64, 96), **MODES[mode]})
    if preset.copy_paste and not has_masks(data):
        with pytest.raises(ConfigError, match="copy_paste"):
            TrainDataset(data, Preprocess(), preset=preset)
        return
    train = TrainDataset(data, Preprocess(), preset=preset, seed=seed)
    items = train.__getitems__([0, 2])
    for item in items:
        check_item(item, with_masks=train.with_masks)
    again = TrainDataset(data, Preprocess(), preset=preset, seed=seed, cache_bytes=0)
    assert all(equal(*pair) for pair in zip(items, again.__getitems__([0, 2]), strict=True))


@pytest.mark.parametrize("mode", ["ssd", "mosaic", "mixup", "copy_paste"])
def test_objects_stay_on_their_colours(tmp_path: Path, mode: str) -> None:
    data = dataset(tmp_path, shapes(), copies=4)
    changes = {**MODES[mode], "photometric": 0.0, "scale_range": (0.8, 1.2)}
    preset = TrainPreset.from_dict({"output_size": (96, 128), **changes})
    train = TrainDataset(data, Preprocess(), preset=preset, seed=1)
    seen = 0
    for item in (train[index] for index in range(4)):
        check_item(item, with_masks=True)
        image, target, _ = item
        least = 60 if mode == "mixup" else 127  # about half of the colour is left of each
        for mask, label in zip(masks_of(target), target.labels.tolist(), strict=True):
            inner = -torch.nn.functional.max_pool2d(-mask[None, None].float(), 5, 1, 2)[0, 0] > 0
            if inner.any():
                seen += 1
                assert (image[..., label][inner] > least).float().mean() > 0.97
    assert seen >= 4


@pytest.mark.parametrize(
    ("progress", "side"), [(0.0, 64), (0.1, 64), (0.35, 96), (0.6, 128), (0.7, 128), (1.0, 128)]
)
def test_pictures_and_their_objects_grow(tmp_path: Path, progress: float, side: int) -> None:
    data = dataset(tmp_path, [annotation((0, 0, WIDTH, HEIGHT))])
    preset = replace(PLAIN, output_size=(128, 128), first_scale=0.5, full_size_from=0.7)
    train = TrainDataset(data, Preprocess(scale=1.0), preset=preset)
    train.set_place(0, progress)
    image, target, _ = train[0]
    assert image.shape[:2] == (round(HEIGHT * side / 128), round(WIDTH * side / 128))
    (x1, y1, x2, y2) = target.boxes_xyxy[0].tolist()
    assert (y2 - y1, x2 - x1) == image.shape[:2]


def test_batches_of_one_size_that_changes(tmp_path: Path) -> None:
    data = dataset(tmp_path, [annotation((0, 0, WIDTH, HEIGHT))], copies=12)
    preset = replace(PLAIN, output_size=(64, 96), output_scale_range=(0.5, 2.0))
    train = TrainDataset(data, Preprocess(scale=4.0), preset=preset)
    batches = [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    sizes = []
    for batch in DataLoader(train, batch_sampler=batches, collate_fn=collate_train):
        assert len(batch.sizes.unique(dim=0)) == 1
        sizes.append(tuple(batch.sizes[0].tolist()))
        assert all(side % 32 == 0 for side in sizes[-1])
        assert 32 <= sizes[-1][0] <= 128
        assert 48 <= sizes[-1][1] <= 192
    assert len(set(sizes)) > 1
    train.set_place(1, 0.0)
    again = [tuple(train.__getitems__(batch)[0][0].shape[:2]) for batch in batches]
    assert again != sizes


def test_objects_grow_with_the_output(tmp_path: Path) -> None:
    data = dataset(tmp_path, [annotation((10, 10, 40, 30))])
    preset = replace(PLAIN, output_size=(96, 128), output_scale_range=(2.0, 2.0))
    image, target, _ = TrainDataset(data, Preprocess(), preset=preset)[0]
    assert image.shape == (2 * HEIGHT, 2 * WIDTH, 3)
    assert target.boxes_xyxy.tolist() == [[20, 20, 80, 60]]


def test_a_thousand_objects_mixed_in_every_way(tmp_path: Path) -> None:
    corners = [(x, y) for y in range(0, HEIGHT - 2, 3) for x in range(0, WIDTH - 2, 3)][:1000]
    data = dataset(tmp_path, [annotation((x, y, x + 3, y + 3)) for x, y in corners], copies=2)
    everything = {**SSD_PRESET, "mosaic": 1.0, "mixup": 1.0, "copy_paste": 1.0}
    preset = TrainPreset.from_dict({"output_size": (64, 64), **everything})
    item = TrainDataset(data, Preprocess(), preset=preset)[0]
    check_item(item, with_masks=True)
    assert len(item[1].labels) > 100


def test_difficult_objects_are_ignored_not_learned(tmp_path: Path) -> None:
    hard = replace(annotation((30, 20, 50, 40), 1), is_difficult=True)
    data = dataset(tmp_path, [annotation((2, 2, 20, 30)), hard])
    preset = replace(PLAIN, output_size=(HEIGHT, WIDTH))
    _, target, _ = TrainDataset(data, Preprocess(), preset=preset)[0]
    assert target.labels.tolist() == [0]
    assert target.ignore_xyxy.tolist() == [[30, 20, 50, 40]]


def test_ssd_leaves_out_what_has_its_centre_elsewhere(tmp_path: Path) -> None:
    made = [annotation((x, 30, x + 20, 60), with_mask=False) for x in (0, 50, 100)]
    data = dataset(tmp_path, made, copies=8)
    preset = TrainPreset(output_size=(64, 64), geometry="ssd", horizontal_flip=0.0)
    train = TrainDataset(data, Preprocess(), preset=preset)
    counts = set()
    for index in range(8):
        image, target, _ = train[index]
        assert image.shape == (64, 64, 3)
        counts.add(len(target.labels))
    assert len(counts) > 1


@pytest.mark.parametrize(("name", "with_masks"), [("nuclei", True), ("bccd", False)])
def test_real_samples(name: str, with_masks: bool) -> None:
    if not (DATA_DIR / name).is_dir():
        pytest.skip(f"needs {name} in the folder that VOVNET_DATA names ({DATA_DIR})")
    data = load_coco(*find_split(DATA_DIR / name, "val"))
    train = TrainDataset(data, Preprocess(scale=1.5), preset=TrainPreset(hue=0.05))
    batch = collate_train([train[index] for index in range(6)])
    assert batch.images.shape == (6, 256, 256, 3)
    assert sum(len(target.labels) for target in batch.targets) > 10
    for target in batch.targets:
        assert (target.masks is not None) == with_masks
        if with_masks and len(target.labels):
            assert torch.equal(tight_boxes(masks_of(target)), target.boxes_xyxy)
