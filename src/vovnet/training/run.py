"""A whole training: from a folder of labelled images to a run folder with a model in it."""

import math
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vovnet.data.augment import TrainBatch, TrainDataset, TrainPreset
from vovnet.data.labels import DetectionData
from vovnet.errors import ConfigError
from vovnet.evaluation import Metrics
from vovnet.files import atomic_write_text, new_run_dir
from vovnet.model_folder import save_model_folder
from vovnet.models.layers import Normalize
from vovnet.models.weights import load_tensors
from vovnet.preprocess import Preprocess
from vovnet.runtime.torch import choose_device, set_threads
from vovnet.training.build import (
    build_detector,
    build_preprocess,
    iou_types_of,
    load_splits,
)
from vovnet.training.checkpoint import (
    Checkpoint,
    Position,
    capture_random_states,
    library_version,
    load_checkpoint,
    load_plain,
    restore_random_states,
    save_checkpoint,
    save_plain,
)
from vovnet.training.config import TrainConfig, config_to_yaml, parse_config
from vovnet.training.loop import (
    Budget,
    Schedule,
    StepRecord,
    StopSignals,
    autocast_dtype,
    count_batches,
    epoch_batches,
    train_steps,
)
from vovnet.training.optim import Ema, build_optimizer
from vovnet.training.package import (
    build_model_config,
    evaluate_model,
    model_card,
    stored_tensor,
)
from vovnet.training.report import (
    ProgressReport,
    Record,
    append_record,
    draw_curves,
    drop_records_after,
    read_records,
    require_matplotlib,
)
from vovnet.training.step import LossStep

LAST, BEST, METRICS = "last.pt", "best.pt", "metrics.jsonl"
FINAL_RESAMPLES = 200
# What a resumed training may change; all else would make it another training.
_FREE_ON_RESUME = {
    "data", "epochs", "max_minutes", "eval_every_epochs", "eval_every_minutes", "log_every_steps",
    "checkpoint_every_minutes", "threads", "workers", "device", "export_half", "licence", "name",
    "runs_dir",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """How a training ended; without metrics and model folder when it was interrupted."""

    run_dir: Path
    interrupted_by: int | None = None  # number of the signal
    model_dir: Path | None = None
    metrics: Metrics | None = None

    @property
    def exit_code(self) -> int:
        """0, or 130 after Ctrl-C and 143 after SIGTERM."""
        return 0 if self.interrupted_by is None else 128 + self.interrupted_by


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """What the parts of one training share; only the contents of `position` change."""

    config: TrainConfig
    folder: Path
    device: torch.device
    preprocess: Preprocess
    val_data: DetectionData
    loss_step: LossStep
    optimizer: torch.optim.Optimizer
    ema: Ema
    position: Position
    report: ProgressReport
    # Images and seconds of the latest steps, for the speed that is shown.
    recent: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=20))


def train(
    config: TrainConfig,
    *,
    resume: Path | None = None,
    skip_bad: bool = False,
    report: ProgressReport | None = None,
) -> TrainResult:
    """Train as `config` says, in a new run folder or, from a checkpoint, in the one it lies in.

    `resume` is a run folder or a last.pt in one. Leaves last.pt, best.pt, metrics.jsonl,
    curves.png, config.yaml and the model folder `model` there. Raises ConfigError, DataError for
    bad data (unless `skip_bad` leaves it out), and TrainingError for a loss that is not finite.
    """
    require_matplotlib()
    report = report or ProgressReport()
    preprocess = build_preprocess(config)
    preset = TrainPreset.from_dict(config.augment)
    checkpoint_file = None if resume is None else _checkpoint_file(resume)
    checkpoint = None if checkpoint_file is None else load_checkpoint(checkpoint_file)
    if checkpoint is not None:
        _check_same_training(config, checkpoint.config, where=str(checkpoint_file))
    train_data, val_data, skipped = load_splits(config, skip_bad=skip_bad)
    set_threads(config.threads)
    run = _prepare(config, preprocess, val_data, report)
    # Nothing is written before all this has succeeded: a refused start leaves no trace.
    if checkpoint is None or checkpoint_file is None:
        folder = new_run_dir(Path(config.runs_dir), config.name or config.model)
        run = replace(run, folder=folder)
    else:
        folder = checkpoint_file.parent
        run = replace(run, folder=folder)
        _restore(run, checkpoint)
    atomic_write_text(folder / "config.yaml", config_to_yaml(config))
    if skipped:
        atomic_write_text(folder / "skipped.txt", "".join(f"{line}\n" for line in skipped))
        report.message(f"left out {len(skipped)} bad entries, see {folder / 'skipped.txt'}")
    dataset = TrainDataset(train_data, preprocess, preset=preset, seed=config.seed)
    report.message(
        f"{folder}: {config.model}, {len(train_data.images)} images to train on, "
        f"{len(val_data.images)} to evaluate on, {run.device}"
    )
    interrupted_by = _train_and_evaluate(run, dataset)
    if interrupted_by is not None:
        report.message(f"interrupted; go on with --resume {folder}")
        return TrainResult(run_dir=folder, interrupted_by=interrupted_by)
    return _finish(run)


def _prepare(
    config: TrainConfig,
    preprocess: Preprocess,
    val_data: DetectionData,
    report: ProgressReport,
) -> _Run:
    """Everything but the run folder, which the caller puts in."""
    device = choose_device(config.device)
    torch.manual_seed(config.seed)
    np.random.seed(config.seed % 2**32)
    detector = build_detector(config, len(val_data.class_names))
    loss_step = LossStep(detector, Normalize(preprocess.mean, preprocess.std)).to(device)
    if config.channels_last:
        loss_step.to(memory_format=torch.channels_last)
    optimizer = build_optimizer(
        detector,
        config.optimizer,
        learning_rate=config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )
    return _Run(
        config=config,
        folder=Path(),
        device=device,
        preprocess=preprocess,
        val_data=val_data,
        loss_step=loss_step,
        optimizer=optimizer,
        ema=Ema(detector, config.ema_decay),
        position=Position(),
        report=report,
    )


def _train_and_evaluate(run: _Run, dataset: TrainDataset) -> int | None:
    """Train to the end, with evaluations and checkpoints; the signal's number when interrupted."""
    config, position = run.config, run.position
    batches_per_epoch = count_batches(len(dataset), config.batch_size)
    budget = _budget(config, batches_per_epoch)
    records = train_steps(
        run.loss_step,
        run.optimizer,
        run.ema,
        batches_of=partial(_batches_of, dataset, config),
        batches_per_epoch=batches_per_epoch,
        position=position,
        schedule=Schedule(
            learning_rate=config.learning_rate,
            warmup_fraction=config.warmup_fraction,
            warmup_steps=config.warmup_steps,
            budget=budget,
        ),
        clip_norm=config.clip_norm,
        autocast_dtype=autocast_dtype(config.precision, run.device),
        device=run.device,
    )
    saved_s = position.spent_s
    with StopSignals() as stop, run.report:
        # One may be left over from before: it was stopped by what ended the run resumed here.
        if _evaluation_due(run, budget) and not _evaluate_and_keep_best(run, stop):
            return stop.received
        finished_s = time.monotonic()
        for record in records:
            run.recent.append((record.num_images, time.monotonic() - finished_s))
            epoch = position.epoch + position.batch / batches_per_epoch
            _log_step(run, record, epoch, budget.spent_fraction(position))
            evaluated = _evaluation_due(run, budget) and _evaluate_and_keep_best(run, stop)
            due = position.spent_s - saved_s >= 60 * config.checkpoint_every_minutes
            if evaluated or due or stop.received is not None:
                _save(run)
                saved_s = position.spent_s
            if stop.received is not None:
                return stop.received
            finished_s = time.monotonic()
    return None


def _batches_of(
    dataset: TrainDataset, config: TrainConfig, epoch: int, first_batch: int
) -> Iterable[TrainBatch]:
    return epoch_batches(
        dataset,
        epoch=epoch,
        first_batch=first_batch,
        batch_size=config.batch_size,
        seed=config.seed,
        workers=config.workers,
    )


def _budget(config: TrainConfig, batches_per_epoch: int) -> Budget:
    if config.max_minutes is not None:
        return Budget(max_seconds=60 * config.max_minutes)
    assert config.epochs is not None
    return Budget(total_steps=max(1, math.ceil(config.epochs * batches_per_epoch)))


def _evaluation_due(run: _Run, budget: Budget) -> bool:
    config, position = run.config, run.position
    if position.step == position.evaluated_step:
        return False
    if budget.spent_fraction(position) >= 1.0:
        return True
    if config.eval_every_epochs is not None:
        return position.batch == 0 and position.epoch % config.eval_every_epochs == 0
    assert config.eval_every_minutes is not None
    return position.spent_s - position.evaluated_s >= 60 * config.eval_every_minutes


def _log_step(run: _Run, step: StepRecord, epoch: float, fraction: float) -> None:
    position = run.position
    for name, value in step.losses.items():
        position.window_losses[name] = position.window_losses.get(name, 0.0) + value
    position.window_steps += 1
    images, seconds = (sum(values) for values in zip(*run.recent, strict=True))
    record: Record = {
        "kind": "train",
        "step": position.step,
        "epoch": epoch,
        "losses": {k: v / position.window_steps for k, v in position.window_losses.items()},
        "learning_rate": step.learning_rate,
        "gradient_norm": step.gradient_norm,
        "images_per_s": images / max(seconds, 1e-9),
        "eta_s": position.spent_s * (1.0 - fraction) / fraction if fraction > 0 else None,
        "spent_s": position.spent_s,
    }
    run.report.step(record, fraction)
    if position.step % run.config.log_every_steps == 0:
        append_record(run.folder / METRICS, record)
        run.report.log(record)
        position.window_losses, position.window_steps = {}, 0


def _evaluate_and_keep_best(run: _Run, stop: StopSignals) -> bool:
    """Evaluate the averaged weights and keep them if they are the best; False when stopped."""
    config, position = run.config, run.position
    run.report.busy(f"step {position.step}: evaluating")
    metrics = evaluate_model(
        run.ema.module,
        run.val_data,
        preprocess=run.preprocess,
        iou_types=iou_types_of(config, run.val_data),
        max_detections=config.max_detections,
        stop=stop,
    )
    if metrics is None:
        return False
    position.evaluated_s, position.evaluated_step = position.spent_s, position.step
    record = {"kind": "eval", "step": position.step, "spent_s": position.spent_s}
    append_record(run.folder / METRICS, record | {"metrics": metrics.to_dict()})
    draw_curves(run.folder / "curves.png", read_records(run.folder / METRICS))
    run.report.message(f"step {position.step}: {metrics.format()}")
    value = metrics.main_ap()
    if (0.0 if math.isnan(value) else value) > position.best_metric:
        position.best_metric = 0.0 if math.isnan(value) else value
        position.best_step = position.step
        best = {"tensors": run.ema.module.state_dict(), "step": position.step}
        save_plain(run.folder / BEST, best)
    return True


def _save(run: _Run) -> None:
    checkpoint = Checkpoint(
        model=run.loss_step.detector.state_dict(),
        ema=run.ema.state_dict(),
        optimizer=run.optimizer.state_dict(),
        position=run.position,
        random_states=capture_random_states(),
        config=run.config.model_dump(mode="json"),
        library=library_version(),
    )
    save_checkpoint(run.folder / LAST, checkpoint)


def _restore(run: _Run, checkpoint: Checkpoint) -> None:
    where = str(run.folder / LAST)
    load_tensors(run.loss_step.detector, checkpoint.model, where=where)
    load_tensors(run.ema.module, checkpoint.ema["module"], where=where)
    run.ema.load_state_dict(checkpoint.ema)
    run.optimizer.load_state_dict(checkpoint.optimizer)
    for entry in fields(Position):
        setattr(run.position, entry.name, getattr(checkpoint.position, entry.name))
    restore_random_states(checkpoint.random_states)
    drop_records_after(run.folder / METRICS, run.position.step)


def _finish(run: _Run) -> TrainResult:
    """Measure the best weights as they are stored, and write the model folder."""
    config = run.config
    best = load_plain(run.folder / BEST)["tensors"]
    tensors = {name: stored_tensor(value, config.export_half) for name, value in best.items()}
    load_tensors(run.ema.module, tensors, where=str(run.folder / BEST))
    metrics = evaluate_model(
        run.ema.module,
        run.val_data,
        preprocess=run.preprocess,
        iou_types=iou_types_of(config, run.val_data),
        max_detections=config.max_detections,
        bootstrap=FINAL_RESAMPLES,
    )
    assert metrics is not None
    model_config = build_model_config(
        config,
        run.val_data,
        run.preprocess,
        metrics=metrics,
        position=run.position,
        device=run.device,
    )
    folder = run.folder / "model"
    arrays = {name: value.numpy() for name, value in tensors.items()}
    save_model_folder(folder, model_config, arrays, card=model_card(model_config, metrics))
    run.report.message(f"{folder}: {metrics.format()}")
    return TrainResult(run_dir=run.folder, model_dir=folder, metrics=metrics)


def _checkpoint_file(resume: Path) -> Path:
    file = resume / LAST if resume.is_dir() else resume
    if not file.is_file():
        raise ConfigError(f"resume: expected a checkpoint at {file}, found none")
    return file


def _check_same_training(config: TrainConfig, saved: dict[str, Any], *, where: str) -> None:
    previous = parse_config(saved, where=where).model_dump(mode="json")
    for name, found in config.model_dump(mode="json").items():
        expected = previous[name]
        if name not in _FREE_ON_RESUME and expected != found:
            raise ConfigError(
                f"resume: expected {name} {expected!r} as in {where}, found {found!r}"
            )
