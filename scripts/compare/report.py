"""The results of `compare_methods.py` as tables: estimates over seeds, rows, Markdown.

All recipes train with the same seeds, and a seed fixes the initial weights, the wrong labels and
the order of the data. So recipes are compared seed by seed: the effect of the seed cancels out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd
from common.cli import InputError, closest
from compare.plot import STYLES, draw_gain_and_cost, draw_gains, draw_sharpness
from compare.recipes import PLAIN
from scipy import stats

LENGTH_STEP = 0.05  # longer plain runs are shared by recipes whose cost rounds to the same
CONFIDENCE = 0.95
# Beside the score: key of a run's record (`outer.inner` if nested), words, digits.
MEASURES = (
    ("ece", "calibration error (ECE)", 3),
    ("nll", "negative log-likelihood", 3),
    ("corrupted_accuracy", "accuracy on corrupted images", 3),
    ("sharpness.worst_sharpness", "worst-case sharpness", 3),
    ("sharpness.adaptive_worst_sharpness", "the same, ASAM's ball", 3),
    ("sharpness.hessian_eigenvalue", "largest Hessian eigenvalue", 1),
    ("sharpness.hessian_trace", "trace of the Hessian", 0),
)
Some = Sequence[Any] | None
USUAL_MEASURES = ("ece", "nll")  # shown even if no run has them


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
    """

    def __init__(
        self, content: dict[str, Any], reference: str, names: Some = None, *asked: Some
    ) -> None:
        self.settings, self.recipes = content["settings"], content["recipes"]
        self.costs = content.get("costs", {}).get("recipes", {})
        self.metric, self.reference = self.settings.get("metric", "accuracy"), reference
        if not content["runs"]:
            raise InputError("the results file has no runs yet")
        frame = pd.json_normalize(content["runs"])
        for key, values in zip(("seed", "level"), asked, strict=False):
            frame = frame[frame[key].isin(values)]
        self.levels = sorted(frame["level"].unique(), key=_parse)
        self.levels_in_words = [in_words(level) for level in self.levels]
        self.metric_in_words = self.metric.replace("_", " ").replace("matthews", "Matthews")
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
        kind = "images" if "training_images" in self.settings else "texts"
        what = "; ".join(self.levels_in_words)
        if len(self.levels) > 4:  # too long for the title of a picture
            what = f"mean over {len(self.levels)} kinds of labels"
        examples = f"{self.settings[f'training_{kind}']} training {kind}"
        return f"{self.settings['task']}, {examples}, {len(self.seeds)} seeds: {what}"

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
        """At a level, or of the means over the levels; of the score if no key is given."""
        key, at = key or self.metric, slice(None) if level is None else [self.levels.index(level)]
        lengths = [plain_length([passes]) for passes in self.passes(name)]
        arrays = self.values(key, name), self.values(key, PLAIN), self.values(key, PLAIN, lengths)
        own, *others = (array[at].mean(0) for array in arrays)
        pairs = [(mean_interval(other), paired_gain(own, other)) for other in others]
        return Contrast(mean_interval(own), *pairs[0], *pairs[1])

    def share(self, name: str) -> Estimate:
        """Of the reference's gain."""
        own, ours, plain = (self.values(self.metric, n) for n in (name, self.reference, PLAIN))
        return share((own - plain).mean(0), (ours - plain).mean(0))

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
            gains = self.values(self.metric, PLAIN, [length] * len(self.levels)) - usual
            if not np.isnan(gains).any():
                curve.append((length, float(gains.mean())))
        return curve


def plain_length(passes: Sequence[float]) -> float:
    """The length of plain training with the same number of passes, rounded, from the seeds'."""
    return round(round(sum(passes) / len(passes) / LENGTH_STEP) * LENGTH_STEP, 2)


def _parse(level: str) -> tuple[float, float, str]:
    """Minus the share of the data, the label noise (infinite for human labels), the labels.

    In this order levels are shown: all data first, and human labels last.
    """
    labels, _, fraction = level.partition(" at ")
    try:
        return -float(fraction or 1), float(labels), labels
    except ValueError:
        return -float(fraction or 1), math.inf, labels


def in_words(level: str) -> str:
    """'10 % of the data, 40 % wrong labels', or the column of the human labels."""
    part, noise, labels = _parse(level)
    words = f"{100 * noise:g} % wrong labels" if noise < math.inf else labels.replace("_", " ")
    return words if part == -1 else f"{-100 * part:g} % of the data, {words}"


def main_table(comparison: Comparison) -> str:
    """Scores, gains and costs of each recipe."""
    metric, levels = comparison.metric_in_words, comparison.levels
    head = ["recipe", "rho", *(f"{metric}, {in_words(level)}" for level in levels)]
    head += ["gain", "share", "gain, equal passes", "passes", "time", "memory"]
    lines = []
    for name in comparison.names:
        rho, score, part = (
            of(name) for of in (comparison.rho, comparison.contrast, comparison.share)
        )
        shown = f"{part.value:.2f} [{part.low:.2f}, {part.high:.2f}]" if part.is_bounded else "-"
        gains = [score.gain.show_signed(), shown, score.equal_gain.show_signed()]
        costs = ["-", "-"]
        if name in comparison.costs:
            median, low, high = (f"{t:.2f}" for t in comparison.time(name))
            costs = [median if low == high else f"{median} ({low} to {high})"]
            costs.append(f"{comparison.memory(name):.2f}")
        line = [name, "-" if rho is None else str(rho)]
        line += [comparison.contrast(name, level).value.show() for level in levels]
        line += ["-", "-", "-"] if name == PLAIN else gains
        lines.append([*line, f"{fmean(comparison.passes(name)):.2f}", *costs])
    return markdown(head, lines)


def gain_table(comparison: Comparison) -> str:
    """At each level the scores, and the gain over plain training of either length."""
    head = ["level", "recipe", comparison.metric_in_words, "plain", "plain, equal passes"]
    head += ["gain", "gain, equal passes"]
    lines = []
    for level in (*comparison.levels, None) if len(comparison.levels) > 1 else comparison.levels:
        for name in [name for name in comparison.names if name != PLAIN]:
            at = comparison.contrast(name, level)
            line = ["mean", name, "", "", ""]
            if level is not None:
                scores = (at.value, at.plain, at.longer)
                line = [in_words(level), name, *(score.show() for score in scores)]
            lines.append([*line, at.gain.show_signed(), at.equal_gain.show_signed()])
    return markdown(head, lines)


def measures_table(comparison: Comparison) -> str:
    """A line for each measure and recipe: its mean, and the differences to plain training."""
    lines = []
    for key, words, digits in MEASURES:
        found = {name: comparison.contrast(name, key=key) for name in comparison.names}
        if key in USUAL_MEASURES or any(of.value.is_known for of in found.values()):
            for name, of in found.items():
                gains = [x.show_signed(digits, 1) for x in (of.gain, of.equal_gain)]
                gains = ["-", "-"] if name == PLAIN else gains
                lines.append([words, name, of.value.show(digits), *gains])
    head = ["measure", "recipe", "mean", "difference to plain", "difference, equal passes"]
    return markdown(head, lines)


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, with columns of equal width."""
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    rows = [head, ["-" * width for width in widths], *lines]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    )


def report(folder: Path, content: dict, reference: str, names: Some, *asked: Some) -> None:
    """Print the tables of a `Comparison`; save them and the pictures."""
    recipes = content["recipes"]
    for name in (*(names or ()), reference):
        if name not in recipes:
            raise InputError(f"the results have no recipe {name!r}{closest(name, recipes)}")
    comparison = Comparison(content, reference, names, *asked)
    title, notes = comparison.title(), comparison.notes
    for name in comparison.names:  # an adaptive recipe may perturb more often in a short run
        passes = fmean(comparison.passes(name))
        timed = comparison.costs.get(name, {}).get("passes", passes)
        if abs(timed - passes) > 0.05:
            notes.append(f"note: {name} made {timed:.2f} passes an update when it was timed")
    table, measures = main_table(comparison), measures_table(comparison)
    text = [f"# {title}", table, *notes, "## At each noise level", gain_table(comparison)]
    text += ["## Measures of the final models, means over the noise levels", measures]
    text += [
        "## Recipes",
        *(f"{name}: {recipes[name]['description']}" for name in comparison.names),
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")
    files = ["table.md", "gain_and_cost.png"]
    draw_gain_and_cost(comparison, folder / files[1])
    if 1 < len(comparison.names) <= 1 + len(STYLES):  # more than the colours would be illegible
        draw_gains(comparison, folder / "gains.png")
        files.append("gains.png")
        if draw_sharpness(comparison, folder / "sharpness.png"):
            files.append("sharpness.png")
    print("", title, "", table, *notes, "", measures, sep="\n")
    print(f"\nsaved in {folder}: {', '.join(files)}")
