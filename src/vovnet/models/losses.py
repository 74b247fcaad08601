"""Losses that more than one detector uses; each returns one value per element or a sum, never a
mean.
"""

import torch
from torch import Tensor


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
