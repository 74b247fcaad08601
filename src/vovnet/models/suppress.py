"""Non-maximum suppression of whole batches as one operator, which exported graphs hold."""

import torch
from torch import Tensor
from torchvision.ops import nms


@torch.library.custom_op("vovnet::suppress", mutates_args=())
def suppress(boxes_xyxy: Tensor, scores: Tensor, threshold: float, keep: int) -> Tensor:
    """Which boxes (G, N, 4) stay for scores (G, C, N), as bool (G, C, N).

    In each group and class the at most `keep` best of those with scores above 0 that overlap no
    better one by more than the threshold.
    """
    kept = torch.zeros_like(scores, dtype=torch.bool)
    for group, label in torch.cartesian_prod(*map(torch.arange, scores.shape[:2])).tolist():
        rows = torch.nonzero(scores[group, label] > 0)[:, 0]
        best = nms(boxes_xyxy[group, rows], scores[group, label, rows], threshold)[:keep]
        kept[group, label, rows[best]] = True
    return kept


@suppress.register_fake
def _shape(boxes_xyxy: Tensor, scores: Tensor, threshold: float, keep: int) -> Tensor:
    return torch.empty_like(scores, dtype=torch.bool)
