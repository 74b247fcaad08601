"""RefineDet (Zhang et al. 2018) as the VoVNet paper measures it: anchors refined once (ARM),
features handed over top-down (TCB), classes on the refined anchors (ODM).

Shapes: B images, A anchors over the maps of strides 8, 16, 32, 64, row by row, ratios innermost.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from vovnet.errors import ConfigError
from vovnet.models.boxes import Target, decode_boxes, grid_boxes
from vovnet.models.layers import ConvNormAct, flatten_anchors, init_weights
from vovnet.models.multibox import (
    VARIANCE_WEIGHTS,
    Assignment,
    MultiboxConfig,
    assign_priors,
    multibox_loss,
    priors_inside,
    select_detections,
)
from vovnet.models.settings import check_settings

STRIDES = (8, 16, 32, 64)


@dataclass(frozen=True, slots=True, kw_only=True)
class RefineDetConfig(MultiboxConfig):
    """The settings of RefineDet; the defaults are those of the VoVNet authors' released code.

    RefineDet320 and RefineDet512 are one network: the paper resizes each picture to a square of
    that many pixels (Preprocess.square).
    """

    neck_channels: int = 256
    anchor_sizes: tuple[float, ...] = (32, 64, 128, 256)  # pixels, one per level
    anchor_ratios: tuple[float, ...] = (1.0, 2.0, 0.5)  # width over height
    arm_positive_iou: float = 0.5
    arm_negative_iou: float = 0.5
    objectness_threshold: float = 0.01  # anchors below it are no negatives and no detections
    pre_nms_top_k: int = 1000  # per class
    max_detections: int = 500

    def __post_init__(self) -> None:
        check_settings(self)
        if len(self.anchor_sizes) != len(STRIDES) or not self.anchor_ratios:
            raise ConfigError(
                f"model settings: expected {len(STRIDES)} anchor_sizes and at least one of "
                f"anchor_ratios, got {self.anchor_sizes!r} and {self.anchor_ratios!r}"
            )


class Bottleneck(nn.Module):
    """ResNet's residual block with a projection; the stride is in its first 1x1 (B, C, H, W)."""

    def __init__(
        self, in_channels: int, mid_channels: int, out_channels: int, *, stride: int = 1
    ) -> None:
        super().__init__()
        self.shortcut = ConvNormAct(
            in_channels, out_channels, kernel=1, stride=stride, norm="bn", activation=False
        )
        self.reduce = ConvNormAct(in_channels, mid_channels, kernel=1, stride=stride, norm="bn")
        self.conv = ConvNormAct(mid_channels, mid_channels, kernel=3, stride=1, norm="bn")
        self.expand = ConvNormAct(
            mid_channels, out_channels, kernel=1, stride=1, norm="bn", activation=False
        )

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.shortcut(x) + self.expand(self.conv(self.reduce(x))))


class AnchorPredictor(nn.Module):
    """A residual block, then logits (B, H * W * R, classes) and deltas (B, H * W * R, 4)."""

    def __init__(self, in_channels: int, channels: int, *, ratios: int, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.body = Bottleneck(in_channels, channels, 4 * channels)
        self.logits = nn.Conv2d(4 * channels, ratios * classes, 3, padding=1)
        self.deltas = nn.Conv2d(4 * channels, ratios * 4, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.body(x)
        logits = flatten_anchors(self.logits(x), self.classes)
        return logits, flatten_anchors(self.deltas(x), 4)


class TransferBlock(nn.Module):
    """TCB: two convolutions of an ARM source, plus the coarser level enlarged, and one more."""

    def __init__(self, in_channels: int, channels: int, *, coarsest: bool) -> None:
        super().__init__()
        self.first = ConvNormAct(in_channels, channels, kernel=3, stride=1, norm="bn")
        self.second = ConvNormAct(
            channels, channels, kernel=3, stride=1, norm="bn", activation=coarsest
        )
        self.enlarge = nn.Sequential() if coarsest else _make_enlarge(channels)
        self.output = ConvNormAct(channels, channels, kernel=3, stride=1, norm="bn")

    def forward(self, source: Tensor, coarser: Tensor | None) -> Tensor:
        x: Tensor = self.second(self.first(source))
        if coarser is not None:
            enlarged = self.enlarge(coarser)
            # Cut or filled with zeros where the finer map is not exactly twice as large.
            height, width = (a - b for a, b in zip(x.shape[2:], enlarged.shape[2:], strict=True))
            x = functional.relu(x + functional.pad(enlarged, (0, width, 0, height)))
        return self.output(x)  # type: ignore[no-any-return]


def _make_enlarge(channels: int) -> nn.Sequential:
    conv = nn.ConvTranspose2d(channels, channels, 2, stride=2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm2d(channels))


class RefineDetHead(nn.Module):
    """Everything behind the backbone, whose three maps have strides 8, 16, 32."""

    def __init__(self, in_channels: Sequence[int], config: RefineDetConfig) -> None:
        super().__init__()
        channels, ratios = config.neck_channels, len(config.anchor_ratios)
        self.anchor_sizes, self.anchor_ratios = config.anchor_sizes, config.anchor_ratios
        self.extra = Bottleneck(in_channels[-1], channels // 2, 2 * channels, stride=2)
        widths = [*in_channels, 2 * channels]
        self.arm = nn.ModuleList(
            AnchorPredictor(width, channels, ratios=ratios, classes=2) for width in widths
        )
        self.tcb = nn.ModuleList(
            TransferBlock(width, channels, coarsest=level == len(widths) - 1)
            for level, width in enumerate(widths)
        )
        self.odm = nn.ModuleList(
            AnchorPredictor(channels, channels, ratios=ratios, classes=config.num_classes + 1)
            for _ in widths
        )
        self.apply(init_weights)
        for predictor in (*self.arm, *self.odm):
            for last in (predictor.logits, predictor.deltas):
                nn.init.xavier_uniform_(last.weight)

    def forward(self, features: Sequence[Tensor]) -> dict[str, Tensor]:
        """arm_logits (B, A, 2), logits (B, A, C + 1), arm_deltas and deltas (B, A, 4), and the
        anchors (A, 4) xyxy in input pixels.
        """
        sources = [*features, self.extra(features[-1])]
        arm = [predict(source) for predict, source in zip(self.arm, sources, strict=True)]
        maps: list[Tensor | None] = [None]
        for transfer, source in zip(reversed(self.tcb), reversed(sources), strict=True):
            maps.insert(0, transfer(source, maps[0]))
        odm = [predict(feature) for predict, feature in zip(self.odm, maps[:-1], strict=True)]
        arm_logits, arm_deltas = (torch.cat(parts, dim=1) for parts in zip(*arm, strict=True))
        logits, deltas = (torch.cat(parts, dim=1) for parts in zip(*odm, strict=True))
        return {
            "arm_logits": arm_logits,
            "arm_deltas": arm_deltas,
            "logits": logits,
            "deltas": deltas,
            "anchors": self._anchors(sources, like=deltas),
        }

    def _anchors(self, sources: Sequence[Tensor], *, like: Tensor) -> Tensor:
        ratio = like.new_tensor(self.anchor_ratios).sqrt()
        shape = torch.stack([ratio, 1 / ratio], dim=1)  # (R, 2)
        levels = zip(sources, STRIDES, self.anchor_sizes, strict=True)
        return torch.cat(
            [
                grid_boxes((m.shape[2], m.shape[3]), size * shape, step=stride, offset=0.5)
                for m, stride, size in levels
            ]
        )


class RefineDet(nn.Module):
    """Backbone and head. Input (B, 3, H, W) float, normalised and zero-padded; the backbone is any
    module that returns three maps of strides 8, 16, 32.
    """

    has_masks = False

    def __init__(self, backbone: nn.Module, head: nn.Module, config: RefineDetConfig) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.config = config

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Raw outputs: those of RefineDetHead."""
        return self.head(self.backbone(images))  # type: ignore[no-any-return]

    def loss(
        self, raw: dict[str, Tensor], targets: Sequence[Target], sizes: Tensor
    ) -> dict[str, Tensor]:
        """loss_arm_cls, loss_arm_box, loss_cls, loss_box (scalars) of a batch; anchors centred
        beyond sizes (B, 2), height and width, take no part.
        """
        return refinedet_loss(raw, targets, sizes, self.config)

    def detect(self, raw: dict[str, Tensor], sizes: Tensor) -> dict[str, Tensor]:
        """boxes (B, K, 4) in input pixels, cut at the image; scores, labels, valid (B, K), best
        first.
        """
        return select_detections(*self.candidates(raw, sizes), sizes, self.config)

    def candidates(self, raw: dict[str, Tensor], sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes (B, A, 4) and class probabilities (B, A, C), 0 of anchors that do not count."""
        refined = refine_anchors(raw)
        boxes = decode_boxes(raw["deltas"], refined, weights=VARIANCE_WEIGHTS)
        usable = priors_inside(raw["anchors"], sizes)
        usable &= raw["arm_logits"].softmax(2)[..., 0] >= self.config.objectness_threshold
        return boxes, raw["logits"].softmax(2)[..., :-1] * usable[:, :, None]


def refine_anchors(raw: dict[str, Tensor]) -> Tensor:
    """The anchors (B, A, 4) as the ARM moves them; no gradient flows back through them."""
    anchors = raw["anchors"].expand_as(raw["arm_deltas"])
    return decode_boxes(raw["arm_deltas"].detach(), anchors, weights=VARIANCE_WEIGHTS)


def refinedet_loss(
    raw: dict[str, Tensor], targets: Sequence[Target], sizes: Tensor, config: RefineDetConfig
) -> dict[str, Tensor]:
    """The multibox losses of the ARM, object or not on the anchors, and of the ODM, classes on the
    refined anchors. An anchor that the ARM is sure to be background is no negative of the ODM.
    """
    anchors = raw["anchors"]
    refined = refine_anchors(raw)
    inside = priors_inside(anchors, sizes)
    arm_iou = (config.arm_positive_iou, config.arm_negative_iou)
    odm_iou = (config.positive_iou, config.negative_iou)
    arm, odm = [], []
    for image, target in enumerate(targets):
        arm.append(assign_priors(anchors, target, inside[image], config, iou=arm_iou))
        odm.append(assign_priors(refined[image], target, inside[image], config, iou=odm_iou))
    objectness = raw["arm_logits"].detach().softmax(2)[..., 0]
    odm = [
        Assignment(one.positive, one.negative & likely, one.matched)
        for one, likely in zip(odm, objectness >= config.objectness_threshold, strict=True)
    ]
    boxes = [target.boxes_xyxy for target in targets]
    labels = [target.labels for target in targets]
    objects = [torch.zeros_like(own) for own in labels]
    ratio = config.negatives_per_positive
    every = anchors.expand_as(refined)
    arm_losses = multibox_loss(
        raw["arm_logits"], raw["arm_deltas"], every, arm, boxes, objects, per_positive=ratio
    )
    odm_losses = multibox_loss(
        raw["logits"], raw["deltas"], refined, odm, boxes, labels, per_positive=ratio
    )
    return dict(
        zip(
            ("loss_arm_cls", "loss_arm_box", "loss_cls", "loss_box"),
            (*arm_losses, *odm_losses),
            strict=True,
        )
    )
