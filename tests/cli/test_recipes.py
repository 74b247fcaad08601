"""`vovnet recipes`: the list, one recipe in full, and no wait for torch."""

import json
import subprocess
import sys

import pytest
import yaml

from vovnet.cli import main as command_line
from vovnet.training.config import TrainConfig, find_recipe, list_recipes, parse_config
from vovnet.training.recipe import command, one_gpu_command


def run(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["vovnet", "recipes", *arguments])
    with pytest.raises(SystemExit) as caught:
        command_line.main()
    return caught.value.code or 0


def as_saved(config: TrainConfig) -> dict[str, object]:
    """Its settings, with lists where Python has tuples."""
    return config.model_dump(mode="json")


def test_the_list_names_all_and_cuts_nothing(monkeypatch, capsys) -> None:
    assert run(monkeypatch) == 0
    text = capsys.readouterr().out
    assert "…" not in text
    rows = {line.split()[0]: line for line in text.splitlines() if line}
    assert {recipe.name for recipe in list_recipes()} <= rows.keys()
    row = rows["mask_rcnn_ese_vovnet39_3x"]
    for part in ("COCO 2017", "270,000 steps of 16 images", "box AP 43.8, mask AP 39.3"):
        assert part in row


def test_a_name_shows_all_of_it(monkeypatch, capsys) -> None:
    assert run(monkeypatch, "centermask_ese_vovnet39_dcn_3x") == 0
    text = capsys.readouterr().out
    recipe = find_recipe("centermask_ese_vovnet39_dcn_3x")
    for part in (command(recipe), one_gpu_command(recipe), *recipe.notes, "box AP 45.1"):
        assert part in text
    settings = yaml.safe_load(text[text.index("\nmodel: ") :])
    assert as_saved(parse_config(settings, where="here")) == as_saved(recipe.config)
    assert run(monkeypatch, "nuclei") == 0
    assert "torchrun" not in capsys.readouterr().out


def test_what_is_to_be_put_in_is_said_and_nothing_is_empty(monkeypatch, capsys) -> None:
    assert run(monkeypatch, "finetune") == 0
    text = capsys.readouterr().out
    assert "command       vovnet train --recipe finetune --data DIR --pretrained\n" in text
    assert "put in        DIR: your data set\n" in text
    assert "\n\n\n" not in text
    assert run(monkeypatch, "centermask_ese_vovnet39_3x") == 0
    text = capsys.readouterr().out
    assert "--data DIR --backbone-weights FILE" in text
    assert "put in        DIR: your data set; FILE: ImageNet weights of its backbone\n" in text


def test_json_says_the_same(monkeypatch, capsys) -> None:
    assert run(monkeypatch, "*faster_rcnn*", "--json") == 0
    listed = json.loads(capsys.readouterr().out)["recipes"]
    assert [one["name"] for one in listed] == [
        recipe.name for recipe in list_recipes() if "faster_rcnn" in recipe.name
    ]
    for one in listed:
        recipe = find_recipe(one["name"])
        assert one["expected_percent"] == recipe.expected
        assert one["command"] == command(recipe)
        assert as_saved(parse_config(one["config"], where="here")) == as_saved(recipe.config)


def test_a_pattern_without_a_match_is_refused(monkeypatch, capsys) -> None:
    assert run(monkeypatch, "yolo*") == 2
    assert "expected a pattern that some name matches, got 'yolo*'" in capsys.readouterr().err


def test_nothing_waits_for_torch() -> None:
    program = (
        "import sys; from vovnet.cli.recipes import recipes; recipes('*', False); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True).returncode == 0
