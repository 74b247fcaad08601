"""The graph that every engine runs: uint8 pictures in, padded detections or logits out."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from vovnet.models.layers import ConvNormAct, Normalize, SeparableConvNormAct
from vovnet.models.vovnet import VoVNet


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
        raw = self.predict(images, sizes)
        return self.detector.detect(raw, sizes)  # type: ignore[operator, no-any-return]

    def predict(self, images: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        """The detector's raw predictions, from which it chooses detections."""
        return self.detector(self.normalize(images, sizes))  # type: ignore[no-any-return]


class ClassifierGraph(nn.Module):
    """A classifier with its normalisation in front, and the embedding beside its logits.

    mean and std are RGB in units of 0..255.
    """

    def __init__(self, classifier: VoVNet, *, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.classifier = classifier

    def forward(self, images: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        """images (B, H, W, 3) uint8 RGB, sizes (B, 2) int64 height and width.

        Returns embedding (B, F), the pooled last map, and logits (B, C) of it; a backbone, which
        has no classes, gives the embedding alone.
        """
        features = self.classifier.forward_features(self.normalize(images, sizes))
        embedding = self.classifier.forward_head(features, pre_logits=True)
        if self.classifier.num_classes == 0:
            return {"embedding": embedding}
        return {"logits": self.classifier.get_classifier()(embedding), "embedding": embedding}


def fold_batch_norms(module: nn.Module) -> None:
    """Folds each BatchNorm into the convolution before it, in place: for prediction alone.

    Saves a pass over every feature map, and the memory of one. Call it on a module in eval mode.
    """
    for part in module.modules():
        if isinstance(part, ConvNormAct) and isinstance(part.bn, nn.BatchNorm2d):
            part.conv, part.bn = fuse_conv_bn_eval(part.conv, part.bn), nn.Identity()
        elif isinstance(part, SeparableConvNormAct) and isinstance(part.bn, nn.BatchNorm2d):
            part.conv_pw, part.bn = fuse_conv_bn_eval(part.conv_pw, part.bn), nn.Identity()
