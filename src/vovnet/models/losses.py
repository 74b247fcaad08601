"""Losses that more than one detector uses; each returns one value per element or a sum, never a
mean.
"""

import torch
from torch import Tensor
from torch.nn import functional


def giou_loss_ltrb(predicted: Tensor, target: Tensor) -> Tensor:
    """Generalised IoU loss (N,) of boxes around one point, as distances to left, top, right, bottom
    (N, 4).

    As in the released FCOS of CenterMask the IoU is (I + 1) / (U + 1), the enclosing term plain.
    """
    predicted_area = (predicted[:, 0] + predicted[:, 2]) * (predicted[:, 1] + predicted[:, 3])
    target_area = (target[:, 0] + target[:, 2]) * (target[:, 1] + target[:, 3])
    inner = torch.minimum(predicted, target)
    outer = torch.maximum(predicted, target)
    intersection = (inner[:, 0] + inner[:, 2]) * (inner[:, 1] + inner[:, 3])
    enclosing = (outer[:, 0] + outer[:, 2]) * (outer[:, 1] + outer[:, 3])
    union = predicted_area + target_area - intersection
    iou = (intersection + 1.0) / (union + 1.0)
    return 1.0 - (iou - (enclosing - union) / enclosing)


def centerness_target(distances: Tensor) -> Tensor:
    """Centerness (N,) of distances left, top, right, bottom (N, 4): FCOS, equation 3."""
    horizontal = distances[:, [0, 2]]
    vertical = distances[:, [1, 3]]
    ratio = horizontal.amin(1) / horizontal.amax(1) * (vertical.amin(1) / vertical.amax(1))
    return ratio.sqrt()


def quality_focal_loss(logits: Tensor, quality: Tensor, *, gamma: float) -> Tensor:
    """Binary cross entropy with soft targets in 0..1, times |target - probability|^gamma; shapes as
    they come. GFL (Li et al. 2020), equation 5.
    """
    cross = functional.binary_cross_entropy_with_logits(logits, quality, reduction="none")
    return cross * (quality - logits.sigmoid()).abs() ** gamma


def distribution_focal_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross entropy (...) of distributions over the whole numbers 0..n-1 (..., n) with the two that
    enclose the targets (...), each weighted by the other's distance. GFL, equation 6.

    Targets are cut at 0 and n - 1.
    """
    last = logits.shape[-1] - 1
    target = target.clamp(0, last)
    lower = target.long().clamp(max=last - 1)
    upper_share = target - lower
    log = logits.log_softmax(-1)
    lower_log = log.gather(-1, lower[..., None])[..., 0]
    upper_log = log.gather(-1, lower[..., None] + 1)[..., 0]
    return -(lower_log * (1 - upper_share) + upper_log * upper_share)


def mask_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Mean binary cross entropy plus one minus the Dice coefficient, of masks (M, H, W): (M,)."""
    cross = functional.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    probability = logits.sigmoid()
    shared = 2 * (probability * truth).sum((1, 2)) + 1
    dice = shared / (probability.sum((1, 2)) + truth.sum((1, 2)) + 1)
    return cross.mean((1, 2)) + 1 - dice
