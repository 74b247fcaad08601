"""`vovnet pretrain`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from vovnet.cli.settings import parse_settings
from vovnet.errors import ConfigError
from vovnet.training.config import load_config, resume_config
from vovnet.training.pretrain import PRETRAIN
from vovnet.training.run import train as run_training


def pretrain(
    config_file: Path | None,
    flags: Mapping[str, object],
    settings: Sequence[str],
    resume: Path | None,
) -> int:
    """Pretrains, or goes on with a run; 130 or 143 after a signal, with the checkpoint saved."""
    given = parse_settings(flags, settings)
    if resume is None:
        config = load_config(None, config_file, given, defaults=PRETRAIN)
    elif config_file is None:
        config = resume_config(resume, given)
    else:
        raise ConfigError("resume: expected no --config, which the run folder already holds")
    if config.task != "pretrain":
        raise ConfigError(f"task: expected pretrain, got {config.task}; see `vovnet train`")
    return run_training(config, resume=resume).exit_code
