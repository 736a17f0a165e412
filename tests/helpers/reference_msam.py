"""Momentum-SAM in float64 and plain torch, written from the paper: the oracle for the tests.

Becker, Altrock and Risse, "Momentum-SAM: Sharpness Aware Minimization without Computational
Overhead", https://arxiv.org/abs/2401.12033. The momentum buffer v takes the place of the
gradient in SAM's ascent step, so a step needs one gradient:

    e_t     = -rho v_t / |v_t|
    v_{t+1} = mu v_t + grad L(w_t + e_t)
    w_{t+1} = w_t - lr v_{t+1}

v points uphill, so w + e is ahead of w on the descent; the gradient there is used at w. For Adam
v is the first moment. The first step takes its gradient at w, as there is no v yet.

The weights of the method are w: those are decayed, evaluated and saved. The authors' code keeps
w + e between steps, and its SGD takes the L2 decay from there; here it is taken from w, as with
any other method.
"""

from __future__ import annotations

from reference_optimizers import adamw_step, sgd_step
from reference_sam import Gradient, Loss, norm, reciprocal, times, value_and_grad
from torch import Tensor


def msam_gradient(
    w: list[Tensor], v: Gradient | None, batch_losses: list[Loss], rho: float
) -> Gradient:
    """The gradient at w - rho v / |v|; at w where v is None, zero or not finite."""
    v = [None] * len(w) if v is None else v
    scale = rho * reciprocal(norm(v))
    ahead = [w_i if v_i is None else w_i - times(scale, v_i) for w_i, v_i in zip(w, v, strict=True)]
    return value_and_grad(lambda w: sum(L(w) for L in batch_losses), ahead)[1]


def msam_sgd_run(
    w: list[Tensor],
    steps: list[list[Loss]],
    rho: float,
    lr: float,
    mu: float,
    weight_decay: float = 0.0,
) -> list[Tensor]:
    """Train with momentum SGD, one entry of `steps` per update, and return the weights w."""
    state = {}
    for batch_losses in steps:
        g = msam_gradient(w, state.get("b"), batch_losses, rho)
        w, state = sgd_step(w, g, state, lr, mu, weight_decay)
    return w


def msam_adamw_run(
    w: list[Tensor],
    steps: list[list[Loss]],
    rho: float,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> list[Tensor]:
    """Train with AdamW; v is its first moment, whose bias correction the direction does not see."""
    state = {}
    for batch_losses in steps:
        v = [m for _, m, _ in state["moments"]] if state else None
        g = msam_gradient(w, v, batch_losses, rho)
        w, state = adamw_step(w, g, state, lr, betas, eps, weight_decay)
    return w
