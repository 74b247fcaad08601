import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from vovnet.classify import Classifier
from vovnet.cli.pretrain import pretrain
from vovnet.data.pictures import load_pictures
from vovnet.errors import ConfigError, DataError
from vovnet.model_folder import load_config as load_model_config
from vovnet.model_folder import load_tensors
from vovnet.training.build import build_model, preprocess_fields
from vovnet.training.config import TrainConfig, load_config, resume_config
from vovnet.training.distill import load_teacher
from vovnet.training.pretrain import (
    PRETRAIN,
    PretrainMetrics,
    PretrainTask,
    compare_views,
    feature_maps,
    without_bad,
)
from vovnet.training.report import ProgressReport, read_records
from vovnet.training.run import train
from vovnet.training.siamese import TeacherStep

CPU = torch.device("cpu")
SMALL = {
    "stem_channels": (8, 8, 16),
    "stage_conv_channels": (8, 8, 8, 8),
    "stage_out_channels": (16, 16, 24, 32),
}
BACKBONE = "ese_vovnet19b_slim_dw"
TEACHER = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.conv, self.fc = nn.Conv2d(3, 7, 8, stride=16), nn.Linear(7, 5)

    def forward_features(self, x):
        return self.conv(x)

    def forward(self, x):
        return self.fc(self.forward_features(x).mean((2, 3)))


def dense():
    return Net()


def pooled():
    torch.manual_seed(3)
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 5))
"""


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Six pictures of random tiles."""
    folder = tmp_path_factory.mktemp("data")
    draw = np.random.default_rng(0)
    for number in range(6):
        tiles = draw.integers(0, 255, (6, 6, 3)).astype(np.uint8)
        Image.fromarray(tiles.repeat(12, 0).repeat(12, 1)).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def teacher_file(tmp_path):
    path = tmp_path / "teachers.py"
    path.write_text(TEACHER)
    return path


def make_config(data_dir, runs_dir, **changes) -> TrainConfig:
    flags = {
        "data": str(data_dir),
        "runs_dir": str(runs_dir),
        "name": "toy",
        "model": BACKBONE,
        "model_overrides": SMALL,
        "image_size": 32,
        "batch_size": 3,
        "epochs": 2,  # 4 steps
        "eval_every_epochs": 1,
        "log_every_steps": 1,
        "workers": 0,
        "device": "cpu",
        "precision": "fp32",
        "preprocess": {"mean": [100.0, 110.0, 120.0], "std": [50.0, 60.0, 70.0]},
    }
    return load_config(None, None, flags | changes, defaults=PRETRAIN)


@pytest.fixture(scope="module")
def finished(data_dir, tmp_path_factory):
    return train(make_config(data_dir, tmp_path_factory.mktemp("runs")))


def test_a_run_leaves_a_backbone(finished):
    assert finished.exit_code == 0
    config = load_model_config(finished.model_dir)
    assert (config.architecture, config.task, config.class_names) == (BACKBONE, "classify", [])
    assert config.training["pretraining"] == finished.metrics.to_dict()
    assert "data" in config.training
    embedding = Classifier.load(finished.model_dir).embeddings([np.zeros((40, 40, 3), np.uint8)])
    assert embedding.shape == (1, 32)
    assert "6 pictures" in (finished.model_dir / "README.md").read_text()
    records = read_records(finished.run_dir / "metrics.jsonl")
    assert set(records[0]["losses"]) == {"loss_stride16", "loss_stride32"}
    assert [r["step"] for r in records if r["kind"] == "eval"] == [2, 4]


def test_the_last_weights_are_kept_whatever_the_figure(finished):
    last = torch.load(finished.run_dir / "last.pt", weights_only=True)
    assert last["position"]["best_step"] == 4
    kept = load_tensors(finished.model_dir)
    averaged = last["ema"]["module"]
    assert kept.keys() == averaged.keys()
    assert all(np.array_equal(kept[name], averaged[name].numpy()) for name in kept)


@pytest.mark.parametrize(
    ("model", "overrides"),
    [(f"fcos_lite_{BACKBONE}", {"neck_channels": 64}), (f"dsod_{BACKBONE}", {}), (BACKBONE, {})],
)
def test_the_weights_arrive_in_detector_and_classifier_exactly(finished, model, overrides):
    config = TrainConfig(
        model=model,
        model_overrides=SMALL | overrides,
        backbone_weights=str(finished.model_dir),
    )
    notes: list[str] = []
    built = build_model(config, ("a", "b"), notes=notes)
    backbone = built if model == BACKBONE else built.backbone
    own = {n: v for n, v in backbone.state_dict().items() if not n.startswith("head.")}
    given = load_tensors(finished.model_dir)
    assert own.keys() <= given.keys()
    assert notes == [f"backbone_weights {finished.model_dir}: {len(own)} tensors loaded"]
    assert all(np.array_equal(own[name].numpy(), given[name]) for name in own)
    assert preprocess_fields(config)["mean"] == [100.0, 110.0, 120.0]
    assert preprocess_fields(config)["std"] == [50.0, 60.0, 70.0]


class Interrupting(ProgressReport):
    """Sends this process a signal at step 3."""

    def step(self, record, spent_fraction):
        if record["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)


def test_a_resumed_run_equals_an_uninterrupted_one(finished, data_dir, tmp_path):
    stopped = train(make_config(data_dir, tmp_path), report=Interrupting())
    assert stopped.exit_code == 130
    moved = tmp_path / "moved"
    shutil.copytree(stopped.run_dir, moved)
    assert pretrain(None, {}, [], moved) == 0
    expected, found = load_tensors(finished.model_dir), load_tensors(moved / "model")
    assert all(np.array_equal(expected[name], found[name]) for name in expected)
    assert resume_config(moved, {}).task == "pretrain"


def test_unreadable_pictures_are_named_and_passed_over(data_dir, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(data_dir, folder)
    (folder / "1.png").write_bytes(b"no picture")
    task = PretrainTask(make_config(folder, tmp_path), skip_bad=False, device=CPU)
    assert task.num_train == 5
    assert len(task.skipped) == 1
    assert "1.png" in task.skipped[0]
    for number in (2, 3, 4, 5):
        (folder / f"{number}.png").unlink()
    with pytest.raises(DataError, match=r"data: expected at least 2 pictures, .*, found 1"):
        PretrainTask(make_config(folder, tmp_path), skip_bad=False, device=CPU)
    for path in folder.glob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(
        DataError, match=r"expected pictures that can be decoded, found none:\n.*0.p"
    ):
        without_bad(load_pictures(folder, ("train",)), threads=1)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"model": "vovdet_n"},
            ConfigError,
            "got the detector vovdet_n; its backbone is vovnet19_thin_dw",
        ),
        ({"model": "resnet50"}, ConfigError, "expected a known name"),
        ({"data": "nowhere"}, DataError, "nowhere: expected a folder of pictures, found nothing"),
        ({"augment": {"mosaic": 1}}, ConfigError, "augment: expected one of image_size, regions"),
        ({"distill": "logits", "teacher": "x"}, ConfigError, "distill: expected none for a model"),
        ({"patience": 3}, ConfigError, "patience"),
        ({"teacher": "no-such-folder"}, ConfigError, "no-such-folder"),
    ],
)
def test_wrong_settings_are_refused(data_dir, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        train(make_config(data_dir, tmp_path / "runs", **changes))
    assert not (tmp_path / "runs").exists()


def test_another_task_is_refused(data_dir, tmp_path):
    with pytest.raises(ConfigError, match="task: expected pretrain, got classify"):
        pretrain(None, {"data": str(data_dir), "task": "classify"}, [], None)
    with pytest.raises(ConfigError, match="expected no --config"):
        pretrain(tmp_path, {}, [], tmp_path)


def test_views_that_agree_are_matched_and_a_point_has_no_spread():
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(20, 16, generator=generator)
    near = first + 0.01 * torch.randn(20, 16, generator=generator)
    found = compare_views(first, near)
    assert found.matched == 1.0
    assert found.feature_std == pytest.approx(1.0, abs=0.1)  # directions from everywhere
    assert compare_views(first, first.flip(0)).matched == 0.0
    point = torch.ones(20, 16) + 1e-4 * first
    assert compare_views(point, point).feature_std < 0.01
    line = torch.ones(20, 16) + first[:, :1] * torch.linspace(-0.1, 0.1, 16)
    assert compare_views(line, line).feature_rank < 1.1
    assert found.feature_rank > 8
    json.dumps(found.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("std", "rank", "is_useless"),
    [(0.5, 9.0, False), (0.002, 9.0, True), (0.5, 1.1, True), (float("nan"), 9.0, True)],
)
def test_features_that_are_all_alike_are_called_so(std, rank, is_useless):
    found = PretrainMetrics(feature_std=std, feature_rank=rank, matched=0.1, num_pictures=20)
    first, *rest = found.format().splitlines()
    assert first.startswith("10.0% of 20 pictures known again")
    assert len(rest) == is_useless
    for warning in rest:
        assert ("spread" in warning, "directions" in warning) == (not std >= 0.05, rank < 1.5)
        assert "do not start a training from it" in warning


def test_a_teacher_gives_its_feature_map_where_it_has_one(teacher_file, tmp_path):
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    sizes = torch.full((2, 2), 32)
    dense = load_teacher(f"{teacher_file}:dense", device=CPU)
    found = feature_maps(dense)(images, sizes)
    assert found.shape == (2, 7, 2, 2)
    with torch.no_grad():
        expected = dense.engine.module.conv(dense.engine.normalize(images, sizes))
    assert torch.allclose(found, expected, atol=1e-6)
    pooled = load_teacher(f"{teacher_file}:pooled", device=CPU)
    assert feature_maps(pooled)(images, sizes).shape == (2, 3, 1, 1)


def test_a_model_folder_teaches_by_its_map(finished):
    own = load_teacher(str(finished.model_dir), device=CPU)
    found = feature_maps(own)(
        torch.zeros((1, 64, 64, 3), dtype=torch.uint8), torch.tensor([[64, 64]])
    )
    assert found.shape == (1, 32, 2, 2)


def test_a_run_with_a_teacher(data_dir, teacher_file, tmp_path):
    config = make_config(data_dir, tmp_path, teacher=f"{teacher_file}:dense", epochs=1)
    task = PretrainTask(config, skip_bad=False, device=CPU)
    assert isinstance(task.loss_step(task.build_model(), []), TeacherStep)
    done = train(config)
    assert set(read_records(done.run_dir / "metrics.jsonl")[0]["losses"]) == {"loss_teacher"}
    assert load_model_config(done.model_dir).training["config"]["teacher"] == "teachers.py:dense"
    assert "teacher" in (done.model_dir / "README.md").read_text()
