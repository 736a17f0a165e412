"""Estimates over seeds: means, paired differences and ratios with 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval, infinite if the data do not bound it. NaN: not measured."""

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2

    @property
    def is_bounded(self) -> bool:
        return math.isfinite(self.half_width)

    @property
    def is_known(self) -> bool:
        return math.isfinite(self.value)

    def show(self, digits: int = 3) -> str:
        half = f" ± {self.half_width:.{digits}f}" if self.is_bounded else ""
        return f"{self.value:.{digits}f}{half}" if self.is_known else "-"

    def show_signed(self, digits: int = 1, factor: float = 100) -> str:
        """By default, a difference of shares in points."""
        value, low, high = (f"{factor * x:+.{digits}f}" for x in (self.value, self.low, self.high))
        shown = f"{value} [{low}, {high}]" if self.is_bounded else value
        return shown if self.is_known else "-"


def mean_interval(values: Sequence[float]) -> Estimate:
    """The mean and its interval by Student's t."""
    mean = float(np.mean(values))
    half = _quantile(len(values)) * float(stats.sem(values)) if len(values) > 1 else math.inf
    return Estimate(mean, mean - half, mean + half)


def paired_gain(scores: Sequence[float], baseline: Sequence[float]) -> Estimate:
    """The mean over the seeds of score - baseline, with the interval of the paired t-test."""
    return mean_interval(np.subtract(scores, baseline))


def share(gains: Sequence[float], reference_gains: Sequence[float]) -> Estimate:
    """mean(gains) / mean(reference gains), with Fieller's interval over the paired seeds.

    The interval is the set of ratios r for which the paired t-test does not reject that
    gains - r * reference_gains has the mean 0. It is unbounded if the mean of the reference's gains
    does not differ significantly from 0; so is, by convention, that of a reference that loses.

    Fieller, "Some problems in interval estimation", Journal of the Royal Statistical Society B 16,
    1954.
    """
    a, b = float(np.mean(gains)), float(np.mean(reference_gains))
    unbounded = Estimate(a / b if b else math.nan, -math.inf, math.inf)
    if len(gains) < 2 or b <= 0:
        return unbounded
    (s_aa, s_ab), (_, s_bb) = np.cov(gains, reference_gains) / len(gains)
    t2 = _quantile(len(gains)) ** 2
    # (a - r b)^2 <= t^2 (s_aa - 2 r s_ab + r^2 s_bb), a quadratic in r.
    square, linear, constant = b**2 - t2 * s_bb, a * b - t2 * s_ab, a**2 - t2 * s_aa
    if square <= 0:
        return unbounded
    if np.allclose(gains, reference_gains, rtol=0, atol=1e-12):
        return Estimate(1.0, 1.0, 1.0)
    root = math.sqrt(max(linear**2 - square * constant, 0.0))
    return Estimate(a / b, (linear - root) / square, (linear + root) / square)


def _quantile(count: int) -> float:
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1))
