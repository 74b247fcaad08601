"""The choice of detections as engines can run it: fixed shapes, whole batches, no loop over images.

Each function gives what `detect` of the same network gives; every export is compared with it.
Shapes: B images, N candidates, C classes, K kept detections, M regions, G groups of boxes.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import roi_align

from vovnet.errors import ConfigError
from vovnet.export.suppress import suppress
from vovnet.models.boxes import clip_boxes
from vovnet.models.centermask import MASK_LEVELS, MASK_SIZE, REGION_SIZE, CenterMask
from vovnet.models.dsod import DSOD
from vovnet.models.fcos import FCOS, FCOSConfig, level_candidates, level_points
from vovnet.models.fcos import STRIDES as FCOS_STRIDES
from vovnet.models.multibox import MultiboxConfig
from vovnet.models.refinedet import RefineDet
from vovnet.models.roi import assign_levels

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
            f"export: expected one of {known}, got {type(detector).__name__}, whose regions are "
            "not yet chosen in a way that other engines run; --raw exports what comes before"
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
    boxes_xyxy: Tensor, scores: Tensor, labels: Tensor, wanted: Tensor, config: FCOSConfig
) -> Tensor:
    """Which candidates (B, N) no better one of their class overlaps."""
    classes = torch.arange(config.num_classes, device=labels.device)[None, :, None]
    own = wanted[:, None] & (labels[:, None] == classes)  # (B, C, N)
    per_class = torch.where(own, scores[:, None], -1.0)
    kept: Tensor = suppress(boxes_xyxy, per_class, config.nms_threshold, config.max_detections)
    return kept.any(1)


def _centermask(detector: CenterMask, raw: Found, sizes: Tensor, min_score: Tensor) -> Found:
    """As CenterMask.detect; one box at least goes through the mask branch, to no effect."""
    found = _fcos(detector, raw, sizes, min_score)
    batch, count = found["valid"].shape
    flat = found["valid"].flatten()
    chosen = torch.nonzero(flat | (torch.arange(flat.shape[0], device=flat.device) == 0))[:, 0]
    boxes, labels = found["boxes"].flatten(0, 1)[chosen], found["labels"].flatten()[chosen]
    images = chosen // count
    areas = sizes.to(boxes.dtype).prod(1)[images]
    levels = assign_levels(boxes, areas, min_level=MASK_LEVELS[0], max_level=MASK_LEVELS[-1])
    features = [raw[f"p{level}"] for level in MASK_LEVELS]
    regions = _pool(
        features, FCOS_STRIDES, boxes, images, levels - MASK_LEVELS[0], size=REGION_SIZE
    )
    masks = detector.class_masks(regions, labels).sigmoid()
    ious = detector.class_ious(regions, masks, labels)
    shape = (batch * count, MASK_SIZE, MASK_SIZE)
    mask_probs = masks.new_zeros(shape).index_put((chosen,), masks) * flat[:, None, None]
    mask_ious = ious.new_zeros(batch * count).index_put((chosen,), ious) * flat
    return found | {
        "mask_probs": mask_probs.unflatten(0, (-1, count)),
        "mask_scores": found["scores"] * mask_ious.unflatten(0, (-1, count)),
    }


def _pool(
    features: Sequence[Tensor],
    strides: Sequence[int],
    boxes_xyxy: Tensor,
    images: Tensor,
    levels: Tensor,
    *,
    size: int,
) -> Tensor:
    """As models.roi.pool_regions: each level pools all boxes, the others' at almost no cost."""
    tiny = boxes_xyxy.new_tensor(_TINY_BOX)
    pooled = None
    for level, (feature, stride) in enumerate(zip(features, strides, strict=False)):
        own = (levels == level)[:, None]
        rois = torch.cat([images[:, None].to(tiny.dtype), torch.where(own, boxes_xyxy, tiny)], 1)
        part = roi_align(feature, rois, size, 1.0 / stride, sampling_ratio=0, aligned=True)
        part = torch.where(own[:, :, None, None], part, 0.0)
        pooled = part if pooled is None else pooled + part
    assert pooled is not None
    return pooled


def _multibox(
    detector: RefineDet | DSOD, raw: Found, sizes: Tensor, min_score: Tensor
) -> Found:
    """As models.multibox.select_detections; the classes of an image are groups of boxes."""
    config: MultiboxConfig = detector.config
    count, classes = config.pre_nms_top_k, config.num_classes
    boxes, probabilities = detector.candidates(raw, sizes)
    filled = _fill(probabilities, count).transpose(1, 2)  # (B, C, A + count)
    scores, prior = filled.topk(count)
    rows = prior.flatten(1)[:, :, None].expand(-1, -1, 4)
    chosen = _fill(boxes, count).gather(1, rows).float()  # (B, C * count, 4)
    wanted = (scores > config.score_threshold) & (scores >= min_score)
    kept = suppress(
        chosen.unflatten(1, (classes, count)).flatten(0, 1),
        torch.where(wanted, scores, -1.0).flatten(0, 1)[:, None],
        config.nms_threshold,
        config.max_detections,
    )
    labels = torch.arange(classes, device=boxes.device)[None, :, None].expand_as(scores)
    kept = kept.flatten(1).unflatten(0, (-1, classes)).flatten(1)
    found = _best(chosen, scores.flatten(1), labels.flatten(1), kept, config.max_detections)
    return found | {"boxes": clip_boxes(found["boxes"], sizes)}


def _best(
    boxes_xyxy: Tensor, scores: Tensor, labels: Tensor, kept: Tensor, count: int
) -> Found:
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
    RefineDet: _multibox,
    DSOD: _multibox,
}
