"""An exported program of torch (.pt2) run by torch, once nothing in it can do more than compute.

torch reads such a file by unpickling, by evaluating texts as Python, and by looking operators up by
name; it has no switch against any of it. So each record and each text is held against what
`vovnet export` writes, and torch is given a copy of what has passed.
"""

import json
import re
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch._ops import OpOverload
from torch.export.passes import move_to_device_pass

from vovnet.errors import ConfigError
from vovnet.exported import EXPORT_KEY
from vovnet.model_folder import CONFIG_KEY
from vovnet.models.suppress import suppress
from vovnet.runtime.exported import ExportedFile, open_exported
from vovnet.runtime.torch import DTYPES, choose_device, set_threads, to_numpy

_RECORDS = re.compile(
    r"archive_format|archive_version|byteorder|version|\.data/\w+|models/model\.json"
    r"|data/weights/(model_weights_config\.json|weight_\d+)"
    r"|data/constants/(model_constants_config\.json|tensor_\d+)"
    rf"|data/sample_inputs/model\.pt|extra/({CONFIG_KEY}|{EXPORT_KEY})"
)
_NAME = re.compile(r"[\w.-]*")
_KEY = re.compile(r"[\w.*-]*")  # of a range: 32*s40
_TEXTS: Mapping[str, re.Pattern[str]] = {
    "as_string": re.compile(r"(?s).*"),  # an argument: which operators take one is looked at below
    "guards_code": re.compile(r"(?!)"),  # nothing
    "path_name": re.compile(r"(weight|tensor)_\d+"),
    "torch_version": re.compile(r"[\w.+]*"),
}
_SPECS = ("in_spec", "out_spec")
_SPEC_TYPES = (None, "builtins.tuple", "builtins.list", "builtins.dict")
_SYMBOL = re.compile(r"Symbol\('[suz]f?\d+'(, (integer|positive|nonnegative)=True)*\)")
_EXPRESSION = re.compile(r"[A-Za-z\d\s+\-*/%(),]*")
_FUNCTIONS = {
    *("Add", "Mul", "Pow", "Integer", "Rational", "Mod", "PythonMod", "ModularIndexing"),
    *("FloorDiv", "CleanDiv", "CeilDiv", "IntTrueDiv", "CeilToInt", "FloorToInt", "TruncToInt"),
    *("ToFloat", "Min", "Max", "Abs", "And", "Or", "Not", "Equality", "Unequality"),
    *("LessThan", "StrictLessThan", "GreaterThan", "StrictGreaterThan"),
}
_TARGET = re.compile(
    r"_operator\.(getitem|add|sub|mul|floordiv|truediv|mod|neg|pow|eq|ne|lt|le|gt|ge|and_|or_)"
    r"|math\.(ceil|floor|trunc)|torch\.sym_(int|float|max|min|not|ite|sum)"
)
_OPERATOR = re.compile(r"torch\.ops\.(aten|torchvision|vovnet)\.(\w+)\.(\w+)")
_OWN = (suppress,)  # registered by its import, before a program is read
_TAKE_TEXTS = {
    *("aten._assert_scalar.default", "aten._assert_async.msg", "aten.div.Tensor_mode"),
    *("aten.meshgrid.indexing", "aten.pad.default"),
}


class TorchExportEngine:
    """An Engine around an exported .pt2 file."""

    name = "torch-export"
    chosen_because = ""
    parallel = 1

    def __init__(
        self, file: ExportedFile, *, device: torch.device, precision: str = "fp32"
    ) -> None:
        if precision == "fp16" and device.type == "cpu":
            raise ConfigError("precision: expected fp32 or bf16 on the CPU, got 'fp16'")
        self.file = file
        self.precision = precision
        self.device = str(device)
        self.max_detections = file.max_detections
        self.has_masks = file.has_masks
        self._program = load_program(file.path, device)

    def infer(self, images: NDArray[np.uint8], sizes: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """As Engine.infer."""
        kind, dtype = self.device.partition(":")[0], DTYPES.get(self.precision)
        feeds = self.file.feeds(images, sizes).values()
        given = [torch.from_numpy(value).to(self.device) for value in feeds]
        with torch.inference_mode(), torch.autocast(kind, dtype=dtype, enabled=dtype is not None):
            found = self._program(*given)
        return self.file.results(list(found), [to_numpy(value) for value in found.values()])


def load(
    model: Path,
    *,
    precision: str,
    device: str,
    threads: int | None,
    settings: Mapping[str, object],
) -> TorchExportEngine:
    """The engine of an exported .pt2 file, fp32 unless stated; raises ConfigError."""
    chosen = choose_device(device)
    set_threads(threads)
    if precision == "int8":
        raise ConfigError("precision: expected fp32, bf16 or fp16 for torch-export, got 'int8'")
    file = open_exported(model, device="auto", settings=settings)
    return TorchExportEngine(
        file, device=chosen, precision="fp32" if precision == "auto" else precision
    )


def load_program(path: Path, device: torch.device) -> nn.Module:
    """The network of an exported .pt2 file on a device; raises ConfigError where anything in it is
    not as `vovnet export` writes it.
    """
    archive = _pack(read_records(path))
    try:
        program = torch.export.load(archive)
        if device.type != "cpu":
            program = move_to_device_pass(program, str(device))
        return program.module()
    except Exception as error:  # whatever torch meets in a damaged file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{path}: expected a program that torch reads: {reason}") from None


def read_records(path: Path) -> dict[str, bytes]:
    """The contents of a .pt2 file by name; raises ConfigError where one is not as it should be."""
    try:
        with ZipFile(path) as archive:
            entries = archive.infolist()
            packed = [one.filename for one in entries if one.compress_type != ZIP_STORED]
            records = {one.filename: archive.read(one) for one in entries if not packed}
    except (OSError, BadZipFile, EOFError, RuntimeError) as error:  # encrypted, too
        raise ConfigError(f"{path}: expected a .pt2 file that can be read: {error}") from None
    problem = next(_problems(records), "")
    if packed or len(records) != len(entries):
        problem = "records that are compressed, or two of one name"
    if problem:
        raise ConfigError(f"{path}: expected what `vovnet export` writes, found {problem}")
    # Written anew: two readers of JSON may differ about a key that comes twice.
    return {
        name: json.dumps(json.loads(content)).encode() if name.endswith(".json") else content
        for name, content in records.items()
    }


def _pack(records: Mapping[str, bytes]) -> BytesIO:
    """An archive of these records alone: no two readers of zip files can differ about it."""
    stream = BytesIO()
    with ZipFile(stream, "w", ZIP_STORED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    stream.seek(0)
    return stream


def _problems(records: Mapping[str, bytes]) -> Iterator[str]:
    for name, content in records.items():
        inner = name.partition("/")[2]
        if not _RECORDS.fullmatch(inner):
            yield f"the record {name!r}"
        elif inner.endswith(".pt") and content:
            yield f"a pickle, {name!r}"
        elif inner.endswith(".json"):
            try:
                yield from find_foreign(json.loads(content))
            except (ValueError, RecursionError):
                yield f"no JSON in {name!r}"


def find_foreign(value: object, key: str = "") -> Iterator[str]:
    """What of a program's description, below `key`, could do other than compute."""
    if isinstance(value, dict):
        for name, part in value.items():
            if not _KEY.fullmatch(name):
                yield f"the name {name!r}"
            yield from find_foreign(part, name)
    elif isinstance(value, list):
        for part in value:
            yield from find_foreign(part, key)
    elif key == "use_pickle" and value is not False:
        yield "a pickle"
    elif isinstance(value, str) and not _is_harmless(key, value):
        yield f"{key} {value[:80]!r}"


def _is_harmless(key: str, text: str) -> bool:
    if key in _SPECS:
        return _is_plain_spec(text)
    if key == "target" or _OPERATOR.fullmatch(text) or key == "as_operator":
        return _is_operator(text)
    if key == "expr_str":
        return _is_arithmetic(text)
    return _TEXTS.get(key, _NAME).fullmatch(text) is not None


def _is_arithmetic(expression: str) -> bool:
    """Whether it is made of numbers, of symbols for sizes, and of functions that are known."""
    rest = _SYMBOL.sub("0", expression)
    names = re.findall(r"[A-Za-z]+", rest)
    return _EXPRESSION.fullmatch(rest) is not None and _FUNCTIONS.issuperset(names)


def _is_operator(target: str) -> bool:
    """Whether it names arithmetic, or an operator that takes no text, such as a file's name."""
    found = _OPERATOR.fullmatch(target)
    if found is None:
        return _TARGET.fullmatch(target) is not None
    space, name, overload = found.groups()
    operator = getattr(getattr(getattr(torch.ops, space), name, None), overload, None)
    if not isinstance(operator, OpOverload):
        return False
    types = [str(argument.type) for argument in operator._schema.arguments]
    texts = any("str" in kind for kind in types)
    return f"{space}.{name}.{overload}" in _TAKE_TEXTS or not texts


def _is_plain_spec(text: str) -> bool:
    """Whether a tree of arguments is of tuples, lists and dicts with names alone."""
    try:
        nodes = [json.loads(text)[1]]
        while nodes:
            node = nodes.pop()
            names = json.loads(node["context"] or "null")
            plain = all(isinstance(name, str) for name in names or ())
            if node["type"] not in _SPEC_TYPES or not plain:
                return False
            nodes += node["children_spec"]
    except (ValueError, TypeError, KeyError, IndexError):
        return False
    return True
