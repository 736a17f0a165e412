"""The gradient that the optimizer gets, for methods that combine g with g_s or act on the step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..methods.base import Floats, Method, Named, Radius, State, Tensors
from .layout import Layout
from .perturbation import HALF


class GradientCombiner:
    """Keeps g during the descent pass, and calls a method's `combine`, `reuse` and step functions.

    All trained parameters of the model take part, perturbed or not: the gradients in the papers are
    those of the whole loss. Parameters of a loss that are not the model's get g_s.
    """

    def __init__(
        self, method: Method, state: State, layout: Layout, trained: Named, optimizer: Any
    ) -> None:
        self._method, self._state, self._layout = method, state, layout
        self._trained = trained
        self.rho: Radius = 0.0
        """rho of the current update; 0 where it is plain."""
        self.discard()
        self._hooks: list[Any] = []
        if method.acts_on_step and optimizer is not None:
            # Hooks of the optimizer itself, whose step the gradient scaler of fp16 may skip.
            unwrapped = getattr(optimizer, "optimizer", optimizer)
            self._hooks = [
                unwrapped.register_step_pre_hook(self._before_step),
                unwrapped.register_step_post_hook(self._after_step),
            ]

    def discard(self) -> None:
        """Drop what was kept for an optimizer step that was not reached."""
        self._kept: dict[str, Tensor] = {}
        self._pending: dict[str, Tensor] = {}

    @property
    def is_pending(self) -> bool:
        """Whether a part of the latest update's gradient waits for the optimizer step."""
        return bool(self._pending)

    def close(self) -> None:
        self.discard()
        for hook in self._hooks:
            hook.remove()

    @property
    def _is_on(self) -> bool:
        return isinstance(self.rho, Tensor) or self.rho > 0

    def keep(self) -> None:
        """Keep g, which `.grad` holds."""
        names, parameters = self._with_gradient(self._trained)
        self._kept = dict(zip(names, self._layout.kept_gradients(parameters), strict=True))

    @torch.no_grad()
    def combine(self) -> None:
        """Turn g_s, which `.grad` holds, into what the optimizer gets."""
        kept, self._kept = self._kept, {}
        names, parameters = self._with_gradient(kept)
        if not names:
            return
        dot = self._layout.dot_over(parameters)
        with self._overwriting(parameters) as descent_grads:
            grads = _wide([kept[name] for name in names])
            pending = self._method.combine(names, grads, descent_grads, dot, self._state)
        if pending is not None:
            self._layout.unscale_(pending)
            self._pending = dict(zip(names, pending, strict=True))

    @torch.no_grad()
    def reuse(self) -> None:
        """Turn g of an update with one pass, which `.grad` holds, into what the optimizer gets."""
        names, parameters = self._with_gradient(self._trained)
        with self._overwriting(parameters) as grads:
            self._method.reuse(names, grads, self._layout.dot_over(parameters), self._state)

    @contextmanager
    def _overwriting(self, parameters: Tensors) -> Iterator[Tensors]:
        """The gradients; what the list holds at the end is what the optimizer gets."""
        stored = self._layout.writable_gradients(parameters)
        results = _wide(stored)
        yield results
        if any(s is not r for s, r in zip(stored, results, strict=True)):
            torch._foreach_copy_(stored, results)

    @torch.no_grad()
    def _before_step(self, optimizer: Any, *args: Any) -> None:
        if self._is_on and not _skips(optimizer):
            names, parameters = self._with_gradient(self._trained)
            weights, rates = self._stepped(optimizer, parameters)
            grads = self._layout.writable_gradients(parameters)
            self._method.before_step(names, weights, grads, rates, self.rho)

    @torch.no_grad()
    def _after_step(self, optimizer: Any, *args: Any) -> None:
        pending, self._pending = self._pending, {}
        if self._is_on and not _skips(optimizer):
            weights, rates = self._stepped(optimizer, list(self._trained.values()))
            self._method.after_step(list(self._trained), weights, pending, rates, self.rho)

    def _stepped(self, optimizer: Any, parameters: Tensors) -> tuple[Tensors, Floats]:
        """The local weights, and their learning rates."""
        rates = {id(p): float(g["lr"]) for g in optimizer.param_groups for p in g["params"]}
        return self._layout.local(parameters), [rates.get(id(p), 0.0) for p in parameters]

    def _with_gradient(self, among: Mapping[str, object]) -> tuple[list[str], Tensors]:
        found = {n: p for n, p in self._trained.items() if n in among and p.grad is not None}
        return list(found), list(found.values())


def momentum_of(optimizer: Any, parameters: Named) -> dict[str, Tensor]:
    """The optimizer's momentum, by parameter name, for the parameters that have one.

    ValueError if the optimizer keeps no momentum, or not as a floating-point tensor.
    """
    found: dict[str, Tensor] = {}
    for name, p in parameters.items():
        kept = optimizer.state.get(p) or {}
        momentum = kept.get("momentum_buffer", kept.get("exp_avg"))
        if isinstance(momentum, Tensor) and momentum.is_floating_point():
            found[name] = momentum
        # Before its first step an optimizer with momentum keeps nothing.
        elif kept or not any(g.get("momentum") or g.get("betas") for g in optimizer.param_groups):
            raise ValueError(
                f"sam_method='msam' needs the optimizer's momentum, and {type(optimizer).__name__} "
                f"keeps {', '.join(map(str, kept)) or 'nothing'} for {name}. Allowed: an optim "
                "with momentum_buffer or exp_avg, such as 'adamw_torch', or 'sgd' with "
                "optim_args='momentum=0.9'."
            )
    return found


def _skips(optimizer: Any) -> bool:
    """Whether a fused optimizer, which fp16's gradient scaler always calls, skips the step."""
    found: Tensor | None = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found.item())


def _wide(grads: Tensors) -> Tensors:
    """The gradients, in fp32 where stored in half precision, for sums and small factors."""
    return [g.float() if g.dtype in HALF else g for g in grads]
