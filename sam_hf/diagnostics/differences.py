"""Hessian products from gradients alone, by central differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .vectors import norm

if TYPE_CHECKING:
    from .objective import Objective

TRUSTED = 0.2
"""Differences that change by a larger part when their step is halved are no judge of others."""


def central_differences(
    objective: Objective, vector: Sequence[Tensor]
) -> tuple[list[Tensor], float]:
    """∇²L(w) v from the gradients at four points.

    The weights move by ±ε v and ±ε v / 2, with ε = u^(2/5) (1 + r) / |v|, u the spacing of the
    floating-point numbers at 1 and r the root mean square of the weights, and the two differences
    are extrapolated to ε = 0 (Richardson; Nocedal and Wright, Numerical Optimization, 2nd ed.,
    section 8.1). Along the sharpest directions a loss bends within a distance that does not grow
    with the number of weights, so that the step must not either.

    Returns:
        The product, and the part by which the differences change as the step is halved.
    """
    length = norm(vector)
    if length == 0:
        return [torch.zeros_like(v) for v in vector], 0.0
    step = _distance(objective) / length
    far, near = (_difference(objective, vector, s) for s in (step, step / 2))
    # The error shrinks with the square of the step: a third of the change is what is left.
    change = torch._foreach_sub(near, far)
    size = norm(near)
    part = norm(change) / size if size > 0 else 0.0
    torch._foreach_add_(near, change, alpha=1 / 3)
    return near, part


def refute(objective: Objective, exact: Sequence[Tensor], vector: Sequence[Tensor]) -> bool:
    """Whether differences that can be trusted tell that the exact product is a wrong one.

    They cannot where they depend on their step, as where ReLUs switch, nor where both are so small
    that rounding is all there is.
    """
    differences, change = central_differences(objective, vector)
    unit = _unit(objective)
    rounding = 100 * norm(objective.gradient()) * norm(vector) * unit / _distance(objective)
    distance = norm(torch._foreach_sub(list(exact), differences))
    is_far = distance > max(0.5 * norm(exact), 0.5 * norm(differences), rounding)
    return bool(is_far and change < TRUSTED)


def _difference(objective: Objective, vector: Sequence[Tensor], step: float) -> list[Tensor]:
    with objective.moved(vector, step):
        ahead = objective.gradient()
    with objective.moved(vector, -step):
        behind = objective.gradient()
    torch._foreach_sub_(ahead, behind)
    torch._foreach_div_(ahead, 2 * step)
    return ahead


def _unit(objective: Objective) -> float:
    return torch.finfo(objective.weights[0].dtype).eps


def _distance(objective: Objective) -> float:
    """How far the weights move."""
    size = norm(objective.weights) / math.sqrt(objective.parameter_count)
    return float(_unit(objective) ** (2 / 5) * (1 + size))
