"""Whether the graph of a loss shows all parameters that it depends on."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

# PyTorch's own functions that propagate every gradient: compiled programs, DDP's last node.
_TRANSPARENT = ("CompiledFunction", "_DDPSink")


def reaches_its_parameters(loss: Tensor) -> bool:
    """Whether ``backward(inputs=...)`` finds every parameter that the loss depends on.

    False where a part of the graph is hidden: a custom autograd function may run its own backward
    pass (reentrant checkpoints, reversible layers), and a hook may propagate the gradient of a
    tensor that was detached from what it was computed from (cached contrastive losses).
    """
    for node in _nodes(loss):
        is_custom = isinstance(node, BackwardCFunction)
        if is_custom and not type(node).__name__.startswith(_TRANSPARENT):
            return False
        if not isinstance(getattr(node, "variable", None), nn.Parameter | None):
            return False
    return True


def mixes_losses(loss: Tensor, recorded: set[Any]) -> bool:
    """Whether a loss is made of recorded losses and, in addition, of parameters.

    Args:
        recorded: the `grad_fn` of the recorded losses.
    """
    nodes = set(_nodes(loss, recorded))
    return not nodes.isdisjoint(recorded) and any(hasattr(node, "variable") for node in nodes)


def _nodes(loss: Tensor, ends: Collection[Any] = ()) -> Iterator[Any]:
    """The nodes of the graph of a loss, without those that only `ends` lead to."""
    seen: set[Any] = {None}
    waiting: list[Any] = [loss.grad_fn]
    while waiting:
        if (node := waiting.pop()) not in seen:
            seen.add(node)
            yield node
            if node not in ends:
                waiting += [following for following, _ in node.next_functions]
