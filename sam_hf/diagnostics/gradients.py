"""Gradient statistics: gradient noise scale, and the distribution of SAM's perturbation."""

from dataclasses import dataclass

import torch

from ..distributed.processes import sum_over_processes_, total
from ..engine.parameters import PARAMETER_GROUPS, parameter_groups
from .numerics import dot
from .objective import Objective
from .sharpness import Ball


@dataclass(frozen=True)
class GradientNoise:
    """Variance of per-example gradients, in relation to the mean gradient.

    Args:
        squared_norm: unbiased estimate of ``|G|²``, G the expected gradient. Noise can make it < 0.
        noise: tr Σ, the trace of the covariance of the gradient of one example.
        scale: ``tr Σ / |G|²``, the simple noise scale, in examples: noise dominates the gradients
            of much smaller batches. Infinite if the estimate of ``|G|²`` is not positive.
    """

    squared_norm: float
    noise: float
    scale: float


def gradient_noise(objective: Objective) -> GradientNoise:
    r"""Simple gradient noise scale, from the gradients of the batches.

    McCandlish, Kaplan, Amodei et al., "An Empirical Model of Large-Batch Training", 2018,
    https://arxiv.org/abs/1812.06162, section 2.2. From K batches of b examples with gradients
    :math:`G_k` and their mean :math:`\bar G`, both estimates being unbiased:

    .. math:: \operatorname{tr} \Sigma = \frac{b}{K - 1} \sum_k \|G_k - \bar G\|^2, \qquad
              |G|^2 = \|\bar G\|^2 - \frac{\operatorname{tr} \Sigma}{K b}

    The batches must be random samples: batches sorted by class overestimate the noise. Batches of
    another size than the most common one are left out. Cost: one forward-backward pass.

    Raises:
        ValueError: fewer than two batches have the most common size.
    """
    size, count = objective.common_batch_size, objective.common_batch_count
    if count < 2:
        needed = f"the gradient noise needs at least two batches of {size} examples"
        raise ValueError(f"{needed}, got {count}: use smaller batches")
    squares = 0.0
    mean = [torch.zeros_like(w) for w in objective.weights]
    for batch_size, grads in objective.batch_gradients():
        if batch_size == size:
            squares += dot(grads, grads)
            torch._foreach_add_(mean, grads, alpha=1 / count)
    sum_over_processes_(mean)
    squared_mean = dot(mean, mean)
    noise = size * (total(squares, mean[0].device) - count * squared_mean) / (count - 1)
    squared_norm = squared_mean - noise / (count * size)
    scale = noise / squared_norm if squared_norm > 0 else float("inf")
    return GradientNoise(squared_norm, noise, scale)


def perturbation_budget(objective: Objective, ball: Ball | None = None) -> dict[str, float]:
    r"""Share of \|e\|² that falls on each group of parameters, for the perturbation e of SAM.

    e is proportional to :math:`g` for SAM (Foret et al. 2021, eq. 2) and to :math:`T^2 g` for the
    adaptive ball of ASAM (Kwon et al. 2021, section 3), where g is the gradient over all examples.
    The radius has no influence on the shares.

    Returns:
        Shares of the groups "norms", "biases", "embeddings" and "matrices" that have parameters.
        They sum to 1, or are all 0 if the gradient is zero.
    """
    ball = ball or Ball()
    e = ball.scale(ball.scale(objective.gradient(), objective.weights), objective.weights)
    squared_norm = dot(e, e)
    groups = parameter_groups(objective.model)
    shares = {}
    for group in PARAMETER_GROUPS:
        members = [x for name, x in zip(objective.names, e, strict=True) if groups[name] == group]
        if members:
            shares[group] = dot(members, members) / squared_norm if squared_norm > 0 else 0.0
    return shares
