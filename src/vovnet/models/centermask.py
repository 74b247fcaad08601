"""CenterMask (Lee & Park 2020): FCOS, then a spatial-attention-guided mask and its predicted IoU
for each box.

Shapes: M regions over the whole batch, C classes, K kept detections per image.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import box_iou

from vovnet.models.boxes import Target
from vovnet.models.fcos import FCOS, STRIDES, FCOSConfig, fcos_detect, fcos_loss
from vovnet.models.roi import assign_levels, pool_regions

MASK_LEVELS = (3, 4, 5)
REGION_SIZE = 14
MASK_SIZE = 28


@dataclass(frozen=True, slots=True, kw_only=True)
class CenterMaskConfig(FCOSConfig):
    """The settings of CenterMask; the defaults are the full model's."""

    mask_convs: int = 4
    mask_channels: int = 256
    mask_iou_width: int = 1024  # of the two fully connected layers
    train_proposals: int = 100  # boxes per image that the mask losses look at, true boxes apart
    mask_rois_per_image: int | None = None  # the mask losses' limit, drawn at random; None: all


class SpatialAttention(nn.Module):
    """Gates each position by a sigmoid of a 3x3 on the channels' mean and maximum (SAM)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        pooled = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], dim=1)
        gate: Tensor = self.conv(pooled).sigmoid()
        return x * gate


class MaskHead(nn.Module):
    """SAG-Mask: convolutions, spatial attention, upsampling: (M, c, 14, 14) to logits (M, C, 28,
    28).
    """

    def __init__(self, in_channels: int, channels: int, num_classes: int, *, convs: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(channels if index else in_channels, channels, 3, padding=1)
            for index in range(convs)
        )
        self.attention = SpatialAttention()
        self.deconv = nn.ConvTranspose2d(channels, channels, 2, stride=2)
        self.predictor = nn.Conv2d(channels, num_classes, 1)
        for module in (*self.convs, self.deconv):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(module.bias)
        nn.init.normal_(self.predictor.weight, std=0.001)
        nn.init.zeros_(self.predictor.bias)  # type: ignore[arg-type]

    def forward(self, regions: Tensor) -> Tensor:
        x = regions
        for conv in self.convs:
            x = functional.relu(conv(x), inplace=True)
        x = functional.relu(self.deconv(self.attention(x)), inplace=True)
        return self.predictor(x)  # type: ignore[no-any-return]


class MaskIoUHead(nn.Module):
    """Predicts each mask's IoU with the truth (Mask Scoring R-CNN) for every class: (M, C)."""

    def __init__(
        self, in_channels: int, channels: int, num_classes: int, *, convs: int, width: int
    ) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(
                channels if index else in_channels + 1,
                channels,
                3,
                stride=2 if index == convs - 1 else 1,
                padding=1,
            )
            for index in range(convs)
        )
        self.fc1 = nn.Linear(channels * (REGION_SIZE // 2) ** 2, width)
        self.fc2 = nn.Linear(width, width)
        self.iou = nn.Linear(width, num_classes)
        for module in self.convs:
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")  # type: ignore[arg-type]
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        for linear in (self.fc1, self.fc2):
            nn.init.kaiming_uniform_(linear.weight, a=1)
            nn.init.zeros_(linear.bias)
        nn.init.normal_(self.iou.weight, std=0.01)
        nn.init.zeros_(self.iou.bias)

    def forward(self, regions: Tensor, mask_probs: Tensor) -> Tensor:
        """regions (M, c, 14, 14), mask_probs (M, 28, 28) of the predicted class."""
        x = torch.cat([regions, functional.max_pool2d(mask_probs[:, None], 2)], dim=1)
        for conv in self.convs:
            x = functional.relu(conv(x), inplace=True)
        x = functional.relu(self.fc1(x.flatten(1)))
        x = functional.relu(self.fc2(x))
        return self.iou(x)  # type: ignore[no-any-return]


class CenterMask(nn.Module):
    """FCOS with a mask branch. Input (B, 3, H, W) float, normalised and zero-padded to multiples of
    32.
    """

    has_masks = True

    def __init__(
        self,
        fcos: FCOS,
        mask_head: nn.Module,
        mask_iou_head: nn.Module,
        config: CenterMaskConfig,
    ) -> None:
        super().__init__()
        self.fcos = fcos
        self.mask_head = mask_head
        self.mask_iou_head = mask_iou_head
        self.config = config

    @property
    def backbone(self) -> nn.Module:
        """The feature extractor."""
        return self.fcos.backbone

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """The raw outputs of FCOS; masks belong to boxes, so loss and detect call the
        second stage.
        """
        return self.fcos(images)  # type: ignore[no-any-return]

    def loss(
        self, raw: dict[str, Tensor], targets: Sequence[Target], sizes: Tensor
    ) -> dict[str, Tensor]:
        """FCOS's losses, loss_mask and loss_mask_iou; sizes (B, 2) height and width without
        padding.
        """
        return fcos_loss(raw, targets, self.config) | self._mask_loss(raw, targets, sizes)

    def detect(self, raw: dict[str, Tensor], sizes: Tensor) -> dict[str, Tensor]:
        """FCOS's detections with mask_probs (B, K, 28, 28) and mask_scores (B, K) = score x
        predicted IoU.
        """
        found = fcos_detect(raw, self.config, max_detections=self.config.max_detections)
        valid, labels = found["valid"], found["labels"][found["valid"]]
        image_indices = torch.nonzero(valid)[:, 0]
        regions = self._pool(raw, found["boxes"][valid], image_indices, sizes)
        masks = self.class_masks(regions, labels).sigmoid()
        ious = self.class_ious(regions, masks, labels)
        mask_probs = masks.new_zeros((*valid.shape, MASK_SIZE, MASK_SIZE))
        mask_probs[valid] = masks
        mask_scores = torch.zeros_like(found["scores"])
        mask_scores[valid] = found["scores"][valid] * ious.to(mask_scores.dtype)
        return found | {"mask_probs": mask_probs, "mask_scores": mask_scores}

    def _pool(
        self, raw: dict[str, Tensor], boxes_xyxy: Tensor, image_indices: Tensor, sizes: Tensor
    ) -> Tensor:
        areas = sizes.to(boxes_xyxy.dtype).prod(1)[image_indices]
        levels = assign_levels(
            boxes_xyxy, areas, min_level=MASK_LEVELS[0], max_level=MASK_LEVELS[-1]
        )
        features = [raw[f"p{level}"] for level in MASK_LEVELS]
        return pool_regions(
            features,
            STRIDES[: len(features)],
            boxes_xyxy,
            image_indices,
            levels - MASK_LEVELS[0],
            size=REGION_SIZE,
        )

    def class_masks(self, regions: Tensor, labels: Tensor) -> Tensor:
        """Mask logits (M, 28, 28) of each region's own class."""
        rows = torch.arange(labels.shape[0], device=labels.device)
        return self.mask_head(regions)[rows, labels].to(regions.dtype)  # type: ignore[no-any-return]

    def class_ious(self, regions: Tensor, mask_probs: Tensor, labels: Tensor) -> Tensor:
        """Predicted mask IoU (M,) of each region's own class."""
        rows = torch.arange(labels.shape[0], device=labels.device)
        ious = self.mask_iou_head(regions, mask_probs)[rows, labels]
        return ious.to(regions.dtype)  # type: ignore[no-any-return]

    def _mask_loss(
        self, raw: dict[str, Tensor], targets: Sequence[Target], sizes: Tensor
    ) -> dict[str, Tensor]:
        boxes, matches = self._foreground(raw, targets)
        counts = torch.tensor([len(match) for match in matches], device=sizes.device)
        image_indices = torch.repeat_interleave(
            torch.arange(len(targets), device=sizes.device), counts
        )
        labels = torch.cat([t.labels[m] for t, m in zip(targets, matches, strict=True)])
        regions = self._pool(raw, torch.cat(boxes), image_indices, sizes)
        logits = self.class_masks(regions, labels)
        ious = self.class_ious(regions, logits.detach().sigmoid(), labels)
        if len(logits) == 0:  # keeps every parameter in the graph
            nothing = logits.sum() + ious.sum()
            return {"loss_mask": nothing, "loss_mask_iou": nothing}
        truth, fractions = _mask_truth(boxes, matches, targets, logits.dtype)
        loss_mask = functional.binary_cross_entropy_with_logits(logits, truth)
        return {
            "loss_mask": loss_mask,
            "loss_mask_iou": _mask_iou_loss(logits.detach(), ious, truth, fractions),
        }

    @torch.no_grad()
    def _foreground(
        self, raw: dict[str, Tensor], targets: Sequence[Target]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Per image the boxes, proposed and true, that overlap an object by half, and that object's
        index.
        """
        detached = {name: value.detach() for name, value in raw.items()}
        found = fcos_detect(detached, self.config, max_detections=self.config.train_proposals)
        boxes, matches = [], []
        for image, target in enumerate(targets):
            proposed = found["boxes"][image, found["valid"][image]]
            candidates = torch.cat([proposed, target.boxes_xyxy.to(proposed.dtype)])
            if len(target.boxes_xyxy) == 0:
                candidates = candidates[:0]
                match = target.labels[:0]
            else:
                iou, match = box_iou(candidates, target.boxes_xyxy.to(proposed.dtype)).max(1)
                candidates, match = candidates[iou >= 0.5], match[iou >= 0.5]
            limit = self.config.mask_rois_per_image
            if limit is not None and len(candidates) > limit:
                drawn = torch.randperm(len(candidates))[:limit].to(candidates.device)
                candidates, match = candidates[drawn], match[drawn]
            boxes.append(candidates)
            matches.append(match)
        return boxes, matches


def _mask_truth(
    boxes: Sequence[Tensor],
    matches: Sequence[Tensor],
    targets: Sequence[Target],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """True masks (M, 28, 28) inside the boxes, and the part of each object (M,) that its
    box holds.
    """
    masks, fractions = [], []
    for box, match, target in zip(boxes, matches, targets, strict=True):
        if len(box) == 0:
            continue
        if target.masks is None:
            raise ValueError(
                "CenterMask's loss: expected masks in every target, got a target without"
            )
        masks.append(target.masks.rasterize(box, match, MASK_SIZE))
        fractions.append(target.masks.visible_fraction(box, match))
    return torch.cat(masks).to(dtype), torch.cat(fractions).to(dtype)


def _mask_iou_loss(logits: Tensor, ious: Tensor, truth: Tensor, fractions: Tensor) -> Tensor:
    """Half the mean squared error of the predicted IoU over masks whose true IoU is above zero.

    The true IoU counts the object's whole area: what its box cuts off is added by 1 / fraction.
    """
    predicted = (logits > 0).to(truth.dtype)
    overlap = (predicted * truth).sum((1, 2))
    union = predicted.sum((1, 2)) + truth.sum((1, 2)) / fractions - overlap
    true_iou = overlap / union.clamp(min=1)
    squared = 0.5 * (ious - true_iou) ** 2 * (true_iou > 0)
    return squared.sum() / (true_iou > 0).sum().clamp(min=1)
