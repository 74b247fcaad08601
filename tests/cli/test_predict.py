"""`vovnet predict` of classifiers: what is printed and written, and the flags of each kind."""

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.hub import fill_hub
from vovnet import Classifier
from vovnet.cli import main as command_line
from vovnet.cli.predict import _mode
from vovnet.predict_files import predict_files


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["vovnet", *(str(a) for a in arguments)])
    with pytest.raises(SystemExit) as caught:
        command_line.main()
    return caught.value.code or 0


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number, name in enumerate(("a.png", "longer name.png")):
        pixels = np.random.default_rng(number).integers(0, 256, (70, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


def test_a_line_per_image_with_the_best_classes(
    monkeypatch, capsys, classifier_folder: Path, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ["--model", classifier_folder, "--source", source, "--output", out]
    assert run(monkeypatch, "predict", *arguments, "--top", 2) == 0
    lines = capsys.readouterr().out.splitlines()
    best = [one.top(2) for one in Classifier.load(classifier_folder)(sorted(source.iterdir()))]
    for line, path, ((first, share), (second, _)) in zip(
        lines, sorted(source.iterdir()), best, strict=True
    ):
        assert line.startswith(str(path))
        cells = line.removeprefix(str(path)).split()
        assert (cells[1], cells[3]) == (first, second)
        assert float(cells[0]) == pytest.approx(share, abs=6e-4)
    assert len({line.index("  0.") for line in lines if "  0." in line}) <= 1  # in columns
    assert sorted(path.name for path in out.iterdir()) == [
        "predictions.csv",
        "results.json",
        "results.jsonl",
    ]


def test_published_weights_by_their_name(monkeypatch, capsys, source: Path, tmp_path: Path) -> None:
    fill_hub(monkeypatch, tmp_path / "hub", "ese_vovnet19b_dw")
    monkeypatch.chdir(tmp_path)
    arguments = ["--model", "ese_vovnet19b_dw.ra_in1k", "--source", source / "a.png", "--json"]
    assert run(monkeypatch, "predict", *arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["output"] == "runs/predict/ese_vovnet19b_dw.ra_in1k-1"
    names = [one["class_name"] for one in found["predictions"][0]["classes"]]
    expected = Classifier.load("ese_vovnet19b_dw")(source / "a.png").top(5)
    assert names == [name for name, _ in expected]


def test_features_and_bad_files(
    monkeypatch, capsys, backbone_folder: Path, source: Path, tmp_path: Path
) -> None:
    (source / "bad.png").write_bytes(b"no image")
    features = tmp_path / "features.npz"
    monkeypatch.chdir(tmp_path)
    common = ["predict", "--model", backbone_folder, "--source", source, "--json"]
    assert run(monkeypatch, *common, "--features", features) == 3
    out, err = capsys.readouterr()
    assert "bad.png" in err
    assert json.loads(out)["features"] == str(features)
    assert np.load(features)["file_name"].tolist() == [
        str(source / "a.png"),
        str(source / "longer name.png"),
    ]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("kind", "flags", "message"),
    [
        ("classifier", ["--tile", "64"], "no --tile, which a classifier does not have"),
        ("classifier", ["--no-save"], "no --save"),
        ("classifier", ["--score-threshold", "0.5"], "no --score-threshold"),
        ("classifier", ["--max-detections", "5", "--overlap", "3"], "--max-detections, --overlap"),
        ("classifier", ["--test-size"], "test size: expected published weights"),
        ("classifier", ["--features", "f.txt"], r"ends in .npz or .parquet"),
        ("classifier", ["--output", "FILE"], "expected a folder"),
        ("detector", ["--top", "3"], "no --top, which a detector does not have"),
        ("detector", ["--features", "f.npz", "--fast-decode"], "--features, --fast-decode"),
        ("detector", ["--test-size"], "no --test-size, which a detector does not have"),
        ("detector", ["--batch-size", "2", "--tile", "64"], "no --batch-size with --tile or --tta"),
        ("detector", ["--batch-size", "2", "--tta", "flip"], "no --batch-size with --tile"),
        ("backbone", [], "--features FILE"),
    ],
)
def test_flags_that_mean_nothing(
    monkeypatch,
    capsys,
    request: pytest.FixtureRequest,
    source: Path,
    tmp_path: Path,
    kind: str,
    flags: list[str],
    message: str,
) -> None:
    fixtures = {"detector": "model_folder"}
    folder = request.getfixturevalue(fixtures.get(kind, f"{kind}_folder"))
    monkeypatch.chdir(tmp_path)
    flags = [str(source / "a.png") if flag == "FILE" else flag for flag in flags]
    assert run(monkeypatch, "predict", "--model", folder, "--source", source, *flags) == 2
    assert message in capsys.readouterr().err


def test_sigterm_keeps_what_is_done(
    monkeypatch, classifier_folder: Path, source: Path, tmp_path: Path
) -> None:
    def stop(*arguments: object) -> str:
        os.kill(os.getpid(), signal.SIGTERM)
        return ""

    monkeypatch.setattr("vovnet.cli.predict._line", stop)
    arguments = ["--model", classifier_folder, "--source", source, "--output", tmp_path / "out"]
    assert run(monkeypatch, "predict", *arguments, "--batch-size", 1) == 143
    assert len((tmp_path / "out" / "results.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("size", [0, 1025])
def test_a_batch_that_no_memory_holds_is_refused(monkeypatch, capsys, size: int) -> None:
    arguments = ["--model", "none", "--source", "none", "--batch-size", size]
    assert run(monkeypatch, "predict", *arguments) == 2
    assert "or equal to 1" in capsys.readouterr().err


def test_detectors_take_batches(
    monkeypatch, capsys, model_folder: Path, source: Path, tmp_path: Path
) -> None:
    sizes: list[int | None] = []
    whole = predict_files

    def note(*arguments, **options):
        sizes.append(options["batch_size"])
        return whole(*arguments, **options)

    monkeypatch.setattr("vovnet.cli.predict.predict_files", note)
    common = ["predict", "--model", model_folder, "--source", source, "--json", "--no-save"]
    for flags in (["--batch-size", 2], []):
        assert run(monkeypatch, *common, "--output", tmp_path / "out", *flags) == 0
        assert json.loads(capsys.readouterr().out)["images"] == 2
    assert sizes == [2, 1]


@pytest.mark.parametrize(
    ("files", "threads", "whole", "mode"),
    [(8, 2, True, "throughput"), (7, 2, True, "latency"), (8, 2, False, "latency")],
)
def test_several_pictures_at_a_time_where_there_are_enough(files, threads, whole, mode) -> None:
    assert _mode(files, threads, whole=whole) == mode
