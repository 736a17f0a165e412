"""SAM in float64 and plain torch, written from the paper: the oracle for the trainer's tests.

Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization",
https://arxiv.org/abs/2010.01412, equation 2 with p = 2 and Algorithm 1:

    e(w) = rho * g / |g|_2,   g = grad L(w)
    g_s  = grad L(w + e(w))

The base optimizer then steps from w with g_s (`reference_optimizers.py`).

`batch_losses` holds one function per micro-batch of the update. It maps the list of parameters to
that micro-batch's share of the loss, already normalised, so that the shares add up to the loss of
the update. It must give the same value when it is called twice with the same parameters.

Norms and inner products run over the perturbed parameters: those flagged in `perturbed` that have
a gradient. The functions change nothing in place.
"""

# ruff: noqa: N803, N806 - the names are the paper's symbols

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Loss = Callable[[list[Tensor]], Tensor]
Gradient = list[Tensor | None]


@dataclass
class Readings:
    """What one perturbation did to the loss it was made for."""

    loss: float  # L(w)
    sharpness: float  # L(w + e) - L(w)
    e_norm: float  # |e|_2
    g_norm: float  # |g|_2
    cosine: float  # cos(g, g_s), nan where either is zero
    e: list[Tensor]  # per parameter, zeros where it is not perturbed


def sam_step(
    w: list[Tensor],
    batch_losses: list[Loss],
    rho: float,
    *,
    scope: str = "batch",
    perturbed: list[bool] | None = None,
) -> tuple[Gradient, list[Readings]]:
    """Return g_s (None for a parameter without gradient) and one `Readings` per perturbation.

    Scope "batch" has one e, from the summed gradient of all micro-batches. Scope "micro_batch" is
    the paper's m-sharpness: every micro-batch has an e of its own, and the g_s are summed.
    """
    return sharpness_aware_step(
        w, batch_losses, lambda w, g: sam_perturbation(g, rho), scope, perturbed
    )


def sam_perturbation(g: Gradient, rho: float) -> list[Tensor | None]:
    """e = rho * g / |g|_2"""
    scale = reciprocal(norm(g)) * rho
    return [None if g_i is None else times(scale, g_i) for g_i in g]


def sharpness_aware_step(
    w: list[Tensor],
    batch_losses: list[Loss],
    perturbation: Callable[[list[Tensor], Gradient], list[Tensor | None]],
    scope: str,
    perturbed: list[bool] | None,
) -> tuple[Gradient, list[Readings]]:
    """Algorithm 1 up to the base optimizer, for any `perturbation(w, g) -> e`."""
    assert all(w_i.dtype == torch.float64 for w_i in w), "the oracle works in float64"
    if scope == "batch":
        losses = [lambda w: sum(L(w) for L in batch_losses)]
    elif scope == "micro_batch":
        losses = batch_losses
    else:
        raise ValueError(f"scope {scope!r} is neither 'batch' nor 'micro_batch'")
    perturbed = [True] * len(w) if perturbed is None else perturbed

    g_s_sum: Gradient = [None] * len(w)
    readings = []
    for L in losses:
        L_w, g = value_and_grad(L, w)
        g = [g_i if flag else None for g_i, flag in zip(g, perturbed, strict=True)]
        e = [
            torch.zeros_like(w_i) if e_i is None else e_i
            for w_i, e_i in zip(w, perturbation(w, g), strict=True)
        ]
        L_s, g_s = value_and_grad(L, [w_i + e_i for w_i, e_i in zip(w, e, strict=True)])
        g_s_sum = [add(a, b) for a, b in zip(g_s_sum, g_s, strict=True)]
        readings.append(Readings(L_w, L_s - L_w, norm(e), norm(g), cosine(g, g_s), e))
    return g_s_sum, readings


def value_and_grad(L: Loss, w: list[Tensor]) -> tuple[float, Gradient]:
    leaves = [w_i.detach().clone().requires_grad_() for w_i in w]
    value = L(leaves)
    return value.item(), list(torch.autograd.grad(value, leaves, allow_unused=True))


def norm(xs: Gradient) -> float:
    return math.sqrt(sum((x * x).sum().item() for x in xs if x is not None))


def cosine(g: Gradient, g_s: Gradient) -> float:
    pairs = [(a, b) for a, b in zip(g, g_s, strict=True) if a is not None and b is not None]
    lengths = norm([a for a, _ in pairs]) * norm([b for _, b in pairs])
    return sum((a * b).sum().item() for a, b in pairs) / lengths if lengths else math.nan


def reciprocal(length: float) -> float:
    """1 / length, and 0 where there is no direction to go: a zero or non-finite gradient."""
    return 1 / length if length > 0 and math.isfinite(length) else 0.0


def times(scale: float, x: Tensor) -> Tensor:
    """scale * x, exactly zero for scale 0: 0 * inf would be nan."""
    return scale * x if scale else torch.zeros_like(x)


def add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b
