import pytest

from tests.profiling.made_up import energy, timings
from vovnet.profiling.choose import Candidate, chosen, rank, verdict
from vovnet.profiling.records import Accuracy


def candidate(
    name: str,
    accuracy: float | None,
    time_ms: float | None,
    *,
    joules: float | None = None,
    spread: float = 0.02,
    data: str = "d val",
) -> Candidate:
    known = None if accuracy is None else Accuracy(value=accuracy, metric="mask AP", data=data)
    time = None if time_ms is None else timings(time_ms, spread)
    return Candidate(name=name, accuracy=known, time=time, energy=energy(joules))


def names(choices: list, fits: bool) -> list[str]:
    return [choice.candidate.name for choice in choices if (not choice.reasons) == fits]


def test_the_most_accurate_that_fits_comes_first() -> None:
    candidates = [
        candidate("fast", 0.4, 5),
        candidate("good", 0.5, 20),
        candidate("best", 0.6, 40),
    ]
    choices = rank(candidates, max_ms=30)
    assert names(choices, True) == ["good", "fast"]
    assert names(choices, False) == ["best"]
    assert choices[-1].reasons[0].startswith("too slow by 10.0 ms (1.33 x the limit")


def test_of_equally_accurate_ones_the_faster_comes_first() -> None:
    choices = rank([candidate("slow", 0.5, 20), candidate("fast", 0.5, 10)])
    assert names(choices, True) == ["fast", "slow"]


def test_a_time_fits_only_with_its_interval() -> None:
    (choice,) = rank([candidate("a", 0.5, 29.9, spread=0.1)], max_ms=30)
    assert choice.reasons[0].startswith("not surely fast enough: 29.9 ms")


@pytest.mark.parametrize(
    ("joules", "reason"),
    [
        (None, "joules unavailable: no meter here"),
        (1.0, "takes 1 J an image, 2.00 x the limit"),
        (0.495, "takes 0.495 J an image, 0.99 x the limit"),  # its largest window is above
    ],
)
def test_joules(joules: float | None, reason: str) -> None:
    (choice,) = rank([candidate("a", 0.5, 10, joules=joules)], max_joules=0.5)
    assert choice.reasons == (reason,)
    (fitting,) = rank([candidate("a", 0.5, 10, joules=0.4)], max_joules=0.5)
    assert fitting.reasons == ()


def test_without_accuracy_or_time_nothing_fits() -> None:
    choices = rank([candidate("a", None, 10), candidate("b", 0.5, None)], max_ms=30)
    assert names(choices, True) == []
    assert {choice.reasons[0].split(" (")[0] for choice in choices} == {
        "no recorded accuracy",
        "its time was not measured",
    }


def test_what_did_not_run_says_why() -> None:
    broken = Candidate(name="a", accuracy=None, time=None, error="its task is detect")
    assert rank([broken], max_ms=1)[0].reasons == ("its task is detect",)


def test_the_verdict_names_the_most_accurate_that_fits_and_why() -> None:
    good, fast, slow = candidate("good", 0.5, 20), candidate("fast", 0.4, 5), candidate("s", 1, 99)
    choices = rank([slow, fast, good], max_ms=30)
    assert chosen(choices) == good
    facts = "mask AP 0.500 on d val, 20.0 ms an image"
    text = f"chosen: good (the most accurate of 2 that fit: {facts})"
    assert verdict(choices, "segment") == text
    assert verdict(rank([good]), "segment") == f"chosen: good (the only one that fits: {facts})"
    other = candidate("other", 0.6, 10, data="e val")
    assert "other (the most accurate of 2 that fit, by accuracies of different data" in verdict(
        rank([good, other]), "segment"
    )


def test_the_verdict_where_nothing_fits_says_why_of_the_nearest() -> None:
    choices = rank([candidate("slower", 0.6, 40), candidate("slow", 0.5, 20)], max_ms=10)
    assert chosen(choices) is None
    assert verdict(choices, "segment").startswith("chosen: none (slow: too slow by 10.0 ms")
    assert (chosen([]), verdict([], "detect")) == (
        None,
        "chosen: none (no model to detect was given)",
    )
