"""GSAM in float64 and plain torch, written from the paper: the oracle for the trainer's tests.

Zhuang et al., "Surrogate Gap Minimization Improves Sharpness-Aware Training",
https://arxiv.org/abs/2203.08065, Algorithm 1:

    rho_t  = rho_min + (rho_max - rho_min) (lr_t - lr_min) / (lr_max - lr_min)
    e      = rho_t g / |g|,   g = grad L(w),   g_s = grad L(w + e)
    g      = g_par + g_perp,  g_par = (g . g_s / |g_s|^2) g_s
    update = g_s - alpha g_perp

The step along -g_perp changes the loss at w + e to second order only, and raises the loss at w, so
it narrows the surrogate gap L(w + e) - L(w).

The decomposition treats all parameters as one vector: those with a gradient at both points,
perturbed or not. Where g_s is zero there is no direction to be orthogonal to, and it is returned
as it is; the formula would leave the ascent direction -alpha g.
"""

from __future__ import annotations

from reference_sam import Gradient, Loss, Readings, norm, reciprocal, sam_step, value_and_grad
from torch import Tensor


def gsam_step(
    w: list[Tensor],
    batch_losses: list[Loss],
    rho: float,
    alpha: float,
    *,
    perturbed: list[bool] | None = None,
) -> tuple[Gradient, list[Readings]]:
    """Return g_s - alpha g_perp and the `Readings` of its perturbation, which is SAM's."""
    _, g = value_and_grad(lambda w: sum(L(w) for L in batch_losses), w)
    g_s, readings = sam_step(w, batch_losses, rho, perturbed=perturbed)
    return gsam_gradient(g, g_s, alpha), readings


def gsam_gradient(g: Gradient, g_s: Gradient, alpha: float) -> Gradient:
    """g_s - alpha (g - (g . g_s / |g_s|^2) g_s); g_s alone for a parameter without g."""
    inverse = reciprocal(norm(both(g_s, g))) ** 2
    if not inverse:
        return g_s
    projection = dot(g, g_s) * inverse
    return [
        b if a is None or b is None else b - alpha * (a - projection * b)
        for a, b in zip(g, g_s, strict=True)
    ]


def gsam_rho(
    rho_max: float, rho_min: float, lr: float, lr_max: float, lr_min: float = 0.0
) -> float:
    """The radius that goes with the learning rate lr; rho_max where that is constant."""
    if lr_max == lr_min:
        return rho_max
    return rho_min + (rho_max - rho_min) * (lr - lr_min) / (lr_max - lr_min)


def dot(a: Gradient, b: Gradient) -> float:
    """a . b over the parameters that have both."""
    return sum(
        (x * y).sum().item() for x, y in zip(a, b, strict=True) if x is not None and y is not None
    )


def both(a: Gradient, b: Gradient) -> Gradient:
    """a, without the parameters that have no b."""
    return [None if y is None else x for x, y in zip(a, b, strict=True)]
