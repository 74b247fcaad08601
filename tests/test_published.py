"""Names of published weights, how they want images, and what their outputs are called."""

from pathlib import Path

import pytest
from timm.data import ImageNetInfo

from vovnet.errors import ConfigError
from vovnet.preprocess import Preprocess
from vovnet.published import (
    PUBLISHED,
    find_published,
    imagenet_class_names,
    published_preprocess,
)


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("ese_vovnet39b.ra_in1k", "ese_vovnet39b"),
        ("ese_vovnet39b", "ese_vovnet39b"),
        ("ese_vovnet57b.ra4_e3600_r256_in1k", "ese_vovnet57b"),
        ("ese_vovnet99b", None),
        ("nuclei", None),
        ("", None),
    ],
)
def test_names(name: str, variant: str | None) -> None:
    assert find_published(name) == variant
    assert find_published(Path(name)) == variant


def test_a_folder_of_the_same_name_goes_first(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    Path("ese_vovnet39b").mkdir()
    assert find_published("ese_vovnet39b") is None
    assert find_published("ese_vovnet39b.ra_in1k") == "ese_vovnet39b"


@pytest.mark.parametrize("name", ["ese_vovnet39b.in1k", "ese_vovnet39b.", "ese_vovnet39b.RA_in1k"])
def test_other_tags_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"expected ese_vovnet39b\.ra_in1k, got ese_vovnet39b\."):
        find_published(name)


@pytest.mark.parametrize(
    ("variant", "test_size", "sides"),
    [
        ("ese_vovnet39b", False, (256, 224)),
        ("ese_vovnet39b", True, (303, 288)),
        ("ese_vovnet57b", False, (269, 256)),
        ("ese_vovnet57b", True, (320, 320)),
    ],
)
def test_sizes(variant: str, test_size: bool, sides: tuple[int, int]) -> None:
    found = published_preprocess(variant, test_size=test_size)
    assert (found.short_side, found.crop_size) == sides
    assert (found.interpolation, found.max_long_side, found.scale) == ("bicubic", None, 1.0)
    if variant == "ese_vovnet39b":  # ImageNet's mean and std are our default
        assert found.mean == pytest.approx(Preprocess().mean)
        assert found.std == pytest.approx(Preprocess().std)
    else:
        assert found.mean == found.std == (127.5, 127.5, 127.5)


def test_class_names_stand_in_timms_order() -> None:
    names = imagenet_class_names()
    assert len(set(names)) == 1000
    described = ImageNetInfo()
    other = [
        (index, name)
        for index, name in enumerate(names)
        if name.lower() not in described.index_to_description(index).lower()
    ]
    assert other == [(134, "crane bird"), (639, "maillot tank suit")]  # told apart from others
    assert (names[0], names[207], names[999]) == ("tench", "golden retriever", "toilet tissue")


@pytest.mark.parametrize("variant", PUBLISHED)
def test_tags_are_those_of_the_hub(variant: str) -> None:
    assert PUBLISHED[variant].hub_repository == f"timm/{variant}.{PUBLISHED[variant].tag}"
