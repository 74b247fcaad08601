"""The cost columns of the VoVNet paper's tables beside ours, in one interleaved run.

    python benchmarks/paper_tables.py [--part classifiers|backbones|both] [--device auto]
        [--rounds 30] [--max-seconds 600] [--quick] [--json FILE]

Classifiers run at 224 x 224, backbones (feature maps) at 320 x 320, batch 1, fp32. The paper's
figures are of whole detectors on a TITAN X (Pascal) in 2019: RefineDet320 (its table 4) and DSOD300
(its table 2), so what compares is the ratio to VoVNet, not the figure. Its GFLOPs are macs, and so
are its GFLOP/s; ours are shown in macs too in the columns that stand beside them. All networks run
in plain eager torch, BatchNorm not folded, as the paper's did.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torchvision import models as torchvision_models

from vovnet.files import atomic_write_json
from vovnet.models.zoo import create_model
from vovnet.profiling.compare import Sampling
from vovnet.profiling.profile import Settings, profile_targets
from vovnet.profiling.records import ModelProfile, Profile
from vovnet.profiling.report import footing, milliseconds
from vovnet.profiling.target import Target

OURS = (
    "vovnet27_slim",
    "vovnet39",
    "vovnet57",
    "ese_vovnet19b_slim_dw",
    "ese_vovnet19b_dw",
    "ese_vovnet19b_slim",
    "ese_vovnet19b",
    "ese_vovnet39b",
    "ese_vovnet57b",
    "ese_vovnet99b",
)
PEERS = ("densenet121", "densenet161", "densenet201", "resnet50", "resnet101", "mobilenet_v2")
QUICK = ("vovnet39", "densenet201", "mobilenet_v2")


@dataclass(frozen=True)
class PaperRow:
    """A row of the paper: GMACs of the detector, images/s, joules for an image, GMAC/s."""

    table: str
    gmacs: float
    images_per_s: float
    energy_per_image_j: float
    gmacs_per_s: float


PAPER = {
    "resnet50": PaperRow("4", 25.43, 23.2, 5.3, 591.3),
    "densenet201": PaperRow("4", 24.65, 12.0, 9.9, 296.9),
    "vovnet39": PaperRow("4", 32.6, 25.0, 4.8, 815.0),
    "resnet101": PaperRow("4", 33.02, 17.5, 7.5, 579.2),
    "densenet161": PaperRow("4", 32.74, 12.8, 10.0, 419.7),
    "vovnet57": PaperRow("4", 36.45, 21.2, 5.9, 775.5),
    # MobileNet (V1) under SSD300 there; the peer here is torchvision's MobileNetV2.
    "mobilenet_v2": PaperRow("2", 1.1, 37, 2.3, 42),
    "vovnet27_slim": PaperRow("2", 5.6, 71, 0.9, 400),
}
BASE = {"4": "vovnet39", "2": "vovnet27_slim"}


def build(name: str, part: str) -> nn.Module:
    """A network with random weights in evaluation mode; `backbones` ends in feature maps."""
    if name in OURS:
        return create_model(name, features_only=part == "backbones").eval()
    network = getattr(torchvision_models, name)(weights=None).eval()
    if part == "classifiers":
        return network
    if name.startswith("resnet"):
        return nn.Sequential(*list(network.children())[:-2])
    return network.features


def measure(names: Sequence[str], part: str, settings: Settings, side: int) -> Profile:
    image = (torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0)),)
    targets = [Target(name, "module", "", None, build(name, part), image) for name in names]
    return profile_targets(targets, settings, progress=lambda text: print(f"{part}: {text}"))


def table_of(profile: Profile, title: str) -> Table:
    table = Table(title=title)
    for name in ("network", "GMACs", "params M", "memory access M", "ms (95 %)", "images/s"):
        table.add_column(name)
    for name in ("GMAC/s", "J/image", "paper: GMACs", "images/s", "GMAC/s", "J/image"):
        table.add_column(name)
    for name in ("speed to VoVNet, ours", "paper's", "same side"):
        table.add_column(name)
    by_name = {model.name: model for model in profile.models}
    for model in profile.models:
        table.add_row(*row_of(model, by_name))
    return table


def row_of(model: ModelProfile, by_name: dict[str, ModelProfile]) -> list[str]:
    result = model.results[0]
    counts, times = result.counts, result.timings
    assert counts is not None
    assert times is not None
    energy = result.energy
    joules = "-" if energy is None or energy.unavailable else f"{energy.energy_per_image_j:.3g}"
    interval = f"{milliseconds(times.median_low_ms)}-{milliseconds(times.median_high_ms)}"
    cells = [
        model.name,
        f"{counts.macs / 1e9:.2f}",
        f"{counts.parameters / 1e6:.2f}",
        f"{counts.memory_access / 1e6:.1f}",
        f"{milliseconds(times.median_ms)} ({interval})",
        f"{result.images_per_s:.1f}",
        f"{(result.achieved_flops_per_s or 0) / 2e9:.1f}",
        joules,
    ]
    return cells + paper_cells(model, by_name)


def paper_cells(model: ModelProfile, by_name: dict[str, ModelProfile]) -> list[str]:
    """The paper's columns, and whether the network is on the same side of VoVNet there as here."""
    paper = PAPER.get(model.name)
    if paper is None:
        return ["-"] * 7
    cells = [f"{paper.gmacs:g}", f"{paper.images_per_s:g}", f"{paper.gmacs_per_s:g}"]
    cells.append(f"{paper.energy_per_image_j:g}")
    base = by_name.get(BASE[paper.table])
    if base is None or base is model:
        return [*cells, "-", "-", "-"]
    ours = speed(model) / speed(base)
    theirs = paper.images_per_s / PAPER[base.name].images_per_s
    same = (ours > 1) == (theirs > 1)
    return [*cells, f"{ours:.2f}", f"{theirs:.2f}", "yes" if same else "no"]


def speed(model: ModelProfile) -> float:
    return model.results[0].images_per_s or 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=("classifiers", "backbones", "both"), default="both")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--max-seconds", type=float, default=600.0)
    parser.add_argument("--quick", action="store_true", help="three networks, small, few rounds")
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
    names = QUICK if options.quick else (*OURS, *PEERS)
    parts = ("classifiers", "backbones") if options.part == "both" else (options.part,)
    console = Console(width=None if Console().is_terminal else 220)
    found = {}
    for part in parts:
        side = 64 if options.quick else {"classifiers": 224, "backbones": 320}[part]
        profile = measure(names, part, settings, side)
        found[part] = profile.to_dict()
        console.print(table_of(profile, f"{part} at {side} x {side}, batch 1, fp32"))
        for line in [*footing(profile), *(ratio.format() for ratio in profile.ratios)]:
            console.print(line, highlight=False, markup=False)
    if options.json is not None:
        atomic_write_json(options.json, found)
    print(json.dumps({part: len(content["models"]) for part, content in found.items()}))


if __name__ == "__main__":
    main()
