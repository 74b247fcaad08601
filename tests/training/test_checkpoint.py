import multiprocessing
import os
import pickle
import random
import time
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch

from vovnet.errors import ConfigError
from vovnet.training.checkpoint import (
    Checkpoint,
    Position,
    capture_random_states,
    library_version,
    load_checkpoint,
    load_plain,
    restore_random_states,
    save_checkpoint,
)


def save_forever(path: Path) -> None:
    torch.set_num_threads(1)
    for step in count(1):
        checkpoint = make_checkpoint()
        checkpoint.model = {"weight": torch.full((200_000,), float(step))}
        checkpoint.position.step = step
        save_checkpoint(path, checkpoint)


def make_checkpoint() -> Checkpoint:
    return Checkpoint(
        model={"weight": torch.arange(6.0).reshape(2, 3)},
        ema={"updates": 3, "module": {"weight": torch.ones(2, 3)}},
        optimizer={"state": {0: {"momentum_buffer": torch.ones(1)}}, "param_groups": []},
        position=Position(step=7, epoch=2, batch=1, window_losses={"loss": 0.5}),
        random_states=capture_random_states(),
        config={"model": "name", "epochs": None, "augment": {"hue": [0.1]}},
        class_names=["cat"],
        library="1.0",
    )


class Harmful:
    def __reduce__(self):
        return os.mkdir, (str(Path(os.environ["HARM"])),)


def test_a_checkpoint_reads_back(tmp_path):
    saved = make_checkpoint()
    save_checkpoint(tmp_path / "last.pt", saved)
    loaded = load_checkpoint(tmp_path / "last.pt")
    assert loaded.position == saved.position
    assert loaded.config == saved.config
    assert torch.equal(loaded.model["weight"], saved.model["weight"])
    assert torch.equal(loaded.random_states["torch"], saved.random_states["torch"])


def draw() -> tuple[float, float, float, float]:
    return (
        float(torch.rand(())),
        float(np.random.rand()),
        float(np.random.randn()),
        random.random(),
    )


def test_random_states_go_on_after_a_file(tmp_path):
    np.random.randn()  # leaves a second normal number waiting in the generator
    save_checkpoint(tmp_path / "last.pt", make_checkpoint())
    expected = [draw(), draw()]
    restore_random_states(load_checkpoint(tmp_path / "last.pt").random_states)
    assert [draw(), draw()] == expected


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"format_version": 1, "model": [x]}])
def test_code_in_a_file_is_not_run(tmp_path, monkeypatch, wrap):
    monkeypatch.setenv("HARM", str(tmp_path / "harm"))
    torch.save(wrap(Harmful()), tmp_path / "zip.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(wrap(Harmful()), protocol=2))
    for name in ("zip.pt", "raw.pt"):
        with pytest.raises(ConfigError, match=f"{name}: expected a whole file of tensors"):
            load_checkpoint(tmp_path / name)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("keep", [0, 1, 100, 1000, -1])
def test_a_cut_file_is_named(tmp_path, keep):
    path = tmp_path / "last.pt"
    save_checkpoint(path, make_checkpoint())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ConfigError, match=r"last\.pt: expected a whole file"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"format_version": 1}, "expected a training checkpoint of format 2, found 1"),
        ({"weight": torch.ones(1)}, "found None"),
        ({"format_version": 2, "model": {}}, r"expected the keys \['class_names', .*found"),
        ([1, 2], "expected a mapping, found list"),
    ],
)
def test_other_content_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "last.pt")
    with pytest.raises(ConfigError, match=message):
        load_checkpoint(tmp_path / "last.pt")


def test_an_unknown_position_is_refused(tmp_path):
    save_checkpoint(tmp_path / "last.pt", make_checkpoint())
    content = load_plain(tmp_path / "last.pt")
    content["position"]["speed"] = 1
    torch.save(content, tmp_path / "last.pt")
    with pytest.raises(ConfigError, match=r"fields of Position, found: .*speed"):
        load_checkpoint(tmp_path / "last.pt")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"last\.pt: expected a file of weights, found none"):
        load_checkpoint(tmp_path / "last.pt")


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, make_checkpoint())
    broken = make_checkpoint()
    broken.config = {"model": lambda: None}  # cannot be stored
    with pytest.raises((pickle.PicklingError, AttributeError)):
        save_checkpoint(path, broken)
    assert load_checkpoint(path).position.step == 7
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_kill_at_any_moment_leaves_a_whole_file(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, make_checkpoint())
    delays = random.Random(0)
    for _ in range(20):
        before = path.stat().st_ino
        process = multiprocessing.get_context("fork").Process(target=save_forever, args=(path,))
        process.start()
        while path.stat().st_ino == before:
            assert process.is_alive()
            time.sleep(0.001)
        time.sleep(delays.uniform(0.0, 0.02))
        process.kill()
        process.join()
        loaded = load_checkpoint(path)
        assert torch.all(loaded.model["weight"] == loaded.position.step)
        for rest in set(tmp_path.iterdir()) - {path}:
            rest.unlink()  # what the killed process was writing


def test_library_version_is_one_word():
    assert library_version().split() == [library_version()]


def test_a_full_disk_is_said_plainly(tmp_path, monkeypatch):
    def fail(content, path):
        raise RuntimeError("[enforce fail at inline_container.cc:671] unexpected pos\nmore")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(
        OSError, match=r"last.pt: cannot be written, is the disk full\? \(\[enforce"
    ):
        save_checkpoint(tmp_path / "last.pt", make_checkpoint())
    assert list(tmp_path.iterdir()) == []
