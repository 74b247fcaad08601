"""`vovnet val` of detectors: metrics, views and the page, as a user asks for them."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.cli.test_main import run

BOXES = [[8, 8, 30, 30], [40, 20, 16, 24]]


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """One image with two objects, as val."""
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    (folder / "annotations").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "images" / "1.png")
    annotations = [
        {"id": i, "image_id": 1, "category_id": 7, "bbox": box, "area": 900, "iscrowd": 0}
        for i, box in enumerate(BOXES, start=1)
    ]
    content = {
        "images": [{"id": 1, "file_name": "1.png", "width": 64, "height": 64}],
        "annotations": annotations,
        "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}],
    }
    (folder / "annotations" / "val.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def arguments(model_folder: Path, data_dir: Path, tmp_path: Path) -> list[object]:
    """The model's classes come in another order than the data's ids: it gets a folder that fits."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in model_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["class_names"], config["category_ids"] = ["dog", "cat"], [3, 7]
    (folder / "config.json").write_text(json.dumps(config))
    return ["val", "--model", folder, "--data", data_dir, "--bootstrap", 0]


@pytest.mark.parametrize("metric", ["voc07", "voc12"])
def test_voc(monkeypatch, capsys, arguments: list[object], metric: str) -> None:
    assert run(monkeypatch, *arguments, "--metric", metric, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["metric"] == metric
    assert result["num_objects"] == 2
    assert list(result["ap_per_class"]) == ["dog", "cat"]
    assert result["ap_per_class"]["dog"] is None


def test_a_page_and_views(monkeypatch, capsys, tmp_path: Path, arguments: list[object]) -> None:
    page = tmp_path / "page.html"
    options = ("--tta", "flip,0.5", "--html", page, "--json")
    assert run(monkeypatch, *arguments, *options) == 0
    result = json.loads(capsys.readouterr().out)
    text = page.read_text()
    ap = result["box"]["ap"]
    assert f"<tr><td>all</td><td>{ap:.3f}</td>" in text
    assert "Average precision and recall of boxes" in text


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--metric", "voc", "metric: expected coco, voc07 or voc12, got 'voc'"),
        ("--tta", "turn", "tta: expected flip"),
        ("--html", "/nowhere/at/all.html", "html: expected an existing folder"),
        ("--html", "/", "html: expected a file, found the folder /"),
    ],
)
def test_wrong_options(
    monkeypatch, capsys, arguments: list[object], option: str, value: str, message: str
) -> None:
    assert run(monkeypatch, *arguments, option, value) == 2
    assert message in capsys.readouterr().err


def test_the_figures_are_there_when_writing_fails(
    monkeypatch, capsys, tmp_path: Path, arguments: list[object]
) -> None:
    (tmp_path / "pipe").symlink_to("/dev/null")
    assert run(monkeypatch, *arguments, "--html", tmp_path / "pipe") == 2
    printed = capsys.readouterr()
    assert "pipe: expected a file to write" in printed.err
    assert "AP" in printed.out


def test_predict_with_views(
    monkeypatch, capsys, tmp_path: Path, model_folder: Path, data_dir: Path
) -> None:
    source = ("predict", "--model", model_folder, "--source", data_dir / "images", "--no-save")
    assert run(monkeypatch, *source, "--output", tmp_path / "a", "--json") == 0
    assert run(monkeypatch, *source, "--output", tmp_path / "b", "--json", "--tta", "flip") == 0
    plain, merged = (json.loads((tmp_path / x / "results.json").read_text()) for x in "ab")
    assert 0 < len(merged) <= 20
    assert plain != merged
    capsys.readouterr()
    assert run(monkeypatch, *source, "--tta", "flip", "--tile", 64) == 2
    assert "expected one of --tile and --tta" in capsys.readouterr().err
