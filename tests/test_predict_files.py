"""Prediction over files: what is written, bad files, pages, interruption."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from vovnet import Predictor
from vovnet.augmented_predict import View
from vovnet.errors import ConfigError
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


class WatchedEngine:
    """An engine that notes the shape of each batch."""

    def __init__(self, predictor: Predictor) -> None:
        self._engine = predictor.engine
        self.shapes: list[tuple[int, ...]] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self._engine, name)

    def infer(self, images: np.ndarray, sizes: np.ndarray) -> dict[str, np.ndarray]:
        self.shapes.append(images.shape[:3])
        return self._engine.infer(images, sizes)


def noise(path: Path, height: int, width: int) -> Path:
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def watched(predictor: Predictor) -> Iterator[WatchedEngine]:
    """The predictor's engine, watched."""
    engine = predictor.engine
    predictor.engine = WatchedEngine(predictor)
    yield predictor.engine
    predictor.engine = engine


def found_in(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]


def test_batches_of_one_size_answer_as_one_at_a_time(
    predictor: Predictor, watched: WatchedEngine, tmp_path: Path
) -> None:
    sizes = [(40, 32), (60, 30), (39, 30), (90, 50), (33, 41), (38, 22), (61, 29), (88, 62)]
    paths = [noise(tmp_path / f"{n}.png", *size) for n, size in enumerate(sizes)]
    broken = tmp_path / "3b.png"
    broken.write_bytes(paths[3].read_bytes()[:80])
    paths.insert(4, broken)
    for batch_size in (1, 3):
        (tmp_path / str(batch_size)).mkdir()
        seen = []
        report = predict_files(
            predictor,
            paths,
            tmp_path / str(batch_size),
            batch_size=batch_size,
            on_image=lambda path, found, seen=seen: seen.append(path),
        )
        assert seen == [path for path in paths if path != broken]
        assert (report.images, len(report.errors)) == (8, 1)
        assert "3b.png" in report.errors[0]
    assert watched.shapes[:8] == [
        (1, *(-(-int(side * 1.5 + 0.5) // 32) * 32 for side in size)) for size in sizes
    ]
    # Padded, 0, 2, 4 and 5 are alike; 1 and 6; 3 and 7.
    assert sorted(shape[0] for shape in watched.shapes[8:]) == [1, 2, 2, 3]
    alone, together = found_in(tmp_path / "1"), found_in(tmp_path / "3")
    for one, other in zip(alone, together, strict=True):
        assert (one["file"], one["image_id"]) == (other["file"], other["image_id"])
        assert len(one["detections"]) == len(other["detections"]) > 0
        for mine, theirs in zip(one["detections"], other["detections"], strict=True):
            assert mine["class_name"] == theirs["class_name"]
            assert mine["score"] == pytest.approx(theirs["score"], abs=1e-4)
            assert mine["box_xyxy"] == pytest.approx(theirs["box_xyxy"], abs=1e-2)
    for number in range(8):
        drawn = [np.asarray(Image.open(tmp_path / n / f"{number}.png")) for n in "13"]
        assert (drawn[0] != drawn[1]).mean() < 0.01


def test_few_pictures_are_held(
    predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picture of its own size does not keep the rest of the folder waiting in memory."""
    opened: list[Path] = []

    def read(path: Path, *, page: int) -> np.ndarray:
        opened.append(path)
        return np.zeros((32, 64 if path.name == "0" else 32, 3), np.uint8)

    monkeypatch.setattr("vovnet.predict_files.read_image", read)
    monkeypatch.setattr("vovnet.pages.count_pages", lambda path: 1)
    monkeypatch.setattr(predictor, "engine", FastEngine())
    held: list[int] = []

    def note(path: Path, found: object) -> None:
        held.append(len(opened) - len(held))

    paths = [Path(str(number)) for number in range(60)]
    report = predict_files(
        predictor, paths, tmp_path, batch_size=2, save_pictures=False, on_image=note
    )
    assert report.images == 60
    # 4 batches wait for the odd one, 2 are with the engine, 3 pictures are read ahead.
    assert 8 <= max(held) <= 8 + 4 + 3


class FastEngine(SimpleNamespace):
    """Finds nothing."""

    parallel, max_detections = 1, 1

    def infer(self, images: np.ndarray, sizes: np.ndarray) -> dict[str, np.ndarray]:
        count = len(images)
        return {
            "boxes": np.zeros((count, 1, 4), np.float32),
            "scores": np.zeros((count, 1), np.float32),
            "labels": np.zeros((count, 1), np.int64),
            "valid": np.zeros((count, 1), bool),
        }


def test_an_interruption_of_batches_keeps_what_is_done(
    predictor: Predictor, tmp_path: Path
) -> None:
    def stop(path: Path, found: object) -> None:
        if path.stem == "b":
            raise KeyboardInterrupt

    paths = [image(tmp_path / f"{name}.png") for name in "abcdef"]
    report = predict_files(predictor, paths, tmp_path, on_image=stop, batch_size=3)
    assert (report.images, report.interrupted) == (2, True)
    assert [Path(line["file"]).stem for line in found_in(tmp_path)] == ["a", "b"]


def test_tiles_and_views_go_one_at_a_time(predictor: Predictor, tmp_path: Path) -> None:
    path = image(tmp_path / "a.png")
    for options in ({"tile": 64}, {"views": (View(), View(flip=True))}):
        with pytest.raises(ConfigError, match="batch size: expected 1 with tiles or several views"):
            predict_files(predictor, [path], tmp_path, batch_size=2, **options)
