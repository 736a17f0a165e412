"""The rule of the automatic radius in float64 and plain Python, written from its formula.

    log rho += k * log min(tan(acos c) / tan(theta), 1 / (|g_s| / |g| - 1 - tan(theta)))

in every fourth update, with theta the angle between g and g_s, averaged over the perturbations of
the update. The second term counts where it is positive. The angle is at most that of the cosine
exp(-4), and a logarithm is between -4 and 4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from reference_sam import Readings

START, K, EVERY, LIMIT = 0.01, 0.25, 4, 4.0


def next_rho(rho: float, readings: Sequence[Readings], target: float) -> float:
    found = [r for r in readings if not math.isnan(r.cosine)]
    if not found:
        return rho
    return rho * math.exp(K * sum(log_factor(r, target) for r in found) / len(found))


def log_factor(reading: Readings, target: float) -> float:
    turn = math.tan(math.acos(max(min(reading.cosine, 1.0), math.exp(-LIMIT))))
    factors = [math.tan(math.acos(target)) / turn if turn else math.inf]
    excess = reading.growth - 1 - turn
    if excess > 0:
        factors.append(1 / excess)
    logarithm = math.log(min(factors)) if min(factors) < math.inf else math.inf
    return max(-LIMIT, min(LIMIT, logarithm))
