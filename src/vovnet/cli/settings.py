"""Settings of a training as the command line gives them: options, and --set NAME=VALUE."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from vovnet.errors import ConfigError


def parse_settings(flags: Mapping[str, object], settings: Sequence[str]) -> dict[str, Any]:
    """The flags that were given, which None are not, and the settings NAME=VALUE over them,
    NAME.KEY=VALUE for one key of a setting that is a mapping; a VALUE of null is None.

    Raises ConfigError.
    """
    given: dict[str, Any] = {name: value for name, value in flags.items() if value is not None}
    for text in settings:
        (name, _, key), value = _parse_setting(text)
        within = {key: value} if key else value
        before = given.get(name)
        if isinstance(before, dict) and isinstance(within, dict):
            within = {**before, **within}
        given[name] = within
    return given


def _parse_setting(text: str) -> tuple[tuple[str, str, str], Any]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ConfigError(f"--set: expected NAME=VALUE, got {text!r}")
    try:
        return name.partition("."), yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"--set {name}: expected a YAML value, got {value!r}") from error
