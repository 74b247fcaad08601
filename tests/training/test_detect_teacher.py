import json
import math
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vovnet.data.augment import TrainDataset
from vovnet.data.formats import load_split
from vovnet.data.labels import Annotation, decode_mask
from vovnet.data.preset import TrainPreset
from vovnet.errors import ConfigError
from vovnet.images import read_image
from vovnet.preprocess import Preprocess
from vovnet.results import Detections, MaskCrop
from vovnet.training.config import TrainConfig
from vovnet.training.detect import DetectorTask
from vovnet.training.detect_teacher import (
    COCO_NAMES,
    DetectorTeacher,
    decode_yolox,
    letterbox,
    load_detector,
    missing_labels,
    teach,
)

CPU = torch.device("cpu")
REAL = Path(os.environ.get("VOVNET_DATA", "../shared/data"))
NAMES = ("cat", "dog", "tree")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Two pictures of 96 x 64 for both splits; the first has a cat and a crowd of dogs."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "images").mkdir()
    (folder / "annotations").mkdir()
    images = []
    draw = np.random.default_rng(0)
    for number in (1, 2):
        pixels = draw.integers(0, 256, (64, 96, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": 96, "height": 64})
    common = {"image_id": 1, "area": 400}
    crowd = {"size": [64, 96], "counts": [64 * 50, 64 * 46]}
    annotations = [
        {"id": 5, "category_id": 1, "bbox": [10, 10, 20, 20], "iscrowd": 0, **common},
        {"id": 6, "category_id": 2, "bbox": [50, 0, 46, 64], "iscrowd": 1, **common}
        | {"segmentation": crowd},
    ]
    categories = [{"id": n, "name": name} for n, name in enumerate(NAMES, start=1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    for split in ("train", "val"):
        (folder / "annotations" / f"{split}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def data(data_dir):
    return load_split(data_dir, "train")[0]


def detections(*rows, class_names=("dog", "car", "cat"), masks=None) -> Detections:
    """Rows of a class name, a score and a box."""
    return Detections(
        boxes_xyxy=np.array([row[2] for row in rows], np.float32).reshape(-1, 4),
        scores=np.array([row[1] for row in rows], np.float32),
        labels=np.array([class_names.index(row[0]) for row in rows], np.int64),
        image_size=(64, 96),
        class_names=class_names,
        masks=masks,
    )


def teacher_of(found: Detections) -> DetectorTeacher:
    return DetectorTeacher(lambda image: found, found.class_names, found.masks is not None)


def test_what_the_labels_miss_is_added_and_all_else_is_left_alone(data):
    found = detections(
        ("dog", 0.9, (2, 40, 22, 60)),
        ("cat", 0.3, (30, 2, 44, 12)),  # unsure
        ("cat", 0.2, (30, 40, 44, 60)),  # too unsure
        ("dog", 0.9, (11, 11, 30, 30)),  # the labelled cat of the first picture
        ("dog", 0.9, (60, 5, 80, 25)),  # in its crowd
        ("car", 0.8, (5, 40, 40, 60)),
        ("car", 0.2, (5, 40, 40, 60)),
    )
    lessons = teach(data, teacher_of(found), score=0.5, with_masks=False, where="it")
    first, second = lessons.data.images
    assert first.annotations[:2] == data.images[0].annotations
    new = [(NAMES[a.label], a.box_xyxy, a.is_difficult) for a in first.annotations[2:]]
    assert new == [("dog", (2, 40, 22, 60), False), ("cat", (30, 2, 44, 12), True)]
    assert [NAMES[a.label] for a in second.annotations] == ["dog", "cat", "dog", "dog"]
    ids = [a.id for image in lessons.data.images for a in image.annotations]
    assert len(set(ids)) == len(ids)
    assert (lessons.objects, lessons.unsure) == (4, 2)
    assert lessons.unknown == Counter(car=2)
    words = "4 objects learnt, 2 unsure ones ignored; 2 detections of other classes left alone"
    assert lessons.describe() == f"{words} (car 2)"


def test_masks_are_kept(data):
    mask = MaskCrop(4, 42, np.eye(10, dtype=bool))
    found = detections(("dog", 0.9, (4, 42, 14, 52)), masks=(mask,))
    added = teach(data, teacher_of(found), score=0.5, with_masks=True, where="it")
    added = added.data.images[1].annotations[0]
    decoded = decode_mask(added, 64, 96)
    assert (decoded.x, decoded.y) == (4, 42)
    assert np.array_equal(decoded.pixels, mask.pixels)
    bare = teach(data, teacher_of(found), score=0.5, with_masks=False, where="it")
    assert bare.data.images[1].annotations[0].segmentation is None


def test_what_counts_as_labelled(data):
    record = data.images[0]
    cat = (10.0, 10.0, 30.0, 30.0)
    moved = [(10.0 + x, 10.0, 30.0 + x, 30.0) for x in (0, 10, 12)]  # IoU 1, 1/3, 1/4
    rows = np.array(
        [cat, *moved, (40, 5, 60, 25), (39, 5, 59, 25)], np.float32
    )  # in crowd: .5, .45
    assert missing_labels(rows, record).tolist() == [False, False, False, True, False, True]
    assert missing_labels(np.zeros((0, 4), np.float32), record).tolist() == []


def test_added_boxes_follow_the_augmentation_as_labels_do(data):
    """The same boxes as labels and as detections of a teacher give the same targets."""
    boxes = [(2.0, 40.0, 22.0, 60.0), (30.0, 2.0, 44.0, 12.0), (60.0, 5.0, 80.0, 25.0)]
    bare = replace(data, images=tuple(replace(i, annotations=()) for i in data.images))
    labels = tuple(Annotation(n, 1, box, None, 1.0, False) for n, box in enumerate(boxes))
    labelled = replace(data, images=tuple(replace(i, annotations=labels) for i in data.images))
    found = detections(*(("dog", 0.9, box) for box in boxes))
    taught = teach(bare, teacher_of(found), score=0.5, with_masks=False, where="it").data
    unsure = teach(bare, teacher_of(found), score=0.95, with_masks=False, where="it").data
    preset = TrainPreset(output_size=(48, 48), scale_range=(0.5, 2.0), vertical_flip=0.5,
                         quarter_turn=0.5, mosaic=0.5)  # fmt: skip
    seen = 0
    for epoch in range(10):
        targets = []
        for one in (labelled, taught, unsure):
            dataset = TrainDataset(one, Preprocess(), preset=preset)
            dataset.set_place(epoch, 0.0)
            targets.append(dataset[epoch % 2][1])
        expected, as_objects, as_unsure = targets
        assert torch.equal(expected.boxes_xyxy, as_objects.boxes_xyxy)
        assert torch.equal(expected.labels, as_objects.labels)
        assert torch.equal(expected.boxes_xyxy, as_unsure.ignore_xyxy)
        assert len(as_unsure.boxes_xyxy) == 0
        seen += len(expected.boxes_xyxy)
    assert seen > 10


def test_a_teacher_of_other_classes_alone_is_refused(data):
    found = detections(("car", 0.9, (0, 0, 9, 9)), class_names=("car",))
    with pytest.raises(
        ConfigError, match="it: expected a detector of some of the classes cat, dog"
    ):
        teach(data, teacher_of(found), score=0.5, with_masks=False, where="it")


def make_task(data_dir, **changes) -> DetectorTask:
    config = TrainConfig(
        data=str(data_dir), model="fcos_lite_ese_vovnet19b_slim_dw", workers=0, **changes
    )
    return DetectorTask(config, skip_bad=False, device=CPU)


def test_a_model_folder_teaches_a_detector(data_dir, data, model_folder):
    task = make_task(data_dir, teacher=str(model_folder), teacher_score=1e-4)
    plain = make_task(data_dir)
    assert plain.notes == []
    assert plain.train_data == data
    assert plain.spent_s < 0.1
    assert task.spent_s > plain.spent_s
    assert len(task.notes) == 1
    assert task.notes[0].startswith(f"teacher {model_folder}: ")
    assert task.val_data == plain.val_data
    teacher = load_detector(str(model_folder), score=0.5e-4, device=CPU)
    lessons = teach(plain.train_data, teacher, score=1e-4, with_masks=False, where="it")
    assert lessons.objects > 0
    assert task.train_data == lessons.data
    assert task.dataset.data == lessons.data
    assert lessons.describe() in task.notes[0]


def test_a_teacher_is_not_asked_before_the_model_is_right(data_dir, monkeypatch):
    monkeypatch.setattr("vovnet.training.detect.load_detector", None)
    wrong = {"model_overrides": {"no_such": 1}, "teacher": "boxes"}
    config = TrainConfig(data=str(data_dir), model="vovdet_n_seg", workers=0, **wrong)
    with pytest.raises(ConfigError, match="no_such"):
        DetectorTask(config, skip_bad=False, device=CPU)


def test_a_segmenter_needs_masks_of_its_teacher(data_dir, monkeypatch):
    found = detections(("cat", 0.9, (0, 0, 9, 9)))
    monkeypatch.setattr("vovnet.training.detect.load_detector", lambda *a, **k: teacher_of(found))
    config = TrainConfig(data=str(data_dir), model="vovdet_n_seg", teacher="boxes", workers=0)
    with pytest.raises(ConfigError, match="teacher boxes: expected a segmenter, got a detector"):
        DetectorTask(config, skip_bad=False, device=CPU)


def test_a_teacher_stops_looking_when_the_time_is_over(data_dir, model_folder, monkeypatch):
    asked = []

    class Teacher:
        class_names, has_masks = ("cat",), True

        def detect(self, image):
            asked.append(image)
            return detections(class_names=("cat",))

    monkeypatch.setattr("vovnet.training.detect.load_detector", lambda *a, **k: Teacher())
    seconds = iter(range(0, 1000, 20))
    monkeypatch.setattr("vovnet.training.detect.time.monotonic", lambda: next(seconds))
    with pytest.raises(ConfigError, match=r"max_minutes: expected more than .* teacher"):
        make_task(data_dir, teacher=str(model_folder), epochs=None, max_minutes=0.5)
    assert len(asked) == 1  # 20 s of 30; then 40 s


def test_wrong_specifications_are_refused(classifier_folder, tmp_path):
    with pytest.raises(ConfigError, match="teacher nowhere: expected a model folder"):
        load_detector("nowhere", score=0.5, device=CPU)
    with pytest.raises(ConfigError, match="expected a detector or segmenter, found a classifier"):
        load_detector(str(classifier_folder), score=0.5, device=CPU)


def test_yolox_is_decoded_as_it_was_trained():
    side, classes = 64, 3
    places = 8 * 8 + 4 * 4 + 2 * 2
    raw = np.random.default_rng(0).normal(size=(places, 5 + classes)).astype(np.float32)
    boxes, probabilities = decode_yolox(raw, side)
    row = 0
    for stride in (8, 16, 32):
        for y in range(side // stride):
            for x in range(side // stride):
                dx, dy, log_w, log_h, is_object, *of_class = raw[row].tolist()
                cx, cy = (x + dx) * stride, (y + dy) * stride
                w, h = math.exp(log_w) * stride, math.exp(log_h) * stride
                expected = [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]
                assert boxes[row].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-3)
                scores = [is_object * p for p in of_class]
                assert probabilities[row].tolist() == pytest.approx(scores, rel=1e-5)
                row += 1
    assert row == len(boxes)


def test_the_letterbox_is_grey_below_and_bgr():
    canvas, ratio = letterbox(np.full((50, 100, 3), (10, 20, 30), np.uint8), 64)
    assert canvas.shape == (1, 3, 64, 64)
    assert ratio == 0.64
    assert canvas[0, :, 0, 0].tolist() == [30, 20, 10]
    assert canvas[0, :, 31, 63].tolist() == [30, 20, 10]
    assert (canvas[0, :, 32:] == 114).all()


def test_coco_has_eighty_names():
    assert len(set(COCO_NAMES)) == 80
    assert (COCO_NAMES[0], COCO_NAMES[39], COCO_NAMES[79]) == ("person", "bottle", "toothbrush")


def test_yolox_finds_what_is_in_a_real_picture():
    weights = REAL / "peer-weights" / "yolox_nano.onnx"
    if not (weights.is_file() and (REAL / "coco-free").is_dir()):
        pytest.skip(f"no YOLOX weights and COCO pictures in {REAL}")
    data, _ = load_split(REAL / "coco-free", "val", read_pixels=False)
    teacher = load_detector(str(weights), score=0.5, device=CPU)
    assert set(data.class_names) <= set(teacher.class_names)
    person = data.class_names.index("person")
    objects = [(a.area, image.id, a) for image in data.images for a in image.annotations
               if a.label == person and not a.is_crowd]  # fmt: skip
    largest = sorted(objects, key=lambda one: -one[0])[:5]
    by_id = {image.id: image for image in data.images}
    hits = 0
    for _, image_id, annotation in largest:
        found = teacher.detect(read_image(by_id[image_id].path))
        people = found[found.labels == 0]
        low = np.maximum(people.boxes_xyxy[:, :2], annotation.box_xyxy[:2])
        high = np.minimum(people.boxes_xyxy[:, 2:], annotation.box_xyxy[2:])
        shared = (high - low).clip(min=0).prod(1)
        sides = people.boxes_xyxy[:, 2:] - people.boxes_xyxy[:, :2]
        x1, y1, x2, y2 = annotation.box_xyxy
        hits += bool((shared / (sides.prod(1) + (x2 - x1) * (y2 - y1) - shared) > 0.7).any())
    assert hits >= 4


def test_another_onnx_file_is_no_yolox():
    weights = REAL / "peer-weights" / "FastestDet.onnx"
    if not weights.is_file():
        pytest.skip(f"no {weights}")
    with pytest.raises(ConfigError, match=r"expected a file of `vovnet export`, or YOLOX"):
        load_detector(str(weights), score=0.5, device=CPU)
