from collections.abc import Callable

import numpy as np
import pytest

from vovnet.errors import ConfigError
from vovnet.profiling.compare import Sampling, interleave, ratio_interval


class Machine:
    """A clock and runs on it; `slowness` multiplies whatever runs, as a noisy neighbour does."""

    def __init__(self, slowness: Callable[[float], float] = lambda now_s: 1.0) -> None:
        self.now_s = 0.0
        self.slowness = slowness
        self.calls: list[str] = []

    def clock(self) -> float:
        return self.now_s

    def run(self, name: str, time_s: float) -> Callable[[], None]:
        def run() -> None:
            self.calls.append(name)
            self.now_s += time_s * self.slowness(self.now_s)

        return run


def test_a_ratio_is_exact_though_the_machine_changes_its_speed() -> None:
    """From second to second the machine is up to 9 times slower; the ratio stays 1.5."""
    noise = np.random.default_rng(0).uniform(1, 9, 10_000)
    machine = Machine(lambda now_s: float(noise[int(now_s / 50)]))
    members = {"a": machine.run("a", 0.2), "b": machine.run("b", 0.3)}
    found = interleave(members, Sampling(min_rounds=30, max_s=1e4), clock=machine.clock)
    (ratio,) = found.ratios
    assert (ratio.name, ratio.baseline) == ("b", "a")
    assert ratio.ratio == pytest.approx(1.5)
    assert ratio.within
    assert found.timings("a").relative_error() > 0.05  # what one of them alone would say


def test_each_round_holds_each_member_once_in_random_order() -> None:
    machine = Machine()
    members = {name: machine.run(name, 1.0) for name in "abc"}
    sampling = Sampling(min_rounds=40, max_s=0, warm_up_s=0)
    found = interleave(members, sampling, clock=machine.clock)
    rounds = ["".join(machine.calls[start : start + 3]) for start in range(3, 123, 3)]
    assert len(machine.calls) == 123  # one call each to warm up, then 40 rounds
    assert {"".join(sorted(one)) for one in rounds} == {"abc"}
    assert len(set(rounds)) == 6
    assert [len(times) for times in found.times_s.values()] == [40, 40, 40]


def test_sampling_goes_on_until_the_ratio_is_known() -> None:
    rng = np.random.default_rng(0)
    machine = Machine(lambda now_s: float(rng.lognormal(0, 0.3)))
    members = {"a": machine.run("a", 1.0), "b": machine.run("b", 1.0)}
    found = interleave(members, Sampling(max_s=1e6), clock=machine.clock)
    (ratio,) = found.ratios
    assert ratio.rounds > 60
    assert ratio.within
    assert (ratio.high - ratio.low) / 2 <= 0.05 * ratio.ratio
    assert ratio.low <= 1 <= ratio.high


def test_sampling_that_runs_out_of_time_says_so() -> None:
    rng = np.random.default_rng(0)
    machine = Machine(lambda now_s: float(rng.lognormal(0, 1.0)))
    members = {"a": machine.run("a", 1.0), "b": machine.run("b", 1.0)}
    found = interleave(members, Sampling(max_s=1.0), clock=machine.clock)
    assert found.ratios[0].rounds == 30
    assert not found.ratios[0].within
    assert "stayed wider than asked for" in found.ratios[0].format()


def test_one_member_is_sampled_until_its_median_is_known() -> None:
    rng = np.random.default_rng(0)
    machine = Machine(lambda now_s: float(rng.lognormal(0, 0.3)))
    found = interleave({"a": machine.run("a", 1.0)}, Sampling(max_s=1e6), clock=machine.clock)
    assert found.timings("a").count > 30
    assert found.timings("a").relative_error() <= 0.05
    assert found.ratios == ()


def test_a_short_member_runs_once_unmeasured_after_another() -> None:
    machine = Machine()
    members = {"short": machine.run("short", 0.01), "long": machine.run("long", 1.0)}
    interleave(members, Sampling(min_rounds=5, max_s=0), clock=machine.clock)
    warm = {"short": 6, "long": 6}
    counts = {name: machine.calls.count(name) - warm[name] for name in members}
    assert counts == {"short": 10, "long": 5}


def test_a_member_that_fails_leaves_and_is_named() -> None:
    machine = Machine()

    def fail() -> None:
        raise MemoryError("too large")

    members = {"bad": fail, "a": machine.run("a", 1.0), "b": machine.run("b", 2.0)}
    found = interleave(members, Sampling(max_s=0), clock=machine.clock, tolerate=(MemoryError,))
    assert str(found.failures["bad"]) == "too large"
    assert set(found.times_s) == {"a", "b"}
    assert (found.ratios[0].baseline, found.ratios[0].ratio) == ("a", 2.0)
    with pytest.raises(MemoryError):
        interleave({"bad": fail}, clock=machine.clock)


def test_the_interval_of_a_ratio_holds_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    held = []
    for seed in range(150):
        base_s = rng.lognormal(0, 0.5, 40)
        times_s = base_s * 1.2 * rng.lognormal(0, 0.1, 40)
        _, low, high = ratio_interval(times_s, base_s, seed=seed)
        held.append(low <= 1.2 <= high)
    assert 0.88 <= np.mean(held) <= 0.99


@pytest.mark.parametrize(
    ("times_s", "baseline_s"), [([1.0], [1.0, 2.0]), ([], []), ([0.0, 1.0], [1.0, 1.0])]
)
def test_pairs_that_are_none(times_s: list[float], baseline_s: list[float]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        ratio_interval(times_s, baseline_s)


def test_wrong_arguments() -> None:
    with pytest.raises(ConfigError, match="at least one"):
        interleave({})
    with pytest.raises(ConfigError, match="min_rounds >= 1"):
        Sampling(min_rounds=0)
