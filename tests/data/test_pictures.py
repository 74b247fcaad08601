import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vovnet.data.classes import load_classes
from vovnet.data.pictures import load_pictures
from vovnet.errors import ConfigError, DataError

SPLITS = ("train", "val")


def draw(path: Path, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(path)
    return path


def names(data) -> list[str]:
    return sorted(Path(file).name for file in data.files)


def test_every_picture_below_a_folder_but_those_of_test(tmp_path):
    for name in ("a.png", "x/b.jpg", "x/y/c.PNG", "test/d.png", ".hidden/e.png", "x/test/f.png"):
        draw(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    found = load_pictures(tmp_path, SPLITS)
    assert names(found) == ["a.png", "b.jpg", "c.PNG", "f.png"]
    assert len(found) == 4
    assert found.class_names == ()


def test_a_detection_set_gives_its_splits_pictures_each_once(tmp_path):
    for number in range(4):
        draw(tmp_path / "images" / f"{number}.png")
    (tmp_path / "annotations").mkdir()
    for split, numbers in {"train": (0, 1), "val": (1, 2), "test": (3,)}.items():
        images = [{"id": n, "file_name": f"{n}.png", "height": 8, "width": 8} for n in numbers]
        content = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "a"}]}
        (tmp_path / "annotations" / f"{split}.json").write_text(json.dumps(content))
    assert names(load_pictures(tmp_path, SPLITS)) == ["0.png", "1.png", "2.png"]
    assert names(load_pictures(tmp_path, ("train", "trainval"))) == ["0.png", "1.png"]
    with pytest.raises(ConfigError, match="--format: expected one of"):
        load_pictures(tmp_path, SPLITS, format="coca")


def test_manifests_and_shards(tmp_path):
    draw(tmp_path / "a.png", 10)
    draw(tmp_path / "b.png", 20)
    draw(tmp_path / "unlisted.png", 30)
    (tmp_path / "train.csv").write_text("path,label\na.png,one\nb.png,two\n")
    assert names(load_pictures(tmp_path, SPLITS)) == ["a.png", "b.png"]
    shards = tmp_path / "shards"
    shards.mkdir()
    (tmp_path / "1.cls").write_text("1")
    (tmp_path / "0.cls").write_text("0")
    for split, value in (("train", 40), ("val", 50)):
        with tarfile.open(shards / f"{split}-0.tar", "w") as tar:
            for label in (0, 1):
                tar.add(draw(tmp_path / "c.png", value + label), f"{split}{label}.png")
                tar.add(tmp_path / f"{label}.cls", f"{split}{label}.cls")
    found = load_pictures(shards, SPLITS)
    assert [found.read(n)[0, 0, 0] for n in range(4)] == [40, 41, 50, 51]
    assert found.name(3) == load_classes(shards, "val").name(1)


def test_no_pictures_are_refused(tmp_path):
    draw(tmp_path / "test" / "a.png")
    with pytest.raises(DataError, match=r"expected pictures \(.*found none"):
        load_pictures(tmp_path, SPLITS)
    with pytest.raises(DataError, match="found nothing"):
        load_pictures(tmp_path / "nowhere", SPLITS)
