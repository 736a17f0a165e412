"""The Hessian of the loss without writing it down: its largest eigenvalues, and its trace."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .estimates import Estimate, check_count, mean_of
from .objective import Objective
from .vectors import dot


@dataclass(frozen=True)
class Eigenpairs:
    """The largest eigenvalues, in falling order, and their unit vectors.

    Args:
        values: λ.
        residuals: |H v - λ v| of each: H has an eigenvalue at most so far from λ.
        vectors: for each λ one tensor for each of the objective's `names`.
        iterations: how many products with H were needed.
    """

    values: list[float]
    residuals: list[float]
    vectors: list[list[Tensor]]
    iterations: int


def top_eigenpairs(
    objective: Objective,
    count: int = 1,
    *,
    iterations: int = 40,
    tolerance: float = 1e-3,
    seed: int = 0,
) -> Eigenpairs:
    r"""The largest eigenvalues of :math:`\nabla^2 L(w)` by the Lanczos method.

    From a random start q_1, three-term recursion gives an orthonormal basis in which H is
    tridiagonal; the eigenvalues of that small matrix are those of H from the outside inward
    (Golub and Van Loan, Matrix Computations, 4th ed., section 10.1). Every new vector is
    orthogonalised against all earlier ones, twice: without it, rounding brings copies of converged
    eigenvalues. An eigenvalue that H has several times is found once.

    Args:
        count: how many. `iterations` must be at least as many.
        iterations: the most products with H; each keeps one vector of the size of the weights.
        tolerance: stop when the residual of each is below this share of it.
        seed: of the start.

    Returns:
        With residuals: where they are not small, more iterations are needed.
    """
    check_count("count", count, 1)
    check_count("iterations", iterations, count)
    generator = torch.Generator().manual_seed(seed)
    start = objective.random_vector(generator)
    torch._foreach_div_(start, dot(start, start) ** 0.5)
    basis: list[list[Tensor]] = [start]
    diagonal: list[float] = []
    beside: list[float] = []
    most = min(iterations, objective.parameter_count)
    while True:
        w = objective.hessian_product(basis[-1])
        diagonal.append(dot(w, basis[-1]))
        for _ in range(2):
            for q in basis:
                torch._foreach_add_(w, q, alpha=-dot(w, q))
        left = dot(w, w) ** 0.5
        values, small = _tridiagonal(diagonal, beside)
        found = min(count, len(values))
        residuals = [left * abs(float(small[-1, -1 - i])) for i in range(found)]
        largest = max(abs(float(v)) for v in values)
        is_done = found == count and all(
            r <= tolerance * abs(float(values[-1 - i])) for i, r in enumerate(residuals)
        )
        # What is left of an exhausted space is rounding.
        is_exhausted = left <= 1e2 * torch.finfo(w[0].dtype).eps * max(largest, 1e-30)
        if is_done or is_exhausted or len(diagonal) >= most:
            break
        beside.append(left)
        torch._foreach_div_(w, left)
        basis.append(w)
    vectors = []
    for i in range(found):
        vector = [torch.zeros_like(x) for x in objective.weights]
        for q, share in zip(basis, small[:, -1 - i].tolist(), strict=True):
            torch._foreach_add_(vector, q, alpha=share)
        vectors.append(vector)
    return Eigenpairs(
        [float(values[-1 - i]) for i in range(found)], residuals, vectors, len(diagonal)
    )


def hessian_trace(objective: Objective, *, samples: int = 20, seed: int = 0) -> Estimate:
    r"""The trace of :math:`\nabla^2 L(w)` by Hutchinson's estimator.

    .. math:: \operatorname{tr} H = E_z[z^\top H z], \qquad z_i = \pm 1

    Hutchinson, "A Stochastic Estimator of the Trace of the Influence Matrix for Laplacian Smoothing
    Splines", Communications in Statistics 19 (1990).

    Args:
        samples: how many z, 2 or more. Cost: as many Hessian products.
    """
    check_count("samples", samples, 2)
    generator = torch.Generator().manual_seed(seed)
    products = []
    for _ in range(samples):
        z = [torch.sign(x) for x in objective.random_vector(generator)]
        for x in z:
            x[x == 0] = 1
        products.append(dot(z, objective.hessian_product(z)))
    return mean_of(products)


def _tridiagonal(diagonal: list[float], beside: list[float]) -> tuple[Tensor, Tensor]:
    """Eigenvalues, rising, and eigenvectors, as columns, of the symmetric matrix."""
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    if beside:
        other = torch.tensor(beside, dtype=torch.float64)
        matrix += torch.diag(other, 1) + torch.diag(other, -1)
    if not all(math.isfinite(x) for x in (*diagonal, *beside)):
        raise ValueError(
            "the Hessian products are not finite: is the loss finite at these weights?"
        )
    values, vectors = torch.linalg.eigh(matrix)
    return values, vectors
