"""Worst-case and average-case sharpness: the rise of the loss in a ball around the weights."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .numerics import Estimate, check_count, norm
from .objective import Objective


@dataclass(frozen=True)
class Ball:
    r"""The set of perturbations e with :math:`\|T^{-1} e\|_2 \le \rho`.

    Args:
        rho: the radius ρ > 0.
        adaptive: False: T = 1, the ball of SAM (Foret et al. 2021,
            https://arxiv.org/abs/2010.01412, eq. 1). True: ``T = |w| + eta`` elementwise, the ball
            of ASAM (Kwon et al. 2021, https://arxiv.org/abs/2102.11600, section 3) with
            `sam_adaptive_scope="all"`.
        eta: η >= 0, added to ``|w|`` so that weights equal to 0 are perturbed too.

    Raises:
        ValueError: rho or eta is not allowed.
    """

    rho: float = 0.05
    adaptive: bool = False
    eta: float = 0.01

    def __post_init__(self) -> None:
        if not (self.rho > 0 and math.isfinite(self.rho)):
            raise ValueError(f"rho={self.rho!r} is not allowed. Allowed: a finite number > 0.")
        if not (self.eta >= 0 and math.isfinite(self.eta)):
            raise ValueError(f"eta={self.eta!r} is not allowed. Allowed: a finite number >= 0.")

    def scale(self, vector: list[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
        """T times a vector; for T = 1 the vector itself."""
        if not self.adaptive:
            return vector
        with torch.no_grad():
            diagonal = torch._foreach_add(torch._foreach_abs(list(weights)), self.eta)
            return list(torch._foreach_mul(vector, diagonal))


def average_sharpness(
    objective: Objective, ball: Ball | None = None, *, samples: int = 20, seed: int = 0
) -> Estimate:
    r"""Average-case sharpness: the mean rise of the loss over the surface of a ball.

    .. math:: E_z[L(w + \rho \, T z / \|z\|_2)] - L(w), \qquad z \sim N(0, 1)

    Andriushchenko et al., "A Modern Look at the Relationship between Sharpness and Generalization",
    ICML 2023, https://arxiv.org/abs/2302.07011, section 3, with z normalised to the sphere. For a
    quadratic with Hessian H and n weights it is :math:`\rho^2 \operatorname{tr}(T H T) / 2n`.

    Each z is used with both signs, so that the first-order term cancels. With millions of weights
    and ρ < 1, the rise can be below the float32 rounding error of the loss (relative 1e-7).

    Returns:
        The mean rise, in units of the loss, with its standard error over `samples` pairs (z, -z),
        at least 2. Cost: 2 `samples` + 1 forward passes.
    """
    check_count("samples", samples, 2)
    ball = ball or Ball()
    generator = torch.Generator().manual_seed(seed)
    loss = objective.value()
    rises = []
    for _ in range(samples):
        z = objective.random_vector(generator)
        size = ball.rho / norm(z)
        z = ball.scale(z, objective.weights)
        mean = 0.0
        for sign in (1, -1):
            with objective.perturbed(z, sign * size):
                mean += objective.value() / 2
        rises.append(mean - loss)
    return Estimate.from_samples(rises)


def worst_sharpness(
    objective: Objective,
    ball: Ball | None = None,
    *,
    m: int | None = None,
    steps: int = 10,
    seed: int = 0,
) -> Estimate:
    r"""Worst-case sharpness: the largest rise of the loss in a ball, by projected gradient ascent.

    .. math:: \max_{\|T^{-1} e\|_2 \le \rho} L(w + e) - L(w)

    The first step is the perturbation of SAM or ASAM (see `Ball`). Each further step adds the
    normalised :math:`T^2 \nabla L(w + e)` with length ρ and projects onto the ball. The highest
    rise is a lower bound, never negative. At a zero gradient, the first direction is random.

    Args:
        m: m-sharpness (Foret et al. 2021, section 4.1): the mean of the maxima for groups of m
            examples. Groups consist of whole (shuffled) batches: m must be a multiple of the batch
            size; a remainder is left out. None: one maximum over all examples of all processes.
        steps: number of ascent steps, at least 1. Cost, over all groups: `steps` forward-backward
            and `steps` + 1 forward passes over the examples.

    Returns:
        The rise, in units of the loss, with its standard error over the groups. Infinite if a loss
        or a gradient in the ball is not finite.
    """
    check_count("steps", steps, 1)
    ball = ball or Ball()
    groups = [objective] if m is None else split_into_groups(objective, m)
    generator = torch.Generator().manual_seed(seed)
    return Estimate.from_samples([_ascend(group, ball, steps, generator) for group in groups])


def _ascend(objective: Objective, ball: Ball, steps: int, generator: torch.Generator) -> float:
    loss = highest = objective.value()
    gradient = objective.gradient()
    if norm(gradient) == 0:
        gradient = objective.random_vector(generator)
    # In the coordinates u = T⁻¹ e the ball is spherical, and the gradient is T ∇L.
    u = [torch.zeros_like(g) for g in gradient]
    for step in range(steps):
        gradient = ball.scale(gradient, objective.weights)
        length = norm(gradient)
        if not math.isfinite(length):
            return math.inf
        if length == 0:
            break
        torch._foreach_add_(u, gradient, alpha=ball.rho / length)
        size = norm(u)
        if size > ball.rho:
            torch._foreach_mul_(u, ball.rho / size)
        with objective.perturbed(ball.scale(u, objective.weights)):
            perturbed_loss = objective.value()
            if not math.isfinite(perturbed_loss):
                return math.inf
            highest = max(highest, perturbed_loss)
            if step < steps - 1:
                gradient = objective.gradient()
    return highest - loss


def split_into_groups(objective: Objective, m: int) -> list[Objective]:
    """Split an objective into objectives over m examples each, made of whole batches."""
    if objective.is_distributed:
        raise ValueError(f"m={m} is not allowed with several processes. Allowed: None")
    check_count("m", m, 1)
    sizes = objective.batch_sizes
    size, per_group = sizes[0], m // sizes[0]
    count = sizes.count(size)
    if m % size or count < per_group or any(other != size for other in sizes[:-1]):
        raise ValueError(
            f"m={m} is not allowed: it is not a multiple of the batch size {size} and at most "
            f"{count * size} of the {objective.example_count} examples, or batch sizes differ. "
            f"Allowed: {size}, {2 * size}, ..., or batches of {m} examples"
        )
    starts = range(0, count - per_group + 1, per_group)
    return [objective.subset(range(start, start + per_group)) for start in starts]
