"""Prediction over files: what is written, bad files, pages, interruption."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vovnet import Predictor
from vovnet.predict_files import predict_files


@pytest.fixture(scope="module")
def predictor(model_folder: Path) -> Predictor:
    return Predictor.load(model_folder, max_detections=3)


def image(path: Path, size: tuple[int, int] = (40, 32)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), 90, np.uint8)).save(path)
    return path


def test_what_is_written(predictor: Predictor, tmp_path: Path) -> None:
    pages = [Image.new("L", (30, 20), shade) for shade in (10, 200)]
    stack = tmp_path / "in" / "stack.tif"
    paths = [image(tmp_path / "in" / "a.png"), image(tmp_path / "in" / "b" / "a.jpg"), stack]
    pages[0].save(stack, save_all=True, append_images=pages[1:])
    output = tmp_path / "out"
    output.mkdir()
    seen = []
    report = predict_files(predictor, paths, output, on_image=lambda path, found: seen.append(path))
    assert (report.images, report.errors, report.interrupted) == (4, [], False)
    assert seen == [*paths, stack]
    names = sorted(path.name for path in output.iterdir())
    assert names == [
        "a.png", "a_2.png", "results.json", "results.jsonl", "stack.png", "stack_page2.png",
    ]  # fmt: skip
    lines = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
    assert [(line["image_id"], line["page"]) for line in lines] == [(1, 0), (2, 0), (3, 0), (4, 1)]
    assert lines[0]["image_size"] == [40, 32]
    coco = json.loads((output / "results.json").read_text())
    assert len(coco) == report.objects == sum(len(line["detections"]) for line in lines)
    assert {entry["category_id"] for entry in coco} <= {7, 3}
    assert np.array(Image.open(output / "a.png")).shape == (40, 32, 3)


def test_bad_files_are_named_and_the_others_done(predictor: Predictor, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(image(tmp_path / "good.png").read_bytes()[:60])
    told = []
    paths = [broken, tmp_path / "missing.png", tmp_path / "good.png"]
    report = predict_files(predictor, paths, tmp_path, save_pictures=False, on_error=told.append)
    assert report.images == 1
    assert told == report.errors
    assert ["broken.png" in told[0], "missing.png" in told[1]] == [True, True]


def test_an_interruption_keeps_what_is_done(predictor: Predictor, tmp_path: Path) -> None:
    def stop(path: Path, found: object) -> None:
        raise KeyboardInterrupt

    paths = [image(tmp_path / f"{name}.png") for name in "abc"]
    report = predict_files(predictor, paths, tmp_path, on_image=stop, tile=64, overlap=8)
    assert (report.images, report.interrupted) == (1, True)
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 1


def test_pictures_never_replace_their_sources(predictor: Predictor, tmp_path: Path) -> None:
    source = image(tmp_path / "a.png")
    before = source.read_bytes()
    predict_files(predictor, [source], tmp_path)
    assert source.read_bytes() == before
    assert (tmp_path / "a_2.png").exists()


def test_a_failure_keeps_what_is_done(predictor: Predictor, tmp_path: Path) -> None:
    def fail(path: Path, found: object) -> None:
        raise MemoryError

    paths = [image(tmp_path / f"{name}.png") for name in "ab"]
    with pytest.raises(MemoryError):
        predict_files(predictor, paths, tmp_path, on_image=fail, save_pictures=False)
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 1
