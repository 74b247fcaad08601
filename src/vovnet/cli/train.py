"""`vovnet train`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from vovnet.errors import ConfigError
from vovnet.training.config import load_config, resume_config
from vovnet.training.run import train as run_training


def train(
    recipe: str | None,
    config_file: Path | None,
    flags: Mapping[str, object],
    settings: Sequence[str],
    resume: Path | None,
    skip_bad: bool,
) -> int:
    """Trains, or goes on with a run; 130 or 143 after a signal, with the checkpoint saved."""
    given = {name: value for name, value in flags.items() if value is not None}
    given |= dict(_parse_setting(text) for text in settings)
    if resume is None:
        config = load_config(recipe, config_file, given)
    else:
        if recipe is not None or config_file is not None:
            raise ConfigError(
                "resume: expected no --recipe and no --config, which the run folder already holds"
            )
        config = resume_config(resume, given)
    return run_training(config, resume=resume, skip_bad=skip_bad).exit_code


def _parse_setting(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ConfigError(f"--set: expected NAME=VALUE, got {text!r}")
    try:
        return name, yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"--set {name}: expected a YAML value, got {value!r}") from error
