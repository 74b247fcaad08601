"""What a profile is: plain figures with the hardware, the method and the date they belong to."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from vovnet.profiling.compare import Ratio
from vovnet.profiling.energy import EnergyResult
from vovnet.profiling.latency import Timings

FORMAT_VERSION = 1
LAYOUTS = ("nchw", "nhwc")
ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}

TargetKind = Literal["folder", "architecture", "module", "onnx"]


def printable(text: str) -> str:
    """The text on one line, in characters that every terminal, page and file can take."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


@dataclass(frozen=True, slots=True)
class Point:
    """One setting of a sweep; sizes in pixels of the network's input, threads None: as they are."""

    batch_size: int = 1
    height: int = 224
    width: int = 224
    threads: int | None = None
    precision: str = "fp32"
    layout: str = "nhwc"

    def size(self) -> str:
        """Return the shape of a batch in a few words."""
        return f"batch {self.batch_size}, {self.height} x {self.width}"

    def format(self) -> str:
        """Return the setting in a few words."""
        threads = "" if self.threads is None else f", {self.threads} threads"
        return f"{self.size()}, {self.precision} {self.layout}{threads}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What one image costs by count, on any machine; memory_access and activations in elements.

    Words and formulas are those of vovnet.profiling.count. `note` says what was counted.
    """

    parameters: int
    macs: int
    memory_access: int
    activations: int
    peak_activation_elements: int
    note: str = ""

    @property
    def flops(self) -> int:
        """Two for each multiply-accumulate; the GFLOPs of the VoVNet paper are macs."""
        return 2 * self.macs


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """One recorded or measured figure, 0..1, and what it was measured on."""

    value: float
    metric: str
    data: str
    low: float | None = None
    high: float | None = None

    def format(self) -> str:
        """Return the figure with its interval and data."""
        interval = "" if self.low is None else f" ({self.low:.3f} to {self.high:.3f})"
        return f"{self.metric} {self.value:.3f}{interval} on {self.data}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where a layer or a network stands under this device's own roofline.

    intensity is flops per byte of memory access; the ceiling is the lesser of the device's flop
    rate and intensity x memory bandwidth; `bound` names which of the two it is.
    """

    name: str
    kind: str
    time_ms: float
    flops: int
    memory_bytes: int
    intensity: float
    achieved_flops_per_s: float
    ceiling_flops_per_s: float
    bound: Literal["compute", "memory"]

    @property
    def of_ceiling(self) -> float:
        """Achieved rate as a share of the ceiling."""
        return self.achieved_flops_per_s / self.ceiling_flops_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class PointResult:
    """The network of one model at one point; `error` holds the reason where there are no times."""

    point: Point
    engine: str
    device: str
    counts: Counts | None = None
    timings: Timings | None = None
    warmed_up: bool = False
    energy: EnergyResult | None = None
    error: str | None = None
    counted_alone: bool = False
    """Nothing that could run it is installed."""

    @property
    def image_ms(self) -> float | None:
        """Median milliseconds for one image of the batch."""
        return None if self.timings is None else self.timings.median_ms / self.point.batch_size

    @property
    def images_per_s(self) -> float | None:
        """Images in a second, by the median time."""
        return None if self.image_ms is None else 1000 / self.image_ms

    @property
    def achieved_flops_per_s(self) -> float | None:
        """The paper's computation efficiency: flops of an image x images per second."""
        if self.images_per_s is None or self.counts is None:
            return None
        return self.counts.flops * self.images_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelProfile:
    """All that was measured of one model."""

    name: str
    kind: TargetKind
    task: str
    input: str
    accuracy: Accuracy | None = None
    results: tuple[PointResult, ...] = ()
    stages: Mapping[str, Timings] = field(default_factory=dict)
    cold_start: Timings | None = None
    peak_memory_bytes: int | None = None
    """The most that a fresh process held up to its first result."""
    whole: Placement | None = None
    layers: tuple[Placement, ...] = ()
    layer_rounds: int = 0
    """Passes that each layer's time is the median of."""
    notes: tuple[str, ...] = ()

    @property
    def main(self) -> PointResult | None:
        """The first point: the one that is compared, drawn and gated."""
        return self.results[0] if self.results else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """One run of the profiler: models measured interleaved, on one machine, at one date."""

    machine: Mapping[str, Any]
    method: tuple[str, ...]
    models: tuple[ModelProfile, ...]
    ratios: tuple[Ratio, ...] = ()
    ceilings: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON types, derived figures included."""
        return {
            "format_version": FORMAT_VERSION,
            "machine": dict(self.machine),
            "method": list(self.method),
            "ceilings": dict(self.ceilings),
            "models": [_model_dict(model) for model in self.models],
            "ratios": [ratio.to_dict() for ratio in self.ratios],
        }


def why_unmeasured(results: Sequence[PointResult]) -> str | None:
    """Why no point of a target has a result, None where one has.

    Counts alone are a result of an ONNX file; of a network that should run they are not.
    """
    first = results[0]
    if any(result.timings for result in results) or (first.counted_alone and first.counts):
        return None
    return first.error


def with_sizes(ratio: Ratio, results: Mapping[str, PointResult]) -> Ratio:
    """The ratio, which names both sizes where its two networks ran on different ones."""
    own, other = (results[name].point.size() for name in (ratio.name, ratio.baseline))
    return ratio if own == other else replace(ratio, sizes=f"{own} over {other}")


def _model_dict(model: ModelProfile) -> dict[str, Any]:
    content = asdict(model)
    content["results"] = [_result_dict(result) for result in model.results]
    content["whole"] = None if model.whole is None else placement_dict(model.whole)
    content["layers"] = [placement_dict(layer) for layer in model.layers]
    return content


def _result_dict(result: PointResult) -> dict[str, Any]:
    content = asdict(result)
    content["image_ms"] = result.image_ms
    content["images_per_s"] = result.images_per_s
    content["achieved_flops_per_s"] = result.achieved_flops_per_s
    if result.counts is not None:
        content["counts"]["flops"] = result.counts.flops
    return content


def placement_dict(placement: Placement) -> dict[str, Any]:
    """Return the fields of a placement and its share of the ceiling."""
    return {**asdict(placement), "of_ceiling": placement.of_ceiling}
