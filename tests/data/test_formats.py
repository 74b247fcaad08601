"""One entry for three formats: the one that lies there is found, and checked like any other."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vovnet.data.check import Report
from vovnet.data.formats import (
    FORMATS,
    check_split,
    load_split,
    parse_split,
    recognise,
    require_split,
)
from vovnet.data.problems import ProblemKind
from vovnet.errors import ConfigError, DataError

HEIGHT, WIDTH = 24, 32
BOXES = {"good": (4, 6, 12, 12), "flat": (4, 6, 4, 12), "outside": (4, 6, 34, 12)}


def picture(path: Path, height: int = HEIGHT) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 255, (height, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def make_coco(folder: Path, boxes: dict[str, tuple[int, int, int, int]]) -> None:
    picture(folder / "images/a.png")
    annotations = [
        {"id": i, "image_id": 1, "category_id": 1, "bbox": [x1, y1, x2 - x1, y2 - y1]}
        for i, (x1, y1, x2, y2) in enumerate(boxes.values(), start=1)
    ]
    image = {"id": 1, "file_name": "a.png", "height": HEIGHT, "width": WIDTH}
    content = {"images": [image], "annotations": annotations}
    content["categories"] = [{"id": 1, "name": "dog"}]
    write(folder / "annotations/train.json", json.dumps(content))


def make_voc(folder: Path, boxes: dict[str, tuple[int, int, int, int]]) -> None:
    picture(folder / "JPEGImages/a.png")
    sides = ("xmin", "ymin", "xmax", "ymax")
    objects = ""
    for x1, y1, x2, y2 in boxes.values():
        values = zip(sides, (x1 + 1, y1 + 1, x2, y2), strict=True)
        box = "".join(f"<{tag}>{value}</{tag}>" for tag, value in values)
        objects += f"<object><name>dog</name><bndbox>{box}</bndbox></object>"
    size = f"<size><height>{HEIGHT}</height><width>{WIDTH}</width></size>"
    text = f"<annotation><filename>a.png</filename>{size}{objects}</annotation>"
    write(folder / "Annotations/a.xml", text)
    write(folder / "ImageSets/Main/train.txt", "a\n")
    write(folder / "labels.txt", "dog\n")


def make_yolo(folder: Path, boxes: dict[str, tuple[int, int, int, int]]) -> None:
    picture(folder / "images/a.png")
    rows = ""
    for x1, y1, x2, y2 in boxes.values():
        cx, cy = (x1 + x2) / 2 / WIDTH, (y1 + y2) / 2 / HEIGHT
        rows += f"0 {cx} {cy} {(x2 - x1) / WIDTH} {(y2 - y1) / HEIGHT}\n"
    write(folder / "labels/a.txt", rows)
    write(folder / "data.yaml", "train: images\nnames: [dog]\n")


MAKERS = {"coco": make_coco, "voc": make_voc, "yolo": make_yolo}


def test_every_format_is_made_here() -> None:
    assert MAKERS.keys() == FORMATS.keys()


@pytest.mark.parametrize("name", MAKERS)
def test_one_form_for_all(tmp_path: Path, name: str) -> None:
    MAKERS[name](tmp_path, {"good": BOXES["good"]})
    assert recognise(tmp_path) == require_split(tmp_path, "train") == name
    for format in ("auto", name):
        data, report = load_split(tmp_path, "train", format=format)
        assert report.is_good
        assert (report.num_images, report.num_annotations) == (1, 1)
        assert data.class_names == ("dog",)
        image = data.images[0]
        assert (image.path.name, image.height, image.width) == ("a.png", HEIGHT, WIDTH)
        (annotation,) = image.annotations
        assert annotation.box_xyxy == BOXES["good"]
        assert (annotation.area, annotation.segmentation) == (48, None)
    with pytest.raises(DataError, match="split 'val': expected"):
        require_split(tmp_path, "val")
    with pytest.raises(DataError, match="split 'val': expected"):
        load_split(tmp_path, "val")


@pytest.mark.parametrize("name", MAKERS)
def test_bad_boxes_are_named_in_every_format(tmp_path: Path, name: str) -> None:
    MAKERS[name](tmp_path, BOXES)
    report: Report = check_split(tmp_path, "train", read_pixels=False)
    assert [problem.kind for problem in report.problems] == [
        ProblemKind.DEGENERATE_BOX,
        ProblemKind.OUTSIDE_BOX,
    ]
    places = {"voc": "Annotations/a.xml: object[1]: ", "yolo": "labels/a.txt:2: ", "coco": ""}
    expected = f"{tmp_path / places[name]}"[:-1] if places[name] else "expected a width"
    assert report.problems[0].text.startswith(expected)
    with pytest.raises(DataError, match=r"2 problems in 1 images with 3 annotations"):
        load_split(tmp_path, "train")
    data, _ = load_split(tmp_path, "train", skip_bad=True)
    assert [a.box_xyxy for a in data.images[0].annotations] == [BOXES["good"]]


@pytest.mark.parametrize("name", MAKERS)
def test_bad_images_are_named_in_every_format(tmp_path: Path, name: str) -> None:
    MAKERS[name](tmp_path, {"good": BOXES["good"]})
    (file,) = tmp_path.rglob("a.png")
    file.write_bytes(file.read_bytes()[:-600])
    assert check_split(tmp_path, "train", read_pixels=False).is_good
    (problem,) = check_split(tmp_path, "train").problems
    assert (problem.kind, problem.file) == (ProblemKind.UNREADABLE_FILE, "a.png")
    if name != "yolo":  # it declares no size
        picture(file, HEIGHT + 1)
        (problem,) = check_split(tmp_path, "train", read_pixels=False).problems
        assert problem.kind == ProblemKind.IMAGE_SIZE
    file.unlink()
    with pytest.raises(DataError):
        load_split(tmp_path, "train", skip_bad=True)


def test_two_formats_in_one_folder(tmp_path: Path) -> None:
    make_coco(tmp_path, {"good": BOXES["good"]})
    make_yolo(tmp_path, {})
    with pytest.raises(DataError, match="found COCO and YOLO; choose by --format coco or --format"):
        recognise(tmp_path)
    for name, count in (("coco", 1), ("yolo", 0)):
        assert len(load_split(tmp_path, "train", format=name)[0].images[0].annotations) == count
    with pytest.raises(DataError, match=r"ImageSets/Main/train\.txt"):
        load_split(tmp_path, "train", format="voc")


def test_no_format(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected one of COCO .*, Pascal VOC .*, YOLO .*; found"):
        recognise(tmp_path)
    with pytest.raises(DataError, match="expected the folder of a data set, found nothing"):
        recognise(tmp_path / "none")
    with pytest.raises(ConfigError, match="--format: expected one of auto, coco, voc, yolo"):
        recognise(tmp_path, "csv")


def test_annotations_without_lists_are_recognised(tmp_path: Path) -> None:
    make_voc(tmp_path, {})
    (tmp_path / "ImageSets/Main/train.txt").unlink()
    (tmp_path / "ImageSets/Main").rmdir()
    assert recognise(tmp_path) == "voc"
    with pytest.raises(DataError, match=r"split 'train': expected .*ImageSets/Main/train\.txt"):
        parse_split(tmp_path, "train")
