"""The rule of the automatic radius in float64 and plain Python, written from its formula.

    log rho += k * log(c * min(L_0 - L, |L|) / (L(w + e) - L(w)))

after every fourth update that may be perturbed, with the mean losses since the last time; L is the
loss, smoothed by the same k, and L_0 the first one. The minimum is at least a hundredth of |L_0|, a
logarithm is between -4 and 4, rho between 1e-6 and 1e4. Losses that are not finite do not count,
nor does L(w + e) - L(w) where e is 0; the other parts of an update stand for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

START, K, EVERY, LIMIT, LEAST = 0.01, 0.25, 4, 4.0, 0.01


class AutomaticRadius:
    """rho in the course of a run, with the share c."""

    def __init__(self, target: float, interval: int = 1) -> None:
        self.target, self.interval, self.rho = target, interval, START
        self._first = self._smoothed = math.nan
        self._number, self._losses, self._rises = 0, [], []

    def update(
        self, losses: Sequence[float], rises: Sequence[float], moved: Sequence[bool] | None = None
    ) -> None:
        """Take what the parts of an update add to L(w) and to L(w + e) - L(w).

        Args:
            rises: empty in a plain update.
            moved: whether e was not 0, for each rise; by default always.
        """
        loss = sum(losses)
        self._losses += [loss] * math.isfinite(loss)
        flags = moved or [True] * len(rises)
        known = [r for r, flag in zip(rises, flags, strict=True) if flag and math.isfinite(r)]
        self._rises += [fmean(known) * len(rises)] if known else []
        if self._number % (EVERY * self.interval) == (EVERY - 1) * self.interval:
            self._move()
        self._number += 1

    def _move(self) -> None:
        losses, rises, self._losses, self._rises = self._losses, self._rises, [], []
        if losses:
            loss = fmean(losses)
            if math.isnan(self._first):
                self._first = self._smoothed = loss
            self._smoothed = (1 - K) * self._smoothed + K * loss
        if not rises or math.isnan(self._first):
            return
        rise, least = fmean(rises), LEAST * abs(self._first)
        goal = self.target * max(min(self._first - self._smoothed, abs(self._smoothed)), least)
        if goal == 0 and rise <= 0:
            return
        logarithm = LIMIT if rise <= 0 else -LIMIT if goal == 0 else math.log(goal / rise)
        self.rho *= math.exp(K * max(-LIMIT, min(LIMIT, logarithm)))
        self.rho = max(1e-6, min(1e4, self.rho))
