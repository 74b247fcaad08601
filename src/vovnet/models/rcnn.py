"""Faster R-CNN (Ren et al. 2015) and Mask R-CNN (He et al. 2017) with a feature pyramid, as in
detectron2.

Shapes: B images, M regions over the whole batch, C classes, K kept detections per image.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from vovnet.errors import ConfigError
from vovnet.models.boxes import (
    Target,
    class_wise_nms,
    clip_boxes,
    covered_fraction,
    decode_boxes,
    encode_boxes,
    match_boxes,
    pad_rows,
    sample_balanced,
)
from vovnet.models.layers import HeadNorm, at_least_float32, make_conv
from vovnet.models.roi import assign_levels_by_size, pool_regions
from vovnet.models.rpn import STRIDES, RPNConfig, propose, rpn_loss
from vovnet.models.settings import check_groups, check_settings

MASK_SIZE = 28
BOX_REGION_SIZE = 7
MASK_REGION_SIZE = 14
LEVELS = (2, 3, 4, 5)  # regions are read from; P6 only proposes
DELTA_WEIGHTS = (10.0, 10.0, 5.0, 5.0)  # of the four deltas
_BOX_LAYERS = {"none": (0, 2), "gn": (4, 1)}  # convolutions and fully connected layers


@dataclass(frozen=True, slots=True, kw_only=True)
class RCNNConfig(RPNConfig):
    """The settings of Faster R-CNN; the defaults are detectron2's.

    head_norm "gn" is for training from scratch with GroupNorm, as the VoVNet paper does (table 5):
    norm after every convolution of neck and heads but the last ones. The box head then has four 3x3
    convolutions and one fully connected layer (Wu & He 2018), as VoVNet-Detectron configures it.
    """

    head_norm: HeadNorm = "none"
    box_conv_channels: int = 256  # with head_norm "gn"
    box_width: int = 1024  # of the fully connected layers
    box_positive_iou: float = 0.5  # less is background
    rois_per_image: int = 512  # regions per image that the box losses look at
    roi_positive_fraction: float = 0.25
    score_threshold: float = 0.05
    min_score: float = 0.0  # a second limit, which callers set to what they show
    nms_threshold: float = 0.5
    max_detections: int = 100  # K

    def __post_init__(self) -> None:
        check_settings(self)
        if self.head_norm == "gn":
            check_groups("neck_channels", [self.neck_channels], groups=16)
            check_groups("box_conv_channels", [self.box_conv_channels], groups=16)
        if len(self.anchor_sizes) != len(STRIDES) or not self.anchor_ratios:
            raise ConfigError(
                f"model settings: expected {len(STRIDES)} anchor_sizes and at least one of "
                f"anchor_ratios, got {self.anchor_sizes!r} and {self.anchor_ratios!r}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskRCNNConfig(RCNNConfig):
    """The settings of Mask R-CNN; the defaults are detectron2's."""

    mask_convs: int = 4
    mask_channels: int = 256


@dataclass(frozen=True, slots=True)
class SampledRegions:
    """The regions of one image that the losses look at: R, of which the first P hold an object."""

    boxes_xyxy: Tensor  # (R, 4)
    labels: Tensor  # (R,) int64, num_classes for background
    matches: Tensor  # (P,) int64, index of the object of each of the first P

    def positive(self) -> tuple[Tensor, Tensor]:
        """Boxes (P, 4) and labels (P,) of the regions that hold an object."""
        return self.boxes_xyxy[: len(self.matches)], self.labels[: len(self.matches)]


class BoxHead(nn.Module):
    """Class and box of a region: (M, c, 7, 7) to logits (M, C + 1), background last, and deltas
    (M, C, 4).
    """

    def __init__(self, config: RCNNConfig) -> None:
        super().__init__()
        convs, layers = _BOX_LAYERS[config.head_norm]
        channels = [config.neck_channels, *[config.box_conv_channels] * convs]
        self.convs = _make_convs(channels, config.head_norm)
        width, area = config.box_width, BOX_REGION_SIZE**2
        self.fcs = nn.ModuleList(
            nn.Linear(width if index else channels[-1] * area, width) for index in range(layers)
        )
        self.logits = nn.Linear(width, config.num_classes + 1)
        self.deltas = nn.Linear(width, config.num_classes * 4)
        for layer in self.fcs:
            nn.init.kaiming_uniform_(layer.weight, a=1)  # type: ignore[arg-type]
        nn.init.normal_(self.logits.weight, std=0.01)
        nn.init.normal_(self.deltas.weight, std=0.001)
        for layer in (*self.fcs, self.logits, self.deltas):
            nn.init.zeros_(layer.bias)

    def forward(self, regions: Tensor) -> tuple[Tensor, Tensor]:
        x = regions
        for conv in self.convs:
            x = functional.relu(conv(x))
        x = x.flatten(1)
        for layer in self.fcs:
            x = functional.relu(layer(x))
        deltas = self.deltas(x).unflatten(1, (-1, 4))
        return at_least_float32(self.logits(x)), at_least_float32(deltas)


class FCNMaskHead(nn.Module):
    """Convolutions, upsampling and one map per class: (M, c, 14, 14) to logits (M, C, 28, 28)."""

    def __init__(self, config: MaskRCNNConfig) -> None:
        super().__init__()
        channels = config.mask_channels
        widths = [config.neck_channels, *[channels] * config.mask_convs]
        self.convs = _make_convs(widths, config.head_norm)
        self.deconv = nn.ConvTranspose2d(channels, channels, 2, stride=2)
        self.predictor = nn.Conv2d(channels, config.num_classes, 1)
        nn.init.kaiming_normal_(self.deconv.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.predictor.weight, std=0.001)
        nn.init.zeros_(self.deconv.bias)  # type: ignore[arg-type]
        nn.init.zeros_(self.predictor.bias)  # type: ignore[arg-type]

    def forward(self, regions: Tensor) -> Tensor:
        x = regions
        for conv in self.convs:
            x = functional.relu(conv(x))
        return at_least_float32(self.predictor(functional.relu(self.deconv(x))))


class FasterRCNN(nn.Module):
    """Backbone, neck, proposals, box head. Input (B, 3, H, W) float, normalised and zero-padded to
    multiples of 32.
    """

    has_masks = False

    def __init__(
        self,
        backbone: nn.Module,
        neck: nn.Module,
        rpn: nn.Module,
        box_head: nn.Module,
        config: RCNNConfig,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = neck
        self.rpn = rpn
        self.box_head = box_head
        self.config = config

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Raw outputs: those of RPNHead, and the pyramid as p2 to p6 (B, neck_channels,
        H_l, W_l).
        """
        pyramid = self.neck(self.backbone(images))
        levels = {f"p{level}": feature for level, feature in enumerate(pyramid, start=2)}
        return self.rpn(pyramid) | levels  # type: ignore[no-any-return]

    def loss(
        self, raw: dict[str, Tensor], targets: Sequence[Target], sizes: Tensor
    ) -> dict[str, Tensor]:
        """loss_rpn_cls, loss_rpn_box, loss_cls, loss_box (scalars) of a batch; sizes (B, 2) height
        and width without padding.
        """
        regions = self.sample_regions(raw, targets, sizes)
        return rpn_loss(raw, targets, self.config) | self.box_loss(raw, targets, regions)

    def detect(self, raw: dict[str, Tensor], sizes: Tensor) -> dict[str, Tensor]:
        """boxes (B, K, 4) in input pixels, cut at the image; scores, labels, valid (B, K), best
        first.
        """
        config = self.config
        proposals = propose(
            raw, sizes, config, pre_nms_top_k=config.pre_nms_top_k, count=config.proposals
        )
        counts = [len(boxes) for boxes in proposals]
        logits, deltas = self.box_head(_pool(raw, proposals, BOX_REGION_SIZE))
        per_image = zip(proposals, logits.split(counts), deltas.split(counts), sizes, strict=True)
        found = [_select(*one_image, config) for one_image in per_image]
        columns = dict(zip(("boxes", "scores", "labels"), zip(*found, strict=True), strict=True))
        columns["valid"] = tuple(
            torch.ones_like(labels, dtype=torch.bool) for _, _, labels in found
        )
        return {name: pad_rows(rows, config.max_detections) for name, rows in columns.items()}

    @torch.no_grad()
    def sample_regions(
        self, raw: dict[str, Tensor], targets: Sequence[Target], sizes: Tensor
    ) -> list[SampledRegions]:
        """What the box losses look at in each image: drawn from proposals and true boxes."""
        config = self.config
        proposals = propose(
            raw,
            sizes,
            config,
            pre_nms_top_k=config.pre_nms_top_k_train,
            count=config.proposals_train,
        )
        return [
            sample_regions(boxes, target, config)
            for boxes, target in zip(proposals, targets, strict=True)
        ]

    def box_loss(
        self, raw: dict[str, Tensor], targets: Sequence[Target], regions: Sequence[SampledRegions]
    ) -> dict[str, Tensor]:
        """loss_cls: mean cross entropy; loss_box: L1 of the positives' deltas of their own class,
        summed and divided by the number of all regions.
        """
        boxes = [one.boxes_xyxy for one in regions]
        logits, deltas = self.box_head(_pool(raw, boxes, BOX_REGION_SIZE))
        labels = torch.cat([one.labels for one in regions])
        count = max(len(labels), 1)
        rows = torch.nonzero(labels < self.config.num_classes)[:, 0]
        matched = zip(regions, targets, strict=True)
        truth = torch.cat([t.boxes_xyxy[one.matches] for one, t in matched]).to(deltas.dtype)
        wanted = encode_boxes(truth, torch.cat(boxes)[rows].to(deltas.dtype), weights=DELTA_WEIGHTS)
        return {
            "loss_cls": functional.cross_entropy(logits, labels, reduction="sum") / count,
            "loss_box": (deltas[rows, labels[rows]] - wanted).abs().sum() / count,
        }


class MaskRCNN(nn.Module):
    """Faster R-CNN with a mask for each box. Input as FasterRCNN."""

    has_masks = True

    def __init__(
        self, faster_rcnn: FasterRCNN, mask_head: nn.Module, config: MaskRCNNConfig
    ) -> None:
        super().__init__()
        self.faster_rcnn = faster_rcnn
        self.mask_head = mask_head
        self.config = config

    @property
    def backbone(self) -> nn.Module:
        """The feature extractor."""
        return self.faster_rcnn.backbone

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """The raw outputs of FasterRCNN; masks belong to boxes, so loss and detect call what
        follows.
        """
        return self.faster_rcnn(images)  # type: ignore[no-any-return]

    def loss(
        self, raw: dict[str, Tensor], targets: Sequence[Target], sizes: Tensor
    ) -> dict[str, Tensor]:
        """The losses of FasterRCNN, and loss_mask: mean BCE of the true class's map over the
        positive regions.
        """
        regions = self.faster_rcnn.sample_regions(raw, targets, sizes)
        box_losses = self.faster_rcnn.box_loss(raw, targets, regions)
        mask_loss = {"loss_mask": self._mask_loss(raw, targets, regions)}
        return rpn_loss(raw, targets, self.config) | box_losses | mask_loss

    def detect(self, raw: dict[str, Tensor], sizes: Tensor) -> dict[str, Tensor]:
        """FasterRCNN's detections with mask_probs (B, K, 28, 28); mask_scores (B, K) are the boxes'
        scores.
        """
        found = self.faster_rcnn.detect(raw, sizes)
        valid = found["valid"]
        boxes = [image[kept] for image, kept in zip(found["boxes"], valid, strict=True)]
        masks = self._class_masks(raw, boxes, found["labels"][valid]).sigmoid()
        mask_probs = masks.new_zeros((*valid.shape, MASK_SIZE, MASK_SIZE))
        mask_probs[valid] = masks
        return found | {"mask_probs": mask_probs, "mask_scores": found["scores"]}

    def _class_masks(
        self, raw: dict[str, Tensor], boxes: Sequence[Tensor], labels: Tensor
    ) -> Tensor:
        """Mask logits (M, 28, 28) of each region's own class."""
        rows = torch.arange(len(labels), device=labels.device)
        maps = self.mask_head(_pool(raw, boxes, MASK_REGION_SIZE))
        return maps[rows, labels]  # type: ignore[no-any-return]

    def _mask_loss(
        self, raw: dict[str, Tensor], targets: Sequence[Target], regions: Sequence[SampledRegions]
    ) -> Tensor:
        boxes, labels = zip(*(one.positive() for one in regions), strict=True)
        logits = self._class_masks(raw, boxes, torch.cat(labels))
        if len(logits) == 0:  # keeps every parameter in the graph
            return logits.sum()
        truth = []
        for box, one, target in zip(boxes, regions, targets, strict=True):
            if len(box) and target.masks is None:
                raise ValueError(
                    "Mask R-CNN's loss: expected masks in every target, got one without"
                )
            if target.masks is not None:
                truth.append(target.masks.rasterize(box, one.matches, MASK_SIZE))
        return functional.binary_cross_entropy_with_logits(logits, torch.cat(truth).to(logits))


def sample_regions(proposals: Tensor, target: Target, config: RCNNConfig) -> SampledRegions:
    """Regions drawn from proposals (N, 4) and the true boxes of one image, positives first.

    Positive: an IoU of box_positive_iou with some object. Background in a crowd region is left out.
    """
    boxes = torch.cat([proposals, target.boxes_xyxy.to(proposals.dtype)])
    iou, matched, _ = match_boxes(boxes, target.boxes_xyxy.to(boxes.dtype))
    is_positive = iou >= config.box_positive_iou
    crowded = covered_fraction(boxes, target.ignore_xyxy.to(boxes)) > config.crowd_fraction
    positive, negative = sample_balanced(
        is_positive,
        ~is_positive & ~crowded,
        count=config.rois_per_image,
        positive_fraction=config.roi_positive_fraction,
    )
    matches = matched[positive]
    background = torch.full_like(negative, config.num_classes)
    labels = torch.cat([target.labels[matches], background])
    return SampledRegions(boxes[torch.cat([positive, negative])], labels, matches)


def _select(
    proposals: Tensor, logits: Tensor, deltas: Tensor, size: Tensor, config: RCNNConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes (k, 4), scores and labels (k,) of one image, k <= max_detections, best first."""
    probability = logits.softmax(1)[:, :-1]  # background is last
    wanted = (probability > config.score_threshold) & (probability >= config.min_score)
    region, label = torch.nonzero(wanted).unbind(1)
    decoded = decode_boxes(deltas[region, label], proposals[region], weights=DELTA_WEIGHTS)
    boxes = clip_boxes(decoded, size).float()
    scores = probability[region, label]
    best = class_wise_nms(
        boxes, scores, label, threshold=config.nms_threshold, keep=config.max_detections
    )
    return boxes[best], scores[best], label[best]


def _pool(raw: dict[str, Tensor], boxes: Sequence[Tensor], size: int) -> Tensor:
    """RoIAlign of each image's boxes from the level of their size: (M, c, size, size)."""
    every = torch.cat(list(boxes))
    counts = torch.tensor([len(one) for one in boxes], device=every.device)
    image_indices = torch.repeat_interleave(counts)
    levels = assign_levels_by_size(every, min_level=LEVELS[0], max_level=LEVELS[-1])
    features = [raw[f"p{level}"] for level in LEVELS]
    strides = STRIDES[: len(LEVELS)]
    return pool_regions(features, strides, every, image_indices, levels - LEVELS[0], size=size)


def _make_convs(widths: Sequence[int], norm: HeadNorm) -> nn.ModuleList:
    """3x3 convolutions from each width to the next."""
    convs = nn.ModuleList(
        make_conv(widths[index], widths[index + 1], kernel=3, norm=norm)
        for index in range(len(widths) - 1)
    )
    for module in convs.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return convs
