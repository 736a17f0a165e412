"""Numerical helpers: inner products, sample means with standard errors, argument checks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


def dot(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> float:
    """Euclidean inner product of two lists of tensors, in float64. Synchronises with the device."""
    pairs = zip(xs, ys, strict=True)
    products = [torch.linalg.vecdot(x.double().flatten(), y.double().flatten()) for x, y in pairs]
    return float(torch.stack(products).sum().item())


def norm(xs: Sequence[Tensor]) -> float:
    """Euclidean norm of a list of tensors, in float64. Synchronises with the device."""
    return math.sqrt(dot(xs, xs))


@dataclass(frozen=True)
class Estimate:
    """Sample mean and its standard error.

    Args:
        value: the mean, in the units of the estimated quantity.
        error: the standard error of the mean; 0 for a single sample or an exact quantity.
    """

    value: float
    error: float = 0.0

    @classmethod
    def from_samples(cls, samples: Sequence[float]) -> Self:
        """Mean of the samples, with the standard error from their sample variance."""
        values = torch.tensor(samples, dtype=torch.float64)
        error = values.std() / len(samples) ** 0.5 if len(samples) > 1 else 0.0
        return cls(float(values.mean()), float(error))


def check_count(name: str, value: int, minimum: int) -> None:
    """Raise a ValueError unless the argument called `name` is an integer of at least `minimum`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{name}={value!r} is not allowed. Allowed: an integer >= {minimum}.")
