"""What the optimizer gets of g and g_s, where a method gives it more than g_s."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .backends import Backend
from .methods import Method, State
from .perturbation import HALF


class Combination:
    """Keeps g during the descent pass, and calls the method's `combine`, `reuse`, `before_step`,
    `after_step`.

    All trained parameters of the model take part, perturbed or not: the gradients of the papers
    are those of the whole loss. Those of a loss that owns parameters keep g_s.

    Args:
        trained: the trained parameters by name.
        optimizer: the optimizer, wrapped by Accelerate or not.
    """

    def __init__(
        self,
        method: Method,
        state: State,
        backend: Backend,
        trained: Mapping[str, Tensor],
        optimizer: Any,
    ) -> None:
        self._method, self._state, self._backend = method, state, backend
        self._trained = trained
        self._kept: dict[str, Tensor] = {}
        self._pending: dict[str, Tensor] = {}
        self.rho = 0.0
        """That of the update; 0 where it is a plain one."""
        self._hooks: list[Any] = []
        if method.steps_too() and optimizer is not None:
            # The scaler of fp16 may skip the optimizer's step: then these are not called.
            unwrapped = getattr(optimizer, "optimizer", optimizer)
            self._hooks = [
                unwrapped.register_step_pre_hook(self._before_step),
                unwrapped.register_step_post_hook(self._after_step),
            ]

    def forget(self) -> None:
        """Drop what an update has left that did not come to its step."""
        self._kept, self._pending = {}, {}

    def close(self) -> None:
        self.forget()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    # ---- In an update with two passes --------------------------------------------------------

    def keep(self) -> None:
        """Keep g, which is in `.grad`."""
        if self._method.keeps_gradient():
            names, parameters = self._with_gradient()
            self._kept = dict(zip(names, self._backend.kept_gradients(parameters), strict=True))

    @torch.no_grad()
    def combine(self) -> None:
        """Make of g and of g_s, which is in `.grad`, what the optimizer gets."""
        kept, self._kept = self._kept, {}
        found = {n: p for n, p in self._trained.items() if n in kept and p.grad is not None}
        if not found:
            return
        names, parameters = list(found), list(found.values())
        written = self._backend.writable_gradients(parameters)
        grads, descent_grads = [_wide(kept[name]) for name in names], [_wide(g) for g in written]
        dot = self._backend.dot_over(parameters)
        pending = self._method.combine(names, grads, descent_grads, dot, self._state)
        _write(written, descent_grads)
        if pending is not None:
            self._backend.unscale_(pending)
            self._pending = dict(zip(names, pending, strict=True))

    # ---- In an update with one ---------------------------------------------------------------

    @torch.no_grad()
    def reuse(self) -> None:
        """Make of g, which is in `.grad`, what the optimizer gets."""
        names, parameters = self._with_gradient()
        written = self._backend.writable_gradients(parameters)
        grads = [_wide(g) for g in written]
        self._method.reuse(names, grads, self._backend.dot_over(parameters), self._state)
        _write(written, grads)

    # ---- Beside the optimizer's step ---------------------------------------------------------

    @torch.no_grad()
    def _before_step(self, optimizer: Any, *args: Any) -> None:
        if self.rho > 0 and not _skips(optimizer):
            names, parameters = self._with_gradient()
            weights = self._backend.local(parameters)
            grads = self._backend.writable_gradients(parameters)
            rates = self._learning_rates(optimizer, parameters)
            self._method.before_step(names, weights, grads, rates, self.rho)

    @torch.no_grad()
    def _after_step(self, optimizer: Any, *args: Any) -> None:
        pending, self._pending = self._pending, {}
        if self.rho > 0 and not _skips(optimizer):
            parameters = list(self._trained.values())
            weights = self._backend.local(parameters)
            rates = self._learning_rates(optimizer, parameters)
            self._method.after_step(list(self._trained), weights, pending, rates, self.rho)

    def _learning_rates(self, optimizer: Any, parameters: list[Tensor]) -> list[float]:
        rates = {id(p): float(g["lr"]) for g in optimizer.param_groups for p in g["params"]}
        return [rates.get(id(p), 0.0) for p in parameters]

    def _with_gradient(self) -> tuple[list[str], list[Tensor]]:
        found = {name: p for name, p in self._trained.items() if p.grad is not None}
        return list(found), list(found.values())


def momentum_of(optimizer: Any, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The optimizer's momentum of the parameters that have one, by their names.

    Raises:
        ValueError: the optimizer keeps none that could be read.
    """
    found: dict[str, Tensor] = {}
    for name, p in parameters.items():
        kept = optimizer.state.get(p) or {}
        values = [kept.get("momentum_buffer"), kept.get("exp_avg")]
        usable = [v for v in values if isinstance(v, Tensor) and v.is_floating_point()]
        if usable:
            found[name] = usable[0]
        elif kept or not _will_keep_momentum(optimizer):
            raise ValueError(
                f"sam_method='msam' needs the optimizer's momentum, and {type(optimizer).__name__} "
                f"keeps {', '.join(map(str, kept)) or 'nothing'} for {name}. Allowed: an optim "
                "with momentum_buffer or exp_avg, such as 'adamw_torch', or 'sgd' with "
                "optim_args='momentum=0.9'."
            )
    return found


def _will_keep_momentum(optimizer: Any) -> bool:
    """Whether an optimizer that has not stepped yet is one with a momentum."""
    return any(group.get("momentum") or group.get("betas") for group in optimizer.param_groups)


def _skips(optimizer: Any) -> bool:
    """Whether a fused optimizer, which fp16's scaler calls in any case, will skip this step."""
    found: Tensor | None = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found.item())


def _wide(grad: Tensor) -> Tensor:
    """In fp32 where it is stored in half precision, which holds neither sums nor small factors."""
    return grad.float() if grad.dtype in HALF else grad


def _write(stored: list[Tensor], results: list[Tensor]) -> None:
    if any(s is not r for s, r in zip(stored, results, strict=True)):
        torch._foreach_copy_(stored, results)
