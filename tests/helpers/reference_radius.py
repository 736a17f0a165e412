"""The rule of the automatic radius in float64 and plain Python, written from its formula.

    log rho += k * log(c * min(L_0 - L, |L|) / (L(w + e) - L(w)))

after every fourth update, with the mean losses of these updates; L is the loss, smoothed by the
same k, and L_0 the first one. The minimum is at least a hundredth of |L_0|, and a logarithm is
between -4 and 4. Losses that are not finite do not count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

START, K, EVERY, LIMIT, LEAST = 0.01, 0.25, 4, 4.0, 0.01


class AutomaticRadius:
    """rho in the course of a run, with the share c."""

    def __init__(self, target: float) -> None:
        self.target, self.rho = target, START
        self._first = self._smoothed = math.nan
        self._updates: list[tuple[float, float]] = []  # all of them

    def update(self, losses: Sequence[float], rises: Sequence[float]) -> None:
        """Take what the parts of an update add to L(w) and to L(w + e) - L(w)."""
        self._updates.append((sum(losses), sum(rises)))
        if len(self._updates) % EVERY:
            return
        counted = [pair for pair in self._updates[-EVERY:] if all(map(math.isfinite, pair))]
        if counted:
            self._move(*map(fmean, zip(*counted, strict=True)))

    def _move(self, loss: float, rise: float) -> None:
        if math.isnan(self._first):
            self._first = self._smoothed = loss
        self._smoothed = (1 - K) * self._smoothed + K * loss
        least = LEAST * abs(self._first)
        goal = self.target * max(min(self._first - self._smoothed, abs(self._smoothed)), least)
        if goal == 0 and rise <= 0:
            return
        logarithm = LIMIT if rise <= 0 else -LIMIT if goal == 0 else math.log(goal / rise)
        self.rho *= math.exp(K * max(-LIMIT, min(LIMIT, logarithm)))
