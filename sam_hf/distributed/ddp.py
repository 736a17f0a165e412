"""One process with Accelerate, several devices in one process, and DDP: every process holds w."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _take_tensors, _unflatten_dense_tensors

from ..engine.layout import Layout
from ..engine.state import patched
from ..methods.lists import by_device
from .graph import reaches_its_parameters

_BUCKET_BYTES = 25 * 2**20  # DDP's own


class DDPLayout(Layout):
    """Parameters whole on every process, gradients reduced by DDP.

    In addition to the arguments of `Layout`, it takes the model as Accelerate prepared it, and the
    number of accelerators over which this process spreads its batches (`DataParallel`).
    """

    def __init__(
        self,
        weights: Sequence[nn.Parameter],
        model: nn.Module,
        wrapped: nn.Module,
        accelerator: Accelerator,
        n_devices: int = 1,
        is_compiled: bool = False,
    ) -> None:
        super().__init__(weights, model, is_compiled)
        self._model, self._accelerator = wrapped, accelerator
        self.processes = accelerator.num_processes
        if accelerator.device.type not in ("cpu", "meta"):
            # Also with weights that are offloaded to the CPU: the passes run on the device.
            self.rng_devices.add(torch.device(accelerator.device))
        if self.rng_devices and n_devices > 1:
            kind = next(iter(self.rng_devices)).type
            self.rng_devices |= {torch.device(kind, i) for i in range(n_devices)}
        handler = accelerator.ddp_handler
        self._is_static = handler is not None and handler.static_graph
        self.grads_live_in_buffers |= handler is not None and handler.gradient_as_bucket_view
        self._reaches_parameters: bool | None = None

    @property
    def is_end_of_update(self) -> bool:
        return bool(self._accelerator.sync_gradients)

    @property
    def is_end_of_epoch(self) -> bool:
        loader = self._accelerator.gradient_state
        return bool(loader.end_of_dataloader or not loader.in_dataloader)

    @property
    def reduces_kept_gradients(self) -> bool:  # type: ignore[override]
        # With sync_each_batch every backward pass reduces, not only the last of an update.
        options = self._accelerator.gradient_state.plugin_kwargs
        is_reduced = self.is_end_of_update or bool(options.get("sync_each_batch", False))
        return self.processes > 1 and is_reduced

    def must_replay(self, scope_is_micro_batch: bool) -> bool:
        # If the ascent pass was not reduced, the other processes wait in the pass that is.
        return scope_is_micro_batch and self.reduces_kept_gradients

    @property
    def can_take_some_gradients(self) -> bool:  # type: ignore[override]
        # Several processes may have seen different graphs, and must not decide differently.
        if self.processes == 1:
            return self._reaches_parameters is not False
        return not self._is_static

    def ascent(
        self, scope_is_micro_batch: bool, some: Sequence[Tensor] = ()
    ) -> AbstractContextManager[None]:
        is_plain = self.processes == 1 and not some
        return nullcontext() if is_plain else self._ascent(scope_is_micro_batch, some)

    @contextmanager
    def _ascent(self, scope_is_micro_batch: bool, some: Sequence[Tensor]) -> Iterator[None]:
        reduction = self._without_reduction() if scope_is_micro_batch or some else nullcontext()
        with reduction, _unused_parameters_explained():
            if not some:
                yield
                return
            # All gradients if the first graph of the run hides which parameters it reaches.
            whole = self._accelerator.backward

            def backward(loss: Tensor, **kwargs: Any) -> None:
                if self._reaches_parameters is None:
                    self._reaches_parameters = reaches_its_parameters(loss)
                inputs = {"inputs": list(some)} if self._reaches_parameters else {}
                whole(loss, **kwargs, **inputs)

            with patched(self._accelerator, backward=backward):
                yield
        # DDP's own reduction, which would wait for the other gradients, was skipped.
        if self.is_end_of_update and not scope_is_micro_batch:
            self.reduce_ascent(some)

    def reduce_ascent(self, weights: Sequence[Tensor]) -> None:
        if self.processes == 1:
            return
        # Another process may have a gradient where this one has none.
        grads = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
        torch._foreach_div_(grads, self.processes)
        all_reduce_(grads)
        for w, g in zip(weights, grads, strict=True):
            w.grad = g

    def replaying(self, is_last: bool, scope_is_micro_batch: bool) -> AbstractContextManager[None]:
        return nullcontext() if is_last else self._without_reduction()

    def _without_reduction(self) -> AbstractContextManager[None]:
        context: AbstractContextManager[None] = self._accelerator.no_sync(self._model)
        return context

    def _as_end_of_update(self, value: bool) -> AbstractContextManager[None]:
        """Mark the micro-batch as the last of its update, or not, for Trainer and Accelerate."""
        return patched(self._accelerator.gradient_state, sync_gradients=value)

    def loss_scale(self) -> Tensor | None:
        scaler: Any = self._accelerator.scaler
        return None if scaler is None else scaler.scale(torch.ones((), device=self.device))

    def shares_state(self, scope_is_micro_batch: bool) -> bool:
        return self.processes == 1 or not scope_is_micro_batch

    @property
    def place(self) -> tuple[int, int]:
        return self._accelerator.process_index, self.processes

    def sum_over_processes(self, numbers: Sequence[Tensor]) -> Tensor:
        own = super().sum_over_processes(numbers)
        total: Tensor = self._accelerator.reduce(own, reduction="sum")
        return total


@contextmanager
def _unused_parameters_explained() -> Iterator[None]:
    """Explain DDP's error where the gradient of another loss was set aside."""
    try:
        yield
    except RuntimeError as error:
        if "still allreduced" not in str(error):
            raise
        raise RuntimeError(
            "A parameter that the loss does not use has a gradient from another backward pass (of "
            "a penalty?), which DDP with find_unused_parameters cannot reduce separately from that "
            "of the loss. Add what computes it to the loss in compute_loss, leave unused "
            "parameters out of it, or set sam_rho=0."
        ) from error


def all_reduce_(tensors: Sequence[Tensor]) -> None:
    """Sum tensors over the processes in place, in buckets as large as DDP's."""
    works = []
    for members in by_device(tensors):
        some = [tensors[i] for i in members]
        for bucket in _take_tensors(some, _BUCKET_BYTES):  # type: ignore[no-untyped-call]
            flat = _flatten_dense_tensors(bucket)  # type: ignore[no-untyped-call]
            works.append((dist.all_reduce(flat, async_op=True), flat, bucket))
    for work, flat, bucket in works:
        assert work is not None
        work.wait()
        parts = _unflatten_dense_tensors(flat, bucket)  # type: ignore[no-untyped-call]
        torch._foreach_copy_(bucket, list(parts))
