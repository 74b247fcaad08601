"""Settings of a training as the command line gives them: options, and --set NAME=VALUE."""

from collections.abc import Mapping, Sequence

import yaml

from vovnet.errors import ConfigError


def parse_settings(flags: Mapping[str, object], settings: Sequence[str]) -> dict[str, object]:
    """The flags that were given, and the settings NAME=VALUE over them; raises ConfigError."""
    given = {name: value for name, value in flags.items() if value is not None}
    return given | dict(_parse_setting(text) for text in settings)


def _parse_setting(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ConfigError(f"--set: expected NAME=VALUE, got {text!r}")
    try:
        return name, yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"--set {name}: expected a YAML value, got {value!r}") from error
