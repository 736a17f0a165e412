"""All measures of one model in one call."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from .estimates import check_count
from .gradients import gradient_noise, perturbation_budget
from .hessian import hessian_trace, top_eigenpairs
from .objective import Objective
from .sharpness import Ball, average_sharpness, groups_of, worst_sharpness


@dataclass(frozen=True)
class Plan:
    """What to measure; a measure whose number is 0 is left out.

    Args:
        rho, eta: of the balls (`Ball`).
        adaptive: measure in ASAM's ball too.
        adaptive_rho: its radius.
        m: the groups of `worst_sharpness`.
        steps: of its ascent.
        samples: of `average_sharpness`.
        eigenvalues: how many of the largest.
        iterations: of the Lanczos method, at most.
        trace_samples: of `hessian_trace`.
        seed: of all that is drawn.
        noise: measure the noise of the gradients, if two batches or more are of the usual size.
        budget: say which weights the perturbation is spent on.

    Raises:
        ValueError: a number is not allowed.
    """

    rho: float = 0.05
    adaptive: bool = True
    adaptive_rho: float = 0.5
    eta: float = 0.01
    m: int | None = None
    steps: int = 10
    samples: int = 10
    eigenvalues: int = 1
    iterations: int = 40
    trace_samples: int = 10
    noise: bool = True
    budget: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        self.balls()
        for name in ("steps", "eigenvalues"):
            check_count(name, getattr(self, name), 0)
        for name in ("samples", "trace_samples"):
            if getattr(self, name) != 0:
                check_count(name, getattr(self, name), 2)
        check_count("iterations", self.iterations, max(1, self.eigenvalues))
        if self.m is not None:
            check_count("m", self.m, 1)

    def balls(self) -> dict[str, Ball]:
        """SAM's ball, and ASAM's if asked for, by the prefix of what is measured in it."""
        balls = {"": Ball(self.rho)}
        if self.adaptive:
            balls["adaptive_"] = Ball(self.adaptive_rho, adaptive=True, eta=self.eta)
        return balls


def measure(objective: Objective, plan: Plan | None = None) -> dict[str, float]:
    """Every measure that the plan asks for, by name; `NAME_error` is its standard error.

    Raises:
        ValueError: the loss is not finite, or `m` does not fit the batches.
    """
    return {name: value for part in measures(objective, plan) for name, value in part.items()}


def measures(objective: Objective, plan: Plan | None = None) -> Iterator[dict[str, float]]:
    """The same, one measure after the other, for those who show how far they are."""
    plan = plan or Plan()
    if plan.m is not None:
        groups_of(objective, plan.m)  # what is refused is refused before anything is computed
    loss = objective.value()
    if not math.isfinite(loss):
        raise ValueError(f"the loss at the weights is {loss}: there is nothing to measure around")
    yield {"loss": loss}
    for prefix, ball in plan.balls().items():
        if plan.steps:
            worst = worst_sharpness(objective, ball, m=plan.m, steps=plan.steps, seed=plan.seed)
            yield {f"{prefix}worst_sharpness": worst.value}
            if plan.m is not None:
                yield {f"{prefix}worst_sharpness_error": worst.error}
        if plan.samples:
            mean = average_sharpness(objective, ball, samples=plan.samples, seed=plan.seed)
            yield {
                f"{prefix}average_sharpness": mean.value,
                f"{prefix}average_sharpness_error": mean.error,
            }
        if plan.budget:
            shares = perturbation_budget(objective, ball)
            yield {f"{prefix}share_{group}": share for group, share in shares.items()}
    if plan.eigenvalues:
        pairs = top_eigenpairs(
            objective, plan.eigenvalues, iterations=plan.iterations, seed=plan.seed
        )
        for number, (value, residual) in enumerate(zip(pairs.values, pairs.residuals, strict=True)):
            name = "hessian_eigenvalue" if number == 0 else f"hessian_eigenvalue_{number + 1}"
            yield {name: value, f"{name}_residual": residual}
    if plan.trace_samples:
        trace = hessian_trace(objective, samples=plan.trace_samples, seed=plan.seed)
        yield {"hessian_trace": trace.value, "hessian_trace_error": trace.error}
    if plan.noise and objective.usual_batches > 1:
        noise = gradient_noise(objective)
        yield {"gradient_noise": noise.noise, "gradient_noise_scale": noise.scale}
        yield {"squared_gradient_norm": noise.squared_norm}
