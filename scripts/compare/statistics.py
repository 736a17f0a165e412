"""The statistics of `compare_methods.py`: means and differences over seeds, with 95 % intervals.

All recipes train with the same seeds, and a seed fixes the initial weights, the wrong labels and
the order of the data. So recipes are compared seed by seed: what a seed does to both cancels out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval. The ends are infinite where the data do not bound it."""

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2

    @property
    def is_bounded(self) -> bool:
        return math.isfinite(self.low) and math.isfinite(self.high)


def mean_interval(values: Sequence[float]) -> Estimate:
    """The mean and its interval by Student's t. Unbounded for a single value."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return Estimate(mean, -math.inf, math.inf)
    half = _quantile(len(values)) * float(stats.sem(values))
    return Estimate(mean, mean - half, mean + half)


def paired_gain(scores: Sequence[float], baseline: Sequence[float]) -> Estimate:
    """The mean over the seeds of score - baseline, with the interval of the paired t-test."""
    return mean_interval(np.subtract(scores, baseline))


def share(gains: Sequence[float], reference_gains: Sequence[float]) -> Estimate:
    """mean(gains) / mean(reference gains), with Fieller's interval over the paired seeds.

    The interval is the set of ratios r for which the paired t-test does not reject that
    gains - r * reference_gains has the mean 0. Where the reference's own gain does not differ
    from 0, that set has no bounds, and says so: there is nothing to have a share of. Nor is there
    where the reference loses.

    Fieller, "Some problems in interval estimation", Journal of the Royal Statistical Society B 16,
    1954.
    """
    a, b = float(np.mean(gains)), float(np.mean(reference_gains))
    value = a / b if b else math.nan
    if len(gains) < 2 or b <= 0:
        return Estimate(value, -math.inf, math.inf)
    (s_aa, s_ab), (_, s_bb) = np.cov(gains, reference_gains) / len(gains)
    t2 = _quantile(len(gains)) ** 2
    # (a - r b)^2 <= t^2 (s_aa - 2 r s_ab + r^2 s_bb), a quadratic in r.
    square, linear, constant = b**2 - t2 * s_bb, a * b - t2 * s_ab, a**2 - t2 * s_aa
    if square <= 0:
        return Estimate(value, -math.inf, math.inf)
    if np.allclose(gains, reference_gains, rtol=0, atol=1e-12):
        return Estimate(1.0, 1.0, 1.0)
    root = math.sqrt(max(linear**2 - square * constant, 0.0))
    return Estimate(value, (linear - root) / square, (linear + root) / square)


def _quantile(count: int) -> float:
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1))
