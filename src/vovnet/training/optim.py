"""The optimizer, its learning rate over the training, and the averaged weights."""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

# The warm-up starts here, not at 0, so that the first step already moves the weights.
_FIRST_FACTOR = 1e-3
_LAST_FACTOR = 1e-2


def build_optimizer(
    module: nn.Module,
    name: Literal["sgd", "adamw"],
    *,
    learning_rate: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool = False,
) -> torch.optim.Optimizer:
    """Optimizer over the trainable parameters in two groups: decayed weights, and all others.

    Norms, biases and learned scales (parameters with fewer than two axes) are not decayed.
    """
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if name == "sgd":
        return torch.optim.SGD(groups, lr=learning_rate, momentum=momentum, nesterov=nesterov)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(momentum, 0.999))


def learning_rate_factor(
    progress: float,
    step: int,
    *,
    warmup_fraction: float | None,
    warmup_steps: int | None,
    drops_at: Sequence[float] = (),
) -> float:
    """Share of the full learning rate: a linear rise, then half a cosine down to 1 %.

    `progress` is the spent share of the training in 0..1, `step` the number of finished steps;
    the rise lasts `warmup_steps` steps where that is given, else `warmup_fraction` of the training.
    With `drops_at` it falls to a tenth at each of these shares of the training instead.
    """
    if warmup_steps is not None:
        risen = (step + 1) / warmup_steps if warmup_steps else 1.0
    else:
        risen = progress / warmup_fraction if warmup_fraction else 1.0
    rise = _FIRST_FACTOR + (1.0 - _FIRST_FACTOR) * min(risen, 1.0)
    if drops_at:
        return rise * 0.1 ** sum(progress >= drop for drop in drops_at)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))
    return rise * (_LAST_FACTOR + (1.0 - _LAST_FACTOR) * cosine)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Give every parameter group this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


class Ema:
    """A second copy of a module whose weights are the running average of the trained ones.

    Floating-point buffers (BatchNorm's statistics) are averaged with the weights they belong to;
    other buffers are copied.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move the average towards `module`; the first updates move it more (warm-up)."""
        self.updates += 1
        decay = min(self.decay, self.updates / (self.updates + 10.0))
        averages, values = [], []
        current = module.state_dict()
        for name, average in self.module.state_dict().items():
            if average.is_floating_point():
                averages.append(average)
                values.append(current[name].to(average.dtype))
            else:
                average.copy_(current[name])
        torch._foreach_lerp_(averages, values, 1.0 - decay)

    def state_dict(self) -> dict[str, Any]:
        """The averaged tensors and the number of updates."""
        return {"updates": self.updates, "module": self.module.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what state_dict gave."""
        self.updates = int(state["updates"])
        tensors: dict[str, Tensor] = state["module"]
        self.module.load_state_dict(tensors)
