"""`vovnet convert-data` and `check` as a user runs them."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from vovnet.cli import main as command_line

BOX = "0 0.5 0.5 0.25 0.5\n"


def run(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["vovnet", *(str(a) for a in arguments)])
    with pytest.raises(SystemExit) as caught:
        command_line.main()
    return caught.value.code or 0


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    for split in ("train", "val"):
        (folder / "images" / split).mkdir(parents=True)
        (folder / "labels" / split).mkdir(parents=True)
        Image.new("RGB", (32, 24)).save(folder / "images" / split / f"{split}.png")
        (folder / "labels" / split / f"{split}.txt").write_text(BOX)
    (folder / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [dog]\n")
    return folder


def test_there_and_back(monkeypatch, capsys, data_dir: Path, tmp_path: Path) -> None:
    voc, coco, yolo = tmp_path / "voc", tmp_path / "coco", tmp_path / "yolo"
    assert run(monkeypatch, "convert-data", "--data", data_dir, "--to", "voc", "--output", voc) == 0
    assert capsys.readouterr().out.splitlines() == [
        "train: 1 images, 1 objects",
        "val: 1 images, 1 objects",
        f"written to {voc}",
    ]
    arguments = ["--data", voc, "--to", "coco", "--output", coco, "--link", "--json"]
    assert run(monkeypatch, "convert-data", *arguments) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["splits"][0] == {
        "name": "train",
        "num_images": 1,
        "num_objects": 1,
        "num_extras": 0,
    }
    (entry,) = json.loads((coco / "annotations/val.json").read_text())["annotations"]
    assert entry["bbox"] == [12, 6, 8, 12]
    arguments = ["--format", "coco", "--split", "val", "--to", "yolo", "--output", yolo]
    assert run(monkeypatch, "convert-data", "--data", coco, *arguments) == 0
    assert (yolo / "labels/val/val.txt").read_text() == BOX
    for folder in (voc, coco):
        assert run(monkeypatch, "check", "--data", folder) == 0
    assert run(monkeypatch, "check", "--data", yolo, "--split", "val") == 0


def test_exit_codes(monkeypatch, capsys, data_dir: Path, tmp_path: Path) -> None:
    arguments = ["--data", data_dir, "--output", tmp_path / "out", "--to"]
    assert run(monkeypatch, "convert-data", *arguments, "csv") == 2
    (data_dir / "labels/val/val.txt").write_text("0 0.5 0.5 2 0.5\n")
    assert run(monkeypatch, "convert-data", *arguments, "coco") == 3
    assert "val.txt:1: expected numbers of 0 to 1, got '2'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run(monkeypatch, "check", "--data", data_dir) == 3
    assert "val.txt:1: expected numbers of 0 to 1, got '2'" in capsys.readouterr().out
    assert run(monkeypatch, "check", "--data", data_dir, "--format", "voc") == 3
    assert run(monkeypatch, "check", "--data", data_dir, "--format", "nonsense") == 2
