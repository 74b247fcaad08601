"""`vovnet models`."""

import json

from vovnet.errors import ConfigError
from vovnet.model_folder import bundled_models
from vovnet.models.zoo import list_models, task_of

TASKS = ("classify", "detect", "segment")


def models(pattern: str, task: str | None, as_json: bool) -> int:
    """Prints the names that match; bundled models come with weights."""
    if task is not None and task not in TASKS:
        raise ConfigError(f"task: expected one of {', '.join(TASKS)}, got {task!r}")
    names = [name for name in list_models(pattern) if task in (None, task_of(name))]
    bundled = sorted(bundled_models())
    if as_json:
        listed = [{"name": name, "task": task_of(name)} for name in names]
        print(json.dumps({"models": listed, "bundled": bundled}))
        return 0
    for name in names:
        print(f"{name:45} {task_of(name)}")
    print(f"\nwith trained weights: {', '.join(bundled) or 'none'}")
    return 0
