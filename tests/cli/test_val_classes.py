"""`vovnet val` of classifiers, with a small network on pictures that it has never seen."""

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vovnet.classify import Classifier
from vovnet.cli import main as command_line
from vovnet.model_folder import ModelConfig, save_model_folder
from vovnet.models.zoo import create_model
from vovnet.preprocess import Preprocess
from vovnet.profiling.accuracy import measure_accuracy

NAMES = ("고양이", "cat", "dog", "bird", "fish", "филин")
ARCHITECTURE = "ese_vovnet19b_slim_dw"
PICTURES = 4
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    network = create_model(ARCHITECTURE, num_classes=len(NAMES))
    with torch.no_grad():  # so that answers differ from picture to picture
        network.get_classifier().weight.mul_(1000)
    config = ModelConfig(
        architecture=ARCHITECTURE,
        model_args={"num_classes": len(NAMES)},
        task="classify",
        class_names=list(NAMES),
        category_ids=list(range(len(NAMES))),
        preprocess=Preprocess(short_side=36, crop_size=32, max_long_side=None).to_dict(),
        licence="apache-2.0",
    )
    tensors = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    save_model_folder(folder, config, tensors, card="")
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for name in NAMES[:4]:  # not all of the model's classes
        (tmp_path / "data" / "test" / name).mkdir(parents=True)
        for number in range(PICTURES):
            pixels = generator.integers(0, 256, (40, 44 + number, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / "test" / name / f"{number}.png")
    return tmp_path / "data"


@pytest.fixture
def run(
    model: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """`vovnet val` with more options: its exit code, and what it printed on stdout and stderr."""

    def call(*options: object, folder: Path = model) -> tuple[int, str, str]:
        fixed = ["--model", folder, "--data", data, "--split", "test", "--bootstrap", 20]
        words = ["vovnet", "val", *fixed, "--device", "cpu", *options]
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            command_line.main()
        printed = capsys.readouterr()
        return int(caught.value.code or 0), printed.out, printed.err

    return call


def test_the_figures_are_those_of_predicting_one_by_one(run: Run, model: Path, data: Path) -> None:
    code, out, _ = run("--json")
    assert code == 0
    report = json.loads(out)
    classifier = Classifier.load(model, device="cpu")
    files = sorted((data / "test").glob("*/*.png"))
    answers = [[name for name, _ in classifier(file).top(5)] for file in files]
    assert len({best for best, *_ in answers}) > 1
    top1 = [file.parent.name == best for file, (best, *_) in zip(files, answers, strict=True)]
    top5 = [file.parent.name in best for file, best in zip(files, answers, strict=True)]
    assert report["top1"] == pytest.approx(np.mean(top1))
    assert report["top5"] == pytest.approx(np.mean(top5))
    assert report["num_images"] == len(files)
    assert [entry["count"] for entry in report["per_class"]] == [PICTURES] * 4 + [0, 0]
    assert np.sum(report["confusion"]) == len(files)
    assert (report["split"], report["skipped"]) == ("test", [])
    accuracy = measure_accuracy(model, data, split="test", device="cpu")
    assert (accuracy.metric, accuracy.data) == ("top-1", "data test")
    assert accuracy.value == report["top1"]
    assert accuracy.low is not None
    assert accuracy.high is not None
    assert accuracy.low <= accuracy.value <= accuracy.high


def test_the_text_has_figures_and_a_row_for_each_class(run: Run) -> None:
    code, out, _ = run()
    lines = out.splitlines()
    assert code == 0
    assert lines[0] == f"{4 * PICTURES} images, 6 classes (4 of them with images)"
    assert lines[1].startswith("top-1 0.")
    assert [line.split()[0] for line in lines if f" {PICTURES} " in line] == list(NAMES[:4])


def test_the_output_folder_holds_pictures_and_answers(
    run: Run, model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out" / "here"
    code, out, _ = run("--output", output, "--json")
    assert code == 0
    report = json.loads(out)
    assert sorted(path.name for path in output.iterdir()) == [
        "confusion.png",
        "metrics.json",
        "mistakes.png",
        "predictions.csv",
    ]
    assert json.loads((output / "metrics.json").read_text(encoding="utf-8")) == report
    with (output / "predictions.csv").open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert sum(row["true"] == row["top1"] for row in rows) == report["top1"] * len(rows)
    classifier = Classifier.load(model, device="cpu")
    for row in rows:
        assert Path(row["file"]).parent.name == row["true"]
        shown = [(row[f"top{k}"], float(row[f"probability{k}"])) for k in range(1, 6)]
        expected = classifier(row["file"]).top(5)
        assert [name for name, _ in shown] == [name for name, _ in expected]
        assert [p for _, p in shown] == pytest.approx([p for _, p in expected], abs=1e-4)
    for name in ("confusion.png", "mistakes.png"):
        with Image.open(output / name) as picture:
            assert picture.format == "PNG"


def test_a_bad_picture_is_an_error_unless_it_may_be_skipped(run: Run, data: Path) -> None:
    bad = data / "test" / "cat" / "1.png"
    bad.write_bytes(bad.read_bytes()[:60])
    code, out, err = run()
    assert (code, out) == (3, "")
    assert str(bad) in err
    code, out, err = run("--skip-bad", "--json")
    report = json.loads(out)
    assert code == 0
    assert report["num_images"] == 4 * PICTURES - 1
    assert [entry["file"] for entry in report["skipped"]] == [str(bad)]
    counts = [entry["count"] for entry in report["per_class"]]
    assert counts == [PICTURES, PICTURES - 1, PICTURES, PICTURES, 0, 0]
    assert "left out: " in err
    assert str(bad) in err


def test_no_readable_picture_is_an_error(run: Run, data: Path) -> None:
    for path in (data / "test").glob("*/*.png"):
        path.write_bytes(b"no picture")
    code, _, err = run("--skip-bad")
    assert code == 3
    assert "expected a picture that can be read, found none" in err


def test_other_classes_are_a_wrong_setting(run: Run, data: Path) -> None:
    (data / "test" / "cat").rename(data / "test" / "horse")
    code, _, err = run()
    assert code == 2
    assert "expected only classes of the model" in err
    assert "found 1 others ('horse')" in err


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--max-detections", 5], "for it is a classifier"),
        (["--format", "voc"], "for it is a classifier"),
        (["--engine", "steam"], "engine: expected auto"),
        (["--precision", "fp3"], "precision: expected auto"),
    ],
)
def test_wrong_options_are_named(run: Run, options: list[object], expected: str) -> None:
    code, _, err = run(*options)
    assert code == 2
    assert expected in err


def test_an_output_that_is_a_file_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    code, _, err = run("--output", tmp_path / "file")
    assert code == 2
    assert "output: expected a folder" in err
    assert (tmp_path / "file").read_text() == "kept"


def test_the_figures_are_there_when_writing_fails(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out" / "predictions.csv").mkdir(parents=True)
    code, out, err = run("--output", tmp_path / "out")
    assert code == 2
    assert "predictions.csv: expected a file to write" in err
    assert "top-1" in out


def test_a_detector_takes_no_output(run: Run, tmp_path: Path) -> None:
    config = ModelConfig(
        architecture="fcos_lite",
        model_args={},
        task="detect",
        class_names=["x"],
        category_ids=[1],
        preprocess=Preprocess().to_dict(),
        licence="apache-2.0",
    )
    save_model_folder(tmp_path / "detector", config, {}, card="")
    code, _, err = run("--output", tmp_path / "out", folder=tmp_path / "detector")
    assert code == 2
    assert "expected no --output, for it is no classifier" in err
