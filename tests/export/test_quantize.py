"""Eight bits through the command line and the gate: what is kept, what is refused, what is left."""

import importlib
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from vovnet import Classifier, create_model
from vovnet.cli import export as cli_export
from vovnet.cli import main as command_line
from vovnet.errors import ConfigError
from vovnet.export import quantize as quantizing
from vovnet.export.model import Export, Format, Progress, Source, export_model, load_source
from vovnet.export.quantize import Accuracy, Pixels, Trial, export_int8, make_trial
from vovnet.exported import ONNX_FILE, OPENVINO_FILE, read_export_info, sha256
from vovnet.model_folder import WEIGHTS_FILE, ModelConfig, load_config, save_model_folder
from vovnet.preprocess import Preprocess
from vovnet.runtime.engine import load_engine

PER_CLASS = 4
VARIANT, SMALL = "ese_vovnet19b_slim_dw", {"layers_per_block": 1}
INT8 = ("--format", "openvino", "--precision", "int8")


def run(*arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command line."""
    out, err = StringIO(), StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["vovnet", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            command_line.main()
    return int(stopped.value.code or 0), out.getvalue(), err.getvalue()


def pictures(count: int) -> list[np.ndarray]:
    """Coarse mosaics of arbitrary colours."""
    random = np.random.default_rng(0)
    squares = [random.integers(0, 256, (n % 7 + 1, n % 5 + 1, 3), np.uint8) for n in range(count)]
    return [np.kron(one, np.ones((72 // len(one), 16, 1), np.uint8)) for one in squares]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier with a last layer that makes its three classes about as frequent."""
    torch.manual_seed(0)
    model = create_model(VARIANT, num_classes=3, overrides=SMALL)
    config = ModelConfig(
        architecture=VARIANT,
        model_args={"num_classes": 3, "overrides": SMALL},
        task="classify",
        class_names=["кот", "개", "bird"],
        category_ids=[0, 1, 2],
        preprocess=Preprocess(short_side=72, max_long_side=None, crop_size=64).to_dict(),
        licence="Apache-2.0",
    )
    folder = tmp_path_factory.mktemp("models") / "even"
    tensors = {name: value.numpy() for name, value in model.state_dict().items()}
    save_model_folder(folder, config, tensors, card="# small\n")
    logits = Classifier.load(folder, device="cpu").logits(pictures(60))
    tensors["head.fc.bias"] -= logits.mean(0)
    tensors["head.fc.weight"] /= logits.std(0)[:, None]
    tensors["head.fc.bias"] /= logits.std(0)
    save_model_folder(folder, config, tensors, card="# small\n")
    return folder


@pytest.fixture(scope="module")
def data_dir(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures that the network in float is surest of, by the classes that it gives them; train
    has the same.
    """
    data_dir = tmp_path_factory.mktemp("data")
    classifier, made = Classifier.load(folder, device="cpu"), pictures(60)
    logits = classifier.logits(made)
    margins = np.diff(np.sort(logits, axis=1)[:, -2:], axis=1)[:, 0]
    for label, name in enumerate(classifier.class_names):
        own = [n for n in np.argsort(-margins) if logits[n].argmax() == label][:PER_CLASS]
        assert len(own) == PER_CLASS
        for split in ("train", "val"):
            (data_dir / split / name).mkdir(parents=True)
            for n in own:
                Image.fromarray(made[n]).save(data_dir / split / name / f"{n}.png")
    return data_dir


@pytest.fixture(scope="module")
def empty_dir(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same to judge by; what it is calibrated on has the mean colour, nothing for a network."""
    folder = tmp_path_factory.mktemp("empty") / "data"
    colour = tuple(round(value) for value in Preprocess().mean)
    shutil.copytree(data_dir, folder)
    for file in (folder / "train").rglob("*.png"):
        Image.new("RGB", (80, 80), colour).save(file)
    return folder


class Whole(NamedTuple):
    """An export through the command line, with what it wrote on the way."""

    folder: Path
    float_file: Path
    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def whole(folder: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """A copy of the folder with its export in int8, and the float file that this came from."""
    base = tmp_path_factory.mktemp("whole")
    copy, float_file = shutil.copytree(folder, base / "model"), base / "float" / "model.xml"
    float_file.parent.mkdir()

    def keep(
        source: Source,
        output: Path,
        pictures: Sequence[Pixels],
        *,
        format: Format,
        progress: Progress,
    ) -> Export:
        done = export_model(source, output, pictures, format=format, progress=progress)
        for suffix in (".bin", ".xml"):
            shutil.copyfile(output.with_suffix(suffix), float_file.with_suffix(suffix))
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantizing, "export_model", keep)
        patch.setattr(quantizing, "TOLD_EVERY_S", float("inf"))
        answer = run("export", copy, *INT8, "--calibration", 6, "--data", data_dir, "--json")
    return Whole(copy, float_file, *answer)


@pytest.fixture
def source(whole: Whole, monkeypatch: pytest.MonkeyPatch) -> Source:
    """The network, which need not be exported in float again."""

    def copy(
        source: Source, output: Path, pictures: object, *, format: str, **rest: object
    ) -> Export:
        for suffix in (".bin", ".xml"):
            shutil.copyfile(whole.float_file.with_suffix(suffix), output.with_suffix(suffix))
        return Export((output, output.with_suffix(".bin")), ())

    monkeypatch.setattr(quantizing, "export_model", copy)
    return load_source(whole.folder)


def judged_by(trial: Trial, values: Sequence[float]) -> Trial:
    """The trial with accuracies told beforehand: of the float file, then of each try."""
    told: Iterator[float] = iter(values)
    return replace(trial, measure=lambda engine: Accuracy("top1", next(told), 12))


@pytest.fixture
def trial(source: Source, data_dir: Path) -> Trial:
    return make_trial(source, data_dir, "val", calibration=2)


def test_through_the_command_line(whole: Whole, data_dir: Path, tmp_path: Path) -> None:
    stages = (
        "exporting to openvino, fp32",
        "comparing openvino with torch",
        "measuring accuracy on the split val in float",
        "measuring accuracy in int8",
    )
    lines = whole.err.splitlines()
    assert whole.code == 0
    for line, stage in zip(lines, stages, strict=True):
        assert line.startswith(f"vovnet: {stage}")
    folder, report = whole.folder, json.loads(whole.out)
    file = folder / OPENVINO_FILE
    assert report["files"] == [str(file), str(file.with_suffix(".bin"))]
    assert sorted(path.name for path in file.parent.iterdir()) == ["model.bin", "model.xml"]
    assert report["convolutions_in_int8"] > 4 * report["convolutions_in_float"]
    info = read_export_info(file)
    assert (info.precision, info.weights_sha256) == ("int8", sha256(folder / WEIGHTS_FILE))
    assert info.int8 is not None
    assert report["int8"] == info.int8.model_dump()
    assert (info.int8.metric, info.int8.split, info.int8.pictures) == ("top1", "val", 12)
    assert (info.int8.float_accuracy, info.int8.accuracy) == (1.0, 1.0)
    assert (info.int8.calibration_pictures, info.int8.float_layers) == (6, [])
    assert load_config(file).class_names == load_config(folder).class_names
    weights = (folder / WEIGHTS_FILE).stat().st_size
    assert file.with_suffix(".bin").stat().st_size < 0.65 * weights  # gates stay in float

    engine = load_engine(folder)  # what lies beside the weights
    assert (engine.name, engine.precision) == ("openvino", "int8")
    code, out, err = run("val", "--model", file, "--data", data_dir, "--json", "--bootstrap", 0)
    assert (code, json.loads(out)["top1"]) == (0, info.int8.accuracy), err
    picture = min((data_dir / "val").rglob("*.png"))
    common = ("--source", picture, "--output", tmp_path / "out", "--json")
    code, out, err = run("predict", "--model", folder, *common)
    assert code == 0, err
    assert "engine openvino, int8" in err
    (answer,) = json.loads(out)["predictions"]
    assert answer["classes"][0]["class_name"] == picture.parent.name
    exact = Classifier.load(folder, engine="torch").logits([np.asarray(Image.open(picture))])
    found = Classifier.load(file, precision="fp32").logits([np.asarray(Image.open(picture))])
    assert 1e-5 < np.abs(found - exact).max() / np.ptp(exact) < 0.5


def test_what_loses_too_much_is_refused(
    source: Source, empty_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantizing, "FLOAT_SHARES", (0.01,))
    file = tmp_path / "model.xml"
    file.write_bytes(b"what was there before")
    monkeypatch.setattr(cli_export, "load_source", lambda model: source)
    code, out, err = run("export", "unused", *INT8, "--output", file, "--data", empty_dir, "--json")
    assert code == 4, err
    assert "top1: expected at most 0.5 points less than in float, found" in err
    assert f"{file}: not written, for it loses too much" in err
    assert [path.name for path in tmp_path.iterdir()] == ["model.xml"]
    assert file.read_bytes() == b"what was there before"
    report = json.loads(out)
    assert report["files"] == []
    kept = report["int8"]["float_layers"]
    assert f"12 pictures of val), with {len(kept)} layers in float" in err
    assert len(kept) == 1
    assert report["int8"]["accuracy"] < report["int8"]["float_accuracy"]
    errors = [one["error"] for one in report["blamed"]]
    assert errors == sorted(errors, reverse=True)
    assert len(errors) == 10
    assert errors[0] > 0.5
    assert f"vovnet: {report['blamed'][0]['layer']}: error {100 * errors[0]:.1f} %" in err
    assert all(one["layer"].startswith("classifier.") for one in report["blamed"])


def test_the_worst_layers_stay_in_float_where_that_helps(
    source: Source, whole: Whole, trial: Trial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantizing, "FLOAT_SHARES", (0.01, 1.0))  # one layer, then all
    told = judged_by(trial, [0.9, 0.8, 0.896])
    file = tmp_path / "model.xml"
    done = export_int8(source, file, [], trial=told, max_drop=0.5)
    assert (done.problems, done.files) == ((), (file, file.with_suffix(".bin")))
    info = read_export_info(file).int8
    assert info is not None
    assert (info.accuracy, info.float_accuracy, len(info.float_layers)) == (0.896, 0.9, 1)
    assert all(name.startswith("classifier.s") for name in info.float_layers)
    assert done.run_in_float > json.loads(whole.out)["convolutions_in_float"]


def test_what_answers_otherwise_than_in_float_is_refused(
    source: Source, trial: Trial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantizing, "FLOAT_SHARES", (0.0,))
    monkeypatch.setattr(quantizing, "quantize", lambda model, feeds, *, keep_float: spoil(model))
    monkeypatch.setattr(quantizing, "layer_errors", lambda model, quantized, feeds: {})
    told = judged_by(trial, [0.9, 0.9, 0.9])
    done = export_int8(source, tmp_path / "model.xml", pictures(1), trial=told, max_drop=0.5)
    assert done.problems == ("logits: expected finite values, found others",)
    assert (done.files, list(tmp_path.iterdir())) == ((), [])


def spoil(model: Any) -> Any:
    """The network with logits divided by zero."""
    ops: Any = importlib.import_module("openvino.opset13")
    (result,) = (one for one in model.get_results() if "logits" in one.input_value(0).get_names())
    broken = ops.divide(result.input_value(0), ops.constant(np.float32(0)))
    broken.output(0).set_names({"logits"})
    result.input_value(0).set_names(set())
    result.input(0).replace_source_output(broken.output(0))
    return model


def test_of_a_head_that_every_level_runs_the_largest_error_is_told() -> None:
    errors = {"node_3": 0.3, "node_1": 0.2, "node_2": 0.1}
    names = {"node_1": "stem", "node_2": "head", "node_3": "head"}
    assert quantizing._by_weight(errors, names) == (("head", 0.3), ("stem", 0.2))


def test_a_measurement_tells_how_far_it_is(
    source: Source, data_dir: Path, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    total, said = 3 * PER_CLASS, list[str]()
    engine = Classifier.load(whole.folder, device="cpu", engine="torch").engine
    for every_s, expected in ((0.0, [f"{total} of {total} pictures"]), (60.0, [])):
        said.clear()
        monkeypatch.setattr(quantizing, "TOLD_EVERY_S", every_s)
        trial = make_trial(source, data_dir, "val", calibration=2, progress=said.append)
        trial.measure(engine)
        assert said == expected


def test_a_detector_counts_each_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(quantizing, "TOLD_EVERY_S", 0.0)
    data = SimpleNamespace(images=[0, 1, 2])
    source = SimpleNamespace(
        config=SimpleNamespace(
            class_names=["a"], category_ids=[1], preprocess=Preprocess().to_dict(), task="detect"
        )
    )
    engine = SimpleNamespace(has_masks=False, max_detections=5)
    monkeypatch.setattr(
        quantizing, "predict_images", lambda predict, data: ([{}] for _ in range(3))
    )
    monkeypatch.setattr(quantizing, "has_masks", lambda data: False)
    judged: list[object] = []

    def evaluate(data: object, found: list[object], **settings: object) -> SimpleNamespace:
        judged.extend(found)
        return SimpleNamespace(main=lambda: 0.5)

    monkeypatch.setattr(quantizing, "evaluate_coco", evaluate)
    found = quantizing._measure_detections(source, data, said.append, engine)
    assert (found.value, found.pictures, judged) == (0.5, 3, [{}, {}, {}])
    assert said == ["1 of 3 pictures", "2 of 3 pictures", "3 of 3 pictures"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ConfigError])
def test_nothing_is_left_behind(
    source: Source, trial: Trial, tmp_path: Path, error: type[BaseException]
) -> None:
    def stop(engine: object) -> Accuracy:
        assert list(tmp_path.iterdir()) != []
        raise error

    with pytest.raises(error):
        export_int8(
            source, tmp_path / "model.xml", [], trial=replace(trial, measure=stop), max_drop=0.5
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--format", "openvino"), "data: expected --data for int8, a data set"),
        (("--data", "."), "format: expected openvino for int8, got 'onnx'"),
        (("--format", "openvino", "--data", ".", "--raw"), "raw: expected a whole export for int8"),
        (("--precision", "fp32", "--data", "."), "data: expected none but for --precision int8"),
    ],
)
def test_what_cannot_be_is_refused(folder: Path, options: tuple[str, ...], message: str) -> None:
    code, _, err = run("export", folder, "--precision", "int8", *options)
    assert code == 2
    assert message in err


def test_a_data_set_without_the_split_is_bad_data(folder: Path, data_dir: Path) -> None:
    code, _, err = run("export", folder, *INT8, "--data", data_dir, "--split", "test")
    assert code == 3
    assert "expected test/CLASS/" in err


def test_int8_is_only_what_was_quantised(whole: Whole) -> None:
    with pytest.raises(ConfigError, match="expected a file in int8, which `vovnet export"):
        load_engine(whole.float_file, precision="int8")
    with pytest.raises(ConfigError, match="for the engine torch, got 'int8'"):
        load_engine(whole.folder, engine="torch", precision="int8")


def test_onnxruntime_has_no_int8(exported_classifier_folder: Path) -> None:
    with pytest.raises(ConfigError, match="expected fp32 of onnxruntime on the CPU, got 'int8'"):
        load_engine(exported_classifier_folder / ONNX_FILE, precision="int8")
