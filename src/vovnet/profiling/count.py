"""Counts that depend on the network and its input size, not on the machine."""

from torch import Tensor, nn, no_grad
from torch.utils.flop_counter import FlopCounterMode


def count_macs(module: nn.Module, example_inputs: tuple[Tensor, ...]) -> int:
    """Multiply-accumulate operations of one forward pass: convolutions and linear layers.

    One multiplication with its addition counts once, so flops = 2 * macs. `example_inputs` are
    the arguments of `module`; divide by their batch size for macs per image. The pass runs in
    evaluation mode, and leaves the weights, statistics and mode of every part as they were.
    """
    training = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with no_grad(), FlopCounterMode(display=False) as counter:
            module(*example_inputs)
    finally:
        for part, mode in training.items():
            part.training = mode
    return int(counter.get_total_flops()) // 2


def count_parameters(module: nn.Module) -> int:
    """Number of learned values, shared ones once; running statistics are not among them."""
    return sum(parameter.numel() for parameter in module.parameters())
