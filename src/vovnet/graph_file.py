"""The texts that an exported file carries beside its network, read without any engine."""

import html
import re
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import BinaryIO
from zipfile import BadZipFile, ZipFile

from .errors import ConfigError

SUFFIXES = (".onnx", ".xml", ".pt2")

_METADATA_PROPS = 14  # field of ONNX's ModelProto; key and value are fields 1 and 2 of each entry
_MAX_TEXT_BYTES = 16 * 2**20
_MAX_XML_BYTES = 256 * 2**20
_MAX_FIELDS = 100_000
_ENTRY = re.compile(rb'<(vovnet_\w+) value="([^"<]*)"')


def is_graph_file(path: str | Path) -> bool:
    """Whether a path is that of a file, existing or not, in the form of ONNX, OpenVINO or
    torch.export.
    """
    return Path(path).suffix in SUFFIXES


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of an .onnx file, the extra files of a .pt2 file, or those texts of an OpenVINO
    .xml file that are ours.

    The network, which may be large, is passed over. Raises ConfigError where the file is missing or
    is of another form.
    """
    form, read = _READERS.get(path.suffix, ("ONNX", _read_onnx))
    try:
        with path.open("rb") as stream:
            return read(stream)
    except OSError as error:
        raise ConfigError(f"{path}: expected a readable file, got: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: expected {form}'s form: {error}") from None


def _read_xml(stream: BinaryIO) -> dict[str, str]:
    content = stream.read(_MAX_XML_BYTES + 1)
    if len(content) > _MAX_XML_BYTES or not content.lstrip().startswith(b"<?xml"):
        raise ValueError("no XML, or too large")
    found = _ENTRY.findall(content)
    return {key.decode(): html.unescape(value.decode()) for key, value in found}


def _read_pt2(stream: BinaryIO) -> dict[str, str]:
    texts = {}
    try:
        with ZipFile(stream) as archive:
            for entry in archive.infolist():
                folder, _, name = entry.filename.rpartition("/")
                if folder.endswith("/extra"):
                    if entry.file_size > _MAX_TEXT_BYTES:
                        raise ValueError(f"a text of {entry.file_size} bytes")
                    texts[name] = archive.read(entry).decode()
    except (BadZipFile, EOFError, RuntimeError) as error:  # encrypted, too
        raise ValueError(str(error)) from None
    return texts


def _read_onnx(stream: BinaryIO) -> dict[str, str]:
    # Not the onnx package: it would read the weights too, and prediction must not need it.
    metadata = {}
    for content in _fields(stream, _METADATA_PROPS):
        texts = [b"".join(_fields(BytesIO(content), number)) for number in (1, 2)]
        key, value = (text.decode() for text in texts)
        metadata[key] = value
    return metadata


_READERS = {
    ".onnx": ("ONNX", _read_onnx),
    ".xml": ("OpenVINO", _read_xml),
    ".pt2": ("torch.export", _read_pt2),
}


def _fields(stream: BinaryIO, wanted: int) -> Iterator[bytes]:
    """The contents of one length-delimited field of a protobuf message, all others passed over."""
    end = stream.seek(0, 2)
    stream.seek(0)
    for _ in range(_MAX_FIELDS):
        if stream.tell() == end:
            return
        number, kind = divmod(_varint(stream), 8)
        if number == 0 or kind not in (0, 1, 2, 5):
            raise ValueError("no protobuf")
        value = _varint(stream) if kind in (0, 2) else 0
        length = {0: 0, 1: 8, 2: value, 5: 4}[kind]
        start = stream.tell()
        if length > end - start:
            raise ValueError("no protobuf, or cut off")
        if kind == 2 and number == wanted:
            if length > _MAX_TEXT_BYTES:
                raise ValueError(f"a text of {length} bytes")
            yield stream.read(length)
        stream.seek(start + length)
    raise ValueError("too many fields")


def _varint(stream: BinaryIO) -> int:
    value = 0
    for shift in range(0, 64, 7):
        byte = stream.read(1)
        if not byte:
            raise ValueError("no protobuf, or cut off")
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    raise ValueError("no protobuf")
