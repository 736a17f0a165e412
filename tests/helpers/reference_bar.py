"""BAR in float64 and plain torch, written from the paper: the oracle for the trainer's tests.

Li, Zhang and He, "Implicit Regularization of Sharpness-Aware Minimization for Scale-Invariant
Problems", https://arxiv.org/abs/2410.14802, Algorithms 2 (nBAR) and 3 (oBAR). On a loss of the
product of two factors x and y, SAM draws |x|^2 - |y|^2 towards zero. BAR does that to the factors
of each LoRA layer by themselves, without a second gradient. At step t, with the gradients at hand
and before the optimizer's update:

    nBAR:  |g_x| >= |g_y|:  x = (1 + alpha_t eta_t) x,  y = (1 - alpha_t eta_t) y
           otherwise:       x = (1 - alpha_t eta_t) x,  y = (1 + alpha_t eta_t) y
    oBAR:  |x| >= |y|:      x = (1 - alpha_t eta_t) x,  y = (1 + alpha_t eta_t) y
           otherwise:       x = (1 + alpha_t eta_t) x,  y = (1 - alpha_t eta_t) y

eta_t is the learning rate, and all norms are Frobenius norms of one layer's factor or its
gradient. So nBAR lets the factor with the longer gradient grow, and oBAR shrinks the longer
factor. It is weight decay of strength alpha on one factor and of -alpha on the other. The
optimizer then steps from the rescaled factors with the gradients of the old ones.

x and y enter alike but for ties. Here x is A and y is B, as the paper starts LoRA from a random x
and y = 0. A gradient that is not finite (the paper has none) leaves both factors alone.

alpha_t falls from alpha_0 (the appendix calls it mu_0) to zero, or stays: the paper names linear,
cosine and constant schedules without their formulas, which are the usual ones here.
"""

# ruff: noqa: N803, N806 - the names are the paper's symbols

from __future__ import annotations

import math

from torch import Tensor


def nbar(
    A: Tensor, B: Tensor, g_A: Tensor, g_B: Tensor, alpha: float, eta: float
) -> tuple[Tensor, Tensor]:
    """The factor with the longer gradient grows, the other shrinks."""
    norm_A, norm_B = g_A.norm().item(), g_B.norm().item()
    if not (math.isfinite(norm_A) and math.isfinite(norm_B)):
        return A, B
    sign = 1 if norm_A >= norm_B else -1
    return (1 + sign * alpha * eta) * A, (1 - sign * alpha * eta) * B


def obar(A: Tensor, B: Tensor, alpha: float, eta: float) -> tuple[Tensor, Tensor]:
    """The longer factor shrinks, the other grows."""
    sign = -1 if A.norm().item() >= B.norm().item() else 1
    return (1 + sign * alpha * eta) * A, (1 - sign * alpha * eta) * B


def bar_alpha(alpha_0: float, t: int, T: int, schedule: str = "linear") -> float:
    """alpha_t at step t of T, from 0."""
    if schedule == "linear":
        return alpha_0 * (1 - t / T)
    if schedule == "cosine":
        return alpha_0 * (1 + math.cos(math.pi * t / T)) / 2
    if schedule == "constant":
        return alpha_0
    raise ValueError(f"no schedule {schedule!r}")
