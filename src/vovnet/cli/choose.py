"""`vovnet choose`."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from vovnet.data.formats import require_split
from vovnet.errors import ConfigError
from vovnet.model_folder import bundled_models
from vovnet.models.zoo import list_models
from vovnet.profiling.accuracy import measure_accuracy
from vovnet.profiling.choose import Candidate, Choice, chosen, rank, verdict
from vovnet.profiling.compare import Sampling
from vovnet.profiling.placing import image_counts
from vovnet.profiling.profile import Settings, check_settings, profile_targets, sweep
from vovnet.profiling.records import Counts, ModelProfile, Profile, why_unmeasured
from vovnet.profiling.report import figure, footing, milliseconds, plain, plain_console
from vovnet.profiling.stages import WHOLE
from vovnet.profiling.target import Target, distinct, find_target, parse_image_size

Sides = tuple[int, int]
"""Height and width in pixels."""
TASKS = ("classify", "detect", "segment")


def choose(
    folders: Sequence[str],
    task: str | None,
    max_ms: float | None,
    max_joules: float | None,
    data_dir: Path | None,
    split: str,
    architectures: str | None,
    engine: str,
    device: str,
    precision: str,
    threads: int | None,
    image: Path | None,
    image_size: str | None,
    rounds: int,
    max_seconds: float,
    as_json: bool,
) -> int:
    """Prints what fits, best first, why the rest does not, and in the last line what to take; 4
    when a limit leaves nothing.
    """
    if task not in (None, *TASKS):
        raise ConfigError(f"task: expected one of {', '.join(TASKS)}, got {task!r}")
    for name, limit in (("max-ms", max_ms), ("max-joules", max_joules)):
        if limit is not None and not 0 < limit < float("inf"):
            raise ConfigError(f"{name}: expected a number above 0, got {limit}")
    settings = Settings(
        engine=engine,
        device=device,
        image_sizes=() if image_size is None else (parse_image_size(image_size),),
        threads=(threads,),
        precisions=(precision,),
        sampling=Sampling(min_rounds=rounds, max_s=max_seconds),
        energy=max_joules is not None,
        cold_starts=0,
        roofline=False,
        image=image,
    )
    check_settings(settings)
    given = _given(folders)
    task = task or _shared_task(given or _bundled())
    if data_dir is not None and task != "classify":
        require_split(data_dir, split)
    counted = {} if architectures is None else _count(task, architectures, settings)
    targets = _with_bundled(given, task)
    limited = max_ms is not None or max_joules is not None
    if limited and not targets:
        raise ConfigError(f"expected model folders, since no bundled model is one to {task}")
    profile = _profile([target for target in targets if target.task == task], settings)
    models = {} if profile is None else {model.name: model for model in profile.models}
    candidates = [
        _candidate(target, models.get(target.name), data_dir, split, settings) for target in targets
    ]
    choices = rank(candidates, max_ms=max_ms, max_joules=max_joules)
    if as_json:
        print(json.dumps(_to_dict(choices, counted, profile, task)))
    else:
        _print(choices, counted, profile, task)
    return 4 if limited and chosen(choices) is None else 0


def _given(folders: Sequence[str]) -> list[Target]:
    targets = [find_target(text) for text in folders]
    for target in targets:
        if target.kind != "folder":
            raise ConfigError(f"expected model folders or bundled models, got {target.name}")
    return targets


def _bundled() -> list[Target]:
    return [find_target(str(path)) for _, path in sorted(bundled_models().items())]


def _shared_task(targets: Sequence[Target]) -> str:
    """What all of them do; raises ConfigError where that is not one thing."""
    tasks = {target.task for target in targets}
    if len(tasks) != 1:
        found = ", ".join(f"{target.name} ({target.task})" for target in targets) or "no model"
        raise ConfigError(f"task: expected --task with models that do not do the same, got {found}")
    return tasks.pop()


def _with_bundled(given: Sequence[Target], task: str) -> list[Target]:
    """The folders that were named, and the bundled models of the task that were not."""
    known = {target.path.resolve() for target in given if target.path}
    added = [
        target
        for target in _bundled()
        if target.task == task and target.path is not None and target.path.resolve() not in known
    ]
    return distinct([*given, *added])


def _profile(targets: Sequence[Target], settings: Settings) -> Profile | None:
    """The targets measured together, None of none."""
    if not targets:
        return None
    names = ", ".join(target.name for target in targets)
    print(f"vovnet: measuring {names}", file=sys.stderr)
    return profile_targets(targets, settings, require_one=False)


def _candidate(
    target: Target,
    model: ModelProfile | None,
    data_dir: Path | None,
    split: str,
    settings: Settings,
) -> Candidate:
    """What was measured of a target; no model is there of one of another task."""
    if model is None:
        return Candidate(name=target.name, error=f"its task is {target.task}")
    reason = why_unmeasured(model.results)
    if reason is not None:
        return Candidate(name=target.name, error=reason)
    accuracy = model.accuracy
    try:
        if data_dir is not None and target.path is not None:
            accuracy = measure_accuracy(
                target.path, data_dir, split=split, engine=settings.engine, device=settings.device
            )
    except ConfigError as error:
        return Candidate(name=target.name, error=str(error))
    result = model.main
    network = None if result is None else result.timings
    return Candidate(
        name=target.name,
        accuracy=accuracy,
        time=model.stages.get(WHOLE, network),
        energy=None if result is None else result.energy,
        engine=None if result is None else result.engine,
        precision=None if result is None else result.point.precision,
        image_size=None if result is None else (result.point.height, result.point.width),
    )


def _count(task: str, pattern: str, settings: Settings) -> dict[tuple[str, Sides], Counts]:
    """Of each architecture by its name and the size of the picture."""
    names = [name for name in list_models(task=task) if fnmatch(name, pattern)]  # type: ignore[arg-type]
    if not names:
        raise ConfigError(f"architectures: expected a pattern for {task}, got {pattern!r}")
    targets = [Target(name, "architecture", task, architecture=name) for name in names]
    points = [sweep([target], settings)[0] for target in targets]
    return {
        (target.name, (point.height, point.width)): image_counts(target, point)
        for target, point in zip(targets, points, strict=True)
    }


def _size(sides: Sides | None) -> str:
    return "-" if sides is None else f"{sides[0]} x {sides[1]}"


def _to_dict(
    choices: Sequence[Choice],
    counted: dict[tuple[str, Sides], Counts],
    profile: Profile | None,
    task: str,
) -> dict[str, Any]:
    best = chosen(choices)
    return {
        "task": task,
        "chosen": None if best is None else best.name,
        "fits": [_choice_dict(choice) for choice in choices if not choice.reasons],
        "fell_out": [_choice_dict(choice) for choice in choices if choice.reasons],
        "architectures": [
            {"name": name, "image_size": size, **asdict(counts), "flops": counts.flops}
            for (name, size), counts in counted.items()
        ],
        "machine": dict(profile.machine) if profile else None,
        "method": list(profile.method) if profile else None,
    }


def _choice_dict(choice: Choice) -> dict[str, Any]:
    return {**asdict(choice.candidate), "reasons": list(choice.reasons)}


def _print(
    choices: Sequence[Choice],
    counted: dict[tuple[str, Sides], Counts],
    profile: Profile | None,
    task: str,
) -> None:
    console = plain_console()
    style = box.SIMPLE_HEAD if console.is_terminal else None
    table = Table(box=style, pad_edge=False)
    timed = "one image, file to results"
    for name in (f"models to {task}", "engine", "accuracy", "picture", timed, "J/image", "fits"):
        table.add_column(name)
    for choice in choices:
        one = choice.candidate
        cells = (
            one.name,
            ", ".join(filter(None, (one.engine, one.precision))) or "-",
            one.accuracy.format() if one.accuracy else "-",
            _size(one.image_size),
            "-" if one.time is None else f"{milliseconds(one.time.median_ms)} ms",
            figure(None if one.energy is None else one.energy.energy_per_image_j),
            "; ".join(choice.reasons) or "yes",
        )
        table.add_row(*map(plain, cells))
    console.print(table)
    if counted:
        console.print(_costs(counted, task, style))
    for line in footing(profile) if profile else []:
        console.print(plain(line), style="dim")
    console.print(plain(verdict(choices, task)), soft_wrap=True)


def _costs(counted: dict[tuple[str, Sides], Counts], task: str, style: box.Box | None) -> Table:
    costs = Table(box=style, pad_edge=False)
    title = f"architectures to {task}, without weights"
    for name in (title, "picture", "GMACs", "params M", "memory access M"):
        costs.add_column(name)
    for (name, size), counts in counted.items():
        figures = (counts.macs / 1e9, counts.parameters / 1e6, counts.memory_access / 1e6)
        costs.add_row(name, _size(size), *(figure(value, 4) for value in figures))
    return costs
