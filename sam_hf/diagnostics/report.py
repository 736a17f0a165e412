"""All sharpness measures of one model in one call."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from .gradients import gradient_noise, perturbation_budget
from .hessian import hessian_trace, top_eigenpairs
from .numerics import check_count
from .objective import FORWARD_WORK, PRODUCT_WORK, Objective
from .sharpness import Ball, average_sharpness, split_into_groups, worst_sharpness


@dataclass(frozen=True)
class Plan:
    """Selection and settings of the measures that `measure` computes.

    Args:
        rho: radius of SAM's ball.
        adaptive, adaptive_rho, eta: whether to measure in ASAM's ball too, and its ρ and η.
        m, steps: those of `worst_sharpness`, which steps=0 disables.
        samples: that of `average_sharpness`, at least 2; 0 disables it.
        eigenvalues, iterations: as `count` and `iterations` of `top_eigenpairs`; 0 disables it.
        trace_samples: samples of `hessian_trace`, at least 2; 0 disables it.
        noise: measure `gradient_noise`, if two or more batches have the most common size.
        budget: measure `perturbation_budget`.

    Raises:
        ValueError: a value is not allowed.
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
        """Selected balls, keyed by the prefix of the measures taken in them."""
        balls = {"": Ball(self.rho)}
        if self.adaptive:
            balls["adaptive_"] = Ball(self.adaptive_rho, adaptive=True, eta=self.eta)
        return balls

    def passes(self, parameter_count: int) -> float:
        """Cost of `measure` in forward-backward passes over the examples, at most.

        A forward pass counts as 1/3, a Hessian-vector product as 2. The Lanczos method may converge
        earlier. Products by central differences (see `Objective`) cost 4 instead.
        """
        forwards = (self.steps and self.steps + 1) + (self.samples and 2 * self.samples + 1)
        of_ball = FORWARD_WORK * forwards + self.steps + self.budget
        iterations = min(self.iterations, parameter_count) if self.eigenvalues else 0
        products = iterations + self.trace_samples
        check = 5 if products else 0  # of the first product, against differences
        passes = FORWARD_WORK + len(self.balls()) * of_ball + PRODUCT_WORK * products + check
        return passes + self.noise


def measure(objective: Objective, plan: Plan | None = None) -> dict[str, float]:
    """Compute the sharpness measures that a plan selects, by default all.

    Returns:
        Values by name. Measures in ASAM's ball have the prefix `adaptive_`, standard errors the
        suffix `_error`, and residuals of eigenvalues the suffix `_residual`.

    Raises:
        ValueError: the loss at the weights is not finite, or `plan.m` does not fit the batches.
    """
    return {name: value for part in iter_measures(objective, plan) for name, value in part.items()}


def iter_measures(objective: Objective, plan: Plan | None = None) -> Iterator[dict[str, float]]:
    """Yield the results of `measure` one by one, as they are computed."""
    plan = plan or Plan()
    if plan.m is not None:
        split_into_groups(objective, plan.m)  # raises before any measure is computed
    loss = objective.value()
    if not math.isfinite(loss):
        raise ValueError(f"the loss at the weights is {loss}: sharpness is undefined")
    yield {"loss": loss}
    for prefix, ball in plan.balls().items():
        if plan.steps:
            worst = worst_sharpness(objective, ball, m=plan.m, steps=plan.steps, seed=plan.seed)
            yield {f"{prefix}worst_sharpness": worst.value}
            if plan.m is not None:
                yield {f"{prefix}worst_sharpness_error": worst.error}
        if plan.samples:
            mean = average_sharpness(objective, ball, samples=plan.samples, seed=plan.seed)
            name = f"{prefix}average_sharpness"
            yield {name: mean.value, f"{name}_error": mean.error}
        if plan.budget:
            shares = perturbation_budget(objective, ball)
            yield {f"{prefix}share_{group}": share for group, share in shares.items()}
    if plan.eigenvalues:
        count, iterations = plan.eigenvalues, plan.iterations
        pairs = top_eigenpairs(objective, count, iterations=iterations, seed=plan.seed)
        for number, (value, residual) in enumerate(zip(pairs.values, pairs.residuals, strict=True)):
            name = "hessian_eigenvalue" if number == 0 else f"hessian_eigenvalue_{number + 1}"
            yield {name: value, f"{name}_residual": residual}
    if plan.trace_samples:
        trace = hessian_trace(objective, samples=plan.trace_samples, seed=plan.seed)
        yield {"hessian_trace": trace.value, "hessian_trace_error": trace.error}
    if plan.noise and objective.common_batch_count > 1:
        noise = gradient_noise(objective)
        yield {"gradient_noise": noise.noise, "gradient_noise_scale": noise.scale}
        yield {"squared_gradient_norm": noise.squared_norm}
