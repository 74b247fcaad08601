import io
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image
from tests.class_folders import COLOURS, make_class_folders

from vovnet.data.classes import bad_pictures, load_classes
from vovnet.errors import DataError, ImageError


@pytest.fixture
def folder(tmp_path):
    return make_class_folders(tmp_path / "data")


def test_a_folder_for_each_class(folder):
    data = load_classes(folder, "train")
    assert data.class_names == tuple(sorted(COLOURS))
    assert len(data) == 18
    assert np.bincount(data.labels).tolist() == [6, 6, 6]
    for index in range(len(data)):
        name = data.class_names[data.labels[index]]
        assert f"/train/{name}/" in data.name(index)
        pixels = data.read(index)
        assert pixels.shape == (40, 44, 3)
        assert np.abs(pixels.mean((0, 1)) - COLOURS[name]).max() < 6


@pytest.mark.parametrize("name", ["validation", "valid", "val"])
def test_other_names_of_the_validation_split(folder, name):
    (folder / "val").rename(folder / name)
    assert len(load_classes(folder, "val")) == 18


def test_folders_without_splits_are_parted_by_name(tmp_path):
    folder = make_class_folders(tmp_path, splits=("all",), count=40) / "all"
    train, val = load_classes(folder, "train"), load_classes(folder, "val")
    assert not set(train.files[i] for i in train.file_of) & set(val.files[i] for i in val.file_of)
    assert len(train) + len(val) == 120
    assert 10 <= len(val) <= 40
    assert set(val.labels.tolist()) == set(train.labels.tolist()) == {0, 1, 2}
    # The same names elsewhere, and one picture more: all others stay where they were.
    other = tmp_path / "elsewhere"
    shutil.copytree(folder, other)
    shutil.copy(folder / "red" / "0.png", other / "red" / "new.png")
    kept = {name.rsplit("all", 1)[1] for name in (val.name(i) for i in range(len(val)))}
    again = load_classes(other, "val")
    moved = {again.name(i).rsplit("elsewhere", 1)[1] for i in range(len(again))}
    assert kept == moved - {"/red/new.png"}


def test_a_class_of_two_pictures_is_in_both_parts(tmp_path):
    folder = make_class_folders(tmp_path, splits=("all",), count=2) / "all"
    for split in ("train", "val"):
        assert np.bincount(load_classes(folder, split).labels).tolist() == [1, 1, 1]


def test_a_manifest(folder):
    (folder / "mine.csv").write_text(
        'label,path,who\nb,train/red/0.png,x\na,train/blue/1.png,y\n"c, d",val/green/0.png,z\n'
    )
    data = load_classes(folder, "mine")
    assert data.class_names == ("a", "b", "c, d")
    assert data.labels.tolist() == [1, 0, 2]
    assert data.name(0).endswith("train/red/0.png")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\nx,y\n", ":1: expected the columns path and label, found file, label"),
        ("path,label\ntrain/red/0.png\n", ":2: expected a path and a label"),
        ("path,label\nno.png,a\n", ":2: expected an image file, found none at 'no.png'"),
        ("path,label\ntrain/red/0.png,a\n", "expected at least 2 classes, found a"),
        ("", "expected the columns path and label, found none"),
        (f"path,label\n{'x' * 5000},a\n", ":2: expected an image file, found none"),
        ("path,label\ntrain/red/0.png, a\n", ":2: expected no blanks around a label, got ' a'"),
        ('path,label\n"unended,a\n', "expected a CSV file in UTF-8"),
    ],
)
def test_wrong_manifests_are_named_by_line(folder, text, message):
    (folder / "mine.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        load_classes(folder, "mine")


def test_shards(folder):
    red = (folder / "train" / "red" / "0.png").read_bytes()
    blue = (folder / "train" / "blue" / "0.png").read_bytes()
    shards = folder / "shards"
    shards.mkdir()
    for number, (label, content) in enumerate(((1, red), (0, blue))):
        with tarfile.open(shards / f"train-{number:03}.tar", "w") as tar:
            for name, data in ((f"{number}.png", content), (f"{number}.cls", str(label).encode())):
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    (shards / "classes.txt").write_text("blue\nred\n")
    data = load_classes(shards, "train")
    assert [data.class_names[label] for label in data.labels] == ["red", "blue"]
    assert np.array_equal(data.read(0), np.array(Image.open(io.BytesIO(red))))
    assert data.name(1).startswith(str(shards / "train-001.tar:"))
    order = load_classes(shards, "train", class_names=("red", "green", "blue"))
    assert order.labels.tolist() == [0, 2]
    (shards / "train-000.tar").write_bytes(b"gone")
    with pytest.raises(ImageError, match=r"train-000.tar:"):
        data.read(0)


def test_classes_in_a_given_order(folder):
    names = ("red", "white", "green", "blue")
    data = load_classes(folder, "val", class_names=names)
    assert data.class_names == names
    assert np.bincount(data.labels).tolist() == [6, 0, 6, 6]
    with pytest.raises(DataError, match="expected the classes red, blue; found also green"):
        load_classes(folder, "val", class_names=("red", "blue"))


def test_what_is_not_a_data_set(folder, tmp_path):
    with pytest.raises(DataError, match="expected the folder of a data set, found none"):
        load_classes(tmp_path / "none", "train")
    with pytest.raises(DataError, match=r"expected test/CLASS/ .* found train, val"):
        load_classes(folder, "test")
    (folder / "train" / "yellow").mkdir()
    with pytest.raises(DataError, match=r"pictures of the class 'yellow' .* found none \(links"):
        load_classes(folder, "train")
    single = tmp_path / "single" / "only"
    single.mkdir(parents=True)
    with pytest.raises(DataError, match="expected at least 2 classes, found only"):
        load_classes(single.parent, "train")


@pytest.mark.parametrize(
    "paths",
    [
        ("Annotations/1.xml", "ImageSets/Main/train.txt", "JPEGImages/1.jpg"),
        ("annotations/train.json", "train2017/1.jpg"),
        ("annotations/train.json", "train/1.jpg"),
        ("images/train/1.jpg", "labels/train/1.txt"),
        ("data.yaml", "train/images/1.jpg", "train/labels/1.txt"),
    ],
)
def test_data_for_detectors_is_told(tmp_path, paths):
    for path in paths:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    with pytest.raises(DataError, match="pictures for each class, found data for detectors"):
        load_classes(tmp_path, "train")


def test_names_in_any_alphabet_and_with_separators(tmp_path):
    folder = make_class_folders(tmp_path)
    for old, new in zip(sorted(COLOURS), ("a,b;c", "고양이", "кот 1"), strict=True):
        (folder / "train" / old).rename(folder / "train" / new)
    assert load_classes(folder, "train").class_names == ("a,b;c", "кот 1", "고양이")


def test_bad_pictures_are_found(folder):
    (folder / "train" / "red" / "0.png").write_bytes(b"no picture")
    whole = (folder / "train" / "blue" / "1.png").read_bytes()
    (folder / "train" / "blue" / "1.png").write_bytes(whole[: len(whole) // 2])
    data = load_classes(folder, "train")
    found = bad_pictures(data)
    assert [index for index, _ in found] == [1, 12]
    assert "blue/1.png" in found[0][1]
    assert "red/0.png" in found[1][1]


def test_chosen_pictures(folder):
    data = load_classes(folder, "train")
    some = data.chosen([7, 2])
    assert [some.name(0), some.name(1)] == [data.name(7), data.name(2)]
    assert some.labels.tolist() == [data.labels[7], data.labels[2]]
