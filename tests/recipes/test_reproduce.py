"""docs/reproduce.md names every recipe with what is known of it, and nothing else."""

import re
from pathlib import Path

from vovnet.cli.recipes import COLUMNS, columns
from vovnet.training.config import list_recipes
from vovnet.training.recipe import command, one_gpu_command

TEXT = (Path(__file__).parents[2] / "docs" / "reproduce.md").read_text("utf-8")


def rows() -> list[str]:
    """The lines of the table that begins with our columns."""
    header = f"| {' | '.join(COLUMNS)} |"
    lines = TEXT[TEXT.index(header) :].splitlines()
    end = next(index for index, line in enumerate(lines) if not line.startswith("|"))
    return lines[2:end]


def test_the_table_is_the_registry() -> None:
    expected = []
    for recipe in list_recipes():
        name, model, *rest = columns(recipe)
        expected.append(f"| {' | '.join([f'`{name}`', f'`{model}`', *rest])} |")
    assert rows() == expected


def test_the_commands_are_what_the_library_prints() -> None:
    shown = re.findall(r"^    (?:vovnet|torchrun) .*--recipe .*$", TEXT, re.MULTILINE)
    assert len(shown) >= 3
    printed = {c for recipe in list_recipes() for c in (command(recipe), one_gpu_command(recipe))}
    assert {line.strip() for line in shown} <= printed
