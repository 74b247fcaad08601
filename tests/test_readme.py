"""The Python that the README shows runs as it stands; the hub's weights are random ones here."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.hub import fill_hub
from vovnet.published import PUBLISHED

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the snippets read: the assets, and a photograph."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "assets").symlink_to(ROOT / "assets")
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((400, 300), Image.Resampling.BICUBIC).save(folder / "photo.jpg")
    return folder


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_snippets_run(monkeypatch: pytest.MonkeyPatch, folder: Path, snippet: str) -> None:
    fill_hub(monkeypatch, folder / "hub", "ese_vovnet19b_dw")
    monkeypatch.chdir(folder)
    exec(compile(snippet, "README.md", "exec"), {})


def test_there_are_snippets() -> None:
    assert len(SNIPPETS) >= 5


@pytest.mark.parametrize("variant", PUBLISHED)
def test_published_figures_are_those_of_the_table(variant: str) -> None:
    weights = PUBLISHED[variant]
    (row,) = re.findall(rf"^\| `{variant}\.{weights.tag}` \| (.*) \|$", README, re.MULTILINE)
    sizes, figures, larger = row.split(" | ")
    assert sizes == f"{weights.image_size}, {weights.crop_fraction:g}"
    assert figures == f"{weights.top1_percent:.2f}, {weights.top5_percent:.2f}"
    assert larger.startswith(f"{weights.test_image_size}: ")
