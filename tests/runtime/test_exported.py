"""Engines beside torch: the same answers from exported files, without torch or a network."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vovnet import Classifier, Predictor
from vovnet.errors import ConfigError
from vovnet.exported import ONNX_FILE, OPENVINO_FILE
from vovnet.files import atomic_write_text
from vovnet.model_folder import CONFIG_FILE, WEIGHTS_FILE
from vovnet.runtime.engine import load_engine
from vovnet.runtime.openvino import openvino_core
from vovnet.runtime.stream import infer_stream

WAYS = [
    (ONNX_FILE, "onnxruntime"),
    (ONNX_FILE, "openvino"),
    (OPENVINO_FILE, "openvino"),
]

FRESH_PROCESS = """
import sys
seen = []
watched = ("socket.connect", "socket.getaddrinfo", "socket.sendto", "subprocess.Popen",
           "os.posix_spawn", "os.fork", "os.system", "os.exec")
sys.addaudithook(lambda event, arguments: seen.append(event) if event in watched else None)
import numpy as np
from vovnet.classify import Classifier, is_classifier
from vovnet.predict import Predictor
picture = np.random.default_rng(0).integers(0, 256, (90, 80, 3), dtype=np.uint8)
(Classifier if is_classifier(sys.argv[1]) else Predictor).load(sys.argv[1])(picture)
loaded = [name for name in ("torch", "torchvision", "timm", "onnx") if name in sys.modules]
print(seen, loaded)
"""


def noise(height: int, width: int, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(("file", "engine"), WAYS)
def test_a_detector_answers_as_in_torch(exported_folder: Path, file: str, engine: str) -> None:
    limits = {"score_threshold": 0.05, "max_detections": 7}  # its scores lie close to 0.1
    torch_s = Predictor.load(exported_folder, engine="torch", **limits)
    ours = Predictor.load(exported_folder / file, engine=engine, **limits)
    assert (ours.engine.name, ours.engine.precision, ours.engine.device) == (engine, "fp32", "cpu")
    assert (ours.class_names, ours.category_ids) == (torch_s.class_names, torch_s.category_ids)
    assert ours.preprocess == torch_s.preprocess
    for picture in (noise(70, 50), noise(33, 121, seed=1)):
        expected, found = torch_s(picture), ours(picture)
        assert len(expected) == 7
        assert found.labels.tolist() == expected.labels.tolist()
        np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)
        np.testing.assert_allclose(found.boxes_xyxy, expected.boxes_xyxy, atol=1e-2)
        np.testing.assert_allclose(found.mask_scores, expected.mask_scores, atol=1e-3)
        for mine, theirs in zip(found.masks, expected.masks, strict=True):
            assert (mine.x, mine.y) == (theirs.x, theirs.y)
            assert (mine.pixels != theirs.pixels).mean() < 0.01


@pytest.mark.parametrize(("height", "width"), [(20, 20), (15, 90), (90, 15)])
def test_openvino_takes_pictures_below_its_least_side(
    exported_folder: Path, height: int, width: int
) -> None:
    """Its pools take no map of two cells; the padding is nothing that can be found."""
    ours = Predictor.load(exported_folder / OPENVINO_FILE, engine="openvino", score_threshold=0.0)
    assert min(ours.preprocess.batch([noise(height, width)])[0].shape[1:3]) == 32
    found = ours(noise(height, width))
    assert len(found) > 0
    assert (found.boxes_xyxy <= [width, height, width, height]).all()


@pytest.mark.parametrize(("file", "engine"), WAYS)
def test_the_least_score_is_the_predictors(exported_folder: Path, file: str, engine: str) -> None:
    every = Predictor.load(exported_folder / file, engine=engine, score_threshold=0.0)
    batch = every.preprocess.batch([noise(64, 96)])
    found = every.engine.infer(*batch)
    scores = found["scores"][found["valid"]]
    limit = float(np.sort(scores)[len(scores) // 2])
    fewer = Predictor.load(exported_folder / file, engine=engine, score_threshold=limit)
    assert fewer.engine.infer(*batch)["valid"].sum() == (scores >= limit).sum() < len(scores)


@pytest.mark.parametrize(("file", "engine"), WAYS)
def test_a_classifier_answers_as_in_torch(
    exported_classifier_folder: Path, file: str, engine: str
) -> None:
    torch_s = Classifier.load(exported_classifier_folder, engine="torch")
    ours = Classifier.load(exported_classifier_folder / file, engine=engine, threads=1)
    assert ours.class_names == torch_s.class_names
    pictures = [noise(64, 90), noise(200, 100, seed=1), noise(72, 72, seed=2)]
    for count in (1, 3):
        expected = torch_s.logits(pictures[:count])
        assert np.ptp(expected) > 0.1
        np.testing.assert_allclose(ours.logits(pictures[:count]), expected, atol=1e-4)
        np.testing.assert_allclose(
            ours.embeddings(pictures[:count]), torch_s.embeddings(pictures[:count]), atol=1e-4
        )
    assert ours.engine.max_detections == 0


@pytest.mark.parametrize("file", [ONNX_FILE, OPENVINO_FILE])
@pytest.mark.parametrize("folder", ["exported_folder", "exported_classifier_folder"])
def test_no_torch_no_network_nothing_written(
    folder: str, file: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    path = request.getfixturevalue(folder) / file
    before = sorted(path.parent.rglob("*"))
    environment = {key: value for key, value in os.environ.items() if key != "CI"}
    source = str(Path(__file__).parents[2] / "src")
    done = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS, str(path)],
        env=environment | {"HOME": str(tmp_path), "PYTHONPATH": source, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "[] []\n"), done.stderr
    assert list(tmp_path.rglob("*")) == []
    assert sorted(path.parent.rglob("*")) == before


def test_a_known_engine_answers_without_torch_and_without_the_other(
    exported_classifier_folder: Path, tmp_path: Path
) -> None:
    """Of a folder the first process measures, in the cache alone; the second only reads."""
    source = str(Path(__file__).parents[2] / "src")
    environment = {key: value for key, value in os.environ.items() if key != "CI"}
    environment |= {"HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    environment |= {"PYTHONPATH": source, "OMP_NUM_THREADS": "1"}
    script = FRESH_PROCESS + "print(sorted({'openvino', 'onnxruntime'} & set(sys.modules)))\n"
    before = sorted(exported_classifier_folder.rglob("*"))
    said = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", script, str(exported_classifier_folder)],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stdout.splitlines())
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == [
            tmp_path / "cache" / "vovnet" / "engines.json"
        ]
    assert said[0] == ["[] []", "['onnxruntime', 'openvino']"]
    assert said[1] in (["[] []", "['onnxruntime']"], ["[] []", "['openvino']"])
    assert sorted(exported_classifier_folder.rglob("*")) == before


def test_batches_at_the_same_time_answer_as_one_at_a_time(exported_folder: Path) -> None:
    fast = load_engine(exported_folder, engine="openvino", threads=2, mode="throughput")
    plain = load_engine(exported_folder, engine="openvino")
    assert (fast.parallel > 1, plain.parallel) == (True, 1)
    batches = [(noise(64, 96, seed=seed)[None], np.array([[64, 90]])) for seed in range(6)]
    for found, batch in zip(infer_stream(fast, batches), batches, strict=True):
        expected = plain.infer(*batch)
        assert found["valid"].sum() == expected["valid"].sum() > 0
        for name in ("boxes", "scores", "mask_probs"):
            np.testing.assert_allclose(found[name], expected[name], atol=1e-4)


SIGNALLED_PROCESS = """
import os, signal, sys
from pathlib import Path
from vovnet.runtime.openvino import load

def engine():
    return load(Path(sys.argv[1]), precision="auto", device="cpu", threads=1, settings={})

first, second = engine(), engine()
del first
del second
signal.signal(signal.SIGTERM, lambda number, frame: print("noted"))
os.kill(os.getpid(), signal.SIGTERM)
"""


def test_a_signal_after_two_engines_have_ended(exported_classifier_folder: Path) -> None:
    """With a Core for each engine it was a segmentation fault."""
    done = subprocess.run(
        [sys.executable, "-c", SIGNALLED_PROCESS, str(exported_classifier_folder / OPENVINO_FILE)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "noted\n"), done.stderr


def test_auto_takes_what_lies_beside_the_weights(
    exported_classifier_folder: Path, classifier_folder: Path
) -> None:
    engine = load_engine(exported_classifier_folder)
    assert engine.name in ("openvino", "onnxruntime")
    assert re.fullmatch(
        r"\d+\.\d ms a picture \(fp32\) against \d+\.\d in (openvino|onnxruntime) \(fp32\), "
        r"measured on this machine on 20\d\d-\d\d-\d\d(, while it was busy)?",
        engine.chosen_because,
    )
    again = load_engine(exported_classifier_folder)
    assert (again.name, again.chosen_because) == (engine.name, engine.chosen_because)
    assert load_engine(exported_classifier_folder, engine="torch").chosen_because == ""
    alone = load_engine(classifier_folder)
    assert (alone.name, alone.chosen_because) == ("torch", "no export lies beside the weights")
    file = load_engine(exported_classifier_folder / ONNX_FILE)
    assert (file.name, file.chosen_because) == ("onnxruntime", "it runs .onnx files")


@pytest.mark.parametrize("engine", ["auto", "openvino", "onnxruntime"])
@pytest.mark.parametrize("changed", ["weights", "preprocess"])
def test_exports_of_a_changed_folder_are_refused(
    exported_classifier_folder: Path, tmp_path: Path, changed: str, engine: str
) -> None:
    folder = shutil.copytree(exported_classifier_folder, tmp_path / "model")
    if changed == "weights":
        content = bytearray((folder / WEIGHTS_FILE).read_bytes())
        content[-1] ^= 1
        (folder / WEIGHTS_FILE).write_bytes(content)
    else:
        config = json.loads((folder / CONFIG_FILE).read_text())
        config["preprocess"]["mean"][0] += 1
        atomic_write_text(folder / CONFIG_FILE, json.dumps(config))
    with pytest.raises(ConfigError, match=r"expected an export of .* as it is now"):
        load_engine(folder, engine=engine)
    assert load_engine(folder, engine="torch").name == "torch"


@pytest.mark.parametrize(
    ("file", "arguments", "message"),
    [
        (ONNX_FILE, {"engine": "torch"}, "engine: expected onnxruntime or openvino for"),
        (OPENVINO_FILE, {"engine": "onnxruntime"}, "engine: expected openvino for"),
        (OPENVINO_FILE, {"device": "cuda"}, "device: expected cpu or auto"),
        (ONNX_FILE, {"precision": "bf16"}, "precision: expected fp32 of onnxruntime"),
        (ONNX_FILE, {"threads": 0}, "threads: expected a whole number"),
        (OPENVINO_FILE, {"threads": 100_000}, "threads: expected a whole number"),
        (ONNX_FILE, {"settings": {"colour": 1}}, "model settings: expected one of min_score"),
        (OPENVINO_FILE, {"settings": {"max_detections": 21}}, r"whole number in 1\.\.20"),
        (OPENVINO_FILE, {"settings": {"min_score": 2}}, r"min_score: expected a number in 0\.\.1"),
    ],
)
def test_wrong_arguments_say_what_was_expected(
    exported_folder: Path, file: str, arguments: dict, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_engine(exported_folder / file, **arguments)


def test_a_precision_that_the_processor_lacks(
    exported_classifier_folder: Path,
) -> None:
    capabilities = openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    file = exported_classifier_folder / OPENVINO_FILE
    for precision in ("bf16", "fp16"):
        if precision.upper() in capabilities:
            assert load_engine(file, precision=precision).precision == precision
        else:
            with pytest.raises(ConfigError, match=r"precision: expected fp32.*this processor has"):
                load_engine(file, precision=precision)


def test_folders_without_an_export_say_how_to_get_one(classifier_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected openvino/model\.xml or model\.onnx.*export"):
        load_engine(classifier_folder, engine="openvino")
    with pytest.raises(ConfigError, match="expected torch for ese_vovnet39b"):
        load_engine("ese_vovnet39b", engine="openvino")


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_broken_files_are_refused(
    exported_classifier_folder: Path, tmp_path: Path, engine: str
) -> None:
    content = (exported_classifier_folder / ONNX_FILE).read_bytes()
    broken = tmp_path / "model.onnx"
    broken.write_bytes(content.replace(b"Conv", b"Vnoc"))
    with pytest.raises(ConfigError, match="expected a network that"):
        load_engine(broken, engine=engine)
    (tmp_path / "other.onnx").write_bytes(b"")
    with pytest.raises(ConfigError, match="expected a file that `vovnet export` wrote"):
        load_engine(tmp_path / "other.onnx", engine=engine)


def test_padded_or_other_sizes_of_a_classifier_are_refused(
    exported_classifier_folder: Path,
) -> None:
    engine = load_engine(exported_classifier_folder / ONNX_FILE)
    images = np.zeros((1, 64, 64, 3), np.uint8)
    with pytest.raises(ValueError, match=r"sizes: expected those of the images, \(64, 64\)"):
        engine.infer(images, np.array([[64, 60]]))
    with pytest.raises(ValueError, match=r"expected height and width \(64, 64\)"):
        engine.infer(images[:, :32], np.array([[32, 64]]))
