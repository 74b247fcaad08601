"""The networks of models.deploy as they are exported: the same outputs, from fused weights."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from vovnet.errors import ConfigError
from vovnet.export.detections import find_detections
from vovnet.export.fuse import CenteredInput
from vovnet.exported import InputName
from vovnet.models.layers import DeformableConvNormAct
from vovnet.models.vovnet import VoVNet

# Of a trace with open sizes: on every level more than one cell, and not square.
_EXAMPLE_SIDES = (288, 416)


class ExportedClassifier(nn.Module):
    """ClassifierGraph around a fused classifier; its images are never padded."""

    inputs: tuple[InputName, ...] = ("images",)

    def __init__(self, fused: VoVNet, *, mean: Sequence[float]) -> None:
        super().__init__()
        self.center = CenteredInput(mean)
        self.classifier = fused

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """images (B, H, W, 3) uint8 RGB; returns what ClassifierGraph does."""
        features = self.classifier.forward_features(self.center(images))
        embedding = self.classifier.forward_head(features, pre_logits=True)
        if self.classifier.num_classes == 0:
            return {"embedding": embedding}
        return {"logits": self.classifier.get_classifier()(embedding), "embedding": embedding}


class ExportedDetector(nn.Module):
    """DeployGraph around a fused detector, written for shapes that are known beforehand."""

    inputs: tuple[InputName, ...] = ("images", "sizes", "min_score")

    def __init__(self, fused: nn.Module, *, mean: Sequence[float]) -> None:
        super().__init__()
        self.center = CenteredInput(mean)
        self.detector = fused

    def forward(self, images: Tensor, sizes: Tensor, min_score: Tensor) -> dict[str, Tensor]:
        """images (B, H, W, 3) uint8 RGB padded to multiples of 32, sizes (B, 2) int64, min_score
        (1,) float, which stands for the setting of that name.

        Returns what DeployGraph does.
        """
        raw = self.detector(self.center(images, sizes))
        return find_detections(self.detector, raw, sizes, min_score)


class ExportedRaw(nn.Module):
    """A fused detector without the choice of detections: its predictions for every location."""

    inputs: tuple[InputName, ...] = ("images", "sizes")

    def __init__(self, fused: nn.Module, *, mean: Sequence[float]) -> None:
        super().__init__()
        self.center = CenteredInput(mean)
        self.detector = fused

    def forward(self, images: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        """As ExportedDetector; returns the detector's raw outputs but the feature maps."""
        raw = self.detector(self.center(images, sizes))
        return {name: value for name, value in raw.items() if not is_feature_map(name)}


Graph = ExportedClassifier | ExportedDetector | ExportedRaw


def is_feature_map(name: str) -> bool:
    """Whether a raw output is a level of the pyramid, p2 to p7."""
    return name[:1] == "p" and name[1:].isdecimal()


def make_graph(fused: nn.Module, *, mean: Sequence[float], raw: bool) -> Graph:
    """The graph to export of a fused network; raises ConfigError on what cannot be exported."""
    if any(isinstance(module, DeformableConvNormAct) for module in fused.modules()):
        raise ConfigError(
            "export: expected a network without deformable convolutions, which not every engine has"
        )
    if isinstance(fused, VoVNet):
        if raw:
            raise ConfigError("export: expected a detector for --raw, found a classifier")
        return ExportedClassifier(fused, mean=mean)
    return ExportedRaw(fused, mean=mean) if raw else ExportedDetector(fused, mean=mean)


def example_inputs(graph: Graph, sides: tuple[int, int] | None) -> dict[str, Tensor]:
    """Two images for a trace, by the names of the graph's inputs; sides None: any."""
    height, width = sides or _EXAMPLE_SIDES
    generator = torch.Generator().manual_seed(0)
    shape = (2, height, width, 3)
    values = {
        "images": torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),
        "sizes": torch.tensor([[height, width], [height - 1, width - 2]]),
        "min_score": torch.zeros(1),
    }
    return {name: values[name] for name in graph.inputs}


def dynamic_shapes(graph: Graph, sides: tuple[int, int] | None) -> dict[str, Any]:
    """What of the inputs is open, as torch.export wants it said."""
    batch = Dim("batch", min=1, max=65_535)
    images: dict[int, Any] = {0: batch}
    if sides is None:
        unit = 1 if isinstance(graph, ExportedClassifier) else 32
        rows, columns = (Dim(f"{name}_{unit}", min=-(-32 // unit), max=4096) for name in "hw")
        images |= {1: unit * rows, 2: unit * columns}
    shapes: dict[str, Any] = {"images": images, "sizes": {0: batch}, "min_score": None}
    return {name: shapes[name] for name in graph.inputs}
