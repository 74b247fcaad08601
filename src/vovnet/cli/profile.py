"""`vovnet profile`."""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vovnet.data.formats import require_split
from vovnet.errors import ConfigError, DataError
from vovnet.files import atomic_write_text
from vovnet.model_folder import CONFIG_FILE, bundled_models
from vovnet.profiling.accuracy import cost_block, measure_accuracy, update_card
from vovnet.profiling.compare import Sampling
from vovnet.profiling.gate import (
    Rise,
    check_against_file,
    check_interleaved,
    parse_increase,
    read_baseline,
    same_machine,
)
from vovnet.profiling.html import to_html
from vovnet.profiling.plots import profile_plots
from vovnet.profiling.profile import Settings, check_settings, profile_targets
from vovnet.profiling.records import Accuracy, Profile, why_unmeasured
from vovnet.profiling.report import plain_console, print_profile, to_csv
from vovnet.profiling.target import (
    Target,
    check_engine,
    distinct,
    find_target,
    load_module,
    on_engines,
    parse_image_size,
)
from vovnet.profiling.transition import transition_weights
from vovnet.profiling.transition_plot import draw_transition

BASELINE_SUFFIX = " (baseline)"


def profile(
    models: Sequence[str],
    engines: Sequence[str],
    device: str,
    batch_sizes: Sequence[int],
    image_sizes: Sequence[str],
    threads: Sequence[int],
    precisions: Sequence[str],
    layouts: Sequence[str],
    image: Path | None,
    rounds: int,
    max_seconds: float,
    energy: bool,
    end_to_end: bool,
    cold_starts: int,
    roofline: bool,
    new_ceilings: bool,
    layers: int,
    data_dir: Path | None,
    split: str,
    csv_file: Path | None,
    html_file: Path | None,
    card: bool,
    baseline: str | None,
    max_increase: str,
    seed: int,
    as_json: bool,
) -> int:
    """Profiles and reports; 4 when a figure rose over the baseline by more than is allowed."""
    settings = Settings(
        engine=engines[0],
        device=device,
        batch_sizes=tuple(batch_sizes) or (1,),
        image_sizes=tuple(map(parse_image_size, image_sizes)),
        threads=tuple(threads) or (None,),
        precisions=tuple(precisions) or ("fp32",),
        layouts=tuple(layouts) or ("nhwc",),
        sampling=Sampling(min_rounds=rounds, max_s=max_seconds, seed=seed),
        energy=energy,
        end_to_end=end_to_end,
        cold_starts=cold_starts,
        roofline=roofline,
        new_ceilings=new_ceilings,
        image=image,
    )
    allowed = parse_increase(max_increase)
    targets = on_engines(distinct([find_target(text) for text in models]), engines)
    if card:
        _require_folders(targets, engines)
    stored, reference = None, None
    if baseline is not None and _is_folder(baseline):
        found = find_target(baseline)
        reference = replace(found, name=found.name + BASELINE_SUFFIX)
    elif baseline is not None:
        stored = read_baseline(Path(baseline))
    outputs = [file for file in (csv_file, html_file) if file is not None]
    kept = [Path(baseline)] if stored is not None and baseline is not None else []
    kept += [] if image is None else [image]
    _check_outputs(outputs, kept, [*targets, *([reference] if reference else [])])
    for engine in engines:
        check_settings(replace(settings, engine=engine))
    for target in targets:
        check_engine(target, target.engine, device)
    if data_dir is not None:
        _check_data(data_dir, split, targets)
    accuracies = _accuracies(targets, data_dir, split, settings)
    measured = profile_targets(
        [*([reference] if reference else []), *targets],
        settings,
        accuracies=accuracies,
        progress=lambda text: print(f"vovnet: {text}", file=sys.stderr),
    )
    _report(measured, csv_file, html_file, layers, as_json)
    if card or baseline is not None:
        _require_all(measured)
    if card:
        _update_cards(measured, targets)
    rises: list[Rise] = []
    if reference is not None:
        rises = _against_folder(measured, allowed)
    elif stored is not None and baseline is not None:
        rises = check_against_file(measured, stored, allowed, where=baseline)
        if not same_machine(measured, stored):
            print("vovnet: baseline of another machine: times not compared", file=sys.stderr)
    for rise in rises:
        print(f"vovnet: {rise.format()}", file=sys.stderr)
    return 4 if rises else 0


def draw_transition_weights(models: Sequence[str], picture: Path) -> int:
    """Draws the VoVNet paper's figure 2 of one network and times nothing."""
    if len(models) != 1:
        raise ConfigError(f"transition-weights: expected one model, got {', '.join(models)}")
    target = find_target(models[0])
    if target.kind == "onnx":
        raise ConfigError(f"transition-weights: expected a network of torch, got {models[0]}")
    _check_outputs([picture], [], [target])
    maps = transition_weights(load_module(target))
    draw_transition(maps, picture)
    print(f"{picture}: {len(maps)} blocks of {target.name}")
    return 0


def _is_folder(text: str) -> bool:
    return (Path(text) / CONFIG_FILE).is_file() or text in bundled_models()


def _check_outputs(
    outputs: Sequence[Path], kept: Sequence[Path], targets: Sequence[Target]
) -> None:
    """Refuse outputs that cannot be written, or would write over what is read or each other."""
    taken = [path.resolve() for path in kept]
    taken += [target.path.resolve() for target in targets if target.path is not None]
    for output in outputs:
        path = output.resolve()
        if path.is_dir() or not path.parent.is_dir():
            found = "a folder" if path.is_dir() else "none"
            raise ConfigError(
                f"{output}: expected a file in an existing folder to write into, found {found}"
            )
        if any(path.is_relative_to(other) for other in taken):
            raise ConfigError(
                f"{output}: expected a file apart from models, --source, --baseline and other "
                "outputs, got one of these"
            )
        taken.append(path)


def _check_data(data_dir: Path, split: str, targets: Sequence[Target]) -> None:
    """Raises DataError before anything is timed where the data is not there."""
    if not data_dir.is_dir():
        raise DataError(f"{data_dir}: expected the folder of a data set, found none")
    if any(target.task != "classify" for target in targets):
        require_split(data_dir, split)


def _require_folders(targets: Sequence[Target], engines: Sequence[str]) -> None:
    if len(engines) > 1:
        raise ConfigError(f"update-card: expected one engine, got {', '.join(engines)}")
    for target in targets:
        if target.kind != "folder" or (target.path is not None and target.path.is_file()):
            raise ConfigError(f"update-card: expected a model folder, got {target.name}")


def _update_cards(measured: Profile, targets: Sequence[Target]) -> None:
    for target in targets:
        model = next(one for one in measured.models if one.name == target.name)
        if target.path is not None:
            update_card(target.path, cost_block(measured, model))


def _require_all(measured: Profile) -> None:
    """A gate must not open, nor a card be written, for a model that did not run."""
    for model in measured.models:
        reason = why_unmeasured(model.results)
        if reason is not None:
            raise ConfigError(f"{model.name}: {reason}")


def _accuracies(
    targets: Sequence[Target], data_dir: Path | None, split: str, settings: Settings
) -> dict[str, Accuracy]:
    if data_dir is None:
        return {}
    return {
        target.name: measure_accuracy(
            target.path,
            data_dir,
            split=split,
            engine=target.engine or settings.engine,
            device=settings.device,
        )
        for target in targets
        if target.kind == "folder" and target.path is not None
    }


def _report(
    measured: Profile, csv_file: Path | None, html_file: Path | None, layers: int, as_json: bool
) -> None:
    if as_json:
        print(json.dumps(measured.to_dict(), allow_nan=False))
    else:
        print_profile(measured, plain_console(), layers=layers)
    if csv_file is not None:
        atomic_write_text(csv_file, to_csv(measured))
    if html_file is not None:
        atomic_write_text(html_file, to_html(measured, profile_plots(measured)))


def _against_folder(measured: Profile, allowed: float) -> list[Rise]:
    baseline, *models = measured.models
    ratios = {ratio.name: ratio for ratio in measured.ratios}
    return [
        rise
        for model in models
        for rise in check_interleaved(model, baseline, ratios.get(model.name), allowed)
    ]
