"""Gradient cosine and sharpness against the radius rho, and the automatic radius of a model."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from ..config import SAMConfig
from ..config.checks import check_choice
from ..engine.metrics import cosine_similarity
from ..engine.perturbation import step_size
from ..engine.radius import AutomaticRadius
from .numerics import dot
from .objective import Objective

METHODS = ("sam", "asam")
_FACTORS = tuple(2.0**i for i in range(-4, 5))
_LOWEST, _HIGHEST = 1e-6, 1e4
_MOST_STEPS = 8  # of the search for the default radii


@dataclass(frozen=True)
class RadiusReading:
    """Effect of one radius: means over the batches. Each batch has its own e.

    Args:
        rho: the radius, |e| in the method's norm.
        cosine: cos(g, g_s), with g the gradient at w and g_s that at w + e.
        sharpness: L(w + e) - L(w), in units of the loss.
        growth: |g_s| / |g|.
        correction: `AutomaticRadius.correction`, limited as in training: the logarithm of the
            factor to the radius at which the target would be met. NaN if no batch has one.
    """

    rho: float
    cosine: float
    sharpness: float
    growth: float
    correction: float


@dataclass(frozen=True)
class RadiusCurve:
    """Readings in ascending order of rho, and the radius at which the automatic rule would settle.

    Args:
        loss: L(w), mean over the batches.
        target_cosine: that of the rule.
        readings: one for each radius.
        suggestion: the lowest radius at which the mean correction falls to 0, interpolated linearly
            in log rho; None if there is none among the radii.
        reason: why there is no suggestion; empty if there is one.
    """

    loss: float
    target_cosine: float
    readings: list[RadiusReading]
    suggestion: float | None
    reason: str


def radius_curve(
    objective: Objective, config: SAMConfig | None = None, radii: Sequence[float] | None = None
) -> RadiusCurve:
    r"""Measure cos(g, g_s), L(w + e) - L(w) and \|g_s\| / \|g\| for several radii of SAM or ASAM.

    Args:
        objective: in one process. Each of its batches counts equally, as an update of that size.
        config: `sam_method` ("sam" or "asam"), `sam_target_cosine`, `sam_eta` and
            `sam_adaptive_scope`; its other fields have no effect. By default that of SAM.
        radii: values of rho. By default nine, around the radius to which a few steps of the
            automatic rule on the first batch lead.

    Cost: 1 + n forward-backward passes over the examples for n radii, and without `radii` up to 16
    over the first batch. Memory: up to five copies of the perturbed weights.

    Raises:
        ValueError: the method or a radius is not allowed, a loss at the weights is not finite, or
            there are several processes.
    """
    config = config or SAMConfig(sam_rho=None)
    check_choice("sam_method", config.sam_method, METHODS)
    check_radii("rho", radii or ())
    if not radii:
        # From 1/16 to 16 times an estimate of the suggestion: from where e hardly turns the
        # gradient to where it breaks it, and wide enough for the first batch to be unusual.
        centre = _estimate(objective.subset([0]), config)
        radii = [centre * factor for factor in _FACTORS]
    loss, gradient_norm, readings = _measure(objective, config, sorted(set(radii)))
    curve = RadiusCurve(loss, config.sam_target_cosine, readings, None, "")
    found = [(math.log(r.rho), r.correction) for r in readings if not math.isnan(r.correction)]
    for (low, above), (high, below) in pairwise(found):
        if above > 0 >= below:
            rho = math.exp(low + (high - low) * above / (above - below))
            return replace(curve, suggestion=rho)
    if gradient_norm == 0:
        reason = "the gradient is zero"
    elif not found:
        reason = "no reading is finite"
    elif found[-1][1] > 0:
        reason = f"the rule would exceed the largest rho, {math.exp(found[-1][0]):.3g}"
    else:
        reason = f"the rule would fall below the smallest rho, {math.exp(found[0][0]):.3g}"
    return replace(curve, reason=reason)


def check_radii(name: str, radii: Sequence[float]) -> None:
    """Raise a ValueError unless the values of the argument called `name` are finite and > 0."""
    for rho in radii:
        if not (rho > 0 and math.isfinite(rho)):
            raise ValueError(f"{name}={rho!r} is not allowed. Allowed: a finite number > 0.")


def count_passes(batches: int, radii: Sequence[float] | None = None) -> int:
    """Cost of `radius_curve` in forward-backward passes over one batch, at most."""
    search = 0 if radii else 2 * _MOST_STEPS
    return search + batches * (1 + len(set(radii or _FACTORS)))


def _estimate(objective: Objective, config: SAMConfig) -> float:
    """Radius with a correction near 0: steps of the rule, bisection if they leave the bracket."""
    x = start = math.log(AutomaticRadius.START)
    low, high = math.log(_LOWEST), math.log(_HIGHEST)
    for _ in range(_MOST_STEPS):
        _, _, (reading,) = _measure(objective, config, [math.exp(x)])
        correction = reading.correction
        if math.isnan(correction):
            if x == start:  # a zero or non-finite gradient
                break
            correction = -AutomaticRadius.LIMIT  # an overflow at w + e
        if abs(correction) < 0.2:
            break
        low, high = (x, high) if correction > 0 else (low, x)
        x = x + correction if low < x + correction < high else (low + high) / 2
    return math.exp(x)


def _measure(
    objective: Objective, config: SAMConfig, radii: Sequence[float]
) -> tuple[float, float, list[RadiusReading]]:
    """L(w) and |g|, means over the batches, and the reading for each radius."""
    method = config.build_method()
    rule = AutomaticRadius(config.sam_target_cosine, {}, torch.device("cpu"), torch.float64)
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
            compared = cosine_similarity(g, g_s, lambda members: _dot)
            assert compared is not None
            cosine, growth = compared[0], compared[1].sqrt() / length
            correction = rule.correction(cosine, growth).clamp(-rule.LIMIT, rule.LIMIT)
            numbers = float(cosine), perturbed_loss - loss, float(growth), float(correction)
            rows.append(numbers)
        at_w_e.append(rows)
    loss, gradient_norm = torch.tensor(at_w, dtype=torch.float64).mean(0).tolist()
    found = torch.tensor(at_w_e, dtype=torch.float64)  # (batches, radii, 4)
    means = found.mean(0)
    means[:, 3] = found[:, :, 3].nanmean(0)  # the rule ignores readings that are not finite
    pairs = zip(radii, means.tolist(), strict=True)
    return loss, gradient_norm, [RadiusReading(rho, *row) for rho, row in pairs]


def _dot(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Tensor:
    """Inner product in float64, a 0-dimensional tensor on the CPU."""
    return torch.tensor(dot(xs, ys), dtype=torch.float64)
