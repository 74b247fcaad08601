"""DSOD (Shen et al. 2017), a detector made for training from scratch, on a VoVNet as in the VoVNet
paper: dense multi-scale prediction, half of each source learned and half taken over.

How the VoVNet authors attached their backbone is not published. Here it ends at stride 16 like
DSOD's own, so without stage 5: the first source is stage 3, the second stage 4 beside stage 3
pooled. With VoVNet-27-slim, the paper's stem, 300 x 300 pixels and 20 classes that makes 5.84 M
parameters and 5.77 G macs; the paper states 5.9 and 5.6.

Shapes: B images, A priors over the six sources, row by row, shapes innermost.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import sqrt

import torch
from torch import Tensor, nn
from torch.nn import functional

from vovnet.errors import ConfigError
from vovnet.models.boxes import Target, decode_boxes, grid_boxes
from vovnet.models.layers import (
    ConvNormAct,
    at_least_float32,
    flatten_anchors,
    init_weights,
)
from vovnet.models.multibox import (
    VARIANCE_WEIGHTS,
    MultiboxConfig,
    assign_priors,
    multibox_loss,
    priors_inside,
    select_detections,
)
from vovnet.models.settings import check_settings

LEVELS = 6
_L2_SCALE = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DSODConfig(MultiboxConfig):
    """The settings of DSOD300; the defaults are those of its authors' released code.

    anchor_steps are that code's too: those of the last two maps fit 300 pixels, where the maps'
    strides are 128 and 256. Priors centred beyond the image take no part.
    """

    source_channels: int = 256  # of each half of the second source
    extra_channels: tuple[int, ...] = (256, 128, 128, 128)  # of each half of the four after it
    anchor_sizes: tuple[float, ...] = (
        30,
        60,
        111,
        162,
        213,
        264,
        315,
    )  # pixels; the last: no level
    anchor_ratios: tuple[tuple[float, ...], ...] = ((2,), (2, 3), (2, 3), (2, 3), (2,), (2,))
    anchor_steps: tuple[float, ...] = (8, 16, 32, 64, 100, 300)  # pixels between centres

    def __post_init__(self) -> None:
        check_settings(self)
        lengths = {
            "extra_channels": LEVELS - 2,
            "anchor_sizes": LEVELS + 1,
            "anchor_ratios": LEVELS,
            "anchor_steps": LEVELS,
        }
        for name, length in lengths.items():
            value = getattr(self, name)
            if len(value) != length:
                raise ConfigError(
                    f"model settings: {name}: expected a list of {length}, got {value!r:.200}"
                )


class NormActConv(nn.Module):
    """BatchNorm, ReLU, convolution without bias (padding k // 2): DSOD's order."""

    def __init__(self, in_channels: int, out_channels: int, *, kernel: int, stride: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(in_channels)
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel, stride=stride, padding=kernel // 2, bias=False
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(functional.relu(self.bn(x)))  # type: ignore[no-any-return]


class DenseSource(nn.Module):
    """The next coarser source (B, 2 * channels, H / 2, W / 2): the last one pooled and reduced,
    beside what two convolutions learn from it.
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.pooled = NormActConv(in_channels, channels, kernel=1, stride=1)
        self.reduce = NormActConv(in_channels, channels, kernel=1, stride=1)
        self.learned = NormActConv(channels, channels, kernel=3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        # As ceil_mode would, on a map of one pixel too, where not every engine pools with it.
        padded = functional.pad(x, (0, 1, 0, 1), mode="replicate")
        pooled = self.pooled(functional.max_pool2d(padded, 2, stride=2))
        return torch.cat([pooled, self.learned(self.reduce(x))], dim=1)


class ScaledNorm(nn.Module):
    """Each pixel's channels at unit length, times a learned scale per channel (ParseNet)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels,), _L2_SCALE))

    def forward(self, x: Tensor) -> Tensor:
        unit = functional.normalize(at_least_float32(x), dim=1)
        return (unit * self.weight[:, None, None]).to(x.dtype)


class SourcePredictor(nn.Module):
    """Logits (B, H * W * R, classes) and deltas (B, H * W * R, 4) of a source: 3x3, BatchNorm."""

    def __init__(self, in_channels: int, *, shapes: int, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.norm = ScaledNorm(in_channels)
        self.logits = _make_output(in_channels, shapes * classes)
        self.deltas = _make_output(in_channels, shapes * 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm(x)
        logits = flatten_anchors(self.logits(x), self.classes)
        return logits, flatten_anchors(self.deltas(x), 4)


def _make_output(in_channels: int, out_channels: int) -> ConvNormAct:
    return ConvNormAct(in_channels, out_channels, kernel=3, stride=1, norm="bn", activation=False)


class DSODHead(nn.Module):
    """Everything behind the backbone, whose two maps have strides 8 and 16."""

    def __init__(self, in_channels: Sequence[int], config: DSODConfig) -> None:
        super().__init__()
        first, second = in_channels
        channels = config.source_channels
        self.steps, self.shapes = config.anchor_steps, prior_shapes(config)
        self.first_pooled = NormActConv(first, channels, kernel=1, stride=1)
        self.second = NormActConv(second, channels, kernel=1, stride=1)
        widths = [first, 2 * channels, *(2 * one for one in config.extra_channels)]
        self.extra = nn.ModuleList(
            DenseSource(before, after // 2) for before, after in pairwise(widths[1:])
        )
        self.predictors = nn.ModuleList(
            SourcePredictor(width, shapes=len(shapes), classes=config.num_classes + 1)
            for width, shapes in zip(widths, self.shapes, strict=True)
        )
        self.apply(init_weights)

    def forward(self, features: Sequence[Tensor]) -> dict[str, Tensor]:
        """logits (B, A, C + 1), deltas (B, A, 4), and the anchors (A, 4) xyxy in input pixels."""
        first, second = features
        # The backbone's own pool, so that the two maps have one size.
        pooled = functional.max_pool2d(first, 3, stride=2, ceil_mode=True)
        sources = [first, torch.cat([self.second(second), self.first_pooled(pooled)], dim=1)]
        for extra in self.extra:
            sources.append(extra(sources[-1]))
        found = [predict(source) for predict, source in zip(self.predictors, sources, strict=True)]
        logits, deltas = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
        levels = zip(sources, self.steps, self.shapes, strict=True)
        anchors = [
            grid_boxes((m.shape[2], m.shape[3]), deltas.new_tensor(sides), step=step, offset=0.5)
            for m, step, sides in levels
        ]
        return {"logits": logits, "deltas": deltas, "anchors": torch.cat(anchors)}


def prior_shapes(config: DSODConfig) -> list[list[tuple[float, float]]]:
    """Width and height of each level's priors: the square, a larger one, then each ratio both ways.

    The larger square lies between this level's size and the next one's.
    """
    shapes = []
    sizes = pairwise(config.anchor_sizes)
    for (size, following), ratios in zip(sizes, config.anchor_ratios, strict=True):
        larger = sqrt(size * following)
        level = [(size, size), (larger, larger)]
        for ratio in ratios:
            long, short = size * sqrt(ratio), size / sqrt(ratio)
            level += [(long, short), (short, long)]
        shapes.append(level)
    return shapes


class DSOD(nn.Module):
    """Backbone and head. Input (B, 3, H, W) float, normalised and zero-padded; the backbone returns
    two maps of strides 8 and 16.
    """

    has_masks = False

    def __init__(self, backbone: nn.Module, head: nn.Module, config: DSODConfig) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.config = config

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Raw outputs: those of DSODHead."""
        return self.head(self.backbone(images))  # type: ignore[no-any-return]

    def loss(
        self, raw: dict[str, Tensor], targets: Sequence[Target], sizes: Tensor
    ) -> dict[str, Tensor]:
        """loss_cls, loss_box (scalars) of a batch; priors centred beyond sizes (B, 2), height and
        width, take no part.
        """
        config, anchors = self.config, raw["anchors"]
        inside = priors_inside(anchors, sizes)
        iou = (config.positive_iou, config.negative_iou)
        assignments = [
            assign_priors(anchors, target, usable, config, iou=iou)
            for target, usable in zip(targets, inside, strict=True)
        ]
        cls, box = multibox_loss(
            raw["logits"],
            raw["deltas"],
            anchors.expand_as(raw["deltas"]),
            assignments,
            [target.boxes_xyxy for target in targets],
            [target.labels for target in targets],
            per_positive=config.negatives_per_positive,
        )
        return {"loss_cls": cls, "loss_box": box}

    def detect(self, raw: dict[str, Tensor], sizes: Tensor) -> dict[str, Tensor]:
        """boxes (B, K, 4) in input pixels, cut at the image; scores, labels, valid (B, K), best
        first.
        """
        return select_detections(*self.candidates(raw, sizes), sizes, self.config)

    def candidates(self, raw: dict[str, Tensor], sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes (B, A, 4) and class probabilities (B, A, C), 0 of priors outside the image."""
        anchors = raw["anchors"].expand_as(raw["deltas"])
        boxes = decode_boxes(raw["deltas"], anchors, weights=VARIANCE_WEIGHTS)
        usable = priors_inside(raw["anchors"], sizes)
        return boxes, raw["logits"].softmax(2)[..., :-1] * usable[:, :, None]
