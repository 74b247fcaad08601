"""What can be profiled, by its name: a model folder, an architecture of the zoo, an ONNX file."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vovnet.classify import Classifier
from vovnet.errors import ConfigError
from vovnet.exported import find_export, is_export, read_export_info
from vovnet.graph_file import is_graph_file
from vovnet.images import read_image
from vovnet.model_folder import ModelConfig, bundled_models, load_config, name_of, resolve_model
from vovnet.models.deploy import fold_batch_norms
from vovnet.models.zoo import create_model, list_models, task_of
from vovnet.predict import Predictor
from vovnet.preprocess import Preprocess
from vovnet.profiling.records import LAYOUTS, Accuracy, Point, TargetKind, printable
from vovnet.profiling.roofline import DTYPES, synchronize
from vovnet.published import PUBLISHED, find_published
from vovnet.runtime.engine import find_candidates
from vovnet.runtime.exported import ExportedFile
from vovnet.runtime.onnxruntime import import_onnxruntime
from vovnet.runtime.torch import build_model, choose_device, set_threads

DEFAULT_SIDES = {"classify": 224, "detect": 512, "segment": 512}
_MAX_SIDE = 16384
_MAX_DIGITS = 9
_INT8_METRICS = {"top1": "top-1", "box_ap": "box AP", "mask_ap": "mask AP"}


class UntimedError(ConfigError):
    """What would run a file is not installed, so that it can only be counted."""


@dataclass(frozen=True, slots=True)
class Target:
    """One thing to profile; `path` of a folder or file, `module` and `inputs` where Python gave
    them; `engine` where it is another than the run's.
    """

    name: str
    kind: TargetKind
    task: str
    path: Path | None = None
    module: nn.Module | None = None
    inputs: tuple[Tensor, ...] = ()
    engine: str = ""
    architecture: str = ""  # a name of the zoo, or published weights with their tag


def on_engines(targets: Sequence[Target], engines: Sequence[str]) -> list[Target]:
    """Each target on each engine, so that one run compares them; raises ConfigError on one twice.

    Their names say which, where there are several.
    """
    if len(set(engines)) < len(engines):
        raise ConfigError(f"engine: expected different engines, got {', '.join(engines)}")
    if len(engines) < 2:
        return [replace(target, engine=engine) for target in targets for engine in engines]
    return [
        replace(target, name=f"{target.name} ({engine})", engine=engine)
        for target in targets
        for engine in engines
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """A network that is ready to run one batch: `run` waits for the device and returns the number
    of images. `module` and `inputs` are there where torch runs it. `own_size` is the batch size,
    height and width of a file that takes no other, where these are not the asked ones.
    """

    run: Callable[[], int]
    engine: str
    precision: str
    device: str
    module: nn.Module | None = None
    own_size: tuple[int, int, int] | None = None


def find_target(text: str) -> Target:
    """The target of a name or path; a folder with config.json goes before a name of the zoo.

    Raises ConfigError saying what was expected.
    """
    path = Path(text)
    if path.suffix == ".onnx" and not is_export(path):
        if not path.is_file():
            raise ConfigError(f"{path}: expected an ONNX file, found none")
        return Target(printable(path.name), "onnx", "", path)
    if is_graph_file(path) and path.is_file():
        return Target(printable(path.name), "folder", load_config(path).task, path)
    if (path / "config.json").is_file() or text in bundled_models():
        folder = resolve_model(text)
        name = printable(name_of(folder))
        return Target(name, "folder", load_config(folder).task, folder)
    if text in list_models():
        return Target(text, "architecture", task_of(text), architecture=text)
    if find_published(text) is not None:  # with its tag: weights of known accuracy
        return Target(text, "architecture", "classify", architecture=text)
    if path.exists():
        resolve_model(text)  # says what a model folder holds
    try:
        task_of(text)
    except ConfigError as error:
        bundled = ", ".join(sorted(bundled_models())) or "none"
        raise ConfigError(
            f"expected a model folder, a bundled model ({bundled}), an exported or .onnx "
            f"file or an architecture, got {text!r}; {error}"
        ) from None
    raise AssertionError("unreachable: the zoo knows the name")


def distinct(targets: Sequence[Target]) -> list[Target]:
    """The targets under names that differ: their paths where two folders have one name.

    Raises ConfigError when one is given twice.
    """
    names = [target.name for target in targets]
    renamed = [
        replace(target, name=printable(str(target.path)))
        if names.count(target.name) > 1
        else target
        for target in targets
    ]
    paths = [target.path.resolve() if target.path else target.name for target in targets]
    if len(set(paths)) < len(paths):
        raise ConfigError(f"expected different models, got {', '.join(names)}")
    return renamed


def check_engine(target: Target, engine: str, device: str) -> None:
    """Raises ConfigError where an engine cannot run a target: folders need an export beside, and
    what is not trained runs through torch.
    """
    if target.kind == "folder" and target.path is not None:
        find_candidates(target.path, engine, device)
    elif target.kind != "onnx" and engine not in ("auto", "torch"):
        raise ConfigError(f"engine: expected torch for what is not trained, got {engine!r}")


def default_side(target: Target) -> int:
    """Of the square images that a target is profiled on, in pixels: a trained classifier's own."""
    if target.kind == "folder" and target.task == "classify" and target.path is not None:
        crop = Preprocess.from_dict(load_config(target.path).preprocess).crop_size
        return crop or DEFAULT_SIDES["classify"]
    return DEFAULT_SIDES.get(target.task, DEFAULT_SIDES["classify"])


def parse_image_size(text: str) -> tuple[int, int]:
    """Height and width of SIDE or HEIGHTxWIDTH, in pixels; raises ConfigError."""
    parts = text.lower().split("x")
    if len(text) > _MAX_DIGITS * 2:  # Python refuses to read thousands of digits
        raise ConfigError(f"image size: expected SIDE or HEIGHTxWIDTH, got {len(text)} characters")
    if len(parts) not in (1, 2) or not all(part.strip().isdecimal() for part in parts):
        raise ConfigError(f"image size: expected SIDE or HEIGHTxWIDTH in pixels, got {text!r}")
    height, width = int(parts[0]), int(parts[-1])
    if not (1 <= height <= _MAX_SIDE and 1 <= width <= _MAX_SIDE):
        raise ConfigError(f"image size: expected sides in 1..{_MAX_SIDE}, got {text!r}")
    return height, width


def load_module(target: Target, *, device: torch.device | None = None) -> nn.Module:
    """The network of a target as a module in evaluation mode: with random weights of an
    architecture, on `device` (meta: no memory at all).
    """
    if target.module is not None:
        return target.module
    if target.kind == "folder" and target.path is not None and target.path.is_file():
        config = load_config(target.path)  # an exported file; its weights change no cost
        with torch.device(device or "cpu"):
            module = create_model(config.architecture, **config.model_args)
    elif target.kind == "folder" and target.path is not None:
        module = build_model(target.path)
    else:
        with torch.device(device or "cpu"):
            # Weights change no cost, so that published ones need not be fetched.
            module = create_model(find_published(target.architecture) or target.architecture)
    return module.eval().to(device or "cpu")


def open_network(
    target: Target, point: Point, *, engine: str = "auto", device: str = "auto", image: Path | None
) -> Network:
    """A target ready to run at a point of a sweep.

    A folder runs on an engine as `predict` runs it, a detector's graph with its detections;
    anything else through torch: an architecture's detector without its second stage, whose cost
    depends on what trained weights find. The batch holds `image` or random pixels. Raises
    ConfigError on what the device or engine cannot do.
    """
    if point.layout not in LAYOUTS:
        raise ConfigError(f"layout: expected {' or '.join(LAYOUTS)}, got {point.layout!r}")
    if point.threads is not None:
        set_threads(point.threads)
    if target.kind == "onnx":
        return _open_onnx(target, point)
    if target.kind == "folder":
        return _open_folder(target, point, engine=engine, device=device, image=image)
    check_engine(target, engine, device)
    module = load_module(target)
    if target.module is None:
        fold_batch_norms(module)
    return open_module(module, _module_inputs(target, point), point, device=choose_device(device))


def open_module(
    module: nn.Module, inputs: tuple[Tensor, ...], point: Point, *, device: torch.device
) -> Network:
    """A torch module ready to run: moved to the device, images in the point's layout, and under
    autocast where the precision is not fp32. The first input holds the batch.
    """
    if point.precision not in DTYPES:
        names = ", ".join(DTYPES)
        raise ConfigError(f"precision: expected one of {names}; got {point.precision!r}")
    if point.precision == "fp16" and device.type == "cpu":
        raise ConfigError("precision: expected fp32 or bf16 on the CPU, got 'fp16'")
    memory_format = torch.channels_last if point.layout == "nhwc" else torch.contiguous_format
    module = module.to(device).to(memory_format=memory_format)
    on_device = tuple(
        value.to(device, memory_format=memory_format) if value.ndim == 4 else value.to(device)
        for value in inputs
    )
    dtype = DTYPES[point.precision]
    autocast = torch.autocast(device.type, dtype=dtype, enabled=point.precision != "fp32")
    images = len(inputs[0])

    def run() -> int:
        with torch.inference_mode(), autocast:
            module(*on_device)
        synchronize(device)
        return images

    return Network(
        run=run, engine="torch", precision=point.precision, device=str(device), module=module
    )


def picture(point: Point, image: Path | None) -> NDArray[np.uint8]:
    """A uint8 (H, W, 3) picture of the point's size: of the file, cut or repeated, or random."""
    shape = (point.height, point.width, 3)
    if image is None:
        return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    pixels = read_image(image)
    rows, columns = -(-shape[0] // pixels.shape[0]), -(-shape[1] // pixels.shape[1])
    return np.ascontiguousarray(np.tile(pixels, (rows, columns, 1))[: shape[0], : shape[1]])


def image_shape(shape: Sequence[Any], point: Point) -> list[int]:
    """Four declared sizes of an image input, NCHW or NHWC; what is no number comes from the point.

    Channels are last where the last size is 3 and the second is not.
    """
    size = (point.height, point.width)
    channels_last = shape[3] == 3 and shape[1] != 3
    wanted = (point.batch_size, *size, 3) if channels_last else (point.batch_size, 3, *size)
    return [one if isinstance(one, int) else want for one, want in zip(shape, wanted, strict=True)]


def known_accuracy(target: Target, engine: str = "torch") -> Accuracy | None:
    """The figure that a model folder records, a file in eight bits its own, be it the target or
    what `engine` runs of a folder, or that timm publishes of weights named with their tag; None of
    anything else.
    """
    if target.kind == "folder" and target.path is not None:
        config = load_config(target.path)
        file = target.path if is_export(target.path) else find_export(target.path, engine)
        int8 = read_export_info(file).int8 if file else None
        if int8 is not None:
            data = f"{int8.pictures} pictures of {printable(int8.split)}, in eight bits"
            return Accuracy(value=int8.accuracy, metric=_INT8_METRICS[int8.metric], data=data)
        return recorded_accuracy(config)
    variant = find_published(target.architecture) if target.architecture else None
    if variant is None or variant == target.architecture:
        return None
    weights = PUBLISHED[variant]
    data = f"ImageNet-1k val at {weights.image_size} x {weights.image_size} (timm's figure)"
    return Accuracy(value=weights.top1_percent / 100, metric="top-1", data=data)


def recorded_accuracy(config: ModelConfig) -> Accuracy | None:
    """The figure that a model folder records, of the test split before the validation split.

    What is no number in 0..1, or has an interval that is none, is no figure.
    """
    data = printable(str(config.training.get("data") or "unnamed data"))
    order = {"test": 0, "val": 1}
    for split in sorted(config.metrics, key=lambda name: order.get(name, 2)):
        found = config.metrics[split]
        figures = found if isinstance(found, Mapping) else {}
        for key, metric in (("mask", "mask AP"), ("box", "box AP"), ("top1", "top-1")):
            part, interval = figures.get(key), figures.get(f"{key}_interval")
            given = part if isinstance(part, Mapping) else {"ap": part, "ap_interval": interval}
            value, interval = given.get("ap"), given.get("ap_interval")
            if not _is_share(value) or not (interval is None or _is_interval(interval)):
                continue
            low, high = interval or (None, None)
            where = f"{data} {printable(split)}"
            return Accuracy(value=value, metric=metric, data=where, low=low, high=high)
    return None


def _is_share(value: object) -> TypeGuard[float]:
    return type(value) in (int, float) and 0 <= value <= 1  # type: ignore[operator]


def _is_interval(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_share, value))


def _open_folder(
    target: Target, point: Point, *, engine: str, device: str, image: Path | None
) -> Network:
    if target.path is None:
        raise ConfigError(f"{target.name}: expected the path of a model folder, got none")
    load = Classifier.load if target.task == "classify" else Predictor.load
    predictor: Classifier | Predictor = load(
        target.path,
        engine=engine,
        precision=point.precision,
        device=device,
        threads=point.threads,
    )
    file: ExportedFile | None = getattr(predictor.engine, "file", None)
    height, width = (file and file.sides) or (point.height, point.width)
    own_size = _other_size(point, (point.batch_size, height, width))
    pixels = [picture(replace(point, height=height, width=width), image)] * point.batch_size
    images, sizes = predictor.preprocess.batch(pixels)

    def run() -> int:
        predictor.engine.infer(images, sizes)
        return point.batch_size

    return Network(
        run=run,
        engine=predictor.engine.name,
        precision=predictor.engine.precision,
        device=predictor.engine.device,
        module=getattr(predictor.engine, "graph", None),
        own_size=own_size,
    )


def _other_size(point: Point, size: tuple[int, int, int]) -> tuple[int, int, int] | None:
    return None if size == (point.batch_size, point.height, point.width) else size


def _module_inputs(target: Target, point: Point) -> tuple[Tensor, ...]:
    if target.inputs:
        return target.inputs
    shape = (point.batch_size, 3, point.height, point.width)
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)),)


def _open_onnx(target: Target, point: Point) -> Network:
    """An ONNX file in onnxruntime, with one random image input of its own shape."""
    try:
        onnxruntime = import_onnxruntime()
    except ConfigError:
        raise UntimedError(
            f"{target.name}: an ONNX file is counted; to time it, install onnxruntime"
        ) from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = point.threads or 0
    providers = ["CPUExecutionProvider"]
    try:
        session = onnxruntime.InferenceSession(str(target.path), options, providers=providers)
    except Exception as error:  # onnxruntime's own, which have no common base
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"{target.name}: expected a network that onnxruntime reads: {reason}"
        ) from None
    given = session.get_inputs()
    if len(given) != 1 or given[0].type not in ("tensor(float)", "tensor(uint8)"):
        found = ", ".join(f"{one.name} {one.type}" for one in given)
        raise ConfigError(f"{target.name}: expected one float or uint8 image input, found {found}")
    values = _onnx_image(given[0].shape, given[0].type, point)

    def run() -> int:
        session.run(None, {given[0].name: values})
        return len(values)

    batch, *sides = values.shape
    height, width = sides[:2] if sides[2] == 3 else sides[1:]
    return Network(
        run=run,
        engine="onnxruntime",
        precision="as stored",
        device="cpu",
        own_size=_other_size(point, (batch, height, width)),
    )


def _onnx_image(shape: list[Any], kind: str, point: Point) -> NDArray[Any]:
    """Random pixels in the declared shape; what it leaves open comes from the point."""
    if len(shape) != 4:
        raise ConfigError(f"expected an image input of four axes, found the shape {shape}")
    sides = image_shape(shape, point)
    values = np.random.default_rng(0).integers(0, 256, sides, dtype=np.uint8)
    return values if kind == "tensor(uint8)" else values.astype(np.float32) / 255


def explain(error: Exception, where: str) -> str:
    """One line on why something did not run; raises OSError when the device itself was lost."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in text:
        return "out of memory"
    text = printable(text)
    if isinstance(error, ConfigError):
        return text
    if "CUDA error" in text or "device-side" in text:
        raise OSError(f"{where}: the device was lost while running: {text}") from error
    return f"cannot run: {text}"
