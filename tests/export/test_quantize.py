"""Eight bits through the command line and the gate: what is kept, what is refused, what is left."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vovnet import Classifier
from vovnet.cli import export as cli_export
from vovnet.cli import main as command_line
from vovnet.errors import ConfigError
from vovnet.export import quantize as quantizing
from vovnet.export.model import Export, Source, export_model, load_source
from vovnet.export.quantize import Accuracy, Trial, export_int8, make_trial
from vovnet.exported import OPENVINO_FILE, read_export_info, sha256
from vovnet.model_folder import WEIGHTS_FILE, load_config, load_tensors, save_model_folder
from vovnet.runtime.engine import load_engine

Run = Callable[..., tuple[int, str, str]]
PER_CLASS = 4


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vovnet", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            command_line.main()
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return call


def pictures(count: int) -> list[np.ndarray]:
    """Coarse mosaics of arbitrary colours."""
    random = np.random.default_rng(0)
    squares = [random.integers(0, 256, (n % 7 + 1, n % 5 + 1, 3), np.uint8) for n in range(count)]
    return [np.kron(one, np.ones((72 // len(one), 16, 1), np.uint8)) for one in squares]


@pytest.fixture(scope="module")
def folder(classifier_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The classifier, with a bias that makes its classes about as frequent."""
    tensors = load_tensors(classifier_folder)
    logits = Classifier.load(classifier_folder, device="cpu").logits(pictures(60))
    tensors["head.fc.bias"] -= logits.mean(0)
    tensors["head.fc.weight"] /= logits.std(0)[:, None]
    tensors["head.fc.bias"] /= logits.std(0)
    folder = tmp_path_factory.mktemp("models") / "even"
    save_model_folder(folder, load_config(classifier_folder), tensors, card="# small\n")
    return folder


@pytest.fixture(scope="module")
def float_file(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its export in float."""
    file = tmp_path_factory.mktemp("float") / "model.xml"
    assert export_model(load_source(folder), file, pictures(2), format="openvino").problems == []
    return file


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
def black_dir(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same to judge by, with black pictures to calibrate on."""
    folder = tmp_path_factory.mktemp("black") / "data"
    shutil.copytree(data_dir, folder)
    for file in (folder / "train").rglob("*.png"):
        Image.new("RGB", (80, 80)).save(file)
    return folder


@pytest.fixture
def source(folder: Path, float_file: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    """The network, which need not be exported in float again."""

    def copy(source: Source, output: Path, pictures: object, *, format: str) -> Export:
        for suffix in (".bin", ".xml"):
            shutil.copyfile(float_file.with_suffix(suffix), output.with_suffix(suffix))
        return Export((output, output.with_suffix(".bin")), ())

    monkeypatch.setattr(quantizing, "export_model", copy)
    return load_source(folder)


def judged_by(trial: Trial, values: Sequence[float]) -> Trial:
    """The trial with accuracies told beforehand: of the float file, then of each try."""
    told: Iterator[float] = iter(values)
    return replace(trial, measure=lambda engine: Accuracy("top1", next(told), 12))


@pytest.fixture
def trial(source: Source, data_dir: Path) -> Trial:
    return make_trial(source, data_dir, "val", calibration=2)


def test_through_the_command_line(run: Run, folder: Path, data_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(folder, tmp_path / "model")
    options = ("--format", "openvino", "--precision", "int8", "--calibration", 6)
    code, out, err = run("export", folder, *options, "--data", data_dir, "--json")
    assert (code, err) == (0, "")
    report, file = json.loads(out), folder / OPENVINO_FILE
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
    assert file.with_suffix(".bin").stat().st_size < 0.55 * weights

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
    source: Source, black_dir: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantizing, "FLOAT_SHARES", (0.1,))
    file = tmp_path / "model.xml"
    file.write_bytes(b"what was there before")
    options = ("--format", "openvino", "--precision", "int8", "--output", file)
    monkeypatch.setattr(cli_export, "load_source", lambda model: source)
    code, out, err = run("export", "unused", *options, "--data", black_dir, "--json")
    assert code == 4, err
    assert "top1: expected at most 0.5 points less than in float, found" in err
    assert f"{file}: not written, for it loses too much" in err
    assert [path.name for path in tmp_path.iterdir()] == ["model.xml"]
    assert file.read_bytes() == b"what was there before"
    report = json.loads(out)
    assert report["files"] == []
    kept = report["int8"]["float_layers"]
    assert f"12 pictures of val), with {len(kept)} layers in float" in err
    assert len(kept) > 1
    assert report["int8"]["accuracy"] < 0.9
    errors = [one["error"] for one in report["blamed"]]
    assert errors == sorted(errors, reverse=True)
    assert len(errors) == 10
    assert errors[0] > 0.5
    assert f"vovnet: {report['blamed'][0]['layer']}: error {100 * errors[0]:.1f} %" in err
    assert all(one["layer"].startswith("classifier.") for one in report["blamed"])


def test_the_worst_layers_stay_in_float_where_that_helps(
    source: Source, trial: Trial, tmp_path: Path
) -> None:
    told = judged_by(trial, [0.9, 0.8, 0.896])
    file = tmp_path / "model.xml"
    done = export_int8(source, file, [], trial=told, max_drop=0.5)
    assert (done.problems, done.files) == ((), (file, file.with_suffix(".bin")))
    info = read_export_info(file).int8
    assert info is not None
    assert (info.accuracy, info.float_accuracy, len(info.float_layers)) == (0.896, 0.9, 2)
    assert all(name.startswith("classifier.s") for name in info.float_layers)
    assert done.run_in_float >= 2


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
def test_what_cannot_be_is_refused(
    run: Run, classifier_folder: Path, options: tuple[str, ...], message: str
) -> None:
    code, _, err = run("export", classifier_folder, "--precision", "int8", *options)
    assert code == 2
    assert message in err


def test_a_data_set_without_the_split_is_bad_data(
    run: Run, classifier_folder: Path, data_dir: Path
) -> None:
    options = ("--format", "openvino", "--precision", "int8", "--data", data_dir)
    code, _, err = run("export", classifier_folder, *options, "--split", "test")
    assert code == 3
    assert "expected test/CLASS/" in err


@pytest.mark.parametrize(
    ("file", "engine", "message"),
    [
        (OPENVINO_FILE, "openvino", "expected a file in int8, which `vovnet export"),
        ("", "torch", "expected fp32, bf16 or fp16 for the engine torch, got 'int8'"),
        ("model.onnx", "onnxruntime", "expected fp32 of onnxruntime on the CPU, got 'int8'"),
    ],
)
def test_int8_is_only_what_was_quantised(
    exported_classifier_folder: Path, file: str, engine: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_engine(exported_classifier_folder / file, engine=engine, precision="int8")
