"""Every model by its name: VoVNet classifiers and backbones, and detectors built on them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import nn

from vovnet.errors import ConfigError
from vovnet.models.centermask import CenterMask, CenterMaskConfig, MaskHead, MaskIoUHead
from vovnet.models.dsod import DSOD, DSODConfig, DSODHead
from vovnet.models.fcos import FCOS, FCOSConfig, FCOSHead
from vovnet.models.fpn import FPN, PooledFPN
from vovnet.models.layers import ConvKind, resolve_indices
from vovnet.models.multibox import MultiboxConfig
from vovnet.models.pan import Pan
from vovnet.models.prototypes import PrototypeHead
from vovnet.models.rcnn import (
    BoxHead,
    FasterRCNN,
    FCNMaskHead,
    MaskRCNN,
    MaskRCNNConfig,
    RCNNConfig,
)
from vovnet.models.refinedet import RefineDet, RefineDetConfig, RefineDetHead
from vovnet.models.rpn import RPNHead
from vovnet.models.settings import check_count, check_groups, check_settings
from vovnet.models.vovdet import VovDet, VovDetConfig, VovDetHead, VovDetSegConfig
from vovnet.models.vovnet import VARIANTS, VoVNet, VoVNetConfig, VoVNetFeatures
from vovnet.models.weights import load_checkpoint, load_published, pretrained_cfg

Task = Literal["classify", "detect", "segment"]
DetectorConfig = FCOSConfig | RCNNConfig | MultiboxConfig | VovDetConfig

DETECTORS: dict[str, DetectorConfig] = {
    "fcos": FCOSConfig(),
    "fcos_lite": FCOSConfig(neck_channels=128, tower_convs=2),
    "centermask": CenterMaskConfig(),
    "centermask_lite": CenterMaskConfig(
        neck_channels=128, tower_convs=2, mask_convs=2, mask_channels=128
    ),
    "faster_rcnn": RCNNConfig(),
    "faster_rcnn_lite": RCNNConfig(neck_channels=128),
    "mask_rcnn": MaskRCNNConfig(),
    "mask_rcnn_lite": MaskRCNNConfig(neck_channels=128),
    "refinedet": RefineDetConfig(),
    "dsod": DSODConfig(),
    "vovdet": VovDetConfig(),
    "vovdet_seg": VovDetSegConfig(),
}
# Names of their own, without a backbone in them: VovDet in four sizes.
_VOVDET_SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "n": ("vovnet19_thin_dw", {"neck_channels": 64, "depthwise": True}),
    "s": ("vovnet19_slim", {"neck_channels": 96}),
    "m": ("ese_vovnet19b", {"neck_channels": 128}),
    "l": ("ese_vovnet39b", {"neck_channels": 160}),
}
SIZED: dict[str, tuple[DetectorConfig, str]] = {
    f"vovdet_{size}{suffix}": (replace(DETECTORS[f"vovdet{suffix}"], **widths), backbone)
    for suffix in ("", "_seg")
    for size, (backbone, widths) in _VOVDET_SIZES.items()
}
"""Detectors whose name says the backbone too."""
_MAPS = 5  # of a backbone: the stem's and the four stages'


def list_models(pattern: str = "*", *, task: Task | None = None) -> list[str]:
    """Names that match a shell pattern, of one task or of all."""
    detectors = [f"{kind}_{backbone}" for kind in DETECTORS for backbone in VARIANTS]
    return [
        name
        for name in [*VARIANTS, *detectors, *SIZED]
        if fnmatch(name, pattern) and task in (None, task_of(name))
    ]


def task_of(name: str) -> Task:
    """What a model of this name does; raises ConfigError on an unknown name."""
    kind, _ = split_name(name)
    if kind is None:
        return "classify"
    return _FAMILIES[type(_config_of(kind))].task


def _config_of(kind: str) -> DetectorConfig:
    return SIZED[kind][0] if kind in SIZED else DETECTORS[kind]


def split_name(name: str) -> tuple[str | None, str]:
    """Detector (None for a classifier) and backbone of a name; raises ConfigError on an unknown
    one. A detector of a fixed size, such as vovdet_n, is its own kind.
    """
    if not isinstance(name, str):
        raise ConfigError(f"model: expected a name, got {name!r}")
    if name in VARIANTS:
        return None, name
    if name in SIZED:
        return name, SIZED[name][1]
    for kind in DETECTORS:
        if name.startswith(f"{kind}_") and name.removeprefix(f"{kind}_") in VARIANTS:
            return kind, name.removeprefix(f"{kind}_")
    known = list_models()
    near = get_close_matches(name, known, n=3) or known[:3]
    raise ConfigError(f"model: expected a known name, such as {', '.join(near)}; got {name!r}")


def create_model(
    name: str,
    pretrained: bool = False,
    *,
    num_classes: int | None = None,
    in_chans: int = 3,
    features_only: bool = False,
    out_indices: int | Sequence[int] | None = None,
    checkpoint_path: str | Path | None = None,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    output_stride: int = 32,
    overrides: Mapping[str, object] | None = None,
) -> nn.Module:
    """A model by name, with random weights unless pretrained or checkpoint_path says otherwise.

    Args:
        name: one of list_models().
        pretrained: published ImageNet weights; for a detector, those of its backbone.
        num_classes: 1000 for classifiers, 80 for detectors when None; 0 leaves the classifier out.
        in_chans: channels of the input images.
        features_only: a backbone that returns the list of feature maps at out_indices.
        out_indices: of the five maps with strides 2, 4, 8, 16, 32 (all when None; n: the last n).
        checkpoint_path: .safetensors, .pth or a model folder, of any layout that `vovnet convert`
            knows.
        drop_rate: of the classifier's input.
        drop_path_rate: of the last block's residual branch (stochastic depth).
        output_stride: of the last map, 8 or 16 instead of 32 by dilation; 32 in a detector.
        overrides: settings of the network's config by name, a detector's (thresholds, widths) or
        the backbone's (norm and the rest of VoVNetConfig).

    Raises:
        ConfigError: on an unknown name or setting, or weights that do not fit.
    """
    kind, backbone_name = split_name(name)
    check_count("in_chans", in_chans)
    if num_classes is not None:
        check_count("num_classes", num_classes, least=0 if kind is None else 1)
    _check_rate("drop_rate", drop_rate)
    _check_rate("drop_path_rate", drop_path_rate)
    if out_indices is not None:
        _check_indices(out_indices)
    backbone_config, settings = _apply_overrides(VARIANTS[backbone_name], overrides)
    if kind is not None:
        if features_only or out_indices is not None:
            raise ConfigError(f"features_only: expected a backbone, got the detector {name}")
        if output_stride != 32:
            raise ConfigError(f"output_stride: expected 32 in a detector, got {output_stride!r}")
        model = _build_detector(
            _config_of(kind), settings, backbone_config, num_classes, in_chans, drop_path_rate
        )
        loaded_backbone: VoVNet = model.backbone  # type: ignore[assignment]
    else:
        _refuse_unknown(settings, fields(VoVNetConfig))
        if features_only:
            model = VoVNetFeatures(
                backbone_config,
                out_indices=out_indices,
                in_chans=in_chans,
                drop_path_rate=drop_path_rate,
                output_stride=output_stride,
            )
        else:
            model = VoVNet(
                backbone_config,
                num_classes=1000 if num_classes is None else num_classes,
                in_chans=in_chans,
                drop_rate=drop_rate,
                drop_path_rate=drop_path_rate,
                output_stride=output_stride,
            )
        loaded_backbone = model
    loaded_backbone.pretrained_cfg = pretrained_cfg(backbone_name)
    if pretrained:
        load_published(loaded_backbone, backbone_name)
    if checkpoint_path is not None:
        load_checkpoint(model, Path(checkpoint_path), name=name)
    return model


def _apply_overrides(
    config: VoVNetConfig, overrides: Mapping[str, object] | None
) -> tuple[VoVNetConfig, dict[str, object]]:
    """The backbone's config with its own settings applied, and the settings that are not
    its own.
    """
    overrides = {} if overrides is None else overrides
    if not isinstance(overrides, Mapping) or not all(isinstance(key, str) for key in overrides):
        raise ConfigError(f"overrides: expected settings by name, got {overrides!r:.200}")
    names = {field.name for field in fields(config)}
    own: dict[str, Any] = {key: value for key, value in overrides.items() if key in names}
    return replace(config, **own), {k: v for k, v in overrides.items() if k not in names}


def _refuse_unknown(settings: Mapping[str, object], known: Sequence[Any]) -> None:
    names = [field.name for field in known]
    for key in settings:
        if key not in names:
            near = ", ".join(get_close_matches(key, names, n=3) or names)
            raise ConfigError(f"model settings: expected one of {near}, got {key!r}")


def _check_rate(name: str, value: object) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1:
        raise ConfigError(f"{name}: expected a number from 0 to below 1, got {value!r}")


def _check_indices(indices: object) -> None:
    """Raises ConfigError unless they choose some of the five feature maps."""
    listed = [indices] if isinstance(indices, int) else indices
    if not isinstance(listed, list | tuple | range) or any(type(i) is not int for i in listed):
        raise ConfigError(f"out_indices: expected whole numbers, got {indices!r}")
    if isinstance(indices, int) and not 1 <= indices <= _MAPS:
        raise ConfigError(f"out_indices: expected 1..{_MAPS} as a number of maps, got {indices}")
    try:
        resolve_indices(indices, _MAPS)  # type: ignore[arg-type]
    except ValueError as error:
        raise ConfigError(f"out_indices: {error}") from error


def _build_detector(
    config: DetectorConfig,
    settings: dict[str, Any],
    backbone_config: VoVNetConfig,
    num_classes: int | None,
    in_chans: int,
    drop_path_rate: float,
) -> nn.Module:
    _refuse_unknown(settings, fields(config))
    if num_classes is not None:
        if "num_classes" in settings:
            raise ConfigError("overrides: expected num_classes as an argument or here, got both")
        settings = settings | {"num_classes": num_classes}
    config = replace(config, **settings)
    check_settings(config)
    make_backbone = partial(
        VoVNetFeatures, backbone_config, in_chans=in_chans, drop_path_rate=drop_path_rate
    )
    return _FAMILIES[type(config)].build(make_backbone, config)


_MakeBackbone = Callable[..., VoVNetFeatures]  # with out_indices, the maps that a detector looks at
_STAGES_3_TO_4 = (2, 3)
_STAGES_3_TO_5 = (2, 3, 4)
_STAGES_2_TO_5 = (1, 2, 3, 4)


def _build_fcos(make_backbone: _MakeBackbone, config: FCOSConfig) -> FCOS:
    check_groups("neck_channels", [config.neck_channels], groups=32)
    backbone = make_backbone(out_indices=_STAGES_3_TO_5)
    neck = FPN(backbone.feature_info.channels(), out_channels=config.neck_channels)
    head = FCOSHead(config.neck_channels, config.num_classes, tower_convs=config.tower_convs)
    return FCOS(backbone, neck, head, config)


def _build_centermask(make_backbone: _MakeBackbone, config: CenterMaskConfig) -> CenterMask:
    fcos = _build_fcos(make_backbone, config)
    mask_head = MaskHead(
        config.neck_channels, config.mask_channels, config.num_classes, convs=config.mask_convs
    )
    mask_iou_head = MaskIoUHead(
        config.neck_channels,
        config.mask_channels,
        config.num_classes,
        convs=config.mask_convs,
        width=config.mask_iou_width,
    )
    return CenterMask(fcos, mask_head, mask_iou_head, config)


def _build_faster_rcnn(make_backbone: _MakeBackbone, config: RCNNConfig) -> FasterRCNN:
    backbone = make_backbone(out_indices=_STAGES_2_TO_5)
    neck = PooledFPN(
        backbone.feature_info.channels(), out_channels=config.neck_channels, norm=config.head_norm
    )
    rpn = RPNHead(config.neck_channels, ratios=len(config.anchor_ratios))
    return FasterRCNN(backbone, neck, rpn, BoxHead(config), config)


def _build_mask_rcnn(make_backbone: _MakeBackbone, config: MaskRCNNConfig) -> MaskRCNN:
    return MaskRCNN(_build_faster_rcnn(make_backbone, config), FCNMaskHead(config), config)


def _build_refinedet(make_backbone: _MakeBackbone, config: RefineDetConfig) -> RefineDet:
    backbone = make_backbone(out_indices=_STAGES_3_TO_5)
    head = RefineDetHead(backbone.feature_info.channels(), config)
    return RefineDet(backbone, head, config)


def _build_dsod(make_backbone: _MakeBackbone, config: DSODConfig) -> DSOD:
    backbone = make_backbone(out_indices=_STAGES_3_TO_4)
    backbone.stages = backbone.stages[:3]  # it ends at stride 16
    return DSOD(backbone, DSODHead(backbone.feature_info.channels(), config), config)


def _build_vovdet(make_backbone: _MakeBackbone, config: VovDetConfig) -> VovDet:
    check_count("box_bins", config.box_bins, least=2)
    limits = config.level_limits
    if len(limits) not in (2, 3):
        raise ConfigError(f"model settings: level_limits: expected 2 or 3 numbers, got {limits}")
    if config.center_radius < 0.5:
        raise ConfigError(
            "model settings: center_radius: expected 0.5 strides or more, below which objects lie "
            f"between locations, got {config.center_radius}"
        )
    backbone = make_backbone(out_indices=1 + len(limits))  # the last maps: one for each level
    conv: ConvKind = "depthwise" if config.depthwise else "plain"
    neck = Pan(backbone.feature_info.channels(), out_channels=config.neck_channels, conv=conv)
    prototypes = None
    if isinstance(config, VovDetSegConfig):
        prototypes = PrototypeHead(config.neck_channels, config.prototypes, conv=conv)
    one_head = VovDetHead(config) if config.one_to_one else None
    return VovDet(backbone, neck, VovDetHead(config), one_head, prototypes, config)


@dataclass(frozen=True, slots=True)
class _Family:
    task: Task
    build: Callable[[_MakeBackbone, Any], nn.Module]


_FAMILIES: dict[type[DetectorConfig], _Family] = {
    FCOSConfig: _Family("detect", _build_fcos),
    CenterMaskConfig: _Family("segment", _build_centermask),
    RCNNConfig: _Family("detect", _build_faster_rcnn),
    MaskRCNNConfig: _Family("segment", _build_mask_rcnn),
    RefineDetConfig: _Family("detect", _build_refinedet),
    DSODConfig: _Family("detect", _build_dsod),
    VovDetConfig: _Family("detect", _build_vovdet),
    VovDetSegConfig: _Family("segment", _build_vovdet),
}
