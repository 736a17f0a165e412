"""The weights are `DTensor`s, cut over the processes: FSDP2, HSDP, tensor parallelism."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ..methods import Dot
from .replicated import Backend


class ShardedBackend(Backend):
    """Works on the local shards; numbers are summed up over all processes.

    A gradient is a shard only after it was reduced, so both passes reduce in both scopes. In scope
    `micro_batch`, e is that of a micro-batch of all processes together.

    The shards are written in place. The weights of a forward pass are gathered from their memory:
    another tensor in the place of a parameter would not be seen.

    Args:
        has_replicas: whether a model that was sharded when it was loaded has replicas (HSDP).
    """

    def __init__(
        self, weights: Sequence[nn.Parameter], *args: Any, has_replicas: bool = False
    ) -> None:
        super().__init__(weights, *args)
        self._has_replicas = has_replicas

    @property
    def reduces_kept_gradients(self) -> bool:
        return False  # a reduced shard is added to what `.grad` holds

    @property
    def can_take_some_gradients(self) -> bool:
        return False  # FSDP2 reduces the gradients of a module together

    def shares_state(self, each_alone: bool) -> bool:
        return bool(self._accelerator.num_processes == 1)

    def descent_is_awaited(self, each_alone: bool) -> bool:
        return False  # FSDP2 demands that all processes use the same parameters

    def ascent(self, model: nn.Module, each_alone: bool) -> AbstractContextManager[Any]:
        return self._with_reduction(model) if each_alone else nullcontext()

    def replaying(
        self, model: nn.Module, is_last: bool, each_alone: bool
    ) -> AbstractContextManager[Any]:
        if not is_last:
            return self._without_reduction(model)
        return self._with_reduction(model) if each_alone else nullcontext()

    @contextmanager
    def _with_reduction(self, model: nn.Module) -> Iterator[None]:
        # Before the last micro-batch of an update, the Trainer has put off the reduction. It turns
        # it on again when the micro-batch is over, so that this need not turn it off.
        self._reduce_gradients(model, True)
        # The Trainer reduces what FSDP2 does not manage (adapters) where an update ends.
        with self._as_end_of_update(True):
            yield

    @contextmanager
    def _without_reduction(self, model: nn.Module) -> Iterator[None]:
        self._reduce_gradients(model, False)
        try:
            with self._as_end_of_update(False):
                yield
        finally:
            self._reduce_gradients(model, True)

    def _reduce_gradients(self, model: Any, value: bool) -> None:
        """Let the backward passes from here on reduce their gradients, or put it off."""
        if not hasattr(model, "set_requires_gradient_sync"):
            return  # tensor parallelism alone
        if self._has_replicas and not value:
            # As the Trainer does: within a replica, gradients stay sharded.
            model.set_requires_all_reduce(False)
        else:
            model.set_requires_gradient_sync(value)

    def holds_gradients(self, weights: Sequence[Tensor]) -> bool:
        return True  # FSDP2 keeps those that are not reduced yet, out of sight

    def recover(self, model: nn.Module) -> None:
        # What a pass has gathered, or has begun to, is w + e.
        for module in model.modules():
            if isinstance(module, FSDPModule):  # the outermost one, for all
                module.reset_iter_state()
                break

    def local(self, weights: Sequence[Tensor]) -> list[Tensor]:
        return [w.to_local().detach() if isinstance(w, DTensor) else w for w in weights]

    def local_as(self, weights: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
        return self.local([_placed_as(w, t) for w, t in zip(weights, tensors, strict=True)])

    def local_gradients(self, weights: Sequence[Tensor]) -> list[Tensor]:
        # Tensor parallelism may leave a gradient whole where the weight is cut.
        return self.local([_placed_as(w, w.grad) for w in weights if w.grad is not None])

    def writable_gradients(self, weights: Sequence[Tensor]) -> list[Tensor]:
        for w in weights:
            if w.grad is not None:
                w.grad = _placed_as(w, w.grad)
        return self.local_gradients(weights)

    def dot_over(self, weights: Sequence[Tensor]) -> Dot:
        # What several processes hold counts once.
        by_holders: dict[float, list[int]] = defaultdict(list)
        for i, weight in enumerate(weights):
            by_holders[self._accelerator.num_processes / _shards(weight)].append(i)

        def dot(xs: list[Tensor], ys: list[Tensor]) -> Tensor:
            parts = [
                self.dot(
                    mine := [xs[i] for i in members],
                    mine if xs is ys else [ys[i] for i in members],
                )
                / holders
                for holders, members in by_holders.items()
            ]
            return self.sum_over_processes([torch.stack(parts).sum()])[0]

        return dot


def _placed_as(weight: Tensor, grad: Tensor) -> Tensor:
    if not (isinstance(weight, DTensor) and isinstance(grad, DTensor)):
        return grad
    placed: Tensor = grad.redistribute(weight.device_mesh, weight.placements)
    return placed


def _shards(weight: Tensor) -> int:
    """Into how many different shards a weight is cut."""
    if not isinstance(weight, DTensor):
        return 1
    mesh = weight.device_mesh
    return math.prod(
        # Not `is_shard`: where FSDP2 and tensor parallelism cut one dimension, that is False.
        mesh.size(dim)
        for dim, placement in enumerate(weight.placements)
        if not placement.is_replicate()
    )


def reshard(model: nn.Module) -> None:
    """Put the shards in the place of weights that an evaluation has gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
