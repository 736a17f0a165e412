"""The picture of `compare_methods.py` of scores beside sharpness: a point for each final model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compare.format import in_order, shared_part
from compare.plot import PLAIN_STYLE, STYLES
from compare.recipes import PLAIN

MEASURES = {
    "worst_sharpness": "Worst-case sharpness",
    "hessian_eigenvalue": "Largest Hessian eigenvalue",
}


def draw_sharpness(
    content: dict[str, Any], names: Sequence[str], title: str, metric: str, file: Path
) -> bool:
    """Save the picture, a column for each noise level; whether there is anything to show.

    Args:
        content: the results, whole.
        names: the recipes to show beside plain training, not more than there are styles.
        metric: in words.
    """
    key = content["settings"].get("metric", "accuracy")
    runs = [
        run
        for run in content["runs"]
        if run["recipe"] in (PLAIN, *names) and run.get("sharpness") and run.get(key) is not None
    ]
    if not runs:
        return False
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    levels = in_order({run["level"] for run in runs})
    _, level_names = shared_part(levels)
    styles = dict(zip(names, STYLES, strict=False))
    figure, grid = plt.subplots(
        *(len(MEASURES), len(levels)),
        figsize=(max(2.8 * len(levels), 5.5), 5.6),
        squeeze=False,
        sharey="col",
        layout="constrained",
    )
    for line, (measure, name) in zip(grid, MEASURES.items(), strict=True):
        for axes, level in zip(line, levels, strict=True):
            shown = [run for run in runs if run["level"] == level]
            at = [run["sharpness"].get(measure) or 0.0 for run in shown]
            for run, value in zip(shown, at, strict=True):
                color, marker = styles.get(run["recipe"], PLAIN_STYLE)
                fill = color if run["length"] == 1 else "none"
                if value > 0:
                    axes.plot(value, run[key], marker, color=color, markerfacecolor=fill, ms=8)
            # Around no minimum at all, or one whose loss is nearly 0.
            without = sum(value <= 0 for value in at)
            axes.set_xscale("log")
            axes.set_xlabel(f"{name}\n(not above 0: {without} models)" if without else name)
            axes.grid(alpha=0.25)
        line[0].set_ylabel(f"Test {metric}")
    for axes, name in zip(grid[0], level_names, strict=True):
        axes.set_title(name if len(levels) > 1 else "", fontsize="medium")
    handles = [_mark(plt, PLAIN, *PLAIN_STYLE)]
    if any(run["length"] != 1 for run in runs):
        label = "plain, with as many passes as a recipe"
        handles.append(_mark(plt, label, *PLAIN_STYLE, markerfacecolor="none"))
    handles += [_mark(plt, name, *style) for name, style in styles.items()]
    figure.suptitle(title, fontsize="medium")
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(file, dpi=150)
    plt.close(figure)
    return True


def _mark(plt: Any, label: str, color: str, marker: str, **options: Any) -> Any:
    return plt.Line2D([], [], color=color, marker=marker, linestyle="", label=label, **options)
