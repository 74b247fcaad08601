"""The commands of recipes, and the linear rule."""

import shlex

import pytest
from typer.testing import CliRunner

from vovnet.cli import main as command_line
from vovnet.cli.settings import parse_settings
from vovnet.published import PUBLISHED
from vovnet.training.config import TrainConfig, find_recipe, list_recipes, load_config
from vovnet.training.recipe import (
    command,
    free_weights_note,
    one_gpu_command,
    one_gpu_settings,
)

TRAIN = "vovnet train --recipe {} --data DIR"


@pytest.mark.parametrize(
    ("name", "processes", "scaled"),
    [
        ("faster_rcnn_ese_vovnet39_3x", 8, {"batch_size": 2, "learning_rate": 0.0025,
                                            "max_steps": 2_160_000, "warmup_steps": 8000}),
        ("centermask_lite_ese_vovnet39_4x", 8, {"batch_size": 2, "learning_rate": 0.00125,
                                                "max_steps": 2_880_000, "warmup_steps": 8000}),
        ("dsod300_vovnet27_slim_voc", 8, {"batch_size": 32, "learning_rate": 0.025,
                                          "max_steps": 400_000}),
        ("refinedet512_vovnet39_coco", 4, {}),
        ("paper", 8, {"batch_size": 32, "learning_rate": 0.0125}),
        ("nuclei", 1, {}),
    ],
)  # fmt: skip
def test_commands_for_several_gpus_and_for_one(name, processes, scaled) -> None:
    recipe = find_recipe(name)
    plain = TRAIN.format(name) + (" --backbone-weights FILE" if recipe.needs_weights else "")
    launcher = f"torchrun --nproc-per-node {processes} -m " if processes > 1 else ""
    assert command(recipe) == launcher + plain
    assert one_gpu_settings(recipe) == scaled
    options = {"batch_size": "--batch-size {}", "learning_rate": "--learning-rate {}"}
    texts = [options.get(key, f"--set {key}={{}}").format(value) for key, value in scaled.items()]
    assert one_gpu_command(recipe) == " ".join([plain, *texts])


def settings_of(text: str, monkeypatch) -> TrainConfig:
    """What the training gets from a command as it would be typed."""
    given: list[tuple[object, ...]] = []
    monkeypatch.setattr(command_line, "run_verb", lambda verb, *values: given.append(values))
    program, *arguments = shlex.split(text)
    assert program == "vovnet"
    result = CliRunner().invoke(command_line.app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    recipe, _, flags, settings, *_ = given[0]
    flags = parse_settings(flags, settings)
    return load_config(recipe, None, flags)


def test_the_commands_are_understood_and_keep_to_the_linear_rule(monkeypatch) -> None:
    for recipe in list_recipes():
        start = command(recipe).partition("-m ")[2] or command(recipe)
        whole, one = (
            settings_of(start, monkeypatch),
            settings_of(one_gpu_command(recipe), monkeypatch),
        )
        weights = "hub" if recipe.config.model in PUBLISHED else "FILE"
        weights = weights if recipe.needs_weights else None
        given = {"data": "DIR", "backbone_weights": weights}
        assert whole == recipe.config.model_copy(update=given)
        factor = whole.batch_size / one.batch_size
        assert factor >= 1
        assert one.learning_rate * factor == pytest.approx(whole.learning_rate)
        for name in ("max_steps", "warmup_steps"):
            if getattr(whole, name):
                assert getattr(one, name) == pytest.approx(getattr(whole, name) * factor)
        names = set(one_gpu_settings(recipe))
        assert {
            n for n in TrainConfig.model_fields if getattr(whole, n) != getattr(one, n)
        } <= names


def test_the_rate_falls_at_shares_of_the_length() -> None:
    config = find_recipe("faster_rcnn_ese_vovnet39_3x").config
    assert [drop * 270_000 for drop in config.drops_at] == pytest.approx([210_000, 250_000])
    assert (config.max_steps, config.epochs, config.max_minutes) == (270_000, None, None)


def test_notes_on_free_weights_name_models_that_there_are() -> None:
    fits = free_weights_note("faster_rcnn_lite", "ese_vovnet19_dw_d2")
    assert "ese_vovnet19b_dw.ra_in1k" in fits
    near = free_weights_note("mask_rcnn", "ese_vovnet57_d2")
    assert near.endswith("--model mask_rcnn_ese_vovnet57b --pretrained.")
    deformable = free_weights_note("centermask", "ese_vovnet39_dcn_d2")
    assert "--model centermask_ese_vovnet39b --pretrained --set" in deformable
    assert "--model ese_vovnet99_d2." in free_weights_note("centermask", "ese_vovnet99_dcn_d2")
