"""Choosing an engine, and what every engine gives."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from vovnet import _lazy
from vovnet.errors import ConfigError
from vovnet.exported import ONNX_FILE, OPENVINO_FILE, sha256
from vovnet.model_folder import CONFIG_FILE, WEIGHTS_FILE
from vovnet.runtime import measured
from vovnet.runtime.engine import load_engine


def picture() -> tuple[np.ndarray, np.ndarray]:
    images = np.random.default_rng(0).integers(0, 256, (1, 64, 96, 3), dtype=np.uint8)
    return images, np.array([[60, 90]], np.int64)


ELSEWHERE = {"torch-triton", "torch-export"}  # have tests of their own


# torch-compile takes a minute for a detector; a classifier has to do.
@pytest.mark.parametrize(
    "name", ["auto", *sorted(set(_lazy.ENGINES) - {"torch-compile"} - ELSEWHERE)]
)
def test_results_have_the_declared_shapes(exported_folder: Path, name: str) -> None:
    engine = load_engine(exported_folder, engine=name)
    found = engine.infer(*picture())
    count = engine.max_detections
    assert engine.has_masks
    assert engine.name in _lazy.ENGINES
    assert {key: value.shape for key, value in found.items()} == {
        "boxes": (1, count, 4),
        "scores": (1, count),
        "labels": (1, count),
        "valid": (1, count),
        "mask_probs": (1, count, 28, 28),
        "mask_scores": (1, count),
    }


def test_settings_change_the_network(model_folder: Path) -> None:
    engine = load_engine(model_folder, settings={"max_detections": 3})
    assert engine.max_detections == 3
    assert engine.infer(*picture())["boxes"].shape == (1, 3, 4)


def test_half_precision_is_near_full_precision(model_folder: Path) -> None:
    full = load_engine(model_folder, precision="fp32")
    half = load_engine(model_folder, precision="bf16")
    assert (full.precision, half.precision) == ("fp32", "bf16")
    expected, found = full.infer(*picture()), half.infer(*picture())
    assert found["scores"].dtype == np.float32
    assert np.abs(found["scores"] - expected["scores"]).max() < 0.02
    assert (found["scores"] != expected["scores"]).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"engine": "abacus"}, "engine: expected auto, torch"),
        ({"precision": "fp7"}, "precision: expected auto, fp32"),
        ({"precision": "fp16", "device": "cpu"}, "expected fp32 or bf16 on the CPU"),
        ({"device": "toaster"}, "device: expected cpu"),
        ({"threads": 0}, "threads: expected a whole number in 1..1024, got 0"),
        ({"mode": "haste"}, "mode: expected latency or throughput, got 'haste'"),
        ({"threads": 100_000}, "threads: expected a whole number"),
        ({"settings": {"colour": 1}}, "model settings: expected one of"),
    ],
)
def test_wrong_arguments_say_what_was_expected(
    model_folder: Path, arguments: dict, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_engine(model_folder, **arguments)


@pytest.mark.parametrize("name", ["auto", *sorted(set(_lazy.ENGINES) - ELSEWHERE)])
def test_classifiers_give_logits_and_embedding(exported_classifier_folder: Path, name: str) -> None:
    engine = load_engine(exported_classifier_folder, engine=name)
    images = picture()[0][:, :, :64]  # the size of its crop, without padding
    sizes = np.array([[64, 64]], np.int64)
    found = engine.infer(images, sizes)
    assert (engine.max_detections, engine.has_masks) == (0, False)
    assert {key: value.shape for key, value in found.items()} == {
        "logits": (1, 3),
        "embedding": (1, 512),
    }
    assert found["logits"].dtype == np.float32
    expected = load_engine(exported_classifier_folder, engine="torch").infer(images, sizes)
    np.testing.assert_allclose(found["logits"], expected["logits"], atol=1e-4)


def test_compiling_needs_a_compiler(
    classifier_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ConfigError, match=r"engine: expected a C\+\+ compiler"):
        load_engine(classifier_folder, engine="torch-compile")


def test_a_task_that_is_not_the_architectures_is_named(
    classifier_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(classifier_folder, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"task": "detect"}))
    with pytest.raises(ConfigError, match=r"task: expected classify, .* found detect"):
        load_engine(tmp_path / "model", settings={"min_score": 0.0})


def test_a_backbone_gives_its_embedding_alone(backbone_folder: Path) -> None:
    assert list(load_engine(backbone_folder).infer(*picture())) == ["embedding"]


class MadeUpEngine:
    """An engine whose pictures move a clock on."""

    device, parallel, max_detections, has_masks = "cpu", 1, 0, False

    def __init__(self, name: str, engines: "MadeUpEngines") -> None:
        self.name = name
        self.precision = "int8" if name == "openvino" else "fp32"
        self.chosen_because = "unset"
        self._engines = engines

    def infer(self, images: np.ndarray, sizes: np.ndarray) -> dict[str, np.ndarray]:
        assert images.shape == (1, 64, 64, 3)  # as the folder's preprocess makes them
        assert sizes.tolist() == [[64, 64]]
        self._engines.now_s += self._engines.ms[self.name] / 1e3
        return {}


class MadeUpEngines:
    """Stands for the loaders of both engines: what they were asked for, and how slow they are."""

    def __init__(self) -> None:
        self.ms = {"openvino": 30.0, "onnxruntime": 1.0}
        self.now_s = 0.0
        self.loads: list[tuple[str, str]] = []
        self.modes: list[str] = []
        self.refusing: set[str] = set()

    def loader(self, target: str) -> Callable[..., MadeUpEngine]:
        name = target.split(":")[0].rpartition(".")[2]

        def load(model: Path, *, precision: str, mode: str = "none", **options) -> MadeUpEngine:
            if name in self.refusing:
                raise ConfigError(f"{name} refuses")
            self.loads.append((name, model.name))
            self.modes.append(mode)
            return MadeUpEngine(name, self)

        return load

    def names(self) -> list[str]:
        """Of the engines loaded since the last time."""
        names = [name for name, _ in self.loads]
        self.loads.clear()
        return names


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> MadeUpEngines:
    made_up = MadeUpEngines()
    monkeypatch.setattr("vovnet.runtime.engine._lazy.load", made_up.loader)
    monkeypatch.setattr(measured, "cache_folder", lambda: tmp_path / "cache")
    timed = partial(measured.time_engines, clock=lambda: made_up.now_s)
    monkeypatch.setattr("vovnet.runtime.engine.time_engines", timed)
    return made_up


BOTH = ["openvino", "onnxruntime"]


def test_the_faster_engine_is_taken_and_kept(
    exported_classifier_folder: Path, engines: MadeUpEngines, tmp_path: Path
) -> None:
    engine = load_engine(exported_classifier_folder)
    assert (engine.name, engines.loads) == (
        "onnxruntime",
        [("openvino", "model.xml"), ("onnxruntime", "model.onnx")],
    )
    assert engine.chosen_because.startswith(
        "1.0 ms a picture (fp32) against 30.0 in openvino (int8), measured on this machine on 20"
    )
    assert engines.names() == BOTH
    engines.ms = {"openvino": 1.0, "onnxruntime": 30.0}  # not looked at again
    again = load_engine(exported_classifier_folder)
    assert (again.name, again.chosen_because) == (engine.name, engine.chosen_because)
    assert engines.names() == ["onnxruntime"]
    assert load_engine(exported_classifier_folder, threads=1).name == "openvino"
    # Who asks for floats gets no int8, however fast.
    assert load_engine(exported_classifier_folder, precision="fp32").name == "onnxruntime"
    (tmp_path / "cache" / "engines.json").write_text("[{")
    assert load_engine(exported_classifier_folder).name == "openvino"
    assert engines.names() == BOTH * 3


@pytest.mark.parametrize("name", [OPENVINO_FILE, "openvino/model.bin", ONNX_FILE])
def test_another_file_is_measured_again(
    exported_classifier_folder: Path, engines: MadeUpEngines, tmp_path: Path, name: str
) -> None:
    folder = shutil.copytree(exported_classifier_folder, tmp_path / "model")
    load_engine(folder)
    content = (folder / name).read_bytes()
    # A changed text that no reader of the description minds: an empty field, a space, a byte.
    (folder / name).write_bytes(content + (b"\x0a\x00" if name == ONNX_FILE else b" "))
    load_engine(folder)
    assert engines.names() == BOTH * 2
    load_engine(folder)
    assert engines.names() == ["onnxruntime"]


def test_what_cannot_be_kept_is_measured_each_time(
    exported_classifier_folder: Path, engines: MadeUpEngines, tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("no folder")
    for _ in range(2):
        assert load_engine(exported_classifier_folder).name == "onnxruntime"
    assert engines.names() == BOTH * 2


@pytest.mark.parametrize("left", BOTH)
def test_one_engine_is_not_measured(
    exported_classifier_folder: Path, engines: MadeUpEngines, tmp_path: Path, left: str
) -> None:
    engines.refusing = {*BOTH} - {left}
    engine = load_engine(exported_classifier_folder)
    assert engine.name == left
    refused = ({*BOTH} - {left}).pop()
    assert engine.chosen_because.endswith(
        f"lies beside the weights; passed over: {refused} refuses"
    )
    engine = load_engine(exported_classifier_folder, precision="fp32")
    assert engine.chosen_because.endswith("lies beside the weights")  # it may lack the precision
    folder = shutil.copytree(exported_classifier_folder, tmp_path / "model")
    shutil.rmtree(folder / "openvino")
    engines.refusing = {"onnxruntime"}
    assert (load_engine(folder).name, engines.loads[-1][1]) == ("openvino", "model.onnx")
    assert not (tmp_path / "cache").exists()
    engines.refusing = {*BOTH}
    with pytest.raises(ConfigError, match="openvino refuses"):
        load_engine(exported_classifier_folder)


def test_a_stale_export_is_passed_over_while_there_is_another(
    exported_classifier_folder: Path, engines: MadeUpEngines, tmp_path: Path
) -> None:
    folder = shutil.copytree(exported_classifier_folder, tmp_path / "model")
    file = folder / OPENVINO_FILE
    weights = sha256(folder / WEIGHTS_FILE)
    text = file.read_text()
    file.write_text(text.replace(weights, weights[::-1]))
    engine = load_engine(folder)
    assert (engine.name, engines.names()) == ("onnxruntime", ["onnxruntime"])
    assert engine.chosen_because.startswith(
        f"{folder / ONNX_FILE} lies beside the weights; passed over: {file}: expected an export of "
    )
    file.write_text("no xml")
    broken = f"; passed over: {file}: expected OpenVINO's form: no XML, or too large"
    assert load_engine(folder).chosen_because.endswith(broken)
    engines.names()
    file.write_text(text.replace(weights, weights[::-1]))
    config = json.loads((folder / CONFIG_FILE).read_text())
    config["preprocess"]["mean"][0] += 1
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"model\.xml: expected an export of"):
        load_engine(folder)


def test_the_mode_is_openvinos_alone(
    exported_classifier_folder: Path, engines: MadeUpEngines
) -> None:
    load_engine(exported_classifier_folder, engine="onnxruntime", mode="throughput")
    load_engine(exported_classifier_folder, engine="openvino", mode="throughput")
    assert engines.modes == ["none", "throughput"]
    engines.ms["openvino"] = 0.5
    engines.modes.clear()
    # Measured with one batch at a time, then loaded for several.
    assert load_engine(exported_classifier_folder, mode="throughput").name == "openvino"
    assert engines.modes == ["latency", "none", "throughput"]
