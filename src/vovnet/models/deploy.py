"""The one graph that every engine runs: uint8 pictures in, padded detections out."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from vovnet.models.layers import ConvNormAct, Normalize, SeparableConvNormAct


class DeployGraph(nn.Module):
    """A detector with its normalisation in front and its detections behind.

    mean and std are RGB in units of 0..255.
    """

    def __init__(self, detector: nn.Module, *, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.detector = detector

    def forward(self, images: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        """images (B, H, W, 3) uint8 RGB padded to multiples of 32, sizes (B, 2) int64 height and
        width.

        Returns boxes (B, K, 4) xyxy in input pixels, not clipped; scores, labels, valid (B, K); for
        segmenters mask_probs (B, K, 28, 28) and mask_scores (B, K). Rows that are not valid are
        zero.
        """
        raw = self.detector(self.normalize(images, sizes))
        return self.detector.detect(raw, sizes)  # type: ignore[operator, no-any-return]


def fold_batch_norms(module: nn.Module) -> None:
    """Folds each BatchNorm into the convolution before it, in place: for prediction alone.

    Saves a pass over every feature map, and the memory of one. Call it on a module in eval mode.
    """
    for part in module.modules():
        if isinstance(part, ConvNormAct) and isinstance(part.bn, nn.BatchNorm2d):
            part.conv, part.bn = fuse_conv_bn_eval(part.conv, part.bn), nn.Identity()
        elif isinstance(part, SeparableConvNormAct) and isinstance(part.bn, nn.BatchNorm2d):
            part.conv_pw, part.bn = fuse_conv_bn_eval(part.conv_pw, part.bn), nn.Identity()
