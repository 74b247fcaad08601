import os
import signal
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from tests.training.toy import ToyDataset, ToyTraining
from vovnet.data.augment import collate_train
from vovnet.errors import TrainingError
from vovnet.training.checkpoint import (
    Checkpoint,
    Position,
    capture_random_states,
    load_checkpoint,
    restore_random_states,
    save_checkpoint,
)
from vovnet.training.loop import (
    Budget,
    StopSignals,
    autocast_dtype,
    computes_bf16,
    count_batches,
    endless_batches,
    epoch_order,
)
from vovnet.training.step import total_loss
from vovnet.training.world import World

# Newer Pythons warn when a process with threads forks, which is how the loader's processes start.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

CPU = torch.device("cpu")
ALONE = World()


def save(training: ToyTraining, path: Path) -> None:
    save_checkpoint(
        path,
        Checkpoint(
            model=training.detector.state_dict(),
            ema=training.ema.state_dict(),
            optimizer=training.optimizer.state_dict(),
            position=training.position,
            random_states=capture_random_states(),
            config={},
            class_names=[],
            library="",
        ),
    )


def restore(training: ToyTraining, path: Path) -> None:
    checkpoint = load_checkpoint(path)
    training.detector.load_state_dict(checkpoint.model)
    training.ema.load_state_dict(checkpoint.ema)
    training.optimizer.load_state_dict(checkpoint.optimizer)
    training.position = checkpoint.position
    restore_random_states(checkpoint.random_states)


def batches_of(dataset: ToyDataset, batch_size: int, *, workers: int = 0, world: World = ALONE):
    """The batches of a training from its start on."""
    return endless_batches(
        dataset,
        collate_train,
        lambda epoch: epoch_order(len(dataset), seed=0, epoch=epoch),
        position=Position(),
        batch_size=batch_size,
        progress_at=lambda epoch, batch: (3 * epoch + batch) / 10,
        workers=workers,
        seed=0,
        world=world,
    )


def assert_equal_states(a: object, b: object) -> None:
    if isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor)
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert isinstance(b, dict)
        assert a.keys() == b.keys()
        for key in a:
            assert_equal_states(a[key], b[key])
    elif isinstance(a, list):
        assert isinstance(b, list)
        for left, right in zip(a, b, strict=True):
            assert_equal_states(left, right)
    else:
        assert a == b


@pytest.mark.parametrize(
    ("stop_after", "workers"),  # an epoch is 3 steps
    [(1, 0), (3, 0), (5, 0), (6, 0), (8, 0), (3, 2), (5, 2)],
)
def test_a_resumed_training_equals_a_straight_one(tmp_path, stop_after, workers):
    straight = ToyTraining(workers=workers)
    expected = list(straight.steps())
    first = ToyTraining(workers=workers)
    records = []
    for record in first.steps():
        records.append(record)
        if first.position.step == stop_after:
            save(first, tmp_path / "last.pt")
            break
    torch.rand(17)  # another process would not be at this place of the generator either
    second = ToyTraining(workers=workers)
    restore(second, tmp_path / "last.pt")
    records += list(second.steps())
    assert records == expected
    assert_equal_states(straight.detector.state_dict(), second.detector.state_dict())
    assert_equal_states(straight.ema.state_dict(), second.ema.state_dict())
    assert_equal_states(straight.optimizer.state_dict(), second.optimizer.state_dict())


def test_a_resume_with_fewer_images_goes_on_with_the_next_epoch():
    training = ToyTraining()
    training.position.batch = 7  # an epoch is 3 steps
    first = next(iter(training.steps()))
    assert first.num_images > 0
    assert (training.position.epoch, training.position.batch) == (1, 1)


def test_workers_do_not_change_the_training():
    assert list(ToyTraining(workers=0).steps()) == list(ToyTraining(workers=2).steps())


def test_done_batches_are_not_loaded_again():
    training = ToyTraining()
    list(islice(training.batches(Position(epoch=4, batch=2)), 1))
    assert training.dataset.loaded == epoch_order(10, seed=training.seed, epoch=4)[6:9]


def test_the_order_is_a_function_of_seed_and_epoch():
    torch.manual_seed(1)
    first = epoch_order(50, seed=3, epoch=2)
    assert first == epoch_order(50, seed=3, epoch=2)
    assert sorted(first) == list(range(50))
    assert first != epoch_order(50, seed=3, epoch=3)
    assert first != epoch_order(50, seed=4, epoch=2)


@pytest.mark.parametrize(("images", "size", "expected"), [(10, 3, 3), (9, 3, 3), (2, 8, 1)])
def test_batches_are_whole_or_the_only_one(images, size, expected):
    assert count_batches(images, size) == expected
    dataset = ToyDataset(images)
    batches = list(islice(batches_of(dataset, size), expected + 1))
    assert [len(batch.paths) for batch in batches] == [min(size, images)] * (expected + 1)
    assert dataset.epoch == 1  # of the last one


def test_processes_share_each_batch():
    whole = [batch.paths for batch in islice(batches_of(ToyDataset(9), 4), 5)]
    parts = [
        [batch.paths for batch in islice(batches_of(ToyDataset(9), 4, world=World(rank, 2)), 5)]
        for rank in range(2)
    ]
    for paths, first, second in zip(whole, *parts, strict=True):
        assert paths == [path for pair in zip(first, second, strict=True) for path in pair]


def test_samples_are_told_how_far_the_training_is():
    dataset = ToyDataset(9)
    told = []
    for _ in islice(batches_of(dataset, 3), 5):
        told.append(round(dataset.progress, 3))
    assert told == [0.0, 0.1, 0.2, 0.3, 0.4]


def test_a_data_set_may_make_its_batches_together():
    class Together(ToyDataset):
        def __getitems__(self, indices):
            self.asked = list(indices)
            return [self[index] for index in indices]

    dataset = Together(9)
    (batch,) = islice(batches_of(dataset, 4), 1)
    assert len(dataset.asked) == len(batch.paths) == 4


def test_positions_and_learning_rates():
    training = ToyTraining(total_steps=4)
    positions, rates = [], []
    for record in training.steps():
        position = training.position
        positions.append((position.step, position.epoch, position.batch))
        rates.append(record.learning_rate)
    assert positions == [(1, 0, 1), (2, 0, 2), (3, 1, 0), (4, 1, 1)]
    assert rates[0] == pytest.approx(0.1 * 0.001)
    assert rates[1] > rates[2] > rates[3]


def test_a_time_budget_ends_the_training():
    budget = Budget(max_seconds=2.0)
    assert budget.spent_fraction(Position(spent_s=0.5)) == 0.25
    assert budget.spent_fraction(Position(spent_s=3.0)) == 1.0
    # A teacher's time is no part of the schedule: after it the training is at its beginning.
    assert budget.spent_fraction(Position(spent_s=1.0, taught_s=1.0)) == 0.0
    assert budget.spent_fraction(Position(spent_s=1.5, taught_s=1.0)) == 0.5
    assert budget.spent_fraction(Position(spent_s=2.0, taught_s=1.0)) == 1.0


def test_a_time_budget_stops_the_loop():
    training = ToyTraining()
    training.schedule = replace(training.schedule, budget=Budget(max_seconds=0.05))
    rates = [record.learning_rate for record in training.steps()]
    assert training.position.spent_s >= 0.05
    assert training.position.step == len(rates) >= 1


def test_bf16_trains():
    training = ToyTraining(total_steps=60)
    records = list(training.steps(autocast_dtype=torch.bfloat16))
    assert records[-1].losses != list(ToyTraining(total_steps=60).steps())[-1].losses
    assert all(parameter.dtype == torch.float32 for parameter in training.detector.parameters())


def test_training_lowers_the_loss():
    records = list(ToyTraining(total_steps=60).steps())
    first, last = (sum(r.losses["loss_size"] for r in part) for part in (records[:9], records[-9:]))
    assert last < first


def test_a_loss_that_is_not_finite_names_everything_and_changes_nothing():
    training = ToyTraining(bad=2)
    before: list[dict[str, torch.Tensor]] = [{}]

    def train_on() -> None:
        for _ in training.steps():
            before.append({k: v.clone() for k, v in training.detector.state_dict().items()})

    with pytest.raises(TrainingError) as caught:
        train_on()
    order = epoch_order(10, seed=training.seed, epoch=0)
    start = order.index(2) // 3 * 3
    for index in order[start : start + 3]:
        assert f"image{index}.png" in str(caught.value)
    assert "loss_size nan" in str(caught.value)
    assert "loss_small 0." in str(caught.value)
    parameters = dict(training.detector.named_parameters())
    for name, value in before[-1].items():
        if name in parameters:
            assert torch.equal(parameters[name], value)


def test_too_high_a_learning_rate_stops():
    with pytest.raises(TrainingError, match="expected finite"):
        list(ToyTraining(total_steps=100, learning_rate=1e9).steps(clip_norm=None))


def test_gradients_that_are_not_finite_stop(monkeypatch):
    training = ToyTraining()
    weight = training.detector.head.weight
    weight.register_hook(lambda gradient: gradient * float("inf"))
    before = weight.clone()
    with pytest.raises(TrainingError, match=r"gradients, got a norm of (nan|inf).*image\d\.png"):
        list(training.steps())
    assert torch.equal(weight, before)


def test_no_losses_is_an_error():
    with pytest.raises(ValueError, match="expected at least one named loss"):
        total_loss({})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_noted_and_a_second_one_acts(number):
    before = signal.signal(number, signal.default_int_handler)
    try:
        with StopSignals() as stop:
            assert stop.received is None
            os.kill(os.getpid(), number)
            assert stop.received == number
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), number)
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)


class SignalDataset(ToyDataset):
    """Images that say how their process takes Ctrl-C, and whether it is in a group of its own."""

    def __getitem__(self, index: int):
        image, target, path = super().__getitem__(index)
        image[0, 0, 0] = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        image[0, 0, 1] = os.getpgrp() == os.getpid()
        return image, target, path


def test_loading_processes_ignore_ctrl_c():
    for batch in islice(batches_of(SignalDataset(), 2, workers=1), 3):
        assert batch.images[:, 0, 0, :2].eq(1).all()


def test_precision(monkeypatch):
    assert autocast_dtype("fp32", CPU) is None
    assert autocast_dtype("bf16", CPU) is torch.bfloat16
    assert autocast_dtype("auto", CPU) is (torch.bfloat16 if computes_bf16(CPU) else None)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    assert autocast_dtype("auto", CPU) is None
