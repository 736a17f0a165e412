"""Pictures of landscapes and of sharpness over a training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..options_file import replacing
from .landscape import Landscape

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind people tell apart; the lines differ in style too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLES = ("-", "--", "-.", ":")
LEVELS = 15


def plot_landscapes(
    landscapes: Sequence[Landscape], path: Path, *, title: str | None = None
) -> list[Path]:
    """Draw one or several landscapes on one scale: lines in one frame, planes side by side.

    Args:
        landscapes: all along one axis, or all along two.
        path: without an ending; a PNG and an SVG are written.

    Returns:
        The files.

    Raises:
        ValueError: there is none, or their numbers of axes differ.
    """
    kinds = {len(landscape.coordinates) for landscape in landscapes}
    if len(kinds) != 1:
        raise ValueError(
            f"landscapes along {sorted(kinds)} axes do not share a picture. Allowed: one or more, "
            "all along one axis or all along two"
        )
    return (_plot_lines if kinds == {1} else _plot_planes)(landscapes, path, title)


def _plot_lines(landscapes: Sequence[Landscape], path: Path, title: str | None) -> list[Path]:
    figure = _figure(6.4, 4.2)
    axes = figure.add_subplot()
    for number, landscape in enumerate(landscapes):
        axes.plot(
            landscape.coordinates[0],
            landscape.losses.tolist(),
            color=COLOURS[number % len(COLOURS)],
            linestyle=STYLES[number % len(STYLES)],
            linewidth=2,
            label=landscape.name,
        )
    joins = any("distance" in landscape.facts for landscape in landscapes)
    for mark in (0.0, 1.0) if joins else (0.0,):
        axes.axvline(mark, color="0.75", linewidth=1, zorder=0)
    axes.set_xlabel(landscapes[0].labels[0] if _same_labels(landscapes) else "along the direction")
    axes.set_ylabel("loss")
    low, high = _span(landscapes)
    if low > 0 and high / low > 50:
        axes.set_yscale("log")
    axes.set_title(title or _title(landscapes), fontsize=10)
    if len(landscapes) > 1:
        axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return _save(figure, path)


def _plot_planes(landscapes: Sequence[Landscape], path: Path, title: str | None) -> list[Path]:
    from matplotlib.colors import BoundaryNorm

    count = len(landscapes)
    figure = _figure(1.6 + 4.0 * count, 4.6)
    all_axes = figure.subplots(1, count, squeeze=False, sharey=_same_labels(landscapes))[0]
    low, high = _span(landscapes)
    levels = _levels(low, high)
    norm = BoundaryNorm(levels, 256, extend="max")
    filled: Any = None
    for landscape, axes in zip(landscapes, all_axes, strict=True):
        xs, ys = landscape.coordinates
        # What is infinite is drawn as the highest.
        losses = landscape.losses.T.clamp(max=levels[-1] * 1.0001).clamp(min=levels[0]).numpy()
        filled = axes.contourf(
            xs, ys, losses, levels=levels, cmap="cividis", norm=norm, extend="max"
        )
        lines = axes.contour(xs, ys, losses, levels=levels, colors="white", linewidths=0.5)
        axes.clabel(lines, levels[::2], fontsize=7, fmt=lambda value: f"{value:.3g}")
        axes.plot(0, 0, "o", color="#D55E00", markeredgecolor="white", markersize=7)
        axes.set_title(
            f"{landscape.name}\nloss at the dot {landscape.facts['loss_at_weights']:.3g}",
            fontsize=10,
        )
        axes.set_xlabel(landscape.labels[0])
        axes.locator_params(nbins=5)
        axes.set_aspect("equal" if _is_square(xs, ys) else "auto")
    all_axes[0].set_ylabel(landscapes[0].labels[1])
    if not _same_labels(landscapes):
        for landscape, axes in zip(landscapes[1:], all_axes[1:], strict=True):
            axes.set_ylabel(landscape.labels[1])
    bar = figure.colorbar(filled, ax=list(all_axes), label="loss (one scale)", shrink=0.85)
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    figure.suptitle(title or _title(landscapes), fontsize=10)
    return _save(figure, path)


def plot_history(
    history: Mapping[str, Sequence[tuple[int, float]]], path: Path, *, title: str | None = None
) -> list[Path]:
    """Draw measures over a training: a frame for each, all over the updates.

    Args:
        history: for each measure pairs of update and value.
        path: without an ending; a PNG and an SVG are written.

    Raises:
        ValueError: there is no measure.
    """
    if not history:
        raise ValueError("history is empty: there is nothing to draw")
    columns = min(len(history), 3)
    rows = math.ceil(len(history) / columns)
    figure = _figure(3.6 * columns, 2.8 * rows + 0.4)
    all_axes = figure.subplots(rows, columns, squeeze=False)
    for axes in all_axes.flat[len(history) :]:
        axes.set_visible(False)
    for (name, pairs), axes in zip(history.items(), all_axes.flat, strict=False):
        axes.plot(*zip(*pairs, strict=True), "o-", color=COLOURS[0], markersize=4)
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("updates")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4), useOffset=False)
        axes.spines[["top", "right"]].set_visible(False)
    if title:
        figure.suptitle(title, fontsize=10)
    return _save(figure, path)


def _figure(width: float, height: float) -> Figure:
    # Without pyplot: its global state, and the windows that it may open, are the user's.
    from matplotlib.figure import Figure as Canvas

    return Canvas(figsize=(width, height), layout="constrained")


def _save(figure: Figure, path: Path) -> list[Path]:
    from matplotlib import rc_context

    path.parent.mkdir(parents=True, exist_ok=True)
    files = [path.with_name(f"{path.name}.{ending}") for ending in ("png", "svg")]
    for file in files:
        # Without the date, so that the same numbers make the same file.
        kind = file.suffix[1:]
        facts = {"Date": None} if kind == "svg" else {}
        with replacing(file) as partial, rc_context({"svg.hashsalt": "sam_hf"}):
            figure.savefig(partial, format=kind, dpi=150, metadata=facts)
    return files


def _span(landscapes: Sequence[Landscape]) -> tuple[float, float]:
    """The lowest and the highest finite loss of all."""
    losses = torch.cat([landscape.losses.flatten() for landscape in landscapes])
    finite = losses[losses.isfinite()]
    if not len(finite):
        raise ValueError("no point of the landscape has a finite loss: take a smaller span")
    return float(finite.min()), float(finite.max())


def _levels(low: float, high: float) -> list[float]:
    """Levels in a geometric progression above 0, else in an arithmetic one."""
    if high <= low:
        high = low + max(abs(low), 1e-12) * 1e-3
    steps = torch.linspace(0, 1, LEVELS, dtype=torch.float64)
    if low > 0:
        low = max(low, high * 1e-4)
        return [float(x) for x in low * (high / low) ** steps]
    return [float(x) for x in low + (high - low) * steps]


def _title(landscapes: Sequence[Landscape]) -> str:
    examples = {landscape.facts.get("examples") for landscape in landscapes}
    return f"Loss on {examples.pop()} examples around the weights" if len(examples) == 1 else "Loss"


def _same_labels(landscapes: Sequence[Landscape]) -> bool:
    return all(landscape.labels == landscapes[0].labels for landscape in landscapes)


def _is_square(xs: Sequence[float], ys: Sequence[float]) -> bool:
    return math.isclose(xs[-1] - xs[0], ys[-1] - ys[0])
