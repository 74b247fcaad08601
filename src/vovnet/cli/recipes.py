"""`vovnet recipes`."""

import json
from fnmatch import fnmatch

from rich.console import Console
from rich.table import Table

from vovnet.errors import ConfigError
from vovnet.training.config import Recipe, config_to_yaml, list_recipes
from vovnet.training.recipe import blanks, command, one_gpu_command

COLUMNS = ("recipe", "model", "data", "length", "published, %", "source")


def recipes(pattern: str, as_json: bool) -> int:
    """Prints the recipes that match; of a single one its commands, notes and settings too."""
    found = [recipe for recipe in list_recipes() if fnmatch(recipe.name, pattern)]
    if not found:
        raise ConfigError(f"recipes: expected a pattern that some name matches, got {pattern!r}")
    if as_json:
        print(json.dumps({"recipes": [describe(recipe) for recipe in found]}))
    elif len(found) == 1:
        print(to_details(found[0]))
    else:
        print(to_table(found))
    return 0


def describe(recipe: Recipe) -> dict[str, object]:
    """All that is known of a recipe, as JSON types; config holds its settings that are no
    defaults.
    """
    return {
        "name": recipe.name,
        "model": recipe.config.model,
        "data": recipe.data,
        "length": length(recipe),
        "expected_percent": dict(recipe.expected),
        "source": recipe.source,
        "needs_weights": recipe.needs_weights,
        "command": command(recipe),
        "one_gpu_command": one_gpu_command(recipe),
        "notes": list(recipe.notes),
        "config": recipe.config.model_dump(mode="json", exclude_defaults=True),
    }


def columns(recipe: Recipe) -> tuple[str, ...]:
    """A recipe's row under COLUMNS."""
    figures = ", ".join(f"{name} {value}" for name, value in recipe.expected.items())
    model = recipe.config.model
    return recipe.name, model, recipe.data, length(recipe), figures or "none", recipe.source


def length(recipe: Recipe) -> str:
    """How long the training is, and of how many images a step."""
    config = recipe.config
    lengths = (
        (config.max_steps, "steps"),
        (config.epochs, "epochs"),
        (config.max_minutes, "minutes"),
    )
    amount = next(f"{value:,g} {unit}" for value, unit in lengths if value is not None)
    return f"{amount} of {config.batch_size} images" if config.max_steps is not None else amount


def to_table(found: list[Recipe]) -> str:
    """The list for people."""
    table = Table(box=None, pad_edge=False)
    shown = [index for index, header in enumerate(COLUMNS) if header != "model"]
    for index in shown:
        table.add_column(COLUMNS[index], no_wrap=True)
    for recipe in found:
        row = columns(recipe)
        table.add_row(*(row[index] for index in shown))
    console = Console(width=240, highlight=False, markup=False)
    with console.capture() as captured:
        console.print(table)
        console.print("\nPublished figures are the sources', not measured here.")
        console.print("vovnet recipes NAME shows the commands, what is unknown, and the settings.")
    return "\n".join(line.rstrip() for line in captured.get().rstrip().splitlines())


def to_details(recipe: Recipe) -> str:
    """All that is known of one recipe, for people."""
    settings = config_to_yaml(recipe.config, only_set=True)
    about = list(zip(COLUMNS, columns(recipe), strict=True))
    commands = [("8 GPUs", command(recipe)), ("one GPU", one_gpu_command(recipe))]
    if recipe.one_gpu_batch is None:
        commands = [("command", command(recipe))]
    commands.append(("put in", blanks(recipe)))
    sections = (
        [f"{title:14}{text}" for title, text in about],
        [f"{title:14}{text}" for title, text in commands],
        [f"- {note}" for note in recipe.notes],
        [settings.rstrip()],
    )
    return "\n\n".join("\n".join(lines) for lines in sections if lines)
