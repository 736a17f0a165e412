"""The finished runs of a results file: scores, paired gains, shares and costs of each recipe.

All recipes train with the same seeds, and a seed fixes the initial weights, the wrong labels and
the order of the data. So recipes are compared seed by seed: the effect of the seed cancels out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd
from common.cli import InputError
from compare.estimates import Estimate, mean_interval, share
from compare.recipes import PLAIN

LENGTH_STEP = 0.05  # longer plain runs are shared by recipes whose cost rounds to the same
Some = Sequence[Any] | None


@dataclass
class Contrast:
    """A score or measure of a recipe, and the differences to plain training."""

    value: Estimate
    plain: Estimate  # with the same number of updates
    gain: Estimate
    longer: Estimate  # plain training with the same number of passes
    equal_gain: Estimate


class Comparison:
    """The finished recipes of a results file, with the finished seeds.

    Args:
        content: of the file.
        reference: recipe that, like plain training, must have run with a seed at every level.
        names: of the recipes to report; all if None.
        asked: the seeds and the levels to report; all if not given.
        metric: key of the runs' records; the task's if None.
    """

    def __init__(
        self,
        content: dict[str, Any],
        reference: str,
        names: Some = None,
        *asked: Some,
        metric: str | None = None,
    ) -> None:
        self.settings, self.recipes = content["settings"], content["recipes"]
        self.costs = content.get("costs", {}).get("recipes", {})
        own = self.settings.get("metric", "accuracy")
        self.metric, self.reference, self.lower_is_better = metric or own, reference, own == "mse"
        self.unit = "% of the MSE of plain training" if self.lower_is_better else "points"
        self.gain_in_words = "gain, %" if self.lower_is_better else "gain"
        if not content["runs"]:
            raise InputError("the results file has no runs yet")
        frame = pd.json_normalize(content["runs"])
        for key in [key for key in frame if key.startswith(("rounded.", "noisy."))]:
            change = frame[own].astype(float) - frame[key].astype(float)
            frame[f"lost.{key}"] = -change if self.lower_is_better else change
        for key, values in zip(("seed", "level"), asked, strict=False):
            frame = frame[frame[key].isin(values)]
        self.levels = sorted(frame["level"].unique(), key=_parse)
        self.levels_in_words = [in_words(level) for level in self.levels]
        words = self.metric.replace("_", " ").replace("mse", "MSE")
        self.metric_in_words = words.replace("matthews", "Matthews")
        both = frame[(frame["length"] == 1) & frame["recipe"].isin([PLAIN, reference])]
        done = both.groupby("seed").size().reindex(frame["seed"].unique(), fill_value=0)
        missing = (len({PLAIN, reference}) * len(self.levels) - done).sort_index()
        self.seeds = missing.index[missing == 0].tolist()
        if not self.seeds:
            raise InputError(f"{PLAIN} and {reference} are not finished at all levels of any seed")
        self.notes = [
            f"left out: seed {seed}, {count} runs of {PLAIN} and {reference} are missing"
            for seed, count in missing[missing > 0].items()
        ]
        frame = frame[frame["seed"].isin(self.seeds)]
        self.frame = frame.set_index(["recipe", "length", "level", "seed"])
        self._columns: dict[str, dict[Any, float]] = {}
        self.names = []
        for name in self.recipes:
            if names is None or name in (PLAIN, reference, *names):
                count = int(np.isnan(self.values(self.metric, name)).sum())
                if count:
                    self.notes.append(f"left out: {name}, {count} of its runs are missing")
                else:
                    self.names.append(name)

    def title(self) -> str:
        what = "; ".join(self.levels_in_words)
        if len(self.levels) > 4:  # too long for the title of a picture
            what = f"mean over {len(self.levels)} kinds of labels"
        counts = {kind: self.settings.get(f"training_{kind}") for kind in ("images", "texts")}
        found = [f"{count} training {kind}" for kind, count in counts.items() if count]
        if not found:
            found = [f"{self.settings['file']}, {self.settings['model']['name']}"]
        return f"{self.settings['task']}, {found[0]}, {len(self.seeds)} seeds: {what}"

    def values(self, key: str, name: str, lengths: Sequence[float] | None = None) -> np.ndarray:
        """(levels, seeds), NaN where there is none.

        Args:
            key: of the runs' records, `outer.inner` if nested.
            lengths: of the training at each level; the plain schedule's if None.
        """
        if key not in self._columns:
            column = self.frame[key].astype(float).to_dict() if key in self.frame else {}
            self._columns[key] = column
        found, lengths = self._columns[key], lengths or [1.0] * len(self.levels)
        at_level = zip(lengths, self.levels, strict=True)
        return np.array(
            [[found.get((name, n, at, s), np.nan) for s in self.seeds] for n, at in at_level]
        )

    def passes(self, name: str) -> list[float]:
        """Of an update, at each level."""
        return [fmean(values) for values in self.values("passes", name)]

    def contrast(self, name: str, level: str | None = None, key: str | None = None) -> Contrast:
        """At a level, or of the means over the levels.

        Without a key, of the score, with gains as those of `gains`; else with differences.
        """
        at = slice(None) if level is None else [self.levels.index(level)]
        lengths = [plain_length([passes]) for passes in self.passes(name)]
        own, *others = (
            self.values(key or self.metric, *run)[at]
            for run in ((name,), (PLAIN,), (PLAIN, lengths))
        )
        found = [mean_interval(own.mean(0))]
        for other in others:
            gains = self.gains(own, other, at) if key is None else (own - other).mean(0)
            found += [mean_interval(other.mean(0)), mean_interval(gains)]
        return Contrast(*found)

    def gains(self, own: np.ndarray, other: np.ndarray, at: Any = slice(None)) -> np.ndarray:
        """For each seed, the mean over the levels: positive where `own` is better.

        Differences, and of an error as shares of plain training's mean error at the level.

        Args:
            own, other: scores (levels, seeds), of the levels `at`.
        """
        if self.lower_is_better:
            usual = self.values(self.metric, PLAIN)[at].mean(1, keepdims=True)
            own, other = -own / usual, -other / usual
        return (own - other).mean(0)

    def share(self, name: str) -> Estimate:
        """Of the reference's gain."""
        own, ours, plain = (self.values(self.metric, n) for n in (name, self.reference, PLAIN))
        return share(self.gains(own, plain), self.gains(ours, plain))

    def share_in_words(self, name: str) -> str:
        part = self.share(name)
        return f"{part.value:.2f} [{part.low:.2f}, {part.high:.2f}]" if part.is_bounded else "-"

    def rho(self, name: str) -> float | str | None:
        options = self.recipes[name].get("options", {})
        return options.get("sam_rho", options.get("rho"))

    def time(self, name: str) -> list[float]:
        """Of an update, in units of plain training's: median and quartiles over the rounds."""
        ratios = np.divide(self.costs[name]["seconds"], self.costs[PLAIN]["seconds"])
        return np.quantile(ratios, [0.5, 0.25, 0.75]).tolist()

    def memory(self, name: str) -> float:
        """Peak beyond that of plain training, in units of the bytes of the model."""
        peak, of_plain = (self.costs[n]["peak_bytes"] for n in (name, PLAIN))
        return (peak - of_plain) / self.costs[name]["model_bytes"]

    def plain_curve(self) -> list[tuple[float, float]]:
        """(length, gain over the usual length) of plain training that was run at every level."""
        curve, usual = [], self.values(self.metric, PLAIN)
        for length in sorted(set(self.frame.loc[PLAIN].index.get_level_values("length"))):
            scores = self.values(self.metric, PLAIN, [length] * len(self.levels))
            if not np.isnan(scores).any():
                curve.append((length, float(self.gains(scores, usual).mean())))
        return curve


def default_reference(names: Iterable[str]) -> str:
    """SAM, or if it is not compared, the first recipe that is not plain training."""
    others = [name for name in names if name != PLAIN]
    return "sam" if "sam" in others or not others else others[0]


def plain_length(passes: Sequence[float]) -> float:
    """The length of plain training with the same number of passes, rounded, from the seeds'."""
    return round(round(sum(passes) / len(passes) / LENGTH_STEP) * LENGTH_STEP, 2)


def _parse(level: str) -> tuple[float, float, str]:
    """Minus the share of the data, the label noise (infinite for human labels), the labels.

    In this order levels are shown: all data first, and human labels last. Of a horizon the last
    is the number of steps, filled up with blanks.
    """
    labels, _, fraction = level.partition(" at ")
    if level.endswith(" steps"):
        return -1.0, math.inf, level.rjust(12)
    try:
        return -float(fraction or 1), float(labels), labels
    except ValueError:
        return -float(fraction or 1), math.inf, labels


def in_words(level: str) -> str:
    """'10 % of the data, 40 % wrong labels', or the column of the human labels."""
    part, noise, labels = _parse(level)
    is_share = noise < math.inf
    words = f"{100 * noise:g} % wrong labels" if is_share else labels.strip().replace("_", " ")
    return words if part == -1 else f"{-100 * part:g} % of the data, {words}"
