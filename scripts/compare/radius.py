"""The report of `compare_radius.py`: the best fixed radius, the table and the picture's rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from common.cli import InputError, closest
from compare.comparison import in_words
from compare.estimates import Estimate, mean_interval, paired_gain
from compare.forecasting import LEVEL as NO_LEVEL
from compare.plot import draw_radius
from compare.recipes import PLAIN
from compare.report import markdown
from compare.results import check_results, read_json

FIXED = 0.05  # of SAM, the usual radius
WAYS = (PLAIN, f"rho {FIXED}", "best fixed", "auto")
WORSE_MSE = 1.2  # times plain training's: such a run is ruined


def recipe_name(method: str, rho: float | str) -> str:
    return f"{method}, auto" if rho == "auto" else f"{method}, rho {rho:g}"


def chance(task: Any) -> float | None:
    """The score of the most frequent class of the test data; None for a series."""
    if task.lower_is_better:
        return None
    if task.metric == "matthews_correlation":
        return 0.0
    return float(np.bincount(task.test["labels"]).max() / len(task.test))


class Study:
    """The results of a task.

    Args:
        content: of its results file.
    """

    def __init__(self, content: dict[str, Any]) -> None:
        self.content, self.levels, self.seeds = content, content["levels"], content["seeds"]
        self.metric = content["settings"].get("metric", "accuracy")
        self.lower_is_better = content["lower_is_better"]
        names = ("recipe", "level", "seed", "tuned_rho")
        self._runs = {tuple(run.get(name) for name in names): run for run in content["runs"]}

    def values(
        self, key: str, recipe: str, level: str, seeds: Sequence[int], tuned: float | None = None
    ) -> list[float]:
        """A value of the runs' records for each seed; NaN where it was not finite."""
        runs = [self._runs.get((recipe, level, seed, tuned)) for seed in seeds]
        if None in runs:
            raise InputError(f"runs of {recipe} at level {level} are missing: train them first")
        return [math.nan if run[key] is None else run[key] for run in runs]

    def best_rho(self, method: str, level: str) -> float:
        """The radius of the grid with the best mean score over the seeds of the search."""
        at = level, self.content["tuning_seeds"]
        means = {
            rho: np.mean(self.values(self.metric, recipe_name(method, rho), *at, tuned=rho))
            for rho in map(float, self.content["grids"][method])
        }
        finite = {rho: mean for rho, mean in means.items() if math.isfinite(mean)}
        if not finite:
            raise InputError(f"{method} diverged with each rho of its grid: it needs smaller ones")
        return (min if self.lower_is_better else max)(finite, key=finite.__getitem__)


@dataclass
class Row:
    """A method on a task at a level of label noise.

    Args:
        label: for the reader.
        scores: of each way, a number for each seed.
        unit: factor of a difference in score: points, or percent of plain training's mean MSE,
            negative since less is better.
        best_rho: the best fixed radius.
        is_at_end: whether that is an end of its grid.
        rho: of the automatic radius, the median over seeds of the medians over updates.
        chance: score of a model that has learned nothing; None for a series.
    """

    label: str
    metric: str
    scores: dict[str, np.ndarray]
    unit: float
    best_rho: float
    is_at_end: bool
    rho: float
    chance: float | None

    def gain(self, way: str, baseline: str = PLAIN) -> Estimate:
        """In `unit`, paired by seed: positive where the way is better."""
        return paired_gain(self.unit * self.scores[way], self.unit * self.scores[baseline])

    def verdict(self) -> str:
        """Where the automatic radius is, seen from the best fixed one."""
        gain, best = self.gain("auto", "best fixed"), mean_interval(self.scores["best fixed"])
        if not gain.is_known:
            return "-"
        is_near = best.low <= self.scores["auto"].mean() <= best.high
        if gain.low <= 0 <= gain.high or is_near:
            return "within"
        return "above" if gain.value > 0 else "below"

    def ruined(self, way: str) -> int:
        """Runs no better than the most frequent class, or with 1.2 times plain training's MSE."""
        scores = self.scores[way]
        is_sound = scores < WORSE_MSE * self.scores[PLAIN]
        if self.chance is not None:
            is_sound = scores > self.chance
        return int((~is_sound).sum())  # of NaN, too


def rows(name: str, content: dict[str, Any]) -> list[Row]:
    """Each method of a task at each of its levels."""
    study, found = Study(content), list[Row]()
    for method, grid in content["grids"].items():
        for level in content["levels"][method]:
            best = study.best_rho(method, level)
            recipes = PLAIN, recipe_name("sam", FIXED), recipe_name(method, best)
            recipes = dict(zip(WAYS, (*recipes, recipe_name(method, "auto")), strict=True))
            scores = {
                way: np.array(study.values(study.metric, recipe, level, study.seeds))
                for way, recipe in recipes.items()
            }
            label = name if level == NO_LEVEL else f"{name}, {in_words(level)}"
            is_mse = study.lower_is_better
            radii = study.values("rho_median", recipes["auto"], level, study.seeds)
            row = Row(
                label=label if method == "sam" else f"{label}, {method}",
                metric=study.metric.replace("_", " ").replace("mse", "MSE (less is better)"),
                scores=scores,
                unit=-100 / scores[PLAIN].mean() if is_mse else 100,
                best_rho=best,
                is_at_end=best in (min(grid), max(grid)),
                rho=median(radii),
                chance=content["chance"],
            )
            found.append(row)
    return found


def table(found: Sequence[Row]) -> str:
    """A line for each row: the scores, and the automatic radius against the best fixed one."""
    head = ["task", "score", "plain", f"rho {FIXED}", "best fixed", "its rho", "auto", "median rho"]
    head += ["auto - best", "verdict", "ruined"]
    lines = []
    for row in found:
        plain, fixed, best, auto = (mean_interval(row.scores[way]).show() for way in WAYS)
        unit = "points" if row.unit > 0 else "%"
        gain = row.gain("auto", "best fixed").show_signed(2, 1)
        ruined = {way: row.ruined(way) for way in WAYS}
        shown = ", ".join(f"{way}: {count}" for way, count in ruined.items() if count)
        end = " (end of the grid)" if row.is_at_end else ""
        line = [row.label, row.metric, plain, fixed, best, f"{row.best_rho:g}{end}", auto]
        line += [f"{row.rho:.3g}", f"{gain} {unit}", row.verdict(), shown or "0"]
        lines.append(line)
    return markdown(head, lines)


def read_study(path: Path, names: Sequence[str] | None) -> dict[str, dict[str, Any]]:
    """The tasks of a results.json of `compare_radius.py`, or some of them."""
    contents = read_json(path, "--from_json")
    keys = {"levels", "seeds", "grids", "tuning_seeds", "lower_is_better", "chance"}
    for content in contents.values():
        if not isinstance(content, dict) or not keys <= content.keys():
            raise InputError(f"--from_json {str(path)!r} was not written by compare_radius.py")
        check_results(content, path)
    for name in names or ():
        if name not in contents:
            raise InputError(f"--tasks: {path} has no task {name!r}{closest(name, contents)}")
    return {name: content for name, content in contents.items() if name in (names or contents)}


def report(folder: Path, contents: dict[str, dict[str, Any]]) -> None:
    """Print the table; save it and the picture."""
    found = [row for name, content in contents.items() for row in rows(name, content)]
    if not found:
        raise InputError("there are no tasks to report")
    seeds = sorted({len(content["seeds"]) for content in contents.values()})
    title = f"The automatic radius, {' or '.join(map(str, seeds))} seeds"
    shown = table(found)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(f"# {title}\n\n{shown}\n", encoding="utf-8")
    draw_radius(found, WAYS, title, folder / "radius.png")
    print("", title, "", shown, sep="\n")
    print(f"\nsaved in {folder}: results.json, table.md, radius.png")
