import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vovnet import model_folder
from vovnet.errors import ConfigError
from vovnet.model_folder import (
    ModelConfig,
    load_config,
    load_tensors,
    resolve_model,
    save_model_folder,
)


def make_config(**changes: Any) -> ModelConfig:
    settings = {
        "architecture": "centermask_lite_ese_vovnet19b_slim",
        "model_args": {"num_classes": 2, "overrides": {"mask_iou_width": 256}},
        "task": "segment",
        "class_names": ["nucleus", "debris"],
        "category_ids": [1, 7],
        "preprocess": {"mean": [1.0, 2.0, 3.0], "short_side": None},
        "licence": "Apache-2.0",
        "training": {"seed": 0},
        "metrics": {"segm": {"ap": 0.4}},
        "cost": {"macs": 10**12},
    }
    return ModelConfig(**(settings | changes))


def make_tensors() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        "conv.weight": generator.normal(size=(4, 3, 3, 3)).astype(np.float16),
        "conv.bias": generator.normal(size=4).astype(np.float32),
        "steps": np.array(7, np.int64),
        "empty": np.zeros((0, 4), np.float32),
        "flags": np.array([True, False]),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    save_model_folder(path, make_config(), make_tensors(), card="# A model\n")
    return path


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / "config.json").read_text())
    change(content)
    (folder / "config.json").write_text(json.dumps(content))


def write_safetensors(path: Path, header: dict[str, Any], data: bytes) -> None:
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)


def test_what_is_saved_is_loaded(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    assert load_config(folder) == make_config()
    assert (folder / "README.md").read_text() == "# A model\n"
    loaded = load_tensors(folder)
    assert loaded.keys() == make_tensors().keys()
    for name, tensor in make_tensors().items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert loaded[name].flags.writeable
        np.testing.assert_array_equal(loaded[name], tensor)


def test_non_contiguous_tensors_keep_their_values(tmp_path: Path) -> None:
    tensor = np.arange(12, dtype=np.float32).reshape(3, 4).T
    save_model_folder(tmp_path, make_config(), {"weight": tensor}, card="")
    np.testing.assert_array_equal(load_tensors(tmp_path)["weight"], tensor)


def test_saving_again_replaces_every_file_and_leaves_no_other(folder: Path) -> None:
    config = make_config(licence="CC0-1.0")
    save_model_folder(folder, config, {"weight": np.ones(2, np.float32)}, card="new")
    assert load_config(folder).licence == "CC0-1.0"
    assert list(load_tensors(folder)) == ["weight"]
    assert len(list(folder.iterdir())) == 3


def test_a_failing_save_leaves_the_old_model(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"'names'.*expected one of .*float32.*got <U1"):
        save_model_folder(folder, make_config(), {"names": np.array(["a"])}, card="new")
    assert load_config(folder) == make_config()
    assert load_tensors(folder).keys() == make_tensors().keys()


def test_config_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr(
        model_folder, "atomic_write_bytes", lambda path, data: written.append(path.name)
    )
    save_model_folder(tmp_path, make_config(), make_tensors(), card="")
    assert written == ["model.safetensors", "README.md", "config.json"]


def test_bfloat16_is_read_as_float32(tmp_path: Path) -> None:
    values = np.array([1.0, -2.5, 0.0, 1e30], np.float32)
    high_half = (values.view(np.uint32) >> 16).astype(np.uint16)
    header = {"weight": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]}}
    write_safetensors(tmp_path / "model.safetensors", header, high_half.tobytes())
    loaded = load_tensors(tmp_path)["weight"]
    assert loaded.dtype == np.float32
    np.testing.assert_allclose(loaded, values.reshape(2, 2), rtol=2**-7)


def test_figures_that_do_not_exist_become_null(tmp_path: Path) -> None:
    config = make_config(metrics={"ap": float("nan"), "bins": (np.float32(0.5), float("inf"))})
    save_model_folder(tmp_path, config, {}, card="")
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["metrics"] == {"ap": None, "bins": [0.5, None]}


@pytest.mark.parametrize("value", [Path("a"), {"set"}, np.zeros(2), object()])
def test_what_json_lacks_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=f"JSON has, got {type(value).__name__}"):
        make_config(training={"seeds": [value]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(colour="red"), "'colour'.*expected only format_version, architecture"),
        (lambda c: c.pop("task"), "expected key 'task', found none"),
        (
            lambda c: c.update(task="sing"),
            "'task'.*'detect', 'segment' or 'classify', found 'sing'",
        ),
        (lambda c: c.update(format_version=2), "'format_version': expected to be 1, found 2"),
        (
            lambda c: c.update(class_names="cat"),
            "'class_names': expected to be a valid array, found 'cat'",
        ),
        (lambda c: c.update(category_ids=[1, "2"]), r"'category_ids\.1'.*integer.*'2'"),
        (lambda c: c.update(category_ids=[1]), "one id for each of the 2 class_names, got 1"),
        (lambda c: c.update(category_ids=[3, 3]), r"unique, got \[3, 3\]"),
        (lambda c: c.update(class_names=[], category_ids=[]), "'class_names'.*at least 1"),
        (lambda c: c.update(architecture=""), "'architecture'"),
        (lambda c: c.update(score_threshold=1.5), "'score_threshold'.*less than or equal to 1"),
        (lambda c: c.update(training=[1]), "'training'.*dictionary|'training'.*object"),
        (lambda c: c["preprocess"].update(scale=float("nan")), "'preprocess'.*finite"),
    ],
)
def test_a_wrong_key_says_expected_and_found(
    folder: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    edit_config(folder, change)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(folder)
    assert str(folder / "config.json") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected JSON"),
        (b"{", "expected JSON"),
        (b"\xff\xfe", "expected JSON"),
        (b"[1]", r"expected a JSON object, found \[1\]"),
        (b'{"metrics":' + b"[" * 100_000, "expected JSON"),
        (b" " * (16 * 2**20 + 1), "expected at most 16777216 bytes, found 16777217"),
    ],
)
def test_a_config_that_is_no_config(folder: Path, content: bytes, message: str) -> None:
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_config(folder)


@pytest.mark.parametrize(
    ("name", "load"), [("config.json", load_config), ("model.safetensors", load_tensors)]
)
def test_a_missing_file_is_named_with_what_is_there(
    folder: Path, name: str, load: Callable[[Path], object]
) -> None:
    (folder / name).unlink()
    with pytest.raises(ConfigError, match=rf"{name}: expected this file.*found README\.md"):
        load(folder)


def test_an_unreadable_file_is_named(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    with pytest.raises(ConfigError, match="expected a readable file, got: Is a directory"):
        load_tensors(folder)


@pytest.mark.parametrize("kept", [0, 7, 8, 40, -1])
def test_truncated_weights(folder: Path, kept: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ConfigError, match="expected a safetensors file, found"):
        load_tensors(folder)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 100_000_001, 10_000])
def test_an_oversized_header(folder: Path, length: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(ConfigError, match="expected a safetensors file"):
        load_tensors(folder)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [5], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]},
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 1600]},
        {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]},
        {"dtype": "PICKLE", "shape": [4], "data_offsets": [0, 16]},
        {"shape": [4]},
        "os.system",
    ],
)
def test_a_lying_header(tmp_path: Path, entry: object) -> None:
    write_safetensors(tmp_path / "model.safetensors", {"weight": entry}, bytes(16))
    with pytest.raises(ConfigError, match=r"model\.safetensors: expected a safetensors file"):
        load_tensors(tmp_path)


def test_overlapping_tensors_are_refused(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    write_safetensors(tmp_path / "model.safetensors", {"a": entry, "b": entry}, bytes(16))
    with pytest.raises(ConfigError, match="expected a safetensors file"):
        load_tensors(tmp_path)


def test_a_type_that_numpy_lacks_is_named(tmp_path: Path) -> None:
    header = {"weight": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}
    write_safetensors(tmp_path / "model.safetensors", header, bytes(4))
    with pytest.raises(ConfigError, match=r"'weight': expected one of .*F16.*, found F8_E4M3"):
        load_tensors(tmp_path)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_weights_load_or_raise_config_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp() / "damaged"
    folder.mkdir(exist_ok=True)
    header = {"weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}
    path = folder / "model.safetensors"
    write_safetensors(path, header, bytes(16))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        loaded = load_tensors(folder)
    except ConfigError:
        return
    assert sum(tensor.nbytes for tensor in loaded.values()) <= 2 * len(content)


def test_a_folder_resolves_to_itself(folder: Path) -> None:
    assert resolve_model(folder) == folder
    assert resolve_model(str(folder)) == folder


def test_a_bundled_name_resolves_to_its_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_folder, "BUNDLED_DIR", folder.parent)
    assert resolve_model("model") == folder
    with pytest.raises(ConfigError, match=r"name of a bundled model \(model\), found neither"):
        resolve_model("nothing")
    with pytest.raises(ConfigError, match="expected a model folder"):
        resolve_model("../model")


def test_a_folder_without_config_says_what_it_holds(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"with config\.json, found README\.md, model\.saf"):
        resolve_model(folder)


def test_every_bundled_model_loads() -> None:
    for path in model_folder.BUNDLED_DIR.glob("*/"):
        config = load_config(path)
        assert len(config.class_names) == len(config.category_ids)
        assert load_tensors(path)


@pytest.mark.parametrize("part", ["card", "config"])
def test_a_text_that_utf_8_does_not_have_writes_nothing(tmp_path: Path, part: str) -> None:
    config = make_config(training={"from": "\udcff" if part == "config" else ""})
    card = "\udcff" if part == "card" else ""
    with pytest.raises(ConfigError, match="Unicode"):
        save_model_folder(tmp_path / "model", config, make_tensors(), card=card)
    assert not (tmp_path / "model").exists()
