"""What is found by drawing, with the error that the drawing leaves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A mean, and the standard error of it (0 where nothing was drawn)."""

    value: float
    error: float = 0.0


def mean_of(values: Sequence[float]) -> Estimate:
    mean = sum(values) / len(values)
    if len(values) < 2:
        return Estimate(mean)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return Estimate(mean, math.sqrt(variance / len(values)))


def check_count(name: str, value: int, least: int) -> None:
    """Refuse what is no whole number from `least` up.

    Raises:
        ValueError: it names the argument and quotes its value.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(
            f"{name}={value!r} is not allowed. Allowed: a whole number from {least} up."
        )
