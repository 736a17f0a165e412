"""The results of `compare_methods.py` as tables, JSON and pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from common.script_utils import InputError, closest
from common.training_utils import save_json
from compare.costs import extra_memory, relative_time
from compare.format import in_order, in_words, markdown, points, shared_part, with_error
from compare.measures_table import Measured, measure_recipe, measures_table
from compare.plot import STYLES, draw_gain_and_cost, draw_gains
from compare.recipes import PLAIN
from compare.results import finished_runs
from compare.runs import plain_length
from compare.sharpness_plot import draw_sharpness
from compare.statistics import Estimate, mean_interval, paired_gain, share

Scores = dict[str, dict[int, float]]  # of one recipe: by level and seed


@dataclass
class Row:
    """What the tables say of a recipe. Gains are shares of the test examples, not yet points."""

    name: str
    group: str
    rho: float | None
    accuracy: dict[str, Estimate]
    plain: dict[str, Estimate]
    gains: dict[str, Estimate]
    gain: Estimate
    share: Estimate
    # Against plain training with as many passes; None and empty where it was not run.
    longer: dict[str, Estimate]
    equal_gains: dict[str, Estimate]
    equal_gain: Estimate | None
    passes: float
    time: tuple[float, float, float] | None  # median and quartiles
    memory: float | None
    metric: str = "accuracy"
    measures: dict[str, Measured | None] = field(default_factory=dict)  # by `Measure.key`


def report(
    content: dict[str, Any],
    names: Sequence[str] | None,
    reference: str,
    folder: Path,
    seeds: Sequence[int] | None = None,
    levels: Sequence[str] | None = None,
) -> None:
    """Print the table; save it, with the details, and the pictures.

    Args:
        seeds: those to report; all that are finished if None.
        levels: those to report; all if None.

    Raises:
        InputError: a recipe is not in the results, or they have none of it.
    """
    for name in (*(names or ()), reference):
        if name not in content["recipes"]:
            hint = closest(name, content["recipes"])
            raise InputError(f"the results have no recipe {name!r}{hint}")
    content, unfinished = finished_runs(content, reference, seeds, levels)
    rows, left_out = make_rows(content, names, reference)
    left_out += unfinished
    table = main_table(rows)
    left_out += _timed_otherwise(content, rows)
    folder.mkdir(parents=True, exist_ok=True)
    text = [
        f"# {title(content)}",
        table,
        *left_out,
        "## At each noise level",
        gain_table(rows),
    ]
    measures = measures_table(rows)
    text += ["## Measures of the final models, means over the noise levels", measures]
    text += ["## Recipes", _descriptions(content, rows)]
    (folder / "table.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")
    numbers = {"title": title(content), "rows": [_finite(asdict(row)) for row in rows]}
    save_json(numbers, folder / "table.json")
    metric, pictures = _in_words(_metric(content)), [folder / "gain_and_cost.png"]
    draw_gain_and_cost(rows, plain_curve(content), title(content), metric, pictures[0])
    if 1 < len(rows) <= 1 + len(STYLES):  # of more recipes than colours nobody could read it
        pictures.append(folder / "gains.png")
        draw_gains(rows, title(content), metric, pictures[1])
        others, file = [row.name for row in rows[1:]], folder / "sharpness.png"
        each = title(content).replace("mean over ", "")
        if draw_sharpness(content, others, each, metric, file):
            pictures.append(file)
    print("", title(content), "", table, *left_out, "", measures, sep="\n")
    print(f"\nsaved in {folder}: table.md, table.json, {', '.join(x.name for x in pictures)}")


def make_rows(
    content: dict[str, Any], names: Sequence[str] | None, reference: str
) -> tuple[list[Row], list[str]]:
    """A row for each recipe that has all runs that plain training has, and a line for the others.

    Raises:
        InputError: plain training or the reference has not all runs.
    """
    runs = _by_recipe(content["runs"])
    plain = runs.get((PLAIN, 1.0), {})
    points = {(level, seed) for level, seeds in plain.items() for seed in seeds}
    if not points or len(points) < len(plain) * len(next(iter(plain.values()))):
        raise InputError("plain training has not been run at every level with every seed yet")
    rows, left_out = [], []
    for name in content["recipes"]:
        if names is not None and name not in (PLAIN, reference, *names):
            continue
        own = runs.get((name, 1.0), {})
        missing = points - {(level, seed) for level, seeds in own.items() for seed in seeds}
        if not missing:
            rows.append(_row(content, runs, name, reference))
        elif name == reference:
            raise InputError(f"--reference {name!r} has not been run at every level and seed yet")
        else:
            left_out.append(f"left out: {name}, {len(missing)} of its runs are missing")
    return rows, left_out


def _timed_otherwise(content: dict[str, Any], rows: Sequence[Row]) -> list[str]:
    """Recipes that look at the gradient may perturb in another part of a short run."""
    costs = content.get("costs", {}).get("recipes", {})
    return [
        f"note: {row.name} made {costs[row.name]['passes']:.2f} passes an update when it was timed"
        for row in rows
        if row.name in costs and abs(costs[row.name]["passes"] - row.passes) > 0.05
    ]


def _row(content: dict[str, Any], runs: dict[Any, Any], name: str, reference: str) -> Row:
    plain, own, ours = runs[PLAIN, 1.0], runs[name, 1.0], runs[reference, 1.0]
    levels, seeds = in_order(plain), sorted(next(iter(plain.values())))
    metric = _metric(content)

    def scores(of: dict[str, dict[int, Any]]) -> np.ndarray:
        return np.array([[of[level][seed][metric] for seed in seeds] for level in levels])

    baseline, mine = scores(plain), scores(own)
    passes = {level: fmean(own[level][s]["passes"] for s in seeds) for level in levels}
    # Plain training with as many passes, at each level.
    longer = {
        level: runs.get((PLAIN, plain_length([passes[level]])), {}).get(level, {})
        for level in levels
    }
    has_longer = all(set(seeds) <= longer[level].keys() for level in levels)
    as_long = scores(longer) if has_longer else None

    def over(other: np.ndarray | None) -> dict[str, Estimate]:
        pairs = [] if other is None else zip(levels, mine, other, strict=True)
        return {level: paired_gain(ours, theirs) for level, ours, theirs in pairs}

    def means(of: np.ndarray | None) -> dict[str, Estimate]:
        pairs = [] if of is None else zip(levels, of, strict=True)
        return {level: mean_interval(values) for level, values in pairs}

    costs = content.get("costs", {}).get("recipes", {})
    options = content["recipes"][name].get("options", {})
    return Row(
        name=name,
        group=content["recipes"][name]["group"],
        rho=options.get("sam_rho", options.get("rho")),
        accuracy=means(mine),
        plain=means(baseline),
        gains=over(baseline),
        gain=paired_gain(mine.mean(0), baseline.mean(0)),
        share=share((mine - baseline).mean(0), (scores(ours) - baseline).mean(0)),
        longer=means(as_long),
        equal_gains=over(as_long),
        equal_gain=None if as_long is None else paired_gain(mine.mean(0), as_long.mean(0)),
        passes=fmean(passes.values()),
        time=relative_time(costs, name) if name in costs else None,
        memory=extra_memory(costs, name) if name in costs else None,
        metric=metric,
        measures=measure_recipe(own, plain, longer if has_longer else None),
    )


def plain_curve(content: dict[str, Any]) -> list[tuple[float, float]]:
    """(length, gain over its usual length) of plain training, where it was run at every level."""
    runs = _by_recipe(content["runs"])
    usual, metric = runs[PLAIN, 1.0], _metric(content)
    curve = []
    for (name, length), levels in runs.items():
        if name == PLAIN and all(
            usual[level].keys() <= levels.get(level, {}).keys() for level in usual
        ):
            pairs = [
                (levels[level][s][metric], usual[level][s][metric])
                for level in usual
                for s in usual[level]
            ]
            curve.append((length, fmean(longer - short for longer, short in pairs)))
    return sorted(curve)


def main_table(rows: Sequence[Row]) -> str:
    levels = list(rows[0].accuracy)
    head = [
        "recipe",
        "rho",
        *(f"{_in_words(rows[0].metric)}, {in_words(level)}" for level in levels),
    ]
    head += ["gain", "share", "gain, equal passes", "passes", "time", "memory"]
    lines = []
    for row in rows:
        is_plain = row.name == PLAIN
        line = [row.name, "-" if row.rho is None else f"{row.rho:g}"]
        line += [with_error(row.accuracy[level]) for level in levels]
        line += ["-", "-", "-"] if is_plain else [points(row.gain), _share(row), _equal(row)]
        line += [f"{row.passes:.2f}", _time(row)]
        line += ["-" if row.memory is None else f"{row.memory:.2f}"]
        lines.append(line)
    return markdown(head, lines)


def gain_table(rows: Sequence[Row]) -> str:
    """At each level the scores, and what a recipe has over plain training of either length."""
    metric = _in_words(rows[0].metric)
    head = ["level", "recipe", metric, "plain", "plain, equal passes"]
    head += ["gain", "gain, equal passes"]
    others = [row for row in rows if row.name != PLAIN]
    lines = []
    for level in rows[0].accuracy:
        for row in others:
            line = [in_words(level), row.name]
            line += [
                with_error(of[level]) if of else "-" for of in (row.accuracy, row.plain, row.longer)
            ]
            line += [points(of[level]) if of else "-" for of in (row.gains, row.equal_gains)]
            lines.append(line)
    if len(rows[0].accuracy) > 1:
        for row in others:
            lines.append(["mean", row.name, "", "", "", points(row.gain), _equal(row)])
    return markdown(head, lines)


def title(content: dict[str, Any]) -> str:
    settings = content["settings"]
    plain = [run for run in content["runs"] if run["recipe"] == PLAIN]
    shared, levels = shared_part(in_order({run["level"] for run in plain}))
    what = f"mean over {', '.join(levels)}" if len(levels) > 1 else levels[0]
    if len(levels) > 4:  # they would not fit above a picture
        what = f"mean over {len(levels)} kinds of labels"
    if all(level.endswith(" % wrong labels") for level in levels) and " of the data" not in what:
        what = what.replace(" % wrong labels,", ",")
    kind = "images" if "training_images" in settings else "texts"
    share = shared.removesuffix("the data")  # "10 % of "
    return (
        f"{settings['task']}, {share}{settings[f'training_{kind}']} training {kind}: "
        f"{what}, {len({run['seed'] for run in plain})} seeds"
    )


def _metric(content: dict[str, Any]) -> str:
    return content["settings"].get("metric", "accuracy")


def _in_words(metric: str) -> str:
    return metric.replace("_", " ").replace("matthews", "Matthews")


def _share(row: Row) -> str:
    share = row.share
    return f"{share.value:.2f} [{share.low:.2f}, {share.high:.2f}]" if share.is_bounded else "-"


def _equal(row: Row) -> str:
    return "-" if row.equal_gain is None else points(row.equal_gain)


def _time(row: Row) -> str:
    """The median, and the quartiles unless it is the unit."""
    if row.time is None:
        return "-"
    median, low, high = (f"{value:.2f}" for value in row.time)
    return median if low == high else f"{median} ({low} to {high})"


def _descriptions(content: dict[str, Any], rows: Sequence[Row]) -> str:
    recipes = content["recipes"]
    return "\n".join(f"- {row.name}: {recipes[row.name]['description']}" for row in rows)


def _finite(value: Any) -> Any:
    """With None for numbers that JSON does not have: the ends of unbounded intervals."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _by_recipe(runs: Sequence[dict[str, Any]]) -> dict[tuple[str, float], Any]:
    """{(recipe, length): {level: {seed: record}}}"""
    found: dict[tuple[str, float], Any] = {}
    for run in runs:
        levels = found.setdefault((run["recipe"], run["length"]), {})
        levels.setdefault(run["level"], {})[run["seed"]] = run
    return found
