"""`vovnet profile` as a user runs it, on a small model in few rounds."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from tests.profiling.made_up import model, profile, result
from vovnet.cli import main as command_line
from vovnet.cli import profile as command
from vovnet.errors import ConfigError
from vovnet.model_folder import load_config
from vovnet.profiling.profile import profile_targets
from vovnet.profiling.roofline import Workload
from vovnet.profiling.target import recorded_accuracy

QUICK = ("--device", "cpu", "--rounds", 2, "--max-seconds", 0, "--image-size", 64)
BARE = (*QUICK, "--no-energy", "--no-end-to-end", "--no-roofline")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["vovnet", "profile", *(str(a) for a in arguments)])
    with pytest.raises(SystemExit) as caught:
        command_line.main()
    return int(caught.value.code or 0)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    small = Workload(matrices=(64,), images=1, copy_bytes=2**20, repeat_s=0.0)
    monkeypatch.setattr("vovnet.profiling.roofline.CPU_WORKLOAD", small)


def test_table_csv_page_and_card(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model_folder: Path,
    tmp_path: Path,
) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "run-1" / "model")
    outputs = ("--csv", tmp_path / "a.csv", "--html", tmp_path / "a.html", "--update-card")
    assert run(monkeypatch, folder, *QUICK, "--cold-starts", 0, *outputs) == 0
    out, err = capsys.readouterr()
    assert "GMACs" in out
    assert "run-1: slowest 10 of" in out
    assert "all stages" in out
    assert "point 1 of 1: batch 1, 64 x 64, fp32 nhwc" in err
    assert (tmp_path / "a.csv").read_text().startswith("model,kind,task")
    assert (tmp_path / "a.html").read_text().count("<figure>") == 3
    before, after = load_config(model_folder), load_config(folder)
    assert after.model_copy(update={"cost": {}}) == before
    assert after.cost["network_ms"]["count"] == 2
    assert after.cost["macs"] > 0
    for key in ("hardware", "method", "date", "versions", "threads"):
        assert after.cost[key], key


def test_json_then_the_gate_on_it(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model_folder: Path,
    tmp_path: Path,
) -> None:
    assert run(monkeypatch, model_folder, *BARE, "--json") == 0
    text = capsys.readouterr().out
    content = json.loads(text)
    path = tmp_path / "base.json"
    path.write_text(text)
    generous = ("--max-increase", "10000%")
    assert run(monkeypatch, model_folder, *BARE, "--baseline", path, *generous) == 0
    counts = content["models"][0]["results"][0]["counts"]
    counts["macs"] = int(counts["macs"] / 200)
    path.write_text(json.dumps(content))
    capsys.readouterr()
    assert run(monkeypatch, model_folder, *BARE, "--baseline", path, *generous) == 4
    assert "vovnet: small: macs rose from" in capsys.readouterr().err


def test_the_gate_against_a_folder_runs_both_in_the_same_rounds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model_folder: Path
) -> None:
    """The measured ratio is set; what surrounds it is real."""
    low, real = 1.2, []

    def measured(*arguments, **keywords):
        real.append(real[0] if real else profile_targets(*arguments, **keywords))
        (found, *_), (ratio,) = real, real[0].ratios
        assert (ratio.name, ratio.baseline) == ("small", "small (baseline)")
        return replace(found, ratios=(replace(ratio, ratio=1.3, low=low, high=1.4),))

    monkeypatch.setattr(command, "profile_targets", measured)
    gate = ("--baseline", model_folder)
    assert run(monkeypatch, model_folder, *BARE, *gate) == 4
    assert "small: latency rose from 1 to 1.3 (+30.0 %)" in capsys.readouterr().err
    low = 0.9
    assert run(monkeypatch, model_folder, *BARE, *gate) == 0


def test_no_gate_opens_and_no_card_is_written_for_what_did_not_run(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model_folder: Path,
    tmp_path: Path,
) -> None:
    ran = result(joules=None)
    failed = replace(ran, timings=None, error="out of memory")
    content = profile(model("small", ran), model("ese_vovnet39b", ran))
    path = tmp_path / "base.json"
    path.write_text(json.dumps(content.to_dict()))
    found = replace(content, models=(content.models[0], model("ese_vovnet39b", failed)))
    monkeypatch.setattr(command, "profile_targets", lambda *arguments, **keywords: found)
    arguments = (model_folder, "ese_vovnet39b", *BARE)
    assert run(monkeypatch, *arguments) == 0
    assert run(monkeypatch, *arguments, "--baseline", path) == 2
    assert "vovnet: ese_vovnet39b: out of memory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["no-such-model"], 2, "expected a model folder, a bundled model (nuclei, nuclei_fast)"),
        (["missing.onnx"], 2, "missing.onnx: expected an ONNX file"),
        (["nuclei", "nuclei"], 2, "expected different models"),
        (["nuclei", "--image-size", "big"], 2, "image size: expected SIDE or HEIGHTxWIDTH"),
        (["nuclei", "--image-size", "1" * 5000], 2, "image size: expected SIDE or HEIGHTxWIDTH"),
        (["nuclei", "--precision", "fp8"], 2, "precision: expected"),
        (["nuclei", "--layout", "chwn"], 2, "layout: expected nchw or nhwc"),
        (["nuclei", "--engine", "abacus"], 2, "engine: expected auto"),
        (["nuclei", "--device", "toaster"], 2, "device: expected cpu"),
        (["nuclei", "--max-increase", "much"], 2, "max-increase: expected a share"),
        (["nuclei", "--baseline", "none.json"], 3, "none.json: expected a profile or a model"),
        (["nuclei", "--html", "none/a.html"], 2, "in an existing folder to write into"),
        (["ese_vovnet39b", "--update-card"], 2, "update-card: expected a model folder"),
        (["nuclei", "--data", "none"], 3, "none"),
        (["nuclei", "--batch", "0"], 2, "batch"),
        ([], 2, "models"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *arguments) == code
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_interruption(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*arguments, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "profile_targets", interrupt)
    assert run(monkeypatch, "nuclei") == 130
    assert capsys.readouterr().err == "vovnet: interrupted\n"


def test_a_lost_device(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def lose(*arguments, **keywords):
        raise OSError("nuclei: the device was lost while running: CUDA error")

    monkeypatch.setattr(command, "profile_targets", lose)
    assert run(monkeypatch, "nuclei") == 1
    assert "vovnet: nuclei: the device was lost" in capsys.readouterr().err


@pytest.mark.parametrize("shape", [[1, 3, 64, 64], ["N", 3, "H", "W"]])
def test_an_onnx_file_is_counted_and_says_that_it_is_not_timed(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    shape: list[int | str],
) -> None:
    """Open sizes are those of --image-size."""
    onnx = pytest.importorskip("onnx", reason="the extra `export` is not installed")
    path = tmp_path / "conv.onnx"
    value, make = onnx.TensorProto.FLOAT, onnx.helper.make_tensor_value_info
    weight = onnx.helper.make_tensor("w", value, [8, 3, 3, 3], [0.0] * 216)
    node = onnx.helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1])
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [make("x", value, shape)],
        [make("y", value, [shape[0], 8, *shape[2:]])],
        [weight],
    )
    onnx.save(onnx.helper.make_model(graph), path)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert run(monkeypatch, path, *BARE, "--json") == 0
    (result,) = json.loads(capsys.readouterr().out)["models"][0]["results"]
    assert result["counts"]["macs"] == 64 * 64 * 216
    assert result["timings"] is None
    assert "install onnxruntime" in result["error"]
    path.write_bytes(b"no model")
    assert run(monkeypatch, path, *BARE) == 2
    assert "conv.onnx" in capsys.readouterr().err


def test_an_error_of_one_of_many_models_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments, **keywords):
        raise ConfigError("b: cannot run: wrong shape")

    monkeypatch.setattr(command, "profile_targets", fail)
    assert run(monkeypatch, "nuclei") == 2
    assert capsys.readouterr().err.endswith("vovnet: b: cannot run: wrong shape\n")


def test_transition_weights_are_drawn_and_nothing_is_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    picture = tmp_path / "transition.png"
    name = "ese_vovnet19b_slim_dw"
    assert run(monkeypatch, name, "--transition-weights", picture) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == f"{picture}: 4 blocks of {name}\n"
    assert run(monkeypatch, name, "vovnet39", "--transition-weights", picture) == 2
    assert "expected one model, got" in capsys.readouterr().err


@pytest.mark.parametrize(
    "outputs",
    [
        ("--csv", "model/config.json"),
        ("--html", "model/sub/../new.html"),
        ("--csv", "a.png", "--source", "a.png"),
        ("--html", "base.json", "--baseline", "base.json"),
        ("--csv", "other/config.json", "--baseline", "other"),
        ("--csv", "a.csv", "--html", "./a.csv"),
        ("--csv", "link.csv", "--source", "a.png"),
        ("--csv", "sub"),
        ("--html", "none/a.html"),
        ("--transition-weights", "model/a.png"),
    ],
)
def test_an_output_never_goes_over_what_is_read(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model_folder: Path,
    tmp_path: Path,
    outputs: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("model", "other"):
        shutil.copytree(model_folder, name)
    Path("sub").mkdir()
    Path("model/sub").mkdir()
    Image.new("RGB", (8, 8)).save("a.png")
    Path("link.csv").symlink_to("a.png")
    Path("base.json").write_text('{"format_version": 1, "models": []}')
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    monkeypatch.setattr(command, "profile_targets", None)
    assert run(monkeypatch, "model", *outputs) == 2
    assert "expected a file" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("arguments", "code"), [(["--source", "none.png"], 3), (["--data", "none"], 3)]
)
def test_missing_inputs_of_an_architecture_are_refused_first(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int
) -> None:
    monkeypatch.setattr(command, "profile_targets", None)
    assert run(monkeypatch, "ese_vovnet39b", *arguments) == code


@pytest.mark.parametrize(
    ("figures", "value"),
    [
        ({"ap": 0.5, "ap_interval": [0.4, 0.6]}, 0.5),
        ({"ap": 0.5, "ap_interval": None}, 0.5),
        ({"ap": 1}, 1),
        ({"ap": 0.5, "ap_interval": [0.4]}, None),
        ({"ap": 0.5, "ap_interval": "ab"}, None),
        ({"ap": 0.5, "ap_interval": 7}, None),
        ({"ap": 0.5, "ap_interval": [0.4, 10**400]}, None),
        ({"ap": True}, None),
        ({"ap": 10**400}, None),
        ({"ap": -5e300}, None),
        (True, None),
    ],
)
def test_a_recorded_accuracy_is_a_share(
    model_folder: Path, figures: object, value: float | None
) -> None:
    config = load_config(model_folder).model_copy(update={"metrics": {"val": {"mask": figures}}})
    found = recorded_accuracy(config)
    assert (found and found.value) == value


def test_a_broken_onnx_file_costs_no_other_model(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model_folder: Path,
    tmp_path: Path,
) -> None:
    pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"hello")
    assert run(monkeypatch, broken, model_folder, *BARE, "--cold-starts", 0) == 0
    out, err = capsys.readouterr()
    assert "GMACs" in out
    assert "broken.onnx: expected " in err
    assert run(monkeypatch, broken, *BARE, "--cold-starts", 0) == 2
    assert "broken.onnx: expected " in capsys.readouterr().err
