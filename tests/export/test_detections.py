"""Detections chosen in fixed shapes are those of the networks' own `detect`."""

import numpy as np
import pytest
import torch
from torch import nn

from vovnet.errors import ConfigError
from vovnet.export.check import compare
from vovnet.export.fuse import fuse_network
from vovnet.export.graph import ExportedDetector, make_graph
from vovnet.models.deploy import DeployGraph, fold_batch_norms
from vovnet.models.layers import Normalize
from vovnet.models.suppress import suppress
from vovnet.models.zoo import create_model

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
SIDES = (96, 160)
SIZES = np.array([[96, 160], [61, 99]])
IMAGES = np.random.default_rng(0).integers(0, 256, (2, *SIDES, 3), dtype=np.uint8)
IMAGES[1, 61:] = IMAGES[1, :, 99:] = 0
LIMITS = {"max_detections": 30, "score_threshold": 0.02}
OVERRIDES = {
    "fcos_lite": LIMITS | {"pre_nms_top_k": 40},
    "centermask_lite": LIMITS | {"pre_nms_top_k": 40, "mask_iou_width": 16},
    "faster_rcnn_lite": LIMITS | {"pre_nms_top_k": 40, "proposals": 60, "box_width": 32},
    "mask_rcnn_lite": LIMITS | {"pre_nms_top_k": 40, "proposals": 60, "box_width": 32},
    "refinedet": LIMITS | {"pre_nms_top_k": 40, "neck_channels": 32},
    "dsod": LIMITS | {"pre_nms_top_k": 40, "source_channels": 32},
    "vovdet": LIMITS | {"neck_channels": 32, "suppression": "peaks"},
    "vovdet_seg": LIMITS | {"neck_channels": 32, "pre_nms_top_k": 40},
}
OUTPUTS = {"logits", "deltas", "objectness", "distances", "predictor", "iou", "distribution"}
Arrays = dict[str, np.ndarray]


def detector(kind: str, **overrides: float) -> nn.Module:
    """Three classes, and predictions that differ from place to place."""
    torch.manual_seed(0)
    settings = OVERRIDES[kind] | overrides
    network = create_model(f"{kind}_ese_vovnet19b_slim_dw", num_classes=3, overrides=settings)
    sizes = torch.from_numpy(SIZES)
    images = Normalize(MEAN, STD)(torch.from_numpy(IMAGES), sizes)
    network.train()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        network(images)  # so that BatchNorm knows the spread of what comes
    network.eval()
    for name, module in network.named_modules():
        if name.rpartition(".")[2] in OUTPUTS:
            for part in module.modules():
                if isinstance(part, nn.Conv2d | nn.Linear):
                    nn.init.normal_(part.weight)
                    part.register_forward_hook(_scale_to_two)
    with torch.no_grad():
        network.detect(network(images), sizes)
    for part in network.modules():
        part._forward_hooks.clear()
    return network


def _scale_to_two(module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
    """Makes a predictor's answers spread by about 2 around 0 from the next time on."""
    if output.numel() and output.std() > 0:
        factor = 2 / output.std()
        module.weight.data *= factor
        if module.bias is not None:
            channels = output.transpose(0, 1).flatten(1)
            module.bias.data = (module.bias - channels.mean(1)) * factor
        module._forward_hooks.clear()  # shared by all levels, and scaled once


def run(graph: nn.Module, *further: torch.Tensor) -> object:
    def call(images: np.ndarray, sizes: np.ndarray) -> Arrays:
        with torch.inference_mode():
            found = graph(torch.from_numpy(images), torch.from_numpy(sizes), *further)
        return {name: value.numpy() for name, value in found.items()}

    return call


@pytest.mark.parametrize("kind", sorted(OVERRIDES))
@pytest.mark.parametrize("min_score", [0.0, 0.3])
def test_as_the_networks_own_choice(kind: str, min_score: float) -> None:
    network = detector(kind, min_score=min_score)
    # Folded on both sides, as export does: what is judged is the choice, not how far these random
    # predictors magnify the rounding of a second fold, which test_fuse judges.
    fold_batch_norms(network)
    expected = run(DeployGraph(network, mean=MEAN, std=STD).eval())
    fused = fuse_network(network, std=STD)
    exported = run(ExportedDetector(fused, mean=MEAN), torch.tensor([min_score]))
    batches = [(IMAGES, SIZES), (IMAGES[:1], SIZES[:1])]
    found = expected(IMAGES, SIZES)
    scores = found["scores"][found["valid"]]
    assert len(scores) > 5
    assert np.ptp(scores) > 0.01
    assert len(np.unique(found["labels"][found["valid"]])) > 1
    assert (scores >= min_score).all()
    assert compare(kind, expected, exported, batches).problems == ()


@pytest.mark.parametrize("kind", sorted(OVERRIDES))
def test_nothing_found(kind: str) -> None:
    network = detector(kind)
    graph = ExportedDetector(fuse_network(network, std=STD), mean=MEAN)
    found = run(graph, torch.tensor([2.0]))(IMAGES, SIZES)
    assert not found["valid"].any()
    assert all((value == 0).all() for value in found.values())
    assert all(np.isfinite(value).all() for value in found.values())


def test_suppress_keeps_the_best_of_each_class() -> None:
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 9], [20, 0, 30, 10], [0, 0, 10, 10]]])
    scores = torch.tensor([[[0.5, 0.9, 0.1, 0.0], [0.4, -1.0, 0.3, -1.0]]])
    kept = suppress(boxes, scores, 0.5, 4)
    assert kept.tolist() == [[[False, True, True, False], [True, False, True, False]]]
    assert suppress(boxes, scores, 0.5, 1).tolist() == [
        [[False, True, False, False], [True, False, False, False]]
    ]
    assert suppress(boxes, scores, 0.95, 4)[0, 0].tolist() == [True, True, True, False]


def test_what_cannot_be_exported_is_named() -> None:
    deformable = create_model("ese_vovnet39_dcn_d2", num_classes=2).eval()
    with pytest.raises(ConfigError, match="expected a network without deformable convolutions"):
        make_graph(deformable, mean=MEAN, raw=False)
