import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tests.class_folders import make_class_folders
from vovnet.classify import Classifier
from vovnet.errors import ConfigError, DataError, TrainingError
from vovnet.model_folder import load_config as load_model_config
from vovnet.models.zoo import create_model
from vovnet.training.classify import ClassifierTask, inverse_frequencies
from vovnet.training.config import load_config, resume_config
from vovnet.training.report import ProgressReport, read_records
from vovnet.training.run import train

CPU = torch.device("cpu")
SMALL = {
    "stem_channels": [16, 16, 16],
    "stage_conv_channels": [16, 16, 16, 16],
    "stage_out_channels": [16, 16, 32, 32],
}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return make_class_folders(tmp_path_factory.mktemp("data"))


def make_config(data_dir, runs_dir, **changes):
    flags = {
        "task": "classify",
        "data": str(data_dir),
        "runs_dir": str(runs_dir),
        "name": "toy",
        "model_overrides": SMALL,
        "augment": {"image_size": 32, "scale": [0.5, 1.0], "mixup": 0.1},
        "batch_size": 6,
        "epochs": 4,
        "optimizer": "adamw",
        "learning_rate": 0.01,
        "ema_decay": 0.5,
        "log_every_steps": 1,
        "workers": 0,
        "device": "cpu",
        "threads": 1,
    }
    return load_config(None, None, flags | changes)


@pytest.fixture(scope="module")
def finished(data_dir, tmp_path_factory):
    config = make_config(data_dir, tmp_path_factory.mktemp("runs"), tensorboard=True, epochs=12)
    return train(config)


def test_a_classifier_learns_colours_and_predicts(finished, data_dir):
    assert finished.exit_code == 0
    assert finished.metrics.top1 > 0.8
    classifier = Classifier.load(finished.model_dir)
    assert classifier.class_names == ("blue", "green", "red")
    names = [path for path in sorted((data_dir / "val").glob("*/*.png"))]
    right = [
        found.top(1)[0][0] == path.parent.name
        for found, path in zip(classifier(names), names, strict=True)
    ]
    assert np.mean(right) == pytest.approx(finished.metrics.top1)
    assert np.mean(right) == load_model_config(finished.model_dir).metrics["val"]["top1"]


def test_what_a_run_leaves(finished):
    names = {path.name for path in finished.run_dir.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "curves.png", "last.pt", "best.pt", "model"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    config = load_model_config(finished.model_dir)
    assert config.task == "classify"
    assert config.model_args["num_classes"] == 3
    assert config.preprocess["crop_size"] == 32
    assert config.preprocess["short_side"] == 36
    card = (finished.model_dir / "README.md").read_text()
    assert "model-index" in card
    assert "top" in card


def test_a_resumed_training_equals_a_straight_one(data_dir, tmp_path, finished):
    """Interrupted in the midst of an epoch, with a teacher's projection to be kept, too."""
    config = make_config(data_dir, tmp_path, teacher=str(finished.model_dir), distill="features")
    straight = train(config)

    class StopAt(ProgressReport):
        def step(self, record, spent_fraction):
            if record["step"] == 5:
                signal.raise_signal(signal.SIGTERM)

    first = train(config, report=StopAt())
    assert first.exit_code == 143
    resumed = train(resume_config(first.run_dir, {}), resume=first.run_dir)
    a, b = (Classifier.load(r.model_dir) for r in (straight, resumed))
    picture = np.full((40, 40, 3), 99, np.uint8)
    assert np.array_equal(a.logits([picture]), b.logits([picture]))
    losses = [
        [r["losses"] for r in read_records(run.run_dir / "metrics.jsonl") if r["kind"] == "train"]
        for run in (straight, resumed)
    ]
    assert losses[0] == losses[1]
    assert "loss_teacher" in losses[0][0]


def test_early_stopping(data_dir, tmp_path, capsys):
    config = make_config(data_dir, tmp_path, epochs=50, patience=2, learning_rate=1e-9)
    result = train(config)
    evaluations = [
        r["step"] for r in read_records(result.run_dir / "metrics.jsonl") if r["kind"] == "eval"
    ]
    assert len(evaluations) == 3
    assert "no better for 2 evaluations: the best was step 3" in capsys.readouterr().err


def test_frozen_parts_stay_as_they_were_loaded(data_dir, tmp_path, finished):
    config = make_config(
        data_dir, tmp_path, init=str(finished.model_dir), freeze=3, epochs=1, ema_decay=0.0
    )
    task = ClassifierTask(config, skip_bad=False, device=CPU)
    result = train(config)
    before = task.build_model().state_dict()
    last = torch.load(result.run_dir / "last.pt", weights_only=True)["model"]
    for name, value in before.items():
        same = torch.equal(last[f"model.{name}"], value)
        frozen = name.startswith(("stem", "stages.0", "stages.1"))
        assert same == frozen, name


def test_the_head_is_swapped_where_the_classes_differ(data_dir, tmp_path):
    weights = tmp_path / "weights.safetensors"
    from safetensors.torch import save_file

    torch.manual_seed(1)
    source = create_model("ese_vovnet19b_slim", num_classes=7, overrides=SMALL)
    save_file(source.state_dict(), weights)
    config = make_config(data_dir, tmp_path, backbone_weights=str(weights))
    task = ClassifierTask(config, skip_bad=False, device=CPU)
    model = task.build_model()
    assert model.get_classifier().out_features == 3
    count = len([name for name in source.state_dict() if not name.startswith("head.")])
    assert task.notes == [f"backbone_weights {weights}: {count} tensors loaded"]
    assert torch.equal(model.stem[0].conv.weight, source.stem[0].conv.weight)


def test_rare_classes_count_more(data_dir, tmp_path):
    folder = make_class_folders(tmp_path / "data")
    for number in range(1, 6):
        (folder / "train" / "red" / f"{number}.png").unlink()
    task = ClassifierTask(
        make_config(folder, tmp_path, class_balance="loss"), skip_bad=False, device=CPU
    )
    weights = inverse_frequencies(task.train_data)
    assert weights.tolist() == pytest.approx([13 / 18, 13 / 18, 13 / 3])
    step = task.loss_step(task.build_model(), ())
    assert torch.equal(step.class_weights, weights)
    sampled = ClassifierTask(
        make_config(folder, tmp_path, class_balance="sampler"), skip_bad=False, device=CPU
    )
    labels = sampled.train_data.labels[list(sampled.order_of(0))]
    assert np.bincount(labels).tolist() == [4, 4, 5] or sorted(np.bincount(labels)) == [4, 4, 5]


def test_bad_pictures_stop_or_are_left_out(tmp_path):
    folder = make_class_folders(tmp_path / "data")
    (folder / "train" / "red" / "0.png").write_bytes(b"none")
    with pytest.raises(DataError, match=r"found 1 that cannot \(--skip-bad leaves them out\)"):
        train(make_config(folder, tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()
    result = train(make_config(folder, tmp_path / "runs", epochs=1), skip_bad=True)
    assert "red/0.png" in (result.run_dir / "skipped.txt").read_text()
    for number in range(1, 6):
        (folder / "train" / "red" / f"{number}.png").write_bytes(b"none")
    with pytest.raises(DataError, match="no picture of red can be decoded"):
        train(make_config(folder, tmp_path / "runs"), skip_bad=True)


def test_a_lost_picture_ends_the_training_with_its_steps_kept(tmp_path, monkeypatch):
    folder = make_class_folders(tmp_path / "data")
    config = make_config(folder, tmp_path / "runs", workers=1, epochs=50)

    class Deletes(ProgressReport):
        def step(self, record, spent_fraction):
            if record["step"] == 1:
                for path in (folder / "train").rglob("*.png"):
                    path.write_bytes(b"gone")

    # Nothing cached, so that the loading process meets the files again.
    monkeypatch.setattr("vovnet.training.classify.DEFAULT_CACHE_BYTES", 0)
    with pytest.raises(DataError) as raised:
        train(config, report=Deletes())
    assert "\n" not in str(raised.value)
    (run_dir,) = (tmp_path / "runs").iterdir()
    last = torch.load(run_dir / "last.pt", weights_only=True)
    assert last["position"]["step"] >= 1


def test_a_resume_with_other_classes_is_refused(finished, tmp_path):
    folder = make_class_folders(tmp_path / "data")
    for split in ("train", "val"):
        (folder / split / "red").rename(folder / split / "rouge")
    before = (finished.model_dir / "config.json").read_bytes()
    config = resume_config(finished.run_dir, {"data": str(folder), "epochs": 20})
    with pytest.raises(ConfigError, match=r"expected the classes blue, green, red as in .*rouge"):
        train(config, resume=finished.run_dir)
    assert (finished.model_dir / "config.json").read_bytes() == before
    with pytest.raises(ConfigError, match="expected a run folder or a checkpoint, found none at"):
        resume_config(tmp_path / "nope", {})


def test_a_head_of_other_classes_is_not_taken_over(data_dir, tmp_path, finished):
    folder = make_class_folders(tmp_path / "data")
    for split in ("train", "val"):
        (folder / split / "red").rename(folder / split / "rouge")
    trained = Classifier.load(finished.model_dir).engine.graph.classifier.get_classifier().weight
    heads, notes = [], []
    for data in (data_dir, folder):
        config = make_config(data, tmp_path, init=str(finished.model_dir))
        task = ClassifierTask(config, skip_bad=False, device=CPU)
        model = task.build_model()
        heads.append(torch.equal(model.get_classifier().weight, trained))
        notes += task.notes
    assert heads == [True, False]
    count = len(model.state_dict())
    assert notes == [
        f"init {finished.model_dir}: {count} tensors loaded",
        f"init {finished.model_dir}: {count - 2} tensors loaded, 2 of other classes left random",
    ]


def test_weights_of_another_network_are_named(data_dir, tmp_path, model_folder):
    config = make_config(data_dir, tmp_path, init=str(model_folder))
    message = f"expected the weights of {config.model}, found those of .*fcos|centermask"
    with pytest.raises(ConfigError, match=message):
        ClassifierTask(config, skip_bad=False, device=CPU).build_model()


def test_a_teacher_is_not_asked_before_the_model_is_right(data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("vovnet.training.classify.load_teacher", None)
    config = make_config(data_dir, tmp_path, teacher="x", model_overrides={"no_such": 1})
    with pytest.raises(ConfigError, match="no_such"):
        ClassifierTask(config, skip_bad=False, device=CPU)


def test_a_batch_too_small_for_batch_norm(data_dir, tmp_path):
    with pytest.raises(TrainingError, match=r"got one from a batch of \(1, 32, 32, 3\); raise"):
        train(make_config(data_dir, tmp_path, batch_size=1))


def test_an_evaluation_can_be_stopped(data_dir, tmp_path):
    class Stop:
        received = 15

    task = ClassifierTask(make_config(data_dir, tmp_path), skip_bad=False, device=CPU)
    assert task.evaluate(task.build_model(), stop=Stop()) is None


def test_pictures_of_one_pixel_train(tmp_path):
    folder = make_class_folders(tmp_path / "data", side=1)
    for path in folder.rglob("*.png"):
        Image.fromarray(np.zeros((1, 1, 3), np.uint8)).save(path)
    assert train(make_config(folder, tmp_path / "runs", epochs=1)).exit_code == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"task": "detect", "model": "ese_vovnet19b_slim"},
            "expected one to detect, got .*classify",
        ),
        ({"max_detections": 7}, "max_detections: expected none for a model to classify, got 7"),
        ({"augment": {"hju": 1}}, "augment: expected one of image_size"),
        ({"freeze": 1}, "freeze: expected weights to keep"),
        ({"teacher": "timm:no_such_net"}, "teacher timm:no_such_net: expected a known model"),
        ({"teacher": "nowhere"}, "expected a model folder or the name of a bundled model"),
        ({"drops_at": [1.5]}, "drops_at.0: expected less than 1"),
        ({"nesterov": True}, "expected nesterov with sgd"),
        ({"distill": "head"}, "teacher: expected one for distill"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(
    data_dir, tmp_path, changes, message
):
    with pytest.raises(ConfigError, match=message):
        train(make_config(data_dir, tmp_path / "runs", **changes))
    assert not (tmp_path / "runs").exists()


def test_several_processes_train_as_one(data_dir, tmp_path):
    """Two processes with half of each batch give what one with all of it gives."""
    overrides = SMALL | {"norm": "evonorm_s0"}  # BatchNorm sees its own process's half alone
    changes = {"model_overrides": overrides, "epochs": 1, "augment": {"image_size": 32}}
    config = make_config(data_dir, tmp_path / "one", **changes)
    alone = train(config)
    settings = config.model_dump(mode="json", exclude_none=True) | {
        "runs_dir": str(tmp_path / "two")
    }
    (tmp_path / "two.json").write_text(json.dumps(settings))  # JSON is YAML
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "vovnet", "train", "--config", str(tmp_path / "two.json")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stderr
    (run_dir,) = (tmp_path / "two").iterdir()
    states = [
        torch.load(folder / "last.pt", weights_only=True)["model"]
        for folder in (alone.run_dir, run_dir)
    ]
    for name, value in states[0].items():
        assert torch.allclose(states[1][name], value, rtol=1e-3, atol=2e-5), name


def test_module_without_features_can_be_trained_too(data_dir, tmp_path):
    """What a comparison with another network needs: logits are enough where nobody teaches."""
    task = ClassifierTask(make_config(data_dir, tmp_path), skip_bad=False, device=CPU)
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))
    step = task.loss_step(model, ())
    batch = task.collate([task.dataset[index] for index in range(3)])
    losses = step(batch.images, batch.sizes, batch.targets)
    assert set(losses) == {"loss_class"}
    losses["loss_class"].backward()
