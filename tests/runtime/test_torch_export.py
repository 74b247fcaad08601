"""Exported programs of torch: they answer as the network does, and nothing else gets in."""

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vovnet import Classifier
from vovnet.errors import ConfigError
from vovnet.export.check import made_up_pictures
from vovnet.export.model import export_model, load_source
from vovnet.exported import EXPORT_KEY, TORCH_EXPORT_FILE, read_export_info, sha256
from vovnet.model_folder import CONFIG_KEY, WEIGHTS_FILE, load_config
from vovnet.runtime.engine import load_engine
from vovnet.runtime.torch_export import find_foreign, load_program, read_records

CPU = torch.device("cpu")
Records = dict[str, bytes]


@pytest.fixture(scope="module")
def program_file(classifier_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("program") / "small.pt2"
    done = export_model(
        load_source(classifier_folder), file, made_up_pictures(), format="torch-export"
    )
    assert done.problems == []
    assert done.files == (file,)
    assert [one.engine for one in done.comparisons] == ["torch-export"]
    assert 0 < done.comparisons[0].differences["logits"] < 1e-4
    return file


def test_a_classifier_answers_as_in_torch(program_file: Path, classifier_folder: Path) -> None:
    exported, plain = Classifier.load(program_file), Classifier.load(classifier_folder)
    assert exported.engine.name == "torch-export"
    assert exported.engine.chosen_because == "it runs .pt2 files"
    assert exported.class_names == plain.class_names
    pictures = made_up_pictures()
    for batch in (pictures[:1], pictures, pictures * 2):  # one trace for every batch
        np.testing.assert_allclose(exported.logits(batch), plain.logits(batch), rtol=1e-4)
    half = Classifier.load(program_file, precision="bf16")
    assert half.engine.precision == "bf16"
    assert (half.logits(pictures) != plain.logits(pictures)).any()
    np.testing.assert_allclose(half.logits(pictures), plain.logits(pictures), rtol=0.2, atol=2)


def test_what_the_file_holds(program_file: Path, classifier_folder: Path) -> None:
    info, config = read_export_info(program_file), load_config(program_file)
    assert (info.inputs, info.sides, info.precision) == (["images"], (64, 64), "fp32")
    assert info.weights_sha256 == sha256(classifier_folder / WEIGHTS_FILE)
    assert config.class_names == load_config(classifier_folder).class_names
    records = read_records(program_file)
    program = json.loads(records["small/models/model.json"])
    assert program["guards_code"] == []
    assert records["small/data/sample_inputs/model.pt"] == b""
    for part in (str(Path.home()).encode(), b"site-packages", b'.py"'):
        assert part not in program_file.read_bytes()


def test_half_the_bytes(classifier_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "half.pt2"
    given = load_source(classifier_folder), file, made_up_pictures()
    done = export_model(*given, format="torch-export", precision="fp16")
    assert done.problems == []
    assert file.stat().st_size < 0.6 * (classifier_folder / WEIGHTS_FILE).stat().st_size
    plain = Classifier.load(classifier_folder).logits(made_up_pictures())
    found = Classifier.load(file).logits(made_up_pictures())
    np.testing.assert_allclose(found, plain, rtol=0.05, atol=0.5)
    assert (found != plain).any()


def test_a_detector(model_folder: Path, tmp_path: Path) -> None:
    """Each picture alone and both in one batch, whose sides are not those of the trace."""
    file = tmp_path / "detector.pt2"
    done = export_model(load_source(model_folder), file, made_up_pictures(), format="torch-export")
    assert done.problems == []
    assert done.comparisons[0].compared == 4 * 20
    engine = load_engine(file, settings={"max_detections": 3, "min_score": 0.05})
    assert (engine.max_detections, engine.has_masks) == (3, True)
    images = np.zeros((1, 96, 64, 3), np.uint8)
    assert engine.infer(images, np.array([[96, 64]]))["mask_probs"].shape == (1, 3, 28, 28)


def test_beside_the_weights(
    program_file: Path, classifier_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in classifier_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    message = f"expected {TORCH_EXPORT_FILE} for the engine torch-export.*--format torch-export"
    with pytest.raises(ConfigError, match=message):
        load_engine(folder, engine="torch-export")
    (folder / TORCH_EXPORT_FILE).write_bytes(program_file.read_bytes())
    assert load_engine(folder, engine="torch-export").name == "torch-export"
    assert load_engine(folder, engine="auto").name == "torch"
    with pytest.raises(ConfigError, match="expected torch-export for"):
        load_engine(folder / TORCH_EXPORT_FILE, engine="torch")


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_precisions_that_there_are_not(program_file: Path, precision: str) -> None:
    with pytest.raises(ConfigError, match=f"precision: expected fp32.*got '{precision}'"):
        load_engine(program_file, precision=precision, device="cpu")


class Harm:
    """Unpickled, it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


def in_program(change: Callable[[dict[str, Any]], None]) -> Callable[[Records, Path], None]:
    def tamper(records: Records, harm: Path) -> None:
        program = json.loads(records["small/models/model.json"])
        change(program)
        text = json.dumps(program).replace("HARM", str(harm))
        records["small/models/model.json"] = text.encode()

    return tamper


def first_node(program: dict[str, Any]) -> dict[str, Any]:
    node: dict[str, Any] = program["graph_module"]["graph"]["nodes"][0]
    return node


def pickled_inputs(records: Records, harm: Path) -> None:
    records["small/data/sample_inputs/model.pt"] = pickle.dumps(Harm(harm))


def pickled_weight(records: Records, harm: Path) -> None:
    name = "small/data/weights/model_weights_config.json"
    config = json.loads(records[name])
    entry = next(iter(config["config"].values()))
    entry["use_pickle"] = True
    records["small/data/weights/" + entry["path_name"]] = pickle.dumps(Harm(harm))
    records[name] = json.dumps(config).encode()


def pickled_constant(records: Records, harm: Path) -> None:
    name = "small/data/constants/model_constants_config.json"
    config = json.loads(records[name])
    next(iter(config["config"].values()))["path_name"] = "opaque_obj_0"
    records[name] = json.dumps(config).encode()


def other_record(records: Records, harm: Path) -> None:
    records["small/data/aotinductor/model/a.so"] = b""


def a_file_name(program: dict[str, Any]) -> None:
    first_node(program)["target"] = "torch.ops.aten.from_file.default"


def a_function(program: dict[str, Any]) -> None:
    first_node(program)["target"] = "torch.os.system"


def a_guard(program: dict[str, Any]) -> None:
    program["guards_code"] = ["open('HARM', 'w')"]


def a_size(program: dict[str, Any]) -> None:
    values = program["graph_module"]["graph"]["tensor_values"]
    sizes = next(iter(values.values()))["sizes"]
    sizes[0] = {"as_expr": {"expr_str": "open('HARM', 'w')", "hint": None}}


def a_name(program: dict[str, Any]) -> None:
    program["graph_module"]["graph"]["inputs"][0]["as_tensor"]["name"] = "x=open('HARM','w')"


def a_spec(program: dict[str, Any]) -> None:
    entry = program["graph_module"]["module_call_graph"][0]["signature"]
    entry["in_spec"] = entry["in_spec"].replace("builtins.tuple", "os.system")


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (pickled_inputs, "a pickle, 'small/data/sample_inputs/model.pt'"),
        (pickled_weight, "a pickle"),
        (pickled_constant, "path_name 'opaque_obj_0'"),
        (other_record, "the record 'small/data/aotinductor/model/a.so'"),
        (in_program(a_file_name), "target 'torch.ops.aten.from_file.default'"),
        (in_program(a_function), "target 'torch.os.system'"),
        (in_program(a_guard), "guards_code"),
        (in_program(a_size), "expr_str"),
        (in_program(a_name), 'found name "x=open'),
        (in_program(a_spec), "in_spec"),
    ],
)
def test_a_file_that_could_do_more_is_refused(
    program_file: Path, tmp_path: Path, tamper: Callable[[Records, Path], None], message: str
) -> None:
    records, harm, file = read_records(program_file), tmp_path / "harm", tmp_path / "bad.pt2"
    tamper(records, harm)
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    with pytest.raises(ConfigError, match="expected what `vovnet export` writes, found") as caught:
        load_program(file, CPU)
    assert message in str(caught.value)
    assert not harm.exists()


@pytest.mark.parametrize(
    "expression",
    [
        "Symbol('s0').evalf",
        "lambdify(Integer(1), Integer(2))",
        "__import__('os')",
        "Symbol('s0', integer=True, x=open)",
        "Integer(1) if True else 2",
        "[1]",
    ],
)
def test_expressions_are_arithmetic(expression: str) -> None:
    assert list(find_foreign({"expr_str": expression}))
    known = "Add(Mul(Integer(32), Symbol('s14', positive=True, integer=True)), Integer(-1))"
    assert not list(find_foreign({"expr_str": known}))


def test_two_records_of_one_name(program_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "bad.pt2"
    file.write_bytes(program_file.read_bytes())
    with (
        pytest.warns(UserWarning, match="Duplicate name"),
        zipfile.ZipFile(file, "a") as archive,
    ):
        archive.writestr("small/models/model.json", "{}")
    with pytest.raises(ConfigError, match="two of one name"):
        load_program(file, CPU)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no archive", b"\x00" * 100])
def test_what_is_no_archive(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "bad.pt2"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"bad\.pt2: expected"):
        load_program(file, CPU)
    with pytest.raises(ConfigError, match=r"expected torch\.export's form"):
        load_config(file)


def test_a_program_of_somebody_else(tmp_path: Path) -> None:
    file = tmp_path / "other.pt2"
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),))
    torch.export.save(program, file)
    with pytest.raises(ConfigError, match="expected what `vovnet export` writes, found"):
        load_program(file, CPU)
    with pytest.raises(ConfigError):
        load_engine(file)


def test_both_texts_travel_in_the_file(program_file: Path) -> None:
    names = {name.rpartition("/")[2] for name in read_records(program_file) if "/extra/" in name}
    assert names == {CONFIG_KEY, EXPORT_KEY}
