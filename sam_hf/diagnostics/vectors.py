"""Vectors as long as the weights: lists with a tensor for each parameter."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def dot(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> float:
    """The inner product over all tensors, in float64. Waits for the device."""
    pairs = zip(xs, ys, strict=True)
    return float(
        torch.stack(
            [torch.linalg.vecdot(x.double().flatten(), y.double().flatten()) for x, y in pairs]
        )
        .sum()
        .item()
    )


def norm(xs: Sequence[Tensor]) -> float:
    """The Euclidean norm over all tensors, in float64. Waits for the device."""
    return math.sqrt(dot(xs, xs))
