"""WSAM in float64 and plain torch, written from the paper: the oracle for the trainer's tests.

Yue et al., "Sharpness-Aware Minimization Revisited: Weighted Sharpness as a Regularization Term",
https://arxiv.org/abs/2305.15817. The loss is L(w) with its sharpness as a weighted regulariser,

    L(w) + gamma / (1 - gamma) (L(w + e) - L(w)),   e = rho g / |g|

so gamma = 0 is the base optimizer and gamma = 1/2 is SAM. With g_s = grad L(w + e):

    coupled:    base step on  g + gamma / (1 - gamma) (g_s - g)
    decoupled:  base step on  g,  then  w = w - lr gamma / (1 - gamma) (g_s - g)

The decoupled form, the default of the authors' code, keeps the sharpness term out of the base
optimizer's moments, as AdamW does with weight decay. Both gradients are those at the weights
before the step. Every parameter with a gradient takes part, perturbed or not; a gradient that is
missing at one of the two points counts as zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from reference_optimizers import State, adamw_step, sgd_step
from reference_sam import Gradient, Loss, add, sam_step, value_and_grad
from torch import Tensor


def wsam_coupled(
    w: list[Tensor],
    batch_losses: list[Loss],
    rho: float,
    gamma: float,
    *,
    perturbed: list[bool] | None = None,
) -> Gradient:
    """g + gamma / (1 - gamma) (g_s - g)"""
    g, sharpness = gradient_and_sharpness(w, batch_losses, rho, perturbed)
    weight = gamma / (1 - gamma)
    return [add(a, None if s is None else weight * s) for a, s in zip(g, sharpness, strict=True)]


def wsam_decoupled_sgd_step(
    w: list[Tensor],
    batch_losses: list[Loss],
    state: State,
    rho: float,
    gamma: float,
    lr: float,
    mu: float = 0.0,
    weight_decay: float = 0.0,
    *,
    perturbed: list[bool] | None = None,
) -> tuple[list[Tensor], State]:
    """The decoupled form on SGD; returns the new weights and the optimizer's state."""
    return decoupled_step(
        w,
        batch_losses,
        state,
        rho,
        gamma,
        lr,
        sgd_step,
        perturbed,
        mu=mu,
        weight_decay=weight_decay,
    )


def wsam_decoupled_adamw_step(
    w: list[Tensor],
    batch_losses: list[Loss],
    state: State,
    rho: float,
    gamma: float,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    *,
    perturbed: list[bool] | None = None,
) -> tuple[list[Tensor], State]:
    """The decoupled form on AdamW: the sharpness term is not divided by the second moment."""
    return decoupled_step(
        w,
        batch_losses,
        state,
        rho,
        gamma,
        lr,
        adamw_step,
        perturbed,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
    )


def decoupled_step(
    w: list[Tensor],
    batch_losses: list[Loss],
    state: State,
    rho: float,
    gamma: float,
    lr: float,
    base_step: Callable[..., tuple[list[Tensor], State]],
    perturbed: list[bool] | None,
    **options: Any,
) -> tuple[list[Tensor], State]:
    g, sharpness = gradient_and_sharpness(w, batch_losses, rho, perturbed)
    w, state = base_step(w, g, state, lr, **options)
    weight = lr * gamma / (1 - gamma)
    return [
        w_i if s is None else w_i - weight * s for w_i, s in zip(w, sharpness, strict=True)
    ], state


def gradient_and_sharpness(
    w: list[Tensor], batch_losses: list[Loss], rho: float, perturbed: list[bool] | None
) -> tuple[Gradient, Gradient]:
    """g and g_s - g, the gradient of the sharpness L(w + e) - L(w) with e held fixed."""
    _, g = value_and_grad(lambda w: sum(L(w) for L in batch_losses), w)
    g_s, _ = sam_step(w, batch_losses, rho, perturbed=perturbed)
    minus_g = [None if a is None else torch.neg(a) for a in g]
    return g, [add(s, m) for s, m in zip(g_s, minus_g, strict=True)]
