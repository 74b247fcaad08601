"""A whole training: from a folder of labelled images to a run folder with a model in it."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from vovnet.errors import ConfigError, DataError
from vovnet.files import atomic_write_text, new_run_dir
from vovnet.model_folder import TRAINED_FOLDER, save_model_folder
from vovnet.models.weights import load_tensors
from vovnet.runtime.torch import choose_device, set_threads
from vovnet.training.build import checked_task, frozen_parts
from vovnet.training.checkpoint import (
    LAST,
    Checkpoint,
    Position,
    capture_random_states,
    find_checkpoint,
    library_version,
    load_checkpoint,
    load_plain,
    restore_random_states,
    save_checkpoint,
    save_plain,
)
from vovnet.training.classify import ClassifierTask
from vovnet.training.config import TrainConfig, check_same_training, config_to_yaml
from vovnet.training.detect import DetectorTask
from vovnet.training.loop import (
    Budget,
    Schedule,
    StepRecord,
    StopSignals,
    autocast_dtype,
    check_time_left,
    count_batches,
    endless_batches,
    train_steps,
)
from vovnet.training.optim import Ema, build_optimizer
from vovnet.training.package import stored_tensor
from vovnet.training.pretrain import PretrainTask
from vovnet.training.report import (
    ProgressReport,
    Record,
    SilentReport,
    TensorboardLog,
    append_record,
    describe_length,
    draw_curves,
    drop_records_after,
    read_records,
    require_matplotlib,
)
from vovnet.training.step import LossStep
from vovnet.training.task import Task, TrainResult
from vovnet.training.world import World, joined_world

BEST, METRICS = "best.pt", "metrics.jsonl"
FINAL_RESAMPLES = 200

TASKS: dict[str, Callable[..., Task]] = {
    "classify": ClassifierTask,
    "detect": DetectorTask,
    "segment": DetectorTask,
    "pretrain": PretrainTask,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """What the parts of one training share; only the contents of `position` change."""

    config: TrainConfig
    task: Task
    folder: Path
    device: torch.device
    model: nn.Module
    loss_step: LossStep
    optimizer: torch.optim.Optimizer
    ema: Ema
    position: Position
    report: ProgressReport
    tensorboard: TensorboardLog | None = None
    world: World
    # Images, seconds, and seconds of waiting for data of the latest steps, for what is shown.
    recent: deque[tuple[int, float, float]] = field(default_factory=lambda: deque(maxlen=20))


def train(
    config: TrainConfig,
    *,
    resume: Path | None = None,
    skip_bad: bool = False,
    report: ProgressReport | None = None,
) -> TrainResult:
    """Train as `config` says, in a new run folder or, from a checkpoint, in the one it lies in.

    `resume` is a run folder or a last.pt in one. Leaves last.pt, best.pt, metrics.jsonl,
    curves.png, config.yaml and the model folder `model` there. Under torchrun all processes train
    together. Raises ConfigError, DataError for bad data (unless `skip_bad` leaves it out), and
    TrainingError for a loss that is not finite.
    """
    require_matplotlib()
    device = choose_device(config.device)
    with joined_world(device.type) as world:
        if config.batch_size % world.size:
            raise ConfigError(
                f"batch_size: expected a multiple of the {world.size} processes, "
                f"got {config.batch_size}"
            )
        if device.type == "cuda" and world.size > 1:
            device = torch.device("cuda", world.local_rank)
        shown = (report or ProgressReport()) if world.is_main else SilentReport()
        return _train(config, resume, skip_bad, shown, device, world)


def _train(
    config: TrainConfig,
    resume: Path | None,
    skip_bad: bool,
    report: ProgressReport,
    device: torch.device,
    world: World,
) -> TrainResult:
    checkpoint_file = None if resume is None else find_checkpoint(resume)
    checkpoint = None if checkpoint_file is None else load_checkpoint(checkpoint_file)
    if checkpoint is not None:
        check_same_training(config, checkpoint.config, where=str(checkpoint_file))
    make_task = TASKS[checked_task(config)]
    set_threads(config.threads)
    task = make_task(config, skip_bad=skip_bad, device=device)
    if task.num_train < world.size:
        raise ConfigError(
            f"torchrun: expected at most {task.num_train} processes, one for each image, "
            f"got {world.size}"
        )
    if checkpoint is not None and checkpoint.class_names != list(task.class_names):
        raise ConfigError(
            f"resume: expected the classes {', '.join(checkpoint.class_names)} as in "
            f"{checkpoint_file}, found {', '.join(task.class_names)}"
        )
    if checkpoint is None:
        check_time_left(config.max_minutes, task.spent_s)
    run = _prepare(config, task, device, report, world)
    # Nothing is written before all this has succeeded: a refused start leaves no trace.
    if checkpoint_file is not None:
        run = replace(run, folder=checkpoint_file.parent)
    elif world.is_main:
        run = replace(run, folder=new_run_dir(Path(config.runs_dir), config.name or config.model))
    if checkpoint is not None:
        _restore(run, checkpoint)
    else:
        run.position.spent_s = run.position.taught_s = task.spent_s
    if world.is_main:
        atomic_write_text(run.folder / "config.yaml", config_to_yaml(config))
        if config.tensorboard:
            run = replace(run, tensorboard=TensorboardLog(run.folder))
        if task.skipped:
            atomic_write_text(run.folder / "skipped.txt", "".join(f"{x}\n" for x in task.skipped))
            report.message(
                f"left out {len(task.skipped)} bad entries, see {run.folder / 'skipped.txt'}"
            )
    for note in task.notes:
        report.message(note)
    report.message(
        f"{run.folder}: {config.model}, {task.num_train} images to train on, "
        f"{task.num_val} to evaluate on, {run.device}"
        + (f", {world.size} processes" if world.size > 1 else "")
    )
    interrupted_by = _train_and_evaluate(run)
    if interrupted_by is not None:
        report.message(f"interrupted; go on with --resume {run.folder}")
        return TrainResult(run_dir=run.folder, interrupted_by=interrupted_by)
    return _finish(run) if world.is_main else TrainResult(run_dir=run.folder)


def _prepare(
    config: TrainConfig, task: Task, device: torch.device, report: ProgressReport, world: World
) -> _Run:
    """Everything but the run folder, which the caller puts in."""
    torch.manual_seed(config.seed)
    np.random.seed(config.seed % 2**32)
    model = task.build_model()
    loss_step = task.loss_step(model, frozen_parts(model, config.freeze)).to(device)
    if config.channels_last:
        loss_step.to(memory_format=torch.channels_last)
    optimizer = build_optimizer(
        loss_step,
        config.optimizer,
        learning_rate=config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov,
    )
    # The same weights everywhere, but other draws (dropout, stochastic depth) in each process.
    torch.manual_seed(config.seed + world.rank)
    return _Run(
        config=config,
        task=task,
        folder=Path(),
        device=device,
        model=model,
        loss_step=loss_step,
        optimizer=optimizer,
        ema=Ema(model, config.ema_decay),
        position=Position(),
        report=report,
        world=world,
    )


def _train_and_evaluate(run: _Run) -> int | None:
    """Train to the end, with evaluations and checkpoints; the signal's number when interrupted."""
    config, position = run.config, run.position
    batches_per_epoch = count_batches(run.task.num_train, config.batch_size)
    budget = Budget.of(
        max_minutes=config.max_minutes,
        max_steps=config.max_steps,
        epochs=config.epochs,
        batches_per_epoch=batches_per_epoch,
    )
    records = _steps(run, budget, batches_per_epoch)
    saved_s = position.spent_s
    with (
        StopSignals() as stop,
        run.report,
        run.tensorboard or nullcontext(),
        _saved_on_bad_data(run),
    ):
        # One may be left over from before: it was stopped by what ended the run resumed here.
        if _evaluation_due(run, budget) and not _evaluate_and_keep_best(run, stop):
            return stop.received
        finished_s = time.monotonic()
        for record in records:
            run.recent.append((record.num_images, time.monotonic() - finished_s, record.waited_s))
            epoch = position.epoch + position.batch / batches_per_epoch
            _log_step(run, record, epoch, budget.spent_fraction(position))
            evaluated = _evaluation_due(run, budget) and _evaluate_and_keep_best(run, stop)
            received = _shared_signal(run, stop)
            due = position.spent_s - saved_s >= 60 * config.checkpoint_every_minutes
            if evaluated or due or received is not None:
                _save(run)
                saved_s = position.spent_s
            if received is not None:
                return received
            if evaluated and position.evaluations_since_best >= (config.patience or math.inf):
                run.report.message(
                    f"no better for {config.patience} evaluations: the best was step "
                    f"{position.best_step}"
                )
                return None
            finished_s = time.monotonic()
    epochs = position.step / batches_per_epoch
    run.report.message(describe_length(position.step, epochs, position.spent_s / 60))
    return None


@contextmanager
def _saved_on_bad_data(run: _Run) -> Iterator[None]:
    """A file that breaks on the way ends the training, and costs none of its steps."""
    try:
        yield
    except DataError:
        _save(run)
        raise


def _steps(run: _Run, budget: Budget, batches_per_epoch: int) -> Iterator[StepRecord]:
    """The training's steps from its position on."""
    config, position = run.config, run.position

    def progress_at(epoch: int, batch: int) -> float:
        if budget.total_steps is None:
            return budget.spent_fraction(position)
        return min(1.0, (epoch * batches_per_epoch + batch) / budget.total_steps)

    batches = endless_batches(
        run.task.dataset,
        run.task.collate,
        run.task.order_of,
        position=position,
        batch_size=config.batch_size,
        progress_at=progress_at,
        workers=config.workers,
        seed=config.seed,
        world=run.world,
    )
    schedule = Schedule(
        learning_rate=config.learning_rate,
        warmup_fraction=config.warmup_fraction,
        warmup_steps=config.warmup_steps,
        budget=budget,
        drops_at=config.drops_at,
    )
    return train_steps(
        run.world.wrap(run.loss_step, run.device),
        run.model,
        run.optimizer,
        run.ema,
        batches=batches,
        batches_per_epoch=batches_per_epoch,
        position=position,
        schedule=schedule,
        clip_norm=config.clip_norm,
        autocast_dtype=autocast_dtype(config.precision, run.device),
        device=run.device,
        world=run.world,
    )


def _shared_signal(run: _Run, stop: StopSignals) -> int | None:
    """The signal that process 0 has received: all stop after the same step, or none."""
    (received,) = run.world.share([stop.received or 0])
    return int(received) or None


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
    images, seconds, waited_s = (sum(values) for values in zip(*run.recent, strict=True))
    record: Record = {
        "kind": "train",
        "step": position.step,
        "epoch": epoch,
        "losses": {k: v / position.window_steps for k, v in position.window_losses.items()},
        "learning_rate": step.learning_rate,
        "gradient_norm": step.gradient_norm,
        "images_per_s": run.world.size * images / max(seconds, 1e-9),
        "waiting_for_data": waited_s / max(seconds, 1e-9),
        "eta_s": position.trained_s * (1.0 - fraction) / fraction if fraction > 0 else None,
        "spent_s": position.spent_s,
    }
    run.report.step(record, fraction)
    # The first too, so that a slow machine soon says how long it takes; the last for the curves.
    if position.step % run.config.log_every_steps == 0 or position.step == 1 or fraction >= 1:
        if run.world.is_main:
            _write_record(run, record)
        run.report.log(record)
        position.window_losses, position.window_steps = {}, 0


def _evaluate_and_keep_best(run: _Run, stop: StopSignals) -> bool:
    """Process 0 evaluates the averaged weights, keeps the best; False when stopped."""
    position = run.position
    value = _evaluate(run, stop) if run.world.is_main else None
    done, value = run.world.share([value is not None, value or 0.0])
    if not done:
        return False
    position.evaluated_s, position.evaluated_step = position.spent_s, position.step
    position.evaluations_since_best += 1
    # Of those at 0, where nothing may be measurable, the latest is kept.
    if value > position.best_metric or not (position.best_metric and run.task.chooses_best):
        position.best_metric, position.best_step = value, position.step
        position.evaluations_since_best = 0
        if run.world.is_main:
            best = {"tensors": run.ema.module.state_dict(), "step": position.step}
            save_plain(run.folder / BEST, best)
    return True


def _evaluate(run: _Run, stop: StopSignals) -> float | None:
    """The main figure of the averaged weights, 0 where there is none; None when stopped."""
    position = run.position
    run.report.busy(f"step {position.step}: evaluating")
    metrics = run.task.evaluate(run.ema.module, stop=stop)
    if metrics is None:
        return None
    record = {"kind": "eval", "step": position.step, "spent_s": position.spent_s}
    _write_record(run, record | {"metrics": metrics.to_dict()})
    draw_curves(run.folder / "curves.png", read_records(run.folder / METRICS))
    run.report.message(f"step {position.step}: {metrics.format()}")
    value = metrics.main()
    return 0.0 if math.isnan(value) else value


def _write_record(run: _Run, record: Record) -> None:
    append_record(run.folder / METRICS, record)
    if run.tensorboard is not None:
        run.tensorboard.write(record)


def _save(run: _Run) -> None:
    if not run.world.is_main:
        return
    checkpoint = Checkpoint(
        model=run.loss_step.state_dict(),
        ema=run.ema.state_dict(),
        optimizer=run.optimizer.state_dict(),
        position=run.position,
        random_states=capture_random_states(),
        config=run.config.model_dump(mode="json"),
        class_names=list(run.task.class_names),
        library=library_version(),
    )
    save_checkpoint(run.folder / LAST, checkpoint)


def _restore(run: _Run, checkpoint: Checkpoint) -> None:
    where = str(run.folder / LAST)
    load_tensors(run.loss_step, checkpoint.model, where=where)
    load_tensors(run.ema.module, checkpoint.ema["module"], where=where)
    run.ema.load_state_dict(checkpoint.ema)
    run.optimizer.load_state_dict(checkpoint.optimizer)
    for entry in fields(Position):
        setattr(run.position, entry.name, getattr(checkpoint.position, entry.name))
    if run.world.is_main:
        restore_random_states(checkpoint.random_states)
        drop_records_after(run.folder / METRICS, run.position.step)


def _finish(run: _Run) -> TrainResult:
    """Measure the best weights as they are stored, and write the model folder."""
    config = run.config
    best = load_plain(run.folder / BEST)["tensors"]
    tensors = {name: stored_tensor(value, config.export_half) for name, value in best.items()}
    load_tensors(run.ema.module, tensors, where=str(run.folder / BEST))
    metrics = run.task.evaluate(run.ema.module, bootstrap=FINAL_RESAMPLES)
    assert metrics is not None
    model_config = run.task.model_config(metrics, position=run.position, device=run.device)
    folder = run.folder / TRAINED_FOLDER
    arrays = {name: value.numpy() for name, value in tensors.items()}
    file_bytes = sum(array.nbytes for array in arrays.values())
    card = run.task.card(model_config, run.ema.module, metrics, file_bytes=file_bytes)
    save_model_folder(folder, model_config, arrays, card=card)
    run.report.message(f"{folder}: {metrics.format()}")
    run.report.message(run.task.advice.format(folder=folder))
    return TrainResult(run_dir=run.folder, model_dir=folder, metrics=metrics)
