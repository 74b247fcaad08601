import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vovnet.errors import ConfigError, DataError
from vovnet.predict import Predictor
from vovnet.training.config import TrainConfig, load_config, resume_config
from vovnet.training.detect import DetectorTask
from vovnet.training.report import ProgressReport, drop_records_after, read_records
from vovnet.training.run import TASKS, train
from vovnet.training.task import TrainResult

SMALL = {
    "neck_channels": 64,
    "tower_convs": 1,
    "mask_convs": 1,
    "mask_channels": 32,
    "mask_iou_width": 16,
    "mask_rois_per_image": 4,
}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    """Three pictures of 64 x 64 with a bright square each, one picture without, for both splits."""
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        (folder / "images" / split).mkdir(parents=True)
        images, annotations = [], []
        for number in range(1, 5):
            pixels = generator.integers(0, 60, (64, 64, 3), dtype=np.uint8)
            x, y, side = (int(v) for v in generator.integers([2, 2, 20], [24, 24, 36]))
            if number < 4:
                pixels[y : y + side, x : x + side] += 150
                annotations.append(
                    {
                        "id": number,
                        "image_id": number,
                        "category_id": 7,
                        "bbox": [x, y, side, side],
                        "area": side * side,
                        "iscrowd": 0,
                        "segmentation": [[x, y, x + side, y, x + side, y + side, x, y + side]],
                    }
                )
            name = f"{number}.png"
            Image.fromarray(pixels).save(folder / "images" / split / name)
            images.append({"id": number, "file_name": name, "height": 64, "width": 64})
        content = {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": 7, "name": "square"}],
        }
        (folder / "annotations").mkdir(exist_ok=True)
        (folder / "annotations" / f"{split}.json").write_text(json.dumps(content))
    return folder


def make_config(data_dir: Path, runs_dir: Path, **changes: object) -> TrainConfig:
    flags = {
        "data": str(data_dir),
        "runs_dir": str(runs_dir),
        "name": "toy",
        "augment": {"output_size": [64, 64]},
        "batch_size": 2,
        "epochs": 1.5,  # 3 steps
        "log_every_steps": 1,
        "max_detections": 20,
        "workers": 0,
        "device": "cpu",
        "precision": "fp32",
        "model_overrides": SMALL,
        "export_half": True,
    }
    return load_config(None, None, flags | changes)


class Interrupting(ProgressReport):
    """Sends this process a signal at a step, or while the first evaluation runs."""

    def __init__(self, number: int, *, step: int | None) -> None:
        super().__init__()
        self.number = number
        self.at_step = step

    def step(self, record, spent_fraction):
        if record["step"] == self.at_step:
            os.kill(os.getpid(), self.number)

    def busy(self, text):
        if self.at_step is None:
            os.kill(os.getpid(), self.number)


@pytest.fixture(scope="module")
def finished(data_dir, tmp_path_factory) -> TrainResult:
    return train(make_config(data_dir, tmp_path_factory.mktemp("runs")))


def plain_records(folder: Path) -> list[dict]:
    records = read_records(folder / "metrics.jsonl")
    for record in records:
        for name in ("images_per_s", "waiting_for_data", "eta_s", "spent_s"):
            record.pop(name, None)
    return records


def test_a_run_leaves_all_that_it_should(finished):
    assert finished.exit_code == 0
    names = {path.name for path in finished.run_dir.iterdir()}
    expected = {"config.yaml", "metrics.jsonl", "curves.png", "last.pt", "best.pt", "model"}
    assert names == expected
    records = read_records(finished.run_dir / "metrics.jsonl")
    assert [r["step"] for r in records if r["kind"] == "train"] == [1, 2, 3]
    assert [r["step"] for r in records if r["kind"] == "eval"] == [2, 3]
    train_keys = {
        "losses",
        "learning_rate",
        "images_per_s",
        "waiting_for_data",
        "eta_s",
        "epoch",
        "spent_s",
    }
    assert train_keys <= records[0].keys()
    assert records[-1]["metrics"]["max_detections"] == 20
    with Image.open(finished.run_dir / "curves.png") as image:
        assert image.format == "PNG"
    card = (finished.model_dir / "README.md").read_text()
    assert "at most 20 detections" in card
    assert "Trained from random weights on " in card


def test_the_model_folder_predicts(finished):
    predictor = Predictor.load(finished.model_dir, score_threshold=0.0)
    found = predictor(np.zeros((50, 70, 3), dtype=np.uint8))
    assert found.class_names == ("square",)
    assert found.image_size == (50, 70)
    text = (finished.model_dir / "config.json").read_text()
    assert json.loads(text)["category_ids"] == [7]
    assert str(finished.run_dir.parent) not in text


@pytest.mark.parametrize(("number", "step"), [(signal.SIGINT, 1), (signal.SIGTERM, None)])
def test_an_interrupted_run_goes_on_exactly(
    data_dir, tmp_path, finished, monkeypatch, number, step
):
    monkeypatch.setattr("vovnet.training.run.draw_curves", lambda path, records: None)
    config = make_config(data_dir, tmp_path)
    stopped = train(config, report=Interrupting(number, step=step))
    assert stopped.interrupted_by == number
    assert stopped.exit_code == 128 + number
    assert stopped.model_dir is None
    resumed = train(resume_config(stopped.run_dir, {}), resume=stopped.run_dir)
    assert resumed.run_dir == stopped.run_dir
    assert plain_records(resumed.run_dir) == plain_records(finished.run_dir)
    for name in ("model", "ema", "optimizer"):
        for first, second in zip(
            tensors_of(resumed, name), tensors_of(finished, name), strict=True
        ):
            assert torch.equal(first, second)


def tensors_of(result: TrainResult, part: str) -> list[torch.Tensor]:
    def walk(value: object) -> list[torch.Tensor]:
        if isinstance(value, torch.Tensor):
            return [value]
        children = value.values() if isinstance(value, dict) else ()
        return [tensor for child in children for tensor in walk(child)]

    return walk(torch.load(result.run_dir / "last.pt", weights_only=True)[part])


def test_a_segmenter_needs_masks(data_dir, tmp_path):
    folder = shutil.copytree(data_dir, tmp_path / "data")
    for file in (folder / "annotations").iterdir():
        content = json.loads(file.read_text())
        for annotation in content["annotations"]:
            del annotation["segmentation"]
        file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"expected masks to train .*, found none"):
        train(make_config(folder, tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()


def test_a_resumed_run_must_be_the_same(data_dir, finished):
    config = make_config(data_dir, finished.run_dir, batch_size=3)
    with pytest.raises(ConfigError, match=r"resume: expected batch_size 2 .*found 3"):
        train(config, resume=finished.run_dir)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_overrides": {"norm": "frozen_bn"}}, "expected bn or gn .* found 'frozen_bn'"),
        ({"task": "detect"}, "model: expected one to detect, got .* one to segment"),
        ({"teacher": "nuclei"}, "teacher nuclei: expected a detector of .* square, got one"),
        ({"teacher_score": 0.7}, "teacher: expected one for teacher_score, got none"),
        ({"teacher": "x", "distill": "head"}, "distill: expected none for a model to segment"),
        ({"freeze": 2}, "freeze: expected weights to keep .* random ones to freeze 2 parts of"),
        ({"augment": {"hju": 1}}, "augment"),
        ({"preprocess": {"scael": 1}}, "preprocess"),
        ({"device": "abacus"}, "device: expected cpu, cuda, cuda:N or auto, found 'abacus'"),
        ({"backbone_weights": "nowhere.pth"}, r"nowhere\.pth"),
    ],
)
def test_settings_that_cannot_be_are_refused(data_dir, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        train(make_config(data_dir, tmp_path, **changes))


def test_a_training_without_time_left_is_refused(data_dir, tmp_path, monkeypatch):
    class SlowlyTaught(DetectorTask):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **kwargs)
            self.spent_s = 90.0

    monkeypatch.setitem(TASKS, "segment", SlowlyTaught)
    message = r"max_minutes: expected more than the 1\.5 minutes .* teacher .*, got 1\.5"
    with pytest.raises(ConfigError, match=message):
        train(make_config(data_dir, tmp_path / "runs", epochs=None, max_minutes=1.5))
    assert not (tmp_path / "runs").exists()


def test_bad_data_stops_or_is_left_out(data_dir, tmp_path):
    folder = tmp_path / "data"
    for split in ("train", "val"):
        (folder / "images" / split).mkdir(parents=True)
        for path in (data_dir / "images" / split).iterdir():
            (folder / "images" / split / path.name).write_bytes(path.read_bytes())
    (folder / "annotations").symlink_to(data_dir / "annotations")
    (folder / "images" / "train" / "2.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"2\.png"):
        train(make_config(folder, tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()
    config = make_config(
        folder, tmp_path / "runs", epochs=0.5, model="fcos_lite_ese_vovnet19b_slim"
    )
    config = config.model_copy(update={"model_overrides": {}})
    result = train(config, skip_bad=True)
    assert "2.png" in (result.run_dir / "skipped.txt").read_text()
    assert set(result.metrics.by_type) == {"bbox"}


def test_lines_of_steps_that_are_done_again_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    drop_records_after(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    drop_records_after(tmp_path / "new.jsonl", 2)
    assert read_records(tmp_path / "new.jsonl") == []
