"""`vovnet choose` as a user runs it; what it measures comes from a made-up profile."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.profiling.made_up import model, profile, result, timings
from vovnet.cli import choose as command
from vovnet.cli import main as command_line
from vovnet.model_folder import BUNDLED_DIR
from vovnet.profiling.records import Accuracy
from vovnet.profiling.stages import WHOLE

COMMON = ("--architectures", "centermask_lite_ese_vovnet19b_slim_dw", "--image-size", 64)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["vovnet", "choose", *(str(a) for a in arguments)])
    with pytest.raises(SystemExit) as caught:
        command_line.main()
    return int(caught.value.code or 0)


@pytest.fixture(autouse=True)
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """nuclei, the only bundled one: 40 ms, 0.8 J, mask AP 0.5; other folders: 10 ms, 0.1 J, no
    accuracy.
    """
    monkeypatch.setattr(command, "bundled_models", lambda: {"nuclei": BUNDLED_DIR / "nuclei"})

    def measured(targets, settings, *, require_one):
        assert not require_one  # what cannot run is a row of the table
        models = []
        for target in targets:
            time_ms, joules, accuracy = (
                (40.0, 0.8, 0.5) if target.name == "nuclei" else (10.0, 0.1, None)
            )
            measured = result(time_ms, joules=joules if settings.energy else None)
            if target.name == "broken":
                measured = replace(measured, timings=None, error="cannot run")
            made = model(target.name, measured, accuracy=accuracy)
            models.append(replace(made, stages={WHOLE: timings(time_ms)}))
        return profile(*models)

    monkeypatch.setattr(command, "profile_targets", measured)


def chosen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, dict]:
    code = run(monkeypatch, *arguments, *COMMON, "--json")
    return code, json.loads(capsys.readouterr().out)


def test_bundled_models_that_fit_and_architectures_with_counts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = chosen(monkeypatch, capsys, "--max-ms", 50, "--max-joules", 1)
    assert code == 0
    assert [one["name"] for one in found["fits"]] == ["nuclei"]
    assert found["chosen"] == "nuclei"
    (architecture,) = found["architectures"]
    assert architecture["name"] == "centermask_lite_ese_vovnet19b_slim_dw"
    assert architecture["flops"] == 2 * architecture["macs"] > 0
    assert (architecture["image_size"], found["task"]) == ([64, 64], "segment")
    assert found["fits"][0]["image_size"] == [224, 224]  # of the made-up profile's point
    assert found["machine"]["device_name"] == "Test CPU"


def test_what_does_not_fit_says_why_and_nothing_left_is_a_gate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model_folder: Path
) -> None:
    code, found = chosen(monkeypatch, capsys, model_folder, "--max-ms", 30, "--max-joules", 0.5)
    assert (code, found["chosen"]) == (4, None)
    reasons = {one["name"]: one["reasons"] for one in found["fell_out"]}
    assert reasons["small"] == ["no recorded accuracy (give --data to measure it)"]
    slow, costly = reasons["nuclei"]
    assert slow.startswith("too slow by 10.0 ms")
    assert costly == "takes 0.8 J an image, 1.60 x the limit"


def test_data_measures_the_accuracy(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model_folder: Path,
    tmp_path: Path,
) -> None:
    def measure(folder: Path, data_dir: Path, **keywords: object) -> Accuracy:
        value = 0.9 if folder == model_folder else 0.2
        return Accuracy(value=value, metric="mask AP", data="mine val")

    monkeypatch.setattr(command, "measure_accuracy", measure)
    (tmp_path / "images").mkdir()
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "val.json").touch()
    code, found = chosen(monkeypatch, capsys, model_folder, "--max-ms", 50, "--data", tmp_path)
    assert code == 0
    assert [one["name"] for one in found["fits"]] == ["small", "nuclei"]


def test_the_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model_folder: Path
) -> None:
    assert run(monkeypatch, model_folder, "--max-ms", 50, *COMMON) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("models to segment ")
    assert "224 x 224" in next(line for line in lines if line.startswith("nuclei "))
    assert any(line.startswith("architectures to segment, without weights") for line in lines)
    assert "mask AP 0.500" in next(line for line in lines if line.startswith("nuclei "))
    assert "no recorded accuracy" in next(line for line in lines if line.startswith("small "))
    assert any(line.startswith("centermask_lite_ese_vovnet19b_slim_dw") for line in lines)


def test_the_last_line_says_what_to_take(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--max-ms", 50) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("chosen: nuclei (the only one that fits: mask AP 0.500")
    assert lines[-1].endswith("40.0 ms an image)")
    assert not any("architectures" in line for line in lines)  # nobody asked for them
    assert run(monkeypatch, "--max-ms", 30) == 4
    assert capsys.readouterr().out.splitlines()[-1].startswith("chosen: none (nuclei: too slow by")
    assert run(monkeypatch, "--task", "detect") == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("chosen: none (no model to detect")


def test_a_folder_of_another_task_or_that_fails_falls_out(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model_folder: Path,
    tmp_path: Path,
) -> None:
    architectures = ("--architectures", "fcos_lite_ese_vovnet19b_slim_dw", "--image-size", 64)
    arguments = (model_folder, "--task", "detect", "--max-ms", 1, *architectures, "--json")
    assert run(monkeypatch, *arguments) == 4
    out, err = capsys.readouterr()
    (one,) = json.loads(out)["fell_out"]
    assert one["reasons"] == ["its task is segment"]
    assert "measuring" not in err
    broken = shutil.copytree(model_folder, tmp_path / "broken")
    code, found = chosen(monkeypatch, capsys, model_folder, broken)
    assert code == 0  # no limit was asked for
    assert {one["name"]: one["reasons"] for one in found["fell_out"]}["broken"] == ["cannot run"]
    code, found = chosen(monkeypatch, capsys, broken, "--max-ms", 1)
    assert (code, found["chosen"]) == (4, None)


def test_the_task_is_that_of_the_models(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model_folder: Path,
    classifier_folder: Path,
) -> None:
    small = ("--architectures", "ese_vovnet19b_slim_dw", "--image-size", 64)
    assert run(monkeypatch, classifier_folder, *small, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["task"] == "classify"
    assert [one["name"] for one in found["fell_out"]] == ["classifier"]  # no accuracy; no nuclei
    assert run(monkeypatch, model_folder, classifier_folder, *small) == 2
    error = capsys.readouterr().err
    assert "expected --task with models that do not do the same" in error
    assert "small (segment), classifier (classify)" in error
    assert run(monkeypatch, model_folder, classifier_folder, "--task", "classify", *small) == 0
    assert "its task is segment" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "fly"], "task: expected one of classify, detect, segment"),
        (["--max-ms", "0"], "max-ms: expected a number above 0"),
        (["--max-joules", "-1"], "max-joules: expected a number above 0"),
        (["--architectures", "nothing*"], "architectures: expected a pattern for segment"),
        (["ese_vovnet39b", *map(str, COMMON)], "expected model folders or bundled models"),
        (["no-such-folder", *map(str, COMMON)], "expected a model folder"),
    ],
)
def test_wrong_arguments(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert run(monkeypatch, *arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--device", "q"], 2, "device: expected cpu"),
        (["--precision", "x"], 2, "precision: expected"),
        (["--precision", "fp16", "--device", "cpu"], 2, "on the CPU, got 'fp16'"),
        (["--engine", "abacus"], 2, "engine: expected auto"),
        (["--source", "none.png"], 3, "none.png: no such file"),
        (["--data", "none"], 3, "none: expected the folder of a data set"),
        (["--image-size", "1" * 5000], 2, "image size: expected"),
    ],
)
def test_wrong_settings_are_no_fault_of_a_model(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.setattr(command, "profile_targets", None)
    assert run(monkeypatch, *arguments) == code
    assert message in capsys.readouterr().err


def test_names_are_no_markup(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model_folder: Path,
    tmp_path: Path,
) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "[red]:smile:\x1b")
    assert run(monkeypatch, folder, *COMMON) == 0
    out, err = capsys.readouterr()
    assert "[red]:smile:\\x1b " in out
    assert "\x1b" not in out + err
