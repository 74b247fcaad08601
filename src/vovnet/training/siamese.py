"""What a backbone learns without labels: that regions look alike in two views, or as a teacher sees
them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import roi_align

from vovnet.training.step import LossStep

MAPS = {16: 3, 32: 4}
"""Of a backbone, by their stride: those of depth that detectors read."""
_PROJECTED = 256
_BOTTLENECK = 64

FeatureMaps = Callable[[Tensor, Tensor], Tensor]
"""From uint8 pictures (B, H, W, 3) and their sizes (B, 2) to features (B, F, h, w)."""


class RegionHead(nn.Module):
    """The projector of region features and the predictor behind it; both are thrown away after."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        # No bias where a BatchNorm follows; the last one keeps a constant from being an answer.
        self.projector = nn.Sequential(
            nn.Linear(channels, _PROJECTED, bias=False),
            nn.BatchNorm1d(_PROJECTED),
            nn.ReLU(inplace=True),
            nn.Linear(_PROJECTED, _PROJECTED, bias=False),
            nn.BatchNorm1d(_PROJECTED, affine=False),
        )
        self.predictor = nn.Sequential(
            nn.Linear(_PROJECTED, _BOTTLENECK, bias=False),
            nn.BatchNorm1d(_BOTTLENECK),
            nn.ReLU(inplace=True),
            nn.Linear(_BOTTLENECK, _PROJECTED),
        )

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Features (N, C) to their projections and what is predicted from these, (N, 256) each."""
        projected = self.projector(features)
        return projected, self.predictor(projected)


class SiameseStep(LossStep):
    """Each region's projection is to be told from the same region's in the other view.

    SimSiam (Chen & He, 2021): a predictor, and no gradient through what is predicted; neither
    negatives nor large batches. On boxes drawn at random where both views overlap, pooled from the
    feature maps, as Dang et al. (2022, "A Study on Self-Supervised Object Detection Pretraining")
    do, instead of on whole pictures: dense features are what a detector reads, and some boxes of
    each picture fill the batches of BatchNorm.
    """

    def __init__(
        self, model: nn.Module, normalize: nn.Module, *, frozen: Sequence[nn.Module] = ()
    ) -> None:
        super().__init__(model, normalize, frozen=frozen)
        info: Any = model.feature_info
        self.heads = nn.ModuleDict(
            {str(stride): RegionHead(info.channels()[index]) for stride, index in MAPS.items()}
        )

    def forward(self, images: Tensor, sizes: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Losses of uint8 RGB views (2B, S, S, 3); targets are regions (2B, R, 4) in their pixels,
        where rows i and B + i show the same ones.
        """
        model: Any = self.model
        maps = model.forward_intermediates(
            self.normalize(images, sizes), tuple(MAPS.values()), intermediates_only=True
        )
        losses = {}
        for (stride, head), features in zip(self.heads.items(), maps, strict=True):
            projected, predicted = head(pool_regions(features, targets, int(stride)))
            losses[f"loss_stride{stride}"] = siamese_loss(projected, predicted)
        return losses


class TeacherStep(LossStep):
    """The last feature map is to show, at every place, what a teacher's shows there.

    Feature distillation (Romero et al., 2015) through a 1x1 convolution that is thrown away, by the
    cosine; the teacher's channels get mean 0 and variance 1 first, else the strongest were all.
    """

    def __init__(
        self,
        model: nn.Module,
        normalize: nn.Module,
        teacher: FeatureMaps,
        channels: int,
        *,
        frozen: Sequence[nn.Module] = (),
    ) -> None:
        super().__init__(model, normalize, frozen=frozen)
        features: Any = model.num_features
        self.teacher = teacher  # no module of this one: it is neither trained nor stored
        self.projection = nn.Conv2d(features, channels, 1)
        self.whiten = nn.BatchNorm2d(channels, affine=False)

    def forward(self, images: Tensor, sizes: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Losses of uint8 RGB views (B, S, S, 3), whose regions count for nothing here."""
        model: Any = self.model
        shown = self.teacher(images, sizes).float()
        learnt = self.projection(model.forward_features(self.normalize(images, sizes)))
        learnt = F.adaptive_avg_pool2d(learnt.float(), (shown.shape[2], shown.shape[3]))
        distance = 1 - F.cosine_similarity(learnt, self.whiten(shown), dim=1)
        return {"loss_teacher": distance.mean()}


def pool_regions(features: Tensor, regions: Tensor, stride: int) -> Tensor:
    """Means (N * R, C) of maps (N, C, H, W) over regions (N, R, 4) xyxy in pixels of the input."""
    count, each = regions.shape[:2]
    owner = torch.arange(count, device=regions.device).repeat_interleave(each)
    rois = torch.cat([owner[:, None].to(regions.dtype), regions.flatten(0, 1)], dim=1)  # (N * R, 5)
    pooled: Tensor = roi_align(
        features.float(), rois, 2, spatial_scale=1 / stride, sampling_ratio=2, aligned=True
    )
    return pooled.mean((2, 3))


def effective_rank(features: Tensor) -> float:
    """In how many directions N feature vectors (N, D) differ: 1 along a line, 0 where all are one.

    The participation ratio of their covariance. What collapses into few directions passes through a
    BatchNorm with every channel's variance whole, so that a variance would not tell.
    """
    powers = torch.linalg.svdvals(features.float() - features.float().mean(0)).square()
    return float(powers.sum().square() / powers.square().sum().clamp(min=1e-12))


def siamese_loss(projected: Tensor, predicted: Tensor) -> Tensor:
    """Mean of 1 - cosine between each half's predictions and the other half's projections (2N, D),
    through which no gradient flows.
    """
    first, second = projected.detach().float().chunk(2)
    other = torch.cat([second, first])
    return 1 - F.cosine_similarity(predicted.float(), other, dim=1).mean()
