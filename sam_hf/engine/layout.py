"""How parameters and gradients are stored: the arithmetic over all of them, in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors

from ..methods.base import Dot, Tensors
from ..methods.lists import CHUNK, chunks
from .perturbation import HALF

Weights = Sequence[Tensor]
Context = AbstractContextManager[None]

_CPU_CHUNK = 2**15


class Layout:
    """One process that holds all weights. The layouts in `distributed` derive from it.

    The methods get one primitive, `dot`, and do not know where the tensors are. `weights` are the
    perturbed parameters, `model` has no wrappers, `is_compiled` is whether it is compiled.
    """

    reduces_kept_gradients = False
    """The next backward pass reduces all of `.grad` over the processes, including gradients of
    earlier micro-batches."""
    can_take_some_gradients = True
    """`ascent` can compute the gradients of some parameters only, at a lower cost."""
    grads_live_in_buffers = False
    """The next backward pass may write into the memory of the gradients of this one."""
    hides_gradients = False
    """Gradients are not in `.grad` before the last micro-batch of an update."""
    processes = 1

    def __init__(self, weights: Weights, model: nn.Module, is_compiled: bool = False) -> None:
        self.device = weights[0].device if weights else torch.device("cpu")
        is_double = any(w.dtype is torch.float64 for w in weights)
        self.accumulate_in = torch.float64 if is_double else torch.float32
        # Also devices that hold no perturbed parameter: their dropout masks must be replayed.
        devices = {p.device for p in model.parameters()}
        self.rng_devices = {d for d in devices if d.type not in ("cpu", "meta")}
        self.has_half_weights = any(w.dtype in HALF and w.requires_grad for w in weights)
        self.grads_live_in_buffers = is_compiled  # captured graphs reuse memory

    @property
    def device_type(self) -> str:
        """Type of the device of the perturbed parameters, such as 'cuda'."""
        return self.device.type

    def ascent(self, scope_is_micro_batch: bool, some: Weights = ()) -> Context:
        """Context of a pass at w. Computes the gradients of `some` parameters only; empty for all.

        With `scope_is_micro_batch`, the micro-batch has its own e: its gradient is not reduced.
        """
        return nullcontext()

    def reduce_ascent(self, weights: Weights) -> None:
        """Replace gradients that no backward pass has reduced by their mean over the processes."""

    def replaying(self, is_last: bool, scope_is_micro_batch: bool) -> Context:
        """Context of each pass at w + e. Only the last of a scope reduces, for all of them."""
        return nullcontext()

    def descent(self, passes: Callable[[], Tensor], restore: Callable[[], None]) -> Tensor:
        """Run all passes at w + e, and `restore` when g_s is complete; returns their loss."""
        loss = passes()
        restore()
        return loss

    def must_replay(self, scope_is_micro_batch: bool) -> bool:
        """Whether the passes at w + e must run even if this process perturbs nothing."""
        return False

    def recover(self) -> None:
        """Drop weights gathered at w + e, after a failure there."""

    def local(self, weights: Weights) -> Tensors:
        """This process's part of the parameters: tensors that share their memory."""
        return list(weights)

    def local_as(self, weights: Weights, tensors: Sequence[Tensor]) -> Tensors:
        """As `local`, for tensors that belong to these parameters, sharded like them."""
        return list(tensors)

    def gradients(self, weights: Weights) -> Tensors:
        """g for a method, in fp32 instead of fp16, where T^2 g would underflow (below 6e-8)."""
        grads = self.local_gradients(weights)
        return [g.float() if g.dtype is torch.float16 else g for g in grads]

    def descent_gradients(self, weights: Weights) -> list[Tensor | None]:
        """g_s, one entry for each parameter; None where it cannot be read."""
        grads = iter(self.local_gradients(weights))
        return [None if w.grad is None else next(grads) for w in weights]

    def local_gradients(self, weights: Weights) -> Tensors:
        """Gradients of the parameters that have one, as `local` gives the parameters."""
        return [w.grad for w in weights if w.grad is not None]

    def writable_gradients(self, weights: Weights) -> Tensors:
        """As `local_gradients`, in the memory that the optimizer reads."""
        return self.local_gradients(weights)

    def kept_gradients(self, weights: Weights) -> Tensors:
        """As `local_gradients`, in memory that the next backward pass does not write."""
        grads = self.local_gradients(weights)
        return [g.clone() for g in grads] if self.grads_live_in_buffers else grads

    def loss_scale(self) -> Tensor | None:
        """The factor of fp16's loss scaling in the gradients, on the device; None without one."""
        return None

    def unscaled(self, norm: Tensor) -> Tensor:
        """A norm of gradients without the loss scale."""
        scale = self.loss_scale()
        return norm if scale is None else norm / scale

    def unscale_(self, grads: Tensors) -> None:
        """Divide gradients by the loss scale, in place."""
        scale = self.loss_scale()
        if scale is not None:
            torch._foreach_mul_(grads, 1 / scale)

    def shares_state(self, scope_is_micro_batch: bool) -> bool:
        """Whether a method's state is the same on every process."""
        return True

    @property
    def place(self) -> tuple[int, int]:
        """Rank of this process, and number of processes."""
        return 0, 1

    def sum_over_processes(self, numbers: Sequence[Tensor]) -> Tensor:
        """The numbers as one tensor, summed over the processes, which must all call this."""
        return torch.stack([n.detach().to(self.device, self.accumulate_in) for n in numbers])

    def dot_over(self, weights: Weights) -> Dot:
        """The inner product of lists with one tensor for each of these parameters."""
        return self.dot

    def dot(self, xs: Tensors, ys: Tensors) -> Tensor:
        """Inner product over all tensors, accumulated in fp32 (float64 for float64 parameters).

        Small tensors are concatenated into chunks, so that the number of operations depends on the
        number of elements and not on that of tensors. The chunks are short on a CPU: the kernels of
        some processors sum sequentially, so that the fp32 sum of a longer chunk would be wrong in
        its sixth digit.
        """
        if not xs:
            return torch.zeros((), dtype=self.accumulate_in, device=self.device)
        on_cpu = xs[0].device.type == "cpu"
        if xs is ys and not on_cpu:
            norms = torch._foreach_norm(xs, 2, dtype=self.accumulate_in)
            return torch.stack([n.to(self.device) for n in norms]).square_().sum()
        size = _CPU_CHUNK if on_cpu else CHUNK
        if on_cpu and sum(map(Tensor.numel, xs)) <= size:
            x = self._flat(xs)
            return torch.dot(x, x if xs is ys else self._flat(ys))
        parts = []
        for members in chunks(xs, size):
            x = self._flat([xs[i] for i in members])
            y = x if xs is ys else self._flat([ys[i] for i in members])
            if on_cpu and x.numel() > size:
                pairs = zip(torch.split(x, size), torch.split(y, size), strict=True)
                parts += [torch.linalg.vecdot(a, b) for a, b in pairs]
            else:
                parts.append(torch.linalg.vecdot(x, y).to(self.device))
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum()

    def _flat(self, tensors: Tensors) -> Tensor:
        # Cast before they are concatenated, which needs a single dtype.
        wide = [t if t.dtype is self.accumulate_in else t.to(self.accumulate_in) for t in tensors]
        return _flatten_dense_tensors(wide)  # type: ignore[no-any-return,no-untyped-call]
