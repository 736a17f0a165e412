"""ESAM's stochastic weight perturbation in float64 and plain torch: the oracle for the tests.

Du et al., "Efficient Sharpness-aware Minimization for Improved Training of Neural Networks",
https://arxiv.org/abs/2110.03141. SAM's perturbation on a random part of the
parameters, scaled up so that it is SAM's on average:

    e = (rho / beta) m * g / |g|,   m_i ~ Bernoulli(beta),   E[e] = rho g / |g|

The mask m is drawn anew for every step. `selected` is that draw, whole tensors (a bool) or
elements (a tensor of 0 and 1), so the twin needs no randomness.

The authors' code (dydjw9/Efficient_SAM, utils/Esam.py) differs from that:
- it draws whole tensors, each with probability beta;
- it has no gradient of the others, as it freezes them in the first pass to save their backward.
  |g| is the norm over the selected ones, so |e| = rho / beta in every step, and E[e] is longer
  than SAM's e. `norm_over="selected"` is that;
- the draw is made at the end of a step for the next one; the first step perturbs everything, and
  divides by beta all the same.
The second pass has the gradient of all parameters in both.
"""

from __future__ import annotations

from reference_sam import Gradient, norm, reciprocal, times
from torch import Tensor


def esam_perturbation(
    g: Gradient,
    rho: float,
    beta: float,
    selected: list[bool | Tensor],
    *,
    norm_over: str = "all",
) -> Gradient:
    """e, zero where it is not selected, None for a parameter without gradient."""
    mask_g = [
        None if a is None else a * m if isinstance(m, Tensor) else times(float(m), a)
        for a, m in zip(g, selected, strict=True)
    ]
    if norm_over == "all":
        length = norm(g)
    elif norm_over == "selected":
        length = norm(mask_g)
    else:
        raise ValueError(f"norm_over {norm_over!r} is neither 'all' nor 'selected'")
    scale = rho / beta * reciprocal(length)
    return [None if a is None else times(scale, a) for a in mask_g]
