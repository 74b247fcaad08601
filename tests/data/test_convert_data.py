"""From each format to each: nothing is lost, nothing half written; labels alone hold most of it."""

import json
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask

from vovnet.data import convert as convert_module
from vovnet.data.coco import write_split
from vovnet.data.convert import convert_dataset
from vovnet.data.formats import FORMATS, load_split
from vovnet.data.labels import Annotation, DetectionData, ImageRecord
from vovnet.errors import ConfigError, DataError

PAIRS = [(first, second) for first in FORMATS for second in FORMATS]
RING = [8.0, 8.0, 20.0, 8.0, 20.0, 19.5]


def picture(path: Path, height: int, width: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (width, height)).save(path)


def rle(height: int, width: int) -> dict[str, object]:
    mask = np.zeros((height, width), dtype=np.uint8, order="F")
    mask[1:4, 2:5] = mask[6, 1:7] = 1
    return coco_mask.encode(mask)


def sample() -> DetectionData:
    """Two images; every field of an object has a value that some format has no place for."""
    objects = (
        Annotation(50, 0, (8.0, 8.0, 20.0, 19.5), [RING], 69.0, False),
        Annotation(7, 1, (1.25, 2.5, 30.1, 33.3), None, 12.0, False, True),
        Annotation(9, 1, (-0.5, 0.0, 40.75, 36.5), None, 1500.0, True),
        Annotation(8, 2, (2.0, 1.0, 7.0, 7.0), rle(36, 40), 15.0, False),
        Annotation(10, 2, (3.0, 4.0, 5.0, 6.0), None, 4.0, False),
    )
    first = ImageRecord(30, Path("sub/b.png"), 36, 40, objects)
    second = ImageRecord(4, Path("a.png"), 11, 13, ())
    return DetectionData((first, second), ("zebra", "개 & <b>", "cat"), (2, 18, 90), Path("x"))


def write_coco(folder: Path, data: DetectionData, split: str = "train") -> Path:
    for image in data.images:
        picture(folder / "images" / split / image.path, image.height, image.width)
    write_split(folder, split, data, [image.path.as_posix() for image in data.images])
    return folder


def read(folder: Path, split: str = "train") -> DetectionData:
    """The split with its images by name."""
    data, report = load_split(folder, split, read_pixels=False)
    assert report.is_good
    roots = ("images/" + split, "JPEGImages")
    (root,) = [folder / root for root in roots if (folder / root).is_dir()]
    images = tuple(replace(im, path=im.path.relative_to(root)) for im in data.images)
    return replace(data, images=images, annotation_file=Path("x"))


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_nothing_is_lost(tmp_path: Path, first: str, second: str) -> None:
    write_coco(tmp_path / "0", sample())
    for number, to in enumerate((first, second, "coco"), start=1):
        source, output = tmp_path / str(number - 1), tmp_path / str(number)
        (converted,) = convert_dataset(source, output, to=to)
        assert (converted.name, converted.num_images, converted.num_objects) == ("train", 2, 5)
        assert read(output) == sample()
        shutil.rmtree(source)
    # No trace of the formats between: COCO has a place for all of this.
    assert not (tmp_path / "3/vovnet-extra").exists()
    entries = json.loads((tmp_path / "3/annotations/train.json").read_text())["annotations"]
    assert [entry.get("difficult", 0) for entry in entries] == [0, 1, 0, 0, 0]
    assert "segmentation" not in entries[1]


@pytest.mark.parametrize("to", ["voc", "yolo"])
def test_the_labels_alone_hold_what_the_format_can(tmp_path: Path, to: str) -> None:
    (converted,) = convert_dataset(write_coco(tmp_path / "0", sample()), tmp_path / "1", to=to)
    assert converted.num_extras == {"voc": 4, "yolo": 3}[to]
    shutil.rmtree(tmp_path / "1/vovnet-extra")
    plain = read(tmp_path / "1")
    found = {image.path.as_posix(): image.annotations for image in plain.images}
    expected = sample().images[0].annotations
    assert found.keys() == {"sub/b.png", "a.png"}
    annotations = found["sub/b.png"]
    assert [a.label for a in annotations] == [a.label for a in expected]
    boxes = [a.box_xyxy for a in expected]
    if to == "yolo":
        boxes[2] = (0.0, 0.0, 40.0, 36.0)
        assert [a.segmentation for a in annotations] == [[RING], None, None, None, None]
    else:
        assert [a.is_difficult for a in annotations] == [False, True, False, False, False]
    assert [a.box_xyxy for a in annotations] == boxes
    assert plain.class_names == sample().class_names


sides = st.floats(-1, 1, allow_subnormal=True) | st.integers(0, 4) | st.decimals(0, 4, places=2)


@st.composite
def annotations_of(draw: st.DrawFn, number: int, labels: int) -> Annotation:
    x1, y1 = float(draw(sides)), float(draw(sides))
    x2, y2 = (16 - float(draw(sides)) for _ in range(2))
    ring = [x1, y1, x2, y1, x2, y2 - 1 / 3]
    mask = draw(st.sampled_from([None, [ring], [ring, RING], rle(16, 16)]))
    area = draw(st.floats(0, 1e5))
    is_crowd, is_difficult = draw(st.booleans()), draw(st.booleans())
    label = draw(st.integers(0, labels - 1))
    return Annotation(number, label, (x1, y1, x2, y2), mask, area, is_crowd, is_difficult)


# Letters of any script, and what stands for something in XML, YAML, shells and glob patterns.
words = st.text(st.characters(categories=["L", "N"]) | st.sampled_from("&<>'\"%#:-[]{}!*?,"))
file_names = st.text(st.characters(categories=["Ll", "Nd"]) | st.sampled_from("&'#[]{}!* ,"))


@st.composite
def data_sets(draw: st.DrawFn) -> DetectionData:
    class_names = draw(st.lists(words.filter(bool), min_size=1, max_size=3, unique=True))
    count = len(class_names)
    ids = sorted(draw(st.sets(st.integers(-9, 99), min_size=count, max_size=count)))
    file_ids = draw(st.lists(st.integers(1, 99), min_size=1, max_size=3, unique=True))
    numbers = iter(draw(st.permutations(range(1, 40))))
    images = []
    for file_id in file_ids:
        count = draw(st.integers(0, 3))
        items = [draw(annotations_of(next(numbers), len(class_names))) for _ in range(count)]
        name = f"i{file_id}{draw(file_names)[:20]}i.png"
        images.append(ImageRecord(file_id, Path(name), 16, 16, tuple(items)))
    return DetectionData(tuple(images), tuple(class_names), tuple(ids), Path("x"))


@settings(max_examples=15, deadline=None)
@given(data=data_sets(), pair=st.sampled_from(PAIRS))
def test_any_data_set_survives_any_way(data: DetectionData, pair: tuple[str, str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # COCO's width and height may round away a bit of the corners: the start is what is read.
        write_coco(folder / "0", data)
        start = read(folder / "0")
        for number, to in enumerate((*pair, "coco"), start=1):
            convert_dataset(folder / str(number - 1), folder / str(number), to=to)
            assert read(folder / str(number)) == start


def test_splits_and_links(tmp_path: Path) -> None:
    for split in ("train", "val", "test", "other"):
        write_coco(tmp_path / "0", sample(), split)
    converted = convert_dataset(tmp_path / "0", tmp_path / "1", to="yolo", link=True)
    assert [item.name for item in converted] == ["train", "val", "test"]
    link = tmp_path / "1/images/val/sub/b.png"
    assert link.is_symlink()
    assert link.resolve() == (tmp_path / "0/images/val/sub/b.png").resolve()
    (converted,) = convert_dataset(tmp_path / "0", tmp_path / "2", to="voc", splits=["other"])
    assert converted.name == "other"
    assert read(tmp_path / "2", "other") == sample()
    assert not (tmp_path / "2/JPEGImages/a.png").is_symlink()


def test_equal_names_in_two_splits_stay_apart(tmp_path: Path) -> None:
    first = sample()
    crowdless = first.images[0].annotations[:1]
    second = replace(first, images=(replace(first.images[0], annotations=crowdless),))
    write_coco(tmp_path / "0", first)
    write_coco(tmp_path / "0", second, "val")
    convert_dataset(tmp_path / "0", tmp_path / "1", to="voc")
    assert (tmp_path / "1/JPEGImages/val/sub/b.png").is_file()
    train, val = (read(tmp_path / "1", split) for split in ("train", "val"))
    assert train.images[0].annotations == first.images[0].annotations
    assert [image.annotations for image in val.images] == [crowdless]


def test_splits_that_share_images_share_files(tmp_path: Path) -> None:
    convert_dataset(write_coco(tmp_path / "0", sample()), tmp_path / "1", to="voc")
    lists = tmp_path / "1/ImageSets/Main"
    (lists / "trainval.txt").write_bytes((lists / "train.txt").read_bytes())
    shutil.rmtree(tmp_path / "1/vovnet-extra")
    splits = ["train", "trainval"]
    convert_dataset(tmp_path / "1", tmp_path / "2", to="voc", splits=splits)
    assert sorted(path.name for path in (tmp_path / "2/JPEGImages").iterdir()) == ["a.png", "sub"]
    (lists / "train.txt").unlink()
    (converted,) = convert_dataset(tmp_path / "1", tmp_path / "3", to="yolo")
    assert converted.name == "trainval"


def converted_to(tmp_path: Path, to: str) -> Path:
    convert_dataset(write_coco(tmp_path / "0", sample()), tmp_path / "1", to=to)
    return tmp_path / "1"


def test_labels_that_changed_since_are_a_problem(tmp_path: Path) -> None:
    folder = converted_to(tmp_path, "yolo")
    file = folder / "labels/train/sub/b.txt"
    text = file.read_text()
    file.write_text(text.replace("\n", "\r\n").replace(" ", "  "))  # as an editor may leave it
    assert read(folder) == sample()
    file.write_text(text.replace("\n", "\n\n") + "0 0.5 0.5 0.5 0.5\n")
    match = r"vovnet-extra/train\.json: images\[0\]: .* have changed since; delete the file"
    with pytest.raises(DataError, match=match):
        load_split(folder, "train")
    data, _ = load_split(folder, "train", skip_bad=True)
    assert [image.id for image in data.images] == [4]


def test_images_that_came_or_went_are_a_problem(tmp_path: Path) -> None:
    folder = converted_to(tmp_path, "yolo")
    (folder / "images/train/a.png").rename(folder / "images/train/c.png")
    (folder / "labels/train/a.txt").rename(folder / "labels/train/c.txt")
    with pytest.raises(DataError) as caught:
        load_split(folder, "train")
    assert "expected an image of the split, once, got 'images/train/a.png'" in str(caught.value)
    assert "expected an entry of 'images/train/c.png'" in str(caught.value)


def changed(**changes: object) -> object:
    return lambda content: content | changes


def in_object(**changes: object) -> object:
    def change(content: dict[str, object]) -> dict[str, object]:
        content["images"][0]["objects"][0] |= changes
        return content

    return change


def in_image(**changes: object) -> object:
    def change(content: dict[str, object]) -> dict[str, object]:
        content["images"][0] |= changes
        return content

    return change


BAD_EXTRAS = {
    "version": (changed(version=2), "expected version 1 and a list of images"),
    "images": (changed(images={}), "expected version 1 and a list of images"),
    "list": (lambda content: [content], "expected a JSON object"),
    "few ids": (changed(category_ids=[1]), "expected 3 different ids"),
    "same ids": (changed(category_ids=[1, 1, 2]), "expected 3 different ids"),
    "text ids": (changed(category_ids=["1", 2, 3]), "category_ids: expected a whole number"),
    "entry": (lambda c: c | {"images": [3, *c["images"]]}, r"images\[0\]: expected an object"),
    "file": (in_image(file=["x"]), "expected an image of the split, once"),
    "objects": (in_image(objects=[]), r"objects: expected 5 entries, got 0"),
    "same id": (in_image(id=4), r"images\[1\]: expected ids that were not given before"),
    "object id": (in_object(id=9), "expected ids that were not given before"),
    "nan": (in_object(area=float("nan")), "area: expected a finite number"),
    "box": (in_object(box_xyxy=[1, 2, 3]), "box_xyxy: expected four numbers"),
    "flag": (in_object(iscrowd="no"), "iscrowd: expected 0 or 1"),
    "mask": (in_object(segmentation={"size": [9, 9], "counts": "0"}), r"size: expected \[36, 40\]"),
    "far": (in_object(box_xyxy=[1, 2, 3e9, 4]), r"labels/train/sub/b\.txt:1: expected corners in"),
}


@pytest.mark.parametrize("name", BAD_EXTRAS)
def test_a_bad_extra_file(tmp_path: Path, name: str) -> None:
    folder = converted_to(tmp_path, "yolo")
    file = folder / "vovnet-extra/train.json"
    change, message = BAD_EXTRAS[name]
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(DataError, match=message):
        load_split(folder, "train", read_pixels=False)


def assert_nothing_written(tmp_path: Path) -> None:
    assert os.listdir(tmp_path) == ["0"]


def test_bad_data_is_not_converted(tmp_path: Path) -> None:
    write_coco(tmp_path / "0", sample())
    bad = replace(sample().images[0].annotations[0], box_xyxy=(1.0, 1.0, 1.0, 2.0))
    write_coco(
        tmp_path / "0",
        replace(sample(), images=(ImageRecord(1, Path("c.png"), 9, 9, (bad,)),)),
        "val",
    )
    with pytest.raises(DataError, match="degenerate box"):
        convert_dataset(tmp_path / "0", tmp_path / "1", to="voc")
    assert_nothing_written(tmp_path)


def test_what_has_no_place_is_refused(tmp_path: Path) -> None:
    twins = tuple(ImageRecord(i, Path(f"a.{s}"), 9, 9, ()) for i, s in ((1, "png"), (2, "bmp")))
    write_coco(tmp_path / "0", replace(sample(), images=twins))
    for to in ("voc", "yolo"):
        with pytest.raises(
            DataError, match="expected different names in the split 'train', got 'a'"
        ):
            convert_dataset(tmp_path / "0", tmp_path / "1", to=to)
    shutil.rmtree(tmp_path / "0")
    write_coco(tmp_path / "0", replace(sample(), class_names=("a ", "b", "c")))
    with pytest.raises(DataError, match="cannot hold the class name 'a '"):
        convert_dataset(tmp_path / "0", tmp_path / "1", to="voc")
    assert_nothing_written(tmp_path)


def test_classes_that_disagree(tmp_path: Path) -> None:
    write_coco(tmp_path / "0", sample())
    write_coco(tmp_path / "0", replace(sample(), class_names=("a", "b", "c")), "val")
    with pytest.raises(DataError, match=r"val\.json: expected the classes of .*train\.json"):
        convert_dataset(tmp_path / "0", tmp_path / "1", to="yolo")
    assert_nothing_written(tmp_path)
    convert_dataset(tmp_path / "0", tmp_path / "1", to="coco")


def test_an_end_in_the_middle_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    write_coco(tmp_path / "0", sample())

    def stop(*_: object) -> None:
        raise SystemExit(143)

    monkeypatch.setattr(convert_module, "make_extra", stop)
    with pytest.raises(SystemExit):
        convert_dataset(tmp_path / "0", tmp_path / "1", to="yolo")
    assert_nothing_written(tmp_path)


def test_a_loss_is_noticed(tmp_path: Path, monkeypatch) -> None:
    write_coco(tmp_path / "0", sample())
    monkeypatch.setattr(convert_module, "make_extra", lambda *_: None)
    for to in ("voc", "yolo"):
        with pytest.raises(DataError, match="cannot hold the split 'train' without a loss"):
            convert_dataset(tmp_path / "0", tmp_path / "1", to=to)
    assert_nothing_written(tmp_path)


def test_where_it_may_write(tmp_path: Path) -> None:
    write_coco(tmp_path / "0", sample())
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").touch()
    for output in (tmp_path / "full", tmp_path / "full/x", tmp_path / "0"):
        with pytest.raises(ConfigError, match="--output: expected a new or empty folder"):
            convert_dataset(tmp_path / "0", output, to="yolo")
    (tmp_path / "empty").mkdir()
    convert_dataset(tmp_path / "0", tmp_path / "empty", to="yolo")
    convert_dataset(tmp_path / "0", tmp_path / "new/deep", to="voc")
    assert sorted(os.listdir(tmp_path)) == ["0", "empty", "full", "new"]
    with pytest.raises(ConfigError, match="--to: expected one of coco, voc, yolo"):
        convert_dataset(tmp_path / "0", tmp_path / "1", to="csv")
    with pytest.raises(ConfigError, match="--split: expected the name of a split"):
        convert_dataset(tmp_path / "0", tmp_path / "1", to="coco", splits=["../x"])
    with pytest.raises(DataError, match="split 'valid': expected"):
        convert_dataset(tmp_path / "0", tmp_path / "1", to="coco", splits=["valid"])
