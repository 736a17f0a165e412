"""The pictures of `compare_methods.py`: gain against cost, and the gain at each noise level."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from compare.format import shared_part

# Okabe and Ito's colours, which colour-blind readers tell apart; the markers help in print.
STYLES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#A65628", "v"))
PLAIN_STYLE = ("#333333", "*")


def draw_gain_and_cost(
    rows: Sequence[Any], longer: Sequence[tuple[float, float]], title: str, metric: str, file: Path
) -> None:
    """Save a picture of the gain over plain training against the time of an update.

    Args:
        rows: those of the table, plain first. Where times were not measured, the passes are shown.
        longer: (length, gain) of plain training that is longer, the line to be above.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    is_timed = all(row.time is not None for row in rows)
    plain, *others = rows
    groups = list(dict.fromkeys(row.group for row in others))
    styles = {group: STYLES[i % len(STYLES)] for i, group in enumerate(groups)}
    figure, axes = plt.subplots(figsize=(11, 7), layout="constrained")
    lengths, gains = zip(*longer, strict=True)
    axes.plot(
        *(lengths, [100 * gain for gain in gains], "--"),
        color=PLAIN_STYLE[0],
        label=f"plain training that takes as {'long' if is_timed else 'many passes'}",
    )
    points = []
    for row in rows:
        color, marker = PLAIN_STYLE if row is plain else styles[row.group]
        x, y = row.time[0] if is_timed else row.passes, 100 * row.gain.value
        half = 100 * row.gain.half_width if row.gain.is_bounded else 0.0
        axes.errorbar(x, y, half or None, color=color, alpha=0.4, elinewidth=1.2, capsize=2)
        axes.plot(x, y, marker, color=color, markersize=7)
        points.append((row.name, x, y, half, color))
    for group, (color, marker) in styles.items():
        axes.plot([], [], marker, color=color, label=group)
    unit = "Time of an update" if is_timed else "Passes of an update"
    axes.set_xlabel(f"{unit}, in units of plain training's")
    axes.set_ylabel(f"Gain in final test {metric} over plain training, points (95 % interval)")
    axes.set_title(title, fontsize="medium")
    axes.grid(alpha=0.25)
    left, right = axes.get_xlim()
    axes.set_xlim(left, right + 0.22 * (right - left))  # room for the names of what costs most
    figure.legend(loc="outside lower center", ncols=len(styles) + 1, frameon=False)
    figure.canvas.draw()
    figure.set_layout_engine("none")  # from here on nothing may move
    _label(axes, points, longer)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def draw_gains(rows: Sequence[Any], title: str, metric: str, file: Path) -> None:
    """Save a picture of the gains at each level, over plain training of either length.

    Args:
        rows: those of the table, plain first; not more others than there are styles.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    _, *others = rows
    levels = list(others[0].gains)
    panels = {"as many updates": [[*row.gains.values(), row.gain] for row in others]}
    if all(row.equal_gains for row in others):
        panels["as many passes"] = [[*row.equal_gains.values(), row.equal_gain] for row in others]
    _, names = shared_part(levels)
    names += ["mean"] if len(levels) > 1 else []
    height = 1.9 + 0.24 * len(names) * (len(others) + 0.6)
    figure, grid = plt.subplots(
        *(1, len(panels)),
        figsize=(11, height),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axes, (what, estimates) in zip(grid[0], panels.items(), strict=True):
        for i, of_row in enumerate(estimates):
            color, marker = STYLES[i]
            shown = of_row[: len(names)]
            x = [100 * estimate.value for estimate in shown]
            half = [100 * e.half_width if e.is_bounded else 0.0 for e in shown]
            # The recipes of a level stand below each other, in the order of the legend.
            y = np.arange(len(names)) + 0.7 * ((i + 0.5) / len(others) - 0.5)
            axes.errorbar(
                *(x, y), xerr=half, fmt=marker, color=color, capsize=2.5, elinewidth=1.4, ms=6
            )
        axes.axvline(0, color=PLAIN_STYLE[0], linewidth=1)
        if len(levels) > 1:
            axes.axhline(len(levels) - 0.5, color="#999999", linewidth=0.8, linestyle=":")
        axes.set_title(f"over plain training with {what}", fontsize="medium")
        axes.set_xlabel(f"Gain in test {metric}, points (95 % interval)")
        axes.grid(axis="x", alpha=0.25)
    grid[0][0].set_yticks(range(len(names)), names)
    grid[0][0].set_ylim(len(names) - 0.5, -0.5)
    figure.suptitle(title, fontsize="medium")
    entries = [
        plt.Line2D([], [], color=color, marker=marker, linestyle="", label=_with_rho(row))
        for row, (color, marker) in zip(others, STYLES, strict=False)
    ]
    figure.legend(handles=entries, loc="outside lower center", ncols=len(entries), frameon=False)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def _with_rho(row: Any) -> str:
    return row.name if row.rho is None or "rho" in row.name else f"{row.name}, rho {row.rho:g}"


def _label(
    axes: Any,
    points: Sequence[tuple[str, float, float, float, str]],
    curve: Sequence[tuple[float, float]],
) -> None:
    """Write each name as near to its point as it can stand without covering anything.

    Args:
        points: name, x, y, half of the error bar, colour.
        curve: of plain training, not yet in points.
    """
    from matplotlib.transforms import Bbox

    def around(pixels: Any, half: float) -> Any:
        return Bbox([pixels - np.full(2, half), pixels + np.full(2, half)])

    to_pixels = axes.transData.transform
    xs, ys = np.array(curve).T
    steps = np.linspace(xs[0], xs[-1], 200)
    thin = [around(p, 3) for p in to_pixels(np.c_[steps, np.interp(steps, xs, 100 * ys)])]
    taken = [around(to_pixels((x, y)), 6) for _, x, y, _, _ in points]
    for _, x, y, half, _ in points:
        low, high = to_pixels([(x, y - half), (x, y + half)])
        thin += [Bbox([low - 2, high + 2])]
    for name, x, y, _, color in sorted(points, key=lambda point: -point[2]):
        text = axes.text(0, 0, name, fontsize=9, color=color, ha="center", va="center")
        size = text.get_window_extent()
        px, py = to_pixels((x, y))
        for cx, cy in _places(px, py, size.width, size.height):
            box = Bbox.from_bounds(
                cx - size.width / 2 - 2, cy - size.height / 2 - 1, size.width + 4, size.height + 2
            )
            line = _line(px, py, box)
            inside = axes.bbox.containsx(box.x0) and axes.bbox.containsx(box.x1)
            inside = inside and axes.bbox.containsy(box.y0) and axes.bbox.containsy(box.y1)
            if inside and not box.count_overlaps(taken + thin) and not _crosses(line, taken):
                break
        text.set_position(axes.transData.inverted().transform((cx, cy)))
        if len(line):
            ends = axes.transData.inverted().transform(line[[0, -1]])
            axes.plot(*ends.T, color=color, linewidth=0.6, alpha=0.6, scalex=False, scaley=False)
        taken += [box, *(around(pixels, 1) for pixels in line)]


def _places(x: float, y: float, width: float, height: float) -> Iterator[tuple[float, float]]:
    """Middles of the name, the nearest first: to the right, above, below, to the left, further."""
    for gap in range(9, 400, 7):
        for turn in (0, 1, -1, 2, -2, 3, -3, 4, -4, 5, -5, 6, -6, 7, -7, 8):
            cosine, sine = math.cos(turn * math.pi / 8), math.sin(turn * math.pi / 8)
            yield x + cosine * (gap + width / 2), y + sine * (gap + height / 2)


def _line(x: float, y: float, box: Any) -> np.ndarray:
    """Points from the marker to the nearest point of the name; none where they are side by side."""
    end = np.clip(x, box.x0, box.x1), np.clip(y, box.y0, box.y1)
    length = math.dist((x, y), end)
    if length < 16:
        return np.empty((0, 2))
    share = np.linspace(8 / length, 1 - 1 / length, max(2, int(length / 3)))[:, None]
    return np.array([[x, y]]) * (1 - share) + np.array([end]) * share


def _crosses(line: np.ndarray, taken: Sequence[Any]) -> bool:
    return any(box.contains(x, y) for box in taken for x, y in line)
