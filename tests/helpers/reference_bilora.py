"""Bi-LoRA in float64 and plain torch, written from the paper: the oracle for the trainer's tests.

Liu et al., "Bi-LoRA: Efficient Sharpness-Aware Minimization for Fine-Tuning Large-Scale Models",
https://arxiv.org/abs/2508.19564, equations 7 to 10 and Algorithm 1. A second, auxiliary pair of
LoRA factors is the perturbation, and climbs while the primary pair descends:

    W = W_0 + B_1 A_1 + B_2 A_2                                                               (7)
    min over (B_1, A_1)  max over |B_2 A_2|_F <= rho  of  L(W)                                (8)

One step has one gradient, G = dL/dW at the W of all four factors, and updates them at once:

    B_1 = B_1 - eta_1 G A_1^T    A_1 = A_1 - eta_1 B_1^T G                                    (9)
    B_2 = B_2 + eta_2 G A_2^T    A_2 = A_2 + eta_2 B_2^T G

(right-hand sides before the step). After the update, all layers' auxiliary factors are clipped by
their joint norm:

    c = sqrt(sum over layers of |B_2 A_2|_F^2)
    B_2 = sqrt(rho / c) B_2,  A_2 = sqrt(rho / c) A_2  where c > rho                         (10)

So the perturbation that a batch meets was climbed to with the batches before it. At the end the
auxiliary pair is dropped: W = W_0 + B_1 A_1.

The paper's default is eta_2 = eta_1 and an auxiliary rank of 8. It leaves out LoRA's factor s =
alpha / r, as one that B and A can take in; here W = W_0 + s_1 B_1 A_1 + s_2 B_2 A_2, the gradients
of the factors carry s_1 and s_2, and the norm that is clipped is that of s_2 B_2 A_2, which is what
is added to the weights. Equation 9 is SGD; with another optimizer the auxiliary pair takes its step
with the gradient's sign turned. The paper does not say how that pair is initialised: LoRA starts
from B = 0, and with B_2 = 0 the first gradient is the one of plain LoRA.
"""

# ruff: noqa: N803, N806 - the names are the paper's symbols

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from reference_optimizers import State, sgd_step
from reference_sam import Loss, norm, value_and_grad
from torch import Tensor


@dataclass
class Layer:
    """W_0 and the two pairs of factors of one adapted weight."""

    W0: Tensor
    B1: Tensor
    A1: Tensor
    B2: Tensor
    A2: Tensor
    s1: float = 1.0
    s2: float = 1.0

    def merged(self) -> Tensor:
        """The weight that training runs with (7)."""
        return self.adapted() + self.perturbation()

    def adapted(self) -> Tensor:
        """The weight that is evaluated and saved."""
        return self.W0 + self.s1 * self.B1 @ self.A1

    def perturbation(self) -> Tensor:
        return self.s2 * self.B2 @ self.A2


def bilora_step(
    layers: list[Layer],
    batch_losses: list[Loss],
    state: State,
    rho: float,
    eta1: float,
    eta2: float,
    optimizer_step: Callable[..., tuple[list[Tensor], State]] = sgd_step,
    **options: Any,
) -> tuple[list[Layer], State]:
    """One step on the sum of `batch_losses`, functions of the list of merged weights.

    `optimizer_step` is one of `reference_optimizers.py`, `options` what it takes besides the
    learning rate; the state has one entry per pair.
    """
    primary, auxiliary = bilora_gradients(layers, batch_losses)
    descended, state1 = optimizer_step(
        [x for layer in layers for x in (layer.B1, layer.A1)],
        primary,
        state.get("primary", {}),
        eta1,
        **options,
    )
    climbed, state2 = optimizer_step(
        [x for layer in layers for x in (layer.B2, layer.A2)],
        [-g for g in auxiliary],
        state.get("auxiliary", {}),
        eta2,
        **options,
    )
    layers = [
        replace(layer, B1=B1, A1=A1, B2=B2, A2=A2)
        for layer, B1, A1, B2, A2 in zip(
            layers, descended[::2], descended[1::2], climbed[::2], climbed[1::2], strict=True
        )
    ]
    return bilora_clip(layers, rho), {"primary": state1, "auxiliary": state2}


def bilora_gradients(
    layers: list[Layer], batch_losses: list[Loss]
) -> tuple[list[Tensor], list[Tensor]]:
    """dL/d(B_1, A_1, B_1, ...) and dL/d(B_2, A_2, ...), all from one gradient of the weights."""
    _, G = value_and_grad(
        lambda W: sum(L(W) for L in batch_losses), [layer.merged() for layer in layers]
    )
    primary, auxiliary = [], []
    for layer, G_i in zip(layers, G, strict=True):
        primary += [layer.s1 * G_i @ layer.A1.T, layer.s1 * layer.B1.T @ G_i]
        auxiliary += [layer.s2 * G_i @ layer.A2.T, layer.s2 * layer.B2.T @ G_i]
    return primary, auxiliary


def bilora_clip(layers: list[Layer], rho: float) -> list[Layer]:
    """Bring the joint norm of the perturbations down to rho, both factors alike (10)."""
    c = norm([layer.perturbation() for layer in layers])
    if c <= rho:
        return layers
    scale = math.sqrt(rho / c)
    return [replace(layer, B2=scale * layer.B2, A2=scale * layer.A2) for layer in layers]
