"""Friendly-SAM in float64 and plain torch, written from the paper: the oracle for the tests.

Li et al., "Friendly Sharpness-Aware Minimization", https://arxiv.org/abs/2403.12350. SAM's ascent
direction without its full-gradient part, which a moving average m of the gradients stands in for:

    d_t = g_t - sigma m,   e_t = rho d_t / |d_t|,   g_s = grad L_t(w_t + e_t)

Which m that is, the paper and its authors' code (nblt/F-SAM) do not agree on:

    Algorithm 1:  m_{-1} = 0,    m_t = lam m_{t-1} + (1 - lam) g_t,  d_t = g_t - sigma m_t
    the code:     first step  m_0 = g_0,  d_0 = g_0
                  later       d_t = g_t - sigma m_{t-1},  m_t = lam m_{t-1} + (1 - lam) g_t

(Algorithm 1 as third-party implementations of it have it.) This file follows the code; `paper_step`
is the algorithm. What becomes of the difference:

- For one and the same m_{t-1}, Algorithm 1 has
      d_t = (1 - sigma (1 - lam)) (g_t - sigma' m_{t-1}),
      sigma' = sigma lam / (1 - sigma (1 - lam)),
  and e only has d's direction. So it is the code's rule with sigma' for sigma, and sigma = 1 is
  the same rule: sigma' = 1.
- The averages themselves differ by lam^(t+1) g_0, what is left of the start from zero. In both
  the first step is SAM's (for sigma < 1 / (1 - lam)), the later ones agree in the limit.

sigma = 0 is SAM. m exists for the perturbed parameters. A parameter's m starts with its first
gradient; a parameter without a gradient keeps its m and is not perturbed. A g that is zero or not
finite leaves m as it was, and there is no perturbation.
"""

from __future__ import annotations

from reference_sam import Gradient, Loss
from reference_vasso import State, averaged_step
from torch import Tensor


def friendly_sam_step(
    w: list[Tensor],
    batch_losses: list[Loss],
    rho: float,
    sigma: float,
    lam: float,
    state: State,
    *,
    perturbed: list[bool] | None = None,
) -> tuple[Gradient, State]:
    """Return g_s, and the state {"m": m_t} for the next step ({} before the first)."""

    def direction(g: Gradient, m_old: Gradient) -> tuple[Gradient, Gradient]:
        d, m_new = [], []
        for a, m in zip(g, m_old, strict=True):
            if a is None:
                d.append(None)
                m_new.append(m)
            elif m is None:
                d.append(a)
                m_new.append(a)
            else:
                d.append(a - sigma * m)
                m_new.append(lam * m + (1 - lam) * a)
        return d, m_new

    return averaged_step(w, batch_losses, rho, direction, state, "m", perturbed)


def paper_step(
    w: list[Tensor],
    batch_losses: list[Loss],
    rho: float,
    sigma: float,
    lam: float,
    state: State,
    *,
    perturbed: list[bool] | None = None,
) -> tuple[Gradient, State]:
    """Algorithm 1: the average starts at zero and has g_t in it before it is used."""

    def direction(g: Gradient, m_old: Gradient) -> tuple[Gradient, Gradient]:
        d, m_new = [], []
        for a, m in zip(g, m_old, strict=True):
            if a is not None:
                m = (1 - lam) * a if m is None else lam * m + (1 - lam) * a
            d.append(None if a is None else a - sigma * m)
            m_new.append(m)
        return d, m_new

    return averaged_step(w, batch_losses, rho, direction, state, "m", perturbed)
