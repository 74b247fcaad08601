"""`vovnet train`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from vovnet.cli.settings import parse_settings
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
    given = parse_settings(flags, settings)
    if resume is None:
        config = load_config(recipe, config_file, given)
    else:
        if recipe is not None or config_file is not None:
            raise ConfigError(
                "resume: expected no --recipe and no --config, which the run folder already holds"
            )
        config = resume_config(resume, given)
    return run_training(config, resume=resume, skip_bad=skip_bad).exit_code
