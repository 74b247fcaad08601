"""`vovnet models`."""

import json

from rich.console import Console
from rich.table import Table

from vovnet.errors import ConfigError
from vovnet.model_folder import bundled_models, load_config
from vovnet.models.vovnet import VARIANTS
from vovnet.models.zoo import list_models, split_name, task_of
from vovnet.published import PUBLISHED

TASKS = ("classify", "detect", "segment")

# Counted ahead because counting all takes longer than anybody waits for a list; tests count again.
COSTS: dict[str, tuple[int, int]] = {
    "vovnet39a": (22_600_296, 7_072_227_328),
    "vovnet57a": (36_640_296, 8_930_144_256),
    "ese_vovnet19b_slim_dw": (1_897_752, 398_071_376),
    "ese_vovnet19b_dw": (6_543_080, 1_333_489_824),
    "ese_vovnet19b_slim": (3_166_136, 1_680_214_784),
    "ese_vovnet19b": (11_205_416, 4_121_937_920),
    "ese_vovnet39b": (24_568_936, 7_074_193_408),
    "ese_vovnet57b": (38_608_936, 8_932_110_336),
    "ese_vovnet99b": (63_199_272, 16_488_214_528),
    "eca_vovnet39b": (22_600_316, 7_072_240_128),
    "ese_vovnet39b_evos": (24_579_144, 7_074_193_408),
    "vovnet19_thin_dw": (1_313_656, 240_181_584),
    "vovnet19_slim": (2_677_192, 1_679_727_104),
    "vovnet27_slim": (3_525_736, 2_176_695_296),
    "vovnet39": (22_600_296, 7_072_227_328),
    "vovnet57": (36_640_296, 8_930_144_256),
    "vovnet27_slim_paper": (3_525_736, 2_870_328_320),
    "vovnet39_paper": (22_600_296, 7_765_860_352),
    "vovnet57_paper": (36_640_296, 9_623_777_280),
    "ese_vovnet19_slim_dw_d2": (1_897_752, 398_071_376),
    "ese_vovnet19_dw_d2": (6_543_080, 1_333_489_824),
    "ese_vovnet19_slim_d2": (3_166_136, 1_680_214_784),
    "ese_vovnet19_d2": (11_205_416, 4_121_937_920),
    "ese_vovnet39_d2": (26_209_128, 7_075_831_808),
    "ese_vovnet57_d2": (42_479_912, 8_935_976_960),
    "ese_vovnet99_d2": (70_548_520, 16_495_554_560),
    "ese_vovnet39_dcn_d2": (27_982_731, 7_423_325_696),
    "ese_vovnet57_dcn_d2": (45_466_976, 9_452_645_504),
    "ese_vovnet99_dcn_d2": (75_962_641, 17_816_945_792),
}
"""Parameters, and macs at 224 x 224, of a classifier of 1000 classes."""

STAGE_5_PARAMETERS: dict[str, int] = {
    "vovnet39a": 11_362_688,
    "vovnet57a": 17_433_152,
    "ese_vovnet19b_slim_dw": 716_880,
    "ese_vovnet19b_dw": 2_856_608,
    "ese_vovnet19b_slim": 1_245_856,
    "ese_vovnet19b": 4_979_008,
    "ese_vovnet39b": 12_412_288,
    "ese_vovnet57b": 18_482_752,
    "ese_vovnet99b": 18_482_752,
    "eca_vovnet39b": 11_362_693,
    "ese_vovnet39b_evos": 12_416_576,
    "vovnet19_thin_dw": 454_224,
    "vovnet19_slim": 983_200,
    "vovnet27_slim": 1_324_128,
    "vovnet39": 11_362_688,
    "vovnet57": 17_433_152,
    "vovnet27_slim_paper": 1_324_128,
    "vovnet39_paper": 11_362_688,
    "vovnet57_paper": 17_433_152,
    "ese_vovnet19_slim_dw_d2": 716_880,
    "ese_vovnet19_dw_d2": 2_856_608,
    "ese_vovnet19_slim_d2": 1_245_856,
    "ese_vovnet19_d2": 4_979_008,
    "ese_vovnet39_d2": 13_461_888,
    "ese_vovnet57_d2": 20_581_952,
    "ese_vovnet99_d2": 20_581_952,
    "ese_vovnet39_dcn_d2": 14_333_070,
    "ese_vovnet57_dcn_d2": 21_919_829,
    "ese_vovnet99_dcn_d2": 21_919_829,
}
"""Parameters of a backbone's last stage, which DSOD does without."""

DETECTOR_PARTS: dict[str, tuple[int, int, int, int]] = {
    "fcos": (8_461_658, 8_166_746, 8_166_746, 8_150_362),
    "fcos_lite": (1_722_586, 1_575_130, 1_575_130, 1_566_938),
    "centermask": (27_445_260, 27_150_348, 27_150_348, 27_133_964),
    "centermask_lite": (9_945_228, 9_797_772, 9_797_772, 9_789_580),
    "faster_rcnn": (17_917_344, 17_585_568, 17_589_664, 17_560_992),
    "faster_rcnn_lite": (8_952_224, 8_786_336, 8_788_384, 8_774_048),
    "mask_rcnn": (20_560_624, 20_228_848, 20_232_944, 20_204_272),
    "mask_rcnn_lite": (11_300_592, 11_134_704, 11_136_752, 11_122_416),
    "refinedet": (34_708_548, 30_252_100, 30_252_100, 30_022_724),
    "dsod": (10_910_188, 9_961_452, 9_961_452, 9_749_036),
    "vovdet": (1_488_432, 1_377_840, 1_377_840, 1_371_696),
    "vovdet_seg": (1_667_152, 1_556_560, 1_556_560, 1_550_416),
}
"""Parameters of neck and heads for 80 classes, by the width of stage 2: 256, 112, 128, 80."""

SIZED_PARTS: dict[str, int] = {
    "vovdet_n": 193_584,
    "vovdet_s": 1_377_840,
    "vovdet_m": 2_525_104,
    "vovdet_l": 3_832_112,
    "vovdet_n_seg": 211_536,
    "vovdet_s_seg": 1_556_560,
    "vovdet_m_seg": 2_837_072,
    "vovdet_l_seg": 4_314_192,
}
"""The same of detectors whose name says the backbone too."""

_STAGE_2_WIDTHS = (256, 112, 128, 80)


def models(pattern: str, task: str | None, as_json: bool) -> int:
    """Prints the models that match: what they cost, and which weights there are."""
    if task is not None and task not in TASKS:
        raise ConfigError(f"task: expected one of {', '.join(TASKS)}, got {task!r}")
    described = [describe(name) for name in list_models(pattern) if task in (None, task_of(name))]
    if not described:
        raise ConfigError(f"models: expected a pattern that some name matches, got {pattern!r}")
    bundled = {
        name: {"architecture": config.architecture, "licence": config.licence}
        for name, config in (
            (name, load_config(folder)) for name, folder in sorted(bundled_models().items())
        )
    }
    if as_json:
        print(json.dumps({"models": described, "bundled": bundled}))
    else:
        print(to_text(described, bundled))
    return 0


def describe(name: str) -> dict[str, object]:
    """What is known of a model without building it: costs, weights, licence, published accuracy.

    macs are for 224 x 224 pixels and 1000 classes; a detector's are None, they depend on the image.
    The weights of a detector are those of its backbone.
    """
    kind, backbone = split_name(name)
    published = PUBLISHED.get(backbone)
    return {
        "name": name,
        "task": task_of(name),
        "parameters": count_parameters(name),
        "macs": COSTS[backbone][1] if kind is None else None,
        "weights": None if published is None else published.hub_repository,
        "licence": None if published is None else published.licence,
        "top1_percent": published.top1_percent if published and kind is None else None,
    }


def count_parameters(name: str) -> int:
    """Parameters of a model of 1000 classes, or of a detector of 80; raises ConfigError on an
    unknown name.
    """
    kind, backbone = split_name(name)
    parameters, _ = COSTS[backbone]
    if kind is None:
        return parameters
    widths = VARIANTS[backbone].stage_out_channels
    unused = 1000 * (widths[-1] + 1)  # the classifier
    if kind == "dsod":
        unused += STAGE_5_PARAMETERS[backbone]
    if kind in SIZED_PARTS:
        return parameters - unused + SIZED_PARTS[kind]
    return parameters - unused + DETECTOR_PARTS[kind][_STAGE_2_WIDTHS.index(widths[0])]


def to_text(described: list[dict[str, object]], bundled: dict[str, dict[str, str]]) -> str:
    """The list for people."""
    table = Table(box=None, pad_edge=False)
    for header in ("model", "task"):
        table.add_column(header, no_wrap=True)
    for header in ("parameters, M", "macs at 224, G", "top-1 %, published"):
        table.add_column(header, justify="right")
    for header in ("weights", "licence"):
        table.add_column(header, no_wrap=True)
    for model in described:
        table.add_row(
            str(model["name"]),
            str(model["task"]),
            _in_units(model["parameters"], 1e6),
            _in_units(model["macs"], 1e9),
            _in_units(model["top1_percent"], 1),
            _weights_text(model),
            str(model["licence"] or ""),
        )
    console = Console(width=160, highlight=False, markup=False)
    with console.capture() as captured:
        console.print(table)
        console.print("\nmacs of a detector depend on the image: vovnet profile MODEL.")
        console.print("Top-1 on ImageNet-1k is the publisher's figure, not measured here.")
        for name, about in bundled.items():
            console.print(f"bundled: {name} ({about['architecture']}, {about['licence']})")
    return captured.get().rstrip()


def _weights_text(model: dict[str, object]) -> str:
    of_backbone = "" if model["task"] == "classify" else " (backbone)"
    return f"{model['weights']}{of_backbone}" if model["weights"] else ""


def _in_units(value: object, unit: float) -> str:
    return f"{value / unit:.2f}" if isinstance(value, int | float) else ""
