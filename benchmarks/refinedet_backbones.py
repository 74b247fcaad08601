"""The VoVNet paper's central comparison, at equal detector: RefineDet320 on different backbones.

    python benchmarks/refinedet_backbones.py [--device auto] [--threads N] [--rounds 30]
        [--max-seconds 900] [--quick] [--json FILE]

One interleaved run over all detectors, batch 1, fp32, 320 x 320, random weights, eager torch,
BatchNorm not folded. What runs is the network up to its raw outputs: what non-maximum suppression
costs depends on trained weights. The paper's figures (its table 4) are of a TITAN X (Pascal) in
2019, so what compares is the ratio of VoVNet to its rival, not the figure. Its GFLOPs are macs, and
so are the GMAC/s here.

DenseNet and ResNet are torchvision's. DenseNet hands over what its transitions compute before they
pool, as VoVNet does, and its last norm; ResNet its layers 2 to 4. How the authors attached them is
not published: the columns "GMACs" and "params M" show how near this comes.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torchvision import models as torchvision_models

from vovnet.files import atomic_write_json
from vovnet.models.refinedet import RefineDet, RefineDetConfig, RefineDetHead
from vovnet.models.zoo import create_model
from vovnet.profiling.compare import Sampling
from vovnet.profiling.profile import Settings, module_target, profile_targets
from vovnet.profiling.records import ModelProfile, Profile
from vovnet.profiling.report import footing, milliseconds


@dataclass(frozen=True)
class PaperRow:
    """A row of the paper's table 4: GMACs, M parameters, images/s, joules for an image, GMAC/s."""

    gmacs: float
    parameters_m: float
    images_per_s: float
    energy_per_image_j: float
    gmacs_per_s: float


PAPER = {
    "vovnet39": PaperRow(32.6, 56.28, 25.0, 4.8, 815.0),
    "densenet201": PaperRow(24.65, 56.13, 12.0, 9.9, 296.9),
    "resnet50": PaperRow(25.43, 63.46, 23.2, 5.3, 591.3),
    "vovnet57": PaperRow(36.45, 70.32, 21.2, 5.9, 775.5),
    "densenet161": PaperRow(32.74, 66.76, 12.8, 10.0, 419.7),
    "resnet101": PaperRow(33.02, 82.45, 17.5, 7.5, 579.2),
}
RIVALS = {
    "densenet201": "vovnet39",
    "resnet50": "vovnet39",
    "densenet161": "vovnet57",
    "resnet101": "vovnet57",
}
QUICK = ("vovnet39", "densenet201")


class Stages(nn.Module):
    """A network cut into parts; returns what each part gives."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W) to maps of strides 8, 16, 32."""
        maps = []
        for part in self.parts:
            x = part(x)
            maps.append(x)
        return maps


def cut_densenet(network: torchvision_models.DenseNet) -> Stages:
    parts = dict(network.features.named_children())
    second, third = (list(parts[name].children()) for name in ("transition2", "transition3"))
    stem = [parts[name] for name in ("conv0", "norm0", "relu0", "pool0")]
    first = [*stem, *(parts[name] for name in ("denseblock1", "transition1", "denseblock2"))]
    return Stages(
        [
            nn.Sequential(*first, *second[:3]),
            nn.Sequential(second[3], parts["denseblock3"], *third[:3]),
            nn.Sequential(third[3], parts["denseblock4"], parts["norm5"], nn.ReLU(inplace=True)),
        ]
    )


def cut_resnet(network: torchvision_models.ResNet) -> Stages:
    stem = (network.conv1, network.bn1, network.relu, network.maxpool)
    return Stages(
        [
            nn.Sequential(*stem, network.layer1, network.layer2),
            network.layer3,
            network.layer4,
        ]
    )


def build(name: str) -> nn.Module:
    """RefineDet of 80 classes on a backbone, with random weights, in evaluation mode."""
    if name.startswith("vovnet"):
        return create_model(f"refinedet_{name}_paper").eval()
    network = getattr(torchvision_models, name)(weights=None)
    backbone = cut_densenet(network) if name.startswith("densenet") else cut_resnet(network)
    with torch.no_grad():
        channels = [one.shape[1] for one in backbone.eval()(torch.zeros(1, 3, 64, 64))]
    config = RefineDetConfig()
    return RefineDet(backbone, RefineDetHead(channels, config), config).eval()


def measure(names: Sequence[str], settings: Settings, side: int) -> Profile:
    image = (torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0)),)
    targets = [module_target(name, build(name), image) for name in names]
    return profile_targets(targets, settings, progress=print)


def table_of(profile: Profile, side: int) -> Table:
    table = Table(title=f"RefineDet at {side} x {side}, batch 1, fp32")
    for name in ("backbone", "GMACs", "paper's", "params M", "paper's", "memory access M"):
        table.add_column(name)
    for name in ("ms (95 %)", "images/s", "paper's", "GMAC/s", "paper's", "J/image", "paper's"):
        table.add_column(name)
    for name in ("VoVNet's speed to it", "paper's", "VoVNet's J to it", "paper's"):
        table.add_column(name)
    by_name = {model.name: model for model in profile.models}
    for model in profile.models:
        table.add_row(*own_cells(model), *rival_cells(model, by_name))
    return table


def own_cells(model: ModelProfile) -> list[str]:
    result, paper = model.results[0], PAPER[model.name]
    counts, times = result.counts, result.timings
    assert counts is not None
    assert times is not None
    interval = f"{milliseconds(times.median_low_ms)}-{milliseconds(times.median_high_ms)}"
    energy = energy_of(model)
    return [
        model.name,
        f"{counts.macs / 1e9:.2f}",
        f"{paper.gmacs:g}",
        f"{counts.parameters / 1e6:.2f}",
        f"{paper.parameters_m:g}",
        f"{counts.memory_access / 1e6:.1f}",
        f"{milliseconds(times.median_ms)} ({interval})",
        f"{result.images_per_s:.2f}",
        f"{paper.images_per_s:g}",
        f"{(result.achieved_flops_per_s or 0) / 2e9:.1f}",
        f"{paper.gmacs_per_s:g}",
        "unavailable" if energy is None else f"{energy:.3g}",
        f"{paper.energy_per_image_j:g}",
    ]


def rival_cells(model: ModelProfile, by_name: dict[str, ModelProfile]) -> list[str]:
    """How much faster, and how much thriftier, VoVNet is than this rival, here and in the paper."""
    ours = by_name.get(RIVALS.get(model.name, ""))
    if ours is None:
        return ["-"] * 4
    speed = (ours.results[0].images_per_s or 0.0) / (model.results[0].images_per_s or 1.0)
    paper, papers_own = PAPER[model.name], PAPER[ours.name]
    energies = (energy_of(ours), energy_of(model))
    thrift = "-" if None in energies else f"{energies[0] / energies[1]:.2f}"  # type: ignore[operator]
    return [
        f"{speed:.2f}",
        f"{papers_own.images_per_s / paper.images_per_s:.2f}",
        thrift,
        f"{papers_own.energy_per_image_j / paper.energy_per_image_j:.2f}",
    ]


def energy_of(model: ModelProfile) -> float | None:
    """Joules for an image, or None where no meter is to be had."""
    energy = model.results[0].energy
    return None if energy is None or energy.unavailable else energy.energy_per_image_j


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--max-seconds", type=float, default=900.0)
    parser.add_argument("--quick", action="store_true", help="two backbones, small, few rounds")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    rounds, seconds = (3, 0.0) if options.quick else (options.rounds, options.max_seconds)
    settings = Settings(
        device=options.device,
        threads=(options.threads,),
        sampling=Sampling(min_rounds=rounds, max_s=seconds, warm_up_s=1.0 if options.quick else 10),
        energy=not options.quick,
        end_to_end=False,
        roofline=False,
    )
    side = 64 if options.quick else 320
    profile = measure(QUICK if options.quick else tuple(PAPER), settings, side)
    console = Console(width=None if Console().is_terminal else 240)
    console.print(table_of(profile, side))
    for line in [*footing(profile), *(ratio.format() for ratio in profile.ratios)]:
        console.print(line, highlight=False, markup=False)
    if options.json is not None:
        atomic_write_json(options.json, profile.to_dict())
    print(json.dumps({"models": len(profile.models)}))


if __name__ == "__main__":
    main()
