"""`vovnet export`: what is written where, what is refused, and that a wrong file never stays."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from vovnet import Classifier
from vovnet.cli import main as command_line
from vovnet.errors import ConfigError
from vovnet.export import model as exporting
from vovnet.exported import ONNX_FILE, OPENVINO_FILE, read_export_info, sha256
from vovnet.model_folder import CONFIG_FILE, WEIGHTS_FILE, load_config
from vovnet.profiling.target import find_target

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vovnet", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            command_line.main()
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return call


def test_a_classifier_with_half_the_bytes(
    run: Run, classifier_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(classifier_folder, tmp_path / "model")
    training = {"data": 'made-up <&> "data"', "minutes": 3.5, "config": {"seed": 1}}
    told = load_config(folder).model_copy(update={"training": training, "cost": {"macs": 1}})
    (folder / CONFIG_FILE).write_text(told.model_dump_json())
    file = tmp_path / "new" / "small.xml"
    picture = tmp_path / "picture.png"
    pixels = np.random.default_rng(0).integers(0, 256, (70, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(picture)
    options = ("--format", "openvino", "--precision", "fp16", "--images", picture)
    code, out, err = run("export", folder, "--output", file, *options, "--json")
    assert (code, err.splitlines()) == (
        0,
        [
            "vovnet: exporting to openvino, fp16",
            "vovnet: comparing openvino with torch",
        ],
    )
    report = json.loads(out)
    assert report["files"] == [str(file), str(file.with_suffix(".bin"))]
    (comparison,) = report["comparisons"]
    assert (comparison["engine"], comparison["compared"]) == ("openvino", 1)
    assert 0 < comparison["differences"]["logits"] < 1e-5
    assert sorted(path.name for path in file.parent.iterdir()) == ["small.bin", "small.xml"]
    assert (load_config(file).training, load_config(file).cost) == (training, {})
    weights = (classifier_folder / WEIGHTS_FILE).stat().st_size
    assert file.with_suffix(".bin").stat().st_size < 0.55 * weights
    exported, torch_s = Classifier.load(file), Classifier.load(classifier_folder)
    assert exported.class_names == torch_s.class_names == ("кот", "개", "bird")
    np.testing.assert_allclose(exported.logits([pixels]), torch_s.logits([pixels]), rtol=0.02)
    assert (exported.logits([pixels]) != torch_s.logits([pixels])).any()


def test_what_the_file_says(exported_folder: Path) -> None:
    config = load_config(exported_folder)
    for name in (ONNX_FILE, OPENVINO_FILE):
        found, info = load_config(exported_folder / name), read_export_info(exported_folder / name)
        assert found.class_names == config.class_names
        assert found.category_ids == config.category_ids
        assert found.preprocess == config.preprocess
        assert found.licence == config.licence
        assert info.weights_sha256 == sha256(exported_folder / WEIGHTS_FILE)
        assert (info.max_detections, info.has_masks, info.raw) == (20, True, False)
    content = (exported_folder / ONNX_FILE).read_bytes()
    for part in (str(Path.home()).encode(), b"site-packages", b'.py"'):
        assert part not in content
    model = onnx.load(exported_folder / ONNX_FILE)
    assert [entry.version for entry in model.opset_import if not entry.domain] == [20]
    shapes = {
        value.name: [one.dim_value or one.dim_param for one in value.type.tensor_type.shape.dim]
        for value in model.graph.input
    }
    assert list(shapes) == ["images", "sizes", "min_score"]
    assert [type(side) for side in shapes["images"]] == [str, str, str, int]


def test_a_file_that_differs_is_not_kept(
    run: Run, classifier_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fuse = exporting.fuse_network
    monkeypatch.setattr(
        exporting, "fuse_network", lambda network, std: fuse(network, std=std[::-1])
    )
    file = tmp_path / "model.onnx"
    file.write_bytes(b"what was there before")
    code, _, err = run("export", classifier_folder, "--output", file)
    assert code == 4
    assert "onnxruntime: logits: expected a difference of at most 0.001" in err
    assert "openvino: logits" in err
    assert "not written, for it differs from torch" in err
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert file.read_bytes() == b"what was there before"


@pytest.mark.parametrize("options", [(), ("--raw",), ("--output", "new/deep/model.onnx")])
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit(143), ConfigError])
def test_an_export_that_is_stopped_leaves_nothing(
    run: Run,
    classifier_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    error: type[BaseException] | BaseException,
) -> None:
    def stop(source: object, path: Path, **settings: object) -> None:
        path.write_bytes(b"half")
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(exporting, "_write", stop)
    folder = shutil.copytree(classifier_folder, tmp_path / "model")
    before = sorted(tmp_path.rglob("*"))
    code, _, _ = run("export", folder, *options)
    assert code == (143 if isinstance(error, SystemExit) else 2 if error is ConfigError else 130)
    assert sorted(tmp_path.rglob("*")) == before


def test_predict_with_an_exported_file(
    run: Run, exported_classifier_folder: Path, tmp_path: Path
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (70, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    answers = []
    for model, engine in (
        (exported_classifier_folder, "torch"),
        (exported_classifier_folder / ONNX_FILE, "auto"),
        (exported_classifier_folder / OPENVINO_FILE, "openvino"),
    ):
        common = ("--source", tmp_path / "picture.png", "--output", tmp_path / "out", "--json")
        code, out, err = run("predict", "--model", model, "--engine", engine, *common)
        assert code == 0, err
        assert ("engine onnxruntime, fp32: it runs .onnx files" in err) == (engine == "auto")
        answers.append(json.loads(out)["predictions"])
    shares = [[one["probability"] for one in entry[0]["classes"]] for entry in answers]
    names = [[one["class_name"] for one in entry[0]["classes"]] for entry in answers]
    assert len(set(shares[0])) == len(names[0]) == 3
    for found, order in zip(shares[1:], names[1:], strict=True):
        assert order == names[0]
        assert found == pytest.approx(shares[0], abs=1e-4)


def test_profile_takes_exported_files(
    run: Run, exported_classifier_folder: Path, tmp_path: Path
) -> None:
    target = find_target(str(exported_classifier_folder / OPENVINO_FILE))
    assert (target.kind, target.task) == ("folder", "classify")
    models = [exported_classifier_folder / name for name in (ONNX_FILE, OPENVINO_FILE)]
    few = ("--image-size", 64, "--rounds", 2, "--max-seconds", 1, "--cold-starts", 0)
    off = ("--no-energy", "--no-end-to-end", "--no-roofline", "--json")
    code, out, err = run("profile", *models, *few, *off)
    assert code == 0, err
    measured = {model["name"]: model["results"][0] for model in json.loads(out)["models"]}
    assert measured["model.onnx"]["engine"] == "onnxruntime"
    assert measured["model.xml"]["engine"] == "openvino"


def test_a_program_of_torch(run: Run, classifier_folder: Path, tmp_path: Path) -> None:
    """Written beside the weights, then predicted with and profiled."""
    folder = tmp_path / "model"
    shutil.copytree(classifier_folder, folder)
    code, out, err = run("export", folder, "--format", "torch-export", "--json")
    assert code == 0, err
    file = folder / "model.pt2"
    assert json.loads(out)["files"] == [str(file)]
    pixels = np.random.default_rng(0).integers(0, 256, (70, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    shares = []
    for model in (folder, file):
        common = ("--source", tmp_path / "picture.png", "--output", tmp_path / "out", "--json")
        code, out, err = run("predict", "--model", model, *common)
        assert code == 0, err
        assert ("engine torch-export, fp32: it runs .pt2 files" in err) == (model == file)
        (entry,) = json.loads(out)["predictions"]
        shares.append([one["probability"] for one in entry["classes"]])
    assert shares[1] == pytest.approx(shares[0], abs=1e-4)
    few = ("--image-size", 64, "--rounds", 2, "--max-seconds", 1, "--cold-starts", 0)
    off = ("--no-energy", "--no-end-to-end", "--no-roofline", "--json")
    code, out, err = run("profile", file, *few, *off)
    assert code == 0, err
    (model,) = json.loads(out)["models"]
    assert model["results"][0]["engine"] == "torch-export"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--format", "caffe"), "format: expected onnx or openvino or torch-export, got 'caffe'"),
        (("--format", "tensorrt"), "--format onnx, then the trtexec line of docs/deploy.md"),
        (("--format", "torch-export", "--output", "model.onnx"), "output: expected a .pt2 file"),
        (("--precision", "fp8"), "precision: expected fp32 or fp16 or int8, got 'fp8'"),
        (("--output", "model.xml"), "output: expected a .onnx file"),
        (("--raw",), "expected a detector for --raw"),
    ],
)
def test_what_cannot_be_is_refused(
    run: Run, classifier_folder: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    arguments = options if "--output" in options else (*options, "--output", tmp_path / "a.onnx")
    code, _, err = run("export", classifier_folder, *arguments)
    assert code == 2
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_an_exported_file_is_no_source(run: Run, exported_classifier_folder: Path) -> None:
    code, _, err = run("export", exported_classifier_folder / ONNX_FILE)
    assert code == 2
    assert "expected a model folder or name, got an exported file" in err
