"""Weights from the hub's cache, from files and folders; hostile ones are refused unread."""

import hashlib
import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import save, save_file

from tests.models.golden import BACKBONES, golden_value
from vovnet.errors import ConfigError
from vovnet.models import weights
from vovnet.models.vovnet import VoVNet
from vovnet.models.weights import (
    MAX_WEIGHTS_BYTES,
    PUBLISHED,
    fetch_published,
    load_backbone,
    load_checkpoint,
    load_tensors,
    pretrained_cfg,
    read_backbone,
    read_weights,
)
from vovnet.models.zoo import create_model

SMALL = "ese_vovnet19b_slim_dw"
NARROW = {
    "stem_channels": [8, 8, 8],
    "stage_conv_channels": [8, 8, 8, 8],
    "stage_out_channels": [8, 8, 8, 8],
}
KEYS = {case["name"]: case["keys"] for case in BACKBONES}


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """A small classifier's weights."""
    torch.manual_seed(0)
    return create_model(SMALL, num_classes=3).state_dict()


# The hub's cache


@pytest.fixture
def cache(monkeypatch, tmp_path: Path) -> Path:
    """An empty hub cache without a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def put_in_cache(cache: Path, content: bytes, *, complete: bool = True) -> Path:
    """A file of ese_vovnet19b_dw as huggingface_hub stores it: a link to one named by sha256."""
    repository = PUBLISHED["ese_vovnet19b_dw"].hub_repository.replace("/", "--")
    folder = cache / f"models--{repository}"
    sha256 = hashlib.sha256(content).hexdigest()
    blob = folder / "blobs" / (sha256 if complete else f"{sha256}.incomplete")
    link = folder / "snapshots" / "0123456789abcdef" / "model.safetensors"
    for path in (blob, link, folder / "refs" / "main"):
        path.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(content)
    if complete:
        link.symlink_to(blob)
    (folder / "refs" / "main").write_text("0123456789abcdef")
    return blob


def test_published_weights_come_from_the_cache_once_their_sum_is_right(cache: Path) -> None:
    blob = put_in_cache(cache, save({"x": torch.arange(4.0)}))
    assert fetch_published("ese_vovnet19b_dw")["x"].tolist() == [0, 1, 2, 3]
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    with pytest.raises(ConfigError, match=f"expected sha256 {blob.name}, found .* damaged"):
        fetch_published("ese_vovnet19b_dw")


def test_a_known_sum_is_checked_where_the_cache_has_none(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"content")
    weights.check_sha256(path, None)
    weights.check_sha256(path, hashlib.sha256(b"content").hexdigest())
    with pytest.raises(ConfigError, match="expected sha256 0000"):
        weights.check_sha256(path, "0" * 64)


def test_half_a_download_is_no_file_and_the_message_says_where_it_belongs(cache: Path) -> None:
    put_in_cache(cache, save({"x": torch.ones(1)}), complete=False)
    with pytest.raises(ConfigError) as caught:
        fetch_published("ese_vovnet19b_dw")
    folder = cache / "models--timm--ese_vovnet19b_dw.ra_in1k"
    assert f"copy the folder {folder}" in str(caught.value)
    assert "model.safetensors of hub repository timm/ese_vovnet19b_dw.ra_in1k" in str(caught.value)


@pytest.mark.parametrize(
    ("is_offline", "is_reachable", "status", "reason"),
    [
        (True, True, 404, "HF_HUB_OFFLINE keeps it from being fetched"),
        (False, False, 404, "there is no network: hub.test has no address"),
        (False, True, 404, "the hub refused it with status 404"),
        (False, True, None, "fetching it failed (TimeoutError); a later try may do"),
    ],
)
def test_what_keeps_weights_away_is_told_alone(
    monkeypatch, tmp_path: Path, is_offline, is_reachable, status, reason: str
) -> None:
    response = SimpleNamespace(status_code=status, headers={}, request=None)
    refused = HfHubHTTPError("no", response=response)  # type: ignore[arg-type]

    def fetch(*arguments: object, **options: object) -> str:
        raise TimeoutError if status is None else refused

    monkeypatch.setattr(weights, "hf_hub_download", fetch)
    monkeypatch.setattr(weights, "_hub_is_reachable", lambda: is_reachable)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", is_offline)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://hub.test")
    with pytest.raises(ConfigError) as caught:
        fetch_published("ese_vovnet39b")
    assert f"is not cached, and {reason}; copy the folder" in str(caught.value)


def test_published_weights_fit_other_images_and_other_classes(monkeypatch, state) -> None:
    published = create_model("ese_vovnet19b_dw").state_dict()
    monkeypatch.setattr(weights, "fetch_published", lambda name: dict(published))
    whole = create_model("ese_vovnet19b_dw", pretrained=True)
    assert torch.equal(whole.head.fc.weight, published["head.fc.weight"])
    grey = create_model("ese_vovnet19b_dw", pretrained=True, num_classes=4, in_chans=1)
    first = published["stem.0.conv.weight"]
    torch.testing.assert_close(grey.stem[0].conv.weight, first.sum(1, keepdim=True))
    assert grey.head.fc.weight.shape == (4, 1024)
    name = "stages.1.blocks.0.conv_concat.conv.weight"
    assert torch.equal(grey.state_dict()[name], published[name])


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_preprocess_is_timms(name: str) -> None:
    timm = pytest.importorskip("timm", reason="timm is the oracle of this test (extra `dev`)")
    theirs = timm.get_pretrained_cfg(name).to_dict()
    ours = pretrained_cfg(name)
    assert ours == {key: theirs[key] for key in ours}
    assert {"input_size", "test_input_size", "mean", "license", "hf_hub_id"} <= ours.keys()


def test_every_backbone_says_how_its_images_are_prepared() -> None:
    with torch.device("meta"):
        classifier = create_model("ese_vovnet57b")
        detector = create_model("fcos_ese_vovnet39b")
        untrained = create_model("vovnet39a", features_only=True)
    assert classifier.pretrained_cfg["input_size"] == (3, 256, 256)
    assert classifier.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)
    assert detector.backbone.pretrained_cfg["hf_hub_id"] == "timm/ese_vovnet39b.ra_in1k"
    assert untrained.pretrained_cfg["tag"] == "untrained"


# Files and folders


@pytest.mark.parametrize("wrapper", [*weights.WRAPPERS, None])
def test_wrappers_and_the_prefix_of_data_parallel(tmp_path: Path, state, wrapper) -> None:
    content = {f"module.{key}": value for key, value in state.items()}
    if wrapper is not None:
        content = {wrapper: content, "epoch": 3}
    torch.save(content, tmp_path / "w.pth")
    assert read_weights(tmp_path / "w.pth").keys() == state.keys()


def test_averaged_weights_go_before_the_last_ones(tmp_path: Path) -> None:
    both = {"state_dict": {"x": torch.zeros(1)}, "state_dict_ema": {"x": torch.ones(1)}}
    torch.save(both, tmp_path / "w.pth")
    assert read_weights(tmp_path / "w.pth")["x"].item() == 1


@pytest.mark.parametrize("prefix", ["", "img_backbone.", "backbone.bottom_up.", "model.encoder."])
def test_a_backbone_takes_its_part_of_a_larger_network(tmp_path: Path, state, prefix: str) -> None:
    content = {prefix + key: value for key, value in state.items() if prefix or "head" not in key}
    if prefix:
        content |= {"neck.conv.weight": torch.ones(2), "bbox_head.fc.bias": torch.ones(2)}
    save_file(content, tmp_path / "w.safetensors")
    path = tmp_path / "w.safetensors"
    model = create_model(SMALL, features_only=True, in_chans=1, checkpoint_path=path)
    key = "stages.3.blocks.0.attn.fc.weight"
    assert torch.equal(model.state_dict()[key], state[key])
    untouched = create_model(SMALL, num_classes=9, checkpoint_path=path) if not prefix else None
    assert untouched is None or untouched.head.fc.weight.shape == (9, 512)


def test_released_weights_load_with_their_licence_and_their_pixels(tmp_path: Path) -> None:
    tensors = {k: golden_value(k, s).float() for k, s in KEYS["V-19-slim-eSE"].items()}
    torch.save(
        {"model": {f"backbone.bottom_up.{k}": v for k, v in tensors.items()}}, tmp_path / "w.pth"
    )
    with pytest.warns(UserWarning, match="CC-BY-NC-4.0"):
        model = create_model(
            "ese_vovnet19_slim_d2",
            features_only=True,
            checkpoint_path=tmp_path / "w.pth",
            overrides={"norm": "frozen_bn"},
        )
    first = tensors["stem.stem_1/conv.weight"]
    assert torch.equal(model.stem[0].conv.weight, first.flip(1))  # BGR became RGB
    assert model.pretrained_cfg["std"] == (1 / 255, 1 / 255, 1 / 255)
    assert model.pretrained_cfg["license"].startswith("CC-BY-NC-4.0")
    with (
        pytest.warns(UserWarning, match="CC-BY-NC-4.0"),
        pytest.raises(ConfigError, match="do not fit"),  # it is a backbone alone
    ):
        create_model("fcos_ese_vovnet19_slim_d2", checkpoint_path=tmp_path / "w.pth")
    with pytest.raises(ConfigError, match=r"vovnet convert .*w\.pth --to FOLDER"):
        read_backbone(tmp_path / "w.pth", name="ese_vovnet19_slim_d2")


def test_the_released_v1_is_not_timms(tmp_path: Path) -> None:
    torch.save({k: torch.zeros(shape) for k, shape in KEYS["vovnet39"].items()}, tmp_path / "w.pth")
    with pytest.raises(ConfigError, match="blocks add their input"):
        create_model("vovnet39a", checkpoint_path=tmp_path / "w.pth")
    with pytest.warns(UserWarning, match="no licence file"):
        create_model("vovnet39", checkpoint_path=tmp_path / "w.pth")


def test_a_deformable_network_starts_from_the_plain_one(tmp_path: Path) -> None:
    plain = create_model("ese_vovnet39_d2", num_classes=0, overrides=NARROW)
    save_file(plain.state_dict(), tmp_path / "plain.safetensors")
    deformable = create_model("ese_vovnet39_dcn_d2", num_classes=0, overrides=NARROW)
    offsets = {k: v.clone() for k, v in deformable.state_dict().items() if ".conv_offset." in k}
    assert offsets
    tensors = read_backbone(tmp_path / "plain.safetensors", name="ese_vovnet39_dcn_d2")
    load_backbone(deformable, tensors, where="plain")
    own = deformable.state_dict()
    assert all(torch.equal(own[name], value) for name, value in plain.state_dict().items())
    assert all(not value.any() for value in offsets.values())
    # Half of the offsets are no plain network.
    some = dict(own)
    del some[next(iter(offsets))]
    with pytest.raises(ConfigError, match=r"1 missing: .*conv_offset"):
        load_backbone(deformable, some, where="half")


@pytest.mark.parametrize("other", ["ese_vovnet39_d2", "mask_rcnn_ese_vovnet39_d2"])
def test_its_folder_may_be_the_plain_ones(monkeypatch, tmp_path: Path, other: str) -> None:
    config = SimpleNamespace(architecture=other)
    monkeypatch.setattr(weights, "load_config", lambda folder: config)
    assert weights._check_folder(tmp_path, "ese_vovnet39_dcn_d2") is config
    with pytest.raises(ConfigError, match=f"expected the weights of ese_vovnet39b, .* {other}"):
        weights._check_folder(tmp_path, "ese_vovnet39b")


def test_a_model_folder_is_read_and_its_name_compared(model_folder: Path) -> None:
    name = "ese_vovnet19b_slim_dw"
    backbone = create_model(name, features_only=True, checkpoint_path=model_folder)
    stored = read_weights(model_folder)
    key = "stages.3.blocks.0.attn.fc.weight"
    assert torch.equal(backbone.state_dict()[key], stored[f"fcos.backbone.{key}"])
    assert read_backbone(model_folder, name=name)[key].shape == stored[f"fcos.backbone.{key}"].shape
    with pytest.raises(ConfigError, match="expected the weights of ese_vovnet39b, found those of"):
        create_model("ese_vovnet39b", checkpoint_path=model_folder)


def test_counters_of_batch_norm_do_not_matter_but_all_else_does(state) -> None:
    without = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    model = create_model(SMALL, num_classes=3)
    load_tensors(model, without, where="test")
    frozen = create_model(SMALL, num_classes=3, overrides={"norm": "frozen_bn"})
    load_tensors(frozen, state, where="test")
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images), frozen.eval()(images))
    with pytest.raises(ConfigError, match=r"1 missing: stem\.0\.bn\.running_var"):
        load_tensors(
            model, {k: v for k, v in state.items() if k != "stem.0.bn.running_var"}, where=""
        )


# Hostile files


class Trap:
    """A pickle that creates a file when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (open, (str(self.path), "w"))


def header_only(length: int, header: bytes) -> bytes:
    return struct.pack("<Q", length) + header


def with_header(header: dict, body: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def compressed(content: bytes) -> bytes:
    """A torch archive, whose parts are stored as they are, with compressed parts."""
    stream = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as stored,
        zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for name in stored.namelist():
            archive.writestr(name, stored.read(name))
    return stream.getvalue()


def torch_bytes(content: object, *, legacy: bool = False) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=not legacy)
    return stream.getvalue()


F32 = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
HOSTILE: dict[str, Callable[[Path], bytes]] = {
    "code.pth": lambda trap: pickle.dumps(Trap(trap)),
    "code_in_archive.pth": lambda trap: torch_bytes({"x": Trap(trap)}),
    "code_legacy.pth": lambda trap: torch_bytes({"x": Trap(trap)}, legacy=True),
    "code_named.safetensors": lambda trap: torch_bytes({"x": Trap(trap)}),
    "safetensors_named.pth": lambda trap: save({"x": torch.ones(2)}),
    "empty.pth": lambda trap: b"",
    "empty.safetensors": lambda trap: b"",
    "list.pth": lambda trap: torch_bytes([torch.ones(1)]),
    "text.pth": lambda trap: torch_bytes({"x": "text"}),
    "number_as_name.pth": lambda trap: torch_bytes({3: torch.ones(1)}),
    "truncated.pth": lambda trap: torch_bytes({"x": torch.ones(999)})[:-700],
    "truncated_legacy.pth": lambda trap: torch_bytes({"x": torch.ones(999)}, legacy=True)[:-700],
    "bomb.pth": lambda trap: compressed(torch_bytes({"x": torch.zeros(2**22)})),
    "no_archive.pth": lambda trap: b"PK\x03\x04" + bytes(100),
    "expanded.pth": lambda trap: torch_bytes({"x": torch.zeros(1).expand(10**6, 10**6)}),
    "repeated.pth": lambda trap: torch_bytes(dict.fromkeys(map(str, range(99)), torch.ones(9999))),
    "sparse.pth": lambda trap: torch_bytes({"x": torch.eye(3).to_sparse()}),
    "complex.pth": lambda trap: torch_bytes({"x": torch.ones(2, dtype=torch.complex64)}),
    "eight_bits.safetensors": lambda trap: save({"x": torch.ones(2).to(torch.float8_e4m3fn)}),
    "short.safetensors": lambda trap: b"\x01\x02",
    "cut.safetensors": lambda trap: save({"x": torch.ones(99)})[:-8],
    "long_header.safetensors": lambda trap: header_only(2**62, b"{}"),
    "header_of_gigabytes.safetensors": lambda trap: header_only(2**31, b"{}"),
    "no_json.safetensors": lambda trap: header_only(4, b"\xff\xfe{}"),
    "beyond.safetensors": lambda trap: with_header({"x": F32 | {"data_offsets": [0, 2**40]}}),
    "overlap.safetensors": lambda trap: with_header({"x": F32, "y": F32}, bytes(16)),
    "shape.safetensors": lambda trap: with_header({"x": F32 | {"shape": [2**62, 8]}}, bytes(16)),
    "dtype.safetensors": lambda trap: with_header({"x": F32 | {"dtype": "F99"}}, bytes(16)),
}


@pytest.mark.filterwarnings("ignore:Validating sparse tensor:UserWarning")
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(tmp_path: Path, name: str) -> None:
    trap = tmp_path / "trap"
    path = tmp_path / name
    path.write_bytes(HOSTILE[name](trap))
    with pytest.raises(ConfigError, match=name):
        read_weights(path)
    assert [found.name for found in tmp_path.iterdir()] == [name]


def test_the_traps_work_when_nobody_looks(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Trap(tmp_path / "trap"))).close()
    assert (tmp_path / "trap").exists()


def test_too_large_a_file_is_not_read(monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "bomb.pth").write_bytes(compressed(torch_bytes({"x": torch.zeros(2**22)})))
    with (tmp_path / "w.pth").open("wb") as stream:
        stream.truncate(MAX_WEIGHTS_BYTES + 1)  # takes no space
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("it was read"))
    with pytest.raises(ConfigError, match="an archive that declares 167"):
        read_weights(tmp_path / "bomb.pth")
    with pytest.raises(ConfigError, match="expected at most"):
        read_weights(tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(extra=torch.zeros(1)), "1 unexpected: extra"),
        (lambda s: s.update({"stages.9.x": torch.zeros(1)}), "1 unexpected: stages.9.x"),
        (lambda s: s["stem.0.bn.bias"].fill_(float("nan")), "1 not finite floats: stem.0.bn.bias"),
        (
            lambda s: s.update({"stem.0.bn.bias": torch.ones(64, dtype=torch.int32)}),
            r"not finite floats: stem.0.bn.bias \(torch.int32\)",
        ),
        (lambda s: s.update({"head.fc.bias": torch.zeros(4)}), r"expected \(3,\), found \(4,\)"),
        (lambda s: s.clear(), "missing"),
    ],
)
def test_tensors_that_do_not_fit_change_nothing(tmp_path: Path, state, change, message) -> None:
    changed = {key: value.clone() for key, value in state.items()}
    change(changed)
    torch.save(changed, tmp_path / "w.pth")
    model = create_model(SMALL, num_classes=3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert isinstance(model, VoVNet)
    with pytest.raises(ConfigError, match=message):
        load_checkpoint(model, tmp_path / "w.pth", name=SMALL)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_name_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(1), "module.x": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(ConfigError, match=r"expected 'x' once, found it also as 'module\.x'"):
        read_weights(tmp_path / "w.pth")


def test_a_lazily_negated_tensor_has_its_own_numbers(tmp_path: Path) -> None:
    torch.save({"x": torch._neg_view(torch.ones(2))}, tmp_path / "w.pth")
    assert read_weights(tmp_path / "w.pth")["x"].numpy().tolist() == [-1, -1]


@pytest.mark.parametrize("kind", ["script", "objects"])
def test_nobody_is_advised_to_run_a_file(tmp_path: Path, kind: str, recwarn) -> None:
    path = tmp_path / "w.pth"
    if kind == "script":
        torch.jit.save(torch.jit.script(torch.nn.ReLU()), path)
    else:
        torch.save({"x": Path("x")}, path)
    recwarn.clear()
    with pytest.raises(ConfigError) as caught:
        read_weights(path)
    assert caught.value.__suppress_context__
    assert "weights_only" not in str(caught.value)
    assert not recwarn.list
