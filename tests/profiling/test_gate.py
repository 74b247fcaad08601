import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.profiling.made_up import MACHINE, model, profile, result
from vovnet.errors import ConfigError, DataError
from vovnet.profiling.compare import Ratio
from vovnet.profiling.gate import (
    check_against_file,
    check_interleaved,
    parse_increase,
    read_baseline,
    same_machine,
)
from vovnet.profiling.records import Point, Profile


def stored(value: Profile) -> dict:
    return json.loads(json.dumps(value.to_dict()))


def rises(now: Profile, before: Profile, allowed: float = 0.05) -> list[str]:
    found = check_against_file(now, stored(before), allowed, where="base.json")
    return [rise.figure for rise in found]


def test_what_is_as_before_passes() -> None:
    assert rises(profile(), profile()) == []


def test_counts_may_rise_by_what_is_allowed_and_no_more() -> None:
    before = profile(model("a", result(macs=1000)))
    assert rises(profile(model("a", result(macs=1050))), before) == []
    assert rises(profile(model("a", result(macs=1051))), before) == ["macs"]
    assert rises(profile(model("a", result(macs=1001))), before, 0.0) == ["macs"]
    assert rises(profile(model("a", result(macs=900))), before) == []


def test_a_time_within_the_noise_passes_and_a_clear_rise_fails() -> None:
    before = profile(model("a", result(20.0, spread=0.1)))
    assert rises(profile(model("a", result(24.0, spread=0.1))), before) == []
    assert rises(profile(model("a", result(30.0, spread=0.1))), before) == ["median_ms"]


def test_joules_rise_only_by_whole_windows() -> None:
    before = profile(model("a", result(joules=1.0)))
    assert rises(profile(model("a", result(joules=1.08))), before) == []
    assert rises(profile(model("a", result(joules=1.2))), before) == ["energy_per_image_j"]
    assert rises(profile(model("a", result(joules=None))), before) == []


def test_times_of_another_machine_are_not_compared_but_counts_are() -> None:
    before = stored(profile(model("a", result(10.0, macs=1000))))
    before["machine"] = {**MACHINE, "device_name": "Other CPU"}
    now = profile(model("a", result(30.0, macs=2000)))
    assert not same_machine(now, before)
    found = check_against_file(now, before, 0.05, where="base.json")
    assert [rise.figure for rise in found] == ["macs"]


def test_a_line_names_model_figure_and_increase() -> None:
    before = stored(profile(model("a", result(macs=1000))))
    (rise,) = check_against_file(
        profile(model("a", result(macs=1200))), before, 0.05, where="base.json"
    )
    assert rise.format() == "a: macs rose from 1000 to 1200 (+20.0 %)"


def test_models_match_by_name_and_a_single_one_with_a_single_one() -> None:
    assert rises(profile(model("new")), profile(model("old"))) == []
    two = profile(model("a"), model("b", result(macs=10**10)))
    assert rises(two, profile(model("a"), model("b"))) == ["macs"]
    with pytest.raises(DataError, match=r"base\.json: expected one of the profiled models .* c, d"):
        rises(two, profile(model("c"), model("d")))


def test_another_point_does_not_compare() -> None:
    other = profile(model("a", result(point=Point(batch_size=8))))
    with pytest.raises(DataError, match="at the same point"):
        rises(profile(), other)


@pytest.mark.parametrize(
    ("low", "high", "figures"), [(0.97, 1.2, []), (1.04, 1.2, []), (1.06, 1.2, ["latency"])]
)
def test_against_a_folder_the_ratio_of_the_same_rounds_counts(
    low: float, high: float, figures: list[str]
) -> None:
    """Both medians may differ by far: only the paired interval says whether one is slower."""
    ratio = Ratio("a", "b", 1.1, low, high, 40, True)
    found = check_interleaved(model("a", result(90.0)), model("b", result(20.0)), ratio, 0.05)
    assert [rise.figure for rise in found] == figures


def test_against_a_folder_counts_and_joules_rise_too() -> None:
    now, before = model("a", result(macs=1200, joules=2.0)), model("b", result(macs=1000, joules=1))
    found = check_interleaved(now, before, None, 0.05)
    assert [rise.figure for rise in found] == ["macs", "energy_per_image_j"]


@pytest.mark.parametrize(
    ("text", "value"), [("5%", 0.05), ("0.05", 0.05), ("0", 0), (" 10 % ", 0.1)]
)
def test_increase(text: str, value: float) -> None:
    assert parse_increase(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "five", "-1%", "nan", "inf"])
def test_an_increase_that_is_none(text: str) -> None:
    with pytest.raises(ConfigError, match="max-increase"):
        parse_increase(text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "expected a profile as JSON"),
        ("[]", "expected a profile of format 1"),
        ('{"format_version": 2}', "expected a profile of format 1"),
        ('{"format_version": 1}', "expected models with their results"),
        ('{"format_version": 1, "models": [{"name": "a"}]}', "expected models with their results"),
    ],
)
def test_a_file_that_is_no_profile(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "base.json"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        read_baseline(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found none"):
        read_baseline(tmp_path / "base.json")


@pytest.mark.parametrize("part", ["timings", "energy", "counts"])
@pytest.mark.parametrize("value", [None, [], "text", {"median_ms": "x", "macs": "x"}])
def test_a_stored_figure_that_is_none_is_passed_over(part: str, value: object) -> None:
    before = stored(profile(model("a", result(joules=1.0))))
    before["models"][0]["results"][0][part] = value
    now = profile(model("a", result(99.0, joules=9.0, macs=10**10)))
    found = {rise.figure for rise in check_against_file(now, before, 0.05, where="base.json")}
    wanted = {"timings": "median_ms", "energy": "energy_per_image_j", "counts": "macs"}
    assert found == set(wanted.values()) - {wanted[part]}


@pytest.mark.parametrize("number", ["1" + 400 * "0", "NaN", "-Infinity", "1e999"])
def test_a_number_that_is_not_finite_is_no_profile(tmp_path: Path, number: str) -> None:
    path = tmp_path / "base.json"
    path.write_text(f'{{"format_version": 1, "models": [], "x": {number}}}')
    with pytest.raises(DataError, match="which is no finite number"):
        read_baseline(path)


def test_json_nested_too_deep(tmp_path: Path) -> None:
    path = tmp_path / "base.json"
    path.write_text("[" * 200_000)
    with pytest.raises(DataError, match=r"base\.json: expected a profile"):
        read_baseline(path)


def test_what_was_written_is_read_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "base.json"
    path.write_text(json.dumps(profile().to_dict()))
    assert read_baseline(path) == stored(profile())


def test_nothing_to_compare_is_no_pass() -> None:
    before = stored(profile())
    before["models"][0]["results"][0] |= {"counts": None, "timings": None}
    with pytest.raises(DataError, match="with counts or times to compare"):
        check_against_file(profile(), before, 0.05, where="base.json")


def test_a_single_round_is_no_rise_of_time() -> None:
    slow = result(90.0)
    assert slow.timings is not None
    once = replace(slow, timings=replace(slow.timings, count=1))
    assert rises(profile(model("a", slow)), profile()) == ["median_ms"]
    assert rises(profile(model("a", once)), profile()) == []
    before = stored(profile())
    before["models"][0]["results"][0]["timings"]["count"] = 1
    assert check_against_file(profile(model("a", slow)), before, 0.05, where="base.json") == []
    ratio = Ratio("a", "b", 3.0, 3.0, 3.0, 1, True)
    assert check_interleaved(model("a"), model("b"), ratio, 0.05) == []
