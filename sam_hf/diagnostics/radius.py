"""Gradient cosine and sharpness against the radius rho, and the automatic radius of a model."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..config import SAMConfig
from ..config.checks import check_choice, check_number
from ..engine.perturbation import step_size
from ..engine.radius import AutomaticRadius
from .numerics import dot
from .objective import Objective

METHODS = ("sam", "asam")
_FACTORS = tuple(2.0**i for i in range(-4, 5))
_LOWEST, _HIGHEST = 1e-6, 1e4
_MOST_STEPS = 8  # of the search for the default radii
_LIMIT = AutomaticRadius.LIMIT


@dataclass(frozen=True)
class RadiusReading:
    """Effect of one radius: means over the batches. Each batch has its own e.

    Args:
        rho: the radius, ``|e|`` in the method's norm.
        cosine: cos(g, g_s), with g the gradient at w and g_s that at w + e.
        sharpness: L(w + e) - L(w), in units of the loss.
    """

    rho: float
    cosine: float
    sharpness: float


@dataclass(frozen=True)
class RadiusCurve:
    """Readings in ascending order of rho, and the radius at which the automatic rule would settle.

    Args:
        loss: L(w), mean over the batches.
        goal: the sharpness that the rule holds at this loss (`AutomaticRadius.goal`).
        readings: one for each radius.
        suggestion: the lowest radius at which the sharpness reaches the goal, interpolated between
            its neighbours on logarithmic axes; None if there is none among the radii.
        reason: why there is no suggestion; empty if there is one.
    """

    loss: float
    goal: float
    readings: list[RadiusReading]
    suggestion: float | None
    reason: str


def radius_curve(
    objective: Objective,
    config: SAMConfig | None = None,
    radii: Sequence[float] | None = None,
    initial_loss: float | None = None,
) -> RadiusCurve:
    """Measure cos(g, g_s) and L(w + e) - L(w) for several radii of SAM or ASAM.

    Args:
        objective: in one process. Each of its batches counts equally, as an update of that size.
        config: `sam_method` ("sam" or "asam"), `sam_target_sharpness`, `sam_eta` and
            `sam_adaptive_scope`; its other fields have no effect. By default that of SAM.
        radii: values of rho. By default nine, around the radius to which a few steps of the
            automatic rule on the first batch lead.
        initial_loss: that of the training that led to these weights, for the goal. By default L(w),
            as if training started here.

    Cost: 1 + n forward-backward passes over the examples for n radii, and without `radii` up to 16
    over the first batch. Memory: up to five copies of the perturbed weights.

    Raises:
        ValueError: the method, a radius or `initial_loss` is not allowed, a loss at the weights is
            not finite, or there are several processes.
    """
    config = config or SAMConfig()
    check_choice("sam_method", config.sam_method, METHODS)
    check_radii("rho", radii or ())
    if initial_loss is not None:
        check_number("initial_loss", initial_loss)
    if not radii:
        # From 1/16 to 16 times an estimate of the suggestion: from where e changes nothing to where
        # it breaks the updates, and wide enough for the first batch to be unusual.
        centre = _estimate(objective.subset([0]), config, initial_loss)
        radii = [centre * factor for factor in _FACTORS]
    loss, gradient_norm, readings = _measure(objective, config, sorted(set(radii)))
    curve = RadiusCurve(loss, _goal(config, initial_loss, loss), readings, None, "")
    found = [(r.rho, r.sharpness) for r in readings if math.isfinite(r.sharpness)]
    reached = next((i for i, (_, rise) in enumerate(found) if rise >= curve.goal), None)
    if gradient_norm == 0 or not math.isfinite(gradient_norm):
        state = "not finite" if gradient_norm else "zero"
        return replace(curve, reason=f"the gradient is {state}")
    if not found:
        return replace(curve, reason="no sharpness is finite")
    if reached is None:
        return replace(curve, reason=f"the largest rho, {found[-1][0]:.3g}, gives less")
    if reached == 0:
        return replace(curve, reason=f"the smallest rho, {found[0][0]:.3g}, gives more")
    (low, below), (high, above) = found[reached - 1], found[reached]
    share = 1.0
    if below > 0:  # otherwise there is no slope to interpolate: the radius that reaches the goal
        share = math.log(curve.goal / below) / math.log(above / below)
    return replace(curve, suggestion=low * (high / low) ** share)


def check_radii(name: str, radii: Sequence[float]) -> None:
    """Raise a ValueError unless the values of the argument called `name` are finite and > 0."""
    for rho in radii:
        if not (rho > 0 and math.isfinite(rho)):
            raise ValueError(f"{name}={rho!r} is not allowed. Allowed: a finite number > 0.")


def count_passes(batches: int, radii: Sequence[float] | None = None) -> int:
    """Cost of `radius_curve` in forward-backward passes over one batch, at most."""
    search = 0 if radii else 2 * _MOST_STEPS
    return search + batches * (1 + len(set(radii or _FACTORS)))


def _goal(config: SAMConfig, initial_loss: float | None, loss: float) -> float:
    first, now = torch.tensor([loss if initial_loss is None else initial_loss, loss]).double()
    rule = AutomaticRadius(config.sam_target_sharpness, {}, first.device, first.dtype)
    return float(rule.goal(first, now))


def _estimate(objective: Objective, config: SAMConfig, initial_loss: float | None) -> float:
    """Radius whose sharpness is near the goal: steps of the rule, bisection outside the bracket."""
    x = math.log(AutomaticRadius.START)
    low, high = math.log(_LOWEST), math.log(_HIGHEST)
    for _ in range(_MOST_STEPS):
        loss, gradient_norm, (reading,) = _measure(objective, config, [math.exp(x)])
        goal, rise = _goal(config, initial_loss, loss), reading.sharpness
        if not gradient_norm > 0 or goal == 0:
            break
        step = -_LIMIT  # an overflow at w + e
        if math.isfinite(rise):
            step = min(math.log(goal / rise), _LIMIT) if rise > 0 else _LIMIT
        if abs(step) < 0.2:
            break
        low, high = (x, high) if step > 0 else (low, x)
        x = x + step if low < x + step < high else (low + high) / 2
    return math.exp(x)


def _measure(
    objective: Objective, config: SAMConfig, radii: Sequence[float]
) -> tuple[float, float, list[RadiusReading]]:
    """L(w) and |g|, means over the batches, and the reading for each radius."""
    method = config.build_method()
    at_w, at_w_e = [], []
    for number in range(len(objective.batches)):
        batch = objective.subset([number])
        loss, g = batch.value_and_gradient()
        if not math.isfinite(loss):
            raise ValueError(f"the loss at the weights is {loss}: no radius can be measured")
        length = _dot(g, g).sqrt()
        at_w.append([loss, float(length)])
        with torch.no_grad():  # `direction` overwrites its gradient
            copies, weights = [x.clone() for x in g], list[Tensor](batch.weights)
            d, squared_norm = method.direction(batch.names, weights, copies, _dot, {})
        rows = []
        for rho in radii:
            with batch.perturbed(d, float(step_size(rho, squared_norm))):
                perturbed_loss, g_s = batch.value_and_gradient()
            cosine = _dot(g, g_s) / length / _dot(g_s, g_s).sqrt()
            rows.append((float(cosine), perturbed_loss - loss))
        at_w_e.append(rows)
    loss, gradient_norm = torch.tensor(at_w, dtype=torch.float64).mean(0).tolist()
    means = torch.tensor(at_w_e, dtype=torch.float64).mean(0)  # of (batches, radii, 2)
    pairs = zip(radii, means.tolist(), strict=True)
    return loss, gradient_norm, [RadiusReading(rho, *row) for rho, row in pairs]


def _dot(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Tensor:
    """Inner product in float64, a 0-dimensional tensor on the CPU."""
    return torch.tensor(dot(xs, ys), dtype=torch.float64)
