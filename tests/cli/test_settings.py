"""Settings of a training as flags and --set give them."""

import pytest

from vovnet.cli.settings import parse_settings
from vovnet.errors import ConfigError


def test_one_key_of_a_mapping_and_all_of_it() -> None:
    texts = ["augment.hue=0.1", "augment={hue: 0.2, scale: [0.5, 1]}", "augment.blur=0", "seed=3"]
    found = parse_settings({"epochs": 2, "seed": 1, "name": None}, texts)
    augment = {"hue": 0.2, "scale": [0.5, 1], "blur": 0}
    assert found == {"epochs": 2, "seed": 3, "augment": augment}


def test_null_is_a_value() -> None:
    texts = ["clip_norm=null", "seed=null", "augment.hue=null"]
    found = parse_settings({"name": None, "seed": 3}, texts)
    assert found == {"clip_norm": None, "seed": None, "augment": {"hue": None}}


@pytest.mark.parametrize("text", ["seed", "=3", "seed=[", "augment.hue=[1"])
def test_what_is_no_setting_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        parse_settings({}, [text])
