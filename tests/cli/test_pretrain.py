"""The verb's options arrive as settings, the user's over the verb's own."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from vovnet.cli import main as command_line
from vovnet.cli import pretrain as verb
from vovnet.errors import ConfigError
from vovnet.training.config import TrainConfig
from vovnet.training.task import TrainResult


@pytest.fixture
def started(monkeypatch) -> list[TrainConfig]:
    """The settings of the trainings that were started; none of them runs."""
    configs: list[TrainConfig] = []

    def run(config, *, resume):
        configs.append(config)
        return TrainResult(run_dir=Path(), interrupted_by=2)

    monkeypatch.setattr(verb, "run_training", run)
    return configs


def test_options_become_settings(started):
    line = "pretrain --data D --model ese_vovnet39b --max-minutes 3 --teacher T --output O --name N"
    line += " --image-size 96 --batch-size 4 --set log_every_steps=2 --set"
    result = CliRunner().invoke(command_line.app, [*line.split(), "augment={hue: 0.0}"])
    assert result.exit_code == 130, result.output
    (config,) = started
    assert (config.task, config.model, config.data) == ("pretrain", "ese_vovnet39b", "D")
    assert (config.max_minutes, config.epochs, config.max_steps) == (3, None, None)
    assert (config.teacher, config.runs_dir, config.name) == ("T", "O", "N")
    assert (config.image_size, config.batch_size, config.log_every_steps) == (96, 4, 2)
    assert config.augment == {"hue": 0.0}
    assert config.optimizer == "adamw"


def test_a_file_of_settings_goes_over_the_verbs_own(started, tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("data: E\nbatch_size: 5\nlearning_rate: 0.5\n")
    assert verb.pretrain(file, {"batch_size": 6, "data": None}, [], None) == 130
    (config,) = started
    assert (config.data, config.batch_size, config.learning_rate) == ("E", 6, 0.5)
    assert (config.model, config.epochs) == ("vovnet19_thin_dw", 100)


def test_no_data_is_refused(started):
    with pytest.raises(ConfigError, match="data: expected the folder of a data set"):
        verb.pretrain(None, {}, [], None)
    assert started == []
