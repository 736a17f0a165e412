"""AE-SAM's rule in plain Python, written from the paper: the oracle for the trainer's tests.

Jiang et al., "An Adaptive Policy to Employ Sharpness-Aware Minimization",
https://arxiv.org/abs/2304.14647. A step is a SAM step where the squared norm of the gradient
stands out against its running mean and deviation, and a plain step otherwise:

    mu_t      = delta mu_{t-1} + (1 - delta) |g_t|^2
    sigma_t^2 = delta sigma_{t-1}^2 + (1 - delta) (|g_t|^2 - mu_t)^2
    c_t       = (t / T) lambda1 + (1 - t / T) lambda2
    SAM at t  iff  |g_t|^2 >= mu_t + c_t sigma_t

Both averages have |g_t|^2 in them already when they judge it. t runs from 0 to T - 1. The paper's
lambda1 = -1 and lambda2 = 1 make SAM rare at first and common at the end.

Both averages start at `mu` and `sigma2`, here zero, so the first step is a SAM step (for delta =
0.9 its threshold is 0.38 |g_0|^2), as are the next ones until mu has caught up.

The paper has no squared norm that is not finite. Here such a step is a plain step, and leaves the
averages as they were.
"""

from __future__ import annotations

import math


def aesam_decides(
    squared_norms: list[float],
    T: int,  # noqa: N803 - the paper's symbol
    delta: float = 0.9,
    lambda1: float = -1.0,
    lambda2: float = 1.0,
    *,
    mu: float = 0.0,
    sigma2: float = 0.0,
) -> list[bool]:
    """For each |g_t|^2 of a run of T steps, from its first one: is it a SAM step?"""
    decisions = []
    for t, squared_norm in enumerate(squared_norms):
        if not math.isfinite(squared_norm):
            decisions.append(False)
            continue
        mu = delta * mu + (1 - delta) * squared_norm
        sigma2 = delta * sigma2 + (1 - delta) * (squared_norm - mu) ** 2
        c = t / T * lambda1 + (1 - t / T) * lambda2
        decisions.append(squared_norm >= mu + c * math.sqrt(sigma2))
    return decisions
