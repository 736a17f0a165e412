"""The second table of `compare_methods.py`: what else is known of the final models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from compare.format import markdown, signed, with_error
from compare.measures import MEASURES, Measure
from compare.recipes import PLAIN
from compare.statistics import Estimate, mean_interval, paired_gain

Runs = dict[str, dict[int, dict[str, Any]]]  # of one recipe: by level and seed


@dataclass
class Measured:
    """A measure of a recipe: means over the levels, with intervals over the seeds.

    Args:
        difference: to plain training with as many updates. None where that was not measured.
        equal_difference: to plain training with as many passes.
    """

    value: Estimate
    difference: Estimate | None
    equal_difference: Estimate | None


def measure_recipe(own: Runs, plain: Runs, longer: Runs | None) -> dict[str, Measured | None]:
    """By the key of each measure; None where a run has none, as those of older results."""
    levels, seeds = list(plain), sorted(next(iter(plain.values())))

    def means(runs: Runs | None, measure: Measure) -> np.ndarray | None:
        if runs is None:
            return None
        values = [[measure.read(runs[level][seed]) for seed in seeds] for level in levels]
        is_complete = all(value is not None for row in values for value in row)
        return np.mean(values, axis=0) if is_complete else None

    def measured(measure: Measure) -> Measured | None:
        mine = means(own, measure)
        if mine is None:
            return None
        others = [means(runs, measure) for runs in (plain, longer)]
        gains = [None if other is None else paired_gain(mine, other) for other in others]
        return Measured(mean_interval(mine), *gains)

    return {measure.key: measured(measure) for measure in MEASURES}


def measures_table(rows: Sequence[Any]) -> str:
    """A line for each measure and recipe: its mean, and the differences to plain training."""
    lines = []
    for measure in MEASURES:
        if not measure.is_usual and not any(row.measures.get(measure.key) for row in rows):
            continue
        for row in rows:
            found = row.measures.get(measure.key)
            line = [measure.words, row.name]
            line += ["-"] if found is None else [with_error(found.value, measure.digits)]
            for name in ("difference", "equal_difference"):
                difference = None if found is None else getattr(found, name)
                is_shown = difference is not None and row.name != PLAIN
                line.append(signed(difference, measure.digits) if is_shown else "-")
            lines.append(line)
    head = ["measure", "recipe", "mean", "difference to plain", "difference, equal passes"]
    return markdown(head, lines)
