"""Hessian spectrum from Hessian-vector products: largest eigenvalues, and the trace."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .numerics import Estimate, check_count, dot, norm
from .objective import Objective


@dataclass(frozen=True)
class Eigenpairs:
    """The largest eigenvalues of a Hessian H, in descending order, with unit eigenvectors.

    Args:
        values: the eigenvalues λ.
        residuals: ``|H v - λ v|`` of each pair. H has an eigenvalue within this distance of λ.
        vectors: the eigenvectors v, each with one tensor for each of the objective's `names`.
        iterations: number of Hessian-vector products computed.
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
    r"""Largest (most positive) eigenvalues of :math:`\nabla^2 L(w)` by the Lanczos method.

    In an orthonormal basis of the Krylov space of a random start vector, H is tridiagonal; the
    extreme eigenvalues of that small matrix converge to those of H (Golub and Van Loan, Matrix
    Computations, 4th ed., section 10.1). A multiple eigenvalue is found once.

    Args:
        count: maximum number of eigenpairs.
        iterations: maximum number of Hessian-vector products, at least `count`. Memory: one vector
            of the size of the weights for each. Large residuals call for more iterations.
        tolerance: stop when the residual of each pair is at most this share of its eigenvalue.

    Raises:
        ValueError: `count` or `iterations` is not allowed, or a product is not finite.
    """
    check_count("count", count, 1)
    check_count("iterations", iterations, count)
    start = objective.random_vector(torch.Generator().manual_seed(seed))
    torch._foreach_div_(start, norm(start))
    basis = [start]
    limit = min(iterations, objective.parameter_count)
    tridiagonal = torch.zeros(limit, limit, dtype=torch.float64)
    for size in range(1, limit + 1):
        w = objective.hessian_product(basis[-1])
        tridiagonal[size - 1, size - 1] = dot(w, basis[-1])
        for _ in range(2):  # fully, since rounding errors bring back converged eigenvalues
            for q in basis:
                torch._foreach_add_(w, q, alpha=-dot(w, q))
        remainder = norm(w)
        if not tridiagonal.isfinite().all():
            raise ValueError("a Hessian-vector product is not finite: is the loss L(w) finite?")
        # In ascending order; only the lower triangle of the matrix is read.
        ritz_values, ritz_vectors = torch.linalg.eigh(tridiagonal[:size, :size])
        values, coefficients = ritz_values.flip(0)[:count], ritz_vectors.flip(1)[:, :count]
        residuals = remainder * coefficients[-1].abs()
        has_converged = len(values) == count and bool((residuals <= tolerance * values.abs()).all())
        # The Krylov space is exhausted when only rounding errors remain.
        rounding = 1e2 * torch.finfo(w[0].dtype).eps * max(float(ritz_values.abs().max()), 1e-30)
        if has_converged or remainder <= rounding or size == limit:
            break
        tridiagonal[size, size - 1] = remainder
        torch._foreach_div_(w, remainder)
        basis.append(w)
    vectors = [[torch.zeros_like(x) for x in objective.weights] for _ in values]
    for q, of_pairs in zip(basis, coefficients.tolist(), strict=True):
        for vector, coefficient in zip(vectors, of_pairs, strict=True):
            torch._foreach_add_(vector, q, alpha=coefficient)
    return Eigenpairs(values.tolist(), residuals.tolist(), vectors, size)


def hessian_trace(objective: Objective, *, samples: int = 20, seed: int = 0) -> Estimate:
    r"""Trace of :math:`\nabla^2 L(w)` by Hutchinson's estimator, with its standard error.

    .. math:: \operatorname{tr} H = E_z[z^\top H z], \qquad z_i = \pm 1

    Hutchinson, "A Stochastic Estimator of the Trace of the Influence Matrix for Laplacian Smoothing
    Splines", Communications in Statistics 19 (1990). The mean is over `samples` (at least 2)
    Rademacher vectors z. Cost: one Hessian-vector product for each.
    """
    check_count("samples", samples, 2)
    generator = torch.Generator().manual_seed(seed)
    products = []
    for _ in range(samples):
        z = [torch.ones_like(x).copysign(x) for x in objective.random_vector(generator)]
        products.append(dot(z, objective.hessian_product(z)))
    return Estimate.from_samples(products)
