"""`vovnet convert` as a user runs it, and what the folders it writes are good for."""

import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.models.golden import golden_value, read
from vovnet.cli import main as command_line
from vovnet.model_folder import load_config
from vovnet.models.weights import read_weights
from vovnet.models.zoo import create_model
from vovnet.training.build import build_model, preprocess_fields
from vovnet.training.config import TrainConfig

DETECTORS = {
    "centermask": "det_centermask_lite_V_19_slim_eSE.json",
    "faster_rcnn": "det_faster_rcnn_V_19_slim_FPNLite.json",
}
COCO_FIRST = ["person", "bicycle", "car"]


def run(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["vovnet", *(str(a) for a in arguments)])
    with pytest.raises(SystemExit) as caught:
        command_line.main()
    return caught.value.code or 0


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The authors' detectors as their training saved them, in float32."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, golden in DETECTORS.items():
        keys = read(golden)["keys"]
        weights = {key: golden_value(key, shape).float() for key, shape in keys.items()}
        torch.save({"model": weights, "iteration": 9}, folder / f"{name}.pth")
    return {name: folder / f"{name}.pth" for name in DETECTORS}


@pytest.mark.parametrize("name", DETECTORS)
def test_a_converted_detector_predicts(
    monkeypatch, capsys, tmp_path: Path, checkpoints: dict[str, Path], name: str
) -> None:
    folder = tmp_path / "model"
    assert run(monkeypatch, "convert", checkpoints[name], "--to", folder, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["output"] == str(folder)
    assert report["licence"].startswith("CC-BY-NC-4.0")
    assert [report[kind] for kind in ("missing", "unexpected", "mis_shaped")] == [[], [], []]
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    config = load_config(folder)
    assert config.architecture.startswith(f"{name}_lite_ese_vovnet19_slim_d2")
    assert config.class_names[:3] == COCO_FIRST
    assert (config.class_names[-1], config.category_ids[-1]) == ("toothbrush", 90)
    assert len(config.class_names) == 80
    card = (folder / "README.md").read_text()
    assert hashlib.sha256(checkpoints[name].read_bytes()).hexdigest() in card
    assert f"{name}.pth" in card
    assert "CC-BY-NC-4.0" in card

    settings = json.loads((folder / "config.json").read_text())
    settings["preprocess"] |= {"short_side": None, "max_long_side": None}
    (folder / "config.json").write_text(json.dumps(settings))
    pixels = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    arguments = ["--source", tmp_path / "image.png", "--output", tmp_path / "out", "--no-save"]
    assert run(monkeypatch, "predict", "--model", folder, *arguments, "--json") == 0
    assert json.loads(capsys.readouterr().out)["objects"] > 0


def test_the_backbone_of_a_detector_starts_a_training(
    monkeypatch, capsys, tmp_path: Path, checkpoints: dict[str, Path]
) -> None:
    folder = tmp_path / "backbone"
    left_out = ["--leave-out", "proposal_generator.*"]
    assert run(monkeypatch, "convert", checkpoints["centermask"], "--to", folder, *left_out) == 0
    text = capsys.readouterr().out
    assert "layout        vovnet-detectron2" in text
    assert "architecture  ese_vovnet19_slim_d2" in text
    assert "BGR pixels became RGB" in text
    assert "not of the backbone" in text
    assert f"written: {folder}" in text
    config = load_config(folder)
    assert (config.task, config.class_names) == ("classify", [])

    backbone = create_model("ese_vovnet19_slim_d2", features_only=True, checkpoint_path=folder)
    training = TrainConfig(
        model="fcos_lite_ese_vovnet19_slim_d2", data="data", backbone_weights=str(folder)
    )
    detector = build_model(training, ("cat", "dog"), notes=[])
    assert backbone.pretrained_cfg["std"] == (1 / 255, 1 / 255, 1 / 255)
    assert backbone.pretrained_cfg["license"].startswith("CC-BY-NC-4.0")
    weight = backbone.stem[0].conv.weight
    assert torch.equal(detector.backbone.stem[0].conv.weight, weight)
    original = golden_value("backbone.bottom_up.stem.stem_1/conv.weight", [64, 3, 3, 3])
    assert torch.equal(weight, original.float().flip(1))
    assert preprocess_fields(training)["std"] == [1.0, 1.0, 1.0]


def test_what_has_no_place_is_named_and_nothing_is_written(
    monkeypatch, capsys, tmp_path: Path, checkpoints: dict[str, Path]
) -> None:
    content = torch.load(checkpoints["faster_rcnn"], weights_only=True)
    content["model"]["roi_heads.keypoint_head.conv.weight"] = torch.zeros(2)
    content["model"].pop("backbone.fpn_output3.bias")
    torch.save(content, tmp_path / "w.pth")
    folder = tmp_path / "model"
    assert run(monkeypatch, "convert", tmp_path / "w.pth", "--to", folder) == 3
    out, err = capsys.readouterr()
    assert "roi_heads.keypoint_head.conv.weight" in out
    assert "neck.output.1.bias" in out
    assert "1 unexpected, 1 missing; nothing was written" in err
    assert not folder.exists()
    arguments = ["--leave-out", "roi_heads.keypoint*", "--json"]
    assert run(monkeypatch, "convert", tmp_path / "w.pth", "--to", folder, *arguments) == 3
    report = json.loads(capsys.readouterr().out)
    assert report["left_out"] == ["roi_heads.keypoint_head.conv.weight"]
    assert (report["missing"], report["output"]) == (["neck.output.1.bias"], None)
    assert not folder.exists()


def test_a_classifier_of_timm_keeps_its_classes_and_its_pixels(
    monkeypatch, capsys, tmp_path: Path
) -> None:
    with torch.device("meta"):
        own = create_model("ese_vovnet57b").state_dict()
    state = {name: torch.full(value.shape, 0.3).bfloat16() for name, value in own.items()}
    save_file(state, tmp_path / "w.safetensors")
    folder = tmp_path / "model"
    assert run(monkeypatch, "convert", tmp_path / "w.safetensors", "--to", folder) == 0
    config = load_config(folder)
    assert (config.architecture, config.task) == ("ese_vovnet57b", "classify")
    assert config.class_names[0] == "tench"
    assert config.preprocess["std"] == [127.5, 127.5, 127.5]
    assert config.licence.startswith("not in the file")
    assert torch.equal(read_weights(folder)["head.fc.weight"], state["head.fc.weight"].float())


def test_wrong_arguments(monkeypatch, capsys, tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "precious").write_text("")
    source = checkpoints["centermask"]
    (tmp_path / "broken.pth").write_bytes(b"PK\x03\x04")
    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    for arguments, code, message in [
        ([source, "--to", full], 2, "expected a new or an empty folder"),
        ([tmp_path, "--to", tmp_path / "new"], 2, "found the folder"),
        ([tmp_path / "no.pth", "--to", tmp_path / "new"], 2, "found neither at"),
        ([tmp_path / "broken.pth", "--to", tmp_path / "new"], 2, "cannot be read"),
        (
            [tmp_path / "other.safetensors", "--to", tmp_path / "new"],
            3,
            "other.safetensors: expected the tensor names of",
        ),
        ([source, "--to", tmp_path / "new", "--leave-out", "nothing*"], 3, "is of none"),
    ]:
        assert run(monkeypatch, "convert", *arguments) == code
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error
    assert not (tmp_path / "new").exists()
    assert [path.name for path in full.iterdir()] == ["precious"]


@pytest.mark.parametrize("shape", [(10**18, 0), (100_001, 0)])
def test_a_head_of_too_many_classes_is_refused(monkeypatch, capsys, tmp_path, shape) -> None:
    with torch.device("meta"):
        own = create_model("ese_vovnet19b_slim_dw").state_dict()
    state = {name: torch.ones(value.shape) for name, value in own.items()}
    torch.save(state | {"head.fc.weight": torch.ones(shape)}, tmp_path / "w.pth")
    assert run(monkeypatch, "convert", tmp_path / "w.pth", "--to", tmp_path / "model") == 2
    assert "w.pth: model settings: num_classes: expected" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "shown"),
    [(b"a`b.pth", "a\\u0060b.pth"), (b"a\n#b.pth", "a\\u000a#b.pth"), (b"\xff.pth", "\\udcff.pth")],
)
def test_any_file_name_is_told_in_plain_text(monkeypatch, tmp_path, name: bytes, shown) -> None:
    path = tmp_path / os.fsdecode(name)
    with torch.device("meta"):
        own = create_model("ese_vovnet19b_slim_dw").state_dict()
    torch.save({key: torch.ones(value.shape) for key, value in own.items()}, path)
    assert run(monkeypatch, "convert", path, "--to", tmp_path / "model") == 0
    assert load_config(tmp_path / "model").training["converted_from"] == shown
    assert f"from `{shown}`\n" in (tmp_path / "model" / "README.md").read_text()


def test_a_target_that_is_no_folder(monkeypatch, capsys, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for name, found in [("file", "found the file"), ("link", "found a link to nothing")]:
        assert run(monkeypatch, "convert", tmp_path / "w.pth", "--to", tmp_path / name) == 2
        assert found in capsys.readouterr().err
