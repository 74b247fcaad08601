"""What SSD-type detectors share (Liu et al. 2016): prior boxes, matching, hard negatives, the
multibox loss, the choice of detections.

Shapes: B images, A priors over all levels, N objects, C classes, K kept detections. Background is
the last class, as in the R-CNN family.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.ops import box_iou

from vovnet.models.boxes import (
    Target,
    class_wise_nms,
    clip_boxes,
    covered_fraction,
    encode_boxes,
    pad_rows,
)

VARIANCE_WEIGHTS = (10.0, 10.0, 5.0, 5.0)  # of the four deltas: one over SSD's .1 .1 .2 .2
_LEAST_IOU = 1e-6  # less is no overlap, as in the released code


@dataclass(frozen=True, slots=True, kw_only=True)
class MultiboxConfig:
    """The settings that SSD-type detectors share; the defaults are SSD's.

    An image without objects teaches the classifier nothing, as negatives are drawn by the number of
    positives of their own image.
    """

    num_classes: int = 80
    positive_iou: float = 0.5
    negative_iou: float = 0.5  # less is background; between the two nothing is learned
    negatives_per_positive: int = 3
    crowd_fraction: float = 0.5  # background that lies in a crowd by more is no example
    score_threshold: float = 0.01
    min_score: float = 0.0  # a second limit, which callers set to what they show
    nms_threshold: float = 0.45
    pre_nms_top_k: int = 400  # per class
    max_detections: int = 200  # K


@dataclass(frozen=True, slots=True)
class Assignment:
    """What the priors of one image have to predict; who is neither of the two learns nothing."""

    positive: Tensor  # (A,) bool
    negative: Tensor  # (A,) bool
    matched: Tensor  # (A,) int64, the object of each positive


def priors_inside(priors_xyxy: Tensor, sizes: Tensor) -> Tensor:
    """Which priors (A, 4) have their centre in each image (B, A); sizes (B, 2) height and width."""
    centers = (priors_xyxy[:, :2] + priors_xyxy[:, 2:]) / 2
    return (centers[None] < sizes.flip(1)[:, None]).all(2)


def assign_priors(
    priors_xyxy: Tensor,
    target: Target,
    usable: Tensor,
    config: MultiboxConfig,
    *,
    iou: tuple[float, float],
) -> Assignment:
    """Matches priors (A, 4) of which some are usable (A,) to the objects of one image.

    First every object gets a prior of its own, the pair with the highest IoU of all first; then
    each other prior with an IoU of at least iou[0] its best object. Negative: less than iou[1] with
    all, and not in a crowd region.
    """
    boxes = target.boxes_xyxy.to(priors_xyxy.dtype)
    nobody = boxes.new_zeros((1, 4))  # a first row that overlaps nothing: there may be no object
    table = box_iou(torch.cat([nobody, boxes]), priors_xyxy).nan_to_num() * usable  # (1 + N, A)
    best, row = table.max(0)
    positive = (best >= iou[0]) & (best > _LEAST_IOU)
    objects, priors = match_one_to_one(table[1:])
    positive[priors] = True
    row[priors] = objects + 1
    crowded = covered_fraction(priors_xyxy, target.ignore_xyxy.to(boxes)) > config.crowd_fraction
    negative = usable & ~positive & (best < iou[1]) & ~crowded
    return Assignment(positive, negative, row - 1)


def match_one_to_one(iou: Tensor) -> tuple[Tensor, Tensor]:
    """Objects (M,) and their own priors (M,) of a table (N, A), the highest overlap of all first.

    An object is left out where no free prior overlaps it. Found by proposals (Gale & Shapley 1962):
    where both sides go by the overlap, their stable matching is the one that takes the highest
    overlap first, and it needs few rounds.
    """
    nobody = len(iou)
    # Among its N best priors an object always finds one that the N - 1 others leave free.
    overlaps, wishes = iou.topk(min(iou.shape), dim=1)
    turn = torch.zeros(nobody, dtype=torch.int64, device=iou.device)
    owner = torch.full((iou.shape[1],), nobody, device=iou.device)
    held = iou.new_zeros(iou.shape[1])
    free = torch.arange(nobody, device=iou.device)
    while len(free):
        free = free[turn[free] < wishes.shape[1]]
        overlap, prior = overlaps[free, turn[free]], wishes[free, turn[free]]
        free, overlap, prior = (x[overlap > _LEAST_IOU] for x in (free, overlap, prior))
        highest = held.scatter_reduce(0, prior, overlap, "amax")
        wins = (overlap == highest[prior]) & (overlap > held[prior])
        first = torch.full_like(owner, nobody).scatter_reduce(0, prior[wins], free[wins], "amin")
        displaced = owner[(first < nobody) & (owner < nobody)]
        owner, held = torch.where(first < nobody, first, owner), highest
        free = torch.cat([free[owner[prior] != free], displaced])
        turn[free] += 1
    priors = torch.nonzero(owner < nobody)[:, 0]
    return owner[priors], priors


def hardest_negatives(
    losses: Tensor, positive: Tensor, negative: Tensor, *, per_positive: int
) -> Tensor:
    """Which negatives (B, A) teach: those of each image's highest losses (B, A), per_positive for
    each of its positives.
    """
    order = losses.masked_fill(~negative, -torch.inf).argsort(dim=1, descending=True, stable=True)
    places = torch.arange(losses.shape[1], device=losses.device).expand_as(order)
    rank = torch.zeros_like(order).scatter(1, order, places)
    return negative & (rank < positive.sum(1, keepdim=True) * per_positive)


def multibox_loss(
    logits: Tensor,
    deltas: Tensor,
    priors_xyxy: Tensor,
    assignments: Sequence[Assignment],
    boxes_xyxy: Sequence[Tensor],
    labels: Sequence[Tensor],
    *,
    per_positive: int,
) -> tuple[Tensor, Tensor]:
    """Cross entropy of logits (B, A, C + 1) and smooth L1 of deltas (B, A, 4), each summed over the
    positives, the first over the hardest negatives too, and divided by the batch's positives.

    priors_xyxy (B, A, 4); boxes (N, 4) and labels (N,) of each image's objects.
    """
    positive = torch.stack([one.positive for one in assignments])
    negative = torch.stack([one.negative for one in assignments])
    objects = [one.matched[one.positive] for one in assignments]
    wanted = torch.full_like(positive, logits.shape[2] - 1, dtype=torch.int64)
    wanted[positive] = torch.cat([own[n] for own, n in zip(labels, objects, strict=True)])
    losses = functional.cross_entropy(logits.transpose(1, 2), wanted, reduction="none")  # (B, A)
    hard = hardest_negatives(losses.detach(), positive, negative, per_positive=per_positive)
    truth = torch.cat([own[n] for own, n in zip(boxes_xyxy, objects, strict=True)])
    offsets = encode_boxes(truth.to(deltas.dtype), priors_xyxy[positive], weights=VARIANCE_WEIGHTS)
    count = positive.sum().clamp(min=1)
    box = functional.smooth_l1_loss(deltas[positive], offsets, reduction="sum")
    return losses[positive | hard].sum() / count, box / count


@torch.no_grad()
def select_detections(
    boxes_xyxy: Tensor, probabilities: Tensor, sizes: Tensor, config: MultiboxConfig
) -> dict[str, Tensor]:
    """The padded detections of boxes (B, A, 4) and class probabilities (B, A, C), best first.

    Of each class the best pre_nms_top_k above the thresholds, without those that overlap a better
    one of their class; of all classes the best K, then cut at the image; sizes (B, 2) its height
    and width.
    """
    kept = [_select(*one, config) for one in zip(boxes_xyxy, probabilities, sizes, strict=True)]
    columns = dict(zip(("boxes", "scores", "labels"), zip(*kept, strict=True), strict=True))
    columns["valid"] = tuple(torch.ones_like(labels, dtype=torch.bool) for _, _, labels in kept)
    return {name: pad_rows(rows, config.max_detections) for name, rows in columns.items()}


def _select(
    boxes_xyxy: Tensor, probabilities: Tensor, size: Tensor, config: MultiboxConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes (k, 4), scores and labels (k,) of one image, k <= max_detections."""
    scores, prior = probabilities.t().topk(min(config.pre_nms_top_k, len(probabilities)))  # (C, k)
    wanted = (scores > config.score_threshold) & (scores >= config.min_score)
    labels = torch.nonzero(wanted)[:, 0]
    scores, boxes = scores[wanted], boxes_xyxy[prior[wanted]].float()
    best = class_wise_nms(
        boxes, scores, labels, threshold=config.nms_threshold, keep=config.max_detections
    )
    return clip_boxes(boxes[best], size), scores[best], labels[best]
