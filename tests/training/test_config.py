from pathlib import Path

import pytest

from vovnet.errors import ConfigError
from vovnet.training.config import (
    Recipe,
    TrainConfig,
    config_to_yaml,
    list_recipes,
    load_config,
    resume_config,
)


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def test_defaults_are_complete():
    config = load_config(None, None, {"data": "somewhere"})
    assert (config.epochs, config.max_minutes) == (50.0, None)
    assert (config.eval_every_epochs, config.eval_every_minutes) == (1, None)
    assert all(field.description for field in TrainConfig.model_fields.values())


def test_flags_go_over_yaml(tmp_path):
    path = write(tmp_path, "data: a\nbatch_size: 2\nlearning_rate: 1e-3\n")
    config = load_config(None, path, {"batch_size": 4})
    assert (config.data, config.batch_size, config.learning_rate) == ("a", 4, 1e-3)


def test_none_is_set_where_a_setting_may_be_none(tmp_path):
    lower = "data: a\nclip_norm: 2.0\nmax_steps: 7\naugment:\n"
    flags = {"clip_norm": None, "max_steps": None, "augment": {"hue": 0.1}}
    config = load_config(None, write(tmp_path, lower), flags)
    assert (config.clip_norm, config.max_steps, config.epochs) == (None, None, 50.0)
    assert config.augment == {"hue": 0.1}
    with pytest.raises(ConfigError, match="batch_size: expected a valid integer, found None"):
        load_config(None, None, {"data": "a", "batch_size": None})


def test_nested_settings_merge_key_by_key(tmp_path):
    path = write(tmp_path, "data: a\npreprocess: {scale: 1.5, size_divisor: 64}\n")
    config = load_config(None, path, {"preprocess": {"scale": 2.0}})
    assert config.preprocess == {"scale": 2.0, "size_divisor": 64}


def test_yaml_goes_over_recipe(tmp_path, monkeypatch):
    settings = TrainConfig(batch_size=3, max_minutes=7.0, augment={"hue": 0.1})
    recipe = Recipe(name="mine", config=settings, data="", source="")
    monkeypatch.setattr("vovnet.training.config.list_recipes", lambda: [recipe])
    config = load_config("mine", write(tmp_path, "batch_size: 5\n"), {"data": "a"})
    assert (config.batch_size, config.max_minutes, config.epochs) == (5, 7.0, None)
    assert config.augment == {"hue": 0.1}


@pytest.mark.parametrize(
    ("lower", "flags", "expected"),
    [
        ("max_minutes: 5", {"epochs": 3.0}, (3.0, None, None)),
        ("epochs: 3", {"max_minutes": 5.0}, (None, 5.0, None)),
        ("epochs: 3", {"max_steps": 7}, (None, None, 7)),
        ("max_steps: 7", {"max_minutes": 5.0}, (None, 5.0, None)),
        ("max_steps: 7", {}, (None, None, 7)),
        ("epochs: 3", {}, (3.0, None, None)),
    ],
)
def test_a_higher_layer_chooses_the_kind_of_limit(tmp_path, lower, flags, expected):
    config = load_config(None, write(tmp_path, f"data: a\n{lower}\n"), flags)
    assert (config.epochs, config.max_minutes, config.max_steps) == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"epochs": 3, "max_minutes": 5}, "expected one of epochs and max_minutes, found both"),
        ({"max_steps": 3, "max_minutes": 5}, "one of max_minutes and max_steps, found both"),
        (
            {"epochs": 3, "max_minutes": 5, "max_steps": 3},
            "expected one of epochs and max_minutes and max_steps, found all",
        ),
        ({"max_steps": 0}, "max_steps: expected greater than or equal to 1, found 0"),
        ({"warmup_steps": 3, "warmup_fraction": 0.1}, "warmup_fraction and warmup_steps"),
        ({"batch_siez": 3}, "command line: .*'batch_siez'; did you mean 'batch_size'"),
        ({"qqqqq": 3}, "'qqqqq'; known: task, model, "),
        ({"batch_size": 0}, "batch_size: expected greater than or equal to 1, found 0"),
        ({"optimizer": "lion"}, "optimizer: expected 'sgd' or 'adamw', found 'lion'"),
        ({"learning_rate": "fast"}, "learning_rate: expected .*number.*found 'fast'"),
        ({"data": None}, "data: expected the folder"),
    ],
)
def test_wrong_settings_say_expected_and_found(flags, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, None, {"data": "a"} | flags)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "expected a YAML mapping"),
        ("- 1\n- 2\n", "found list"),
        ("1: 2\n", "expected a mapping of setting names"),
        ("x: !!python/object/apply:os.system ['true']\n", "python/object"),
        ("a: &a [1]\nb: *a\n", "alias"),
        ("learning_rte: 1\n", r"config\.yaml: .*did you mean 'learning_rate'"),
        ("[" * 5_000, "config.yaml: expected"),
        ("#" * 1_000_001, "at most 1000000 bytes"),
    ],
)
def test_bad_yaml_is_refused(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, write(tmp_path, text), {"data": "a"})


def test_missing_yaml_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing\.yaml: .*No such file"):
        load_config(None, tmp_path / "nothing.yaml", {"data": "a"})


def test_unknown_recipe_is_named():
    with pytest.raises(ConfigError, match=r"recipe: expected .* found 'os\.path'"):
        load_config("os.path", None, {"data": "a"})
    with pytest.raises(ConfigError, match=r"found 'nucelei'; did you mean 'nuclei'\?"):
        load_config("nucelei", None, {"data": "a"})


@pytest.mark.parametrize("recipe", list_recipes(), ids=lambda recipe: recipe.name)
def test_recipes_load(recipe):
    flags = {"data": "a", "backbone_weights": "b"}
    assert load_config(recipe.name, None, flags) == recipe.config.model_copy(update=flags)
    if recipe.needs_weights:
        with pytest.raises(ConfigError, match=f"recipe {recipe.name}: expected ImageNet weights"):
            load_config(recipe.name, None, {"data": "a"})
        assert load_config(recipe.name, None, {"data": "a", "init": "c"}).init == "c"
    else:
        assert load_config(recipe.name, None, {"data": "a"}).backbone_weights is None


def test_saved_settings_read_back(tmp_path):
    flags = {"data": "a", "augment": {"output_size": [64, 64]}, "max_minutes": 2.5}
    config = load_config(None, None, flags)
    write(tmp_path, config_to_yaml(config))
    assert resume_config(tmp_path, {}) == config
    (tmp_path / "last.pt").touch()
    assert resume_config(tmp_path / "last.pt", {"workers": 0}).workers == 0
