"""Parameters that are `DTensor`s, sharded over the processes: FSDP2, HSDP, tensor parallelism."""

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

from ..compat import reset_fsdp
from ..methods import Dot
from .ddp import DDPLayout


class FSDP2Layout(DDPLayout):
    """Works on the local shards; numbers are summed over all processes.

    A gradient is a shard only after it was reduced, so that both passes reduce in both scopes. In
    scope `micro_batch`, e is that of one micro-batch of all processes together.

    `has_replicas`: the model was sharded when it was loaded, and has replicas (HSDP).
    """

    can_take_some_gradients = False  # reduced per module, together
    reduces_kept_gradients = False  # a shard is added to `.grad`
    hides_gradients = True

    def __init__(self, *args: Any, has_replicas: bool = False) -> None:
        super().__init__(*args)
        self._has_replicas = has_replicas

    def shares_state(self, scope_is_micro_batch: bool) -> bool:
        return self.processes == 1

    def must_replay(self, scope_is_micro_batch: bool) -> bool:
        return False  # FSDP2 requires that all processes use the same parameters

    def ascent(
        self, scope_is_micro_batch: bool, some: Sequence[Tensor] = ()
    ) -> AbstractContextManager[None]:
        return self._reducing(True) if scope_is_micro_batch else nullcontext()

    def replaying(self, is_last: bool, scope_is_micro_batch: bool) -> AbstractContextManager[None]:
        if is_last and not scope_is_micro_batch:
            return nullcontext()
        return self._reducing(is_last)

    @contextmanager
    def _reducing(self, value: bool) -> Iterator[None]:
        """Reduce the gradients of the block, or defer it.

        The Trainer defers it before the last micro-batch of an update, and enables it afterwards.
        """
        self._reduce_gradients(value)
        try:
            # Where an update ends, the Trainer reduces what FSDP2 does not manage (adapters).
            with self._as_end_of_update(value):
                yield
        finally:
            self._reduce_gradients(True)

    def _reduce_gradients(self, value: bool) -> None:
        model: Any = self._model
        if not hasattr(model, "set_requires_gradient_sync"):
            return  # tensor parallelism alone
        if self._has_replicas and not value:
            # As the Trainer does: within a replica, gradients stay sharded.
            model.set_requires_all_reduce(False)
        else:
            model.set_requires_gradient_sync(value)

    def recover(self) -> None:
        # What a pass has gathered, or has started to gather, is w + e.
        outermost = next((m for m in self._model.modules() if isinstance(m, FSDPModule)), None)
        if outermost is not None:
            reset_fsdp(outermost)

    def local(self, weights: Sequence[Tensor]) -> list[Tensor]:
        return [w.to_local().detach() if isinstance(w, DTensor) else w for w in weights]

    def local_as(self, weights: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
        return self.local([_placed_as(w, t) for w, t in zip(weights, tensors, strict=True)])

    def local_gradients(self, weights: Sequence[Tensor]) -> list[Tensor]:
        # Tensor parallelism may leave a gradient whole where the parameter is sharded.
        return self.local([_placed_as(w, w.grad) for w in weights if w.grad is not None])

    def writable_gradients(self, weights: Sequence[Tensor]) -> list[Tensor]:
        for w in weights:
            if w.grad is not None:
                w.grad = _placed_as(w, w.grad)
        return self.local_gradients(weights)

    def dot_over(self, weights: Sequence[Tensor]) -> Dot:
        # Elements that several processes hold count once.
        by_holders: dict[float, list[int]] = defaultdict(list)
        for i, weight in enumerate(weights):
            by_holders[self.processes / _shards(weight)].append(i)

        def dot(xs: list[Tensor], ys: list[Tensor]) -> Tensor:
            parts = []
            for holders, members in by_holders.items():
                mine = [xs[i] for i in members]
                theirs = mine if xs is ys else [ys[i] for i in members]
                parts.append(self.dot(mine, theirs) / holders)
            return self.sum_over_processes([torch.stack(parts).sum()])[0]

        return dot


def _placed_as(weight: Tensor, grad: Tensor) -> Tensor:
    if not (isinstance(weight, DTensor) and isinstance(grad, DTensor)):
        return grad
    placed: Tensor = grad.redistribute(weight.device_mesh, weight.placements)
    return placed


def _shards(weight: Tensor) -> int:
    """Number of different shards of a parameter."""
    if not isinstance(weight, DTensor):
        return 1
    # Not `is_shard`: it is False where FSDP2 and tensor parallelism shard one dimension.
    dims = [i for i, placement in enumerate(weight.placements) if not placement.is_replicate()]
    return math.prod(map(weight.device_mesh.size, dims))


def reshard(model: nn.Module) -> None:
    """Reshard parameters that an evaluation has gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
