"""Peak memory of activations: in execution order, a buffer lives from its first to its last use."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Step:
    """One operation: the module it belongs to, and the buffers it reads or writes, by number."""

    name: str
    buffers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Peak:
    """The most elements alive at once, and the module (dotted path) whose operation needs them."""

    elements: int
    name: str


def peak_live(
    steps: Sequence[Step],
    sizes: Mapping[int, int],
    *,
    inputs: Collection[int],
    outputs: Collection[int],
) -> Peak:
    """Find the operation during which the live buffers hold the most elements.

    `sizes` gives each buffer's elements. `inputs` live from the start, `outputs` to the end. What
    an operation reads and what it writes live together, so an operation that works in place names
    one buffer where another names two. Of equal peaks the first counts.
    """
    born = {buffer: 0 for buffer in inputs}
    dies = {buffer: 0 for buffer in inputs}
    for index, step in enumerate(steps):
        for buffer in step.buffers:
            born.setdefault(buffer, index)
            dies[buffer] = index
    dies |= {buffer: len(steps) - 1 for buffer in outputs}
    if not steps:
        return Peak(sum(sizes[buffer] for buffer in {*inputs, *outputs}), "")
    change = [0] * (len(steps) + 1)
    for buffer, index in born.items():
        change[index] += sizes[buffer]
        change[dies[buffer] + 1] -= sizes[buffer]
    peak, live = Peak(-1, ""), 0
    for step, difference in zip(steps, change, strict=False):
        live += difference
        if live > peak.elements:
            peak = Peak(live, step.name)
    return peak
