"""ASAM in float64 and plain torch, written from the paper: the oracle for the trainer's tests.

Kwon et al., "ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep
Neural Networks", https://arxiv.org/abs/2102.11600, equation 7 with p = 2 and the element-wise
normalization operator of its Algorithm 1:

    T(w) = |w| + eta
    e(w) = rho * T^2 g / |T g|_2,   so that |T^-1 e|_2 = rho

The paper keeps T = 1 on the biases; `adaptive` says for each parameter which form it has.
Everything else is as in `reference_sam.py`.
"""

# ruff: noqa: N806 - the names are the paper's symbols

from __future__ import annotations

import torch
from reference_sam import (
    Gradient,
    Loss,
    Readings,
    norm,
    reciprocal,
    sharpness_aware_step,
    times,
)
from torch import Tensor


def asam_step(
    w: list[Tensor],
    batch_losses: list[Loss],
    rho: float,
    eta: float,
    *,
    adaptive: list[bool] | None = None,
    scope: str = "batch",
    perturbed: list[bool] | None = None,
) -> tuple[Gradient, list[Readings]]:
    """Return g_s and one `Readings` per perturbation; `adaptive` None: T = |w| + eta on all."""
    flags = [True] * len(w) if adaptive is None else adaptive
    return sharpness_aware_step(
        w, batch_losses, lambda w, g: asam_perturbation(w, g, rho, eta, flags), scope, perturbed
    )


def asam_perturbation(
    w: list[Tensor], g: Gradient, rho: float, eta: float, adaptive: list[bool]
) -> list[Tensor | None]:
    """e = rho * T^2 g / |T g|_2"""
    T = normalization(w, eta, adaptive)
    Tg = [None if g_i is None else T_i * g_i for T_i, g_i in zip(T, g, strict=True)]
    scale = rho * reciprocal(norm(Tg))
    return [None if x is None else times(scale, T_i * x) for T_i, x in zip(T, Tg, strict=True)]


def normalization(w: list[Tensor], eta: float, adaptive: list[bool]) -> list[Tensor]:
    """The diagonal of T: |w| + eta, or 1."""
    return [
        w_i.abs() + eta if flag else torch.ones_like(w_i)
        for w_i, flag in zip(w, adaptive, strict=True)
    ]
