"""How much the loss rises within a ball around the weights: at worst, and on average."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .estimates import Estimate, check_count, mean_of
from .objective import Objective
from .vectors import dot


@dataclass(frozen=True)
class Ball:
    r"""The perturbations e with :math:`\|T^{-1} e\|_2 \le \rho`.

    Args:
        rho: the radius, above 0.
        adaptive: T = 1 (the ball of SAM) if False; T = |w| + eta element by element (that of ASAM,
            https://arxiv.org/abs/2102.11600, with its scope "all") if True.
        eta: keeps weights at 0 movable.

    Raises:
        ValueError: rho or eta is not allowed.
    """

    rho: float = 0.05
    adaptive: bool = False
    eta: float = 0.01

    def __post_init__(self) -> None:
        if not (self.rho > 0 and math.isfinite(self.rho)):
            raise ValueError(f"rho={self.rho!r} is not allowed. Allowed: a finite number above 0.")
        if not (self.eta >= 0 and math.isfinite(self.eta)):
            raise ValueError(f"eta={self.eta!r} is not allowed. Allowed: a finite number from 0.")

    def scales(self, weights: Sequence[Tensor]) -> list[Tensor] | None:
        """T, for each weight tensor; None if it is 1."""
        if not self.adaptive:
            return None
        with torch.no_grad():
            return list(torch._foreach_add(torch._foreach_abs(list(weights)), self.eta))


def average_sharpness(
    objective: Objective, ball: Ball | None = None, *, samples: int = 20, seed: int = 0
) -> Estimate:
    r"""The mean rise of the loss over the surface of the ball.

    .. math:: E_z[L(w + \rho \, T z / \|z\|_2)] - L(w), \qquad z \sim N(0, 1)

    For a quadratic with Hessian H it is :math:`\rho^2 \operatorname{tr}(T H T) / 2n` with n
    parameters. Each z is drawn with -z, so that the gradient, which has no part in the mean, has
    none in the noise either. The average-case sharpness of Andriushchenko et al., "A Modern Look at
    the Relationship between Sharpness and Generalization", ICML 2023,
    https://arxiv.org/abs/2302.07011, section 3, but on a sphere: their Gaussian has
    :math:`\|T^{-1} e\| \approx \rho \sqrt n`.

    Args:
        samples: how many pairs of z and -z, 2 or more.

    The same ρ reaches less far in more dimensions: for models with millions of weights, a ρ below
    1 gives a mean that the rounding of the loss in float32 (1e-7 of it) hides.

    Returns:
        In units of the loss. Cost: 2 `samples` + 1 forward passes.
    """
    check_count("samples", samples, 2)
    ball = ball or Ball()
    scales = ball.scales(objective.weights)
    generator = torch.Generator().manual_seed(seed)
    at_weights = objective.value()
    rises = []
    for _ in range(samples):
        z = objective.random_vector(generator)
        size = ball.rho / dot(z, z) ** 0.5
        if scales is not None:
            torch._foreach_mul_(z, scales)
        total = 0.0
        for sign in (1, -1):
            with objective.moved(z, sign * size):
                total += objective.value() / 2
        rises.append(total - at_weights)
    return mean_of(rises)


def worst_sharpness(
    objective: Objective,
    ball: Ball | None = None,
    *,
    m: int | None = None,
    steps: int = 10,
    seed: int = 0,
) -> Estimate:
    r"""The largest rise of the loss in the ball that projected gradient ascent finds.

    .. math:: \max_{\|T^{-1} e\|_2 \le \rho} L(w + e) - L(w)

    The first step is SAM's (ASAM's) own perturbation. Each further one goes on by ρ along
    :math:`T^2 \nabla L(w + e)`, normalised, and is projected back onto the ball; the highest loss
    met counts, so that the result is a lower bound of the maximum, and never below 0. Where the
    gradient at w is 0, the ascent begins in a random direction.

    Args:
        m: the maximum is taken for each group of m examples apart and averaged, as SAM does with
            its batches (Foret et al. 2021, https://arxiv.org/abs/2010.01412, section 4.1). The
            batches are put together to such groups: m must be a multiple of their size, and
            examples that are left over do not count. All examples of all processes if None.
        steps: of the ascent, 1 or more.

    Returns:
        In units of the loss, with the standard error over the groups; infinite where a loss or a
        gradient in the ball is. The groups are as random as the batches: data that are sorted by
        class must be shuffled first. Cost, over all groups:
        `steps` forward-backward passes and `steps` + 1 forward passes over the examples.
    """
    check_count("steps", steps, 1)
    ball = ball or Ball()
    groups = [objective] if m is None else groups_of(objective, m)
    generator = torch.Generator().manual_seed(seed)
    return mean_of([_worst(group, ball, steps, generator) for group in groups])


def _worst(objective: Objective, ball: Ball, steps: int, generator: torch.Generator) -> float:
    scales = ball.scales(objective.weights)
    at_weights = objective.value()
    gradient = objective.gradient()
    if dot(gradient, gradient) == 0:
        gradient = objective.random_vector(generator)
    # In the coordinates u = T⁻¹ e the ball is round: du = T ∇L.
    u = [torch.zeros_like(g) for g in gradient]
    best = at_weights
    for step in range(steps):
        if scales is not None:
            torch._foreach_mul_(gradient, scales)
        length = dot(gradient, gradient) ** 0.5
        if not math.isfinite(length):
            return math.inf
        if length == 0:
            break
        torch._foreach_add_(u, gradient, alpha=ball.rho / length)
        size = dot(u, u) ** 0.5
        if size > ball.rho:
            torch._foreach_mul_(u, ball.rho / size)
        e = u if scales is None else list(torch._foreach_mul(u, scales))
        with objective.moved(e):
            value = objective.value()
            if not math.isfinite(value):
                return math.inf
            best = max(best, value)
            if step < steps - 1:
                gradient = objective.gradient()
    return best - at_weights


def groups_of(objective: Objective, m: int) -> list[Objective]:
    """Parts of the objective with m examples each, put together from its batches.

    Raises:
        ValueError: m is no multiple of the size of the batches, or more than all examples.
    """
    if objective.is_shared:
        raise ValueError(
            f"m={m} is not allowed with several processes, whose examples are one group. Allowed: "
            "None, or one process"
        )
    sizes = objective.batch_sizes
    check_count("m", m, 1)
    size = sizes[0]
    if m % size or any(other != size for other in sizes[:-1]):
        raise ValueError(
            f"m={m} is not allowed: it is no multiple of the {size} examples of a batch. Allowed: "
            f"{size}, {2 * size}, ..., or batches of {m} examples"
        )
    per_group = m // size
    whole = [i for i, other in enumerate(sizes) if other == size]
    if len(whole) < per_group:
        raise ValueError(
            f"m={m} is not allowed: there are {objective.example_count} examples. Allowed: no more"
        )
    starts = range(0, len(whole) - per_group + 1, per_group)
    return [objective.subset(whole[start : start + per_group]) for start in starts]
