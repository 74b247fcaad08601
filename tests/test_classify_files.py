"""Classification of files: what is written, order, bad files, pages, features, interruption."""

import csv
import json
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from vovnet import Classifier, read_image
from vovnet.classify_files import BATCHES_AHEAD, ClassifiedImage, classify_files
from vovnet.errors import ConfigError


@pytest.fixture(scope="module")
def classifier(classifier_folder: Path) -> Classifier:
    return Classifier.load(classifier_folder)


def image(path: Path, *, seed: int = 0) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (70, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def images(folder: Path, count: int) -> list[Path]:
    return [image(folder / f"{number:03d}.png", seed=number) for number in range(count)]


def test_what_is_written(classifier: Classifier, tmp_path: Path) -> None:
    paths = images(tmp_path, 5)
    shown = []
    report = classify_files(
        classifier, paths, tmp_path, top=2, batch_size=2, on_image=lambda one: shown.append(one)
    )
    assert shown == report.images
    assert [one.file for one in report.images] == paths
    expected = [classifier(path).top(2) for path in paths]
    assert len({best[0][1] for best in expected}) == 5  # every picture has an answer of its own
    for found, best in zip(report.images, expected, strict=True):
        assert [name for name, _ in found.top] == [name for name, _ in best]
        assert [p for _, p in found.top] == pytest.approx([p for _, p in best], abs=1e-5)
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert lines == json.loads((tmp_path / "results.json").read_text())
    assert [line["image_id"] for line in lines] == [1, 2, 3, 4, 5]
    assert lines[0]["classes"][0]["class_name"] == expected[0][0][0]
    with (tmp_path / "predictions.csv").open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == ["file", "page", "class_1", "probability_1", "class_2", "probability_2"]
    assert [row["class_1"] for row in rows] == [best[0][0] for best in expected]
    assert float(rows[4]["probability_2"]) == pytest.approx(expected[4][1][1], abs=1e-5)


def test_pages_and_bad_files(classifier: Classifier, tmp_path: Path) -> None:
    stack = tmp_path / "stack.tif"
    pages = [Image.new("L", (30, 20), shade) for shade in (10, 120, 200)]
    pages[0].save(stack, save_all=True, append_images=pages[1:])
    broken = tmp_path / "broken.png"
    broken.write_bytes(image(tmp_path / "good.png").read_bytes()[:200])
    paths = [broken, stack, tmp_path / "missing.jpg", tmp_path / "good.png"]
    told = []
    report = classify_files(classifier, paths, tmp_path, batch_size=2, on_error=told.append)
    assert [(one.file.name, one.page) for one in report.images] == [
        ("stack.tif", 0),
        ("stack.tif", 1),
        ("stack.tif", 2),
        ("good.png", 0),
    ]
    assert told == report.errors
    assert ["broken.png" in told[0], "missing.jpg" in told[1], len(told)] == [True, True, 2]


def test_a_file_that_breaks_off_is_told_once(classifier: Classifier, tmp_path: Path) -> None:
    stack = tmp_path / "stack.tif"
    pages = [Image.new("L", (300, 200), shade) for shade in range(4)]
    pages[0].save(stack, save_all=True, append_images=pages[1:], compression="tiff_lzw")
    content = bytearray(stack.read_bytes())
    with Image.open(stack) as opened:
        for page in (1, 2):
            opened.seek(page)
            start = opened.tag_v2[273][0]
            content[start : start + opened.tag_v2[279][0]] = b"\xff" * opened.tag_v2[279][0]
    stack.write_bytes(content)
    report = classify_files(classifier, [stack], tmp_path)
    assert len(report.errors) == 1
    assert [one.page for one in report.images] == [0]


def test_an_interruption_keeps_what_is_done(classifier: Classifier, tmp_path: Path) -> None:
    def stop(one: ClassifiedImage) -> None:
        raise KeyboardInterrupt

    features = tmp_path / "features.npz"
    report = classify_files(
        classifier, images(tmp_path, 9), tmp_path, batch_size=2, features=features, on_image=stop
    )
    assert (len(report.images), report.interrupted) == (2, True)
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2
    assert np.load(features)["embedding"].shape == (2, 512)
    assert not [one for one in threading.enumerate() if "ThreadPool" in one.name]


def test_a_failure_keeps_what_is_done(classifier: Classifier, tmp_path: Path) -> None:
    def fail(one: ClassifiedImage) -> None:
        raise MemoryError

    with pytest.raises(MemoryError):
        classify_files(classifier, images(tmp_path, 3), tmp_path, batch_size=1, on_image=fail)
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 1


def test_decoding_runs_ahead_by_a_bounded_number(
    classifier: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, at_first = [], []

    def read(path: Path, **options: object) -> np.ndarray:
        started.append(path)
        return read_image(path, **options)

    def note(one: ClassifiedImage) -> None:
        at_first.append(len(started))

    monkeypatch.setattr("vovnet.classify_files.read_image", read)
    classify_files(classifier, images(tmp_path, 30), tmp_path, batch_size=2, on_image=note)
    assert len(started) == 30
    assert at_first[0] <= (BATCHES_AHEAD + 1) * 2 + 2


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_features(classifier: Classifier, tmp_path: Path, suffix: str) -> None:
    paths = [*images(tmp_path, 3), tmp_path / "missing.png"]
    file = tmp_path / f"features{suffix}"
    classify_files(classifier, paths, tmp_path, batch_size=2, features=file)
    expected = classifier.embeddings([read_image(path) for path in paths[:3]])
    if suffix == ".npz":
        found = np.load(file)
        embedding, names, pages = found["embedding"], found["file_name"].tolist(), found["page"]
    else:
        table = pyarrow.parquet.read_table(file)
        embedding = np.array(table["embedding"].to_pylist(), np.float32)
        names, pages = table["file_name"].to_pylist(), table["page"].to_numpy()
        assert str(table.schema.field("embedding").type).startswith("fixed_size_list<")
    assert embedding.dtype == np.float32
    spread = expected.std()
    assert np.abs(embedding - expected).max() < 1e-3 * spread
    assert np.abs(embedding[0] - embedding[1]).max() > 0.1 * spread
    assert names == [str(path) for path in paths[:3]]
    assert pages.tolist() == [0, 0, 0]


def test_features_of_nothing_are_an_empty_table(classifier: Classifier, tmp_path: Path) -> None:
    for name in ("features.npz", "features.parquet"):
        classify_files(classifier, [tmp_path / "no.png"], tmp_path, features=tmp_path / name)
    assert np.load(tmp_path / "features.npz")["embedding"].shape[0] == 0
    assert pyarrow.parquet.read_table(tmp_path / "features.parquet").num_rows == 0


def test_a_backbone_writes_features_alone(backbone_folder: Path, tmp_path: Path) -> None:
    backbone = Classifier.load(backbone_folder)
    paths = images(tmp_path, 2)
    with pytest.raises(ConfigError, match="--features FILE"):
        classify_files(backbone, paths, tmp_path)
    report = classify_files(backbone, paths, tmp_path, features=tmp_path / "f.npz")
    assert [one.top for one in report.images] == [[], []]
    assert np.load(tmp_path / "f.npz")["embedding"].shape == (2, 512)
    assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("f.csv", r"ends in \.npz or \.parquet"),
        ("nowhere/f.npz", "expected an existing folder"),
        ("taken.npz", "features: expected a file, found the folder"),
    ],
)
def test_features_that_cannot_be_written_stop_the_run_before_it(
    classifier: Classifier, tmp_path: Path, name: str, message: str
) -> None:
    (tmp_path / "taken.npz").mkdir()
    with pytest.raises(ConfigError, match=message):
        classify_files(classifier, images(tmp_path, 1), tmp_path, features=tmp_path / name)
    assert not (tmp_path / "results.json").exists()


def test_parquet_without_pyarrow(
    classifier: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"pip install 'vovnet\[parquet\]'"):
        classify_files(classifier, images(tmp_path, 1), tmp_path, features=tmp_path / "f.parquet")


def test_fast_decoding_is_nearly_the_same_and_only_on_demand(
    classifier: Classifier, tmp_path: Path
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    path = tmp_path / "large.jpg"
    Image.fromarray(pixels).resize((1200, 900), Image.Resampling.BICUBIC).save(path, quality=95)
    plain, fast = (
        classify_files(classifier, [path], tmp_path, fast_decode=wanted).images[0].top[0][1]
        for wanted in (False, True)
    )
    assert plain == pytest.approx(classifier(path).top(1)[0][1], abs=1e-5)
    assert fast != plain
    assert fast == pytest.approx(plain, abs=0.02)
