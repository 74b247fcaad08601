"""`vovnet models`: the table is what counting gives."""

import json
import sys

import pytest
import torch

from vovnet.cli import main as command_line
from vovnet.cli.models import COSTS, DETECTOR_PARTS, SIZED_PARTS, count_parameters, describe
from vovnet.models.vovnet import VARIANTS
from vovnet.models.weights import PUBLISHED
from vovnet.models.zoo import DETECTORS, SIZED, create_model, list_models
from vovnet.profiling import count


def run(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["vovnet", "models", *arguments])
    with pytest.raises(SystemExit) as caught:
        command_line.main()
    return caught.value.code or 0


def test_every_model_has_its_costs() -> None:
    assert COSTS.keys() == VARIANTS.keys()
    assert DETECTOR_PARTS.keys() == DETECTORS.keys()
    assert SIZED_PARTS.keys() == SIZED.keys()
    assert all(count_parameters(name) > 0 for name in list_models())


@pytest.mark.parametrize("name", VARIANTS)
def test_the_costs_are_what_counting_gives(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name)
        images = torch.zeros(1, 3, 224, 224)
    assert COSTS[name] == (count.count_parameters(model), count.count_macs(model, (images,)))


@pytest.mark.parametrize("backbone", ["ese_vovnet39_d2", "ese_vovnet19b_slim_dw", "vovnet27_slim"])
@pytest.mark.parametrize("kind", DETECTORS)
def test_the_parameters_of_detectors_are_what_counting_gives(kind: str, backbone: str) -> None:
    name = f"{kind}_{backbone}"
    with torch.device("meta"):
        model = create_model(name)
    assert count_parameters(name) == count.count_parameters(model)


@pytest.mark.parametrize("name", SIZED)
def test_the_parameters_of_sized_detectors_are_what_counting_gives(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name)
    assert count_parameters(name) == count.count_parameters(model)


def test_json_says_what_there_is(monkeypatch, capsys) -> None:
    assert run(monkeypatch, "*_vovnet39b", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    by_name = {model["name"]: model for model in listed["models"]}
    classifier = by_name["ese_vovnet39b"]
    assert classifier["parameters"] == 24_568_936
    assert classifier["macs"] == 7_074_193_408
    assert classifier["weights"] == "timm/ese_vovnet39b.ra_in1k"
    assert (classifier["licence"], classifier["top1_percent"]) == ("apache-2.0", 79.312)
    detector = by_name["fcos_ese_vovnet39b"]
    assert (detector["macs"], detector["top1_percent"]) == (None, None)
    assert detector["weights"] == classifier["weights"]
    assert describe("ese_vovnet99b")["weights"] is None
    assert "nuclei" in listed["bundled"]


def test_the_list_is_for_people_too(monkeypatch, capsys) -> None:
    assert run(monkeypatch, "ese_vovnet*", "--task", "classify") == 0
    text = capsys.readouterr().out
    row = next(line for line in text.splitlines() if line.startswith("ese_vovnet57b "))
    published = PUBLISHED["ese_vovnet57b"]
    for part in ("38.61", "8.93", "82.46", published.hub_repository, published.licence):
        assert part in row
    assert "publisher's figure" in text
    assert "fcos" not in text.replace("bundled", "").partition("Top-1 on")[0]
    assert run(monkeypatch, "fcos_ese_vovnet57b") == 0
    assert f"{published.hub_repository} (backbone)" in capsys.readouterr().out
    assert run(monkeypatch, "--task", "fly") == 2
    assert "expected one of classify, detect, segment" in capsys.readouterr().err
