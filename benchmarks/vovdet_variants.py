"""The variants of VovDet that `vovdet_ablation.py` compares, each with one choice made otherwise.

What no setting changes is put in the place of the name that vovnet.models.vovdet looks up, within
`replacing` alone.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import log
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from vovnet.models import vovdet
from vovnet.models.boxes import distances_to_boxes
from vovnet.models.layers import ConvKind, ConvNormAct, init_weights, make_conv3x3
from vovnet.models.pan import Pan
from vovnet.models.vovdet import VovDet, VovDetConfig, VovDetHead
from vovnet.models.vovnet import VARIANTS as BACKBONES
from vovnet.models.vovnet import OsaBlock, VoVNetFeatures
from vovnet.models.zoo import SIZED

BASE = "as-is"
FIRST_DISTANCE = 7.5  # strides: the mean of an even distribution over 16 bins
MAX_LOG_DISTANCE = log(1000 / 16)


def conv_of(config: VovDetConfig) -> ConvKind:
    """The kind of the neck's 3x3 convolutions."""
    return "depthwise" if config.depthwise else "plain"


def make_pan(in_channels: Sequence[int], config: VovDetConfig) -> Pan:
    """The neck as it is."""
    return Pan(in_channels, out_channels=config.neck_channels, conv=conv_of(config))


def make_osa_pan(in_channels: Sequence[int], config: VovDetConfig) -> Pan:
    """The neck with an OSA block, of three convolutions half as wide, for each fusion."""
    width = config.neck_channels
    neck = make_pan(in_channels, config)
    for fusions in (neck.top_down, neck.bottom_up):
        for index in range(len(fusions)):
            fusions[index] = OsaBlock(
                2 * width,
                width // 2,
                width,
                layers=3,
                conv=conv_of(config),
                dilation=1,
                attention="none",
                identity=False,
                norm="bn",
                drop_path=0.0,
            )
    neck.apply(init_weights)
    return neck


class Fpn(nn.Module):
    """A feature pyramid (Lin et al. 2017) with BatchNorm and ReLU after each convolution: the sum
    of lateral maps from the coarsest down, then one 3x3 convolution for each level.
    """

    def __init__(self, in_channels: Sequence[int], config: VovDetConfig) -> None:
        super().__init__()
        width = config.neck_channels
        self.lateral = nn.ModuleList(
            ConvNormAct(channels, width, kernel=1, stride=1, norm="bn") for channels in in_channels
        )
        self.output = nn.ModuleList(
            make_conv3x3(conv_of(config), width, width, stride=1, norm="bn") for _ in in_channels
        )
        self.apply(init_weights)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Maps of strides 8, 16, 32 to maps (B, neck_channels, H_l, W_l) of the same strides."""
        maps = [conv(feature) for conv, feature in zip(self.lateral, features, strict=True)]
        for level in range(len(maps) - 2, -1, -1):
            size = maps[level].shape[-2:]
            maps[level] = maps[level] + functional.interpolate(maps[level + 1], size=size)
        return [conv(one) for conv, one in zip(self.output, maps, strict=True)]


def decode_distances(distances: Tensor, points: Tensor, strides: Tensor) -> Tensor:
    """In the place of decode_distributions: one number (..., 4) for each side of a box, whose
    exponential is the distance in FIRST_DISTANCE strides (FCOS, section 3.2).

    At zero, where training starts, boxes are as large as those of even distributions.
    """
    factor = distances.clamp(max=MAX_LOG_DISTANCE).exp()
    return distances_to_boxes(points, FIRST_DISTANCE * factor * strides)


def no_distribution_loss(logits: Tensor, target: Tensor) -> Tensor:
    """In the place of distribution_focal_loss, where nothing is distributed."""
    return logits.sum(-1) * 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """What differs from VovDet as it is; the defaults are what it has itself."""

    change: str
    backbone: Mapping[str, Any] = field(default_factory=dict)  # settings of VoVNetConfig
    settings: Mapping[str, Any] = field(default_factory=dict)  # of VovDetConfig
    neck: Callable[[Sequence[int], VovDetConfig], nn.Module] = make_pan
    replaced: Mapping[str, Any] = field(default_factory=dict)  # names of vovnet.models.vovdet


VOVDET_VARIANTS = {
    BASE: Variant(change="nothing"),
    "fpn": Variant(change="neck: plain FPN, nothing goes up", neck=Fpn),
    "osa-neck": Variant(change="neck: PAN of OSA blocks", neck=make_osa_pan),
    "no-dfl": Variant(
        change="boxes: one number a side, GIoU alone",
        settings={"box_bins": 1, "distribution_weight": 0.0},
        replaced={
            "decode_distributions": decode_distances,
            "distribution_focal_loss": no_distribution_loss,
        },
    ),
    "bce": Variant(
        change="scores: binary cross entropy, same soft targets", settings={"focal_gamma": 0.0}
    ),
    "light-boxes": Variant(
        change="box losses of 2 and 0.5 in place of 5 and 1.25",
        settings={"box_weight": 2.0, "distribution_weight": 0.5},
    ),
    "aligned": Variant(change="assignment: task-aligned", settings={"assignment": "aligned"}),
    "ese": Variant(change="backbone: eSE, as V2", backbone={"attention": "ese"}),
    "slim": Variant(
        change="backbone: widths of 19-slim-dw",
        backbone={
            "stem_channels": (64, 64, 64),
            "stage_conv_channels": (64, 80, 96, 112),
            "stage_out_channels": (112, 256, 384, 512),
        },
    ),
    "stride-4": Variant(
        change="one more level, of stride 4",
        settings={"level_limits": (32, 64, 128)},
    ),
}


@contextmanager
def replacing(names: Mapping[str, Any]) -> Iterator[None]:
    """Within it vovnet.models.vovdet has these in the place of its own."""
    own = {name: getattr(vovdet, name) for name in names}
    vars(vovdet).update(names)
    try:
        yield
    finally:
        vars(vovdet).update(own)


def build(variant: Variant, model: str, *, num_classes: int) -> VovDet:
    """A variant of a VovDet of this name, such as vovdet_n, with random weights."""
    base, backbone_name = SIZED[model]
    if type(base) is not VovDetConfig:
        raise SystemExit(f"--model: expected a VovDet without masks, got {model}")
    config = replace(base, num_classes=num_classes, **variant.settings)
    backbone_config = replace(BACKBONES[backbone_name], **variant.backbone)
    with replacing(variant.replaced):
        backbone = VoVNetFeatures(backbone_config, out_indices=1 + len(config.level_limits))
        neck = variant.neck(backbone.feature_info.channels(), config)
        return VovDet(backbone, neck, VovDetHead(config), None, None, config)
