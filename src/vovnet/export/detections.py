"""The choice of detections as engines can run it: fixed shapes, whole batches, no loop over images.

Each function gives what `detect` of the same network gives; every export is compared with it.
Shapes: B images, N candidates, C classes, K kept detections, M regions, G groups of boxes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import roi_align

from vovnet.errors import ConfigError
from vovnet.models.boxes import clip_boxes, decode_boxes
from vovnet.models.centermask import MASK_LEVELS, REGION_SIZE, CenterMask
from vovnet.models.dsod import DSOD
from vovnet.models.fcos import FCOS, FCOSConfig, level_candidates, level_points
from vovnet.models.fcos import STRIDES as FCOS_STRIDES
from vovnet.models.rcnn import (
    BOX_REGION_SIZE,
    LEVELS,
    MASK_REGION_SIZE,
    FasterRCNN,
    MaskRCNN,
    RCNNConfig,
)
from vovnet.models.rcnn import DELTA_WEIGHTS as BOX_WEIGHTS
from vovnet.models.refinedet import RefineDet
from vovnet.models.roi import assign_levels, assign_levels_by_size
from vovnet.models.rpn import DELTA_WEIGHTS as RPN_WEIGHTS
from vovnet.models.rpn import STRIDES as RPN_STRIDES
from vovnet.models.rpn import level_anchors
from vovnet.models.suppress import suppress
from vovnet.models.vovdet import VovDet, VovDetConfig, best_candidates, finish_detections

Found = dict[str, Tensor]

_UNLIKELY = -1e4  # a logit whose probability is exactly 0
_TINY_BOX = (0.0, 0.0, 1.0, 1.0)


def find_detections(detector: nn.Module, raw: Found, sizes: Tensor, min_score: Tensor) -> Found:
    """What detector.detect(raw, sizes) gives with this min_score (1,).

    Raises ConfigError on a detector that cannot be exported whole.
    """
    family = _FAMILIES.get(type(detector))
    if family is None:
        known = ", ".join(one.__name__ for one in _FAMILIES)
        raise ConfigError(
            f"export: expected one of {known}, got {type(detector).__name__}, whose detections no "
            "other engine can choose; --raw exports what comes before"
        )
    return family(detector, raw, sizes, min_score)


def _fcos(detector: FCOS | CenterMask, raw: Found, sizes: Tensor, min_score: Tensor) -> Found:
    """As models.fcos.fcos_detect; each level is filled up so that it has its full candidates."""
    config = detector.config
    count = config.pre_nms_top_k
    filling = -(-count // config.num_classes)
    levels, start = [], 0
    for points, stride in zip(level_points(raw), FCOS_STRIDES, strict=True):
        stop = start + points.shape[0]
        logits = _fill(raw["logits"][:, start:stop], filling, value=_UNLIKELY)
        distances = _fill(raw["distances"][:, start:stop], filling)
        centerness = _fill(raw["centerness"][:, start:stop, None], filling)[..., 0]
        located = _fill(points[None], filling)[0]
        levels.append(
            level_candidates(
                logits, distances, centerness, located, stride, count=count, config=config
            )
        )
        start = stop
    boxes, scores, labels = (torch.cat(parts, dim=1) for parts in zip(*levels, strict=True))
    wanted = (scores > 0) & (scores >= min_score)
    kept = _keep_per_class(boxes.float(), scores, labels, wanted, config)
    return _best(boxes.float(), scores, labels, kept, config.max_detections)


def _keep_per_class(
    boxes_xyxy: Tensor,
    scores: Tensor,
    labels: Tensor,
    wanted: Tensor,
    config: FCOSConfig | VovDetConfig,
) -> Tensor:
    """Which candidates (B, N) no better one of their class overlaps."""
    classes = torch.arange(config.num_classes, device=labels.device)[None, :, None]
    own = wanted[:, None] & (labels[:, None] == classes)  # (B, C, N)
    per_class = torch.where(own, scores[:, None], -1.0)
    kept: Tensor = suppress(boxes_xyxy, per_class, config.nms_threshold, config.max_detections)
    return kept.any(1)


def _centermask(detector: CenterMask, raw: Found, sizes: Tensor, min_score: Tensor) -> Found:
    """As CenterMask.detect."""
    found = _fcos(detector, raw, sizes, min_score)
    rows = _mask_rows(found)
    areas = sizes.to(rows.boxes_xyxy.dtype).prod(1)[rows.images]
    levels = assign_levels(
        rows.boxes_xyxy, areas, min_level=MASK_LEVELS[0], max_level=MASK_LEVELS[-1]
    )
    regions = _pool(raw, MASK_LEVELS, FCOS_STRIDES, rows, levels, size=REGION_SIZE)
    masks = detector.class_masks(regions, rows.labels).sigmoid()
    ious = detector.class_ious(regions, masks, rows.labels)
    return found | {
        "mask_probs": _put_back(masks, rows, found),
        "mask_scores": found["scores"] * _put_back(ious, rows, found),
    }


def _faster_rcnn(detector: FasterRCNN, raw: Found, sizes: Tensor, min_score: Tensor) -> Found:
    """As FasterRCNN.detect; each class of an image is a group of boxes, one of each proposal."""
    config = detector.config
    proposals, valid = _propose(raw, sizes, config)  # (B, P, 4), (B, P)
    count = valid.shape[1]
    flat = proposals.flatten(0, 1)
    images = torch.arange(flat.shape[0], device=flat.device) // count
    rows = _Rows(images, flat, images, images)
    levels = assign_levels_by_size(flat, min_level=LEVELS[0], max_level=LEVELS[-1])
    regions = _pool(raw, LEVELS, RPN_STRIDES, rows, levels, size=BOX_REGION_SIZE)
    logits, deltas = detector.box_head(regions)
    scores = logits.softmax(1)[:, :-1].unflatten(0, (-1, count)).transpose(1, 2)  # (B, C, P)
    decoded = decode_boxes(deltas, flat[:, None], weights=BOX_WEIGHTS).unflatten(0, (-1, count))
    boxes = clip_boxes(decoded.transpose(1, 2).flatten(1, 2), sizes).float()  # (B, C * P, 4)
    wanted = valid[:, None] & (scores > config.score_threshold) & (scores >= min_score)
    return _best_of_groups(boxes, scores, wanted, config.nms_threshold, config.max_detections)


def _mask_rcnn(detector: MaskRCNN, raw: Found, sizes: Tensor, min_score: Tensor) -> Found:
    """As MaskRCNN.detect."""
    found = _faster_rcnn(detector.faster_rcnn, raw, sizes, min_score)
    rows = _mask_rows(found)
    levels = assign_levels_by_size(rows.boxes_xyxy, min_level=LEVELS[0], max_level=LEVELS[-1])
    maps = detector.mask_head(_pool(raw, LEVELS, RPN_STRIDES, rows, levels, size=MASK_REGION_SIZE))
    masks = maps[torch.arange(rows.labels.shape[0], device=maps.device), rows.labels].sigmoid()
    return found | {
        "mask_probs": _put_back(masks, rows, found),
        "mask_scores": found["scores"],
    }


def _propose(raw: Found, sizes: Tensor, config: RCNNConfig) -> tuple[Tensor, Tensor]:
    """As models.rpn.propose: boxes (B, P, 4), and which of them there are (B, P)."""
    count, start = config.pre_nms_top_k, 0
    boxes, scores = [], []
    for anchors in level_anchors(raw, config):
        stop = start + anchors.shape[0]
        objectness = _fill(raw["objectness"][:, start:stop, None], count, value=_UNLIKELY)
        best, index = objectness[..., 0].topk(count)
        deltas = _fill(raw["anchor_deltas"][:, start:stop], count)
        chosen = deltas.gather(1, index[:, :, None].expand(-1, -1, 4))
        decoded = decode_boxes(chosen, _fill(anchors[None], count)[0][index], weights=RPN_WEIGHTS)
        boxes.append(clip_boxes(decoded, sizes).float())
        usable = (boxes[-1][..., 2:] > boxes[-1][..., :2]).all(2)
        scores.append(torch.where(usable, best, _UNLIKELY))
        start = stop
    grouped, by_level = torch.stack(boxes, 1), torch.stack(scores, 1)  # (B, levels, k, 4)
    # Their order is what counts within a level, and suppress wants scores above 0.
    rank = torch.arange(count, 0, -1, device=grouped.device, dtype=grouped.dtype)
    ranks = torch.where(by_level > _UNLIKELY, rank, -1.0).flatten(0, 1)[:, None]
    kept = suppress(grouped.flatten(0, 1), ranks, config.rpn_nms_threshold, config.proposals)
    kept = kept.unflatten(0, (-1, grouped.shape[1])).flatten(1)
    ranked = torch.where(kept, by_level.flatten(1), _UNLIKELY)
    best, order = _fill(ranked[..., None], config.proposals, value=_UNLIKELY)[..., 0].topk(
        config.proposals
    )
    every = _fill(grouped.flatten(1, 2), config.proposals)
    return every.gather(1, order[:, :, None].expand(-1, -1, 4)), best > _UNLIKELY


@dataclass(frozen=True, slots=True)
class _Rows:
    """Detections that go through a second stage."""

    chosen: Tensor  # (M,) place among the B * K
    boxes_xyxy: Tensor  # (M, 4)
    labels: Tensor  # (M,)
    images: Tensor  # (M,) place in the batch


def _mask_rows(found: Found) -> _Rows:
    """The valid detections, and the first in any case: engines do not all run on nothing."""
    flat = found["valid"].flatten()
    first = torch.arange(flat.shape[0], device=flat.device) == 0
    chosen = torch.nonzero(flat | first)[:, 0]
    boxes, labels = found["boxes"].flatten(0, 1)[chosen], found["labels"].flatten()[chosen]
    return _Rows(chosen, boxes, labels, chosen // found["valid"].shape[1])


def _put_back(values: Tensor, rows: _Rows, found: Found) -> Tensor:
    """Values (M, ...) of rows as (B, K, ...), zero where nothing is valid."""
    valid = found["valid"].flatten()
    shape = (-1, *(1 for _ in values.shape[1:]))
    empty = values.new_zeros((valid.shape[0], *values.shape[1:]))
    every: Tensor = empty.index_put((rows.chosen,), values) * valid.view(shape)
    rows_of_images: Tensor = every.unflatten(0, (-1, found["valid"].shape[1]))
    return rows_of_images


def _pool(
    raw: Found,
    names: Sequence[int],
    strides: Sequence[int],
    rows: _Rows,
    levels: Tensor,
    *,
    size: int,
) -> Tensor:
    """As models.roi.pool_regions: each level pools all boxes, the others' at almost no cost."""
    tiny = rows.boxes_xyxy.new_tensor(_TINY_BOX)
    images = rows.images[:, None].to(tiny.dtype)
    pooled = None
    for level, stride in zip(names, strides, strict=False):
        own = (levels == level)[:, None]
        rois = torch.cat([images, torch.where(own, rows.boxes_xyxy, tiny)], 1)
        part = roi_align(raw[f"p{level}"], rois, size, 1.0 / stride, sampling_ratio=0, aligned=True)
        part = torch.where(own[:, :, None, None], part, 0.0)
        pooled = part if pooled is None else pooled + part
    assert pooled is not None
    return pooled


def _multibox(detector: RefineDet | DSOD, raw: Found, sizes: Tensor, min_score: Tensor) -> Found:
    """As models.multibox.select_detections; each class of an image is a group of boxes."""
    config, count = detector.config, detector.config.pre_nms_top_k
    boxes, probabilities = detector.candidates(raw, sizes)
    scores, prior = _fill(probabilities, count).transpose(1, 2).topk(count)  # (B, C, k)
    rows = prior.flatten(1)[:, :, None].expand(-1, -1, 4)
    chosen = _fill(boxes, count).gather(1, rows).float()  # (B, C * k, 4)
    wanted = (scores > config.score_threshold) & (scores >= min_score)
    found = _best_of_groups(chosen, scores, wanted, config.nms_threshold, config.max_detections)
    return found | {"boxes": clip_boxes(found["boxes"], sizes)}


def _vovdet(detector: VovDet, raw: Found, sizes: Tensor, min_score: Tensor) -> Found:
    """As VovDet.detect, which suppresses boxes in one of its ways alone."""
    config = detector.config
    if config.suppression != "nms":
        count = config.max_detections
        found = best_candidates(raw, sizes, config, count=count, min_score=min_score)
        return finish_detections(raw, found)
    count = config.pre_nms_top_k
    found = best_candidates(raw, sizes, config, count=count, min_score=min_score)
    boxes, scores, labels = found["boxes"], found["scores"], found["labels"]
    kept = _keep_per_class(boxes, scores, labels, found["valid"], config)
    best = _best(boxes, scores, labels, kept, config.max_detections)
    places = _best(boxes, scores, found["location"], kept, config.max_detections)["labels"]
    return finish_detections(raw, best | {"location": places})


def _best_of_groups(
    boxes_xyxy: Tensor, scores: Tensor, wanted: Tensor, threshold: float, count: int
) -> Found:
    """The best of boxes (B, C * n, 4) with scores and wanted (B, C, n), none overlapping a better
    one of its class.
    """
    classes = scores.shape[1]
    kept = suppress(
        boxes_xyxy.unflatten(1, (classes, -1)).flatten(0, 1),
        torch.where(wanted, scores, -1.0).flatten(0, 1)[:, None],
        threshold,
        count,
    )
    labels = torch.arange(classes, device=scores.device)[None, :, None].expand_as(scores)
    kept = kept.flatten(1).unflatten(0, (-1, classes)).flatten(1)
    return _best(boxes_xyxy, scores.flatten(1), labels.flatten(1), kept, count)


def _best(boxes_xyxy: Tensor, scores: Tensor, labels: Tensor, kept: Tensor, count: int) -> Found:
    """The `count` best of the kept candidates (B, N), best first; what is not valid is zero."""
    filled = _fill(torch.where(kept, scores, -1.0)[..., None], count, value=-1.0)[..., 0]
    best, order = filled.topk(count)
    valid = best > 0
    rows = order[:, :, None].expand(-1, -1, 4)
    return {
        "boxes": _fill(boxes_xyxy, count).gather(1, rows) * valid[:, :, None],
        "scores": best * valid,
        "labels": _fill(labels[..., None], count)[..., 0].gather(1, order) * valid,
        "valid": valid,
    }


def _fill(rows: Tensor, count: int, *, value: float = 0.0) -> Tensor:
    """(B, N, D) with `count` further rows: then there are always enough to choose from."""
    return functional.pad(rows, (0, 0, 0, count), value=value)


_FAMILIES: Mapping[type[nn.Module], Callable[[Any, Found, Tensor, Tensor], Found]] = {
    FCOS: _fcos,
    CenterMask: _centermask,
    FasterRCNN: _faster_rcnn,
    MaskRCNN: _mask_rcnn,
    RefineDet: _multibox,
    DSOD: _multibox,
    VovDet: _vovdet,
}
