"""What the graph of a loss says of a backward pass that is asked for some gradients alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

# Functions of PyTorch itself that hand every gradient on: compiled programs, DDP's last node.
_HARMLESS = ("CompiledFunction", "_DDPSink")


def reaches_its_parameters(loss: Tensor) -> bool:
    """Whether ``backward(inputs=...)`` finds every parameter that the loss depends on.

    Not for sure where a part of the graph is hidden: a function written in Python may run a
    backward pass of its own (reentrant checkpoints, reversible layers), and a hook may hand on the
    gradient of a tensor that was cut off from what it was computed from (cached contrastive
    losses).
    """
    seen: set[Any] = set()
    nodes: list[Any] = [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, BackwardCFunction) and not type(node).__name__.startswith(_HARMLESS):
            return False
        leaf = getattr(node, "variable", None)
        if leaf is not None and not isinstance(leaf, nn.Parameter):
            return False
        nodes += [following for following, _ in node.next_functions]
    return True
