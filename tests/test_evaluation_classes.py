"""Figures of classifiers against loops that restate their definitions."""

import io
import json
import math
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vovnet.data.classes import ClassData, load_classes
from vovnet.errors import ConfigError, DataError, ImageError
from vovnet.evaluation_classes import (
    calibration_error,
    evaluate_classes,
    load_known_classes,
    predict_logits,
)
from vovnet.preprocess import Preprocess
from vovnet.published import imagenet_class_names
from vovnet.results import Classification

GENERATOR = np.random.default_rng(7)


def names(count: int) -> tuple[str, ...]:
    return tuple(f"class {index}" for index in range(count))


def restated(logits, labels) -> dict[str, float]:
    """Image by image, in plain Python."""
    top1 = top5 = loss = 0.0
    bins: dict[int, list[tuple[float, bool]]] = {}
    confusion = np.zeros((logits.shape[1], logits.shape[1]), dtype=int)
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        total = math.fsum(math.exp(value) for value in row)
        ranked = sorted(range(len(row)), key=lambda k, row=row: (-row[k], k))
        right = ranked[0] == label
        confidence = math.exp(row[ranked[0]]) / total
        top1 += right
        top5 += label in ranked[:5]
        loss -= math.log(math.exp(row[label]) / total)
        confusion[label, ranked[0]] += 1
        place = next(m for m in range(15) if m / 15 < confidence <= (m + 1) / 15)
        bins.setdefault(place, []).append((confidence, right))
    ece = 0.0
    for members in bins.values():
        gap = sum(right for _, right in members) - sum(confidence for confidence, _ in members)
        ece += abs(gap) / len(labels)
    recalls = [confusion[k, k] / sum(confusion[k]) for k in set(labels.tolist())]
    return {
        "top1": top1 / len(labels),
        "top5": top5 / len(labels),
        "ece": ece,
        "log_loss": loss / len(labels),
        "balanced_accuracy": sum(recalls) / len(recalls),
        "confusion": confusion,
    }


@pytest.mark.parametrize(("images", "classes"), [(400, 7), (1, 6), (5000, 12)])
def test_figures_equal_their_definitions(images: int, classes: int) -> None:
    # Rounded, so that there are many ties.
    logits = np.round(GENERATOR.normal(size=(images, classes)) * 2).astype(np.float32)
    labels = GENERATOR.integers(classes - 1, size=images)  # the last class has no image
    metrics = evaluate_classes(logits, labels, names(classes))
    for name, expected in restated(logits, labels).items():
        if name == "confusion":
            assert np.array_equal(metrics.confusion, expected)
        else:
            assert getattr(metrics, name) == pytest.approx(expected, abs=1e-9), name
    assert metrics.main() == metrics.top1
    assert metrics.num_images == images


def test_the_table_of_classes() -> None:
    given = [0, 0, 1, 1, 1, 0]
    labels = np.array([0, 0, 0, 1, 1, 2])
    metrics = evaluate_classes(np.eye(4)[given], labels, names(4))
    rows = [(e.count, e.recall, e.precision, e.f1) for e in metrics.per_class]
    assert rows[0] == (3, pytest.approx(2 / 3), pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert rows[1] == (2, 1.0, pytest.approx(2 / 3), pytest.approx(0.8))
    assert rows[2][:2] == (1, 0.0)
    assert math.isnan(rows[2][2])
    assert rows[2][3] == 0.0
    assert rows[3][0] == 0
    assert all(map(math.isnan, rows[3][1:]))
    assert metrics.balanced_accuracy == pytest.approx((2 / 3 + 1 + 0) / 3)


def test_of_equal_logits_the_first_class_goes_before_as_in_results() -> None:
    logits = np.zeros((8, 8), dtype=np.float32)
    metrics = evaluate_classes(logits, np.arange(8), names(8))
    shown = Classification(np.full(8, 0.125, np.float32), names(8)).top(5)
    assert [name for name, _ in shown] == list(names(8)[:5])
    assert (metrics.top1, metrics.top5) == (1 / 8, 5 / 8)
    assert metrics.confusion[:, 0].tolist() == [1] * 8


@pytest.mark.parametrize(("classes", "exists"), [(2, False), (5, False), (6, True)])
def test_top5_exists_only_among_more_than_five(classes: int, exists: bool) -> None:
    metrics = evaluate_classes(np.eye(classes), np.arange(classes), names(classes))
    assert math.isnan(metrics.top5) is not exists


def test_large_logits_do_not_overflow() -> None:
    logits = np.array([[1e4, -1e4], [1e4, -1e4]], dtype=np.float32)
    metrics = evaluate_classes(logits, np.array([0, 1]), names(2))
    assert metrics.log_loss == pytest.approx(1e4)
    assert metrics.ece == pytest.approx(0.5)


def test_calibration_of_sure_and_right_and_of_sure_and_wrong() -> None:
    ones = np.ones(10)
    assert calibration_error(ones, np.ones(10, bool)) == 0.0
    assert calibration_error(ones, np.zeros(10, bool)) == 1.0
    # The gaps of two bins do not cancel, those inside one do.
    assert calibration_error(np.array([0.9, 0.1]), np.array([False, True])) == pytest.approx(0.9)
    assert calibration_error(np.array([0.5, 0.5]), np.array([False, True])) == pytest.approx(0.0)
    # Ends of bins belong to the lower one: 0.2 is the end of the third.
    both = np.array([3 / 15, 2.5 / 15])
    assert calibration_error(both, np.array([False, True])) == pytest.approx(abs(5.5 / 15 - 1) / 2)


def test_the_interval_is_that_of_resampled_images() -> None:
    labels = np.zeros(150, dtype=np.int64)
    logits = np.eye(2)[(np.arange(150) >= 120).astype(int)]  # 80 % right
    metrics = evaluate_classes(logits, labels, names(2), bootstrap=4000, seed=1)
    generator = np.random.default_rng(3)
    right = np.arange(150) < 120
    drawn = [right[generator.integers(150, size=150)].mean() for _ in range(4000)]
    assert metrics.top1_interval == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.011)
    again = evaluate_classes(logits, labels, names(2), bootstrap=4000, seed=1)
    assert again.top1_interval == metrics.top1_interval
    few = [
        evaluate_classes(logits, labels, names(2), bootstrap=50, seed=seed).top1_interval
        for seed in range(4)
    ]
    assert len(set(few)) > 1
    assert evaluate_classes(logits, labels, names(2)).top1_interval is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_refused(value: float) -> None:
    logits = np.zeros((3, 2), dtype=np.float32)
    logits[1, 0] = value
    with pytest.raises(ValueError, match="logits: expected finite numbers, got others in row 1"):
        evaluate_classes(logits, np.zeros(3, dtype=np.int64), names(2))


@pytest.mark.parametrize(
    ("shape", "labels", "expected"),
    [
        ((3, 2), [0, 1], "logits: expected"),
        ((2, 3), [0, 1], "logits: expected"),
        ((0, 2), [], "logits: expected at least one row"),
        ((2, 2), [0, 2], r"labels: expected whole numbers in 0..1"),
        ((2, 2), [-1, 0], r"labels: expected whole numbers in 0..1"),
        ((2, 2), [0.0, 1.0], r"labels: expected whole numbers"),
    ],
)
def test_wrong_shapes_and_labels_are_refused(shape, labels, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        evaluate_classes(np.zeros(shape), np.array(labels), names(2))


def test_metrics_as_json_and_text() -> None:
    metrics = evaluate_classes(
        np.eye(3), np.array([0, 1, 1]), ("cat", "crane", "crane"), bootstrap=9
    )
    content = json.loads(json.dumps(metrics.to_dict(), allow_nan=False))
    assert "confusion" not in content
    assert content["top5"] is None
    assert [entry["name"] for entry in content["per_class"]] == ["cat", "crane", "crane"]
    assert content["per_class"][2] == {
        "name": "crane",
        "count": 0,
        "recall": None,
        "precision": 0.0,
        "f1": 0.0,
    }
    assert metrics.to_dict(with_confusion=True)["confusion"] == [[1, 0, 0], [0, 1, 1], [0, 0, 0]]
    text = metrics.format()
    assert "3 images, 3 classes (2 of them with images)" in text
    assert "top-1 0.667 [" in text
    assert "top-5 n/a" in text
    assert "9 resamples" in text


class MeanColour:
    """A classifier of the brightest channel, which remembers its batches and its thread."""

    class_names = ("red", "green", "blue")
    preprocess = Preprocess(short_side=8, crop_size=8, max_long_side=None)

    def __init__(self, fault: float = 0.0) -> None:
        self.engine = self
        self.fault = fault
        self.batches: list[int] = []
        self.threads: set[int] = set()

    def infer(self, images, sizes):
        self.batches.append(len(images))
        self.threads.add(threading.get_ident())
        logits = images.astype(np.float32).mean(axis=(1, 2))
        logits[:, 0] += self.fault
        return {"logits": logits, "embedding": logits}


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    for channel, name in enumerate(MeanColour.class_names):
        (tmp_path / "test" / name).mkdir(parents=True)
        for number in range(4):
            pixels = np.zeros((9 + number, 12, 3), np.uint8)
            pixels[..., channel] = 100 + 20 * number
            Image.fromarray(pixels).save(tmp_path / "test" / name / f"{number}.png")
    return tmp_path


@pytest.mark.parametrize(("batch_size", "batches"), [(5, [5, 5, 2]), (1, [1] * 12), (50, [12])])
def test_logits_are_in_the_order_of_the_data(
    colours: Path, batch_size: int, batches: list[int]
) -> None:
    data = load_known_classes(colours, "test", MeanColour.class_names)
    classifier, done = MeanColour(), []
    logits = predict_logits(classifier, data, batch_size=batch_size, on_batch=done.append)
    one_by_one = [
        classifier.preprocess.resize(data.read(index)).mean(axis=(0, 1)) for index in range(12)
    ]
    assert np.allclose(logits, one_by_one)
    assert logits.dtype == np.float32
    assert classifier.batches == batches
    assert done == np.cumsum(batches).tolist()
    assert classifier.threads == {threading.get_ident()}
    assert evaluate_classes(logits, data.labels, data.class_names).top1 == 1.0


def test_pictures_are_decoded_only_a_little_ahead(
    colours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = load_classes(colours, "test").chosen(np.tile(np.arange(12), 10))
    read: list[int] = []
    original = ClassData.read
    monkeypatch.setattr(
        ClassData, "read", lambda self, index: (read.append(index), original(self, index))[1]
    )
    most = []
    predict_logits(
        MeanColour(), data, batch_size=4, on_batch=lambda done: most.append(len(read) - done)
    )
    assert len(read) == 120
    assert max(most) <= 3 * 4


def test_an_unreadable_picture_is_an_error_or_left_out(colours: Path) -> None:
    bad = colours / "test" / "green" / "2.png"
    bad.write_bytes(bad.read_bytes()[:40])
    data = load_known_classes(colours, "test", MeanColour.class_names)
    with pytest.raises(ImageError, match=r"2\.png"):
        predict_logits(MeanColour(), data, batch_size=5)
    whole = [index for index in range(12) if data.name(index) != str(bad)]
    found: list[tuple[int, str]] = []
    logits = predict_logits(
        MeanColour(), data, batch_size=5, on_bad=lambda index, reason: found.append((index, reason))
    )
    assert [index for index, _ in found] == sorted(set(range(12)) - set(whole))
    assert "2.png" in found[0][1]
    assert np.array_equal(logits, predict_logits(MeanColour(), data.chosen(whole)))


def test_nothing_readable_gives_no_rows(colours: Path) -> None:
    data = load_classes(colours, "test").chosen([0, 1])
    for index in range(2):
        Path(data.name(index)).write_bytes(b"no picture")
    logits = predict_logits(MeanColour(), data, on_bad=lambda index, reason: None)
    assert logits.shape == (0, 3)


def test_a_network_that_overflows_is_named_with_the_picture(colours: Path) -> None:
    data = load_classes(colours, "test")
    with pytest.raises(ConfigError, match=r"test/blue/0\.png: expected finite logits"):
        predict_logits(MeanColour(math.inf), data)


def test_labels_are_told_by_name(colours: Path) -> None:
    data = load_known_classes(colours, "test", ("x", "green", "y", "blue", "red"))
    assert {Path(data.name(i)).parent.name: int(data.labels[i]) for i in range(12)} == {
        "green": 1,
        "blue": 3,
        "red": 4,
    }
    assert data.class_names == ("x", "green", "y", "blue", "red")


def write_shard(folder: Path, labels: range) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (1, 1)).save(stream, format="PNG")
    with tarfile.open(folder / "test.tar", "w") as tar:
        for label in labels:
            for suffix, content in (("png", stream.getvalue()), ("cls", str(label).encode())):
                entry = tarfile.TarInfo(f"{label:03}.{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))


def test_numbers_in_shards_are_names_where_the_model_has_these(tmp_path: Path) -> None:
    write_shard(tmp_path, range(12))
    as_text = tuple(sorted(map(str, range(12))))  # 0, 1, 10, 11, 2, ... as of folders
    data = load_known_classes(tmp_path, "test", as_text)
    assert [as_text[label] for label in data.labels] == [str(label) for label in range(12)]
    data = load_known_classes(tmp_path, "test", tuple("abcdefghijkl"))
    assert data.labels.tolist() == list(range(12))
    with pytest.raises(ConfigError, match="found 1 others \\('0'\\)"):
        load_known_classes(tmp_path, "test", tuple(map(str, range(1, 13))))


def test_one_class_of_the_model_is_enough(colours: Path) -> None:
    for name in ("red", "blue"):
        for path in (colours / "test" / name).iterdir():
            path.unlink()
        (colours / "test" / name).rmdir()
    data = load_known_classes(colours, "test", MeanColour.class_names)
    assert data.labels.tolist() == [1] * 4


@pytest.mark.parametrize(
    ("wanted", "found"),
    [(("red", "green"), "1 others \\('blue'\\)"), (("crane", "red", "red", "blue"), "2 others")],
)
def test_a_class_that_is_not_the_models_is_refused(
    colours: Path, wanted: tuple[str, ...], found: str
) -> None:
    with pytest.raises(ConfigError, match=f"expected only classes of the model.*{found}"):
        load_known_classes(colours, "test", wanted)


def test_data_that_is_not_there_stays_a_data_error(colours: Path) -> None:
    with pytest.raises(DataError):
        load_known_classes(colours, "val", MeanColour.class_names)


def test_synsets_are_in_the_order_of_imagenet_only_when_all_are_there(tmp_path: Path) -> None:
    pixel = np.zeros((1, 1, 3), np.uint8)
    Image.fromarray(pixel).save(tmp_path / "pixel.png")
    lines = [f"pixel.png,n{index:08d}" for index in range(1000)]
    (tmp_path / "test.csv").write_text("path,label\n" + "\n".join(lines))
    data = load_known_classes(tmp_path, "test", imagenet_class_names())
    assert data.labels.tolist() == list(range(1000))
    assert data.class_names == imagenet_class_names()
    (tmp_path / "test.csv").write_text("path,label\n" + "\n".join(lines[:-1]))
    with pytest.raises(ConfigError, match="found 999 others"):
        load_known_classes(tmp_path, "test", imagenet_class_names())
