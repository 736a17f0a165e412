"""Plots of loss landscapes, of sharpness during training, and of its dependence on rho."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..config.file import replacing
from .landscape import Landscape
from .radius import RadiusCurve

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The palette of Okabe and Ito, suited to colour-blind readers.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_LINE_STYLES = ("-", "--", "-.", ":", "-", "--")
_LEVEL_COUNT = 15


def plot_landscapes(
    landscapes: Sequence[Landscape], path: Path, *, title: str | None = None
) -> list[Path]:
    """Plot landscapes on a shared loss scale: lines in one frame, planes side by side.

    Args:
        landscapes: one or more, all one-dimensional or all two-dimensional.
        path: path without a suffix; a PNG and an SVG are written, whose paths are returned.
        title: title of the figure; by default the models, directions and number of examples.

    Raises:
        ValueError: `landscapes` is empty or mixes one and two dimensions, or no loss is finite.
    """
    dimensions = {len(landscape.coordinates) for landscape in landscapes}
    if len(dimensions) != 1:
        raise ValueError(
            f"landscapes with {sorted(dimensions)} dimensions cannot be plotted together. Allowed: "
            "one or more landscapes, all with one dimension or all with two"
        )
    losses = torch.cat([landscape.losses.flatten() for landscape in landscapes])
    finite = losses[losses.isfinite()]
    if not len(finite):
        raise ValueError("no grid point has a finite loss: use a smaller span")
    draw = _draw_lines if dimensions == {1} else _draw_planes
    figure = draw(landscapes, float(finite.min()), float(finite.max()))
    return _save(figure, path, title or _title(landscapes))


def _title(landscapes: Sequence[Landscape]) -> str:
    """What is shown: line or plane, directions, models, and number of examples."""
    shape = ("line", "plane")[len(landscapes[0].labels) - 1]
    where = {
        "random": f"a random {shape}",
        "eigenvectors": f"the sharpest {shape}",
        "between two models": "the line between two models",
    }.get(str(landscapes[0].facts.get("directions")), f"a {shape}")
    names = " and ".join(landscape.name for landscape in landscapes)
    examples = {landscape.facts.get("examples") for landscape in landscapes}
    on_examples = f", {examples.pop()} examples" if len(examples) == 1 else ""
    return f"Loss on {where}: {names}{on_examples}"


def _levels(low: float, high: float) -> list[float]:
    """Round losses that span the range, logarithmically spaced if it is wide and positive."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    if low > 0 and high > 10 * low:
        low = max(low, high * 1e-4)
        subs = (1, 1.5, 2, 3, 5, 7) if high < 100 * low else (1, 2, 5)
        # Ticks end at the decade that begins below the upper limit.
        ticks = LogLocator(subs=subs, numticks=_LEVEL_COUNT).tick_values(low, 10 * high)
    else:
        ticks = MaxNLocator(_LEVEL_COUNT, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    first = max(0, int(np.searchsorted(ticks, low, side="right")) - 1)
    return [float(tick) for tick in ticks[first : int(np.searchsorted(ticks, high)) + 1]]


def _draw_lines(landscapes: Sequence[Landscape], low: float, high: float) -> Figure:
    figure = _figure(6.4, 4.2)
    axes = figure.add_subplot()
    axes.set_prop_cycle(color=_COLOURS, linestyle=_LINE_STYLES)
    for landscape in landscapes:
        losses = landscape.losses.tolist()
        axes.plot(landscape.coordinates[0], losses, linewidth=2, label=landscape.name)
    is_between_models = any("distance" in landscape.facts for landscape in landscapes)
    for mark in (0.0, 1.0) if is_between_models else (0.0,):
        axes.axvline(mark, color="0.75", linewidth=1, zorder=0)
    labels = {landscape.labels[0] for landscape in landscapes}
    axes.set(xlabel=labels.pop() if len(labels) == 1 else "along the direction", ylabel="loss")
    if low > 0 and high / low > 50:
        axes.set_yscale("log")
    else:
        axes.ticklabel_format(axis="y", useOffset=False)
    if len(landscapes) > 1:
        axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_planes(landscapes: Sequence[Landscape], low: float, high: float) -> Figure:
    from matplotlib.colors import BoundaryNorm

    figure = _figure(1.6 + 4.0 * len(landscapes), 4.6)
    have_same_labels = all(landscape.labels == landscapes[0].labels for landscape in landscapes)
    all_axes = figure.subplots(1, len(landscapes), squeeze=False, sharey=have_same_labels)[0]
    high = high if high > low else low + max(abs(low), 1e-12) * 1e-3
    levels = _levels(low, high)
    norm = BoundaryNorm(levels, 256, extend="max")
    for landscape, axes in zip(landscapes, all_axes, strict=True):
        xs, ys = landscape.coordinates
        # Infinite losses get the colour of the highest level.
        losses = landscape.losses.T.clamp(levels[0], levels[-1] * 1.0001).numpy()
        filled = axes.contourf(xs, ys, losses, levels, cmap="cividis", norm=norm, extend="max")
        lines = axes.contour(xs, ys, losses, levels, colors="white", linewidths=0.5)
        axes.clabel(lines, levels[::2], fontsize=7, fmt="%.10g")
        axes.plot(0, 0, "o", color="#D55E00", markeredgecolor="white", markersize=7)
        loss = f"{landscape.facts['loss_at_weights']:.3g}"
        axes.set_title(f"{landscape.name}\nloss at the dot {loss}", fontsize=10)
        axes.set(xlabel=landscape.labels[0], ylabel=landscape.labels[1])
        if have_same_labels:
            axes.label_outer()
        axes.locator_params(nbins=5)
        if math.isclose(xs[-1] - xs[0], ys[-1] - ys[0]):
            axes.set_aspect("equal")
    figure.colorbar(filled, ax=all_axes, label="loss (one scale)", shrink=0.85, format="%.10g")
    return figure


def plot_history(
    history: Mapping[str, Sequence[tuple[int, float]]], path: Path, *, title: str | None = None
) -> list[Path]:
    """Plot sharpness measures against the number of updates, in one frame for each measure.

    `history` has the (update, value) pairs of each measure, by its name. `path` and the result are
    those of `plot_landscapes`.

    Raises:
        ValueError: `history` is empty.
    """
    if not history:
        raise ValueError("history is empty: at least one measure is needed")
    columns = min(len(history), 3)
    rows = math.ceil(len(history) / columns)
    figure = _figure(3.6 * columns, 2.8 * rows + 0.4)
    for number, (name, pairs) in enumerate(history.items(), 1):
        axes: Any = figure.add_subplot(rows, columns, number)
        axes.plot(*zip(*pairs, strict=True), "o-", color=_COLOURS[0], markersize=4)
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("updates")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4), useOffset=False)
        axes.spines[["top", "right"]].set_visible(False)
    return _save(figure, path, title)


def plot_radius_curve(curve: RadiusCurve, path: Path, *, title: str | None = None) -> list[Path]:
    """Plot gradient cosine and sharpness against rho, with the rule's goal and suggestion.

    `path` and the result are those of `plot_landscapes`.
    """
    figure = _figure(8.4, 3.6)
    cosines, sharpness = figure.subplots(1, 2, sharex=True)
    radii = [reading.rho for reading in curve.readings]
    options: Any = {"color": _COLOURS[0], "markersize": 4, "linewidth": 2}
    cosines.plot(radii, [reading.cosine for reading in curve.readings], "o-", **options)
    cosines.set(ylabel="cosine of g and g_s", ylim=(None, 1.02))
    rises = [reading.sharpness for reading in curve.readings]
    sharpness.plot(radii, rises, "o-", **options)
    sharpness.axhline(curve.goal, color=_COLOURS[1], linestyle="--", label=f"goal {curve.goal:.3g}")
    sharpness.set_ylabel("sharpness L(w + e) - L(w)")
    if all(0 < rise < math.inf for rise in rises):
        sharpness.set_yscale("log")
    for axes in (cosines, sharpness):
        if curve.suggestion is not None:
            label = f"suggestion {curve.suggestion:.3g}"
            axes.axvline(curve.suggestion, color=_COLOURS[2], linestyle="-.", label=label)
        # Given, since there may be no finite reading to derive it from.
        axes.set(xlabel="rho", xscale="log", xlim=(radii[0] / 1.3, 1.3 * radii[-1]))
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = sharpness.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return _save(figure, path, title)


def _figure(width: float, height: float) -> Figure:
    # Without pyplot, whose global state and windows belong to the user.
    from matplotlib.figure import Figure as Canvas

    return Canvas(figsize=(width, height), layout="constrained")


def _save(figure: Figure, path: Path, title: str | None) -> list[Path]:
    from matplotlib import rc_context

    if title:
        figure.suptitle(title, fontsize=10)
    figure.draw_without_rendering()  # the layout of axes of equal scale needs a second pass
    path.parent.mkdir(parents=True, exist_ok=True)
    files = []
    for suffix, metadata in (("png", {}), ("svg", {"Date": None})):  # reproducible files
        files.append(path.with_name(f"{path.name}.{suffix}"))
        with replacing(files[-1]) as partial, rc_context({"svg.hashsalt": "sam_hf"}):
            # "tight", since a title may be wider than the figure.
            figure.savefig(partial, format=suffix, dpi=150, metadata=metadata, bbox_inches="tight")
    return files
