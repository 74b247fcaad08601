"""Texts of exported files; onnx and OpenVINO's own writers are the oracle."""

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from vovnet.errors import ConfigError
from vovnet.graph_file import is_graph_file, read_metadata
from vovnet.runtime.openvino import import_openvino, openvino_core

TEXT = '{"a": "<&\\"\'é\\n"}'


def save_onnx(path: Path, **metadata: str) -> Path:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 3])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 3])
    weight = helper.make_tensor("w", TensorProto.FLOAT, [3], [1.0, 2.0, 3.0])
    node = helper.make_node("Add", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "g", [value], [result], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    helper.set_model_props(model, metadata)
    onnx.save(model, path)
    return path


def test_onnx_metadata(tmp_path: Path) -> None:
    path = save_onnx(tmp_path / "a.onnx", vovnet_config=TEXT, other="")
    assert read_metadata(path) == {"vovnet_config": TEXT, "other": ""}
    assert read_metadata(save_onnx(tmp_path / "b.onnx")) == {}


def test_openvino_metadata(tmp_path: Path) -> None:
    openvino = import_openvino()
    source = save_onnx(tmp_path / "a.onnx", vovnet_config=TEXT, vovnet_export="{}")
    openvino.save_model(openvino_core().read_model(source), tmp_path / "a.xml")
    assert read_metadata(tmp_path / "a.xml") == {"vovnet_config": TEXT, "vovnet_export": "{}"}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.onnx", b"no protobuf at all"),
        ("a.onnx", b"\x72\xff\xff\xff\xff\x7fshort"),
        ("a.onnx", b"\x80" * 40),
        ("a.onnx", b"\x08"),
        ("a.onnx", b"\x00" * 10),
        ("a.xml", b"not xml"),
        ("a.xml", b""),
        ("a.xml", b'<?xml version="1.0"?><vovnet_config value="\xff" />'),
    ],
)
def test_other_content_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"expected (ONNX|OpenVINO)'s form"):
        read_metadata(path)


def test_a_cut_file_is_refused(tmp_path: Path) -> None:
    path = save_onnx(tmp_path / "a.onnx", vovnet_config=TEXT)
    content = path.read_bytes()
    path.write_bytes(content[:-3])
    with pytest.raises(ConfigError, match="cut off"):
        read_metadata(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a readable file"):
        read_metadata(tmp_path / "none.onnx")


def test_suffixes() -> None:
    assert is_graph_file("a/model.onnx")
    assert is_graph_file(Path("model.xml"))
    assert not is_graph_file("model.safetensors")
