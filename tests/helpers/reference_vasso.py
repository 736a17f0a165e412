"""VaSSO in float64 and plain torch, written from the paper: the oracle for the trainer's tests.

Li and Giannakis, "Enhancing Sharpness-Aware Optimization Through Variance Suppression",
https://arxiv.org/abs/2309.15639. SAM ascends along a moving average d of the
gradients at the clean weights, which varies less from batch to batch than one of them:

    d_0 = g_0
    d_t = (1 - theta) d_{t-1} + theta g_t,   g_t = grad L_t(w_t)
    e_t = rho d_t / |d_t|
    g_s = grad L_t(w_t + e_t)

theta = 1 is SAM. d exists for the perturbed parameters. A parameter's d starts with its first
gradient; a parameter without a gradient keeps its d and is not perturbed.

The paper has no gradient that is zero or not finite. Here such a g leaves d as it was, and there
is no perturbation.
"""

# ruff: noqa: N802 - the names are the paper's symbols

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from reference_sam import (
    Gradient,
    Loss,
    norm,
    reciprocal,
    sam_perturbation,
    value_and_grad,
)
from torch import Tensor

State = dict[str, Any]


def vasso_step(
    w: list[Tensor],
    batch_losses: list[Loss],
    rho: float,
    theta: float,
    state: State,
    *,
    perturbed: list[bool] | None = None,
) -> tuple[Gradient, State]:
    """Return g_s, and the state {"d": d_t} for the next step ({} before the first)."""

    def direction(g: Gradient, d_old: Gradient) -> tuple[Gradient, Gradient]:
        d = [
            old if a is None else a if old is None else torch.lerp(old, a, theta)
            for a, old in zip(g, d_old, strict=True)
        ]
        return d, d

    return averaged_step(w, batch_losses, rho, direction, state, "d", perturbed)


def averaged_step(
    w: list[Tensor],
    batch_losses: list[Loss],
    rho: float,
    direction: Callable[[Gradient, Gradient], tuple[Gradient, Gradient]],
    state: State,
    name: str,
    perturbed: list[bool] | None,
) -> tuple[Gradient, State]:
    """SAM along d, where `direction(g, average) -> (d, average)` moves the state's average."""

    def L(w: list[Tensor]) -> Tensor:
        return sum(L_i(w) for L_i in batch_losses)

    perturbed = [True] * len(w) if perturbed is None else perturbed
    _, g = value_and_grad(L, w)
    g = [a if flag else None for a, flag in zip(g, perturbed, strict=True)]
    if not reciprocal(norm(g)):
        _, g_s = value_and_grad(L, w)
        return g_s, state

    d, average = direction(g, state.get(name, [None] * len(w)))
    e = sam_perturbation([None if a is None else x for a, x in zip(g, d, strict=True)], rho)
    _, g_s = value_and_grad(
        L, [w_i if e_i is None else w_i + e_i for w_i, e_i in zip(w, e, strict=True)]
    )
    return g_s, {name: average}
