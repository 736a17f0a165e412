"""LookSAM in float64 and plain torch, written from the paper: the oracle for the trainer's tests.

Liu et al., "Towards Efficient and Scalable Sharpness-Aware Minimization",
https://arxiv.org/abs/2203.02714:

    t mod k = 0:  g_s = grad L(w + rho g / |g|)
                  g_v = g_s - |g_s| cos(g, g_s) g / |g|
                  update = g_s
    otherwise:    update = g + alpha (|g| / |g_v|) g_v,   one gradient

g_v, the part of g_s that is orthogonal to g, is kept from one SAM step to the next. Norms and the
projection treat all parameters as one vector, as the paper writes them: those with a gradient,
perturbed or not. (Look-LayerSAM, the paper's other algorithm, is the layer-wise one.)

Before the first g_v there is none to reuse, and a step is a SAM step whatever t is. Neither is
there one after a SAM step that met a gradient that is not finite: it leaves the state as it was.
Where g_v is zero the update is g. It is zero for a loss that is linear between w and w + e, but
then only up to rounding, and the reuse blows what is left up to the length alpha |g|.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from reference_gsam import both, dot
from reference_sam import Gradient, Loss, norm, reciprocal, sam_step, value_and_grad
from torch import Tensor

State = dict[str, Any]


def looksam_step(
    w: list[Tensor],
    batch_losses: list[Loss],
    rho: float,
    alpha: float,
    k: int,
    t: int,
    state: State,
    *,
    perturbed: list[bool] | None = None,
) -> tuple[Gradient, State]:
    """Return the gradient for the base optimizer at step t (from 0), and the new state."""
    _, g = value_and_grad(lambda w: sum(L(w) for L in batch_losses), w)
    if t % k == 0 or not state:
        g_s, _ = sam_step(w, batch_losses, rho, perturbed=perturbed)
        if not (math.isfinite(norm(g)) and math.isfinite(norm(g_s))):
            return g_s, state
        return g_s, {"g_v": orthogonal_part(g_s, g)}

    g_v = both(state["g_v"], g)
    scale = alpha * norm(g) * reciprocal(norm(g_v))
    if not (scale and math.isfinite(scale)):
        return g, state
    return [
        a if v is None else torch.add(a, v, alpha=scale) for a, v in zip(g, g_v, strict=True)
    ], state


def orthogonal_part(g_s: Gradient, g: Gradient) -> Gradient:
    """g_v = g_s - (g_s . g_hat) g_hat, g_hat = g / |g|; g_s itself for a parameter without g."""
    projection = dot(g_s, g) * reciprocal(norm(both(g, g_s))) ** 2
    return [
        b if a is None or b is None else b - projection * a for a, b in zip(g, g_s, strict=True)
    ]
