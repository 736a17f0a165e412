"""Losses whose gradients are known, for the tests of the oracles."""

# ruff: noqa: N802, N803 - the names are the papers' symbols

from __future__ import annotations

import torch
from reference_sam import value_and_grad
from torch import Tensor

INF = float("inf")
EXACT = {"rtol": 0, "atol": 1e-14}


def t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def quadratic(A: list[list[float]]):
    """L(w) = 1/2 w^T A w over parameters that are each one number."""
    matrix = torch.tensor(A, dtype=torch.float64)

    def L(w: list[Tensor]) -> Tensor:
        return torch.cat(w) @ matrix @ torch.cat(w) / 2

    return L


def linear(*slopes: float):
    """L(w) = slopes . w: its gradient is the same everywhere."""
    return lambda w: torch.cat(w) @ t(*slopes)


# g = A w = (3, 4), |g| = 5; with rho = 0.5, e = (0.3, 0.4) and g_s = A (1.3, 1.4) = (4, 5.5).
BOWL = quadratic([[2, 1], [1, 3]])
ONES = [t(1.0), t(1.0)]


def two_layer_net(seed: int = 0):
    """w1, w2 and the squared error of x -> w2 w1 x, a loss per column of x."""
    draw = torch.Generator().manual_seed(seed)
    w1, w2, x, y = (
        torch.randn(shape, generator=draw, dtype=torch.float64)
        for shape in [(4, 3), (2, 4), (3, 8), (2, 8)]
    )
    columns = [lambda w, i=i: ((w[1] @ w[0] @ x[:, i] - y[:, i]) ** 2).sum() / 8 for i in range(8)]
    return [w1, w2], columns


def grad(losses, w):
    return value_and_grad(lambda w: sum(L(w) for L in losses), w)[1]
