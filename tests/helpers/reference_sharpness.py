"""Sharpness, Hessians and noise scales in float64, the long way: every number written down.

* the maximum of a quadratic over a ball: the trust-region problem, by its secular equation
  (Nocedal and Wright, Numerical Optimization, 2nd ed., section 4.3);
* the whole Hessian, row by row;
* the noise of the gradients from the gradient of each single example (McCandlish et al. 2018,
  https://arxiv.org/abs/1812.06162, appendix A.1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

LossOf = Callable[[nn.Module], Tensor]


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.reshape(-1) for x in tensors])


def dense_hessian(model: nn.Module, loss: LossOf) -> Tensor:
    """All second derivatives, of the parameters in their order."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss(model), parameters, create_graph=True, materialize_grads=True)
    rows = []
    for g in flat(grads):
        row = torch.autograd.grad(g, parameters, retain_graph=True, materialize_grads=True)
        rows.append(flat(row).detach())
    return torch.stack(rows)


def quadratic_rise_in_ball(g: Tensor, h: Tensor, rho: float) -> float:
    """The maximum of g'e + e'He/2 over |e| <= rho, for H with a positive largest eigenvalue.

    It lies on the sphere: e = (s - H)⁻¹ g with s above the largest eigenvalue, such that |e| = rho.
    """
    values, vectors = torch.linalg.eigh(h)
    parts = vectors.T @ g
    low, high = float(values[-1]), float(values[-1]) + float(g.norm()) / rho + 1.0
    for _ in range(200):
        middle = (low + high) / 2
        length = (parts / (middle - values)).norm()
        low, high = (middle, high) if length > rho else (low, middle)
    e = vectors @ (parts / (high - values))
    return float(g @ e + e @ h @ e / 2)


def noise_of_examples(grads: Sequence[Tensor]) -> tuple[float, float]:
    """(tr Σ, |G|²) of the gradients of single examples, without bias."""
    rows = torch.stack(list(grads))
    trace = float(rows.var(dim=0, unbiased=True).sum())
    return trace, float(rows.mean(dim=0).square().sum()) - trace / len(rows)
