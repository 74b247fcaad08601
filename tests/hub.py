"""Published weights without a network: a hub cache that holds random ones."""

import hashlib
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save

from vovnet.published import PUBLISHED


def fill_hub(monkeypatch: pytest.MonkeyPatch, cache: Path, variant: str) -> torch.nn.Module:
    """Makes `cache` the hub's, offline, with random weights of a variant; returns timm's model."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    torch.manual_seed(0)
    model = timm.create_model(variant).eval()
    torch.nn.init.normal_(model.head.fc.weight, std=100)
    folder = cache / f"models--{PUBLISHED[variant].hub_repository.replace('/', '--')}"
    content = save(model.state_dict())
    blob = folder / "blobs" / hashlib.sha256(content).hexdigest()
    link = folder / "snapshots" / "0123456789abcdef" / "model.safetensors"
    for path in (blob, link, folder / "refs" / "main"):
        path.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(content)
    link.unlink(missing_ok=True)
    link.symlink_to(blob)
    (folder / "refs" / "main").write_text("0123456789abcdef")
    return model
