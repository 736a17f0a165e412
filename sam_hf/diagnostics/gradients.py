"""What the gradients say: how noisy they are, and which weights a perturbation is spent on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..backends.processes import sum_over_processes_
from ..params import PARAMETER_GROUPS, parameter_groups
from .objective import Objective
from .sharpness import Ball
from .vectors import dot


@dataclass(frozen=True)
class GradientNoise:
    """How much the gradients of single examples differ.

    Args:
        squared_norm: |G|² of the mean gradient, without the part that the noise adds to it. The
            estimate can be below 0 where the noise outweighs it.
        noise: tr Σ, the summed variance of one example's gradient.
        scale: tr Σ / |G|², the simple noise scale: batches much smaller than this many examples
            have gradients that are mostly noise. Infinite where |G|² is not above 0.
    """

    squared_norm: float
    noise: float
    scale: float


def gradient_noise(objective: Objective) -> GradientNoise:
    r"""The simple noise scale, from the gradients of the batches.

    McCandlish, Kaplan, Amodei et al., "An Empirical Model of Large-Batch Training", 2018,
    https://arxiv.org/abs/1812.06162, section 2.2. With K batches of b examples, gradients
    :math:`G_k` and their mean :math:`\bar G`, both without bias:

    .. math:: \operatorname{tr} \Sigma = \frac{b}{K - 1} \sum_k \|G_k - \bar G\|^2, \qquad
              |G|^2 = \|\bar G\|^2 - \frac{\operatorname{tr} \Sigma}{K b}

    The batches must be drawn at random: where they are sorted by class, their gradients differ
    more. A last batch that is smaller is left out.

    Raises:
        ValueError: there are fewer than two batches of one size.

    Cost: one forward-backward pass over the examples.
    """
    size, squares = objective.usual_size, 0.0
    count = objective.usual_batches
    if count < 2:
        raise ValueError(
            f"the gradient noise needs two batches of {size} examples or more, and there is "
            f"{count}: use smaller batches"
        )
    total = [torch.zeros_like(w) for w in objective.weights]
    for its_size, grads in objective.batch_gradients():
        if its_size == size:
            squares += dot(grads, grads)
            torch._foreach_add_(total, grads)
    sum_of_squares = torch.tensor(squares, dtype=torch.float64, device=total[0].device)
    sum_over_processes_([*total, sum_of_squares])
    squares = float(sum_of_squares.item())
    torch._foreach_div_(total, count)
    mean = dot(total, total)
    noise = size * (squares - count * mean) / (count - 1)
    squared_norm = mean - noise / (count * size)
    scale = noise / squared_norm if squared_norm > 0 else float("inf")
    return GradientNoise(squared_norm, noise, scale)


def perturbation_budget(objective: Objective, ball: Ball | None = None) -> dict[str, float]:
    r"""The share of \|e\|² that each group of parameters gets, e the first step into the ball.

    e is SAM's perturbation :math:`g`, or ASAM's :math:`T^2 g`, up to its length. Groups: norms,
    biases, embeddings, matrices; those without parameters are left out. Where the gradient is 0,
    all shares are 0.
    """
    e = objective.gradient()
    scales = (ball or Ball()).scales(objective.weights)
    if scales is not None:
        torch._foreach_mul_(e, scales)
        torch._foreach_mul_(e, scales)
    total = dot(e, e)
    groups = parameter_groups(objective.model)
    shares = {}
    for group in PARAMETER_GROUPS:
        members = [x for name, x in zip(objective.names, e, strict=True) if groups[name] == group]
        if members:
            shares[group] = dot(members, members) / total if total > 0 else 0.0
    return shares
