"""The pictures of `compare_methods.py`: gain against cost or at each level, errors, sharpness."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from compare.estimates import mean_interval

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.transforms import Bbox

# Colours of Okabe and Ito, distinguishable with colour blindness; the markers help in print.
STYLES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#A65628", "v"))
PLAIN_STYLE = ("#333333", "*")
SHARPNESS = {
    "sharpness.worst_sharpness": "Worst-case sharpness",
    "sharpness.hessian_eigenvalue": "Largest Hessian eigenvalue",
}


def draw_gain_and_cost(comparison: Any, file: Path) -> None:
    """Save a picture of the gain over plain training against the time of an update.

    The dashed line is longer plain training. If times were not measured, the passes are shown.
    """
    plain, *others = comparison.names
    is_timed = all(name in comparison.costs for name in comparison.names)
    groups = dict.fromkeys(comparison.recipes[name]["group"] for name in others)
    styles = {group: STYLES[i % len(STYLES)] for i, group in enumerate(groups)}
    figure, axes = plt.subplots(figsize=(11, 7), layout="constrained")
    label = f"plain training with the same {'time' if is_timed else 'number of passes'}"
    curve = np.array([(length, 100 * gain) for length, gain in comparison.plain_curve()])
    axes.plot(*curve.T, "--", color=PLAIN_STYLE[0], label=label)
    points = []
    for name in comparison.names:
        group, gain = comparison.recipes[name]["group"], comparison.contrast(name).gain
        color, marker = PLAIN_STYLE if name == plain else styles[group]
        x = comparison.time(name)[0] if is_timed else np.mean(comparison.passes(name))
        y, half = 100 * gain.value, _half(gain)
        axes.errorbar(x, y, half or None, color=color, alpha=0.4, elinewidth=1.2, capsize=2)
        axes.plot(x, y, marker, color=color, markersize=7)
        points.append((name, x, y, half, color))
    for group, (color, marker) in styles.items():
        axes.plot([], [], marker, color=color, label=group)
    unit = "Time of an update" if is_timed else "Passes of an update"
    axes.set_xlabel(f"{unit}, in units of plain training's")
    what = f"{comparison.metric_in_words}, {comparison.unit}"
    axes.set_ylabel(f"Gain in final test {what} (95 % interval)")
    axes.set_title(comparison.title(), fontsize="medium")
    axes.grid(alpha=0.25)
    left, right = axes.get_xlim()
    axes.set_xlim(left, right + 0.22 * (right - left))  # room for the names of what costs most
    figure.legend(loc="outside lower center", ncols=len(styles) + 1, frameon=False)
    figure.canvas.draw()
    figure.set_layout_engine("none")  # the axes must not move any more
    _label(axes, points, curve)
    _save(figure, file)


def _label(axes: Any, points: Sequence[tuple[str, float, float, float, str]], curve: Any) -> None:
    """Write each name at the free place nearest to its point, with a line between them.

    Args:
        points: name, x, y, half of the error bar, colour.
    """
    to_pixels = axes.transData.transform
    steps = np.linspace(*curve[[0, -1], 0], 200)
    on_curve = to_pixels(np.c_[steps, np.interp(steps, *curve.T)])
    taken = [Bbox([pixels - 3, pixels + 3]) for pixels in on_curve]
    for _, x, y, half, _ in points:
        point, low, high = to_pixels([(x, y), (x, y - half), (x, y + half)])
        taken += [Bbox([point - 6, point + 6]), Bbox([low - 2, high + 2])]
    # To the right, above, below, to the left, and further away.
    turns = sorted(range(-7, 9), key=lambda turn: (abs(turn), -turn))
    places = [(gap, turn * math.pi / 8) for gap in range(9, 400, 7) for turn in turns]
    for name, x, y, _, color in sorted(points, key=lambda point: -point[2]):
        line = {"arrowstyle": "-", "color": color, "alpha": 0.6, "lw": 0.6, "shrinkA": 0}
        style = {"fontsize": 9, "color": color, "ha": "center", "va": "center"}
        text = axes.annotate(name, (x, y), (x, y), arrowprops=line, **style)
        size = np.array([text.get_window_extent().width, text.get_window_extent().height]) / 2
        for gap, angle in places:
            middle = to_pixels((x, y)) + (size + gap) * (math.cos(angle), math.sin(angle))
            box = Bbox([middle - size - (2, 1), middle + size + (2, 1)])
            is_inside = all(axes.bbox.contains(*corner) for corner in box.corners())
            if is_inside and not box.count_overlaps(taken):
                break
        text.set_position(axes.transData.inverted().transform(middle))
        text.arrow_patch.set_visible(gap > 16)
        taken.append(box)


def draw_gains(comparison: Any, file: Path) -> None:
    """Save a picture of the gains at each level, over plain training of either length."""
    others, levels = comparison.names[1:], comparison.levels
    keys, names = levels, comparison.levels_in_words
    if len(levels) > 1:
        keys, names = [*keys, None], [*names, "mean"]
    contrasts = [[comparison.contrast(name, level) for level in keys] for name in others]
    panels = {"updates": [[at.gain for at in of] for of in contrasts]}
    if all(at.equal_gain.is_known for of in contrasts for at in of):
        panels["passes"] = [[at.equal_gain for at in of] for of in contrasts]
    height = 1.9 + 0.24 * len(names) * (len(others) + 0.6)
    options = {"sharex": True, "sharey": True, "squeeze": False, "layout": "constrained"}
    figure, grid = plt.subplots(1, len(panels), figsize=(11, height), **options)
    for axes, (what, gains) in zip(grid[0], panels.items(), strict=True):
        for i, of in enumerate(gains):
            color, marker = STYLES[i]
            # The recipes of a level are below each other, in the order of the legend.
            y = np.arange(len(names)) + 0.7 * ((i + 0.5) / len(others) - 0.5)
            x, half = [100 * gain.value for gain in of], [_half(gain) for gain in of]
            style = {"fmt": marker, "color": color, "capsize": 2.5, "elinewidth": 1.4, "ms": 6}
            axes.errorbar(x, y, xerr=half, **style)
        axes.axvline(0, color=PLAIN_STYLE[0], linewidth=1)
        if len(levels) > 1:
            axes.axhline(len(levels) - 0.5, color="#999999", linewidth=0.8, linestyle=":")
        axes.set_title(f"over plain training, same number of {what}", fontsize="medium")
        what = f"{comparison.metric_in_words}, {comparison.unit}"
        axes.set_xlabel(f"Gain in test {what} (95 % interval)")
        axes.grid(axis="x", alpha=0.25)
    grid[0][0].set_yticks(range(len(names)), names)
    grid[0][0].set_ylim(len(names) - 0.5, -0.5)
    marks = []
    for name, style in zip(others, STYLES, strict=False):
        rho = comparison.rho(name)
        is_shown = isinstance(rho, float | int) and "rho" not in name
        with_rho = f"{name}, rho {rho:g}" if is_shown else name
        marks.append(_mark(with_rho, *style))
    _save(figure, file, comparison.title(), marks)


def draw_sharpness(comparison: Any, file: Path) -> bool:
    """Save a picture of each model's score against its sharpness; False if it is not known."""
    if not SHARPNESS.keys() <= set(comparison.frame):
        return False
    levels = comparison.levels_in_words
    styles = dict(zip(comparison.names, [PLAIN_STYLE, *STYLES], strict=False))
    frame = comparison.frame.reset_index().dropna(subset=list(SHARPNESS), how="all")
    frame = frame[frame["recipe"].isin(list(styles))]
    size = (max(2.8 * len(levels), 5.5), 5.6)
    options = {"squeeze": False, "sharey": "col", "layout": "constrained"}
    figure, grid = plt.subplots(len(SHARPNESS), len(levels), figsize=size, **options)
    for line, (key, name) in zip(grid, SHARPNESS.items(), strict=True):
        for axes, level in zip(line, comparison.levels, strict=True):
            shown = frame[frame["level"] == level]
            is_positive = shown[key].astype(float) > 0
            for run in shown[is_positive].to_dict("records"):
                color, marker = styles[run["recipe"]]
                fill = color if run["length"] == 1 else "none"
                at = run[key], run[comparison.metric]
                axes.plot(*at, marker, color=color, markerfacecolor=fill, ms=8)
            # A model that is not at a minimum, or whose loss is nearly 0.
            others = f"\n(not above 0: {(~is_positive).sum()} models)"
            axes.set_xscale("log")
            axes.set_xlabel(name if is_positive.all() else name + others)
            axes.grid(alpha=0.25)
        line[0].set_ylabel(f"Test {comparison.metric_in_words}")
    for axes, name in zip(grid[0], levels, strict=True):
        axes.set_title(name if len(levels) > 1 else "", fontsize="medium")
    marks = [_mark(name, *style) for name, style in styles.items()]
    if (frame["length"] != 1).any():
        label = "plain, at equal passes"
        marks.insert(1, _mark(label, *PLAIN_STYLE, markerfacecolor="none"))
    _save(figure, file, comparison.title().replace("mean over ", ""), marks)
    return True


def draw_radius(rows: Sequence[Any], ways: Sequence[str], title: str, file: Path) -> None:
    """Save a picture of each way's gain over plain training, the first of `ways`, on each task."""
    styles = dict(zip(ways, [PLAIN_STYLE, *STYLES], strict=False))
    figure, axes = plt.subplots(figsize=(9, 1.9 + 0.5 * len(rows)), layout="constrained")
    for i, (way, (color, marker)) in enumerate(styles.items()):
        gains = [row.gain(way) for row in rows]
        y = np.arange(len(rows)) + 0.7 * ((i + 0.5) / len(styles) - 0.5)
        x = [gain.value for gain in gains]
        half = [gain.half_width if gain.is_bounded else 0.0 for gain in gains]
        style = {"fmt": marker, "color": color, "capsize": 2.5, "elinewidth": 1.4, "ms": 6}
        axes.errorbar(x, y, xerr=half, **style)
    axes.axvline(0, color=PLAIN_STYLE[0], linewidth=1)
    # Runs that a radius has ruined lose ten times what others gain.
    axes.set_xscale("symlog", linthresh=5, linscale=1.2)
    left, right = axes.get_xlim()
    ticks = [-100, -50, -20, -10, -5, -2, 0, 2, 5, 10, 20, 50, 100]
    axes.set_xticks([tick for tick in ticks if left <= tick <= right], minor=False)
    axes.minorticks_off()
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yticks(range(len(rows)), [row.label for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.25)
    axes.set_xlabel("Gain over plain training (95 % interval): points, or of a series % of the MSE")
    _save(figure, file, title, [_mark(way, *style) for way, style in styles.items()])


def draw_errors(contents: Sequence[dict[str, Any]], level: str, file: Path) -> None:
    """Save the test MSE against compute: a panel for each series, means and 95 % intervals."""
    options = {"layout": "constrained", "squeeze": False}
    figure, grid = plt.subplots(1, len(contents), figsize=(5.2 * len(contents), 4.2), **options)
    styles = {"Adam": PLAIN_STYLE[0], "Adam with SAM": STYLES[1][0]}
    for axes, content in zip(grid[0], contents, strict=True):
        series, end = content["settings"]["file"], 0.0
        for (label, color), recipe in zip(styles.items(), ("plain", "auto"), strict=True):
            passes, errors = _curves(content, recipe, level)
            bands = [mean_interval(at) for at in errors.T]
            mean = [band.value for band in bands]
            axes.plot(passes, mean, "o-", color=color, markersize=3, label=label)
            low, high = ([getattr(band, end) for band in bands] for end in ("low", "high"))
            axes.fill_between(passes, low, high, color=color, alpha=0.2, linewidth=0)
            place = {"xytext": (5, 0), "textcoords": "offset points", "va": "center"}
            axes.annotate(f"{mean[-1]:.3f}", (passes[-1], mean[-1]), color=color, **place)
            end = max(end, passes[-1])
        axes.set_title(f"{series}, next {level.removesuffix(' steps')} hours", fontsize="medium")
        axes.set_xlabel("Compute: forward-backward passes over the training data")
        axes.set_xlim(0, 1.12 * end)
        axes.grid(alpha=0.25)
    grid[0][0].set_ylabel("Test MSE")
    marks = grid[0][0].get_legend_handles_labels()
    figure.legend(*marks, loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def _curves(content: dict[str, Any], recipe: str, level: str) -> tuple[np.ndarray, np.ndarray]:
    """Passes over the training data, and the test MSE (seeds, epochs) of the longest runs."""
    runs = [run for run in content["runs"] if (run["recipe"], run["level"]) == (recipe, level)]
    longest = max(run["length"] for run in runs)
    runs = [run for run in runs if run["length"] == longest]
    windows = content["settings"]["windows"][level][0]
    of_epoch = -(-windows // content["settings"]["training"]["per_device_train_batch_size"])
    updates = np.array([point["updates"] for point in runs[0]["curve"]])
    errors = [[point["test_mse"] for point in run["curve"]] for run in runs]
    return runs[0]["passes"] * updates / of_epoch, np.array(errors)


def _half(gain: Any) -> float:
    return 100 * gain.half_width if gain.is_bounded else 0.0


def _mark(label: str, color: str, marker: str, **options: Any) -> Any:
    return plt.Line2D([], [], color=color, marker=marker, linestyle="", label=label, **options)


def _save(figure: Any, file: Path, title: str | None = None, marks: Any = None) -> None:
    if marks is not None:
        figure.suptitle(title, fontsize="medium")
        columns = min(len(marks), 5)
        figure.legend(handles=marks, loc="outside lower center", ncols=columns, frameon=False)
    figure.savefig(file, dpi=150)
    plt.close(figure)
