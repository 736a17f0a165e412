"""Each process holds all weights: one process alone, several devices in one, and DDP."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from ..methods import Dot
from ..methods.lists import scale_
from ..perturbation import HALF
from ..side_effects import shadowed
from .graph import reaches_its_parameters


class Backend:
    """Numbers over all weights, and what the processes have to say to each other.

    The maths of the methods receives one primitive, `dot`, and never asks where it runs. The other
    layouts derive from this one and say what they do differently.

    Args:
        weights: the perturbed parameters.
        accelerator: Accelerate's, which knows the processes and the loss scale.
        n_devices: the accelerators that this process spreads its batches over (`DataParallel`).
        is_compiled: whether `torch.compile` has made another program of the model.
    """

    def __init__(
        self,
        weights: Sequence[nn.Parameter],
        accelerator: Accelerator,
        n_devices: int = 1,
        is_compiled: bool = False,
    ) -> None:
        self._accelerator = accelerator
        self._device = weights[0].device if weights else torch.device("cpu")
        is_double = any(w.dtype is torch.float64 for w in weights)
        self.accumulate_in = torch.float64 if is_double else torch.float32
        self.rng_devices = {w.device for w in weights if w.device.type != "cpu"}
        if self.rng_devices and n_devices > 1:
            self.rng_devices |= {torch.device(self._device.type, i) for i in range(n_devices)}
        self.half = any(w.dtype in HALF and w.requires_grad for w in weights)
        self._reaches_parameters: bool | None = None
        self._is_compiled = is_compiled

    # ---- Where in the run --------------------------------------------------------------------

    @property
    def is_end_of_update(self) -> bool:
        """Whether this micro-batch is the last one of its update."""
        return bool(self._accelerator.sync_gradients)

    @property
    def is_end_of_epoch(self) -> bool:
        loader = self._accelerator.gradient_state
        return bool(loader.end_of_dataloader or not loader.in_dataloader)

    # ---- The passes --------------------------------------------------------------------------

    @property
    def reduces_kept_gradients(self) -> bool:
        """Whether the next backward pass sums up over the processes all that `.grad` holds, also
        what earlier micro-batches have left there."""
        # With sync_each_batch the Trainer lets every backward pass reduce. What is kept must then
        # stay in `.grad`: with gradient_as_bucket_view it is a view of what such a pass writes.
        options = self._accelerator.gradient_state.plugin_kwargs
        is_reduced = self.is_end_of_update or bool(options.get("sync_each_batch", False))
        return self._accelerator.num_processes > 1 and is_reduced

    def descent_is_awaited(self, each_alone: bool) -> bool:
        """Whether the pass at w + e must run even where nothing was perturbed in this process.

        Where the ascent was not reduced, the other processes wait for the pass that is.
        """
        return each_alone and self.reduces_kept_gradients

    def ascent(self, model: nn.Module, each_alone: bool) -> AbstractContextManager[Any]:
        """Around the pass at w, forward and backward.

        With `each_alone`, the micro-batch has an e of its own, and its gradient stays here.
        """
        return self._without_reduction(model) if each_alone else nullcontext()

    @property
    def can_take_some_gradients(self) -> bool:
        """Whether `ascent_for` works here, and computes less."""
        # Several processes would not all have seen the same: they go on with `ascent_for`.
        if self._reaches_parameters is False and self._accelerator.num_processes == 1:
            return False
        handler = self._accelerator.ddp_handler
        is_static = handler is not None and handler.static_graph
        return self._accelerator.num_processes == 1 or not is_static

    @contextmanager
    def ascent_for(
        self, weights: Sequence[Tensor], model: nn.Module, each_alone: bool
    ) -> Iterator[None]:
        """As `ascent`, for the gradients of `weights` alone: those of others are not computed,
        unless the first graph of the run hides where they come from.

        DDP would wait for the others in its reduction: it is left out, and made up for.
        """
        whole = self._accelerator.backward

        def backward(loss: Tensor, **kwargs: Any) -> None:
            if self._reaches_parameters is None:
                self._reaches_parameters = reaches_its_parameters(loss)
            some = {"inputs": list(weights)} if self._reaches_parameters else {}
            whole(loss, **kwargs, **some)

        with self._without_reduction(model), shadowed(self._accelerator, backward=backward):
            yield
        if self.is_end_of_update and not each_alone:
            self.reduce_ascent(weights)

    def reduce_ascent(self, weights: Sequence[Tensor]) -> None:
        """Put the mean over the processes in the place of gradients that were not reduced."""
        if self._accelerator.num_processes == 1:
            return
        # Another process may have a gradient where this one has none.
        grads = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
        torch._foreach_div_(grads, self._accelerator.num_processes)
        for work in [dist.all_reduce(g, async_op=True) for g in grads]:
            work.wait()
        for w, g in zip(weights, grads, strict=True):
            w.grad = g

    def replaying(
        self, model: nn.Module, is_last: bool, each_alone: bool
    ) -> AbstractContextManager[Any]:
        """Around each pass at w + e. Only the last one of the scope reduces, for all of them."""
        return nullcontext() if is_last else self._without_reduction(model)

    @contextmanager
    def _without_reduction(self, model: nn.Module) -> Iterator[None]:
        with self._accelerator.no_sync(model):
            yield

    @contextmanager
    def _as_end_of_update(self, value: bool) -> Iterator[None]:
        """Let others take the passes inside for those of the last micro-batch, or not."""
        before = self._accelerator.sync_gradients
        self._accelerator.sync_gradients = value
        try:
            yield
        finally:
            self._accelerator.sync_gradients = before

    @contextmanager
    def descent(self, put_back: Callable[[], None]) -> Iterator[None]:
        """Around all passes at w + e: calls `put_back` when g_s is complete, before any step."""
        yield
        put_back()

    def recover(self, model: nn.Module) -> None:
        """After a failure at w + e: forget what the pass has left of it beside the weights."""

    # ---- Reading and writing -----------------------------------------------------------------

    def local(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """What this process holds of the weights: tensors that share their memory."""
        return list(weights)

    def local_as(self, weights: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
        """As `local`, of tensors that belong to these weights, cut as these are."""
        return self.local(tensors)

    def holds_gradients(self, weights: Sequence[Tensor]) -> bool:
        """Whether micro-batches of the current update may have left gradients."""
        return any(w.grad is not None for w in weights)

    def gradients(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """g for the method to work on. fp16 cannot hold T² g (below 6e-8 it is 0): it gets fp32."""
        grads = self.local_gradients(weights)
        return [g.float() if g.dtype is torch.float16 else g for g in grads]

    def descent_gradients(self, weights: Sequence[Tensor]) -> list[Tensor | None]:
        """g_s, where this layout lets it be read; of as many tensors as `weights` has."""
        grads = iter(self.local_gradients(weights))
        return [None if w.grad is None else next(grads) for w in weights]

    def local_gradients(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """The gradients of those weights that have one, as `local` gives the weights."""
        return self.local([w.grad for w in weights if w.grad is not None])

    def writable_gradients(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """As `local_gradients`, in the memory of what the optimizer will read."""
        return self.local_gradients(weights)

    def kept_gradients(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """As `local_gradients`, in memory that the next backward pass does not write."""
        handler = self._accelerator.ddp_handler
        is_view = handler is not None and handler.gradient_as_bucket_view
        grads = self.local_gradients(weights)
        # A compiled model may leave its gradients in the memory of a captured graph.
        return [g.clone() for g in grads] if is_view or self._is_compiled else grads

    def loss_scale(self) -> Tensor | None:
        """The factor of fp16's loss scaling that is in the gradients, on the device."""
        scaler = self._accelerator.scaler
        return None if scaler is None else scaler.scale(torch.ones((), device=self._device))

    def unscaled(self, norm: Tensor) -> Tensor:
        """A norm of gradients without the factor of fp16's loss scaling."""
        scale = self.loss_scale()
        return norm if scale is None else norm / scale

    def unscale_(self, grads: Sequence[Tensor]) -> None:
        """Take the factor of fp16's loss scaling out of gradients."""
        scale = self.loss_scale()
        if scale is not None:
            scale_(grads, 1 / scale)

    # ---- Numbers -----------------------------------------------------------------------------

    def shares_state(self, each_alone: bool) -> bool:
        """Whether what a method makes of gradients is the same on every process."""
        return self._accelerator.num_processes == 1 or not each_alone

    @property
    def place(self) -> tuple[int, int]:
        """The number of this process, and of how many."""
        return self._accelerator.process_index, self._accelerator.num_processes

    def sum_over_processes(self, numbers: Sequence[Tensor]) -> Tensor:
        """The numbers as one tensor, added up over the processes, which must all call this."""
        # In float64 for float64 weights alone: not every device has it.
        total = torch.stack([n.detach().to(self._device, self.accumulate_in) for n in numbers])
        if self._accelerator.num_processes > 1:
            total = self._accelerator.reduce(total, reduction="sum")
        return total

    def dot_over(self, weights: Sequence[Tensor]) -> Dot:
        """The inner product of lists that have one tensor for each of these weights."""
        return self.dot

    def dot(self, xs: list[Tensor], ys: list[Tensor]) -> Tensor:
        """The inner product over all tensors, accumulated in fp32 (float64 for float64 weights)."""
        if not xs:
            return torch.zeros((), dtype=self.accumulate_in, device=self._device)
        if xs is ys and xs[0].device.type != "cpu":
            norms = torch._foreach_norm(xs, 2, dtype=self.accumulate_in)
            return torch.stack([n.to(self._device) for n in norms]).square_().sum()
        # There is no multi-tensor inner product, and one made of multi-tensor operations would
        # write a copy of the weights. On a CPU this is also the norm: `vector_norm` adds up one
        # after the other, which is slower and, on 1e6 numbers, fifty times less exact.
        products = [
            _inner_product(
                x.flatten().to(self.accumulate_in), y.flatten().to(self.accumulate_in)
            ).to(self._device)
            for x, y in zip(xs, ys, strict=True)
        ]
        return torch.stack(products).sum()


# Some processors' kernels add one number after the other: over more of them, the sum in fp32 is
# wrong in its sixth digit.
_CHUNK = 2**15


def _inner_product(x: Tensor, y: Tensor) -> Tensor:
    size = _CHUNK if x.device.type == "cpu" else max(x.numel(), 1)
    pairs = zip(torch.split(x, size), torch.split(y, size), strict=True)
    return torch.stack([torch.linalg.vecdot(a, b) for a, b in pairs]).sum()
