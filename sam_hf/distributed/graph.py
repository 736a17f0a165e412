"""Whether the graph of a loss shows all parameters that it depends on."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

# PyTorch's own functions that pass every gradient on: compiled programs, DDP's last node.
_TRANSPARENT = ("CompiledFunction", "_DDPSink")


def reaches_its_parameters(loss: Tensor) -> bool:
    """Whether ``backward(inputs=...)`` finds every parameter that the loss depends on.

    Unknown where a part of the graph is hidden: a custom autograd function may run a backward pass
    of its own (reentrant checkpoints, reversible layers), and a hook may pass on the gradient of a
    tensor that was detached from what it was computed from (cached contrastive losses).
    """
    seen: set[Any] = {None}
    nodes: list[Any] = [loss.grad_fn]
    while nodes:
        if (node := nodes.pop()) in seen:
            continue
        seen.add(node)
        is_custom = isinstance(node, BackwardCFunction)
        if is_custom and not type(node).__name__.startswith(_TRANSPARENT):
            return False
        leaf = getattr(node, "variable", None)
        if leaf is not None and not isinstance(leaf, nn.Parameter):
            return False
        nodes += [following for following, _ in node.next_functions]
    return True


def mixes_losses(loss: Tensor, recorded: set[Any]) -> bool:
    """Whether a loss is made of recorded losses and, in addition, of parameters.

    Args:
        recorded: the `grad_fn` of the recorded losses.
    """
    seen: set[Any] = set()
    nodes: list[Any] = [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [] if node in recorded else [following for following, _ in node.next_functions]
    return not seen.isdisjoint(recorded) and any(hasattr(node, "variable") for node in seen)
