"""Metrics of the updates, kept on the device until they are logged."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..methods.base import Dot, Method, Names, Tensors
from .parameters import PARAMETER_GROUPS

# In the order in which they are logged.
_NAMES = (
    "rho",
    "ascent_grad_norm",
    "perturbation_norm",
    *(f"share_{group}" for group in PARAMETER_GROUPS),
    "grad_cosine",
    "sharpness",
    "passes_per_update",
)
_FOLD = 64  # values that are kept before they are summed: bounds their number between two logs


class Metrics:
    """The `sam_*` entries of the logs.

    `sam_sharpness` is the mean of L(w + e) - L(w) over the perturbed updates since the last log,
    `sam_passes_per_update` the mean over all updates. The others are those of the last perturbed
    update before the log, as the Trainer's `grad_norm` is: they cost passes over the weights and
    are measured only where a log shows them.
    """

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._latest: dict[str, Tensor] = {}
        self._rises: list[Tensor] = []
        self._sharpness = torch.zeros(()), torch.zeros(())  # sum and number
        self._passes, self._updates = 0.0, 0

    def add_sharpness(self, rise: Tensor) -> None:
        """Record L(w + e) - L(w) of one update. Left out if it is not finite."""
        self._rises.append(rise)
        if len(self._rises) >= _FOLD:
            self._fold()

    def _fold(self) -> None:
        if not self._rises:
            return
        total, count = (x.sum() for x in _finite(torch.stack(self._rises)))
        self._sharpness = total + self._sharpness[0], count + self._sharpness[1]
        self._rises = []

    def add_passes(self, passes: float) -> None:
        """Record the forward-backward passes of one update; a plain update has 1."""
        self._passes += passes
        self._updates += 1

    def set(self, **values: Tensor) -> None:
        """Record values of the current update, each a 0-dimensional tensor."""
        self._latest.update(values)

    def pop(self, total: Callable[[Tensors], Tensor]) -> dict[str, float]:
        """The metrics since the last call, in one transfer from the device; finite values only.

        `total` sums numbers over the processes. It is called on every process, with the same number
        of values whatever this process has measured.
        """
        self._fold()
        found = {name: _finite(value) for name, value in self._latest.items()}
        found["sharpness"] = self._sharpness
        found["passes_per_update"] = torch.tensor(self._passes), torch.tensor(self._updates)
        self._reset()
        nothing = torch.zeros(())
        pairs = [found.get(name, (nothing, nothing)) for name in _NAMES]
        sums, counts = zip(*pairs, strict=True)
        numbers = total([*sums, *counts]).tolist()
        logged = zip(_NAMES, numbers[: len(_NAMES)], numbers[len(_NAMES) :], strict=True)
        return {f"sam_{name}": value / count for name, value, count in logged if count}


def _finite(values: Tensor) -> tuple[Tensor, Tensor]:
    """The values with 0 where they are not finite, and a flag where they are."""
    usable = torch.isfinite(values)
    return torch.where(usable, values, 0), usable


def measure(
    method: Method,
    names: Names,
    groups: Sequence[str],
    weights: Tensors,
    perturbation: Tensors,
    descent_grads: Sequence[Tensor | None],
    dot_over: Callable[[Sequence[int]], Dot],
) -> dict[str, Tensor]:
    """|e|, its shares on groups of parameters, and cos(g, g_s). Overwrites `perturbation`.

    `dot_over` returns the inner product over the parameters at the given positions.
    """
    squares = {}
    for group in PARAMETER_GROUPS:
        if members := [i for i, its_group in enumerate(groups) if its_group == group]:
            e = [perturbation[i] for i in members]
            squares[group] = dot_over(members)(e, e)
    squared_norm = torch.stack(list(squares.values())).sum()
    values = {"perturbation_norm": squared_norm.sqrt()}
    if method.reports_shares:
        values.update((f"share_{group}", s / squared_norm) for group, s in squares.items())

    g = method.ascent_gradient(names, weights, perturbation)
    pairs = [(i, y) for i, y in enumerate(descent_grads) if y is not None]
    if g is not None and pairs:
        members, g_s = (list(side) for side in zip(*pairs, strict=True))
        every, dot = dot_over(range(len(g))), dot_over(members)
        product = dot([g[i] for i in members], g_s)
        # Two roots: the product of the squares may overflow or underflow where the norms do not.
        values["grad_cosine"] = product / every(g, g).sqrt() / dot(g_s, g_s).sqrt()
    return values
