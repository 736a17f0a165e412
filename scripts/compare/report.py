"""The report of `compare_methods.py`: tables in Markdown, and the pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from common.cli import InputError, closest
from compare.comparison import Comparison, Some, in_words
from compare.measures import NOISE, ROUNDED_BITS
from compare.plot import STYLES, draw_errors, draw_gain_and_cost, draw_gains, draw_sharpness
from compare.recipes import PLAIN

# Next to the score: key of a run's record (`outer.inner` if nested), words, digits.
MEASURES = (
    ("ece", "calibration error (ECE)", 3),
    ("nll", "negative log-likelihood", 3),
    ("mae", "mean absolute error", 3),
    ("selected_mse", "MSE of the epoch with the least validation error", 3),
    ("corrupted_accuracy", "accuracy on corrupted images", 3),
    ("next_season_mse", "MSE in the following season", 3),
    *((f"lost.rounded.{b}", f"lost with weights rounded to {b} bits", 4) for b in ROUNDED_BITS),
    *((f"lost.noisy.{x}", f"lost with noise of {100 * x:g} % in the weights", 4) for x in NOISE),
    ("sharpness.worst_sharpness", "worst-case sharpness", 3),
    ("sharpness.adaptive_worst_sharpness", "the same, ASAM's ball", 3),
    ("sharpness.hessian_eigenvalue", "largest Hessian eigenvalue", 1),
    ("sharpness.hessian_trace", "trace of the Hessian", 0),
)


def main_table(comparison: Comparison) -> str:
    """Scores, gains and costs of each recipe."""
    metric, levels = comparison.metric_in_words, comparison.levels
    head = ["recipe", "rho", *(f"{metric}, {in_words(level)}" for level in levels)]
    gain = comparison.gain_in_words
    head += [gain, "share", f"{gain}, equal passes", "passes", "time", "memory"]
    lines = []
    for name in comparison.names:
        rho, score = comparison.rho(name), comparison.contrast(name)
        gains = [score.gain.show_signed(), comparison.share_in_words(name)]
        gains.append(score.equal_gain.show_signed())
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
    head += [comparison.gain_in_words, f"{comparison.gain_in_words}, equal passes"]
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
        if key in comparison.frame:  # also if it is infinite in all runs
            for name, of in found.items():
                gains = [x.show_signed(digits, 1) for x in (of.gain, of.equal_gain)]
                gains = ["-", "-"] if name == PLAIN else gains
                lines.append([words, name, of.value.show(digits), *gains])
    head = ["measure", "recipe", "mean", "difference to plain", "difference, equal passes"]
    return markdown(head, lines)


def recipes_table(comparisons: Sequence[Comparison]) -> str:
    """A line for each recipe: its passes, its gain on each task and that gain's share."""
    head = ["recipe", "passes"]
    for comparison in comparisons:
        where = comparison.settings.get("file", comparison.settings["task"])
        head += [f"{where}: {comparison.gain_in_words}", "share"]
    names = dict.fromkeys(name for comparison in comparisons for name in comparison.names)
    lines = []
    for name in names:
        line, passes = [], []
        for comparison in comparisons:
            if name == PLAIN or name not in comparison.names:
                line += ["-", "-"]
                continue
            passes += comparison.passes(name)
            line += [comparison.contrast(name).gain.show_signed(), comparison.share_in_words(name)]
        if name != PLAIN:
            lines.append([name, f"{fmean(passes):.2f}", *line])
    return markdown(head, lines)


def summary_table(contents: dict[str, dict[str, Any]]) -> str:
    """A line for each recipe of each file, with the means over its levels and seeds.

    Args:
        contents: of the files, by their names without ending.
    """
    head = ["file", "trained on", "recipe", "score", "plain", "plain, equal passes"]
    head += ["gain", "gain, equal passes"]
    lines = []
    for file, content in contents.items():
        found = Comparison(content, "sam")
        for name in [name for name in found.names if name != PLAIN]:
            at = found.contrast(name)
            scores = [score.show() for score in (at.value, at.plain, at.longer)]
            gains = [gain.show_signed() for gain in (at.gain, at.equal_gain)]
            lines.append([file, found.title(), name, *scores, *gains])
    return markdown(head, lines)


def robustness_table(contents: dict[str, dict[str, Any]], name: str) -> str:
    """What a recipe's models and plain training's lose by a shift of the data and of the weights.

    Args:
        contents: of the files, by their names without ending.
        name: of the recipe.
    """
    head = ["file", "measure", "plain", "plain, equal passes", name]
    head += ["difference to plain", "difference, equal passes"]
    lines = []
    for file, content in contents.items():
        found = Comparison(content, name, [name])
        for key, words, digits in MEASURES:
            if key.startswith("lost.") or key in ("corrupted_accuracy", "next_season_mse"):
                at = found.contrast(name, key=key)
                scores = [score.show(digits) for score in (at.plain, at.longer, at.value)]
                gains = [gain.show_signed(digits, 1) for gain in (at.gain, at.equal_gain)]
                lines += [[file, words, *scores, *gains]] if at.value.is_known else []
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
    text = [f"# {title}", table, *notes, "## At each level", gain_table(comparison)]
    text += ["## Measures of the final models, means over the levels", measures]
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
    if comparison.lower_is_better and "auto" in comparison.names:
        draw_errors([content], comparison.levels[0], folder / "mse_and_compute.png")
        files.append("mse_and_compute.png")
    print("", title, "", table, *notes, "", measures, sep="\n")
    print(f"\nsaved in {folder}: {', '.join(files)}")
