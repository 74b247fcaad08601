"""The command line as a user runs it: output, exit codes, messages."""

import json
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vovnet
from vovnet.cli import main as command_line


def run(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["vovnet", *(str(a) for a in arguments)])
    with pytest.raises(SystemExit) as caught:
        command_line.main()
    return caught.value.code or 0


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """Two images with one object each, as train and val."""
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    (folder / "annotations").mkdir()
    images, annotations = [], []
    for number in (1, 2):
        Image.fromarray(np.full((64, 64, 3), 60 * number, np.uint8)).save(
            folder / "images" / f"{number}.png"
        )
        images.append({"id": number, "file_name": f"{number}.png", "width": 64, "height": 64})
        annotations.append(
            {
                "id": number,
                "image_id": number,
                "category_id": 7,
                "bbox": [8, 8, 30, 30],
                "area": 900,
                "iscrowd": 0,
                "segmentation": [[8, 8, 38, 8, 38, 38, 8, 38]],
            }
        )
    categories = [{"id": 3, "name": "dog"}, {"id": 7, "name": "cat"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    for split in ("train", "val"):
        (folder / "annotations" / f"{split}.json").write_text(json.dumps(content))
    return folder


def test_models(monkeypatch, capsys) -> None:
    assert run(monkeypatch, "models", "ese_vovnet39*", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    tasks = {model["name"]: model["task"] for model in listed["models"]}
    assert tasks["ese_vovnet39b"] == "classify"
    assert run(monkeypatch, "models", "--task", "fly") == 2
    assert "expected one of classify, detect, segment, got 'fly'" in capsys.readouterr().err


def test_version(monkeypatch, capsys) -> None:
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out.strip() == vovnet.__version__


def test_check(monkeypatch, capsys, data_dir: Path) -> None:
    assert run(monkeypatch, "check", "--data", data_dir) == 0
    (data_dir / "images" / "2.png").write_bytes(b"")
    assert run(monkeypatch, "check", "--data", data_dir) == 3
    assert capsys.readouterr().out.count("2.png: the file is empty") == 2  # in train and in val
    assert run(monkeypatch, "check", "--data", data_dir, "--json") == 3
    assert list(json.loads(capsys.readouterr().out)) == ["train", "val"]
    assert run(monkeypatch, "check", "--data", data_dir, "--split", "test") == 3
    assert "vovnet: split 'test': expected" in capsys.readouterr().err


def test_predict(monkeypatch, capsys, data_dir: Path, model_folder: Path, tmp_path: Path) -> None:
    common = ["predict", "--model", model_folder, "--output", tmp_path / "out", "--json"]
    assert run(monkeypatch, *common, "--source", data_dir / "images") == 0
    assert json.loads(capsys.readouterr().out)["images"] == 2
    assert (tmp_path / "out" / "1.png").exists()
    (data_dir / "images" / "bad.png").write_bytes(b"no image")
    assert run(monkeypatch, *common, "--source", data_dir / "images", "--no-save") == 3
    out, err = capsys.readouterr()
    assert "bad.png" in err
    assert json.loads(out)["images"] == 2


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--model", "no-such-model", "--source", "IMAGES"], 2, "expected a model folder or"),
        (["--model", "MODEL", "--source", "nowhere"], 3, "nowhere"),
        (["--model", "MODEL", "--source", "IMAGES", "--score-threshold", "2"], 2, "in 0..1"),
        (["--model", "MODEL", "--source", "IMAGES", "--score-threshold", "bird=.5"], 2, "bird"),
        (["--model", "MODEL", "--source", "IMAGES", "--tile", "64", "--overlap", "64"], 2, "less"),
        (["--model", "MODEL", "--source", "IMAGES", "--device", "quantum"], 2, "device"),
        (["--model", "MODEL", "--source", "IMAGES", "--device", "meta"], 2, "device"),
        (["--model", "MODEL", "--source", "IMAGES", "--max-detections", "999999999"], 2, "whole"),
        (["--model", "MODEL", "--source", "IMAGES", "--output", "FILE"], 2, "expected a folder"),
        (["--model", "MODEL", "--source", "IMAGES", "--threads", "100000"], 2, "threads"),
        (["--model", "MODEL"], 2, "--source"),
    ],
)
def test_wrong_arguments(
    monkeypatch,
    capsys,
    data_dir: Path,
    model_folder: Path,
    tmp_path: Path,
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {
        "MODEL": str(model_folder),
        "IMAGES": str(data_dir / "images"),
        "FILE": str(data_dir / "annotations" / "val.json"),
    }
    arguments = [places.get(argument, argument) for argument in arguments]
    assert run(monkeypatch, "predict", *arguments) == code
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "runs").exists()


def test_sigterm_in_predict_keeps_what_is_done(
    monkeypatch, data_dir: Path, model_folder: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        "vovnet.predict_files.draw_detections",
        lambda image, found: signal.raise_signal(signal.SIGTERM),
    )
    arguments = ["--model", model_folder, "--source", data_dir / "images", "--output", tmp_path]
    assert run(monkeypatch, "predict", *arguments) == 143
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 1


def test_sigterm_ends_any_verb_as_an_exception(monkeypatch) -> None:
    monkeypatch.setattr("vovnet.cli.main.run_verb", lambda *a: signal.raise_signal(signal.SIGTERM))
    assert run(monkeypatch, "models") == 143


def test_val_wants_the_models_classes(
    monkeypatch, capsys, data_dir: Path, model_folder: Path
) -> None:
    assert run(monkeypatch, "val", "--model", model_folder, "--data", data_dir) == 2
    assert "expected the model's classes cat, dog, found dog, cat" in capsys.readouterr().err


def test_train_val_predict(monkeypatch, capsys, data_dir: Path, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    settings = [
        "--set",
        "model_overrides={mask_iou_width: 16, score_threshold: 0.0}",
        "--set",
        "augment={output_size: [64, 64]}",
        "--batch-size",
        2,
        "--workers",
        0,
    ]
    model = "centermask_lite_ese_vovnet19b_slim_dw"
    common = ["train", "--data", data_dir, "--model", model, *settings]
    assert run(monkeypatch, *common, "--epochs", 1, "--name", "a") == 0
    folder = tmp_path / "runs" / "train" / "a-1"
    assert (folder / "model" / "config.json").exists()
    assert (folder / "curves.png").exists()
    capsys.readouterr()
    assert run(monkeypatch, "val", "--model", folder / "model", "--data", data_dir, "--json") == 0
    assert json.loads(capsys.readouterr().out)["max_detections"] == 100
    assert run(monkeypatch, *common, "--epochs", 1, "--init", folder / "model", "--name", "b") == 0
    assert run(monkeypatch, "train", "--data", data_dir, "--set", "learning_rte=1") == 2
    assert "did you mean 'learning_rate'?" in capsys.readouterr().err
    assert run(monkeypatch, "train", "--data", data_dir, "--set", "seed=2020-99-99") == 2
    assert "expected a YAML value" in capsys.readouterr().err
    assert run(monkeypatch, *common, "--epochs", "inf") == 2
    saved = (folder / "config.yaml").read_text()
    assert run(monkeypatch, "train", "--resume", folder, "--device", "cuda:77") == 2
    assert (folder / "config.yaml").read_text() == saved
    assert sorted(path.name for path in folder.parent.iterdir()) == ["a-1", "b-1"]
    assert run(monkeypatch, "train") == 2
    assert "--data DIR" in capsys.readouterr().err
