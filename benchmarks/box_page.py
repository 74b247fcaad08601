"""The page for `boxes_vs_peers.py`: accuracy against milliseconds, as `vovnet profile` draws it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vovnet.files import atomic_write_text
from vovnet.profiling.html import to_html
from vovnet.profiling.latency import summary
from vovnet.profiling.machine import describe_machine
from vovnet.profiling.plots import profile_plots
from vovnet.profiling.records import Accuracy, ModelProfile, Point, PointResult, Profile

PLOTS = 2  # accuracy against milliseconds and joules; no layers were measured


def as_model(
    name: str, record: Mapping[str, Any], speed: Mapping[str, Any], data: str
) -> ModelProfile:
    """A contestant of `speed.json`, such as "yolo openvino int8", with the record of its AP."""
    _, engine, precision = name.split()
    height, width = speed["input"]
    low, high = record["ap_interval"]
    times_s = [1 / rate for rate in speed["end_to_end_images_per_s"][name]]
    point = Point(1, height, width, speed["threads"], precision)
    return ModelProfile(
        name=name,
        kind="module",
        task="detect",
        input="",
        accuracy=Accuracy(value=record["ap"], metric="box AP", data=data, low=low, high=high),
        results=(PointResult(point=point, engine=engine, device="cpu", timings=summary(times_s)),),
    )


def accuracy_name(contestant: str) -> str:
    """The record that holds a contestant's AP; fp32 has that of torch in every engine."""
    name, _, precision = contestant.split()
    return name if precision == "fp32" else f"{name}_{precision}"


def fastest(speed: Mapping[str, Any]) -> list[str]:
    """Of each detector in each precision the engine with most images per second."""
    rates = speed["end_to_end_images_per_s"]
    best: dict[str, str] = {}
    for name in sorted(rates, key=lambda one: -np.median(rates[one])):
        best.setdefault(accuracy_name(name), name)
    return list(best.values())


def above_and_left(
    ours: Mapping[str, tuple[float, float]], peers: Mapping[str, tuple[float, float]]
) -> list[str]:
    """A line for each peer that is at least as accurate as one of ours, and faster; values are
    (box AP, images/s).
    """
    return [
        f"{peer} lies above and left of {name}: {peer_ap - ap:+.3f} AP, "
        f"{peer_rate / rate:.2f} times its images/s"
        for name, (ap, rate) in ours.items()
        for peer, (peer_ap, peer_rate) in peers.items()
        if peer_ap >= ap and peer_rate > rate
    ]


def write_page(work_dir: Path, data: str) -> None:
    """Write `page.html` and its drawing; print which peers lie above and left of ours."""
    speed = json.loads((work_dir / "speed.json").read_text())
    files = {name: work_dir / f"{accuracy_name(name)}.json" for name in fastest(speed)}
    for name in (file.name for file in files.values() if not file.is_file()):
        print(f"without accuracy: {name}")
    records = {name: json.loads(f.read_text()) for name, f in files.items() if f.is_file()}
    models = [as_model(name, record, speed, data) for name, record in records.items()]
    profile = Profile(
        machine=describe_machine(torch.device("cpu")) | {"threads": speed["threads"]},
        method=(
            f"Times: from file to detections, {speed['images']} pictures one at a time, all by "
            "turns; of each detector and precision the fastest engine.",
        ),
        models=tuple(models),
    )
    plots = profile_plots(profile)[:PLOTS]
    atomic_write_text(work_dir / "page.html", to_html(profile, plots))
    atomic_write_text(work_dir / "page.svg", plots[0].svg)
    drawn: dict[bool, dict[str, tuple[float, float]]] = {True: {}, False: {}}
    for name, record in records.items():
        rate = float(np.median(speed["end_to_end_images_per_s"][name]))
        drawn[record.get("ours", False)][name] = (record["ap"], rate)
    lines = above_and_left(drawn[True], drawn[False])
    print(*(lines or ["no peer lies above and left of ours"]), sep="\n")
