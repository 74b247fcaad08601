"""What the verbs say of engines."""

import sys

from vovnet.runtime.engine import Engine


def print_engine(engine: Engine) -> None:
    """Says on stderr what was chosen, where it is not torch."""
    if engine.chosen_because and engine.name != "torch":
        text = f"engine {engine.name}, {engine.precision}: {engine.chosen_because}"
        print(f"vovnet: {text}", file=sys.stderr)
