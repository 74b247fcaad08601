"""The profiler on small modules and folders, in few rounds."""

import html
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from vovnet.errors import ConfigError, ImageError
from vovnet.exported import EXPORT_KEY, ONNX_FILE
from vovnet.model_folder import CONFIG_KEY, ModelConfig, load_config
from vovnet.predict import Predictor
from vovnet.profiling.compare import Sampling
from vovnet.profiling.count import count_costs
from vovnet.profiling.profile import (
    Settings,
    module_target,
    profile_module,
    profile_targets,
    sweep,
)
from vovnet.profiling.records import Point
from vovnet.profiling.roofline import Workload
from vovnet.profiling.stages import time_cold_start, time_stages
from vovnet.profiling.target import (
    Target,
    check_engine,
    distinct,
    explain,
    find_target,
    known_accuracy,
    load_module,
    on_engines,
    parse_image_size,
    picture,
    recorded_accuracy,
)

QUICK = Settings(
    device="cpu",
    sampling=Sampling(min_rounds=3, max_s=0, warm_up_s=0),
    energy=False,
    end_to_end=False,
    roofline=False,
    layer_rounds=2,
)


def small() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1))


class Failing(nn.Module):
    """Raises what it is given as soon as values, not shapes alone, go through."""

    def __init__(self, error: Exception, above: int = 0) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 1)
        self.error = error
        self.above = above

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_meta and x.shape[0] > self.above:
            raise self.error
        return self.convolution(x)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    small = Workload(matrices=(64,), images=1, copy_bytes=2**20, repeat_s=0.0)
    monkeypatch.setattr("vovnet.profiling.roofline.CPU_WORKLOAD", small)


def test_a_module_is_counted_timed_and_placed() -> None:
    torch.manual_seed(0)
    settings = replace(QUICK, roofline=True, energy=True)
    module = small().train()
    found = profile_module(module, (torch.randn(2, 3, 16, 16),), settings=settings)
    (model,) = found.models
    (result,) = model.results
    assert result.counts is not None
    assert result.counts.macs == 16 * 16 * (3 * 8 * 9 + 8 * 4)  # of one image, not of the batch
    assert result.counts.parameters == 3 * 8 * 9 + 8 + 8 * 4 + 4
    assert result.timings is not None
    assert result.timings.count == 3
    assert (result.point.batch_size, result.point.height) == (2, 16)
    assert result.images_per_s == pytest.approx(2000 / result.timings.median_ms)
    assert result.achieved_flops_per_s == pytest.approx(result.counts.flops * result.images_per_s)
    assert [layer.name for layer in model.layers] == ["0", "2"]
    assert model.layers[0].flops == 2 * 2 * 16 * 16 * 3 * 8 * 9  # of the batch that was timed
    assert model.layers[0].memory_bytes == 4 * (2 * 16 * 16 * (3 + 8) + 3 * 8 * 9)
    assert model.whole is not None
    assert model.whole.flops == sum(layer.flops for layer in model.layers)
    assert result.energy is not None
    assert (result.energy.unavailable is None) == (result.energy.energy_per_image_j is not None)
    assert found.machine["device"] == "cpu"
    assert module.training  # the caller's module stays as it was


def test_models_of_one_run_share_their_rounds_and_have_a_ratio() -> None:
    inputs = (torch.randn(1, 3, 8, 8),)
    targets = [module_target(name, small(), inputs) for name in ("a", "b")]
    found = profile_targets(targets, QUICK)
    (ratio,) = found.ratios
    assert (ratio.name, ratio.baseline, ratio.rounds) == ("b", "a", 3)
    assert "sizes" not in ratio.format()


def test_out_of_memory_is_reported_and_the_sweep_goes_on() -> None:
    error = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ...")
    targets = [Target("a", "module", "", None, Failing(error, above=1), ())]

    def inputs(target: Target, point: Point) -> tuple[Tensor, ...]:
        return (torch.zeros(point.batch_size, 3, point.height, point.width),)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vovnet.profiling.target._module_inputs", inputs)
        report = count_costs(small(), (torch.zeros(1, 3, 8, 8),))
        patch.setattr("vovnet.profiling.placing.count_target", lambda *_: report)
        found = profile_targets(
            targets, replace(QUICK, batch_sizes=(1, 2, 1), image_sizes=((8, 8),))
        )
    first, second, third = found.models[0].results
    assert second.error == "out of memory"
    assert second.timings is None
    assert first.timings is not None
    assert third.timings is not None


def test_a_model_that_never_runs_is_an_error() -> None:
    module = Failing(RuntimeError("wrong shape"))
    with pytest.raises(ConfigError, match="broken: cannot run: wrong shape"):
        profile_module(module, (torch.zeros(1, 3, 8, 8),), name="broken", settings=QUICK)


def test_a_model_that_never_runs_leaves_the_others_their_figures() -> None:
    inputs = (torch.zeros(1, 3, 8, 8),)
    broken = module_target("broken", Failing(RuntimeError("wrong shape")), inputs)
    said: list[str] = []
    targets = [broken, module_target("a", small(), inputs)]
    found = profile_targets(targets, QUICK, progress=said.append)
    first, second = found.models
    assert (first.results[0].timings, first.results[0].error) == (None, "cannot run: wrong shape")
    assert second.results[0].timings is not None
    assert "not measured: broken: cannot run: wrong shape" in said
    with pytest.raises(ConfigError, match="broken: cannot run: wrong shape; other: cannot run"):
        profile_targets([broken, replace(broken, name="other")], QUICK)


@pytest.mark.parametrize("file", [".", ONNX_FILE])
def test_a_file_of_one_size_runs_at_that(exported_classifier_folder: Path, file: str) -> None:
    own = replace(find_target(str(exported_classifier_folder / file)), engine="onnxruntime")
    targets = [own, find_target("ese_vovnet19b_slim_dw")]
    settings = replace(QUICK, image_sizes=((96, 128),), end_to_end=True, cold_starts=0)
    found = profile_targets(targets, settings)
    fixed, free = found.models
    alone = profile_targets([own], replace(QUICK, image_sizes=((64, 64),))).models[0]
    assert (fixed.results[0].point.height, fixed.results[0].point.width) == (64, 64)
    assert (free.results[0].point.height, free.results[0].point.width) == (96, 128)
    assert fixed.results[0].counts == alone.results[0].counts
    assert fixed.results[0].timings is not None
    told = "its file has a size of its own: it ran at batch 1, 64 x 64, not as asked"
    assert told in fixed.notes
    assert not any("its file" in note for note in (*free.notes, *alone.notes))
    (ratio,) = found.ratios
    assert ratio.format().endswith(", of other sizes: batch 1, 96 x 128 over batch 1, 64 x 64")


def test_a_foreign_file_of_one_size_says_what_it_ran_at(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
    path = tmp_path / "conv.onnx"
    images = torch.zeros(2, 3, 16, 24)
    torch.onnx.export(small().eval(), (images,), path, dynamo=True, verbose=False)
    settings = replace(QUICK, image_sizes=((64, 64),))
    (result,) = profile_targets([find_target(str(path))], settings).models[0].results
    point = result.point
    assert (point.batch_size, point.height, point.width) == (2, 16, 24)
    assert result.timings is not None
    assert result.images_per_s == pytest.approx(2000 / result.timings.median_ms)


def test_a_wrong_input_names_the_layer() -> None:
    with pytest.raises(ConfigError, match=r"module: .*expected input"):
        profile_module(small(), (torch.zeros(1, 5, 8, 8),), settings=QUICK)


def test_a_lost_device_ends_the_run() -> None:
    module = Failing(RuntimeError("CUDA error: unspecified launch failure\nmore"))
    with pytest.raises(OSError, match="m: the device was lost while running: CUDA error"):
        profile_module(module, (torch.zeros(1, 3, 8, 8),), name="m", settings=QUICK)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (MemoryError(), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried ..."), "out of memory"),
        (ConfigError("precision: no"), "precision: no"),
        (RuntimeError("first\nsecond"), "cannot run: first"),
        (RuntimeError(), "cannot run: RuntimeError"),
    ],
)
def test_reasons_are_one_line(error: Exception, text: str) -> None:
    assert explain(error, "m") == text


def test_a_precision_that_the_device_lacks_is_reported_in_a_sweep() -> None:
    settings = replace(QUICK, precisions=("fp32", "fp16", "bf16"), layouts=("nhwc", "nchw"))
    found = profile_module(small(), (torch.zeros(1, 3, 8, 8),), settings=settings)
    errors = [result.error for result in found.models[0].results]
    expected = "precision: expected fp32 or bf16 on the CPU, got 'fp16'"
    assert errors == [None, None, expected, expected, None, None]


def test_the_sweep_is_every_combination_with_the_main_point_first() -> None:
    targets = [Target("a", "architecture", "classify"), Target("b", "architecture", "detect")]
    settings = replace(QUICK, batch_sizes=(1, 8), threads=(1, 2), precisions=("fp32", "bf16"))
    points = sweep(targets, settings)
    assert points[0] == Point(1, 512, 512, 1, "fp32", "nhwc")
    assert len(set(points)) == len(points) == 8
    assert sweep(targets[:1], QUICK) == [Point(1, 224, 224)]


def test_threads_are_those_of_the_main_point_and_then_as_before() -> None:
    before = torch.get_num_threads()
    settings = replace(QUICK, threads=(before + 1, before + 2))
    found = profile_module(small(), (torch.zeros(1, 3, 8, 8),), settings=settings)
    assert found.machine["threads"] == before + 1
    assert torch.get_num_threads() == before


def test_an_architecture_has_random_weights_and_no_accuracy() -> None:
    found = profile_targets(
        [find_target("ese_vovnet19b_slim_dw")], replace(QUICK, image_sizes=((32, 32),))
    )
    (model,) = found.models
    assert model.accuracy is None
    assert model.results[0].timings is not None
    assert model.results[0].counts is not None
    assert model.results[0].counts.parameters == 1_897_752


def test_a_file_in_eight_bits_has_its_own_figure(tmp_path: Path) -> None:
    told = {
        "weights_sha256": "0" * 64,
        "vovnet_version": "0",
        "precision": "int8",
        "raw": False,
        "inputs": ["images"],
        "int8": {
            "metric": "box_ap",
            "accuracy": 0.25,
            "float_accuracy": 0.26,
            "split": "val",
            "pictures": 7,
            "calibration_pictures": 5,
            "float_layers": [],
        },
    }
    config = ModelConfig(
        architecture="vovdet_n",
        model_args={"num_classes": 1},
        task="detect",
        class_names=["cell"],
        category_ids=[1],
        preprocess={},
        licence="CC0-1.0",
        metrics={"val": {"box": {"ap": 0.26}}},
    )
    entries = {CONFIG_KEY: config.model_dump_json(), EXPORT_KEY: json.dumps(told)}
    lines = [f'<{key} value="{html.escape(text)}" />' for key, text in entries.items()]
    path = tmp_path / "int8.xml"
    path.write_text("\n".join(['<?xml version="1.0"?>', "<net>", *lines, "</net>"]))
    accuracy = known_accuracy(find_target(str(path)))
    assert accuracy is not None
    assert (accuracy.value, accuracy.metric) == (0.25, "box AP")
    assert accuracy.data == "7 pictures of val, in eight bits"
    # So has the folder that it lies in, where an engine runs it.
    beside = tmp_path / "model" / "openvino" / "model.xml"
    beside.parent.mkdir(parents=True)
    beside.write_text(path.read_text())
    (tmp_path / "model" / "config.json").write_text(config.model_dump_json())
    target = find_target(str(tmp_path / "model"))
    assert known_accuracy(target, "openvino") == accuracy
    by_torch = known_accuracy(target, "torch")
    assert by_torch is not None
    assert by_torch.value == 0.26


def test_published_weights_by_their_name_have_timms_figure() -> None:
    target = find_target("ese_vovnet19b_dw.ra_in1k")
    accuracy = known_accuracy(target)
    assert (target.kind, target.task) == ("architecture", "classify")
    assert accuracy is not None
    assert (accuracy.value, accuracy.metric) == (pytest.approx(0.76828), "top-1")
    assert "timm's figure" in accuracy.data
    assert known_accuracy(find_target("ese_vovnet19b_dw")) is None
    meta = load_module(target, device=torch.device("meta"))
    assert sum(one.numel() for one in meta.parameters()) == 6_543_080


def test_a_folder_runs_on_its_engine_with_stages(model_folder: Path) -> None:
    target = find_target(str(model_folder))
    settings = replace(
        QUICK, image_sizes=((64, 64),), end_to_end=True, cold_starts=0, roofline=True
    )
    found = profile_targets([target], settings)
    (model,) = found.models
    assert (model.kind, model.task, model.results[0].engine) == ("folder", "segment", "torch")
    assert list(model.stages) == [
        "decode", "preprocess", "network", "postprocess", "all stages",
    ]  # fmt: skip
    assert model.layers[0].name == "fcos.backbone.stem.0.conv"
    assert any("depends on what is found" in note for note in model.notes)


def test_stages_are_timed_by_the_clock(model_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(path)
    ticks = iter(range(1000))
    found = time_stages(
        Predictor.load(model_folder, device="cpu"),
        path,
        rounds=2,
        warm_up=1,
        clock=lambda: float(next(ticks)),
    )
    assert {name: times.median_ms for name, times in found.items()} == {
        "decode": 1000,
        "preprocess": 1000,
        "network": 1000,
        "postprocess": 1000,
        "all stages": 4000,
    }
    assert found["decode"].count == 2
    with pytest.raises(ImageError):
        time_stages(Predictor.load(model_folder, device="cpu"), tmp_path / "none.png")


def test_a_fresh_process_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"said: .*expected a model folder"):
        time_cold_start(
            Predictor,
            tmp_path,
            tmp_path / "none.png",
            engine="torch",
            precision="fp32",
            device="cpu",
            threads=1,
            runs=1,
        )


def test_engines_are_compared_in_one_run(exported_classifier_folder: Path) -> None:
    engines = ("torch", "openvino", "onnxruntime")
    targets = on_engines([find_target(str(exported_classifier_folder))], engines)
    settings = replace(
        QUICK, image_sizes=((64, 64),), precisions=("auto",), end_to_end=True, cold_starts=1
    )
    found = profile_targets(targets, settings)
    name = exported_classifier_folder.name
    assert [model.name for model in found.models] == [f"{name} ({engine})" for engine in engines]
    assert [model.results[0].engine for model in found.models] == list(engines)
    assert [ratio.name for ratio in found.ratios] == [f"{name} ({one})" for one in engines[1:]]
    peaks = [model.peak_memory_bytes for model in found.models]
    if sys.platform == "linux":  # torch is not loaded where another engine runs
        assert peaks[0] > max(peaks[1:]) > 30e6
    assert all(model.cold_start.count == 1 for model in found.models)
    alone = on_engines([find_target("ese_vovnet19b_slim_dw")], ("auto", "torch"))
    assert all(len(list(load_module(one).parameters())) > 9 for one in alone)
    with pytest.raises(ConfigError, match="engine: expected torch for what is not trained"):
        check_engine(alone[0], "openvino", "cpu")
    with pytest.raises(ConfigError, match="engine: expected different engines, got torch, torch"):
        on_engines(targets, ("torch", "torch"))


def test_two_models_need_two_names() -> None:
    inputs = (torch.zeros(1, 3, 8, 8),)
    target = module_target("a", small(), inputs)
    with pytest.raises(ConfigError, match="expected different models, got a, a"):
        profile_targets([target, target], QUICK)
    with pytest.raises(ConfigError, match="a batch of at least 1"):
        module_target("a", small(), ())
    one, two = Target("m", "folder", "", Path("x/m")), Target("m", "folder", "", Path("y/m"))
    assert [target.name for target in distinct([one, two])] == ["x/m", "y/m"]
    with pytest.raises(ConfigError, match="expected different models"):
        distinct([one, one])


@pytest.mark.parametrize("field", ["batch_sizes", "threads"])
def test_settings_out_of_range(field: str) -> None:
    with pytest.raises(ConfigError, match=f"{field}: expected whole numbers"):
        replace(QUICK, **{field: (0,)})


@pytest.mark.parametrize(("text", "size"), [("224", (224, 224)), ("480x640", (480, 640))])
def test_image_size(text: str, size: tuple[int, int]) -> None:
    assert parse_image_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "1x2x3", "0", "-3", "99999", "a"])
def test_image_size_that_is_none(text: str) -> None:
    with pytest.raises(ConfigError, match="image size: expected"):
        parse_image_size(text)


def test_a_picture_is_cut_or_repeated_to_the_points_size(tmp_path: Path) -> None:
    pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path)
    found = picture(Point(height=3, width=1), path)
    assert np.array_equal(found, np.concatenate([pixels, pixels])[:3, :1])
    noise = picture(Point(height=8, width=9), None)
    assert noise.shape == (8, 9, 3)
    assert np.array_equal(noise, picture(Point(height=8, width=9), None))


def test_recorded_accuracy_is_of_the_test_split_and_of_masks() -> None:
    config = load_config(find_target("nuclei").path)
    mask = config.metrics["test"]["mask"]
    low, high = mask["ap_interval"]
    found = recorded_accuracy(config)
    assert found is not None
    assert found.format() == f"mask AP {mask['ap']:.3f} ({low:.3f} to {high:.3f}) on nuclei test"


def test_recorded_accuracy_where_there_is_none(model_folder: Path) -> None:
    config = load_config(model_folder)
    assert recorded_accuracy(config) is None
    boxes = config.model_copy(update={"metrics": {"val": {"mask": {"ap": None}, "box": {"ap": 1}}}})
    found = recorded_accuracy(boxes)
    assert found is not None
    assert (found.metric, found.value, found.data) == ("box AP", 1, "unnamed data val")


@pytest.mark.parametrize("text", ["no-such-model", "none.onnx", "."])
def test_a_target_that_is_none(text: str) -> None:
    with pytest.raises(ConfigError, match="expected"):
        find_target(text)
